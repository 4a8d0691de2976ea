"""The study of reproduction: its scoring, its resumption, and what its statistics find in
planted data."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from evaluation_cases import tokenizer
from scipy.optimize import minimize_scalar
from tiny import tiny

import vps
from benchmarks.reproduce import cells, equivalence, protocol, questions, scoring, texts
from benchmarks.reproduce.cells import Part
from benchmarks.reproduce.findings import CONTROLS, NULLS, PLAIN, findings
from benchmarks.reproduce.measures import ACCURACY, chosen
from benchmarks.reproduce.report import NOISE, write_report
from vps import VPSConfig
from vps.evaluation.confidence import ORDERS
from vps.evaluation.controls import control
from vps.evaluation.grid import BASELINE
from vps.evaluation.paired import Outcome
from vps.evaluation.runs import Evaluation, ablate, read_run
from vps.model.capture import restored
from vps.verify import CompositeVerifier

ASKED = [
    ("Question: 3 + 4\nAnswer:", ["7", "8", "17", "71"]),
    ("Question: 12 * 12, and then some more\nAnswer:", ["144", "143", "14", "1444"]),
    ("Q", ["0"]),
]


def model(**config):
    """A patched model of characters, in float64."""
    made = tiny(vocab_size=99, max_position_embeddings=256)
    vps.patch(made, VPSConfig(**config))
    return made


def one_by_one(made, read, context, option):
    """The log-likelihood of an option in a row of its own."""
    first, whole = (read(text)["input_ids"] for text in (context, f"{context} {option}"))
    marks = torch.arange(len(whole)) < len(first)
    with vps.prompt(marks.unsqueeze(0)), torch.no_grad():
        logits = made(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, whole[i]]) for i in range(len(first), len(whole)))


@pytest.mark.parametrize("scope", ("token", "prompt"))
@pytest.mark.parametrize(
    "variant", ("baseline", "sharpened", "random_indices", "random_noise", "shuffled_selection")
)
def test_options_of_one_row_score_as_rows_of_their_own(scope, variant):
    made, read = model(scope=scope, gamma=0.6), tokenizer()
    with control(made, variant):
        found = scoring.log_likelihoods(made, [scoring.encoded(read, *each) for each in ASKED])
        for (context, options), scores in zip(ASKED, found, strict=True):
            expected = [one_by_one(made, read, context, option) for option in options]
            torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_a_prefix_that_options_share_is_one_token():
    made = scoring.row([5, 6], [[1, 2, 3], [1, 2, 4], [1], [9, 9]])
    assert made.tokens == (5, 6, 1, 2, 9)
    assert made.parents == (-1, 0, 1, 2, 1)
    assert made.options[1] == ((1, 1), (2, 2), (4, 3))
    for context, options in (([], [[1]]), ([1], [[1], []])):
        with pytest.raises(ValueError, match="at least one token"):
            scoring.row(context, options)


def test_batches_hold_every_row_once():
    lengths = [3, 50, 7, 7, 20, 1]
    found = scoring.batches(lengths, 60)
    assert sorted(index for batch in found for index in batch) == list(range(6))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 60 for batch in found)


@pytest.mark.parametrize("scope", ("token", "prompt"))
def test_loss_of_prose_is_that_of_the_tokens_after_the_prompt(scope):
    made = model(scope=scope, gamma=0.6)
    ids = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(0))
    found = texts.losses(made, ids.tolist(), 5)
    for text, loss in zip(ids, found, strict=True):
        with vps.prompt((torch.arange(12) < 5).unsqueeze(0)), torch.no_grad():
            logits = made(text.unsqueeze(0)).logits[0, 4:-1]
        expected = torch.nn.functional.cross_entropy(logits, text[5:])
        assert loss == pytest.approx(float(expected), abs=1e-6)


def test_answers_do_not_depend_on_batch_mates():
    made, read = model(scope="token", gamma=0.6), tokenizer()
    prompts = [context for context, _ in ASKED]
    together = texts.answers(made, read, prompts, 4)
    assert together == [texts.answers(made, read, [each], 4)[0] for each in prompts]


def test_questions_of_the_study_are_not_those_of_the_pilot():
    for kind in questions.KINDS:
        pilot = {each["question"] for each in questions.questions(kind, 20, pilot=True)}
        study = [each["question"] for each in questions.questions(kind, 60)]
        assert len(set(study)) == 60 and not pilot & set(study)


@pytest.fixture
def small(monkeypatch):
    """A study of a few short questions for a model of characters."""
    monkeypatch.setattr(cells, "BLOCK", 4)
    drawn = [
        {"question": f"{i} + {j}", "answer": str(i + j), "choices": [str(i + j), "3"], "gold": 0}
        for i in range(4, 7)
        for j in range(2)
    ]
    monkeypatch.setattr(questions, "questions", lambda kind, count, pilot=False: drawn[:count])
    grid = cells.grid("small", {"paper": {}}, ("token",))
    return Part("small", grid, questions=6)


def test_a_killed_run_loses_one_block_at_most(small, tmp_path, monkeypatch):
    made, read = model(), tokenizer()
    cells.run(small, made, read, "m", tmp_path / "whole")
    scored = []
    score = scoring.log_likelihoods

    def killed(model, rows):
        scored.append(len(rows))
        if len(scored) == 9:
            raise KeyboardInterrupt
        return score(model, rows)

    monkeypatch.setattr(scoring, "log_likelihoods", killed)
    with pytest.raises(KeyboardInterrupt):
        cells.run(small, made, read, "m", tmp_path / "killed")
    (left,) = (tmp_path / "killed/blocks").glob("1.jsonl")
    left.write_bytes(left.read_bytes() + b'{"block": 2, "outco')  # cut off while it was written
    cells.run(small, made, read, "m", tmp_path / "killed")
    assert len(scored) == 5 * 6 + 1  # five cells of three kinds in two blocks, one of them twice
    assert not list((tmp_path / "killed/blocks").iterdir())
    one, other = (read_run(tmp_path / name) for name in ("whole", "killed"))
    for index, record in one.finished.items():
        assert record.outcomes == other.finished[index].outcomes
    assert {"instructions", "commit", "torch"} <= one.finished[0].facts.keys()


def planted(tmp_path, effect, discordance, n=1000, seed=0):
    """A finished run in which every cell changes answers, those of the paper with an effect."""
    grid = cells.grid("planted", {"paper": {}}, ("prompt",))
    truth = np.random.default_rng(seed).random(n) < 0.5

    def evaluate(cell):
        generator = np.random.default_rng(seed + 1 + cell.index)
        gain = effect if cell.control is None else 0.0
        right = truth.copy()
        if cell.name != BASELINE:
            up, down = (discordance + gain) / 2, (discordance - gain) / 2
            draw = generator.random(n)
            right = np.where(truth, draw >= down / truth.mean(), draw < up / (1 - truth.mean()))
        scores = ([0.0, -1.0], [-1.0, 0.0])
        return Evaluation([chosen("k", i, scores[not own], 0) for i, own in enumerate(right)])

    ablate(grid, evaluate, tmp_path, {})
    return {
        (each.family, each.comparison.cell, each.comparison.against): each
        for each in findings(read_run(tmp_path), resamples=99)[ACCURACY]
    }


def test_a_planted_effect_of_five_points_is_found(tmp_path):
    found = planted(tmp_path, 0.05, 0.08)
    (own,) = (each for (family, *_), each in found.items() if family == PLAIN)
    assert own.comparison.n == 1000 and own.verdict == "better" and own.detectable < 0.05
    against = [each for (family, *_), each in found.items() if family == CONTROLS]
    assert len(against) == 3 and all(each.comparison.corrected < 0.05 for each in against)


def test_a_planted_null_is_equivalent(tmp_path):
    found = planted(tmp_path, 0.0, 0.03)
    assert {each.verdict for each in found.values()} == {"equivalent"}
    assert sum(family == NULLS for family, *_ in found) == 3


def test_findings_refuse_an_unfinished_part(tmp_path):
    ablate(cells.grid("g", {"paper": {}}, ("token",), controls=False), failing, tmp_path, {})
    with pytest.raises(vps.evaluation.runs.RunError, match="not finished: paper, token"):
        findings(read_run(tmp_path))


def failing(cell):
    if cell.name != BASELINE:
        raise RuntimeError("no")
    return Evaluation([Outcome("k", "0", ACCURACY, 1.0)])


@pytest.mark.parametrize("gained,lost,n", [(0, 0, 30), (5, 0, 40), (0, 7, 50), (12, 20, 300)])
@pytest.mark.parametrize("difference", (-0.1, -0.02, 0.02, 0.1))
def test_score_of_equivalence_uses_the_likeliest_shares(gained, lost, n, difference):
    """Under the hypothesis, found by searching the likelihood."""

    def minus_likelihood(q):
        shares = np.array([q + difference, q, 1 - 2 * q - difference])
        counts = np.array([gained, lost, n - gained - lost])
        return -(counts * np.log(np.maximum(shares, 1e-300)))[counts > 0].sum()

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    q = minimize_scalar(minus_likelihood, bounds=bounds, options={"xatol": 1e-9}).x
    variance = 2 * q + difference - difference**2
    expected = (gained - lost - n * difference) / np.sqrt(n * variance)
    assert equivalence.score(gained, lost, n, difference) == pytest.approx(expected, rel=1e-3)


def test_equivalence_of_accuracies():
    assert equivalence.accuracies(0, 0, 1000, 0.02) < 1e-4
    assert equivalence.accuracies(0, 0, 50, 0.02) > 0.05
    assert equivalence.accuracies(60, 10, 1000, 0.02) > 0.9
    with pytest.raises(ValueError, match="of 5, margin"):
        equivalence.accuracies(4, 4, 5, 0.02)


def test_power_of_equivalence_is_the_share_of_draws():
    n, discordance = 400, 0.03
    generator = np.random.default_rng(0)
    draws = generator.multinomial(n, [discordance / 2, discordance / 2, 1 - discordance], 1000)
    shown = np.mean([equivalence.accuracies(b, c, n, 0.02) <= 0.05 for b, c, _ in draws])
    assert equivalence.power(n, discordance, 0.02) == pytest.approx(shown, abs=0.04)
    powers = [equivalence.power(n, share, 0.02) for share in (0.0, 0.02, 0.05, 0.1)]
    assert all(one > other for one, other in pairwise(powers))


def test_a_false_equivalence_is_as_rare_as_its_level():
    """At the margin itself the tests show equivalence in at most about one of twenty."""
    assert equivalence.power(1000, 0.06, 0.02, effect=0.02) < 0.06


def test_equivalence_of_means():
    generator = np.random.default_rng(0)
    assert equivalence.means(generator.normal(0, 0.1, 64), 0.05) < 0.01
    assert equivalence.means(generator.normal(0.05, 0.1, 64), 0.05) > 0.05
    assert (equivalence.means([0.0, 0.0], 0.1), equivalence.means([1.0, 1.0], 0.1)) == (0.0, 1.0)


@pytest.mark.parametrize("variant", ("sharpened", "random_noise", "shuffled_selection", "baseline"))
def test_loop_with_gold_starts_with_the_plain_answer_and_leaves_the_model(variant):
    made, read = model(scope="prompt"), tokenizer()
    document = {"choices": ["7", "18", "19", "70"], "gold": 1}
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with vps.disabled(made):
        (plain,) = scoring.log_likelihoods(
            made, [scoring.encoded(read, "9 + 9 =", document["choices"])]
        )
    with restored(made), control(made, variant):
        found = protocol.refined(made, read, "9 + 9 =", document, CompositeVerifier())
    assert len(found) == protocol.ITERATIONS
    assert found[0].margin == pytest.approx(plain[1] - max(plain[0], *plain[2:]), abs=1e-9)
    assert (found[1].margin == found[0].margin) == (variant == "baseline")
    assert all((each.loss == 0) == each.right for each in found)
    assert protocol.best(found).loss == min(each.loss for each in found)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_selection_and_labels_gain_without_meaning():
    margins = np.random.default_rng(0).normal(0, 1, 300)
    found = {each: protocol.without_meaning(margins, 0.5, each) for each in ORDERS}
    assert all(each["best"].low > 0 for each in found.values())  # labels choose
    assert found["hardest"]["last"].low > 0  # the hardest are wrong: they can only gain
    assert found["uncertain"]["last"].low < 0 < found["uncertain"]["last"].high
    none = protocol.without_meaning(margins, 0.0, "hardest")
    assert none["best"].mean == none["last"].mean == 0
    arms = {"plain": margins > 0, "all": np.ones(300)}
    gains = protocol.resampled(margins, arms, "hardest")
    assert gains["plain"].mean == 0 and gains["all"].low > 0.9
    assert gains == protocol.resampled(margins, arms, "hardest")
    with pytest.raises(ValueError, match="uncertain, hardest, got 'easy'"):
        protocol.resampled(margins, arms, "easy")


def test_report_of_a_small_study(small, tmp_path):
    made, read = model(), tokenizer()
    loop = dataclasses.replace(small, questions=0, pool=3)
    for part, name in ((small, "main"), (loop, "loop")):
        cells.run(part, made, read, "m", tmp_path / name)
    text = write_report(tmp_path)
    assert "| paper, token · random_noise | baseline | 18 |" in text
    assert "| paper, token, best | +" in text and NOISE in text
    assert (tmp_path / "forest.png").read_bytes().startswith(b"\x89PNG")
    parts = json.loads((tmp_path / "findings.json").read_text())["parts"]
    for values in parts.values():
        assert {"cpu", "instructions", "commit"} <= values["facts"][0].keys()
        assert values["settings"]["seed"] == questions.SEED
    assert len(parts["main"]["findings"]) == 7  # one cell, against three controls, and they
    assert all("detectable" in each for each in parts["main"]["findings"])
