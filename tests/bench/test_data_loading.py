"""The bench of loading: its files are what they stand for, its gate stops what is not the released law."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import data_loading, loading_files, loading_stages, released_loading
from bench import loading_pipelines as P
from bench import loading_report as report
from bench.data_loading import QUICK
from bench.loading_files import KINDS, ensure_files
from pmm_fast.data import transforms
from pmm_fast.data.crop import crop_drawn
from pmm_fast.data.labels import IGNORE
from pmm_fast.data.loader import choose_loader
from tests.tolerances import EXACT

PIPELINES, SKIPPED = data_loading.usable([*P.PIPELINES])
OURS = [name for name in PIPELINES if name != "released"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the small files of every kind lie."""
    made = tmp_path_factory.mktemp("files")
    for kind in KINDS.values():
        ensure_files(made, kind, QUICK.images, QUICK.shrink)
    return made


@pytest.fixture(scope="module")
def threads():
    """The bench gives its process one thread; the tests after it get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def setting_of(folder: Path, kind: str) -> P.Setting:
    return P.Setting(ensure_files(folder, KINDS[kind], QUICK.images, QUICK.shrink), QUICK.crop, 0)


# --- the files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_full_file_has_the_size_and_encoding_of_the_data_set(name, tmp_path):
    kind = KINDS[name]
    files = ensure_files(tmp_path, kind, 1)
    assert files.size == kind.size
    low, high = kind.megabytes
    assert low <= files.megabytes(0) <= high
    with Image.open(files.pairs[0][1]) as image:
        assert image.size == kind.size
        assert image.mode == {"gtav": "P", "synthia": "RGB", "jpeg": "L"}[name]
    head = files.pairs[0][1].read_bytes()[:26]
    # bits a channel and the type of colour, of the PNG's header
    assert tuple(head[24:26]) == {"gtav": (8, 3), "synthia": (16, 2), "jpeg": (8, 0)}[name]
    image = files.pairs[0][0].read_bytes()[:3]
    assert image == (b"\xff\xd8\xff" if name == "jpeg" else b"\x89PN")


@pytest.mark.parametrize("name", KINDS)
def test_the_released_readers_give_back_what_was_written(name, folder):
    files = setting_of(folder, name).files
    for index, (_, path) in enumerate(files.pairs):
        _, labels = loading_files.draw(KINDS[name], index, QUICK.shrink)
        np.testing.assert_array_equal(released_loading.READERS[name](path), labels)
        assert len(np.unique(labels)) > 5 and (labels == IGNORE).any()


def test_sixteen_bits_are_written_exactly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2**16, (60, 40, 3), np.uint16)
    # smooth, noisy, and equal to what is above: rows for every filter
    pixels[20:40] = np.arange(40)[:, None] * 517 + np.arange(20)[:, None, None] * 311
    pixels[45:50] = pixels[44]
    path = tmp_path / "a.png"
    path.write_bytes(loading_files.png48(pixels.astype(">u2")))
    image = Image.open(path)
    high = np.array(image)
    image = Image.open(path)
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    np.testing.assert_array_equal(high * np.uint16(256) + np.array(image), pixels)


def test_files_are_drawn_once_and_never_half(tmp_path, monkeypatch):
    kind = KINDS["jpeg"]
    made = ensure_files(tmp_path, kind, 1, QUICK.shrink)
    before = made.pairs[0][0].stat().st_mtime_ns
    assert ensure_files(tmp_path, kind, 1, QUICK.shrink).pairs[0][0].stat().st_mtime_ns == before

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(loading_files, "_write", fail)
    monkeypatch.setattr(loading_files, "ProcessPoolExecutor", lambda workers: Here())
    with pytest.raises(OSError, match="disk full"):
        ensure_files(tmp_path, kind, 2, QUICK.shrink)
    assert [path.name for path in made.root.parent.iterdir()] == [made.root.name]


class Here:
    """A pool without processes."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def map(self, *args):
        return map(*args)


# --- the gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", KINDS)
def test_ours_are_as_released(name, kind, folder):
    setting = setting_of(folder, kind)
    fine, text = P.judge(name, setting, P.expect(setting))
    assert fine and "labels equal" in text, text


def broken(**changes):
    """A way of drawing that is wrong in some parts."""
    right = released_loading.draw

    def draw(size, crop, rng):
        drawn = right(size, crop, rng)
        return dataclasses.replace(drawn, **{name: change(getattr(drawn, name)) for name, change in changes.items()})

    return draw


BREAKS = {
    "scale": {"scaled": lambda size: (size[0] + 2, size[1] + 1)},
    "corner": {"corner": lambda corner: (max(corner[0] - 1, 0), corner[1])},
    "mirror": {"mirror": lambda mirror: not mirror},
    "jitter": {"jitter": lambda jitter: not jitter},
    "order": {"order": lambda order: order[::-1]},
    "hue": {"factors": lambda factors: (*factors[:3], factors[3] + 0.05)},
    "sigma": {"sigma": lambda sigma: sigma + 0.3},
}


@pytest.mark.parametrize("what", BREAKS)
def test_another_draw_does_not_pass(what, folder, monkeypatch):
    setting = setting_of(folder, "gtav")
    monkeypatch.setattr(released_loading, "draw", broken(**BREAKS[what]))
    expected = P.expect(setting)
    for name in OURS:
        fine, text = P.judge(name, setting, expected)
        assert not fine, f"{name}: {text}"


def test_the_released_geometry_is_ours_with_and_without_a_border():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    labels = np.random.default_rng(1).integers(0, 19, (40, 50)).astype(np.uint8)
    augment = transforms.Augment((44, 52), released_loading.SCALE, 0.5, 0.5, blur=True)
    borders = 0
    for seed in range(20):
        drawn = released_loading.draw((50, 40), (44, 52), np.random.default_rng(seed))
        ours = augment.draw((50, 40), np.random.default_rng(seed))
        found = released_loading.scale_and_crop(Image.fromarray(labels), drawn, (44, 52))
        np.testing.assert_array_equal(found, transforms.crop_labels(labels, ours.window, ours.mirror))
        crop = np.asarray(released_loading.scale_and_crop(Image.fromarray(pixels), drawn, (44, 52))).astype(int)
        assert np.abs(crop - crop_drawn(Image.fromarray(pixels), ours)).max() <= P.CROP_LEVELS
        borders += bool((np.asarray(found) == IGNORE).any())
    assert 3 < borders < 17


def test_a_wrong_label_crop_or_no_number_does_not_pass(folder, monkeypatch):
    setting = setting_of(folder, "jpeg")
    expected = P.expect(setting)
    labels = expected.labels.copy()
    labels[0, 3, 4] ^= 1
    fine, text = P.judge("torch", setting, dataclasses.replace(expected, labels=labels))
    assert not fine and "labels differ" in text
    for value, places in ((64, slice(0, 1)), (1, slice(0, None, 100))):
        crops = expected.crops.copy()
        crops.reshape(-1)[places] ^= value
        fine, text = P.judge("torch", setting, dataclasses.replace(expected, crops=crops))
        assert not fine and "labels equal" in text
    monkeypatch.setattr(P, "finish", lambda batch: torch.full((P.BATCH, 3, *QUICK.crop), float("nan")))
    assert not P.judge("torch", setting, expected)[0]


def test_no_figures_behind_a_gate_that_failed(folder, monkeypatch, capsys, threads):
    monkeypatch.setattr(released_loading, "draw", broken(**BREAKS["mirror"]))
    words = f"--quick --kinds jpeg --pipelines released torch --files {folder} --json {folder / 'none.json'}"
    with pytest.raises(SystemExit) as ended:
        data_loading.main(words.split())
    assert ended.value.code == "error: the gate failed, nothing is timed"
    printed = capsys.readouterr().out
    assert "gate: FAILED: jpeg, torch: " in printed and "images/s" not in printed
    assert not (folder / "none.json").exists()


def test_a_pipeline_that_raises_fails_the_gate(folder, monkeypatch):
    def fail(setting):
        raise RuntimeError("no codec")

    monkeypatch.setitem(P.LOADERS, "torch", fail)
    options = data_loading.arguments(["--quick", "--files", str(folder)])
    session = data_loading.Session(options, ["torch"], {})
    found = list(session.judge(setting_of(folder, "jpeg").files))
    assert found == [(False, "jpeg, torch: RuntimeError: no codec")]


def test_the_released_blur_with_and_without_scipy(monkeypatch):
    if released_loading.gaussian_filter is None:
        pytest.skip("SciPy is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    for sigma in (0.15, 0.7, 1.3):
        levels = pixels / 255.0
        found = released_loading.plain_filter(levels, sigma)
        wanted = released_loading.gaussian_filter(levels, (sigma, sigma, 0), mode="nearest", truncate=4.0)
        assert np.abs(found - wanted).max() < EXACT
    with_scipy = np.asarray(released_loading.blur(Image.fromarray(pixels), 0.9)).astype(int)
    monkeypatch.setattr(released_loading, "gaussian_filter", None)
    without = np.asarray(released_loading.blur(Image.fromarray(pixels), 0.9))
    # a value that is whole but for the last bit is cut to it or to the one below
    assert np.abs(with_scipy - without).max() <= 1 and (with_scipy != without).mean() < 1e-2


# --- measuring ----------------------------------------------------------------------------------------------------


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cpu_time_of_children_counts_while_they_run_and_after():
    start = data_loading.cpu_seconds()
    ready, done = multiprocessing.Event(), multiprocessing.Event()

    def work():
        burn(0.3)
        ready.set()
        done.wait()

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    assert ready.wait(30)
    running = data_loading.cpu_seconds() - start
    done.set()
    child.join()
    ended = data_loading.cpu_seconds() - start
    assert 0.27 <= running <= ended < 2


def test_watching_counts_what_comes_after_the_warm_up(monkeypatch):
    now, taken, closed = [0.0], [0], []
    monkeypatch.setattr(data_loading.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(data_loading, "cpu_seconds", lambda: now[0] * 1.5)

    def batches():
        try:
            while True:
                # slow while warming up, then a batch of four in two seconds
                now[0] += 100 if taken[0] < 2 else 2
                taken[0] += 1
                yield torch.zeros(4, 3, 2, 2), torch.zeros(4)
        finally:
            closed.append(True)

    source = batches()
    found = data_loading.watch(source, 2, 13.0)
    # seven batches would be enough, but not whole rounds of two workers
    assert found == report.Throughput(images=32, seconds=16.0, cpu_seconds=24.0, error=0.0)
    assert closed and found.rate == 2 and found.cpu == 0.75
    # three rounds at least
    taken[0] = 0
    assert data_loading.watch(batches(), 2, 0.0).images == 24


# --- what is said -------------------------------------------------------------------------------------------------


def throughputs(**rates):
    return {name: report.Throughput(100, 100 / rate, 90 / rate, 0.02) for name, rate in rates.items()}


def records_of(kind, workers=1, **rates):
    return report.records_of(kind, workers, throughputs(**rates), {"torch": dict.fromkeys(report.STAGES, 1.0)})


def test_records():
    released, torch_row, dali = records_of("gtav", released=2, torch=10, dali=16)
    assert tuple(dali) == report.KEYS
    assert dali["ratio_torch"] == pytest.approx(1.6) and dali["ratio_released"] == pytest.approx(8)
    assert dali["cpu_ratio_torch"] == pytest.approx(1.6) and dali["cpu_ms_per_image"] == pytest.approx(900 / 16)
    assert torch_row["stages_ms"]["blur"] == 1 and released["stages_ms"] is None
    (alone,) = records_of("gtav", dali=16)
    assert alone["ratio_torch"] is None
    assert {len(report.row(record)) for record in (released, torch_row, dali, alone)} == {len(report.HEADER)}


def test_stages_and_the_rest_make_the_whole():
    record = records_of("gtav", torch=10)[0]
    stages = report.mean_stages(record)
    assert stages["jitter"] == 0.5 and sum(stages.values()) == pytest.approx(record["cpu_ms_per_image"])
    assert report.mean_stages(record | {"cpu_ms_per_image": 1.0})["rest"] == 0


def test_targets():
    lines = report.target_lines(
        records_of("gtav", released=2, torch=10, dali=16)
        + records_of("synthia", torch=20, dali=24)
        + records_of("jpeg", torch=30, dali=48)
    )
    verdicts = {line.split(",")[0] + "," + line.split(",")[1]: line.split() for line in lines[1:]}
    assert verdicts["dali / torch, gtav"][-4:] == ["1.60x", "met", "1.60x", "met"]
    assert verdicts["dali / torch, synthia"][-4:] == ["1.20x", "missed", "1.20x", "missed"]
    # equal parts: (1/10 + 1/20 + 1/30) / (1/16 + 1/24 + 1/48)
    assert verdicts["dali / torch, gtav + synthia + jpeg"][-4] == "1.47x"
    assert verdicts["dali / released, gtav"][-2:] == ["8.00x", "met"]
    assert len(verdicts) == 5
    assert report.target_lines([]) == []


def test_a_run(folder, tmp_path, capsys, threads):
    json_file, plot = tmp_path / "a.json", tmp_path / "a.png"
    words = f"--quick --workers 2 --files {folder} --json {json_file} --plot {plot}"
    data_loading.main(words.split())
    records = json.loads(json_file.read_text())
    rows = [(record["files"], record["workers"], record["pipeline"]) for record in records]
    assert rows == [(kind, 2, name) for kind in KINDS for name in PIPELINES]
    for record in records:
        assert list(record)[: len(report.KEYS)] == list(report.KEYS)
        assert record["images_per_s"] > 0 and record["cpu_ms_per_image"] > 0 and record["images"] >= 4
        assert set(record["stages_ms"]) == set(report.STAGES) and record["stages_ms"]["image"] > 0
        assert {"device", "torch", "commit", "threads", "dali", "pillow", "crop_backend", "released_blur"} <= set(
            record
        )
    # the slow way must be seen to be slow even here: 57 comparisons against one look-up
    stages = {record["pipeline"]: record["stages_ms"] for record in records if record["files"] == "gtav"}
    assert stages["released"]["labels"] > 3 * stages["torch"]["labels"]
    printed = capsys.readouterr().out
    assert printed.count("gate: ") == len(KINDS) * len(PIPELINES) and "FAILED" not in printed
    assert printed.count("\ngtav ") == 2 * len(PIPELINES) and "no figure above is a measurement" in printed
    assert plot.stat().st_size > 10_000


def test_the_picture_has_every_kind_and_number_of_workers(tmp_path):
    few, many = (
        records_of("gtav", workers, released=2, torch=10) + records_of("jpeg", workers, released=9, torch=30)
        for workers in (1, 2)
    )
    sizes = []
    for name, records in (("a", few[:2]), ("b", few + many)):
        report.draw(str(tmp_path / f"{name}.png"), records, "a title")
        with Image.open(tmp_path / f"{name}.png") as image:
            sizes.append(image.size)
    # a row of panels for each kind
    assert sizes[1][1] > 1.4 * sizes[0][1] and sizes[1][0] == sizes[0][0]


def test_dali_is_skipped_by_name_where_it_is_not(monkeypatch):
    monkeypatch.setattr(data_loading, "choose_loader", lambda wanted: ("torch", "DALI is not installed"))
    assert data_loading.usable(["torch", "dali"]) == (["torch"], ["skipped: dali: DALI is not installed"])
    monkeypatch.setattr(data_loading, "choose_loader", choose_loader)
    assert data_loading.usable(["torch"]) == (["torch"], [])


def test_options(capsys):
    with pytest.raises(SystemExit):
        data_loading.arguments(["--workers", "0"])
    assert "--workers: expected 1 or more, got 0" in capsys.readouterr().err
    default = data_loading.arguments([])
    assert default.seconds == data_loading.FULL.seconds and default.workers == [1, 2] and default.kinds == [*KINDS]
    assert data_loading.arguments(["--quick"]).scale is QUICK


def test_every_pipeline_has_its_stages(folder):
    found = loading_stages.measure(setting_of(folder, "synthia"), PIPELINES, 1)
    assert list(found) == PIPELINES
    assert {frozenset(stages) for stages in found.values()} == {frozenset(report.STAGES)}
