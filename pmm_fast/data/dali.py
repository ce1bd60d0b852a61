"""The DALI loader: the samples of ``sampling``, their images read, decoded and (on a GPU) resampled by DALI.

Crops are drawn here, from the size in a file's header, before anything is decoded; so DALI decodes no more of an image
than the crop depends on, and no state of DALI's own enters a batch.  What is decoded on the CPU equals Pillow's image
bit for bit, and is cropped by the function of the torch loader.  On a GPU, DALI resamples and mirrors there: the crop
is Pillow's to within the rounding that ``tests/data/test_dali.py`` states, and reaches torch without passing through
the host.  Labels of every encoding are read by the domain's own reader, in threads: PNGs are decoded on the host
anyway, and DALI would expand palettes and cut 16 bits to 8.

A thread prepares batches ahead, at most ``PREFETCH`` of them.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from pmm_fast.data.crop import resized_crop
from pmm_fast.data.files import DataError, read_size
from pmm_fast.data.folder import FolderDomain
from pmm_fast.data.loader import PREFETCH
from pmm_fast.data.sampling import Batch, Iterations, Key, Sampling
from pmm_fast.data.transforms import Draw, crop_labels, footprint


@dataclass(frozen=True)
class Sample:
    """One sample of a batch, known before its files are decoded.

    Attributes:
        domain, index: the image.
        size: (W, H) of the image.
        draw: its transform.
        part: what of the image the crop depends on: left, top, right, bottom.
    """

    domain: FolderDomain
    index: int
    size: tuple[int, int]
    draw: Draw
    part: tuple[int, int, int, int]


class DaliLoader:
    """The batches of some iterations, by DALI.

    Args:
        iterations: which.
        workers: threads that decode; at least one is used.
        device: where batches are going; for a GPU, images are made there.
    """

    def __init__(self, iterations: Iterations, workers: int, device: torch.device) -> None:
        self._iterations, self._workers, self._device = iterations, max(1, workers), device

    def __len__(self) -> int:
        return len(self._iterations)

    def __iter__(self) -> _Ahead:
        return _Ahead(self._batches())

    def _batches(self) -> Generator[Batch]:
        with (
            ThreadPoolExecutor(self._workers) as pool,
            closing(Assembly(self._iterations.sampling, self._workers, self._device, pool)) as assembly,
        ):
            for keys in self._iterations:
                yield assembly.batch(keys)


class _Ahead(Iterator[Batch]):
    """Runs a generator in a thread, at most ``PREFETCH`` results ahead; an error arrives in its place."""

    def __init__(self, batches: Generator[Batch]) -> None:
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH)
        self._stop = threading.Event()
        # a function that does not know this object: it must be able to die while the thread runs
        arguments = (batches, self._ready, self._stop)
        self._thread = threading.Thread(target=_run, args=arguments, name="pmm_fast loader", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            try:
                raise item
            finally:
                # its traceback holds this frame, and this frame would hold it
                del item
        if item.images.is_cuda:
            # made on the loader's stream; its memory must not be reused while the caller's works on it
            item.images.record_stream(torch.cuda.current_stream(item.images.device))
        return item

    def close(self) -> None:
        """Stop loading, and wait until the thread has."""
        self._stop.set()
        self._thread.join()

    def __del__(self) -> None:
        self._stop.set()


def _run(batches: Generator[Batch], ready: queue.Queue[Batch | BaseException], stop: threading.Event) -> None:
    """The thread: batches into the queue while there is room, until all are made, one fails, or it is stopped."""

    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        with closing(batches):
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
        put(StopIteration())
    except BaseException as error:
        put(error)


class Assembly:
    """Makes batches: plans samples, has images decoded, reads labels, and puts them together.

    Args:
        sampling: what the samples are.
        threads: for DALI.
        device: of the images.
        pool: for what DALI does not do.
        resize: whether DALI resamples, or the pool; default: on a GPU.
    """

    def __init__(
        self,
        sampling: Sampling,
        threads: int,
        device: torch.device,
        pool: ThreadPoolExecutor,
        resize: bool | None = None,
    ) -> None:
        self._sampling, self._threads, self._device, self._pool = sampling, threads, device, pool
        self._resize = device.type == "cuda" if resize is None else resize
        # one for all batches: torch has few, and keeps memory apart by stream
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pipeline: Pipeline | None = None
        self._sizes: dict[Path, tuple[int, int]] = {}

    def close(self) -> None:
        """Let go of DALI's pipeline here and now: its threads would not survive a fork that collects it later."""
        self._pipeline = None

    def batch(self, keys: Sequence[Key]) -> Batch:
        """The batch of an iteration's keys.

        Raises:
            DataError: a file is at fault, as ``FolderDomain.load`` would say it.
        """
        samples = [self._plan(key) for key in keys]
        height, width = self._sampling.augment.crop
        pinned = self._device.type == "cuda"
        labels = torch.empty((len(keys), height, width), dtype=torch.uint8, pin_memory=pinned)
        looks = torch.from_numpy(np.stack([sample.draw.look for sample in samples]))
        pending = [
            self._pool.submit(_read_labels, sample, out.numpy()) for sample, out in zip(samples, labels, strict=True)
        ]
        images = self._images(samples)
        for future in pending:
            future.result()
        domains = len(self._sampling.domains)
        images, labels, looks = (part.unflatten(0, (domains, -1)) for part in (images, labels, looks))
        return Batch(images.permute(0, 1, 4, 2, 3), labels, looks.pin_memory() if pinned else looks)

    def _plan(self, key: Key) -> Sample:
        domain, index, rng = self._sampling.pick(key)
        size = self._size(domain, index)
        draw = self._sampling.augment.draw(size, rng, key.strong)
        return Sample(domain, index, size, draw, footprint(size, draw.window))

    def _size(self, domain: FolderDomain, index: int) -> tuple[int, int]:
        path = domain.pairs[index][0]
        if path not in self._sizes:
            try:
                self._sizes[path] = read_size(path)
            except DataError as error:
                raise DataError(f"domain {domain.name!r}: {error}") from error
        return self._sizes[path]

    def _images(self, samples: Sequence[Sample]) -> torch.Tensor:
        """uint8 ``[N, h, w, 3]`` on the device."""
        if self._pipeline is None:
            self._pipeline = build_pipeline(
                len(samples), self._sampling.augment.crop, self._threads, self._device, self._resize
            )
        for name, values in inputs(samples, self._resize).items():
            self._pipeline.feed_input(name, values)
        fault = None
        try:
            (output,) = self._pipeline.run()
        except RuntimeError as error:
            fault = _explain(error, samples)
        # not from within the handler: DALI's error holds the pipeline by its traceback
        if fault is not None:
            raise fault
        if self._resize:
            return self._own(output)
        height, width = self._sampling.augment.crop
        images = torch.empty((len(samples), height, width, 3), dtype=torch.uint8)
        jobs = [
            self._pool.submit(
                resized_crop,
                np.asarray(output.at(i)),
                sample.size,
                sample.part,
                sample.draw.window,
                sample.draw.mirror,
                images[i].numpy(),
            )
            for i, sample in enumerate(samples)
        ]
        for job in jobs:
            job.result()
        return images

    def _own(self, output: Any) -> torch.Tensor:
        """A dense output as a tensor of its own: DALI's memory is the next run's."""
        if self._device.type == "cpu":
            return torch.from_dlpack(output.as_tensor()).clone()
        assert self._stream is not None
        # on a stream of the loader's, which DALI's tensor makes wait for its own, and training never waits for
        with torch.cuda.stream(self._stream):
            own = torch.from_dlpack(output.as_tensor()).clone()
        self._stream.synchronize()
        return own


def _explain(error: RuntimeError, samples: Sequence[Sample]) -> DataError:
    """What DALI stumbled over, which does not say the file: in the words of the domain's reader, if it does too."""
    for sample in samples:
        try:
            sample.domain.load_image(sample.index)
        except DataError as reason:
            return DataError(f"domain {sample.domain.name!r}: {reason}")
    files = ", ".join(dict.fromkeys(str(sample.domain.pairs[sample.index][0]) for sample in samples))
    lines = [line.strip() for line in str(error).splitlines()]
    said = lines[lines.index("encountered:") + 2] if "encountered:" in lines[:-2] else lines[0]
    return DataError(f"DALI failed on one of {files}, which Pillow can read (--loader torch does): {said}")


def _read_labels(sample: Sample, out: np.ndarray) -> None:
    try:
        labels = sample.domain.load_labels(sample.index, sample.size)
    except DataError as error:
        raise DataError(f"domain {sample.domain.name!r}: {error}") from error
    out[:] = crop_labels(labels, sample.draw.window, sample.draw.mirror)


def inputs(samples: Sequence[Sample], resize: bool) -> dict[str, list[np.ndarray]]:
    """What the pipeline is fed for some samples: its inputs by name, a small array a sample."""
    fed: dict[str, list[np.ndarray]] = {}

    def feed(name: str, values: Any, dtype: type) -> None:
        fed.setdefault(name, []).append(np.array(values, dtype))

    for sample in samples:
        path, _ = sample.domain.pairs[sample.index]
        left, top, right, bottom = sample.part
        feed("path", np.frombuffer(os.fsencode(path), np.uint8), np.uint8)
        feed("start", (top, left), np.int32)
        feed("shape", (bottom - top, right - left), np.int32)
        if not resize:
            continue
        window = sample.draw.window
        x0, y0, x1, y1 = window.visible()
        across, down = sample.size[0] / window.scaled[0], sample.size[1] / window.scaled[1]
        feed("size", (y1 - y0, x1 - x0), np.float32)
        feed("roi_start", (y0 * down - top, x0 * across - left), np.float32)
        feed("roi_end", (y1 * down - top, x1 * across - left), np.float32)
        feed("corner", (window.top - y0, window.left - x0), np.int32)
        feed("mirror", sample.draw.mirror, np.int32)
    return fed


def build_pipeline(batch: int, crop: tuple[int, int], threads: int, device: torch.device, resize: bool) -> Pipeline:
    """DALI's part: the footprint of each crop, and from it the crop if ``resize``.

    Returns:
        A pipeline of one output, uint8 ``[h, w, 3]`` a sample (the footprint's size without ``resize``).
    """
    on_gpu = device.type == "cuda"
    index = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
    # batches are kept ahead by the thread; each run is then one batch from beginning to end
    pipeline = Pipeline(batch, threads, index, prefetch_queue_depth=1, exec_pipelined=False, exec_async=False)
    with pipeline:
        images = fn.decoders.image_slice(
            fn.io.file.read(_vector("path", types.UINT8)),
            start=_vector("start", types.INT32),
            shape=_vector("shape", types.INT32),
            axes=(0, 1),
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            # as Pillow decodes them; the second is for GPUs, a CPU does it anyway
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
        if resize:
            images = fn.resize(
                images,
                size=_vector("size", types.FLOAT),
                roi_start=_vector("roi_start", types.FLOAT),
                roi_end=_vector("roi_end", types.FLOAT),
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )
            images = fn.slice(
                images,
                start=_vector("corner", types.INT32),
                shape=list(crop),
                axes=(0, 1),
                out_of_bounds_policy="pad",
                fill_values=0,
            )
            images = fn.flip(images, horizontal=fn.external_source(name="mirror", ndim=0, dtype=types.INT32))
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _vector(name: str, dtype: Any) -> Any:
    return fn.external_source(name=name, ndim=1, dtype=dtype)
