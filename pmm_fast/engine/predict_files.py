"""Predictions of many images and videos, written to files: reading and writing go on beside the network."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pmm_fast.data.files import DataError
from pmm_fast.data.inputs import Input, read_upright
from pmm_fast.data.parallel import in_order
from pmm_fast.data.videos import VideoReader, VideoWriter
from pmm_fast.engine.predict import PredictionError, Predictor
from pmm_fast.engine.predict_record import Record, Wanted, frame_name
from pmm_fast.viz.predictions import Prediction

# decoding an image or drawing and encoding one takes longer than a GPU needs for it
THREADS = min(8, os.cpu_count() or 1)


def predict_files(
    predictor: Predictor, inputs: Sequence[Input], wanted: Wanted, record: Record, batch: int = 1
) -> list[str]:
    """Predict inputs one after the other, images first, and write what is wanted of each.

    Every file is whole or absent, and on record when all of its input's are written, so that a run which is stopped at
    any point can be called again.  Progress goes to stderr.

    Args:
        predictor: the network; keeps probabilities if they are wanted.
        inputs: what to predict on.
        wanted: what to write.
        record: of the folder, begun.
        batch: images of equal size, or frames, that go through the network together.

    Returns:
        A message for every input that could not be read or predicted; the others are done.

    Raises:
        OSError: a file could not be written.
    """
    images = [item for item in inputs if item.kind == "image"]
    failures = _predict_images(predictor, images, wanted, record, batch) if images else []
    for item in inputs:
        if item.kind == "video":
            try:
                _predict_video(predictor, item, wanted, record, batch)
            except DataError as error:
                failures.append(str(error))
            except PredictionError as error:
                failures.append(f"{item.path}: {error}")
    return failures


# --- images -------------------------------------------------------------------------------------------------------


def _predict_images(predictor: Predictor, items: list[Input], wanted: Wanted, record: Record, batch: int) -> list[str]:
    failures: list[str] = []
    waiting: deque[Future[None]] = deque()
    with (
        ThreadPoolExecutor(THREADS) as readers,
        ThreadPoolExecutor(THREADS) as writers,
        _bar(len(items), "images", "image") as bar,
    ):
        try:
            read = in_order(readers, _read, items, batch + THREADS)
            for group in _groups(read, batch, failures, bar):
                for item, prediction in _predict_group(predictor, group, failures, bar):
                    waiting.append(writers.submit(_save, item, prediction, wanted, record))
                while len(waiting) > batch + THREADS:
                    waiting.popleft().result()
                    bar.update()
            while waiting:
                waiting.popleft().result()
                bar.update()
        finally:
            # after an error or Ctrl-C only what is being written now is completed
            readers.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(cancel_futures=True)
    return failures


Read = tuple[Input, Image.Image]


def _read(item: Input) -> tuple[Input, Image.Image | DataError]:
    try:
        return item, read_upright(item.path)
    except DataError as error:
        return item, error


def _groups(
    read: Iterable[tuple[Input, Image.Image | DataError]], most: int, failures: list[str], bar: tqdm
) -> Iterator[list[Read]]:
    """Images of equal size that follow one another, ``most`` at most; those that cannot be read are failures."""
    group: list[Read] = []
    for item, image in read:
        if isinstance(image, DataError):
            failures.append(str(image))
            bar.update()
            continue
        if group and (len(group) == most or group[0][1].size != image.size):
            yield group
            group = []
        group.append((item, image))
    if group:
        yield group


def _predict_group(
    predictor: Predictor, group: list[Read], failures: list[str], bar: tqdm
) -> list[tuple[Input, Prediction]]:
    try:
        predictions = predictor.batch([image for _, image in group])
    except PredictionError as error:
        if len(group) > 1:
            # too many at once, perhaps
            return [pair for each in group for pair in _predict_group(predictor, [each], failures, bar)]
        failures.append(f"{group[0][0].path}: {error}")
        bar.update()
        return []
    return [(item, prediction) for (item, _), prediction in zip(group, predictions, strict=True)]


def _save(item: Input, prediction: Prediction, wanted: Wanted, record: Record) -> None:
    prediction.save(wanted.folder, item.name, wanted.kinds, wanted.alpha, wanted.ids)
    record.add(item, prediction.pixels().tolist())


# --- videos -------------------------------------------------------------------------------------------------------


def _predict_video(predictor: Predictor, item: Input, wanted: Wanted, record: Record, batch: int) -> None:
    pixels = np.zeros(predictor.space.num_classes, np.int64)
    done = 0
    with VideoReader(item.path) as video, ExitStack() as stack:
        films = {
            kind: stack.enter_context(VideoWriter(wanted.video_file(kind, item.name), video.rate))
            for kind in wanted.filmed
        }
        bar = stack.enter_context(_bar(video.frames or None, Path(item.name).name, "frame"))
        frames = iter(video)
        while images := list(islice(frames, batch)):
            for prediction in predictor.batch(images):
                for kind, film in films.items():
                    film.write(prediction.overlay(wanted.alpha) if kind == "overlay" else prediction.colours())
                if wanted.framed:
                    name = frame_name(item.name, done)
                    prediction.save(wanted.folder, name, wanted.framed, wanted.alpha, wanted.ids)
                pixels += prediction.pixels()
                done += 1
                bar.update()
    record.add(item, pixels.tolist(), done)
    if done < video.frames:
        print(f"{item.path}: {done} of about {video.frames} frames could be read", file=sys.stderr)


def _bar(total: int | None, title: str, unit: str) -> tqdm:
    # a line now and then where stderr is a file
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=title, unit=unit, mininterval=interval, dynamic_ncols=True)
