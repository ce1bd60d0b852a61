"""Interrupting and resuming a run: nothing is lost, nothing differs, and nothing is overwritten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pmm_fast.data import choose_loader
from pmm_fast.engine import build, checkpoint
from pmm_fast.engine.checkpoint import CheckpointError
from pmm_fast.engine.trainer import Trainer
from tests.street_folders import log_lines, same, tiny_config, train

needs_dali = pytest.mark.skipif(choose_loader("auto")[0] != "dali", reason="DALI is not installed")


def interrupt(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """Let the user press Ctrl-C when an iteration (from 0) begins."""
    iterate = Trainer._iterate

    def stop_there(self: Trainer, batches: Iterator[Any]) -> Any:
        if self.iteration == iteration:
            raise KeyboardInterrupt
        return iterate(self, batches)

    monkeypatch.setattr(Trainer, "_iterate", stop_there)


@pytest.mark.parametrize(
    "iterations, every, stop, options",
    [
        (6, 3, 5, {"meta.inner_lr": 0.1}),
        (3, 2, 2, {"optim.accumulate": 2, "data.workers": 1}),
        (3, 2, 2, {"amp": True}),
        pytest.param(3, 2, 2, {"data.loader": "dali", "data.workers": 2}, marks=needs_dali),
    ],
    ids=["order 2", "accumulated", "bf16", "dali"],
)
def test_resuming_is_exact(
    domains: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    iterations: int,
    every: int,
    stop: int,
    options: dict[str, Any],
) -> None:
    options = options | {"optim.iterations": iterations, "checkpoint_every": every, "optim.momentum": 0.9}
    straight = train(domains, tmp_path / "straight", options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, stop)
        train(domains, tmp_path / "resumed", options)
    # in the first case, the log is ahead of the checkpoint
    assert [line["iteration"] for line in log_lines(tmp_path / "resumed")] == list(range(1, stop + 1))
    assert checkpoint.read(tmp_path / "resumed")["training"]["iteration"] == every
    torch.manual_seed(1)
    resumed = train(domains, tmp_path / "resumed", options | {"resume": True})

    assert resumed["training"]["iteration"] == iterations
    assert same(resumed["training"], straight["training"])
    assert same(resumed["model"], straight["model"])
    lines = log_lines(tmp_path / "resumed")
    assert [line["iteration"] for line in lines] == list(range(1, iterations + 1))
    assert lines == log_lines(tmp_path / "straight")


def test_resuming_a_finished_run_changes_nothing(domains: Path, tmp_path: Path) -> None:
    first = train(domains, tmp_path, {"optim.iterations": 1})
    log = (tmp_path / "metrics.jsonl").read_text()
    again = train(domains, tmp_path, {"optim.iterations": 1, "resume": True})
    assert same(again, first) and (tmp_path / "metrics.jsonl").read_text() == log


def test_options_changed_on_resuming_count_and_are_told(
    domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(domains, tmp_path, {"optim.iterations": 1})
    capsys.readouterr()
    options = {"optim.iterations": 2, "optim.lr": 0.5, "optim.momentum": 0.25, "optim.weight_decay": 0.0}
    content = train(domains, tmp_path, {**options, "resume": True})
    (group,) = content["training"]["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.25, 0.0)
    assert log_lines(tmp_path)[1]["lr"] > 0.4
    assert (
        "resumed at iteration 1; changed: optim.iterations 1 -> 2; changed: optim.lr 0.01 -> 0.5; "
        "changed: optim.momentum 0.9 -> 0.25; changed: optim.weight_decay 0.0005 -> 0.0\n"
    ) in capsys.readouterr().err
    train(domains, tmp_path, {**options, "resume": True})
    assert "resumed at iteration 2\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data.label_space": "cityscapes19"}, "its label_space is idd_lite7, this run's is cityscapes19"),
        (
            {"model.architecture": "deeplabv2_mobilenet_v2"},
            "its settings is .*deeplabv3plus_mobilenet_v2.*, this run's",
        ),
        ({"meta.mode": "mldg"}, "its settings is .*'memory': True.*, this run's is .*'memory': False"),
    ],
    ids=["label space", "architecture", "mode"],
)
def test_another_network_cannot_resume(domains: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    out = tmp_path / "run"
    config = tiny_config(domains, out)
    checkpoint.save(build.create_model(config)[0], out / checkpoint.FILE_NAME)
    content = checkpoint.read(out)
    checkpoint.write(out / checkpoint.FILE_NAME, {**content, "training": {"iteration": 1}})
    (out / "config.yaml").write_text("of the first run")
    before = (out / checkpoint.FILE_NAME).read_bytes()
    with pytest.raises(CheckpointError, match=f"^{out / checkpoint.FILE_NAME}: cannot resume: {message}"):
        train(domains, out, {**options, "resume": True})
    assert sorted(os.listdir(out)) == ["checkpoint.pt", "config.yaml"]
    assert (out / checkpoint.FILE_NAME).read_bytes() == before
    assert (out / "config.yaml").read_text() == "of the first run"


def test_a_model_without_training_state_cannot_resume(domains: Path, tmp_path: Path) -> None:
    checkpoint.save(build.create_model(tiny_config(domains, tmp_path))[0], tmp_path / checkpoint.FILE_NAME)
    with pytest.raises(CheckpointError, match="holds a model but no training state to resume"):
        train(domains, tmp_path, {"resume": True})


def test_a_damaged_checkpoint_cannot_resume(domains: Path, tmp_path: Path) -> None:
    (tmp_path / checkpoint.FILE_NAME).write_text("rubbish")
    with pytest.raises(CheckpointError, match="no checkpoint, or damaged or cut off"):
        train(domains, tmp_path, {"resume": True})
    assert os.listdir(tmp_path) == [checkpoint.FILE_NAME]


def test_nothing_to_resume(domains: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^resume: {tmp_path}/new holds no checkpoint.pt to continue from"):
        train(domains, tmp_path / "new", {"resume": True})
    assert not (tmp_path / "new").exists()


def test_a_run_is_not_overwritten(domains: Path, tmp_path: Path) -> None:
    (tmp_path / checkpoint.FILE_NAME).write_text("precious")
    with pytest.raises(ValueError, match=f"^out: {tmp_path} already holds a run; continue it with --resume"):
        train(domains, tmp_path)
    assert (tmp_path / checkpoint.FILE_NAME).read_text() == "precious"


def test_resuming_does_not_need_the_folder_where_it_was(domains: Path, tmp_path: Path) -> None:
    train(domains, tmp_path / "here", {"optim.iterations": 1})
    shutil.move(tmp_path / "here", tmp_path / "there")
    content = train(domains, tmp_path / "there", {"optim.iterations": 2, "resume": True})
    assert content["training"]["iteration"] == 2 and content["config"]["out"] == str(tmp_path / "there")
