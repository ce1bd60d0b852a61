"""What the values of a configuration must satisfy, one by one and together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pmm_fast.config.eval_protocols import EVAL_PROTOCOLS
from pmm_fast.config.load import ConfigError, suggest
from pmm_fast.config.protocol import META_MODES
from pmm_fast.config.schema import Config, DataConfig, DomainConfig

Rule = tuple[str, Callable[[Any], bool], str]


def _positive(value: float) -> bool:
    return value > 0


def _not_negative(value: float) -> bool:
    return value >= 0


def _share(value: float) -> bool:
    return 0 <= value <= 1


def _below_one(value: float) -> bool:
    return 0 <= value < 1


def _height_width(value: list[int]) -> bool:
    return len(value) == 2 and all(side > 0 for side in value)


def _range(value: list[float]) -> bool:
    return len(value) == 2 and 0 < value[0] <= value[1]


def _each(keys: str, test: Callable[[Any], bool], expected: str) -> list[Rule]:
    return [(key, test, expected) for key in keys.split()]


RULES: list[Rule] = [
    *_each("data.crop data.streets_size", _height_width, "two positive whole numbers (height width)"),
    *_each("data.scale", _range, "two positive numbers (smallest largest), in this order"),
    *_each("data.flip data.jitter", _share, "a probability in 0..1"),
    *_each("memory.momentum optim.momentum", _share, "a number in 0..1"),
    *_each("model.aux_dropout eval.overlap", _below_one, "a number in 0..1, below 1"),
    *_each("memory.temperature memory.cohesion_temperature", _positive, "a positive number"),
    *_each(
        "data.batch_per_domain data.streets_images model.channels memory.init_iterations optim.iterations "
        "optim.accumulate whitening.images whitening.trials eval.crop checkpoint_every log_every",
        _positive,
        "at least 1",
    ),
    *_each(
        "data.workers memory.init_passes meta.inner_lr_ratio meta.inner_lr meta.aux_weight meta.cohesion_weight "
        "meta.divergence_weight meta.classifier_weight optim.lr optim.weight_decay optim.horizon eval.height "
        "eval.limit eval.tile_batch whitening.weight whitening.start seed",
        _not_negative,
        "at least 0",
    ),
    ("whitening.clusters", lambda clusters: clusters >= 2, "at least 2"),
    ("eval.scales", lambda scales: bool(scales) and min(scales) > 0, "one or more positive numbers"),
]
"""(full key, test, what is expected) of every rule about a single option."""


def get_option(config: Config, key: str) -> Any:
    """The value of an option by its full key, e.g. ``optim.lr``."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def validate(config: Config, training: bool = True) -> None:
    """Refuse values out of range and options that contradict each other.

    Not looked at here: what depends on files (label spaces, domains, weights), on the machine (device) or on the
    network (architecture); whoever uses them refuses them.  ``model.output_stride`` is ignored by deeplabv2,
    ``meta.order`` by the modes without meta-learning, ``amp_dtype`` without ``amp``.

    Args:
        config: the merged configuration; its types are right (``from_dict`` saw to it).
        training: whether it is to train with; a test may go without source domains.

    Raises:
        ConfigError: naming every option that is wrong, in one line.
    """
    problems = [
        f"{key}: expected {expected}, got {value!r}"
        for key, test, expected in RULES
        # None: as something else has it
        if (value := get_option(config, key)) is not None and not test(value)
    ]
    if config.eval.protocol not in EVAL_PROTOCOLS:
        hint = suggest(config.eval.protocol, EVAL_PROTOCOLS)
        known = ", ".join(EVAL_PROTOCOLS)
        problems.append(f"eval.protocol: expected one of {known}, got {config.eval.protocol!r}{hint}")
    if config.data.strong_meta_test and config.meta.mode not in META_MODES:
        problems.append(f"data.strong_meta_test: mode {config.meta.mode} has no meta-test domains")
    if config.model.instance_norm == "isw" and config.meta.mode != "agg":
        problems.append(f"model.instance_norm: isw is trained with meta.mode agg, got meta.mode {config.meta.mode}")
    if config.data.leave_out:
        problems.append(
            f"data.leave_out: only training and verify by command carry it out; it is still {config.data.leave_out!r} "
            "(config.leave_one_out does it)"
        )
    for name, domain in config.data.domains.items():
        problems += domain_problems(name, domain)
    problems += _overlap_problems(config) + (_source_problems(config) if training else [])
    if problems:
        raise ConfigError("; ".join(problems))


def domain_problems(name: str, domain: DomainConfig) -> list[str]:
    """What is wrong with the definition of a domain, as far as can be told without its files.

    Args:
        name: its name in ``data.domains``.
        domain: the definition.
    """
    problems = []
    if domain.dataset and replace(domain, root="", dataset="") != DomainConfig():
        problems.append(
            f"data.domains.{name}: with `dataset` only `root` can be given, for folders and labels are then known; "
            "leave out the rest, or leave out `dataset` and describe the folder"
        )
    for key in ("root", "images", "labels", "list_file"):
        path = getattr(domain, key) or ""
        for part in re.findall(r"\{[^{}]*\}", path):
            if part != "{split}":
                problems.append(f"data.domains.{name}.{key}: expected no braces but {{split}}, got {part} in {path!r}")
    return problems


def _source_problems(config: Config) -> list[str]:
    sources = config.data.sources
    if not sources:
        return ["data.sources: expected at least one domain to train on, got none"]
    # meta-learning takes a single source twice, to split it against itself
    twice = len(sources) == 1 and config.meta.mode in META_MODES
    last = 1 if twice else len(sources) - 1
    wrong = [position for position in config.data.strong_domains if not 0 <= position <= last]
    if not wrong:
        return []
    return [f"data.strong_domains: no position {', '.join(map(str, wrong))}: data.sources has positions 0..{last}"]


def _overlap_problems(config: Config) -> list[str]:
    unseen = {_place(name, config.data): name.rstrip("/") for name in config.data.unseen}
    same = {name.rstrip("/"): unseen.get(_place(name, config.data)) for name in config.data.sources}
    both = sorted(name for name, other in same.items() if name == other)
    problems = [f"data.sources and data.unseen both name {', '.join(both)}: unseen domains are never trained on"]
    return (problems if both else []) + [
        f"data.sources {name} and data.unseen {other} are one domain: unseen domains are never trained on"
        for name, other in sorted(same.items(), key=lambda pair: pair[0])
        if other not in (None, name)
    ]


def _place(name: str, data: DataConfig) -> str:
    """What a name stands for, the same for two names of one folder as far as can be told without looking for it."""
    name = name.rstrip("/")
    plain = DomainConfig(root=name) if "/" in name else DomainConfig(dataset=name)
    domain = data.domains.get(name, plain)
    if domain.dataset and not domain.root:
        # the variants of a data set share their folder
        domain = DomainConfig(root=domain.dataset.partition(":")[0])
    root = os.path.abspath(os.path.join(os.path.expanduser(data.root), os.path.expanduser(domain.root)))
    return repr(replace(domain, root=root))
