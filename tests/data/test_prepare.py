"""Preparing data sets: what is written reads back as the originals do, and a stopped run leaves nothing half."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_fast.config import ConfigError
from pmm_fast.config.schema import DataConfig
from pmm_fast.data import convert_files, prepare, prepare_domain, verify
from pmm_fast.data.datasets import DATASETS
from pmm_fast.data.files import DataError
from pmm_fast.data.folder import open_domain
from pmm_fast.data.labels import IGNORE, get_space
from pmm_fast.data.parallel import for_each
from tests.data import trees

# KITTI and IDD-Lite, not shipped: their licences do not allow it
REAL = Path(os.environ.get("PMM_FAST_TEST_DATA", Path(__file__).parents[2].parent / "shared/data"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real data beside the repository")
SIZE = (12, 20)


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def ids(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    values = np.array([*range(19), IGNORE], np.uint8)
    return values[np.random.default_rng(seed).integers(0, 20, size)]


def save(path: Path, pixels: np.ndarray, **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def town(root: Path, count: int = 4, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """A plain folder of small pairs, the first of each split in a sub-folder."""
    for position, split in enumerate(splits):
        for index in range(count):
            name, seed = ("a/first" if index == 0 else f"n{index}"), 100 * position + index
            save(root / f"images/{split}/{name}.png", picture(seed))
            save(root / f"labels/{split}/{name}.png", ids(seed))
    return root


def run(source: Path, out: Path, *options: str) -> int:
    """The exit code of the program."""
    try:
        prepare.main(["--domains", str(source), "--out", str(out), "--workers", "2", *options])
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code
    return 0


def files(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder: its bytes, or where it links to."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def assert_equal_domains(one: str, other: str, config: DataConfig, other_config: DataConfig, split: str) -> None:
    first, second = open_domain(one, config, split), open_domain(other, other_config, split)
    assert len(first) == len(second) > 0
    for index in range(len(first)):
        for left, right in zip(first.load(index), second.load(index), strict=True):
            np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["link", "copy", "png"])
def test_reads_back_equal_and_verifies(tmp_path: Path, images: str) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    before = files(source)
    assert run(source, out, "--images", images) == 0
    assert files(source) == before
    for split in ("train", "val"):
        assert_equal_domains(str(source), str(out / "town"), DataConfig(), DataConfig(), split)
    image = out / "town/images/train/a/first.png"
    assert image.is_symlink() == (images == "link")
    if images == "link":
        assert os.readlink(image) == str(source / "images/train/a/first.png")
    with Image.open(out / "town/labels/val/n1.png") as label:
        assert label.mode == "L"
    verify.main([str(out), "--domains", "town"])
    record = json.loads((out / "town/prepared.json").read_text())
    assert record["counts"] == {"train": 4, "val": 4} and record["skipped"] == []
    assert record["label_space"] == "cityscapes19" and record["images"] == images


def test_jpeg_encodes_what_is_none_and_copies_what_is(tmp_path: Path) -> None:
    source = town(tmp_path / "town", 2, ("train",))
    smooth = np.tile(np.arange(20, dtype=np.uint8)[None, :, None] * 8, (12, 1, 3))
    save(source / "images/train/n1.png", smooth)
    (source / "images/train/a/first.png").unlink()
    photo = save(source / "images/train/a/first.jpeg", smooth, quality=30)
    assert run(source, tmp_path / "out", "--images", "jpeg", "--splits", "train", "--quality", "98") == 0
    made = tmp_path / "out/town/images/train"
    assert (made / "a/first.jpeg").read_bytes() == photo.read_bytes()
    Image.fromarray(smooth).save(tmp_path / "n1.jpg", quality=98)
    assert (made / "n1.jpg").read_bytes() == (tmp_path / "n1.jpg").read_bytes()


def test_a_coarser_label_space(tmp_path: Path) -> None:
    source = town(tmp_path / "town", 2)
    options = ("--label-space", "idd_lite7")
    # the labels of a plain folder are in the space that is learnt, unless a data set says otherwise
    assert run(source, tmp_path / "out", *options) == 1
    root = kitti(tmp_path / "data")
    assert run(Path("kitti"), tmp_path / "out", "--root", str(root), *options) == 0
    coarse = DataConfig(root=str(root), label_space="idd_lite7")
    prepared = DataConfig(root=str(tmp_path / "out"), label_space="idd_lite7")
    assert_equal_domains("kitti", "kitti", coarse, prepared, "val")
    with pytest.raises(ValueError, match="idd_lite7"):
        open_domain("kitti", DataConfig(root=str(tmp_path / "out")), "val")


def kitti(root: Path) -> Path:
    """KITTI's own tree in small: all 200 names, whose labels are colours."""
    colours = np.array(get_space("cityscapes19").colours, np.uint8)
    for index in range(200):
        save(root / f"kitti/images/{index:06d}_10.png", picture(index, (2, 3)))
        save(root / f"kitti/labels/{index:06d}_10.png", colours[ids(index, (2, 3)) % 19])
    return root


@pytest.mark.parametrize(
    ("dataset", "layout"), [(dataset, layout) for dataset, layouts in trees.TREES.items() for layout in layouts]
)
def test_every_data_set_in_every_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, layout: str
) -> None:
    trees.use_small_lists(monkeypatch, tmp_path / "lists")
    expected = trees.make_tree(tmp_path / "data" / dataset, dataset, layout)
    space = ("--label-space", trees.SPACE.get(dataset, "cityscapes19"))
    assert run(Path(dataset), tmp_path / "out", "--root", str(tmp_path / "data"), *space) == 0
    known = DATASETS[dataset]
    for split in ("train", "val"):
        domain = open_domain(dataset, DataConfig(root=str(tmp_path / "out"), label_space=space[1]), split)
        assert domain.label_format == "ids" and domain.source_space == space[1] and domain.dataset
        labels = [labels for _, labels in sorted(expected[split].items())]
        for index in range(len(domain)):
            np.testing.assert_array_equal(domain.load(index)[1], labels[index])
        monkeypatch.setitem(known.counts, (known.default_variant, split), len(labels))  # type: ignore[arg-type]
    for root in ("data", "out"):
        verify.main([str(tmp_path / root), "--domains", dataset, *space])


def test_images_on_no_list_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.use_small_lists(monkeypatch, tmp_path / "lists")
    names = trees.GTAV | {"train": (*trees.GTAV["train"], "12160")}
    trees.make_tree(tmp_path / "data/gtav", "gtav", "images + labels", names)
    assert run(Path("gtav"), tmp_path / "out", "--root", str(tmp_path / "data")) == 0
    assert "1 image (12160) on no list, not prepared" in capsys.readouterr().err
    record = json.loads((tmp_path / "out/gtav/prepared.json").read_text())
    assert record["left_out"] == {"train": ["12160"], "val": ["12160"]} and record["variant"] == "released"
    assert record["lists"] == {"train": "gtav_train_released.txt", "val": "gtav_val.txt"}
    # another variant is another domain
    with pytest.raises(DataError, match="gtav:all"):
        open_domain("gtav:all", DataConfig(root=str(tmp_path / "out")), "train")


@needs_real
def test_real_data(tmp_path: Path) -> None:
    assert run(Path("kitti"), tmp_path, "--root", str(REAL), "--splits", "val") == 0
    prepared = DataConfig(root=str(tmp_path))
    assert_equal_domains("kitti", "kitti", DataConfig(root=str(REAL)), prepared, "val")
    verify.main([str(tmp_path), "--domains", "kitti", "--splits", "val", "--limit", "3"])


# --- faults -----------------------------------------------------------------------------------------------------------


def plant(root: Path) -> dict[str, str]:
    """Faults of every kind in ``train`` of a town of ten: what is said about each, by the name of the pair."""
    images, labels = root / "images/train", root / "labels/train"
    (labels / "n1.png").unlink()
    save(labels / "n2.png", ids(2).T.copy())
    save(labels / "n3.png", np.full(SIZE, 77, np.uint8))
    for path in (labels / "n4.png", images / "n5.png"):
        path.write_bytes(path.read_bytes()[:-80])
    Image.fromarray(ids(6).astype(np.uint16)).save(labels / "n6.png")
    save(images / "n7.jpg", picture(7))
    return {
        "n1": "missing label: .*images/train/n1.png has no label",
        "n2": "size: .*n2.png is 20x12, its label .*n2.png 12x20",
        "n3": "label: .*n3.png: values 77",
        "n4": "label: .*labels/train/n4.png: cannot be read",
        "n5": "image: .*images/train/n5.png: cannot be read",
        "n6": "label: .*n6.png.*16",
        "n7": "duplicate: .*n7.(jpg|png) and .*n7.(jpg|png)",
    }


def test_every_fault_is_named_and_nothing_passes_for_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = town(tmp_path / "town", 10), tmp_path / "out"
    faults = plant(source)
    before = files(source)
    assert run(source, out) == 1
    said = capsys.readouterr()
    for message in faults.values():
        assert len(re.findall(message, said.out)) == 1, message
    assert "7 faults" in said.out and "--skip-faulty" in said.err
    assert not (out / "town").exists() and not list(out.rglob("prepared.json"))
    # of the faulty pairs nothing is written, of the others everything
    assert {Path(name).stem for name in files(out / "town.partial/labels/train")} == {"first", "n8", "n9"}
    assert files(source) == before
    with pytest.raises(DataError):
        open_domain("town", DataConfig(root=str(out)), "train")


def test_faulty_pairs_are_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = town(tmp_path / "town", 10), tmp_path / "out"
    faults = plant(source)
    assert run(source, out, "--skip-faulty") == 0
    assert capsys.readouterr().out.count("left out, ") == 7
    record = json.loads((out / "town/prepared.json").read_text())
    assert {fault["name"] for fault in record["skipped"]} == set(faults)
    assert {fault["split"] for fault in record["skipped"]} == {"train"}
    assert record["counts"] == {"train": 3, "val": 10}
    verify.main([str(out), "--domains", "town"])
    # complete is complete: a further call reads nothing and says what was left out
    assert run(source, out, "--skip-faulty") == 0
    assert capsys.readouterr().out.count("left out, ") == 7


def test_mended_originals_complete_the_folder(tmp_path: Path) -> None:
    source, out = town(tmp_path / "town", 3), tmp_path / "out"
    label = source / "labels/val/n1.png"
    whole = label.read_bytes()
    label.write_bytes(whole[:-60])
    assert run(source, out) == 1
    label.write_bytes(whole)
    assert run(source, out) == 0
    assert run(source, tmp_path / "once") == 0
    assert files(out) == files(tmp_path / "once")


# --- going on ---------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    assert run(source, out) == 0
    whole = files(out)
    (out / "town/labels/train/n2.png").unlink()
    (out / "town/images/val/n3.png").unlink()
    written = []
    write_whole = convert_files.write_whole
    monkeypatch.setattr(
        convert_files, "write_whole", lambda path, write: (written.append(path), write_whole(path, write))
    )
    assert run(source, out) == 0
    assert {path.stem for path in written} == {"n2", "n3"} and files(out) == whole
    written.clear()
    assert run(source, out) == 0
    assert written == []


def test_what_was_complete_is_not_once_a_file_is_lost(tmp_path: Path) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    assert run(source, out) == 0
    (out / "town/labels/train/n2.png").unlink()
    save(source / "labels/train/n2.png", np.full(SIZE, 77, np.uint8))
    assert run(source, out) == 1
    assert not (out / "town").exists() and not list(out.rglob("prepared.json"))


def test_a_link_that_leads_elsewhere_is_made_again(tmp_path: Path) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    assert run(source, out) == 0
    whole = files(out)
    link = out / "town/images/val/n3.png"
    link.unlink()
    link.symlink_to(source / "images/val/n2.png")
    assert run(source, out) == 0
    assert files(out) == whole


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--images", "copy"), "--images link, now copy"),
        (("--splits", "val"), "--splits train val, now val"),
        (("--label-space", "idd_lite7"), "--label-space cityscapes19, now idd_lite7"),
    ],
)
def test_other_options_are_refused(tmp_path: Path, options: tuple[str, ...], named: str) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    assert run(source, out) == 0
    whole = files(out)
    with pytest.raises(DataError, match=named):
        run(source, out, *options)
    with pytest.raises(DataError, match=r"--root .*town.*, now .*other"):
        run(town(tmp_path / "other/town"), out)
    assert files(out) == whole


def test_killed_in_the_middle_it_goes_on(tmp_path: Path) -> None:
    source = tmp_path / "town"
    for index in range(40):
        save(source / f"images/train/{index}.jpg", picture(index, (384, 384)))
        save(source / f"labels/train/{index}.png", ids(index, (384, 384)))
    options = ("--images", "png", "--splits", "train")
    command = [sys.executable, "-m", "pmm_fast.data.prepare", "--domains", str(source), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--workers", "2", *options], stderr=subprocess.DEVNULL)
    partial = tmp_path / "out/town.partial"
    while len(list(partial.glob("labels/train/*.png"))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) == 2
    wait_until_gone(workers)
    half = [path for path in partial.rglob("*.png") if not path.name.startswith(".")]
    assert 3 <= len(half) < 80 and not (tmp_path / "out/town").exists() and not (partial / "prepared.json").exists()
    for path in half:
        Image.open(path).load()
    # as left by a process that was killed while it wrote
    (partial / "labels/train/.39.png.1.part").write_bytes(b"half")
    assert run(source, tmp_path / "out", *options) == 0
    assert run(source, tmp_path / "once", *options) == 0
    assert files(tmp_path / "out") == files(tmp_path / "once")


def wait_until_gone(pids: list[str]) -> None:
    """Wait for processes that are not ours to end; a dead one that nobody has asked for counts as ended."""
    limit = time.monotonic() + 10
    while any(state(pid) not in ("", "Z") for pid in pids):
        assert time.monotonic() < limit, "a worker outlived the program"
        time.sleep(0.01)


def state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image, path: Path, *rest: object, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    source = town(tmp_path / "town")
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        run(source, tmp_path / "out")
    assert set(files(tmp_path / "out")) == {"town.partial/options.json"}


# --- refused ----------------------------------------------------------------------------------------------------------


def test_originals_are_out_of_bounds(tmp_path: Path) -> None:
    source = town(tmp_path / "data/town")
    before = files(tmp_path)
    for out in (source.parent, source, source / "images", source / "labels/train"):
        with pytest.raises(DataError, match=r"--out: .*originals"):
            run(source, out)
    with pytest.raises(DataError, match=r"--out: .*--root"):
        run(Path("town"), source.parent, "--root", str(source.parent))
    (tmp_path / "alias").symlink_to(source.parent)
    with pytest.raises(DataError, match=r"--out: .*originals"):
        run(source, tmp_path / "alias")
    assert {name: content for name, content in files(tmp_path).items() if name != "alias"} == before


def test_a_folder_that_was_not_made_here_is_left_alone(tmp_path: Path) -> None:
    source, mine = town(tmp_path / "town"), save(tmp_path / "out/town/images/mine.png", picture(0))
    with pytest.raises(DataError, match="was not made by this program"):
        run(source, tmp_path / "out")
    assert files(tmp_path / "out") == {"town/images/mine.png": mine.read_bytes()}


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first file that is written to the last."""
    source, out = town(tmp_path / "town"), tmp_path / "out"
    write_whole, refused = convert_files.write_whole, {}

    def write(path: Path, function: object) -> None:
        if path.name in ("options.json", "n1.png", "prepared.json") and path.name not in refused:
            refused[path.name] = subprocess.run(
                [sys.executable, "-m", "pmm_fast.data.prepare", "--domains", str(source), "--out", str(out)],
                capture_output=True,
                text=True,
            )
        write_whole(path, function)

    for module in (convert_files, prepare_domain):
        monkeypatch.setattr(module, "write_whole", write)
    assert run(source, out) == 0 and len(refused) == 3
    for second in refused.values():
        assert second.returncode == 2 and "another run is writing" in second.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--domains x --out y --images jpeg --quality 0", "--quality: expected 1..100, got 0"),
        ("--domains x --out y --quality 90", "--quality is for --images jpeg, not for link"),
        ("--domains x --out y --workers 0", "--workers: expected at least 1, got 0"),
        ("--domains x", "--out"),
        ("--domains x --out y --split val", "did you mean --splits"),
    ],
)
def test_wrong_options(arguments: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare.main(arguments.split())


def test_domains_are_looked_for_before_work_begins(tmp_path: Path) -> None:
    source, out = town(tmp_path / "town"), tmp_path / "out"
    with pytest.raises(DataError, match="nowhere"):
        prepare.main(["--domains", str(source), "nowhere", "--out", str(out)])
    with pytest.raises(DataError, match="would both be written to"):
        prepare.main(["--domains", str(source), str(town(tmp_path / "b/town")), "--out", str(out)])
    assert not out.exists()


# --- processes --------------------------------------------------------------------------------------------------------


def double(task: int) -> tuple[int, int]:
    if task == 1000:
        raise ValueError("no such task")
    return 2 * task, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_for_each_keeps_the_order(workers: int) -> None:
    results = list(for_each(double, list(range(0, 80, 2)), workers, "doubling"))
    assert [(task, result[0]) for task, result in results] == [(task, 2 * task) for task in range(0, 80, 2)]
    assert (os.getpid() in {result[1] for _, result in results}) == (workers == 1)
    with pytest.raises(ValueError, match="no such task"):
        list(for_each(double, [1000] * 20, workers, "doubling"))
