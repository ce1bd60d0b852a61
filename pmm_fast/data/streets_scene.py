"""Populates a generated street: traffic, parked vehicles, people, and the furniture of the sidewalk."""

from __future__ import annotations

import math

import numpy as np

from pmm_fast.data import streets_furniture as furniture
from pmm_fast.data import streets_objects as objects
from pmm_fast.data.streets_canvas import VOID, Camera, Canvas, Paint
from pmm_fast.data.streets_layout import Layout
from pmm_fast.data.streets_style import StreetStyle

CAR_KINDS = ("sedan", "hatch", "hatch", "suv", "van")


def draw_scene(style: StreetStyle, rng: np.random.Generator, size: tuple[int, int]) -> Canvas:
    """Lay out, populate and draw one scene.

    Args:
        style: the domain.
        rng: source of every choice.
        size: image height and width in pixels.

    Returns:
        The canvas with its number map complete.
    """
    height, width = size
    angle = math.radians(float(rng.uniform(*style.field_of_view)))
    camera = Camera(
        width,
        height,
        0.5 * width / math.tan(0.5 * angle),
        height * float(rng.uniform(*style.horizon)),
        float(rng.uniform(*style.camera_height)),
    )
    up = math.radians(float(rng.uniform(*style.sun_elevation)))
    around = math.radians(float(rng.uniform(*style.sun_azimuth)))
    sun = (math.sin(around) * math.cos(up), math.sin(up), math.cos(around) * math.cos(up))
    canvas = Canvas(camera, sun)
    layout = Layout(canvas, style, rng)
    layout.build()
    _traffic(layout)
    _two_wheelers(layout)
    _people(layout)
    for side in (-1, 1):
        _furniture(layout, side)
    layout.paint()
    if rng.random() < style.hood:
        _hood(canvas, layout)
    return canvas


def _distance(layout: Layout, near: float, far: float) -> float:
    """A distance along the street, near ones more likely, in metres."""
    return near + (far - near) * float(layout.rng.random()) ** 1.7


def _vehicle(layout: Layout, kind: str, s: float, z: float, away: bool) -> bool:
    """Queue a vehicle at a street position; False if the place is taken."""
    length, width = objects.footprint(kind)
    if z - 0.5 * length < 4.5 or not layout.free(s, z, 0.5 * width + 0.1, 0.5 * length + 0.8):
        return False
    slope = layout.yaw + 2 * layout.bend * z
    heading = math.atan(slope) + (0.0 if away else math.pi) + float(layout.rng.normal(0.0, 0.02))
    rng, place = layout.rng, layout.at(s, z)
    layout.add(z, objects.vehicle, layout.canvas, kind, place, heading, rng, layout.lit)
    return True


def _traffic(layout: Layout) -> None:
    """Trams, buses, trucks and cars in the lanes, parked cars, and cars in the cross streets."""
    rng, style = layout.rng, layout.style
    inner = 0.5 * layout.middle + 0.5 * layout.lane
    if layout.tram:
        away = rng.random() < 0.4
        _vehicle(layout, "tram", inner if away else -inner, _distance(layout, 22.0, 60.0), away)
    for kind, mean in (("bus", style.buses), ("truck", style.trucks)):
        for _ in range(int(rng.poisson(mean))):
            _in_lane(layout, kind, 13.0, 50.0)
    for _ in range(int(rng.poisson(style.cars))):
        _in_lane(layout, CAR_KINDS[int(rng.integers(len(CAR_KINDS)))], 8.0, 90.0)
    for _ in range(int(rng.poisson(style.parked))):
        side = int(rng.integers(2))
        if layout.parking[side]:
            kind = CAR_KINDS[int(rng.integers(len(CAR_KINDS)))] if rng.random() < 0.9 else "truck"
            s = (2 * side - 1) * (layout.kerb + 0.5 * layout.parking[side])
            _vehicle(layout, kind, s, _distance(layout, 6.0, 70.0), (side == 1) == (rng.random() < 0.9))
    for z0, z1 in layout.crossings[:1]:
        if rng.random() < 0.4:
            _crossing(layout, z0, z1)


def _in_lane(layout: Layout, kind: str, near: float, far: float) -> None:
    """Put a vehicle into a random lane; the own lane stays clear for some metres."""
    rng = layout.rng
    away = rng.random() < 0.5
    lane = int(rng.integers(layout.lanes))
    s = 0.5 * layout.middle + (lane + 0.5) * layout.lane
    if away and lane == layout.own_lane:
        near += 6.0
    _vehicle(layout, kind, s if away else -s, _distance(layout, near, far), away)


def _crossing(layout: Layout, z0: float, z1: float) -> None:
    """A vehicle that crosses the street from the side."""
    rng = layout.rng
    kind = ("hatch", "sedan", "suv", "van", "bus", "truck")[int(rng.integers(6))]
    z, s = 0.5 * (z0 + z1), float(rng.uniform(-12.0, 12.0))
    length, width = objects.footprint(kind)
    if z > 12.0 and layout.free(s, z, 0.5 * length, 0.5 * width):
        heading = math.copysign(0.5 * math.pi, float(rng.normal())) + float(rng.normal(0.0, 0.03))
        place = layout.at(s, z)
        layout.add(z, objects.vehicle, layout.canvas, kind, place, heading, rng, layout.lit)


def _two_wheelers(layout: Layout) -> None:
    """Riders on the road, parked bicycles and motorcycles on the sidewalk."""
    rng, style = layout.rng, layout.style
    for _ in range(int(rng.poisson(style.riders))):
        side = int(rng.integers(2))
        s, z = (2 * side - 1) * (layout.kerb - 0.8), _distance(layout, 6.0, 32.0)
        across = rng.random() < 0.25
        heading = (0.0 if side else math.pi) + float(rng.normal(0.0, 0.3)) + (0.5 * math.pi if across else 0.0)
        _two_wheeler(layout, s, z, heading, rng.random() < 0.4, True)
    for motor, mean in ((True, style.motorcycles), (False, style.bicycles)):
        for _ in range(int(rng.poisson(mean))):
            side = int(rng.integers(2))
            s, z = (2 * side - 1) * (layout.edge[side] + 0.8), _distance(layout, 5.5, 26.0)
            heading = float(rng.uniform(0.6, 2.5)) * (1 if rng.random() < 0.5 else -1)
            # bicycles stand in racks, several side by side
            for k in range(1 if motor else int(rng.integers(1, 4))):
                _two_wheeler(layout, s, z + 0.8 * k, heading, motor, False)


def _two_wheeler(layout: Layout, s: float, z: float, heading: float, motor: bool, ridden: bool) -> None:
    """Queue a two-wheeler if its place is free."""
    if layout.free(s, z, 0.6, 0.35):
        rng, place, lit = layout.rng, layout.at(s, z), layout.lit if ridden else 0.0
        layout.add(z, objects.two_wheeler, layout.canvas, place, heading, motor, ridden, rng, lit)


def _people(layout: Layout) -> None:
    """People on the sidewalks, alone and in groups, and some who cross the road."""
    rng, style = layout.rng, layout.style
    for _ in range(int(rng.poisson(0.7 * style.people))):
        side = int(rng.integers(2))
        crossing = rng.random() < 0.15
        if crossing:
            s, z = float(rng.uniform(-layout.edge[0], layout.edge[1])), _distance(layout, 9.0, 35.0)
            turn = 0.5 * math.pi
        else:
            low, high = layout.edge[side] + 0.5, layout.front[side] - 0.3
            s, z = (2 * side - 1) * float(rng.uniform(low, max(high, low + 0.1))), _distance(layout, 6.0, 55.0)
            turn = 0.0
        for k in range(1 + int(rng.random() < 0.35)):
            heading = turn + (math.pi if rng.random() < 0.5 else 0.0) + float(rng.normal(0.0, 0.4))
            _person(layout, s + 0.65 * k, z, heading)


def _person(layout: Layout, s: float, z: float, heading: float) -> None:
    """Queue a person if the place is free."""
    if layout.free(s, z, 0.3, 0.25):
        rng, place = layout.rng, layout.at(s, z)
        layout.add(z, objects.person, layout.canvas, place, heading, rng)


def _furniture(layout: Layout, side: int) -> None:
    """Lamps, bare poles, traffic lights, signs and bins of one sidewalk."""
    rng, style, canvas = layout.rng, layout.style, layout.canvas
    i = (side + 1) // 2
    s = side * (layout.edge[i] + 0.5)
    steel = layout.colours(style.poles_colour)
    gap = float(rng.uniform(16.0, 30.0))
    z = float(rng.uniform(8.0, 8.0 + gap))
    while z < 110.0:
        layout.free(s, z, 0.2, 0.2)
        layout.add(z, furniture.street_lamp, canvas, layout.at(s, z), -side * 1.8, steel, layout.lit)
        z += gap
    for _ in range(int(rng.poisson(0.5 * style.poles))):
        z = _distance(layout, 6.0, 60.0)
        if layout.free(s, z, 0.2, 0.4):
            tall, wide = float(rng.uniform(1.0, 8.0)), float(rng.uniform(0.1, 0.24))
            layout.add(z, furniture.pole, canvas, layout.at(s, z), tall, wide, steel)
    _signals(layout, side, s, steel)
    for _ in range(int(rng.poisson(0.5 * style.signs))):
        z = _distance(layout, 7.0, 45.0)
        if layout.free(s, z, 0.4, 0.4):
            board = furniture.direction_board if rng.random() < 0.15 else furniture.traffic_sign
            layout.add(z, board, canvas, layout.at(s, z), steel, rng)
    for _ in range(int(rng.poisson(0.5 * style.litter))):
        z = _distance(layout, 7.0, 40.0)
        if layout.free(s + 0.4 * side, z, 0.5, 0.5):
            layout.add(z, furniture.bin_or_box, canvas, layout.at(s + 0.4 * side, z), rng)


def _signals(layout: Layout, side: int, s: float, steel: tuple[float, float, float]) -> None:
    """Traffic lights: before cross streets, and some elsewhere."""
    rng, canvas = layout.rng, layout.canvas
    places = [z0 - 0.6 for z0, _ in layout.crossings[:2]] if rng.random() < 0.4 * layout.style.lights else []
    places += [_distance(layout, 8.0, 40.0) for _ in range(int(rng.poisson(0.25 * layout.style.lights)))]
    for z in places:
        if layout.free(s, z, 0.3, 0.4):
            reach = -side * float(rng.uniform(2.5, 4.5)) if rng.random() < 0.35 else 0.0
            layout.add(z, furniture.traffic_light, canvas, layout.at(s, z), steel, reach, rng)


def _hood(canvas: Canvas, layout: Layout) -> None:
    """The bonnet of the own car, an arc at the bottom edge; outside the 19 classes (void)."""
    camera, rng = canvas.camera, layout.rng
    rise = float(rng.uniform(0.05, 0.1)) * camera.height
    colour = objects.pick(rng, objects.CAR_COLOURS)
    z = 1.2
    scale = z / camera.focal
    corners = []
    for k in range(13):
        across = (k / 6.0 - 1.0) * 0.48 * camera.width
        v = camera.height - rise * math.sqrt(max(0.0, 1.0 - (k / 6.0 - 1.0) ** 2))
        corners.append((across * scale, camera.elevation - (v - camera.horizon) * scale, z))
    below = camera.elevation - (camera.height + 2.0 - camera.horizon) * scale
    corners += [(corners[-1][0], below, z), (corners[0][0], below, z)]
    canvas.face(corners, Paint(VOID, colour), (0.0, 0.9, -0.3))
