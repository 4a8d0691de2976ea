"""Plug into vLLM as its "quantization method" ``vps``.

``VPS_CONFIG=settings.json vllm serve MODEL --quantization vps``. vLLM asks the method how each
linear layer multiplies; the weights stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vps.algorithm import policy
from vps.config import VPSConfig
from vps.model.matching import select_names
from vps.serving import limits, requests

logger = init_logger("vllm.plugins.vps")  # shown like vLLM's own

NAME = "vps"
# Attention itself reads these weights, beside the product that is sharpened.
ABSORBED = ("kv_b_proj",)


def register() -> None:
    """Register the method: the entry point in ``vllm.general_plugins``, called in each process."""
    register_quantization_config(NAME)(Sharpening)


class Sharpening(QuantizationConfig):
    """Which layers of a model are sharpened, and how.

    vLLM makes it where it reads the model's config, and sends it to its workers.

    Raises:
        ValueError: settings that cannot be read or used (:func:`limits.config_from_environment`).
    """

    def __init__(self, config: VPSConfig | None = None) -> None:
        super().__init__()
        self.config = limits.config_from_environment() if config is None else config
        self.sharpened: list[str] = []
        self.others: list[str] = []
        self.coupled: list[str] = []
        self.uncoupled: dict[str, str] = {}
        self.reported = False

    def get_name(self) -> str:
        """Return ``"vps"``."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return every dtype that vLLM computes with."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0, which admits any GPU."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no name, for the settings are no part of a model's files."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Sharpening:
        """Refuse a model whose own files call it quantized: its weights are no matrices."""
        method = config.get("quant_method", "an unknown method")
        raise ValueError(
            f"vps cannot sharpen this model: its weights are quantized ({method}), and vLLM takes "
            "one quantization method for a model"
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how ``layer`` multiplies, or ``None`` for a module that is no linear layer.

        Raises:
            ValueError: the engine cannot be sharpened, or a layer that the settings ask for.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from vps.serving import linear_method

        if isinstance(layer, ParallelLMHead) and select_names([prefix], prefix, self.config):
            raise ValueError(
                f"vps cannot sharpen {prefix}: it is a {type(layer).__name__}, the output head, "
                "which vLLM computes for the last token of a request alone"
            )
        if isinstance(layer, RoutedExperts):
            logger.warning("vps: not sharpened: %s: its experts are one fused tensor", prefix)
        if not isinstance(layer, LinearBase):
            return None
        if policy.settings(self.config, False, layer.input_size, layer.output_size) is None:
            return UnquantizedLinearMethod()  # γ is 0
        engine = get_current_vllm_config()
        limits.check(engine, self.config, linear_method.keeps_prompts_whole(engine))
        self._tell_compiler(engine)
        if self.config.scope == "prompt":
            linear_method.follow_requests()
        if prefix.rpartition(".")[2] in ABSORBED and select_names([prefix], None, self.config):
            raise ValueError(
                f"vps cannot sharpen {prefix}: it is a {type(layer).__name__} whose weight vLLM "
                "also multiplies into the attention"
            )
        return linear_method.Sharpened(self, prefix)

    def fuse(self, layer: Any, prefix: str, sizes: list[int]) -> requests.Fused | None:
        """Return how the layer named ``prefix``, whose parts have these sizes, is sharpened."""
        fused = requests.split(prefix, sizes, self.packed_modules_mapping, self.config)
        if fused is None:
            self.others.append(prefix)
            return None
        self.sharpened.append(prefix)
        coupling = self.config.couples
        if coupling and hasattr(layer, "num_kv_heads"):
            coupled = requests.couple(fused, layer.num_heads, layer.num_kv_heads)
            if isinstance(coupled, requests.Fused):
                self.coupled.append(prefix)
                return coupled
            if len(fused.parts) != 3 or any(part.sharpened for part in fused.parts[:2]):
                self.uncoupled[prefix] = coupled
        return fused

    def report(self) -> None:
        """Log once, when the model is complete, what is sharpened.

        Raises:
            ValueError: no layer is sharpened.
        """
        if self.reported:
            return
        self.reported = True
        if not self.sharpened:
            kinds = sorted({name.rpartition(".")[2] for name in self.others})
            raise ValueError(
                f"vps: target_modules {self.config.target_modules!r} (exclude_modules "
                f"{self.config.exclude_modules!r}, layers_to_transform "
                f"{self.config.layers_to_transform!r}) match none of the model's "
                f"{len(self.others)} linear layers, which vLLM names {', '.join(kinds)}"
            )
        logger.info(
            "vps: %d linear layers sharpened, query and key coupled in %d; %d left plain",
            len(self.sharpened),
            len(self.coupled),
            len(self.others),
        )
        if self.uncoupled:
            listed = "; ".join(f"{name}: {why}" for name, why in list(self.uncoupled.items())[:3])
            logger.warning("vps: q and k select separately in %d: %s", len(self.uncoupled), listed)

    def _tell_compiler(self, engine: Any) -> None:
        """Add the settings to the key of vLLM's cache of compiled graphs."""
        if isinstance(engine.additional_config, dict):
            engine.additional_config[NAME] = self.config.to_json()
