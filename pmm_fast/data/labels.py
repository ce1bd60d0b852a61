"""Label spaces: which classes there are, their colours, and how one space maps to another.

A label map is a uint8 array ``[H, W]`` of class ids ``0 .. num_classes - 1`` with 255 for "ignore".  To add a space,
add one entry to ``SPACES``; whatever can be mapped to it or from it is written in the ``to`` of the finer space.  The
ids in which data sets write their files are in ``label_ids``: they have no colours, and nothing is learnt in them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from pmm_fast.data.label_ids import ID_TABLES

IGNORE = 255
"""Label of pixels that count neither in a loss nor in a score."""

INVALID = 254
"""What ``mapping`` gives for ids that the source space does not have; no space has that many classes."""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LabelSpace:
    """A set of classes.

    Attributes:
        name: name of the space, as in ``data.label_space``.
        classes: class names; the position is the id.
        colours: RGB colour of each class, 0..255, all different; read from colour labels, drawn in overlays.
        to: for each coarser space, the id there of every class here (255 where it has none).
    """

    name: str
    classes: tuple[str, ...]
    colours: tuple[Colour, ...]
    to: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < len(self.classes) < INVALID:
            raise ValueError(f"label space {self.name}: expected 1 to {INVALID - 1} classes, got {len(self.classes)}")
        if len(self.colours) != len(self.classes) or len(set(self.colours)) != len(self.colours):
            raise ValueError(f"label space {self.name}: expected {len(self.classes)} different colours")
        for target, ids in self.to.items():
            if len(ids) != len(self.classes):
                raise ValueError(
                    f"label space {self.name}: to[{target!r}] needs {len(self.classes)} ids, got {len(ids)}"
                )

    @property
    def num_classes(self) -> int:
        """Number of classes, the ignore label not counted."""
        return len(self.classes)


def _space(name: str, table: Iterable[tuple[str, Colour]], **to: tuple[int, ...]) -> LabelSpace:
    classes, colours = zip(*table, strict=True)
    return LabelSpace(name, classes, colours, to)


SPACES: dict[str, LabelSpace] = {
    space.name: space
    for space in (
        _space(
            "cityscapes19",
            [
                ("road", (128, 64, 128)),
                ("sidewalk", (244, 35, 232)),
                ("building", (70, 70, 70)),
                ("wall", (102, 102, 156)),
                ("fence", (190, 153, 153)),
                ("pole", (153, 153, 153)),
                ("traffic light", (250, 170, 30)),
                ("traffic sign", (220, 220, 0)),
                ("vegetation", (107, 142, 35)),
                ("terrain", (152, 251, 152)),
                ("sky", (70, 130, 180)),
                ("person", (220, 20, 60)),
                ("rider", (255, 0, 0)),
                ("car", (0, 0, 142)),
                ("truck", (0, 0, 70)),
                ("bus", (0, 60, 100)),
                ("train", (0, 80, 100)),
                ("motorcycle", (0, 0, 230)),
                ("bicycle", (119, 11, 32)),
            ],
            idd_lite7=(0, 1, 5, 4, 4, 4, 4, 4, 5, 1, 6, 2, 2, 3, 3, 3, 3, 3, 3),
            # without terrain, truck and train
            synthia16=(0, 1, 2, 3, 4, 5, 6, 7, 8, IGNORE, 9, 10, 11, 12, IGNORE, 13, IGNORE, 14, 15),
            # wall is building, terrain is tree, larger vehicles are cars, all on two wheels is bicyclist
            camvid11=(3, 4, 1, 1, 7, 2, 6, 6, 5, 5, 0, 9, 10, 8, 8, 8, 8, 10, 10),
        ),
        _space(
            "synthia16",
            [
                ("road", (128, 64, 128)),
                ("sidewalk", (244, 35, 232)),
                ("building", (70, 70, 70)),
                ("wall", (102, 102, 156)),
                ("fence", (190, 153, 153)),
                ("pole", (153, 153, 153)),
                ("traffic light", (250, 170, 30)),
                ("traffic sign", (220, 220, 0)),
                ("vegetation", (107, 142, 35)),
                ("sky", (70, 130, 180)),
                ("person", (220, 20, 60)),
                ("rider", (255, 0, 0)),
                ("car", (0, 0, 142)),
                ("bus", (0, 60, 100)),
                ("motorcycle", (0, 0, 230)),
                ("bicycle", (119, 11, 32)),
            ],
        ),
        _space(
            "camvid11",
            [
                ("sky", (128, 128, 128)),
                ("building", (128, 0, 0)),
                ("pole", (192, 192, 128)),
                ("road", (128, 64, 128)),
                ("pavement", (60, 40, 222)),
                ("tree", (128, 128, 0)),
                ("sign symbol", (192, 128, 128)),
                ("fence", (64, 64, 128)),
                ("car", (64, 0, 128)),
                ("pedestrian", (64, 64, 0)),
                ("bicyclist", (0, 128, 192)),
            ],
        ),
        _space(
            "idd_lite7",
            [
                ("drivable", (128, 64, 128)),
                ("non-drivable", (244, 35, 232)),
                ("living things", (220, 20, 60)),
                ("vehicles", (0, 0, 142)),
                ("roadside objects", (220, 220, 0)),
                ("far objects", (107, 142, 35)),
                ("sky", (70, 130, 180)),
            ],
        ),
    )
}


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that ``name`` was perhaps meant to be, as a part of an error message; empty without one."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known name and the list of all."""
    names = sorted(known)
    return f"{nearest(name, names)} (known: {', '.join(names) or 'none'})"


def get_space(name: str) -> LabelSpace:
    """The label space called ``name``.

    Raises:
        ValueError: there is none; the message suggests the nearest name and lists all.
    """
    if name not in SPACES:
        raise ValueError(f"unknown label space {name!r}{suggestion(name, SPACES)}")
    return SPACES[name]


def num_ids(source: str) -> int:
    """How many ids, from 0, the files of a label space or id table may hold, the ignore label not counted.

    Raises:
        ValueError: neither a label space nor an id table is called ``source``.
    """
    if source in ID_TABLES:
        return len(ID_TABLES[source].names)
    if source not in SPACES:
        raise ValueError(f"unknown label space {source!r}{suggestion(source, [*SPACES, *ID_TABLES])}")
    return SPACES[source].num_classes


def mapping(source: str, target: str) -> np.ndarray:
    """The look-up table from the ids in files to the ids of a label space.

    The ids of a data set go to the space of its table, and from there to any coarser one.

    Args:
        source: name of the label space, or of the id table, of the files.
        target: name of the space to learn.

    Returns:
        uint8 ``[256]``: the target id of every source id, 255 for 255, ``INVALID`` (254) for values that the source
        does not have, so that a reader can tell them from ignored pixels.

    Raises:
        ValueError: an unknown space, or no mapping between the two.
    """
    count, goal = num_ids(source), get_space(target)
    ids = _targets(source, target)
    if ids is None:
        reachable = ", ".join(name for name in SPACES if _targets(source, name) is not None)
        raise ValueError(
            f"label space {source!r} ({count} classes) cannot be mapped to {target!r} "
            f"({goal.num_classes} classes); it maps to: {reachable}"
        )
    table = np.full(256, INVALID, np.uint8)
    table[:count] = ids
    table[IGNORE] = IGNORE
    return table


def _targets(source: str, target: str) -> tuple[int, ...] | None:
    """The target id of every source id; None where there is no way from one to the other."""
    if source == target:
        return tuple(range(SPACES[source].num_classes))
    if source in SPACES:
        return SPACES[source].to.get(target)
    table = ID_TABLES[source]
    ids = _targets(table.space, target)
    if ids is None:
        return None
    of: dict[str | None, int] = dict(zip(SPACES[table.space].classes, ids, strict=True))
    return tuple(of.get(name, IGNORE) for name in table.classes)


@lru_cache(maxsize=8)
def _palette(colours: tuple[Colour, ...]) -> np.ndarray:
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colours)] = colours
    return palette


def colourise(labels: np.ndarray, space: LabelSpace) -> np.ndarray:
    """Paint a label map in the colours of its space.

    Args:
        labels: uint8 ``[H, W]``, class ids.
        space: the space of the ids.

    Returns:
        uint8 ``[H, W, 3]`` RGB; ids that the space does not have, and 255, are black.

    Raises:
        ValueError: ``labels`` is not uint8 ``[H, W]``.
    """
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError(f"labels: expected uint8 [H, W], got {labels.dtype} {list(labels.shape)}")
    return _palette(space.colours)[labels]
