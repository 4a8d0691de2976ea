"""List layer shapes of published models, and which of them are run where."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Model(NamedTuple):
    """Hold the sizes of a decoder that its linear layers follow from."""

    hidden: int
    heads: int
    kv_heads: int
    head: int  # features of one head
    intermediate: int
    layers: int
    vocabulary: int

    def projections(self) -> dict[str, tuple[int, int]]:
        """Return ``(d_in, d_out)`` of the seven linear layers of a block, in the order they run."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


MODELS = {
    "SmolLM2-135M": Model(576, 9, 3, 64, 1536, 30, 49152),
    "Qwen2.5-0.5B": Model(896, 14, 2, 64, 4864, 24, 151936),
    "Qwen2.5-1.5B": Model(1536, 12, 2, 128, 8960, 28, 151936),
    "Qwen2.5-7B": Model(3584, 28, 4, 128, 18944, 28, 152064),
    "Qwen2.5-72B": Model(8192, 64, 8, 128, 29568, 80, 152064),
    "Llama-3-8B": Model(4096, 32, 8, 128, 14336, 32, 128256),
    "Llama-3-70B": Model(8192, 64, 8, 128, 28672, 80, 128256),
}

SINGLE = {
    "cpu": ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (896, 4864)),
    "cuda": ((1536, 8960), (3584, 3584), (3584, 18944), (18944, 3584), (8192, 28672)),
}
# (sequences, tokens of each)
TOKENS = {"cpu": ((1, 1), (1, 32), (1, 256)), "cuda": ((1, 1), (16, 1), (1, 2048))}
MORE_TOKENS = {  # of the models that the targets name, which come first
    "Qwen2.5-7B": ((1, 1), (1, 2048), (16, 1), (1, 512), (1, 8192)),
    "Llama-3-70B": ((1, 1), (1, 2048), (16, 1), (1, 512), (1, 8192)),
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
WEIGHT_BYTES = {"cpu": 128 * 2**20, "cuda": 256 * 2**20}  # four times the last-level cache
ON_A_CPU = ("SmolLM2-135M", "Qwen2.5-0.5B", "Qwen2.5-1.5B")


def title(dtype: torch.dtype) -> str:
    """Return ``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
