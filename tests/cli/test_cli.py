"""The command vps, driven on a tiny random Llama saved with its own tokenizer."""

import io
import json
import logging
import signal
import struct
import subprocess
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from vps import VPSConfig, cli
from vps.model.generation import first_difference
from vps.model.loading import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(92))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    model.save_pretrained(path)
    return path


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def generate(capsys, folder, *arguments):
    return run(capsys, "generate", "--model", folder, "--max-new-tokens", 12, "--json", *arguments)


def test_generate_compares_with_the_plain_model(capsys, folder):
    code, out, err = generate(capsys, folder, "--prompt", "w1 w2 w3", "--compare")
    result = json.loads(out)
    assert (code, err) == (0, "")
    model, tokenizer = load_model(str(folder))
    ids = tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert result["plain"]["tokens"] == plain
    assert result["layers"] == 14
    assert result["first_difference"] == first_difference(plain, result["sharpened"]["tokens"])
    assert result["first_difference"] is not None


def test_gamma_zero_is_the_plain_model(capsys, folder, tmp_path, monkeypatch):
    (tmp_path / "c.json").write_text(VPSConfig(scope="token").to_json())
    (tmp_path / "p.txt").write_text("w5 w6")
    code, out, _ = generate(
        capsys, folder, "--prompt-file", tmp_path / "p.txt", "--compare",
        "--config", tmp_path / "c.json", "--set", "gamma=0",
    )  # fmt: skip
    result = json.loads(out)
    assert code == 0 and result["first_difference"] is None
    assert result["config"]["scope"] == "token" and result["config"]["adaptive_gamma"] is False
    monkeypatch.setattr("sys.stdin", io.StringIO("w5 w6"))
    code, out, _ = generate(capsys, folder, "--set", "gamma=0")
    assert json.loads(out)["sharpened"]["tokens"] == result["plain"]["tokens"]


def test_text_output(capsys, folder):
    arguments = ("generate", "--model", folder, "--prompt", "w1", "--max-new-tokens", 5)
    code, out, _ = run(capsys, *arguments, "--compare")
    assert code == 0 and "plain" in out.splitlines()[0] and "sharpened" in out.splitlines()[0]
    assert "differ" in out.splitlines()[-1]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and out.startswith("w")


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
        (["--device", "abacus", "--prompt", "w1"], "abacus"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, folder, arguments, message):
    code, out, err = run(capsys, "generate", "--model", folder, *arguments)
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1 and err.startswith("vps: error: ")


def test_bad_files(capsys, folder, tmp_path):
    (tmp_path / "cut.json").write_text(VPSConfig().to_json()[:30])
    code, _, err = generate(capsys, folder, "--config", tmp_path / "cut.json", "--prompt", "w1")
    assert code == 2 and "cut.json" in err and "not valid JSON" in err
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    code, _, err = run(
        capsys, "generate", "--model", folder, "--prompt-file", tmp_path / "latin.txt"
    )
    assert code == 2 and "latin.txt: not UTF-8 text, at byte 3" in err and err.count("\n") == 1
    for model in (tmp_path / "nowhere", tmp_path / "nowhere.gguf"):
        code, _, err = generate(capsys, model, "--prompt", "w1")
        assert code == 2 and "no such" in err and err.count("\n") == 1


def test_failure_is_exit_code_1_without_a_traceback(capsys, folder):
    code, _, err = generate(capsys, folder, "--prompt", "w1", "--set", 'target_modules=["c_attn"]')
    assert code == 1 and err.count("\n") == 1 and "q_proj" in err
    with pytest.raises(ValueError):
        generate(capsys, folder, "--debug", "--prompt", "w1", "--set", 'target_modules=["c_attn"]')


def test_doctor_help_and_version(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["versions"]["torch"] == torch.__version__
    assert facts["backends"]["torch"] == "available" and "no CUDA" in facts["backends"]["cuda"]
    assert run(capsys, "doctor")[1].startswith("versions")
    for argument in ("--help", "--version"):
        with pytest.raises(SystemExit) as exit_:
            cli.main([argument])
        assert exit_.value.code == 0
    assert "vps 0." in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        cli.main(["generate"])
    assert exit_.value.code == 2


def test_a_closed_pipe_is_silent(folder):
    command = f"{sys.executable} -m vps.cli doctor | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def stderr_of(capsys, *arguments):
    """Exit code and standard error where argparse itself ends the program."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "invalid choice: 'frob'"),
        ([], "required: command"),
        (["generate"], "--model"),
        (["generate", "--model", "m", "--max-new-tokens", "0"], "0 is not positive"),
        (["generate", "--model", "m", "--max-new-tokens", "x"], "'x' is not an integer"),
        (["generate", "--model", "m", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["generate", "--model", "m", "--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["generate", "--model", "m", "--frob"], "unrecognized arguments: --frob"),
    ],
)
def test_arguments_argparse_refuses_get_one_line(capsys, arguments, message):
    code, err = stderr_of(capsys, *arguments)
    assert code == 2 and message in err
    assert err.count("\n") == 1 and err.startswith("vps: error: ")


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("gamma=.3", "gamma", 0.3),
        ("gamma=1", "gamma", 1.0),
        ("rank=3", "rank", 3),
        ("tau=null", "tau", None),
        ("tau=none", "tau", None),
        ("clamp=1e-2", "clamp", 0.01),
        ("rank_bounds=[1,2]", "rank_bounds", (1, 2)),
        ("gamma_bounds=0.1,0.2", "gamma_bounds", (0.1, 0.2)),
        ("layers_to_transform=0", "layers_to_transform", (0,)),
        ("lbfgs=False", "lbfgs", False),
        ("builder=sk", "builder", "sk"),
        ('target_modules=["q_proj"]', "target_modules", ("q_proj",)),
        ("target_modules=.*up_proj", "target_modules", ".*up_proj"),
        ("exclude_modules=null", "exclude_modules", None),
    ],
)
def test_settings_are_read_by_the_type_of_their_field(setting, field, value):
    assert getattr(cli.read_config(None, [setting]), field) == value


@pytest.mark.parametrize("name", ["gamma", "rank", "topk", "order"])
def test_a_fixed_value_turns_its_policy_off_unless_asked(tmp_path, name):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({f"adaptive_{name}": True}))
    assert getattr(cli.read_config(path, [f"{name}=1"]), f"adaptive_{name}") is False
    kept = cli.read_config(path, [f"{name}=1", f"adaptive_{name}=true"])
    assert getattr(kept, f"adaptive_{name}") is True


def test_a_bad_value_names_field_and_value():
    for setting in ("gamma=much", "rank=1.5", "lbfgs=maybe", "tau=0", "rank_bounds=[3,1]"):
        with pytest.raises(cli.UsageError, match=setting.split("=")[0]):
            cli.read_config(None, [setting])


def test_gamma_reaches_the_model(capsys, folder):
    texts = [
        json.loads(generate(capsys, folder, "--prompt", "w1 w2", "--set", f"gamma={gamma}")[1])
        for gamma in (0, 3)
    ]
    assert texts[0]["config"]["gamma"] == 0 and texts[1]["config"]["gamma"] == 3
    assert texts[0]["sharpened"]["tokens"] != texts[1]["sharpened"]["tokens"]


def test_seed_draws_the_random_features(capsys, folder):
    def answer(*arguments):
        out = generate(capsys, folder, "--prompt", "w1 w2", "--set", "builder=random", *arguments)[
            1
        ]
        return json.loads(out)

    assert answer("--seed", 7)["config"]["seed"] == 7
    assert answer("--seed", 7, "--set", "seed=9")["config"]["seed"] == 9
    same, again = answer("--seed", 7), answer("--set", "seed=7")
    assert same["sharpened"]["tokens"] == again["sharpened"]["tokens"]


def test_no_chat_and_dtype(capsys, folder, tmp_path):
    model, tokenizer = load_model(str(folder))
    tokenizer.chat_template = "{% for m in messages %}w90 {{ m['content'] }} w91{% endfor %}"
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    chat = generate(capsys, tmp_path / "chat", "--prompt", "w1", "--set", "gamma=0")[1]
    spelled = generate(capsys, folder, "--prompt", "w90 w1 w91", "--set", "gamma=0")[1]
    bare = generate(capsys, tmp_path / "chat", "--prompt", "w1", "--no-chat", "--set", "gamma=0")
    plain = generate(capsys, folder, "--prompt", "w1", "--set", "gamma=0")[1]

    def tokens(out):
        return json.loads(out)["sharpened"]["tokens"]

    assert tokens(chat) == tokens(spelled) != tokens(bare[1]) == tokens(plain)
    code, out, _ = generate(capsys, folder, "--prompt", "w1", "--dtype", "bfloat16")
    assert code == 0 and len(tokens(out)) <= 12


def test_loading_says_what_is_wrong(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VPS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    code, _, err = generate(capsys, tmp_path / "empty", "--prompt", "w1")
    assert code == 2 and "expected config.json or one .gguf file" in err and err.count("\n") == 1
    (tmp_path / "bad.gguf").write_text("junk")
    code, _, err = generate(capsys, tmp_path / "bad.gguf", "--prompt", "w1")
    assert code == 1 and "is not a GGUF file" in err and err.count("\n") == 1
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 9, 9) + b"\0" * 20)
    code, _, err = generate(capsys, tmp_path / "cut.gguf", "--prompt", "w1")
    assert code == 1 and "cut.gguf cannot be read, is it complete?" in err
    assert err.count("\n") == 1 and not list((tmp_path / "cache").iterdir())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'vps-kernels\[hf\]'"):
        load_model(str(folder))


def test_an_interrupt_is_one_line_and_130(capsys, folder, monkeypatch):
    def interrupted(*arguments, **options):
        # A process that a shell started in the background ignores the signal itself.
        signal.default_int_handler(signal.SIGINT, None)

    monkeypatch.setattr("vps.model.generation.encode", interrupted)
    code, out, err = run(capsys, "generate", "--model", folder, "--prompt", "w1")
    assert (code, out, err) == (130, "", "vps: interrupted\n")


def test_progress_is_shown_on_a_slow_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        progress = cli.Progress()
        progress.step("quick", 3)
        progress.advance()
        progress.close()
        assert stream.getvalue() == ""
        progress.step("slow")
        if shown:
            progress._thread.join(3)
        progress.close()
        assert ("slow" in stream.getvalue()) is shown


def test_bars_of_libraries_do_not_reach_the_terminal(capsys, folder, monkeypatch):
    from tqdm.auto import tqdm

    def loading(*arguments):
        list(tqdm(range(3), desc="dequantizing"))
        return load_model(*arguments)

    monkeypatch.setattr("vps.model.loading.load_model", loading)
    assert generate(capsys, folder, "--prompt", "w1")[2] == ""
    assert "dequantizing" in generate(capsys, folder, "--prompt", "w1", "--debug")[2]


def test_logging_is_as_before(capsys):
    level = logging.root.manager.disable
    run(capsys, "doctor")
    assert logging.root.manager.disable == level
