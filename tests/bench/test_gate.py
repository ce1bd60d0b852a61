"""Nothing wrong is timed: the gate lets right implementations pass and stops subtly wrong ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import cases as C
from bench.gate import Gate
from pmm_fast import ops
from tests.tolerances import EXACT, relative_error

CPU = torch.device("cpu")
SMALL = [case for case in C.all_cases() if case.size.startswith("small")]


@pytest.fixture(scope="module", params=SMALL, ids=lambda case: case.title)
def gate(request):
    return Gate(request.param, C.make_inputs(request.param, CPU))


class Twisted(torch.autograd.Function):
    """The identity, but with a wrong first or second derivative."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.order == 2:
            return Twisted.apply(gradient, 1), None
        return gradient * 1.05, None


def twisted(variant, order):
    """A variant that is wrong from one order of derivative on."""

    def run(inputs, noise):
        first, *others = variant.function(inputs, noise)
        wrong = first * 1.05 if order == 0 else Twisted.apply(first, order)
        return (wrong, *others)

    return C.Variant("wrong", run)


def test_a_right_one_passes(gate):
    assert gate.judge(C.backend_variant(gate.case.op, "reference")) is None


@pytest.mark.parametrize(("order", "found"), [(0, "fwd"), (1, "bwd"), (2, "bwd2")])
def test_a_wrong_one_does_not(gate, order, found):
    if gate.case.dtype != "float32":
        pytest.skip("one dtype is enough")
    # the seed and the drawn noise must be the same noise, or even the forward pass would differ
    message = gate.judge(twisted(C.backend_variant(gate.case.op, "reference"), order))
    assert message is not None and message.startswith(f"{found}, value ")


def test_not_a_number_does_not_pass(gate):
    right = C.backend_variant(gate.case.op, "reference")

    def run(inputs, noise):
        first, *others = right.function(inputs, noise)
        return (first * float("nan"), *others)

    assert "fwd, value 0" in str(gate.judge(C.Variant("wrong", run)))


def test_other_noise_does_not_pass():
    case = next(case for case in SMALL if case.op == "memory_read")
    inputs = C.make_inputs(case, CPU)
    other = dataclasses.replace(inputs, seed=inputs.seed + 1)
    right = C.backend_variant("memory_read", "reference")
    wrong = C.Variant(
        "wrong", lambda inputs, noise: right.function(dataclasses.replace(inputs, seed=other.seed), noise)
    )
    assert "fwd, value 0" in str(Gate(case, inputs).judge(wrong))


def test_the_loss_by_image_is_the_loss():
    case = next(case for case in SMALL if case.op == "upsample_cross_entropy")
    inputs = C.make_inputs(case, CPU)
    labels = inputs.labels.clone()
    # images of unequal weight
    labels[0, 20:] = 255
    inputs = dataclasses.replace(inputs, labels=labels)
    loss = ops.upsample_cross_entropy(inputs.maps[0].double(), labels)
    gate = Gate(case, inputs)
    assert relative_error(gate.expected["fwd"][0], loss) < EXACT
    assert gate.judge(C.backend_variant(case.op, "reference")) is None
