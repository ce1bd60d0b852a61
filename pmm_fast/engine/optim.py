"""SGD, its schedule, and the loss scale of fp16."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pmm_fast.config import Config, OptimConfig


def learning_rate(config: OptimConfig, iteration: int) -> float:
    """Learning rate at iteration t, from 0: exp ``lr e^(-9 t/horizon)`` (released), poly ``lr (1 - t/horizon)^0.9``."""
    progress = min(iteration / (config.horizon or config.iterations), 1.0)
    factor = math.exp(-9 * progress) if config.schedule == "exp" else (1 - progress) ** 0.9
    return config.lr * factor


def inner_learning_rate(config: Config, iteration: int) -> float:
    """Step size of the inner gradient step: fixed, or a share of the learning rate (released: a quarter)."""
    return config.meta.inner_lr or config.meta.inner_lr_ratio * learning_rate(config.optim, iteration)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """SGD on every parameter, weight decay on all of them (released ``optimizer.py:17-25``)."""
    return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


class LossScale:
    """Dynamic loss scale for fp16, known to the step, which takes it out of the inner and the outer gradient.

    ``torch.amp.GradScaler`` scales one backward call; the meta step differentiates twice, so the scale is a plain
    number here.  Halved when a gradient is not finite (that update is skipped), doubled after ``growth_interval``
    finite ones.
    """

    def __init__(self, enabled: bool, scale: float = 2.0**12, growth_interval: int = 500) -> None:
        self.enabled, self.growth_interval, self.finite_steps = enabled, growth_interval, 0
        self.scale = scale if enabled else 1.0

    def update(self, finite: bool) -> None:
        """Take note of whether the last gradients were finite."""
        if not self.enabled:
            return
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.finite_steps % self.growth_interval == 0:
            self.scale = min(self.scale * 2, 2.0**24)

    @property
    def exhausted(self) -> bool:
        """No scale is small enough: the losses themselves are the problem."""
        return not self.enabled or self.scale < 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale if self.enabled else None, "finite_steps": self.finite_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # fp16 may have been switched on or off since
        if self.enabled and state["scale"] is not None:
            self.scale, self.finite_steps = state["scale"], state["finite_steps"]


def gradient_norm(grads: dict[str, Tensor]) -> Tensor:
    """L2 norm of all gradients together, a scalar on their device; NaN or infinite when any entry is."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads.values()))))
