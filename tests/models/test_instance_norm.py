"""Instance norms: values, derivatives, where they stand in a backbone, and what is handed out to be whitened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pmm_fast import meta
from pmm_fast.models import build_model, load_backbone
from pmm_fast.models.instance_norm import InstanceNorm2d
from pmm_fast.models.recompute import recompute_blocks
from pmm_fast.models.resnet import BasicBlock, Bottleneck, Placement, ResNet
from tests.tolerances import EXACT, FORWARD, relative_error


def randomised(layer: nn.Module) -> nn.Module:
    """The layer in float64, its parameters away from 1 and 0."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0)
    return layer.double()


def plain_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Channel by channel of image by image, as it is defined."""
    out = np.empty_like(x)
    for n, c in np.ndindex(*x.shape[:2]):
        values = x[n, c]
        deviation = np.sqrt(((values - values.mean()) ** 2).mean() + 1e-5)
        out[n, c] = weight[c] * (values - values.mean()) / deviation + bias[c]
    return out


@pytest.mark.parametrize("affine", [True, False])
def test_values_with_and_without_gradients(affine: bool) -> None:
    layer, x = randomised(InstanceNorm2d(3, affine)), 2 + torch.randn(2, 3, 4, 5, dtype=torch.float64)
    weight, bias = (p.detach().numpy() for p in layer.parameters()) if affine else (np.ones(3), np.zeros(3))
    expected = torch.from_numpy(plain_norm(x.numpy(), weight, bias))
    assert relative_error(layer(x), expected) < EXACT
    assert relative_error(layer.eval()(x), expected) < EXACT
    with torch.no_grad():
        assert relative_error(layer(x), expected) < EXACT
    # as under autocast: a map in bf16, parameters in float32
    layer.float()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            out = layer(x.bfloat16())
        assert out.dtype == torch.bfloat16 and relative_error(out, expected) < 4 * FORWARD[torch.bfloat16]


@pytest.mark.parametrize("affine", [True, False])
def test_derivatives_of_both_orders(affine: bool) -> None:
    layer = randomised(InstanceNorm2d(2, affine))
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(("weight", "bias"), parameters, strict=False)), (x,))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("training", [True, False])
def test_one_position_is_refused(training: bool) -> None:
    refused = pytest.raises(ValueError, match=r"two positions or more, got input size \(2, 3, 1, 1\)")
    with torch.set_grad_enabled(training), refused:
        InstanceNorm2d(3, affine=False)(torch.zeros(2, 3, 1, 1))


@pytest.mark.parametrize("make", [BasicBlock, Bottleneck])
def test_a_block_normalises_its_sum_and_leaves_the_relu(make: type[BasicBlock] | type[Bottleneck]) -> None:
    torch.manual_seed(0)
    width = 8 // make.expansion
    plain = make(8, width, Placement(1, 1), None).double()
    block = make(8, width, Placement(1, 1), None, InstanceNorm2d(8, affine=False)).double()
    block.load_state_dict(plain.state_dict())
    before: list[Tensor] = []
    plain.relu.register_forward_hook(lambda module, inputs, output: before.append(inputs[0]))
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    plain(x)
    # the last ReLU of the block without sees the sum
    expected = plain_norm(before[-1].detach().numpy(), np.ones(8), np.zeros(8))
    assert relative_error(block(x), torch.from_numpy(expected)) < EXACT


@pytest.mark.parametrize(
    ("architecture", "places", "widths", "sizes"),
    [
        ("deeplabv2_resnet18", ["bn1", "layer1.1", "layer2.1"], [64, 64, 128], [32, 16, 8]),
        ("deeplabv3plus_resnet50", ["bn1", "layer1.2", "layer2.3"], [64, 256, 512], [32, 16, 8]),
        ("deeplabv3plus_mobilenet_v2", ["features.1", "features.6", "features.10"], [16, 32, 64], [32, 8, 4]),
    ],
)
def test_where_they_stand_and_what_is_whitened(
    architecture: str, places: list[str], widths: list[int], sizes: list[int]
) -> None:
    images = torch.randn(2, 3, 64, 64)
    plain = build_model(architecture, 3, channels=4)
    assert len(plain.encoder(images)) == 3 and plain.whitening is None

    ibn = build_model(architecture, 3, channels=4, instance_norm="ibn")
    backbone = ibn.encoder.backbone
    layers = [name for name, module in backbone.named_modules() if isinstance(module, InstanceNorm2d)]
    assert layers == [place if place == "bn1" else f"{place}.instance_norm_layer" for place in places]
    added = {f"encoder.backbone.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(ibn.state_dict()) - set(plain.state_dict()) == {name for name in added if ".bn1." not in name}
    assert len(ibn.encoder(images)) == 3 and ibn.whitening is None

    isw = build_model(architecture, 3, channels=4, instance_norm="isw")
    assert not any("instance_norm" in name for name in isw.state_dict())
    stages = isw.encoder.backbone(images)
    features = isw.encoder(images)
    assert torch.equal(features.whitened[2], stages.whitened[2])
    for index, (x, width, size) in enumerate(zip(stages.whitened, widths, sizes, strict=True)):
        assert x.shape == (2, width, size, size)
        mask = isw.get_buffer(f"whitening.mask{index}")
        assert mask.shape == (width, width) and mask.dtype == torch.bool and not mask.any()
        # of zero mean and of unit variance, but in channels that hardly vary
        assert x.mean((2, 3)).abs().max() < 1e-4 and 0.9 < x.var((2, 3), correction=0).median() < 1.0001
    if isinstance(isw.encoder.backbone, ResNet):
        # what goes on is the ReLU of the map that is whitened
        assert stages.whitened[1].min() < 0 and torch.equal(stages.low_level, stages.whitened[1].relu())


def test_names_and_places_that_are_refused() -> None:
    with pytest.raises(ValueError, match="instance_norm must be none, ibn, isw, got 'in'"):
        build_model("deeplabv3plus_resnet18", 3, instance_norm="in")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="instance_norm 'ibn' needs a ResNet or MobileNetV2 backbone, got shuffle"):
        build_model("deeplabv3plus_shufflenet_v2", 3, instance_norm="ibn")


@pytest.mark.parametrize("kind", ["ibn", "isw"])
def test_pretrained_weights_go_where_there_is_a_place_for_them(kind: str, tmp_path: Path) -> None:
    trained = build_model("deeplabv3plus_resnet18", 3, channels=4)
    for value in trained.encoder.backbone.state_dict().values():
        value.copy_(torch.randn(value.shape) if value.is_floating_point() else value)
    state = trained.encoder.backbone.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = build_model("deeplabv3plus_resnet18", 3, channels=4, instance_norm=kind)
    load_backbone(model, str(tmp_path / "weights.pth"))
    found = model.encoder.backbone.state_dict()
    # the stem's norm takes over weight and bias, those at the ends of stages start at 1 and 0
    taken = {"bn1.weight", "bn1.bias"} if kind == "ibn" else set()
    kept = {key for key in state if not key.startswith("bn1.")} | taken
    assert all(torch.equal(found[key], state[key]) for key in kept)
    norms = [f"layer{stage}.1.instance_norm_layer" for stage in (1, 2)] if kind == "ibn" else []
    assert set(found) == kept | {f"{norm}.{name}" for norm in norms for name in ("weight", "bias")}
    assert all((found[f"{norm}.weight"] == 1).all() and not found[f"{norm}.bias"].any() for norm in norms)
    torch.save(state | {"layer5.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"unexpected: layer5\.weight"):
        load_backbone(model, str(tmp_path / "weights.pth"))


def test_recomputed_blocks_have_the_same_derivatives() -> None:
    torch.manual_seed(0)
    block = Bottleneck(8, 2, Placement(1, 1), None, InstanceNorm2d(8, affine=True)).double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)

    def derivatives() -> list[Tensor]:
        leaves = [x, *block.parameters()]
        out = block(x)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        # as vectors: the offset of a batch norm before an instance norm has derivatives of rounding alone
        return [out, *(torch.cat([g.flatten() for g in order]) for order in (first, second))]

    expected = derivatives()
    assert recompute_blocks(block) == 1
    assert all(relative_error(ours, theirs) < EXACT for ours, theirs in zip(derivatives(), expected, strict=True))


def test_network_functions_take_the_values_of_the_norms() -> None:
    model = build_model("deeplabv3plus_mobilenet_v2", 3, channels=4, memory=False, instance_norm="ibn").eval()
    params, buffers, _ = meta.split_state(model)
    network, images = meta.Network(model), torch.randn(1, 3, 64, 64)
    name = "encoder.backbone.features.6.instance_norm_layer.bias"
    with torch.no_grad():
        before = network("encoder", params, buffers, images, training=False).feature
        after = network("encoder", params | {name: params[name] + 1}, buffers, images, training=False).feature
        assert torch.equal(before, model.encoder(images).feature) and not torch.equal(before, after)
