"""Blocks that keep their input alone and compute the rest again for their derivatives, of first and second order.

``torch.utils.checkpoint`` saves nothing in a second-order step: what its backward computes again under
``create_graph=True`` stays alive until the second derivative, so the peak is that of no checkpointing at all.  Here a
block y = f(x, p), p its parameters, is a function whose backward is again such a function:

    forward             y                      keeps x, p
    backward            d<g, y>                computes f again; keeps x, p and g
    double backward     d<a, backward>         computes f and its backward again; keeps nothing

so between the passes only the maps at the borders of the blocks live.  Chen et al., arXiv 1604.06174, for first order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pmm_fast.models.conv import autocast_type
from pmm_fast.models.mobilenetv2 import InvertedResidual
from pmm_fast.models.resnet import BasicBlock, Bottleneck
from pmm_fast.models.shufflenetv2 import ShuffleUnit

_BLOCKS = (BasicBlock, Bottleneck, InvertedResidual, ShuffleUnit)

# a block as a function of its input and parameters; ``again`` tells the first time from the others
_Function = Callable[[Sequence[Tensor], bool], Tensor]


def recompute_blocks(module: nn.Module) -> int:
    """Make every residual block and every convolution with batch norm below ``module`` one that computes again.

    Only training passes that record a graph change; values, derivatives of first and second order and batch-norm
    statistics are those of the block itself.  A third derivative raises ``RuntimeError``.

    Args:
        module: changed in place; names of parameters and buffers stay.

    Returns:
        How many blocks were found.
    """
    if isinstance(module, _BLOCKS) or _is_convolution_block(module):
        module.forward = _Recomputed(module)  # type: ignore[method-assign]
        return 1
    return sum(recompute_blocks(child) for child in module.children())


def _is_convolution_block(module: nn.Module) -> bool:
    """A plain sequence that begins with a convolution and its batch norm."""
    children = list(module.children()) if type(module) is nn.Sequential else []
    return len(children) > 1 and isinstance(children[0], nn.Conv2d) and isinstance(children[1], nn.BatchNorm2d)


class _Body(nn.Module):
    """A block with the forward of its class, whatever its instance's is."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return type(self.block).forward(self.block, x)


class _Recomputed:
    """The forward of a block that computes again."""

    def __init__(self, block: nn.Module) -> None:
        self.body = _Body(block)

    def __call__(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.body.block.training):
            return self.body(x)
        # by now the caller has put the values of this pass in the block's place
        params, buffers = dict(self.body.named_parameters()), dict(self.body.named_buffers())
        precision, cached = autocast_type(x.device), torch.is_autocast_cache_enabled()

        def function(tensors: Sequence[Tensor], again: bool) -> Tensor:
            state = dict(zip(params, tensors[1:], strict=True))
            # batch norm takes note of its statistics once
            state |= {name: value.clone() if again else value for name, value in buffers.items()}
            # its derivatives are taken outside of the mixed precision that it was called in
            with torch.autocast(x.device.type, precision, enabled=precision is not None, cache_enabled=cached):
                return functional_call(self.body, state, (tensors[0],), strict=True)

        return _Forward.apply(function, x, *params.values())


class _Forward(torch.autograd.Function):
    """y = f(x, p)."""

    @staticmethod
    def forward(ctx: Any, function: _Function, *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(tensors, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        return (None, *_Backward.apply(ctx.function, wanted, grad, *ctx.saved_tensors))


class _Backward(torch.autograd.Function):
    """The gradient of <g, f(x, p)> in those of x and p that want one."""

    @staticmethod
    def forward(
        ctx: Any, function: _Function, wanted: Sequence[bool], grad: Tensor, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.function, ctx.wanted = function, wanted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, *tensors)
        with torch.enable_grad():
            leaves = _leaves(tensors, wanted)
            output = function(leaves, True)
            found = iter(torch.autograd.grad(output, _only(leaves, wanted), grad))
        return tuple(next(found) if want else None for want in wanted)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        found = _DoubleBackward.apply(ctx.function, ctx.wanted, wanted, *ctx.saved_tensors, *incoming)
        return (None, None, *found)


class _DoubleBackward(torch.autograd.Function):
    """The gradient of <a, backward> in those of g, x and p that want one."""

    @staticmethod
    def forward(
        ctx: Any,
        function: _Function,
        first_wanted: Sequence[bool],
        wanted: Sequence[bool],
        grad: Tensor,
        *tensors: Any,
    ) -> tuple[Tensor | None, ...]:
        count = len(first_wanted)
        tensors, incoming = tensors[:count], tensors[count:]
        with torch.enable_grad():
            grad, *leaves = _leaves((grad, *tensors), (True, *first_wanted))
            output = function(leaves, True)
            first = torch.autograd.grad(output, _only(leaves, first_wanted), grad, create_graph=True)
            pairs = zip(first, _only(incoming, first_wanted), strict=True)
            ends = [(value, gradient) for value, gradient in pairs if gradient is not None]
            values, gradients = zip(*ends, strict=True)
            second = iter(torch.autograd.grad(values, _only((grad, *leaves), wanted), gradients, allow_unused=True))
        return tuple(next(second) if want else None for want in wanted)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> NoReturn:
        raise RuntimeError("checkpointed activations: third derivatives are not supported")


def _leaves(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    return [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]


def _only(values: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    return [value for value, want in zip(values, wanted, strict=True) if want]
