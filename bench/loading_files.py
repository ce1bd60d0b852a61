"""Image and label files of the true sizes and encodings, for ``python bench/data_loading.py``.

The pictures are generated streets, enlarged and with a camera's noise on top, so that the PNG files are about as large
as those of the data sets that they stand for: a decoder's time depends on it.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pmm_fast.config.schema import DomainConfig
from pmm_fast.data.labels import IGNORE, get_space
from pmm_fast.data.streets import render

VERSION = 1  # raised whenever the files change, so that no folder mixes two generations

# train id -> id in the files; what is ignored becomes the first of the ids that mean nothing
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
SYNTHIA_IDS = (3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11)
VOID = 0

Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """One sort of file.

    Attributes:
        name: as in the table.
        size: (W, H), pixels.
        street: the generated domain that the pictures come from.
        noise: standard deviation of the camera's noise, grey levels.
        suffix: of the image files.
        megabytes: what image files of the data set have, roughly, from and to.
        domain: how pmm_fast reads such files; the folder is still to be put in.
    """

    name: str
    size: tuple[int, int]
    street: str
    noise: float
    suffix: str
    megabytes: tuple[float, float]
    domain: DomainConfig


KINDS = {
    kind.name: kind
    for kind in (
        Kind("gtav", (1914, 1052), "noon", 0.8, ".png", (2.2, 2.8), DomainConfig(label_format="colours")),
        Kind(
            "synthia",
            (1280, 760),
            "suburb",
            0.8,
            ".png",
            (1.0, 1.5),
            DomainConfig(label_format="ids16", label_space="synthia_ids"),
        ),
        Kind("jpeg", (2048, 1024), "overcast", 3.0, ".jpg", (0.4, 0.8), DomainConfig(label_format="ids")),
    )
}


@dataclass(frozen=True)
class Files:
    """The files of a kind.

    Attributes:
        kind: which.
        root: folder that holds ``images`` and ``labels``.
        pairs: (image, label) of every sample, sorted.
    """

    kind: Kind
    root: Path
    pairs: list[tuple[Path, Path]]

    @property
    def size(self) -> tuple[int, int]:
        """(W, H) of the images."""
        return Image.open(self.pairs[0][0]).size

    def megabytes(self, which: int) -> float:
        """Mean size of the image files (0) or of the label files (1)."""
        return sum(pair[which].stat().st_size for pair in self.pairs) / len(self.pairs) / 1e6


def ensure_files(folder: Path, kind: Kind, count: int, shrink: int = 1) -> Files:
    """Make sure that the files of a kind lie on disk; they are drawn if they do not.

    Args:
        folder: where to keep them.
        kind: which files.
        count: images.
        shrink: divides both sides; 1 for what is to be measured.

    Returns:
        The files.
    """
    root = folder / f"loading-v{VERSION}" / f"{kind.name}-{kind.size[0] // shrink}x{kind.size[1] // shrink}-{count}"
    pairs = [(root / "images" / f"{i:05d}{kind.suffix}", root / "labels" / f"{i:05d}.png") for i in range(count)]
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        # made beside and renamed, so that the folder is either absent or whole
        part = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
        try:
            for name in ("images", "labels"):
                (part / name).mkdir()
            beside = [tuple(part / path.relative_to(root) for path in pair) for pair in pairs]
            with ProcessPoolExecutor(min(os.cpu_count() or 1, count)) as pool:
                made = pool.map(partial(_write, kind.name, shrink), range(count), beside)
                list(tqdm(made, f"drawing {kind.name} files", count, unit="image", leave=False))
            part.rename(root)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return Files(kind, root, pairs)


def _write(name: str, shrink: int, index: int, pair: tuple[Path, Path]) -> None:
    kind = KINDS[name]
    image, labels = draw(kind, index, shrink)
    if kind.suffix == ".jpg":
        image.save(pair[0], quality=92)
    else:
        image.save(pair[0])
    _LABEL_WRITERS[name](pair[1], labels)


def draw(kind: Kind, index: int, shrink: int = 1) -> tuple[Image.Image, Labels]:
    """A picture and its train ids ``[H, W]``: a scene of half the size, enlarged, with noise; part of it is ignored.

    Half of the noise's deviation is each channel's own, the rest is common to the three.
    """
    width, height = (side // shrink for side in kind.size)
    image, labels = render(kind.street, "bench", index, (height // 2, width // 2))
    levels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    rng = np.random.default_rng(index)
    grain = rng.standard_normal((height, width, 1), np.float32)
    grain = grain + 0.5 * rng.standard_normal((height, width, 3), np.float32)
    noisy = np.clip(levels + kind.noise * grain + 0.5, 0, 255).astype(np.uint8)
    enlarged = np.array(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    # where the camera's own car would be
    enlarged[-height // 12 :, width // 4 : -width // 4] = IGNORE
    return Image.fromarray(noisy), enlarged


# --- labels in the encodings of the data sets ---------------------------------------------------------------------


def _table(ids: tuple[int, ...]) -> NDArray[np.uint8]:
    """From train ids to the ids of a file."""
    table = np.full(256, VOID, np.uint8)
    table[: len(ids)] = ids
    return table


def write_palette(path: Path, labels: Labels) -> None:
    """GTAV: indices into a palette that has the Cityscapes colours, and black for what is ignored."""
    palette = np.zeros((256, 3), np.uint8)
    palette[list(CITYSCAPES_IDS)] = get_space("cityscapes19").colours
    image = Image.fromarray(_table(CITYSCAPES_IDS)[labels])
    image.putpalette(palette.tobytes())
    image.save(path)


def write_ids(path: Path, labels: Labels) -> None:
    """Train ids as they are, 8 bits."""
    Image.fromarray(labels).save(path)


def write_deep(path: Path, labels: Labels) -> None:
    """SYNTHIA: three channels of 16 bits, the first the class, the second the instance."""
    pixels = np.zeros((*labels.shape, 3), ">u2")
    pixels[..., 0] = _table(SYNTHIA_IDS)[labels]
    # some objects, numbered: their numbers compress worse than a constant
    pixels[..., 1] = np.where(labels >= 11, np.arange(labels.shape[1])[None, :] // 97 + 1, 0)
    pixels[..., 1][labels == IGNORE] = 0
    path.write_bytes(png48(pixels))


_LABEL_WRITERS: dict[str, Callable[[Path, Labels], None]] = {
    "gtav": write_palette,
    "synthia": write_deep,
    "jpeg": write_ids,
}


def png48(pixels: NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write.

    Each row gets the filter with the least sum of absolute differences, as libpng chooses it.

    Args:
        pixels: big-endian uint16 ``[H, W, 3]``.
    """
    height, width, _ = pixels.shape
    rows = pixels.view(np.uint8).reshape(height, width * 6).astype(np.int16)
    up = np.pad(rows, ((1, 0), (0, 0)))[:-1]
    left, corner = (np.pad(a, ((0, 0), (6, 0)))[:, :-6] for a in (rows, up))
    # the neighbour nearest to left + up - corner, the first of several
    distances = np.stack([np.abs(up - corner), np.abs(left - corner), np.abs(left + up - 2 * corner)])
    paeth = np.choose(distances.argmin(0), [left, up, corner])
    guesses = (np.zeros_like(rows), left, up, (left + up) // 2, paeth)
    filtered = np.stack([rows - guess for guess in guesses]).astype(np.uint8)
    best = np.abs(filtered.view(np.int8).astype(np.int16)).sum(2, dtype=np.int64).argmin(0)
    chosen = filtered[best, np.arange(height)]
    raw = np.concatenate([best[:, None].astype(np.uint8), chosen], 1).tobytes()

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 6)) + chunk(b"IEND", b"")
