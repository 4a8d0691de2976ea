"""Tiny random models, and token ids, for tests of what a sequence is."""

import torch
import transformers

SPECIAL = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(
    SPECIAL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
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
CLOSE = dict(rtol=1e-9, atol=1e-10)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def made(auto, family, sizes):
    """A model; ``sizes`` are its config where it has no family."""
    torch.manual_seed(0)
    config = sizes
    if family is not None:
        config = transformers.AutoConfig.for_model(family, **sizes)
    make = getattr(auto, "from_config", None) or auto._from_config  # that of a single class
    model = make(config).double().eval()
    with torch.no_grad():  # larger weights than initialised, so that sharpening shows
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model


def draw(*shape, seed=0):
    return torch.randint(3, 64, shape, generator=seeded(seed))
