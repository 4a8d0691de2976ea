"""Offline tasks: the same documents for the same seed, right answers, wrong ones near them."""

import re
from collections import Counter
from fractions import Fraction

import pytest
from evaluation_cases import patched_model, tokenizer

from vps.evaluation import tasks
from vps.evaluation.harness import Harness


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_documents_are_fixed_and_different(kind):
    first = tasks.documents(kind, 60)
    assert tasks.documents(kind, 20) == first[:20]
    assert len({document["question"] for document in first}) == 60
    other = tasks.documents(kind, 60, seed=1)
    assert sum(document in first for document in other) < 20


def test_documents_stay_what_they_were():
    """A reported figure means these."""
    firsts = {kind: tasks.documents(kind, 1)[0] for kind in tasks.KINDS}
    assert firsts["arithmetic"]["question"] == "Calculate 64 * 65."
    assert firsts["chains"]["question"].endswith("problem: 74 + 75 + 92 =")
    assert firsts["word_problems"]["answer"] == "65"
    assert firsts["units"]["question"] == (
        "Calculate the time difference between 10:32 and 22:19. Express the result in HH:MM."
    )


@pytest.mark.parametrize("kind", ["arithmetic", "chains"])
def test_answers_are_right(kind):
    """reasoning-gym 0.1.25 has wrong ones where it divides."""
    for document in tasks.documents(kind):
        terms = re.search(r"(?:Calculate|problem:) ([-+* 0-9]+?)[.=]?$", document["question"])
        assert Fraction(eval(terms[1])) == Fraction(document["answer"]), document


def test_durations_are_right():
    for document in tasks.documents("units"):
        start, end, length = (
            int(hours) * 60 + int(minutes)
            for hours, minutes in tasks.CLOCK.findall(document["question"] + document["answer"])
        )
        assert end - start == length, document


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_choices_are_near_and_give_nothing_away(kind):
    def number(choice):
        hours, _, minutes = choice.rpartition(":")
        return int(hours or 0) * 60 + int(minutes)

    documents = tasks.documents(kind)
    places, ranks = Counter(), Counter()
    for document in documents:
        choices, gold = document["choices"], document["gold"]
        assert choices[gold] == document["answer"] and len({*choices}) == 4
        numbers = [number(choice) for choice in choices]
        assert all(0 < abs(n - numbers[gold]) <= 120 for n in numbers if n != numbers[gold])
        assert len({n < 0 for n in numbers}) == 1
        assert [tasks.right(choice, document["answer"]) for choice in choices] == [
            index == gold for index in range(4)
        ]
        places[gold] += 1
        ranks[sorted(numbers).index(numbers[gold])] += 1
    assert max(places.values()) < 90 and max(ranks.values()) < 110  # of 240; 60 by chance


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (" 42.", "42", True),
        ("64 * 65 = 4160", "4160", True),
        ("It is 41. No, it is 42", "42", True),
        ("-7", "7", False),
        ("9 * 4", "36", False),
        ("To find 9 * 4, we need to multiply", "36", False),
        ("9 × 4 =", "36", False),
        ("(30 + 6)", "36", False),
        ("3 - 5", "-2", False),
        ("3 - 5 = -2", "-2", True),
        ("$9 * 4 = 36$", "36", True),
        ("64 * 65 = 4,160", "4160", True),
        ("", "7", False),
        ("none", "7", False),
        (" 11:47", "11:47", True),
        ("from 10:32 to 22:19 it is 11:47.", "11:47", True),
        ("1:05", "01:05", True),
        ("01:05:30 hours", "01:05", True),
        ("705 minutes", "11:45", False),
    ],
)
def test_grading(text, answer, expected):
    assert tasks.right(text, answer) is expected


def test_grading_is_not_fooled_by_a_clock_inside_another():
    assert not tasks.right("1111:473", "11:47")


def test_every_task_runs():
    model = patched_model(layers=1)
    scores = Harness(model, tokenizer(), tasks.names(), limit=2, batch_size=8).run()
    assert [(o.task, o.metric) for o in scores.outcomes] == [
        (name, "acc" if name.endswith("_choice") else "exact_match")
        for name in tasks.names()
        for _ in range(2)
    ]
    assert all((o.margin is None) == (o.metric == "exact_match") for o in scores.outcomes)


def test_generated_answers_are_graded(monkeypatch):
    """A model that knows the answers has them all right, one that adds 1 none."""
    run = Harness(patched_model(layers=1), tokenizer(), ["vps_chains"], limit=5, num_fewshot=1)
    answers = {d["question"]: d["answer"] for d in tasks.documents("chains")}
    for change, expected in ((0, 1.0), (1, 0.0)):

        def generate(requests, *, change=change):
            questions = [re.findall("Question: (.*)\nAnswer:", r.args[0])[-1] for r in requests]
            return [f" {int(answers[question]) + change}" for question in questions]

        monkeypatch.setattr(run._lm, "generate_until", generate)
        scores = run.run()
        assert scores.results["vps_chains"]["exact_match,none"] == expected
        assert [o.value for o in scores.outcomes] == [expected] * 5


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(ValueError, match="kind must be one of arithmetic, .* got 'algebra'"):
        tasks.documents("algebra")
    with pytest.raises(ValueError, match="size must be an integer ≥ 1, got 0"):
        tasks.documents("chains", 0)
    few = tasks.KINDS["chains"]._replace(settings={"max_terms": 2, "max_digits": 1})
    monkeypatch.setitem(tasks.KINDS, "chains", few)
    with pytest.raises(ValueError, match=r"size is 201, but chains has only \d+ for this seed"):
        tasks.documents("chains", 201)
    with pytest.raises(ValueError, match="name must be one of vps_arithmetic, .* got 'chains'"):
        tasks.task("chains")
