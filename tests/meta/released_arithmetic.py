"""The same mathematics in the order in which the released code rounds it.

The released iteration of the fixture is ill-conditioned: image pooling feeds a batch norm with two values a channel,
and its gradients move the weights by 3 %, so that a rounding of 1e-7 in the inner gradient moves the outer gradient by
1 % (:func:`tests.meta.test_released_step.test_conditioning` measures it).  With these functions in place of ours the
roundings agree, and what is left is the iteration itself.  Each of them is compared with ours in
:func:`tests.meta.test_released_step.test_released_arithmetic_is_the_same_mathematics`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmm_fast.models import MemoryFusion, MemoryWriter
from pmm_fast.models.batchnorm import BatchNorm2d
from pmm_fast.models.conv import Conv2d
from pmm_fast.models.deeplabv3plus import ASPP
from pmm_fast.ops import backends, reference


def memory_read(
    features: Tensor, memory: Tensor, noise: Tensor | None, temperature: float, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions as rows; the normalised features are left on the read for the fusion, which must not redo them."""
    assert noise is None and temperature == 1 and values is None
    batch, channels, height, width = features.shape
    query = F.normalize(features.clone(), dim=1).permute(0, 2, 3, 1).contiguous()
    scores = torch.matmul(query, memory.t())
    read = torch.matmul(F.softmax(scores.view(-1, len(memory)), dim=1), memory)
    read.query = query.view(-1, channels)
    read.size = (batch, height, width)
    return read, scores.permute(0, 3, 1, 2).contiguous()


def masked_average_pool(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """From the one-hot map with a slot for ignored pixels."""
    assert normalize
    query = F.normalize(features, dim=1)
    slots = torch.where(labels == ignore_index, num_classes, labels.long())
    one_hot = F.one_hot(slots, num_classes + 1).permute(0, 3, 1, 2).contiguous().float()
    masses = F.interpolate(one_hot, query.shape[2:], mode="bilinear", align_corners=True)
    masses = masses.permute(0, 2, 3, 1).contiguous().view(len(query), -1, num_classes + 1)
    sums = torch.matmul(query.flatten(2), masses).sum(0).t()
    return sums[:num_classes], masses.sum(1).sum(0)[:num_classes]


def memory_pass(
    features: Tensor,
    written: Tensor,
    labels: Tensor,
    memory: Tensor,
    noise: Tensor | None,
    temperature: float,
    ignore: int,
    values: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    read, scores = memory_read(features, memory, noise, temperature, values)
    return read, scores, *masked_average_pool(written, labels, len(memory), ignore)


def update_memory(memory: Tensor, sums: Tensor, mass: Tensor, momentum: float) -> Tensor:
    """Slot by slot."""
    rows = [
        momentum * memory[k] + (1 - momentum) * sums[k] / mass[k] if mass[k] != 0 else memory[k]
        for k in range(len(memory))
    ]
    return F.normalize(torch.stack(rows), dim=1)


def write(self: MemoryWriter, feature: Tensor) -> Tensor:
    """From a copy, so that the gradients of its two uses are added to each other first."""
    feature = feature.clone()
    return self.relu(feature + self.bn(self.conv(feature)))


def fuse(self: MemoryFusion, feature: Tensor, read: Tensor) -> Tensor:
    joined = torch.cat([read.query, read], 1).view(*read.size, -1).permute(0, 3, 1, 2).contiguous()
    return self.relu(self.bn(self.conv(joined)))


def pyramid(self: ASPP, x: Tensor) -> Tensor:
    """Image pooling resampled instead of repeated."""
    pooled = F.interpolate(
        self.image_pool(F.adaptive_avg_pool2d(x, 1)), x.shape[2:], mode="bilinear", align_corners=True
    )
    return torch.cat([pooled, *(branch(x) for branch in self.branches)], 1)


def install(monkeypatch) -> None:
    """Put these functions in place of ours until the monkeypatch is undone."""
    monkeypatch.setattr(backends, "_implementations", dict(backends._implementations))
    monkeypatch.setenv("PMM_FAST_BACKEND", "reference")
    for function in (memory_read, masked_average_pool, memory_pass):
        backends.register(function.__name__, "reference", function)
    monkeypatch.setattr(reference, "update_memory", update_memory)
    monkeypatch.setattr(MemoryWriter, "forward", write)
    monkeypatch.setattr(MemoryFusion, "forward", fuse)
    monkeypatch.setattr(ASPP, "forward", pyramid)
    # PyTorch's own weight gradients: ours add up dilated ones in another order
    monkeypatch.setattr(Conv2d, "forward", nn.Conv2d.forward)
    monkeypatch.setattr(BatchNorm2d, "forward", nn.BatchNorm2d.forward)
