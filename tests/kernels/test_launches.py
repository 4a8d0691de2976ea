"""What a GPU is asked to run for a block: kernels and operators between, in the interpreter."""

from collections import Counter

import pytest
import torch
from tiny import tiny
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import vps
from vps.backends import operator, sharing, triton
from vps.backends.call import Outputs
from vps.model import attention_mask
from vps.model.patching import sharpened_layers

pytestmark = pytest.mark.skipif(
    vps.backends()["triton"] is not None or torch.cuda.is_available(),
    reason="counts in Triton's interpreter",
)
# None launches anything; constants, which are made anew under a dispatch mode, are kept elsewhere.
FREE = {"empty", "new_empty", "view", "select", "slice", "unsqueeze", "expand", "t", "detach"}
FREE |= {"transpose", "as_strided", "alias", "_unsafe_view", "permute", "squeeze", "reshape"}
FREE |= {"lift_fresh", "unbind"}


class Launches(TorchDispatchMode):
    """Names of kernels of Triton and of operators of torch, by the layer they run in."""

    def __init__(self, model, monkeypatch):
        super().__init__()
        from triton.runtime.interpreter import GridExecutor

        self.found, self.layer, self.interpreting = {}, None, False
        for name, layer in sharpened_layers(model).items():
            layer.register_forward_pre_hook(lambda *_, name=name: self.enter(name))
            layer.register_forward_hook(lambda *_: self.enter(None))
        run = GridExecutor.__call__

        def count(kernel, *arguments, **options):
            self.add(kernel.fn.__name__)
            self.interpreting = True
            try:
                return run(kernel, *arguments, **options)
            finally:
                self.interpreting = False

        monkeypatch.setattr(GridExecutor, "__call__", count)

    def enter(self, name):
        self.layer = name

    def add(self, name):
        if self.layer is not None and not self.interpreting and name not in FREE:
            self.found.setdefault(self.layer.rsplit(".")[-1], Counter())[name] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model(monkeypatch, request):
    """A patched block that is computed as on a GPU: by the operator, and no mask is read."""

    def by_operator(inputs, settings, traced, kept):
        y, features, *rest = operator._triton(*inputs, *settings.packed())
        if kept is not None:
            kept.append(Outputs(y, *features.unbind(1), *rest))
        return y, features[:, 0]

    monkeypatch.setattr(triton, "_interpreted", by_operator)
    monkeypatch.setattr(attention_mask, "is_read_freely", lambda _: False)
    model = tiny("qwen2", torch.float32, num_hidden_layers=1)
    vps.patch(model, vps.VPSConfig(scope=getattr(request, "param", "sequence")))
    return model


@pytest.mark.parametrize("capture", [None, 3])
@pytest.mark.parametrize("sequences", [1, 3])
@torch.no_grad()
def test_decoding_takes_thirteen(model, monkeypatch, sequences, capture):
    """Eager, and in a captured graph, where layers of one x share launches as well."""
    monkeypatch.setattr(triton, "_modes", lambda: 0)  # the mode that counts changes no way
    if capture is not None:
        state = sharing.state_of
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(sharing, "state_of", lambda *tensors: (*state(*tensors), 7, capture))
    ids = torch.arange(5 * sequences).view(sequences, 5)
    with vps.backend("triton"):
        past = model(ids, attention_mask=torch.ones_like(ids)).past_key_values
        for length in (6, 7):  # in which it is learned what reads one x
            mask = torch.ones(sequences, length, dtype=torch.long)
            model(ids[:, :1], attention_mask=mask, past_key_values=past)
        mask = torch.ones(sequences, 8, dtype=torch.long)
        with Launches(model, monkeypatch) as launches:
            model(ids[:, :1], attention_mask=mask, past_key_values=past)
    layer = Counter(chunk_kernel=1, gemv_kernel=1, apply_kernel=1)
    assert launches.found == {
        "q_proj": layer + Counter(couple_kernel=1),  # and k_proj, v_proj
        "o_proj": layer,
        "gate_proj": layer,  # and up_proj
        "down_proj": layer,
    }


@torch.no_grad()
def test_by_the_operator_decoding_takes_seventeen(model, monkeypatch):
    """As where a dispatch mode looks on."""
    ids = torch.arange(5).view(1, 5)
    with vps.backend("triton"):
        past = model(ids).past_key_values
        with Launches(model, monkeypatch) as launches:
            model(ids[:, :1], past_key_values=past)
    layer = Counter(gemv_kernel=1, apply_kernel=1)
    first = layer + Counter(chunk_kernel=1)  # of those that read the same x
    assert launches.found == {
        "q_proj": first + Counter(couple_kernel=1),  # and k_proj
        "v_proj": layer,
        "o_proj": first,
        "gate_proj": first,
        "up_proj": layer,
        "down_proj": first,
    }


@pytest.mark.parametrize("sequences", [1, 3])
@torch.no_grad()
def test_a_prefill_takes_five_a_layer(model, monkeypatch, sequences):
    """One product a layer, no copy of a selection, and nothing of torch for a mask."""
    ids = torch.arange(24).view(1, 24).repeat(sequences, 1)
    with vps.backend("triton"), Launches(model, monkeypatch) as launches:
        model(ids, attention_mask=torch.ones_like(ids))
    ranked = Counter(partial_kernel=1, rank_kernel=1)
    update = Counter(factors_kernel=1, delta_kernel=1)
    layer = Counter(mm=1) + ranked + update
    scored = Counter(linear=1, partial_kernel=1, combine_kernel=1) + update  # query, or key
    assert launches.found == {
        "q_proj": ranked + scored + scored + Counter(couple_kernel=1),  # and k_proj
        "v_proj": layer,
        "o_proj": ranked + layer,
        "gate_proj": ranked + layer,
        "up_proj": layer,
        "down_proj": ranked + layer,
    }


@pytest.mark.parametrize("tokens", [20, 200])
@torch.no_grad()
def test_wide_layers_take_five_too(monkeypatch, tokens):
    """Several tiles of H, and more of x, whose parts are merged by a launch of their own."""
    layer = vps.VPSLinear.from_linear(torch.nn.Linear(600, 700), vps.VPSConfig())
    model = torch.nn.ModuleDict({"proj": layer})
    x = torch.randn(1, tokens, 600)
    with vps.backend("triton"), Launches(model, monkeypatch) as launches:
        layer(x)
    ranked = Counter(partial_kernel=1, rank_kernel=1)
    update = Counter(factors_kernel=1, delta_kernel=1)
    wanted = ranked + Counter(merge_kernel=1) + Counter(mm=1) + ranked + update
    assert launches.found == {"proj": wanted}


@pytest.mark.parametrize(
    "config",
    [
        vps.VPSConfig(builder="sc"),
        vps.VPSConfig(builder="sk", order=2),
        vps.VPSConfig(builder="sk", clip="spectral"),
        vps.VPSConfig(builder="sc", order=2, clip="spectral", clamp=0.1, gamma=0.3, rank=2),
    ],
    ids=["sc", "second order", "spectral", "all"],
)
@pytest.mark.parametrize("tokens", [1, 40])
@torch.no_grad()
def test_a_core_takes_two(monkeypatch, config, tokens):
    """Nothing of torch but the product: no solver, which a capture may refuse."""
    layer = vps.VPSLinear.from_linear(torch.nn.Linear(60, 70), config)
    model = torch.nn.ModuleDict({"proj": layer})
    x = torch.randn(1, tokens, 60)
    with vps.backend("triton"), Launches(model, monkeypatch) as launches:
        layer(x)
    (found,) = launches.found.values()
    update = Counter(core_kernel=1, delta_kernel=1)
    grams = Counter(gram_kernel=found["gram_kernel"])
    ranked = Counter(partial_kernel=1, rank_kernel=1)
    select = ranked
    if tokens == 1:
        select, ranked = Counter(chunk_kernel=1), Counter(rank_kernel=1, gather_kernel=1)
    assert found == select + Counter(mm=1) + ranked + grams + update
    assert grams["gram_kernel"] <= 1


@pytest.mark.parametrize("model", ["prompt"], indirect=True)
@pytest.mark.parametrize(
    "sequences, tokens, launches",
    [
        (1, 1, {"edited_gemv_kernel": 1}),
        (3, 5, {"edited_gemv_kernel": 1}),
        (5, 1, {"linear": 1}),  # each program would read E of five
        (1, 17, {"linear": 1}),
    ],
)
@torch.no_grad()
def test_after_its_prompt_a_layer_takes_one(model, monkeypatch, sequences, tokens, launches):
    """One, or cuBLAS and an edit for all layers of one x; nothing of torch between."""
    ids = torch.arange(24 * sequences).view(sequences, 24) % 7
    with vps.backend("triton"):
        past = model(ids[:, :5]).past_key_values
        with Launches(model, monkeypatch) as counted:
            model(ids[:, :tokens], past_key_values=past)
    layers = "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    expected = {layer: Counter(launches) for layer in layers}
    if "linear" in launches:
        for first in ("q_proj", "o_proj", "gate_proj", "down_proj"):
            expected[first] += Counter(edit_kernel=1)
    assert counted.found == expected


WAITS = {"_local_scalar_dense", "_to_copy", "lift_fresh", "nonzero", "is_nonzero"}


class NothingFromTheHost(TorchDispatchMode):
    """Refuse what copies between host and device on a GPU, or waits for one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS and "linalg" not in name, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["sequence", "token"], indirect=True)
@torch.no_grad()
def test_nothing_is_copied_from_the_host_after_the_first_call(model, monkeypatch):
    """Also with another entropy, history or γ, so that a graph can be captured and replayed."""
    from triton.runtime.interpreter import GridExecutor

    state, layers = vps.policy_state(model), list(sharpened_layers(model).values())
    run = GridExecutor.__call__

    def unseen(kernel, *arguments, **options):  # the interpreter itself copies
        with _disable_current_modes():
            return run(kernel, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", unseen)
    ids = torch.arange(6).view(2, 3)
    state.set_entropy(0.5)

    def look():
        for tokens in (ids, ids[:, :1]):
            x = model.model.embed_tokens(tokens)
            for layer in layers:
                layer(x[..., : layer.widths[1]] if layer.widths[1] <= x.shape[-1] else wide)

    wide = torch.randn(2, 1, layers[-1].widths[1])
    with vps.backend("triton"):
        look()
        changes = (
            lambda: None,
            lambda: state.set_entropy(1.5),
            lambda: state.record(True),
            lambda: state.set_entropy(None),
            lambda: [
                setattr(layer, "gamma", vps.algorithm.policy.LayerGamma(0.3)) for layer in layers
            ],
            lambda: layers[0].gamma.set(-0.2),
        )
        for change in changes:
            change()
            with NothingFromTheHost():
                look()
