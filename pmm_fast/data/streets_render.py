"""Turns a drawn canvas into a picture: textures, light and shadow, weather, and the camera's sensor.

All arrays are float32, colours RGB in 0..1.  ``[P]`` is the number of pixels of the image, row by row.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pmm_fast.data import streets_canvas as c
from pmm_fast.data.streets_canvas import Canvas
from pmm_fast.data.streets_style import StreetStyle

Floats = NDArray[np.float32]

TILE = 256  # texels; the side of a noise texture, a power of two


@lru_cache(maxsize=1)
def _noises() -> tuple[Floats, Floats]:
    """Two tileable noise textures ``[TILE, TILE]`` of unit variance: soft clouds and fine grain."""
    rng = np.random.default_rng(20220619)
    frequency = np.fft.fftfreq(TILE) * TILE
    radius = np.hypot(frequency[:, None], frequency[None, :])
    made = []
    for power, low, high in ((1.5, 2.0, 40.0), (0.4, 6.0, 128.0)):
        weight = np.where((radius >= low) & (radius <= high), np.maximum(radius, 1.0) ** -power, 0.0)
        wave = np.fft.ifft2(np.fft.fft2(rng.normal(size=(TILE, TILE))) * weight).real
        made.append((wave / wave.std()).astype(np.float32))
    return made[0], made[1]


def _sample(texture: Floats, p: Floats, q: Floats, scale: float) -> Floats:
    """Look up a tiled texture at coordinates in metres, ``scale`` texels a metre."""
    column = (p * scale + 65536.0).astype(np.int32) & (TILE - 1)
    row = (q * scale + 65536.0).astype(np.int32) & (TILE - 1)
    return texture[row, column]


def _cell_noise(i: Floats, j: Floats, seed: Floats) -> Floats:
    """A number in 0..1 for each grid cell ``(i, j)``, the same wherever the cell is seen."""
    # integers, since the last bits of a sine change from one processor to the next
    mixed = i.astype(np.int32).view(np.uint32) * np.uint32(374761393) + j.astype(np.int32).view(np.uint32) * np.uint32(
        668265263
    )
    mixed += (seed * 65536.0).astype(np.int32).view(np.uint32) * np.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(1274126177)
    return ((mixed ^ (mixed >> 16)) & 0xFFFF).astype(np.float32) / np.float32(65536.0)


class Surface:
    """What each pixel shows: looked up from the primitive table by the number map.

    Args:
        canvas: a complete canvas.
        rng: shifts the textures, so that no two images share them.
    """

    def __init__(self, canvas: Canvas, rng: np.random.Generator) -> None:
        camera = canvas.camera
        self.canvas = canvas
        self.shape = (camera.height, camera.width)
        self.table = canvas.table()
        self.ids = np.asarray(canvas.ids).reshape(-1)
        u = np.tile(np.arange(camera.width, dtype=np.float32), camera.height)
        v = np.repeat(np.arange(camera.height, dtype=np.float32), camera.width)
        plane = self.table[:, c.PLANE][self.ids]
        inverse = np.maximum(plane[:, 0] * u + plane[:, 1] * v + plane[:, 2], 1.0 / c.FAR)
        self.z: Floats = 1.0 / inverse
        self.x: Floats = (u - 0.5 * camera.width) * self.z / camera.focal
        self.y: Floats = camera.elevation - (v - camera.horizon) * self.z / camera.focal
        self.u, self.v = u, v
        self.material = self.table[:, c.MATERIAL][self.ids].astype(np.uint8)
        self.albedo: Floats = self.table[:, c.ALBEDO][self.ids]
        self.emit: Floats = self.table[:, c.EMIT][self.ids]
        self.normal: Floats = self.table[:, c.NORMAL][self.ids]
        self.shift = rng.uniform(0.0, 64.0, 2).astype(np.float32)

    def labels(self) -> NDArray[np.uint8]:
        """The train ids ``[H, W]``."""
        return self.table[:, c.LABEL].astype(np.uint8)[self.ids].reshape(self.shape)

    def where(self, material: int) -> NDArray[np.intp]:
        """Pixels of one material."""
        return np.flatnonzero(self.material == material)

    def along(self, at: NDArray[np.intp]) -> Floats:
        """Metres along the ground line of an upright plane, at the pixels ``at``."""
        axis = self.table[:, c.AXIS][self.ids[at]]
        along: Floats = self.x[at] * axis[:, 0] + self.z[at] * axis[:, 1] + axis[:, 2]
        return along

    def extra(self, at: NDArray[np.intp]) -> Floats:
        """The material's own numbers ``[len(at), 6]``."""
        extra: Floats = self.table[:, c.EXTRA][self.ids[at]]
        return extra


def render_surface(
    canvas: Canvas, style: StreetStyle, rng: np.random.Generator
) -> tuple[Image.Image, NDArray[np.uint8]]:
    """The picture and the label of a complete canvas.

    Args:
        canvas: the canvas.
        style: the domain.
        rng: source of textures, weather and sensor noise.

    Returns:
        RGB image, and uint8 train ids ``[H, W]``.
    """
    surface = Surface(canvas, rng)
    snow = float(rng.uniform(*style.snow))
    _texture_ground(surface)
    _texture_upright(surface)
    _facades(surface, style)
    if snow > 0:
        _cover_with_snow(surface, snow)
    colour = _light(surface, style)
    at = surface.where(c.CLOUDS)
    colour[at] = _sky(surface, at, style, rng)
    colour = _weather(surface, colour, style, rng)
    height, width = surface.shape
    return _sensor(colour.reshape(height, width, 3), style, rng), surface.labels()


def _texture_ground(s: Surface) -> None:
    """Asphalt with patches, paving slabs with joints, grass in tufts; texture fades where a texel passes a pixel."""
    soft, fine = _noises()
    at = np.flatnonzero(s.material <= c.GRASS)
    p, q = s.x[at] + s.shift[0], s.z[at] + s.shift[1]
    fade = 1.0 / (1.0 + (s.z[at] / 18.0) ** 2)
    kind = s.material[at]
    patches = _sample(soft, p, q, 6.0)
    grain = _sample(fine, p, q, 22.0) * fade
    # grass is mottled more than asphalt is
    amount = np.asarray([0.045, 0.04, 0.1], np.float32)[kind]
    rough = np.asarray([0.04, 0.03, 0.13], np.float32)[kind]
    factor = 1.0 + amount * patches + rough * grain
    slab = s.extra(at)[:, 0]
    paved = slab > 0
    pitch = np.where(paved, slab, 1.0)
    joint = (np.mod(p, pitch) < 0.05) | (np.mod(q, pitch) < 0.07)
    factor = factor - 0.16 * fade * (joint & paved)
    s.albedo[at] *= factor[:, None]


def _texture_upright(s: Surface) -> None:
    """Brick courses, fence bars, foliage, roof tiles, window glass and lacquer."""
    soft, fine = _noises()
    at = s.where(c.BRICK)
    along, up = s.along(at), s.y[at]
    s.albedo[at] *= (_bricks(along, up, s.z[at]) * (1.0 + 0.06 * _sample(soft, along, up, 14.0)))[:, None]

    at = s.where(c.BARS)
    along, up, extra = s.along(at), s.y[at], s.extra(at)
    bar = np.mod(along, extra[:, 0]) < extra[:, 1] * extra[:, 0]
    bar |= np.mod(up - 0.1, extra[:, 2]) < 0.09
    second = s.table[:, c.SECOND][s.ids[at]] * (1.0 + 0.15 * _sample(fine, along, up, 12.0))[:, None]
    s.albedo[at] = np.where(bar[:, None], s.albedo[at], second)

    at = s.where(c.LEAVES)
    # leaves are textured in the picture plane, coarser the nearer they are
    p, q = s.x[at] + 0.37 * s.z[at], s.y[at] + 0.11 * s.z[at]
    leafy = 0.2 * _sample(fine, p, q, 30.0) + 0.14 * _sample(soft, p, q, 24.0)
    s.albedo[at] *= np.clip(1.0 + leafy, 0.45, 1.6)[:, None]

    at = s.where(c.ROOF)
    courses = np.mod(s.y[at], 0.32) < 0.07
    s.albedo[at] *= (1.0 - 0.16 * courses + 0.06 * _sample(fine, s.x[at], s.y[at], 10.0))[:, None]

    at = s.where(c.GLASS)
    # glass mirrors the sky above and the street below
    s.albedo[at] += (np.clip(0.18 + 0.1 * _sample(soft, s.x[at], s.y[at], 18.0), 0.0, 0.5))[:, None]

    at = s.where(c.PLAIN)
    s.albedo[at] *= (1.0 + 0.035 * _sample(soft, s.along(at) + s.shift[0], s.y[at], 16.0))[:, None]


def _bricks(along: Floats, up: Floats, z: Floats) -> Floats:
    """Brightness of a brick bond; the joints fade with distance."""
    course = np.floor(up / 0.16)
    shifted = along + 0.16 * np.mod(course, 2.0)
    joint = (np.mod(up, 0.16) < 0.03) | (np.mod(shifted, 0.32) < 0.03)
    fade = 1.0 / (1.0 + (z / 9.0) ** 2)
    tone = _cell_noise(course, np.floor(shifted / 0.32), np.zeros_like(up)) - 0.5
    brightness: Floats = 1.0 + fade * (0.22 * joint + 0.2 * tone)
    return brightness


def _facades(s: Surface, style: StreetStyle) -> None:
    """Windows with frames, sills and floors on plaster or brick; at night some are lit."""
    soft, _ = _noises()
    at = s.where(c.FACADE)
    if not at.size:
        return
    along, up, extra = s.along(at), s.y[at], s.extra(at)
    pitch, storey, wide, tall, brick, seed = extra.T
    column, row = np.floor(along / pitch), np.floor(up / storey)
    fu, fv = along / pitch - column - 0.5, up / storey - row - 0.48
    ground = row < 0.5
    # the ground floor has wider panes: shops and entrances
    half_u, half_v = 0.5 * np.where(ground, wide * 1.35, wide), 0.5 * np.where(ground, tall * 1.25, tall)
    pane = (np.abs(fu) < half_u) & (np.abs(fv) < half_v)
    frame = (np.abs(fu) < half_u + 0.05) & (np.abs(fv) < half_v + 0.04) & ~pane
    sill = (np.abs(fu) < half_u + 0.07) & (np.abs(fv + half_v + 0.06) < 0.025)
    mullion = pane & (np.abs(fu) < 0.018)
    chance = _cell_noise(column, row, seed)
    ledge = sill | (np.abs(up / storey - row - 0.02) < 0.02)
    tone = (1.0 + 0.05 * _sample(soft, along + seed * 50.0, up, 9.0)) * (1.0 - np.float32(0.2) * ledge)
    tone *= np.where(brick > 0.5, _bricks(along, up, s.z[at]), np.float32(1.0))
    tone *= np.where(frame, np.where(seed > 0.5, np.float32(1.45), np.float32(0.55)), np.float32(1.0))
    wall = s.albedo[at] * tone[:, None]
    glass = s.table[:, c.SECOND][s.ids[at]] * (0.55 + 0.8 * chance + 0.5 * (fv + 0.5))[:, None]
    curtain = chance > 0.82
    glass = np.where(curtain[:, None], glass * 0.4 + 0.42, glass)
    shown = pane & ~mullion
    s.albedo[at] = np.where(shown[:, None], glass, wall)
    if style.night > 0:
        warm = _cell_noise(row, column, seed + 0.31)
        lit = shown & (chance < np.where(ground, 0.55, 0.3))
        glow = np.stack([0.95 + 0.05 * warm, 0.6 + 0.3 * warm, 0.25 + 0.5 * warm], -1) * (0.45 + 0.5 * warm)[:, None]
        s.emit[at] += np.where(lit[:, None], glow * style.night, 0.0).astype(np.float32)


def _cover_with_snow(s: Surface, amount: float) -> None:
    """Whiten what faces up: grass and roofs most, paving less, the road where no wheels pass."""
    soft, _ = _noises()
    spread = _sample(soft, s.x + s.shift[0], s.z + s.shift[1], 9.0)
    labels = s.table[:, c.LABEL][s.ids]
    hold = np.select(
        [s.material == c.GRASS, s.material == c.ROOF, labels == c.SIDEWALK, labels == c.ROAD, labels == c.VEGETATION],
        [1.1, 1.1, 0.55, 0.2, 0.3],
        0.0,
    )
    share = np.clip(amount * hold + 0.22 * spread * (hold > 0), 0.0, 0.94)[:, None].astype(np.float32)
    s.albedo = s.albedo * (1.0 - share) + np.asarray([0.9, 0.92, 0.96], np.float32) * share


def _light(s: Surface, style: StreetStyle) -> Floats:
    """Sun, sky light, contact and cast shadows by day; street lamps, headlights and windows by night."""
    canvas = s.canvas
    sun = np.maximum(s.normal @ np.asarray(canvas.sun, np.float32), 0.0)
    blur = max(s.shape[1] / 512.0, 0.3)
    cast = np.asarray(canvas.sun_shadow.filter(ImageFilter.GaussianBlur(0.8 * blur)), np.float32).reshape(-1) / 255.0
    touch = np.asarray(canvas.contact.filter(ImageFilter.GaussianBlur(2.0 * blur)), np.float32).reshape(-1) / 255.0
    labels = s.table[:, c.LABEL][s.ids]
    flat = (labels <= c.SIDEWALK) | (labels == c.TERRAIN)
    flat &= s.normal[:, 1] > 0.9
    sun *= 1.0 - style.shadow * cast * flat
    sky = (0.8 + 0.2 * s.normal[:, 1]) * (1.0 - 0.75 * touch * flat)
    light = sky[:, None] * np.asarray(style.ambient, np.float32) + sun[:, None] * np.asarray(style.sun, np.float32)
    if style.night > 0:
        light += style.night * _lamps(s)
    return np.asarray(s.albedo * light + s.emit, np.float32)


def _lamps(s: Surface) -> Floats:
    """Light of the scene's lamps and of the own headlights at every pixel ``[P, 3]``."""
    light = np.zeros((s.z.size, 3), np.float32)
    at = np.flatnonzero(s.material != c.CLOUDS)
    px, py, pz = s.x[at], s.y[at], s.z[at]
    beam = np.exp(-((px / (0.32 * pz + 1.5)) ** 2) - np.maximum(py - 0.6, 0.0) ** 2 / (0.4 + 0.004 * pz**2))
    shares, colours = [0.6 * beam / (1.0 + (pz / 20.0) ** 2)], [(1.0, 0.96, 0.86)]
    nearest = sorted(s.canvas.lamps, key=lambda lamp: lamp[0][2] / max(lamp[1], 1e-3))[:12]
    for (x, y, z), strength, colour in nearest:
        square = (px - x) ** 2 + 0.35 * (py - y) ** 2 + (pz - z) ** 2
        shares.append(strength * 0.6 / (1.0 + square / 14.0))
        colours.append(colour)
    # many lamps together do not dazzle
    light[at] = np.tanh(np.stack(shares, 1) @ np.asarray(colours, np.float32))
    return light


def _sky(s: Surface, at: NDArray[np.intp], style: StreetStyle, rng: np.random.Generator) -> Floats:
    """A gradient with clouds that crowd towards the horizon."""
    soft, _ = _noises()
    camera = s.canvas.camera
    up = (camera.horizon - s.v[at]) / camera.focal
    zenith, horizon = (np.asarray(colour, np.float32) / 255.0 for colour in style.sky)
    high = np.clip(up / 0.5, 0.0, 1.0)[:, None] ** 0.7
    sky = horizon * (1.0 - high) + zenith * high
    p = (s.u[at] - 0.5 * camera.width) / camera.focal / (np.maximum(up, 0.0) + 0.22)
    q = 1.0 / (np.maximum(up, 0.0) + 0.22)
    offset = rng.uniform(0.0, 9.0, 2)
    shape = _sample(soft, p + float(offset[0]), 1.6 * q + float(offset[1]), 34.0)
    shape = 0.7 * shape + 0.3 * _sample(soft, p + float(offset[1]), 1.6 * q, 90.0)
    cover = float(rng.uniform(*style.clouds))
    dense = np.clip((shape + 2.4 * (cover - 0.5)) * 0.9, 0.0, 1.0)[:, None] * np.clip(up * 14.0, 0.0, 1.0)[:, None]
    cloud = np.asarray(style.cloud_colour, np.float32) / 255.0 * (1.0 - 0.1 * np.clip(shape, -1, 1)[:, None])
    return np.asarray(sky * (1.0 - dense) + cloud * dense, np.float32)


def _weather(s: Surface, colour: Floats, style: StreetStyle, rng: np.random.Generator) -> Floats:
    """Mirror of a wet road, haze or fog by depth, glow around lamps, streaks of rain."""
    height, width = s.shape
    wet = float(rng.uniform(*style.wet))
    if wet > 0.02:
        colour = _wet_road(s, colour, wet)
    density = float(rng.uniform(*style.fog))
    clear = np.exp(-density * np.minimum(s.z, 260.0))
    # clouds stand above the haze; only near the horizon does the sky take its colour
    sky = s.material == c.CLOUDS
    rise = np.clip((s.canvas.camera.horizon - s.v) / (0.35 * height), 0.0, 1.0)
    clear = np.where(sky, np.exp(-density * 90.0 * (1.0 - 0.8 * rise)), clear)[:, None].astype(np.float32)
    haze = np.asarray(style.fog_colour, np.float32) / 255.0
    image: Floats = np.asarray(colour * clear + haze * (1.0 - clear), np.float32).reshape(height, width, 3)
    if style.night > 0:
        bright = Image.fromarray((np.clip(s.emit, 0, 1).reshape(height, width, 3) * 255).astype(np.uint8))
        # a glow is soft: a half-size image of it will do
        bright = bright.resize((width // 2, height // 2), Image.Resampling.BOX)
        for radius, gain in ((0.006, 0.35), (0.03, 0.6)):
            halo = bright.filter(ImageFilter.GaussianBlur(0.5 * radius * width)).resize((width, height))
            image += np.asarray(halo, np.float32) * np.float32(style.night * gain / 255.0)
    if style.rain > 0:
        image += _streaks(height, width, style.rain, rng)
    return np.asarray(image, np.float32).reshape(-1, 3)


def _wet_road(s: Surface, colour: Floats, wet: float) -> Floats:
    """Mix the ground with the upright mirror image of what stands beyond it, smeared along the columns."""
    soft, _ = _noises()
    height, width = s.shape
    image = Image.fromarray((np.clip(colour, 0, 1).reshape(height, width, 3) * 255).astype(np.uint8))
    smear = np.asarray(image.filter(ImageFilter.GaussianBlur((0.8, 0.02 * height))), np.float32) / 255.0
    at = np.flatnonzero(s.material <= c.PAVING)
    mirrored = np.clip(2.0 * s.canvas.camera.horizon - s.v[at], 0, height - 1).astype(np.int32)
    puddle = np.clip(0.55 + 0.35 * _sample(soft, s.x[at] + s.shift[0], s.z[at], 9.0), 0.1, 1.0)
    glance = np.clip(0.35 + s.z[at] / 60.0, 0.0, 0.9)
    share = (wet * puddle * glance)[:, None]
    colour = colour.copy()
    colour[at] = colour[at] * (1.0 - share) + smear[mirrored, s.u[at].astype(np.int32)] * share
    return colour


def _streaks(height: int, width: int, density: float, rng: np.random.Generator) -> Floats:
    """Bright slanted streaks of falling rain ``[H, W, 1]``."""
    drops = (rng.random((height, width)) < 0.004 * density).astype(np.float32)
    streak = np.zeros_like(drops)
    for k in range(max(3, height // 22)):
        streak += np.roll(drops, (k, -(k // 4)), (0, 1))
    return np.asarray(0.13 * np.minimum(streak, 1.0)[..., None], np.float32)


def _sensor(image: Floats, style: StreetStyle, rng: np.random.Generator) -> Image.Image:
    """Exposure, white balance, contrast, gamma, saturation, vignette, blur and noise of the camera."""
    height, width, _ = image.shape
    image = image * float(rng.uniform(*style.exposure)) * np.asarray(style.tint, np.float32)
    # a soft shoulder instead of hard clipping
    over = np.maximum(image - 0.75, 0.0)
    image = image - over + over / (1.0 + 2.5 * over)
    grey = image.mean(axis=2, keepdims=True)
    image = grey + (image - grey) * float(rng.uniform(*style.saturation))
    image = 0.45 + (image - 0.45) * float(rng.uniform(*style.contrast))
    gamma = float(rng.uniform(*style.gamma))
    rows = np.linspace(-1.0, 1.0, height, dtype=np.float32)[:, None]
    columns = np.linspace(-1.0, 1.0, width, dtype=np.float32)[None, :]
    image = image * (1.0 - float(rng.uniform(*style.vignette)) * 0.5 * (rows**2 + columns**2))[..., None]
    picture = Image.fromarray((np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8))
    picture = picture.point([round(255.0 * (level / 255.0) ** gamma) for level in range(256)] * 3)
    picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(*style.blur)) * width / 512.0))
    sigma = float(rng.uniform(*style.noise)) * 255.0
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * sigma
    grain = grain + rng.standard_normal((height, width, 3), dtype=np.float32) * (0.5 * sigma)
    return Image.fromarray(np.clip(np.asarray(picture, np.float32) + grain + 0.5, 0, 255).astype(np.uint8))
