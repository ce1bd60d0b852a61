"""The baseline computes what the released code computed, and what the operators compute."""

from __future__ import annotations

import pytest
import torch

from bench import cases as C
from bench import released_ops
from bench.gate import Gate, derive, differentiable
from pmm_fast import ops
from tests import released
from tests.ops.inputs import make_inputs
from tests.tolerances import EXACT, RELEASED_MEMORY, relative_error

SMALL = [case for case in C.all_cases() if case.size.startswith("small") and case.dtype == "float32"]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.title)
def test_equals_the_reference_in_three_orders(case):
    inputs = C.make_inputs(case, torch.device("cpu"))
    gate = Gate(case, inputs)
    double = inputs.convert(torch.float64)
    noise = None if inputs.memory is None else inputs.noise(torch.float64)
    found = derive(C.released_variant(case.op), double, noise, gate.given.convert(torch.float64))
    for order, values in gate.expected.items():
        assert len(found[order]) == len(values)
        for value, expected in zip(found[order], values, strict=True):
            # the one-hot map is float32 in the released code, whatever the features are
            assert relative_error(value, expected) < (1e-5 if case.op != "upsample_cross_entropy" else EXACT), order


def test_equals_the_released_fixture():
    data = released.load("memory")
    query, memory, noise = data["query"], data["memory_before"], data["gumbel_noise"]
    flat = noise.reshape(-1, memory.shape[0])
    read, scores = released_ops.memory_read(query, memory, lambda _: flat)
    expected = (data["assignment"] @ memory).reshape(query.shape[0], *query.shape[2:], -1).permute(0, 3, 1, 2)
    channels = query.shape[1]
    assert relative_error(read[:, channels:], expected) < RELEASED_MEMORY
    assert relative_error(read[:, :channels], ops.normalize(query, 1)) < RELEASED_MEMORY
    loss = released_ops.upsample_cross_entropy(scores, data["labels"])
    assert relative_error(loss, data["cohesion_loss"]) < RELEASED_MEMORY


def test_labels_are_left_as_they_are_and_absent_classes_stay_empty():
    inputs = make_inputs(classes=4, label_dtype=torch.int64)
    labels = torch.where(inputs.labels == 2, 255, inputs.labels)
    before = labels.clone()
    sums, mass = released_ops.masked_average_pool(inputs.features, labels, 4)
    assert torch.equal(labels, before)
    assert mass[2] == 0 and not sums[2].any() and mass[[0, 1, 3]].all()


def test_noise_is_drawn_twice_and_afresh():
    drawn = []

    def draw(scores):
        drawn.append(released_ops.draw_gumbel(scores))
        return drawn[-1]

    inputs = make_inputs(dtype=torch.float32)
    released_ops.memory_read(inputs.features, inputs.memory, draw)
    assert len(drawn) == 2 and not torch.equal(*drawn)
    assert abs(float(torch.cat([released_ops.draw_gumbel(torch.empty(20000))]).mean()) - 0.5772) < 0.05


def test_only_what_has_a_derivative_is_differentiated():
    inputs = C.make_inputs(SMALL[0], torch.device("cpu")).convert()
    outputs = C.released_variant("masked_average_pool").function(inputs, None)
    assert [output.shape for output in differentiable(outputs)] == [(19, 64)]
