"""Score the answers of choice questions, several questions a call, each context computed once.

A question is one row: its context, then the tokens that its options have before their last, each
prefix that options share once. A token attends to the context and to the prefix that it continues,
and has the position that it would have there, so every option gets the log-likelihood of a row of
its own. The context is the prompt under ``scope="prompt"`` (SPEC §11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vps import masking

BATCH_TOKENS = 2048  # rows times tokens of the longest, a call


@dataclass(frozen=True)
class Row:
    """Lay out a question as a row of T tokens.

    Args:
        tokens: context, then prefixes of options.
        context: number of tokens of the context.
        parents: index of the token before each, −1 for the first.
        options: of each option its tokens, each with the index of the token that predicts it.
    """

    tokens: tuple[int, ...]
    context: int
    parents: tuple[int, ...]
    options: tuple[tuple[tuple[int, int], ...], ...]


def row(context: Sequence[int], options: Sequence[Sequence[int]]) -> Row:
    """Lay out a context and its options, given as token ids.

    Raises:
        ValueError: an empty context or option.
    """
    if not context or not all(options):
        raise ValueError("row: expected at least one token in the context and in every option")
    tokens, parents = list(context), list(range(-1, len(context) - 1))
    places: dict[tuple[int, ...], int] = {(): len(context) - 1}
    found = []
    for option in options:
        predicted = []
        for length, token in enumerate(option):
            prefix = tuple(option[:length])
            if prefix not in places:
                places[prefix] = len(tokens)
                tokens.append(prefix[-1])
                parents.append(places[prefix[:-1]])
            predicted.append((token, places[prefix]))
        found.append(tuple(predicted))
    return Row(tuple(tokens), len(context), tuple(parents), tuple(found))


def encoded(tokenizer: Any, context: str, options: Sequence[str]) -> Row:
    """Lay out a question in text; an option follows the context after a space, as in lm-eval."""
    texts = [context, *(f"{context} {option}" for option in options)]
    first, *whole = tokenizer(texts)["input_ids"]
    return row(first, [each[len(first) :] for each in whole])


def margin(scores: Sequence[float], gold: int) -> float:
    """Return the log-likelihood of the right option less that of the best wrong one, in nats."""
    return scores[gold] - max(score for index, score in enumerate(scores) if index != gold)


@torch.no_grad()
def log_likelihoods(model: Any, rows: Sequence[Row]) -> list[list[float]]:
    """Return the log-likelihood of every option of every row, in nats.

    Args:
        model: a causal language model of transformers, whose attention takes a 4-D mask.
        rows: in any order; those of like length share a call.
    """
    found: list[list[float]] = [[] for _ in rows]
    for batch in batches([len(each.tokens) for each in rows]):
        part = [rows[index] for index in batch]
        for index, values in zip(batch, _batch(model, part), strict=True):
            found[index] = values
    return found


def batches(lengths: Sequence[int], most: int = BATCH_TOKENS) -> list[list[int]]:
    """Put indices of like length together, at most ``most`` tokens with padding, longest first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    found: list[list[int]] = []
    for index in order:
        if not found or (len(found[-1]) + 1) * lengths[found[-1][0]] > most:
            found.append([])
        found[-1].append(index)
    return found


def _batch(model: Any, rows: Sequence[Row]) -> list[list[float]]:
    hidden = _hidden(model, rows)
    asked = sorted(
        {(i, place) for i, own in enumerate(rows) for o in own.options for _, place in o}
    )
    number = {key: n for n, key in enumerate(asked)}
    where = torch.tensor(asked, device=hidden.device)
    states = hidden[where[:, 0], where[:, 1]]
    logits = model.get_output_embeddings()(states).float().log_softmax(-1).cpu()
    return [
        [float(sum(logits[number[i, place], token] for token, place in o)) for o in own.options]
        for i, own in enumerate(rows)
    ]


def _hidden(model: Any, rows: Sequence[Row]) -> Tensor:
    """Return the last hidden states ``[B, T, d]`` of rows, padded to the right."""
    length = max(len(each.tokens) for each in rows)
    size = (len(rows), length)
    ids, positions = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    context = torch.zeros(size, dtype=torch.bool)
    seen = torch.zeros(*size, length, dtype=torch.bool)
    for i, each in enumerate(rows):
        count = len(each.tokens)
        ids[i, :count] = torch.tensor(each.tokens)
        context[i, : each.context] = True
        seen[i, : each.context, : each.context] = True
        seen[i].tril_()
        seen[i, count:, 0] = True  # no token that attends to nothing
        depth = list(range(each.context))
        for place in range(each.context, count):
            parent = each.parents[place]
            seen[i, place] = seen[i, parent]
            seen[i, place, place] = True
            depth.append(depth[parent] + 1)
        positions[i, :count] = torch.tensor(depth)
        positions[i, count:] = 1
    mask = torch.zeros(seen.shape, dtype=model.dtype)
    mask.masked_fill_(~seen, torch.finfo(model.dtype).min)
    device = model.device
    with masking.prompt(context.to(device)):
        hidden: Tensor = model.base_model(
            input_ids=ids.to(device),
            attention_mask=mask.unsqueeze(1).to(device),
            position_ids=positions.to(device),
            use_cache=False,
        ).last_hidden_state
    return hidden
