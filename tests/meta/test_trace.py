"""What is taken out of a traced step because it computes nothing, and what must stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pmm_fast import meta
from pmm_fast.meta import trace as trace_module
from pmm_fast.models.batchnorm import BatchNorm2d
from tests.meta.tiny import CHANNELS, TinySegmentor, tiny_problem

aten = torch.ops.aten


def traced(function: Callable[..., object], *values: Tensor) -> GraphModule:
    return make_fx(function, tracing_mode="fake")(*values)


def count(graph: GraphModule) -> Counter[object]:
    return Counter(node.target for node in graph.graph.nodes)


def second_derivative(x: Tensor) -> Tensor:
    """Of a sum of cubes behind a ReLU, which has a map of zeros from the derivative of the ReLU's derivative."""
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(x.relu().pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(first.pow(2).sum(), x)[0]


def test_sums_with_zeros_are_taken_out() -> None:
    graph, x = traced(second_derivative, torch.randn(3, 4)), torch.randn(3, 4)
    before = count(graph)
    trace_module._drop_zeros(graph)
    after = count(graph)
    assert before[aten.zeros_like.default] == 1 and after[aten.zeros_like.default] == 0
    assert after[aten.add.Tensor] == before[aten.add.Tensor] - 1
    assert torch.equal(graph(x), second_derivative(x))


def zeros_changed(x: Tensor) -> list[Tensor]:
    zeros = torch.zeros_like(x)
    zeros[0].fill_(1)
    return [(x + zeros).sin()]


def base_changed(x: Tensor) -> list[Tensor]:
    base = x.clone()
    total = base[0] + torch.zeros_like(base[0])
    base.mul_(2)
    return [total.sin(), base.cos()]


@pytest.mark.parametrize(
    "function",
    [
        # the sum is changed, or its term, or is handed out; the sum is of another type or size than the term, or
        # a multiple of it
        lambda x: [(x + torch.zeros_like(x)).mul_(2).sin(), x.cos()],
        lambda x: [(x + torch.zeros_like(x)).sin(), x.mul_(2).cos()],
        lambda x: [(x + torch.zeros_like(x)).view(12).mul_(2).sin(), x.cos()],
        lambda x: [x + torch.zeros_like(x)],
        lambda x: [(x + torch.zeros_like(x, dtype=torch.float64)).sin()],
        lambda x: [(x[0] + torch.zeros_like(x)).sin()],
        lambda x: [torch.add(torch.zeros_like(x), x, alpha=2).sin()],
        zeros_changed,
        base_changed,
    ],
    ids=[
        *("changed", "term changed", "changed through a view", "handed out", "type", "size", "multiple"),
        *("zeros changed", "what the term is a view of changed"),
    ],
)
def test_a_sum_that_is_more_than_its_term_stays(function: Callable[[Tensor], list[Tensor]]) -> None:
    x = torch.randn(3, 4)
    graph = traced(function, x)
    trace_module._drop_zeros(graph)
    assert count(graph)[aten.add.Tensor] == 1
    for found, expected in zip(graph(x.clone()), function(x.clone()), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_copies_that_nothing_reads_are_taken_out() -> None:
    def function(mean: Tensor, seen: Tensor) -> list[Tensor]:
        kept, lost, read = mean.clone(), mean.clone(), mean.clone()
        kept.lerp_(seen, 0.1)
        lost.lerp_(seen, 0.1)
        read.lerp_(seen, 0.5)
        return [kept, read * 2]

    values = torch.randn(5), torch.randn(5)
    graph = traced(function, *values)
    trace_module._drop_unread_statistics(graph)
    found = count(graph)
    assert found[aten.clone.default] == found[aten.lerp_.Scalar] == 2
    for ours, theirs in zip(graph(*values), function(*values), strict=True):
        assert torch.equal(ours, theirs)


def test_a_step_has_one_set_of_statistics_and_no_sums_with_zeros() -> None:
    """Those of the memory's rewrite and of the outer pass are nobody's."""
    *arguments, hyper = tiny_problem()
    model = TinySegmentor()
    model.encoder.bn = BatchNorm2d(CHANNELS)
    norms = sum(isinstance(module, BatchNorm2d) for module in model.modules())
    call = trace_module.take_apart(*arguments, replace(hyper, network=meta.Network(model)))
    graph = trace_module.trace(call).graph
    found = count(graph)
    assert found[aten.lerp_.Scalar] == 2 * norms and found[aten.clone.default] == 3 * norms
    assert found[torch.ops.pmm_fast.batch_norm_double_backward.default] == norms
    sums = graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    terms = {term.target for node in sums for term in node.all_input_nodes}
    assert sums and not terms & {aten.zeros_like.default, aten.zeros.default}
