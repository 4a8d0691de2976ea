"""Tiny models with random weights, and what they answer, for the tests of the plugin of vLLM."""

import torch

import vps

PROMPTS = [
    [5, 6, 7, 8, 9, 10],
    [11, 12],
    [13, 64, 21, 99, 100, 7, 13, 2, 55, 80, 81, 82, 3, 9, 70, 71, 72, 73, 74, 75],
    [20, 30, 40, 50],
]
TOKENS = 10
SCHEDULER = "vps.serving.scheduler.Scheduler"


def make_model(folder, family):
    """A model with random weights and 2 query heads to a key-value head, and a tokenizer of words.

    Small query and key weights keep attention spread out: heads of one group that look at one and
    the same token have equal outputs, and which of them is selected would be left to rounding.
    """
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    sizes = dict(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif "q_proj" in name or "k_proj" in name:
            parameter.data.mul_(0.25)
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(sizes["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", eos_token="w1"
    )
    fast.save_pretrained(folder)
    return str(folder)


def counts(prompts, tokens):
    """How many tokens each answer has: one number for all, or a list."""
    return tokens if isinstance(tokens, list) else [tokens] * len(prompts)


def answers(llm, prompts, tokens=TOKENS, **sampling):
    """Greedy tokens of all prompts, asked at once."""
    from vllm import SamplingParams

    common = dict(temperature=0, ignore_eos=True, **sampling)
    sampling = [SamplingParams(max_tokens=count, **common) for count in counts(prompts, tokens)]
    results = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
    )
    return [list(result.outputs[0].token_ids) for result in results]


def expected(folder, config, prompts=PROMPTS, tokens=TOKENS):
    """Greedy tokens of transformers, patched with vps unless the config is ``None``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if config is not None:
        vps.patch(model, config)
    found = []
    for prompt, count in zip(prompts, counts(prompts, tokens), strict=True):
        length = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False)
        row = model.generate(torch.tensor([prompt]), **length)[0]
        found.append(row[len(prompt) :].tolist())
    return found
