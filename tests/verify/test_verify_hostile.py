"""Every text of both tables: its verdict, in time, and nothing left behind."""

import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from formula_cases import CASES as FORMULAS
from hostile_cases import CASES as HOSTILE
from kind_cases import CASES as PLAIN
from ordinary_cases import CASES as ORDINARY

from vps.verify import CompositeVerifier, check, default_pool, extract_answer, warm
from vps.verify.composite import TIMEOUT
from vps.verify.pool import MEMORY

pytest.importorskip("sympy")
pytest.importorskip("pint")
pytest.importorskip("math_verify")

CASES = HOSTILE + ORDINARY
KINDS = PLAIN + FORMULAS
# What a busy machine may keep this process waiting for beyond the limit.
SLACK = 0.5
LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")


def children():
    """Parent process of every process, by process id."""
    found = {}
    for entry in os.listdir("/proc") if os.path.exists("/proc/self/stat") else ():
        try:
            if entry.isdecimal():
                stat = Path("/proc", entry, "stat").read_text(errors="replace")
                found[int(entry)] = int(stat.rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    return found


def status(process, field):
    """A field of ``/proc/PID/status`` in bytes; 0 where the process is gone."""
    try:
        lines = Path("/proc", str(process), "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def own_children():
    """Processes that this one started and that are no workers of the default pool."""
    workers = set(default_pool().processes())
    return {
        child
        for child, parent in children().items()
        if parent == os.getpid() and child not in workers or parent in workers
    }


@pytest.fixture(scope="module")
def before():
    """Modules and processes when everything that verdicts need is loaded."""
    warm()
    check(r"\boxed{[0, 1)}", "2 km")
    check("2 km", "2000 m")
    return set(sys.modules), own_children()


@pytest.fixture
def guarded(before, tmp_path, monkeypatch):
    """Run in an empty folder; afterwards nothing may have been made, loaded or started."""
    modules, processes = before
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    warm()
    modules |= set(sys.modules)  # pytest's own
    yield
    assert os.listdir(tmp_path) == ["work"]
    for folder in (work, Path(tempfile.gettempdir()), Path(os.sep)):
        assert "CANARY" not in os.listdir(folder)
    assert not os.listdir(work)
    assert set(sys.modules) <= modules
    assert own_children() <= processes
    for worker in default_pool().processes():
        assert status(worker, "VmPeak") <= MEMORY
        assert status(worker, "VmHWM") <= MEMORY


def in_time(call, *arguments, **options):
    """What a call returns, which must come within the limit."""
    start = time.monotonic()
    found = call(*arguments, **options)
    assert time.monotonic() - start < options.get("timeout", TIMEOUT) + SLACK
    return found


@pytest.mark.parametrize(
    "prediction, gold, verdict", CASES, ids=lambda value: ascii(value[:24]).replace("::", ":")
)
def test_verdict(guarded, prediction, gold, verdict):
    assert in_time(check, prediction, gold).value == verdict


@pytest.mark.parametrize(
    "prediction, gold, verdicts", KINDS, ids=lambda value: ascii(value[:24]).replace("::", ":")
)
def test_verdict_and_loss_of_every_kind(before, prediction, gold, verdicts):
    """Loss agrees with verdict: none where equality is shown, some where a difference is."""
    verdict = check(prediction, gold, timeout=30).value
    assert verdict in verdicts
    parts = CompositeVerifier(timeout=30)(prediction, gold).parts
    if verdict == "correct":
        assert parts == {"numeric": 0, "units": 0, "algebraic": 0}
    elif verdict == "wrong":
        assert any(parts.values())


def test_an_answer_is_itself(before):
    """Both sides of every row that is no undefined value answer themselves."""
    for prediction, gold, _ in KINDS:
        for text in {prediction, gold}:
            assert check(text, text, timeout=30).value != "wrong", text


def test_table():
    assert len({(prediction, gold) for prediction, gold, _ in KINDS}) == len(KINDS) >= 300
    assert min(Counter(verdicts[0] for *_, verdicts in KINDS).values()) >= 100
    assert len({(prediction, gold) for prediction, gold, _ in CASES}) == len(CASES) >= 150
    assert min(Counter(verdict for *_, verdict in CASES).values()) >= 50


def test_losses(guarded):
    """All four parts are finite for any text, in one call within the limit."""
    verifier = CompositeVerifier(timeout=0.5)
    texts = [(prediction, gold) for prediction, gold, _ in CASES if len(prediction + gold) < 200]
    for prediction, gold in texts[::8]:
        start = time.monotonic()
        losses = verifier(prediction, gold, [prediction, gold, "5"])
        assert time.monotonic() - start < 0.5 + SLACK
        assert set(losses.parts) == {"numeric", "units", "algebraic", "self_consistency"}
        assert all(0 <= loss <= 1e300 for loss in losses.parts.values())


@LINUX
def test_worker_is_limited(before):
    for worker in default_pool().processes():
        limits = Path("/proc", str(worker), "limits").read_text().splitlines()
        by_name = {line[:26].strip(): line[26:].split()[:2] for line in limits}
        assert by_name["Max address space"] == [str(MEMORY)] * 2
        assert by_name["Max file size"] == ["0", "0"]
        assert by_name["Max core file size"] == ["0", "0"]
        maps = Path("/proc", str(worker), "maps").read_text()
        assert "libtorch" not in maps and "numpy" not in maps


def test_plain_answers_take_5_ms_at_most(before):
    plain = [
        ("The answer is 42.", "6 * 7 = 42\n#### 42"),
        (r"So we get \boxed{\frac{3}{4}}.", "0.75"),
        ("It costs $1,234.50 in all.", "#### 1234.5"),
        ("That makes 2 km.", "2000 m"),
        ("x^2 - 1", "x^2 - 1"),
        ("a step of 7. " * 100 + "The answer is 12%", "12"),
    ]
    times = []
    for prediction, gold in plain * 20:
        start = time.perf_counter()
        assert check(prediction, gold).value == "correct"
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] <= 0.005


def test_formulas_take_50_ms_at_most(before):
    """In the median, warm; the first of its kind takes longer."""
    formulas = [
        (r"\boxed{\frac{x^{2}-1}{x-1}}", "x + 1"),
        (r"So $x = \frac{\sqrt{3}}{2}$.", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed{2\sqrt{2} + \pi}", r"\sqrt{8} + \pi"),
        (r"\boxed{\{1, 2, 3\}}", "1, 2, 3"),
        (r"x \in (3, 5)", "3 < x < 5"),
    ]
    times = []
    for prediction, gold in formulas * 9:
        start = time.perf_counter()
        assert check(prediction, gold).value == "correct"
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] <= 0.05


@pytest.mark.parametrize("mark", ["so 5 ", "the answer is 5 ", "#### 5 ", r"\boxed{5 "])
@pytest.mark.parametrize("unit", list("()[]{}|^=,-!%") + [r"\pi ", "1 m ", "x y ", "'a", "½ "])
def test_extraction_is_linear(mark, unit):
    def seconds(count):
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            extract_answer(mark + unit * count)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(4096) < 8 * max(seconds(1024), 0.01)  # 16 times if it were quadratic


# No mutation of these pieces makes either gold.
GOLDS = ("271828.1828459", "x^7 + 31 y z^5")
PIECES = (
    [r"\boxed{", "}", "####", "The answer is ", r"\frac{", r"\sqrt[3]{", "^", "**", "!", "(", ")"]
    + ["[", "]", "{", "|", "$", "%", ",", ".", "-", "−", "+", "*", "/", "=", "<", ">=", "_", "\\"]
    + ["0", "2", "9", "9" * 50, "1e9", "1e-999", "2.5", "1,000", "½", "٤", "²", "\x00", "\u202e"]
    + ["x", "y", "n", r"\pi", r"\infty", "e", "i", "sin ", "log", r"\int", r"\sum_{i=0}", r"\binom"]
    + [" m", " km/h", " m^9", " °C", " apples", "\n", " ", " and ", " or ", "nan", "inf", "None"]
    + ["__import__('os')", "lambda x:", "().__class__", r"\text{", r"\begin{matrix}", "&", r"\\"]
)


def mutated(source):
    """A text of random pieces, or a text of the table with pieces put in, doubled and left out."""
    if source.random() < 0.4:
        return "".join(source.choices(PIECES, k=source.randrange(1, 24)))
    text = source.choice(CASES)[0][:300]
    for _ in range(source.randrange(1, 6)):
        at, length = source.randrange(len(text) + 1), source.randrange(8)
        match source.randrange(3):
            case 0:
                text = text[:at] + source.choice(PIECES) + text[at:]
            case 1:
                text = text[:at] + text[at : at + length] * 2 + text[at + length :]
            case _:
                text = text[:at] + text[at + length :]
    return text


@pytest.mark.parametrize("seed", range(4))
def test_random_texts(guarded, seed):
    source, found = random.Random(seed), Counter()
    for number in range(75):
        text, gold = mutated(source), GOLDS[number % 2]
        for pair in ((text, gold), (gold, text)):
            found[in_time(check, *pair, timeout=0.3).value] += 1
            assert not found["correct"], pair
    assert found["wrong"] > 30 and found["undecided"] > 0
