"""Miniature trees of every data set in its true layout and encoding, and the labels that they must be read as.

What an id means is written here once more, by name and from the data sets' descriptions, so that a wrong table in the
package is seen.  ``make_tree`` writes a tree; the split lists of the package would miss almost all of their images, so
``use_small_lists`` puts lists of the miniature's images in their place.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_fast.data import split_lists

IGNORE = 255
Names = Mapping[str, tuple[str, ...]]
Expected = dict[str, dict[str, np.ndarray]]

CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "light", "sign", "vegetation", "terrain", "sky", "person",
    "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
COLOURS = [
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
    (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
]  # fmt: skip
# colours of GTA V's palettes that are no class, among them near misses
EXTRA_COLOURS = [
    (0, 0, 0), (111, 74, 0), (81, 0, 81), (250, 170, 160), (230, 150, 140), (180, 165, 180), (150, 100, 100),
    (150, 120, 90), (153, 153, 154), (0, 0, 90), (0, 0, 110),
]  # fmt: skip


def _ids(count: int, text: str) -> dict[int, int]:
    """The train id of every id of a data set: those of ``text`` ("7 road 8 sidewalk ..."), 255 for the rest."""
    words = text.split()
    return dict.fromkeys(range(count), IGNORE) | {
        int(number): CLASSES.index(name) for number, name in zip(words[::2], words[1::2], strict=True)
    }


CITYSCAPES = _ids(
    34,
    "7 road 8 sidewalk 11 building 12 wall 13 fence 17 pole 19 light 20 sign 21 vegetation 22 terrain 23 sky 24 person "
    "25 rider 26 car 27 truck 28 bus 31 train 32 motorcycle 33 bicycle",
)
SYNTHIA = _ids(
    23,
    "1 sky 2 building 3 road 4 sidewalk 5 fence 6 vegetation 7 pole 8 car 9 sign 10 person 11 bicycle 12 motorcycle "
    "15 light 16 terrain 17 rider 18 truck 19 bus 20 train 21 wall",
)
MAPILLARY = _ids(
    66,
    "13 road 24 road 41 road 2 sidewalk 15 sidewalk 17 building 6 wall 3 fence 45 pole 47 pole 48 light 50 sign "
    "30 vegetation 29 terrain 27 sky 19 person 20 rider 21 rider 22 rider 55 car 61 truck 54 bus 58 train "
    "57 motorcycle 52 bicycle",
)
TRAIN_IDS = dict.fromkeys([IGNORE], IGNORE) | {index: index for index in range(19)}
CAMVID = {index: index for index in range(11)} | {11: IGNORE}
IDD_LITE = {index: index for index in range(7)} | {IGNORE: IGNORE}
IDD_IGNORED = (
    "parking", "drivable fallback", "rail track", "animal", "autorickshaw", "caravan", "trailer", "vehicle fallback",
    "curb", "guard rail", "billboard", "polegroup", "obs-str-bar-fallback", "bridge", "tunnel", "fallback background",
    "unlabeled", "ego vehicle", "rectification border", "out of roi", "license plate",
)  # fmt: skip
# IDD's names, with the train id of each
IDD = {
    **{name: CLASSES.index(name) for name in CLASSES if name not in ("light", "sign", "terrain")},
    "traffic light": 6,
    "traffic sign": 7,
    "non-drivable fallback": 9,
    **dict.fromkeys(IDD_IGNORED, IGNORE),
    "cargroup": 13,
    "persongroup": 11,
}


# --- encodings ----------------------------------------------------------------------------------------------------


def codes(table: Mapping[int, int], size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A map in which every id of the table stands, and the train ids of it."""
    values = rng.permutation(np.resize(np.array(list(table)), size[0] * size[1])).reshape(size)
    wanted = np.zeros(256, np.uint8)
    wanted[list(table)] = list(table.values())
    return values.astype(np.uint8), wanted[values]


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png16(path: Path, values: np.ndarray, filters: tuple[int, ...] = (4, 3, 2, 1, 0)) -> None:
    """A 16-bit PNG, which Pillow cannot write: ``[H, W]`` grey, or ``[H, W, 3 | 4]``; the rows' filters in turn."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    step = 2 * channels
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)
    data, above = b"", np.zeros_like(rows[0])
    for number, row in enumerate(rows):
        left, corner = (np.concatenate([np.zeros(step, int), line[:-step]]) for line in (row, above))
        by_left, by_above, by_corner = abs(above - corner), abs(left - corner), abs(left + above - 2 * corner)
        paeth = np.where(by_above <= by_corner, above, corner)
        paeth = np.where((by_left <= by_above) & (by_left <= by_corner), left, paeth)
        kind = filters[number % len(filters)]
        guess = (0 * row, left, above, (left + above) // 2, paeth)[kind]
        data += bytes([kind]) + ((row - guess) % 256).astype(np.uint8).tobytes()
        above = row
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


Writer = Callable[[Path, tuple[int, int], np.random.Generator], np.ndarray]


def ids_file(table: Mapping[int, int], palette: bool = False) -> Writer:
    """8-bit ids, the palette of no meaning."""

    def write(path: Path, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        values, wanted = codes(table, size, rng)
        image = Image.fromarray(values)
        if palette:
            image = Image.fromarray(values, "P")
            image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
        image.save(path)
        return wanted

    return write


def palette_file(path: Path, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """GTA V: a palette PNG; the index means nothing, the colours are those of the classes, and others."""
    colours = np.array(COLOURS + EXTRA_COLOURS, np.uint8)
    order = rng.permutation(len(colours))
    index, _ = codes(dict.fromkeys(range(len(colours)), 0), size, rng)
    image = Image.fromarray(index, "P")
    image.putpalette(colours[order].tobytes())
    image.save(path)
    kind = order[index]
    return np.where(kind < len(COLOURS), kind, IGNORE).astype(np.uint8)


def colour_file(path: Path, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """KITTI: RGB in the colours of the classes, and others."""
    colours = np.array(COLOURS + EXTRA_COLOURS, np.uint8)
    kind, _ = codes(dict.fromkeys(range(len(colours)), 0), size, rng)
    Image.fromarray(colours[kind]).save(path)
    return np.where(kind < len(COLOURS), kind, IGNORE).astype(np.uint8)


def synthia_file(path: Path, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """SYNTHIA: 16 bits, three channels: class, instance, nothing."""
    values, wanted = codes(SYNTHIA, size, rng)
    channels = [values, rng.integers(0, 65536, size), np.zeros(size, int)]
    write_png16(path, np.stack(channels, -1))
    return wanted


def polygon_file(path: Path, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """IDD: rectangles of every label, later ones over earlier ones, one of them deleted, on nothing."""
    height, width = size
    wanted = np.full(size, IGNORE, np.uint8)
    objects = []
    for label in [*rng.permutation(sorted(IDD)), "road"]:
        y, x = int(rng.integers(height - 3)), int(rng.integers(width - 3))
        bottom, right = y + int(rng.integers(1, 4)), x + int(rng.integers(1, 4))
        corners = [[x, y], [right, y], [right, bottom], [x, bottom]]
        objects.append({"draw": True, "label": str(label), "polygon": [[float(a), float(b)] for a, b in corners]})
        wanted[y : bottom + 1, x : right + 1] = IDD[label]
    everything = [[0, 0], [width, 0], [width, height], [0, height]]
    objects.append({"label": "sky", "polygon": everything, "deleted": 1})
    path.write_text(json.dumps({"imgHeight": height, "imgWidth": width, "objects": objects}))
    return wanted


# --- trees --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """Where files lie: ``{split}`` is the split's folder, ``{name}`` the shared name, folders included."""

    image: str
    label: str
    write: Writer
    names: Names
    folders: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "val": "val", "test": "test"})
    extra: tuple[str, ...] = ()


GTAV = {"train": ("00001", "00002"), "val": ("00004",), "test": ("00005",)}
SYNTHIA_NAMES = {"train": ("0000001", "0000002"), "val": ("0000000",)}
CITIES = {"train": ("ulm/ulm_000000_000019", "ulm/ulm_000001_000019"), "val": ("lindau/lindau_000000_000019",)}
BDD = {"train": ("0004a4c0-d4dff0ad", "00054602-3bf57337"), "val": ("7d2f7975-e0c1c5a7",)}
VISTAS = {"train": ("_-3oZ0vrh4O5nv5HeJnqbA", "__1JqUxX0Vb1Q"), "val": ("_1Gn_xkw7sa_i9GU4mkxxQ",)}
SEQUENCES = {"train": ("0/frame0029", "12/000001"), "val": ("119/frame0100",)}
CAMVID_NAMES = {"train": ("0001TP_006690", "0001TP_006720"), "val": ("0016E5_07959",)}
KITTI = {"train": ("000001_10", "000002_10"), "val": ("000000_10",)}
LITE = {"train": ("0/024541", "0/024703"), "val": ("119/903127",)}

GTAV_FOLDERS = {"train": "train", "val": "valid", "test": "test"}
VISTAS_FOLDERS = {"train": "training", "val": "validation"}
CITY_EXTRA = ("_gtFine_color.png", "_gtFine_instanceIds.png")
CITY = "leftImg8bit/{split}/{name}_leftImg8bit"
FINE = "gtFine/{split}/{name}_gtFine_"
DEEP_CITY, DEEP_FINE = f"leftImg8bit_trainvaltest/{CITY}", f"gtFine_trainvaltest/{FINE}"


def _city_like(names: Names, extra: tuple[str, ...], **kinds: tuple[str, str, Writer]) -> dict[str, Tree]:
    return {
        f"{level}{kind}": Tree(image + suffix, f"{label}{kind}{end}", write, names, extra=extra)
        for level, image, label in (("trainvaltest, ", DEEP_CITY, DEEP_FINE), ("", CITY, FINE))
        for kind, (suffix, end, write) in kinds.items()
    }


# by data set and layout; those with a second part after ";" are the same layout in another arrangement
TREES: dict[str, dict[str, Tree]] = {
    "gtav": {
        "images + labels": Tree("images/{name}.png", "labels/{name}.png", palette_file, GTAV),
        "images + labels; split folders": Tree(
            "images/{split}/01/{name}.png", "labels/{split}/01/{name}.png", palette_file, GTAV, GTAV_FOLDERS
        ),
    },
    "synthia": {
        "RGB + GT/LABELS": Tree("RGB/{name}.png", "GT/LABELS/{name}.png", synthia_file, SYNTHIA_NAMES),
        "RGB + GT/LABELS; split folders": Tree(
            "RGB/{split}/{name}.png", "GT/LABELS/{split}/{name}.png", synthia_file, SYNTHIA_NAMES
        ),
    },
    "cityscapes": _city_like(
        CITIES,
        CITY_EXTRA,
        labelIds=(".png", ".png", ids_file(CITYSCAPES)),
        labelTrainIds=(".png", ".png", ids_file(TRAIN_IDS)),
    ),
    "bdd100k": {
        "images/10k + labels/sem_seg": Tree(
            "images/10k/{split}/{name}.jpg", "labels/sem_seg/masks/{split}/{name}.png", ids_file(TRAIN_IDS), BDD
        ),
        "seg": Tree(
            "seg/images/{split}/{name}.jpg", "seg/labels/{split}/{name}_train_id.png", ids_file(TRAIN_IDS), BDD
        ),
        "images + labels": Tree(
            "images/{split}/{name}.jpg", "labels/{split}/{name}_train_id.png", ids_file(TRAIN_IDS), BDD
        ),
    },
    "mapillary": {
        "v2.0 with v1.2": Tree(
            "{split}/images/{name}.jpg",
            "{split}/v1.2/labels/{name}.png",
            ids_file(MAPILLARY, palette=True),
            VISTAS,
            VISTAS_FOLDERS,
        ),
        "v1.2": Tree(
            "{split}/images/{name}.jpg",
            "{split}/labels/{name}.png",
            ids_file(MAPILLARY, palette=True),
            VISTAS,
            VISTAS_FOLDERS,
        ),
    },
    "idd": _city_like(
        SEQUENCES,
        (),
        labelcsTrainIds=(".png", ".png", ids_file(TRAIN_IDS)),
        polygons=(".jpg", ".json", polygon_file),
    ),
    "camvid": {
        "train + trainannot": Tree("{split}/{name}.png", "{split}annot/{name}.png", ids_file(CAMVID), CAMVID_NAMES)
    },
    "kitti": {
        "training/image_2 + training/semantic": Tree(
            "training/image_2/{name}.png", "training/semantic/{name}.png", ids_file(CITYSCAPES), KITTI
        ),
        "images + labels": Tree("images/{name}.jpg", "labels/{name}.png", colour_file, KITTI),
    },
    "idd_lite": {
        "leftImg8bit + gtFine": Tree(
            "leftImg8bit/{split}/{name}_image.jpg",
            "gtFine/{split}/{name}_label.png",
            ids_file(IDD_LITE),
            LITE,
            extra=("_inst_label.png",),
        ),
        "images + labels": Tree(
            "images/{split}/{name}_image.jpg", "labels/{split}/{name}_label.png", ids_file(IDD_LITE), LITE
        ),
    },
}
SPACE = dict.fromkeys(TREES, "cityscapes19") | {"camvid": "camvid11", "idd_lite": "idd_lite7"}
"""The label space in which ``make_tree`` says what is expected."""

SMALL_LISTS = {
    "gtav_train_released": GTAV["train"],
    "gtav_train_official": (*GTAV["train"], "00003"),
    "gtav_train_all": ("00001", "00002", "00003", "00004", "00005"),
    "gtav_val": GTAV["val"],
    "gtav_test": GTAV["test"],
    "synthia_train": SYNTHIA_NAMES["train"],
    "synthia_val": SYNTHIA_NAMES["val"],
    "kitti_semantics_train": KITTI["train"],
    "kitti_semantics_val": KITTI["val"],
}


def use_small_lists(monkeypatch: pytest.MonkeyPatch, folder: Path, **lists: tuple[str, ...]) -> None:
    """Let the split lists name the images of the miniatures; ``lists`` are others by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in (SMALL_LISTS | lists).items():
        (folder / f"{name}.txt").write_text("\n".join(entries))
    monkeypatch.setattr(split_lists, "LISTS", folder)


def colour_of(name: str) -> tuple[int, int, int]:
    """The one colour of an image, by its name, so that a mix-up is seen."""
    code = zlib.crc32(name.encode())
    return code & 255, code >> 8 & 255, code >> 16 & 255


def make_tree(
    root: Path, dataset: str, layout: str, images: Names | None = None, size: tuple[int, int] = (24, 32)
) -> Expected:
    """Write a tree.

    Args:
        root: the data set's folder.
        dataset: a key of ``TREES``.
        layout: one of its layouts.
        images: shared names, folders included, of each split; default: two for training, one for validation.
        size: height and width.

    Returns:
        For each split and name the labels to be read, uint8 ``[H, W]``, in the space ``SPACE[dataset]``.
    """
    tree = TREES[dataset][layout]
    expected: Expected = {}
    for split, names in (images or tree.names).items():
        expected[split] = {}
        for name in names:
            rng = np.random.default_rng(zlib.crc32(f"{split} {name}".encode()))
            image, label = (
                root / part.format(split=tree.folders[split], name=name) for part in (tree.image, tree.label)
            )
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size[::-1], colour_of(name)).save(image)
            expected[split][name] = tree.write(label, size, rng)
            for end in tree.extra:
                Image.new("L", size[::-1], 250).save(label.parent / (Path(name).name + end))
    return expected
