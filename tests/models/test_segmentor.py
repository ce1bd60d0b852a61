"""Every architecture: shapes, strides, initial values, derivatives, errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from pmm_fast import ops
from pmm_fast.models import ARCHITECTURES, Segmentor, build_model

LOW_LEVEL = {
    "resnet18": 64,
    "resnet50": 256,
    "resnet101": 256,
    "mobilenet_v2": 24,
    "mobilenet_v2_released": 32,
    "shufflenet_v2": 116,
}
AUX = {
    "resnet18": 256,
    "resnet50": 1024,
    "resnet101": 1024,
    "mobilenet_v2": 96,
    "mobilenet_v2_released": 320,
    "shufflenet_v2": 464,
}
# backbones whose low-level map is at an eighth, and whose auxiliary map is at output stride 32 too
COARSE = ("mobilenet_v2_released", "shufflenet_v2")
CASES = [
    (name, stride)
    for name in ARCHITECTURES
    for stride in (8, 16, 32)
    if stride == 16 or (name.startswith("deeplabv3") and (stride == 8 or "resnet50" not in name))
]


def at(stride: int) -> tuple[int, int]:
    """Size of a map of the images below."""
    return math.ceil(65 / stride), math.ceil(83 / stride)


@pytest.mark.parametrize(("architecture", "asked"), CASES)
def test_shapes_at_odd_sizes(architecture: str, asked: int) -> None:
    index = CASES.index((architecture, asked))
    classes, channels, memory = (19, 16, True) if index % 2 else (7, 12, index % 4 == 0)
    model = build_model(architecture, classes, channels=channels, output_stride=asked, memory=memory).eval()
    head, backbone = architecture.split("_", 1)
    stride = 8 if head == "deeplabv2" else asked
    images = torch.randn(2, 3, 65, 83)
    coarse, fine = at(stride), at(8 if backbone in COARSE else 4)
    aux_size = coarse if backbone in COARSE else at(min(stride, 16))
    with torch.no_grad():
        features = model.encoder(images)
        logits = model.decoder(features.feature, features.low_level)
        out = model(images)
        aux = model.aux_head(features.aux)
    assert features.feature.shape == (2, channels, *coarse) and features.feature.min() >= 0
    assert model.feature_size(65, 83) == coarse
    assert features.aux.shape == (2, AUX[backbone], *aux_size)
    assert aux.shape == (2, classes, *aux_size)
    if head == "deeplabv2":
        assert features.low_level is features.feature
        assert logits.shape == (2, classes, *coarse)
    else:
        assert features.low_level.shape == (2, LOW_LEVEL[backbone], *fine)
        assert logits.shape == (2, classes, *fine)
    assert out.logits.shape == (2, classes, 65, 83) and out.logits.isfinite().all()
    assert out.read_feature.shape == out.feature.shape
    if memory:
        assert out.assignment is not None
        # the slots are still zero: every cosine is, so every slot weighs the same
        torch.testing.assert_close(out.assignment, torch.full((2, classes, *coarse), 1 / classes))
    else:
        assert out.assignment is None and out.read_feature is out.feature


def dilations(module: nn.Module) -> set[tuple[int, int]]:
    """(stride, dilation) of every 3x3 convolution."""
    convolutions = (m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    return {(m.stride[0], m.dilation[0]) for m in convolutions}


def test_dilation_law() -> None:
    for backbone in ("resnet18", "resnet50"):
        net = build_model(f"deeplabv3plus_{backbone}", 3, channels=8).encoder.backbone
        assert dilations(net.layer3) == {(2, 1), (1, 1)} and dilations(net.layer4) == {(1, 2)}
        net = build_model(f"deeplabv3plus_{backbone}", 3, channels=8, output_stride=8).encoder.backbone
        assert dilations(net.layer3) == {(1, 2)} and dilations(net.layer4) == {(1, 4)}
    net = build_model("deeplabv3plus_resnet18", 3, channels=8, output_stride=32).encoder.backbone
    assert dilations(net.layer3) == dilations(net.layer4) == {(2, 1), (1, 1)}
    net = build_model("deeplabv3plus_mobilenet_v2", 3, channels=8).encoder.backbone
    assert dilations(net.features[:14]) == {(2, 1), (1, 1)} and dilations(net.features[14:]) == {(1, 2)}
    net = build_model("deeplabv3plus_mobilenet_v2", 3, channels=8, output_stride=8).encoder.backbone
    assert dilations(net.features[7:14]) == {(1, 2)} and dilations(net.features[14:]) == {(1, 4)}


def test_aspp_rates_and_moved_stride() -> None:
    for stride, rates in ((16, [1, 6, 12, 18]), (8, [1, 12, 24, 36]), (32, [1, 3, 6, 9])):
        aspp = build_model("deeplabv3plus_resnet18", 3, channels=8, output_stride=stride).encoder.aspp
        assert [branch[0].dilation[0] for branch in aspp.branches] == rates
    first = build_model("deeplabv2_resnet50", 3, channels=8).encoder.backbone.layer2[0]
    assert first.conv1.stride == (2, 2) and first.conv2.stride == (1, 1)
    first = build_model("deeplabv3plus_resnet50", 3, channels=8).encoder.backbone.layer2[0]
    assert first.conv1.stride == (1, 1) and first.conv2.stride == (2, 2)


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = build_model("deeplabv3plus_resnet18", 19, channels=64)
    for conv in (model.encoder.project[0], model.decoder.fuse[0], model.aux_head[0]):
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
        # normal: a uniform law of the same deviation ends at 1.73 of it
        assert conv.weight.abs().max() > 3 * conv.weight.std()
    assert not model.decoder.classify.bias.any() and not model.aux_head[0].bias.any()
    # torchvision's law for the backbone: fan out
    stem = model.encoder.backbone.conv1.weight
    assert stem.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    assert model.aux_head[3].p == 0.1


@pytest.mark.parametrize(
    "architecture",
    [
        "deeplabv3plus_resnet18",
        "deeplabv3plus_mobilenet_v2",
        "deeplabv2_resnet18",
        "deeplabv3plus_mobilenet_v2_released",
        "deeplabv3plus_shufflenet_v2",
    ],
)
def test_second_derivative_in_training_mode(architecture: str) -> None:
    torch.manual_seed(0)
    model = build_model(architecture, 3, channels=8, aux_dropout=0.0).train()
    assert model.memory is not None
    model.memory.slots.copy_(ops.normalize(torch.rand(3, 8), 1))
    images = torch.randn(2, 3, 33, 47)
    features = model.encoder(images)
    read = model.memory(features.feature).read_feature
    loss = model.decoder(read, features.low_level).pow(2).mean() + model.aux_head(features.aux).pow(2).mean()
    weights = [model.encoder.get_parameter(name) for name in ("backbone." + first_conv(model),)]
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
    second = torch.autograd.grad(gradient.pow(2).sum(), weights)[0]
    assert gradient.isfinite().all() and second.isfinite().all()
    assert second.abs().max() > 0


def first_conv(model: Segmentor) -> str:
    """Name of the stem's weight in the backbone."""
    return next(name for name, _ in model.encoder.backbone.named_parameters())


def test_submodules_run_on_given_parameters() -> None:
    model = build_model("deeplabv3plus_resnet18", 3, channels=8).eval()
    images = torch.randn(1, 3, 40, 40)
    expected = model.encoder(images)
    doubled = {name: 2 * p for name, p in model.encoder.named_parameters()}
    other = torch.func.functional_call(model.encoder, doubled, (images,))
    assert not torch.equal(expected.feature, other.feature)
    assert torch.equal(expected.feature, model.encoder(images).feature)


def test_copies_to_meta_and_rebuilding_from_settings() -> None:
    model = build_model("deeplabv2_mobilenet_v2", 5, channels=8, aux_dropout=0.2, temperature=0.5)
    assert model.settings["output_stride"] == 8 and model.num_classes == 5
    assert model.architecture == "deeplabv2_mobilenet_v2"
    again = build_model(**model.settings)
    again.load_state_dict(model.state_dict())
    assert again.settings == model.settings and again.aux_head[3].p == 0.2
    assert again.memory is not None and again.memory.temperature == 0.5
    model = build_model("deeplabv3plus_resnet18", 5, channels=8)
    skeleton = copy.deepcopy(model).to("meta")
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    features = torch.func.functional_call(skeleton.encoder, model.encoder.state_dict(), (torch.rand(2, 3, 32, 32),))
    assert features.feature.shape == (2, 8, 2, 2) and not features.feature.is_meta


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'deeplabv3plus_resnet51'. Did you mean deeplabv3plus_resnet50"):
        build_model("deeplabv3plus_resnet51", 19)
    with pytest.raises(ValueError, match=r"'unet'. Known: deeplabv3plus_resnet18"):
        build_model("unet", 19)
    with pytest.raises(ValueError, match="num_classes must be positive, got 0"):
        build_model("deeplabv3plus_resnet18", 0)
    with pytest.raises(ValueError, match="channels must be positive, got -1"):
        build_model("deeplabv3plus_resnet18", 19, channels=-1)
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        build_model("deeplabv3plus_resnet18", 19, output_stride=4)
    with pytest.raises(ValueError, match="aux_dropout must be in"):
        build_model("deeplabv3plus_resnet18", 19, aux_dropout=1.0)
    model = build_model("deeplabv3plus_resnet18", 3, channels=8, memory=False)
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], got shape \(1, 1, 32, 32\)"):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="at least 2 images"):
        model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no memory to read"):
        model.eval()(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 2, 2))
