"""Turn what a model does with questions, prose and problems into outcomes that can be paired.

A measure takes the model as it is at the moment, documents, and the number of the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.reproduce import protocol, questions, scoring, texts
from vps.evaluation.paired import Outcome
from vps.verify import CompositeVerifier
from vps.verify.composite import check

ACCURACY, LOSS, EXACT, BEST = "acc", "nll", "exact_match", "best of all iterations"
DIGITS = 3  # of margins
PROMPT_TOKENS, TEXT_TOKENS = 32, 96  # of a paragraph
NEW_TOKENS = 6  # of an answer

Measure = Callable[[Any, Sequence[Any], int], list[Outcome]]
Asked = tuple[list[Any], Measure]


def choices(
    kind: str, tokenizer: Any, model: Any, asked: Sequence[Any], start: int
) -> list[Outcome]:
    """Score choice questions by the log-likelihood of their options."""
    rows = [
        scoring.encoded(tokenizer, questions.context(kind, each), each["choices"]) for each in asked
    ]
    found = scoring.log_likelihoods(model, rows)
    return [
        chosen(kind, start + number, scores, each["gold"])
        for number, (scores, each) in enumerate(zip(found, asked, strict=True))
    ]


def chosen(task: str, number: int, scores: Sequence[float], gold: int) -> Outcome:
    """Say whether the option of highest log-likelihood is the gold one, and by what margin."""
    margin = scoring.margin(scores, gold)
    return Outcome(task, str(number), ACCURACY, float(margin > 0), round(margin, DIGITS))


def prose(kind: str, model: Any, asked: Sequence[Any], start: int) -> list[Outcome]:
    """Measure the nll of paragraphs after their first tokens, in nats a token."""
    return [
        Outcome(kind, str(start + number), LOSS, round(loss, DIGITS + 2))
        for number, loss in enumerate(texts.losses(model, asked, PROMPT_TOKENS))
    ]


def answers(tokenizer: Any, model: Any, asked: Sequence[Any], start: int) -> list[Outcome]:
    """Verify greedy answers to problems of arithmetic."""
    prompts = [questions.context("arithmetic", each) for each in asked]
    given = texts.answers(model, tokenizer, prompts, NEW_TOKENS)
    right = (
        check(text, each["answer"]).name == "CORRECT"
        for text, each in zip(given, asked, strict=True)
    )
    return [
        Outcome("generated", str(start + number), EXACT, float(own))
        for number, own in enumerate(right)
    ]


def loop(kind: str, tokenizer: Any, model: Any, asked: Sequence[Any], start: int) -> list[Outcome]:
    """Answer choice questions in the paper's loop: the last answer, and that of lowest loss."""
    verifier = CompositeVerifier()
    found = []
    for number, each in enumerate(asked, start):
        put = questions.context(kind, each)
        every = protocol.refined(model, tokenizer, put, each, verifier)
        for metric, answer in ((ACCURACY, every[-1]), (BEST, protocol.best(every))):
            margin = round(answer.margin, DIGITS)
            found.append(Outcome(kind, str(number), metric, float(answer.right), margin))
    return found
