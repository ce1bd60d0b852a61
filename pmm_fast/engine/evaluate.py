"""Testing a network on labelled domains; ``engine.inference`` segments the images.

Shapes: ``K`` classes, ``H x W`` the label map.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from pmm_fast.config import EvalConfig, resolve_protocol
from pmm_fast.config.schema import MapillaryTest
from pmm_fast.data.convert_files import write_whole
from pmm_fast.data.files import DataError
from pmm_fast.data.parallel import THREADS, in_order
from pmm_fast.data.survey import evenly_spaced
from pmm_fast.engine.inference import image_seed, segment
from pmm_fast.engine.logging import progress_bar
from pmm_fast.engine.mapillary import mapillary_view
from pmm_fast.engine.metrics import Confusion
from pmm_fast.models import Segmentor

OnPrediction = Callable[[int, Image.Image, np.ndarray, np.ndarray], None]
"""Called with sample index, image, labels uint8 ``[H, W]`` and prediction uint8 ``[H, W]``."""


class Domain(Protocol):
    """What is tested on: a named sequence of images with labels."""

    @property
    def name(self) -> str:
        """Name of the domain."""

    @property
    def dataset(self) -> str:
        """Data set and variant, such as ``mapillary:v1.2``; empty for a plain folder."""

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


# --- domains ------------------------------------------------------------------------------------------------------


def evaluate_domain(
    model: Segmentor,
    domain: Domain,
    num_classes: int,
    settings: EvalConfig,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool = True,
    on_prediction: OnPrediction | None = None,
    threads: int = THREADS,
) -> DomainResult:
    """Test a network on a domain.

    Args:
        model: network on ``device``; it is in eval mode meanwhile, then as before.
        domain: the images and labels.
        num_classes: K.
        settings: the protocol; ``limit`` picks evenly spaced images.
        device: where to compute.
        amp_dtype: type of autocast; None: float32 throughout.
        seed: of the noise, under a protocol that has noise: every image draws its own from it.
        progress: show a progress bar on stderr, with the running mIoU.
        on_prediction: called for every image, e.g. to draw it.
        threads: images read ahead of the network, each in a thread.

    Returns:
        The pixel counts and how long it took.

    Raises:
        DataError: the domain is empty, or an image or label cannot be read or does not fit ``num_classes``; names
            domain and sample, or the file.
        ValueError: the network does not fit ``num_classes``, or fails on a sample, which is named.
    """
    protocol, indices = resolve_protocol(settings), evenly_spaced(len(domain), settings.limit)
    if not indices:
        raise DataError(f"domain {domain.name!r} has no images to test on")
    if model.num_classes != num_classes:
        raise ValueError(f"evaluate: the network has {model.num_classes} classes, the labels {num_classes}")
    confusion = Confusion(num_classes)
    training, start = model.training, time.perf_counter()
    model.eval()
    pool = ThreadPoolExecutor(max(1, threads))
    try:
        samples = in_order(pool, _loader(domain, protocol.mapillary), indices, max(1, threads) + 1)
        bar = progress_bar(domain.name, samples, len(indices), shown=progress)
        for index, (image, labels) in zip(indices, bar, strict=True):
            options = (labels.shape, protocol, device, amp_dtype, image_seed(seed, index))
            with _naming(domain.name, index, ValueError):
                prediction, _ = segment(model, image, *options, tile_batch=settings.tile_batch)
            with _naming(domain.name, index, DataError):
                confusion.update(prediction, torch.from_numpy(np.array(labels)).to(device))
            bar.set_postfix_str(f"mIoU {100 * confusion.miou():.1f}", refresh=False)
            if on_prediction is not None:
                on_prediction(index, image, labels, prediction.cpu().numpy())
    finally:
        pool.shutdown(cancel_futures=True)
        model.train(training)
    return DomainResult(domain.name, confusion, len(indices), time.perf_counter() - start)


@contextmanager
def _naming(domain: str, index: int, kind: type[ValueError]) -> Iterator[None]:
    """Says at which sample something went wrong, and whose fault it is by the type: a domain's, or a network's."""
    try:
        yield
    except ValueError as error:
        raise kind(f"domain {domain!r}, sample {index}: {error}") from error


def _loader(domain: Domain, variant: MapillaryTest) -> Callable[[int], tuple[Image.Image, np.ndarray]]:
    """``domain.load``, with Mapillary's images as its test has them."""
    if domain.dataset.partition(":")[0] != "mapillary":
        return domain.load
    return lambda index: mapillary_view(*domain.load(index), variant)


# --- files --------------------------------------------------------------------------------------------------------


SCORES = ("miou", "pixel_accuracy", "class_accuracy", "fwiou")
"""Scores that are written, each a method of ``Confusion``."""


def write_results(
    runs: Mapping[str, Sequence[DomainResult]],
    out_dir: str | Path,
    classes: Sequence[str],
    unseen: Collection[str] = (),
    settings: Mapping[str, Any] | None = None,
    protocol: str = "",
) -> tuple[Path, Path]:
    """Write ``results.json`` (everything, with the confusion matrices) and ``results.csv`` (a row a run and domain).

    Scores are shares in 0..1; a class without IoU is null in JSON and empty in CSV.  Files are replaced whole.

    Args:
        runs: name of each run to its results.
        out_dir: folder, made if missing.
        classes: class names.
        unseen: names of the domains that were never trained on; the others count as sources.
        settings: how it was tested, stored as it is in the JSON file.
        protocol: its name, for the CSV file.

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
            scores = {name: _finite(getattr(result.confusion, name)()) for name in SCORES}
            iou = [_finite(value) for value in result.confusion.iou().tolist()]
            domains[result.name] = {
                "role": role,
                **scores,
                "iou": dict(zip(classes, iou, strict=True)),
                "images": result.images,
                "seconds": round(result.seconds, 3),
                "confusion": result.confusion.matrix.tolist(),
            }
            rows.append([run, result.name, role, protocol, *scores.values(), *iou, result.images])
    json_path, csv_path = folder / "results.json", folder / "results.csv"
    header = ["run", "domain", "role", "protocol", *SCORES, *classes, "images"]
    text = json.dumps(stored, indent=1, allow_nan=False) + "\n"
    write_whole(json_path, lambda part: part.write_text(text, encoding="utf-8"))
    write_whole(csv_path, lambda part: _write_csv(part, [header, *rows]))
    return json_path, csv_path


def _write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
