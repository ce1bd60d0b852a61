"""Domains tested with networks whose answers are known, and the files of scores."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pmm_fast.config import EvalConfig
from pmm_fast.data.files import DataError
from pmm_fast.data.survey import evenly_spaced
from pmm_fast.engine import mapillary
from pmm_fast.engine.evaluate import DomainResult, evaluate_domain, write_results
from pmm_fast.engine.metrics import Confusion

CPU = torch.device("cpu")


class Output(NamedTuple):
    logits: Tensor


class Network(nn.Module):
    """The three channels as logits of three classes; remembers in which mode it was called."""

    num_classes, memory = 3, None

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def predict_coarse(self, images: Tensor, noise: Tensor | None = None) -> Output:
        self.modes.append(self.training)
        return Output(images)


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@dataclass
class Memory:
    """A domain in memory: images in the three primary colours, which ``Network`` segments exactly."""

    name: str = "primary"
    dataset: str = ""
    size: int = 5
    labels: list[np.ndarray] = field(default_factory=list)
    loaded: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(1)
        self.labels = [rng.integers(0, 3, (6, 8), dtype=np.uint8) for _ in range(self.size)]

    def __len__(self) -> int:
        return self.size

    def load(self, index: int, /) -> tuple[Image.Image, np.ndarray]:
        self.loaded.append(index)
        return Image.fromarray(np.eye(3, dtype=np.uint8)[self.labels[index]] * 255), self.labels[index]


def test_a_perfect_network_scores_one_and_keeps_its_mode() -> None:
    network, domain = Network().train(), Memory()
    result = evaluate_domain(network, domain, 3, EvalConfig(), CPU, progress=False)
    assert (result.name, result.images, result.confusion.miou()) == ("primary", 5, 1.0)
    assert result.confusion.matrix.sum() == 5 * 48 and result.seconds > 0
    assert network.training and not any(network.modes)
    assert sorted(domain.loaded) == [0, 1, 2, 3, 4]


def test_predictions_are_handed_over_in_order() -> None:
    seen = []

    def keep(index: int, image: Image.Image, labels: np.ndarray, prediction: np.ndarray) -> None:
        assert image.size == (8, 6) and prediction.dtype == np.uint8 and np.array_equal(prediction, labels)
        seen.append(index)

    settings = EvalConfig(limit=3)
    evaluate_domain(Network(), Memory(size=9), 3, settings, CPU, progress=False, on_prediction=keep, threads=4)
    assert seen == [1, 4, 7]


def test_evenly_spaced() -> None:
    assert evenly_spaced(4, 0) == evenly_spaced(4, 4) == evenly_spaced(4, 9) == [0, 1, 2, 3]
    assert evenly_spaced(10, 2) == [2, 7] and evenly_spaced(5, 1) == [2]


def test_errors_name_domain_and_sample() -> None:
    with pytest.raises(DataError, match="domain 'primary' has no images"):
        evaluate_domain(Network(), Memory(size=0), 3, EvalConfig(), CPU, progress=False)
    with pytest.raises(ValueError, match="the network has 3 classes, the labels 4"):
        evaluate_domain(Network(), Memory(), 4, EvalConfig(), CPU, progress=False)
    domain, network = Memory(), Network().train()
    domain.labels[2] = np.full((6, 8), 2, np.uint8)
    domain.load = lambda index: (random_image(6, 8), domain.labels[index] + (3 if index == 2 else 0))  # type: ignore
    with pytest.raises(DataError, match="domain 'primary', sample 2: confusion_matrix: label holds 5, expected"):
        evaluate_domain(network, domain, 3, EvalConfig(), CPU, progress=False)
    assert network.training
    # a network's fault is none of the domain
    network.num_classes = 257
    with pytest.raises(ValueError, match="domain 'primary', sample 0: segment: the network must have") as caught:
        evaluate_domain(network, Memory(), 257, EvalConfig(), CPU, progress=False)
    assert not isinstance(caught.value, DataError)


def test_several_domains() -> None:
    domains = [Memory("a"), Memory("b", size=2)]
    results = [evaluate_domain(Network(), d, 3, EvalConfig(), CPU, progress=False) for d in domains]
    assert [(result.name, result.images) for result in results] == [("a", 5), ("b", 2)]


def test_written_results(tmp_path: Path) -> None:
    half = Confusion(2, matrix=torch.tensor([[2, 2], [0, 0]]))
    absent = Confusion(2, matrix=torch.tensor([[3, 0], [0, 0]]))
    runs = {"agg": [DomainResult("a", half, 1, 0.5), DomainResult("b", absent, 2, 0.5)]}
    json_path, csv_path = write_results(runs, tmp_path / "new", ["road", "sky"], ["b"], {"flip": True}, "sliding")
    stored = json.loads(json_path.read_text())
    domains = stored["runs"]["agg"]
    assert stored["settings"] == {"flip": True} and stored["classes"] == ["road", "sky"]
    assert domains["a"]["role"] == "source" and domains["b"]["role"] == "unseen"
    assert domains["a"]["miou"] == 0.25 and domains["a"]["confusion"] == [[2, 2], [0, 0]]
    assert domains["b"]["iou"] == {"road": 1.0, "sky": None}
    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["domain"] for row in rows] == ["a", "b"]
    assert [row["protocol"] for row in rows] == ["sliding"] * 2
    assert (rows[0]["miou"], rows[0]["road"], rows[1]["sky"], rows[1]["role"]) == ("0.25", "0.5", "", "unseen")


def test_mapillary_alone_is_cut_and_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapillary, "SIDE", 9)
    settings = EvalConfig("released-train")
    for dataset, pixels in (("mapillary:v1.2", 81), ("mapillary", 81), ("cityscapes", 48), ("", 48)):
        result = evaluate_domain(Network(), Memory(dataset=dataset, size=1), 3, settings, CPU, progress=False)
        assert result.confusion.matrix.sum() == pixels
    # the centred variant does not count its padding: 12 x 9 pixels are cut to 9 x 9, 4 x 8 have 4 x 9 of 9 x 9
    domain = Memory(dataset="mapillary", size=1)
    domain.labels = [np.ones((8, 4), np.uint8)]
    result = evaluate_domain(Network(), domain, 3, EvalConfig(mapillary="centred"), CPU, progress=False)
    assert result.confusion.matrix.sum() == 4 * 9


def test_every_image_has_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def segment(model: nn.Module, image: Image.Image, size: tuple[int, int], *others: object, tile_batch: int) -> tuple:
        seeds.append(others[3])
        return torch.zeros(size, dtype=torch.uint8), None

    monkeypatch.setattr("pmm_fast.engine.evaluate.segment", segment)
    for seed in (1, 1, 2):
        evaluate_domain(Network(), Memory(), 3, EvalConfig(), CPU, seed=seed, progress=False)
    assert seeds[:5] == seeds[5:10] and len(set(seeds)) == 10


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = DomainResult("a", Confusion(2, matrix=torch.tensor([[2, 2], [0, 0]])), 1, 0.5)
    write_results({"run": [result]}, tmp_path, ["road", "sky"])
    before = (tmp_path / "results.json").read_text()

    def full(path: Path, text: str, encoding: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: .*results\.json"):
        write_results({"run": [result, result]}, tmp_path, ["road", "sky"])
    assert (tmp_path / "results.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]
