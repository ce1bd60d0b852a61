"""Image folders: finding domains, pairing files, reading labels, and what is said when something is wrong."""

from __future__ import annotations

import os
import re
import struct
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pmm_fast.config.schema import DataConfig, DomainConfig
from pmm_fast.data.folder import DataError, open_domain
from pmm_fast.data.labels import IGNORE, colourise, get_space, mapping
from pmm_fast.data.split_lists import LISTS

# KITTI and IDD-Lite, not shipped: their licences do not allow it
REAL = Path(os.environ.get("PMM_FAST_TEST_DATA", Path(__file__).parents[2].parent / "shared/data"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real data beside the repository")
CITY = get_space("cityscapes19")


def ids(seed: int, size: tuple[int, int] = (12, 20)) -> np.ndarray:
    values = np.array([*range(19), IGNORE], np.uint8)
    return values[np.random.default_rng(seed).integers(0, 20, size)]


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def make(root: Path, names: tuple[str, ...] = ("a", "b", "c"), images: str = "images", labels: str = "labels") -> Path:
    """A folder of small pairs; the label of the n-th name is ``ids(n)``."""
    for seed, name in enumerate(names):
        save(root / images / f"{name}.png", np.full((12, 20, 3), seed * 10 % 256, np.uint8))
        save(root / labels / f"{name}.png", ids(seed))
    return root


def config(root: Path, label_space: str = "cityscapes19", **options: str) -> DataConfig:
    return DataConfig(
        root=str(root.parent), label_space=label_space, domains={"d": DomainConfig(root=root.name, **options)}
    )


def palette_image(labels: np.ndarray, order: np.ndarray) -> Image.Image:
    """The label map as a palette PNG in class colours, the palette shuffled; ignore is a colour of no class."""
    colours = np.array([*CITY.colours, (111, 74, 0)], np.uint8)
    index = np.where(labels == IGNORE, 19, labels)
    image = Image.fromarray(np.argsort(order).astype(np.uint8)[index], "P")
    image.putpalette(colours[order].tobytes())
    return image


# --- finding --------------------------------------------------------------------------------------------------------


def test_configured_domain(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    domain = open_domain("d", config(root), "train")
    assert domain.name == "d" and len(domain) == 3
    assert domain.pairs == [(root / f"images/{n}.png", root / f"labels/{n}.png") for n in "abc"]
    image, labels = domain.load(1)
    assert image.mode == "RGB" and image.size == (20, 12) and image.getpixel((0, 0)) == (10, 10, 10)
    np.testing.assert_array_equal(labels, ids(1))
    assert "d: 3 images" in domain.describe() and "train and val are the same images" in domain.describe()


def test_a_named_domain_wins_over_a_folder_and_splits_apply(tmp_path: Path) -> None:
    make(tmp_path / "d", ("folder",))
    make(tmp_path / "other", ("x", "y"), "img/train", "lab/train")
    make(tmp_path / "other", ("z",), "img/val", "lab/val")
    cfg = DataConfig(root=str(tmp_path))
    assert [p[0].stem for p in open_domain("d", cfg, "train").pairs] == ["folder"]
    cfg.domains["d"] = DomainConfig(root="other", images="img/{split}", labels="lab/{split}")
    assert [p[0].stem for p in open_domain("d", cfg, "train").pairs] == ["x", "y"]
    val = open_domain("d", cfg, "val")
    assert [p[0].stem for p in val.pairs] == ["z"] and "same images" not in val.describe()


def test_folder_path_with_and_without_splits(tmp_path: Path) -> None:
    flat = make(tmp_path / "flat")
    assert len(open_domain(str(flat), DataConfig(), "val")) == 3
    split = make(tmp_path / "split", ("a", "b"), "images/train", "labels/train")
    assert len(open_domain(str(split), DataConfig(), "train")) == 2
    # all images instead would be the training images
    with pytest.raises(DataError, match=r"split/images has a folder 'train' but none called 'val'"):
        open_domain(str(split), DataConfig(), "val")
    make(split, ("c",), "images/val", "labels/val")
    assert [p[0].name for p in open_domain(str(split), DataConfig(), "val").pairs] == ["c.png"]
    assert len(open_domain(str(split), DataConfig(), "train")) == 2


def test_a_described_folder_has_its_splits_too(tmp_path: Path) -> None:
    root = make(tmp_path / "set", ("a", "b"), "images/train", "labels/train")
    with pytest.raises(DataError, match=r"set/images has a folder 'train' but none called 'val'"):
        open_domain("d", config(root), "val")
    make(root, ("c",), "images/val", "labels/val")
    for options in ({}, {"label_format": "ids"}):
        for split, names in (("train", ["a", "b"]), ("val", ["c"])):
            domain = open_domain("d", config(root, **options), split)
            assert [p[0].stem for p in domain.pairs] == names and "same images" not in domain.describe()
    # a list says by itself what is taken
    (root / "all.txt").write_text("train/a\nval/c\n")
    assert len(open_domain("d", config(root, list_file="all.txt"), "train")) == 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_streets_are_generated_with_the_configured_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    calls = []

    def ensure_streets(domain: str, split: str, count: int, size: tuple, cache: Path | None) -> Path:
        calls.append((domain, split, count, tuple(size), cache))
        # more than asked for, as left by another run
        names = tuple(f"{index:05d}" for index in range(count + 2))
        return make(tmp_path / "made", names, f"images/{split}", f"labels/{split}")

    fake = types.ModuleType("pmm_fast.data.streets")
    fake.__dict__.update(ensure_streets=ensure_streets, STREETS={"noon": 0, "fog": 0})
    monkeypatch.setitem(sys.modules, "pmm_fast.data.streets", fake)
    cfg = DataConfig(
        cache=str(tmp_path), streets_images=7, streets_size=[64, 128], label_space="idd_lite7", root="/absent"
    )
    domain = open_domain("streets/noon", cfg, split)
    assert calls == [("noon", split, 7 if split == "train" else 40, (64, 128), tmp_path)]
    assert len(domain) == (7 if split == "train" else 40)
    np.testing.assert_array_equal(domain.load(6)[1], mapping("cityscapes19", "idd_lite7")[ids(6)])
    with pytest.raises(DataError, match=r"'streets/non'.*did you mean 'streets/noon'"):
        open_domain("streets/non", cfg, split)
    with pytest.raises(DataError, match=r"'kity'.*did you mean 'kitty'.*known: kitty, streets/fog, streets/noon.*kity"):
        open_domain("kity", DataConfig(domains={"kitty": DomainConfig()}), split)


def test_nested_suffixed_case_insensitive_sorted(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for seed, name in enumerate(("z/1", "a/2", "a/1")):
        extension = (".JPG", ".jpeg", ".Png")[seed]
        save(root / "images" / f"{name}_left{extension}", np.zeros((12, 20, 3), np.uint8))
        save(root / "labels" / f"{name}_ids.PNG", ids(seed))
        save(root / "labels" / f"{name}_color.png", ids(seed))
    save(root / "images/._a_left.png", ids(0))
    domain = open_domain("d", config(root, image_suffix="_left", label_suffix="_ids"), "train")
    assert [label.relative_to(root / "labels").as_posix() for _, label in domain.pairs] == [
        "a/1_ids.PNG",
        "a/2_ids.PNG",
        "z/1_ids.PNG",
    ]
    np.testing.assert_array_equal(domain.load(0)[1], ids(2))


def test_linked_folders_are_followed_and_cycles_end(tmp_path: Path) -> None:
    root = make(tmp_path / "set", ("a",))
    make(tmp_path / "far", ("b",))
    for kind in ("images", "labels"):
        (root / kind / "link").symlink_to(tmp_path / "far" / kind)
        (root / kind / "cycle").symlink_to(root / kind)
    assert [p[0].stem for p in open_domain("d", config(root), "train").pairs] == ["a", "b"]


@pytest.mark.parametrize("where", ["absolute", "below the root"])
def test_list_file(tmp_path: Path, where: str) -> None:
    root = make(tmp_path / "set", ("city/a_left", "city/b_left", "city/c_left"))
    for name in "abc":
        (root / f"labels/city/{name}_left.png").rename(root / f"labels/city/{name}.png")
    path = root / "some_val.txt"
    path.write_text("# chosen\ncity/c_left.png\n\ncity/a\n./city/a_left\n")
    name = str(path) if where == "absolute" else "some_{split}.txt"
    domain = open_domain("d", config(root, list_file=name, image_suffix="_left"), "val")
    assert [p[0].name for p in domain.pairs] == ["a_left.png", "c_left.png"]
    path.write_text("city/a\ncity/aa\n")
    with pytest.raises(DataError, match=r"some_val.txt, line 2: there is no image 'city/aa'; did you mean 'city/a'"):
        open_domain("d", config(root, list_file=name, image_suffix="_left"), "val")
    path.write_text("# nothing\n")
    with pytest.raises(DataError, match=r"some_val.txt names no image"):
        open_domain("d", config(root, list_file=name, image_suffix="_left"), "val")


def test_shipped_lists() -> None:
    train, val = ((LISTS / f"kitti_semantics_{split}.txt").read_text().split() for split in ("train", "val"))
    assert (len(train), len(val)) == (160, 40)
    assert sorted(train + val) == [f"{i:06d}_10" for i in range(200)]
    assert val == [f"{i:06d}_10" for i in range(0, 200, 5)]


# --- what is wrong with a folder --------------------------------------------------------------------------------------


def test_missing_root_names_what_exists(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"no folder {tmp_path}/gone/images for its images \({tmp_path} exists\)"):
        open_domain("d", config(tmp_path / "gone"), "train")
    with pytest.raises(DataError, match=r"data.domains.d.root is empty, and so is data.root"):
        open_domain("d", DataConfig(domains={"d": DomainConfig()}), "train")


def test_empty_domain(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    with pytest.raises(DataError, match=r"no image files .*3 files do not end with image_suffix '_left'"):
        open_domain("d", config(root, image_suffix="_left"), "train")
    for path in (root / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=rf"no image files \(.jpg .jpeg .png\) below {root}/images$"):
        open_domain("d", config(root), "train")
    for name in ("a.tif", "b.TIF", "README", ".hidden.gif"):
        (root / "images" / name).touch()
    with pytest.raises(DataError, match=rf"below {root}/images; there are 1 extensionless files, 2 \.tif files$"):
        open_domain("d", config(root), "train")


def test_image_without_label(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    (root / "labels/b.png").unlink()
    (root / "labels/c.png").unlink()
    with pytest.raises(DataError, match=rf"2 of 3 images have no label, first: {root}/images/b.png; expected .*b.png"):
        open_domain("d", config(root), "train")


def test_label_without_image_is_mentioned(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    (root / "images/b.png").unlink()
    domain = open_domain("d", config(root), "train")
    assert len(domain) == 2
    assert "1 labels have no image (first: b)" in domain.describe()


def test_two_images_of_one_name(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    save(root / "images/a.jpg", np.zeros((12, 20, 3), np.uint8))
    with pytest.raises(DataError, match=r"two image files for one name: .*a\.(png|jpg) and .*a\.(png|jpg)"):
        open_domain("d", config(root), "train")


def test_wrong_options(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    with pytest.raises(DataError, match=r"list_file: no file .*kitti_semantic_train.txt.*mean 'kitti_semantics_train"):
        open_domain("d", config(root, list_file="kitti_semantic_train.txt"), "train")
    with pytest.raises(
        DataError, match=r"data.domains.d.label_format: expected ids, ids16, colours or polygons, got 'rgb'"
    ):
        open_domain("d", config(root, label_format="rgb"), "train")
    with pytest.raises(ValueError, match=r"'idd_lite7' .* cannot be mapped to 'cityscapes19'"):
        cfg = DataConfig(domains={"d": DomainConfig(root=str(root), label_space="idd_lite7")})
        open_domain("d", cfg, "train")
    with pytest.raises(
        DataError, match=r"data.domains.d.images: expected no braces but \{split\}, got \{spilt\} in 'i/"
    ):
        open_domain("d", config(root, images="i/{spilt}"), "train")
    with pytest.raises(
        DataError, match=rf"unknown domain 'sett'.* no such folder either: {Path.cwd()}/sett, {tmp_path}/sett$"
    ):
        open_domain("sett", config(root), "train")
    with pytest.raises(DataError, match=rf"no such folder either: {Path.cwd()}/sett \(data.root is empty\)$"):
        open_domain("sett", DataConfig(), "train")
    with pytest.raises(ValueError, match=r"split: expected one of train, val, got 'test'"):
        open_domain("d", config(root), "test")  # type: ignore[arg-type]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cityscapes19", "idd_lite7"])
@pytest.mark.parametrize("kind", ["ids L", "ids P", "colours RGB", "colours RGBA", "colours P"])
def test_label_encodings_agree(tmp_path: Path, kind: str, target: str) -> None:
    root, labels = make(tmp_path / "set", ("a",)), ids(3)
    colours = colourise(labels, CITY)
    order = np.random.default_rng(0).permutation(20)
    image = {
        "ids L": lambda: Image.fromarray(labels),
        "ids P": lambda: Image.fromarray(labels, "P"),
        "colours RGB": lambda: Image.fromarray(colours),
        "colours RGBA": lambda: Image.fromarray(np.dstack([colours, np.full_like(labels, 9)])),
        "colours P": lambda: palette_image(labels, order),
    }[kind]()
    if kind == "ids P":
        image.putpalette([7] * 768)
    image.save(root / "labels/a.png")
    cfg = config(root, label_space=target, label_format=kind.split()[0])
    cfg.domains["d"].label_space = "cityscapes19"
    got = open_domain("d", cfg, "train").load(0)[1]
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, mapping("cityscapes19", target)[labels])


def test_near_colours_are_ignored(tmp_path: Path) -> None:
    root = make(tmp_path / "set", ("a",))
    pixels = np.zeros((12, 20, 3), np.uint8)
    pixels[0, :4] = [(128, 64, 128), (128, 64, 129), (127, 64, 128), (128, 65, 128)]
    save(root / "labels/a.png", pixels)
    labels = open_domain("d", config(root, label_format="colours"), "train").load(0)[1]
    assert labels[0, 0] == 0 and (labels.ravel()[1:] == IGNORE).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    root = make(tmp_path / "set", ("a",))
    (root / "images/a.png").unlink()
    Image.new("RGB", (20, 12), (102, 102, 102)).convert(mode).save(
        root / f"images/a.{'jpg' if mode == 'CMYK' else 'png'}"
    )
    image, _ = open_domain("d", config(root), "train").load(0)
    assert image.mode == "RGB" and max(abs(v - 102) for v in image.getpixel((5, 5))) <= 2


def broken(tmp_path: Path, label: Image.Image, **options: str) -> str:
    """The message about a domain whose only label is ``label``."""
    root = make(tmp_path / "set", ("a",))
    label.save(root / "labels/a.png")
    with pytest.raises(DataError, match=re.escape(str(root / "labels/a.png"))) as caught:
        open_domain("d", config(root, **options), "train").load(0)
    return str(caught.value)


def test_value_outside_the_space(tmp_path: Path) -> None:
    labels = ids(0)
    labels[0, 0], labels[2, 1:3] = 19, 254
    message = broken(tmp_path, Image.fromarray(labels))
    assert "values 19, 254 in 3 pixels are no ids of label space 'cityscapes19' (0..18, 255 for ignore)" in message


def test_sizes_differ(tmp_path: Path) -> None:
    message = broken(tmp_path, Image.fromarray(ids(0, (12, 21))))
    assert message.endswith("--skip-faulty, or with list_file")
    assert "differ in size" in message and "images/a.png is 20x12" in message and "labels/a.png is 21x12" in message


@pytest.mark.parametrize("label_format", ["ids", "colours"])
def test_16_bit_label(tmp_path: Path, label_format: str) -> None:
    message = broken(tmp_path, Image.fromarray(ids(0).astype(np.uint16)), label_format=label_format)
    assert "expected an 8-bit label, got 16 bits; convert it to 8-bit ids" in message


def test_16_bit_rgb_label(tmp_path: Path) -> None:
    # Pillow cannot write one, and reads it as 8-bit: a one-pixel file by hand, as SYNTHIA's are
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    root = make(tmp_path / "set", ("a",))
    save(root / "images/a.png", np.zeros((1, 1, 3), np.uint8))
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 7))
    (root / "labels/a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))
    with pytest.raises(DataError, match="expected an 8-bit label, got 16 bits"):
        open_domain("d", config(root, label_format="colours"), "train").load(0)


def test_16_bit_image(tmp_path: Path) -> None:
    root = make(tmp_path / "set", ("a",))
    save(root / "images/a.png", np.zeros((12, 20), np.uint16))
    with pytest.raises(DataError, match=r"images/a.png: expected an 8-bit image, got mode I;16"):
        open_domain("d", config(root), "train").load(0)


def test_wrong_mode(tmp_path: Path) -> None:
    colours = Image.fromarray(colourise(ids(0), CITY))
    assert "got mode RGB; for labels in colours set label_format: colours" in broken(tmp_path, colours)
    message = broken(tmp_path, Image.fromarray(ids(0)), label_format="colours")
    assert "got mode L; for labels in ids set label_format: ids" in message
    assert "got mode 1" in broken(tmp_path, colours.convert("1"))


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "gone"])
def test_damaged_file(tmp_path: Path, kind: str, damage: str) -> None:
    root = make(tmp_path / "set", ("a",))
    save(root / "images/a.png", np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8))
    domain = open_domain("d", config(root), "train")
    path = root / kind / "a.png"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "text": b"not an image"}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    message = ": the file is no image$" if damage in ("text", "empty") else ": "
    with pytest.raises(DataError, match=rf"{kind}/a.png: cannot be read as an image{message}"):
        domain.load(0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.booleans(), kind=st.sampled_from(["jpg", "png"])
)
def test_any_damage_is_a_data_error(tmp_path: Path, position: int, value: int, cut: bool, kind: str) -> None:
    root = tmp_path / kind
    make(root, ("a",))
    (root / "images/a.png").unlink()
    path = save(root / f"images/a.{kind}", np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8))
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    domain = open_domain("d", config(root), "train")
    path.write_bytes(data[: position % len(data)] if cut else data)
    try:
        image, labels = domain.load(0)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert (image.height, image.width) == labels.shape


# --- real scenes ------------------------------------------------------------------------------------------------------


@needs_real
def test_kitti_in_both_spaces() -> None:
    definition = DomainConfig(
        root="kitti_semantics",
        label_format="colours",
        label_space="cityscapes19",
        list_file="kitti_semantics_{split}.txt",
    )
    fine, coarse = (
        DataConfig(root=str(REAL), label_space=space, domains={"kitti": definition})
        for space in ("cityscapes19", "idd_lite7")
    )
    domain = open_domain("kitti", fine, "val")
    assert len(domain) == 40 and len(open_domain("kitti", fine, "train")) == 160
    image, labels = domain.load(0)
    assert labels.shape == (image.height, image.width)
    assert {0, 8, 10, 13} <= set(np.unique(labels)) <= {*range(19), IGNORE}
    np.testing.assert_array_equal(
        open_domain("kitti", coarse, "val").load(0)[1], mapping("cityscapes19", "idd_lite7")[labels]
    )
    # by the slow law: one comparison a class
    raw = np.asarray(Image.open(domain.pairs[0][1]).convert("RGB"))
    for index, colour in enumerate(CITY.colours):
        np.testing.assert_array_equal(labels == index, (raw == colour).all(-1))


@needs_real
def test_idd_lite_opens() -> None:
    definition = DomainConfig(
        root="idd_lite", images="images/{split}", labels="labels/{split}", image_suffix="_image", label_suffix="_label"
    )
    cfg = DataConfig(root=str(REAL), label_space="idd_lite7", domains={"idd": definition})
    train, val = open_domain("idd", cfg, "train"), open_domain("idd", cfg, "val")
    assert (len(train), len(val)) == (1403, 204)
    image, labels = val.load(7)
    assert image.size == (320, 227) and set(np.unique(labels)) <= {*range(7), IGNORE}
