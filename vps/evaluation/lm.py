"""Show lm-evaluation-harness a sharpened model: padding, scope and batch size as they must be.

``HFLM`` pads the rows it scores with token 0 to the right and passes no attention mask. A causal
model does not mind, but the statistics of SPEC §2 would count the padding; here they do not. The
call itself stays that of ``HFLM``, so a model without sharpening gives the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial, partialmethod
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vps.evaluation.controls import with_configs
from vps.evaluation.paired import Outcome
from vps.masking import prompt, token_mask
from vps.model.patching import check_scope, sharpened_layers

ROLLING = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def language_model(
    model: Any, tokenizer: Any, batch_size: int, scoring_scope: str, group: Any = None
) -> Any:
    """Make an lm-eval ``LM`` of a patched model.

    Args:
        model: a patched causal language model of transformers.
        tokenizer: its tokenizer, which is copied.
        batch_size: rows a call.
        scoring_scope: scope for requests that score given continuations; ``"config"`` leaves the
            config's.
        group: a process group whose ranks share the requests; ``None`` for one process.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: an encoder-decoder model.
    """
    lm = _class()(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    if lm.backend != "causal":
        raise ValueError(
            f"evaluation: model must be a causal language model, got {type(model).__name__}, "
            f"which lm-eval calls {lm.backend}"
        )
    lm.scoring_scope = scoring_scope
    lm.ran = {}
    lm.group = group
    return lm


@contextmanager
def scoped(model: nn.Module, scope: str) -> Iterator[None]:
    """Put the config of every layer under another scope.

    Raises:
        ValueError: one of another scope than ``"token"`` for sharpened experts.
    """
    check_scope(model, scope, "evaluation")
    other = cache(lambda config: config.replace(scope=scope))
    with with_configs(model, lambda number, config: other(config)):
        yield


def shared(
    compute: Callable[[list[Any]], list[Any]], requests: Sequence[Any], group: Any
) -> list[Any]:
    """Share requests over the ranks of a group; each gets what ``compute`` gives for all.

    Requests of one context, which lm-eval runs as one row where it can, stay together. Every rank
    calls this with the same requests and gets all answers.
    """
    if group is None:
        return compute(list(requests))
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    contexts: dict[str, int] = {}
    owners = [contexts.setdefault(each.args[0], len(contexts)) % world for each in requests]
    own = [each for each, owner in zip(requests, owners, strict=True) if owner == rank]
    parts: list[list[Any]] = [[]] * world
    dist.all_gather_object(parts, compute(own) if own else [], group=group)
    answers = [iter(part) for part in parts]
    return [next(answers[owner]) for owner in owners]


@cache
def _class() -> type[Any]:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ModuleNotFoundError(
            f"evaluation needs lm-eval: pip install 'vps-kernels[eval]' ({error})"
        ) from None

    class SharpenedLM(HFLM):  # type: ignore[misc]
        scoring_scope: str
        group: Any
        ran: dict[str, tuple[str, int]]  # scope and batch size by type of request
        batch_size_per_gpu: int
        logits_cache: bool
        _rows: dict[tuple[int, ...], list[int]] | None = None

        def _shared(self, kind: str, requests: Any, **kwargs: Any) -> Any:
            """Compute under the scope for this kind of request, one row a call in scope "batch",
            whose results else depend on batch-mates."""
            compute = partial(getattr(super(), kind), **kwargs)
            own = kind == "generate_until" or self.scoring_scope == "config"
            before = self.batch_size_per_gpu, self.logits_cache
            with nullcontext() if own else scoped(self.model, self.scoring_scope):
                scopes = {layer.config.scope for layer in sharpened_layers(self.model).values()}
                if "batch" in scopes:
                    self.batch_size_per_gpu = 1
                if "prompt" in scopes:  # equal rows may have contexts of other lengths
                    self.logits_cache = False
                self.ran[kind] = (", ".join(sorted(scopes)), self.batch_size_per_gpu)
                try:
                    return shared(compute, requests, self.group)
                finally:
                    self.batch_size_per_gpu, self.logits_cache = before

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            # With its cache HFLM runs one row for all requests that share context +
            # continuation[:-1]. It takes the longest texts first, in the order of their tokens.
            keep, known = self.max_length + 1, set()
            self._rows = {}
            order = sorted(requests, key=lambda own: (-len(own[1] + own[2]), own[1] + own[2]))
            for _, context, continuation in order:
                whole = tuple(context + continuation[:-1])
                if self.logits_cache and whole in known:
                    continue
                known.add(whole)
                row = tuple((context + continuation)[-keep:][:-1])
                context_length = max(0, len(row) - len(continuation) + 1)
                self._rows.setdefault(row, []).append(context_length)
            try:
                return super()._loglikelihood_tokens(requests, *args, **kwargs)
            finally:
                self._rows = None

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._rows is None:
                return super()._model_call(inps, *args, **kwargs)
            counted, context = _marked(inps, self._rows)
            with prompt(context), nullcontext() if counted is None else token_mask(counted):
                return super()._model_call(inps, *args, **kwargs)

    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(SharpenedLM, kind, partialmethod(SharpenedLM._shared, kind))
    return SharpenedLM


def _marked(
    inputs: Tensor, waiting: dict[tuple[int, ...], list[int]]
) -> tuple[Tensor | None, Tensor]:
    """Mark the tokens of inputs ``[B, T]`` that belong to a row to be scored, ``None`` if all do.

    Also mark those of the context, which is the prompt under ``scope="prompt"``. Rows come longest
    first, so the longest that fits is the one; ``waiting`` has the lengths of their contexts.
    """
    lengths, contexts = [], []
    for row in inputs.tolist():
        length = len(row)
        while not waiting.get(tuple(row[:length])):
            if length == 1 or row[length - 1] != 0:
                raise RuntimeError(
                    "evaluation: lm-eval ran a row that fits no request padded with 0 to the "
                    "right, as version 0.4.13 has them; this version pads otherwise"
                )
            length -= 1
        contexts.append(waiting[tuple(row[:length])].pop(0))
        lengths.append(length)
    order = torch.arange(inputs.shape[1], device=inputs.device)
    ends, starts = (torch.tensor(n, device=inputs.device).unsqueeze(1) for n in (lengths, contexts))
    counted = None if min(lengths) == inputs.shape[1] else order < ends
    return counted, order < starts


def outcomes_of(task: Any, samples: list[dict[str, Any]], tokens: Callable[[str], int]) -> list:
    """Turn the samples that lm-eval logged for a task into outcomes, in their order.

    A metric keeps its name; one of a named filter is ``"metric,filter"``. Log-likelihoods become
    ``"nll"`` in nats: per token, weighted by the tokens, for whole texts; per target for
    ``perplexity``. Metrics that are no number per document (F1, Matthews) are left out.

    Args:
        task: the lm-eval task.
        samples: what it logged.
        tokens: counts the tokens of a text.

    Raises:
        ValueError: none of the task's metrics is a number per document.
    """
    outcomes: list[Outcome] = []
    for sample in samples:
        document = f"{sample['doc_id']}:{sample['doc_hash'][:8]}"
        margin = _margin(task, sample)
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        seen: dict[str, tuple[float, float]] = {}
        for metric in sample["metrics"]:
            value = sample[metric]
            if metric in ROLLING:
                count = tokens(sample["arguments"][0][0])
                seen["nll"] = (-float(value[0]) / max(1, count), float(max(1, count)))
            elif metric == "perplexity":
                seen["nll"] = (-float(value), 1.0)
            elif isinstance(value, (bool, int, float, numpy.number, numpy.bool_)):
                seen[metric] = (float(value), 1.0)
        outcomes += [
            Outcome(task.task_name, document, metric + suffix, value, margin, weight)
            for metric, (value, weight) in seen.items()
        ]
    if not outcomes:
        metrics = sorted({metric for sample in samples for metric in sample["metrics"]})
        raise ValueError(
            f"evaluation: task {task.task_name!r} has no metric that is a number per document, "
            f"got {', '.join(metrics) or 'none'}"
        )
    return outcomes


def _margin(task: Any, sample: dict[str, Any]) -> float | None:
    """Return the log-likelihood of the right choice less that of the best wrong one."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    document = sample["doc"]
    choices = task.doc_to_choice(document)
    gold = task.doc_to_text(document) if task.multiple_input else sample["target"]
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    right = set(gold) if isinstance(gold, list) else {gold}
    scores = [float(response[0]) for response in sample["filtered_resps"][: len(choices)]]
    good = [score for index, score in enumerate(scores) if index in right]
    bad = [score for index, score in enumerate(scores) if index not in right]
    return max(good) - max(bad) if good and bad else None
