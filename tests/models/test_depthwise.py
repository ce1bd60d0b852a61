import copy

import pytest
import torch
from torch import nn

from pmm_fast.models.depthwise import DepthwiseConv2d, _backward, _forward

GEOMETRIES = [(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 4, 4), (1, 0, 1), (2, 2, 2)]


def both(stride, padding, dilation, channels=5):
    ours = DepthwiseConv2d(channels, 3, stride, padding, dilation).double()
    plain = nn.Conv2d(channels, channels, 3, stride, padding, dilation, groups=channels, bias=False).double()
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    return ours, plain


def derivatives(layer, x):
    """Output, first and second derivatives of a function that bends in input and weight."""
    output = layer(x)
    first = torch.autograd.grad(output.pow(3).sum(), (x, layer.weight), create_graph=True)
    second = torch.autograd.grad(sum(value.pow(2).sum() for value in first), (x, layer.weight))
    return [output, *first, *second]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equals_conv2d_to_second_order(geometry):
    x = torch.randn(2, 5, 11, 9, dtype=torch.float64, requires_grad=True)
    for found, expected in zip(*(derivatives(layer, x) for layer in both(*geometry)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gradcheck_and_third_order():
    ours, plain = both(2, 1, 1, channels=2)
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = ours.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: _forward(a, b, 2, 1, 1), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: _forward(a, b, 2, 1, 1), (x, weight))
    third = []
    for layer in (ours, plain):
        grad = layer(x).pow(3).sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(grad, x, create_graph=True)
            grad = grad.pow(2).sum()
        third.append(torch.autograd.grad(grad, layer.weight)[0])
    torch.testing.assert_close(*third, rtol=1e-9, atol=1e-9)


def test_opcheck():
    x, weight = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(3, 1, 3, 3, requires_grad=True)
    torch.library.opcheck(_forward, (x, weight, 1, 1, 1))
    grad = torch.randn(2, 3, 6, 6, requires_grad=True)
    torch.library.opcheck(_backward, (grad, x, weight, 1, 1, 1))


def test_autocast_casts_like_conv2d():
    ours, plain = (layer.float() for layer in both(1, 1, 1))
    x = torch.randn(2, 5, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = ours(x), plain(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_mobilenet_uses_it_for_every_depthwise_layer():
    from pmm_fast.models import build_model

    model = build_model("deeplabv3plus_mobilenet_v2", 3, channels=8)
    grouped = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(grouped) == 17 and all(isinstance(m, DepthwiseConv2d) for m in grouped)
