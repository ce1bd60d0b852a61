"""The generated streets: determinism, labels, the cache on disk, and that the domains differ."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_fast.data import streets
from pmm_fast.data.streets import STREETS, ensure_streets, render

SIZE = (64, 128)
SOURCES = ("noon", "suburb", "overcast")
UNSEEN = ("night", "fog")


def _files(root: Path) -> dict[str, int]:
    """Every file below a folder with the time it was written."""
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def samples() -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Ten small scenes of each domain, as (image, label)."""
    drawn = {domain: [render(domain, "train", i, SIZE) for i in range(10)] for domain in STREETS}
    return {domain: [(np.asarray(image), label) for image, label in pairs] for domain, pairs in drawn.items()}


def test_same_arguments_give_the_same_scene() -> None:
    for domain in STREETS:
        (first, label_first), (second, label_second) = render(domain, "val", 3, SIZE), render(domain, "val", 3, SIZE)
        assert np.array_equal(first, second)
        assert np.array_equal(label_first, label_second)


def test_scenes_differ_by_domain_split_and_index() -> None:
    keys = [("noon", "train", 0), ("noon", "val", 0), ("noon", "train", 1), ("night", "train", 0)]
    labels = [render(*key, SIZE)[1] for key in keys]
    for i, one in enumerate(labels):
        for other in labels[:i]:
            assert (one != other).mean() > 0.05


@pytest.mark.parametrize("size", [(33, 47), (64, 128), (97, 65), (32, 200)])
def test_image_and_label_have_the_size_asked_for(size: tuple[int, int]) -> None:
    image, label = render("rain", "train", 0, size)
    assert (image.mode, image.size) == ("RGB", (size[1], size[0]))
    assert (label.dtype, label.shape) == (np.uint8, size)


def test_labels_are_train_ids(samples: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    found = {int(i) for pairs in samples.values() for _, label in pairs for i in np.unique(label)}
    assert found <= {*range(19), 255}
    assert 255 in found


def test_sources_have_all_classes(samples: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    counts = np.zeros(256, np.int64)
    for domain in SOURCES:
        for _, label in samples[domain]:
            counts += np.bincount(label.reshape(-1), minlength=256)
    assert np.flatnonzero(counts[:19] < 20).tolist() == []


def test_layout_follows_perspective(samples: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    """The road lies in the lower half and widens downwards; the sky lies in the upper half."""
    for domain, pairs in samples.items():
        labels = np.stack([label for _, label in pairs])
        road, sky = (labels == 0).mean(axis=(0, 2)), (labels == 10).mean(axis=(0, 2))
        assert road[:18].sum() == 0, domain
        assert road[56] > road[40] > road[30], domain
        assert sky[40:].sum() == 0 < sky[:16].sum(), domain


def test_image_edges_lie_on_label_edges() -> None:
    """Label and image come from one number map: classes meet where colours change."""
    image, label = render("noon", "train", 1, (128, 256))
    luminance = np.asarray(image, np.float32).mean(axis=2)
    step = np.abs(np.diff(luminance, axis=1))
    border = np.diff(label.astype(np.int16), axis=1) != 0
    aligned, inside = step[border].mean(), step[~border].mean()
    shifted = step[np.roll(border, 4, axis=1)].mean()
    assert aligned > 3 * inside
    assert aligned > 1.8 * shifted


def test_domains_differ_measurably(samples: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    """Night is dark and noisy, fog pale and of low contrast; the sources lie closer together."""
    luminance = {d: np.stack([image for image, _ in pairs]).mean() for d, pairs in samples.items()}
    contrast = {d: np.mean([image.mean(axis=2).std() for image, _ in pairs]) for d, pairs in samples.items()}
    for source in SOURCES:
        assert luminance["night"] < luminance[source] - 20
        assert luminance["rain"] < luminance[source] - 20
        assert luminance["fog"] > luminance[source] + 12
        assert contrast["fog"] < contrast[source] - 3
    spread = [luminance[source] for source in SOURCES]
    assert max(spread) - min(spread) < 25


def test_colour_alone_does_not_tell_the_class(samples: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    """Road and building share a good part of their brightness range in every source domain."""
    for domain in SOURCES:
        values: dict[int, list[np.ndarray]] = {0: [], 2: []}
        for image, label in samples[domain]:
            for k, parts in values.items():
                parts.append(image[label == k].mean(axis=1))
        road, building = (np.concatenate(parts) for parts in values.values())
        low, high = np.percentile(road, [10, 90])
        assert ((building > low) & (building < high)).mean() > 0.2, domain


def test_cache_holds_exactly_the_files_and_is_left_alone(tmp_path: Path) -> None:
    root = ensure_streets("noon", "val", 3, SIZE, tmp_path, progress=False)
    assert root == tmp_path / f"streets-v{streets.VERSION}-64x128" / "noon"
    before = _files(tmp_path)
    names = [f"{kind}/val/{i:05d}.png" for kind in ("images", "labels") for i in range(3)]
    assert list(before) == [str((root / name).relative_to(tmp_path)) for name in names]
    ensure_streets("noon", "val", 3, SIZE, tmp_path, progress=False)
    assert _files(tmp_path) == before


def test_cached_files_are_what_render_draws(tmp_path: Path) -> None:
    root = ensure_streets("fog", "train", 1, SIZE, tmp_path, progress=False)
    image, label = render("fog", "train", 0, SIZE)
    with Image.open(root / "images/train/00000.png") as stored:
        assert stored.mode == "RGB" and np.array_equal(stored, image)
    with Image.open(root / "labels/train/00000.png") as stored:
        assert stored.mode == "L" and np.array_equal(stored, label)


@pytest.mark.parametrize("lost", ["images", "labels"])
def test_cache_is_repaired_and_grows(tmp_path: Path, lost: str) -> None:
    root = ensure_streets("suburb", "train", 2, SIZE, tmp_path, progress=False)
    before = _files(root)
    (root / lost / "train" / "00001.png").unlink()
    ensure_streets("suburb", "train", 4, SIZE, tmp_path, progress=False)
    after = _files(root)
    assert len(after) == 8
    for kind in ("images", "labels"):
        assert after[f"{kind}/train/00000.png"] == before[f"{kind}/train/00000.png"]


def test_label_is_written_before_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut off leaves no image without its label, and no half-written file."""
    replace = streets.os.replace

    def cut_off(source: Path, target: Path) -> None:
        if "images" in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(streets.os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        ensure_streets("noon", "train", 1, SIZE, tmp_path, progress=False)
    assert [Path(name).parts[-3] for name in _files(tmp_path)] == ["labels"]


def test_worker_processes_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    pool = streets.ProcessPoolExecutor
    monkeypatch.setattr(streets.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(streets, "ProcessPoolExecutor", lambda n, **kw: started.append(n) or pool(n, **kw))
    root = ensure_streets("overcast", "train", 16, (32, 32), tmp_path, progress=False)
    assert started == [2]
    assert len(list((root / "images" / "train").iterdir())) == 16
    with Image.open(root / "images/train/00015.png") as stored:
        assert np.array_equal(stored, render("overcast", "train", 15, (32, 32))[0])


def test_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMM_FAST_CACHE", str(tmp_path / "env"))
    assert (tmp_path / "env") in ensure_streets("noon", "val", 1, (32, 32), progress=False).parents
    monkeypatch.delenv("PMM_FAST_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (tmp_path / "home/.cache/pmm_fast") in ensure_streets("noon", "val", 1, (32, 32), progress=False).parents


def test_unknown_domain_names_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match=r"unknown street domain 'nigth'. Did you mean 'night'\?") as error:
        render("nigth", "train", 0, SIZE)
    assert all(name in str(error.value) for name in STREETS)
    with pytest.raises(ValueError, match="unknown street domain"):
        ensure_streets("atlantis", "train", 1, SIZE, Path("/nonexistent"))


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 32 x 32 pixels, got 31 x 64"):
        render("noon", "train", 0, (31, 64))
    with pytest.raises(ValueError, match="index must be 0 or more, got -1"):
        render("noon", "train", -1, SIZE)
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        ensure_streets("noon", "train", 0, SIZE, tmp_path)
    with pytest.raises(ValueError, match="plain folder name"):
        ensure_streets("noon", "../train", 1, SIZE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unwritable_cache_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match=re.escape(str(blocked)) + ".*PMM_FAST_CACHE"):
        ensure_streets("noon", "train", 1, SIZE, blocked, progress=False)
