"""Measure running text: the loss of given prose, and greedy answers, several rows a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.reproduce.scoring import batches
from vps import masking
from vps.model.patching import policy_state

BATCH_TOKENS = 512  # logits of more would take memory for no speed
BATCH_ROWS = 25


@torch.no_grad()
def losses(model: Any, texts: Sequence[Sequence[int]], prompt: int) -> list[float]:
    """Return the mean nll of each text's tokens after its first ``prompt``, in nats a token.

    The first tokens are the prompt under ``scope="prompt"``, so every scope predicts the same.

    Args:
        model: a causal language model of transformers.
        texts: token ids, all of one length.
        prompt: at least 1.
    """
    found: list[float] = [0.0] * len(texts)
    for batch in batches([len(text) for text in texts], BATCH_TOKENS):
        ids = torch.tensor([list(texts[index]) for index in batch], device=model.device)
        marks = (torch.arange(ids.shape[1], device=ids.device) < prompt).expand(ids.shape)
        with masking.prompt(marks):
            logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - prompt + 1).logits
        lost = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, prompt:].flatten(), reduction="none"
        )
        for index, own in zip(batch, lost.view(len(batch), -1).mean(1).tolist(), strict=True):
            found[index] = own
    return found


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[str]:
    """Return the first line of a greedy continuation of each prompt.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        prompts: in any order; those of like length share a call.
        new_tokens: most new tokens of each.
    """
    policy = policy_state(model)
    found = [""] * len(prompts)
    encoded = tokenizer(list(prompts))["input_ids"]
    lengths = [len(each) for each in encoded]
    end = model.generation_config.eos_token_id
    order = sorted(range(len(prompts)), key=lambda index: (lengths[index], index))
    for start in range(0, len(order), BATCH_ROWS):
        batch = order[start : start + BATCH_ROWS]
        longest = max(lengths[index] for index in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(batch):
            ids[place, longest - lengths[index] :] = torch.tensor(encoded[index])
            mask[place, longest - lengths[index] :] = 1
        policy.reset()
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=end if isinstance(end, int) else 0,
        )
        for index, tail in zip(batch, output[:, longest:].tolist(), strict=True):
            text = tokenizer.decode(tail, skip_special_tokens=True)
            found[index] = text.strip().partition("\n")[0]
    return found
