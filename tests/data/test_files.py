"""Label encodings beside the 8-bit ones of test_folder: 16-bit PNGs and polygons; lists of names."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pmm_fast.data.convert_files import write_whole
from pmm_fast.data.files import LABEL_FORMATS, DataError, check_encoding, read_image, read_labels, read_size
from pmm_fast.data.labels import IGNORE, mapping
from pmm_fast.data.split_lists import read_list
from tests.data import trees


def read16(path: Path) -> np.ndarray:
    return read_labels(path, "ids16", "synthia_ids", "cityscapes19")


# --- 16 bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (4, 0, 3, 1, 2)])
def test_every_row_filter(tmp_path: Path, filters: tuple[int, ...], channels: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 65536, (23, 31, 3))
    values[..., 0] = rng.integers(0, 23, (23, 31))
    trees.write_png16(tmp_path / "a.png", values if channels == 3 else values[..., 0], filters)
    labels = read16(tmp_path / "a.png")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, mapping("synthia_ids", "cityscapes19")[values[..., 0]])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value", [23, 254, 256, 259, 3 << 8, 65535])
def test_16_bit_ids_beyond_the_table(tmp_path: Path, value: int, channels: int) -> None:
    values = np.zeros((5, 6, 3), int)
    values[1, 2:4] = value
    trees.write_png16(tmp_path / "a.png", values if channels == 3 else values[..., 0])
    with pytest.raises(DataError, match=rf"a.png: values {value} in 2 pixels are no ids of .* 'synthia_ids' \(0..22"):
        read16(tmp_path / "a.png")


def test_255_is_ignore_in_16_bits_too(tmp_path: Path) -> None:
    trees.write_png16(tmp_path / "a.png", np.array([[255, 3]]))
    assert read16(tmp_path / "a.png").tolist() == [[IGNORE, 0]]


def test_16_bits_expected(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for pixels, message in (
        (
            np.zeros((4, 5), np.uint8),
            "expected a 16-bit PNG of ids, got 8 bits, mode L; for 8-bit ids set label_format: ids",
        ),
        (np.zeros((4, 5, 3), np.uint8), "expected a 16-bit PNG of ids, got 8 bits, mode RGB"),
    ):
        Image.fromarray(pixels).save(path)
        with pytest.raises(DataError, match=re.escape(f"{path}: {message}") + "$"):
            read16(path)
    trees.write_png16(path, np.zeros((4, 5, 4), int))
    with pytest.raises(DataError, match="expected a 16-bit PNG of one or three channels, got one with alpha"):
        read16(path)
    trees.write_png16(path, np.zeros((4, 5, 3), int))
    with pytest.raises(DataError, match=r"got 16 bits; convert it .* or, if .* set label_format: ids16") as caught:
        read_labels(path, "ids", "synthia_ids", "cityscapes19")
    # a worker sends it as it is
    sent = pickle.loads(pickle.dumps(caught.value))
    assert str(sent) == str(caught.value) and sent.found == caught.value.found


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.booleans())
def test_any_damage_to_a_16_bit_file_is_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: bool
) -> None:
    path = tmp_path_factory.mktemp("damage") / "a.png"
    values = np.random.default_rng(0).integers(0, 23, (12, 20, 3))
    trees.write_png16(path, values)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data[: position % len(data)] if cut else data)
    try:
        labels = read16(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert labels.ndim == 2


# --- polygons ---------------------------------------------------------------------------------------------------------


def polygons(path: Path, *objects: dict, **other: object) -> np.ndarray:
    path.write_text(json.dumps({"imgHeight": 6, "imgWidth": 8, "objects": objects} | other))
    return read_labels(path, "polygons", "idd_ids", "cityscapes19")


def square(label: str, left: float, top: float, right: float, bottom: float, **other: object) -> dict:
    return {"label": label, "polygon": [[left, top], [right, top], [right, bottom], [left, bottom]]} | other


def test_polygons_are_drawn_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    wanted = np.full((6, 8), IGNORE, np.uint8)
    wanted[1:4, 1:5], wanted[2:6, 3:8] = 10, 13
    parts = square("sky", 1, 1, 4, 3), square("cargroup", 3, 2, 20, 20), square("road", 0, 0, 7, 5, deleted=1)
    np.testing.assert_array_equal(polygons(path, *parts), wanted)
    # what has no class covers what lies below it
    wanted[2:6, 3:8] = IGNORE
    parts = square("sky", 1, 1, 4, 3), square("polegroup", 3, 2, 20, 20)
    np.testing.assert_array_equal(polygons(path, *parts), wanted)
    assert (polygons(path) == IGNORE).all()


def test_labels_that_idd_does_not_have(tmp_path: Path) -> None:
    for label, message in (("cars", r"'cars'; did you mean 'car'\?"), ("xgroup", "'xgroup'")):
        with pytest.raises(DataError, match=f"a.json: unknown label {message}"):
            polygons(tmp_path / "a.json", square(label, 0, 0, 1, 1))


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"imgHeight": 6, "imgWidth": 8, "objects": [1]}',
        '{"imgHeight": 6, "imgWidth": 8, "objects": [{"label": "car"}]}',
        '{"imgHeight": 6, "imgWidth": 8, "objects": [{"label": "car", "polygon": [[1, 2]]}]}',
        '{"imgHeight": 6, "imgWidth": 8, "objects": [{"label": "car", "polygon": [[1, 2], [2], [3, 3]]}]}',
        '{"imgHeight": 6, "imgWidth": 8, "objects": [{"label": "car", "polygon": [["a", 2], [2, 1], [3, 3]]}]}',
        '{"imgHeight": -6, "imgWidth": 8, "objects": []}',
        '{"imgHeight": null, "imgWidth": 8, "objects": []}',
    ],
)
def test_json_of_another_kind(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"a.json: expected imgWidth, imgHeight and objects of label and polygon"):
        read_labels(path, "polygons", "idd_ids", "cityscapes19")


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b""])
def test_damaged_json(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a.json: cannot be read as JSON"):
        read_labels(tmp_path / "a.json", "polygons", "idd_ids", "cityscapes19")


# --- what goes together -----------------------------------------------------------------------------------------------


def test_check_encoding() -> None:
    for label_format, source in zip(LABEL_FORMATS, ("idd_ids", "synthia_ids", "cityscapes19", "idd_ids"), strict=True):
        check_encoding(label_format, source, "cityscapes19", "here")
    with pytest.raises(DataError, match=r"here.label_format: expected ids, ids16, colours or polygons, got 'rgb'"):
        check_encoding("rgb", "cityscapes19", "cityscapes19", "here")
    with pytest.raises(DataError, match=r"here.label_space: .*needs a space with colours.*got idd_ids"):
        check_encoding("colours", "idd_ids", "cityscapes19", "here")
    with pytest.raises(DataError, match=r"here.label_space: expected idd_ids with label_format: polygons, got city"):
        check_encoding("polygons", "cityscapes19", "cityscapes19", "here")
    with pytest.raises(ValueError, match=r"unknown label space 'idd_id'; did you mean 'idd_ids'"):
        check_encoding("ids", "idd_id", "cityscapes19", "here")


def test_16_bit_colour_images_are_refused(tmp_path: Path) -> None:
    # decoders part over them: some keep the high byte, some round
    trees.write_png16(tmp_path / "a.png", np.full((3, 4, 3), 0x12FF))
    for read in (read_image, read_size):
        with pytest.raises(DataError, match=r"a\.png: expected an 8-bit image, got 16 bits, mode RGB; convert it"):
            read(tmp_path / "a.png")


def test_the_size_is_in_the_header(tmp_path: Path) -> None:
    for suffix in ("png", "jpg"):
        path = tmp_path / f"a.{suffix}"
        Image.new("RGB", (31, 17)).save(path)
        path.write_bytes(path.read_bytes()[:-20])
        assert read_size(path) == (31, 17)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png: cannot be read as an image: the file is no image$"):
        read_size(tmp_path / "b.png")


# --- lists ------------------------------------------------------------------------------------------------------------


def test_numbers_in_short(tmp_path: Path) -> None:
    (tmp_path / "odd.txt").write_text("numbers of 5 digits\n1 3 5 7 9\n")
    (tmp_path / "a.txt").write_text("# some\n\nnumbers of 5 digits\n8-10 1-3\n# more\n12 !odd 14-14")
    assert list(read_list(tmp_path / "a.txt")) == ["00002", "00008", "00010", "00012", "00014"]


def test_names_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\ufeff# some\nb\\c.png\n\n./a\n", encoding="utf-8")
    assert read_list(path) == {"b/c.png": f"{path}, line 2", "a": f"{path}, line 4"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt names no image"),
        (b"numbers of 5 digits\n", "a.txt names no image"),
        (b"numbers of 5 digits\n5-3", "a.txt names no image"),
        (b"numbers of 5 digits\n1 2- 3", r"a.txt: expected numbers, runs like 15-20 or !LIST, got '2-'"),
        (b"numbers of 5 digits\n1 !gone", r"gone.txt: cannot be read as a list of images"),
        (b"\xff\xff", "a.txt: cannot be read as a list of images"),
    ],
)
def test_wrong_lists(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_list(tmp_path / "a.txt")


# --- writing ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_called_by_its_own_name(tmp_path: Path) -> None:
    def refuse(part: Path) -> None:
        raise PermissionError(13, "Permission denied", str(part))

    with pytest.raises(PermissionError) as caught:
        write_whole(tmp_path / "a.html", refuse)
    assert caught.value.filename == str(tmp_path / "a.html")
    # a file that is read meanwhile keeps its name
    with pytest.raises(FileNotFoundError, match="/gone'"):
        write_whole(tmp_path / "a.html", lambda part: (tmp_path / "gone").read_bytes())
