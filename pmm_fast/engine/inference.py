"""Segmenting one image under a test protocol: scales, mirrored images, tiles, noise.

Shapes: ``K`` classes, ``H x W`` the result, ``h x w`` the image as the network sees it at one scale.

An image at one scale is cut into tiles (one, unless the protocol is a sliding one), and so is its mirrored image.  The
network gives each tile logits at its decoder's resolution; ``ops.merge_tiles`` upsamples them as the network would and
averages, at every pixel, all the tiles that cover it, mirrored ones included.  With one scale and an image of the size
of the result that is all, and ``ops.segment_tiles`` takes the class of each pixel without storing ``K x h x w`` scores.
Else the averages are resized to ``H x W`` (bilinear, ``align_corners=False``) and averaged over the scales.

Released code: ``eval.py`` (``inference_sliding``, ``inference_pool``); ``docs/evaluate.md`` tells what differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pmm_fast import ops
from pmm_fast.config import EvalProtocol
from pmm_fast.data.transforms import MEAN, NO_JITTER, STD
from pmm_fast.models import Segmentor
from pmm_fast.ops.merge_tiles import MOST_CLASSES

TILE_BATCHES = {"cpu": 1, "cuda": 8}
"""Tiles and mirrored images that go through the network at once, where nobody says: a CPU's caches hold one tile's maps
better (eight take twice the time a tile: ``bench/evaluation.py``), a GPU wants more work than one has."""

# of PyTorch on a CPU; of CUDA and Triton; of cuBLAS and cuDNN
_NO_MEMORY = ("DefaultCPUAllocator", "bad_alloc", "out of memory", "ALLOC_FAILED")
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Segmented(NamedTuple):
    """What an image was segmented into.

    Attributes:
        classes: uint8 ``[H, W]``.
        confidence: float32 ``[H, W]``, the softmax probability of that class by the averaged scores; None if not asked
            for.
    """

    classes: Tensor
    confidence: Tensor | None


class Tiles(NamedTuple):
    """Logits of all tiles of an image at one scale, as ``ops.merge_tiles`` takes them.

    Attributes:
        logits: ``[T, K, h', w']``, at the decoder's resolution; those of mirrored tiles are mirrored back.
        tops: first row of every tile.
        lefts: first column of every tile, in the image that is not mirrored.
        tile: height and width of a tile.
        size: height and width of the image at this scale.
    """

    logits: Tensor
    tops: list[int]
    lefts: list[int]
    tile: tuple[int, int]
    size: tuple[int, int]


def segment(
    model: Segmentor,
    image: Image.Image,
    size: tuple[int, int],
    protocol: EvalProtocol,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    seed: int = 0,
    confidence: bool = False,
    tile_batch: int = 0,
) -> Segmented:
    """The class of every pixel of an image under a protocol.

    Args:
        model: network on ``device``, in eval mode.
        image: RGB.
        size: H, W of the result, usually those of the image.
        protocol: how; from ``config.resolve_protocol``.
        device: where the model is.
        amp_dtype: type of autocast; None: no autocast.
        seed: of the noise in the read, where the protocol has noise (and the network a memory): the same seed, image
            and protocol give the same result; take another one for every image (``image_seed``).
        confidence: also give the probability of the class.
        tile_batch: tiles and mirrored images that go through the network at once; the noise does not depend on it.  0:
            ``TILE_BATCHES``.

    Returns:
        Classes and confidence, on ``device``.

    Raises:
        ValueError: the image is not RGB, or the network has too many classes for uint8, refuses the image or gives
            logits that are not finite.
    """
    if model.num_classes > MOST_CLASSES:
        raise ValueError(f"segment: the network must have at most {MOST_CLASSES} classes, got {model.num_classes}")
    passes = _passes(model, image, protocol, device, amp_dtype, seed, tile_batch)
    if _single_pass(protocol, image, size):
        return Segmented(*ops.segment_tiles(*next(passes), confidence=confidence))
    scores = _combine(passes, size, protocol)
    if protocol.method == "pooling":
        # scores are probabilities
        best, classes = scores.max(0)
    elif confidence:
        best, classes = torch.softmax(scores, 0).max(0)
    else:
        classes = scores.argmax(0)
    return Segmented(classes.to(torch.uint8), best if confidence else None)


def predict_logits(
    model: Segmentor,
    image: Image.Image,
    size: tuple[int, int],
    protocol: EvalProtocol,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    seed: int = 0,
    tile_batch: int = 0,
) -> Tensor:
    """Averaged logits of one image under a protocol; arguments as in :func:`segment`.

    Returns:
        float32 ``[K, H, W]`` on ``device``; for the pooling protocols logarithms of the averaged probabilities, so that
        a softmax gives the probabilities under every protocol.

    Raises:
        ValueError: the image is not RGB, or the network refuses it or gives logits that are not finite.
    """
    scores = _combine(_passes(model, image, protocol, device, amp_dtype, seed, tile_batch), size, protocol)
    return scores.log() if protocol.method == "pooling" else scores


def image_seed(seed: int, image: int) -> int:
    """A seed for the noise of one image of many.

    Args:
        seed: seed of the run, not negative.
        image: number of the image, not negative.
    """
    return _mix(seed, image)


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """First positions of the tiles that cover ``length`` pixels.

    The stride is ``ceil(tile * (1 - overlap))``; the last tile is moved back to end at the border.
    """
    # 9 * (1 - 1/3) is a little over 6 in floating point
    stride = max(1, math.ceil(tile * (1 - overlap) - 1e-6))
    last = max(0, length - tile)
    return [*range(0, last, stride), last]


def to_device(image: Image.Image, device: torch.device) -> Tensor:
    """``data.normalise``, bit for bit, with 8-bit values on the way to the device.

    Args:
        image: RGB, H x W.
        device: where it is wanted.

    Returns:
        float32 ``[3, H, W]``.

    Raises:
        ValueError: the image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"image: expected mode RGB, got {image.mode}")
    # a copy: PIL's memory is read-only, which torch warns about
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device)
    return ops.photometric(pixels, torch.tensor([[*NO_JITTER, 0.0]]), MEAN, STD)[0]


def coarse_logits(
    model: Segmentor,
    windows: Sequence[Tensor],
    seeds: Sequence[int] = (),
    amp_dtype: torch.dtype | None = None,
    tile_batch: int = 0,
) -> Tensor:
    """Logits of images or tiles of equal size, at the decoder's resolution.

    Args:
        model: network on the device of the windows, in eval mode.
        windows: ``[3, h, w]`` each, normalised.
        seeds: of the noise of each; none: no noise.
        amp_dtype: type of autocast; None: no autocast.
        tile_batch: windows that go through the network at once; 0: ``TILE_BATCHES``.

    Returns:
        ``[T, K, h', w']``.

    Raises:
        ValueError: the network refuses windows of this size, or gives logits that are not finite.
    """
    device = windows[0].device
    found = []
    tile_batch = tile_batch or TILE_BATCHES[device.type]
    with torch.no_grad(), torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        for start in range(0, len(windows), tile_batch):
            batch = torch.stack(list(windows[start : start + tile_batch]))
            noise = _noise(model, seeds[start : start + tile_batch], batch) if seeds else None
            found.append(model.predict_coarse(batch, noise).logits)
    logits = torch.cat(found)
    # NaN counts as the largest number, so that the first class would win; all at once, for a GPU is waited for
    if not bool(logits.isfinite().all()):
        hint = "; they overflow in fp16: amp_dtype bf16 reaches further" if amp_dtype == torch.float16 else ""
        raise ValueError(f"the network gives logits that are not finite{hint}")
    return logits


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU, where PyTorch has no type of error for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


# --- passes -------------------------------------------------------------------------------------------------------


def _single_pass(protocol: EvalProtocol, image: Image.Image, size: tuple[int, int]) -> bool:
    """Whether one call of ``ops.segment_tiles`` is the whole protocol: nothing is resized, averaged or pooled."""
    if len(protocol.scales) > 1 or (protocol.method == "pooling" and protocol.flip):
        return False
    return _scaled_size(image, protocol, protocol.scales[0]) == size


def _scaled_size(image: Image.Image, protocol: EvalProtocol, scale: float) -> tuple[int, int]:
    # first to the protocol's height, rounded, as one would store it; then by the scale
    factor = protocol.height / image.height if protocol.height else 1.0
    height, width = round(image.height * factor), round(image.width * factor)
    return max(1, int(height * scale)), max(1, int(width * scale))


def _passes(
    model: Segmentor,
    image: Image.Image,
    protocol: EvalProtocol,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    seed: int,
    tile_batch: int,
) -> Iterator[Tiles]:
    """What is averaged: one for every scale; the mirrored images of the pooling protocols come by themselves."""
    passed = count()
    for scale in protocol.scales:
        size = _scaled_size(image, protocol, scale)
        scaled = image
        if size != (image.height, image.width):
            scaled = image.resize(size[::-1], _FILTERS[protocol.resample])
        pixels = to_device(scaled, device)
        side = int(protocol.crop * max(1.0, scale)) if protocol.method == "sliding" else max(size)
        tile = min(side, size[0]), min(side, size[1])
        rows, columns = (tile_starts(*lengths, protocol.overlap) for lengths in zip(size, tile, strict=True))
        places = [(top, left) for top in rows for left in columns]
        views = [pixels, pixels.flip(-1)] if protocol.flip else [pixels]
        windows = [view[:, top : top + tile[0], left : left + tile[1]] for view in views for top, left in places]
        seeds = [_mix(seed, next(passed)) for _ in windows] if protocol.noise and model.memory is not None else []
        logits = coarse_logits(model, windows, seeds, amp_dtype, tile_batch)
        if protocol.flip:
            logits[len(places) :] = logits[len(places) :].flip(-1)
            places += [(top, size[1] - tile[1] - left) for top, left in places]
        if protocol.method == "pooling":
            # probabilities are averaged, so views must not be averaged before
            for view in logits.split(1):
                yield Tiles(view, [0], [0], tile, size)
        else:
            yield Tiles(logits, [top for top, _ in places], [left for _, left in places], tile, size)


def _noise(model: Segmentor, seeds: Sequence[int], batch: Tensor) -> Tensor:
    """Gumbel noise ``[N, K, h, w]``, of every tile by itself, so that batches of any size have the same."""
    shape = (1, model.num_classes, *model.feature_size(batch.shape[2], batch.shape[3]))
    # filled on the device: a copy from the host would make it wait
    drawn = (torch.full((), seed, dtype=torch.int64, device=batch.device) for seed in seeds)
    return torch.cat([ops.seeded_gumbel_noise(seed, shape) for seed in drawn])


def _mix(*numbers: int) -> int:
    """One number of 63 bits from several."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _combine(passes: Iterator[Tiles], size: tuple[int, int], protocol: EvalProtocol) -> Tensor:
    """The mean of all passes at the size of the result, float32 ``[K, H, W]``: logits, or probabilities (pooling)."""
    total: Tensor | None = None
    number = 0
    for tiles in passes:
        scores = ops.merge_tiles(*tiles)
        if tiles.size != size:
            scores = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
        if protocol.method == "pooling":
            scores = torch.softmax(scores, 0)
        total = scores if total is None else total.add_(scores)
        number += 1
    assert total is not None
    return total.div_(number)
