"""Released checkpoints: the same numbers, the same names, and nothing skipped."""

from __future__ import annotations

import pytest
import torch

from pmm_fast import convert
from pmm_fast.models import Segmentor, build_model
from tests.released import load, released_keys, released_slots, released_weights
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
    again = convert.from_released(state_dict, memory, architecture)
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
