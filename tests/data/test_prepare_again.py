"""Preparing again: originals that changed, folders that were damaged or left half, and what is told of either."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_fast.data import verify
from pmm_fast.data.datasets import DATASETS
from pmm_fast.data.files import DataError
from tests.data import trees
from tests.data.test_prepare import SIZE, files, ids, kitti, picture, run, save, town

NATIVE = np.array([7, 8, 11, 21, 23, 26, 0], np.uint8)[np.arange(240).reshape(SIZE) % 7]


def cityscapes(root: Path, labels: list[np.ndarray]) -> Path:
    """A Cityscapes of its own layout, ``val`` only."""
    for index, values in enumerate(labels):
        save(root / f"cityscapes/leftImg8bit/val/a/{index}_leftImg8bit.png", picture(index))
        save(root / f"cityscapes/gtFine/val/a/{index}_gtFine_labelIds.png", values)
    return root


def touch_later(path: Path) -> None:
    """Let a file be younger than all that was made of it."""
    later = path.stat().st_mtime_ns + 10**10
    os.utime(path, ns=(later, later))


# --- the whole split --------------------------------------------------------------------------------------------------


def test_train_ids_where_native_ids_belong_are_never_completed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = cityscapes(tmp_path / "data", [ids(index) for index in range(3)]), tmp_path / "out"
    options = ("--root", str(root), "--splits", "val")
    # the second call has nothing to write, the third may leave out pairs but no splits
    for more in ((), (), ("--skip-faulty",)):
        assert run(Path("cityscapes"), out, *options, *more) == 1
        assert "ids of cityscapes19, but are read as cityscapes_ids" in capsys.readouterr().out
        assert [path.name for path in out.iterdir()] == ["cityscapes.partial"]
    for index in range(3):
        touch_later(save(root / f"cityscapes/gtFine/val/a/{index}_gtFine_labelIds.png", NATIVE))
    assert run(Path("cityscapes"), out, *options) == 0


def test_another_number_than_the_known_is_told_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, options = (
        cityscapes(tmp_path / "data", [NATIVE, NATIVE]),
        ("--splits", "val", "--root", str(tmp_path / "data")),
    )
    assert root and run(Path("cityscapes"), tmp_path / "out", *options) == 0
    assert "warning: cityscapes val has 500 images, here are 2" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/cityscapes/prepared.json").read_text())["known"] == {"val": 500}
    monkeypatch.setitem(DATASETS["cityscapes"].counts, ("", "val"), 2)  # type: ignore[arg-type]
    assert run(Path("cityscapes"), tmp_path / "other", *options) == 0
    assert "warning" not in capsys.readouterr().err


# --- originals that changed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["link", "copy", "png", "jpeg"])
def test_originals_that_changed_are_written_again(tmp_path: Path, images: str) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    assert run(source, out, "--images", images) == 0
    touch_later(save(source / "labels/val/n1.png", ids(77)))
    touch_later(save(source / "images/train/n2.png", picture(78)))
    assert run(source, out, "--images", images) == 0
    assert run(source, tmp_path / "once", "--images", images) == 0
    assert files(out) == files(tmp_path / "once")


def test_what_turned_faulty_does_not_stay(tmp_path: Path) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    assert run(source, out) == 0
    touch_later(save(source / "labels/val/n1.png", np.full(SIZE, 77, np.uint8)))
    assert run(source, out) == 1
    assert run(source, out, "--skip-faulty") == 0
    assert not list(out.rglob("val/n1.png"))
    assert json.loads((out / "town/prepared.json").read_text())["counts"] == {"train": 4, "val": 3}


@pytest.mark.parametrize("gone", [("images", "labels"), ("labels",)])
def test_originals_that_are_gone_are_refused_by_name(tmp_path: Path, gone: tuple[str, ...]) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    assert run(source, out) == 0
    before = files(out)
    for kind in gone:
        (source / kind / "val/n1.png").unlink()
    with pytest.raises(DataError, match=r"images/val/n1.png: no such pair .*delete .*out/town and prepare again"):
        run(source, out)
    assert files(out) == before


def test_what_was_left_out_is_tried_again_unless_it_is_to_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    label = source / "labels/val/n1.png"
    whole = label.read_bytes()
    label.write_bytes(whole[:-60])
    (source / "labels/train/n2.png").unlink()
    for _ in range(2):
        assert run(source, out, "--skip-faulty") == 0
        assert capsys.readouterr().out.count("left out, ") == 2
    assert run(source, out) == 1
    assert not (out / "town").exists()
    label.write_bytes(whole)
    save(source / "labels/train/n2.png", ids(2))
    assert run(source, out) == 0
    assert run(source, tmp_path / "once") == 0
    assert files(out) == files(tmp_path / "once")


def test_verify_counts_without_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = kitti(tmp_path / "data"), tmp_path / "out"
    (root / "kitti/labels/000000_10.png").unlink()
    assert run(Path("kitti"), out, "--root", str(root), "--splits", "val", "--skip-faulty") == 0
    verify.main([str(out), "--domains", "kitti", "--splits", "val"])
    assert "1 pair (000000_10) left out when it was prepared" in capsys.readouterr().out
    for kind in ("images", "labels"):
        next((out / f"kitti/{kind}/val").iterdir()).unlink()
    with pytest.raises(SystemExit):
        verify.main([str(out), "--domains", "kitti", "--splits", "val"])
    said = capsys.readouterr().out
    assert "38 images" in said and "kitti has 40, less 1 pair (000000_10) left out" in said


# --- folders that were damaged or left half ---------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["unlink", "replace"])
def test_killed_between_complete_and_partial_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    assert run(source, out) == 0
    whole = files(out)
    (out / "town/labels/train/n2.png").unlink()
    original = {"unlink": Path.unlink, "replace": os.replace}[function]

    def killed(path: Path, *rest: object, **options: object) -> None:
        if path in (out / "town", out / "town.partial/prepared.json", out / "town/prepared.json"):
            raise KeyboardInterrupt
        original(path, *rest, **options)  # type: ignore[operator]

    with monkeypatch.context() as patch:
        patch.setattr({"unlink": Path, "replace": os}[function], function, killed)
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    # never a folder of the domain's name that is neither complete nor known to be not
    assert (out / "town/prepared.json").exists() or not (out / "town").exists()
    assert run(source, out) == 0
    assert files(out) == whole


def test_a_folder_without_its_record_counts_as_partial(tmp_path: Path) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    assert run(source, out) == 0
    whole = files(out)
    (out / "town/prepared.json").unlink()
    assert run(source, out) == 0
    assert files(out) == whole
    (out / "town/prepared.json").unlink()
    (out / "town.partial").mkdir()
    with pytest.raises(DataError, match=r"there is .*town.partial beside .*town: delete one"):
        run(source, out)


def test_killed_at_its_very_first_file_it_begins_anew(tmp_path: Path) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    (out / "town.partial").mkdir(parents=True)
    (out / "town.partial/.options.json.1.part").write_text("{")
    assert run(source, out) == 0
    assert run(source, tmp_path / "once") == 0
    assert files(out) == files(tmp_path / "once")


@pytest.mark.parametrize("file", ["options.json", "prepared.json"])
@pytest.mark.parametrize("content", ['{"format"', "[]", '{"format": 1}', ""])
def test_damaged_records_are_named(tmp_path: Path, file: str, content: str) -> None:
    source, out = town(tmp_path / "town", 1), tmp_path / "out"
    assert run(source, out) == 0
    (out / "town" / file).write_text(content)
    with pytest.raises(DataError, match=rf"out/town/{file}: .*(expected|cannot be read as JSON)"):
        run(source, out)


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, path: Path, *rest: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    def fail_without_number(self: Image.Image, path: Path, *rest: object, **options: object) -> None:
        raise OSError("encoder error -2 when writing image file")

    source = town(tmp_path / "town")
    for function, words in ((fail, "No space left on device"), (fail_without_number, "encoder error")):
        monkeypatch.setattr(Image.Image, "save", function)
        with pytest.raises(OSError, match=words) as caught:
            run(source, tmp_path / "out")
        assert "town.partial/labels/train/a/first.png" in str(caught.value)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_other_variants_and_qualities_are_told_as_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees.use_small_lists(monkeypatch, tmp_path / "lists")
    trees.make_tree(tmp_path / "data/gtav", "gtav", "images + labels")
    root = ("--root", str(tmp_path / "data"))
    assert run(Path("gtav"), tmp_path / "out", *root) == 0
    with pytest.raises(DataError, match="begun with --domains gtav:released, now gtav:official: give"):
        run(Path("gtav:official"), tmp_path / "out", *root)
    with pytest.raises(DataError, match="begun with --images link, now jpeg --quality 95: give"):
        run(Path("gtav"), tmp_path / "out", *root, "--images", "jpeg")


def test_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match=r"--out: expected a folder, but .*out is a file"):
        run(town(tmp_path / "town"), tmp_path / "out")
