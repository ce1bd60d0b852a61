"""Blocks that compute again: the same values, derivatives and statistics, in less memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from bench.harness import cpu_peak
from pmm_fast import meta
from pmm_fast.models import build_model
from pmm_fast.models.blocks import conv_bn_relu
from pmm_fast.models.mobilenetv2 import InvertedResidual
from pmm_fast.models.recompute import recompute_blocks
from pmm_fast.models.resnet import BasicBlock, Bottleneck, Placement
from tests.tolerances import EXACT, relative_error

BLOCKS = {
    "basic": lambda: BasicBlock(6, 6, Placement(1, 1), None),
    "bottleneck": lambda: Bottleneck(6, 3, Placement(1, 2), conv_bn_relu(6, 12)),
    "inverted residual": lambda: InvertedResidual(6, 6, 2, 1, 1),
    "convolution": lambda: conv_bn_relu(6, 4, 3),
}


def derivatives(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, first and second derivatives, and buffers after one training pass."""
    x = x.clone().requires_grad_()
    leaves = [x, *block.parameters()]
    out = block(x)
    first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    along = sum((g * torch.randn(g.shape, generator=generator, dtype=g.dtype)).sum() for g in first)
    second = torch.autograd.grad(along, leaves)
    return [out, *first, *second, *block.buffers()]


@pytest.mark.parametrize("name", BLOCKS)
def test_derivatives_of_both_orders_and_statistics_are_those_of_the_block(name: str) -> None:
    torch.manual_seed(0)
    block, x = BLOCKS[name]().double(), torch.randn(3, 6, 5, 4, dtype=torch.float64)
    state = {key: value.clone() for key, value in block.state_dict().items()}
    expected = derivatives(block, x)
    block.load_state_dict(state)
    assert recompute_blocks(block) == 1
    found = derivatives(block, x)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < EXACT


def test_third_derivative_is_refused() -> None:
    block = conv_bn_relu(2, 2).double()
    recompute_blocks(block)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    value = block(x).pow(2).sum()
    for _ in range(2):
        value = torch.autograd.grad(value, x, create_graph=True)[0].pow(2).sum()
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(value, x)


def test_evaluation_and_passes_without_a_graph_compute_once() -> None:
    block = conv_bn_relu(2, 2)
    x = torch.randn(2, 2, 3, 3)
    expected = block.eval()(x)
    recompute_blocks(block)
    assert torch.equal(block(x), expected)
    with torch.no_grad():
        assert block.train()(x).grad_fn is None


def problem(architecture: str, order: int, autocast: torch.dtype | None, size: int, checkpoint: bool):
    torch.manual_seed(0)
    model = build_model(architecture, 5, channels=16, aux_dropout=0.0)
    model.memory.slots.copy_(nn.functional.normalize(torch.rand_like(model.memory.slots), dim=1))
    dtype = torch.float64 if autocast is None else torch.float32
    params, buffers, memory = meta.split_state(model.to(dtype))
    generator = torch.Generator().manual_seed(1)
    mtr, mte = (
        meta.Batch(
            torch.randn(2, 3, size, size, generator=generator, dtype=dtype),
            torch.randint(0, 5, (2, size, size), generator=generator, dtype=torch.uint8),
        )
        for _ in range(2)
    )
    network = meta.Network(model, checkpoint_activations=checkpoint)
    hyper = meta.Hyper(network, order=order, inner_lr=0.01, autocast=autocast)
    return params, buffers, memory, mtr, mte, meta.Noise(), hyper


@pytest.mark.parametrize("architecture", ["deeplabv3plus_resnet18", "deeplabv3plus_mobilenet_v2"])
@pytest.mark.parametrize("order", [1, 2])
def test_step_is_the_same(architecture: str, order: int) -> None:
    plain, again = (meta.step(*problem(architecture, order, None, 32, checkpoint)) for checkpoint in (False, True))
    largest = max(grad.abs().max() for grad in plain.grads.values())
    for name, expected in plain.grads.items():
        assert relative_error(again.grads[name], expected) < EXACT or expected.abs().max() < 1e-9 * largest, name
    for name, expected in plain.buffers.items():
        assert torch.equal(again.buffers[name], expected), name


def test_step_in_mixed_precision_rounds_alike() -> None:
    """Gradients of one tensor may be added in another order: far less than what bf16 itself costs."""

    def vector(autocast: torch.dtype | None, checkpoint: bool) -> Tensor:
        arguments = problem("deeplabv3plus_resnet18", 2, torch.bfloat16, 32, checkpoint)
        result = meta.step(*arguments[:-1], dataclasses.replace(arguments[-1], autocast=autocast))
        return torch.cat([grad.flatten() for grad in result.grads.values()])

    exact, plain, again = vector(None, False), vector(torch.bfloat16, False), vector(torch.bfloat16, True)
    assert (again - plain).norm() < 0.1 * (plain - exact).norm()


@pytest.mark.parametrize("order", [1, 2])
def test_peak_memory_falls(order: int) -> None:
    found = []
    for checkpoint in (False, True):
        arguments = problem("deeplabv3plus_mobilenet_v2", order, torch.bfloat16, 160, checkpoint)
        found.append(cpu_peak(lambda arguments=arguments: meta.step(*arguments))[0])
    assert found[1] < 0.8 * found[0], found
