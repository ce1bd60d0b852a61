"""What a network says about an image, as pictures and files.

Shapes: ``K`` classes, ``H x W`` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from pmm_fast.data.convert_files import write_whole
from pmm_fast.data.label_ids import ID_TABLES
from pmm_fast.data.labels import LabelSpace
from pmm_fast.viz.overlays import overlay

Kind = Literal["overlay", "colours", "ids", "confidence", "probabilities"]
Ids = Literal["train", "cityscapes"]

KINDS: tuple[Kind, ...] = get_args(Kind)
"""What can be saved of a prediction; each goes into a folder of its name."""

OPACITY = 0.55
_CITYSCAPES = "cityscapes_ids"


@dataclass(frozen=True)
class Prediction:
    """The segmentation of one image.

    Attributes:
        ids: uint8 ``[H, W]``, the most probable class of each pixel.
        confidence: float32 ``[H, W]``, the probability of that class.
        image: RGB, H x W.
        space: classes and colours.
        probabilities: float16 ``[K, H, W]`` of every class, or None where they were not asked for.
    """

    ids: np.ndarray
    confidence: np.ndarray
    image: Image.Image
    space: LabelSpace
    probabilities: np.ndarray | None = None

    def overlay(self, alpha: float = OPACITY) -> Image.Image:
        """The image under the colours of its classes, RGB.

        Args:
            alpha: opacity of the colours, 0..1.

        Raises:
            ValueError: ``alpha`` is not in 0..1.
        """
        return overlay(self.image, self.ids, self.space, alpha)

    def colours(self) -> Image.Image:
        """The classes in their colours: a palette image (mode P) whose indices are the class ids."""
        picture = Image.fromarray(self.ids)
        # a grey image becomes a palette image by it, its values indices
        picture.putpalette(np.array(self.space.colours, np.uint8).tobytes())
        return picture

    def id_map(self, ids: Ids = "train") -> Image.Image:
        """The class ids as a grey image (mode L).

        Args:
            ids: ``train``: positions in ``space.classes``; ``cityscapes``: the ids of Cityscapes' own label files,
                which its test server expects.

        Raises:
            ValueError: a class that Cityscapes does not have.
        """
        return Image.fromarray(self.ids if ids == "train" else cityscapes_ids(self.space)[self.ids])

    def confidence_map(self) -> Image.Image:
        """The confidence as a grey image (mode L): 0 black, 1 white."""
        return Image.fromarray((255 * self.confidence).round().astype(np.uint8))

    def pixels(self) -> np.ndarray:
        """The number of pixels of each class, int64 ``[K]``."""
        return np.bincount(self.ids.ravel(), minlength=self.space.num_classes)

    def save(
        self,
        folder: str | Path,
        name: str,
        kinds: Sequence[Kind] = ("overlay",),
        alpha: float = OPACITY,
        ids: Ids = "train",
    ) -> list[Path]:
        """Write files, each whole or not at all.

        Args:
            folder: where; folders are made.
            name: of the image, without extension; may hold ``/``.
            kinds: what of ``KINDS``: ``folder/KIND/name.png``, ``.npz`` for the probabilities.
            alpha: of the overlay.
            ids: of the id map.

        Returns:
            The files.

        Raises:
            ValueError: an unknown kind, or probabilities that were not kept.
            OSError: a file cannot be written; names it.
        """
        pictures: dict[str, Callable[[], Image.Image]] = {
            "overlay": lambda: self.overlay(alpha),
            "colours": self.colours,
            "ids": lambda: self.id_map(ids),
            "confidence": self.confidence_map,
        }
        files = [output_file(Path(folder), kind, name) for kind in kinds]
        for kind, file in zip(kinds, files, strict=True):
            if kind == "probabilities":
                write_whole(file, self._write_probabilities)
            else:
                _write_png(file, pictures[kind]())
        return files

    def _write_probabilities(self, part: Path) -> None:
        if self.probabilities is None:
            raise ValueError("probabilities were not kept: build the Predictor with probabilities=True")
        with part.open("wb") as file:
            np.savez_compressed(file, probabilities=self.probabilities, classes=np.array(self.space.classes))


def output_file(folder: Path, kind: Kind, name: str) -> Path:
    """Where an output of an image is written.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected {', '.join(KINDS)}, got {kind!r}")
    return folder / kind / f"{name}{'.npz' if kind == 'probabilities' else '.png'}"


def cityscapes_ids(space: LabelSpace) -> np.ndarray:
    """The id in Cityscapes' own label files of each class.

    Returns:
        uint8 ``[K]``.

    Raises:
        ValueError: a class that Cityscapes does not have.
    """
    names = ID_TABLES[_CITYSCAPES].names
    unknown = [name for name in space.classes if name not in names]
    if unknown:
        raise ValueError(
            f"label space {space.name}: its classes {', '.join(unknown)} have no ids in Cityscapes; "
            "only train ids can be written"
        )
    return np.array([names.index(name) for name in space.classes], np.uint8)


def _write_png(file: Path, picture: Image.Image) -> None:
    # 1 is three times as fast as Pillow's 6, for files a little larger
    write_whole(file, lambda part: picture.save(part, "PNG", compress_level=1))
