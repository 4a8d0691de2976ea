"""Schedule every prompt whole, as ``scope="sequence"`` and ``"prompt"`` need.

No prompt is split over steps (chunked prefill) or taken from the cache of another request (prefix
caching). With ``"sequence"`` none is computed again together with its answer (preemption): only as
many requests run at once as surely fit. With ``"prompt"`` that changes no answer.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler as Base

from vps.serving.limits import running_requests
from vps.serving.plugin import Sharpening

logger = init_logger("vllm.plugins.vps")


class Scheduler(Base):
    """vLLM's scheduler, restricted; ``--scheduler-cls vps.serving.scheduler.Scheduler`` chooses it.

    Raises:
        ValueError: a prompt may be longer than one step.
    """

    def __init__(self, vllm_config: Any, *arguments: Any, **options: Any) -> None:
        scheduling, cache = vllm_config.scheduler_config, vllm_config.cache_config
        longest = vllm_config.model_config.max_model_len
        step = scheduling.max_num_scheduled_tokens or scheduling.max_num_batched_tokens
        if step < longest:
            raise ValueError(
                f"vps: a prompt of up to {longest} tokens (--max-model-len) must be computed in "
                f"one step, of {step} tokens (--max-num-batched-tokens): raise the one or lower "
                "the other"
            )
        scheduling.enable_chunked_prefill = False
        scheduling.long_prefill_token_threshold = 0
        cache.enable_prefix_caching = False
        super().__init__(vllm_config, *arguments, **options)
        method = vllm_config.quant_config
        self.repeats = isinstance(method, Sharpening) and method.config.scope == "prompt"
        if self.repeats:
            return
        wanted = scheduling.max_num_active_seqs or scheduling.max_num_seqs
        self.max_num_active_reqs = running_requests(cache.kv_cache_max_concurrency, wanted)
        if self.max_num_active_reqs < wanted:
            logger.warning(
                "vps: %d requests run at once instead of %d, because no more of %d tokens fit "
                "into the cache of keys and values; the others wait",
                self.max_num_active_reqs,
                wanted,
                longest,
            )

    def _preempt_request(self, *arguments: Any, **options: Any) -> None:
        if self.repeats:
            return super()._preempt_request(*arguments, **options)
        raise RuntimeError(
            "vps: scope='sequence' cannot stop a running request and compute it again: its answer "
            "would become part of the prompt"
        )
