"""Files that a command goes on with, or writes over: nothing of anybody else is cut or replaced."""

import json
import os

import pytest
from ablation_cases import SETTINGS, by_an_earlier_version, evaluate, grid
from cli_cases import FAST, rows, write

from vps import Calibration, files
from vps.evaluation.runs import RunError, ablate, read_run
from vps.fitting.calibrate import Kept

FOREIGN = {
    "a note": b"remember the milk",
    "a header": b"row,prompt,gold\n",
    "XML": b'<?xml version="1.0"?><rows/>',
    "an array": b'[{"row": 1}]\n',
    "a number": b"42",
    "a string": b'"row"',
    "bytes": b"\x89PNG\r\n\x1a\x00\xff",
    "half a letter": "é".encode()[:1],
    "another object": b'{"prompt": "1 2 3"',
    "text like a row": b'{"row": this is no JSON}',
    "a word like a row": b'{"row": hello',
    "a row with more after it": b'{"row": 1} f',
    "a row in latin-1": b'{"row": 1, "prompt": "caf\xe9 noir"',
    "a row over lines": b'{"row": \n1}',
    "a mark": b"\xef\xbb\xbfnotes",
    "blank lines around": b"\n\n  notes\n\n",
    "the names of cells": b'{"cell": 1',
}
NO_MODEL = ("--model", "nobody/none")  # for what is refused before any model is looked for


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_somebody_else_stays_as_it_is(refuse, tmp_path, text):
    """It is refused by name, before any model is looked for."""
    data = write(tmp_path / "in.jsonl", [{"prompt": "1 2 3", "gold": "6"}])
    out = tmp_path / "notes.txt"
    for given in (text, text + b"\n", text.replace(b"\n", b"\r\n")):
        out.write_bytes(given)
        err = refuse("refine", *NO_MODEL, "--data", data, "--out", out)
        assert err.startswith(f"vps: error: --out: {out}: line ") and out.read_bytes() == given


def row(**values):
    """A row with everything that JSON has, as it is written."""
    return {
        "row": 12, "id": None, "prompt": "é 😀 \ud800 \\ \" \n \x00 γ", "gold": "", "true": True,
        "false": [False, {}, [], -0.5, 1.5e-07, 1e22, float("nan"), -float("inf")], **values,
    }  # fmt: skip


def test_every_cut_of_a_row_is_cut_off(tmp_path):
    """kill -9 may come after any byte."""
    path = tmp_path / "rows.jsonl"
    files.append(path, row())
    whole = path.read_bytes()
    assert files.read_objects(path, '{"row": ')[1] == len(whole)
    for before in (b"", whole, whole + b"\n\r\n", b"\xef\xbb\xbf" + whole):
        for length in range(1, len(whole) - 1):
            for end in (b"", b"\n") if length % 9 == 0 else (b"",):
                path.write_bytes(before + whole[:length] + end)
                found, kept = files.read_objects(path, '{"row": ')
                assert len(found) == (before.strip(b"\xef\xbb\xbf\r\n") != b"")
                files.cut(path, kept)
                assert path.read_bytes() == before
                if before and length > 40:
                    break


def test_only_the_end_of_a_row_is_missing(tmp_path):
    path = tmp_path / "rows.jsonl"
    files.append(path, row())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    found, kept = files.read_objects(path, '{"row": ')
    files.cut(path, kept)
    assert len(found) == 1 and path.read_bytes() == whole


def test_blank_lines_and_other_ends_of_lines_are_read_over(refine, tmp_path):
    """An editor may have had the results: they are gone on with, and nothing of them is cut."""
    data = write(tmp_path / "in.jsonl", [{"prompt": "1 2"}, {"prompt": "3 4"}, {"prompt": "5 6"}])
    out = tmp_path / "out.jsonl"
    assert refine("--data", data, "--out", out)[0] == 0
    whole = out.read_bytes()
    first, second, third = whole.splitlines(keepends=True)
    for edited in (
        first + b"\n" + second + b"  \n\n",
        first.replace(b"\n", b"\r\n") + b"\r\n" + second.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + first + second,
        b"\n\n" + first + second + b"\n",
    ):
        out.write_bytes(edited + third[:50])
        code, text, err = refine("--data", data, "--out", out, "--json")
        assert (code, err) == (0, "") and json.loads(text)["skipped"] == 2
        assert out.read_bytes() == edited + third
        assert refine("--data", data, "--out", out)[0] == 0
        assert out.read_bytes() == edited + third
    out.write_bytes(b"\n \n")  # blank, so nobody's
    assert refine("--data", data, "--out", out)[0] == 0
    assert out.read_bytes() == b"\n \n" + whole


@pytest.mark.parametrize("how", ["same", "symlink", "hardlink"])
@pytest.mark.parametrize(
    "text", [b'{"prompt": "1"}', b'{"row": 1, "pro', b'{"prompt": "1"}\n{"row']
)
def test_the_input_is_no_output(refuse, tmp_path, how, text):
    data = tmp_path / "in.jsonl"
    data.write_bytes(text)
    out = {"same": tmp_path / "." / "in.jsonl"}.get(how, tmp_path / "out.jsonl")
    if how == "symlink":
        out.symlink_to(data)
    elif how == "hardlink":
        os.link(data, out)
    if text.startswith(b'{"ro'):  # an input that was cut off itself
        data.write_bytes(b'{"prompt": "1"}\n' + text)
    before = data.read_bytes()
    err = refuse("refine", *NO_MODEL, "--data", data, "--out", out)
    assert f"--out {out}: is the file of --data" in err
    assert data.read_bytes() == before


@pytest.fixture(params=["folder", "pipe", "device"])
def no_file(request, tmp_path):
    path = tmp_path / "out"
    if request.param == "folder":
        path.mkdir()
    elif request.param == "pipe":
        os.mkfifo(path)
    else:
        os.symlink("/dev/null", path)
    return path


def test_what_is_no_file_is_no_output(refuse, tmp_path, no_file):
    """A pipe would be waited for, and a device replaced by a file."""
    kind = os.stat(no_file).st_mode
    data = write(tmp_path / "in.jsonl", rows(8))
    err = refuse("refine", *NO_MODEL, "--data", data, "--out", no_file)
    assert "not a regular file" in err and str(no_file) in err
    for more in ((), ("--gradient-only",)):
        err = refuse("calibrate", *NO_MODEL, "--data", data, "--out", no_file, *more)
        assert "expected a file in a folder that exists" in err
    with pytest.raises(OSError, match="not a regular file"):
        files.replace(no_file, "text")
    with pytest.raises(ValueError, match="holds no interrupted calibration"):
        Kept(no_file, {})
    assert os.stat(no_file).st_mode == kind


def test_calibrate_writes_over_its_own_files_alone(run, refuse, folder, tmp_path):
    examples = [{"prompt": "1 2 3", "answer": str(i)} for i in range(8)]
    data, out = write(tmp_path / "in.jsonl", examples), tmp_path / "cal.json"
    partial = tmp_path / "cal.json.partial"
    common = ("--data", data, "--out", out)
    for text in (*FOREIGN.values(), b"{}", b'{"format": "vps-settings-1"}', b'{"key": 1}'):
        out.write_bytes(text)
        for more in ((), ("--gradient-only",)):
            err = refuse("calibrate", *NO_MODEL, *common, *more)
            assert f"--out {out}: holds no " in err
            assert out.read_bytes() == text
        out.unlink()
        partial.write_bytes(text)
        err = refuse("calibrate", *NO_MODEL, *common)
        assert f"{partial} holds no interrupted calibration" in err
        assert partial.read_bytes() == text and not out.exists()
        partial.unlink()
    err = refuse("calibrate", *NO_MODEL, "--data", data, "--out", data)
    assert len(data.read_text().splitlines()) == 8

    model = ("--model", folder, "--no-controls", *FAST)
    out.write_bytes(b"")  # as mktemp leaves it
    for _ in range(2):  # a calibration may be made anew
        assert run("calibrate", *model, *common)[0] == 0
    made = Calibration.load(out)
    err = refuse("calibrate", *NO_MODEL, *common, "--gradient-only")
    assert "holds no ranking by --gradient-only" in err
    assert Calibration.load(out) == made

    ranking, picture = tmp_path / "r.json", tmp_path / "r.png"
    common = ("--data", data, "--out", ranking, "--gradient-only")
    picture.write_bytes(b"holiday")
    err = refuse("calibrate", *NO_MODEL, *common)
    assert f"{picture} is there" in err and picture.read_bytes() == b"holiday"
    picture.unlink()
    for _ in range(2):
        assert run("calibrate", *model, *common)[0] == 0
    err = refuse("calibrate", *NO_MODEL, *common[:2], "--out", ranking)
    assert "holds no calibration" in err
    common = ("--data", data, "--out", tmp_path / "x.png", "--gradient-only")
    err = refuse("calibrate", *NO_MODEL, *common)
    assert ".png is the heat map" in err


def test_an_ablation_writes_over_its_own_cells_alone(tmp_path):
    ablate(grid(), evaluate, tmp_path, SETTINGS)
    path = tmp_path / "cells/2.json"
    whole = path.read_bytes()
    other = whole.replace(b'"cell": 2', b'"cell": 1')
    for text in (
        *FOREIGN.values(),
        b"",
        whole[:-9],
        whole + b"notes",
        b"{}",
        b'{"cell": 2}',
        other,
    ):
        path.write_bytes(text)
        for read in (read_run, lambda path: ablate(grid(), evaluate, path, SETTINGS)):
            with pytest.raises(RunError, match="cells/2.json is no result of a cell"):
                read(tmp_path)
        assert path.read_bytes() == text
    path.unlink()
    (tmp_path / "cells/7.json").write_bytes(whole.replace(b'"cell": 2', b'"cell": 7'))
    with pytest.raises(RunError, match="cells/7.json is of no cell of .*run.json"):
        ablate(grid(), evaluate, tmp_path, SETTINGS)


def test_an_ablation_leaves_the_rows_of_an_earlier_version(tmp_path):
    ablate(grid(), evaluate, tmp_path, SETTINGS)
    whole = b"".join(by_an_earlier_version(tmp_path))
    shard = tmp_path / "cells-0.jsonl"
    for text in (*FOREIGN.values(), whole + b"notes", whole + b'{"row": 1', whole + b'{"cell": x'):
        if text != FOREIGN["the names of cells"]:
            shard.write_bytes(text)
            with pytest.raises(RunError, match="line . is no JSON object"):
                ablate(grid(), evaluate, tmp_path, SETTINGS)
            assert shard.read_bytes() == text
    for text, message in (
        (b"{}\n", "cells-0.jsonl: row 1 is no result of a cell"),
        (whole + b'{"prompt": "1"}\n', "cells-0.jsonl: row 4 is no result of a cell"),
        (whole.replace(b'"cell": 2', b'"cell": 7'), "row 3 is of no cell of .*run.json"),
    ):
        shard.write_bytes(text)
        for read in (read_run, lambda path: ablate(grid(), evaluate, path, SETTINGS)):
            with pytest.raises(RunError, match=message):
                read(tmp_path)
        assert shard.read_bytes() == text
    shard.write_bytes(whole.replace(b"\n", b"\r\n\r\n") + b'{"cell": 2, "sec')
    before = shard.read_bytes()
    assert ablate(grid(), None, tmp_path, SETTINGS).skipped == 3
    assert shard.read_bytes() == before


def test_an_ablation_takes_no_table_of_somebody_else(tmp_path):
    (tmp_path / "table.md").write_text("my table")
    with pytest.raises(RunError, match="holds table.md, but no run.json"):
        ablate(grid(), evaluate, tmp_path, SETTINGS)
    assert (tmp_path / "table.md").read_text() == "my table"
    assert not (tmp_path / "run.json").exists()
    (tmp_path / "table.md").unlink()
    (tmp_path / "run.json").write_bytes(b"not of a run")
    with pytest.raises(RunError, match="run.json is not of the format"):
        ablate(grid(), evaluate, tmp_path, SETTINGS)
    assert (tmp_path / "run.json").read_bytes() == b"not of a run"
