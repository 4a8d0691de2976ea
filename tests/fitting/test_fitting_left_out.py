"""Examples that cannot be used do not end a calibration: they are left out, and it is said."""

import json
import warnings

import pytest
from fitting_cases import learner, pairs, texts
from tiny import number_tokenizer
from tokenizers import normalizers

from vps import Calibration, calibrate, sensitivity
from vps.fitting import Options, text
from vps.fitting.examples import read_examples, usable
from vps.model.patching import sharpened_layers

ONE, LONG = "1", " ".join(["3"] * 600)  # nothing to predict; more than 512 tokens in a pair


def quick(tokenizer, examples, **options):
    """A calibration of one step, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = calibrate(
            learner(), tokenizer, examples, chat=False, controls=False,
            options=Options(steps=1, batch_size=2, learning_rates=(0.1,)), **options,
        )  # fmt: skip
    return made, [str(each.message) for each in said if "left out" in str(each.message)]


def test_examples_that_cannot_be_used_are_left_out(tokenizer):
    """The others give what they give by themselves."""
    good, held = pairs(8), pairs(5, seed=1)
    empty = number_tokenizer()  # takes a prompt of one unknown sign for nothing
    empty._tokenizer.normalizer = normalizers.Replace("#", "")
    mixed = [*good[:3], ONE, *good[3:], (LONG, "1"), {"prompt": "#", "answer": "2"}]
    alone, nothing = quick(empty, good, held_out=held, other_texts=texts(3, seed=2))
    assert nothing == [] and alone.report["left_out"] == []
    others = [*texts(3, seed=2), ONE]
    made, said = quick(empty, mixed, held_out=[ONE, *held, (LONG, "2")], other_texts=others)
    assert made.gamma == alone.gamma and made.data == alone.data
    assert made.report["comparisons"] == alone.report["comparisons"]
    assert [(each["of"], each["number"]) for each in made.report["left_out"]] == [
        ("examples", 4), ("examples", 10), ("examples", 11),
        ("held-out examples", 1), ("held-out examples", 7), ("other texts", 4),
    ]  # fmt: skip
    reasons = " ".join(each["reason"] for each in made.report["left_out"])
    assert "no token to predict" in reasons and "has 601 tokens, expected at most 512" in reasons
    assert [line.split(" cannot")[0] for line in said] == [
        "vps.calibrate: 3 of 11 examples", "vps.calibrate: 2 of 7 held-out examples",
        "vps.calibrate: 1 of 4 other texts",
    ]  # fmt: skip
    assert "Left out, since they cannot be used: examples, number 4: " in text(made)
    assert "; and 3 more." in text(made)
    report = {name: value for name, value in made.report.items() if name != "left_out"}
    older = Calibration(**(vars(made) | {"report": report}))
    assert "Left out" not in text(older)


def test_gradients_of_those_that_can_be_used(tokenizer):
    good = [*pairs(4), pairs(4)[0]]  # an example that comes twice counts twice
    alone = sensitivity(learner(), tokenizer, good, chat=False)
    with pytest.warns(UserWarning, match=r"2 of 7 examples cannot .* number 2: .*; .* number 7: "):
        found = sensitivity(
            learner(), tokenizer, [good[0], ONE, *good[1:], (LONG, "1")], chat=False
        )
    assert found == alone
    assert found != sensitivity(learner(), tokenizer, good[:4], chat=False)


def test_too_few_that_can_be_used_are_an_error(tokenizer):
    model = learner()
    for examples, options, message in (
        ([ONE] * 5, {}, "5 of 5 examples cannot be used .*no token to predict.*and 2 more"),
        ([*pairs(3), ONE], {}, "at least 4 different examples, got 3; 1 of 4 examples cannot be"),
        (pairs(8), {"held_out": [ONE]}, "1 of 1 held-out examples cannot be used"),
        (pairs(8), {"other_texts": [ONE, "2"]}, "2 of 2 other texts cannot be used"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, tokenizer, examples, chat=False, **options)
        assert not sharpened_layers(model)
    with pytest.raises(ValueError, match="2 of 2 examples cannot be used"):
        sensitivity(model, tokenizer, [ONE, (LONG, "1")], chat=False)


def test_other_texts_that_come_twice_count_once(tokenizer):
    twice, _ = quick(tokenizer, pairs(8), other_texts=[*texts(3), f"{texts(3)[1]} "])
    once, _ = quick(tokenizer, pairs(8), other_texts=texts(3))
    assert twice.report["comparisons"] == once.report["comparisons"]


def test_empty_ones_are_left_out(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    rows = [{"text": ""}, {"prompt": "1", "answer": " "}, {"text": "1 2"}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = read_examples(path)
    assert len(found) == 3
    kept, left_out = usable(tokenizer, "examples", found, chat=False)
    assert [each.answer for each, _ in kept] == ["1 2"]
    assert [(each.number, each.reason) for each in left_out] == [
        (1, "text is empty"), (2, "answer is empty"),
    ]  # fmt: skip
