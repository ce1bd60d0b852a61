"""The drawing surface of the generated streets: a pinhole camera and a map of primitive numbers.

Every primitive (a polygon, a stroke, an ellipse) is drawn once, as its own number, into one integer image, near over
far.  Its class, colour, material and plane stand in one row of a table.  Label and picture are both looked up from the
same number map, so that they agree pixel by pixel by construction.

World frame: X to the right, Y up, Z ahead of the camera, metres.  Image frame: u to the right, v down, pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[float, float, float]
Point = tuple[float, float, float]
Normal = tuple[float, float, float]

ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN = range(10)
SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(10, 19)
VOID = 255

# materials; the ground ones come first so that `material <= GRASS` means "lies on the ground"
ASPHALT, PAVING, GRASS, PLAIN, FACADE, BRICK, BARS, LEAVES, ROOF, GLASS, CLOUDS, LACQUER = range(12)

BLACK: Colour = (0.0, 0.0, 0.0)
UP: Normal = (0.0, 1.0, 0.0)
NEAR = 0.5  # metres; what lies nearer is moved to this distance
FAR = 400.0  # metres; the depth of the sky

# columns of the primitive table
LABEL, MATERIAL = 0, 1
ALBEDO, SECOND, EMIT = slice(2, 5), slice(5, 8), slice(8, 11)
PLANE = slice(11, 14)
AXIS = slice(14, 17)
NORMAL = slice(17, 20)
EXTRA = slice(20, 26)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along Z, its pitch expressed as the row of the horizon.

    Args:
        width, height: image size in pixels.
        focal: focal length in pixels.
        horizon: row of the horizon in pixels.
        elevation: height above the road in metres.
    """

    width: int
    height: int
    focal: float
    horizon: float
    elevation: float

    def project(self, point: Point) -> tuple[float, float]:
        """The pixel coordinates ``(u, v)`` of a world point; points nearer than ``NEAR`` are moved there."""
        scale = self.focal / max(point[2], NEAR)
        return 0.5 * self.width + point[0] * scale, self.horizon + (self.elevation - point[1]) * scale

    def pixels(self, metres: float, z: float) -> float:
        """How many pixels a length in metres takes at depth ``z``."""
        return metres * self.focal / max(z, NEAR)


@dataclass(frozen=True)
class Paint:
    """What a primitive is made of.

    Args:
        label: train id.
        colour: albedo, RGB in 0..1.
        material: which texture is laid over it.
        second: a second colour that the material uses (window panes, gaps of a fence).
        emit: light that it gives off, RGB in 0..1 and beyond.
        extra: up to six numbers for the material.  `FACADE`: window pitch and floor height in metres, pane width and
            height as fractions of them, 1 for brick, a random number.  `BARS`: pitch of the bars in metres, their share
            of it, height of the rail in metres.  `PAVING`: side of a slab in metres.
    """

    label: int
    colour: Colour
    material: int = PLAIN
    second: Colour = BLACK
    emit: Colour = BLACK
    extra: tuple[float, ...] = ()


class Canvas:
    """Collects primitives far to near; see the module docstring.

    Args:
        camera: the camera that everything is projected with.
        sun: unit vector towards the sun.
    """

    def __init__(self, camera: Camera, sun: Normal) -> None:
        self.camera = camera
        self.sun = sun
        size = (camera.width, camera.height)
        self.ids = Image.new("I", size, 0)
        self.sun_shadow = Image.new("L", size, 0)
        self.contact = Image.new("L", size, 0)
        self._draw = ImageDraw.Draw(self.ids)
        self._draw_shadow = ImageDraw.Draw(self.sun_shadow)
        self._draw_contact = ImageDraw.Draw(self.contact)
        self.rows: list[tuple[float, ...]] = []
        self.lamps: list[tuple[Point, float, Colour]] = []
        # primitive 0 is the sky: the number map starts out filled with it
        self._row(Paint(SKY, (0.6, 0.7, 0.8), CLOUDS), (0.0, 0.0, 1.0 / FAR), (1.0, 0.0, 0.0), UP)

    def table(self) -> np.ndarray:
        """The primitives as a float32 array ``[count, 26]``; columns as named at the top of the module."""
        return np.asarray(self.rows, dtype=np.float32)

    def _row(self, paint: Paint, plane: Point, axis: Point, normal: Normal) -> int:
        colours = (*paint.colour, *paint.second, *paint.emit)
        extra = (*paint.extra, *(0.0,) * (6 - len(paint.extra)))
        self.rows.append((paint.label, paint.material, *colours, *plane, *axis, *normal, *extra))
        return len(self.rows) - 1

    def ground(self, outline: Sequence[tuple[float, float]], paint: Paint, y: float = 0.0) -> None:
        """Fill a polygon of ``(X, Z)`` points that lies flat at height ``y`` metres."""
        camera = self.camera
        drop = camera.focal * max(camera.elevation - y, 0.05)
        number = self._row(paint, (0.0, 1.0 / drop, -camera.horizon / drop), (1.0, 0.0, 0.0), UP)
        self._draw.polygon([camera.project((x, y, z)) for x, z in outline], fill=number)

    def wall(self, start: tuple[float, float], end: tuple[float, float], y0: float, y1: float, paint: Paint) -> None:
        """Fill an upright rectangle over the ground line from ``start`` to ``end``, each ``(X, Z)``, metres."""
        self.upright(start, end, [(0.0, y0), (0.0, y1), (1.0, y1), (1.0, y0)], paint)

    def upright(
        self, start: tuple[float, float], end: tuple[float, float], outline: Sequence[tuple[float, float]], paint: Paint
    ) -> None:
        """Fill a polygon in the upright plane over a ground line.

        Args:
            start, end: ends ``(X, Z)`` of the ground line in metres.
            outline: ``(fraction of the line, height in metres)`` of each corner.
            paint: what it is made of.
        """
        camera = self.camera
        (x0, z0), (x1, z1) = start, end
        dx, dz = x1 - x0, z1 - z0
        length = math.hypot(dx, dz) or 1e-6
        dx, dz = dx / length, dz / length
        nx, nz = dz, -dx
        distance = nx * x0 + nz * z0
        if distance > 0:
            # the normal has to point at the camera, which stands at the origin
            nx, nz, distance = -nx, -nz, -distance
        distance = min(distance, -1e-3)
        plane = (
            nx / (camera.focal * distance),
            0.0,
            (nz - nx * 0.5 * camera.width / camera.focal) / distance,
        )
        number = self._row(paint, plane, (dx, dz, -(dx * x0 + dz * z0)), (nx, 0.0, nz))
        corners = [camera.project((x0 + (x1 - x0) * k, y, z0 + (z1 - z0) * k)) for k, y in outline]
        self._draw.polygon(corners, fill=number)

    def face(self, corners: Sequence[Point], paint: Paint, normal: Normal = (0.0, 0.0, -1.0)) -> None:
        """Fill a small polygon of world points; its depth is taken as constant."""
        z = max(sum(corner[2] for corner in corners) / len(corners), NEAR)
        number = self._row(paint, (0.0, 0.0, 1.0 / z), (1.0, 0.0, 0.0), normal)
        self._draw.polygon([self.camera.project(corner) for corner in corners], fill=number)

    def stroke(self, start: Point, end: Point, width: float, paint: Paint, end_width: float | None = None) -> None:
        """Draw a straight limb from ``start`` to ``end``, ``width`` metres wide (tapering to ``end_width``)."""
        camera = self.camera
        (u0, v0), (u1, v1) = camera.project(start), camera.project(end)
        length = math.hypot(u1 - u0, v1 - v0) or 1e-6
        first = 0.5 * camera.pixels(width, start[2])
        last = 0.5 * camera.pixels(width if end_width is None else end_width, end[2])
        du, dv = (v1 - v0) / length, (u0 - u1) / length
        z = max(0.5 * (start[2] + end[2]), NEAR)
        number = self._row(paint, (0.0, 0.0, 1.0 / z), (1.0, 0.0, 0.0), (-0.3, 0.3, -0.9))
        quad = [
            (u0 + du * first, v0 + dv * first),
            (u1 + du * last, v1 + dv * last),
            (u1 - du * last, v1 - dv * last),
            (u0 - du * first, v0 - dv * first),
        ]
        self._draw.polygon(quad, fill=number)

    def ellipse(self, centre: Point, radius_x: float, radius_y: float, paint: Paint) -> None:
        """Draw an ellipse that faces the camera, radii in metres."""
        camera = self.camera
        u, v = camera.project(centre)
        ru, rv = camera.pixels(radius_x, centre[2]), camera.pixels(radius_y, centre[2])
        number = self._row(paint, (0.0, 0.0, 1.0 / max(centre[2], NEAR)), (1.0, 0.0, 0.0), (-0.2, 0.4, -0.9))
        self._draw.ellipse((u - ru, v - rv, u + ru, v + rv), fill=number)

    def blob(self, centre: Point, outline: Sequence[tuple[float, float]], paint: Paint, normal: Normal) -> None:
        """Draw a ragged shape that faces the camera; ``outline``: offsets ``(right, up)`` from ``centre``, metres."""
        x, y, z = centre
        self.face([(x + du, y + dv, z) for du, dv in outline], paint, normal)

    def shadow(self, outline: Sequence[tuple[float, float]], height: float, base: float = 0.0) -> None:
        """Cast the sun shadow of an upright prism over the ground polygon ``outline`` of ``(X, Z)`` points.

        Args:
            outline: the footprint in metres.
            height: top of the prism in metres.
            base: bottom of the prism in metres.
        """
        if self.sun[1] <= 0.05:
            return
        project = self.camera.project
        dx, dz = -self.sun[0] / self.sun[1], -self.sun[2] / self.sun[1]
        low = [project((x + dx * base, 0.0, z + dz * base)) for x, z in outline]
        high = [project((x + dx * height, 0.0, z + dz * height)) for x, z in outline]
        for i in range(len(low)):
            j = (i + 1) % len(low)
            self._draw_shadow.polygon([low[i], low[j], high[j], high[i]], fill=255)
        if len(low) > 2:
            self._draw_shadow.polygon(high, fill=255)

    def touch(self, outline: Sequence[tuple[float, float]], strength: float = 0.6) -> None:
        """Darken the ground polygon below something that stands on it, whatever the weather."""
        corners = [self.camera.project((x, 0.0, z)) for x, z in outline]
        self._draw_contact.polygon(corners, fill=round(255 * strength))

    def lamp(self, place: Point, strength: float, colour: Colour) -> None:
        """Put a light source at ``place``; it lights its surroundings at night."""
        self.lamps.append((place, strength, colour))
