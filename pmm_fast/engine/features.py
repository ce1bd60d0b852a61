"""What the pictures need of a network: class means of its features, the weights of its read, its memory.

Always in evaluation mode and without noise, so that the same image gives the same result.

Shapes: N points, C channels, K classes (slots), h x w feature positions, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pmm_fast import ops
from pmm_fast.engine.evaluate import Domain
from pmm_fast.engine.inference import to_device
from pmm_fast.engine.logging import progress_bar
from pmm_fast.models import Segmentor, SemanticMemory


@dataclass(frozen=True)
class Features:
    """Class means of a domain's features.

    Attributes:
        points: float32 ``[N, C]``, unit rows.
        classes: uint8 ``[N]``, the class of each.
        images: int64 ``[N]``, the index of the image of each.
        domain: name of the domain.
    """

    points: np.ndarray
    classes: np.ndarray
    images: np.ndarray
    domain: str


def collect_features(
    model: Segmentor,
    domain: Domain,
    indices: Sequence[int],
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Features:
    """The mean feature of every class of every image, as a unit vector: what the t-SNE of the method is made of.

    ``p = normalize(sum_i y[k, i] F[i] / |F[i]|)`` over the feature positions i, with F as the encoder gives it, before
    the memory is read, and y the labels sampled bilinearly there (``ops.masked_average_pool``).  The released code
    (``tsnelib.py``) upsamples F to the labels instead, which costs 0.9 GB for an image of 1280 x 720.  The two differ
    in how positions at the border of a class or of the image are weighted, and a class that no position sees, because
    it lies between them, gives no point here.

    Args:
        model: network on ``device``; it is in eval mode meanwhile, then as before.
        domain: the images and labels.
        indices: the samples to take.
        device: where to compute.
        amp_dtype: type of autocast; None: float32 throughout.
        progress: show a progress bar on stderr.

    Returns:
        A point for every class in every image, in the order of ``indices``, then of classes.

    Raises:
        ValueError: no indices, or labels that do not fit the network's classes; names domain and sample.
    """
    if not indices:
        raise ValueError(f"domain {domain.name!r}: expected samples to take features of, got none")
    points: list[Tensor] = []
    classes: list[Tensor] = []
    images: list[Tensor] = []
    with _testing(model, device, amp_dtype):
        for index in progress_bar(f"features of {domain.name}", indices, shown=progress):
            image, labels = domain.load(index)
            feature = model.encoder(to_device(image, device)[None]).feature
            ids = torch.from_numpy(np.array(labels))[None].to(device)
            try:
                sums, _ = ops.masked_average_pool(feature, ids, model.num_classes)
            except ValueError as error:
                raise ValueError(f"domain {domain.name!r}, sample {index}: {error}") from error
            # a class that is not there, and one whose features are all zero, have no direction
            there = (sums != 0).any(1).nonzero().flatten()
            points.append(ops.normalize(sums[there].float(), 1).cpu())
            classes.append(there.to(torch.uint8).cpu())
            images.append(torch.full((len(there),), index))
    return Features(torch.cat(points).numpy(), torch.cat(classes).numpy(), torch.cat(images).numpy(), domain.name)


def read_assignment(
    model: Segmentor, image: Image.Image, device: torch.device, amp_dtype: torch.dtype | None = None
) -> np.ndarray:
    """The weights with which the slots are read over an image: what memory activation maps are made of.

    Args:
        model: network on ``device``; it is in eval mode meanwhile, then as before.
        image: RGB.
        device: where to compute.
        amp_dtype: type of autocast; None: float32 throughout.

    Returns:
        float32 ``[K, h, w]``; the slots of a position sum to one.

    Raises:
        ValueError: the network has no memory.
    """
    memory = _memory(model)
    with _testing(model, device, amp_dtype):
        feature = model.encoder(to_device(image, device)[None]).feature
        _, scores = ops.memory_read(feature, memory.slots, temperature=memory.temperature)
        return ops.assignment(scores, temperature=memory.temperature)[0].float().cpu().numpy()


def memory_slots(model: Segmentor) -> np.ndarray:
    """The memory of a network, float32 ``[K, C]``: unit rows, zero for a class never seen.

    Raises:
        ValueError: the network has no memory.
    """
    # a copy: the array must not be the buffer
    return _memory(model).slots.detach().float().cpu().numpy().copy()


def _memory(model: Segmentor) -> SemanticMemory:
    if model.memory is None:
        raise ValueError(f"this {model.architecture} has no memory (trained with --mode agg or mldg)")
    return model.memory


@contextmanager
def _testing(model: Segmentor, device: torch.device, amp_dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode, no gradients, and autocast if asked for."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            yield
    finally:
        model.train(training)
