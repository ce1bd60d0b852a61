"""The ways of loading that ``python bench/data_loading.py`` sets beside each other, and the check that they agree.

All draw the same images, crops and looks (:mod:`pmm_fast.data.sampling`), so they do the same work on the same files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench import released_loading as released
from bench.loading_files import Files
from pmm_fast import ops
from pmm_fast.config.schema import DataConfig
from pmm_fast.data import open_domain, transforms
from pmm_fast.data.loader import Batches as CropBatches
from pmm_fast.data.loader import make_loader
from pmm_fast.data.sampling import Batch, Iterations, Key, Sampling

SEED = 304
BATCH = 4  # images of a domain in an iteration
ENDLESS = 1_000_000  # iterations: more than will be asked for

# a crop against the released one, in grey levels: the most, and the share of values that differ at all (the sums of a
# bicubic filter that end near a half round either way; tests/data/test_transforms.py)
CROP_LEVELS, CROP_SHARE = 2, 5e-3
# a finished image against the released one, which cuts to whole levels where we round, and its rounding in float32
LOOK_LEVELS = 1 + 1e-3

Loader = Literal["torch", "dali"]
Batches = Generator[tuple[Tensor, ...], None, None]


@dataclass(frozen=True)
class Setting:
    """What is loaded.

    Attributes:
        files: from where.
        crop: (h, w).
        workers: processes, or DALI's threads.
    """

    files: Files
    crop: tuple[int, int]
    workers: int

    def config(self, loader: Loader) -> DataConfig:
        """The options that a user would give; scale, mirror, jitter and blur are the defaults."""
        name, root = self.files.kind.name, str(self.files.root)
        return DataConfig(
            sources=[name],
            unseen=[],
            domains={name: dataclasses.replace(self.files.kind.domain, root=root)},
            crop=list(self.crop),
            batch_per_domain=BATCH,
            workers=self.workers,
            loader=loader,
        )

    def iterations(self) -> Iterations:
        """Which sample comes when."""
        config = self.config("torch")
        sampling = Sampling([open_domain(self.files.kind.name, config, "train")], config, SEED)
        return Iterations(sampling, config, 0, ENDLESS)


Load = Callable[[Setting, Sampling, Key], tuple[Tensor, ...]]


# --- the pipelines ------------------------------------------------------------------------------------------------


class Samples(Dataset[tuple[Tensor, ...]]):
    """Samples by ``Key``, each made whole in the worker by a function of the setting, the sampling and the key."""

    def __init__(self, setting: Setting, sampling: Sampling, load: Load) -> None:
        self.setting, self.sampling, self.load = setting, sampling, load

    def __getitem__(self, key: Key) -> tuple[Tensor, ...]:
        return self.load(self.setting, self.sampling, key)


def load_released(setting: Setting, sampling: Sampling, key: Key) -> tuple[Tensor, ...]:
    """The released chain."""
    _, index, rng = sampling.pick(key)
    files = setting.files
    return released.load(files.kind.name, files.pairs[index], setting.crop, rng)


def load_pillow(setting: Setting, sampling: Sampling, key: Key) -> tuple[Tensor, ...]:
    """Our law in Pillow and NumPy, from beginning to end."""
    domain, index, rng = sampling.pick(key)
    image, labels = domain.load(index)
    return transforms.transform(image, labels, sampling.augment.draw(image.size, rng))


def _alone(_: int) -> None:
    torch.set_num_threads(1)


def _in_workers(setting: Setting, load: Load) -> Batches:
    iterations = setting.iterations()
    yield from DataLoader(
        Samples(setting, iterations.sampling, load),
        batch_sampler=iterations,
        num_workers=setting.workers,
        worker_init_fn=_alone,
        generator=torch.Generator(),
    )


def open_loader(setting: Setting, loader: Loader) -> CropBatches:
    """Crops and looks, as the trainer gets them; loading starts."""
    config = setting.config(loader)
    domains = [open_domain(setting.files.kind.name, config, "train")]
    return make_loader(domains, config, SEED, 0, ENDLESS).__iter__()


def finish(batch: Batch) -> Tensor:
    """The look of a batch, as the trainer applies it: float32 ``[N, 3, h, w]``, normalised."""
    images, looks = batch.images.flatten(0, 1), batch.looks.flatten(0, 1)
    return ops.photometric(images, looks, transforms.MEAN, transforms.STD)


def _finished(setting: Setting, loader: Loader) -> Batches:
    batches = open_loader(setting, loader)
    try:
        while True:
            batch = next(batches)
            yield finish(batch), batch.labels.flatten(0, 1)
    finally:
        batches.close()


LOADERS: dict[str, Callable[[Setting], CropBatches]] = {
    "torch": partial(open_loader, loader="torch"),
    "dali": partial(open_loader, loader="dali"),
}
PIPELINES: dict[str, Callable[[Setting], Batches]] = {
    "released": partial(_in_workers, load=load_released),
    "torch_pillow": partial(_in_workers, load=load_pillow),
    "torch": partial(_finished, loader="torch"),
    "dali": partial(_finished, loader="dali"),
}
"""Name to endless batches of normalised float32 images and labels."""


# --- the gate -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What the released chain makes of the first batch.

    Attributes:
        crops: uint8 ``[N, h, w, 3]``, before jitter.
        labels: uint8 ``[N, h, w]``.
        draws: what was random.
    """

    crops: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    draws: Sequence[released.Draw]


def expect(setting: Setting) -> Expected:
    """Load the first batch as released."""
    iterations = setting.iterations()
    crops, maps, draws = [], [], []
    for key in next(iter(iterations)):
        _, index, rng = iterations.sampling.pick(key)
        image_path, label_path = setting.files.pairs[index]
        image = released.read_image(image_path)
        labels = Image.fromarray(released.READERS[setting.files.kind.name](label_path))
        drawn = released.draw(image.size, setting.crop, rng)
        crops.append(np.asarray(released.scale_and_crop(image, drawn, setting.crop)))
        maps.append(np.asarray(released.scale_and_crop(labels, drawn, setting.crop)))
        draws.append(drawn)
    return Expected(np.stack(crops), np.stack(maps), draws)


def judge(name: str, setting: Setting, expected: Expected) -> tuple[bool, str]:
    """Whether a pipeline's first batch is what the released chain makes of the same draws, and how near it is.

    Labels must be equal and crops nearly.  Jitter can multiply a rounding error of the crop, so finished images are
    compared with what the released chain makes of the same crops.
    """
    if name in LOADERS:
        cropped = LOADERS[name](setting)
        batch = next(cropped)
        cropped.close()
        crops = batch.images.flatten(0, 1).permute(0, 2, 3, 1).numpy()
        images, labels = finish(batch), batch.labels.flatten(0, 1).numpy()
    else:
        crops = expected.crops if name == "released" else pillow_crops(setting)
        batches = PIPELINES[name](setting)
        images, maps = next(batches)[:2]
        batches.close()
        labels = maps.numpy()
    if crops.shape != expected.crops.shape or labels.shape != expected.labels.shape:
        return False, f"crops {list(crops.shape)}, labels {list(labels.shape)}; expected {list(expected.crops.shape)}"
    wrong = (labels != expected.labels).mean()
    difference = np.abs(crops.astype(int) - expected.crops)
    most, share = int(difference.max()), float((difference > 0).mean())
    deviation = torch.tensor(transforms.STD).view(3, 1, 1)
    wanted = [released.finish(Image.fromarray(crop), drawn) for crop, drawn in zip(crops, expected.draws, strict=True)]
    look = float(((images - torch.stack(wanted)).abs() * deviation * 255).max())
    # a NaN is not <= either
    fine = wrong == 0 and most <= CROP_LEVELS and share <= CROP_SHARE and look <= LOOK_LEVELS
    labels_text = f"{wrong:.2%} of the labels differ" if wrong else "labels equal"
    crops_text = f"crops within {most} grey levels ({share:.3%} of the values differ)"
    return fine, f"{labels_text}, {crops_text}, look within {look:.2f}"


def pillow_crops(setting: Setting) -> NDArray[np.uint8]:
    """The first batch's crops as the reference cuts them, uint8 ``[N, h, w, 3]``."""
    iterations = setting.iterations()
    sampling, crops = iterations.sampling, []
    for key in next(iter(iterations)):
        domain, index, rng = sampling.pick(key)
        image = domain.load_image(index)
        drawn = sampling.augment.draw(image.size, rng)
        crop = np.asarray(transforms.crop_image(image, drawn.window))
        crops.append(crop[:, ::-1] if drawn.mirror else crop)
    return np.stack(crops)
