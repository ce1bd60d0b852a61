"""Features by a mean made by hand, and the read as the network reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pmm_fast import ops
from pmm_fast.data import normalise
from pmm_fast.engine.features import collect_features, memory_slots, read_assignment
from pmm_fast.models import Segmentor, build_model
from tests import tolerances

CPU = torch.device("cpu")
CLASSES = 5


class Domain:
    """Three images of noise; class k stands in the first 3 + i classes of image i, and a part is ignored."""

    name = "noise"

    def __len__(self) -> int:
        return 3

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        rng = np.random.default_rng(index)
        labels = rng.integers(0, 3 + index, (3, 4), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        labels[:8] = 255
        return Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)), labels


@pytest.fixture(scope="module")
def model() -> Segmentor:
    torch.manual_seed(0)
    network = build_model("deeplabv3plus_mobilenet_v2", CLASSES, channels=8, temperature=0.2)
    assert network.memory is not None
    network.memory.slots.copy_(F.normalize(torch.rand(CLASSES, 8), dim=1))
    return network.train()


def by_hand(model: Segmentor, index: int) -> dict[int, torch.Tensor]:
    """The formula in float64: normalised features, labels one-hot and sampled with corners aligned."""
    image, labels = Domain().load(index)
    model.eval()
    with torch.no_grad():
        feature = F.normalize(model.encoder(normalise(image)[None]).feature.double(), dim=1)[0]
    model.train()
    # ids above the classes are one class more, which is dropped
    ids = torch.from_numpy(np.minimum(labels, CLASSES)).long()
    onehot = F.one_hot(ids, CLASSES + 1).permute(2, 0, 1)[None].double()
    weights = F.interpolate(onehot, tuple(feature.shape[1:]), mode="bilinear", align_corners=True)[0, :CLASSES]
    return {
        k: F.normalize((weights[k] * feature).sum((1, 2)), dim=0) for k in range(CLASSES) if float(weights[k].sum())
    }


def test_points_are_the_mean_directions_of_each_class_and_image(model: Segmentor) -> None:
    found = collect_features(model, Domain(), [2, 0], CPU, progress=False)
    expected = [(index, k, point) for index in (2, 0) for k, point in by_hand(model, index).items()]
    assert found.domain == "noise" and found.points.dtype == np.float32 and found.classes.dtype == np.uint8
    assert found.images.tolist() == [index for index, _, _ in expected]
    assert found.classes.tolist() == [k for _, k, _ in expected]
    assert len({*found.classes.tolist()}) > 3
    points = torch.from_numpy(found.points)
    tolerance = tolerances.FORWARD[torch.float32]
    assert tolerances.relative_error(points, torch.stack([point for *_, point in expected])) < tolerance
    assert (points.norm(dim=1) - 1).abs().max() < tolerance


def test_it_runs_in_evaluation_mode_and_leaves_the_mode_alone(model: Segmentor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = collect_features(model.train(), Domain(), range(2), CPU, progress=False)
    weights = read_assignment(model, Domain().load(0)[0], CPU)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    second = collect_features(model.eval(), Domain(), range(2), CPU, progress=False)
    assert not model.training and np.array_equal(first.points, second.points)
    assert np.array_equal(weights, read_assignment(model, Domain().load(0)[0], CPU))


def test_assignment_is_that_of_the_network(model: Segmentor) -> None:
    image = Domain().load(1)[0]
    found = read_assignment(model, image, CPU)
    with torch.no_grad():
        expected = model.eval()(normalise(image)[None]).assignment
    model.train()
    assert expected is not None and found.dtype == np.float32
    assert np.array_equal(found, expected[0].numpy()) and found.sum(0) == pytest.approx(np.ones(found.shape[1:]))


def test_slots_are_those_of_the_memory_and_not_shared_with_it(model: Segmentor) -> None:
    assert model.memory is not None
    slots = memory_slots(model)
    assert np.array_equal(slots, model.memory.slots.numpy()) and slots.dtype == np.float32
    slots[:] = 0
    assert model.memory.slots.abs().max() > 0


def test_autocast_gives_nearly_the_same(model: Segmentor) -> None:
    exact = collect_features(model, Domain(), [0], CPU, progress=False)
    rounded = collect_features(model, Domain(), [0], CPU, torch.bfloat16, progress=False)
    assert rounded.points.dtype == np.float32 and not np.array_equal(exact.points, rounded.points)
    assert ((exact.points * rounded.points).sum(1) > 1 - tolerances.AUTOCAST_STEP).all()


def test_what_is_missing_or_wrong_is_named(model: Segmentor) -> None:
    with pytest.raises(ValueError, match="domain 'noise': expected samples"):
        collect_features(model, Domain(), [], CPU, progress=False)

    class Wrong(Domain):
        def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
            return super().load(index)[0], np.full((48, 64), 77, np.uint8)

    with pytest.raises(ValueError, match=r"domain 'noise', sample 1: .*77"):
        collect_features(model, Wrong(), [1], CPU, progress=False)
    plain = build_model("deeplabv3plus_mobilenet_v2", CLASSES, channels=8, memory=False)
    for call in (memory_slots, lambda network: read_assignment(network, Domain().load(0)[0], CPU)):
        with pytest.raises(ValueError, match="has no memory"):
            call(plain)


def test_an_image_without_labels_gives_no_points(model: Segmentor) -> None:
    class Unlabelled(Domain):
        def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
            return super().load(index)[0], np.full((48, 64), 255, np.uint8)

    found = collect_features(model, Unlabelled(), [0, 1], CPU, progress=False)
    assert found.points.shape == (0, 8) and found.classes.shape == (0,)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_the_network_gets_normalised_images_and_the_device_bytes(
    model: Segmentor, monkeypatch: pytest.MonkeyPatch, amp_dtype: torch.dtype | None
) -> None:
    bytes_seen, images_seen, photometric, image = [], [], ops.photometric, Domain().load(0)[0]
    monkeypatch.setattr(ops, "photometric", lambda *a: (bytes_seen.append(a[0].dtype), photometric(*a))[1])
    handle = model.encoder.register_forward_pre_hook(lambda module, arguments: images_seen.append(arguments[0]))
    collect_features(model, Domain(), [0], CPU, amp_dtype, progress=False)
    read_assignment(model, image, CPU, amp_dtype)
    handle.remove()
    assert bytes_seen == [torch.uint8] * 2 and len(images_seen) == 2
    assert all(torch.equal(seen, normalise(image)[None]) for seen in images_seen)
