"""The pool of workers, killed, stopped, busy, forked and closed: a verdict comes in time."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vps.verify import CompositeVerifier, Pool, check
from vps.verify.composite import TIMEOUT

pytest.importorskip("sympy")
pytest.importorskip("pint")
pytest.importorskip("math_verify")

SLACK = 0.5
ALGEBRA = ("x^2 - 1", "(x-1)(x+1)")
ENDLESS = (r"\sum_{i=1}^{10^{12}} \frac{1}{i}", "1")


@pytest.fixture
def pool():
    """A pool of two with one warm worker."""
    made = Pool()
    made.warm()
    yield made
    made.close()
    assert not any(map(alive, made.processes()))


def alive(process):
    """Whether a process runs; one that ended and was not collected does not."""
    try:
        return Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(processes, seconds):
    """Whether all of them end in time."""
    deadline = time.monotonic() + seconds
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, processes))


def verdict(pair, pool, timeout=TIMEOUT):
    """The verdict, which must come within the limit."""
    start = time.monotonic()
    found = check(*pair, timeout=timeout, pool=pool).value
    assert time.monotonic() - start < timeout + SLACK
    return found


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_killed_from_outside(pool, kill):
    for process in pool.processes():
        os.kill(process, kill)
    assert verdict(ALGEBRA, pool) in ("correct", "undecided")  # it waits for the next worker
    pool.warm()
    assert verdict(ALGEBRA, pool) == "correct"


def test_killed_while_it_works(pool):
    (process,) = pool.processes()
    timer = threading.Timer(0.3, os.kill, (process, signal.SIGKILL))
    timer.start()
    assert verdict(ENDLESS, pool) == "undecided"
    timer.join()
    pool.warm()
    assert verdict(ALGEBRA, pool) == "correct"


def test_stopped_from_outside(pool):
    (process,) = pool.processes()
    os.kill(process, signal.SIGSTOP)
    assert verdict(ALGEBRA, pool, 0.5) == "undecided"
    assert gone([process], 5)
    pool.warm()
    assert verdict(ALGEBRA, pool) == "correct"


def test_late_one_is_replaced(pool):
    (process,) = pool.processes()
    assert verdict(ENDLESS, pool, 0.5) == "undecided"
    assert gone([process], 5)
    # The next worker is starting.
    assert verdict(ALGEBRA, pool, 0.1) in ("correct", "undecided")
    pool.warm()
    assert verdict(ALGEBRA, pool) == "correct"


def test_many_threads(pool):
    found = []

    def work(pair):
        for _ in range(3):
            found.append((pair, verdict(pair, pool, 0.6)))

    threads = [
        threading.Thread(target=work, args=(pair,))
        for pair in [ENDLESS, ALGEBRA, ("42", "42"), ENDLESS, ALGEBRA, ("42", "41")]
    ]
    for thread in threads:
        thread.start()
    for process in pool.processes():
        os.kill(process, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert len(found) == 18  # none was late, see verdict
    for pair, value in found:
        assert (
            value
            in {
                ENDLESS: ["undecided"],
                ALGEBRA: ["correct", "undecided"],
                ("42", "42"): ["correct"],
                ("42", "41"): ["wrong"],
            }[pair]
        )
    assert len(pool.processes()) <= pool.size
    pool.warm()
    assert verdict(ALGEBRA, pool) == "correct"


def test_memory_limit(pool):
    """A limit at what a worker holds when it is ready, since Python may end below that."""
    used = [int(Path(f"/proc/{own}/statm").read_text().split()[0]) for own in pool.processes()]
    limit = max(used) * resource.getpagesize() + (2 << 20)
    large = ("(a+b+c+x+y)^9", "((a+b)^2 + 2(a+b)(c+x+y) + (c+x+y)^2)^4 (a+b+c+x+y)")
    assert verdict(large, pool) == "correct"
    small = Pool(memory=limit)
    try:
        small.warm()
        assert verdict(large, small) == "undecided"
        for own in small.processes():
            assert int(Path(f"/proc/{own}/statm").read_text().split()[0]) <= limit
        assert verdict(("x", "x"), small) == "correct"
    finally:
        small.close()


def test_a_worker_without_memory_has_a_successor(tmp_path):
    script = tmp_path / "worker.py"
    answer = '{"verdict": "undecided", "exhausted": true}'
    script.write_text(
        f"print('{{}}', flush=True)\nwhile True:\n    input()\n    print({answer!r}, flush=True)\n"
    )
    pool = Pool(script=script)
    try:
        assert verdict(ALGEBRA, pool) == "undecided"
        (process,) = pool.processes()  # the successor, which no verdict has used
        assert verdict(ALGEBRA, pool) == "undecided"
        assert gone([process], 5) and process not in pool.processes()
    finally:
        pool.close()


def test_script_that_ends_at_once(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("")
    pool = Pool(script=script)
    try:
        assert verdict(ALGEBRA, pool) == "undecided"
        losses = CompositeVerifier(pool=pool)(*ALGEBRA)
        assert losses.parts["algebraic"] == 1 and losses.undecided == ("algebraic",)
    finally:
        pool.close()


@pytest.mark.parametrize("answer", ["", "[]", "{", "null", "x" * 100_000])
def test_worker_that_answers_nonsense(tmp_path, answer):
    script = tmp_path / "worker.py"
    script.write_text(f"print('{{}}', flush=True)\nfor _ in range(9):\n    print({answer!r})\n")
    pool = Pool(script=script)
    try:
        assert verdict(ALGEBRA, pool) == "undecided"
    finally:
        pool.close()


def test_inherits_no_secrets(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    pool = Pool()
    try:
        pool.warm()
        for process in pool.processes():
            assert b"s3cret" not in Path("/proc", str(process), "environ").read_bytes()
            assert os.readlink(f"/proc/{process}/cwd") == "/"
    finally:
        pool.close()


def test_closed(pool):
    processes = pool.processes()
    pool.close()
    assert gone(processes, 5)
    assert verdict(ALGEBRA, pool) == "undecided"
    assert verdict(("42", "42"), pool) == "correct"
    pool.close()


def run(source):
    """What a Python prints, and its process id."""
    with subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        output, errors = process.communicate(timeout=60)
    return output.split(), errors, process.returncode


def test_leaves_no_process_behind():
    output, errors, code = run(
        "from vps.verify import check, default_pool, warm\n"
        "warm(); print(*default_pool().processes()); check('x+1', '1+x')"
    )
    assert (errors, code) == ("", 0) and output
    assert gone(map(int, output), 5)


@pytest.mark.parametrize("busy", [False, True])
def test_parent_that_is_killed_leaves_no_process_behind(busy):
    output, errors, code = run(
        "import os, threading, time\n"
        "from vps.verify import check, default_pool, warm\n"
        "warm(); print(*default_pool().processes(), flush=True)\n"
        f"if {busy}: threading.Thread(target=check, args={ENDLESS!r}).start(); time.sleep(0.3)\n"
        "os.kill(os.getpid(), 9)"
    )
    assert (errors, code) == ("", -signal.SIGKILL) and output
    assert gone(list(map(int, output)), 15)


def test_fork():
    """A child has its own workers and locks; the parent keeps its workers."""
    output, errors, code = run(
        """
import gc, os, threading, time, warnings
from vps.verify import check, default_pool, pool, warm
warnings.simplefilter("error")
warm()
parent = default_pool().processes()
threading.Thread(target=check, args=(r"\\sum_{i=1}^{10^{12}} 1/i", "1")).start()
held = threading.Event()
def hold():
    with pool._default_lock:
        held.set(); time.sleep(1)
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if not child:
    gc.collect()
    start = time.monotonic()
    print(check("2 km", "2000 m").value, flush=True)
    print(check("x^2 - 1", "(x-1)(x+1)", timeout=20).value, flush=True)
    print(set(default_pool().processes()).isdisjoint(parent), flush=True)
    default_pool().close()
    os._exit(0)
os.waitpid(child, 0)
warm()
print(check("x^2 - 1", "(x-1)(x+1)").value)
"""
    )
    assert (output, errors, code) == (["correct", "correct", "True", "correct"], "", 0)
