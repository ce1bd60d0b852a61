"""Predictions of many images and videos, written to files: reading and writing go on beside the network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from pmm_fast.data.files import DataError
from pmm_fast.data.inputs import Input, read_upright
from pmm_fast.data.parallel import THREADS, in_order
from pmm_fast.data.videos import VideoReader, VideoWriter
from pmm_fast.engine.logging import progress_bar
from pmm_fast.engine.predict import PredictionError, Predictor
from pmm_fast.engine.predict_record import Line, Record, Wanted, frame_name, identity
from pmm_fast.viz.predictions import Prediction


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
        A message for every input that could not be read or predicted, or is a video that ends early; the others are
        done.

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
        progress_bar("images", total=len(items), unit="image") as bar,
    ):
        try:
            read = in_order(readers, _read, items, batch + THREADS)
            for group in _groups(read, batch, failures, bar):
                found = _predict_batch(predictor, [each.image for each in group])
                for each, prediction in zip(group, found, strict=True):
                    if isinstance(prediction, PredictionError):
                        failures.append(f"{each.item.path}: {prediction}")
                        bar.update()
                        continue
                    waiting.append(writers.submit(_save, each, prediction, wanted, record))
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


def _predict_batch(predictor: Predictor, images: Sequence[Image.Image]) -> Iterator[Prediction | PredictionError]:
    """Predict images together or, where that fails, one by one: they may be too many at once."""
    try:
        yield from predictor.batch(images)
        return
    except PredictionError as error:
        if len(images) == 1:
            yield error
            return
    # outside of the handler, which holds on to what was on the device
    for image in images:
        yield from _predict_batch(predictor, [image])


class Read(NamedTuple):
    """An image, and which file it was."""

    item: Input
    identity: Line
    image: Image.Image


def _read(item: Input) -> Read | DataError:
    # first: a file that is replaced in between is done again
    which = identity(item)
    try:
        return Read(item, which, read_upright(item.path))
    except DataError as error:
        return error


def _groups(read: Iterable[Read | DataError], most: int, failures: list[str], bar: tqdm) -> Iterator[list[Read]]:
    """Images of equal size that follow one another, ``most`` at most; those that cannot be read are failures."""
    group: list[Read] = []
    for each in read:
        if isinstance(each, DataError):
            failures.append(str(each))
            bar.update()
            continue
        if group and (len(group) == most or group[0].image.size != each.image.size):
            yield group
            group = []
        group.append(each)
    if group:
        yield group


def _save(read: Read, prediction: Prediction, wanted: Wanted, record: Record) -> None:
    prediction.save(wanted.folder, read.item.name, wanted.kinds, wanted.alpha, wanted.ids)
    record.add(read.item, read.identity, wanted, prediction.pixels().tolist())


# --- videos -------------------------------------------------------------------------------------------------------


def _predict_video(predictor: Predictor, item: Input, wanted: Wanted, record: Record, batch: int) -> None:
    """Predict a video; of one that is cut off, what there is is written, but it is not on record as done.

    Raises:
        DataError: it cannot be read, or not to its end.
        PredictionError: a frame cannot be predicted.
    """
    pixels = np.zeros(predictor.space.num_classes, np.int64)
    done, which = 0, identity(item)
    with VideoReader(item.path) as video, ExitStack() as stack:
        films = {
            kind: stack.enter_context(VideoWriter(wanted.video_file(kind, item.name), video.rate))
            for kind in wanted.filmed
        }
        bar = stack.enter_context(progress_bar(Path(item.name).name, total=video.frames or None, unit="frame"))
        frames = iter(video)
        while images := list(islice(frames, batch)):
            for prediction in _predict_batch(predictor, images):
                if isinstance(prediction, PredictionError):
                    raise prediction
                for kind, film in films.items():
                    film.write(prediction.overlay(wanted.alpha) if kind == "overlay" else prediction.colours())
                if wanted.framed:
                    name = frame_name(item.name, done)
                    prediction.save(wanted.folder, name, wanted.framed, wanted.alpha, wanted.ids)
                pixels += prediction.pixels()
                done += 1
                bar.update()
    if _ends_early(done, video):
        raise DataError(f"{item.path}: cut off: only {done} of about {video.frames} frames could be read")
    record.add(item, which, wanted, pixels.tolist(), done)


def _ends_early(frames: int, video: VideoReader) -> bool:
    """Whether so many frames are missing that a video must be cut off.

    Many containers tell only how long they are, sound included, and at which rate frames come on average: what is
    missing may be a tenth of the frames, or those of half a second.
    """
    return frames < video.frames - max(video.frames / 10, video.rate / 2)
