"""Batch normalisation with a second derivative of few passes, over one process or several.

With w, b weight and offset of a channel, M the values it has in the batch, mu and r their mean and inverse deviation,
x^ = (x - mu) r and sums over the batch:

    forward         y = w x^ + b
    backward        g_x = w r (g - s1 / M - x^ s2 / M)      g_w = s2 = sum g x^      g_b = s1 = sum g

The double backward has incoming gradients a, b, c of g_x, g_w, g_b.  With A1 = sum a, A2 = sum a x^ and
Q = sum a g - (A1 s1 + A2 s2) / M,

    to g:   w r (a - A1 / M - x^ A2 / M) + b x^ + c         the backward itself, of a, and two terms more
    to w:   r Q
    to x:   r (h - H1 / M - x^ H2 / M) - w Q r^2 x^ / M     h = b g - w r (a s2 + A2 g) / M
            H1 = sum h   = b s1 - w r (A1 s2 + A2 s1) / M
            H2 = sum h x^ = b s2 - 2 w r A2 s2 / M

which is a linear combination of a, g and x - mu in each channel.  PyTorch's own is some sixty passes over the map, this
written in PyTorch thirty, and the kernels that a GPU gets for it (``kernels/batch_norm.py``) read the maps twice.

Over several ranks M, mu, r and every sum are those of all ranks together, one collective in each of the three; g_w and
g_b are the sums of this rank, and b, c what came in on this rank (whoever trains adds up gradients over the ranks).

Shapes: N images, C channels, H x W positions.  Statistics, sums and coefficients are float32 for bf16 and fp16: a
second derivative contains r^3, which passes fp16's largest number once the variance is below 6e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from pmm_fast.ops.backends import interpreted, refuses, requested, use_backend
from pmm_fast.ops.chain import empty_map, kernels
from pmm_fast.ops.collective import sum_over_ranks

_CHANNELS = (1, -1, 1, 1)


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward.

    Args:
        x: ``[N, C, H, W]`` of any floating type.
        weight, bias: ``[C]``, w and b, float32 (float64 for float64).
        eps: added to the variance.
        group: name of the process group that has the batch, or None.

    Returns:
        y ``[N, C, H, W]`` in the type of ``x``; ``[C]`` mean, inverse deviation and unbiased variance.
    """
    if group is None:
        # running statistics that forget everything are this batch's
        empty = weight.new_zeros(2, weight.shape[0]).unbind()
        y, mean, inverse, _, unbiased = torch.ops.aten._native_batch_norm_legit_functional(
            x, weight, bias, *empty, True, 1.0, eps
        )
        # they are of this type already, save in a trace: the op's fake says bf16
        mean, inverse, unbiased = (value.to(weight.dtype) for value in (mean, inverse, unbiased))
        return y, mean, inverse, unbiased
    # each rank's moments are sound; float64 keeps their sums so
    local = x.numel() // x.shape[1]
    variance, mean = (value.double() for value in torch.var_mean(x.to(weight.dtype), (0, 2, 3), correction=0))
    (mean, square), count = _means((local * mean, local * (variance + mean.square())), local, group)
    variance = (square - mean.square()).clamp(min=0)
    found = (mean, variance, (variance + eps).rsqrt(), variance * count / (count - 1).clamp(min=1))
    mean, variance, inverse, unbiased = (value.to(weight.dtype) for value in found)
    y = torch.ops.aten.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
    return y, mean, inverse, unbiased


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, group: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward.

    Args:
        grad: ``[N, C, H, W]`` of y.
        x, weight, group: as in :func:`normalise`.
        mean, inverse: ``[C]``, what it returned.

    Returns:
        g_x ``[N, C, H, W]``, g_w and g_b ``[C]``.
    """
    if group is None:
        return _native_backward(grad, x, weight, mean, inverse, True)
    _, of_weight, of_bias = _native_backward(grad, x, weight, mean, inverse, False)
    (scaled, total), _ = _means((of_weight, of_bias), x.numel() // x.shape[1], group)
    return _project(grad, x, weight, mean, inverse, total, scaled), of_weight, of_bias


def double_backward(
    of_x: Tensor,
    of_weight: Tensor,
    of_bias: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The double backward.

    Args:
        of_x, of_weight, of_bias: a ``[N, C, H, W]``, b and c ``[C]``, incoming gradients of the results of
            :func:`backward`.
        grad, x, weight, mean, inverse, group: its arguments.
        grad_weight, grad_bias: ``[C]``, g_w and g_b, what it returned.

    Returns:
        The gradients in ``grad``, ``x`` and ``weight``; the last a part of the sum over the ranks.
    """
    local = x.numel() // x.shape[1]
    kind, type_ = x.dtype, weight.dtype
    # one cast each, for arithmetic of two types is slow
    of_x, grad, x = of_x.to(type_), grad.to(type_), x.to(type_)
    product = (of_x * grad).sum((0, 2, 3))
    of_grad, scaled_a, total_a = _native_backward(of_x, x, weight, mean, inverse, group is None)
    sums = (total_a, scaled_a, grad_bias, grad_weight, of_weight * grad_bias, of_weight * grad_weight, product)
    if group is None:
        a1, a2, s1, s2, b1, b2, mean_product = (value / local for value in sums)
    else:
        (a1, a2, s1, s2, b1, b2, mean_product), _ = _means(sums, local, group)
        of_grad = _project(of_x, x, weight, mean, inverse, a1, a2)
    # w r, and H1, H2, Q over M
    slope = weight * inverse
    h1 = b1 - slope * (a1 * s2 + a2 * s1)
    h2 = b2 - 2 * slope * a2 * s2
    q = mean_product - a1 * s1 - a2 * s2
    of_scale = inverse * (product - total_a * s1 - scaled_a * s2)

    centred = x - mean.view(_CHANNELS)
    of_grad.addcmul_(centred, (inverse * of_weight).view(_CHANNELS)).add_(of_bias.view(_CHANNELS))
    found = centred.mul_((-inverse.square() * (h2 + slope * q)).view(_CHANNELS))
    found.addcmul_(of_x, (-inverse * slope * s2).view(_CHANNELS))
    found.addcmul_(grad, (inverse * (of_weight - slope * a2)).view(_CHANNELS))
    found.sub_((inverse * h1).view(_CHANNELS))
    return of_grad.to(kind), found.to(kind), of_scale


def _double_backward_op(
    of_x: Tensor,
    of_weight: Tensor,
    of_bias: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`double_backward`, by a kernel where there is one."""
    tensors = (of_x, of_weight, of_bias, grad, x, weight, mean, inverse, grad_weight, grad_bias)
    if group is None and _has_kernels(x):
        return kernels("batch_norm", "triton").double_backward(*tensors)
    of_grad, of_x, of_scale = double_backward(*tensors, group)
    return _laid_out(of_grad, x), _laid_out(of_x, x), of_scale


def _double_backward_fake(of_x: Tensor, of_weight: Tensor, of_bias: Tensor, grad: Tensor, x: Tensor, *rest: Any) -> Any:
    """The results have the layout of ``x``, whoever computes them."""
    return empty_map(x, x.shape[1]), empty_map(x, x.shape[1]), torch.empty_like(rest[0])


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A map in the layout of another."""
    found = empty_map(like, like.shape[1])
    return value if value.stride() == found.stride() else found.copy_(value)


def _has_kernels(x: Tensor) -> bool:
    """Whether Triton takes a map: on a GPU unless plain PyTorch is asked for by name, interpreted only by name.

    As it is for the operators (:mod:`pmm_fast.ops.backends`), which have more backends.
    """
    wanted = requested()
    if wanted == "reference" or (interpreted() and wanted != "triton"):
        return False
    return refuses("triton", x) is None


def _native_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, wants_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """g_x (if wanted), s2 and s1 of this process, from the statistics given."""
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, inverse, True, 0.0, [wants_input, True, True]
    )


def _project(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, total: Tensor, scaled: Tensor
) -> Tensor:
    """w r (g - total - x^ scaled), in the type of ``x``."""
    slope = weight * inverse
    found = (x - mean.view(_CHANNELS)).mul_((-slope * inverse * scaled).view(_CHANNELS))
    return found.addcmul_(grad, slope.view(_CHANNELS)).sub_((slope * total).view(_CHANNELS)).to(x.dtype)


def _means(sums: Sequence[Tensor], local: int, group: str) -> tuple[list[Tensor], Tensor]:
    """``[C]`` sums of this process, each divided by M after they were added up over the ranks; and M."""
    own = torch.stack([*sums, torch.full_like(sums[0], local)]).double()
    *totals, count = sum_over_ranks(own, group).unbind()
    return [(value / count).to(sums[0].dtype) for value in totals], count


# op, fake and decomposition are one function, but for the last op, which has kernels on a GPU
_batch_norm = torch.library.custom_op("pmm_fast::batch_norm", normalise, mutates_args=())
_batch_norm_backward = torch.library.custom_op("pmm_fast::batch_norm_backward", backward, mutates_args=())
_batch_norm_double_backward = torch.library.custom_op(
    "pmm_fast::batch_norm_double_backward", _double_backward_op, mutates_args=()
)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, ctx.group = inputs
    # the derivatives may be taken on another thread, which does not see what this one has chosen
    ctx.backend = requested()
    _, mean, inverse, unbiased = output
    ctx.mark_non_differentiable(mean, inverse, unbiased)
    # or the backward would be given zeros for these three
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, mean, inverse)


def _differentiate_forward(ctx: Any, grad: Tensor | None, *statistics: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    with use_backend(ctx.backend):
        return (*_batch_norm_backward(grad, *ctx.saved_tensors, ctx.group), None, None)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.group = inputs
    ctx.backend = requested()
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate_backward(ctx: Any, of_x: Tensor, of_weight: Tensor, of_bias: Tensor) -> tuple[Tensor | None, ...]:
    with use_backend(ctx.backend):
        found = _batch_norm_double_backward(of_x, of_weight, of_bias, *ctx.saved_tensors, ctx.group)
    return (*found, None, None, None)


def _refuse(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError("batch_norm: third derivatives are not supported; nn.BatchNorm2d has them")


_batch_norm.register_fake(normalise)
_batch_norm_backward.register_fake(backward)
_batch_norm_double_backward.register_fake(_double_backward_fake)
_batch_norm.register_autograd(_differentiate_forward, setup_context=_save_forward)
_batch_norm_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)
_batch_norm_double_backward.register_autograd(_refuse)

DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.pmm_fast.batch_norm.default: normalise,
    torch.ops.pmm_fast.batch_norm_backward.default: backward,
    torch.ops.pmm_fast.batch_norm_double_backward.default: double_backward,
}


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the derivatives of this module: same parameters and buffers, same values.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.

    Attributes:
        group: name of the process group over whose ranks the statistics are taken; None: those of this process alone.

    Note:
        Differentiable twice while training, to any order in evaluation mode.  Running statistics are updated in place.
    """

    group: str | None = None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape and dtype.

        Raises:
            ValueError: while training, one value a channel in a process that works alone.
        """
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        if self.group is None and x.numel() == x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        y, mean, _, unbiased = _batch_norm(x, self.weight, self.bias, self.eps, self.group)
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        return y
