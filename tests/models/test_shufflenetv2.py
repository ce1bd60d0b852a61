"""ShuffleNetV2 and the released MobileNetV2: names, sizes, derivatives.

That they compute what the released ones do is in ``tests/test_convert.py``.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pmm_fast import meta
from pmm_fast.models import build_model, load_backbone
from pmm_fast.models.mobilenetv2 import MobileNetV2
from pmm_fast.models.recompute import recompute_blocks
from pmm_fast.models.shufflenetv2 import ShuffleNetV2, ShuffleUnit
from tests.tolerances import EXACT, relative_error

UNITS = {"plain": lambda: ShuffleUnit(6, 6), "downsample": lambda: ShuffleUnit(3, 6, True, 2)}
UNITS["dilated"] = lambda: ShuffleUnit(3, 6, True, 1, 2)


def test_names_and_sizes_are_torchvisions() -> None:
    # torchvision documents 2,278,604 and 3,504,872 parameters, of which its classifiers have these
    classifier, mobile_classifier = 1024 * 1000 + 1000, 1280 * 1000 + 1000
    with torch.device("meta"):
        shuffle, mobile = ShuffleNetV2(), MobileNetV2(released=True)
    assert sum(p.numel() for p in shuffle.parameters()) == 2278604 - classifier
    assert sum(p.numel() for p in mobile.parameters()) == 3504872 - mobile_classifier
    names = set(shuffle.state_dict())
    assert {"conv1.0.weight", "stage2.0.branch1.2.weight", "stage4.3.branch2.6.running_var", "conv5.1.bias"} <= names
    assert "stage2.1.branch1.0.weight" not in names
    assert "features.18.0.weight" in mobile.state_dict()


def test_channels_of_the_two_branches_alternate() -> None:
    unit = ShuffleUnit(4, 4).eval()
    unit.branch2 = nn.Identity()  # type: ignore[assignment]
    x = torch.arange(4.0).view(1, 4, 1, 1)
    assert unit(x).flatten().tolist() == [0, 2, 1, 3]


def convolutions(module: nn.Module) -> set[tuple[int, int]]:
    """(stride, dilation) of every 3x3 convolution."""
    found = (m for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    return {(m.stride[0], m.dilation[0]) for m in found}


@pytest.mark.parametrize(
    ("stride", "third", "fourth"), [(32, (2, 1), (2, 1)), (16, (2, 1), (1, 2)), (8, (1, 2), (1, 4))]
)
def test_only_what_strided_is_dilated(stride: int, third: tuple[int, int], fourth: tuple[int, int]) -> None:
    with torch.device("meta"):
        shuffle, mobile = ShuffleNetV2(stride), MobileNetV2(stride, released=True)
    assert convolutions(shuffle.stage2) == {(2, 1), (1, 1)}
    assert convolutions(shuffle.stage3[0]) == {third} and convolutions(shuffle.stage4[0]) == {fourth}
    assert convolutions(shuffle.stage3[1:]) == convolutions(shuffle.stage4[1:]) == {(1, 1)}
    assert convolutions(mobile.features[7]) == {third} and convolutions(mobile.features[14]) == {fourth}
    assert convolutions(mobile.features[8:14]) == convolutions(mobile.features[15:]) == {(1, 1)}


@pytest.mark.parametrize("name", UNITS)
def test_derivatives_of_a_unit(name: str) -> None:
    torch.manual_seed(0)
    unit = UNITS[name]().double()
    channels = 6 if name == "plain" else 3
    x = torch.randn(2, channels, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(unit, (x,), fast_mode=True)


def step(architecture: str, checkpoint: bool) -> meta.StepResult:
    """One order-2 iteration of a small network in float64."""
    torch.manual_seed(0)
    model = build_model(architecture, 3, channels=8, aux_dropout=0.0).double()
    assert model.memory is not None
    model.memory.slots.copy_(nn.functional.normalize(torch.rand_like(model.memory.slots), dim=1))
    params, buffers, memory = meta.split_state(model)
    images = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64)
    mtr, mte = (meta.Batch(part, torch.randint(0, 3, (2, 32, 32))) for part in images)
    hyper = meta.Hyper(meta.Network(model, checkpoint_activations=checkpoint), order=2, inner_lr=0.01)
    return meta.step(params, buffers, memory, mtr, mte, meta.Noise(), hyper)


@pytest.mark.parametrize("architecture", ["deeplabv3plus_shufflenet_v2", "deeplabv3plus_mobilenet_v2_released"])
def test_meta_step_runs_with_and_without_recomputing(architecture: str) -> None:
    plain, again = step(architecture, False), step(architecture, True)
    largest = max(grad.abs().max() for grad in plain.grads.values())
    assert largest.isfinite() and largest > 0
    for name, expected in plain.grads.items():
        assert relative_error(again.grads[name], expected) < EXACT or expected.abs().max() < 1e-9 * largest, name


def test_every_unit_is_recomputed() -> None:
    net = ShuffleNetV2()
    # 16 units, the stem and the last convolution
    assert recompute_blocks(copy.deepcopy(net)) == 18


@pytest.mark.parametrize(
    ("backbone", "extra"), [("shufflenet_v2", "fc.bias"), ("mobilenet_v2_released", "classifier.1.bias")]
)
def test_torchvision_weights_load(tmp_path: Path, backbone: str, extra: str) -> None:
    model = build_model(f"deeplabv3plus_{backbone}", 3, channels=8, memory=False)
    trained: dict[str, Tensor] = {
        name: torch.full_like(value, 3) for name, value in model.encoder.backbone.state_dict().items()
    }
    torch.save({**trained, extra: torch.zeros(1000)}, tmp_path / "weights.pth")
    assert load_backbone(model, str(tmp_path / "weights.pth")).startswith(f"backbone {backbone}: weights from")
    assert all((value == 3).all() for value in model.encoder.backbone.state_dict().values())
