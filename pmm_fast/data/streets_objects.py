"""What stands and moves in the generated streets: vehicles, two-wheelers and people.

Every function draws one object in metres on the ground plane; ``place`` is its ``(X, Z)``, ``heading`` its direction in
radians (0: away from the camera, clockwise seen from above).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from pmm_fast.data.streets_canvas import (
    BICYCLE,
    BLACK,
    BUS,
    CAR,
    GLASS,
    LACQUER,
    MOTORCYCLE,
    PERSON,
    RIDER,
    TRAIN,
    TRUCK,
    Canvas,
    Colour,
    Paint,
    Point,
)

Place = tuple[float, float]

RUBBER: Colour = (0.09, 0.09, 0.1)
PANE: Colour = (0.16, 0.2, 0.24)
SKIN: tuple[Colour, ...] = ((0.86, 0.68, 0.56), (0.74, 0.54, 0.42), (0.5, 0.36, 0.28), (0.34, 0.24, 0.2))
CLOTHES: tuple[Colour, ...] = (
    (0.12, 0.13, 0.17),
    (0.22, 0.25, 0.36),
    (0.5, 0.5, 0.52),
    (0.8, 0.78, 0.74),
    (0.6, 0.18, 0.16),
    (0.2, 0.4, 0.34),
    (0.72, 0.58, 0.34),
    (0.3, 0.22, 0.18),
    (0.24, 0.42, 0.66),
)
CAR_COLOURS: tuple[Colour, ...] = (
    (0.85, 0.85, 0.86),
    (0.62, 0.64, 0.66),
    (0.34, 0.36, 0.39),
    (0.12, 0.12, 0.14),
    (0.62, 0.12, 0.12),
    (0.14, 0.24, 0.48),
    (0.74, 0.7, 0.6),
    (0.2, 0.34, 0.28),
    (0.8, 0.5, 0.14),
)
TRAM_COLOURS: tuple[Colour, ...] = (
    (0.78, 0.2, 0.14),
    (0.86, 0.84, 0.76),
    (0.2, 0.42, 0.36),
    (0.85, 0.68, 0.2),
    (0.3, 0.4, 0.56),
)
BUS_COLOURS: tuple[Colour, ...] = (
    (0.84, 0.72, 0.2),
    (0.66, 0.14, 0.16),
    (0.86, 0.86, 0.86),
    (0.2, 0.36, 0.6),
    (0.3, 0.5, 0.36),
)
CARGO_COLOURS: tuple[Colour, ...] = (
    (0.88, 0.88, 0.86),
    (0.3, 0.42, 0.62),
    (0.64, 0.6, 0.5),
    (0.72, 0.3, 0.2),
    (0.5, 0.52, 0.54),
)
TAIL: Colour = (0.62, 0.06, 0.06)
LAMP: Colour = (0.94, 0.93, 0.86)


def pick(rng: np.random.Generator, items: Sequence[Colour]) -> Colour:
    """One of ``items``, slightly changed so that no colour comes twice."""
    colour = items[int(rng.integers(len(items)))]
    return tint(colour, float(rng.normal(1.0, 0.08)))


def tint(colour: Colour, factor: float) -> Colour:
    """``colour`` made brighter or darker, kept within 0..1."""
    return (min(colour[0] * factor, 1.0), min(colour[1] * factor, 1.0), min(colour[2] * factor, 1.0))


class Frame:
    """A local frame on the ground: ``at(forward, up, right)`` gives world points.

    Args:
        place: ``(X, Z)`` of its origin in metres.
        heading: direction of its forward axis in radians.
    """

    def __init__(self, place: Place, heading: float) -> None:
        self.place = place
        self.sin, self.cos = math.sin(heading), math.cos(heading)

    def at(self, forward: float, up: float, right: float) -> Point:
        """The world point at local coordinates in metres."""
        x, z = self.place
        return (x + forward * self.sin + right * self.cos, up, z + forward * self.cos - right * self.sin)

    def facing(self, forward: float, up: float, right: float) -> Point:
        """The world direction of a local direction."""
        return (forward * self.sin + right * self.cos, up, forward * self.cos - right * self.sin)


# profiles: (forward, up) from the rear bumper over the roof to the front bumper, as fractions of length and height
PROFILES: dict[str, tuple[tuple[float, float], ...]] = {
    "sedan": ((0, 0.2), (0, 0.62), (0.16, 0.66), (0.28, 1), (0.58, 1), (0.74, 0.66), (0.98, 0.54), (1, 0.2)),
    "hatch": ((0, 0.2), (0, 0.62), (0.1, 0.98), (0.58, 1), (0.76, 0.66), (0.98, 0.54), (1, 0.2)),
    "suv": ((0, 0.24), (0, 0.6), (0.05, 0.98), (0.6, 1), (0.73, 0.64), (0.98, 0.58), (1, 0.24)),
    "van": ((0, 0.16), (0, 0.55), (0.02, 1), (0.72, 1), (0.9, 0.58), (0.99, 0.48), (1, 0.16)),
    "bus": ((0, 0.1), (0, 0.5), (0.01, 1), (0.98, 1), (1, 0.46), (1, 0.1)),
    "cargo": ((0, 0.28), (0, 0.6), (0, 1), (1, 1), (1, 0.6), (1, 0.28)),
    "cab": ((0, 0.14), (0, 0.55), (0.02, 0.96), (0.7, 1), (0.96, 0.56), (1, 0.14)),
    "tram": ((0, 0.1), (0, 0.42), (0.03, 0.96), (0.06, 1), (0.94, 1), (0.97, 0.96), (1, 0.42), (1, 0.1)),
}
# size: length, width, height in metres
SIZES: dict[str, tuple[float, float, float]] = {
    "sedan": (4.5, 1.8, 1.45),
    "hatch": (4.0, 1.75, 1.5),
    "suv": (4.6, 1.9, 1.72),
    "van": (5.2, 2.0, 2.3),
    "bus": (11.5, 2.55, 3.1),
    "cargo": (6.5, 2.5, 3.5),
    "cab": (2.0, 2.4, 2.9),
    "tram": (13.0, 2.4, 3.5),
}
# side windows of each body: (rear, front, low, high) as fractions, count of panes
WINDOWS: dict[str, tuple[float, float, float, float, int]] = {
    "sedan": (0.25, 0.66, 0.68, 0.94, 2),
    "hatch": (0.1, 0.68, 0.68, 0.94, 3),
    "suv": (0.07, 0.66, 0.66, 0.93, 3),
    "van": (0.66, 0.84, 0.6, 0.9, 1),
    "bus": (0.04, 0.95, 0.44, 0.86, 7),
    "cab": (0.35, 0.8, 0.58, 0.9, 1),
    "tram": (0.05, 0.95, 0.42, 0.84, 7),
}


def body(
    canvas: Canvas, kind: str, frame: Frame, start: float, label: int, colour: Colour, second: Colour, lit: float
) -> None:
    """Draw one box-like body extruded from its side profile.

    Args:
        canvas: what to draw on.
        kind: a key of ``PROFILES``.
        frame: the vehicle's frame.
        start: where the rear of the body is along the frame, metres.
        label: train id.
        colour, second: lacquer, and the stripe or skirt below the windows.
        lit: brightness of the lamps and of the windows of buses and trams.
    """
    length, width, height = SIZES[kind]
    half = 0.5 * width
    outline = [(start + a * length, y * height) for a, y in PROFILES[kind]]
    lacquer = Paint(label, colour, LACQUER)
    inside = (0.5 * lit, 0.45 * lit, 0.33 * lit) if kind in ("bus", "tram") else BLACK
    glass = Paint(label, PANE, GLASS, emit=inside)
    rubber = Paint(label, RUBBER)
    near_end = frame.cos >= 0
    end = start if near_end else start + length
    # tyres, and the dark underside between them
    skirt = outline[0][1] + 0.1
    for b0, b1, low in ((-half, half, 0.13), (-half, 0.24 - half, 0.0), (half - 0.24, half, 0.0)):
        canvas.face([frame.at(end, y, b) for b, y in ((b0, low), (b0, skirt), (b1, skirt), (b1, low))], rubber)
    strips = []
    for (a0, y0), (a1, y1) in pairwise(outline):
        normal = frame.facing(-(y1 - y0), a1 - a0, 0.0)
        middle = frame.at(0.5 * (a0 + a1), 0.5 * (y0 + y1), 0.0)
        away = normal[0] * middle[0] + normal[1] * (middle[1] - canvas.camera.elevation) + normal[2] * middle[2]
        if away < 0:
            strips.append((middle[2], a0, y0, a1, y1, normal))
    for _, a0, y0, a1, y1, normal in sorted(strips, reverse=True):
        scale = math.sqrt(normal[0] ** 2 + normal[1] ** 2 + normal[2] ** 2)
        unit = (normal[0] / scale, normal[1] / scale, normal[2] / scale)
        quad = [frame.at(a0, y0, -half), frame.at(a1, y1, -half), frame.at(a1, y1, half), frame.at(a0, y0, half)]
        canvas.face(quad, lacquer, unit)
        if kind not in ("cargo",) and abs(y1 - y0) > 0.2 * height and min(y0, y1) > 0.38 * height:
            _inset(canvas, quad, 0.1, 0.14, glass, unit)
    _end_details(canvas, kind, frame, end, near_end, label, second, lit)
    _side(canvas, kind, frame, start, outline, lacquer, glass, rubber, second)


def _inset(canvas: Canvas, quad: Sequence[Point], across: float, along: float, paint: Paint, normal: Point) -> None:
    """Fill a quad shrunk towards its centre: corners in the order low left, high left, high right, low right."""

    def mix(u: float, v: float) -> Point:
        weights = ((1 - u) * (1 - v), (1 - u) * v, u * v, u * (1 - v))
        x, y, z = (sum(w * p[k] for w, p in zip(weights, quad, strict=True)) for k in range(3))
        return (x, y, z)

    corners = [mix(across, along), mix(across, 1 - along), mix(1 - across, 1 - along), mix(1 - across, along)]
    canvas.face(corners, paint, normal)


def _end_details(
    canvas: Canvas, kind: str, frame: Frame, end: float, rear: bool, label: int, second: Colour, lit: float
) -> None:
    """Lamps, number plate and bumper of the end that faces the camera."""
    if kind == "cargo" or canvas.camera.pixels(1.0, frame.place[1]) < 5:
        return
    _, width, height = SIZES[kind]
    half = 0.5 * width
    y = (0.5 if kind in ("sedan", "hatch", "suv") else 0.24) * height
    size = 0.07 * height if height < 2 else 0.04 * height
    colour = TAIL if rear else LAMP
    emit = tint(colour, 1.0) if lit > 0 else BLACK
    if rear and lit > 0:
        emit = (1.0 * lit, 0.1 * lit, 0.08 * lit)
    normal = frame.facing(-1.0 if rear else 1.0, 0.0, 0.0)
    out = end + (-0.02 if rear else 0.02)
    for side in (-1, 1):
        b0, b1 = side * half * 0.72, side * half * 0.95
        corners = [frame.at(out, y - size, b0), frame.at(out, y + size, b0)]
        corners += [frame.at(out, y + size, b1), frame.at(out, y - size, b1)]
        canvas.face(corners, Paint(label, colour, emit=emit), normal)
        if lit > 0:
            strength, glow = (0.25, (1.0, 0.2, 0.15)) if rear else (0.7, (1.0, 0.95, 0.85))
            # some way off, or it would mostly light its own vehicle
            canvas.lamp(frame.at(out + (-1.0 if rear else 2.5), y, b0), strength * lit, glow)
    plate = [frame.at(out, 0.27 * height if height < 2 else 0.5, b) for b in (-0.26, 0.26)]
    upper = [(x, v + 0.12, z) for x, v, z in reversed(plate)]
    canvas.face([*plate, *upper], Paint(label, (0.86, 0.86, 0.82)), normal)
    low, high = (0.2 * height, 0.25 * height) if height < 2 else (0.1 * height, 0.15 * height)
    bumper = [
        frame.at(out, low, -half),
        frame.at(out, high, -half),
        frame.at(out, high, half),
        frame.at(out, low, half),
    ]
    canvas.face(bumper, Paint(label, tint(second, 0.6)), normal)


def _side(
    canvas: Canvas,
    kind: str,
    frame: Frame,
    start: float,
    outline: Sequence[tuple[float, float]],
    lacquer: Paint,
    glass: Paint,
    rubber: Paint,
    second: Colour,
) -> None:
    """The flank that faces the camera, with its windows, stripe and wheels."""
    length, width, height = SIZES[kind]
    x, z = frame.place
    side = -1.0 if x * frame.cos - z * frame.sin > 0 else 1.0
    b = side * 0.5 * width
    normal = frame.facing(0.0, 0.0, side)
    canvas.face([frame.at(a, y, b) for a, y in outline], lacquer, normal)

    def panel(a0: float, a1: float, y0: float, y1: float, paint: Paint) -> None:
        corners = ((a0, y0), (a0, y1), (a1, y1), (a1, y0))
        canvas.face([frame.at(start + a * length, y * height, b) for a, y in corners], paint, normal)

    if kind in ("bus", "tram", "cargo"):
        panel(
            0.0,
            1.0,
            0.14 if kind != "cargo" else 0.3,
            0.3 if kind != "cargo" else 0.36,
            replace(lacquer, colour=second),
        )
    if kind in WINDOWS:
        rear, front, low, high, count = WINDOWS[kind]
        step = (front - rear) / count
        # slanted pillars: the glass of a car is narrower at the roof
        lean = 0.06 if height < 2 else 0.0
        for i in range(count):
            a0, a1 = rear + step * i + 0.012, rear + step * (i + 1) - 0.012
            top0, top1 = a0 + (lean if i == 0 else 0.0), a1 - (lean if i == count - 1 else 0.0)
            corners = ((a0, low), (top0, high), (top1, high), (a1, low))
            canvas.face([frame.at(start + a * length, y * height, b) for a, y in corners], glass, normal)
    if kind == "tram":
        panel(0.06, 0.94, 0.02, 0.12, rubber)
        return
    radius = {"bus": 0.5, "cargo": 0.5, "cab": 0.5, "van": 0.36}.get(kind, 0.33)
    axles = {"cargo": (0.16, 0.34), "cab": (0.6,), "bus": (0.26, 0.82)}.get(kind, (0.17, 0.82))
    hub = replace(rubber, colour=(0.5, 0.5, 0.52))
    for axle in axles:
        centre = (start + axle * length, radius)
        canvas.face(_circle(frame, centre, radius, b * 1.01, 10), rubber, normal)
        canvas.face(_circle(frame, centre, 0.55 * radius, b * 1.02, 8), hub, normal)


def _circle(frame: Frame, centre: Place, radius: float, right: float, corners: int) -> list[Point]:
    """A wheel: a regular polygon in the frame's upright forward plane; ``centre`` is ``(forward, up)``."""
    angles = [2 * math.pi * k / corners for k in range(corners)]
    return [frame.at(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a), right) for a in angles]


def vehicle(
    canvas: Canvas, kind: str, place: Place, heading: float, rng: np.random.Generator, lit: float = 0.0
) -> None:
    """Draw a car, van, truck, bus or tram with its shadow.

    Args:
        canvas: what to draw on.
        kind: ``sedan``, ``hatch``, ``suv``, ``van``, ``truck``, ``bus`` or ``tram``.
        place: ``(X, Z)`` of its centre in metres.
        heading: its direction in radians.
        rng: draws its colours.
        lit: brightness of its lamps, 0 by day.
    """
    frame = Frame(place, heading)
    length, width = footprint(kind)
    corners = [(a * length / 2, b * width / 2) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    outline = [(p[0], p[2]) for p in (frame.at(a, 0.0, b) for a, b in corners)]
    height = SIZES["cargo" if kind == "truck" else kind][2]
    canvas.shadow(outline, height)
    canvas.touch(outline, 0.75)
    colour = pick(rng, CAR_COLOURS)
    second = pick(rng, CLOTHES)
    if kind == "truck":
        box = pick(rng, CARGO_COLOURS)
        parts = [("cargo", -length / 2, box), ("cab", length / 2 - SIZES["cab"][0], colour)]
        for part, start, paint in parts if heading_away(heading) is False else parts[::-1]:
            body(canvas, part, frame, start, TRUCK, paint, second, lit)
    elif kind == "tram":
        colour = pick(
            rng, ((0.78, 0.2, 0.14), (0.86, 0.84, 0.76), (0.2, 0.42, 0.36), (0.85, 0.68, 0.2), (0.3, 0.4, 0.56))
        )
        starts = [-length / 2, 0.3]
        for start in starts if not heading_away(heading) else starts[::-1]:
            body(canvas, "tram", frame, start, TRAIN, colour, tint(second, 1.3), lit)
        roof = Paint(TRAIN, (0.2, 0.2, 0.22))
        canvas.stroke(frame.at(-2.0, 3.5, 0.0), frame.at(-3.2, 4.3, 0.0), 0.08, roof)
        canvas.stroke(frame.at(-3.2, 4.3, 0.0), frame.at(-2.2, 5.1, 0.0), 0.08, roof)
        canvas.stroke(frame.at(-2.2, 5.1, -0.8), frame.at(-2.2, 5.1, 0.8), 0.1, roof)
    elif kind == "bus":
        colour = pick(
            rng, ((0.84, 0.72, 0.2), (0.66, 0.14, 0.16), (0.86, 0.86, 0.86), (0.2, 0.36, 0.6), (0.3, 0.5, 0.36))
        )
        body(canvas, "bus", frame, -length / 2, BUS, colour, tint(second, 1.2), lit)
    else:
        body(canvas, kind, frame, -length / 2, CAR, colour, (0.3, 0.3, 0.32), lit)


def footprint(kind: str) -> tuple[float, float]:
    """Length and width of a vehicle in metres."""
    if kind == "truck":
        return SIZES["cargo"][0] + SIZES["cab"][0] + 0.3, SIZES["cargo"][1]
    if kind == "tram":
        return 2 * SIZES["tram"][0] + 0.6, SIZES["tram"][1]
    return SIZES[kind][0], SIZES[kind][1]


def heading_away(heading: float) -> bool:
    """Whether the rear of something with this heading faces the camera."""
    return math.cos(heading) >= 0


def person(canvas: Canvas, place: Place, heading: float, rng: np.random.Generator) -> None:
    """Draw a standing or walking person, 1.1 to 1.9 m tall."""
    frame = Frame(place, heading)
    tall = float(rng.normal(1.72, 0.09)) if rng.random() < 0.88 else float(rng.uniform(1.1, 1.4))
    stride = float(rng.uniform(-0.16, 0.16)) * tall
    coat, trousers, skin = pick(rng, CLOTHES), pick(rng, CLOTHES[:4]), pick(rng, SKIN)
    hair = Paint(PERSON, pick(rng, ((0.1, 0.08, 0.07), (0.3, 0.2, 0.12), (0.6, 0.5, 0.34), (0.5, 0.5, 0.5))))
    x, z = place
    canvas.shadow([(x - 0.2, z), (x + 0.2, z)], tall)
    canvas.touch([(x - 0.25, z - 0.15), (x + 0.25, z - 0.15), (x + 0.25, z + 0.15), (x - 0.25, z + 0.15)], 0.45)
    cloth, skin_paint = Paint(PERSON, coat), Paint(PERSON, skin)
    # seen from the side a body is half as broad as from the front
    breadth = tall * (0.12 * abs(frame.cos) + 0.15)
    for side, swing in ((-1, 1), (1, -1)):
        hip, foot = frame.at(0, 0.5 * tall, side * 0.05 * tall), frame.at(swing * stride, 0.03, side * 0.06 * tall)
        canvas.stroke(hip, foot, 0.105 * tall, Paint(PERSON, tint(trousers, 1.0 + 0.1 * side)), 0.06 * tall)
        toe = (foot[0], 0.0, foot[2])
        canvas.ellipse(toe, 0.055 * tall, 0.03 * tall, Paint(PERSON, (0.12, 0.1, 0.1)))
    for side in (-1, 1):
        shoulder = frame.at(0, 0.8 * tall, side * 0.12 * tall)
        hand = frame.at(-side * stride * 0.9, 0.46 * tall, side * 0.16 * tall)
        canvas.stroke(shoulder, hand, 0.07 * tall, Paint(PERSON, tint(coat, 0.86)), 0.05 * tall)
        canvas.ellipse(hand, 0.025 * tall, 0.03 * tall, skin_paint)
    hem = float(rng.choice([0.48, 0.44, 0.32]))
    canvas.stroke(frame.at(0, hem * tall, 0), frame.at(0, 0.79 * tall, 0), breadth * 0.85, cloth, breadth)
    canvas.ellipse(frame.at(0, 0.79 * tall, 0), 0.5 * breadth, 0.045 * tall, cloth)
    if rng.random() < 0.25:
        back = -1 if heading_away(heading) else 1
        bag = frame.at(-0.06 * back, 0.66 * tall, 0)
        canvas.ellipse(bag, 0.09 * tall, 0.13 * tall, Paint(PERSON, pick(rng, CLOTHES)))
    canvas.stroke(frame.at(0, 0.81 * tall, 0), frame.at(0, 0.9 * tall, 0), 0.06 * tall, skin_paint)
    canvas.ellipse(frame.at(0, 0.925 * tall, 0), 0.06 * tall, 0.075 * tall, skin_paint)
    canvas.ellipse(frame.at(-0.01 * tall, 0.955 * tall, 0), 0.062 * tall, 0.048 * tall, hair)


def _wheel(canvas: Canvas, frame: Frame, forward: float, radius: float, thick: float, label: int, hub: Colour) -> None:
    """A free-standing wheel: a tyre that keeps its thickness when seen edge on."""
    tyre = Paint(label, RUBBER)
    canvas.stroke(frame.at(forward, 0.0, 0.0), frame.at(forward, 2 * radius, 0.0), thick, tyre)
    canvas.face(_circle(frame, (forward, radius), radius, 0.0, 14), tyre)
    canvas.face(_circle(frame, (forward, radius), radius - thick, 0.0, 12), Paint(label, hub))


def two_wheeler(
    canvas: Canvas, place: Place, heading: float, motor: bool, ridden: bool, rng: np.random.Generator, lit: float = 0.0
) -> None:
    """Draw a bicycle or a motorcycle, with its rider if ``ridden``.

    Args:
        canvas: what to draw on.
        place: ``(X, Z)`` of its centre in metres.
        heading: its direction in radians.
        motor: a motorcycle rather than a bicycle.
        ridden: whether somebody sits on it.
        rng: draws its colours.
        lit: brightness of its lamp, 0 by day.
    """
    frame = Frame(place, heading)
    colour = pick(rng, CAR_COLOURS)
    label = MOTORCYCLE if motor else BICYCLE
    ends = [frame.at(a, 0.0, 0.0) for a in (-0.9, 0.9)]
    canvas.shadow([(p[0], p[2]) for p in ends], 1.7 if ridden else 1.0)
    wide = [frame.at(a, 0.0, b) for a, b in ((-0.8, -0.12), (0.8, -0.12), (0.8, 0.12), (-0.8, 0.12))]
    canvas.touch([(p[0], p[2]) for p in wide], 0.5)
    paint, steel = Paint(label, colour, LACQUER), Paint(label, (0.32, 0.33, 0.35))
    if motor:
        for a in (-0.68, 0.68):
            _wheel(canvas, frame, a, 0.31, 0.14, label, (0.4, 0.4, 0.42))
        canvas.stroke(frame.at(-0.4, 0.42, 0), frame.at(0.4, 0.42, 0), 0.34, steel)
        canvas.stroke(frame.at(0.05, 0.78, 0), frame.at(0.5, 0.74, 0), 0.3, paint)
        canvas.stroke(frame.at(-0.85, 0.8, 0), frame.at(0.05, 0.74, 0), 0.2, Paint(label, (0.1, 0.1, 0.1)))
        canvas.stroke(frame.at(0.45, 0.95, 0), frame.at(0.7, 0.32, 0), 0.12, steel)
        canvas.stroke(frame.at(0, 0.3, 0), frame.at(0, 0.8, 0), 0.32, paint)
        bar, lamp_at = (0.42, 1.0, 0.36), 0.85
    else:
        for a in (-0.52, 0.52):
            _wheel(canvas, frame, a, 0.34, 0.06, label, (0.46, 0.46, 0.46))
        for a0, y0, a1, y1 in (
            (-0.52, 0.34, -0.18, 0.78),
            (-0.52, 0.34, -0.05, 0.3),
            (-0.05, 0.3, -0.2, 0.88),
            (-0.18, 0.78, 0.36, 0.8),
            (-0.05, 0.3, 0.38, 0.74),
            (0.52, 0.34, 0.34, 0.98),
        ):
            canvas.stroke(frame.at(a0, y0, 0), frame.at(a1, y1, 0), 0.055, paint)
        canvas.stroke(frame.at(-0.34, 0.91, 0), frame.at(-0.1, 0.91, 0), 0.1, Paint(label, (0.1, 0.1, 0.1)))
        bar, lamp_at = (0.36, 1.0, 0.26), 0.75
    canvas.stroke(frame.at(bar[0], bar[1], -bar[2]), frame.at(bar[0], bar[1], bar[2]), 0.07, steel)
    if ridden:
        _rider(canvas, frame, motor, rng)
    if lit > 0 and (motor or ridden):
        away = heading_away(heading)
        glow = (1.0, 0.12, 0.1) if away else (1.0, 0.95, 0.85)
        place3 = frame.at(-0.7 if away else 0.6, lamp_at, 0)
        canvas.ellipse(place3, 0.07, 0.07, Paint(label, TAIL if away else LAMP, emit=glow))
        canvas.lamp(place3, 0.25 * lit, glow)


def _rider(canvas: Canvas, frame: Frame, motor: bool, rng: np.random.Generator) -> None:
    """Somebody sitting on a two-wheeler, leaning towards the handlebar."""
    coat, trousers = pick(rng, CLOTHES), pick(rng, CLOTHES[:4])
    seat, shoulder = (-0.2, 0.92 if not motor else 0.84), (0.12, 1.42 if not motor else 1.36)
    knee_side = float(rng.uniform(-0.12, 0.12))
    breadth = 0.42 * abs(frame.cos) + 0.26 * abs(frame.sin)
    for side in (-1, 1):
        b = side * (0.1 if not motor else 0.17)
        knee = frame.at(0.2, 0.68 + side * knee_side, b * 1.2)
        foot = frame.at(0.0, 0.28 - side * knee_side, b)
        paint = Paint(RIDER, tint(trousers, 1.0 + 0.12 * side))
        canvas.stroke(frame.at(seat[0], seat[1], b), knee, 0.18, paint, 0.14)
        canvas.stroke(knee, foot, 0.14, paint, 0.1)
        canvas.stroke(foot, frame.at(0.12, 0.26 - side * knee_side, b), 0.09, Paint(RIDER, (0.1, 0.1, 0.1)))
    canvas.stroke(frame.at(*seat, 0), frame.at(*shoulder, 0), breadth * 0.85, Paint(RIDER, coat), breadth)
    skin = Paint(RIDER, pick(rng, SKIN))
    for side in (-1, 1):
        elbow = frame.at(0.3, 1.16, side * 0.26)
        canvas.stroke(
            frame.at(shoulder[0], shoulder[1] - 0.06, side * 0.19), elbow, 0.12, Paint(RIDER, tint(coat, 0.85))
        )
        canvas.stroke(elbow, frame.at(0.4, 1.03, side * 0.24), 0.1, Paint(RIDER, tint(coat, 0.85)), 0.08)
    head = frame.at(shoulder[0] + 0.08, shoulder[1] + 0.2, 0)
    canvas.ellipse(head, 0.1, 0.13, skin)
    if motor or rng.random() < 0.6:
        helmet = Paint(RIDER, pick(rng, CAR_COLOURS), LACQUER)
        top = frame.at(shoulder[0] + 0.07, shoulder[1] + 0.26, 0)
        canvas.ellipse(top, 0.13, 0.14 if motor else 0.09, helmet)
    else:
        canvas.ellipse(frame.at(shoulder[0] + 0.06, shoulder[1] + 0.26, 0), 0.105, 0.08, Paint(RIDER, (0.2, 0.14, 0.1)))
