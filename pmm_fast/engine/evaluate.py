"""Testing a network on labelled domains.

Shapes: ``K`` classes, ``H x W`` the label map, ``h x w`` the image as the network sees it.

Whatever the protocol, the logits of all passes over an image (scales, mirrored or not) are resized to ``H x W``
(bilinear, ``align_corners=False``) and averaged before the one argmax, in float32.
"""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from pmm_fast.config.schema import EvalConfig
from pmm_fast.data.survey import evenly_spaced
from pmm_fast.data.transforms import normalise
from pmm_fast.engine.metrics import Confusion

T = TypeVar("T")

OnPrediction = Callable[[int, Image.Image, np.ndarray, np.ndarray], None]
"""Called with sample index, image, labels uint8 ``[H, W]`` and prediction uint8 ``[H, W]``."""


class Domain(Protocol):
    """What is tested on: a named sequence of images with labels."""

    @property
    def name(self) -> str:
        """Name of the domain."""

    def __len__(self) -> int:
        """Number of samples."""

    def load(self, index: int, /) -> tuple[Image.Image, np.ndarray]:
        """RGB image and its labels, uint8 ``[H, W]``; called from several threads."""


@dataclass
class DomainResult:
    """What a network scored on a domain.

    Attributes:
        name: name of the domain.
        confusion: pixel counts over all its images.
        images: number of images tested.
        seconds: wall-clock time of the test, reading included.
    """

    name: str
    confusion: Confusion
    images: int
    seconds: float


# --- one image ----------------------------------------------------------------------------------------------------


def predict_logits(
    model: nn.Module,
    image: Image.Image,
    size: tuple[int, int],
    settings: EvalConfig,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
) -> Tensor:
    """Averaged logits of one image under a protocol.

    Args:
        model: network in eval mode; ``model(images).logits`` is ``[N, K, h, w]`` for ``[N, 3, h, w]``.
        image: RGB.
        size: height and width of the result.
        settings: protocol, scales, flip, tiles, height.
        device: where the model is.
        amp_dtype: type of autocast; None: no autocast.

    Returns:
        float32 ``[K, H, W]`` on ``device``.
    """
    factor = settings.height / image.height if settings.height else 1.0
    total: Tensor | None = None
    for scale in settings.scales:
        pixels = normalise(_resize(image, factor, scale)).to(device)
        # the mirrored image rides along in the same batch
        batch = torch.stack([pixels, pixels.flip(-1)]) if settings.flip else pixels[None]
        with torch.no_grad(), torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            logits = _sliding(model, batch, settings, scale) if settings.protocol == "sliding" else _run(model, batch)
        if settings.flip:
            logits = (logits[:1] + logits[1:].flip(-1)) / 2
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        total = logits if total is None else total + logits
    if total is None:
        raise ValueError("eval.scales: expected one or more scales, got none")
    return total[0] / len(settings.scales)


def _resize(image: Image.Image, factor: float, scale: float) -> Image.Image:
    # first to eval.height, rounded, as one would store it; then by the scale
    height, width = round(image.height * factor), round(image.width * factor)
    height, width = max(1, int(height * scale)), max(1, int(width * scale))
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _run(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch).logits.float()
    if logits.shape[-2:] != batch.shape[-2:]:
        raise ValueError(
            f"evaluate: expected logits of the size of the images, {tuple(batch.shape[-2:])}, "
            f"got {tuple(logits.shape[-2:])}"
        )
    return logits


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """First positions of the tiles that cover ``length`` pixels.

    The stride is ``ceil(tile * (1 - overlap))``; the last tile is moved back to end at the border.
    """
    # 9 * (1 - 1/3) is a little over 6 in floating point
    stride = max(1, math.ceil(tile * (1 - overlap) - 1e-6))
    last = max(0, length - tile)
    return [*range(0, last, stride), last]


def _sliding(model: nn.Module, batch: Tensor, settings: EvalConfig, scale: float) -> Tensor:
    """Logits averaged over overlapping tiles of ``crop * max(1, scale)`` pixels, at most as large as the image."""
    tile = int(settings.crop * max(1.0, scale))
    height, width = batch.shape[-2:]
    counts = torch.zeros(height, width, device=batch.device)
    total: Tensor | None = None
    for top in tile_starts(height, tile, settings.overlap):
        for left in tile_starts(width, tile, settings.overlap):
            window = (..., slice(top, top + tile), slice(left, left + tile))
            logits = _run(model, batch[window])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[window] += logits
            counts[window] += 1
    assert total is not None
    return total.div_(counts)


# --- domains ------------------------------------------------------------------------------------------------------


def evaluate_domain(
    model: nn.Module,
    domain: Domain,
    num_classes: int,
    settings: EvalConfig,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    progress: bool = True,
    on_prediction: OnPrediction | None = None,
    threads: int = 2,
) -> DomainResult:
    """Test a network on a domain.

    Args:
        model: network on ``device``, see ``predict_logits``; it is in eval mode meanwhile, then as before.
        domain: the images and labels.
        num_classes: K.
        settings: the protocol; ``limit`` picks evenly spaced images.
        device: where to compute.
        amp_dtype: type of autocast; None: float32 throughout.
        progress: show a progress bar on stderr, with the running mIoU.
        on_prediction: called for every image, e.g. to draw it.
        threads: images read ahead of the network, each in a thread.

    Returns:
        The pixel counts and how long it took.

    Raises:
        ValueError: the domain is empty, or logits or labels do not fit ``num_classes``; names domain and sample.
    """
    indices = evenly_spaced(len(domain), settings.limit)
    if not indices:
        raise ValueError(f"domain {domain.name!r} has no images to test on")
    confusion = Confusion(num_classes)
    training, start = model.training, time.perf_counter()
    model.eval()
    try:
        samples = _read_ahead(domain.load, indices, threads)
        # a line now and then where stderr is a file
        interval = 0.2 if sys.stderr.isatty() else 10.0
        bar = tqdm(samples, domain.name, len(indices), mininterval=interval, dynamic_ncols=True, disable=not progress)
        for index, (image, labels) in zip(indices, bar, strict=True):
            height, width = labels.shape
            logits = predict_logits(model, image, (height, width), settings, device, amp_dtype)
            if logits.shape[0] != num_classes:
                raise ValueError(f"evaluate: the network has {logits.shape[0]} classes, the labels {num_classes}")
            prediction = logits.argmax(0).to(torch.uint8)
            try:
                confusion.update(prediction, torch.from_numpy(np.array(labels)).to(device))
            except ValueError as error:
                raise ValueError(f"domain {domain.name!r}, sample {index}: {error}") from error
            bar.set_postfix_str(f"mIoU {100 * confusion.miou():.1f}", refresh=False)
            if on_prediction is not None:
                on_prediction(index, image, labels, prediction.cpu().numpy())
    finally:
        model.train(training)
    return DomainResult(domain.name, confusion, len(indices), time.perf_counter() - start)


def _read_ahead(load: Callable[[int], T], indices: Sequence[int], threads: int) -> Iterator[T]:
    """``load`` of every index, in order, a few at a time in threads: decoding would otherwise hold up a GPU."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting = iter(indices)
        ahead = [pool.submit(load, index) for index in islice(waiting, max(1, threads) + 1)]
        while ahead:
            sample = ahead.pop(0).result()
            ahead += [pool.submit(load, index) for index in islice(waiting, 1)]
            yield sample


# --- files --------------------------------------------------------------------------------------------------------


def _scores(result: DomainResult) -> dict[str, float]:
    confusion = result.confusion
    return {
        "miou": confusion.miou(),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "class_accuracy": confusion.class_accuracy(),
        "fwiou": confusion.fwiou(),
    }


def write_results(
    runs: Mapping[str, Sequence[DomainResult]],
    out_dir: str | Path,
    classes: Sequence[str],
    unseen: Collection[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Write ``results.json`` (everything, with the confusion matrices) and ``results.csv`` (a row a run and domain).

    Scores are shares in 0..1; a class without IoU is null in JSON and empty in CSV.

    Args:
        runs: name of each run to its results.
        out_dir: folder, made if missing.
        classes: class names.
        unseen: names of the domains that were never trained on; the others count as sources.
        settings: how it was tested, stored as it is in the JSON file.

    Returns:
        The paths of the two files.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = {"settings": dict(settings or {}), "classes": list(classes), "runs": {}}
    rows: list[list[Any]] = []
    for run, results in runs.items():
        stored["runs"][run] = domains = {}
        for result in results:
            role = "unseen" if result.name in unseen else "source"
            scores = {name: _finite(value) for name, value in _scores(result).items()}
            iou = [_finite(value) for value in result.confusion.iou().tolist()]
            domains[result.name] = {
                "role": role,
                **scores,
                "iou": dict(zip(classes, iou, strict=True)),
                "images": result.images,
                "seconds": round(result.seconds, 3),
                "confusion": result.confusion.matrix.tolist(),
            }
            rows.append([run, result.name, role, *scores.values(), *iou, result.images])
    json_path, csv_path = folder / "results.json", folder / "results.csv"
    json_path.write_text(json.dumps(stored, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    header = ["run", "domain", "role", "miou", "pixel_accuracy", "class_accuracy", "fwiou", *classes, "images"]
    with csv_path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return json_path, csv_path


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
