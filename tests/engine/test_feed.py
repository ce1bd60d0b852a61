"""What the trainer is fed: the augmentation of each iteration's split, and how long it waits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pmm_fast.config import ConfigError, validate
from pmm_fast.data import make_loader
from pmm_fast.data.transforms import STD, render
from pmm_fast.engine import trainer as trainer_module
from pmm_fast.engine.feed import prepare
from pmm_fast.engine.trainer import Trainer
from tests.street_folders import tiny_config


def test_looks_are_applied_as_the_reference_does(domains: Path, tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(domains, tmp_path, {"data.jitter": 0.5}))
    (batch,) = trainer._loader(0, 1, lambda iteration: {1})
    assert (batch.looks[1, :, 0] >= 0).all() and (batch.looks[..., 8] > 0).all()
    images, labels = prepare(batch, torch.device("cpu"))
    assert images.dtype == torch.float32 and images.is_contiguous() and torch.equal(labels, batch.labels)
    for place in np.ndindex(2, 2):
        expected = render(batch.images[place].permute(1, 2, 0).numpy(), batch.looks[place].numpy())
        levels = (images[place] - expected).abs() * torch.tensor(STD).view(3, 1, 1) * 255
        # a blur may round a tie the other way
        assert levels.max() < 1.01 and (levels > 0.01).float().mean() < 1e-3


def test_meta_test_domains_alone_are_augmented_strongly(domains: Path, tmp_path: Path) -> None:
    """The split of each iteration, also where several micro-batches share it."""
    names = ["alpha", "beta", "gamma"]
    options = {"data.sources": names, "data.jitter": 0.0, "optim.accumulate": 2, "optim.iterations": 4}
    plain, strong = (
        Trainer(tiny_config(domains, tmp_path, options | {"data.strong_meta_test": chosen})) for chosen in (False, True)
    )
    met = set()
    for batch, ((weak, _), (jittered, _)) in enumerate(zip(plain._feed(), strong._feed(), strict=True)):
        test = strong._split(batch // 2)[1]
        met.add(tuple(test))
        changed = [domain for domain in range(3) if not torch.equal(weak[domain], jittered[domain])]
        assert changed == sorted(test) and 0 < len(test) < 3
    assert batch == 7 and len(met) > 1


def test_strong_meta_test_needs_a_meta_test(domains: Path, tmp_path: Path) -> None:
    config = tiny_config(domains, tmp_path, {"meta.mode": "agg", "data.strong_meta_test": True})
    with pytest.raises(ConfigError, match=r"^data\.strong_meta_test: mode agg has no meta-test domains$"):
        validate(config)


def test_waiting_for_data_is_logged(domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that takes twice as long as a step: about two thirds of the time are waited."""

    class Slow:
        def __init__(self, batches: Any) -> None:
            self.batches = batches

        def __next__(self) -> Any:
            time.sleep(0.2)
            return next(self.batches)

        def close(self) -> None:
            self.batches.close()

    def slow(*arguments: Any) -> Any:
        loader = make_loader(*arguments)
        return type("Loader", (), {"__iter__": lambda self: Slow(iter(loader))})()

    monkeypatch.setattr(trainer_module, "make_loader", slow)
    monkeypatch.setattr(Trainer, "_iterate", lambda self, feed: (next(feed), time.sleep(0.1), ({"total": 0.0}, 0.0))[2])
    Trainer(tiny_config(domains, tmp_path, {"meta.mode": "agg", "optim.iterations": 4, "log_every": 2})).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4]
    assert all(0.5 < line["data_wait"] < 0.8 for line in lines)
