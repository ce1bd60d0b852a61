"""Learning rates at known points, SGD's decay, and the loss scale of fp16."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pmm_fast.config import Config, MetaConfig, OptimConfig
from pmm_fast.engine.optim import LossScale, build_optimizer, gradient_norm, inner_learning_rate, learning_rate


def test_exponential_schedule() -> None:
    released = OptimConfig()
    assert learning_rate(released, 0) == 0.01
    # what the released recipe reaches at its last iteration
    assert learning_rate(released, 30463) == pytest.approx(1.018e-3, rel=1e-3)
    assert learning_rate(released, 60000) == pytest.approx(0.01 * math.exp(-4.5), rel=1e-12)
    assert learning_rate(released, 120000) == pytest.approx(0.01 * math.exp(-9), rel=1e-12)
    assert learning_rate(released, 500000) == learning_rate(released, 120000)


def test_polynomial_schedule_over_all_iterations() -> None:
    config = OptimConfig(schedule="poly", horizon=0, iterations=400, lr=0.2)
    assert learning_rate(config, 0) == 0.2
    assert learning_rate(config, 200) == pytest.approx(0.2 * 0.5**0.9, rel=1e-12)
    assert learning_rate(config, 399) == pytest.approx(0.2 * (1 / 400) ** 0.9, rel=1e-9)
    assert learning_rate(config, 400) == learning_rate(config, 401) == 0.0


def test_inner_learning_rate_follows_or_is_fixed() -> None:
    config = Config()
    for iteration in (0, 1, 7777):
        assert inner_learning_rate(config, iteration) == learning_rate(config.optim, iteration) / 4
    assert inner_learning_rate(config, 1) < inner_learning_rate(config, 0)
    fixed = Config(meta=MetaConfig(inner_lr=0.3))
    assert inner_learning_rate(fixed, 0) == inner_learning_rate(fixed, 9999) == 0.3


def test_weight_decay_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, momentum=0.9, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert len(before) == 4
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name] * (1 - 0.5 * 0.1))
    # the second step has momentum: the first one's decay goes on
    optimizer.step()
    for name, value in model.named_parameters():
        first = 0.1 * before[name]
        second = 0.9 * first + 0.1 * (before[name] - 0.5 * first)
        torch.testing.assert_close(value, before[name] - 0.5 * (first + second))


def test_loss_scale_halves_and_doubles() -> None:
    scale = LossScale(True, scale=16.0, growth_interval=3)
    seen = []
    for finite in (True, False, True, True, True, True, True, True, False):
        scale.update(finite)
        seen.append(scale.scale)
    # one that is not finite also starts the count anew
    assert seen == [16, 8, 8, 8, 16, 16, 16, 32, 16]


def test_loss_scale_has_a_ceiling() -> None:
    scale = LossScale(True, scale=2.0**23, growth_interval=1)
    for _ in range(3):
        scale.update(True)
    assert scale.scale == 2.0**24


def test_loss_scale_is_exhausted_below_one() -> None:
    scale = LossScale(True, scale=4.0)
    exhausted = []
    for _ in range(3):
        scale.update(False)
        exhausted.append(scale.exhausted)
    assert exhausted == [False, False, True]


def test_loss_scale_switched_off() -> None:
    scale = LossScale(False)
    scale.update(False)
    assert scale.scale == 1.0 and scale.exhausted


def test_loss_scale_is_restored() -> None:
    scale = LossScale(True, scale=64.0, growth_interval=4)
    for finite in (False, True, True):
        scale.update(finite)
    other = LossScale(True, growth_interval=4)
    other.load_state_dict(scale.state_dict())
    for each in (scale, other):
        each.update(True)
        each.update(True)
        assert each.scale == 64.0


def test_loss_scale_survives_a_change_of_precision() -> None:
    off, on = LossScale(False), LossScale(True, scale=64.0)
    state = on.state_dict()
    on.load_state_dict(off.state_dict())
    off.load_state_dict(state)
    assert (off.scale, on.scale) == (1.0, 64.0)


def test_gradient_norm() -> None:
    grads = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor(4.0)}
    assert float(gradient_norm(grads)) == 5.0
    assert not gradient_norm(grads | {"c": torch.tensor([1.0, math.nan])}).isfinite()
    assert not gradient_norm(grads | {"c": torch.tensor([math.inf])}).isfinite()
