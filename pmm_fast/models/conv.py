"""Convolutions whose second derivative costs as much as their first.

A convolution y = C(x, w) is bilinear, so every derivative of it is made of three bilinear maps: C itself, its transpose
D(g, w) in x, and its weight gradient W(g, x).  They are closed under differentiation; with an incoming gradient a or b:

    y = C(x, w)      to x: D(a, w)     to w: W(a, x)
    u = D(g, w)      to g: C(a, w)     to w: W(g, a)
    v = W(g, x)      to g: C(x, b)     to x: D(g, b)

Each is a registered op, so a derivative of any order computes the terms that are asked for and no others.  PyTorch's
own double backward (``convolution_double_backward``) finds its weight gradient by a transposed convolution, and
convolves group by group where there are groups: 7,500 small convolutions in one order-2 step of a MobileNetV2.

Taps of the kernel that see nothing but padding are left out: at dilation 12, a 3x3 kernel on a 12 x 12 map is its
centre.

Shapes: N images, I and O channels in and out, G groups, h x w kernel, H x W map, H' x W' output map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload

Pair = Sequence[int]
Size = int | tuple[int, int]


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """C(x, w) + bias.

    Args:
        x: ``[N, I, H, W]`` of any floating type.
        weight: ``[O, I / G, h, w]``, same type.
        bias: ``[O]``, same type, or None.
        stride, padding, dilation: of rows and of columns.
        groups: G.

    Returns:
        ``[N, O, H', W']``.
    """
    weight, padding = _without_blind_taps(x, weight, stride, padding, dilation)
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


def input_gradient(
    grad: Tensor, weight: Tensor, like: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """D(g, w), the gradient of <g, C(x, w)> in x.

    Args:
        grad: ``[N, O, H', W']``.
        weight: ``[O, I / G, h, w]``.
        like: ``[N, I, H, W]``, gives the shape.
        stride, padding, dilation, groups: as in :func:`convolve`.

    Returns:
        ``[N, I, H, W]``.
    """
    weight, padding = _without_blind_taps(like, weight, stride, padding, dilation)
    if _is_dilated_depthwise(like, weight, stride, padding, dilation, groups):
        # oneDNN has a kernel for the forward of these and none for the backward
        return torch.conv2d(grad, weight.flip(2, 3), None, stride, padding, dilation, groups)
    return _backward(grad, like, weight, stride, padding, dilation, groups, (True, False, False))[0]


def weight_gradient(
    grad: Tensor, x: Tensor, like: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """W(g, x), the gradient of <g, C(x, w)> in w.

    Args:
        grad: ``[N, O, H', W']``.
        x: ``[N, I, H, W]``.
        like: ``[O, I / G, h, w]``, gives the shape.
        stride, padding, dilation, groups: as in :func:`convolve`.

    Returns:
        ``[O, I / G, h, w]``.
    """
    seen, padding = _without_blind_taps(x, like, stride, padding, dilation)
    if _is_dilated_depthwise(x, seen, stride, padding, dilation, groups):
        grad, x, padding, dilation = _phases(grad, dilation), _phases(x, dilation), (1, 1), (1, 1)
    if _has_small_windows(x, seen, stride, padding, dilation, groups):
        found = _weight_gradient_by_taps(grad, x, seen, padding, dilation)
    else:
        found = _backward(grad, x, seen, stride, padding, dilation, groups, (False, True, False))[1]
    rows, columns = ((full - kept) // 2 for full, kept in zip(like.shape[2:], seen.shape[2:], strict=True))
    return F.pad(found, (columns, columns, rows, rows)) if rows or columns else found


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The type of the mixed precision in force on a device, or None."""
    # the meta device has none to ask about
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )


def _without_blind_taps(
    x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Sequence[int]]:
    """Kernel and padding without the outermost taps that see nothing but padding, as many on either side."""
    if max(dilation) == 1:
        return weight, padding
    rows, columns = (
        _blind_taps(x.shape[axis + 2], weight.shape[axis + 2], stride[axis], padding[axis], dilation[axis])
        for axis in (0, 1)
    )
    if not rows and not columns:
        return weight, padding
    seen = weight[:, :, rows : weight.shape[2] - rows, columns : weight.shape[3] - columns]
    return seen, (padding[0] - rows * dilation[0], padding[1] - columns * dilation[1])


def _blind_taps(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many taps on each side of one axis see padding at every output position.

    Tap k at output o sees position o stride + k dilation - padding.
    """
    last = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride
    count = 0
    while (
        count < (kernel - 1) // 2
        and last * stride + count * dilation < padding
        and (kernel - 1 - count) * dilation - padding >= size
        and (count + 1) * dilation <= padding
    ):
        count += 1
    return count


def _is_dilated_depthwise(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> bool:
    """3x3, one filter a channel, as large out as in, on the CPU, where oneDNN's derivatives of these are slow.

    Measured with 960 channels, dilation 2, 24 x 24: 3 ms forward and 40 to 60 ms for either derivative.
    """
    return (
        x.device.type == "cpu"
        and groups == weight.shape[0] == x.shape[1] > 1
        and weight.shape[2:] == (3, 3)
        and max(stride) == 1
        and dilation[0] == dilation[1] == padding[0] == padding[1] > 1
    )


def _phases(x: Tensor, dilation: Pair) -> Tensor:
    """The d x d interleaved maps of ``[N, C, H, W]``, each a map of its own: what dilation d keeps apart.

    Rows and columns are filled up with zeros to multiples of d, which adds nothing to a weight gradient.
    """
    d = dilation[0]
    x = F.pad(x, (0, -x.shape[3] % d, 0, -x.shape[2] % d))
    return x.unflatten(3, (-1, d)).unflatten(2, (-1, d)).permute(0, 3, 5, 1, 2, 4).flatten(0, 2)


def _has_small_windows(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> bool:
    """Whether the outer taps see half the rows of the map or fewer, on the CPU.

    oneDNN then has no direct kernel for the weight gradient and multiplies mostly padding: 1.3 to 8 times slower than
    one product a tap.  With larger windows it has one, as fast as the forward.
    """
    return (
        x.device.type == "cpu"
        and groups == 1
        and max(stride) == 1
        and dilation[0] > 1
        and weight.shape[2] > 1
        and 2 * padding[0] >= x.shape[2]
    )


def _weight_gradient_by_taps(grad: Tensor, x: Tensor, like: Tensor, padding: Pair, dilation: Pair) -> Tensor:
    """W(g, x) at stride 1, tap by tap: the product of the gradients and of the inputs that they meet there."""
    taps = []
    for top in range(like.shape[2]):
        rows_g, rows_x = _window(x.shape[2], grad.shape[2], top * dilation[0] - padding[0])
        for left in range(like.shape[3]):
            columns_g, columns_x = _window(x.shape[3], grad.shape[3], left * dilation[1] - padding[1])
            seen_g = grad[:, :, rows_g, columns_g].transpose(0, 1).flatten(1)
            seen_x = x[:, :, rows_x, columns_x].transpose(0, 1).flatten(1)
            taps.append(seen_g @ seen_x.t())
    return torch.stack(taps, -1).view(like.shape)


def _window(size: int, out: int, offset: int) -> tuple[slice, slice]:
    """Output positions at which a tap at ``offset`` sees the map, and the positions that it sees."""
    start, stop = max(0, -offset), max(min(out, size - offset), 0)
    stop = max(start, stop)
    return slice(start, stop), slice(start + offset, stop + offset)


# op, fake and decomposition are one function
_conv2d = torch.library.custom_op("pmm_fast::conv2d", convolve, mutates_args=())
_conv2d_input_gradient = torch.library.custom_op("pmm_fast::conv2d_input_gradient", input_gradient, mutates_args=())
_conv2d_weight_gradient = torch.library.custom_op("pmm_fast::conv2d_weight_gradient", weight_gradient, mutates_args=())


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the two tensors of a map; its third is a bias or gives a shape."""
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.geometry = inputs[3:]


def _differentiate_conv2d(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    return (
        _conv2d_input_gradient(grad, weight, x, *ctx.geometry) if wants_x else None,
        _conv2d_weight_gradient(grad, x, weight, *ctx.geometry) if wants_weight else None,
        grad.sum((0, 2, 3)) if wants_bias else None,
        *[None] * 4,
    )


def _differentiate_input_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    incoming, weight = ctx.saved_tensors
    wants_incoming, wants_weight = ctx.needs_input_grad[:2]
    return (
        _conv2d(grad, weight, None, *ctx.geometry) if wants_incoming else None,
        _conv2d_weight_gradient(incoming, grad, weight, *ctx.geometry) if wants_weight else None,
        *[None] * 5,
    )


def _differentiate_weight_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    incoming, x = ctx.saved_tensors
    wants_incoming, wants_x = ctx.needs_input_grad[:2]
    return (
        _conv2d(x, grad, None, *ctx.geometry) if wants_incoming else None,
        _conv2d_input_gradient(incoming, grad, x, *ctx.geometry) if wants_x else None,
        *[None] * 5,
    )


_conv2d.register_fake(convolve)
_conv2d_input_gradient.register_fake(input_gradient)
_conv2d_weight_gradient.register_fake(weight_gradient)
_conv2d.register_autograd(_differentiate_conv2d, setup_context=_save)
_conv2d_input_gradient.register_autograd(_differentiate_input_gradient, setup_context=_save)
_conv2d_weight_gradient.register_autograd(_differentiate_weight_gradient, setup_context=_save)

DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.pmm_fast.conv2d.default: convolve,
    torch.ops.pmm_fast.conv2d_input_gradient.default: input_gradient,
    torch.ops.pmm_fast.conv2d_weight_gradient.default: weight_gradient,
}


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` with the derivatives of this module: same parameters, same values.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in ``nn.Conv2d``; padding is
            zeros.

    Raises:
        ValueError: padding given by name.

    Note:
        Differentiable in input, weight and bias to any order.  Under autocast all three are cast as those of any
        convolution.  Without gradient mode no registered op is called, so that inference can be exported.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        if isinstance(padding, str):
            raise ValueError(f"Conv2d: padding must be a number of pixels or two of them, got {padding!r}")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        assert not isinstance(self.padding, str)
        self._geometry = (self.stride, self.padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, I, H, W]`` to ``[N, O, H', W']``."""
        weight, bias = self.weight, self.bias
        dtype = autocast_type(x.device)
        if dtype is not None and x.dtype != torch.float64:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        function = _conv2d if torch.is_grad_enabled() else convolve
        return function(x, weight, bias, *self._geometry)
