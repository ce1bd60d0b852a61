"""Every data set in every layout, read back from miniature trees; lists and variants; what is said of faults."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_fast.config.schema import DataConfig, DomainConfig
from pmm_fast.data.datasets import DATASETS, dataset_names, get_dataset, recognise
from pmm_fast.data.folder import DataError, FolderDomain, open_domain
from pmm_fast.data.labels import mapping
from pmm_fast.data.listing import list_domain, read_prepared
from pmm_fast.data.scan import Split, select
from pmm_fast.data.split_lists import LISTS, read_list, shipped_list
from tests.data import trees

ALL = [(dataset, layout) for dataset, layouts in trees.TREES.items() for layout in layouts]
OMITTED = [12160, 12166, 12167, 12191, 12192, 12193, 12195, *range(12202, 12209), 19993]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for miniature trees, under lists that name their images."""
    trees.use_small_lists(monkeypatch, tmp_path / "lists")
    return tmp_path / "data"


def config(root: Path, dataset: str = "", **domains: DomainConfig) -> DataConfig:
    return DataConfig(root=str(root), label_space=trees.SPACE.get(dataset, "cityscapes19"), domains=domains)


def assert_read_back(domain: FolderDomain, expected: dict[str, np.ndarray]) -> None:
    """Every expected image is there, in order, with its own labels and its own colour."""
    assert len(domain) == len(expected)
    for index, (name, labels) in enumerate(sorted(expected.items())):
        image, got = domain.load(index)
        assert np.abs(np.subtract(image.getpixel((3, 3)), trees.colour_of(name))).max() <= 3
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, labels)


# --- every data set and layout ----------------------------------------------------------------------------------------


def test_the_miniatures_are_of_every_layout() -> None:
    layouts = [(dataset.name, layout.name) for dataset in DATASETS.values() for layout in dataset.layouts]
    assert {(dataset, layout.split(";")[0]) for dataset, layout in ALL} == set(layouts)


@pytest.mark.parametrize(("dataset", "layout"), ALL)
def test_read_back(small: Path, dataset: str, layout: str) -> None:
    expected = trees.make_tree(small / DATASETS[dataset].folders[-1].upper(), dataset, layout)
    for split in ("train", "val"):
        domain = open_domain(dataset, config(small, dataset), split)
        assert_read_back(domain, expected[split])
        assert get_dataset(domain.dataset) == get_dataset(dataset) and domain.left_out == ()
        assert f"layout {layout.split(';')[0]};" in domain.describe() and f"data set {dataset}" in domain.describe()
        assert "no image" not in domain.describe()


@pytest.mark.parametrize(("dataset", "layout"), ALL)
@pytest.mark.parametrize("how", ["path", "below the root", "configured with root", "configured"])
def test_found_in_other_ways(small: Path, dataset: str, layout: str, how: str) -> None:
    folder = small / DATASETS[dataset].folders[0]
    expected = trees.make_tree(folder, dataset, layout)
    cfg = config(small, dataset)
    name = {"path": str(folder), "below the root": folder.name}.get(how, "mine")
    if how.startswith("configured"):
        cfg.domains["mine"] = DomainConfig(dataset=dataset, root=folder.name if "root" in how else "")
    assert_read_back(open_domain(name, cfg, "val"), expected["val"])


def test_coarser_spaces(small: Path) -> None:
    expected = trees.make_tree(small / "cityscapes", "cityscapes", "labelIds")["val"]
    for space in ("synthia16", "idd_lite7", "camvid11"):
        cfg = DataConfig(root=str(small), label_space=space)
        labels = open_domain("cityscapes", cfg, "val").load(0)[1]
        np.testing.assert_array_equal(labels, mapping("cityscapes19", space)[next(iter(expected.values()))])
    with pytest.raises(ValueError, match=r"'camvid_ids' .* cannot be mapped to 'cityscapes19' .* maps to: camvid11"):
        trees.make_tree(small / "camvid", "camvid", "train + trainannot")
        open_domain("camvid", config(small), "val")


def test_native_ids_are_preferred_to_train_ids(small: Path) -> None:
    folder = small / "cityscapes"
    trees.make_tree(folder, "cityscapes", "labelTrainIds")
    assert recognise(DATASETS["cityscapes"], folder, "val").name == "labelTrainIds"
    trees.make_tree(folder, "cityscapes", "labelIds")
    assert recognise(DATASETS["cityscapes"], folder, "val").name == "labelIds"
    assert recognise(DATASETS["cityscapes"], small, "val") is None


def test_instances_alone_are_no_labels(small: Path) -> None:
    trees.make_tree(small / "idd_lite", "idd_lite", "leftImg8bit + gtFine")
    for path in (small / "idd_lite").rglob("*_label.png"):
        if not path.stem.endswith("_inst_label"):
            path.unlink()
    assert recognise(DATASETS["idd_lite"], small / "idd_lite", "val") is None


# --- lists and variants -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "digest"),
    [
        # SHA-256 of the released code's lists: one NAME.png a line
        ("gtav_train_released", 12388, "44e8f5f3891907c1693f4c8422b3822b79eb44f643bde4397a12362c5f1cc10e"),
        ("gtav_val", 6382, "c5647af8f75ec9dbaf7ca07c899aa0fa675ccc9a4e887f7a72e560bd7da27837"),
        ("gtav_test", 6181, "d38ff2920f6ff852829e6fccd2db556b71c56a158f4f76084b29d4fc3fd172e2"),
        ("synthia_train", 6580, "98d60bf5438fcc00deb068a15daf873afbf3cd5fab1cb5ca7f3579b79af9619f"),
        ("synthia_val", 2820, "26ea99f4da25965a69850aad04aa10142882b0376de62f22e53e7f1df29958b0"),
    ],
)
def test_shipped_lists_are_the_released_ones(name: str, count: int, digest: str) -> None:
    names = list(read_list(shipped_list(name)))
    assert len(names) == count
    assert hashlib.sha256("".join(f"{entry}.png\n" for entry in names).encode()).hexdigest() == digest


@pytest.mark.parametrize(("variant", "left_out"), [("released", OMITTED), ("official", []), ("all", [])])
def test_gtav_variants(variant: str, left_out: list[int]) -> None:
    dataset, _ = get_dataset(f"gtav:{variant}")
    images = {f"{number:05d}": Path() for number in range(1, 24967)}
    lists = {split: shipped_list(name) for split, name in dataset.variants[variant].items()}
    for split in ("train", "val"):
        chosen = select(images, lists, split, "")
        assert len(chosen.keys) == dataset.counts[variant, split] and not chosen.absent
        assert chosen.left_out == tuple(f"{number:05d}" for number in left_out)
        assert chosen.shared.get({"train": "val", "val": "train"}[split], 0) == (6382 if variant == "all" else 0)


def test_every_list_that_is_named_is_shipped_and_has_the_known_count() -> None:
    for dataset in DATASETS.values():
        assert dataset.default_variant in dataset.variants
        for variant, lists in dataset.variants.items():
            for split in ("train", "val"):
                count = dataset.counts[variant, split]
                assert split not in lists or len(read_list(shipped_list(lists[split]))) == count
    assert sum(path.stat().st_size for path in LISTS.iterdir()) < 30_000


def test_variants_take_their_images_and_name_the_rest(small: Path) -> None:
    names = trees.GTAV | {"train": ("00001", "00002", "00003"), "test": ("00005", "7")}
    expected = trees.make_tree(small / "GTAV", "gtav", "images + labels", names)
    every = {name: labels for split in expected.values() for name, labels in split.items()}
    for variant, wanted, left_out in (
        ("gtav", ("00001", "00002"), ("00003", "7")),
        ("gtav:released", ("00001", "00002"), ("00003", "7")),
        ("gtav:official", ("00001", "00002", "00003"), ("7",)),
        ("gtav:all", ("00001", "00002", "00003", "00004", "00005"), ("7",)),
    ):
        domain = open_domain(variant, config(small), "train")
        assert_read_back(domain, {name: every[name] for name in wanted})
        assert domain.left_out == left_out
        text = f"{len(left_out)} images on disk are on no list: {', '.join(left_out)}"
        assert text in domain.describe()
        assert ("1 of its images are also in val" in domain.describe()) == (variant == "gtav:all")
    assert open_domain("gtav:all", config(small), "val").left_out == ("7",)


def test_a_listed_image_that_is_not_there(small: Path) -> None:
    trees.make_tree(small / "GTAV", "gtav", "images + labels")
    (small / "GTAV/images/00002.png").unlink()
    listing = list_domain("gtav", config(small), "train")
    assert listing.keys == ("00001",) and listing.absent == ("00002",) and listing.list_name.endswith("released.txt")
    with pytest.raises(DataError, match=r"released.txt, line 2: there is no image '00002' below .*\(1 of 2 on the"):
        open_domain("gtav", config(small), "train")
    assert len(open_domain("gtav", config(small), "val")) == 1


# --- names ------------------------------------------------------------------------------------------------------------


def test_get_dataset() -> None:
    assert get_dataset("gtav")[1] == "released" and get_dataset("gtav:all")[1] == "all"
    assert get_dataset("idd") == (DATASETS["idd"], "")
    assert {"gtav", "gtav:official", "kitti"} <= set(dataset_names())
    for name, near in (
        ("gtva", "gtav"),
        ("gtav:offical", "gtav:official"),
        ("citiscapes", "cityscapes"),
        ("idd:", "idd"),
    ):
        with pytest.raises(DataError, match=rf"unknown data set '{name}'; did you mean '{near}'\? \(known: bdd100k"):
            get_dataset(name)


def test_unknown_and_missing(small: Path) -> None:
    with pytest.raises(DataError, match=r"unknown data set 'gtav:relased'; did you mean 'gtav:released'"):
        open_domain("gtav:relased", config(small), "train")
    with pytest.raises(DataError, match=r"unknown domain 'citiscapes'; did you mean 'cityscapes'\?.*data sets: gtav, "):
        open_domain("citiscapes", config(small), "train")
    with pytest.raises(DataError, match=r"no data for 'idd' .*data.root is empty, is --data.root missing.*idd.insaan"):
        open_domain("idd", DataConfig(), "train")
    with pytest.raises(
        DataError, match=rf"no data for 'gtav:all' .* below {small}; looked for .* gtav, gta5, .*visinf"
    ):
        open_domain("gtav:all", config(small), "train")
    with pytest.raises(DataError, match=r"no data for 'b' \(BDD100K.*bdd100k, bdd-100k"):
        open_domain("b", config(small, b=DomainConfig(dataset="bdd100k")), "train")


def test_a_split_that_is_not_there(small: Path) -> None:
    trees.make_tree(small / "bdd", "bdd100k", "seg", {"train": ("a",)})
    assert len(open_domain("bdd100k", config(small), "train")) == 1
    for name in ("bdd100k", str(small / "bdd")):
        message = r"/bdd is in none of the layouts of BDD100K.* for split 'val'; looked for .*; or seg/images/val with "
        with pytest.raises(DataError, match=message + r"seg/labels/val/\*\*/\*_train_id.png; or "):
            open_domain(name, config(small), "val")


def test_of_two_folders_the_one_that_is_known_counts(small: Path) -> None:
    (small / "gtav").mkdir(parents=True)
    expected = trees.make_tree(small / "GTA5", "gtav", "images + labels")
    assert_read_back(open_domain("gtav", config(small), "train"), expected["train"])
    # and by a path what is there
    with pytest.raises(DataError, match=r"no folder .*/gtav/images for its images"):
        open_domain(str(small / "gtav"), config(small), "train")


def test_a_folder_of_another_name_is_a_plain_one(small: Path) -> None:
    trees.make_tree(small / "games", "gtav", "images + labels")
    domain = open_domain("games", config(small), "train")
    assert domain.dataset == "" and len(domain) == 4 and "no split" in domain.describe()


def test_other_options_beside_dataset_are_refused(small: Path) -> None:
    cfg = config(small, mine=DomainConfig(dataset="gtav", list_file="x.txt"))
    with pytest.raises(DataError, match=r"data.domains.mine: with `dataset` only `root` can be given"):
        open_domain("mine", cfg, "train")


def test_encodings_and_short_lists_without_a_data_set(small: Path) -> None:
    names = {"train": ("00001", "00002", "00003", "00004"), "val": ("00007", "00009")}
    expected = trees.make_tree(small / "city", "synthia", "RGB + GT/LABELS", names)
    (small / "city/train.txt").write_text("numbers of 5 digits\n1-2 4")
    (small / "city/val.txt").write_text("00007\n")
    domain = DomainConfig("city", "", "RGB", "GT/LABELS", "{split}.txt", "", "", "ids16", "synthia_ids")
    opened = open_domain("d", config(small, d=domain), "train")
    assert_read_back(opened, {name: labels for name, labels in expected["train"].items() if name != "00003"})
    # val's is on a list too
    assert opened.left_out == ("00003", "00009") and opened.dataset == ""
    domain.list_file = "train.txt"
    opened = open_domain("d", config(small, d=domain), "val")
    assert opened.left_out == ("00003", "00007", "00009")
    assert "3 of its images are also in train" in opened.describe()


# --- prepared folders -------------------------------------------------------------------------------------------------


RECORD = {
    "format": 1,
    "name": "gtav",
    "dataset": "",
    "variant": "",
    "layout": "",
    "label_space": "cityscapes19",
    "splits": ["train", "val"],
    "images": "copy",
    "quality": None,
    "source": "/originals",
    "lists": {"train": "", "val": ""},
    "counts": {"train": 1, "val": 1},
    "left_out": {"train": [], "val": ["b"]},
    "skipped": [],
}


def prepare(folder: Path, **content: object) -> np.ndarray:
    """A folder as the prepare tool leaves it, of one pair a split; the labels are returned."""
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4) % 7
    for split in ("train", "val"):
        for kind, pixels in (("images", np.zeros((3, 4, 3), np.uint8)), ("labels", labels)):
            (folder / kind / split / "deep").mkdir(parents=True)
            Image.fromarray(pixels).save(folder / kind / split / "deep/a.png")
    (folder / "prepared.json").write_text(json.dumps(RECORD | content))
    return labels


@pytest.mark.parametrize("how", ["gtav", "gtav:released", "path", "configured"])
def test_prepared(small: Path, how: str) -> None:
    labels = prepare(small / "gtav", label_space="cityscapes19", dataset="gtav", variant="released")
    cfg = config(small, d=DomainConfig(dataset="gtav"))
    cfg.label_space = "idd_lite7"
    domain = open_domain({"path": str(small / "gtav"), "configured": "d"}.get(how, how), cfg, "val")
    assert len(domain) == 1 and domain.label_format == "ids" and domain.dataset == "gtav:released"
    assert "layout prepared" in domain.describe()
    np.testing.assert_array_equal(domain.load(0)[1], mapping("cityscapes19", "idd_lite7")[labels])


def test_prepared_under_any_name(small: Path) -> None:
    # by a path it is what it says, whatever its folder is called
    labels = prepare(small / "gtav", label_space="cityscapes19", dataset="gtav", variant="all")
    assert open_domain(str(small / "gtav"), config(small), "train").dataset == "gtav:all"
    prepare(small / "town", label_space="cityscapes19")
    domain = open_domain("town", DataConfig(root=str(small), label_space="idd_lite7"), "train")
    assert domain.dataset == "" and domain.source_space == "cityscapes19"
    np.testing.assert_array_equal(domain.load(0)[1], mapping("cityscapes19", "idd_lite7")[labels])
    # and of two folders of a data set, one being empty, it is found
    (small / "synthia").mkdir()
    prepare(small / "RAND_CITYSCAPES", label_space="cityscapes19", dataset="synthia")
    assert len(open_domain("synthia", config(small), "val")) == 1


def test_prepared_from_something_else(small: Path) -> None:
    prepare(small / "gtav", label_space="cityscapes19", dataset="gtav", variant="all")
    with pytest.raises(DataError, match=r"prepared.json: expected gtav:released, but it was prepared from gtav:all"):
        open_domain("gtav", config(small), "train")
    assert len(open_domain("gtav:all", config(small), "train")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", r"expected a JSON object, got \[\]"),
        ("{}", "format: expected a whole number, got none"),
        *[
            (json.dumps({key: value for key, value in RECORD.items() if key != missing}), f"{missing}: .* got none$")
            for missing in RECORD
        ],
        *[
            (json.dumps(RECORD | {key: value}), message)
            for key, value, message in (
                ("dataset", "gtva", "dataset: expected a known data set, or nothing, got 'gtva'"),
                ("dataset", ["gtav"], "dataset: expected"),
                ("dataset", "gtav", "variant: expected one of released, official, all, got ''"),
                ("label_space", "cityscapes", "label_space: expected one of cityscapes19, .*, got 'cityscapes'"),
                ("splits", ["test"], "splits: expected a list of train and val"),
                ("quality", "95", "quality: expected a whole number or null, got '95'"),
                ("counts", {"train": 1}, "counts: expected an entry for val, got {'train': 1}"),
                ("counts", {"train": 1, "val": True}, "counts: expected a whole number by split"),
                ("left_out", {"train": "a", "val": []}, "left_out: expected a list of names by split"),
                ("skipped", [{"kind": "label"}], r"skipped: expected a list of faults \(kind, split, name, path"),
            )
        ],
    ],
)
def test_a_record_of_another_kind(small: Path, text: str, message: str) -> None:
    prepare(small / "gtav")
    (small / "gtav/prepared.json").write_text(text)
    with pytest.raises(DataError, match=rf"^{small}/gtav/prepared.json: {message}"):
        open_domain("gtav", config(small), "train")


def test_what_a_record_says(small: Path) -> None:
    fault = dict.fromkeys(("kind", "split", "name", "path", "message"), "x")
    prepare(small / "g", dataset="gtav", variant="all", images="jpeg", quality=95, skipped=[fault])
    record = read_prepared(small / "g")
    assert (record.dataset, record.images, record.quality, record.skipped) == ("gtav:all", "jpeg", 95, [fault])
    assert record.counts == {"train": 1, "val": 1} and record.left_out["val"] == ["b"]
    assert record.splits == ("train", "val") and record.label_space == "cityscapes19"
    domain = open_domain("g", config(small), "train")
    assert "images: jpeg, quality 95" in domain.notes and "1 of 24966 known images" in domain.notes


def test_a_domain_that_was_not_completed(small: Path) -> None:
    prepare(small / "idd")
    prepare(small / "town.partial")
    shutil.copytree(small / "idd", small / "town")
    for name in ("idd", "town"):
        (small / name / "prepared.json").rename(small / name / "options.json")
    cfg = config(small, a=DomainConfig(root="town"), b=DomainConfig(root="idd", dataset="idd"))
    for name in ("idd", "town", str(small / "town"), "town.partial", str(small / "town.partial"), "a", "b"):
        with pytest.raises(DataError, match=r"was not completed; call python -m pmm_fast.data.prepare again"):
            open_domain(name, cfg, "train")
    # somebody else's file of that name
    (small / "town/options.json").write_text("{}")
    assert len(open_domain("town", cfg, "train")) == 1


@pytest.mark.parametrize("name", ["cityscapes", "gtav", "games", "described", "known", "prepared"])
def test_a_relative_root(small: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    trees.make_tree(small / "cityscapes", "cityscapes", "labelIds")
    prepare(small / "gtav", dataset="gtav", variant="released")
    prepare(small / "games", label_space="idd_lite7")
    (small / "games/prepared.json").unlink()
    prepare(small / "prepared", label_space="idd_lite7")
    known = DomainConfig(root="cityscapes", dataset="cityscapes")
    monkeypatch.chdir(small.parent)
    cfg = config(Path(small.name), described=DomainConfig(root="games"), known=known)
    cfg.label_space = "idd_lite7"
    domain = open_domain(name, cfg, "val")
    assert len(domain) >= 1 and all(path.is_absolute() and path.is_file() for pair in domain.pairs for path in pair)


def test_a_prepared_folder_that_is_described_keeps_its_label_space(small: Path) -> None:
    labels = prepare(small / "town")
    cfg = config(small, d=DomainConfig(root="town"))
    cfg.label_space = "idd_lite7"
    expected = mapping("cityscapes19", "idd_lite7")[labels]
    np.testing.assert_array_equal(open_domain("d", cfg, "val").load(0)[1], expected)


# --- faults -----------------------------------------------------------------------------------------------------------


def test_train_ids_where_native_ones_are_expected_and_the_reverse(small: Path) -> None:
    trees.make_tree(small / "bdd", "bdd100k", "seg")
    label = small / "bdd/seg/labels/val/7d2f7975-e0c1c5a7_train_id.png"
    trees.ids_file(trees.CITYSCAPES)(label, (24, 32), np.random.default_rng(0))
    with pytest.raises(DataError, match=r"values 19, 20, .* are no ids of label space 'cityscapes19' \(0..18, 255"):
        open_domain("bdd100k", config(small), "val").load(0)


@pytest.mark.parametrize(
    ("dataset", "layout", "value", "space"),
    [
        ("cityscapes", "labelIds", 34, r"'cityscapes_ids' \(0..33, 255 for ignore\)"),
        ("mapillary", "v1.2", 200, r"'mapillary_ids' \(0..65, "),
        ("camvid", "train + trainannot", 12, r"'camvid_ids' \(0..11, "),
    ],
)
def test_ids_that_the_data_set_does_not_have(small: Path, dataset: str, layout: str, value: int, space: str) -> None:
    trees.make_tree(small / dataset, dataset, layout)
    domain = open_domain(dataset, config(small, dataset), "val")
    pixels = np.zeros((24, 32), np.uint8)
    pixels[2, 3] = value
    Image.fromarray(pixels).save(domain.pairs[0][1])
    with pytest.raises(DataError, match=rf"values {value} in 1 pixels are no ids of label space {space}"):
        domain.load(0)


def test_a_listing_names_every_fault(small: Path) -> None:
    names = {"train": ("ulm/a", "ulm/b", "ulm/c"), "val": ("lindau/a",)}
    trees.make_tree(small / "cityscapes", "cityscapes", "labelIds", names)
    images, labels = small / "cityscapes/leftImg8bit/train/ulm", small / "cityscapes/gtFine/train/ulm"
    (labels / "b_gtFine_labelIds.png").unlink()
    (images / "c_leftImg8bit.jpg").write_bytes((images / "c_leftImg8bit.png").read_bytes())
    (images / "a_leftImg8bit.png").rename(images / "d_leftImg8bit.png")
    listing = list_domain("cityscapes", config(small), "train")
    assert listing.keys == ("ulm/b", "ulm/c", "ulm/d") and listing.unlabelled == ("ulm/b", "ulm/d")
    assert listing.expected_label("ulm/b") == labels / "b_gtFine_labelIds.png"
    assert listing.duplicates == ((images / "c_leftImg8bit.jpg", images / "c_leftImg8bit.png"),)
    assert "1 labels have no image (first: ulm/a), not used" in listing.notes
    with pytest.raises(DataError, match=r"two image files for one name: .*c_leftImg8bit.jpg and .*c_leftImg8bit.png"):
        open_domain("cityscapes", config(small), "train")
    (images / "c_leftImg8bit.jpg").unlink()
    with pytest.raises(
        DataError, match=r"2 of 3 images have no label, first: .*; expected .*/ulm/b_gtFine_labelIds.png"
    ):
        open_domain("cityscapes", config(small), "train")
    (labels / "c_gtFine_labelIds.PNG").write_bytes(b"")
    with pytest.raises(DataError, match="two label files for one name"):
        open_domain("cityscapes", config(small), "train")


def test_one_name_in_two_folders_of_a_listed_data_set(small: Path) -> None:
    trees.make_tree(small / "GTAV", "gtav", "images + labels; split folders")
    trees.make_tree(small / "GTAV", "gtav", "images + labels; split folders", {"val": ("00001",)})
    with pytest.raises(DataError, match=r"two image files for one name: .*train/01/00001.png and .*valid/01/00001.png"):
        open_domain("gtav", config(small), "train")
    # val has nothing to do with it
    assert len(open_domain("gtav", config(small), "val")) == 1


@pytest.mark.parametrize(("folder", "split"), [("leftImg8bit/train/ulm", "train"), ("gtFine/val", "val")])
def test_a_folder_that_cannot_be_read(small: Path, monkeypatch: pytest.MonkeyPatch, folder: str, split: Split) -> None:
    names = {"train": ("ulm/a", "bonn/b"), "val": ("lindau/a",)}
    trees.make_tree(small / "cityscapes", "cityscapes", "labelIds", names)
    scandir = os.scandir

    # not by its mode: a test may run as root, who may read anything
    def refuse(path: str) -> object:
        if str(path).endswith(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=rf"cityscapes/{folder}: the folder cannot be read: Permission denied"):
        open_domain("cityscapes", config(small), split)


def test_another_number_than_is_known_is_told(small: Path) -> None:
    trees.make_tree(small / "cityscapes", "cityscapes", "labelIds", {"val": ("ulm/a", "ulm/b")})
    assert "; 2 of 500 known images;" in f"{open_domain('cityscapes', config(small), 'val').describe()};"


def test_advice_for_a_data_set(small: Path) -> None:
    trees.make_tree(small / "cityscapes", "cityscapes", "labelIds")
    domain = open_domain("cityscapes", config(small), "val")
    mend = r"; mend it, or leave it out with python -m pmm_fast.data.prepare --skip-faulty$"
    for pixels, message in (
        (np.zeros((3, 4), np.uint8), r"is 4x3"),
        (np.zeros((24, 32), np.uint16), "expected an 8-bit label, got 16 bits"),
        (np.zeros((24, 32, 3), np.uint8), "got mode RGB"),
    ):
        Image.fromarray(pixels).save(domain.pairs[0][1])
        with pytest.raises(DataError, match=message + mend):
            domain.load(0)
