"""Tiny random models of every family, the tokenizer of numbers that they read, and token ids."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import vps
from vps import VPSConfig

CLOSE = dict(rtol=1e-9, atol=1e-10)
SPECIAL = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZES = dict(
    SPECIAL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
BERT = dict(
    SPECIAL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip
BART = dict(
    SPECIAL, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
T5 = dict(
    SPECIAL, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0,
    dropout_rate=0.0,
)  # fmt: skip
CAUSAL = {  # where they differ from SIZES
    "gpt2": dict(SPECIAL, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": SIZES | dict(ffn_dim=48, word_embed_proj_dim=32),
    "mixtral": SIZES | dict(num_local_experts=2, num_experts_per_tok=1),
}
TARGETS = {  # where they differ from those of VPSConfig
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "bloom": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "mixtral": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


def made(auto, family, sizes, *, dtype=torch.float64, times=4, seed=0):
    """Make a model with larger weights than initialised, so that sharpening shows.

    ``sizes`` are its config where ``family`` is ``None``.
    """
    torch.manual_seed(seed)
    config = sizes
    if family is not None:
        config = transformers.AutoConfig.for_model(family, **sizes)
    config._experts_implementation = "eager"  # the grouped one has no float64
    make = getattr(auto, "from_config", None) or auto._from_config  # that of a single class
    model = make(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(times if parameter.dim() > 1 else 1)
    return model


def tiny(family="llama", dtype=torch.float64, *, times=4, seed=0, **sizes):
    """Make a plain causal language model of a family."""
    sizes = CAUSAL.get(family, SIZES) | sizes
    return made(AutoModelForCausalLM, family, sizes, dtype=dtype, times=times, seed=seed)


def settings(family, **changes):
    """A config with the target modules of a family."""
    if family in TARGETS:
        changes["target_modules"] = TARGETS[family]
    return VPSConfig(**changes)


def tiny_llama():
    """Make a patched model of one block."""
    model = tiny(
        dtype=torch.float32, times=1, vocab_size=50, hidden_size=16, intermediate_size=24,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    vps.patch(model.requires_grad_(False))
    return model


def number_llama():
    """Make a plain model that speaks :func:`number_tokenizer`; sharpening changes its answers."""
    return tiny(dtype=torch.float32, times=6, max_position_embeddings=128)


def number_tokenizer():
    """Make a tokenizer of 96 words that are numbers."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(str(i) for i in range(92))]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    """Draw token ids that are none of the special ones."""
    return torch.randint(3, 96, shape, generator=seeded(seed))
