"""Label spaces, their mappings and colours."""

from __future__ import annotations

import numpy as np
import pytest

from pmm_fast.data.label_ids import ID_TABLES, IdTable
from pmm_fast.data.labels import IGNORE, INVALID, SPACES, LabelSpace, colourise, get_space, mapping, num_ids
from tests.data import trees

# the seven coarse classes by the names of the fine ones, written down independently of the table under test
PARENTS = {
    "drivable": {"road"},
    "non-drivable": {"sidewalk", "terrain"},
    "living things": {"person", "rider"},
    "vehicles": {"car", "truck", "bus", "train", "motorcycle", "bicycle"},
    "roadside objects": {"wall", "fence", "pole", "traffic light", "traffic sign"},
    "far objects": {"building", "vegetation"},
    "sky": {"sky"},
}


def test_cityscapes_table() -> None:
    space = get_space("cityscapes19")
    assert space.num_classes == 19
    assert [space.classes.index(name) for name in ("road", "sky", "car", "bicycle")] == [0, 10, 13, 18]
    assert space.colours[13] == (0, 0, 142) and space.colours[9] == (152, 251, 152)


@pytest.mark.parametrize("name", sorted(SPACES))
def test_spaces_are_named_by_their_key(name: str) -> None:
    assert get_space(name).name == name
    assert len(set(get_space(name).classes)) == get_space(name).num_classes


@pytest.mark.parametrize("name", sorted(SPACES))
def test_identity_mapping_marks_foreign_values(name: str) -> None:
    count = get_space(name).num_classes
    table = mapping(name, name)
    assert table.dtype == np.uint8 and table.shape == (256,)
    np.testing.assert_array_equal(table[:count], np.arange(count))
    assert (table[count:IGNORE] == INVALID).all()
    assert table[IGNORE] == IGNORE


def test_cityscapes_to_idd_lite_by_name() -> None:
    fine, coarse = get_space("cityscapes19"), get_space("idd_lite7")
    table = mapping("cityscapes19", "idd_lite7")
    got = {name: {fine.classes[i] for i in range(19) if table[i] == index} for index, name in enumerate(coarse.classes)}
    assert got == PARENTS
    assert table[IGNORE] == IGNORE and table[19] == INVALID


def test_cityscapes_to_synthia_by_name() -> None:
    fine, coarse = get_space("cityscapes19").classes, get_space("synthia16").classes
    table = mapping("cityscapes19", "synthia16")
    missing = {"terrain", "truck", "train"}
    assert coarse == tuple(name for name in fine if name not in missing)
    for index, name in enumerate(fine):
        assert table[index] == (IGNORE if name in missing else coarse.index(name))
        assert (
            name in missing or get_space("synthia16").colours[table[index]] == get_space("cityscapes19").colours[index]
        )


def test_cityscapes_to_camvid_by_name() -> None:
    parents = {
        "sky": {"sky"},
        "building": {"building", "wall"},
        "pole": {"pole"},
        "road": {"road"},
        "pavement": {"sidewalk"},
        "tree": {"vegetation", "terrain"},
        "sign symbol": {"traffic light", "traffic sign"},
        "fence": {"fence"},
        "car": {"car", "truck", "bus", "train"},
        "pedestrian": {"person"},
        "bicyclist": {"rider", "motorcycle", "bicycle"},
    }
    fine, coarse = get_space("cityscapes19").classes, get_space("camvid11").classes
    assert coarse == tuple(parents)
    table = mapping("cityscapes19", "camvid11")
    assert {coarse[i]: {fine[j] for j in range(19) if table[j] == i} for i in range(11)} == parents


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("cityscapes_ids", trees.CITYSCAPES),
        ("synthia_ids", trees.SYNTHIA),
        ("mapillary_ids", trees.MAPILLARY),
        ("camvid_ids", trees.CAMVID),
        ("idd_ids", {index: trees.IDD[name] for index, name in enumerate(ID_TABLES["idd_ids"].names)}),
    ],
)
def test_id_tables(name: str, wanted: dict[int, int]) -> None:
    table = mapping(name, ID_TABLES[name].space)
    count = num_ids(name)
    assert list(table[:count]) == [wanted[index] for index in range(len(wanted))]
    assert (table[count:IGNORE] == INVALID).all() and table[IGNORE] == IGNORE
    for space in set(SPACES) - {"cityscapes19", "camvid11"}:
        if ID_TABLES[name].space == "cityscapes19":
            np.testing.assert_array_equal(mapping(name, space)[:count], mapping("cityscapes19", space)[table[:count]])


def test_idd_ids_stand_in_order() -> None:
    names = ID_TABLES["idd_ids"].names
    chosen = {0: "road", 5: "non-drivable fallback", 12: "car", 20: "wall", 26: "pole", 33: "sky", 35: "unlabeled"}
    assert len(names) == 40 and names[39] == "license plate" and {i: names[i] for i in chosen} == chosen


@pytest.mark.parametrize("members", [{"sky": ("b",)}, {"sky": ("a",), "road": ("a",)}])
def test_inconsistent_id_table_is_refused(members: dict) -> None:
    with pytest.raises(ValueError, match="id table odd"):
        IdTable("odd", "cityscapes19", ("a",), members)


def test_unknown_source_suggests() -> None:
    with pytest.raises(ValueError, match=r"unknown label space 'idd_id'; did you mean 'idd_ids'\? \(known: camvid11, "):
        mapping("idd_id", "cityscapes19")
    # ids are read, never learnt
    with pytest.raises(ValueError, match=r"unknown label space 'idd_ids'"):
        mapping("cityscapes19", "idd_ids")


def test_unknown_space_suggests() -> None:
    with pytest.raises(
        ValueError,
        match=r"'cityscape19'.*did you mean 'cityscapes19'.*known: camvid11, cityscapes19, idd_lite7, synthia16",
    ):
        get_space("cityscape19")


def test_no_mapping_to_a_finer_space() -> None:
    with pytest.raises(ValueError, match=r"'idd_lite7' \(7 classes\) cannot be mapped to 'cityscapes19'"):
        mapping("idd_lite7", "cityscapes19")


def test_colourise() -> None:
    space = get_space("cityscapes19")
    labels = np.array([[0, 18], [IGNORE, 200]], np.uint8)
    painted = colourise(labels, space)
    assert painted.dtype == np.uint8
    np.testing.assert_array_equal(painted, [[space.colours[0], space.colours[18]], [(0, 0, 0), (0, 0, 0)]])


@pytest.mark.parametrize("labels", [np.zeros((2, 2), np.int64), np.zeros((1, 2, 2), np.uint8)])
def test_colourise_refuses_other_arrays(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W\], got"):
        colourise(labels, get_space("idd_lite7"))


@pytest.mark.parametrize(
    ("classes", "colours", "to"),
    [
        ((), (), {}),
        (("a", "b"), ((0, 0, 1),), {}),
        (("a", "b"), ((0, 0, 1), (0, 0, 1)), {}),
        (("a",), ((0, 0, 1),), {"idd_lite7": (0, 1)}),
    ],
)
def test_inconsistent_space_is_refused(classes: tuple, colours: tuple, to: dict) -> None:
    with pytest.raises(ValueError, match="label space odd"):
        LabelSpace("odd", classes, colours, to)
