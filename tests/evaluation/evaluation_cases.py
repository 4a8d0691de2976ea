"""A tiny random Llama that reads characters, and tasks from local JSONL files."""

import json
import random

import torch
import transformers
from tiny import tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import vps
from vps import VPSConfig

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
CONFIG = VPSConfig(gamma=0.5, adaptive_gamma=False, adaptive_rank=False)
NOTHING = VPSConfig(gamma=0, adaptive_gamma=False)

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
TEXT = """
include: {base}
task: {name}
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
doc_to_choice: null
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""
GENERATE = """
include: {base}
task: {name}
output_type: generate_until
doc_to_target: question
doc_to_choice: null
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def tokenizer():
    """One token a character; ids of ``<pad>``, end, and unknown come first."""
    words = ["<pad>", "</s>", "<unk>", *CHARACTERS]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def plain_model(dtype=torch.float32, layers=2):
    return tiny(
        dtype=dtype, times=6, vocab_size=len(CHARACTERS) + 4, num_hidden_layers=layers,
        max_position_embeddings=512, eos_token_id=1,
    )  # fmt: skip


def patched_model(dtype=torch.float32, config=CONFIG, layers=2):
    model = plain_model(dtype, layers)
    vps.patch(model, config)
    return model


def write_tasks(folder, size=12, seed=0):
    """Tasks ``local_choice``, ``local_text`` and ``local_answer`` of one JSONL file."""
    rng = random.Random(seed)
    rows = []
    for _ in range(size):
        words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(4)]
        question = " ".join(rng.sample(words, rng.randint(1, 4)))
        rows.append({"question": question, "choices": words, "gold": rng.randrange(4)})
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = folder / "local_choice.yaml"
    base.write_text(CHOICE.format(name="local_choice", data=data))
    for name, text in (("local_text", TEXT), ("local_answer", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(name=name, base=base.name))
    return rows
