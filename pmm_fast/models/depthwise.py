"""Depthwise convolution whose second derivative costs as much as its first.

A depthwise convolution y = x * w is bilinear, so every derivative of it is made of three maps: the convolution itself,
its transpose D_x(g, w) and its weight gradient D_w(g, x).  With backward(g, x, w) = (D_x(g, w), D_w(g, x)) and incoming
gradients a, b of its two outputs, the derivative of backward is

    in g:      a * w + x * b
    in (x, w): backward(g, a, b)

so the pair is closed under differentiation, to any order.  PyTorch's own double backward of a grouped convolution
(``convolution_double_backward``) convolves group by group instead: 7,500 small convolutions in one order-2 step of a
MobileNetV2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _geometry(stride: int, padding: int, dilation: int) -> tuple[list[int], list[int], list[int]]:
    return [stride] * 2, [padding] * 2, [dilation] * 2


@torch.library.custom_op("pmm_fast::depthwise_conv2d", mutates_args=())
def _forward(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    return nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1])


@torch.library.custom_op("pmm_fast::depthwise_conv2d_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        *_geometry(stride, padding, dilation),
        transposed=False,
        output_padding=[0, 0],
        groups=x.shape[1],
        output_mask=[True, True, False],
    )
    return grad_x, grad_weight


@_forward.register_fake
def _(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    return nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1])


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: object) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.geometry = inputs[len(tensors) :]  # type: ignore[attr-defined]


def _differentiate_forward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    return (*_backward(grad, x, weight, *ctx.geometry), None, None, None)


def _differentiate_backward(ctx, grad_x: Tensor, grad_weight: Tensor):  # type: ignore[no-untyped-def]
    grad, x, weight = ctx.saved_tensors
    of_grad = _forward(grad_x, weight, *ctx.geometry) + _forward(x, grad_weight, *ctx.geometry)
    return (of_grad, *_backward(grad, grad_x, grad_weight, *ctx.geometry), None, None, None)


_forward.register_autograd(_differentiate_forward, setup_context=_save)
_backward.register_autograd(_differentiate_backward, setup_context=_save)


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d(channels, channels, kernel_size, groups=channels, bias=False)``, quick to differentiate twice.

    Args:
        channels: C, in and out.
        kernel_size, stride, padding, dilation: as of ``nn.Conv2d``, the same in both directions.

    Note:
        Same parameter name and values as ``nn.Conv2d``; differentiable in input and weight to any order; under
        autocast input and weight are cast as those of any convolution.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> None:
        super().__init__(channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C, H', W']``."""
        weight = self.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return _forward(x, weight, self.stride[0], int(self.padding[0]), self.dilation[0])
