"""Loading a GGUF file: what is kept of it, where, and when it is made again."""

import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import gguf
import numpy
import pytest
import torch

from vps.model import loading
from vps.model.loading import MARK, cache_folder, load_model, located


def write_gguf(path, seed=0):
    """Write a quantized Llama of one block that reads single letters."""
    rng = numpy.random.default_rng(seed)
    words = ["<unk>", "<s>", "</s>", *map(chr, range(33, 93)), "12"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([2, 3, 3, *[1] * 61])
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    vectors = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    matrices = {
        "token_embd": (64, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    for name in vectors:
        writer.add_tensor(f"{name}.weight", rng.standard_normal(32).astype(numpy.float32))
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, shape in matrices.items():
        plain = rng.standard_normal(shape).astype(numpy.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(plain, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def made(monkeypatch):
    """The dtypes in which a GGUF file was read."""
    found, read = [], loading._read_gguf
    monkeypatch.setattr(
        loading, "_read_gguf", lambda path, dtype: (found.append(dtype), read(path, dtype))[1]
    )
    return found


def weights(file, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model, _ = load_model(str(file), **options)
    assert not model.training
    # Copies: those of the model lie in the file itself, which a test may cut.
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_second_start_reads_what_the_first_kept(file, cache, made, monkeypatch):
    first = weights(file)
    (entry,) = cache.iterdir()
    assert made == [torch.float32] and entry.name.startswith("tiny-")
    assert entry.joinpath("model.safetensors").stat().st_size >= 4 * 11_000
    assert equal(weights(file), first)
    half = weights(file, dtype=torch.bfloat16)
    assert len(made) == 1
    monkeypatch.setenv("VPS_CACHE", "off")
    assert equal(weights(file), first) and equal(weights(file, dtype=torch.bfloat16), half)
    assert len(made) == 3 and [*cache.iterdir()] == [entry]
    tokenizer = load_model(str(file))[1]
    assert tokenizer.decode(tokenizer("12AB")["input_ids"]) == "12AB"


def test_the_step_says_that_it_takes_longer_once(file, cache, monkeypatch, tmp_path):
    assert loading.step_of_loading(str(file)) == "dequantizing the model, once"
    weights(file)
    assert loading.step_of_loading(str(file)) == "loading the model"
    monkeypatch.setenv("VPS_CACHE", "off")
    assert loading.step_of_loading(str(file)) == "dequantizing the model"
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path), "nobody/none"):
        assert loading.step_of_loading(name) == "loading the model"


def test_another_state_of_the_file_is_read_again_and_replaces_the_first(file, cache, made):
    first = weights(file)
    kept = file.stat()
    write_gguf(file, seed=1)
    assert file.stat().st_size == kept.st_size
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # size and time as before
    second = weights(file)
    assert len(made) == 2 and not equal(first, second) and len([*cache.iterdir()]) == 1
    os.utime(file)
    assert equal(weights(file), second)
    assert len(made) == 3 and len([*cache.iterdir()]) == 1


def test_files_of_one_name_in_two_folders_are_two(file, cache, made, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_gguf(other / "tiny.gguf", seed=1)
    assert not equal(weights(file), weights(other / "tiny.gguf"))
    assert len([*cache.iterdir()]) == 2
    weights(file)
    assert len(made) == 2


def test_other_versions_read_the_file_themselves(file, cache, made, monkeypatch):
    weights(file)
    version = loading.metadata.version
    monkeypatch.setattr(loading.metadata, "version", lambda name: version(name) + "+1")
    weights(file)
    assert len(made) == 2 and len([*cache.iterdir()]) == 2


@pytest.mark.parametrize("damage", ["cut", "removed", "mark", "words"])
def test_a_damaged_entry_is_made_again(file, cache, made, damage):
    first = weights(file)
    (entry,) = cache.iterdir()
    if damage == "cut":
        with entry.joinpath("model.safetensors").open("rb+") as opened:
            opened.truncate(1000)
    elif damage == "removed":
        entry.joinpath("tokenizer.json").unlink()
    elif damage == "mark":
        entry.joinpath(MARK).unlink()
    else:
        entry.joinpath(MARK).write_text('["no", "object"]')
    assert equal(weights(file), first) and len(made) == 2
    assert equal(weights(file), first) and len(made) == 2
    assert [*cache.iterdir()] == [entry]


def test_what_a_killed_process_left_is_removed_when_it_is_old(file, cache):
    for name, age in ((".tiny-x.old", 2 * loading.ABANDONED), (".tiny-x.new", 0)):
        cache.joinpath(name).mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    weights(file)
    assert {each.name for each in cache.iterdir() if each.name[0] == "."} == {".tiny-x.new"}


@pytest.mark.parametrize("how", ["file", "full"])
def test_where_nothing_can_be_kept_a_warning_says_so_and_the_model_loads(
    file, cache, how, monkeypatch, tmp_path
):
    monkeypatch.setenv("VPS_CACHE", "off")
    expected = weights(file)
    monkeypatch.setenv("VPS_CACHE", str(cache))
    if how == "file":  # also root cannot make a folder there
        cache.write_text("")
    else:
        from transformers import PreTrainedModel

        def full(self, folder):
            Path(folder, "model.safetensors").write_bytes(b"x" * 100)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.warns(UserWarning, match="load_model: cannot keep .* VPS_CACHE=off wants none"):
        model, _ = load_model(str(file))
    assert equal(model.state_dict(), expected)
    assert how == "file" or not [*cache.iterdir()]


def test_the_command_shows_that_warning_in_one_line(file, cache, run):
    cache.write_text("")
    code, out, err = run("generate", "--model", file, "--prompt", "12", "--max-new-tokens", 2)
    assert code == 0 and out
    assert err.startswith("vps: warning: load_model: cannot keep") and err.count("\n") == 1


def test_another_process_may_be_first(file, cache, made, monkeypatch):
    first = weights(file)
    (entry,) = cache.iterdir()
    shutil.move(entry, cache / "aside")
    mark = loading._mark

    def late(folder, state):
        mark(folder, state)
        shutil.move(cache / "aside", entry)

    monkeypatch.setattr(loading, "_mark", late)
    assert equal(weights(file), first) and [*cache.iterdir()] == [entry]


@pytest.mark.parametrize(
    ("answer", "local"),
    [(None, False), (ConnectionError("no route"), True), (ValueError("no name"), False)],
)
def test_the_hub_is_asked_once_and_what_is_cached_does_not_wait(monkeypatch, answer, local):
    import huggingface_hub
    from transformers import AutoTokenizer

    asked = []

    def model_info(self, name, timeout):
        asked.append(name)
        if answer is not None:
            raise answer

    def from_pretrained(name, local_files_only):
        assert name == "nobody/none" and local_files_only is local
        raise OSError("not there.")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(OSError, match="Hugging Face has no such model or cannot be reached: not"):
        load_model("nobody/none")
    assert asked == ["nobody/none"]


def test_a_dtype_by_its_name_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype or None, got 'bfloat16'"):
        load_model(str(tmp_path), dtype="bfloat16")


def test_where_the_cache_is(monkeypatch, tmp_path):
    for name in ("VPS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/vps"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x/vps"
    monkeypatch.setenv("VPS_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("VPS_CACHE", "off")
    assert cache_folder() is None


def test_the_model_of_the_demo_is_found_in_its_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "site/stand_in"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text("raise AssertionError('not to be imported')")
    monkeypatch.setattr(loading, "DEMO_PACKAGE", "stand_in")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert loading.demo_model() is None and "`make demo`" in loading.where_to_get_one()
    write_gguf(package / "tiny.gguf")
    assert loading.demo_model() == package and str(package) in loading.where_to_get_one()
    assert located(str(package)) == package / "tiny.gguf"
    tmp_path.joinpath(".cache/smollm2").mkdir(parents=True)
    tmp_path.joinpath(".cache/smollm2/config.json").write_text(json.dumps({}))
    assert loading.demo_model() == loading.DEMO
