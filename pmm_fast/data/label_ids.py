"""The ids in which data sets write their labels, and the class of each.

A table is only read from, never learnt: ``labels.mapping`` carries its ids on into the space that is learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class IdTable:
    """The ids of one data set's label files.

    Attributes:
        name: name of the table, as in ``DomainConfig.label_space``.
        space: label space to which the classes belong.
        names: the data set's own names; the position is the id.
        members: for a class of ``space``, the names that are of that class; names in none are ignored.
    """

    name: str
    space: str
    names: tuple[str, ...]
    members: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        members = [name for names in self.members.values() for name in names]
        if len(set(members)) != len(members) or not set(members) <= set(self.names):
            raise ValueError(f"id table {self.name}: a name belongs to two classes, or to a class without being listed")

    @property
    def classes(self) -> tuple[str | None, ...]:
        """The class of each id, None where it has none."""
        of = {name: target for target, names in self.members.items() for name in names}
        return tuple(of.get(name) for name in self.names)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _same(text: str) -> dict[str, tuple[str, ...]]:
    """Classes that the data set calls by the name they have here."""
    return {name: (name,) for name in _split(text)}


_CITYSCAPES_IDS = _split(
    "unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, road, sidewalk, parking, "
    "rail track, building, wall, fence, guard rail, bridge, tunnel, pole, polegroup, traffic light, traffic sign, "
    "vegetation, terrain, sky, person, rider, car, truck, bus, caravan, trailer, train, motorcycle, bicycle"
)
_SYNTHIA_IDS = _split(
    "void, sky, building, road, sidewalk, fence, vegetation, pole, car, traffic sign, pedestrian, bicycle, motorcycle, "
    "parking slot, road work, traffic light, terrain, rider, truck, bus, train, wall, lane marking"
)
_MAPILLARY_IDS = _split(
    "Bird, Ground Animal, Curb, Fence, Guard Rail, Barrier, Wall, Bike Lane, Crosswalk - Plain, Curb Cut, Parking, "
    "Pedestrian Area, Rail Track, Road, Service Lane, Sidewalk, Bridge, Building, Tunnel, Person, Bicyclist, "
    "Motorcyclist, Other Rider, Lane Marking - Crosswalk, Lane Marking - General, Mountain, Sand, Sky, Snow, Terrain, "
    "Vegetation, Water, Banner, Bench, Bike Rack, Billboard, Catch Basin, CCTV Camera, Fire Hydrant, Junction Box, "
    "Mailbox, Manhole, Phone Booth, Pothole, Street Light, Pole, Traffic Sign Frame, Utility Pole, Traffic Light, "
    "Traffic Sign (Back), Traffic Sign (Front), Trash Can, Bicycle, Boat, Bus, Car, Caravan, Motorcycle, On Rails, "
    "Other Vehicle, Trailer, Truck, Wheeled Slow, Car Mount, Ego Vehicle, Unlabeled"
)
_IDD_IDS = _split(
    "road, parking, drivable fallback, sidewalk, rail track, non-drivable fallback, person, animal, rider, motorcycle, "
    "bicycle, autorickshaw, car, truck, bus, caravan, trailer, train, vehicle fallback, curb, wall, fence, guard rail, "
    "billboard, traffic sign, traffic light, pole, polegroup, obs-str-bar-fallback, building, bridge, tunnel, "
    "vegetation, sky, fallback background, unlabeled, ego vehicle, rectification border, out of roi, license plate"
)
_CAMVID_IDS = _split(
    "sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian, bicyclist, unlabelled"
)

ID_TABLES: dict[str, IdTable] = {
    table.name: table
    for table in (
        IdTable(
            "cityscapes_ids",
            "cityscapes19",
            _CITYSCAPES_IDS,
            _same(
                "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, "
                "person, rider, car, truck, bus, train, motorcycle, bicycle"
            ),
        ),
        IdTable(
            "synthia_ids",
            "cityscapes19",
            _SYNTHIA_IDS,
            _same(
                "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, "
                "rider, car, truck, bus, train, motorcycle, bicycle"
            )
            | {"person": ("pedestrian",)},
        ),
        IdTable(
            "mapillary_ids",
            "cityscapes19",
            _MAPILLARY_IDS,
            {
                "road": ("Road", "Lane Marking - General", "Manhole"),
                "sidewalk": ("Sidewalk", "Curb"),
                "building": ("Building",),
                "wall": ("Wall",),
                "fence": ("Fence",),
                "pole": ("Pole", "Utility Pole"),
                "traffic light": ("Traffic Light",),
                "traffic sign": ("Traffic Sign (Front)",),
                "vegetation": ("Vegetation",),
                "terrain": ("Terrain",),
                "sky": ("Sky",),
                "person": ("Person",),
                "rider": ("Bicyclist", "Motorcyclist", "Other Rider"),
                "car": ("Car",),
                "truck": ("Truck",),
                "bus": ("Bus",),
                "train": ("On Rails",),
                "motorcycle": ("Motorcycle",),
                "bicycle": ("Bicycle",),
            },
        ),
        IdTable(
            "idd_ids",
            "cityscapes19",
            _IDD_IDS,
            _same(
                "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, sky, person, "
                "rider, car, truck, bus, train, motorcycle, bicycle"
            )
            | {"terrain": ("non-drivable fallback",)},
        ),
        IdTable(
            "camvid_ids",
            "camvid11",
            _CAMVID_IDS,
            _same("sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian, bicyclist"),
        ),
    )
}
