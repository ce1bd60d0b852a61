"""Values out of range and contradictions are refused by name; what is merely unusual is not."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pmm_fast.config import Config, ConfigError, validate
from pmm_fast.config.load import option_types
from pmm_fast.config.schema import DomainConfig
from pmm_fast.config.validate import RULES

TWO_NAMES = {
    "data__sources": ["x", "i"],
    "data__domains": {
        "x": DomainConfig(root="far/x"),
        "y": DomainConfig(root="far/../far/x"),
        "z": DomainConfig(root="far/x", list_file="{split}.txt"),
        "i": DomainConfig(dataset="idd"),
    },
}


def with_options(**options: Any) -> Config:
    """A configuration with ``section__field`` set."""
    config = Config()
    for key, value in options.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(config, section) if section else config, name, value)
    return config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__sources": []}, "data.sources: expected at least one domain to train on"),
        ({"data__crop": [768]}, "data.crop: expected two positive whole numbers (height width), got [768]"),
        ({"data__crop": [0, 768]}, "data.crop: expected two positive"),
        ({"data__crop": [1, 2, 3]}, "data.crop: expected two positive"),
        ({"data__streets_size": [-1, 5]}, "data.streets_size: expected two positive"),
        ({"data__scale": [2.0, 0.5]}, "data.scale: expected two positive numbers (smallest largest), in this order"),
        ({"data__scale": [0.0, 0.5]}, "data.scale: expected two positive"),
        ({"data__flip": 1.5}, "data.flip: expected a probability in 0..1, got 1.5"),
        ({"data__jitter": -0.1}, "data.jitter: expected a probability in 0..1"),
        ({"data__strong_domains": [0, 3]}, "data.strong_domains: no position 3: data.sources has positions 0..2"),
        ({"data__strong_domains": [-1]}, "data.strong_domains: no position -1"),
        ({"data__sources": ["a"], "data__strong_domains": [2]}, "data.strong_domains: no position 2"),
        (
            {"data__sources": ["a"], "data__strong_domains": [1], "meta__mode": "agg"},
            "data.strong_domains: no position 1: data.sources has positions 0..0",
        ),
        ({"data__sources": ["a", "b/"], "data__unseen": ["b"]}, "data.sources and data.unseen both name b"),
        ({"data__batch_per_domain": 0}, "data.batch_per_domain: expected at least 1, got 0"),
        ({"data__workers": -1}, "data.workers: expected at least 0, got -1"),
        (
            {"model__instance_norm": "isw"},
            "model.instance_norm: isw is trained with meta.mode agg, got meta.mode pinmem",
        ),
        ({"model__instance_norm": "isw", "meta__mode": "mldg"}, "agg, got meta.mode mldg"),
        ({"whitening__clusters": 1}, "whitening.clusters: expected at least 2, got 1"),
        ({"whitening__images": 0}, "whitening.images: expected at least 1, got 0"),
        ({"whitening__trials": 0}, "whitening.trials: expected at least 1"),
        ({"whitening__start": -1}, "whitening.start: expected at least 0"),
        ({"whitening__weight": -0.1}, "whitening.weight: expected at least 0"),
        ({"memory__momentum": 1.1}, "memory.momentum: expected a number in 0..1"),
        ({"memory__temperature": 0.0}, "memory.temperature: expected a positive number, got 0.0"),
        ({"memory__cohesion_temperature": -1.0}, "memory.cohesion_temperature: expected a positive number"),
        ({"meta__inner_lr": -0.1}, "meta.inner_lr: expected at least 0, got -0.1"),
        ({"meta__inner_lr_ratio": -0.1}, "meta.inner_lr_ratio: expected at least 0"),
        ({"meta__aux_weight": -0.1}, "meta.aux_weight: expected at least 0"),
        ({"model__aux_dropout": 1.0}, "model.aux_dropout: expected a number in 0..1, below 1"),
        ({"optim__iterations": 0}, "optim.iterations: expected at least 1"),
        ({"optim__accumulate": 0}, "optim.accumulate: expected at least 1"),
        ({"optim__lr": -1.0}, "optim.lr: expected at least 0"),
        ({"eval__protocol": "sliding", "eval__crop": 0}, "eval.crop: expected at least 1, got 0"),
        ({"eval__overlap": 1.0}, "eval.overlap: expected a number in 0..1, below 1, got 1.0"),
        ({"eval__scales": []}, "eval.scales: expected one or more positive numbers, got []"),
        ({"eval__scales": [1.0, 0.0]}, "eval.scales: expected one or more positive numbers"),
        ({"checkpoint_every": 0}, "checkpoint_every: expected at least 1"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(with_options(**options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__sources": ["./a"], "data__unseen": ["a"]}, "data.sources ./a and data.unseen a are one domain"),
        (
            {"data__sources": ["gtav"], "data__unseen": ["gtav:all"]},
            "data.sources gtav and data.unseen gtav:all are one",
        ),
        (
            {"data__root": "/r", "data__sources": ["a", "b"], "data__unseen": ["/r/b/"]},
            "data.sources b and data.unseen /r/b are one domain: unseen domains are never trained on",
        ),
        ({**TWO_NAMES, "data__unseen": ["y"]}, "data.sources x and data.unseen y are one domain"),
        ({**TWO_NAMES, "data__unseen": ["idd"]}, "data.sources i and data.unseen idd are one domain"),
        ({**TWO_NAMES, "data__unseen": ["far/x"]}, "data.sources x and data.unseen far/x are one domain"),
        (
            {"data__domains": {"d": DomainConfig(dataset="gtav", list_file="x.txt")}},
            "data.domains.d: with `dataset` only `root` can be given, for folders and labels are then known; leave out",
        ),
        (
            {"data__domains": {"d": DomainConfig(root="a/{spilt}")}},
            "data.domains.d.root: expected no braces but {split}, got {spilt} in 'a/{spilt}'",
        ),
    ],
)
def test_refused_domains(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}[^\\n]*$"):
        validate(with_options(**options))


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.lr: .*; data\.sources and data\.unseen both name a"):
        validate(with_options(optim__lr=-1.0, data__sources=["a", "b"], data__unseen=["a"]))


@pytest.mark.parametrize(
    "options",
    [
        {"meta__mode": "agg", "meta__order": 2},
        {"amp": False, "amp_dtype": "fp16"},
        {"model__instance_norm": "isw", "meta__mode": "agg", "whitening__start": 0},
        {"model__instance_norm": "ibn"},
        {"model__architecture": "deeplabv2_resnet101", "model__output_stride": 16},
        {"data__sources": ["a", "a"], "data__strong_domains": [0, 1], "data__unseen": []},
        {"data__sources": ["a"], "data__strong_domains": [1]},
        {"optim__horizon": 0, "meta__inner_lr": 0.0, "memory__init_passes": 0, "eval__height": 0, "optim__lr": 0.0},
        {**TWO_NAMES, "data__unseen": ["z"]},
        {"data__scale": [1.0, 1.0], "data__flip": 1.0, "memory__momentum": 0.0, "eval__overlap": 0.0},
    ],
)
def test_accepted(options: dict[str, Any]) -> None:
    validate(with_options(**options))


def test_a_test_may_go_without_sources() -> None:
    validate(with_options(data__sources=[], data__strong_domains=[0]), training=False)
    with pytest.raises(ConfigError, match="both name a"):
        validate(with_options(data__sources=["a"], data__unseen=["a"]), training=False)


def test_rules_name_options_that_exist() -> None:
    assert {key for key, _, _ in RULES} <= option_types().keys()
