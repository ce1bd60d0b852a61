"""The memory module: the released numbers with their gradients, initialisation, use by itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmm_fast import ops
from pmm_fast.models import SemanticMemory
from tests.released import load
from tests.tolerances import RELEASED_MEMORY, relative_error

NAMES = {
    "output.0.weight": "fusion.conv.weight",
    "output.1.weight": "fusion.bn.weight",
    "output.1.bias": "fusion.bn.bias",
    "writenet.writefeat.0.weight": "writer.conv.weight",
    "writenet.writefeat.1.weight": "writer.bn.weight",
    "writenet.writefeat.1.bias": "writer.bn.bias",
    "clsfier.weight": "classifier.weight",
    "clsfier.bias": "classifier.bias",
}
NORMS = (("output.1", "fusion.bn"), ("writenet.writefeat.1", "writer.bn"))


def released_total(memory: SemanticMemory, query: Tensor, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """One training pass of the released memory, its losses and its outputs, from the module's parts."""
    batch, _, height, width = query.shape
    noise = data["gumbel_noise"].reshape(batch, height, width, 19).permute(0, 3, 1, 2)
    read, scores, assignment = memory(query, noise)
    sums, mass = ops.masked_average_pool(memory.writer(query), data["labels"], 19)
    after = ops.update_memory(memory.slots, sums, mass, 0.8)
    cohesion = ops.upsample_cross_entropy(scores, data["labels"])
    similar = (after @ after.T).clamp(min=0)
    divergence = (similar.sum() - similar.trace()) / (19 * 18)
    classifier = F.cross_entropy(memory.classifier(after), torch.arange(19))
    total = (read * data["dout"]).sum() + 0.02 * cohesion + 0.4 * divergence + 0.2 * classifier
    return {
        "read_feature": read,
        "assignment": assignment.permute(0, 2, 3, 1),
        "memory_after": after,
        "cohesion_loss": cohesion,
        "divergence_loss": divergence,
        "classifier_loss": classifier,
        "total": total + (after * data["dmem"]).sum(),
    }


def test_equals_the_released_memory_with_gradients() -> None:
    data = load("memory")
    memory = SemanticMemory(19, 64)
    assert dict(memory.named_parameters()).keys() == set(NAMES.values())
    state = {ours: data[f"param/{theirs}"] for theirs, ours in NAMES.items()}
    for theirs, ours in NORMS:
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            state[f"{ours}.{buffer}"] = data[f"param/{theirs}.{buffer}"]
    memory.load_state_dict({**state, "slots": data["memory_before"]})
    query = data["query"].clone().requires_grad_()
    outputs = released_total(memory, query, data)
    for name, value in outputs.items():
        assert value.shape == data[name].shape
        assert relative_error(value, data[name]) < RELEASED_MEMORY, name
    outputs["total"].backward()
    assert query.grad is not None
    assert relative_error(query.grad, data["grad_query"]) < RELEASED_MEMORY
    for theirs, ours in NAMES.items():
        gradient = memory.get_parameter(ours).grad
        assert gradient is not None
        assert relative_error(gradient, data[f"grad/{theirs}"]) < RELEASED_MEMORY, ours
    for theirs, ours in NORMS:
        for buffer in ("running_mean", "running_var"):
            after = memory.get_buffer(f"{ours}.{buffer}")
            assert relative_error(after, data[f"buffer_after/{theirs}.{buffer}"]) < RELEASED_MEMORY, (ours, buffer)


def test_initial_values() -> None:
    torch.manual_seed(0)
    memory = SemanticMemory(19, 256)
    assert memory.slots.dtype == torch.float32 and not memory.slots.any()
    for bn in (memory.writer.bn, memory.fusion.bn):
        assert (bn.weight == 1).all() and (bn.bias == 1e-4).all()
        assert bn.eps == 1e-5 and bn.momentum == 0.1
    # Kaiming normal, fan in
    assert memory.writer.conv.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert memory.fusion.conv.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert memory.classifier.weight.std().item() == pytest.approx(1e-4, rel=0.05)
    assert not memory.classifier.bias.any()


def test_reading_does_not_write_and_slots_are_saved() -> None:
    memory = SemanticMemory(4, 8)
    memory.slots.copy_(F.normalize(torch.rand(4, 8), dim=1))
    before = memory.slots.clone()
    memory(torch.rand(2, 8, 5, 3))
    assert torch.equal(before, memory.slots)
    assert "slots" in memory.state_dict() and not memory.slots.requires_grad


def test_noise_and_temperature_reach_the_assignment() -> None:
    memory = SemanticMemory(4, 8).eval()
    memory.slots.copy_(F.normalize(torch.rand(4, 8), dim=1))
    feature = torch.rand(2, 8, 5, 3)
    noise = torch.zeros(2, 4, 5, 3)
    noise[:, 1] = 50
    plain, noisy = memory(feature), memory(feature, noise)
    cold = SemanticMemory(4, 8, temperature=1e-3).eval()
    cold.load_state_dict(memory.state_dict())
    sharp = cold(feature)
    assert noisy.assignment[:, 1].min() > 0.999 and plain.assignment.max() < 0.6
    assert sharp.assignment.max() > 0.99
    torch.testing.assert_close(sharp.assignment.argmax(1), sharp.scores.argmax(1))
    torch.testing.assert_close(plain.scores, noisy.scores)
    assert not torch.equal(plain.read_feature, noisy.read_feature)
    assert not torch.equal(plain.read_feature, sharp.read_feature)


def test_zero_features_stay_finite_to_second_order() -> None:
    memory = SemanticMemory(4, 8)
    memory.slots.copy_(F.normalize(torch.rand(4, 8), dim=1))
    feature = torch.rand(2, 8, 5, 3)
    feature[:, :, 0] = 0
    feature.requires_grad_()
    out = memory(feature)
    (gradient,) = torch.autograd.grad((out.read_feature**2).sum(), feature, create_graph=True)
    (second,) = torch.autograd.grad((gradient**2).sum(), feature)
    assert gradient.isfinite().all() and second.isfinite().all() and second.any()


def test_errors_name_what_was_expected() -> None:
    with pytest.raises(ValueError, match="must be positive, got 0 and 8"):
        SemanticMemory(0, 8)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        SemanticMemory(4, 8, temperature=0.0)
    with pytest.raises(ValueError, match=r"C = 7, got shape \(4, 8\)"):
        SemanticMemory(4, 8)(torch.rand(1, 7, 2, 2))
    with pytest.raises(ValueError, match="noise must be"):
        SemanticMemory(4, 8)(torch.rand(1, 8, 2, 2), torch.zeros(1, 3, 2, 2))
