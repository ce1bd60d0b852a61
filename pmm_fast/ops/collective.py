"""The sum over the processes that work on one batch, differentiable to any order.

Every rank r holds x_r and gets y = sum_s x_s.  Let each rank differentiate its own share L_r of a loss L = sum_r L_r;
what reaches y on rank r is then dL_r/dy, and dL/dx_s = sum_r dL_r/dy for every s: the derivative of the operator is the
operator itself, applied to the incoming gradients.  So it is for every further derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NAME = "sum_over_ranks"


class RankLostError(RuntimeError):
    """A sum over the ranks failed: as a rule another process is gone, or did not come in time."""


def sum_over_ranks(x: Tensor, group: str) -> Tensor:
    """The elementwise sum of every rank's tensor, the same bits on each of them.

    y = sum over ranks s of x_s;  dL/dx = sum over ranks of dL_r/dy, with L = sum over ranks of L_r.

    Args:
        x: any shape, any dtype that the group's backend can add; equal in shape and dtype on all ranks.  Not changed.
        group: name of the process group (``group_name`` of a ``torch.distributed.ProcessGroup``).

    Returns:
        A new contiguous tensor of the shape and dtype of ``x``.

    Raises:
        RankLostError: the sum failed: a rank is gone or did not come within the group's time, or the backend cannot
            add up these tensors.
        RuntimeError: no such group.

    Note:
        Differentiable to any order.  A collective: every rank of the group must call it, and differentiate through it,
        in the same order.  The host does not wait for a GPU.
    """
    return _sum(x, group)


def count_ranks(group: str) -> int:
    """The number of ranks in the process group of that name."""
    return _find(group).size()


def _find(group: str) -> Any:
    # imported when it is needed: there are builds of torch without it
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(group)  # type: ignore[arg-type]


@torch.library.custom_op(f"pmm_fast::{_NAME}", mutates_args=())
def _sum(x: Tensor, group: str) -> Tensor:
    total, processes = x.clone(memory_format=torch.contiguous_format), _find(group)
    try:
        torch.distributed.all_reduce(total, group=processes)
    except RuntimeError as error:
        # the backend raises this type for whatever goes wrong, so its own words come along
        cause = str(error).splitlines()[0]
        raise RankLostError(
            f"another rank is gone or does not answer, or the backend cannot add up the ranks' tensors ({cause})"
        ) from error
    return total


@_sum.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _sum(grad, ctx.group), None


_sum.register_autograd(_differentiate, setup_context=_save)
