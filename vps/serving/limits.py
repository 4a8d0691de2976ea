"""Read a serving engine's settings, and refuse by name and remedy what cannot be sharpened.

``VPS_CONFIG`` holds the settings, as a JSON file or JSON text. A request's tokens must not depend
on what else is in the batch. With ``scope="token"`` they cannot; ``scope="prompt"`` needs every
prompt in one piece, ``scope="sequence"`` also once; ``scope="batch"`` is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vps.config import VPSConfig
from vps.model.settings import FORMAT
from vps.reading import parse_json, read_text

SCHEDULER = "vps.serving.scheduler.Scheduler"
VARIABLE = "VPS_CONFIG"


def config_from_environment() -> VPSConfig:
    """Return the config that ``VPS_CONFIG`` names, or the default config where it is unset.

    The variable holds the path of a JSON file, or the JSON object itself (``{"gamma": 0.1, …}``),
    as :meth:`VPSConfig.to_json` or :func:`vps.save` writes it.

    Raises:
        ValueError: no such file, not JSON, an unknown field, a bad value, or a value that a server
            cannot compute with; the message starts with the variable and the origin of the text.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return VPSConfig()
    text, origin = value, VARIABLE
    if not value.startswith("{"):
        origin = f"{VARIABLE}={value}"
        try:
            text = read_text(Path(value).expanduser())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{origin}: expected the path of a JSON file, or a JSON object: {error}"
            ) from None
    try:
        config = VPSConfig.from_json(_config_text(text))
        if config.scope == "batch":
            raise ValueError(
                "scope='batch' would let the requests of a batch change each other's tokens; "
                "expected 'token', 'sequence' or 'prompt'"
            )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{origin}: {error}") from None
    return config


def _config_text(text: str) -> str:
    """Return the config alone, where ``text`` is what :func:`vps.save` wrote."""
    try:
        values = parse_json(text)
    except ValueError:
        return text  # for VPSConfig to refuse
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return text
    if values.get("entropy") is not None or values.get("outcomes"):
        raise ValueError(
            "it holds an entropy or outcomes of a refinement, which a server has no place for; "
            "save the model after vps.policy_state(model).reset()"
        )
    return json.dumps(values.get("config"))


def check(engine: Any, config: VPSConfig, keeps_prompts_whole: bool) -> None:
    """Refuse an engine whose outputs would differ from the sharpened model's.

    Args:
        engine: vLLM's ``VllmConfig``.
        config: the settings.
        keeps_prompts_whole: whether the engine's scheduler is :data:`SCHEDULER`.

    Raises:
        ValueError: the engine cannot be sharpened; the message says why, and what to do.
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
    if config.scope != "token":
        found = _splits(engine, config.scope)
        if not keeps_prompts_whole:
            found.append(
                f"the scheduler may split or cache prompts: add --scheduler-cls {SCHEDULER}, or "
                "set scope to 'token'"
            )
        reasons += [f"scope='{config.scope}': {reason}" for reason in found]
    if reasons:
        raise ValueError(f"vps cannot sharpen this engine: {'; '.join(reasons)}")


def _splits(engine: Any, scope: str) -> list[str]:
    """Return why a layer may not see whole prompts and, after them, the tokens of each request."""
    model, parallel, drafts = engine.model_config, engine.parallel_config, engine.speculative_config
    reasons = []
    if scope == "sequence" and drafts is not None:
        reasons.append("speculative decoding computes several tokens of an answer at once")
    elif drafts is not None and drafts.method != "ngram":
        reasons.append(
            f"speculative decoding by {drafts.method!r} is untested: expected the method 'ngram'"
        )
    if scope == "prompt" and engine.use_v2_model_runner:
        reasons.append(
            "Model Runner V2 does not say whose tokens a batch has: set the variable "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )
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
    """Return how many requests, at most ``wanted``, can run at once without preemption.

    Args:
        concurrency: how many requests of the greatest length fit into the cache of keys and values,
            its unused block 0 included; ``None`` for a model without such a cache.
        wanted: at least 1.
    """
    if concurrency is None:
        return wanted
    whole = int(concurrency)
    return max(1, min(wanted, whole if concurrency > whole else whole - 1))
