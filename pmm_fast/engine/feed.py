"""Batches as the network wants them: on the training device, with their colours and blur applied, normalised."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from pmm_fast import ops
from pmm_fast.data.loader import Loader
from pmm_fast.data.sampling import Batch
from pmm_fast.data.transforms import MEAN, STD


class Feed:
    """Iterates over a loader, and knows how long it was waited for.

    :meth:`close` ends it.

    Args:
        loader: gives ``Batch``.
        device: where to train.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._device = device
        self._batches = loader.__iter__()
        self._waited, self._since = 0.0, time.perf_counter()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Images float32 ``[D, B, 3, h, w]``, normalised, and labels uint8 ``[D, B, h, w]``, on the device."""
        start = time.perf_counter()
        batch = next(self._batches)
        self._waited += time.perf_counter() - start
        return prepare(batch, self._device)

    def share_waited(self) -> float:
        """The share of the time since the last call (or the start) that was spent waiting for data."""
        now = time.perf_counter()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return share

    def close(self) -> None:
        """Stop loading."""
        self._batches.close()


def prepare(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch on a device, its looks applied there.

    Returns:
        Images float32 ``[D, B, 3, h, w]``, normalised, and labels uint8 ``[D, B, h, w]``.
    """
    # the looks stay: they are numbers for the host to launch with
    images, labels = (part.to(device, non_blocking=True) for part in (batch.images, batch.labels))
    ready = ops.photometric(images.flatten(0, 1), batch.looks.flatten(0, 1), MEAN, STD)
    return ready.unflatten(0, images.shape[:2]), labels
