"""Decoding is what it says, whatever the model's own generation_config asks for."""

import json
import warnings

import pytest
import torch
import transformers
from fitting_cases import learner
from tiny import number_llama, number_tokenizer
from tokenizers import Tokenizer, decoders, models

import vps
from vps.model.generation import encode, generate, generate_together, sample
from vps.model.loading import load_model

OTHER_MODES = {
    "beams": {"num_beams": 3},
    "beams of a length": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "several beams back": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 5.0, "top_p": 0.9},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "everything kept": {"output_attentions": True, "output_hidden_states": True},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "high"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
    "an assistant": {"is_assistant": True},
    "several tokens at once": {"use_mtp": True},
    "forced words": {"force_words_ids": [[7]], "num_beams": 2},
    "a healed prompt": {"token_healing": True},
}
CUTS = {
    "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1, "epsilon_cutoff": 0.9, "eta_cutoff": 0.9,
    "top_k": 1, "top_p": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def letters():
    """One token a letter: stop strings need a tokenizer that can spell."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 .,?"]
    plain = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    plain.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def wishing(**wishes):
    """A model whose generation_config holds these settings."""
    model = learner(times=4)
    model.generation_config.eos_token_id = None
    for name, value in wishes.items():
        assert hasattr(model.generation_config, name), name
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize("mode", OTHER_MODES)
def test_generate_is_greedy(tokenizer, mode):
    """Every token is the most likely one; each is reported."""
    model = wishing(**OTHER_MODES[mode])
    inputs = encode(tokenizer, "1 2 3")
    steps = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = generate(model, tokenizer, inputs, 6, lambda: steps.append(1))
    ids = inputs["input_ids"]
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert found.tokens == ids[0, 3:].tolist() and len(steps) == 6
    assert found.text == tokenizer.decode(found.tokens, skip_special_tokens=True)


@pytest.mark.parametrize("mode", OTHER_MODES)
def test_samples_are_drawn_one_by_one(tokenizer, mode):
    inputs = encode(tokenizer, "1 2 3")
    plain = sample(wishing(), tokenizer, inputs, 5, 3, seed=4)
    assert len(set(plain)) == 3
    assert sample(wishing(**OTHER_MODES[mode]), tokenizer, inputs, 5, 3, seed=4) == plain


@pytest.mark.parametrize("cut", CUTS)
def test_samples_are_drawn_from_the_whole_distribution(tokenizer, cut):
    inputs = encode(tokenizer, "1 2 3")
    plain = sample(wishing(), tokenizer, inputs, 5, 3, seed=4, temperature=3.0)
    found = sample(wishing(**{cut: CUTS[cut]}), tokenizer, inputs, 5, 3, seed=4, temperature=3.0)
    assert found == plain


def test_other_wishes_of_the_model_hold(letters):
    inputs = encode(letters, "abc")
    free = generate(wishing(), letters, inputs, 8)
    stop = free.text[2:4]
    stopped = generate(wishing(stop_strings=[stop]), letters, inputs, 8)
    assert stopped.text == free.text[: free.text.index(stop) + 2] != free.text
    drawn = sample(wishing(eos_token_id=2), letters, inputs, 8, 2, seed=3)
    assert len(drawn[0]) == 8  # no special token among them
    stop = drawn[0][1:3]
    stopping = wishing(eos_token_id=2, stop_strings=stop)
    found = sample(stopping, letters, inputs, 8, 2, seed=3)
    assert found[0] == drawn[0][:3] and drawn[1].startswith(found[1])
    third = free.tokens[2]
    suppressing = wishing(suppress_tokens=[third])
    assert third not in generate(suppressing, letters, inputs, 8).tokens
    assert generate(wishing(eos_token_id=third), letters, inputs, 8).tokens[-1] == third
    biased = generate(wishing(sequence_bias=[[[9], 1e3]]), letters, inputs, 8)
    assert biased.tokens == [9] * 8


def test_what_cannot_be_encoded_is_named(tokenizer):
    with pytest.raises(ValueError, match="the prompt is empty, expected at least one token"):
        encode(tokenizer, "")
    with pytest.raises(TypeError, match="must be a tokenizer of transformers, got NoneType"):
        encode(None, "1 2 3")


def test_a_tokenizer_without_a_mask(tokenizer):
    bare = number_tokenizer()
    bare.model_input_names = ["input_ids"]
    given, wanted = (encode(each, "1 2 3") for each in (bare, tokenizer))
    assert {name: value.tolist() for name, value in given.items()} == {
        name: value.tolist() for name, value in wanted.items()
    }
    bare.chat_template = "{% for m in messages %}9 {{ m['content'] }}{% endfor %}"
    assert encode(bare, "1")["attention_mask"].tolist() == [[1, 1]]
    model = wishing()
    vps.patch(model)
    results = [
        vps.refine(
            model, each, "1 2 3", "7", max_new_tokens=3, iterations=2,
            weights={"numeric": 1.0}, chat=False,
        )
        for each in (bare, tokenizer)
    ]  # fmt: skip
    assert results[0] == results[1]


def test_the_command_line_with_wishes_in_the_folder(run, letters, tmp_path):
    wishing().save_pretrained(tmp_path)
    letters.save_pretrained(tmp_path)
    common = ("--model", tmp_path, "--prompt", "abc", "--max-new-tokens", 6, "--json")
    commands = (
        ("generate", *common, "--compare"),
        ("refine", *common, "--samples", 2, "--iterations", 2),
    )
    plain = [run(*command) for command in commands]
    model, _ = load_model(str(tmp_path))
    model.generation_config.update(
        num_beams=3, return_dict_in_generate=True, stop_strings=["no such text"], do_sample=True
    )
    model.save_pretrained(tmp_path)
    for command, (_, before, _) in zip(commands, plain, strict=True):
        code, out, err = run(*command)
        assert (code, err) == (0, "") and texts(json.loads(out)) == texts(json.loads(before))


def texts(values):
    """Every text of a command's answer; seconds differ."""
    if isinstance(values, dict):
        return {name: texts(value) for name, value in values.items() if name != "seconds"}
    return [texts(value) for value in values] if isinstance(values, list) else values


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_prompts_of_one_batch_are_answered_as_alone(pad):
    model, own = number_llama(), number_tokenizer()
    vps.patch(model, vps.VPSConfig(gamma=0.6))
    own.pad_token = pad
    inputs = [encode(own, prompt) for prompt in ("1 2 3 4 5 6", "7", "8 9")]
    alone = [generate(model, own, each, 8).text for each in inputs]
    assert generate_together(model, own, inputs, 8) == alone and len(set(alone)) == 3
