"""docs/drop_in.md: both of its examples train, and the memory between them stays what it is."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmm_fast import SemanticMemory, meta, ops
from tests import repository
from tests.tolerances import EXACT, relative_error

BLOCKS = re.findall(r"^```python\n(.*?)^```", (repository.ROOT / "docs/drop_in.md").read_text(), re.M | re.S)


def losses(printed: str) -> list[float]:
    """The losses that an example has printed."""
    return [float(line.split()[1]) for line in printed.splitlines()]


def run(block: int, names: dict[str, Any]) -> None:
    exec(compile(BLOCKS[block], "docs/drop_in.md", "exec"), names)


@pytest.fixture(scope="module")
def loop() -> dict[str, Any]:
    """The names of the first example after it has run, what it printed among them, and a copy of the first slots."""
    torch.manual_seed(0)
    lines: list[str] = []
    names: dict[str, Any] = {"print": lambda *words: lines.append(" ".join(map(str, words)))}
    run(0, names)
    return names | {"printed": "\n".join(lines)}


def assert_unit_rows(slots: Tensor) -> None:
    torch.testing.assert_close(slots.norm(dim=1), torch.ones(len(slots)))


def test_the_example_is_short_and_learns(loop: dict[str, Any]) -> None:
    assert len(BLOCKS) == 2
    assert len([line for line in BLOCKS[0].splitlines() if line.strip() and not line.startswith("#")]) <= 30
    found = losses(loop["printed"])
    assert len(found) == 40 and all(map(math.isfinite, found))
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    assert_unit_rows(loop["memory"].slots)


def test_gradients_reach_encoder_writing_net_and_classifier(loop: dict[str, Any]) -> None:
    for part in ("encoder", "decoder", "memory"):
        for name, parameter in loop[part].named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, (part, name)


def test_the_trained_memory_is_read_for_what_it_holds(loop: dict[str, Any]) -> None:
    memory, encoder = loop["memory"].eval(), loop["encoder"].eval()
    images, labels = loop["loader"][0]
    with torch.no_grad():
        classes = loop["decoder"](memory(encoder(images)).read_feature).argmax(1)
    assert (classes == labels[:, ::4, ::4]).double().mean() > 0.5


def test_the_meta_step_takes_a_network_made_by_hand(loop: dict[str, Any]) -> None:
    lines: list[str] = []
    names = loop | {"print": lambda *words: lines.append(" ".join(map(str, words)))}
    torch.manual_seed(0)
    run(1, names)
    found = losses("\n".join(lines))
    assert len(found) == 10 and sum(found[-3:]) < sum(found[:3])
    network, result = names["network"], names["result"]
    assert set(result.grads) == {name for name, _ in network.named_parameters()}
    assert all(value.isfinite().all() and value.abs().max() > 0 for value in result.grads.values())
    assert names["slots"] is network.memory.slots
    assert_unit_rows(network.memory.slots)
    assert int(network.encoder.stem[1].num_batches_tracked) == 10


def small_memory() -> SemanticMemory:
    torch.manual_seed(0)
    memory = SemanticMemory(3, 4).double()
    memory.slots.copy_(F.normalize(torch.rand(3, 4, dtype=torch.float64), dim=1))
    return memory


def test_write_moves_each_slot_towards_its_class_and_stores_nothing() -> None:
    memory = small_memory()
    before = memory.slots.clone()
    feature = torch.rand(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    # class 2 is absent, some pixels are ignored; labels as large as the map, so that a pixel is a position
    labels = torch.randint(0, 2, (2, 6, 6))
    labels[0, 0] = 255
    written = memory.write(feature, labels, momentum=0.6)
    assert torch.equal(memory.slots, before)
    output = F.normalize(memory.writer(feature), dim=1)
    for k in range(2):
        mean = output.permute(0, 2, 3, 1)[labels == k].mean(0)
        expected = F.normalize(0.6 * before[k] + 0.4 * mean, dim=0)
        assert relative_error(written[k], expected) < EXACT
    assert relative_error(written[2], before[2]) < EXACT
    (gradient,) = torch.autograd.grad(written.pow(3).sum(), feature, create_graph=True)
    second = torch.autograd.grad(gradient.pow(2).sum(), memory.writer.conv.weight)[0]
    assert gradient.abs().max() > 0 and second.abs().max() > 0
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 2"):
        memory.write(feature, labels, momentum=2)


def test_initial_slots_are_the_class_means_over_all_samples() -> None:
    memory = small_memory()
    features = torch.rand(3, 2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 2, (3, 2, 6, 6))
    slots = memory.initial_slots(zip(features, labels, strict=True))
    assert not slots.requires_grad and not torch.equal(slots, memory.slots)
    means = F.normalize(features, dim=2).permute(0, 1, 3, 4, 2)
    for k in range(2):
        assert relative_error(slots[k], F.normalize(means[labels == k].mean(0), dim=0)) < EXACT
    assert not slots[2].any()


def test_the_losses_are_those_of_the_step() -> None:
    memory = small_memory()
    feature, labels = torch.rand(2, 4, 3, 3, dtype=torch.float64), torch.randint(0, 3, (2, 9, 9))
    scores = memory(feature).scores
    assert torch.equal(meta.cohesion_loss(scores, labels), ops.upsample_cross_entropy(scores, labels))
    cosines = memory.slots @ memory.slots.T
    assert relative_error(meta.divergence_loss(memory.slots), (cosines.sum() - cosines.trace()) / 6) < EXACT
    expected = F.cross_entropy(memory.classifier(memory.slots), torch.arange(3))
    assert relative_error(meta.classifier_loss(memory.classifier(memory.slots)), expected) < EXACT
