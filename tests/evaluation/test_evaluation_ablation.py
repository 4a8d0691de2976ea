"""Runs that are killed, interrupted, full, doubled, changed or shared."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from ablation_cases import SETTINGS, TEN, by_an_earlier_version, evaluate, grid, outcomes

from vps import files
from vps.evaluation import runs
from vps.evaluation.grid import make_grid
from vps.evaluation.paired import Outcome
from vps.evaluation.runs import Evaluation, RunError, ablate, read_run

ROOT = Path(__file__).parents[2]


def test_results_come_back_as_they_were_given(tmp_path):
    made = grid(0.3, 0.5)
    facts = {"device": "cpu: X", "torch": "2.13"}
    steps = []
    done = ablate(made, evaluate, tmp_path / "x", SETTINGS, facts=facts,
                  advance=lambda: steps.append(1))  # fmt: skip
    assert (done.evaluated, done.failed, done.skipped, len(steps)) == (3, 0, 0, 3)
    run = read_run(tmp_path / "x")
    assert run.cells == made.cells and run.definition == SETTINGS and run.title == "ablation"
    for cell in made.cells:
        record = run.records[cell.index]
        assert list(record.outcomes) == outcomes(cell) and record.facts == facts
        assert record.first == (cell.index == 0) and record.seconds >= 0
        assert record.scopes == {"loglikelihood": "token"}
    rated = [Outcome("t", "ü|\ud800", "acc", 1.0, -0.25)]
    ablate(grid(0.1), lambda cell: Evaluation(rated), tmp_path / "y", SETTINGS)
    assert list(read_run(tmp_path / "y").records[0].outcomes) == rated
    again = ablate(made, None, tmp_path / "x", SETTINGS)
    assert (again.evaluated, again.skipped) == (0, 3)


def test_failed_cells_are_written_and_tried_again(tmp_path):
    made = grid(0.3, 0.5, 0.7)
    broken = {1: ValueError("no layer\nmatches"), 3: None}

    def sometimes(cell):
        if cell.index == 1:
            raise broken[1]
        if cell.index == 3:
            return Evaluation([Outcome("t", "4", "nll", float("nan"))])
        return evaluate(cell)

    done = ablate(made, sometimes, tmp_path, SETTINGS)
    assert (done.evaluated, done.failed) == (2, 2)
    run = read_run(tmp_path)
    assert run.records[1].error == "ValueError: no layer matches"
    assert (
        "nll of document '4' of t is nan with weight 1.0, expected finite" in run.records[3].error
    )
    assert sorted(run.finished) == [0, 2]
    table = (tmp_path / "table.md").read_text()
    assert "2 of 4 cells are finished" in table and "failed: ValueError: no layer matches" in table
    done = ablate(made, evaluate, tmp_path, SETTINGS)
    assert (done.evaluated, done.failed, done.skipped) == (2, 0, 2)
    assert sorted(read_run(tmp_path).finished) == [0, 1, 2, 3]
    assert all(record.error is None for record in read_run(tmp_path).records.values())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "gave no outcome"),
        ([Outcome("t", "1", "acc", 1.0)] * 2, "acc of document '1' of t comes twice"),
        ([Outcome("t", "1", "acc", 1.0, None, 0.0)], "weight 0.0, expected finite"),
    ],
)
def test_a_failed_baseline_ends_the_run(tmp_path, bad, message):
    with pytest.raises(RuntimeError, match=f"the baseline failed: ValueError: .*{message}"):
        ablate(grid(), lambda cell: Evaluation(bad), tmp_path, SETTINGS)
    assert list(read_run(tmp_path).records) == [0]


def test_an_interrupt_leaves_a_readable_table(tmp_path):
    def interrupted(cell):
        if cell.index == 2:
            raise KeyboardInterrupt
        return evaluate(cell)

    with pytest.raises(KeyboardInterrupt):
        ablate(grid(), interrupted, tmp_path, SETTINGS)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[2].startswith("2 of 3 cells are finished.")
    assert table[4] == "| cell | state | t, acc | text, nll | seconds |"
    mean = sum(o.value for o in outcomes(grid().cells[1])[:6]) / 6
    assert table[7].startswith(f"| gamma=0.3 | done | {mean:.4f} |")
    assert table[8] == "| gamma=0.5 | not yet |  |  |  |"
    assert ablate(grid(), evaluate, tmp_path, SETTINGS).skipped == 2


def test_the_table_holds_cells_back_until_their_controls_are_there(tmp_path):
    made = make_grid({"cells": [{"gamma": 0.3}]})

    def interrupted(cell):
        if cell.control == "random_noise":
            raise KeyboardInterrupt
        return evaluate(cell)

    with pytest.raises(KeyboardInterrupt):
        ablate(made, interrupted, tmp_path, SETTINGS)
    assert "| gamma=0.3 | waits for its controls |  |  |" in (tmp_path / "table.md").read_text()
    ablate(made, evaluate, tmp_path, SETTINGS)
    assert "| gamma=0.3 | done | 0." in (tmp_path / "table.md").read_text()


def test_a_folder_of_an_earlier_version_is_continued(tmp_path):
    """Also one that was cut in the midst of a line, which nobody writes to any more."""
    made = grid()
    ablate(made, evaluate, tmp_path, SETTINGS)
    expected = results(tmp_path)
    lines = by_an_earlier_version(tmp_path)
    shard = tmp_path / "cells-0.jsonl"
    assert results(tmp_path) == expected and ablate(made, None, tmp_path, SETTINGS).skipped == 3
    shard.write_bytes(b"".join(lines)[:-1])  # only the end of the line is missing: it is there
    assert results(tmp_path) == expected and ablate(made, None, tmp_path, SETTINGS).skipped == 3
    for kept in (len(lines[2]) - 2, len(lines[2]) // 2, 1):
        cut = lines[0] + lines[1] + lines[2][:kept]
        shard.write_bytes(cut)
        assert sorted(read_run(tmp_path).records) == [0, 1]
        done = ablate(made, evaluate, tmp_path, SETTINGS)
        assert (done.evaluated, done.skipped) == (1, 2) and results(tmp_path) == expected
        assert shard.read_bytes() == cut
        (tmp_path / "cells/2.json").unlink()
    failed = lines[2].replace(b'"error": null', b'"error": "ValueError: x"')
    shard.write_bytes(lines[0] + lines[1] + failed)
    assert ablate(made, evaluate, tmp_path, SETTINGS).evaluated == 1
    assert results(tmp_path) == expected
    shard.write_bytes(lines[0] + b"{broken\n" + lines[2])
    with pytest.raises(RunError, match=r"cells-0.jsonl: line 2 is no JSON object"):
        ablate(made, evaluate, tmp_path, SETTINGS)
    with pytest.raises(RunError, match="model is 'm' there, 'n' here"):
        ablate(made, evaluate, tmp_path, SETTINGS | {"model": "n"})


def test_what_a_killed_write_left_is_taken_away(tmp_path):
    made = grid()
    ablate(made, evaluate, tmp_path, SETTINGS)
    whole = (tmp_path / "cells/2.json").read_bytes()
    (tmp_path / "cells/2.json").unlink()
    part, foreign = tmp_path / "cells/.2.json.4711", tmp_path / "cells/.notes"
    part.write_bytes(whole[:50])
    foreign.write_text("mine")
    assert sorted(read_run(tmp_path).records) == [0, 1]
    assert ablate(made, evaluate, tmp_path, SETTINGS, rank=1, world=2).skipped == 1
    assert part.exists()  # of a cell of the other process
    assert ablate(made, evaluate, tmp_path, SETTINGS).evaluated == 1
    assert not part.exists() and foreign.read_text() == "mine"


SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = {tests!r}
from ablation_cases import SETTINGS, TEN, evaluate
from vps.evaluation.runs import ablate

folder, log, pause, rank, world = sys.argv[1:]

def slow(cell):
    with open(log, "a") as file:
        print("begin", cell.index, file=file)
    time.sleep(float(pause))
    return evaluate(cell)

ablate(TEN, slow, Path(folder), SETTINGS, rank=int(rank), world=int(world))
"""


def start(folder, log, pause=0.0, rank=0, world=1):
    code = textwrap.dedent(
        SCRIPT.format(tests=[str(ROOT / "tests/evaluation"), str(ROOT / "tests")])
    )
    arguments = map(str, (folder, log, pause, rank, world))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def begun(log):
    return [int(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_kill_9_loses_and_repeats_no_finished_cell(tmp_path):
    """Killed twice in the midst of a cell, and a rival is refused while the writer lives."""
    folder, log = tmp_path / "x", tmp_path / "log"
    for cells in (3, 6):
        process = start(folder, log, pause=0.15)
        wait_for(lambda cells=cells: len(begun(log)) >= cells)
        if cells == 3:
            with pytest.raises(RunError, match="another process is writing to .*x"):
                ablate(TEN, evaluate, folder, SETTINGS)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        finished = set(read_run(folder).finished)
        assert 0 < len(finished) < 10 and (folder / "lock").exists()
    process = start(folder, log)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert sorted(folder.glob("cells/*")) == sorted(folder / f"cells/{i}.json" for i in range(10))
    times = begun(log)
    assert set(times) == set(range(10)) and len(times) <= 12  # one cell begun anew for each kill
    ablate(TEN, evaluate, tmp_path / "y", SETTINGS)
    assert results(folder) == results(tmp_path / "y")


def results(folder):
    run = read_run(folder)
    return run.cells, {i: (r.outcomes, r.scopes, r.error) for i, r in run.records.items()}


def test_two_processes_give_what_one_gives(tmp_path):
    processes = [start(tmp_path / "two", tmp_path / f"log{r}", 0.05, r, 2) for r in (0, 1)]
    for process in processes:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    assert begun(tmp_path / "log0") == [0, 2, 4, 6, 8]
    assert begun(tmp_path / "log1") == [1, 3, 5, 7, 9]
    ablate(TEN, evaluate, tmp_path / "one", SETTINGS)
    assert results(tmp_path / "two") == results(tmp_path / "one")
    done = ablate(TEN, None, tmp_path / "two", SETTINGS, rank=2, world=3)
    assert (done.evaluated, done.skipped) == (0, 3)  # merged, whatever wrote it
    with pytest.raises(ValueError, match="rank is 2 of 2 processes, expected 0 to 1"):
        ablate(TEN, evaluate, tmp_path / "two", SETTINGS, rank=2, world=2)


def test_launches_of_other_sizes_are_refused_too(tmp_path):
    """One rank of two holds its cells; a single process would repeat the one it works on."""
    process = start(tmp_path / "x", tmp_path / "log", 30, rank=1, world=2)
    try:
        wait_for(lambda: begun(tmp_path / "log"))
        for rank, world in ((0, 1), (1, 3), (1, 2)):
            with pytest.raises(RunError, match="it works on cell"):
                ablate(TEN, evaluate, tmp_path / "x", SETTINGS, rank=rank, world=world)
        done = ablate(TEN, evaluate, tmp_path / "x", SETTINGS, rank=0, world=2)
        assert done.evaluated == 5
    finally:
        process.kill()
        process.communicate()


def test_a_changed_run_is_refused_with_the_difference(tmp_path):
    ablate(grid(0.3, 0.5), evaluate, tmp_path, SETTINGS)
    before = {path: path.read_bytes() for path in tmp_path.glob("cells/*")}
    for made, settings, messages in (
        (grid(), SETTINGS | {"model": "n"}, ["model is 'm' there, 'n' here"]),
        (grid(), SETTINGS | {"tasks": ["t", "u"]}, [r"tasks is \['t'\] there, \['t', 'u'\] here"]),
        (grid(), SETTINGS | {"limit": 5}, ["limit is None there, 5 here"]),
        (grid(0.3, 0.7), SETTINGS, ["only there: 'gamma=0.5'", "only here: 'gamma=0.7'"]),
        (grid(0.5, 0.3), SETTINGS, ["the cells are in another order"]),
        (grid(title="b"), SETTINGS, ["title is 'ablation' there, 'b' here"]),
        (
            grid(fixed={"rank": 3}),
            SETTINGS,
            ["cell 'gamma=0.3': rank 2 there, 3 here, adaptive_rank True there, False here"],
        ),
        (grid(controls=["random_noise"]), SETTINGS, ["2 cells only here: 'gamma=0.3 · random_no"]),
    ):
        for message in messages:
            with pytest.raises(RunError, match=message):
                ablate(made, evaluate, tmp_path, settings)
    assert {path: path.read_bytes() for path in tmp_path.glob("cells/*")} == before
    with pytest.raises(RunError, match=r"and \d+ more"):
        many = {str(i): i for i in range(12)}
        ablate(grid(), evaluate, tmp_path, SETTINGS | many)
    (tmp_path / "run.json").write_text('{"format": "other"}')
    with pytest.raises(RunError, match="not of the format vps-ablation-2"):
        ablate(grid(), evaluate, tmp_path, SETTINGS)
    (tmp_path / "run.json").unlink()
    with pytest.raises(RunError, match="holds cells but no run.json"):
        ablate(grid(), evaluate, tmp_path, SETTINGS)
    with pytest.raises(RunError, match="holds no run: expected .*run.json"):
        read_run(tmp_path)


def test_a_full_disk_is_reported_and_loses_nothing(tmp_path, monkeypatch):
    """The disk takes the third cell, and cannot keep it."""
    sync = os.fsync

    def full(file):
        if "/cells/.2.json" in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: not written.*cells/2.json"):
        ablate(grid(), evaluate, tmp_path, SETTINGS)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("cells/*")) == ["0.json", "1.json"]
    assert ablate(grid(), evaluate, tmp_path, SETTINGS).skipped == 2


@pytest.mark.parametrize("write", [files.append, lambda path, row: files.replace(path, row["a"])])
def test_a_file_that_may_not_grow(tmp_path, write):
    """The same by the kernel: a limit on the size of files stops the write in the midst."""
    path = tmp_path / "rows.jsonl"
    write(path, {"a": "x" * 600})
    before = path.read_bytes()
    process = os.fork()
    if not process:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            write(path, {"a": "y" * 1100})
        except OSError as error:
            code = 0 if error.errno == errno.EFBIG and str(path) in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_disk_that_takes_half_of_a_row(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    files.append(path, {"row": 1})
    write, full = os.write, []

    def little(file, data):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        full.append(file)
        return write(file, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", little)
    with pytest.raises(OSError, match=r"No space left on device: a row was not.*rows.jsonl"):
        files.append(path, {"row": 2})
    assert path.read_text() == '{"row": 1}\n'


def test_every_cell_is_on_the_disk_before_the_next_begins(tmp_path, monkeypatch):
    """Its file and its name in the folder."""
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or sync(file)
    )
    seen = []

    def watching(cell):
        names = [name.removeprefix(f"{tmp_path}/") for name in synced]
        seen.append([name.split(".json")[0] for name in names if name.startswith("cells")])
        return evaluate(cell)

    ablate(grid(), watching, tmp_path, SETTINGS)
    assert seen == [[], ["cells/.0", "cells"], ["cells/.0", "cells", "cells/.1", "cells"]]


def test_wait_for_others(tmp_path):
    process = start(tmp_path / "x", tmp_path / "log", 0.2, rank=9, world=10)
    wait_for(lambda: begun(tmp_path / "log"))
    runs.wait_for_others(tmp_path / "x")
    assert 9 in read_run(tmp_path / "x").finished
    process.communicate(timeout=60)


def test_fingerprint_tells_weights_apart(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"1" * 3000000)
    first = runs.fingerprint(str(tmp_path))
    assert first == runs.fingerprint(str(tmp_path)) and len(first) == 16
    (tmp_path / "a.bin").write_bytes(b"1" * 2999999 + b"2")
    assert runs.fingerprint(str(tmp_path)) != first
    assert runs.fingerprint("org/name") is None
