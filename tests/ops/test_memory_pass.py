import pytest
import torch

from pmm_fast import ops
from tests.ops.inputs import make_inputs


def test_is_the_read_of_features_and_the_pool_of_written():
    inputs = make_inputs()
    found = ops.memory_pass(inputs.features, inputs.written, inputs.labels, inputs.memory, inputs.noise, 0.5)
    read, scores = ops.memory_read(inputs.features, inputs.memory, inputs.noise, 0.5)
    sums, mass = ops.masked_average_pool(inputs.written, inputs.labels, 4)
    for name, a, b in zip(("read", "scores", "sums", "mass"), found, (read, scores, sums, mass), strict=True):
        assert torch.equal(a, b), name


def test_gradients_when_one_tensor_is_read_and_written():
    inputs = make_inputs(channels=3, classes=3, size=(2, 2))
    features, memory = inputs.features.requires_grad_(), inputs.memory.requires_grad_()

    def function(features, memory):
        return ops.memory_pass(features, features, inputs.labels, memory, inputs.noise)

    assert torch.autograd.gradcheck(function, (features, memory))
    assert torch.autograd.gradgradcheck(function, (features, memory))


def test_bad_arguments():
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"written must be shaped like features \(2, 6, 3, 5\), got \(2, 6, 3, 4\)"):
        ops.memory_pass(inputs.features, inputs.written[..., :4], inputs.labels, inputs.memory)
    with pytest.raises(ValueError, match=r"labels hold 9, expected classes in 0\.\.3"):
        ops.memory_pass(inputs.features, inputs.written, torch.full((2, 7, 11), 9), inputs.memory)
