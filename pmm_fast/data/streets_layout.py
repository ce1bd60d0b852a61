"""Lays out one generated street: the ground and what is built and grows along it.

Lateral positions ``s`` are metres to the right of the middle of the road, ``z`` metres ahead of the camera; the road
may bend, so `Layout.x` turns ``s`` into the world's X.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ParamSpec

import numpy as np

from pmm_fast.data import streets_furniture as furniture
from pmm_fast.data import streets_objects as objects
from pmm_fast.data.streets_canvas import (
    ASPHALT,
    BARS,
    BRICK,
    BUILDING,
    FACADE,
    FENCE,
    GRASS,
    LACQUER,
    LEAVES,
    PAVING,
    PLAIN,
    ROAD,
    ROOF,
    SIDEWALK,
    TERRAIN,
    VEGETATION,
    WALL,
    Canvas,
    Colour,
    Paint,
)
from pmm_fast.data.streets_objects import pick, tint
from pmm_fast.data.streets_style import Rgb, StreetStyle

P = ParamSpec("P")

END = 170.0  # metres; how far the street is built up
STEPS = (0.7, 2.0, 4.0, 7.0, 11.0, 16.0, 24.0, 36.0, 55.0, 85.0, 130.0, 190.0, 320.0)


class Layout:
    """One street and what stands along it, to be drawn far to near.

    Args:
        canvas: an empty canvas.
        style: the domain.
        rng: source of every choice.
    """

    def __init__(self, canvas: Canvas, style: StreetStyle, rng: np.random.Generator) -> None:
        self.canvas, self.style, self.rng = canvas, style, rng
        self.items: list[tuple[float, Callable[[], None]]] = []
        self.taken: list[tuple[float, float, float, float]] = []
        lanes = int(rng.integers(style.lanes[0], style.lanes[1] + 1))
        self.lane = float(rng.uniform(2.9, 3.4))
        self.middle = float(rng.uniform(1.2, 2.6)) if rng.random() < style.median else 0.0
        self.lanes = lanes
        self.kerb = 0.5 * self.middle + lanes * self.lane
        self.parking = [2.1 if rng.random() < style.parking else 0.0 for _ in range(2)]
        self.edge = [self.kerb + width for width in self.parking]
        self.verge = [float(rng.uniform(1.0, 2.2)) if rng.random() < style.verge else 0.0 for _ in range(2)]
        self.front = [e + v + self.draw(style.sidewalk) for e, v in zip(self.edge, self.verge, strict=True)]
        self.tram = rng.random() < style.trams
        self.own_lane = int(rng.integers(lanes))
        self.own = 0.5 * self.middle + (self.own_lane + 0.5) * self.lane
        self.yaw = float(rng.normal(0.0, 0.025))
        self.bend = float(rng.normal(0.0, 0.0006))
        self.crossings: list[tuple[float, float]] = []
        self.leaf = self.colours(style.leaves)
        self.lit = style.night

    def draw(self, bounds: tuple[float, float]) -> float:
        """A number from a uniform range of the style."""
        return float(self.rng.uniform(*bounds))

    def colours(self, palette: Sequence[Rgb]) -> Colour:
        """One colour of a palette, shifted in brightness and hue."""
        base = palette[int(self.rng.integers(len(palette)))]
        shift = self.rng.normal(0.0, self.style.colour_jitter * 0.25, 3) + self.rng.normal(
            0.0, self.style.colour_jitter
        )
        red, green, blue = (
            min(max(c / 255.0 * (1.0 + d), 0.02), 1.0) for c, d in zip(base, shift.tolist(), strict=True)
        )
        return (red, green, blue)

    def x(self, s: float, z: float) -> float:
        """World X of lateral position ``s`` at distance ``z``."""
        return s - self.own + self.yaw * z + self.bend * z * z

    def at(self, s: float, z: float) -> tuple[float, float]:
        """Ground point ``(X, Z)`` of a street position."""
        return (self.x(s, z), z)

    def add(self, z: float, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Queue ``action(*args)``, to be drawn after everything that lies farther than ``z`` metres."""
        self.items.append((z, partial(action, *args, **kwargs)))

    def free(self, s: float, z: float, half_s: float, half_z: float) -> bool:
        """Claim a rectangle of the street; False if something stands there already."""
        for s1, z1, hs, hz in self.taken:
            if abs(s - s1) < half_s + hs and abs(z - z1) < half_z + hz:
                return False
        self.taken.append((s, z, half_s, half_z))
        return True

    def build(self) -> None:
        """Draw the ground and queue what stands along the street."""
        self._cross_streets()
        self._ground()
        self._markings()
        self._backdrop()
        for side in (-1, 1):
            self._frontage(side)
            self._trees(side)

    def paint(self) -> None:
        """Draw what was queued, far to near."""
        for _, action in sorted(self.items, key=lambda item: -item[0]):
            action()

    def strip(
        self, s0: float, s1: float, paint: Paint, z0: float = STEPS[0], z1: float = STEPS[-1], y: float = 0.0
    ) -> None:
        """Fill the ground between two lateral positions."""
        zs = [z0, *[z for z in STEPS if z0 < z < z1], z1]
        outline = [self.at(s0, z) for z in zs] + [self.at(s1, z) for z in reversed(zs)]
        self.canvas.ground(outline, paint)

    def _cross_streets(self) -> None:
        """Choose where cross streets meet this one."""
        z = float(self.rng.uniform(10.0, 60.0))
        while z < 140.0:
            width = float(self.rng.uniform(6.5, 9.5))
            self.crossings.append((z, z + width))
            z += float(self.rng.uniform(45.0, 110.0))

    def _ground(self) -> None:
        """Terrain, sidewalks, verges, road, median, cross streets."""
        style = self.style
        grass = Paint(TERRAIN, self.colours(style.grass), GRASS)
        stone = Paint(SIDEWALK, self.colours(style.pavement), PAVING, extra=(self.draw((0.5, 1.2)),))
        tar = Paint(ROAD, self.colours(style.road), ASPHALT)
        kerb = Paint(SIDEWALK, tint(stone.colour, 1.12), PLAIN)
        self.paved = stone
        self.lawn = grass
        self.tar = tar
        self.canvas.ground([(-900.0, 0.7), (-900.0, 390.0), (900.0, 390.0), (900.0, 0.7)], grass)
        for i, side in enumerate((-1, 1)):
            self.strip(side * self.edge[i], side * (self.front[i] + 0.3), stone)
            if self.verge[i]:
                # a verge lies beside the kerb or behind the sidewalk
                inner = self.edge[i] + (
                    0.25 if self.rng.random() < 0.6 else self.front[i] - self.edge[i] - self.verge[i]
                )
                self.strip(side * inner, side * (inner + self.verge[i]), grass)
        self.strip(-self.edge[0], self.edge[1], tar)
        for z0, z1 in self.crossings:
            self.canvas.ground(
                [(-300.0, z0 - 2.5), (-300.0, z1 + 2.5), (300.0, z1 + 2.5), (300.0, z0 - 2.5)],
                stone,
            )
            self.canvas.ground([(-300.0, z0), (-300.0, z1), (300.0, z1), (300.0, z0)], tar)
            # redraw the road over the sidewalks of the cross street
            self.strip(-self.edge[0], self.edge[1], tar, max(z0 - 2.6, 0.7), z1 + 2.6)
        bounds = [STEPS[0]] + [z for pair in self.crossings for z in pair] + [STEPS[-1]]
        for z0, z1 in zip(bounds[::2], bounds[1::2], strict=True):
            for i, side in enumerate((-1, 1)):
                self.strip(side * self.edge[i], side * (self.edge[i] + 0.22), kerb, z0, z1)
            if self.middle:
                self.strip(-0.5 * self.middle, 0.5 * self.middle, kerb, z0, z1)
                self.strip(-0.5 * self.middle + 0.2, 0.5 * self.middle - 0.2, grass, z0, z1)

    def _markings(self) -> None:
        """Lane lines, edge lines, zebra crossings, stop lines, tram rails: all part of the road."""
        mark = Paint(ROAD, self.colours((self.style.marking,)), PLAIN)
        rng = self.rng
        if not self.middle:
            if rng.random() < 0.5:
                self._dashes(0.0, 3.0, float(rng.uniform(4.0, 8.0)), mark)
            else:
                self.strip(-0.07, 0.07, mark)
        for k in range(1, self.lanes):
            for side in (-1, 1):
                self._dashes(side * (0.5 * self.middle + k * self.lane), 3.0, 6.0, mark)
        for i, side in enumerate((-1, 1)):
            if self.parking[i] and rng.random() < 0.7:
                self.strip(side * self.kerb, side * (self.kerb + 0.12), mark)
            elif rng.random() < 0.4:
                self.strip(side * (self.edge[i] - 0.35), side * (self.edge[i] - 0.22), mark)
        zebras = [z0 - 4.2 for z0, _ in self.crossings if rng.random() < 0.7]
        if rng.random() < 0.4:
            zebras.append(float(rng.uniform(7.0, 30.0)))
        for z in (z for z in zebras if z > 4.0):
            s = -self.edge[0] + 0.4
            while s < self.edge[1] - 0.6:
                # none on a median
                if abs(s + 0.25) > 0.5 * self.middle + 0.2:
                    self.strip(s, s + 0.5, mark, z, z + 3.2)
                s += 1.0
            self.strip(0.5 * self.middle + 0.1, self.kerb - 0.1, mark, z - 1.6, z - 1.2)
        if self.tram:
            rail = Paint(ROAD, tint(self.tar.colour, 0.55), PLAIN)
            for track in (-1, 1):
                for gauge in (-0.72, 0.72):
                    s = track * (0.5 * self.middle + 0.5 * self.lane) + gauge
                    self.strip(s - 0.06, s + 0.06, rail)

    def _dashes(self, s: float, dash: float, gap: float, paint: Paint) -> None:
        """A broken line along the road."""
        z = float(self.rng.uniform(0.7, dash + gap))
        while z < 90.0:
            self.strip(s - 0.07, s + 0.07, paint, z, z + dash)
            z += dash + gap

    def _backdrop(self) -> None:
        """What closes the view: a skyline, hills or woods along the horizon."""
        rng = self.rng
        x = -420.0
        haze = self.colours(self.style.facades)
        while x < 420.0:
            width = float(rng.uniform(18.0, 50.0))
            if rng.random() < 0.6:
                z = float(rng.uniform(230.0, 330.0))
                height = float(rng.uniform(6.0, 16.0))
                tops = (height * rng.uniform(0.6, 1.1, 9)).tolist()
                outline = [(0.0, 0.0), *[(k / 8, top) for k, top in enumerate(tops)], (1.0, 0.0)]
                paint = Paint(VEGETATION, tint(self.leaf, float(rng.uniform(0.7, 1.0))), LEAVES)
                self.add(z, self.canvas.upright, (x, z), (x + width, z), outline, paint)
            else:
                z = float(rng.uniform(190.0, 230.0))
                height = float(rng.uniform(8.0, 24.0))
                paint = self._facade_paint(tint(haze, float(rng.uniform(0.8, 1.15))), 3.2)
                self.add(z, self.canvas.wall, (x, z), (x + width, z), 0.0, height, paint)
            x += width * float(rng.uniform(0.6, 1.0))

    def _frontage(self, side: int) -> None:
        """Fill one side of the street with lots: blocks, houses, walls, fences, parks."""
        rng, style = self.rng, self.style
        weights = np.cumsum(style.frontage[:5]) / sum(style.frontage[:5])
        cross = style.frontage[5] > 0
        z = -4.0 + float(rng.uniform(0.0, 6.0))
        while z < END:
            kind = int(np.searchsorted(weights, rng.random()))
            length = float(rng.uniform(*((10.0, 24.0), (11.0, 17.0), (9.0, 24.0), (9.0, 24.0), (14.0, 30.0))[kind]))
            for z0, z1 in self.crossings if cross else ():
                # a lot ends where the cross street's sidewalk begins
                if z < z1 + 2.5 and z + length > z0 - 2.5:
                    if z > z0 - 6.0:
                        z = z1 + 2.5
                    else:
                        length = z0 - 2.5 - z
            end = z + length
            if end > 2.0:
                (self._block, self._house, self._walled, self._fenced, self._park)[kind](side, max(z, 1.0), end)
            z = end

    def _facade_paint(self, colour: Colour, storey: float) -> Paint:
        """A facade with windows of a random pattern; ``storey`` is the height of a floor in metres."""
        rng = self.rng
        pane = tint((0.2, 0.24, 0.28), float(rng.uniform(0.6, 1.6)))
        pitch = float(rng.uniform(1.7, 3.2))
        brick = 1.0 if rng.random() < self.style.brick else 0.0
        extra = (pitch, storey, self.draw((0.36, 0.62)), self.draw((0.42, 0.62)), brick, float(rng.random()))
        return Paint(BUILDING, colour, FACADE, second=pane, extra=extra)

    def _box(self, side: int, s: float, z0: float, z1: float, depth: float, height: float, paint: Paint) -> None:
        """The two walls of a building that can be seen, and its shadow."""
        near, far = self.at(side * s, z0), self.at(side * s, z1)
        back, back_far = (near[0] + side * depth, z0), (far[0] + side * depth, z1)
        self.canvas.shadow([near, far, back_far, back], height)
        self.canvas.touch([self.at(side * (s - 0.35), z0), self.at(side * (s - 0.35), z1), far, near], 0.35)
        self.canvas.wall(near, back, 0.0, height, paint)
        self.canvas.wall(near, far, 0.0, height, paint)

    def _block(self, side: int, z0: float, z1: float, setback: float = 0.0) -> None:
        """A city block: flat front, several floors, a shop band, a cornice or a mansard roof."""
        rng, style = self.rng, self.style
        i = (side + 1) // 2
        storey = float(rng.uniform(2.9, 3.5))
        floors = int(rng.integers(style.floors[0], style.floors[1] + 1))
        height = storey * floors + 0.6
        paint = self._facade_paint(self.colours(style.facades), storey)
        roof = Paint(BUILDING, self.colours(style.roofs), ROOF)
        trim = Paint(BUILDING, tint(paint.colour, float(rng.uniform(0.65, 1.25))), PLAIN)
        mansard, shop = rng.random() < 0.45, rng.random() < 0.5
        awning = Paint(BUILDING, pick(rng, objects.CLOTHES), LACQUER) if shop and rng.random() < 0.5 else None
        s = self.front[i] + setback
        near, far = self.at(side * s, z0), self.at(side * s, z1)

        def action() -> None:
            self._box(side, s, z0, z1, 12.0, height, paint)
            if mansard:
                rise, lean = 2.6, side * 1.6
                eaves = [(near[0], height, z0), (far[0], height, z1)]
                ridge = [(far[0] + lean, height + rise, z1), (near[0] + lean, height + rise, z0)]
                end = [(near[0], height, z0), (near[0] + lean, height + rise, z0), (near[0] + side * 12.0, height, z0)]
                self.canvas.face(end, roof)
                self.canvas.face(eaves + ridge, roof, (-side * 0.8, 0.6, 0.0))
            self.canvas.wall(near, far, height - 0.3, height + 0.15, trim)
            if shop:
                self.canvas.wall(near, far, 3.0, 3.5, trim)
            if awning:
                out = -side * 1.0
                corners = [(near[0], 2.9, z0), (far[0], 2.9, z1), (far[0] + out, 2.4, z1), (near[0] + out, 2.4, z0)]
                self.canvas.face(corners, awning, (-side * 0.5, 0.85, 0.0))

        self.add(z1, action)

    def _house(self, side: int, z0: float, z1: float) -> None:
        """A detached house with a pitched roof behind a front garden."""
        rng, style = self.rng, self.style
        i = (side + 1) // 2
        setback, storey = float(rng.uniform(3.0, 7.0)), float(rng.uniform(2.6, 3.0))
        floors = int(rng.integers(1, 3))
        height, rise, depth = storey * floors + 0.3, float(rng.uniform(2.0, 3.6)), 9.0
        paint = self._facade_paint(self.colours(style.facades), storey)
        roof = Paint(BUILDING, self.colours(style.roofs), ROOF)
        door = Paint(BUILDING, pick(rng, objects.CLOTHES), PLAIN)
        s = self.front[i] + setback
        a, b = z0 + float(rng.uniform(0.5, 2.0)), z1 - float(rng.uniform(0.5, 2.5))
        near, far = self.at(side * s, a), self.at(side * s, b)
        boundary = int(rng.integers(5))

        def action() -> None:
            self._box(side, s, a, b, depth, height, paint)
            x, half = near[0], side * 0.5 * depth
            gable = [(x, height, a), (x + half, height + rise, a), (x + 2 * half, height, a)]
            self.canvas.face(gable, Paint(BUILDING, tint(paint.colour, 0.95), PLAIN))
            eave = -side * 0.5
            low = height - 0.15
            slope = [(x + eave, low, a - 0.4), (far[0] + eave, low, b + 0.4)]
            slope += [(far[0] + half, height + rise, b + 0.4), (x + half, height + rise, a - 0.4)]
            self.canvas.face(slope, roof, (-side * 0.6, 0.8, 0.0))
            outline = [(0.42, 0.0), (0.42, 2.1), (0.52, 2.1), (0.52, 0.0)]
            self.canvas.upright(near, far, outline, door)

        self.add(b + 0.4, action)
        self._boundary(side, self.front[i] + 0.2, z0, z1, boundary)
        if rng.random() < 0.5:
            spot = (side * (self.front[i] + 0.5 * setback), float(rng.uniform(z0, z1)))
            self._tree_at(*spot, float(rng.uniform(3.0, 6.5)))

    def _boundary(self, side: int, s: float, z0: float, z1: float, kind: int) -> None:
        """What encloses a front garden: nothing, a picket fence, a low wall or a hedge."""
        near, far = self.at(side * s, max(z0, 1.0)), self.at(side * s, z1)
        height = float(self.rng.uniform(0.8, 1.4))
        if kind in (1, 2):
            paint = self._fence_paint()
        elif kind == 3:
            paint = self._wall_paint()
        elif kind == 4:
            leaf = tint(self.colours(self.style.leaves), 0.9)
            self.add(z1, furniture.hedge, self.canvas, near, far, height, leaf, self.rng)
            return
        else:
            return
        self.add(z1, self._panel, near, far, height, paint)

    def _panel(self, near: tuple[float, float], far: tuple[float, float], height: float, paint: Paint) -> None:
        """A wall or fence along a ground line, with its shadow."""
        self.canvas.shadow([near, far], height)
        self.canvas.wall(near, far, 0.0, height, paint)
        if paint.label == WALL:
            self.canvas.wall(near, far, height, height + 0.1, Paint(WALL, tint(paint.colour, 1.15), PLAIN))

    def _fence_paint(self) -> Paint:
        """A fence: bars of a colour over what is seen through them, which the label counts as fence too."""
        rng = self.rng
        behind = tint(self.lawn.colour if rng.random() < 0.5 else self.leaf, float(rng.uniform(0.6, 0.95)))
        extra = (float(rng.uniform(0.12, 0.3)), float(rng.uniform(0.3, 0.6)), float(rng.uniform(0.5, 1.0)))
        return Paint(FENCE, self.colours(self.style.fences), BARS, second=behind, extra=extra)

    def _wall_paint(self) -> Paint:
        """A free-standing wall, of brick or concrete."""
        brick = self.rng.random() < self.style.brick + 0.2
        return Paint(WALL, self.colours(self.style.walls), BRICK if brick else PLAIN)

    def _walled(self, side: int, z0: float, z1: float) -> None:
        """A high wall; behind it trees or a building."""
        s = self.front[(side + 1) // 2] + 0.1
        height, paint = float(self.rng.uniform(1.7, 3.2)), self._wall_paint()
        near, far = self.at(side * s, z0), self.at(side * s, z1)
        self._behind(side, z0, z1)
        self.add(z1, self._panel, near, far, height, paint)

    def _fenced(self, side: int, z0: float, z1: float) -> None:
        """A fence; behind it trees or a building."""
        s = self.front[(side + 1) // 2] + 0.1
        height, paint = float(self.rng.uniform(1.2, 2.3)), self._fence_paint()
        near, far = self.at(side * s, z0), self.at(side * s, z1)
        self._behind(side, z0, z1)
        self.add(z1, self._panel, near, far, height, paint)

    def _behind(self, side: int, z0: float, z1: float) -> None:
        """What looks over a wall or a fence."""
        if self.rng.random() < 0.5:
            self._block(side, z0, z1, float(self.rng.uniform(5.0, 11.0)))
        else:
            self._park(side, z0, z1)

    def _park(self, side: int, z0: float, z1: float) -> None:
        """Open ground with trees and a hedge at its back."""
        rng = self.rng
        front = self.front[(side + 1) // 2]
        for _ in range(max(1, int((z1 - z0) / 5.0))):
            self._tree_at(side * (front + self.draw((2.0, 14.0))), float(rng.uniform(z0, z1)), self.draw((5.0, 11.0)))
        near, far = self.at(side * (front + 15.0), z0), self.at(side * (front + 15.0), z1)
        leaf, height = tint(self.leaf, 0.8), self.draw((1.5, 4.0))
        self.add(z1, furniture.hedge, self.canvas, near, far, height, leaf, rng)

    def _tree_at(self, s: float, z: float, height: float) -> None:
        """A tree at a street position."""
        rng = self.rng
        if z < 5.0:
            return
        conifer, leaf = rng.random() < self.style.conifers, self.colours(self.style.leaves)
        self.add(z, furniture.tree, self.canvas, self.at(s, z), height, conifer, leaf, rng)

    def _trees(self, side: int) -> None:
        """Trees between road and sidewalk."""
        i = (side + 1) // 2
        offset = self.edge[i] + 0.5 * max(self.verge[i], 0.9)
        for _ in range(int(self.rng.poisson(0.5 * self.style.street_trees))):
            z = float(self.rng.uniform(7.0, 90.0))
            if self.free(side * offset, z, 0.4, 2.0):
                self._tree_at(side * offset, z, float(self.rng.uniform(4.5, 9.0)))
