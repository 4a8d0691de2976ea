"""How fast the command answers: what needs no model loads no torch, text comes as it is made."""

import gc
import json
import os
import subprocess
import sys
import time

import pytest
from processes import ROOT, python

from vps import cli
from vps.cli.doctor import advice
from vps.cli.terminal import GrowingColumns
from vps.model import loading
from vps.model.generation import GrowingText, encode, generate

HERE = "generate", "--model", "m", "--prompt", "1"
WITHOUT_TORCH = [
    (["--version"], 0),
    (["--help"], 0),
    (["generate", "--help"], 0),
    ([], 2),
    (["frob"], 2),
    (["generate"], 2),
    (["generate", "--model", "m", "--frob"], 2),
    ([*HERE, "--dtype", "int8"], 2),
    ([*HERE, "--device", "cdua"], 2),
    ([*HERE, "--device", "gpu"], 2),
    ([*HERE, "--set", "gama=1"], 2),
    ([*HERE, "--config", "missing"], 2),
    ([*HERE, "--calibration", "missing"], 2),
    (["generate", "--model", "missing.gguf", "--prompt", "1"], 2),
    (["generate", "--model", "./missing", "--prompt", "1"], 2),
    (["refine", "--model", "./missing", "--prompt", "1"], 2),
    (["refine", "--model", "m", "--data", "missing", "--out", "x"], 2),
    (["calibrate", "--model", "m", "--data", "missing", "--out", "x"], 2),
    (["calibrate", "--model", "m", "--data", "README.md", "--out", "x"], 2),
    (["eval", "--model", "./missing", "--tasks", "x"], 2),
    (["ablate", "missing", "--model", "m", "--tasks", "x", "--out", "x"], 2),
    (["report", "missing"], 2),
    (["demo", "--model-dir", "missing"], 2),
]


def test_what_needs_no_model_loads_no_torch():
    run = python(
        """
        import json, sys
        from vps import cli
        for arguments, code in json.loads(sys.argv[1]):
            assert cli.main(arguments) == code, arguments
            assert "torch" not in sys.modules, arguments
        """,
        json.dumps(WITHOUT_TORCH),
    )
    assert run.returncode == 0, run.stderr
    errors = run.stderr.splitlines()
    assert len(errors) == sum(code == 2 for _, code in WITHOUT_TORCH), run.stderr
    assert all(line.startswith("vps: error: ") for line in errors)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--model"]])
def test_help_and_refusals_take_half_a_second(arguments):
    """Of a processor, in the best of three: other work on the machine does not count."""
    fastest = float("inf")
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "vps.cli", *arguments], cwd=ROOT, capture_output=True)
        after = os.times()
        spent = after.children_user + after.children_system
        fastest = min(fastest, spent - before.children_user - before.children_system)
    assert fastest < 0.5


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("gen", ["generate"]),
        ("generate --pro", ["--prompt", "--prompt-file"]),
        ("generate --dtype b", ["bfloat16"]),
        ("generate --set gam", ["gamma=", "gamma_bounds="]),
        ("eval --tasks x,vps_u", ["x,vps_units", "x,vps_units_choice"]),
    ],
)
def test_a_shell_completes_without_torch(words, completed):
    words = f"vps {words}"
    environment = dict(
        _VPS_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" "))
    )
    code = "import sys; from vps import cli; cli.main(); assert 'torch' not in sys.modules"
    run = python(code, **environment)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.split() == completed


def test_completion_scripts_are_shown(run, monkeypatch):
    monkeypatch.setattr("typer._completion_shared._get_shell_name", lambda: "bash", raising=False)
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash", raising=False)
    code, out, err = run("--show-completion")
    assert (code, err) == (0, "") and "_VPS_COMPLETE=complete_bash" in out
    assert run("--version")[1].startswith("vps 0.")  # and nothing of it stays


class Pieces:
    """A standard output that tells what was written when it was flushed."""

    encoding, errors = "utf-8", "strict"

    def __init__(self, terminal=False):
        self.flushed, self.text, self.terminal = [], "", terminal

    def write(self, text):
        self.text += text

    def flush(self):
        self.flushed.append(self.text)

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("terminal", [False, True])
def test_text_comes_as_it_is_made(folder, monkeypatch, run, terminal):
    arguments = ["generate", "--model", str(folder), "--prompt", "1 2", "--max-new-tokens", "12"]
    text = json.loads(run(*arguments, "--json")[1])["sharpened"]["text"]
    stream = Pieces(terminal)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(GrowingText, "REST", 0)
    assert cli.main(arguments) == 0
    assert stream.text == text + "\n"
    assert len({each for each in stream.flushed if each}) > 5


def test_a_reader_that_leaves_ends_generation_silently(folder):
    command = f"{sys.executable} -m vps.cli generate --model {folder} --prompt '1 2' | head -c 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert len(done.stdout) == 1 and done.stderr == ""


def test_columns_grow_on_a_terminal_and_the_output_is_as_ever(folder, run, monkeypatch):
    monkeypatch.setattr(GrowingText, "REST", 0)
    arguments = ["generate", "--model", str(folder), "--prompt", "1 2", "--compare"]
    expected = run(*arguments)
    seen = []
    for name in ("plain", "sharpened"):
        add = getattr(GrowingColumns, name)
        monkeypatch.setattr(
            GrowingColumns,
            name,
            lambda self, piece, add=add: (seen.append(piece), add(self, piece)),
        )
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    code, out, err = run(*arguments)
    assert (code, out) == expected[:2] and len(seen) > 10
    assert "sharpened" in err and "plain" in err and "-|-" in err


def byte_tokenizer(**options):
    """A tokenizer of bytes, so that letters come in several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, **options)


@pytest.mark.parametrize(
    "text",
    ["plain words", "naïve 漢字 🙂 end 🙂", " two  spaces ", "a\n\nb", "\ufffd odd \ufffd", ""],
)
@pytest.mark.parametrize("tidied", [False, True])
def test_pieces_together_are_the_whole_text(text, tidied, monkeypatch):
    monkeypatch.setattr(GrowingText, "REST", 0)
    tokenizer = byte_tokenizer(clean_up_tokenization_spaces=tidied)
    tokens = tokenizer(text)["input_ids"]
    pieces = []
    growing = GrowingText(tokenizer, pieces.append)
    for token in tokens:
        growing.add([token])
    if len(text) > 10 and not tidied:
        assert len(pieces) > 5
    growing.end()
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_tidied_spaces_are_held_back(monkeypatch):
    monkeypatch.setattr(GrowingText, "REST", 0)

    class Tidied:
        clean_up_tokenization_spaces = True

        def decode(self, tokens, skip_special_tokens):
            text = "".join(map(chr, tokens))
            for old, new in ((" .", "."), (" ' ", "'"), (" n't", "n't"), (" 've", "'ve")):
                text = text.replace(old, new)
            return text

    said = "I do n't know . They 've said ' so ' . And more ."
    pieces = []
    growing = GrowingText(Tidied(), pieces.append)
    for letter in said:
        growing.add([ord(letter)])
    assert len(pieces) > 10
    growing.end()
    assert "".join(pieces) == Tidied().decode([ord(letter) for letter in said], True)


def test_decoding_takes_a_tenth_of_the_time_at_most(monkeypatch):
    clock, decoded = [0.0], []

    class Slow:
        def decode(self, tokens, skip_special_tokens):
            clock[0] += 1.0
            decoded.append(len(tokens))
            return "x" * len(tokens)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    growing = GrowingText(Slow(), lambda piece: None)
    for token in range(100):
        clock[0] += 1.0
        growing.add([token])
    assert 5 <= len(decoded) <= 12


@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_collected_once_a_model_is_there(folder, run, monkeypatch, before):
    (gc.enable if before else gc.disable)()
    seen = []
    monkeypatch.setattr("vps.model.generation.encode", lambda *_, **__: seen.append(gc.isenabled()))
    try:
        run("generate", "--model", folder, "--prompt", "1")
        run("--version")
        assert seen == [True] and gc.isenabled() is before
    finally:
        gc.enable()


def test_streaming_changes_no_token(folder, tokenizer):
    model, _ = loading.load_model(str(folder))
    inputs = encode(tokenizer, "1 2 3")
    pieces = []
    alone = generate(model, tokenizer, inputs, 9)
    shown = generate(model, tokenizer, inputs, 9, show=pieces.append)
    assert shown.tokens == alone.tokens and "".join(pieces) == alone.text


def test_errors_say_where_a_model_is(refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "DEMO_PACKAGE", "no_such_package")
    common = ("generate", "--prompt", "1", "--model")
    for name in ("missing.gguf", "./missing", str(tmp_path)):
        assert "`make demo` puts the demo's model into .cache/smollm2" in refuse(*common, name)
    (tmp_path / ".cache/smollm2").mkdir(parents=True)
    (tmp_path / ".cache/smollm2/config.json").write_text("{}")
    assert refuse(*common, "missing.gguf").endswith("the demo's model is in .cache/smollm2\n")
    (tmp_path / "text.txt").write_text("x")
    assert "but another file: text.txt" in refuse(*common, "text.txt")


def test_a_missing_package_names_the_extra_that_brings_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    monkeypatch.delitem(sys.modules, "vps.evaluation.runs", raising=False)
    code, _, err = run("report", "x")
    assert code == 1 and "pip install 'vps-kernels[eval]'" in err and err.count("\n") == 1


FACTS = {
    "packages": {"transformers": "5", "lm_eval": "1", "scipy": "1"},
    "devices": {"cpu": "x"},
    "backends": {"cpp": "available", "triton": "none"},
    "tools": {"c++": "/usr/bin/c++"},
}


def changed(**sections):
    return {name: values | sections.get(name, {}) for name, values in FACTS.items()}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (FACTS, ["vps generate --model here", "vps demo", "vps eval --model here"]),
        (
            changed(packages={"transformers": "missing: x"}),
            ["pip install 'vps-kernels[hf]'"],
        ),
        (changed(packages={"lm_eval": "missing: x"}), ["'vps-kernels[eval]'"]),
        (changed(backends={"cpp": "not built"}), ["VPS_BUILD_CPP=1 pip install"]),
        (
            changed(backends={"cpp": "not built"}, tools={"c++": "not found"}),
            ["install a C++ compiler"],
        ),
        (changed(devices={"cuda:0": "H200"}, backends={"triton": "gone"}), ["the GPU well: gone"]),
    ],
)
def test_doctor_says_what_to_do_next(monkeypatch, facts, words):
    monkeypatch.setattr(loading, "demo_model", lambda: "here")
    monkeypatch.setattr("vps.cli.doctor.shutil.which", lambda name: None)
    steps = "\n".join(advice(facts))
    assert all(word in steps for word in words), steps


def test_doctor_without_a_model_says_how_to_get_one(monkeypatch, run):
    monkeypatch.setattr(loading, "demo_model", lambda: None)
    assert "`make demo`" in "\n".join(advice(FACTS))
    code, out, _ = run("doctor")
    assert code == 0 and "`make demo`" in out.partition("\nnext\n")[2]
    assert json.loads(run("doctor", "--json")[1])["next"]
