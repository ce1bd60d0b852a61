import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pmm_fast import ops
from tests.ops import matrix
from tests.ops.inputs import make_inputs, one_hot_masses


def by_definition(features, labels, classes, normalize=True):
    """Loop over the classes of the one-hot map."""
    features = F.normalize(features, dim=1) if normalize else features
    masses = one_hot_masses(labels, tuple(features.shape[2:]), classes, features.dtype)
    sums = torch.stack([(features * masses[:, k : k + 1]).sum((0, 2, 3)) for k in range(classes)])
    return sums, masses.sum((0, 2, 3))


@pytest.mark.parametrize("target", [matrix.REFERENCE, matrix.CPU], ids=["reference", "cpu"])
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    classes=st.sampled_from([1, 2, 7, 19, 64]),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    label_size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    label_dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    normalize=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_one_hot_definition(target, classes, label_dtype, normalize, **sizes):
    inputs = make_inputs(classes=classes, label_dtype=label_dtype, **sizes)
    with matrix.on(target):
        sums, mass = ops.masked_average_pool(inputs.features, inputs.labels, classes, normalize=normalize)
    expected_sums, expected_mass = by_definition(inputs.features, inputs.labels, classes, normalize)
    torch.testing.assert_close(sums, expected_sums, rtol=0, atol=1e-11)
    torch.testing.assert_close(mass, expected_mass, rtol=0, atol=1e-11)


def test_masses_of_a_position_sum_to_its_labelled_share():
    labels = make_inputs(ignored=0.0, label_size=(32, 48)).labels
    _, mass = ops.masked_average_pool(torch.randn(2, 3, 5, 7), labels, 4)
    assert float(mass.sum()) == pytest.approx(2 * 5 * 7, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((2, 7, 11), 4)}, r"labels hold 4, expected classes in 0\.\.3 or the ignore index 255"),
        ({"labels": torch.full((2, 7, 11), -1)}, r"labels hold -1"),
        ({"labels": torch.zeros(2, 7, 11)}, "integer dtype"),
        ({"labels": torch.zeros(3, 7, 11, dtype=torch.uint8)}, r"\[B, H, W\] with B = 2"),
        ({"features": torch.zeros(2, 6, 3)}, r"features must be \[B, C, h, w\], got shape \(2, 6, 3\)"),
        ({"features": torch.zeros(2, 6, 3, 5, dtype=torch.int64)}, "floating point"),
        ({"num_classes": 0}, "num_classes must be positive"),
    ],
)
def test_bad_arguments(change, message):
    inputs = make_inputs()
    arguments = {"features": inputs.features, "labels": inputs.labels, "num_classes": 4} | change
    with pytest.raises(ValueError, match=message):
        ops.masked_average_pool(**arguments)


def test_update_memory_is_the_momentum_rule():
    inputs = make_inputs()
    sums, mass = torch.randn(4, 6, dtype=torch.float64), torch.tensor([3.0, 0.0, 1.5, 2.0], dtype=torch.float64)
    new = ops.update_memory(inputs.memory, sums, mass, 0.8)
    for k in range(4):
        row = inputs.memory[k] if mass[k] == 0 else 0.8 * inputs.memory[k] + 0.2 * sums[k] / mass[k]
        torch.testing.assert_close(new[k], row / row.norm(), rtol=1e-12, atol=0)


def test_update_memory_keeps_a_zero_row_and_differentiates_twice():
    inputs = make_inputs()
    memory = inputs.memory.clone()
    memory[1] = 0
    mass = torch.tensor([3.0, 0.0, 1.5, 2.0], dtype=torch.float64)
    sums = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    assert not ops.update_memory(memory, sums, mass, 0.8)[1].any()
    assert torch.autograd.gradcheck(lambda s: ops.update_memory(memory, s, mass, 0.8), sums)
    assert torch.autograd.gradgradcheck(lambda s: ops.update_memory(memory, s, mass, 0.8), sums)


def test_update_memory_bad_arguments():
    memory = make_inputs().memory
    with pytest.raises(ValueError, match="momentum must lie in"):
        ops.update_memory(memory, torch.zeros(4, 6), torch.zeros(4), 1.5)
    with pytest.raises(ValueError, match=r"sums and mass must be \(4, 6\) and \(4,\)"):
        ops.update_memory(memory, torch.zeros(3, 6), torch.zeros(3), 0.5)
