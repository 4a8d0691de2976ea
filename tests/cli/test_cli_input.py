"""What the command reads and where it writes: editors, terminals and shells of other people."""

import io
import json
import os
import subprocess
import sys

import pytest

from vps import VPSConfig, cli
from vps.cli.values import read_config

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TERMINALS = {  # encoding and what Python does with letters outside it
    "ascii": ("ascii", "strict"),
    "latin-1": ("latin-1", "strict"),
    "C": ("ascii", "surrogateescape"),
    "utf-8": ("utf-8", "strict"),
}


def shell(arguments, more="", environment=None, **options):
    """The command in a process of its own, through a shell."""
    return subprocess.run(
        f"{sys.executable} -m vps.cli {arguments} {more}", shell=True, cwd=ROOT,
        env=os.environ | (environment or {}), capture_output=True, check=False, timeout=120,
        **options,
    )  # fmt: skip


def test_configs_are_json_or_yaml(tmp_path):
    """By the reader of all files of settings (tests/test_reading.py)."""
    for text in ('{"alpha": 1e-2,\r\n "tau": null}', "# mine\r\nalpha: 1e-2\r\ntau: null\r\n"):
        (tmp_path / "c").write_bytes(f"\ufeff{text}".encode())
        assert read_config(tmp_path / "c", []) == VPSConfig(alpha=0.01, tau=None)
        assert read_config(tmp_path / "c", ["rank=3"]).rank == 3


@pytest.mark.parametrize("name", ["c.json", "c.yaml", "c"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rank": 1, "rank": 3}', "the key 'rank' comes twice"),
        (f'{{"rank": {"[" * 700}{"]" * 700}}}', "c"),
        ('{"rank": 1', "not valid"),
        ("[1]", "expected an object, got list"),
        ('{"rank": "x"}', "VPSConfig.rank is 'x'"),
        ('{"gama": 1}', "unknown key 'gama'; did you mean 'gamma'"),
        (b"\xff\xfe{\0}\0", "not UTF-8 text, at byte 0"),
    ],
)
def test_broken_configs_are_one_line(refuse, tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    err = refuse("generate", "--model", "m", "--prompt", "1", "--config", path)
    assert err.startswith(f"vps: error: --config {path}: ")
    assert message in err and len(err) < 5000


def test_weights_are_read_alike(refuse):
    common = ("refine", "--model", "m", "--prompt", "1", "--weights")
    for text, message in (
        ('{"numeric": 1, "numeric": 2}', "the key 'numeric' comes twice"),
        ("[" * 100_000, "nested too deeply"),
    ):
        assert message in refuse(*common, text)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("gamma=.3", 0.3),
        ("gamma=1", 1.0),
        ("rank=3", 3),
        ("tau=null", None),
        ("tau=none", None),
        ("clamp=1e-2", 0.01),
        ("rank_bounds=[1,2]", (1, 2)),
        ("gamma_bounds=0.1,0.2", (0.1, 0.2)),
        ("lbfgs=False", False),
        ("builder=sk", "sk"),
        ("target_modules=q_proj,v_proj", ("q_proj", "v_proj")),
        ("target_modules=q_proj, v_proj,", ("q_proj", "v_proj")),
        ("target_modules=q_proj", ("q_proj",)),
        ("target_modules=[q_proj,v_proj]", ("q_proj", "v_proj")),
        ("target_modules=['q_proj', 'v_proj']", ("q_proj", "v_proj")),
        ("target_modules=layers.0.up_proj,lm-head", ("layers.0.up_proj", "lm-head")),
        ("target_modules=0,2", ("0", "2")),
        ("target_modules=0", ("0",)),
        ("exclude_modules=k_proj,o_proj", ("k_proj", "o_proj")),
        ("layers_to_transform=0", (0,)),
        ("layers_to_transform=0,1", (0, 1)),
        ("layers_to_transform=[0, 1]", (0, 1)),
        ('target_modules=["q_proj"]', ("q_proj",)),
        # What is more than names stays a regular expression.
        (r"target_modules=.*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"target_modules=.*\.[0-9]{1,2}\.up_proj", r".*\.[0-9]{1,2}\.up_proj"),
        ("target_modules=.*up_proj", ".*up_proj"),
        ("target_modules=.*_proj,x", ".*_proj,x"),
        ("target_modules=(q|v)_proj", "(q|v)_proj"),
        ("target_modules=[qv]", "[qv]"),
        ("target_modules=model.layers.0.mlp.up_proj", ("model.layers.0.mlp.up_proj",)),
        ("target_modules=all-linear", "all-linear"),
        ('target_modules="q_proj"', "q_proj"),
        ("exclude_modules=null", None),
    ],
)
def test_settings_are_read_by_the_type_of_their_field(setting, value):
    assert getattr(read_config(None, [setting]), setting.partition("=")[0]) == value


def test_settings_nested_too_deeply(refuse):
    """What does not fit is left for VPSConfig to refuse."""
    for setting in ("rank_bounds=" + '{"a":' * 100_000, "rank=" + "[" * 100_000):
        err = refuse("generate", "--model", "m", "--prompt", "1", "--set", setting)
        assert err.startswith("vps: error: --set: VPSConfig.rank")


def test_names_reach_the_model(generate):
    code, out, _ = generate("--prompt", "1", "--set", "target_modules=q_proj,v_proj")
    assert code == 0 and json.loads(out)["layers"] == 4


def test_prompts_with_a_mark(generate, tmp_path, monkeypatch):
    plain = json.loads(generate("--prompt", "5 6")[1])
    (tmp_path / "p.txt").write_bytes("\ufeff5 6".encode())
    code, out, _ = generate("--prompt-file", tmp_path / "p.txt")
    assert code == 0 and json.loads(out)["prompt"] == "5 6"
    for encoding in ("utf-8", "ascii"):
        given = io.TextIOWrapper(io.BytesIO("\ufeff5 6".encode()), encoding)
        monkeypatch.setattr("sys.stdin", given)
        code, out, _ = generate()
        assert json.loads(out)["sharpened"]["tokens"] == plain["sharpened"]["tokens"]


def test_standard_input_has_an_encoding(refuse, monkeypatch):
    """Of the terminal, where it has one for more than ASCII."""

    def given(data, encoding, errors="strict"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding, errors))
        return refuse("generate", "--model", "/no/such", "--json")

    for data, encoding in (
        ("é".encode(), "utf-8"), ("é".encode(), "ascii"), ("é".encode("latin-1"), "latin-1"),
    ):  # fmt: skip
        assert "no such" in given(data, encoding)  # got as far as the model
    for encoding, errors in (("utf-8", "strict"), ("utf-8", "surrogateescape"), ("ascii",) * 2):
        err = given(b"caf\xe9", encoding, errors if errors != "ascii" else "strict")
        assert "standard input: not UTF-8 text, at byte 3" in err


def test_prompts_on_the_command_line_of_an_ascii_locale(folder):
    found = shell(
        f"generate --model {folder} --max-new-tokens 2 --json --prompt '1 é'", environment=ASCII
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["prompt"] == "1 é"


def test_arguments_that_are_no_text(refuse):
    for option in ("--prompt", "--gold"):
        err = refuse("refine", "--model", "m", option, "caf\udce9")
        assert f"'{option}': not UTF-8 text" in err


def terminal(monkeypatch, name):
    """Standard output and error of a terminal; what is written comes back as bytes."""
    encoding, errors = TERMINALS[name]
    written = io.BytesIO(), io.BytesIO()
    for stream, buffer, how in zip(("stdout", "stderr"), written, (errors, "strict"), strict=True):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(buffer, encoding, how))
    return written


@pytest.mark.parametrize("name", TERMINALS)
def test_every_terminal_can_show_help(monkeypatch, name):
    out, err = terminal(monkeypatch, name)
    for command in ([], ["calibrate"], ["refine"]):
        assert cli.main([*command, "--help"]) == 0 and err.getvalue() == b""
    assert ("γ" if name == "utf-8" else "\\u03b3").encode() in out.getvalue()


@pytest.mark.parametrize("name", TERMINALS)
def test_every_terminal_can_show_answers(monkeypatch, name):
    """JSON stays JSON, and what a terminal can show it shows."""
    text = "γ é 😀 \ud800"

    def answer(command):
        print(json.dumps({"text": text}, ensure_ascii=False))
        raise RuntimeError(text)

    monkeypatch.setattr("vps.cli.doctor.Doctor.run", answer)
    out, err = terminal(monkeypatch, name)
    assert cli.main(["doctor"]) == 1
    (line,) = out.getvalue().splitlines()
    encoding = TERMINALS[name][0]
    assert json.loads(line.decode(encoding))["text"] == text
    assert ("é" in line.decode(encoding)) is (encoding != "ascii")
    error = err.getvalue().decode(encoding)
    assert error.startswith("vps: error: ") and error.endswith("\\ud800\n")


def test_names_of_files_keep_their_bytes_in_a_c_locale(monkeypatch):
    """There Python gives them as surrogates, which it writes as the bytes that they were."""
    out, _ = terminal(monkeypatch, "C")
    monkeypatch.setattr("vps.cli.doctor.Doctor.run", lambda command: print("/tmp/\udcc3\udca9"))
    assert cli.main(["doctor"]) == 0 and out.getvalue() == "/tmp/é\n".encode()


@pytest.mark.parametrize(
    ("arguments", "closed", "message"),
    [
        (["generate"], "stdin", "standard input is closed; give --prompt or --prompt-file"),
        (["refine"], "stdin", "standard input is closed; give --prompt or --prompt-file"),
        (["generate", "--prompt", "1"], "stdout", "standard output is closed"),
        (["--help"], "stdout", "standard output is closed"),
    ],
)
def test_closed_streams(run, monkeypatch, arguments, closed, message):
    monkeypatch.setattr(sys, closed, None)  # which Python does where the shell closed them
    code, out, err = run(*arguments, *(["--model", "m"] if len(arguments) % 2 else []))
    assert (code, out, err) == (2, "", f"vps: error: {message}\n")


def test_streams_that_a_shell_closed(folder):
    found = shell("doctor --json", ">&- <&-")
    assert (found.returncode, found.stdout) == (2, b"")
    assert found.stderr == b"vps: error: standard output is closed\n"
    found = shell("generate --model m", "0>/dev/null")
    assert found.returncode == 2 and found.stderr.startswith(b"vps: error: standard input: ")
    assert found.stderr.count(b"\n") == 1


def test_a_closed_error_stream_harms_nothing(folder):
    common = f"generate --model {folder} --prompt 1 --max-new-tokens 2 --json"
    found = shell(common, "2>&- <&-")
    assert found.returncode == 0 and json.loads(found.stdout)["prompt"] == "1"
    found = shell(f"{common} --set gamma=x", "2>&-")  # the error goes nowhere, not into the answer
    assert found.returncode == 2 and found.stdout == b""


def test_streams_are_left_as_they_were(run):
    before = [(stream.errors, stream) for stream in (sys.stdout, sys.stderr)]
    run("doctor")
    assert [(stream.errors, stream) for stream in (sys.stdout, sys.stderr)] == before


def test_data_that_is_no_text(refuse, tmp_path):
    """Nothing of it can be used, which is known before the model is loaded."""
    (tmp_path / "in.jsonl").write_bytes('{"prompt": "1"}\n'.encode("utf-16"))
    common = ("--model", "m", "--data", tmp_path / "in.jsonl", "--out", tmp_path / "out")
    for command, where in (("refine", "in.jsonl: no row"), ("calibrate", "in.jsonl, line 1")):
        err = refuse(command, *common)
        assert where in err and "not UTF-8 text, at byte 0" in err
        assert not (tmp_path / "out").exists()
