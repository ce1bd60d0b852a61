"""``python -m pmm_fast.train`` as its users meet it: what it says about mistakes, and that it trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pmm_fast
from pmm_fast import train
from pmm_fast.config import run_main
from tests.street_folders import SIZE, SPACE, make_domain

Spoil = Callable[[Path], None]


@pytest.fixture
def roots(tmp_path: Path) -> list[str]:
    """Two domains, given by their folders."""
    return [str(make_domain(tmp_path / name, seed)) for seed, name in enumerate(("a", "b"))]


def arguments(roots: list[str], out: Path, *more: str) -> list[str]:
    text = (
        f"--data.unseen --data.label_space {SPACE} --data.crop {SIZE[0]} {SIZE[1]} --data.batch_per_domain 2 "
        "--data.workers 0 --loader torch --model.channels 8 --model.weights none --memory.init_iterations 1 "
        "--optim.iterations 2 --device cpu"
    )
    return ["--data.sources", *roots, *text.split(), "--out", str(out), *more]


def error(capsys: pytest.CaptureFixture[str], argv: list[str], lines: int | None = 1) -> str:
    """Run the command in this process, expecting failure: its last line, which is the only one unless it had begun."""
    with pytest.raises(SystemExit) as caught:
        run_main(train.main, argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    return last_line(err, lines)


def last_line(err: str, lines: int | None) -> str:
    assert "Traceback" not in err and err.endswith("\n")
    found = err.splitlines()
    assert lines is None or len(found) == lines, err
    assert found[-1].startswith("error: ") and "error: " not in "".join(found[:-1])
    return found[-1].removeprefix("error: ")


def command(*argv: str) -> tuple[int, str, str]:
    """The command as a process of its own."""
    done = subprocess.run([sys.executable, "-m", "pmm_fast.train", *argv], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


# --- it trains ----------------------------------------------------------------------------------------------------


def test_training_and_resuming(roots: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = arguments(roots, out, "--mode", "agg", "--log_every", "1")
    code, told, err = command(*argv)
    assert code == 0, err
    assert told == f"{out}: trained; test it with  python -m pmm_fast.evaluate {out}\n"
    assert "agg, no meta-learning; deeplabv3plus_mobilenet_v2 on cpu; backbone mobilenet_v2: random weights\n" in err
    assert all(f"source {root}: 4 images, labels: ids of {SPACE}; " in err for root in roots)
    assert "loader: torch (as asked); crops: " in err
    assert pmm_fast.load(out, label_space=SPACE).architecture == "deeplabv3plus_mobilenet_v2"
    train.main([*argv, "--resume", "--iterations", "3"])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3]


def test_generated_streets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--data.streets_images 2 --data.streets_size 64 128 --data.crop 48 64 --data.batch_per_domain 2"
    options += " --model.channels 8 --memory.init_iterations 1 --optim.iterations 1 --data.workers 0 --device cpu"
    options += " --model.weights none"
    with pytest.raises(SystemExit) as caught:
        run_main(
            train.main, [*options.split(), "--data.cache", str(tmp_path / "streets"), "--out", str(tmp_path / "run")]
        )
    assert caught.value.code == 0
    err = capsys.readouterr().err
    assert "pinmem, order 2 (exact)" in err
    assert all(f"source streets/{name}: 2 images, " in err for name in ("noon", "suburb", "overcast"))
    assert "loader: dali (DALI is installed); crops: " in err or "loader: torch (DALI is not installed" in err
    assert pmm_fast.load(tmp_path / "run", label_space="cityscapes19").num_classes == 19


# --- options ------------------------------------------------------------------------------------------------------


def test_unknown_option_by_command(tmp_path: Path) -> None:
    code, told, err = command("--out", str(tmp_path / "run"), "--optim.learning_rate", "0.1", "--optim.momentun", "0.5")
    assert code == 2 and told == ""
    assert last_line(err, 1).startswith("command line: unknown option --optim.learning_rate")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--optim.momentun 0.5", "command line: unknown option --optim.momentun; did you mean --optim.momentum?"),
        ("--optim.lr fast", "command line: optim.lr: expected a number, got 'fast'"),
        ("--meta.order 3", "meta.order: expected one of 1, 2, got '3'"),
        ("--data.crop 48", "data.crop: expected two positive whole numbers (height width), got [48]"),
        ("--optim.iterations 0", "optim.iterations: expected at least 1, got 0"),
        ("--data.sources", "data.sources: expected at least one domain to train on, got none"),
        ("--data.label_space cityscapes20", "unknown label space 'cityscapes20'; did you mean 'cityscapes19'?"),
        ("--data.strong_domains 2", "data.strong_domains: no position 2: data.sources has positions 0..1"),
        ("--model.architecture deeplabv3_resnet50", "unknown architecture 'deeplabv3_resnet50'. Did you mean"),
        ("--model.weights none.pth", "backbone weights: no file none.pth"),
        ("--device gpu", "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("--resume", "holds no checkpoint.pt to continue from"),
        ("--config nowhere.yaml", "no such file: nowhere.yaml"),
    ],
)
def test_wrong_options(
    roots: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, expected: str
) -> None:
    out = tmp_path / "run"
    assert expected in error(capsys, arguments(roots, out, *options.split()))
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_where_there_is_none(roots: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, arguments(roots, tmp_path / "run", "--device", "cuda"))
    assert message == "device: 'cuda' was asked for, but torch finds no GPU here"


def test_an_unseen_domain_that_is_trained_on(
    roots: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error(capsys, [*arguments(roots, tmp_path / "run"), "--data.unseen", roots[1]])
    assert message == f"data.sources and data.unseen both name {roots[1]}: unseen domains are never trained on"


def test_a_run_that_is_there_already(roots: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pt").write_text("precious")
    message = error(capsys, arguments(roots, tmp_path / "run"))
    assert message == f"out: {tmp_path}/run already holds a run; continue it with --resume or name another --out"
    # before it: what is trained, with which loader, and a line for each source
    message = error(capsys, arguments(roots, tmp_path / "run", "--resume"), lines=5)
    assert message.startswith(f"{tmp_path}/run/checkpoint.pt: no checkpoint, or damaged or cut off")
    assert os.listdir(tmp_path / "run") == ["checkpoint.pt"]


def test_out_is_a_file(roots: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("in the way")
    message = error(capsys, arguments(roots, tmp_path / "run"), lines=5)
    assert str(tmp_path / "run") in message and "File exists" in message


# --- data ---------------------------------------------------------------------------------------------------------


def test_missing_root_by_command(tmp_path: Path) -> None:
    code, told, err = command(
        "--config", "gs_r50", "--data.root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")
    )
    assert code == 2 and told == ""
    assert last_line(err, 1).startswith(
        f"no data for 'gtav' (GTA V (Playing for Data)) below {tmp_path}/nowhere; looked for a folder called "
    )
    assert not (tmp_path / "run").exists()


def test_no_root(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = error(capsys, ["--config", "gs_r50", "--out", str(tmp_path / "run")])
    assert message.startswith(
        "no data for 'gtav' (GTA V (Playing for Data)) anywhere: data.root is empty, is --data.root"
    )


def test_unknown_domain(roots: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, arguments([roots[0], "streets/nooon"], tmp_path / "run"))
    assert message.startswith("unknown generated domain 'streets/nooon'; did you mean 'streets/noon'?")
    message = error(capsys, arguments([roots[0], str(tmp_path / "c")], tmp_path / "run"))
    assert message.startswith(f"unknown domain '{tmp_path}/c'") and f"no such folder either: {tmp_path}/c" in message


def empty(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.unlink()


def without_a_label(root: Path) -> None:
    (root / "labels/2.png").unlink()


def without_labels(root: Path) -> None:
    for path in (root / "labels").iterdir():
        path.unlink()
    (root / "labels").rmdir()


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (empty, "domain '{root}': no image files (.jpg .jpeg .png) below {root}/images"),
        (
            without_a_label,
            "domain '{root}': 1 of 4 images have no label, first: {root}/images/2.png; expected {root}/labels/2.png",
        ),
        (without_labels, "domain '{root}': no folder {root}/labels for its labels ({root} exists)"),
    ],
)
def test_folders_that_cannot_be_used(
    roots: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Spoil, expected: str
) -> None:
    spoil(Path(roots[1]))
    assert error(capsys, arguments(roots, tmp_path / "run")) == expected.format(root=roots[1])
    assert not (tmp_path / "run").exists()


def other_sizes(root: Path) -> None:
    for path in (root / "images").iterdir():
        Image.new("RGB", (32, 16)).save(path)


def labels_outside_the_space(root: Path) -> None:
    for path in (root / "labels").iterdir():
        labels = np.asarray(Image.open(path)).copy()
        labels[5, 3:7] = 11
        Image.fromarray(labels).save(path)


def truncated_images(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    "spoil, expected, workers",
    [
        (
            other_sizes,
            r"image and label differ in size: {root}/images/\d\.png is 32x16, {root}/labels/\d\.png is 64x48",
            0,
        ),
        (
            labels_outside_the_space,
            r"{root}/labels/\d\.png: values 11 in 4 pixels are no ids of .*'idd_lite7' \(0\.\.6,",
            0,
        ),
        (truncated_images, r"{root}/images/\d\.png: cannot be read as an image: ", 0),
        (truncated_images, r"{root}/images/\d\.png: cannot be read as an image: ", 1),
    ],
)
@pytest.mark.parametrize("mode", ["pinmem", "agg"])
def test_files_that_cannot_be_used(
    roots: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Spoil,
    expected: str,
    workers: int,
    mode: str,
) -> None:
    spoil(Path(roots[1]))
    # told while the memory is initialised, or in training
    more = ("--mode", mode, "--data.workers", str(workers))
    message = error(capsys, arguments(roots, tmp_path / "run", *more), lines=None)
    assert re.match(f"domain '{roots[1]}': " + expected.format(root=roots[1]), message), message
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_a_truncated_image_met_by_a_worker_by_command(roots: list[str], tmp_path: Path) -> None:
    truncated_images(Path(roots[0]))
    code, told, err = command(*arguments(roots, tmp_path / "run", "--mode", "agg", "--data.workers", "1"))
    assert code == 2 and told == ""
    message = last_line(err, None)
    assert message.startswith(f"domain '{roots[0]}': {roots[0]}/images/") and "cannot be read as an image" in message
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_a_mended_data_set_starts_anew(roots: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Path(roots[1]) / "images/0.png"
    spare = {path: path.read_bytes() for path in image.parent.iterdir()}
    truncated_images(Path(roots[1]))
    argv = arguments(roots, tmp_path / "run", "--mode", "agg")
    error(capsys, argv, lines=None)
    for path, content in spare.items():
        path.write_bytes(content)
    train.main(argv)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1
