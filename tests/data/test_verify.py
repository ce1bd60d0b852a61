"""Verifying data sets: every planted fault is named, what is right passes, and the reports say what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from pmm_fast.config import ConfigError, load_config
from pmm_fast.data import verify, verify_report
from pmm_fast.data.contact_sheet import Sample, cell, contact_sheet, percent
from pmm_fast.data.datasets import DATASETS
from pmm_fast.data.files import DataError
from pmm_fast.data.labels import IGNORE, get_space
from pmm_fast.data.survey import FaultKind
from tests.data import trees
from tests.data.test_prepare import REAL, SIZE, files, ids, kitti, needs_real, picture, plant, save, town

CITY = get_space("cityscapes19")


def run(*arguments: str | Path) -> int:
    """The exit code of the program."""
    try:
        verify.main([*map(str, arguments), "--workers", "2"])
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code
    return 0


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def all_faults(content: dict[str, Any]) -> list[dict[str, str]]:
    return [
        fault
        for domain in content["domains"]
        for fault in domain["missing"] + [f for split in domain["splits"].values() for f in split["faults"]]
    ]


def cityscapes(root: Path, monkeypatch: pytest.MonkeyPatch, labels: dict[str, np.ndarray]) -> Path:
    """A Cityscapes of its own layout; the known counts are those of these labels."""
    for name, values in labels.items():
        split = name.split("/")[0]
        save(root / f"cityscapes/leftImg8bit/{name}_leftImg8bit.png", picture(1))
        save(root / f"cityscapes/gtFine/{name}_gtFine_labelIds.png", values)
        known = sum(other.startswith(split) for other in labels)
        monkeypatch.setitem(DATASETS["cityscapes"].counts, ("", split), known)  # type: ignore[arg-type]
    return root


# --- faults -----------------------------------------------------------------------------------------------------------


def test_what_is_right_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = town(tmp_path / "town", 20)
    before = files(source)
    assert run("--domains", source, "--out", tmp_path / "out") == 0
    assert "all there and right; 40 of 40 pairs read" in capsys.readouterr().out
    assert files(source) == before
    content = report(tmp_path / "out")
    assert content["ok"] and all_faults(content) == []
    found = content["domains"][0]["splits"]["val"]
    assert found["images"] == found["read"] == 20 and found["sizes"] == {"20x12": 20} and found["known"] is None
    truth = np.concatenate([ids(100 + index).ravel() for index in range(20)])
    assert list(found["pixels"].values()) == [int((truth == index).sum()) for index in range(19)]
    assert found["ignored_pixels"] == int((truth == IGNORE).sum())


def test_every_planted_fault_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = town(tmp_path / "town", 10)
    faults = plant(source)
    assert run("--domains", source, "--out", tmp_path / "out") == 1
    said = capsys.readouterr().out
    for message in faults.values():
        assert len(re.findall(message, said)) == 1, message
    found = all_faults(report(tmp_path / "out"))
    assert {(fault["name"], fault["kind"]) for fault in found} == {
        (name, message.partition(":")[0]) for name, message in faults.items()
    }
    assert {fault["kind"] for fault in found} <= set(get_args(FaultKind)) and "WRONG: " in said and "7 FAULTS" in said
    # without one of the fields nobody finds the file
    assert all(fault["split"] == "train" and Path(fault["path"]).parts for fault in found)


def test_too_many_faults_to_show_are_all_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = town(tmp_path / "town", 30, ("val",))
    for path in (source / "labels/val").glob("n*.png"):
        save(path, np.full(SIZE, 77, np.uint8))
    assert run("--domains", source, "--splits", "val", "--out", tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert said.count("values 77") == 20 and "... and 9 more; all are in report.json" in said
    assert len(all_faults(report(tmp_path / "out"))) == 29


def test_labels_without_image_are_told_but_do_no_harm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = town(tmp_path / "town")
    save(source / "labels/val/lost.png", ids(3))
    assert run("--domains", source, "--out", tmp_path / "out") == 0
    assert "1 labels have no image (first: lost)" in capsys.readouterr().out
    assert report(tmp_path / "out")["domains"][0]["splits"]["val"]["labels_without_image"] == ["lost"]


def test_count_and_names_on_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = kitti(tmp_path)
    assert run(root, "--domains", "kitti") == 0
    assert "160 images (160 known)" in capsys.readouterr().out
    (root / "kitti/images/000000_10.png").unlink()
    assert run(root, "--domains", "kitti") == 1
    said = capsys.readouterr().out
    assert "missing image: 000000_10 is on the list" in said and "count: 39 images" in said
    assert "1 labels have no image (first: 000000_10)" in said


def test_a_list_in_a_yaml_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    town(tmp_path / "town", 3, ("val",))
    (tmp_path / "town/val.txt").write_text("n1\nn2\nn9\n")
    file = tmp_path / "my.yaml"
    file.write_text(
        "data:\n  sources: []\n  unseen: [mine]\n  domains:\n    mine: {root: town, images: images/val, "
        "labels: labels/val, list_file: val.txt}\n"
    )
    assert run(tmp_path, "--config", file) == 1
    said = capsys.readouterr().out
    assert "missing image: n9 is on the list" in said and "2 images" in said and "a/first" in said


def test_train_ids_where_native_ids_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native = np.array([7, 8, 11, 21, 23, 26, 0], np.uint8)[np.arange(240).reshape(SIZE) % 7]
    labels = {f"{split}/a/{split}{index}": native for split in ("train", "val") for index in range(3)}
    root = cityscapes(tmp_path, monkeypatch, labels)
    assert run(root, "--domains", "cityscapes") == 0
    for index in range(3):
        save(root / f"cityscapes/gtFine/val/a/val{index}_gtFine_labelIds.png", ids(index))
    capsys.readouterr()
    assert run(root, "--domains", "cityscapes", "--out", tmp_path / "out") == 1
    assert "ids of cityscapes19, but are read as cityscapes_ids" in capsys.readouterr().out
    assert [(f["kind"], f["split"]) for f in all_faults(report(tmp_path / "out"))] == [("label space", "val")]


def test_255_is_no_fault_where_it_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS["camvid"].counts, ("", "val"), 1)  # type: ignore[arg-type]
    save(tmp_path / "camvid/val/a.png", picture(0))
    save(tmp_path / "camvid/valannot/a.png", np.where(ids(0) < 11, ids(0), IGNORE))
    assert run(tmp_path, "--domains", "camvid", "--splits", "val", "--label-space", "camvid11") == 0


def test_labels_without_any_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = town(tmp_path / "town", 3, ("val",))
    empty = np.full(SIZE, IGNORE, np.uint8)
    save(source / "labels/val/n1.png", empty)
    assert run("--domains", source, "--splits", "val") == 0
    assert "1 label (n1) without a pixel of any class" in capsys.readouterr().out
    for name in ("a/first", "n2"):
        save(source / f"labels/val/{name}.png", empty)
    assert run("--domains", source, "--splits", "val") == 1
    assert "has a pixel of any class: is it cityscapes19 at all?" in capsys.readouterr().out


# --- what is needed ---------------------------------------------------------------------------------------------------


def test_an_absent_protocol_says_what_to_get_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--protocol", "gs", "--out", tmp_path / "out") == 1
    content = report(tmp_path / "out")
    assert {domain["name"]: domain["needed"] for domain in content["domains"]} == {
        "gtav": ["train", "val"],
        "synthia": ["train", "val"],
        "cityscapes": ["val"],
        "bdd100k": ["val"],
        "mapillary": ["val"],
    }
    assert all(fault["kind"] == "missing domain" for fault in all_faults(content)) and not content["ok"]
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out/report.json"]
    assert capsys.readouterr().out.count("MISSING") >= 5


def test_a_whole_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trees.use_small_lists(monkeypatch, tmp_path / "lists")
    # the data sets by name, wherever the preset would look for them
    config = load_config("gs_r50")
    config.data.domains.clear()
    monkeypatch.setattr(verify, "load_config", {"gs_r50": config}.__getitem__)
    for name in ("gtav", "synthia", "cityscapes", "bdd100k", "mapillary"):
        expected = trees.make_tree(tmp_path / "data" / name, name, next(iter(trees.TREES[name])))
        for split in ("train", "val"):
            known = DATASETS[name]
            monkeypatch.setitem(known.counts, (known.default_variant, split), len(expected[split]))  # type: ignore[arg-type]
    assert run(tmp_path / "data", "--protocol", "gs", "--out", tmp_path / "out") == 0
    assert "9 of 9 pairs read" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
    (tmp_path / "data/mapillary").rename(tmp_path / "elsewhere")
    assert run(tmp_path / "data", "--protocol", "gs") == 1
    assert "WRONG: mapillary (1 fault); 8 of 8 pairs read" in capsys.readouterr().out


def test_16_bit_labels_that_somebody_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees.use_small_lists(monkeypatch, tmp_path / "lists")
    trees.make_tree(tmp_path / "synthia", "synthia", "RGB + GT/LABELS")
    # the high bytes are all that is left when 16 bits are read as 8
    save(tmp_path / "synthia/GT/LABELS/0000000.png", np.zeros((24, 32, 3), np.uint8))
    assert run(tmp_path, "--domains", "synthia", "--splits", "val", "--out", tmp_path / "out") == 1
    assert ("label", "0000000") in {(f["kind"], f["name"]) for f in all_faults(report(tmp_path / "out"))}


def test_an_absent_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--domains", "gtav:all", "mapillary", "--splits", "val") == 1
    said = capsys.readouterr().out
    for words in ("6382 val", "2000 val", "gta5", *(DATASETS[name].source for name in ("gtav", "mapillary"))):
        assert words in said
    (tmp_path / "Mapillary/validation").mkdir(parents=True)
    assert run(tmp_path, "--domains", "mapillary") == 1
    assert "none of the layouts" in capsys.readouterr().out


def test_a_prepared_folder_that_lost_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pmm_fast.data import prepare

    prepare.main(["--domains", str(town(tmp_path / "town")), "--out", str(tmp_path / "out")])
    for kind in ("images", "labels"):
        (tmp_path / f"out/town/{kind}/val/n2.png").unlink()
    assert run(tmp_path / "out", "--domains", "town") == 1
    assert re.search("count: 3 images in .*val, but 4 were prepared", capsys.readouterr().out)


def test_limit_reads_evenly_spaced_pairs(tmp_path: Path) -> None:
    source = town(tmp_path / "town", 10, ("val",))
    save(source / "labels/val/n5.png", np.full(SIZE, 77, np.uint8))
    (source / "labels/val/n9.png").unlink()
    # names are all looked at, whatever the limit
    assert run("--domains", source, "--splits", "val", "--limit", "2", "--out", tmp_path / "out") == 1
    assert [fault["name"] for fault in all_faults(report(tmp_path / "out"))] == ["n9"]
    assert report(tmp_path / "out")["domains"][0]["splits"]["val"]["read"] == 2


def test_generated_streets(tmp_path: Path) -> None:
    file = tmp_path / "streets.yaml"
    file.write_text(
        f"data: {{sources: [streets/noon], unseen: [], streets_images: 2, streets_size: [32, 64], cache: {tmp_path}}}"
    )
    assert run("--config", file, "--splits", "train", "--out", tmp_path / "out") == 0
    with Image.open(tmp_path / "out/streets_noon.png") as sheet:
        assert sheet.width > 800


@needs_real
def test_real_data(tmp_path: Path) -> None:
    options = ("--label-space", "idd_lite7", "--limit", "5", "--out", tmp_path)
    assert run(REAL, "--domains", "kitti", "idd_lite", *options) == 0
    content = report(tmp_path)
    counts = {d["name"]: [split["images"] for split in d["splits"].values()] for d in content["domains"]}
    assert counts == {"kitti": [160, 40], "idd_lite": [1403, 204]}
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "kitti.png", "idd_lite.png"}


def test_every_domain_has_a_sheet_of_its_own(tmp_path: Path) -> None:
    names = ["東京", "a/town", "a_town", "A_town", "...", "/", "x" * 300]
    towns = [str(town(tmp_path / name, 1, ("val",))) for name in names[:3]]
    assert run("--domains", *towns, "--splits", "val", "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    found = verify_report.sheet_names(names)
    assert found[:6] == ["東京.png", "a_town.png", "a_town_2.png", "A_town_3.png", "domain.png", "domain_2.png"]
    assert len(found[6]) < 100


def test_a_domain_that_does_not_map_is_refused_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cityscapes(tmp_path, monkeypatch, {"val/a/1": ids(0) % 19})
    save(tmp_path / "camvid/val/a.png", picture(0))
    save(tmp_path / "camvid/valannot/a.png", ids(0) % 11)
    monkeypatch.setattr(verify_report, "survey_split", None)
    with pytest.raises(DataError, match=r"domain 'camvid' with --label-space cityscapes19: .*camvid11"):
        run(root, "--domains", "cityscapes", "camvid", "--splits", "val")


def test_domains_that_are_not_looked_at_are_not_called_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    town(tmp_path / "one", 2)
    file = tmp_path / "my.yaml"
    file.write_text("data: {sources: [one], unseen: [other]}")
    assert run(tmp_path, "--config", file, "--splits", "train", "--out", tmp_path / "out") == 0
    assert [domain["name"] for domain in report(tmp_path / "out")["domains"]] == ["one"]
    assert "not looked at, only needed in other splits: other" in capsys.readouterr().out
    file.write_text("data: {sources: [], unseen: [other]}")
    with pytest.raises(ConfigError, match="--splits train: no domain"):
        run(tmp_path, "--config", file, "--splits", "train")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("unseen: [streets/nonn]", "streets/noon"),
        ("unseen: [citiscapes]", "did you mean 'cityscapes'"),
        ("unseen: ['gtav:offical']", "did you mean 'gtav:official'"),
        ("unseen: [mine], domains: {mine: {dataset: gtaw}}", "did you mean 'gtav'"),
    ],
)
def test_misspelt_names_are_wrong_options_in_a_file_too(tmp_path: Path, data: str, message: str) -> None:
    (tmp_path / "my.yaml").write_text(f"data: {{sources: [], {data}}}")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--config", tmp_path / "my.yaml")


# --- contact sheet ----------------------------------------------------------------------------------------------------


def test_a_cell_shows_the_image_and_its_labels() -> None:
    image = Image.new("RGB", (40, 20), (100, 100, 100))
    labels = np.full((20, 40), 13, np.uint8)
    labels[:, 20:] = IGNORE
    pixels = np.asarray(cell(image, labels, CITY, width=80)).astype(int)
    assert pixels.shape == (82, 80, 3)
    assert (pixels[:40] == 100).all()
    np.testing.assert_allclose(pixels[50, 10], 0.4 * 100 + 0.6 * np.array(CITY.colours[13]), atol=1)
    # what is ignored is striped
    assert len(np.unique(pixels[60, 44:76, 0])) == 2


def test_contact_sheet_shows_every_sample(tmp_path: Path) -> None:
    samples = [Sample(f"s{index}", Image.fromarray(picture(index)), ids(index)) for index in range(5)]
    shares = [0.05] * 20
    sheet = contact_sheet("town", ["one", "two"], samples, CITY, shares)
    shorter = contact_sheet("town", ["one", "two"], samples[:4], CITY, shares)
    assert sheet.width == shorter.width and sheet.height > shorter.height
    pixels = np.asarray(sheet).reshape(-1, 3)
    for colour in CITY.colours:
        assert (pixels == colour).all(1).sum() >= 300
    never = contact_sheet("town", ["one", "two"], samples, CITY, [0.0] + [0.05] * 19)
    assert (np.asarray(never).reshape(-1, 3) == CITY.colours[0]).all(1).sum() < 100
    with pytest.raises(ValueError, match="expected samples and 20 shares"):
        contact_sheet("town", [], samples, CITY, shares[1:])


def test_percent() -> None:
    assert [percent(share) for share in (0, 1e-6, 0.0001, 0.12345)] == ["never", "<0.01 %", "0.01 %", "12.35 %"]


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--domains gtav --protocol g", "not allowed with"),
        ("", "--protocol --domains --config"),
        ("--protocol gst", "invalid choice: 'gst'"),
        ("--domains gtav --limit -1", "--limit: expected at least 0, got -1"),
        ("--domains gtav --workers 0", "--workers: expected at least 1, got 0"),
        ("--domains streets/nonn", "streets/noon"),
        ("--domains gtav:offical", "did you mean 'gtav:official'"),
        (f"--domains gtav --out {__file__}", "--out: expected a folder, but .*test_verify.py is a file"),
        ("--domains gtaw", "did you mean 'gtav'"),
        ("--domains gtav --label-space cityscapes", "did you mean 'cityscapes19'"),
        ("/no/such/folder --domains gtav", "no such folder: /no/such/folder"),
        ("--config gs_r51", "did you mean gs_r50"),
    ],
)
def test_wrong_options(arguments: str, message: str) -> None:
    with pytest.raises((ConfigError, DataError, ValueError), match=message):
        verify.main(arguments.split())
