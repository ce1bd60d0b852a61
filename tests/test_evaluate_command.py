"""``python -m pmm_fast.evaluate``: tables, files and pictures of tiny runs, protocols, and what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pmm_fast import evaluate as program
from pmm_fast.config import ConfigError, EvalConfig, EvalProtocol
from pmm_fast.data.files import DataError
from pmm_fast.engine import build, checkpoint
from pmm_fast.engine.evaluate import DomainResult, evaluate_domain
from pmm_fast.models import Segmentor
from tests.street_folders import CLASSES, NAMES, SPACE, make_domain, make_domains, tiny_config, train
from tests.tiny_network import fill_memory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with domains and two short runs, ``agg`` and ``pinmem``."""
    root = make_domains(tmp_path_factory.mktemp("evaluate"))
    for mode in ("agg", "pinmem"):
        # alpha twice: it is tested once
        options = {"meta.mode": mode, "data.unseen": ["gamma"], "data.sources": ["alpha", "alpha", "beta"]}
        options["eval.crop"] = 32
        train(root, root / "runs" / mode, options)
    return root


@pytest.fixture(scope="module")
def bare(trained: Path) -> Path:
    """The ``pinmem`` network in a file without a configuration, as ``pmm_fast.convert`` writes them."""
    path = trained / "bare" / "weights.safetensors"
    checkpoint.save(checkpoint.load(trained / "runs/pinmem"), path)
    return path


@pytest.fixture
def pictures() -> None:
    """Pictures are drawn: the other tests go without."""


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # expected scores are those of networks on the CPU
    monkeypatch.setattr(build, "pick_device", lambda name: CPU)
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(program, "_draw", lambda *arguments: None)
        monkeypatch.setattr(program, "_draw_curves", lambda *arguments: None)


def scores(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_runs_are_compared(trained: Path, tmp_path: Path, pictures: None, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(trained / "runs/agg"), str(trained / "runs/pinmem/checkpoint.pt")]
    program.main([*runs, "--out", str(tmp_path / "out"), "--eval.limit", "3", "--device", "cpu"])
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert output.err.count("agg on alpha") == 1
    assert lines[0].split() == ["mIoU", "%", "alpha", "beta", "mean", "source", "gamma", "drop"]
    assert [line.split()[0] for line in lines[2:4]] == ["agg", "pinmem"]
    stored = scores(tmp_path / "out")
    assert list(stored["runs"]) == ["agg", "pinmem"] and stored["settings"]["eval"]["limit"] == 3
    assert {name: (d["role"], d["images"]) for name, d in stored["runs"]["agg"].items()} == {
        "alpha": ("source", 3),
        "beta": ("source", 3),
        "gamma": ("unseen", 3),
    }
    told = "Protocol whole: whole images at their own size, at most 3 images a domain."
    assert told in lines and told in (tmp_path / "out/results.md").read_text().splitlines()
    shown = f"{100 * stored['runs']['pinmem']['gamma']['miou']:.1f}"
    assert shown in lines[3].split()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    drawn = {f"overlays_{name}.png" for name in NAMES}
    drawn |= {f"confusion_{run}_{name}.png" for name in NAMES for run in ("agg", "pinmem")}
    assert files - {"curves.png"} == {"results.json", "results.csv", "results.md", *drawn}
    assert "## IoU of every class, gamma" in (tmp_path / "out/results.md").read_text()
    # five columns with the difference, three rows of images at 4:3
    width, height = Image.open(tmp_path / "out/overlays_gamma.png").size
    assert width > 5 * 420 and height > 3 * 315


def test_scores_are_those_of_the_network(trained: Path, tmp_path: Path) -> None:
    program.main([str(trained / "runs/pinmem"), "--out", str(tmp_path), "--data.unseen", str(trained / "gamma")])
    stored = scores(tmp_path)["runs"]["pinmem"]
    model = checkpoint.load(trained / "runs/pinmem")
    config = tiny_config(trained, tmp_path)
    config.data.sources, config.data.unseen = ["alpha"], []
    [domain] = program.open_domains(config)
    expected = evaluate_domain(model, domain, CLASSES, EvalConfig(), CPU, progress=False).confusion.matrix
    assert stored["alpha"]["confusion"] == expected.tolist()
    assert stored[str(trained / "gamma")]["role"] == "unseen"


def test_written_beside_the_runs_by_default(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.main([str(trained / "runs/agg"), "--data.sources", "--eval.limit", "1"])
    assert (trained / "runs/agg/evaluation/results.csv").is_file()
    assert capsys.readouterr().out.splitlines()[0].split() == ["mIoU", "%", "gamma"]
    shutil.rmtree(trained / "runs/agg/evaluation")


def test_a_quick_test_does_not_replace_a_full_one(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = [str(trained / "runs/agg"), "--data.sources"], trained / "runs/agg/evaluation"
    few = trained / "runs/agg/evaluation_limit_2"
    for limit in ("1", "0", "2", "0"):
        program.main([*run, "--eval.limit", limit])
        output = capsys.readouterr()
        assert ("at most" in output.out) == (limit != "0")
        # a quick test is replaced
        images = scores(folder)["runs"]["agg"]["gamma"]["images"]
        assert images == (1 if limit == "1" else 4)
        assert (f"{folder} holds a test on all images; this one on a few is written to {few}\n" in output.err) == (
            limit == "2"
        )
    assert scores(few)["runs"]["agg"]["gamma"]["images"] == 2
    program.main([*run, "--eval.limit", "1", "--out", str(folder)])
    assert scores(folder)["settings"]["eval"]["limit"] == 1
    (folder / "results.json").write_text("{}")
    assert program.default_out([folder.parent], 1) == folder
    shutil.rmtree(folder)
    shutil.rmtree(few)


# --- protocols ----------------------------------------------------------------------------------------------------


def test_the_resolved_protocol_is_written(trained: Path, tmp_path: Path) -> None:
    run = [str(trained / "runs/pinmem"), "--out", str(tmp_path), "--data.sources", "--eval.limit", "1"]
    # the run has a crop of its own, which holds until a protocol is named
    program.main([*run, "--eval.flip"])
    settings = scores(tmp_path)["settings"]["eval"]
    assert (settings["protocol"], settings["crop"], settings["flip"]) == ("whole", 32, True)
    program.main([*run, "--protocol", "released-sliding", "--eval.overlap", "0.5"])
    assert scores(tmp_path)["settings"] == {
        "eval": {
            "protocol": "released-sliding",
            "method": "sliding",
            "scales": [1.0],
            "flip": True,
            "crop": 768,
            "overlap": 0.5,
            "height": 0,
            "resample": "bilinear",
            "noise": True,
            "mapillary": "released",
            "limit": 1,
        },
        "seed": 304,
        "amp": None,
    }
    assert "\nProtocol released-sliding: tiles of 768 x 768, over" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.csv").read_text().splitlines()[1].startswith("pinmem,gamma,unseen,released-sliding,")


def test_noise_has_a_seed_and_a_network_without_memory_says_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds: list[int] = []

    def record(model: object, image: object, size: tuple[int, int], protocol: EvalProtocol, *others: Any, **more: Any):
        assert protocol.noise
        seeds.append(others[2])
        return torch.zeros(size, dtype=torch.uint8), None

    monkeypatch.setattr("pmm_fast.engine.evaluate.segment", record)
    runs = [str(trained / "runs/agg"), str(trained / "runs/pinmem"), "--out", str(tmp_path), "--data.sources"]
    for seed in ("1", "1", "2"):
        program.main([*runs, "--eval.limit", "2", "--protocol", "released-train", "--seed", seed])
    # two images by two networks, which see the same noise
    assert seeds[:4] == seeds[4:8] == seeds[:2] * 2 and len(set(seeds)) == 4
    told = capsys.readouterr().err
    assert "agg on gamma (cpu), without noise: it has no memory\n" in told and "pinmem on gamma (cpu)\n" in told


# --- checkpoints without a configuration --------------------------------------------------------------------------


def test_a_checkpoint_without_a_configuration(trained: Path, bare: Path, tmp_path: Path) -> None:
    both = [str(trained / "gamma"), str(trained / "alpha")]
    program.main([str(bare), "--out", str(tmp_path / "a"), "--data.unseen", both[0], "--data.sources", both[1]])
    program.main([str(trained / "runs/pinmem"), "--out", str(tmp_path / "b")])
    mine, theirs = scores(tmp_path / "a")["runs"]["weights"], scores(tmp_path / "b")["runs"]["pinmem"]
    for path, name in zip(both, ("gamma", "alpha"), strict=True):
        assert mine[path]["confusion"] == theirs[name]["confusion"] and mine[path]["role"] == theirs[name]["role"]
    with pytest.raises(ConfigError, match=r"at least one domain .*, got none; .*weights.safetensors holds no config"):
        program.main([str(bare), "--out", str(tmp_path / "c")])


def test_label_spaces_are_those_of_the_networks(trained: Path, bare: Path, tmp_path: Path) -> None:
    content = checkpoint.read(trained / "runs/agg")
    content["model"]["label_space"] = "cityscapes19"
    checkpoint.write(tmp_path / "other" / "checkpoint.pt", content)
    message = f"other: trained for the label space cityscapes19, but this test is in {SPACE}"
    with pytest.raises(ConfigError, match=message):
        program.main([str(trained / "runs/agg"), str(tmp_path / "other"), "--out", str(tmp_path / "out")])
    content = checkpoint.read(bare)
    content["model"]["label_space"] = None
    checkpoint.write(tmp_path / "nameless.pt", content)
    domain = ["--data.unseen", str(trained / "gamma"), "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="a network of 7 classes, but this test is in cityscapes19, which has 19"):
        program.main([str(tmp_path / "nameless.pt"), *domain])
    program.main([str(tmp_path / "nameless.pt"), *domain, "--data.label_space", SPACE])
    assert "nameless" in scores(tmp_path / "out")["runs"]


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_damaged_file_does_not_cost_the_other_domains(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = make_domain(tmp_path / "broken", 7)
    labels = np.full((48, 64), 99, np.uint8)
    Image.fromarray(labels).save(broken / "labels" / "2.png")
    runs = [str(trained / "runs/agg"), str(trained / "runs/pinmem"), "--out", str(tmp_path / "out")]
    with pytest.raises(program.IncompleteError, match=r"not tested to the end: agg on .*broken: .*2\.png"):
        program.main([*runs, "--data.sources", "alpha", str(broken), "--data.unseen", "gamma"])
    output = capsys.readouterr()
    stored = scores(tmp_path / "out")["runs"]
    assert list(stored["agg"]) == list(stored["pinmem"]) == ["alpha", "gamma"]
    assert output.out.splitlines()[2].split()[2] == "-" and "error: agg on " in output.err
    # the other network is not tried on it
    assert f"pinmem on {broken}" not in output.err
    assert (tmp_path / "out/results.md").is_file()


def test_what_is_known_is_written_before_the_next_domain(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = program.evaluate_on

    def interrupted(runs: list, domain: object, config: object) -> object:
        if domain.name == "beta":
            raise KeyboardInterrupt
        return right(runs, domain, config)

    monkeypatch.setattr(program, "evaluate_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        program.main([str(trained / "runs/agg"), "--out", str(tmp_path)])
    assert list(scores(tmp_path)["runs"]["agg"]) == ["alpha"]


def test_a_place_that_cannot_be_written_to_is_refused_before_the_test(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "evaluate_on", lambda *_: pytest.fail("it was tested"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--out: .*/file/e cannot be written: Not a directory$"):
        program.main([str(trained / "runs/agg"), "--out", str(tmp_path / "file/e")])


@pytest.mark.parametrize("name", ["results.csv", "results.md", "confusion_agg_gamma.png", "curves.png"])
def test_a_full_disk_is_told_with_the_file_after_the_table(
    trained: Path,
    tmp_path: Path,
    pictures: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    if name == "curves.png":
        pytest.importorskip("matplotlib")
    replace = os.replace

    def full(source: str | Path, target: str | Path) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/{name}'"):
        program.main([str(trained / "runs/agg"), "--data.sources", "--eval.limit", "1", "--out", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2].startswith("agg ")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".") or path.name == name]


def gpu_is_full(*arguments: object, **options: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("full", [gpu_is_full, fill_memory])
def test_a_network_that_is_too_large_does_not_cost_the_others(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Callable[..., None]
) -> None:
    def limited(model: Segmentor, *arguments: Any, **options: Any) -> DomainResult:
        if model.memory is None:
            full()
        return evaluate_domain(model, *arguments, **options)

    monkeypatch.setattr("pmm_fast.engine.evaluate.evaluate_domain", limited)
    runs = [str(trained / "runs/agg"), str(trained / "runs/pinmem"), "--out", str(tmp_path), "--device", "cpu"]
    message = r"^not tested to the end: agg on gamma: cpu has too little memory; --eval.tile_batch 1 takes least"
    with pytest.raises(program.IncompleteError, match=message):
        program.main([*runs, "--data.sources", "--eval.limit", "1"])
    stored = scores(tmp_path)["runs"]
    assert stored["agg"] == {} and list(stored["pinmem"]) == ["gamma"]


def test_a_network_that_overflows_has_no_scores(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = checkpoint.read(trained / "runs/agg")
    for name, tensor in content["model"]["state"].items():
        if name.startswith("decoder.classify"):
            tensor.fill_(3e38)
    checkpoint.write(tmp_path / "broken" / "checkpoint.pt", content)
    runs = [str(tmp_path / "broken"), str(trained / "runs/pinmem"), "--out", str(tmp_path / "out")]
    with pytest.raises(program.IncompleteError) as caught:
        program.main([*runs, "--data.sources", "alpha", "--eval.limit", "1"])
    reasons = str(caught.value).split("; ")
    assert len(reasons) == 2 and reasons[0].startswith("not tested to the end: broken on alpha: domain 'alpha', sample")
    assert all(reason.endswith("the network gives logits that are not finite") for reason in reasons)
    stored = scores(tmp_path / "out")["runs"]
    assert stored["broken"] == {} and list(stored["pinmem"]) == ["alpha", "gamma"]


def test_all_domains_are_looked_at_before_any_is_tested(trained: Path, tmp_path: Path) -> None:
    short = make_domain(tmp_path / "short")
    (short / "labels" / "1.png").unlink()
    with pytest.raises(ConfigError) as caught:
        program.main(
            [str(trained / "runs/agg"), "--out", str(tmp_path / "out"), "--data.unseen", str(short), "nowhere"]
        )
    assert "1 of 4 images have no label" in str(caught.value) and "unknown domain 'nowhere'" in str(caught.value)
    assert not (tmp_path / "out").exists() and not issubclass(ConfigError, DataError)


def test_one_of_several_processes_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="evaluate is one process, but torchrun started 4: call it with python -m"):
        program.main([str(trained / "runs/agg")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN", "RUN"], "a run is given twice"),
        (["RUN/nothing"], "no such checkpoint"),
        (["RUN", "--data.unseen", "nowhere"], "unknown domain 'nowhere'"),
        (["RUN", "--data.unseen", "alpha"], "data.sources and data.unseen both name alpha"),
        (["RUN", "--data.sources", "--data.unseen"], "expected at least one domain to test on"),
        (["RUN", "--eval.scale", "1"], r"unknown option --eval.scale; did you mean --eval.scales\?"),
        (
            ["RUN", "--protocol", "slidin"],
            r"eval.protocol: expected one of whole, .*, got 'slidin'; did you mean sliding\?",
        ),
        (
            ["RUN", "--eval.mapillary", "third"],
            "eval.mapillary: expected one of native, half, centred, released or null",
        ),
        (["RUN", "--eval.tile_batch", "-1"], "eval.tile_batch: expected at least 0, got -1"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_errors(trained: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        program.main([word.replace("RUN", str(trained / "runs/agg")) for word in argv])
