"""Label spaces: which classes there are, their colours, and how one space maps to another.

A label map is a uint8 array ``[H, W]`` of class ids ``0 .. num_classes - 1`` with 255 for "ignore".  To add a space,
add one entry to ``SPACES``; whatever can be mapped to it or from it is written in the ``to`` of the finer space.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

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


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known name and the list of all."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (known: {', '.join(names) or 'none'})"


def get_space(name: str) -> LabelSpace:
    """The label space called ``name``.

    Raises:
        ValueError: there is none; the message suggests the nearest name and lists all.
    """
    if name not in SPACES:
        raise ValueError(f"unknown label space {name!r}{suggestion(name, SPACES)}")
    return SPACES[name]


def mapping(source: str, target: str) -> np.ndarray:
    """The look-up table from ids of one label space to ids of another.

    Args:
        source: name of the space of the files.
        target: name of the space to learn.

    Returns:
        uint8 ``[256]``: the target id of every source id, 255 for 255, ``INVALID`` (254) for values that the source
        space does not have, so that a reader can tell them from ignored pixels.

    Raises:
        ValueError: an unknown space, or no mapping between the two.
    """
    origin, goal = get_space(source), get_space(target)
    if source == target:
        ids: tuple[int, ...] = tuple(range(origin.num_classes))
    elif target in origin.to:
        ids = origin.to[target]
    else:
        reachable = ", ".join([source, *origin.to])
        raise ValueError(
            f"label space {source!r} ({origin.num_classes} classes) cannot be mapped to {target!r} "
            f"({goal.num_classes} classes); it maps to: {reachable}"
        )
    table = np.full(256, INVALID, np.uint8)
    table[: origin.num_classes] = ids
    table[IGNORE] = IGNORE
    return table


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
