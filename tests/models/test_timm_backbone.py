"""Backbones of timm: on a stand-in with timm's functions, and on timm itself where it is installed."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pmm_fast
from pmm_fast import meta, ops
from pmm_fast.models import Segmentor, build_model, load_backbone
from pmm_fast.models.batchnorm import BatchNorm2d
from pmm_fast.models.conv import Conv2d
from pmm_fast.models.timm_backbone import TimmBackbone, _HardSigmoid
from tests.tolerances import EXACT, relative_error

WIDTHS = (4, 6, 8, 10)


class NormAct(nn.BatchNorm2d):
    """Like timm's ``BatchNormAct2d``: activation inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class PocketNet(nn.ModuleDict):
    """A stem of stride 2 and three stages, named as timm's ``FeatureListNet`` names them; the last may be dilated."""

    def __init__(self, output_stride: int = 32) -> None:
        super().__init__()
        torch.manual_seed(3)
        reached, strides = 2, [2]
        self["stem"] = self.make_stem()
        for index, width in enumerate(WIDTHS[1:]):
            # stages two and three stride twice as far as one
            stride = min((2, 2, 4)[index], output_stride // reached)
            reached *= stride
            strides.append(reached)
            self[f"stages_{index}"] = self.make_stage(WIDTHS[index], width, stride)
        self.feature_info = types.SimpleNamespace(channels=lambda: list(WIDTHS), reduction=lambda: strides)
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def make_stem(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.Hardswish(inplace=True))

    def make_stage(self, width: int, out: int, stride: int) -> nn.Module:
        kernel = max(3, 2 * stride - 1)
        gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(out, out, 1), nn.Hardsigmoid())
        return Gated(nn.Sequential(nn.Conv2d(width, out, kernel, stride, kernel // 2), NormAct(out)), gate)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for part in self.values():
            x = part(x)
            found.append(x)
        return found


class Gated(nn.Module):
    def __init__(self, body: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.body, self.gate = body, gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x * self.gate(x)


class PatchNet(PocketNet):
    """Cuts the image into patches, whose number rounds down."""

    def make_stem(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.GroupNorm(1, 4))

    def make_stage(self, width: int, out: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, out, stride, stride), nn.GELU())


class LastNet(PocketNet):
    """Channels last."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [found.permute(0, 2, 3, 1) for found in super().forward(x)]


class CoarseNet(PocketNet):
    """No map at a quarter."""

    def __init__(self, output_stride: int = 32) -> None:
        super().__init__(output_stride)
        self.feature_info.reduction = lambda: [8, 8, 16, 16]


class OddNet(PocketNet):
    """A batch norm without weights."""

    def make_stem(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4, affine=False))


class StiffNet(PocketNet):
    """Knows no output stride."""

    def __init__(self) -> None:
        super().__init__()


NETWORKS = {
    "pocket_net": PocketNet,
    "patch_net": PatchNet,
    "last_net": LastNet,
    "coarse_net": CoarseNet,
    "odd_net": OddNet,
    "stiff_net": StiffNet,
}


def create_model(
    model_name: str,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    checkpoint_path: Any = None,
    cache_dir: Any = None,
    scriptable: bool | None = None,
    exportable: bool | None = None,
    no_jit: bool | None = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's signature, and its law that an option of None is not given."""
    assert kwargs.pop("features_only") and exportable
    network = NETWORKS[model_name](**{key: value for key, value in kwargs.items() if value is not None})
    if pretrained:
        for value in network.state_dict().values():
            value.fill_(3)
    return network


def list_models(
    filter: Any = "",
    module: Any = "",
    pretrained: bool = False,
    exclude_filters: Any = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    return sorted(NETWORKS)


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The stand-in, imported as ``timm``."""
    module = types.ModuleType("timm")
    module.__dict__.update(
        __version__="0.0", create_model=create_model, list_models=list_models, is_model=NETWORKS.__contains__
    )
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def network(name: str = "pocket_net", **options: Any) -> Segmentor:
    return build_model(f"deeplabv3plus_timm/{name}", 5, **{"channels": 8, "aux_dropout": 0.0, **options})


@pytest.mark.parametrize("name", ["pocket_net", "patch_net"])
@pytest.mark.parametrize(("head", "stride"), [("deeplabv3plus", 8), ("deeplabv3plus", 16), ("deeplabv2", 8)])
def test_shapes_at_odd_sizes(timm: types.ModuleType, name: str, head: str, stride: int) -> None:
    model = build_model(f"{head}_timm/{name}", 5, channels=8, output_stride=stride).eval()
    images = torch.randn(2, 3, 65, 83)
    with torch.no_grad():
        out, stages = model(images), model.encoder.backbone(images)
    coarse = model.feature_size(65, 83)
    assert out.feature.shape == (2, 8, *coarse) and out.logits.shape == (2, 5, 65, 83)
    backbone = model.encoder.backbone
    assert stages.low_level.shape == (2, backbone.low_level_channels, 17, 21)
    # at its own stride, of the image and not of the padding
    aux_stride = backbone.network.feature_info.reduction()[-2]
    assert stages.aux.shape == (2, backbone.aux_channels, -(-65 // aux_stride), -(-83 // aux_stride))
    assert stages.last.shape == (2, backbone.channels, *coarse)
    assert (backbone.low_level_channels, backbone.aux_channels, backbone.channels) == WIDTHS[1:]


def test_a_network_that_rounds_down_sees_the_whole_image(timm: types.ModuleType) -> None:
    backbone = TimmBackbone("patch_net").eval()
    images = torch.zeros(1, 3, 33, 33)
    other = images.clone()
    other[..., -1, -1] = 1
    assert not torch.equal(backbone(images).last, backbone(other).last)
    # a size that fits is taken as it is
    exact = torch.randn(1, 3, 32, 48)
    assert all(torch.equal(a, b) for a, b in zip(backbone(exact)[:3], backbone.network(exact)[1:], strict=True))


def test_layers_are_ours_and_compute_the_same(timm: types.ModuleType) -> None:
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    theirs = create_model("pocket_net", features_only=True, exportable=True, output_stride=16).double()
    backbone = TimmBackbone("pocket_net").double()
    backbone.network.load_state_dict(theirs.state_dict())
    kinds = [type(module) for module in backbone.modules()]
    assert not {nn.Conv2d, nn.BatchNorm2d, NormAct, nn.Hardsigmoid} & set(kinds)
    assert sum(issubclass(kind, BatchNorm2d) for kind in kinds) == 4 and kinds.count(Conv2d) == 7
    for training in (True, False):
        found, expected = backbone.train(training)(images), theirs.train(training)(images)
        for ours, other in zip(found[:3], expected[1:], strict=True):
            assert relative_error(ours, other) < EXACT
    # statistics moved alike
    for name, value in theirs.state_dict().items():
        assert relative_error(backbone.network.state_dict()[name], value) < EXACT, name


def test_the_hard_sigmoid_has_the_values_of_pytorch_and_a_second_derivative() -> None:
    x = torch.linspace(-4.15, 4.25, 29, dtype=torch.float64, requires_grad=True)
    assert relative_error(_HardSigmoid()(x), F.hardsigmoid(x)) < EXACT
    assert torch.autograd.gradgradcheck(_HardSigmoid(), (x,))


def test_a_second_order_step(timm: types.ModuleType) -> None:
    torch.manual_seed(0)
    model = network().double()
    assert model.memory is not None
    model.memory.slots.copy_(ops.normalize(torch.rand(5, 8), 1))
    params, buffers, memory = meta.split_state(model)
    batch = meta.Batch(torch.randn(2, 3, 32, 48, dtype=torch.float64), torch.randint(0, 5, (2, 32, 48)))
    first, second = (
        meta.step(
            params, buffers, memory, batch, batch, meta.Noise(), meta.Hyper(meta.Network(model), order=n, inner_lr=0.1)
        ).grads
        for n in (1, 2)
    )
    for name, value in second.items():
        assert value.isfinite().all(), name
        if "backbone" in name:
            assert relative_error(first[name], value) > 1e-4, name


def test_batch_norm_takes_part_in_a_group(timm: types.ModuleType) -> None:
    skeleton = meta.Network(network(), group="ranks")._modules[True]
    norms = [module for module in skeleton.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.group == "ranks" for norm in norms)


def test_a_checkpoint_rebuilds_it(timm: types.ModuleType, tmp_path: Path) -> None:
    model = network().eval()
    pmm_fast.save(model, tmp_path / "model.pt")
    again = pmm_fast.load(tmp_path / "model.pt")
    images = torch.randn(1, 3, 40, 40)
    assert again.architecture == "deeplabv3plus_timm/pocket_net"
    assert torch.equal(model(images).logits, again(images).logits)


@pytest.mark.parametrize(
    ("name", "stride", "message"),
    [
        ("pocket_nett", 16, r"timm/pocket_nett: timm 0.0 has no such network; did you mean timm/pocket_net"),
        ("last_net", 16, r"at output stride 16 \(images of 64 x 96 give maps \[\(1, 32, 48, 4\)"),
        ("coarse_net", 16, r"its maps are at strides 8, 8, 16, 16"),
        ("odd_net", 16, r"its batch norm stem.1 is of a kind that is not known here"),
        ("stiff_net", 16, r"unexpected keyword argument 'output_stride'\); a network that cannot be dilated has 32"),
    ],
)
def test_what_cannot_be_a_backbone_is_refused(timm: types.ModuleType, name: str, stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(name, output_stride=stride)


def test_a_network_that_cannot_be_dilated_has_its_own_stride(timm: types.ModuleType) -> None:
    assert network("stiff_net", output_stride=32).encoder.backbone.channels == WIDTHS[-1]


def test_refusals_that_do_not_need_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm/resnet18 needs the extra timm: pip install 'pmm_fast\[timm\]'"):
        network("resnet18")
    with pytest.raises(ValueError, match=r"instance_norm 'ibn' needs a ResNet or MobileNetV2 backbone, got timm/"):
        network("resnet18", instance_norm="ibn")
    with pytest.raises(ValueError, match=r"unknown architecture 'unet_timm/resnet18'.*HEAD_timm/NAME"):
        build_model("unet_timm/resnet18", 5)


def test_imagenet_weights_are_those_of_timm(timm: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    line = load_backbone(model, "imagenet")
    assert line == (
        "backbone timm/pocket_net: ImageNet weights of timm, trained with mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    )
    assert all((value == 3).all() for value in model.encoder.backbone.state_dict().values())

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    model = network()
    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*\n.*HF_HOME.*--model.weights none"):
        load_backbone(model, "imagenet")
    assert load_backbone(model, "none") == "backbone timm/pocket_net: random weights"


def test_a_file_has_the_names_of_the_classifier(timm: types.ModuleType, tmp_path: Path) -> None:
    model = network()
    named = model.encoder.backbone.network.state_dict()
    classifier = {key.replace("stages_", "stages."): torch.full_like(value, 3) for key, value in named.items()}
    path = tmp_path / "classifier.pth"
    torch.save({**classifier, "head.fc.weight": torch.zeros(2, 2)}, path)
    assert load_backbone(model, str(path)).endswith(f"weights from {path} (of no use here: head.fc.weight)")
    assert all((value == 3).all() for value in model.encoder.backbone.state_dict().values())
    classifier["stages.0.body.2.weight"] = classifier.pop("stages.0.body.0.weight")
    torch.save(classifier, path)
    with pytest.raises(ValueError, match=r"missing: network.stages_0.body.0.weight"):
        load_backbone(network(), str(path))


@pytest.fixture
def real_timm() -> Iterator[types.ModuleType]:
    yield pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_the_real_one_where_installed(real_timm: types.ModuleType, name: str) -> None:
    given = inspect.signature(real_timm.create_model).parameters
    assert list(given) == list(inspect.signature(create_model).parameters)
    model = network(name).eval()
    with torch.no_grad():
        out = model(torch.randn(1, 3, 65, 83))
    assert out.feature.shape[2:] == model.feature_size(65, 83)
