"""What sets one generated domain apart from another: camera, layout, palette, light, weather and sensor.

Colours are 8-bit RGB triples, ranges are ``(low, high)`` of a uniform law, counts are means of a Poisson law per image.
The source domains differ moderately; the unseen ones (night, fog, rain, winter) differ markedly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Range = tuple[float, float]
Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class StreetStyle:
    """The parameters of one domain; every value is drawn anew for each image."""

    # camera
    field_of_view: Range = (58.0, 66.0)  # horizontal, degrees
    camera_height: Range = (1.25, 1.45)  # metres
    horizon: Range = (0.44, 0.52)  # row, fraction of the image height
    hood: float = 0.0  # probability that the bonnet of the own car (void) shows

    # layout
    lanes: tuple[int, int] = (1, 2)  # each way
    sidewalk: Range = (2.5, 4.5)  # metres
    verge: float = 0.2  # probability of a grass strip beside the sidewalk
    median: float = 0.15  # probability of a strip between the directions
    parking: float = 0.6  # probability of a parking lane, each side
    # weights of what stands along the street: block, house, wall, fence, park, cross street
    frontage: tuple[float, float, float, float, float, float] = (8.0, 0.0, 1.4, 1.6, 1.0, 1.0)
    floors: tuple[int, int] = (3, 6)
    street_trees: float = 6.0
    conifers: float = 0.05  # share of conifers among the trees

    # objects
    people: float = 6.0
    riders: float = 1.2
    cars: float = 5.0
    parked: float = 5.0
    trucks: float = 0.4
    buses: float = 0.35
    trams: float = 0.3
    motorcycles: float = 0.6
    bicycles: float = 1.5
    poles: float = 5.0
    lights: float = 1.6
    signs: float = 3.0
    litter: float = 0.8  # bins and boxes (void)

    # palette
    road: tuple[Rgb, ...] = ((112, 112, 114), (98, 98, 102), (126, 122, 118))
    pavement: tuple[Rgb, ...] = ((158, 152, 146), (142, 140, 140), (168, 158, 144))
    facades: tuple[Rgb, ...] = ((214, 190, 150), (196, 160, 120), (222, 208, 184), (178, 126, 98), (150, 146, 142))
    brick: float = 0.15  # share of facades and walls that show brick
    walls: tuple[Rgb, ...] = ((186, 176, 160), (150, 142, 134), (172, 120, 92))
    fences: tuple[Rgb, ...] = ((70, 74, 72), (150, 150, 148), (120, 90, 60))
    roofs: tuple[Rgb, ...] = ((150, 82, 60), (96, 84, 80), (120, 70, 54))
    leaves: tuple[Rgb, ...] = ((74, 104, 44), (92, 118, 52), (64, 92, 50))
    grass: tuple[Rgb, ...] = ((120, 132, 66), (142, 138, 84))
    poles_colour: tuple[Rgb, ...] = ((84, 88, 88), (130, 132, 132))
    sky: tuple[Rgb, Rgb] = ((84, 142, 214), (196, 216, 232))  # zenith, horizon
    clouds: Range = (0.1, 0.45)  # covered share
    cloud_colour: Rgb = (246, 246, 246)
    marking: Rgb = (226, 224, 216)
    colour_jitter: float = 0.07

    # light
    sun_elevation: Range = (50.0, 68.0)  # degrees
    sun_azimuth: Range = (-180.0, 180.0)  # degrees from straight ahead, to the right
    sun: tuple[float, float, float] = (0.78, 0.74, 0.66)
    ambient: tuple[float, float, float] = (0.56, 0.59, 0.66)
    shadow: float = 0.85

    # weather
    night: float = 0.0  # 1: lamps, headlights and windows are lit
    fog: Range = (0.0004, 0.0012)  # extinction per metre
    fog_colour: Rgb = (200, 214, 228)
    wet: Range = (0.0, 0.0)  # mirror of the road
    rain: float = 0.0  # density of rain streaks
    snow: Range = (0.0, 0.0)  # share of the ground and the roofs that is covered

    # sensor
    exposure: Range = (0.95, 1.08)
    contrast: Range = (1.02, 1.14)
    gamma: Range = (0.95, 1.05)
    saturation: Range = (1.0, 1.2)
    tint: tuple[float, float, float] = (1.02, 1.0, 0.97)
    noise: Range = (0.006, 0.012)  # standard deviation, full scale 1
    blur: Range = (0.35, 0.55)  # Gaussian sigma at 512 pixels of width
    vignette: Range = (0.05, 0.15)


_NOON = StreetStyle()

_SUBURB = StreetStyle(
    field_of_view=(72.0, 82.0),
    camera_height=(1.6, 1.85),
    horizon=(0.42, 0.5),
    hood=0.35,
    lanes=(1, 1),
    sidewalk=(1.5, 2.4),
    verge=0.85,
    median=0.08,
    parking=0.35,
    frontage=(1.0, 8.0, 1.2, 1.8, 2.0, 1.0),
    floors=(1, 3),
    street_trees=9.0,
    conifers=0.3,
    people=3.5,
    riders=1.2,
    cars=3.5,
    parked=4.5,
    trucks=0.5,
    buses=0.18,
    trams=0.1,
    motorcycles=0.6,
    bicycles=1.3,
    poles=6.0,
    lights=0.9,
    signs=2.2,
    road=((132, 126, 120), (146, 140, 132), (116, 112, 108)),
    pavement=((178, 172, 162), (160, 156, 150)),
    facades=((226, 222, 212), (188, 200, 204), (206, 186, 152), (168, 92, 72), (150, 160, 140), (196, 150, 130)),
    brick=0.4,
    walls=((168, 110, 88), (190, 184, 172), (136, 128, 116)),
    fences=((222, 220, 212), (146, 108, 72), (110, 84, 60), (80, 96, 80)),
    roofs=((120, 74, 60), (90, 82, 84), (142, 96, 70), (74, 78, 88)),
    leaves=((86, 122, 44), (70, 108, 48), (120, 132, 48), (52, 84, 52)),
    grass=((112, 146, 62), (134, 150, 74), (98, 130, 58)),
    sky=((118, 158, 206), (236, 222, 196)),
    clouds=(0.2, 0.6),
    cloud_colour=(250, 240, 226),
    sun_elevation=(24.0, 38.0),
    sun=(1.0, 0.84, 0.6),
    ambient=(0.6, 0.6, 0.62),
    shadow=0.8,
    fog=(0.001, 0.003),
    fog_colour=(226, 216, 198),
    contrast=(0.95, 1.05),
    saturation=(0.9, 1.1),
    tint=(1.06, 1.0, 0.9),
    noise=(0.01, 0.018),
    blur=(0.5, 0.75),
    vignette=(0.15, 0.3),
)

_OVERCAST = StreetStyle(
    field_of_view=(48.0, 56.0),
    camera_height=(2.0, 2.4),
    horizon=(0.38, 0.46),
    hood=0.15,
    lanes=(1, 2),
    sidewalk=(2.0, 3.5),
    verge=0.35,
    median=0.2,
    frontage=(6.0, 2.0, 1.5, 1.5, 1.6, 1.0),
    floors=(2, 5),
    street_trees=6.0,
    conifers=0.12,
    people=6.0,
    riders=2.0,
    cars=5.5,
    trucks=0.6,
    buses=0.4,
    trams=0.3,
    motorcycles=0.5,
    bicycles=2.6,
    road=((84, 86, 92), (96, 98, 104), (74, 76, 82)),
    pavement=((122, 120, 122), (146, 112, 102), (134, 134, 138)),
    facades=((134, 78, 66), (156, 98, 80), (122, 122, 126), (188, 186, 182), (108, 92, 88), (170, 164, 150)),
    brick=0.65,
    walls=((118, 114, 112), (128, 82, 70), (92, 92, 96)),
    fences=((60, 62, 66), (112, 114, 118), (92, 78, 66)),
    roofs=((82, 78, 82), (110, 70, 60), (66, 68, 76)),
    leaves=((62, 84, 54), (78, 92, 56), (98, 90, 50), (54, 72, 56)),
    grass=((92, 110, 66), (110, 114, 78)),
    sky=((176, 182, 190), (214, 216, 220)),
    clouds=(0.5, 0.9),
    cloud_colour=(198, 202, 208),
    sun=(0.16, 0.16, 0.16),
    ambient=(1.02, 1.05, 1.1),
    shadow=0.2,
    fog=(0.002, 0.005),
    fog_colour=(204, 208, 214),
    wet=(0.0, 0.15),
    exposure=(0.92, 1.06),
    contrast=(0.84, 0.94),
    saturation=(0.7, 0.88),
    tint=(0.96, 1.0, 1.05),
    noise=(0.014, 0.026),
    blur=(0.4, 0.65),
    vignette=(0.1, 0.25),
)

_NIGHT = replace(
    _NOON,
    field_of_view=(56.0, 70.0),
    camera_height=(1.3, 1.7),
    frontage=(7.0, 2.0, 1.2, 1.2, 1.2, 1.0),
    facades=_NOON.facades + _OVERCAST.facades,
    brick=0.3,
    leaves=_NOON.leaves + _OVERCAST.leaves,
    sky=((10, 14, 30), (44, 38, 44)),
    clouds=(0.2, 0.7),
    cloud_colour=(40, 38, 44),
    sun=(0.0, 0.0, 0.0),
    ambient=(0.16, 0.18, 0.26),
    shadow=0.0,
    night=1.0,
    fog=(0.001, 0.004),
    fog_colour=(34, 32, 40),
    wet=(0.0, 0.3),
    exposure=(0.9, 1.1),
    contrast=(1.0, 1.15),
    gamma=(0.92, 1.02),
    saturation=(0.8, 1.0),
    tint=(1.04, 0.98, 0.96),
    noise=(0.02, 0.04),
    blur=(0.55, 0.9),
    vignette=(0.2, 0.4),
)

_FOG = replace(
    _OVERCAST,
    field_of_view=(54.0, 70.0),
    camera_height=(1.4, 1.9),
    frontage=(5.0, 3.0, 1.4, 1.6, 2.0, 1.0),
    facades=_OVERCAST.facades + _SUBURB.facades,
    leaves=_OVERCAST.leaves + _SUBURB.leaves,
    sky=((196, 200, 204), (206, 208, 210)),
    clouds=(0.0, 0.1),
    sun=(0.04, 0.04, 0.04),
    fog=(0.022, 0.045),
    fog_colour=(202, 205, 208),
    wet=(0.0, 0.1),
    exposure=(0.95, 1.08),
    contrast=(0.8, 0.92),
    saturation=(0.55, 0.75),
    tint=(0.98, 1.0, 1.02),
    blur=(0.6, 0.95),
)

_RAIN = replace(
    _OVERCAST,
    field_of_view=(54.0, 70.0),
    camera_height=(1.3, 1.8),
    facades=_OVERCAST.facades + _NOON.facades,
    leaves=_OVERCAST.leaves + _NOON.leaves,
    road=((52, 54, 60), (62, 64, 70), (46, 48, 54)),
    sky=((92, 100, 114), (150, 158, 170)),
    cloud_colour=(112, 120, 132),
    sun=(0.0, 0.0, 0.0),
    ambient=(0.56, 0.62, 0.74),
    shadow=0.0,
    night=0.35,
    fog=(0.007, 0.014),
    fog_colour=(136, 146, 160),
    wet=(0.55, 0.85),
    rain=1.0,
    exposure=(0.85, 1.0),
    contrast=(0.92, 1.05),
    saturation=(0.7, 0.9),
    tint=(0.92, 1.0, 1.1),
    noise=(0.02, 0.035),
    blur=(0.8, 1.2),
)

_WINTER = replace(
    _SUBURB,
    field_of_view=(56.0, 72.0),
    camera_height=(1.3, 1.8),
    lanes=(1, 2),
    frontage=(4.0, 5.0, 1.3, 1.6, 1.6, 1.0),
    trams=0.2,
    facades=_OVERCAST.facades + _SUBURB.facades,
    leaves=((108, 96, 84), (128, 118, 108), (66, 78, 66), (94, 84, 76)),
    sky=((186, 196, 212), (226, 228, 234)),
    clouds=(0.4, 0.8),
    cloud_colour=(220, 222, 228),
    sun=(0.2, 0.19, 0.17),
    ambient=(0.8, 0.84, 0.92),
    shadow=0.35,
    fog=(0.004, 0.01),
    fog_colour=(220, 224, 232),
    snow=(0.45, 0.85),
    exposure=(0.95, 1.05),
    contrast=(0.95, 1.05),
    saturation=(0.6, 0.85),
    tint=(0.97, 1.0, 1.05),
)

STREETS: dict[str, StreetStyle] = {
    "noon": _NOON,
    "suburb": _SUBURB,
    "overcast": _OVERCAST,
    "night": _NIGHT,
    "fog": _FOG,
    "rain": _RAIN,
    "winter": _WINTER,
}
"""Every domain by name.  ``noon``, ``suburb`` and ``overcast`` are meant as sources, the others as unseen."""
