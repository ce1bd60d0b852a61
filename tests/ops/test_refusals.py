"""What the operators refuse, in which words, and when they fall back."""

from __future__ import annotations

import pytest
import torch

from pmm_fast import ops
from pmm_fast.ops import backends
from tests.ops.inputs import make_inputs

FEATURES, MEMORY = torch.randn(1, 4, 3, 3), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.masked_average_pool(FEATURES, torch.zeros(1, 0, 4, dtype=torch.uint8), 5),
            r"got shape \(1, 0, 4\)",
        ),
        (
            lambda: ops.memory_pass(FEATURES, FEATURES, torch.zeros(1, 4, 0, dtype=torch.uint8), MEMORY),
            r"got shape \(1, 4, 0\)",
        ),
        (lambda: ops.memory_read(torch.zeros(1, 0, 3, 3), torch.zeros(5, 0)), r"features must be .*\(1, 0, 3, 3\)"),
        (lambda: ops.memory_read(FEATURES, torch.zeros(0, 4)), r"memory must be .*\(0, 4\)"),
        (lambda: ops.memory_read(FEATURES, MEMORY, values=torch.zeros(5, 0)), r"values must be .*\(5, 0\)"),
        (
            lambda: ops.memory_read(FEATURES, MEMORY, torch.zeros(1, dtype=torch.int32)),
            "or an int64 seed, got torch.int32",
        ),
        (lambda: ops.memory_read(FEATURES.to("meta"), MEMORY), "one device, got meta, cpu"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_empty_label_map_has_loss_zero():
    assert ops.upsample_cross_entropy(FEATURES, torch.zeros(1, 0, 0, dtype=torch.uint8)) == 0


def test_functional_transforms_of_any_argument_fall_back():
    inputs = make_inputs()

    def total(memory):
        with ops.record_backends() as calls:
            result = (ops.memory_read(inputs.features, memory)[0] ** 2).sum()
        assert calls == [("memory_read", "reference")]
        return result

    found = torch.func.grad(total)(inputs.memory)
    memory = inputs.memory.clone().requires_grad_()
    (expected,) = torch.autograd.grad((ops.memory_read(inputs.features, memory)[0] ** 2).sum(), memory)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint16, torch.uint32, torch.uint64])
def test_rare_label_types(dtype):
    labels = make_inputs(ignored=0.0).labels
    for name in (name for name in ops.available_backends("masked_average_pool") if name in ("cpu", "reference")):
        with ops.use_backend(name):
            found = ops.masked_average_pool(FEATURES.expand(2, -1, -1, -1), labels.to(dtype), 4, 100)
            expected = ops.masked_average_pool(FEATURES.expand(2, -1, -1, -1), labels, 4, 100)
        assert all(map(torch.equal, found, expected))


def test_an_unused_gradient_path_does_not_spread_infinity():
    features = FEATURES.clone()
    features[0, 0, 0, 0] = float("inf")
    features.requires_grad_()
    sums, _ = ops.masked_average_pool(features, torch.zeros(1, 5, 5, dtype=torch.uint8), 3, normalize=False)
    assert torch.autograd.grad(sums.sum(), features)[0].isfinite().all()


def test_an_empty_environment_variable_is_none(monkeypatch):
    monkeypatch.setenv("PMM_FAST_BACKEND", "")
    assert backends.requested() == "auto"
