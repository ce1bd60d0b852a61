"""Images and videos found by file, folder or pattern."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_fast.data.files import DataError
from pmm_fast.data.inputs import Inputs, find_inputs, kind_of, read_upright
from pmm_fast.data.videos import import_av
from tests.tiny_network import noise


def picture(path: Path, kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(4, 6)).save(path, kind)
    return path


def names(inputs: Inputs) -> list[str]:
    return [item.name for item in inputs.found]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/2.png", "b/1.jpg", "a.png", ".hidden/1.png", "b/.hidden.png", "out/overlay/a.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folder_is_searched_to_the_bottom(tree):
    inputs = find_inputs([str(tree)], [tree / "out/overlay"])
    assert names(inputs) == ["a", "b/1", "b/2"]
    assert [item.path for item in inputs.found] == [tree / "a.png", tree / "b/1.jpg", tree / "b/2.png"]
    assert inputs.others == 1
    # what is left out must be said
    assert "out/overlay/a" in names(find_inputs([str(tree)]))


def test_pattern(tree, monkeypatch):
    assert names(find_inputs([f"{tree}/*/*.png"], [tree / "out/overlay"])) == ["b/2"]
    assert names(find_inputs([f"{tree}/**/*.png"], [tree / "out/overlay"])) == ["a", "b/2"]
    # folders that a pattern matches are searched
    assert names(find_inputs([f"{tree}/[b-c]"])) == ["b/1", "b/2"]
    monkeypatch.chdir(tree)
    assert names(find_inputs(["*.png", "b"])) == ["a", "1", "2"]
    # a file whose name looks like a pattern
    picture(tree / "x[1].png")
    assert names(find_inputs(["x[1].png"])) == ["x[1]"]


def test_names_that_would_be_shared(tmp_path):
    for name in ("x/1.png", "y/1.png", "x/only.png", "y/z/1.png"):
        picture(tmp_path / name)
    assert names(find_inputs([str(tmp_path / "x"), str(tmp_path / "y")])) == ["x/1", "only", "y/1", "z/1"]
    # files of one name but for the extension keep it
    picture(tmp_path / "x/1.jpg", "JPEG")
    assert names(find_inputs([str(tmp_path / "x")])) == ["1.jpg", "1.png", "only"]
    for name in ("w/1.jpg", "w/1.png", "w/1.jpg.png"):
        picture(tmp_path / name)
    assert names(find_inputs([str(tmp_path / "w")])) == ["1.jpg", "1.jpg.png", "1.png"]
    # led to twice, there once
    assert names(find_inputs([str(tmp_path / "x/only.png"), str(tmp_path / "x")])) == ["only", "1.jpg", "1.png"]


def test_kind_is_of_the_content(tmp_path):
    assert kind_of(picture(tmp_path / "image_without_extension")) == "image"
    assert kind_of(picture(tmp_path / "image.mp4", "JPEG")) == "image"
    heads = {"a.png": b"\0\0\0\x18ftypmp42", "b": b"\x1aE\xdf\xa3----", "c": b"RIFF\0\0\0\0AVI "}
    for name, head in heads.items():
        (tmp_path / name).write_bytes(head)
        assert kind_of(tmp_path / name) == "video"
    (tmp_path / "still").write_bytes(b"\0\0\0\x18ftypavif")
    assert kind_of(tmp_path / "still") == "image"
    # damaged from the first byte on: the extension tells what it was
    for name, kind in (("x.jpg", "image"), ("x.MOV", "video"), ("x.txt", None)):
        (tmp_path / name).write_bytes(b"garbage")
        assert kind_of(tmp_path / name) == kind
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert kind_of(tmp_path / "gone.png") == "image" and kind_of(tmp_path) is None


def test_a_named_file_is_always_an_input(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    [item] = find_inputs([str(tmp_path / "notes.txt")]).found
    assert item.kind == "image"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere.png", "no such file or folder"),
        ("*.jpg", "the pattern matches no image and no video"),
        ("empty", "the folder holds no image and no video"),
        ("texts", "the folder holds no image and no video (other files: 1)"),
    ],
)
def test_a_path_that_leads_nowhere(tmp_path, path, reason):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/1.txt").write_text("text")
    with pytest.raises(DataError, match=f"^{re.escape(f'{tmp_path}/{path}: {reason}')}$"):
        find_inputs([str(tmp_path / path)])


def test_images_are_turned_upright(tmp_path):
    pixels = noise(4, 6)
    exif = Image.Exif()
    # a quarter turn clockwise makes it upright
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    Image.fromarray(pixels).save(tmp_path / "damaged.png", exif=b"Exif\0\0nonsense")
    Image.fromarray(pixels).save(tmp_path / "cut.png", exif=exif.tobytes()[:10])
    assert np.array_equal(np.asarray(read_upright(tmp_path / "turned.png")), np.rot90(pixels, -1))
    for name in ("plain", "damaged", "cut"):
        assert np.array_equal(np.asarray(read_upright(tmp_path / f"{name}.png")), pixels)


def test_grey_and_16_bits(tmp_path):
    grey = noise(4, 6)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    image = read_upright(tmp_path / "grey.png")
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), grey[..., None].repeat(3, 2))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep.png: expected an 8-bit image, got"):
        read_upright(tmp_path / "deep.png")


def test_the_extra_for_videos_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'pmm_fast\[video\]'"):
        import_av()
