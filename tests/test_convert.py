"""Released checkpoints: the same numbers, the same names, and nothing skipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pmm_fast import convert
from pmm_fast.models import Segmentor, build_model, released
from tests.released import load, released_keys, released_slots, released_weights
from tests.released_networks import network_forward, network_keys
from tests.tolerances import RELEASED_NETWORK, relative_error

V3PLUS, V2 = "deeplabv3plus_resnet50", "deeplabv2_resnet101"
SMALL = "deeplabv3plus_resnet18"


@pytest.fixture(scope="module")
def models() -> dict[str, Segmentor]:
    """The two released networks, built once."""
    return {
        name: convert.from_released(released_weights(released_keys(name)), released_slots(), name)
        for name in (V3PLUS, V2)
    }


@pytest.fixture
def small() -> Segmentor:
    """A small network with a memory that differs from zero."""
    model = build_model(SMALL, 5, channels=8)
    assert model.memory is not None
    model.memory.slots.normal_()
    return model


@pytest.mark.parametrize("architecture", [V3PLUS, V2])
def test_forward_equals_the_released_code(models: dict[str, Segmentor], architecture: str) -> None:
    expected = load(f"{architecture}_forward")
    with torch.no_grad():
        out = models[architecture](expected["image"])
    assert out.assignment is not None
    found = {**out._asdict(), "assignment": out.assignment.permute(0, 2, 3, 1)}
    for name in ("logits", "feature", "read_feature", "assignment"):
        assert found[name].shape == expected[name].shape
        # measured: 3e-7 at most
        assert relative_error(found[name], expected[name]) < RELEASED_NETWORK, name


@pytest.mark.parametrize(("architecture", "count", "parameters"), [(V3PLUS, 397, 45284057), (V2, 679, 66904185)])
def test_names_and_sizes_equal_the_released_ones(
    models: dict[str, Segmentor], architecture: str, count: int, parameters: int
) -> None:
    keys = released_keys(architecture)
    assert sum(p.numel() for p in models[architecture].parameters()) == parameters
    state_dict, memory = convert.to_released(models[architecture])
    assert len(keys) == count
    # the order too: a released optimizer state numbers parameters by it
    assert [(name, list(tensor.shape)) for name, tensor in state_dict.items()] == list(keys.items())
    assert memory is not None and memory.shape == (19, 256)


def test_round_trip_of_released_weights_is_bit_exact(models: dict[str, Segmentor]) -> None:
    weights = released_weights(released_keys(V3PLUS))
    state_dict, memory = convert.to_released(models[V3PLUS])
    for name, tensor in weights.items():
        assert tensor.dtype == state_dict[name].dtype
        assert torch.equal(tensor, state_dict[name]), name
    assert memory is not None and torch.equal(memory, released_slots())


def test_baseline_without_memory() -> None:
    keys = {name: shape for name, shape in released_keys(V3PLUS).items() if not name.startswith("memory.")}
    assert len(keys) == 383
    model = convert.from_released({name: torch.zeros(shape) for name, shape in keys.items()})
    assert model.architecture == V3PLUS and model.settings["output_stride"] == 16
    assert model.memory is None and model.label_space == "cityscapes19"
    assert sum(p.numel() for p in model.parameters()) == 45081542


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("architecture", [SMALL, "deeplabv2_resnet18"])
def test_round_trip_of_ours_is_bit_exact(architecture: str, prefix: bool) -> None:
    model = build_model(architecture, 5, channels=8)
    assert model.memory is not None
    model.memory.slots.normal_()
    state_dict, memory = convert.to_released(model, module_prefix=prefix)
    assert all(name.startswith("module.") == prefix for name in state_dict)
    again = convert.from_released(state_dict, memory, output_stride=16)
    assert again.settings == model.settings and again.label_space is None
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not again.training and all(p.requires_grad for p in again.parameters())


def test_tensors_are_copied_and_no_random_numbers_drawn(small: Segmentor) -> None:
    state_dict, memory = convert.to_released(small)
    before = torch.get_rng_state()
    again = convert.from_released(state_dict, memory, SMALL)
    assert torch.equal(before, torch.get_rng_state())
    state_dict["final2.0.bias"].fill_(7)
    assert not (small.decoder.classify.bias == 7).any()
    again.decoder.classify.weight.data.fill_(7)
    assert not (again.decoder.classify.bias == 7).any()
    assert not (state_dict["final2.0.weight"] == 7).any()
    assert not (small.decoder.classify.weight == 7).any()


def test_output_stride_8_and_loss_weights(small: Segmentor) -> None:
    state_dict, memory = convert.to_released(small, module_prefix=True)
    state_dict["module.criterion.weight"] = torch.ones(5)
    model = convert.from_released(state_dict, memory, SMALL, output_stride=8)
    assert model(torch.zeros(1, 3, 64, 64)).feature.shape == (1, 8, 8, 8)


# a released function's trunk and output stride; its names are those of 8, 16 and 32 alike
TRUNKS = ("resnet18", "mobilenet_v2_released", "shufflenet_v2")
STRIDES = [("resnet18", None, 32)]
STRIDES += [(trunk, asked, asked or 16) for trunk in TRUNKS[1:] for asked in (8, None, 32)]


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    """Released weights of every other trunk, with the names of a memory."""
    return {trunk: released_weights(network_keys(trunk)) for trunk in TRUNKS}


def without_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("memory.")}


@pytest.mark.parametrize(("trunk", "asked", "stride"), STRIDES)
def test_every_trunk_computes_what_the_released_one_does(
    states: dict[str, dict[str, Tensor]], trunk: str, asked: int | None, stride: int
) -> None:
    state = without_memory(states[trunk])
    model = convert.from_released(state, output_stride=asked)
    assert model.architecture == f"deeplabv3plus_{trunk}" and model.settings["output_stride"] == stride
    # a map of 7 x 13 positions, so that two of the three rates of the pyramid reach across it
    size = (7 * stride - 1, 13 * stride - 5)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network_forward(trunk, state, images, stride)
        stages = model.encoder.backbone(images)
        out, aux_logits = model(images), model.aux_head(stages.aux)
    assert out.feature.shape[2:] == model.feature_size(*size) == (7, 13)
    found = {**stages._asdict(), "feature": out.feature, "logits": out.logits, "aux_logits": aux_logits}
    for name, value in expected._asdict().items():
        assert found[name].shape == value.shape
        # measured: 2.5e-7 at most
        assert relative_error(found[name], value) < RELEASED_NETWORK, name


@pytest.mark.parametrize("stride", [16, 8])
def test_the_plain_network_is_the_released_one(stride: int) -> None:
    """What the trunks are compared with equals the fixture where there is one, and at output stride 8 our network."""
    expected, state = load(f"{V3PLUS}_forward"), released_weights(released_keys(V3PLUS))
    feature = network_forward("resnet50", state, expected["image"], stride).feature
    if stride == 8:
        with torch.no_grad():
            model = convert.from_released(state, released_slots(), output_stride=8)
            expected = {"feature": model.encoder(expected["image"]).feature}
    assert relative_error(feature, expected["feature"]) < RELEASED_NETWORK


@pytest.mark.parametrize("trunk", TRUNKS)
def test_round_trip_of_every_trunk_is_bit_exact(states: dict[str, dict[str, Tensor]], trunk: str) -> None:
    checkpoint = {
        "state_dict": {f"module.{name}": tensor for name, tensor in states[trunk].items()},
        "memory": released_slots(),
        "epoch": 0,
        "mean_iu": 0,
    }
    model, unused = released.from_released_checkpoint(checkpoint)
    assert unused == ["epoch (0)", "mean_iu (0)"] and model.label_space == "cityscapes19"
    again = released.to_released_checkpoint(model)
    assert again.keys() == checkpoint.keys() and again["epoch"] == again["mean_iu"] == 0
    assert list(again["state_dict"]) == list(checkpoint["state_dict"])
    assert torch.equal(again["memory"], checkpoint["memory"])
    for name, tensor in checkpoint["state_dict"].items():
        assert again["state_dict"][name].dtype == tensor.dtype
        assert torch.equal(again["state_dict"][name], tensor), name


@pytest.mark.parametrize(
    "architecture",
    ["deeplabv2_resnet50", "deeplabv3plus_resnet101", "deeplabv3plus_mobilenet_v2_released", "deeplabv2_resnet18"],
)
def test_recognised_by_its_names(architecture: str) -> None:
    with torch.device("meta"):
        state_dict, _ = convert.to_released(build_model(architecture, 5, channels=8))
    assert released.recognise(state_dict) == architecture


def test_what_is_not_recognised_is_said() -> None:
    with pytest.raises(ValueError, match=r"neither aspp.features.\* nor aspp.conv2d_list"):
        released.recognise(["layer0.0.weight"])
    names = ["aspp.features.0.0.weight", *(f"layer{stage}.0.conv1.weight" for stage in (1, 2, 3, 4))]
    with pytest.raises(ValueError, match=r"stages of 1, 1, 1, 1 blocks: expected 2, 2, 2, 2 \(resnet18\); 3, 4, 6, 3"):
        released.recognise(names)


@pytest.mark.parametrize("kind", ["none", "ibn", "isw"])
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2_released"])
def test_instance_norms_are_recognised(backbone: str, kind: str) -> None:
    model = build_model(f"deeplabv3plus_{backbone}", 5, channels=8, memory=False, instance_norm=kind)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.uniform_(0.4, 0.8)
    state_dict, _ = convert.to_released(model.eval())
    # stem and the ends of two stages: names of the released code's --wt_layer 0 0 4 4 4 0 0
    last = {"resnet18": ("layer1.1", "layer2.1"), "mobilenet_v2_released": ("layer0.1", "layer1.4", "layer2.3")}[
        backbone
    ]
    affine = {f"{block}.instance_norm_layer.{part}" for block in last for part in ("weight", "bias")}
    assert {name for name in state_dict if "instance_norm" in name} == (affine if kind == "ibn" else set())
    stem = {name for name in state_dict if name.startswith("layer0.1.")}
    if backbone == "resnet18":
        assert len(stem) == {"none": 5, "ibn": 2, "isw": 0}[kind]
    # a MobileNetV2 with isw has the names of one without
    said = kind if kind == "isw" and backbone != "resnet18" else None
    again = convert.from_released(state_dict, output_stride=16, instance_norm=said)
    assert again.settings == model.settings
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(images).logits, model(images).logits)


def test_what_a_checkpoint_holds_besides_is_told(small: Segmentor) -> None:
    checkpoint = released.to_released_checkpoint(small)
    checkpoint |= {"optimizer": {"state": {}}, "scheduler": {}, "epoch": 40, "mean_iu": 0.5}
    checkpoint["state_dict"]["module.criterion.weight"] = torch.ones(5)
    model, unused = released.from_released_checkpoint(checkpoint, SMALL, output_stride=16)
    assert unused == ["epoch (40)", "mean_iu (0.5)", "optimizer", "scheduler", "state_dict: module.criterion.weight"]
    assert model.settings == small.settings
    del checkpoint["memory"]
    with pytest.raises(ValueError, match="no key memory"):
        released.from_released_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"memory: expected a tensor \[K, C\], got a list"):
        released.from_released_checkpoint({**checkpoint, "memory": [1]})


def test_what_the_released_form_cannot_say_is_told() -> None:
    assert released.not_in_released(build_model("deeplabv3plus_mobilenet_v2_released", 5, channels=8)) == []
    model = build_model(SMALL, 7, channels=8, temperature=0.5, instance_norm="isw")
    model.label_space = "idd_lite7"
    assert released.not_in_released(model) == [
        "label space idd_lite7",
        "output stride 16 (taken to be 32)",
        "temperature 0.5 of the read (taken to be 1)",
        "the masks of the whitening loss",
    ]


def test_what_does_not_fit_is_listed(small: Segmentor) -> None:
    state_dict, memory = convert.to_released(small)
    del state_dict["layer1.0.conv1.weight"], state_dict["final1.4.bias"]
    state_dict["surplus.weight"] = torch.zeros(1)
    state_dict["dsn.4.weight"] = torch.zeros(6, 16, 1, 1)
    with pytest.raises(ValueError) as caught:
        convert.from_released(state_dict, memory, SMALL)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  missing: layer1.0.conv1.weight, final1.4.bias"
    assert lines[2] == "  unexpected: surplus.weight"
    assert lines[3] == "  of another shape: dsn.4.weight (6, 16, 1, 1), expected (5, 16, 1, 1)"


def test_a_memory_of_another_shape_is_refused(small: Segmentor) -> None:
    state_dict, _ = convert.to_released(small)
    with pytest.raises(ValueError, match=r"memory \(4, 8\), expected \(5, 8\)"):
        convert.from_released(state_dict, torch.zeros(4, 8), SMALL)


def test_misuse_is_named(small: Segmentor) -> None:
    state_dict, memory = convert.to_released(small)
    with pytest.raises(ValueError, match=r"pass checkpoint\['memory'\]"):
        convert.from_released(state_dict, None, SMALL)
    bare = {name: tensor for name, tensor in state_dict.items() if not name.startswith("memory.")}
    with pytest.raises(ValueError, match="no memory net"):
        convert.from_released(bare, memory, SMALL)
    with pytest.raises(ValueError, match="whole checkpoint"):
        convert.from_released({"state_dict": state_dict, "memory": memory}, None, SMALL)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="not a released DeepLab"):
        convert.from_released({"fc.weight": torch.zeros(1)}, None, SMALL)
    with pytest.raises(ValueError, match="Did you mean deeplabv2_resnet50 or deeplabv3plus_resnet50"):
        convert.from_released(state_dict, memory, "deeplabv3_resnet50")
    with pytest.raises(ValueError, match="no counterpart"):
        convert.to_released(build_model("deeplabv3plus_mobilenet_v2", 5, channels=8))


def test_a_name_with_and_without_prefix_is_refused() -> None:
    weights = released_weights({"final2.0.weight": [19, 8, 1, 1], "final2.0.bias": [19]})
    twice = weights | {"module.final2.0.bias": weights["final2.0.bias"]}
    with pytest.raises(ValueError, match=r"given twice, with 'module.' and without: final2.0.bias"):
        convert.from_released(twice)
