import pytest
import torch
import torch.nn.functional as F

from pmm_fast import ops
from tests.ops import matrix
from tests.ops.inputs import make_inputs


@pytest.mark.parametrize("target", [matrix.REFERENCE, matrix.CPU], ids=["reference", "cpu"])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_equals_position_by_position_definition(noisy, temperature, target):
    inputs = make_inputs()
    noise = inputs.noise if noisy else None
    with matrix.on(target):
        read, scores = ops.memory_read(inputs.features, inputs.memory, noise, temperature)
    for b in range(2):
        for y in range(3):
            for x in range(5):
                cosine = F.cosine_similarity(inputs.features[b, :, y, x], inputs.memory, dim=1)
                logits = cosine + (inputs.noise[b, :, y, x] if noisy else 0)
                weights = torch.softmax(logits / temperature, 0)
                torch.testing.assert_close(scores[b, :, y, x], cosine, rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(read[b, :, y, x], weights @ inputs.memory, rtol=1e-10, atol=1e-12)


def test_zero_feature_reads_the_mean_and_has_finite_derivatives():
    inputs = make_inputs()
    features = torch.zeros_like(inputs.features).requires_grad_()
    read, scores = ops.memory_read(features, inputs.memory)
    assert not scores.any()
    torch.testing.assert_close(read[0, :, 0, 0], inputs.memory.mean(0))
    (grad,) = torch.autograd.grad(read.sum(), features)
    assert not grad.any()


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_projected_values_are_the_projected_read(target):
    """What the memory module does with the second half of its convolution."""
    inputs = make_inputs()
    features, memory, weight = (
        x.to(target.device) for x in (inputs.features, inputs.memory, torch.randn(9, 6).double())
    )
    with matrix.on(target):
        read, scores = ops.memory_read(features, memory)
        projected, same = ops.memory_read(features, memory, values=memory @ weight.T)
    torch.testing.assert_close(projected, F.conv2d(read, weight[:, :, None, None]), rtol=1e-10, atol=1e-12)
    assert torch.equal(same, scores)


def test_gumbel_noise_makes_the_argmax_a_sample_of_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0])
    noise = ops.gumbel_noise((20000, 3), torch.Generator().manual_seed(0))
    counts = torch.bincount((logits + noise).argmax(1), minlength=3) / 20000
    torch.testing.assert_close(counts, logits.softmax(0), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": torch.zeros(4, 5)}, r"memory must be \[K, C\] with C = 6, got shape \(4, 5\)"),
        ({"noise": torch.zeros(2, 4, 3, 4)}, r"noise must be \[B, K, h, w\] = \(2, 4, 3, 5\)"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"features": torch.zeros(2, 6)}, "features must be"),
        ({"values": torch.zeros(3, 6)}, r"values must be \[K, D\] with K = 4, got shape \(3, 6\)"),
        ({"values": torch.zeros(4, 6, dtype=torch.int64)}, "values must be floating point"),
        ({"memory": torch.zeros(4, 6, dtype=torch.int64)}, "memory must be floating point"),
    ],
)
def test_bad_arguments(change, message):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=message):
        ops.memory_read(**({"features": inputs.features, "memory": inputs.memory} | change))
