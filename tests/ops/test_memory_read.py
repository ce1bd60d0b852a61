import pytest
import torch
import torch.nn.functional as F

from pmm_fast import ops
from tests.ops.inputs import make_inputs
from tests.tolerances import FORWARD, relative_error


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_equals_position_by_position_definition(noisy, temperature):
    inputs = make_inputs()
    noise = inputs.noise if noisy else None
    read, scores = ops.memory_read(inputs.features, inputs.memory, noise, temperature)
    for b in range(2):
        for y in range(3):
            for x in range(5):
                cosine = F.cosine_similarity(inputs.features[b, :, y, x], inputs.memory, dim=1)
                logits = cosine + (inputs.noise[b, :, y, x] if noisy else 0)
                weights = torch.softmax(logits / temperature, 0)
                torch.testing.assert_close(scores[b, :, y, x], cosine, rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(read[b, :, y, x], weights @ inputs.memory, rtol=1e-10, atol=1e-12)


def test_gradients_of_first_and_second_order():
    inputs = make_inputs(channels=3, classes=3, size=(2, 2))
    arguments = [tensor.requires_grad_() for tensor in (inputs.features, inputs.memory, inputs.noise)]
    assert torch.autograd.gradcheck(lambda *a: ops.memory_read(*a, 0.7), arguments)
    assert torch.autograd.gradgradcheck(lambda *a: ops.memory_read(*a, 0.7), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    inputs = make_inputs(channels=32, size=(6, 7), dtype=dtype)
    read, scores = ops.memory_read(inputs.features, inputs.memory, inputs.noise)
    expected_read, expected_scores = ops.memory_read(inputs.features.double(), inputs.memory.double(), inputs.noise)
    assert read.dtype == dtype and scores.dtype == torch.float32
    assert relative_error(read, expected_read) < FORWARD[dtype]
    assert relative_error(scores, expected_scores) < FORWARD[torch.float32]


def test_zero_feature_reads_the_mean_and_has_finite_derivatives():
    inputs = make_inputs()
    features = torch.zeros_like(inputs.features).requires_grad_()
    read, scores = ops.memory_read(features, inputs.memory)
    assert not scores.any()
    torch.testing.assert_close(read[0, :, 0, 0], inputs.memory.mean(0))
    (grad,) = torch.autograd.grad(read.sum(), features)
    assert not grad.any()


def test_large_scores_do_not_overflow():
    inputs = make_inputs(dtype=torch.float32)
    read, _ = ops.memory_read(inputs.features, inputs.memory, inputs.noise * 1e4)
    assert read.isfinite().all()


def test_empty_batch():
    read, scores = ops.memory_read(torch.zeros(0, 6, 3, 5), torch.zeros(4, 6))
    assert read.shape == (0, 6, 3, 5) and scores.shape == (0, 4, 3, 5)


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
        ({"memory": torch.zeros(4, 6, dtype=torch.int64)}, "memory must be floating point"),
    ],
)
def test_bad_arguments(change, message):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=message):
        ops.memory_read(**({"features": inputs.features, "memory": inputs.memory} | change))
