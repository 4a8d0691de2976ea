"""Make whole models in every variant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vps
from benchmarks import baselines, checks, shapes, variants
from benchmarks.common import Variant
from vps import VPSConfig, reference

PLAIN = "plain"
PROMPT = ", scope prompt"
COMPARED_LAYERS = 16
CLEAR = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
SMOLLM2 = "SmolLM2-135M"


def random_model(
    name: str, dtype: torch.dtype, device: str, layers: int | None = None, vocabulary: int = 0
) -> Any:
    """Make a causal language model of these sizes with random weights; ``layers`` of its blocks.

    The architecture is Qwen2's, without the biases of q, k and v where the model is no Qwen.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = shapes.MODELS[name]
    qwen = name.startswith("Qwen")
    config = (Qwen2Config if qwen else LlamaConfig)(
        vocab_size=vocabulary or sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=layers or sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        tie_word_embeddings=True,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = (Qwen2ForCausalLM if qwen else LlamaForCausalLM)(config)
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            checks.randomize(layer.weight)
    return model


def smollm2(folder: Path) -> Any:
    """Load SmolLM2-135M in float32 from the folder that ``make`` downloads it to."""
    from vps.model.loading import load_model

    files = sorted(folder.glob("*.gguf"))
    model, _ = load_model(str(files[0] if files else folder))
    return model.requires_grad_(False)


class Variants:
    """Hold a model in every variant that fits in memory; ``runs`` gives each a call.

    Sharpened forms share one patched copy, whose weights are those of the plain model.
    """

    def __init__(self, plain: nn.Module, config: VPSConfig = variants.CONFIG) -> None:
        self.config = config
        self.plain = plain
        self.sharpened = shared_copy(plain)
        vps.patch(self.sharpened, config)
        self.prompted = shared_copy(plain)
        vps.patch(self.prompted, config.replace(scope="prompt"))
        layer = next(m for m in plain.modules() if isinstance(m, nn.Linear))
        self.lora_name = f"peft lora r={baselines.rank(config, layer)}"
        self.lora: nn.Module | str = "not here: peft is not installed"
        try:
            self.lora = baselines.lora_in_place(shared_copy(plain), baselines.rank(config, layer))
        except ImportError:
            pass
        self.author = baselines.author_in_place(shared_copy(plain), config)

    def runs(
        self,
        run: Callable[[nn.Module], object],
        probe: Tensor,
        wrong: dict[str, str],
        author: str | None = None,
        prompted: bool = False,
    ) -> dict[str, Variant | str]:
        """Return ``run`` for every variant, or the reason why one is left out.

        ``wrong`` is what :meth:`check` found; ``author`` why the published form is left out;
        ``prompted`` adds the sharpened forms under ``scope="prompt"``.
        """
        found: dict[str, Callable[[], object] | str] = {PLAIN: lambda: run(self.plain)}
        lora = self.lora
        found[self.lora_name] = lora if isinstance(lora, str) else lambda: run(lora)
        for name in variants.BACKENDS:
            # Inside a model the CUDA backend decodes what it takes and leaves the rest to Triton.
            reason = variants.why_not(name, probe)
            found[f"vps {name}"] = reason or self._by(name, run, self.sharpened)
            if prompted:
                found[f"vps {name}{PROMPT}"] = reason or self._by(name, run, self.prompted)
        found[variants.AUTHOR] = author or (lambda: run(self.author))
        return {
            name: wrong.get(name) or (call if isinstance(call, str) else Variant(call))
            for name, call in found.items()
        }

    def _by(
        self, name: str, run: Callable[[nn.Module], object], model: nn.Module
    ) -> Callable[[], object]:
        def call() -> object:
            with vps.backend(name):
                return run(model)

        return call

    def check(self, call: Callable[[nn.Module], object], dtype: torch.dtype) -> dict[str, str]:
        """Return what is wrong, by variant; nothing when all is right.

        Disabled, the patched model must give the plain model's bits. Through a whole model one
        choice between near-ties moves every later one, so each variant is compared layer by layer
        with float64, on the inputs that it meets, in some layers spread over the model.
        """
        wrong = {}
        with vps.disabled(self.sharpened):
            if not torch.equal(call(self.sharpened), call(self.plain)):
                wrong[PLAIN] = "wrong: disabled, the patched model is not bit-identical"
        probe = torch.empty(1, 1, 0, device=next(self.plain.parameters()).device)
        for name in variants.BACKENDS:
            if variants.why_not(name, probe) is None:
                with vps.backend(name):
                    reason = self._why_wrong(self.sharpened, call, dtype)
                if reason is not None:
                    wrong[f"vps {name}"] = wrong[f"vps {name}{PROMPT}"] = reason
        for name, model in ((variants.AUTHOR, self.author), (self.lora_name, self.lora)):
            if isinstance(model, nn.Module) and (reason := self._why_wrong(model, call, dtype)):
                wrong[name] = reason
        return wrong

    def _why_wrong(
        self, model: nn.Module, call: Callable[[nn.Module], object], dtype: torch.dtype
    ) -> str | None:
        errors: list[float] = []

        def compare(layer: Any, arguments: tuple[Tensor], y: Tensor) -> None:
            right = self._right(layer, arguments[0].double(), CLEAR[dtype])
            if right is not None:
                errors.append(float((y.double() - right).norm() / right.norm()))

        layers = [m for m in model.modules() if _is_variant(m)]
        every = max(1, len(layers) // COMPARED_LAYERS)
        hooks = [layer.register_forward_hook(compare) for layer in layers[::every]]
        try:
            call(model)
        finally:
            for hook in hooks:
                hook.remove()
        if not errors:
            return "wrong: no layer has a selection clear enough to compare"
        bound = checks.TOLERANCE[dtype]
        return None if max(errors) <= bound else f"wrong: a layer's error is {max(errors):.1e}"

    def _right(self, layer: Any, x: Tensor, margin: float) -> Tensor | None:
        """Compute a layer in float64; ``None`` where rounding could change the selection."""
        if hasattr(layer, "lora_A"):
            y = layer.base_layer.weight.double()
            A, B = (getattr(layer, f"lora_{side}")["default"].weight.double() for side in "AB")
            y = x @ (y + (layer.scaling["default"] * B) @ A).T
            return y if layer.base_layer.bias is None else y + layer.base_layer.bias.double()
        base = layer.base if isinstance(layer, baselines.AuthorStyle) else layer
        bias = None if base.bias is None else base.bias.double()
        if isinstance(layer, vps.VPSLinear) and len(layer.deciding()) == 2:
            return self._right_of_two(layer, x, margin)
        right = reference.vps_linear(x, base.weight.double(), bias, config=self.config)
        clear = all(checks.is_clear(group, self.config, margin) for group in right.groups)
        return right.y if clear else None

    def _right_of_two(self, layer: vps.VPSLinear, x: Tensor, margin: float) -> Tensor | None:
        """Compute a query or key layer that is coupled with the other in float64."""
        pair = layer.coupling
        assert pair is not None
        both = [
            reference.Projection(
                one.weight.double(), None if one.bias is None else one.bias.double()
            )
            for one in (pair.query, pair.key)
        ]
        heads, kv_heads = pair.heads, pair.kv_heads
        results = reference.coupled_vps_linear(
            x, *both, heads=heads, kv_heads=kv_heads, config=self.config
        )
        for query, key in zip(*(result.groups for result in results), strict=True):
            per_head = query.s_out.view(kv_heads, heads // kv_heads, -1)
            pairs = replace(key, s_out=per_head.sum(1).flatten() * key.s_out)
            best = per_head.sort(dim=1, descending=True).values
            chosen = key.I_out[: checks.most(self.config)]
            if heads > kv_heads:
                near = (best[:, 1] > (1 - margin) * best[:, 0]).flatten()[chosen]
                if bool(near.any()):
                    return None
            if not checks.is_clear(pairs, self.config, margin):
                return None
        return results[0 if layer is pair.query else 1].y


def _is_variant(module: nn.Module) -> bool:
    return isinstance(module, vps.VPSLinear | baselines.AuthorStyle) or hasattr(module, "lora_A")


def shared_copy(model: nn.Module) -> Any:
    """Copy the modules, sharing all parameters and buffers."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)
