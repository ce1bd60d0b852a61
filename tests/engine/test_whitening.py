"""A run with a whitening loss: off at first, covariances selected once, then on; exact when resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pmm_fast
from pmm_fast import meta
from pmm_fast.data.sampling import Key, Sampling
from pmm_fast.data.transforms import crop_image, normalise, render
from pmm_fast.engine import checkpoint, whitening
from pmm_fast.engine.checkpoint import CheckpointError
from pmm_fast.engine.distributed import Ranks
from pmm_fast.engine.trainer import INIT_STREAM, Trainer
from tests.engine.test_resume import interrupt
from tests.street_folders import log_lines, same, tiny_config, train

START, IMAGES, TRIALS = 2, 3, 2
OPTIONS = {
    "meta.mode": "agg",
    "model.instance_norm": "isw",
    "optim.iterations": 4,
    "optim.momentum": 0.9,
    "whitening.start": START,
    "whitening.images": IMAGES,
    "whitening.trials": TRIALS,
    "whitening.weight": 5.0,
}


def masks_of(content: dict[str, Any]) -> list[torch.Tensor]:
    return [value for name, value in content["model"]["state"].items() if name.startswith("whitening.")]


@pytest.fixture(scope="module")
def run(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run, and its checkpoint."""
    folder = tmp_path_factory.mktemp("whitening") / "run"
    return folder, train(domains, folder, OPTIONS)


def test_loss_is_off_until_the_covariances_are_selected(run: tuple[Path, dict[str, Any]]) -> None:
    lines = [line["losses"] for line in log_lines(run[0])]
    assert [line["train/whitening"] > 0 for line in lines] == [False] * START + [True] * (len(lines) - START)
    for line in lines:
        parts = line["train/seg"] + 0.4 * line["train/aux"] + 5.0 * line["train/whitening"]
        assert line["total"] == pytest.approx(parts, rel=1e-5)
    for mask in masks_of(run[1]):
        # some, not all, and above the diagonal
        assert 0 < mask.sum() < len(mask) * (len(mask) - 1) // 4 and not mask.tril().any()


def test_loss_trains_when_it_is_on(domains: Path, tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    off = train(domains, tmp_path, OPTIONS | {"whitening.weight": 0.0, "optim.iterations": START + 1})
    lines, others = log_lines(run[0]), log_lines(tmp_path)
    assert lines[:START] == others[:START]
    assert all(map(torch.equal, masks_of(run[1]), masks_of(off)))
    assert lines[START]["gradient_norm"] != others[START]["gradient_norm"]


def test_masks_are_those_of_the_images_plain_and_strongly_jittered(domains: Path, tmp_path: Path) -> None:
    config = tiny_config(domains, tmp_path, OPTIONS)
    trainer = Trainer(config)
    trainer._select_covariances()
    data = config.data
    data.scale, data.flip = [1.0, 1.0], 0.0
    sampling = Sampling(trainer.sources, data, config.seed, INIT_STREAM)
    model, expected = trainer.model.eval(), None
    # three images are two batches of two
    for trial, domain in np.ndindex(TRIALS, len(trainer.sources)):
        variances = []
        for iteration, slot in np.ndindex(2, 2):
            source, index, rng = sampling.pick(Key(2 * trial + iteration, domain, slot, True))
            image, _ = source.load(index)
            draw = sampling.augment.draw(image.size, rng, strong=True)
            assert not draw.mirror and draw.look[0] >= 0 and draw.look[8] > 0
            crop = crop_image(image, draw.window)
            pair = [normalise(crop), render(np.asarray(crop), draw.look)]
            with torch.no_grad():
                maps = [model.encoder.backbone(half[None]).whitened for half in pair]
            covariances = [[torch.cov(x[0].flatten(1).double()) for x in half] for half in maps]
            variances.append([(a - b).square().triu(1) / 2 for a, b in zip(*covariances, strict=True)])
        means = [torch.stack(parts).mean(0) for parts in zip(*variances, strict=True)]
        selected = [meta.cluster_numbers(mean.numpy().ravel(), 3).reshape(mean.shape) > 0 for mean in means]
        expected = selected if expected is None else [a & b for a, b in zip(expected, selected, strict=True)]
    assert expected is not None
    for mask, wanted in zip(trainer.model.whitening.buffers(), expected, strict=True):
        # a covariance on the edge of a cluster may fall to either side by rounding
        assert (mask.numpy() != wanted).mean() < 1e-3 and mask.any()


def test_ranks_select_what_one_process_does(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(domains, tmp_path, OPTIONS)
    trainer = Trainer(config)
    state = (trainer.network, trainer.params, trainer.buffers, trainer.sources, config, INIT_STREAM, trainer.device)
    expected = whitening.select_masks(*state, Ranks(), trainer._progress)
    trainer.step = compiled = meta.CompiledStep("graph")
    trainer._select_covariances()
    assert all(map(torch.equal, trainer.model.whitening.buffers(), expected))
    # it was checked without the loss
    assert isinstance(trainer.step, meta.CompiledStep) and trainer.step is not compiled
    # the second rank's sums are kept for when the first one adds them up
    kept: list[torch.Tensor] = []
    monkeypatch.setattr(whitening, "sum_over_ranks", lambda sums, group: kept.append(sums) or sums)
    whitening.select_masks(*state, Ranks(1, 2, 1, "both"), trainer._progress)
    monkeypatch.setattr(whitening, "sum_over_ranks", lambda sums, group: sums + kept.pop(0))
    found = whitening.select_masks(*state, Ranks(0, 2, 0, "both"), trainer._progress)
    assert not kept and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("every", [START, START + 1], ids=["saved before the selection", "saved after it"])
def test_resuming_is_exact(
    domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: tuple[Path, dict[str, Any]], every: int
) -> None:
    options = OPTIONS | {"checkpoint_every": every}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, every)
        train(domains, tmp_path, options)
    assert any(mask.any() for mask in masks_of(checkpoint.read(tmp_path))) == (every > START)
    resumed = train(domains, tmp_path, options | {"resume": True})
    assert same(resumed["model"], run[1]["model"]) and same(resumed["training"], run[1]["training"])
    assert log_lines(tmp_path) == log_lines(run[0])


def test_a_start_that_is_never_reached_is_told(
    domains: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = train(domains, tmp_path, OPTIONS | {"whitening.start": 1, "optim.iterations": 1})
    assert "whitening.start: 1 is not before the last of 1 iterations: the loss stays 0" in capsys.readouterr().err
    assert not any(mask.any() for mask in masks_of(content))


def test_the_checkpoint_is_a_model(run: tuple[Path, dict[str, Any]]) -> None:
    model = pmm_fast.load(run[0])
    assert model.settings["instance_norm"] == "isw" and model.memory is None
    assert all(map(torch.equal, model.whitening.buffers(), masks_of(run[1])))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 48, 64)).logits.isfinite().all()


def test_another_instance_norm_cannot_resume(domains: Path, tmp_path: Path, run: tuple[Path, dict[str, Any]]) -> None:
    shutil.copytree(run[0], tmp_path / "run")
    for kind in ("ibn", "none"):
        options = OPTIONS | {"model.instance_norm": kind, "resume": True}
        with pytest.raises(CheckpointError, match=r"cannot resume: its settings is .*'isw'"):
            train(domains, tmp_path / "run", options)


def test_a_checkpoint_from_before_the_setting_resumes(domains: Path, tmp_path: Path) -> None:
    options = {"meta.mode": "agg", "optim.iterations": 1}
    content = train(domains, tmp_path, options)
    del content["model"]["settings"]["instance_norm"]
    checkpoint.write(tmp_path / checkpoint.FILE_NAME, content)
    assert train(domains, tmp_path, options | {"resume": True})["training"]["iteration"] == 1
    with pytest.raises(CheckpointError, match="the weights do not fit the model"):
        train(domains, tmp_path, options | {"resume": True, "model.instance_norm": "isw"})
