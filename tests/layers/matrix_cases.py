"""Models in every form that a layer can take, and the oracle: linears that call the reference."""

import copy

import torch
from tiny import draw, tiny
from torch import nn

import vps
from vps import masking, reference

TARGETS = vps.VPSConfig().target_modules
HEADS, KV_HEADS = 4, 2
IDS = draw(2, 9, seed=1)


def llama():
    """A tiny random Llama with grouped queries, of widths that bitsandbytes' kernels take."""
    model = tiny(dtype=torch.float32, hidden_size=64, intermediate_size=128, head_dim=16)
    return model.requires_grad_(False)


def replaced(model, make):
    """The model with ``make(linear)`` in place of every target layer."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if name in TARGETS:
                    setattr(part, name, make(child))
    return model


def quantized(kind):
    """A maker of layers of bitsandbytes or torchao, for :func:`replaced`."""
    import bitsandbytes
    import torchao.quantization as torchao

    def make(linear):
        d_in, d_out, bias = linear.in_features, linear.out_features, linear.bias is not None
        dtype = linear.weight.dtype
        if kind in ("nf4", "fp4"):
            layer = bitsandbytes.nn.Linear4bit(
                d_in, d_out, bias, compute_dtype=dtype, quant_type=kind
            )
            # Its kernel for AVX-512 packs the weight in 16 bits, which makes H inexact.
            layer.support_avx512bf16_for_cpu = False
        elif kind == "int8":
            layer = bitsandbytes.nn.Linear8bitLt(d_in, d_out, bias, has_fp16_weights=False)
        else:
            config = {
                "torchao int8": torchao.Int8WeightOnlyConfig,
                "torchao int4": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
                "torchao fp8": torchao.Float8WeightOnlyConfig,
                "torchao dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
            }[kind]()
            holder = nn.Sequential(copy.deepcopy(linear))
            torchao.quantize_(holder, config)
            return holder[0]
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu").eval().requires_grad_(False)

    return make


@torch.no_grad()
def dense(layer, dtype=torch.float64):
    """W and b of a layer, found by applying it to the identity."""
    like = torch.float32
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            like = parameter.dtype
    zero = layer(torch.zeros(1, layer.in_features, dtype=like))
    W = layer(torch.eye(layer.in_features, dtype=like)) - zero
    bias = None if getattr(layer, "bias", None) is None else zero[0].to(dtype)
    return W.t().to(dtype), bias


class Literal(nn.Module):
    """A layer that computes by the reference, with its peer in a coupled attention block."""

    def __init__(self, W, b, config):
        super().__init__()
        self.W, self.b, self.config = W, b, config
        self.peer = [self]
        self.index = 0

    def forward(self, x):
        dims, mask = masking.token_dims(x)
        wide = x.to(self.W.dtype).reshape(*dims, x.shape[-1])
        if self.config.gamma_bounds == (0, 0):
            y = torch.nn.functional.linear(wide, self.W, self.b)
        elif self.config.scope == "prompt" and wide.shape[-2] == 1:  # decided by the prompt
            y = torch.stack([self.held_row(*pair) for pair in zip(wide, self.held, strict=True)])
        elif len(self.peer) == 2:
            both = [reference.Projection(layer.W, layer.b) for layer in self.peer]
            result = reference.coupled_vps_linear(
                wide, *both, heads=HEADS, kv_heads=KV_HEADS, config=self.config, mask=mask
            )[self.index]
            y, self.held = result.y, result.groups
        else:
            result = reference.vps_linear(wide, self.W, self.b, config=self.config, mask=mask)
            y, self.held = result.y, result.groups
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)

    def held_row(self, x, group):
        chosen = group.I_in[: group.rank], group.I_out[: group.rank], group.core
        return reference.held_vps_linear(x, self.W, self.b, *chosen, group.gamma)


class OwnProduct(Literal):
    """The same where a layer's H is not ``x Wᵀ``: bitsandbytes' int8 quantizes x, too."""

    def __init__(self, layer, config):
        super().__init__(*dense(layer), config)
        self.layer = copy.deepcopy(layer)

    def forward(self, x):
        dims, mask = masking.token_dims(x)
        assert mask is None
        y = self.layer(x)
        if self.config.gamma_bounds == (0, 0):
            return y
        flat = x.reshape(-1, x.shape[-1]).double()
        H = [layer.layer(x).reshape(len(flat), -1).double() for layer in self.peer]
        decided = self.config.scope == "prompt" and x.shape[-2] == 1
        H = [h if layer.b is None else h - layer.b for h, layer in zip(H, self.peer, strict=True)]
        result = y.reshape(len(flat), -1).double()
        if decided:
            for row, group in enumerate(self.held):
                I_in, I_out = group.I_in[: group.rank], group.I_out[: group.rank]
                update = H[self.index][row, I_out] @ group.core @ self.W[:, I_in].T
                result[row] += group.gamma * update
            return result.to(x.dtype).view(y.shape)
        self.held = []
        for tokens in reference.group_tokens(dims, self.config.scope):
            joint = None
            if len(H) == 2:
                energy = reference.mean_square(torch.cat([h[tokens] for h in H], 1))
                topk = reference.decide(self.config, energy, None, ())[3]
                scores = [h[tokens].abs().mean(0) for h in H]
                k = min(topk, H[1].shape[1])
                joint = energy, reference.couple_heads(*scores, HEADS, KV_HEADS, k)[self.index]
            group = reference._sharpen(
                flat[tokens], H[self.index][tokens], reference.Projection(self.W), tokens,
                torch.ones_like(tokens).bool(), self.config, None, (), joint,
            )  # fmt: skip
            # x A = H V, the first identity of SPEC §4: A itself knows nothing of a rounded x.
            t = H[self.index][tokens] @ (group.V / group.scale.sqrt())
            result[tokens] += group.gamma * t @ group.B_clipped.T
            self.held.append(group)
        return result.to(x.dtype).view(y.shape)


def oracle(weights, config, model=None):
    """A Llama whose target layers have these dense weights and call the reference.

    Args:
        weights: pairs of W and b, or layers whose own product counts, in the order of
            :func:`replaced`.
        config: the settings; bounds of γ at 0 for the plain model.
    """
    rest = iter(weights)
    model = llama() if model is None else model
    replaced(
        model,
        lambda _: (
            OwnProduct(one, config)
            if isinstance(one := next(rest), nn.Module)
            else Literal(*one, config)
        ),
    )
    for block in model.model.layers:
        attention = block.self_attn
        if config.qk_coupling and config.builder != "random":
            attention.q_proj.peer = attention.k_proj.peer = [attention.q_proj, attention.k_proj]
            attention.k_proj.index = 1
    vps.model.attention_mask.attach(model)
    return model


def weights_of(model):
    """Dense weights of the target layers, in the order of :func:`replaced`."""
    found = []
    replaced(model, lambda layer: (found.append(dense(layer)), layer)[1])
    return found


@torch.no_grad()
def run(model, ids, steps=3, mask=None):
    """Logits of a prefill of all but the last ``steps`` tokens, and of each of those decoded with
    a cache."""
    start = ids.shape[1] - steps
    given = {} if mask is None else {"attention_mask": mask[:, :start]}
    out = model(ids[:, :start], use_cache=True, **given)
    logits = [out.logits]
    for step in range(start, ids.shape[1]):
        given = {} if mask is None else {"attention_mask": mask[:, : step + 1]}
        out = model(
            ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True, **given
        )
        logits.append(out.logits)
    return logits[0], torch.cat(logits[1:], 1)


def shard(model, layers):
    """Split a model with FSDP2: its blocks, and where asked each linear layer."""
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        if layers:
            for module in list(block.modules()):
                if isinstance(module, nn.Linear):
                    fully_shard(module)
        fully_shard(block)
    return fully_shard(model)
