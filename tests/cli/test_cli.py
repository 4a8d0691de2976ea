"""The command vps, driven on a tiny random Llama saved with its own tokenizer."""

import io
import json
import logging
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from processes import python

from vps import VPSConfig
from vps.cli.terminal import Progress, side_by_side
from vps.cli.values import UsageError, read_config
from vps.model.generation import first_difference
from vps.model.loading import load_model


def tokens_of(ran):
    """The sharpened tokens in what ``vps generate --json`` printed."""
    return json.loads(ran[1])["sharpened"]["tokens"]


def test_generate_compares_with_the_plain_model(generate, folder):
    code, out, err = generate("--prompt", "1 2 3", "--compare")
    result = json.loads(out)
    assert (code, err) == (0, "")
    model, tokenizer = load_model(str(folder))
    ids = tokenizer("1 2 3", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert result["plain"]["tokens"] == plain
    assert result["layers"] == 14
    assert result["first_difference"] == first_difference(plain, result["sharpened"]["tokens"])
    assert result["first_difference"] is not None


def test_gamma_zero_is_the_plain_model(generate, tmp_path, monkeypatch):
    (tmp_path / "c.json").write_text(VPSConfig(scope="token").to_json())
    (tmp_path / "p.txt").write_text("5 6")
    code, out, _ = generate(
        "--prompt-file", tmp_path / "p.txt", "--compare",
        "--config", tmp_path / "c.json", "--set", "gamma=0",
    )  # fmt: skip
    result = json.loads(out)
    assert code == 0 and result["first_difference"] is None
    assert result["config"]["scope"] == "token" and result["config"]["adaptive_gamma"] is False
    monkeypatch.setattr("sys.stdin", io.StringIO("5 6"))
    assert tokens_of(generate("--set", "gamma=0")) == result["plain"]["tokens"]


def test_text_output(run, folder):
    arguments = ("generate", "--model", folder, "--prompt", "1", "--max-new-tokens", 5)
    code, out, _ = run(*arguments, "--compare")
    assert code == 0 and "plain" in out.splitlines()[0] and "sharpened" in out.splitlines()[0]
    assert "differ" in out.splitlines()[-1]
    code, out, _ = run(*arguments)
    assert code == 0 and out[0].isdigit()


@pytest.mark.parametrize("width", [10, 40, 101])
def test_columns_hold_every_word_and_no_escapes(monkeypatch, width):
    """Of texts that a terminal library might take for markup, too wide or of no letters."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    plain = "[bold]7[/bold] :smile: " + "x" * 300 + "\n\n  indented"
    shown = side_by_side(plain, "漢字 " * 40 + "\ud800").splitlines()
    assert shown[0].split() == ["plain", "|", "sharpened"]
    assert {line.find("|") for line in shown} == {shown[0].find("|")} or width == 10
    left, right = (
        "".join(line.partition("|")[place].strip() for line in shown[2:]) for place in (0, 2)
    )
    assert left.replace(" ", "") == plain.replace(" ", "").replace("\n", "")
    assert right.replace(" ", "") == "漢字" * 40 + "\ud800"
    assert "\x1b" not in "".join(shown) and all(line == line.rstrip() for line in shown)
    assert max(map(len, shown)) <= max(width, 23)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "gama=1"], "unknown field 'gama'; did you mean 'gamma'?"),
        (["--set", "gamma"], "expected FIELD=VALUE"),
        (["--set", "gamma=-1"], "VPSConfig.gamma is -1"),
        (["--set", "builder=sl"], "VPSConfig.builder is 'sl'"),
        (["--config", "missing.json"], "--config missing.json: No such file or directory"),
        (["--config", "."], "--config .: Is a directory"),
        (["--prompt-file", "missing.txt"], "--prompt-file missing.txt: No such file or directory"),
        (["--prompt", " "], "the prompt is empty"),
        (["--device", "abacus", "--prompt", "1"], "abacus"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(refuse, folder, arguments, message):
    assert message in refuse("generate", "--model", folder, *arguments)


def test_bad_files(refuse, folder, tmp_path):
    common = ("generate", "--model", folder)
    (tmp_path / "cut.json").write_text(VPSConfig().to_json()[:30])
    err = refuse(*common, "--config", tmp_path / "cut.json", "--prompt", "1")
    assert "cut.json" in err and "not valid JSON" in err
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    err = refuse(*common, "--prompt-file", tmp_path / "latin.txt")
    assert "latin.txt: not UTF-8 text, at byte 3" in err
    for model in (tmp_path / "nowhere", tmp_path / "nowhere.gguf"):
        assert "no such" in refuse("generate", "--model", model, "--prompt", "1")


def test_failure_is_exit_code_1_without_a_traceback(generate):
    code, _, err = generate("--prompt", "1", "--set", 'target_modules=["c_attn"]')
    assert code == 1 and err.count("\n") == 1 and "q_proj" in err
    with pytest.raises(ValueError):
        generate("--debug", "--prompt", "1", "--set", 'target_modules=["c_attn"]')


def test_doctor_and_version(run):
    code, out, _ = run("doctor", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["versions"]["torch"] == torch.__version__
    assert facts["backends"]["torch"] == "available" and "no CUDA" in facts["backends"]["cuda"]
    assert run("doctor")[1].startswith("versions")
    code, out, err = run("--version")
    assert (code, err) == (0, "") and out.startswith("vps 0.")


COMMANDS = ("generate", "refine", "calibrate", "eval", "ablate", "report", "demo", "doctor")


def test_help_fits_80_columns(run, monkeypatch):
    """Whole sentences, and every command; no escapes even where a pipe asks for colour."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    for arguments in ([], *([command] for command in COMMANDS)):
        for asked in ("--help", "-h"):
            code, out, err = run(*arguments, asked)
            assert (code, err) == (0, "") and out.startswith("Usage: vps")
            assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
            if not arguments:
                assert all(f"\n  {command}" in out for command in COMMANDS)
                assert not any(line.endswith("...") for line in out.splitlines()[1:])


def test_without_typer_one_line_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from vps import cli; sys.exit(cli.main())"
    ran = python(code, "doctor")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == ("vps: error: the command needs typer: pip install 'vps-kernels[cli]'\n")


@pytest.mark.parametrize("command", ["doctor", "--help", "eval --help"])
def test_a_closed_pipe_is_silent(command):
    command = f"{sys.executable} -m vps.cli {command}; echo $? >&2"
    done = subprocess.run(f"({command}) | true", shell=True, capture_output=True, text=True)
    assert done.stderr == "0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "No such command 'frob' (see vps --help)"),
        ([], "Missing command"),
        (["generate"], "Missing option '--model' (see vps generate --help)"),
        (["generate", "--model", "m", "--max-new-tokens", "0"], "0 is not positive"),
        (["generate", "--model", "m", "--max-new-tokens", "x"], "'x' is not an integer"),
        (["refine", "--model", "m", "--seed", "1.5"], "'--seed': '1.5' is not an integer"),
        (["generate", "--model", "m", "--dtype", "int8"], "'--dtype': 'int8' is not one of"),
        (
            ["generate", "--model", "m", "--prompt", "a", "--prompt-file", "b"],
            "--prompt-file: not allowed with --prompt",
        ),
        (["generate", "--model", "m", "--frob"], "No such option: --frob"),
        (["report", "a", "b"], "unexpected extra argument"),
    ],
)
def test_what_typer_refuses_gets_one_line(refuse, arguments, message):
    assert message in refuse(*arguments)


@pytest.mark.parametrize("name", ["gamma", "rank", "topk", "order"])
def test_a_fixed_value_turns_its_policy_off_unless_asked(tmp_path, name):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({f"adaptive_{name}": True}))
    assert getattr(read_config(path, [f"{name}=1"]), f"adaptive_{name}") is False
    kept = read_config(path, [f"{name}=1", f"adaptive_{name}=true"])
    assert getattr(kept, f"adaptive_{name}") is True


def test_a_bad_value_names_field_and_value():
    for setting in ("gamma=much", "rank=1.5", "lbfgs=maybe", "tau=0", "rank_bounds=[3,1]"):
        with pytest.raises(UsageError, match=setting.split("=")[0]):
            read_config(None, [setting])


def test_gamma_reaches_the_model(generate):
    ran = [generate("--prompt", "1 2", "--set", f"gamma={gamma}") for gamma in (0, 3)]
    assert [json.loads(each[1])["config"]["gamma"] for each in ran] == [0, 3]
    assert tokens_of(ran[0]) != tokens_of(ran[1])


def test_seed_draws_the_random_features(generate):
    def answer(*arguments):
        return generate("--prompt", "1 2", "--set", "builder=random", *arguments)

    assert json.loads(answer("--seed", 7)[1])["config"]["seed"] == 7
    assert json.loads(answer("--seed", 7, "--set", "seed=9")[1])["config"]["seed"] == 9
    assert tokens_of(answer("--seed", 7)) == tokens_of(answer("--set", "seed=7"))


def test_no_chat_and_dtype(generate, folder, tmp_path):
    model, tokenizer = load_model(str(folder))
    tokenizer.chat_template = "{% for m in messages %}90 {{ m['content'] }} 91{% endfor %}"
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = generate("--prompt", "1", "--set", "gamma=0", model=tmp_path / "chat")
    spelled = generate("--prompt", "90 1 91", "--set", "gamma=0")
    bare = generate("--prompt", "1", "--no-chat", "--set", "gamma=0", model=tmp_path / "chat")
    plain = generate("--prompt", "1", "--set", "gamma=0")
    assert tokens_of(chat) == tokens_of(spelled) != tokens_of(bare) == tokens_of(plain)
    ran = generate("--prompt", "1", "--dtype", "bfloat16")
    assert ran[0] == 0 and len(tokens_of(ran)) <= 12


def test_loading_says_what_is_wrong(generate, refuse, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VPS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    err = refuse("generate", "--model", tmp_path / "empty", "--prompt", "1")
    assert "expected config.json or one .gguf file" in err
    (tmp_path / "bad.gguf").write_text("junk")
    code, _, err = generate("--prompt", "1", model=tmp_path / "bad.gguf")
    assert code == 1 and "is not a GGUF file" in err and err.count("\n") == 1
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 9, 9) + b"\0" * 20)
    code, _, err = generate("--prompt", "1", model=tmp_path / "cut.gguf")
    assert code == 1 and "cut.gguf cannot be read, is it complete?" in err
    assert err.count("\n") == 1 and not list((tmp_path / "cache").iterdir())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vps-kernels\[hf\]'"):
        load_model(str(folder))


def test_an_interrupt_is_one_line_and_130(run, folder, monkeypatch):
    def interrupted(*arguments, **options):
        # A process that a shell started in the background ignores the signal itself.
        signal.default_int_handler(signal.SIGINT, None)

    monkeypatch.setattr("vps.model.generation.encode", interrupted)
    ran = run("generate", "--model", folder, "--prompt", "1")
    assert ran == (130, "", "vps: interrupted\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "kind", "shown"),
    [(Terminal, "xterm", True), (Terminal, "dumb", False), (io.StringIO, "xterm", False)],
)
def test_progress_is_shown_on_a_slow_terminal_only(monkeypatch, stream, kind, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("TERM", kind)
    with Progress() as progress:
        progress.step("quick", 3)
        progress.advance()
        progress.close()
        assert sys.stderr.getvalue() == ""
        progress.step("slow [red]")
        until = time.monotonic() + (30 if shown else 2.5)
        while "slow" not in sys.stderr.getvalue() and time.monotonic() < until:
            time.sleep(0.1)
    assert ("slow [red]" in sys.stderr.getvalue()) is shown


def test_bars_of_libraries_do_not_reach_the_terminal(generate, monkeypatch):
    from tqdm.auto import tqdm

    def loading(*arguments):
        list(tqdm(range(3), desc="dequantizing"))
        return load_model(*arguments)

    monkeypatch.setattr("vps.model.loading.load_model", loading)
    assert generate("--prompt", "1")[2] == ""
    assert "dequantizing" in generate("--prompt", "1", "--debug")[2]


def test_logging_is_as_before(run):
    level = logging.root.manager.disable
    run("doctor")
    assert logging.root.manager.disable == level
