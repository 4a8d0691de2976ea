"""The command vps, driven on a tiny random Llama saved with its own tokenizer."""

import io
import json
import subprocess
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from vps import VPSConfig, cli
from vps.demo import compare, heatmap
from vps.generation import first_difference
from vps.loading import load_model
from vps.patching import patch


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
        (["--config", "missing.json"], "missing.json"),
        (["--prompt-file", "missing.txt"], "missing.txt"),
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
    assert facts["backends"]["torch"] == "available" and "not part" in facts["backends"]["triton"]
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


def test_demo_report(folder, tmp_path):
    model, tokenizer = load_model(str(folder))
    patch(model)
    messages = []
    result = compare(model, tokenizer, tmp_path / "out", 6, messages.append)
    assert len(result.answers) == 3 and 0 <= result.changed <= 1 and messages
    assert result.plain_rate > 0 and result.sharpened_rate > 0
    assert {entry.projection for entry in result.statistics} == set(VPSConfig().target_modules)
    assert len(result.statistics) == 14
    assert all(0.3 <= entry.gamma <= 0.8 and 1 <= entry.rank <= 4 for entry in result.statistics)
    assert all(0 < entry.relative_size < 1 for entry in result.statistics)
    html = result.report.read_text()
    assert "&lt;unk&gt;" in html or "<unk>" not in html
    assert (tmp_path / "out/heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in html
    heatmap.draw(result.statistics[:1], tmp_path / "one.png")
