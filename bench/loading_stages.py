"""Each stage of loading on its own, on one thread, for ``python bench/data_loading.py``."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import released_loading as released
from bench.loading_pipelines import Setting
from pmm_fast import ops
from pmm_fast.data import crop, transforms
from pmm_fast.data.folder import FolderDomain

# the least of so many counts
REPEATS = 2

Call = Callable[[], object]
Stages = dict[str, float]


@dataclass(frozen=True)
class Sample:
    """A sample at every stage of its way.

    Attributes:
        domain, index: where it is from.
        image: decoded.
        labels: as an image.
        drawn: what is random, as the released chain has it.
        ours: the same, as pmm_fast has it.
        crop: of the image, before jitter.
    """

    domain: FolderDomain
    index: int
    image: Image.Image
    labels: Image.Image
    drawn: released.Draw
    ours: transforms.Draw
    crop: Image.Image

    def factors(self) -> list[float]:
        """What jitter is given: three factors, and the shift of the hue in steps of 1/256 of the circle."""
        *factors, shift = self.drawn.factors
        return [*factors, int(shift * 255)]


def samples(setting: Setting, count: int) -> Iterator[Sample]:
    """The first samples of a setting's pipelines."""
    iterations = setting.iterations()
    sampling = iterations.sampling
    for key in itertools.islice(itertools.chain.from_iterable(iterations), count):
        domain, index, rng = sampling.pick(key)
        image, labels = domain.load(index)
        drawn = released.draw(image.size, setting.crop, rng)
        # the same numbers once more, in our form
        ours = sampling.augment.draw(image.size, sampling.pick(key)[2])
        cropped = Image.fromarray(crop.crop_drawn(image, ours))
        yield Sample(domain, index, image, Image.fromarray(labels), drawn, ours, cropped)


# --- a call for every stage -----------------------------------------------------------------------------------------


def released_calls(setting: Setting, sample: Sample) -> dict[str, Call]:
    """The released chain."""
    image_path, label_path = setting.files.pairs[sample.index]
    return {
        "image": partial(released.read_image, image_path),
        "labels": partial(released.READERS[setting.files.kind.name], label_path),
        "crop": partial(released.scale_and_crop, sample.image, sample.drawn, setting.crop),
        "label_crop": partial(released.scale_and_crop, sample.labels, sample.drawn, setting.crop),
        "jitter": partial(released.jitter, sample.crop, sample.drawn),
        "blur": partial(released.blur, sample.crop, sample.drawn.sigma),
        "normalise": partial(released.normalise, sample.crop),
    }


def reading_calls(sample: Sample) -> dict[str, Call]:
    """What our pipelines have in common."""
    labels, drawn = np.asarray(sample.labels), sample.ours
    return {
        "image": partial(sample.domain.load_image, sample.index),
        "labels": partial(sample.domain.load_labels, sample.index),
        "label_crop": partial(transforms.crop_labels, labels, drawn.window, drawn.mirror),
    }


def pillow_calls(setting: Setting, sample: Sample) -> dict[str, Call]:
    """Our law in Pillow and NumPy."""
    return reading_calls(sample) | {
        "crop": partial(transforms.crop_image, sample.image, sample.ours.window),
        "jitter": partial(transforms.colour_jitter, sample.crop, sample.factors(), sample.drawn.order),
        "blur": partial(transforms.gaussian_blur, np.asarray(sample.crop), sample.drawn.sigma),
        "normalise": partial(transforms.normalise, sample.crop),
    }


def torch_calls(setting: Setting, sample: Sample) -> dict[str, Call]:
    """The compiled crop, and the fused look: nothing but normalised, and with jitter or blur besides."""
    pixels = torch.from_numpy(np.array(sample.crop)).permute(2, 0, 1)[None]
    jitter, none = [*sample.drawn.order, *sample.factors()], [*transforms.NO_JITTER]
    looks = {"normalise": [*none, 0.0], "jitter": [*jitter, 0.0], "blur": [*none, sample.drawn.sigma]}
    calls = reading_calls(sample) | {"crop": partial(crop.crop_drawn, sample.image, sample.ours)}
    for stage, look in looks.items():
        calls[stage] = partial(ops.photometric, pixels, torch.tensor([look]), transforms.MEAN, transforms.STD)
    return calls


class DaliCalls:
    """As in torch, but DALI decodes, and only the part of the image that the crop depends on."""

    def __init__(self) -> None:
        self._pipeline: Any = None

    def __call__(self, setting: Setting, sample: Sample) -> dict[str, Call]:
        # here and not at the top: an extra
        from pmm_fast.data import dali

        if self._pipeline is None:
            self._pipeline = dali.build_pipeline(1, setting.crop, 1, torch.device("cpu"), resize=False)
        size, draw = sample.image.size, sample.ours
        box = transforms.footprint(size, draw.window)
        planned = dali.Sample(sample.domain, sample.index, size, draw, box)
        part = np.asarray(sample.image.crop(box))
        out = np.empty((*setting.crop, 3), np.uint8)
        return torch_calls(setting, sample) | {
            "image": partial(self._decode, dali.inputs([planned], resize=False)),
            "crop": partial(crop.resized_crop, part, size, box, draw.window, draw.mirror, out),
        }

    def _decode(self, inputs: dict[str, list[np.ndarray]]) -> object:
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)
        return self._pipeline.run()


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(setting: Setting, pipelines: list[str], count: int) -> dict[str, Stages]:
    """CPU milliseconds an image of every stage, by pipeline.

    Jitter is timed as if every image had it.  In the fused look a stage costs what it adds to normalising.

    Args:
        setting: what is loaded.
        pipelines: their names.
        count: samples that the means are over.
    """
    all_calls: dict[str, Callable[[Setting, Sample], dict[str, Call]]] = {
        "released": released_calls,
        "torch_pillow": pillow_calls,
        "torch": torch_calls,
        "dali": DaliCalls(),
    }
    found: dict[str, dict[str, list[float]]] = {name: {} for name in pipelines}
    for sample in samples(setting, count):
        for name in pipelines:
            for stage, call in all_calls[name](setting, sample).items():
                found[name].setdefault(stage, []).append(shortest(call))
    means = {name: {stage: statistics.mean(times) for stage, times in stages.items()} for name, stages in found.items()}
    for name in {"torch", "dali"} & set(pipelines):
        for stage in ("jitter", "blur"):
            means[name][stage] -= means[name]["normalise"]
    return means


def shortest(call: Call) -> float:
    """CPU milliseconds of a call, the least of a few."""
    found = []
    for _ in range(REPEATS):
        start = time.process_time_ns()
        call()
        found.append(time.process_time_ns() - start)
    return min(found) / 1e6
