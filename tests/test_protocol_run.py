"""G+S -> C, B, M from beginning to end on miniatures of the real trees: as they come, and prepared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pmm_fast import evaluate, train
from pmm_fast.data import prepare
from pmm_fast.data.loader import choose_loader
from tests.data import trees

NAMES = {"gtav": "GTAV", "synthia": "synthia", "cityscapes": "cityscapes", "bdd100k": "bdd-100k", "mapillary": "vistas"}
TINY = (
    "--data.crop 48 64 --data.batch_per_domain 2 --data.workers 1 --model.channels 8 --model.weights none "
    "--model.architecture deeplabv3plus_mobilenet_v2 --memory.init_passes 1 --memory.init_iterations 1 --iterations 2 "
    "--device cpu --log_every 1"
)
needs_dali = pytest.mark.skipif(choose_loader("auto")[0] != "dali", reason="DALI is not installed")


@pytest.fixture
def pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The five data sets below ``data``, under lists that name their images: validation pixels that count in each."""
    trees.use_small_lists(monkeypatch, tmp_path / "lists")
    counts = {}
    for dataset, folder in NAMES.items():
        made = trees.make_tree(tmp_path / "data" / folder, dataset, next(iter(trees.TREES[dataset])))
        counts[dataset] = sum(int((labels != 255).sum()) for labels in made["val"].values())
    return counts


def train_and_test(root: Path, out: Path, loader: str) -> dict:
    """The scores of a run of the preset."""
    arguments = ["--config", "gs_r50", "--data.root", str(root), *TINY.split(), "--loader", loader, "--out", str(out)]
    train.main(arguments)
    evaluate.main([str(out), "--out", str(out), "--device", "cpu"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2] and all("data_wait" in line for line in lines)
    return json.loads((out / "results.json").read_text())["runs"][out.name]


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["torch", pytest.param("dali", marks=needs_dali)])
def test_trees_as_they_come(
    pixels: dict[str, int], tmp_path: Path, loader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = train_and_test(tmp_path / "data", tmp_path / "run", loader)
    assert {name: result["role"] for name, result in scores.items()} == {
        **dict.fromkeys(("gtav", "synthia"), "source"),
        **dict.fromkeys(("cityscapes", "bdd100k", "mapillary"), "unseen"),
    }
    assert {name: sum(map(sum, result["confusion"])) for name, result in scores.items()} == pixels
    told = capsys.readouterr().err
    assert f"loader: {loader}" in told and "data set gtav:released, labels: colours" in told


@pytest.mark.slow
def test_prepared_trees_train_alike(pixels: dict[str, int], tmp_path: Path) -> None:
    root, prepared = tmp_path / "data", tmp_path / "prepared"
    for names, splits in ((["gtav", "synthia"], ["train", "val"]), (["cityscapes", "bdd100k", "mapillary"], ["val"])):
        options = ["--root", str(root), "--out", str(prepared), "--domains", *names, "--splits", *splits]
        prepare.main([*options, "--workers", "1"])
    first, second = (train_and_test(data, tmp_path / "runs" / data.name / "run", "torch") for data in (prepared, root))
    assert {name: result["confusion"] for name, result in first.items()} == {
        name: result["confusion"] for name, result in second.items()
    }
