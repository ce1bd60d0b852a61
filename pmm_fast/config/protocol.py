"""What a configuration amounts to as a protocol: who is trained on, how, and who is only tested."""

from __future__ import annotations

import dataclasses

from pmm_fast.config.eval_protocols import describe_eval, resolve_protocol
from pmm_fast.config.load import ConfigError, suggest
from pmm_fast.config.schema import Config

META_MODES = ("pinmem", "mldg")


def leave_one_out(config: Config) -> Config:
    """Carry out ``data.leave_out``: that source becomes the one unseen domain, and the option is empty again.

    ``data.strong_domains`` keeps naming the same domains.

    Raises:
        ConfigError: it is none of the sources, or the only one.
    """
    name, sources = config.data.leave_out, config.data.sources
    if not name:
        return config
    kept = [position for position, source in enumerate(sources) if source.rstrip("/") != name.rstrip("/")]
    if len(kept) == len(sources):
        hint = suggest(name, sources)
        raise ConfigError(f"data.leave_out: expected one of data.sources ({', '.join(sources)}), got {name!r}{hint}")
    if not kept:
        raise ConfigError(f"data.leave_out: {name} is the only source; nothing would be left to train on")
    # positions that are out of range stay so, for the check of the option to refuse
    inside = range(len(sources))
    strong = [kept.index(p) if p in kept else p for p in config.data.strong_domains if p in kept or p not in inside]
    data = dataclasses.replace(
        config.data, leave_out="", sources=[sources[p] for p in kept], unseen=[name], strong_domains=strong
    )
    return dataclasses.replace(config, data=data)


def describe_protocol(config: Config) -> list[str]:
    """A run's protocol in a few lines: meta-gradient, each source with its list and augmentation, tests."""
    data, mode = config.data, config.meta.mode
    lines = [f"{mode}, {describe_order(config)}; {config.model.architecture}"]
    crop = f"{data.crop[0]} x {data.crop[1]}"
    common = f"crop {crop}, scale {data.scale[0]:g} to {data.scale[1]:g}, mirrored {data.flip:.0%}"
    lines.append(f"{data.batch_per_domain} images of each source: {common}, {'blurred' if data.blur else 'no blur'}")
    for position, name in enumerate(data.sources):
        lines.append(f"source {_data_set(config, name)}: {_jitter(config, position)}")
    lines += [
        f"unseen {_data_set(config, name)}: {describe_eval(resolve_protocol(config.eval))}" for name in data.unseen
    ]
    return lines


def describe_order(config: Config) -> str:
    """The meta-gradient in words."""
    if config.meta.mode not in META_MODES:
        return "no meta-learning"
    return f"order {config.meta.order} ({'exact' if config.meta.order == 2 else 'as released'})"


def _data_set(config: Config, name: str) -> str:
    domain = config.data.domains.get(name)
    return f"{name} ({domain.dataset})" if domain and domain.dataset not in ("", name) else name


def _jitter(config: Config, position: int) -> str:
    data = config.data
    strong = "strong jitter (0.8, 0.8, 0.8, 0.3)"
    if position in data.strong_domains:
        return f"{strong}, always"
    plain = f"jitter (0.4, 0.4, 0.4, 0.1) of {data.jitter:.0%}"
    return f"{plain}; in meta-test {strong}" if data.strong_meta_test else plain
