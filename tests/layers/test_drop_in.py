"""``VPSLinear`` where the code of others has an ``nn.Linear``, PyTorch's own tests of it first.

The inputs and references are those of ``torch.testing._internal.common_modules``, from which
PyTorch's ``test_modules.py`` makes its tests.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like

import vps
from vps import VPSConfig, VPSLinear

INFO = next(each for each in module_db if each.module_cls is nn.Linear)


class Off(VPSLinear):
    """``VPSLinear`` with γ = 0, made as PyTorch's tests make a module."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, config=VPSConfig(gamma=0), **kwargs)


def inputs(dtype, requires_grad=False):
    """PyTorch's inputs for nn.Linear."""
    torch.manual_seed(0)
    return INFO.module_inputs_func(
        INFO, device="cpu", dtype=dtype, requires_grad=requires_grad, training=True
    )


def made(cls, module_input, dtype, **kwargs):
    """A module of a class for one of the inputs, always the same."""
    torch.manual_seed(1)
    constructor = module_input.constructor_input
    return cls(*constructor.args, **constructor.kwargs, **kwargs).to(dtype)


def called(module, module_input):
    forward = module_input.forward_input
    return module(*forward.args, **forward.kwargs)


CASES = pytest.mark.parametrize(
    ("number", "dtype"), [(n, d) for n in range(len(inputs(torch.float32))) for d in INFO.dtypes]
)


@CASES
@pytest.mark.parametrize("cls", [Off, VPSLinear])
def test_forward(number, dtype, cls):
    case = inputs(dtype)[number]
    module, plain = made(cls, case, dtype), made(nn.Linear, case, dtype)
    with vps.disabled(nn.Sequential(module)):
        y = called(module, case)
    assert torch.equal(y, called(plain, case))
    forward = case.forward_input
    torch.testing.assert_close(y, case.reference_fn(module, *forward.args, **forward.kwargs))
    called(module, case)  # by name, too, where it is sharpened


@CASES
def test_factory_arguments_keep_their_places(number, dtype):
    constructor = inputs(dtype)[number].constructor_input
    bias = constructor.kwargs.get("bias", True)
    for module in (
        VPSLinear(*constructor.args, device="meta", dtype=dtype, **constructor.kwargs),
        VPSLinear(*constructor.args, bias, "meta", dtype),
        VPSLinear(*constructor.args, bias, torch.device("meta"), dtype=dtype),
    ):
        assert all(p.is_meta and p.dtype is dtype for p in module.parameters())
        assert (module.bias is not None) == bias and module.config == VPSConfig()
    with torch.device("meta"):
        assert VPSLinear(*constructor.args, **constructor.kwargs).weight.is_meta
    with pytest.raises(TypeError):
        VPSLinear(*constructor.args, bias, None, None, VPSConfig())


@CASES
def test_copies_pickles_and_state_dicts(number, dtype):
    case = inputs(dtype)[number]
    module = made(Off, case, dtype)
    expected = called(module, case)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    torch.manual_seed(2)
    constructor = case.constructor_input
    loaded = Off(*constructor.args, **constructor.kwargs).to(dtype)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for each in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(called(each, case), expected)
    plain = made(nn.Linear, case, dtype)
    assert list(plain.state_dict()) == list(module.state_dict())
    assert repr(plain)[len("Linear(") : -1] in repr(module)


@pytest.mark.parametrize("number", range(len(inputs(torch.float64))))
def test_gradients_of_first_and_second_order(number):
    case = inputs(torch.float64, requires_grad=True)[number]
    module = made(Off, case, torch.float64)
    forward = case.forward_input
    x = (*forward.args, *forward.kwargs.values())[0]

    def run(x, *parameters):
        names = [name for name, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    given = (x, *module.parameters())
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, given)


@CASES
def test_views_and_inputs_that_are_not_contiguous(number, dtype):
    case, strided = inputs(dtype)[number], inputs(dtype)[number]
    forward = strided.forward_input
    forward.args = tuple(noncontiguous_like(arg) for arg in forward.args)
    forward.kwargs = {name: noncontiguous_like(arg) for name, arg in forward.kwargs.items()}
    module = made(Off, case, dtype)
    expected = called(module, case)
    torch.testing.assert_close(called(module, strided), expected)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.set_(noncontiguous_like(parameter))
    torch.testing.assert_close(called(module, case), expected)


@pytest.mark.parametrize("swap", [False, True])
@torch.no_grad()
def test_conversions(swap):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer = VPSLinear(6, 5)
        x = torch.randn(3, 6)
        expected = layer(x)
        torch.testing.assert_close(
            layer.double()(x.double()).float(), expected, atol=1e-5, rtol=1e-5
        )
        layer.to("meta")
        assert layer.weight.is_meta
        layer.to_empty(device="cpu").reset_parameters()
        assert layer(x.double()).dtype is torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_a_meta_layer_waits_for_its_values():
    torch.manual_seed(0)
    plain = nn.Linear(6, 5)
    x = torch.randn(2, 4, 6)
    expected = VPSLinear.from_linear(plain)(x)
    assert not torch.equal(expected, plain(x))
    for load in (
        lambda layer: layer.load_state_dict(plain.state_dict(), assign=True),
        lambda layer: layer.to_empty(device="cpu").load_state_dict(plain.state_dict()),
    ):
        layer = VPSLinear.from_linear(nn.Linear(6, 5, device="meta"))
        assert layer(torch.empty(2, 4, 6, device="meta")).shape == (2, 4, 5)
        errors = []
        for each in (layer, nn.Linear(6, 5, device="meta")):
            with pytest.raises((RuntimeError, NotImplementedError)) as raised:
                each(x)
            errors.append((type(raised.value), str(raised.value)))
        assert errors[0] == errors[1]
        load(layer)
        assert torch.equal(layer(x), expected)


def off_layers():
    """One that is off by its config, and what turns sharpening off for the other."""
    yield VPSLinear(6, 5, config=VPSConfig(gamma=0)), None
    layer = VPSLinear(6, 5)
    layer.gamma = vps.algorithm.policy.LayerGamma(0.0)
    yield layer, None
    layer = VPSLinear(6, 5)
    yield layer, vps.disabled(nn.Sequential(layer))


def jagged(layer):
    parts = [torch.randn(n, 6) for n in (2, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    return torch.cat(layer(nested).unbind()), torch.cat([plain_of(layer)(part) for part in parts])


def sparse(layer):
    x = torch.eye(6).to_sparse()
    return layer(x), plain_of(layer)(x)


def complex_numbers(layer):
    layer.to(torch.complex64)
    x = torch.randn(3, 6, dtype=torch.complex64)
    return layer(x), plain_of(layer)(x)


def tangents(layer):
    x, t = torch.randn(2, 3, 6)
    return torch.cat(torch.func.jvp(layer, (x,), (t,))), torch.cat(
        torch.func.jvp(plain_of(layer), (x,), (t,))
    )


def hessian(layer):
    x = torch.randn(6)
    return tuple(
        torch.func.hessian(lambda x, f=f: f(x).square().sum())(x) for f in (layer, plain_of(layer))
    )


def proxies(layer):
    x = torch.randn(3, 6)
    return torch.fx.symbolic_trace(nn.Sequential(layer))(x), plain_of(layer)(x)


def batched(layer):
    x = torch.randn(4, 3, 6)
    return torch.vmap(layer)(x), torch.vmap(plain_of(layer))(x)


def tensor_subclass(layer):
    class Sub(torch.Tensor):
        pass

    x = torch.randn(3, 6).as_subclass(Sub)
    y = layer(x)
    assert type(y) is Sub
    return y.as_subclass(torch.Tensor), plain_of(layer)(x).as_subclass(torch.Tensor)


def plain_of(layer):
    return nn.Linear.forward.__get__(layer)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize(
    "use",
    [jagged, sparse, complex_numbers, tangents, hessian, proxies, batched, tensor_subclass],
    ids=lambda use: use.__name__,
)
def test_what_nn_linear_takes_is_taken_where_sharpening_is_off(place, use):
    torch.manual_seed(0)
    layer, off = list(off_layers())[place]
    if off is None:
        got, expected = use(layer)
    else:
        with off:
            got, expected = use(layer)
    assert torch.equal(got.to_dense(), expected.to_dense())


def test_the_function_takes_it_too():
    W, b = torch.randn(5, 6), torch.randn(5)
    x = torch.randn(3, 6, dtype=torch.complex64)
    W, b = W.to(x.dtype), b.to(x.dtype)
    expected = torch.nn.functional.linear(x, W, b)
    assert torch.equal(vps.vps_linear(x, W, b, VPSConfig(gamma=0)), expected)
    assert torch.equal(vps.vps_linear(x, W, b, gamma=0.0), expected)


def test_the_input_goes_by_its_name_through_hooks():
    layer, x = VPSLinear(6, 5), torch.randn(3, 6)
    expected, seen = layer(x), []
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    assert torch.equal(layer(input=x), expected) and seen == [["input"]]
    assert torch.equal(torch.func.functional_call(layer, {}, (), {"input": x}), expected)


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (1, 4, 6), (2, 4, 6), (1, 1, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("scope", ["sequence", "token", "batch"])
@pytest.mark.parametrize("builder", ["sk", "sc"])
def test_an_output_may_be_edited_in_place(backend, shape, scope, builder):
    torch.manual_seed(0)
    layer = VPSLinear(6, 5, config=VPSConfig(scope=scope, builder=builder))
    x = torch.randn(shape, requires_grad=True)
    with vps.backend(backend):
        y = layer(x)
        y /= 2
        y[..., 0] = 3
        nn.functional.relu(y, inplace=True).sum().backward()
        edited, x.grad = x.grad, None
        y = layer(x) / 2
        first = torch.arange(5) == 0
        torch.where(first, torch.tensor(3.0), y).relu().sum().backward()
    torch.testing.assert_close(edited, x.grad)
