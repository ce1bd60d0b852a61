"""Configurations as mappings and YAML: exact round trips, merging, presets, and errors that name file and key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pmm_fast.config import (
    Config,
    ConfigError,
    DomainConfig,
    from_dict,
    load_config,
    load_file,
    load_preset,
    preset_names,
    to_dict,
    to_yaml,
    validate,
)
from pmm_fast.data import get_dataset


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_round_trip(name: str, tmp_path: Path) -> None:
    config = load_preset(name)
    validate(config)
    assert from_dict(to_dict(config), "") == config
    assert load_file(write(tmp_path, to_yaml(config))) == config


def test_round_trip_of_values_that_yaml_could_mistake(tmp_path: Path) -> None:
    config = Config(out="1e5", seed=7)
    config.data.root, config.data.cache, config.device = "no", "0123", "~"
    config.data.sources, config.data.unseen = ["5e-4", "null", "ü: #x"], []
    config.optim.lr, config.optim.weight_decay = 1e-5, 1 / 3
    config.data.domains = {"a": DomainConfig(root="x", list_file=None), "1": DomainConfig(list_file="{split}.txt")}
    assert load_file(write(tmp_path, to_yaml(config))) == config


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    config = load_file(write(tmp_path, "optim: {lr: 5e-4, weight_decay: 1E+1}\nmemory: {temperature: 2}\n"))
    assert (config.optim.lr, config.optim.weight_decay, config.memory.temperature) == (5e-4, 10.0, 2.0)
    assert type(config.memory.temperature) is float


def test_mapping_is_merged_onto_a_base_that_stays() -> None:
    base = Config()
    base.data.domains = {"a": DomainConfig(root="x", images="i")}
    domains = {"a": {"root": "y"}, "b": {"label_format": "colours"}}
    config = from_dict({"data": {"domains": domains, "crop": [1, 2]}, "seed": 1}, "", base)
    assert config.data.domains == {
        "a": DomainConfig(root="y", images="i"),
        "b": DomainConfig(label_format="colours"),
    }
    assert (config.data.crop, config.seed, config.data.sources) == ([1, 2], 1, base.data.sources)
    assert base.data.domains == {"a": DomainConfig(root="x", images="i")} and base.seed == 304
    config.data.sources.append("more")
    assert base.data.sources == Config().data.sources


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {crops: [1, 2]}", "mine.yaml: unknown key data.crops; did you mean data.crop?"),
        ("date: {crop: [1, 2]}", "mine.yaml: unknown key date; did you mean data?"),
        ("optim: {order: 1}", "mine.yaml: unknown key optim.order; did you mean meta.order?"),
        ("eval: {scale: [1]}", "mine.yaml: unknown key eval.scale; did you mean eval.scales?"),
        ("meta: {zzz: 1}", "mine.yaml: unknown key meta.zzz (known: meta.mode, meta.order,"),
        (
            "data: {domains: {a: {rot: x}}}",
            "mine.yaml: unknown key data.domains.a.rot; did you mean data.domains.a.root?",
        ),
        ("data: {domains: {a: x}}", "mine.yaml: data.domains.a: expected a mapping, got 'x'"),
        ("optim: {lr: fast}", "mine.yaml: optim.lr: expected a number, got 'fast'"),
        ("optim: {lr: .nan}", "mine.yaml: optim.lr: expected a number, got nan"),
        ("optim: {iterations: 2.5}", "mine.yaml: optim.iterations: expected a whole number, got 2.5"),
        ("optim: {iterations: true}", "mine.yaml: optim.iterations: expected a whole number, got True"),
        ("amp: 1", "mine.yaml: amp: expected true or false, got 1"),
        ("out: 5", "mine.yaml: out: expected a string, got 5"),
        ("data: {crop: 768}", "mine.yaml: data.crop: expected a list, each a whole number, got 768"),
        ("data: {crop: [768, big]}", "mine.yaml: data.crop[1]: expected a whole number, got 'big'"),
        ("data: {sources: gtav}", "mine.yaml: data.sources: expected a list, each a string, got 'gtav'"),
        ("meta: {order: 3}", "mine.yaml: meta.order: expected one of 1, 2, got 3"),
        ("meta: {order: true}", "mine.yaml: meta.order: expected one of 1, 2, got True"),
        ("meta: {mode: pinmen}", "mine.yaml: meta.mode: expected one of pinmem, memory-agg, mldg, agg, got 'pinmen'"),
        ("meta: 3", "mine.yaml: meta: expected a mapping, got 3"),
        ("data: {root: null}", "mine.yaml: data.root: expected a string, got None"),
        ("- 1", "mine.yaml: expected a mapping of sections, got a list"),
        ("seed: 1\nout: x\nseed: 2", "mine.yaml, line 3: not valid YAML: key 'seed' is given twice"),
        ("data: [1", "mine.yaml, line 1: not valid YAML"),
    ],
)
def test_errors_name_file_key_and_expectation(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_file(write(tmp_path, text))
    assert message in str(caught.value)


def test_extends_a_preset_and_a_file_beside_it(tmp_path: Path) -> None:
    write(tmp_path, "extends: gs_r50\nmeta: {order: 1}\nseed: 1\n", "base.yaml")
    config = load_file(write(tmp_path, "extends: base.yaml\nseed: 2\n"))
    expected = load_preset("gs_r50")
    expected.meta.order, expected.seed = 1, 2
    assert config == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: mine.yaml", "extends itself: mine.yaml -> mine.yaml"),
        ("extends: demmo", "mine.yaml, extends: unknown preset 'demmo'; did you mean demo?"),
        ("extends: nowhere.yaml", "mine.yaml, extends: no such file:"),
        ("extends: 3", "mine.yaml: extends: expected a preset or a file, got 3"),
    ],
)
def test_errors_of_extends(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_file(write(tmp_path, text))
    assert message in str(caught.value)


def test_unknown_presets_and_files() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'gs_r5'; did you mean gs_r50\? \(presets: demo, "):
        load_preset("gs_r5")
    with pytest.raises(ConfigError, match=r"no such file: .*nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_published_settings() -> None:
    released, ours = load_preset("released_gs_r50"), load_preset("gs_r50")
    assert (released.meta.order, ours.meta.order) == (1, 2)
    ours.meta.order = 1
    assert released == ours
    iterations = {name: load_preset(name).optim.iterations for name in ("gs_r50", "gs_r101v2", "gg_r50", "gsi_r50")}
    assert iterations == {"gs_r50": 30463, "gs_r101v2": 70585, "gg_r50": 23033, "gsi_r50": 69099}
    assert all(load_preset(name).data.strong_domains == [0] for name in iterations)
    assert load_preset("gg_r50").data.sources == ["gtav", "gtav"]
    optim, memory, meta = ours.optim, ours.memory, ours.meta
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.schedule, optim.horizon) == (
        0.01,
        0.9,
        5e-4,
        "exp",
        120000,
    )
    assert (memory.momentum, memory.temperature, memory.gumbel, memory.init_iterations) == (0.8, 1.0, True, 743)
    assert (meta.aux_weight, meta.cohesion_weight, meta.divergence_weight, meta.classifier_weight) == (
        0.4,
        0.02,
        0.4,
        0.2,
    )
    assert meta.inner_lr_ratio == 0.25 and ours.data.crop == [768, 768] and ours.data.batch_per_domain == 4


def test_baselines_are_trained_as_their_settings_say() -> None:
    found = {}
    for name in ("gs_agg", "gs_mldg", "gsi_ibn", "gsi_isw", "demo_mldg", "demo_ibn", "demo_isw"):
        config = load_preset(name)
        data, optim = config.data, config.optim
        found[name] = (
            config.meta.mode,
            config.model.instance_norm,
            data.strong_domains,
            optim.iterations,
            optim.schedule,
        )
        assert len(data.sources) == {"gs": 2, "gsi": 3, "demo": 3}[name.split("_")[0]]
    assert found == {
        "gs_agg": ("agg", "none", [], 30463, "exp"),
        "gs_mldg": ("mldg", "none", [0], 30463, "exp"),
        "gsi_ibn": ("agg", "ibn", [], 69099, "poly"),
        "gsi_isw": ("agg", "isw", [], 69099, "poly"),
        "demo_mldg": ("mldg", "none", [], 250, "poly"),
        "demo_ibn": ("agg", "ibn", [], 250, "poly"),
        "demo_isw": ("agg", "isw", [], 250, "poly"),
    }
    whitening = load_preset("gsi_isw").whitening
    assert (whitening.weight, whitening.clusters, whitening.images, whitening.trials) == (0.6, 3, 500, 10)
    # passes 0 to 5
    assert whitening.start == 6 * 743


@pytest.mark.parametrize("name", preset_names())
def test_every_domain_of_a_preset_is_defined(name: str) -> None:
    data = load_preset(name).data
    for domain in [*data.sources, *data.unseen]:
        known = data.domains[domain].dataset if domain in data.domains else domain
        assert known.startswith("streets/") or get_dataset(known)


def test_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, pmm_fast.config as c; c.load_preset('demo'); print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
