import copy
import itertools

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pmm_fast.models import build_model, conv
from pmm_fast.models.conv import Conv2d
from tests.tolerances import BACKWARD, EXACT, relative_error

OPS = (torch.ops.pmm_fast.conv2d, torch.ops.pmm_fast.conv2d_input_gradient, torch.ops.pmm_fast.conv2d_weight_gradient)
# (in, out, kernel, stride, padding, dilation, groups, bias), map
LAYERS = {
    "plain": ((3, 4, 3, 1, 1), (7, 9)),
    "1x1": ((3, 4, 1, 1, 0, 1, 1, False), (5, 6)),
    "stride": ((3, 4, 3, 2, 1), (8, 9)),
    "stem": ((3, 4, 7, 2, 3, 1, 1, False), (11, 12)),
    "dilated": ((3, 4, 3, 1, 2, 2), (9, 7)),
    "small windows": ((3, 4, 3, 1, 4, 4), (7, 10)),
    "blind rows": ((3, 4, 3, 1, 6, 6), (6, 13)),
    "blind": ((3, 4, 3, 1, 12, 12), (12, 9)),
    "blind 5x5": ((3, 4, 5, 1, 12, 6), (9, 14)),
    "blind and stride": ((3, 4, 3, 2, 8, 8), (7, 20)),
    "other padding": ((3, 4, 3, 1, 5, 4), (7, 6)),
    "unequal": ((3, 4, (3, 1), (1, 2), (3, 0), (3, 1)), (6, 7)),
    "depthwise": ((4, 4, 3, 1, 1, 1, 4, False), (6, 7)),
    "depthwise stride": ((4, 4, 3, 2, 1, 1, 4, False), (7, 6)),
    "depthwise dilated": ((4, 4, 3, 1, 2, 2, 4), (7, 6)),
    "depthwise far": ((4, 4, 3, 1, 4, 4, 4), (9, 6)),
    "depthwise blind": ((4, 4, 3, 1, 4, 4, 4), (4, 6)),
    "depthwise other padding": ((4, 4, 3, 1, 1, 2, 4), (7, 6)),
    "groups": ((4, 6, 3, 1, 2, 2, 2), (5, 6)),
}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)


def both(name, dtype=torch.float64, memory_format=torch.contiguous_format):
    arguments, size = LAYERS[name]
    torch.manual_seed(0)
    ours, plain = Conv2d(*arguments), nn.Conv2d(*arguments)
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    x = torch.randn(2, arguments[0], *size).to(dtype=dtype, memory_format=memory_format).requires_grad_()
    return ours.to(dtype), plain.to(dtype), x


def as_function(layer):
    """The layer as a function of its input and parameters."""
    names = dict(layer.named_parameters())
    return lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)


def derivatives(layer, x):
    """Output, first and second derivatives of a function that bends in input, weight and bias."""
    inputs = (x, *layer.parameters())
    output = layer(x)
    first = torch.autograd.grad(output.pow(3).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(value.pow(2).sum() for value in first), inputs)
    return [output, *first, *second]


@EVERY_LAYER
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
def test_equals_nn_conv2d_to_second_order(name, memory_format):
    ours, plain, x = both(name, memory_format=memory_format)
    for found, expected in zip(derivatives(ours, x), derivatives(plain, x), strict=True):
        assert relative_error(found, expected) < EXACT


@EVERY_LAYER
def test_gradcheck(name):
    ours, _, x = both(name)
    inputs = (x, *ours.parameters())
    assert torch.autograd.gradcheck(as_function(ours), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(as_function(ours), inputs, fast_mode=True)


@pytest.mark.parametrize("name", ("stride", "small windows", "depthwise dilated"))
def test_third_order(name):
    ours, plain, x = both(name)
    third = []
    for layer in (ours, plain):
        grad = layer(x).pow(3).sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(grad, x, create_graph=True)
            grad = grad.pow(2).sum()
        third.append(torch.autograd.grad(grad, layer.weight)[0])
    assert relative_error(*third) < EXACT


@EVERY_LAYER
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_other_types_are_as_near_to_the_truth_as_theirs(name, dtype):
    ours, plain, x = both(name, dtype)
    exact = derivatives(copy.deepcopy(plain).double(), x.detach().double().requires_grad_())
    for found, baseline, expected in zip(derivatives(ours, x), derivatives(plain, x), exact, strict=True):
        assert found.dtype == dtype
        assert relative_error(found, expected) <= 3 * relative_error(baseline, expected) + BACKWARD[dtype]


# opcheck takes seconds a case
@pytest.mark.parametrize("name", ("stride", "small windows", "blind", "depthwise dilated"))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
def test_opcheck(name, memory_format):
    ours, _, x = both(name, torch.float32, memory_format)
    weight, geometry = ours.weight, ours._geometry
    grad = torch.randn_like(ours(x), memory_format=memory_format).requires_grad_()
    arguments = ((x, weight, ours.bias), (grad, weight, x), (grad, x, weight))
    for operator, tensors in zip(OPS, arguments, strict=True):
        torch.library.opcheck(operator.default, (*tensors, *map(list, geometry[:3]), geometry[3]))


def test_channels_last_stays():
    ours, _, x = both("plain", torch.float32, torch.channels_last)
    output = ours(x)
    (grad,) = torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), x)
    for value in (output, grad, second):
        assert value.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ("plain", "small windows", "blind rows", "depthwise dilated"))
@pytest.mark.parametrize("opened", (False, True), ids=("ops", "opened"))
@pytest.mark.parametrize("mode", ("real", "fake"))
def test_traced_with_its_derivatives(name, opened, mode):
    ours, _, x = both(name)
    parameters = list(ours.parameters())

    def second_order(x, *values):
        (first,) = torch.autograd.grad(as_function(ours)(x, *values).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), (x, values[0]))

    table = conv.DECOMPOSITIONS if opened else {}
    graph = make_fx(second_order, decomposition_table=table, tracing_mode=mode)(x, *parameters)
    ops = {node.target for node in graph.graph.nodes if "pmm_fast" in str(node.target)}
    assert len(ops) == (0 if opened else 3)
    other = torch.randn_like(x, requires_grad=True)
    for found, expected in zip(graph(other, *parameters), second_order(other, *parameters), strict=True):
        assert relative_error(found, expected) < EXACT


@pytest.fixture
def counted(monkeypatch):
    """How often each of the three maps was called since it was asked last."""
    names, made = ("_conv2d", "_conv2d_input_gradient", "_conv2d_weight_gradient"), []
    for name in names:
        function = getattr(conv, name)
        monkeypatch.setattr(conv, name, lambda *values, _n=name, _f=function: made.append(_n) or _f(*values))

    def take():
        counts = [made.count(name) for name in names]
        made.clear()
        return counts

    return take


def test_nothing_is_computed_that_nobody_asked_for(counted):
    ours, _, x = both("plain")
    ours(x.detach()).sum().backward()
    assert counted() == [1, 0, 1]
    ours.weight.requires_grad_(False)
    torch.autograd.grad(ours(x).sum(), x)
    assert counted() == [1, 1, 0]
    # of D(g, w) with w constant, the derivative in g alone
    output = ours(x)
    (first,) = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)
    counted()
    torch.autograd.grad(first.pow(2).sum(), output)
    assert counted() == [1, 0, 0]


def test_a_second_derivative_is_two_forwards_and_one_backward(counted):
    ours, _, x = both("plain")
    output = ours(x)
    grad = torch.ones_like(output, requires_grad=True)
    first = torch.autograd.grad(output, (x, ours.weight), grad, create_graph=True)
    assert counted() == [1, 1, 1]
    torch.autograd.grad(first, (grad, x, ours.weight), [value.detach() for value in first])
    assert counted() == [2, 1, 1]


@pytest.mark.parametrize("name", ("plain", "depthwise"))
def test_autocast_casts_like_nn_conv2d(name):
    ours, plain, x = both(name, torch.float32)
    for dtype, kept in itertools.product((torch.bfloat16, torch.float16), (False, True)):
        with torch.autocast("cpu", dtype=dtype), torch.set_grad_enabled(kept):
            found, expected = ours(x), plain(x)
        assert found.dtype == expected.dtype == dtype
        assert torch.equal(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.double()(x.double()).dtype == torch.float64


def test_without_gradient_mode_there_is_no_registered_op():
    ours, _, x = both("blind")
    with torch.no_grad():
        graph = make_fx(as_function(ours), tracing_mode="fake")(x.detach(), *ours.parameters())
    assert "pmm_fast" not in graph.code and "convolution" in graph.code


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation", "blind"),
    (
        (12, 3, 1, 12, 12, 1),
        (13, 3, 1, 12, 12, 0),
        (6, 3, 1, 6, 6, 1),
        (9, 5, 1, 12, 6, 1),
        (6, 5, 1, 12, 6, 2),
        (8, 3, 2, 8, 8, 1),
        (10, 3, 2, 9, 9, 0),
    ),
)
def test_blind_taps(size, kernel, stride, padding, dilation, blind):
    assert conv._blind_taps(size, kernel, stride, padding, dilation) == blind


def test_blind_taps_have_gradient_zero_and_the_others_do_not():
    ours, _, x = both("blind rows")
    (grad,) = torch.autograd.grad(ours(x).pow(2).sum(), ours.weight)
    assert grad[:, :, (0, 2)].eq(0).all() and grad[:, :, 1].ne(0).all()


@pytest.mark.parametrize(
    ("rows", "dilation", "by_taps"), ((12, 6, True), (12, 5, False), (24, 12, True), (25, 12, False), (12, 12, False))
)
def test_which_weight_gradients_go_tap_by_tap(rows, dilation, by_taps, monkeypatch):
    made = []
    whole = conv._weight_gradient_by_taps
    monkeypatch.setattr(conv, "_weight_gradient_by_taps", lambda *values: made.append(1) or whole(*values))
    layer = Conv2d(2, 3, 3, padding=dilation, dilation=dilation)
    layer(torch.randn(1, 2, rows, 48)).sum().backward()
    assert bool(made) == by_taps


def test_named_padding_is_refused():
    with pytest.raises(ValueError, match=r"Conv2d: padding must be a number.*'same'"):
        Conv2d(3, 4, 3, padding="same")


@pytest.mark.parametrize("architecture", ("deeplabv3plus_mobilenet_v2", "deeplabv2_resnet18"))
def test_the_networks_use_it_for_every_convolution(architecture):
    found = [m for m in build_model(architecture, 3, channels=8).modules() if isinstance(m, nn.Conv2d)]
    assert len(found) > 20 and all(type(m) is Conv2d for m in found)
    assert repr(Conv2d(3, 4, 3, bias=False)) == repr(nn.Conv2d(3, 4, 3, bias=False))
