"""Generate text, tell its entropy to the policy, and compare a model with its plain self.

``ℋ = −Σ p log p`` of the next token, in nats, is what the policy reads (SPEC §5).

Gradients are off, but not by torch's inference mode: tensors of that mode count no versions, so
layers that read the same x could share nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vps import masking
from vps.backends import dispatch
from vps.model.patching import disabled, shared_state

# The settings by which transformers chooses another way to decode, to read the prompt or to return
# results. A model's own generation_config may hold any of them. Its other settings, such as stop
# strings and penalties, hold.
_ONE_SEQUENCE: dict[str, Any] = {
    "num_beams": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "is_assistant": None,
    "token_healing": None,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
}
# The settings that cut off a part of the distribution.
_WHOLE_DISTRIBUTION: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


@dataclass(frozen=True)
class Generation:
    """One answer: its text, token ids ``[n]`` and wall-clock seconds."""

    text: str
    tokens: list[int]
    seconds: float


def encode(tokenizer: Any, prompt: str, chat: bool = True) -> dict[str, Tensor]:
    """Return token ids and mask ``[1, T]`` of a prompt, in the chat template if there is one.

    Args:
        tokenizer: a tokenizer of transformers.
        prompt: the text.
        chat: whether to use the chat template.

    Raises:
        TypeError: the tokenizer cannot be called.
        ValueError: the prompt has no token.
    """
    if not callable(tokenizer):
        raise TypeError(
            f"encode: tokenizer must be a tokenizer of transformers, got {type(tokenizer).__name__}"
        )
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"]
    if ids.numel() == 0:
        raise ValueError("encode: the prompt is empty, expected at least one token")
    mask = encoded["attention_mask"] if "attention_mask" in encoded else torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask}


class _Streamer:
    """A streamer of transformers that counts new tokens and shows the text as it grows."""

    def __init__(
        self, tokenizer: Any, advance: Callable[[], None] | None, show: Callable[[str], None] | None
    ) -> None:
        self._advance = advance
        self._text = None if show is None else GrowingText(tokenizer, show)
        self._in_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt first, then each new token, from ``model.generate``."""
        if not self._in_prompt:
            if self._text is not None:
                self._text.add(value.reshape(-1).tolist())
            if self._advance is not None:
                self._advance()
        self._in_prompt = False

    def end(self) -> None:
        """Show what was held back."""
        if self._text is not None:
            self._text.end()


class GrowingText:
    """The text of tokens that come one by one, shown in pieces that later tokens do not change.

    The pieces together are the text of all tokens. What may still change is held back: the bytes of
    an unfinished letter, and the last letters where the tokenizer tidies spaces.

    Args:
        tokenizer: decodes the tokens.
        show: called with each piece.
    """

    TIDIED = 8  # letters; a rule of the tidying reads four
    REST = 9  # times as long as decoding took, until it is done again

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._held = self.TIDIED if getattr(tokenizer, "clean_up_tokenization_spaces", 0) else 0
        self._tokens: list[int] = []
        self._shown = ""
        self._next = 0.0

    def add(self, tokens: list[int]) -> None:
        """Take tokens, and show what they settle; decoding takes a tenth of the time at most."""
        self._tokens += tokens
        start = time.perf_counter()
        if start < self._next:
            return
        text = self._decoded().rstrip("\ufffd")
        self._give(text[: max(0, len(text) - self._held)])
        end = time.perf_counter()
        self._next = end + self.REST * (end - start)

    def end(self) -> None:
        """Show the rest."""
        self._give(self._decoded())

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return text

    def _give(self, text: str) -> None:
        if len(text) > len(self._shown) and text.startswith(self._shown):
            piece, self._shown = text[len(self._shown) :], text
            self._show(piece)


def generate(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    new_tokens: int,
    advance: Callable[[], None] | None = None,
    processors: Sequence[Any] = (),
    show: Callable[[str], None] | None = None,
) -> Generation:
    """Return the greedy continuation of at most ``new_tokens`` tokens.

    ``advance`` is called after each token, and ``show`` with each piece of the text, as soon as it
    is settled. ``processors`` are logits processors, such as
    :class:`vps.EntropyProcessor`. If the model's own ``generation_config`` asks for beams or
    another way to decode, this part of it is ignored; its stop strings, penalties and tokens hold.
    """
    options = _settings(model, tokenizer, _ONE_SEQUENCE)
    options |= {"do_sample": False, "num_return_sequences": 1}
    if advance is not None or show is not None:
        options["streamer"] = _Streamer(tokenizer, advance, show)
    start = time.perf_counter()
    (tokens,) = _continue(model, tokenizer, inputs, new_tokens, processors, options)
    seconds = time.perf_counter() - start
    return Generation(tokenizer.decode(tokens, skip_special_tokens=True), tokens, seconds)


def generate_together(
    model: Any, tokenizer: Any, inputs: Sequence[dict[str, Tensor]], new_tokens: int
) -> list[str]:
    """Return the greedy continuations of several prompts, padded on the left to one batch."""
    width = max(each["input_ids"].shape[1] for each in inputs)
    pad = tokenizer.pad_token_id
    fill = {"input_ids": tokenizer.eos_token_id if pad is None else pad, "attention_mask": 0}
    batch = {
        name: torch.cat(
            [
                nn.functional.pad(each[name], (width - each[name].shape[1], 0), value=value)
                for each in inputs
            ]
        )
        for name, value in fill.items()
    }
    options = _settings(model, tokenizer, _ONE_SEQUENCE)
    options |= {"do_sample": False, "num_return_sequences": 1}
    tails = _continue(model, tokenizer, batch, new_tokens, (), options)
    return [tokenizer.decode(tail, skip_special_tokens=True) for tail in tails]


def sample(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    new_tokens: int,
    count: int,
    *,
    seed: int,
    temperature: float = 0.7,
    processors: Sequence[Any] = (),
) -> list[str]:
    """Return ``count`` continuations drawn at ``temperature``, as text.

    The same seed draws the same numbers, so equal models give equal samples. The caller's random
    state stays as it was.
    """
    options = _settings(model, tokenizer, _ONE_SEQUENCE | _WHOLE_DISTRIBUTION)
    options |= {"do_sample": True, "temperature": temperature, "num_return_sequences": count}
    devices = [input_device(model)] if input_device(model).type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        tails = _continue(model, tokenizer, inputs, new_tokens, processors, options)
    return [tokenizer.decode(tail, skip_special_tokens=True) for tail in tails]


def _continue(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Tensor],
    new_tokens: int,
    processors: Sequence[Any],
    options: dict[str, Any],
) -> list[list[int]]:
    """Return the new token ids of each continuation that ``model.generate`` makes."""
    inputs = {name: tensor.to(input_device(model)) for name, tensor in inputs.items()}
    pad = tokenizer.pad_token_id
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            logits_processor=list(processors),
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
            **options,
        )
    tails: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
    return tails


def _settings(model: Any, tokenizer: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of ``wanted`` that the installed transformers knows.

    If the model has stop strings, the tokenizer is among them.
    """
    own = model.generation_config
    found = {name: value for name, value in wanted.items() if hasattr(own, name)}
    if own.stop_strings is not None:  # without any, transformers would hand it to the forward
        found["tokenizer"] = tokenizer
    return found


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Return the index of the first token that differs, or ``None`` when both are equal."""
    for position, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return position
    return None if len(a) == len(b) else min(len(a), len(b))


def changed_choices(model: Any, inputs: dict[str, Tensor], continuation: list[int]) -> float:
    """Return the share of next-token choices that sharpening changes along a continuation.

    The plain and the sharpened model see the same tokens, so every position is judged by itself.
    Under the sequence scope late tokens shape the selection for early ones; ``scope="token"`` and
    ``scope="prompt"`` give a causal figure.

    Args:
        model: a sharpened causal language model.
        inputs: the prompt, as :func:`encode` returns it.
        continuation: token ids that follow the prompt.
    """
    plain, sharpened = next_choices(model, inputs, continuation)
    return sum(a != b for a, b in zip(plain, sharpened, strict=True)) / len(plain)


def next_choices(
    model: Any, inputs: dict[str, Tensor], continuation: list[int]
) -> tuple[list[int], list[int]]:
    """Return the likeliest token at each place of a continuation, by the plain and the sharpened
    model, which both read the tokens before it."""
    prompt = inputs["input_ids"].to(input_device(model))
    tail = torch.tensor([continuation], dtype=prompt.dtype, device=prompt.device)
    ids = torch.cat([prompt, tail], dim=1)
    marks = (torch.arange(ids.shape[1], device=ids.device) < prompt.shape[1]).expand(ids.shape)
    with torch.no_grad(), masking.prompt(marks):
        sharpened = model(ids).logits[0, prompt.shape[1] - 1 : -1].argmax(-1)
        with disabled(model):
            plain = model(ids).logits[0, prompt.shape[1] - 1 : -1].argmax(-1)
    return plain.tolist(), sharpened.tolist()


def input_device(model: Any) -> torch.device:
    """Return the device for a model's inputs; an offloaded model takes them where it computes."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = module.__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", [hook]):
            found = getattr(one, "execution_device", None)
            if found is not None:
                return torch.device(found)
    return device


def token_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax over the last dim, in nats.

    On CUDA a Triton kernel reads the logits once, unless they are float64.

    Args:
        logits: ``[..., vocabulary]``, floating point; −inf excludes a token.

    Returns:
        ``[...]``, computed in float64 for float64 logits and in float32 for others. NaN where a
        row holds NaN or +inf, or nothing but −inf.

    Raises:
        TypeError: ``logits`` is no floating-point tensor.
        ValueError: the vocabulary is empty.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        came = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"token_entropy: logits must be a floating-point tensor, got {came}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"token_entropy: logits must be [..., V] with V > 0, got {tuple(logits.shape)}"
        )
    wide = logits.dtype == torch.float64  # the kernel gives float32
    if logits.is_cuda and not wide and dispatch.backends()["triton"] is None:
        from vps.kernels import entropy

        rows = logits.detach().reshape(-1, logits.shape[-1])
        return entropy.token_entropy(rows).view(logits.shape[:-1])
    values = logits.detach() if wide else logits.detach().float()
    return torch.special.entr(values.softmax(-1)).sum(-1)


class EntropyProcessor:
    """A logits processor for ``model.generate`` that tells the policy each step's entropy.

    The policy state of a model takes one number: the mean over all sequences or beams of the step,
    finished ones included, without those whose logits are not finite. A single sequence gets its
    own ℋ, and its tokens do not depend on others. The entropy of the last step stays set until
    ``vps.policy_state(model).reset()``.

    Use: ``model.generate(..., logits_processor=[vps.EntropyProcessor(model)])``. It runs after the
    processors that transformers adds for penalties, and before those for sampling.

    Args:
        model: a sharpened model.

    Raises:
        ValueError: no sharpened layer in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.state = shared_state(model, "EntropyProcessor")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the entropy of logits ``scores`` [B, vocabulary], and return them unchanged."""
        self.state.set_entropy(token_entropy(scores).nanmean().nan_to_num(0.0))
        return scores
