"""Check claims of the paper that need no answers: ``python -m benchmarks.study.claims``.

On every sharpened layer of a model and on its real activations, by the definition
(``vps.reference``): the bound ``‖ÃB̃ᵀ‖₂ ≤ √r·τ`` of proposition 4.1 and ``r·τ``, which always holds;
how much larger than H the update is; whether γ, rank and features depend on the input; and in the
loop with the gold answer, how often L-BFGS holds a pair and how large its step is.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vps
from benchmarks import machine
from benchmarks.reproduce import measures, protocol, questions
from vps import VPSConfig, files, reference
from vps.evaluation.controls import configured
from vps.model.capture import restored
from vps.model.loading import load_model
from vps.model.patching import sharpened_layers
from vps.reference import Group, Projection
from vps.verify import CompositeVerifier

FORMAT = "vps-claims-1"
CONFIGS = {
    f"{name}, {scope}": VPSConfig(scope=scope, **settings)
    for scope in ("token", "prompt")
    for name, settings in (
        ("paper", {}),
        ("SK, r = 4", {"rank": 4, "builder": "sk"}),
        ("SC, r = 4", {"rank": 4, "builder": "sc"}),
    )
}
TEXTS = 4  # questions of each kind, and as many paragraphs
TOKENS = 4  # of each text under scope token
ASKED = 10  # questions of each kind in the loop
ROUNDING = 1 + 1e-5


@dataclass(frozen=True)
class Update:
    """Hold what one group of tokens showed in one layer.

    Args:
        layer: its name.
        rank: r.
        norm: ``‖ÃB̃ᵀ‖₂``.
        product: ``‖Ã‖₂‖B̃‖₂``.
        clipped: whether the clip scaled a column.
        sigma, gamma: σ and γ.
        relative: ``‖γδ‖ / ‖H‖``.
        features: the r selected inputs and the r selected outputs.
    """

    layer: str
    rank: int
    norm: float
    product: float
    clipped: bool
    sigma: float
    gamma: float
    relative: float
    features: tuple[tuple[int, ...], tuple[int, ...]]


@contextmanager
def inputs_of(layers: Iterable[Any]) -> Iterator[dict[Any, Tensor]]:
    """Collect the last input of every layer that runs inside."""
    seen: dict[Any, Tensor] = {}

    def keep(module: Any, args: Any) -> None:
        seen[module] = args[0].detach()

    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def groups(model: Any, ids: Sequence[int], places: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """Run one text, and yield every layer's name with its literal result.

    Args:
        model: a patched model of one config.
        ids: tokens of the text, the whole of which is the prompt.
        places: the tokens that are computed under scope token.
    """
    layers: dict[str, Any] = sharpened_layers(model)
    with inputs_of(layers.values()) as seen:
        model(torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)
    found: dict[Any, Any] = {}
    for layer, x in seen.items():
        x = x[:, list(places)] if layer.config.scope == "token" else x
        own = layer.deciding()
        if layer in found:
            continue
        given = [Projection(one.matrix(), None, layer.gradient) for one in own]
        if len(own) == 1:
            found[layer] = reference.vps_linear(
                x, given[0].weight, config=layer.config, gradient=layer.gradient
            )
        else:
            pair = layer.coupling
            heads = {"heads": pair.heads, "kv_heads": pair.kv_heads}
            both = reference.coupled_vps_linear(x, *given, config=layer.config, **heads)
            found |= zip(own, both, strict=True)
    yield from ((name, found[layer]) for name, layer in layers.items() if layer in found)


def measured(name: str, group: Group, H: Tensor) -> Update:
    """Measure one group of a layer by its factors, in float64."""
    A, B = group.A_clipped.double(), group.B_clipped.double()
    roots = [torch.linalg.qr(each).R for each in (A, B)]
    largest = [float(torch.linalg.matrix_norm(each, ord=2)) for each in roots]
    size = float(H[group.tokens].double().norm())
    moved = float(group.gamma * group.delta.double().norm())
    return Update(
        layer=name,
        rank=group.rank,
        norm=float(torch.linalg.matrix_norm(roots[0] @ roots[1].T, ord=2)),
        product=largest[0] * largest[1],
        clipped=bool((group.scale > 1).any()),
        sigma=group.sigma,
        gamma=group.gamma,
        relative=moved / size if size else 0.0,
        features=tuple(tuple(each[: group.rank].tolist()) for each in (group.I_in, group.I_out)),
    )


def updates(model: Any, config: VPSConfig, texts: Iterable[Sequence[int]]) -> list[Update]:
    """Measure every group of every layer under one config."""
    found = []
    with restored(model), configured(model, config):
        for ids in texts:
            places = np.linspace(0, len(ids) - 1, TOKENS).round().astype(int).tolist()
            for name, result in groups(model, ids, places):
                found += [measured(name, group, result.H) for group in result.groups if group.rank]
    return found


def summary(every: Sequence[Update], tau: float) -> dict[str, Any]:
    """Put the updates of one config, or of one kind of layer, into figures."""
    ranks = np.array([each.rank for each in every])
    norms, products, relative, sigma = (
        np.array([getattr(each, name) for each in every])
        for name in ("norm", "product", "relative", "sigma")
    )
    root, always = np.sqrt(ranks) * tau, ranks * tau
    wide = ranks > 1
    layers: dict[str, list[Update]] = defaultdict(list)
    for each in every:
        layers[each.layer].append(each)
    ranges = [np.ptp([each.gamma for each in own]) for own in layers.values()]
    return {
        "layers": len(layers),
        "groups": len(every),
        "groups of rank above 1": int(wide.sum()),
        "clipped": round(float(np.mean([each.clipped for each in every])), 4),
        "largest over √r·τ": round(float((norms / root).max()), 4),
        "median over √r·τ": round(float(np.median(norms / root)), 4),
        "above √r·τ": int((norms > root * ROUNDING).sum()),
        "layers above √r·τ": len({own.layer for own, norm, most in
                                  zip(every, norms, root, strict=True) if norm > most * ROUNDING}),
        "largest over r·τ": round(float((norms / always).max()), 4),
        "above r·τ": int((norms > always * ROUNDING).sum()),
        "‖Ã‖‖B̃‖ above √r·τ": int((products > root * ROUNDING).sum()),
        "largest ‖Ã‖‖B̃‖ over √r·τ": round(float((products / root).max()), 4),
        "update over H": [round(float(q), 4) for q in np.quantile(relative, (0.5, 0.95, 1))],
        "σ above 0.95": round(float((sigma > 0.95).mean()), 4),
        "σ below 0.05": round(float((sigma < 0.05).mean()), 4),
        "γ": [round(float(q), 4) for q in np.quantile([e.gamma for e in every], (0, 0.5, 1))],
        "range of γ in a layer, median": round(float(np.median(ranges)), 4),
        "ranks": {str(rank): int(count) for rank, count in sorted(Counter(ranks).items())},
        "choices on the most frequent inputs": round(constancy(layers, 0), 4),
        "choices on the most frequent outputs": round(constancy(layers, 1), 4),
    }  # fmt: skip


def constancy(layers: dict[str, list[Update]], side: int) -> float:
    """Return the share of choices that fall on a layer's r most frequent features, on average.

    1 where a layer's features never depend on the input; r is the highest rank of the layer.
    """
    shares = []
    for own in layers.values():
        chosen = Counter(index for each in own for index in each.features[side])
        most = chosen.most_common(max(each.rank for each in own))
        shares.append(sum(count for _, count in most) / chosen.total())
    return float(np.mean(shares))


def curvature(model: Any, tokenizer: Any, count: int) -> dict[str, Any]:
    """Answer questions of the pilot in the paper's loop, and look at the L-BFGS memory after it."""
    asked = [(k, d) for k in questions.KINDS for d in questions.questions(k, count, pilot=True)]
    verifier, held, steps = CompositeVerifier(), 0, []
    config = VPSConfig(scope="prompt")
    with restored(model), configured(model, config):
        for kind, document in asked:
            context = questions.context(kind, document)
            protocol.refined(model, tokenizer, context, document, verifier)
            memories = {name: layer.memory for name, layer in sharpened_layers(model).items()}
            if not any(memories.values()):
                continue
            held += 1
            for name, result in groups(model, tokenizer(context)["input_ids"], ()):
                if memories[name]:
                    B = result.groups[0].B_clipped
                    step = 1e-3 * memories[name].apply(B)
                    steps.append(float(step.norm() / B.norm()))
    return {
        "questions": len(asked),
        "with a pair": held,
        "layers with a pair, of those": len(steps),
        "step over factor": [round(float(q), 6) for q in np.quantile(steps or [0.0], (0, 0.5, 1))],
        "steps above the factor": sum(step > 1 for step in steps),
    }


def texts(tokenizer: Any, count: int) -> list[list[int]]:
    """Return tokens of questions of the pilot, and of paragraphs of each kind of prose."""
    put = [
        tokenizer(questions.context(kind, each))["input_ids"]
        for kind in questions.KINDS
        for each in questions.questions(kind, count, pilot=True)
    ]
    each = max(1, count // len(questions.PROSE))
    prose = partial(questions.prose, tokenizer=tokenizer, length=measures.TEXT_TOKENS)
    return put + [text for kind in questions.PROSE for text in prose(kind, each)]


def check(model: Any, tokenizer: Any, count: int = TEXTS, asked: int = ASKED) -> dict[str, Any]:
    """Check the claims on a patched model.

    Args:
        model: a patched causal language model.
        tokenizer: its tokenizer.
        count: questions of each kind, of the pilot of the study, and paragraphs of prose.
        asked: questions of each kind in the loop.
    """
    facts, read = machine.facts(), texts(tokenizer, count)
    found = {}
    for name, config in CONFIGS.items():
        every = updates(model, config, read)
        kinds = dict.fromkeys(each.layer.rpartition(".")[2] for each in every)
        tau = config.tau
        assert tau is not None
        found[name] = {
            "all": summary(every, tau),
            **{kind: summary([e for e in every if e.layer.endswith(kind)], tau) for kind in kinds},
        }
    return {
        "format": FORMAT,
        "settings": {
            "seed": questions.SEED,
            "texts": len(read),
            "tokens of each under scope token": TOKENS,
            "digest": questions.digest(read),
        },
        "facts": facts,
        "updates": found,
        "L-BFGS": curvature(model, tokenizer, asked),
    }


def main() -> None:
    """Check the claims and write them beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/claims"))
    given = parser.parse_args()
    model, tokenizer = load_model(given.model)
    vps.patch(model, VPSConfig())
    found = check(model, tokenizer)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{machine.name()}.json"
    files.replace(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(path)


if __name__ == "__main__":
    main()
