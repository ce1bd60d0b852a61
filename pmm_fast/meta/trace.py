"""The meta step as one graph of plain tensors, its two gradients included.

What is traced is the whole step (``make_fx``, below autograd), so nothing is left to differentiate: parameters,
buffers, memory, batches, noise, the inner learning rate and the loss scale come in, losses, gradients, memory and
buffers go out.  Traced with fake tensors, which have a shape and no values: the graph cannot hold a value of the batch
that it was traced with, and a tensor that is not among the inputs is an error instead of a constant (docs/compile.md).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pmm_fast.meta.network import State
from pmm_fast.meta.step import Batch, Hyper, Noise, StepResult, step
from pmm_fast.models import batchnorm, conv
from pmm_fast.ops.backends import requested

aten = torch.ops.aten


class CompileError(ValueError):
    """A step that cannot be compiled, with the cause."""


@dataclass(frozen=True)
class Call:
    """One call of :func:`pmm_fast.meta.step`, taken apart.

    Attributes:
        values: the tensors, in the order of the graph's inputs, detached.
        key: all else that the graph depends on; equal keys mean that one graph serves both calls.
        run: the step of ``values``, as ``meta.step`` does it.
    """

    values: list[Tensor]
    key: Hashable
    run: Callable[..., StepResult]

    @property
    def device(self) -> torch.device:
        """Where the step runs."""
        return self.values[0].device

    def at_order(self, order: int) -> StepResult:
        """The result of the eager step of an order."""
        return self.run(*self.values, order=order)


@dataclass(frozen=True)
class Traced:
    """A traced step: the graph, the structure that its outputs are put back into, and which of its leaves are None."""

    graph: GraphModule
    structure: pytree.TreeSpec
    absent: tuple[bool, ...]

    def result(self, outputs: Sequence[Tensor]) -> StepResult:
        """The outputs of the graph as ``meta.step`` returns them."""
        leaves = iter(outputs)
        return pytree.tree_unflatten([None if absent else next(leaves) for absent in self.absent], self.structure)


def take_apart(
    params: State,
    buffers: State,
    memory: Tensor | None,
    batch_mtr: Batch,
    batch_mte: Batch | None,
    noise: Noise,
    hyper: Hyper,
) -> Call:
    """The tensors of a call and the key of its graph; the arguments are those of :func:`pmm_fast.meta.step`."""
    like = batch_mtr.images
    scaled = isinstance(hyper.loss_scale, Tensor) or hyper.loss_scale != 1
    numbers = (_scalar(hyper.inner_lr, params, like), _scalar(hyper.loss_scale, params, like) if scaled else None)
    leaves, structure = pytree.tree_flatten((params, buffers, memory, batch_mtr, batch_mte, noise, numbers))
    present = tuple(leaf is not None for leaf in leaves)
    values = [leaf.detach() for leaf in leaves if leaf is not None]
    settings = replace(hyper, inner_lr=0.0, loss_scale=1.0)

    def run(*tensors: Tensor, order: int = hyper.order) -> StepResult:
        rest = iter(tensors)
        full = [next(rest) if there else None for there in present]
        weights, statistics, slots, mtr, mte, drawn, (inner_lr, loss_scale) = pytree.tree_unflatten(full, structure)
        scale = 1.0 if loss_scale is None else loss_scale
        chosen = replace(settings, inner_lr=inner_lr, loss_scale=scale, order=order)
        return step(weights, statistics, slots, mtr, mte, drawn, chosen)

    layout = tuple((value.shape, value.dtype, value.stride(), value.device) for value in values)
    return Call(values, (tuple(params), tuple(buffers), present, layout, settings, requested()), run)


def _scalar(number: float | Tensor, params: State, like: Tensor) -> Tensor:
    """A number as an input of the graph: of the parameters' type, so that it is rounded as eager mode rounds it."""
    dtype = next(iter(params.values())).dtype
    if isinstance(number, Tensor):
        return number.detach().to(like.device, dtype)
    # filled on the device: a copy from the host would make it wait
    return torch.full((), number, dtype=dtype, device=like.device)


def trace(call: Call, fuses: bool = False) -> Traced:
    """Trace a step without computing it.

    Args:
        call: its layout counts alone.
        fuses: whether an engine that fuses operations gets the graph: then it is shown more of them.

    Raises:
        CompileError: the step draws random numbers itself, which a graph and eager mode would draw differently.
    """
    found: list[Any] = []

    def flat(*values: Tensor) -> list[Tensor]:
        leaves, structure = pytree.tree_flatten(call.run(*values))
        found[:] = [structure, tuple(leaf is None for leaf in leaves)]
        return [leaf for leaf in leaves if leaf is not None]

    with FakeTensorMode():
        # made from shape and strides, so that two inputs that are one tensor now may be two later
        fakes = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in call.values]
    graph = make_fx(flat, decomposition_table=_opened(fakes[0].device, fuses), tracing_mode="fake")(*fakes)
    _drop_detach(graph)
    _drop_zeros(graph)
    _drop_unread_statistics(graph)
    _refuse_randomness(graph)
    structure, absent = found
    return Traced(graph, structure, absent)


def _opened(device: torch.device, fuses: bool) -> dict[OpOverload, Callable[..., Any]]:
    """The registered ops of the layers that a graph shows as PyTorch's own, which a compiler can fuse."""
    if device.type == "cpu":
        # PyTorch's fake batch norm gives statistics of bf16 here, and Inductor's really rounds them
        return conv.DECOMPOSITIONS
    if fuses:
        return conv.DECOMPOSITIONS | batchnorm.DECOMPOSITIONS
    # the last has a kernel of its own
    closed = torch.ops.pmm_fast.batch_norm_double_backward.default
    return conv.DECOMPOSITIONS | {op: body for op, body in batchnorm.DECOMPOSITIONS.items() if op is not closed}


def _drop_detach(graph: GraphModule) -> None:
    """Without autograd a detach is its input under another name; an order-2 step has hundreds."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    graph.recompile()


def _drop_zeros(graph: GraphModule) -> None:
    """Take out sums with zeros: the derivative of a ReLU's derivative has a map of them for the ReLU's output."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        for kept, other in (node.args, node.args[::-1]):
            zeros = isinstance(other, Node) and other.target in (aten.zeros_like.default, aten.zeros.default)
            if zeros and not node.kwargs and _is_alike(kept, node) and not any(map(_is_written, (node, kept, other))):
                node.replace_all_uses_with(kept)
                graph.graph.erase_node(node)
                break
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _is_alike(value: Any, node: Node) -> bool:
    """Whether a value is a tensor of the shape and type of a node."""
    if not isinstance(value, Node):
        return False
    ours, theirs = value.meta["val"], node.meta["val"]
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype


def _is_written(node: Node) -> bool:
    """Whether an operation writes into the memory of a value, or the graph hands it out: it is more than its value."""
    seen, found = set(), [_base(node)]
    while found:
        value = found.pop()
        if value in seen:
            continue
        seen.add(value)
        for user in value.users:
            if not isinstance(user.target, OpOverload) or user.target._schema.is_mutable:
                return True
            if _shares_memory(user):
                found.append(user)
    return False


def _base(node: Node) -> Node:
    """What a view is a view of."""
    while node.op == "call_function" and _shares_memory(node):
        node = node.all_input_nodes[0]
    return node


def _shares_memory(node: Node) -> bool:
    """Whether an operation's result may be the memory of its first argument."""
    return isinstance(node.target, OpOverload) and any(
        argument.alias_info is not None for argument in node.target._schema.arguments
    )


def _drop_unread_statistics(graph: GraphModule) -> None:
    """Take out copies that are updated in place and never read: the statistics of the passes that keep none."""
    for node in graph.graph.find_nodes(op="call_function", target=aten.clone.default):
        updates = list(node.users)
        if all(
            isinstance(user.target, OpOverload)
            and user.target._schema.is_mutable
            and user.args.count(node) == 1
            and user.args[0] is node
            and not user.users
            for user in updates
        ):
            for user in updates:
                graph.graph.erase_node(user)
            graph.graph.erase_node(node)
    graph.recompile()


def _refuse_randomness(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise CompileError(
                f"the step draws random numbers itself ({node.target}); give the dropout of the auxiliary head as "
                "Noise.train_keep and Noise.test_keep, see meta.draw_noise"
            )
