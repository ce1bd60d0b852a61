"""One training iteration as the released code executes it: the baseline of ``python bench/meta_step.py``.

Plain PyTorch, pass for pass ``train.py:493-586`` of the released code (docs/design.md names the commit), with nothing
left out that costs time there, needed or not:

* three networks: the one that is trained and two copies whose parameters are replaced by theta' in every iteration,
  built once for each of them;
* the inner graph is kept (``retain_graph=True``, and the outputs stay alive) while the later passes run;
* both rewrites of the memory run the whole network, the first in training mode with all its losses;
* the memory and the losses are those of :mod:`bench.released_ops`, the slots are mixed in a Python loop, the labels are
  two int64 copies, of which the auxiliary loss makes a float one.

What is not there is what a single process does not run either: DistributedDataParallel and its buckets.

Letters: B images, C channels, K classes, H x W label pixels.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import released_ops
from bench.phases import Clock
from pmm_fast.meta import Batch
from pmm_fast.models import Segmentor

AUX_WEIGHT, COHESION_WEIGHT, DIVERGENCE_WEIGHT, CLASSIFIER_WEIGHT = 0.4, 0.02, 0.4, 0.2
MEMORY_MOMENTUM = 0.8
IGNORE = 255


class Labels(NamedTuple):
    """The two int64 copies ``[B, H, W]`` of the labels: for the main loss, and for the auxiliary one."""

    main: Tensor
    aux: Tensor


class Pass(NamedTuple):
    """What one pass of the network gives: the sum of its losses, their parts, and the memory that it wrote."""

    loss: Tensor
    losses: dict[str, Tensor]
    memory: Tensor


def plain_layers(model: nn.Module) -> nn.Module:
    """Turn every convolution and batch norm of ``model`` into torch's own, in place; parameters stay as they are."""
    for module in model.modules():
        for kind in (nn.Conv2d, nn.BatchNorm2d):
            if isinstance(module, kind):
                # a class derived from torch's own has its attributes, so that only the methods change
                module.__class__ = kind
    return model


def write_memory(net: Segmentor, feature: Tensor, labels: Tensor, memory: Tensor) -> Tensor:
    """The memory moved towards the pooled output of the writing net, slot by slot (``memory.py:206-257``)."""
    assert net.memory is not None
    writer, classes = net.memory.writer, len(memory)
    query = feature.clone()
    query = F.normalize(writer.relu(query + writer.bn(writer.conv(query))), dim=1)
    masses = released_ops.one_hot_masses(labels, (feature.shape[2], feature.shape[3]), classes, IGNORE)
    masses = masses.flatten(2).permute(0, 2, 1).to(query.dtype)
    sums = torch.matmul(query.flatten(2), masses).sum(0).t()
    mass = masses.sum((0, 1))
    updated = memory.clone()
    for k in range(classes):
        if mass[k] != 0:
            updated[k] = MEMORY_MOMENTUM * memory[k] + (1 - MEMORY_MOMENTUM) * sums[k] / mass[k]
    return F.normalize(updated, dim=1)


def memory_losses(net: Segmentor, memory: Tensor) -> dict[str, Tensor]:
    """Divergence and classifier loss of a written memory (``memory.py:259-272``)."""
    assert net.memory is not None
    classes = len(memory)
    others = 1 - torch.eye(classes, dtype=memory.dtype, device=memory.device)
    divergence = (torch.matmul(memory, memory.t()).clamp(min=0) * others).sum() / (classes * (classes - 1))
    logits = net.memory.classifier(memory)
    return {
        "divergence": divergence,
        "classifier": F.cross_entropy(logits, torch.arange(classes, device=memory.device)),
    }


def auxiliary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the resolution of the head, labels as floats to be resampled (``deepv3plus.py:589-595``)."""
    small = F.interpolate(labels.unsqueeze(1).float(), (logits.shape[2], logits.shape[3]), mode="nearest")
    return F.cross_entropy(logits, small.squeeze(1).long(), ignore_index=IGNORE)


def put_adapted(target: nn.Module, source: nn.Module, inner_lr: float, live: tuple[str, ...]) -> None:
    """Replace the parameters of ``target`` by theta' = theta - alpha g of ``source``.

    Args:
        target: structural copy of ``source``; its parameters become plain tensors.
        source: has theta, and g in ``.grad``.
        inner_lr: alpha.
        live: prefixes of the parameters that stay connected to theta; the others are constants.
    """
    modules = zip(target.named_modules(), source.modules(), strict=True)
    for (name, module), original in modules:
        for key, theta in original._parameters.items():
            if theta is not None:
                assert theta.grad is not None
                adapted = theta - inner_lr * theta.grad
                connected = f"{name}.{key}".startswith(live)
                module._parameters[key] = adapted if connected else adapted.detach()  # type: ignore[assignment]


class ReleasedStep:
    """The released training loop's state and its iteration.

    Args:
        model: network with a memory, in training mode; it is taken over: its layers become torch's own and it is
            trained.
        inner_lr: alpha, the step size of the inner gradient step.
        lr: step size of SGD (momentum 0.9, weight decay 5e-4).
        gumbel: whether the reads are noisy.
    """

    def __init__(self, model: Segmentor, inner_lr: float, lr: float, gumbel: bool = True) -> None:
        assert model.memory is not None
        self.net: Segmentor = plain_layers(model)  # type: ignore[assignment]
        self.adapted, self.constant = copy.deepcopy(self.net), copy.deepcopy(self.net)
        self.memory = model.memory.slots.clone()
        self.inner_lr = inner_lr
        self.draw = released_ops.draw_gumbel if gumbel else torch.zeros_like
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)

    def iterate(self, train: Batch, test: Batch, clock: Clock) -> dict[str, float]:
        """One iteration: gradients, SGD, and the memory's rewrite; returns the two losses."""
        labels = Labels(train.labels.long(), train.labels.long())
        # the outputs keep both graphs alive to the end
        inner, outer = self.differentiate(train, labels, test, clock)
        with clock.phase("optimizer"):
            self.optimizer.step()
        with clock.phase("memory"):
            self.rewrite(train.images, labels)
        return {"train": inner.loss.item(), "test": outer.loss.item()}

    def differentiate(self, train: Batch, labels: Labels, test: Batch, clock: Clock) -> tuple[Pass, Pass]:
        """The inner and the outer pass; their gradients, added, stand in ``.grad`` of ``net``'s parameters."""
        self.optimizer.zero_grad(set_to_none=False)
        before = self.memory.clone()
        inner = self._pass(self.net, train.images, labels, before, writes=True)
        with clock.phase("inner_gradient"):
            inner.loss.backward(retain_graph=True)
        put_adapted(self.adapted, self.net, self.inner_lr, live=("",))
        with clock.phase("memory"):
            put_adapted(self.constant, self.net, self.inner_lr, live=("memory.",))
            written = self._pass(self.constant, train.images, labels, before, writes=True)
        test_labels = Labels(test.labels.long(), test.labels.long())
        outer = self._pass(self.adapted, test.images, test_labels, written.memory, writes=False)
        with clock.phase("outer_gradient"):
            outer.loss.backward()
        return inner, outer

    def rewrite(self, images: Tensor, labels: Labels) -> None:
        """M*, by the whole network in evaluation mode (``train.py:578-583``)."""
        self.net.eval()
        with torch.no_grad():
            feature, low_level, _ = self.net.encoder(images)
            fused, _ = self._read(self.net, feature, labels.main, self.memory)
            self.memory = write_memory(self.net, feature, labels.main, self.memory)
            logits = self.net.decoder(fused, low_level)
            F.interpolate(logits, (images.shape[2], images.shape[3]), mode="bilinear", align_corners=True)
        self.net.train()

    def _read(self, net: Segmentor, feature: Tensor, labels: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The fused feature and the cohesion loss."""
        assert net.memory is not None
        joined, scores = released_ops.memory_read(feature, memory, self.draw)
        fusion = net.memory.fusion
        loss = released_ops.upsample_cross_entropy(scores, labels, IGNORE)
        return fusion.relu(fusion.bn(fusion.conv(joined))), loss

    def _pass(self, net: Segmentor, images: Tensor, labels: Labels, memory: Tensor, writes: bool) -> Pass:
        """A training pass of the whole network: read with ``memory``, then, where ``writes``, write and judge it."""
        feature, low_level, aux = net.encoder(images)
        fused, cohesion = self._read(net, feature, labels.main, memory)
        losses = {
            "seg": released_ops.upsample_cross_entropy(net.decoder(fused, low_level), labels.main, IGNORE),
            "aux": auxiliary_loss(net.aux_head(aux), labels.aux),
            "cohesion": cohesion,
        }
        loss = losses["seg"] + AUX_WEIGHT * losses["aux"] + COHESION_WEIGHT * losses["cohesion"]
        if writes:
            memory = write_memory(net, feature, labels.main, memory)
            losses |= memory_losses(net, memory)
            loss = loss + DIVERGENCE_WEIGHT * losses["divergence"] + CLASSIFIER_WEIGHT * losses["classifier"]
        return Pass(loss, losses, memory)
