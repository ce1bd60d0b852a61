"""Test protocols on networks whose logits are known, the files written, and ``python -m pmm_fast.evaluate``."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pmm_fast import evaluate as program
from pmm_fast.config import ConfigError, EvalConfig
from pmm_fast.data import normalise
from pmm_fast.data.survey import evenly_spaced
from pmm_fast.engine import checkpoint
from pmm_fast.engine.evaluate import (
    DomainResult,
    evaluate_domain,
    predict_logits,
    tile_starts,
    write_results,
)
from pmm_fast.engine.metrics import Confusion
from tests.street_folders import CLASSES, SPACE, make_domains, tiny_config, train

CPU = torch.device("cpu")
MakeLogits = Callable[[Tensor], Tensor]


class Output(NamedTuple):
    logits: Tensor


class Network(nn.Module):
    """A network that is a function of the images; remembers what it was shown."""

    def __init__(self, make_logits: MakeLogits) -> None:
        super().__init__()
        self.make_logits, self.shapes, self.modes = make_logits, [], []

    def forward(self, images: Tensor) -> Output:
        self.shapes.append(tuple(images.shape))
        self.modes.append(self.training)
        return Output(self.make_logits(images))


def pointwise(images: Tensor) -> Tensor:
    """The three channels as logits of three classes."""
    return images.clone()


def columns(images: Tensor) -> Tensor:
    """Logit 0 counts the columns from the left, so that it knows nothing of the image but its width; logit 1 is 0."""
    count, _, height, width = images.shape
    ramp = torch.arange(width, dtype=torch.float32).expand(count, 1, height, width)
    return torch.cat([ramp, torch.zeros_like(ramp)], 1)


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@dataclass
class Memory:
    """A domain in memory: images in the three primary colours, which ``pointwise`` segments exactly."""

    name: str = "primary"
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


# --- one image ----------------------------------------------------------------------------------------------------


def test_whole_image_is_one_pass() -> None:
    image, network = random_image(10, 14), Network(pointwise)
    logits = predict_logits(network, image, (10, 14), EvalConfig(), CPU)
    assert torch.equal(logits, normalise(image)) and network.shapes == [(1, 3, 10, 14)]


@pytest.mark.parametrize(("crop", "overlap"), [(4, 1 / 3), (5, 0.5), (6, 0.0), (100, 1 / 3), (1, 0.9)])
def test_sliding_equals_whole_for_a_pointwise_network(crop: int, overlap: float) -> None:
    settings = EvalConfig(protocol="sliding", crop=crop, overlap=overlap)
    image, network = random_image(10, 14), Network(pointwise)
    logits = predict_logits(network, image, (10, 14), settings, CPU)
    assert torch.allclose(logits, normalise(image), atol=1e-6)
    assert all(shape[2:] == (min(crop, 10), min(crop, 14)) for shape in network.shapes)


def test_tiles_are_averaged_where_they_overlap() -> None:
    # tiles of 6 columns start at 0, 4 and 4 + 4 moved back to 5: column c has the mean of c - start
    settings = EvalConfig(protocol="sliding", crop=6, overlap=1 / 3)
    logits = predict_logits(Network(columns), random_image(3, 11), (3, 11), settings, CPU)
    expected = [0, 1, 2, 3, (4 + 0) / 2, (5 + 1 + 0) / 3, (2 + 1) / 2, (3 + 2) / 2, (4 + 3) / 2, (5 + 4) / 2, 5]
    assert logits[0].tolist() == [pytest.approx(expected)] * 3


@pytest.mark.parametrize(
    ("length", "tile", "overlap", "starts"),
    [
        (11, 6, 1 / 3, [0, 4, 5]),
        # 9 * (1 - 1/3) is a little over 6 in floating point
        (30, 9, 1 / 3, [0, 6, 12, 18, 21]),
        (2048, 768, 1 / 3, [0, 512, 1024, 1280]),
        (1792, 768, 1 / 3, [0, 512, 1024]),
        (12, 6, 0.0, [0, 6]),
        (13, 6, 0.0, [0, 6, 7]),
        (6, 6, 0.5, [0]),
        (5, 6, 0.5, [0]),
        (8, 5, 0.5, [0, 3]),
    ],
)
def test_tile_starts(length: int, tile: int, overlap: float, starts: list[int]) -> None:
    assert tile_starts(length, tile, overlap) == starts


def test_tiles_grow_with_scales_above_one_only() -> None:
    network = Network(pointwise)
    settings = EvalConfig(protocol="sliding", crop=8, overlap=0.0, scales=[0.5, 1.0, 2.0])
    predict_logits(network, random_image(16, 16), (16, 16), settings, CPU)
    assert network.shapes == [(1, 3, 8, 8), *[(1, 3, 8, 8)] * 4, *[(1, 3, 16, 16)] * 4]


def test_the_mirrored_image_is_mirrored_back() -> None:
    image, network = random_image(10, 14), Network(pointwise)
    logits = predict_logits(network, image, (10, 14), EvalConfig(flip=True), CPU)
    assert torch.allclose(logits, normalise(image), atol=1e-6) and network.shapes == [(2, 3, 10, 14)]
    # a network that looks at positions only: (c + (width - 1 - c)) / 2 everywhere
    logits = predict_logits(Network(columns), image, (10, 14), EvalConfig(flip=True), CPU)
    assert torch.allclose(logits[0], torch.full((10, 14), 6.5))


def test_scales_are_averaged_after_resizing_to_the_label() -> None:
    image = random_image(10, 15)
    small = image.resize((7, 5), Image.Resampling.BICUBIC)
    shrunk = F.interpolate(normalise(small)[None], (10, 15), mode="bilinear", align_corners=False)[0]
    logits = predict_logits(Network(pointwise), image, (10, 15), EvalConfig(scales=[1.0, 0.5]), CPU)
    assert torch.allclose(logits, (normalise(image) + shrunk) / 2, atol=1e-6)


def test_height_resizes_the_image_and_keeps_its_shape() -> None:
    image, network = random_image(10, 15), Network(pointwise)
    logits = predict_logits(network, image, (10, 15), EvalConfig(height=4, scales=[1.0, 2.0]), CPU)
    assert network.shapes == [(1, 3, 4, 6), (1, 3, 8, 12)] and logits.shape == (3, 10, 15)


def test_labels_of_another_size_than_the_image() -> None:
    image = random_image(4, 6)
    logits = predict_logits(Network(pointwise), image, (8, 12), EvalConfig(), CPU)
    expected = F.interpolate(normalise(image)[None], (8, 12), mode="bilinear", align_corners=False)[0]
    assert torch.equal(logits, expected)


def test_mixed_precision_is_on_in_the_network_and_over_after_it() -> None:
    def matrix_product(images: Tensor) -> Tensor:
        return torch.einsum("nchw,ck->nkhw", images, torch.eye(3))

    seen = []
    network = Network(lambda images: seen.append(matrix_product(images)) or seen[-1])
    logits = predict_logits(network, random_image(4, 6), (4, 6), EvalConfig(), CPU, torch.bfloat16)
    assert seen[0].dtype == torch.bfloat16 and logits.dtype == torch.float32


def test_logits_of_another_size_are_refused() -> None:
    network = Network(lambda images: images[..., ::2])
    with pytest.raises(ValueError, match=r"logits of the size of the images, \(4, 6\), got \(4, 3\)"):
        predict_logits(network, random_image(4, 6), (4, 6), EvalConfig(), CPU)


# --- domains ------------------------------------------------------------------------------------------------------


def test_a_perfect_network_scores_one_and_keeps_its_mode() -> None:
    network, domain = Network(pointwise).train(), Memory()
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
    evaluate_domain(Network(pointwise), Memory(size=9), 3, settings, CPU, progress=False, on_prediction=keep, threads=4)
    assert seen == [1, 4, 7]


def test_evenly_spaced() -> None:
    assert evenly_spaced(4, 0) == evenly_spaced(4, 4) == evenly_spaced(4, 9) == [0, 1, 2, 3]
    assert evenly_spaced(10, 2) == [2, 7] and evenly_spaced(5, 1) == [2]


def test_errors_name_domain_and_sample() -> None:
    with pytest.raises(ValueError, match="domain 'primary' has no images"):
        evaluate_domain(Network(pointwise), Memory(size=0), 3, EvalConfig(), CPU, progress=False)
    with pytest.raises(ValueError, match="the network has 3 classes, the labels 4"):
        evaluate_domain(Network(pointwise), Memory(), 4, EvalConfig(), CPU, progress=False)
    domain, network = Memory(), Network(pointwise).train()
    domain.labels[2] = np.full((6, 8), 2, np.uint8)
    domain.load = lambda index: (random_image(6, 8), domain.labels[index] + (3 if index == 2 else 0))  # type: ignore
    with pytest.raises(ValueError, match="domain 'primary', sample 2: confusion_matrix: label holds 5, expected"):
        evaluate_domain(network, domain, 3, EvalConfig(), CPU, progress=False)
    assert network.training


def test_several_domains() -> None:
    domains = [Memory("a"), Memory("b", 2)]
    results = [evaluate_domain(Network(pointwise), d, 3, EvalConfig(), CPU, progress=False) for d in domains]
    assert [(result.name, result.images) for result in results] == [("a", 5), ("b", 2)]


def test_written_results(tmp_path: Path) -> None:
    half = Confusion(2, matrix=torch.tensor([[2, 2], [0, 0]]))
    absent = Confusion(2, matrix=torch.tensor([[3, 0], [0, 0]]))
    runs = {"agg": [DomainResult("a", half, 1, 0.5), DomainResult("b", absent, 2, 0.5)]}
    json_path, csv_path = write_results(runs, tmp_path / "new", ["road", "sky"], ["b"], {"flip": True})
    stored = json.loads(json_path.read_text())
    domains = stored["runs"]["agg"]
    assert stored["settings"] == {"flip": True} and stored["classes"] == ["road", "sky"]
    assert domains["a"]["role"] == "source" and domains["b"]["role"] == "unseen"
    assert domains["a"]["miou"] == 0.25 and domains["a"]["confusion"] == [[2, 2], [0, 0]]
    assert domains["b"]["iou"] == {"road": 1.0, "sky": None}
    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["domain"] for row in rows] == ["a", "b"]
    assert (rows[0]["miou"], rows[0]["road"], rows[1]["sky"], rows[1]["role"]) == ("0.25", "0.5", "", "unseen")


# --- the program --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with domains and two short runs, ``agg`` and ``pinmem``."""
    root = make_domains(tmp_path_factory.mktemp("evaluate"))
    for mode in ("agg", "pinmem"):
        # alpha twice: it is tested once
        options = {"meta.mode": mode, "data.unseen": ["gamma"], "data.sources": ["alpha", "alpha", "beta"]}
        train(root, root / "runs" / mode, options)
    return root


def test_program_compares_runs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(trained / "runs/agg"), str(trained / "runs/pinmem/checkpoint.pt")]
    program.main([*runs, "--out", str(tmp_path / "out"), "--eval.limit", "3", "--device", "cpu"])
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert output.err.count("agg on alpha") == 1
    assert lines[0].split() == ["mIoU", "%", "alpha", "beta", "mean", "source", "gamma", "drop"]
    assert [line.split()[0] for line in lines[2:4]] == ["agg", "pinmem"]
    stored = json.loads((tmp_path / "out/results.json").read_text())
    assert list(stored["runs"]) == ["agg", "pinmem"] and stored["settings"]["eval"]["limit"] == 3
    assert {name: (d["role"], d["images"]) for name, d in stored["runs"]["agg"].items()} == {
        "alpha": ("source", 3),
        "beta": ("source", 3),
        "gamma": ("unseen", 3),
    }
    shown = f"{100 * stored['runs']['pinmem']['gamma']['miou']:.1f}"
    assert shown in lines[3].split()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"overlays_alpha.png", "overlays_beta.png", "overlays_gamma.png"}
    assert files - {"curves.png"} == {"results.json", "results.csv", "results.md", *pictures}
    assert "## IoU of every class, gamma" in (tmp_path / "out/results.md").read_text()
    # four columns, three rows of images at 4:3
    width, height = Image.open(tmp_path / "out/overlays_gamma.png").size
    assert width > 4 * 420 and height > 3 * 315


def test_program_scores_are_those_of_the_network(trained: Path, tmp_path: Path) -> None:
    program.main([str(trained / "runs/pinmem"), "--out", str(tmp_path), "--data.unseen", str(trained / "gamma")])
    stored = json.loads((tmp_path / "results.json").read_text())["runs"]["pinmem"]
    model = checkpoint.load(trained / "runs/pinmem")
    config = tiny_config(trained, tmp_path)
    config.data.sources, config.data.unseen = ["alpha"], []
    [domain] = program.open_domains(config)
    expected = evaluate_domain(model, domain, CLASSES, EvalConfig(), CPU, progress=False).confusion.matrix
    assert stored["alpha"]["confusion"] == expected.tolist()
    assert stored[str(trained / "gamma")]["role"] == "unseen"


def test_program_writes_beside_the_runs_by_default(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.main([str(trained / "runs/agg"), "--data.sources", "--eval.limit", "1"])
    assert (trained / "runs/agg/evaluation/results.csv").is_file()
    assert capsys.readouterr().out.splitlines()[0].split() == ["mIoU", "%", "gamma"]
    shutil.rmtree(trained / "runs/agg/evaluation")


def test_program_refuses_networks_of_different_label_spaces(trained: Path, tmp_path: Path) -> None:
    content = checkpoint.read(trained / "runs/agg")
    content["model"]["label_space"] = "cityscapes19"
    checkpoint.write(tmp_path / "other" / "checkpoint.pt", content)
    message = f"other: trained for the label space cityscapes19, but this test is in {SPACE}"
    with pytest.raises(ConfigError, match=message):
        program.main([str(trained / "runs/agg"), str(tmp_path / "other"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["RUN", "RUN"], "a run is given twice"),
        (["RUN/nothing"], "no such checkpoint"),
        (["RUN", "--data.unseen", "nowhere"], "unknown domain 'nowhere'"),
        (["RUN", "--data.unseen", "alpha"], "data.sources and data.unseen both name alpha"),
        (["RUN", "--data.sources", "--data.unseen"], "expected at least one domain to test on"),
        (["RUN", "--eval.scale", "1"], r"unknown option --eval.scale; did you mean --eval.scales\?"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_program_errors(trained: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        program.main([word.replace("RUN", str(trained / "runs/agg")) for word in argv])


def test_names_of_runs_are_as_short_as_they_can_be() -> None:
    names = program.run_names(["/x/one/agg", "/x/two/agg/checkpoint.pt", "/x/two/best.pt"])
    assert list(names) == ["one/agg", "two/agg", "two/best"]
    assert list(program.run_names(["/x/one/agg"])) == ["agg"]
