"""What stands beside the generated streets: trees, lamps, poles, traffic lights, signs, hedges, bins."""

from __future__ import annotations

import math

import numpy as np

from pmm_fast.data.streets_canvas import (
    BLACK,
    LACQUER,
    LEAVES,
    LIGHT,
    POLE,
    SIGN,
    VEGETATION,
    VOID,
    Canvas,
    Colour,
    Paint,
)
from pmm_fast.data.streets_objects import Place, pick, tint

WHITE: Colour = (0.92, 0.92, 0.9)
RED: Colour = (0.8, 0.1, 0.1)
BLUE: Colour = (0.1, 0.26, 0.66)
YELLOW: Colour = (0.94, 0.76, 0.12)
GREEN: Colour = (0.06, 0.42, 0.28)
SODIUM: Colour = (1.0, 0.78, 0.48)


def pole(canvas: Canvas, place: Place, height: float, width: float, colour: Colour) -> None:
    """Draw a bare upright pole with its shadow; height and width in metres."""
    x, z = place
    canvas.stroke((x, 0.0, z), (x, height, z), width, Paint(POLE, colour), 0.7 * width)
    canvas.shadow([(x - 0.5 * width, z), (x + 0.5 * width, z)], height)
    canvas.touch([(x - 0.2, z - 0.15), (x + 0.2, z - 0.15), (x + 0.2, z + 0.15), (x - 0.2, z + 0.15)], 0.4)


def street_lamp(canvas: Canvas, place: Place, reach: float, colour: Colour, lit: float) -> None:
    """Draw a street lamp whose arm reaches ``reach`` metres to the right (negative: left)."""
    x, z = place
    height = 7.0
    pole(canvas, place, height, 0.18, colour)
    paint = Paint(POLE, colour)
    canvas.stroke((x, height - 0.1, z), (x + reach, height + 0.4, z), 0.12, paint)
    head = (x + reach, height + 0.35, z)
    emit = tint(SODIUM, 1.0) if lit > 0 else BLACK
    side = math.copysign(0.45, reach)
    canvas.stroke((x + reach - side, height + 0.35, z), (x + reach + side, height + 0.4, z), 0.2, Paint(POLE, colour))
    canvas.stroke(
        (x + reach - side, height + 0.25, z), (x + reach + side, height + 0.3, z), 0.1, Paint(POLE, WHITE, emit=emit)
    )
    if lit > 0:
        canvas.lamp(head, 1.6 * lit, SODIUM)


def traffic_light(canvas: Canvas, place: Place, colour: Colour, overhead: float, rng: np.random.Generator) -> None:
    """Draw a traffic light on its pole; ``overhead`` metres is the reach of an arm over the road, 0 for none."""
    x, z = place
    height = 5.6 if overhead else 3.4
    pole(canvas, place, height, 0.16, colour)
    on = int(rng.integers(3))
    facing = rng.random() < 0.8
    _signal_head(canvas, (x, 2.75, z), on, facing)
    if overhead:
        canvas.stroke((x, height - 0.1, z), (x + overhead, height, z), 0.13, Paint(POLE, colour))
        _signal_head(canvas, (x + overhead, height - 0.2, z), on, facing)


def _signal_head(canvas: Canvas, centre: tuple[float, float, float], on: int, facing: bool) -> None:
    """The three-lamp box; ``on`` counts from the top, ``facing`` tells whether the lamps look at the camera."""
    x, y, z = centre
    half, tall = 0.19, 0.52
    shade = (0.1, 0.11, 0.11) if facing else (0.2, 0.22, 0.2)
    corners = [(x - half, y - tall, z), (x - half, y + tall, z), (x + half, y + tall, z), (x + half, y - tall, z)]
    canvas.face(corners, Paint(LIGHT, shade))
    if not facing:
        return
    for k, colour in enumerate(((1.0, 0.16, 0.1), (1.0, 0.7, 0.1), (0.1, 0.95, 0.5))):
        lamp = colour if k == on else tint(colour, 0.22)
        spot = (x, y + 0.33 - 0.33 * k, z)
        # a burning lamp gives off light in any weather
        canvas.ellipse(spot, 0.13, 0.13, Paint(LIGHT, lamp, emit=tint(lamp, 0.9) if k == on else BLACK))
        if k == on:
            canvas.lamp((x, spot[1], z - 0.3), 0.12, colour)


def traffic_sign(canvas: Canvas, place: Place, colour: Colour, rng: np.random.Generator) -> None:
    """Draw one or two traffic signs of a random kind on their pole."""
    x, z = place
    height = float(rng.uniform(2.3, 3.0))
    pole(canvas, place, height + 0.3, 0.09, colour)
    for k in range(2 if rng.random() < 0.3 else 1):
        _plate(canvas, x, height - 0.75 * k, z - 0.02, int(rng.integers(7)), float(rng.uniform(0.32, 0.42)))


def _plate(canvas: Canvas, x: float, y: float, z: float, kind: int, r: float) -> None:
    """One plate: ban, command, warning, stop, priority, parking, grey back."""
    if kind in (0, 1):
        rim, field = ((RED, WHITE), (WHITE, BLUE))[kind]
        canvas.ellipse((x, y, z), r, r, Paint(SIGN, rim))
        canvas.ellipse((x, y, z), 0.74 * r, 0.74 * r, Paint(SIGN, field))
        mark = Paint(SIGN, (0.1, 0.1, 0.1) if kind == 0 else WHITE)
        canvas.stroke((x, y - 0.35 * r, z), (x, y + 0.35 * r, z), 0.25 * r, mark)
    elif kind == 2:
        for scale, paint in ((1.15, Paint(SIGN, RED)), (0.7, Paint(SIGN, WHITE))):
            s = scale * r
            canvas.blob((x, y, z), [(-s, -0.7 * s), (0, s), (s, -0.7 * s)], paint, (0, 0, -1))
        canvas.stroke((x, y - 0.2 * r, z), (x, y + 0.3 * r, z), 0.18 * r, Paint(SIGN, (0.1, 0.1, 0.1)))
    elif kind == 3:
        for scale, paint in ((1.0, Paint(SIGN, WHITE)), (0.9, Paint(SIGN, RED))):
            ring = [
                (scale * r * math.cos(a), scale * r * math.sin(a)) for a in [math.pi * (k + 0.5) / 4 for k in range(8)]
            ]
            canvas.blob((x, y, z), ring, paint, (0, 0, -1))
        canvas.stroke((x - 0.6 * r, y, z), (x + 0.6 * r, y, z), 0.35 * r, Paint(SIGN, WHITE))
    elif kind == 4:
        for scale, paint in ((1.1, Paint(SIGN, WHITE)), (0.8, Paint(SIGN, YELLOW))):
            s = scale * r
            canvas.blob((x, y, z), [(-s, 0), (0, s), (s, 0), (0, -s)], paint, (0, 0, -1))
    elif kind == 5:
        canvas.blob((x, y, z), [(-r, -r), (-r, r), (r, r), (r, -r)], Paint(SIGN, BLUE), (0, 0, -1))
        canvas.stroke((x - 0.25 * r, y - 0.6 * r, z), (x - 0.25 * r, y + 0.6 * r, z), 0.25 * r, Paint(SIGN, WHITE))
        canvas.ellipse((x + 0.05 * r, y + 0.3 * r, z), 0.34 * r, 0.34 * r, Paint(SIGN, WHITE))
    else:
        canvas.ellipse((x, y, z), r, r, Paint(SIGN, (0.55, 0.56, 0.57)))


def direction_board(canvas: Canvas, place: Place, colour: Colour, rng: np.random.Generator) -> None:
    """Draw a large direction board on two posts."""
    x, z = place
    half, low, high = float(rng.uniform(0.9, 1.5)), 2.2, float(rng.uniform(3.3, 4.2))
    for side in (-0.6, 0.6):
        pole(canvas, (x + side * half, z), low + 0.2, 0.12, colour)
    field = (BLUE, GREEN, YELLOW, WHITE)[int(rng.integers(4))]
    text = Paint(SIGN, WHITE if field != WHITE and field != YELLOW else (0.1, 0.1, 0.12))
    for inset, paint in ((0.0, Paint(SIGN, WHITE)), (0.07, Paint(SIGN, field))):
        x0, x1, y0, y1 = x - half + inset, x + half - inset, low + inset, high - inset
        canvas.face([(x0, y0, z), (x0, y1, z), (x1, y1, z), (x1, y0, z)], paint)
    for k in range(2):
        y = high - 0.4 - 0.5 * k
        canvas.stroke((x - 0.7 * half, y, z), (x + float(rng.uniform(0.1, 0.7)) * half, y, z), 0.16, text)


def hedge(canvas: Canvas, start: Place, end: Place, height: float, leaf: Colour, rng: np.random.Generator) -> None:
    """Draw a hedge along a ground line, its top uneven; height in metres."""
    length = math.hypot(end[0] - start[0], end[1] - start[1])
    count = max(3, min(14, round(length)))
    tops = (height * rng.uniform(0.86, 1.1, count + 1)).tolist()
    outline = [(0.0, 0.0), *[(k / count, top) for k, top in enumerate(tops)], (1.0, 0.0)]
    canvas.upright(start, end, outline, Paint(VEGETATION, leaf, LEAVES))


def bin_or_box(canvas: Canvas, place: Place, rng: np.random.Generator) -> None:
    """Draw a litter bin or a switch box; both are outside the 19 classes (void)."""
    x, z = place
    half, height = float(rng.uniform(0.25, 0.5)), float(rng.uniform(0.8, 1.3))
    colour = pick(rng, ((0.2, 0.3, 0.24), (0.5, 0.5, 0.5), (0.3, 0.3, 0.34), (0.55, 0.38, 0.16)))
    canvas.shadow([(x - half, z), (x + half, z)], height)
    canvas.touch([(x - half, z - 0.1), (x + half, z - 0.1), (x + half, z + 0.5), (x - half, z + 0.5)], 0.6)
    canvas.wall((x - half, z), (x + half, z), 0.0, height, Paint(VOID, colour, LACQUER))
    canvas.wall((x - half * 1.1, z), (x + half * 1.1, z), height * 0.9, height, Paint(VOID, tint(colour, 0.7)))


def tree(canvas: Canvas, place: Place, height: float, conifer: bool, leaf: Colour, rng: np.random.Generator) -> None:
    """Draw a tree, trunk and crown both vegetation; ``height`` in metres."""
    x, z = place
    bark = Paint(VEGETATION, pick(rng, ((0.3, 0.24, 0.18), (0.36, 0.32, 0.27), (0.24, 0.2, 0.17))))
    canvas.stroke((x, 0.0, z), (x, 0.55 * height, z), 0.05 * height, bark, 0.03 * height)
    canvas.touch([(x - 0.3, z - 0.3), (x + 0.3, z - 0.3), (x + 0.3, z + 0.3), (x - 0.3, z + 0.3)], 0.5)
    if conifer:
        for k in range(5):
            low, half = (0.14 + 0.16 * k) * height, (0.24 - 0.042 * k) * height
            paint = Paint(VEGETATION, tint(leaf, 0.62 + 0.08 * k), LEAVES)
            ragged = [(u * half, low - 0.0 + abs(float(rng.normal(0, 0.02))) * height) for u in (-1, -0.5, 0, 0.5, 1)]
            ragged += [
                (0.22 * half, low + 0.2 * height),
                (0.0, low + 0.27 * height),
                (-0.22 * half, low + 0.2 * height),
            ]
            canvas.blob((x, 0.0, z), ragged, paint, (-0.2, 0.4, -0.9))
        spread, low = 0.24 * height, 0.15 * height
    else:
        spread, low = _crown(canvas, x, z, height, leaf, bark, rng)
    ring = [(x + spread * math.cos(a), z + spread * math.sin(a)) for a in (0.3, 1.3, 2.3, 3.3, 4.3, 5.3)]
    canvas.shadow(ring, 0.8 * height, low)
    canvas.shadow([(x - 0.15, z), (x + 0.15, z)], low)


def _crown(
    canvas: Canvas, x: float, z: float, height: float, leaf: Colour, bark: Paint, rng: np.random.Generator
) -> Place:
    """The crown of a broad-leaved tree, dark clusters behind and light ones above; returns (spread, lowest leaf)."""
    spread = height * float(rng.uniform(0.24, 0.36))
    middle = height * float(rng.uniform(0.62, 0.7))
    for side in (-1, 1):
        canvas.stroke((x, 0.4 * height, z), (x + side * 0.5 * spread, middle, z), 0.025 * height, bark)
    count = 9 if canvas.camera.pixels(height, z) > 40 else 4
    angles = rng.uniform(0, 2 * math.pi, count)
    reach = np.sqrt(rng.uniform(0, 1, count)) * 0.62
    noise = rng.uniform(0.78, 1.18, (count, 14))
    spots = sorted(
        zip(angles.tolist(), reach.tolist(), noise.tolist(), strict=True), key=lambda s: math.sin(s[0]) * s[1]
    )
    for k, (angle, far, wobble) in enumerate(spots):
        radius = spread * (0.6 - 0.2 * far)
        ring = [
            (radius * w * math.cos(2 * math.pi * i / 14), 0.9 * radius * w * math.sin(2 * math.pi * i / 14))
            for i, w in enumerate(wobble)
        ]
        up = math.sin(angle) * far
        paint = Paint(VEGETATION, tint(leaf, 0.74 + 0.4 * k / max(count - 1, 1)), LEAVES)
        centre = (x + spread * far * math.cos(angle), middle + up * 0.36 * height, z)
        canvas.blob(centre, ring, paint, (math.cos(angle) * 0.6, 0.35 + 0.4 * up, -0.7))
    return spread, middle - 0.3 * height
