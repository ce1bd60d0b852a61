"""The baseline computes the released iteration: its numbers, and those of our order 1."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench import released_step, step_gate
from bench.phases import Clock
from bench.released_step import Labels, ReleasedStep, plain_layers
from bench.step_variants import LR, Setup, new_batches, new_model
from pmm_fast import convert, meta
from tests import released
from tests.tolerances import EXACT, relative_error

CPU = torch.device("cpu")
NAME = "deeplabv3plus_resnet50_step"
SMALL = Setup("deeplabv3plus_mobilenet_v2", step_gate.EXACT_CROP, 2, CPU, channels=8)
ARCHITECTURES = ("deeplabv3plus_resnet18", "deeplabv2_mobilenet_v2", "deeplabv3plus_mobilenet_v2")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_is_our_order_one(architecture):
    setup = Setup(architecture, step_gate.EXACT_CROP, 2, CPU, channels=8)
    fine, text = step_gate.check_released(setup, step_gate.run_ours(setup, 1))
    assert fine, text


def test_is_not_our_order_two():
    fine, text = step_gate.check_released(SMALL, step_gate.run_ours(SMALL, 2))
    assert not fine and "gradients" in text


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("MEMORY_MOMENTUM", 0.79, "memory"),
        ("AUX_WEIGHT", 0.41, "gradients"),
        ("CLASSIFIER_WEIGHT", 0.0, "gradients"),
    ],
)
def test_a_slip_shows(monkeypatch, name, value, kind):
    expected = step_gate.run_ours(SMALL, 1)
    monkeypatch.setattr(released_step, name, value)
    found = expected.distance(step_gate.run_released(SMALL))
    assert found[kind] > 1000 * EXACT
    assert not step_gate.check_released(SMALL, expected)[0]


def test_the_outer_gradient_reaches_the_encoder_only_through_its_own_images(monkeypatch):
    """What is constant in the copy that writes must be: with a live encoder there the gradient is another."""
    expected = step_gate.run_ours(SMALL, 1)
    put = released_step.put_adapted

    def all_live(target, source, inner_lr, live):
        put(target, source, inner_lr, ("",))

    monkeypatch.setattr(released_step, "put_adapted", all_live)
    assert expected.distance(step_gate.run_released(SMALL))["gradients"] > 1000 * EXACT


def test_equals_the_released_fixture():
    arrays, numbers = released.load(NAME), released.load_json(NAME)
    weights = released.released_weights(released.released_keys("deeplabv3plus_resnet50"))
    model = convert.from_released(weights, arrays["memory_before"]).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0  # as the fixture was made
    step = ReleasedStep(model, numbers["inner_lr"], numbers["lr"], gumbel=False)
    train, test = (meta.Batch(arrays["image"][:, d], arrays["label"][:, d]) for d in (0, 1))
    labels = Labels(train.labels.long(), train.labels.long())
    inner, outer = step.differentiate(train, labels, test, Clock(CPU))
    # what comes after the inner gradient is moved by how it was rounded (tests/meta/released_arithmetic.py)
    for found, expected, allowed in zip((inner, outer), numbers["losses"], (1e-5, 1e-2), strict=True):
        for name, loss in (found.losses | {"total": found.loss}).items():
            assert loss.item() == pytest.approx(expected[name], rel=allowed), name
    step.optimizer.step()
    step.rewrite(train.images, labels)
    assert relative_error(step.memory, arrays["memory_after"]) < 1e-2


def test_layers_are_torchs_own_and_parameters_stay():
    model = new_model(Setup("deeplabv3plus_mobilenet_v2", (35, 34), 2, CPU, channels=8))
    before = dict(model.named_parameters())
    kinds = {type(module) for module in plain_layers(model).modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)}
    assert kinds == {nn.Conv2d, nn.BatchNorm2d}
    assert all(value is before[name] for name, value in model.named_parameters())


def test_an_iteration_trains_and_leaves_its_input():
    step = ReleasedStep(new_model(SMALL), SMALL.inner_lr, LR)
    train, test = new_batches(SMALL)
    labels, weight = train.labels.clone(), step.net.decoder.classify.weight.detach().clone()
    memory = step.memory
    losses = step.iterate(train, test, Clock(CPU))
    assert set(losses) == {"train", "test"}
    assert torch.equal(train.labels, labels) and step.net.training
    assert not torch.equal(step.net.decoder.classify.weight, weight) and not torch.equal(step.memory, memory)
    norms = step.memory.norm(dim=1)
    assert relative_error(norms, torch.ones_like(norms)) < 1e-6
