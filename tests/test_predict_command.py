"""``python -m pmm_fast.predict``: what is written, what is not done twice, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from pmm_fast import predict as program
from pmm_fast.config import run_main
from pmm_fast.data.files import DataError
from pmm_fast.data.videos import VideoReader, VideoWriter
from pmm_fast.engine import predict_record
from pmm_fast.engine.predict import PredictionError, Predictor
from pmm_fast.engine.predict_record import DONE_FILE, SETTINGS_FILE
from pmm_fast.models import Segmentor
from pmm_fast.viz import predictions
from tests.tiny_network import noise, save_network

IMAGES = {"a.png": (20, 32), "b.png": (20, 32), "c.jpg": (24, 20), "town/a.png": (20, 32)}
NAMES = [name.rpartition(".")[0] for name in IMAGES]


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    return save_network(tmp_path_factory.mktemp("network") / "network.pt")


@pytest.fixture(scope="module")
def predictor(network) -> Predictor:
    return Predictor(network, "cpu", probabilities=True)


@pytest.fixture
def photos(tmp_path) -> Path:
    for seed, (name, size) in enumerate(IMAGES.items()):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(*size, seed)).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.fixture
def run(network, photos, tmp_path):
    """Predict ``photos`` into ``out`` with further options; the folder of outputs is returned."""

    def call(*options: str, paths: tuple[str, ...] = (str(photos),)) -> Path:
        program.main([str(network), *paths, "--out", str(tmp_path / "out"), "--device", "cpu", *options])
        return tmp_path / "out"

    return call


def files(folder: Path) -> dict[str, int]:
    """The files below a folder, and when each was written."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in found}


def done(folder: Path) -> list[str]:
    return [json.loads(line)["name"] for line in (folder / DONE_FILE).read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# --- what is written ----------------------------------------------------------------------------------------------


def test_everything_of_a_folder(run, photos, predictor, capsys):
    out = run("--save", *program.KINDS, "--alpha", "0.3")
    outputs = [predictions.output_file(Path(), kind, name).as_posix() for kind in program.KINDS for name in NAMES]
    assert sorted(files(out)) == sorted([*outputs, SETTINGS_FILE, DONE_FILE])
    found = [predictor(photos / name) for name in IMAGES]
    for name, expected in zip(NAMES, found, strict=True):
        assert np.array_equal(pixels(out / f"overlay/{name}.png"), np.asarray(expected.overlay(0.3)))
        assert np.array_equal(pixels(out / f"ids/{name}.png"), expected.ids)
        assert np.array_equal(pixels(out / f"colours/{name}.png"), expected.ids)
        assert np.array_equal(pixels(out / f"confidence/{name}.png"), np.asarray(expected.confidence_map()))
        with np.load(out / f"probabilities/{name}.npz") as arrays:
            assert np.array_equal(arrays["probabilities"], expected.probabilities)
    total = sum(each.pixels() for each in found)
    shown = capsys.readouterr().out
    for name, count in zip(predictor.space.classes, total, strict=True):
        share = "never" if not count else f"{100 * count / total.sum():.2f} %"
        assert any(line.split("  ")[0] == name and line.endswith(share) for line in shown.splitlines())
    assert "share of each class in 4 of 4" in shown and "4 done now" in shown


def test_batches(run, photos, predictor, monkeypatch):
    sizes, predict = [], Predictor.batch
    monkeypatch.setattr(Predictor, "batch", lambda self, images: (sizes.append(len(images)), predict(self, images))[1])
    out = run("--save", "confidence", "ids", "--batch", "3")
    # c is of another size
    assert sizes == [2, 1, 1]
    for name in IMAGES:
        stem, expected = name.rpartition(".")[0], predictor(photos / name)
        assert (pixels(out / f"ids/{stem}.png") == expected.ids).mean() > 0.99
        difference = pixels(out / f"confidence/{stem}.png") - np.asarray(expected.confidence_map(), float)
        assert abs(difference).max() <= 1


def test_ids_of_cityscapes(run, photos, predictor):
    out = run("--save", "ids", "--ids", "cityscapes")
    expected = predictions.cityscapes_ids(predictor.space)[predictor(photos / "a.png").ids]
    assert np.array_equal(pixels(out / "ids/a.png"), expected)


def test_options_of_the_protocol_reach_the_network(run, photos, network):
    out = run("--protocol", "sliding", "--eval.crop", "16", "--save", "confidence")
    protocol = program.resolve_protocol(program.from_dict({"eval": {"protocol": "sliding", "crop": 16}}, "test").eval)
    expected = Predictor(network, "cpu", protocol)(photos / "a.png")
    assert np.array_equal(pixels(out / "confidence/a.png"), np.asarray(expected.confidence_map()))
    assert not np.array_equal(expected.confidence, Predictor(network, "cpu")(photos / "a.png").confidence)
    assert json.loads((out / SETTINGS_FILE).read_text())["crop"] == 16


def test_default_folder(network, photos, tmp_path):
    assert program.default_out(tmp_path) == tmp_path / "predictions"
    assert program.default_out(tmp_path / "checkpoint.pt") == tmp_path / "predictions"
    copy = shutil.copy(network, tmp_path / "mine.pt")
    program.main([str(copy), str(photos / "a.png"), "--device", "cpu"])
    assert sorted(files(tmp_path / "mine_predictions")) == ["overlay/a.png", SETTINGS_FILE, DONE_FILE]


def test_outputs_are_no_inputs(network, photos):
    for limit in ("1", "0"):
        program.main([str(network), str(photos), "--out", str(photos), "--device", "cpu", "--eval.limit", limit])
    assert sorted(done(photos)) == sorted(NAMES)


def test_classes(network, capsys):
    program.main([str(network), "--classes"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["cityscapes19, 19 classes", "  0  #804080  road"] and len(lines) == 20


# --- going on -----------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_done(run, photos, capsys):
    out = run("--save", "overlay", "ids")
    before = files(out)
    run("--save", "overlay", "ids")
    assert "4 of 4 are done already" in capsys.readouterr().err
    (out / "ids/b.png").unlink()
    run("--save", "overlay", "ids")
    assert "3 of 4 are done already" in capsys.readouterr().err
    after = files(out)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name] and "/" in name} == {"overlay/b.png", "ids/b.png"}
    # an original that is another one now, and another kind of output
    Image.fromarray(noise(9, 9)).save(photos / "a.png")
    run("--save", "ids")
    assert pixels(out / "ids/a.png").shape == (9, 9) and pixels(out / "overlay/a.png").shape[:2] == (20, 32)
    assert "share of each class in 4 of 4" in capsys.readouterr().out
    run("--save", "confidence")
    assert set(files(out)) >= {f"confidence/{name}.png" for name in NAMES}
    # of a, ids and confidence are on record together, but no overlay: that is the former original's
    capsys.readouterr()
    run("--save", "ids", "confidence")
    assert "4 of 4 are done already" in capsys.readouterr().err
    run("--save", "overlay", "ids")
    assert "3 of 4 are done already" in capsys.readouterr().err and pixels(out / "overlay/a.png").shape[:2] == (9, 9)


def test_what_was_written_with_other_settings_is_not_taken_for_done(run, photos, predictor, capsys):
    out = run("--save", "overlay", "ids")
    run("--save", "overlay", "--ids", "cityscapes", "--overwrite")
    capsys.readouterr()
    run("--save", "overlay", "ids", "--ids", "cityscapes")
    assert "already" not in capsys.readouterr().err
    expected = predictions.cityscapes_ids(predictor.space)[predictor(photos / "a.png").ids]
    assert np.array_equal(pixels(out / "ids/a.png"), expected)


def test_a_file_that_is_replaced_meanwhile_is_done_again(run, photos, monkeypatch):
    path, predict = photos / "a.png", Predictor.batch

    def replaced(self: Predictor, images: list) -> list:
        Image.fromarray(noise(9, 9)).save(path)
        return predict(self, images)

    monkeypatch.setattr(Predictor, "batch", replaced)
    out = run(paths=(str(path),))
    monkeypatch.undo()
    assert pixels(out / "overlay/a.png").shape[:2] == (20, 32)
    run(paths=(str(path),))
    assert pixels(out / "overlay/a.png").shape[:2] == (9, 9)


def test_a_run_that_was_interrupted_goes_on(run, monkeypatch, capsys):
    predict = Predictor.batch
    calls = []

    def interrupted(self: Predictor, images: list) -> list:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(self, images)

    monkeypatch.setattr(Predictor, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    out = run()
    # the record ends in half a line where a run was killed
    with (out / DONE_FILE).open("a") as file:
        file.write('{"name": "tow')
    run()
    assert "4 of 4 are done already" in capsys.readouterr().err
    assert sorted(done(out)) == sorted(NAMES)
    assert sorted(name for name in files(out) if "/" in name) == sorted(f"overlay/{name}.png" for name in NAMES)


def test_a_full_disk_stops_it(run, monkeypatch):
    write, written = predictions.write_whole, []

    def full(path: Path, fill) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write(path, fill)

    monkeypatch.setattr(predictions, "write_whole", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*overlay"):
        run()
    monkeypatch.undo()
    out = written[0].parent.parent
    assert sorted(done(out)) == sorted(path.stem for path in written) and len(files(out)) == 4
    run()
    assert sorted(done(out)) == sorted(NAMES)


def test_one_run_at_a_time(run, photos, tmp_path, monkeypatch):
    begin = predict_record.Record.begin

    def meanwhile(record, *arguments):
        begin(record, *arguments)
        with pytest.raises(DataError, match=f"another run is writing {record.folder}"):
            run()

    monkeypatch.setattr(predict_record.Record, "begin", meanwhile)
    run()
    # the lock goes with the run
    assert not list(tmp_path.rglob(".lock"))


def test_predictions_are_not_mixed(run, photos, tmp_path, capsys):
    out = run()
    before = files(out)
    other = save_network(tmp_path / "other.pt", "idd_lite7")
    calls = {
        r"was made with alpha 0.55 \(now 0.7\); choose another --out, or --overwrite": lambda: run("--alpha", "0.7"),
        r"made with protocol whole \(now sliding\), method": lambda: run("--protocol", "sliding"),
        "was made with another checkpoint": lambda: program.main([str(other), str(photos), "--out", str(out)]),
        f"holds, as a, outputs of {photos}/a.png, not of {photos}/town/a.png": lambda: run(
            paths=(str(photos / "town"),)
        ),
    }
    for reason, call in calls.items():
        with pytest.raises(ValueError, match=reason):
            call()
    assert files(out) == before
    capsys.readouterr()
    run("--alpha", "0.7", "--overwrite", paths=(str(photos / "a.png"),))
    assert done(out) == ["a"] and "already" not in capsys.readouterr().err
    assert files(out)["overlay/b.png"] == before["overlay/b.png"]


def test_files_of_others_are_not_overwritten(run, tmp_path):
    (tmp_path / "out/ids").mkdir(parents=True)
    (tmp_path / "out/ids/a.png").write_text("precious")
    with pytest.raises(ValueError, match=r"out/ids holds files that no prediction is recorded of; choose another"):
        run("--save", "ids")
    assert (tmp_path / "out/ids/a.png").read_text() == "precious"
    (tmp_path / "out" / SETTINGS_FILE).write_text("[")
    with pytest.raises(ValueError, match=rf"{SETTINGS_FILE}: expected what .* remove the file"):
        run()


# --- what cannot be read ------------------------------------------------------------------------------------------


def test_unreadable_files_are_named_at_the_end(run, network, photos, capsys):
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:300])
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(photos / "deep.png")
    (photos / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    (photos / "notes.txt").write_text("text")
    arguments = [str(network), str(photos), "--out", str(photos.parent / "out"), "--batch", "2", "--device", "cpu"]
    for attempt in range(2):
        with pytest.raises(SystemExit) as stop:
            run_main(program.main, arguments)
        errors = capsys.readouterr().err
        assert stop.value.code == 1 and "error: 3 of 6 could not be predicted:" in errors
        assert "passed over, neither image nor video: 1 file" in errors
        for reason in (f"{photos}/b.png: cannot be read", f"{photos}/deep.png: expected an 8-bit", "/gone.jpg: cannot"):
            assert sum(reason in line for line in errors.splitlines()) == 1
        assert ("3 of 6 are done already" in errors) == (attempt == 1)
    assert sorted(done(photos.parent / "out")) == ["a", "c", "town/a"]


def test_too_little_memory_for_a_batch(run, monkeypatch, capsys):
    batches, predict = [], Predictor.batch

    def narrow(self: Predictor, images: list) -> list:
        batches.append(len(images))
        if len(images) > 1 or images[0].size == (20, 24):
            raise PredictionError("too little memory")
        return predict(self, images)

    monkeypatch.setattr(Predictor, "batch", narrow)
    with pytest.raises(SystemExit):
        run("--batch", "2")
    assert batches == [2, 1, 1, 1, 1] and "c.jpg: too little memory" in capsys.readouterr().err


def test_an_image_that_the_network_refuses_is_named_and_the_others_are_done(run, photos, monkeypatch, capsys):
    predict = Segmentor.predict_coarse

    def picky(self: Segmentor, images: Tensor, *arguments: object) -> object:
        if images.shape[2:] == (24, 20):
            raise ValueError("maps of two positions or more")
        return predict(self, images, *arguments)

    monkeypatch.setattr(Segmentor, "predict_coarse", picky)
    with pytest.raises(SystemExit):
        run()
    assert f"  {photos}/c.jpg: maps of two positions or more\n" in capsys.readouterr().err
    assert sorted(done(photos.parent / "out")) == sorted(set(NAMES) - {"c"})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "expected images, videos, folders or patterns after the checkpoint"),
        (["PHOTOS", "--alpha", "2"], r"--alpha: expected 0\.\.1, got 2"),
        (["PHOTOS", "--batch", "0"], "--batch: expected at least 1, got 0"),
        (["PHOTOS", "--save", "images"], "invalid choice: 'images'"),
        (["PHOTOS", "--savee", "ids"], "unknown option --savee; did you mean --save"),
        (["PHOTOS", "--eval.mapillary", "half"], r"eval\.mapillary: is for testing"),
        (["PHOTOS", "--protocol", "slidin"], r"eval\.protocol: expected one of .* did you mean"),
        (["PHOTOS", "nowhere"], "nowhere: no such file or folder"),
        (["PHOTOS/*.gif"], r"photos/\*\.gif: the pattern matches no image"),
        (["PHOTOS", "--out", "PHOTOS/a.png"], r"--out: .*a\.png cannot be written: Not a directory"),
        (["PHOTOS", "--out", "PHOTOS/a.png/below"], r"--out: .*below cannot be written: Not a directory"),
    ],
)
def test_refused_before_the_network_is_loaded(network, photos, monkeypatch, options, reason):
    monkeypatch.setattr(program, "_load", lambda *_: pytest.fail("the network was loaded"))
    before = files(photos.parent)
    arguments = [option.replace("PHOTOS", str(photos)) for option in options]
    with pytest.raises(ValueError, match=reason):
        program.main([str(network), *arguments])
    assert files(photos.parent) == before and not (network.parent / "network_predictions").exists()


def test_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"predict is one process, but torchrun started 2"):
        run()


def test_wrong_checkpoints(photos, tmp_path):
    other = save_network(tmp_path / "other.pt", "idd_lite7")
    for checkpoint, options, reason in (
        (photos / "a.png", (), r"a\.png: no checkpoint.*PNG"),
        (tmp_path / "nowhere", (), "nowhere: no such checkpoint"),
        (photos, (), r"photos/checkpoint\.pt: no such checkpoint"),
        (other, ("--ids", "cityscapes"), "idd_lite7: its classes drivable"),
    ):
        with pytest.raises(ValueError, match=reason):
            program.main([str(checkpoint), str(photos), "--out", str(tmp_path / "out"), "--device", "cpu", *options])
    assert not (tmp_path / "out").exists()


# --- videos -------------------------------------------------------------------------------------------------------


def test_videos_need_their_extra(run, photos, monkeypatch):
    (photos / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(program, "_load", lambda *_: pytest.fail("the network was loaded"))
    with pytest.raises(ImportError, match=r"pip install 'pmm_fast\[video\]'"):
        run()


def film(path: Path, frames: int = 5) -> Path:
    with VideoWriter(path, Fraction(10)) as video:
        for number in range(frames):
            video.write(Image.fromarray(np.full((32, 48, 3), 40 * number, np.uint8)))
    return path


def test_video(run, tmp_path, predictor):
    pytest.importorskip("av")
    path = film(tmp_path / "drive.mp4")
    out = run("--save", "overlay", "ids", "--batch", "2", paths=(str(path),))
    stills = [f"ids/drive_frames/{number:06d}.png" for number in range(1, 6)]
    assert sorted(files(out)) == sorted(["overlay/drive.mp4", *stills, SETTINGS_FILE, DONE_FILE])
    with VideoReader(path) as original, VideoReader(out / "overlay/drive.mp4") as overlay:
        assert overlay.rate == original.rate
        for number, (frame, painted) in enumerate(zip(original, overlay, strict=True), 1):
            expected = predictor(frame)
            assert (pixels(out / f"ids/drive_frames/{number:06d}.png") == expected.ids).mean() > 0.99
            difference = np.asarray(expected.overlay(), float) - np.asarray(painted, float)
            # compressed
            assert abs(difference).mean() < 8
    before = files(out)
    run("--save", "overlay", "ids", paths=(str(path),))
    assert {name for name, when in files(out).items() if before[name] != when} == {SETTINGS_FILE, DONE_FILE}
    (out / stills[-1]).unlink()
    run("--save", "overlay", "ids", "--frames", paths=(str(path),))
    assert set(files(out)) == {*before, *(still.replace("ids", "overlay") for still in stills)}


def test_frames_of_a_video_that_do_not_go_together_go_one_by_one(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("av")
    batches, predict, fails = [], Predictor.batch, []

    def narrow(self: Predictor, images: list) -> list:
        batches.append(len(images))
        if len(images) > 1 or fails:
            raise PredictionError("too little memory")
        return predict(self, images)

    monkeypatch.setattr(Predictor, "batch", narrow)
    path = film(tmp_path / "drive.mp4", 3)
    out = run("--save", "ids", "--batch", "2", paths=(str(path),))
    assert batches == [2, 1, 1, 1] and len(list((out / "ids/drive_frames").iterdir())) == 3
    fails.append(True)
    with pytest.raises(SystemExit):
        run("--save", "ids", "--batch", "2", "--overwrite", paths=(str(path),))
    # the first frame that fails ends it
    assert batches[4:] == [2, 1] and f"  {path}: too little memory\n" in capsys.readouterr().err


def test_pictures_of_a_video_are_on_record(run, tmp_path):
    pytest.importorskip("av")
    paths = (str(film(tmp_path / "drive.mp4", 1)),)
    out = run("--frames", paths=paths)
    before = files(out)
    run("--overwrite", "--alpha", "0.3", paths=paths)
    run("--frames", "--alpha", "0.3", paths=paths)
    still = "overlay/drive_frames/000001.png"
    assert still in before and files(out)[still] != before[still]


def test_damaged_videos(run, photos, capsys):
    pytest.importorskip("av")
    content = film(photos / "film.mp4").read_bytes()
    (photos / "cut.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit) as stop:
        run()
    out = photos.parent / "out"
    assert stop.value.code == 1 and f"{photos}/cut.mp4: cannot be read as a video" in capsys.readouterr().err
    assert sorted(done(out)) == sorted([*NAMES, "film"])
    assert sorted(path.name for path in (out / "overlay").iterdir()) == ["a.png", "b.png", "c.png", "film.mp4", "town"]
