"""Show lm-evaluation-harness a sharpened model: padding, scope and batch size as they must be.

``HFLM`` pads the rows it scores with token 0 to the right and passes no attention mask. A causal
model does not mind, but the statistics of SPEC §2 would count the padding; here they do not. The
call itself stays that of ``HFLM``, so a model without sharpening gives the same bits.
"""

from __future__ import annotations

import copy
from collections import Counter
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
from vps.masking import token_mask
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
        _rows: Counter[tuple[int, ...]] | None = None

        def _shared(self, kind: str, requests: Any, **kwargs: Any) -> Any:
            """Compute under the scope for this kind of request, one row a call in scope "batch",
            whose results else depend on batch-mates."""
            compute = partial(getattr(super(), kind), **kwargs)
            own = kind == "generate_until" or self.scoring_scope == "config"
            before = self.batch_size_per_gpu
            with nullcontext() if own else scoped(self.model, self.scoring_scope):
                scopes = {layer.config.scope for layer in sharpened_layers(self.model).values()}
                if "batch" in scopes:
                    self.batch_size_per_gpu = 1
                self.ran[kind] = (", ".join(sorted(scopes)), self.batch_size_per_gpu)
                try:
                    return shared(compute, requests, self.group)
                finally:
                    self.batch_size_per_gpu = before

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            # HFLM runs one row for all requests that share context + continuation[:-1].
            keep = self.max_length + 1
            rows = {tuple(ctx + cont[:-1]): (ctx + cont)[-keep:][:-1] for _, ctx, cont in requests}
            self._rows = Counter(tuple(row) for row in rows.values())
            try:
                return super()._loglikelihood_tokens(requests, *args, **kwargs)
            finally:
                self._rows = None

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Any:
            mask = None if self._rows is None else _counted(inps, self._rows)
            if mask is None:
                return super()._model_call(inps, *args, **kwargs)
            with token_mask(mask):
                return super()._model_call(inps, *args, **kwargs)

    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(SharpenedLM, kind, partialmethod(SharpenedLM._shared, kind))
    return SharpenedLM


def _counted(inputs: Tensor, waiting: Counter[tuple[int, ...]]) -> Tensor | None:
    """Mark the tokens of inputs ``[B, T]`` that belong to a row to be scored; ``None`` if all do.

    Rows come longest first, so the longest that fits is the one.
    """
    lengths = []
    for row in inputs.tolist():
        length = len(row)
        while not waiting[tuple(row[:length])]:
            if length == 1 or row[length - 1] != 0:
                raise RuntimeError(
                    "evaluation: lm-eval ran a row that fits no request padded with 0 to the "
                    "right, as version 0.4.13 has them; this version pads otherwise"
                )
            length -= 1
        waiting[tuple(row[:length])] -= 1
        lengths.append(length)
    width = inputs.shape[1]
    if min(lengths) == width:
        return None
    ends = torch.tensor(lengths, device=inputs.device).unsqueeze(1)
    return torch.arange(width, device=inputs.device) < ends


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
