"""What a serving engine cannot be sharpened with: refused when it starts, by name and remedy.

A request's tokens must not depend on what else is in the batch. With ``scope="token"`` they
cannot; ``scope="sequence"`` needs every prompt in one piece, once.
"""

from __future__ import annotations

from typing import Any

from vps.config import VPSConfig

SCHEDULER = "vps.serving.scheduler.Scheduler"


def check(engine: Any, config: VPSConfig, keeps_prompts_whole: bool) -> None:
    """Refuse an engine whose outputs would not be those of the sharpened model.

    Args:
        engine: vLLM's ``VllmConfig``.
        config: the settings.
        keeps_prompts_whole: whether the engine's scheduler is :data:`SCHEDULER`.

    Raises:
        ValueError: naming what it is about the engine, and what to do.
    """
    parallel = engine.parallel_config
    reasons = []
    if parallel.tensor_parallel_size > 1:
        reasons.append(
            f"its layers would be sharded over {parallel.tensor_parallel_size} devices "
            "(--tensor-parallel-size): expected 1"
        )
    if parallel.pipeline_parallel_size > 1:
        reasons.append(
            "its blocks would be spread over devices (--pipeline-parallel-size), which is "
            "untested: expected 1"
        )
    if engine.lora_config is not None:
        reasons.append("adapters (--enable-lora) would be added to sharpened outputs unsharpened")
    if config.scope == "sequence":
        reasons += [f"scope='sequence': {reason}" for reason in _splits(engine)]
        if not keeps_prompts_whole:
            reasons.append(
                "scope='sequence': the scheduler may split, cache or repeat prompts: add "
                f"--scheduler-cls {SCHEDULER}, or set scope to 'token'"
            )
    if reasons:
        raise ValueError(f"vps cannot sharpen this engine: {'; '.join(reasons)}")


def _splits(engine: Any) -> list[str]:
    """Why the tokens that a layer sees may not be whole prompts and single generated tokens."""
    model, parallel = engine.model_config, engine.parallel_config
    reasons = []
    if engine.speculative_config is not None:
        reasons.append("speculative decoding computes several tokens of an answer at once")
    if engine.kv_transfer_config is not None:
        reasons.append("keys and values from elsewhere (--kv-transfer-config) stand for tokens")
    if parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        reasons.append("context parallelism spreads a prompt over devices")
    if parallel.use_ubatching:
        reasons.append("dual-batch overlap (--enable-dbo) splits a batch")
    if model.is_multimodal_model or model.is_encoder_decoder or model.runner_type != "generate":
        reasons.append("only text generation by a decoder is supported")
    mode = engine.compilation_config.cudagraph_mode
    if mode is not None and mode.name != "NONE":
        reasons.append("a CUDA graph would repeat one grouping of tokens: add --enforce-eager")
    return reasons


def running_requests(concurrency: float | None, wanted: int) -> int:
    """How many requests may run at once with no need to preempt one, at most ``wanted``.

    Args:
        concurrency: requests of the greatest length whose keys and values fit at once, block 0
            included, which stays unused; ``None`` for a model without them.
        wanted: at least 1.
    """
    if concurrency is None:
        return wanted
    whole = int(concurrency)
    return max(1, min(wanted, whole if concurrency > whole else whole - 1))
