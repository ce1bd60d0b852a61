"""``Predictor``: what it says of an image is what the network says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import pmm_fast
from pmm_fast import ops
from pmm_fast.config import EVAL_PROTOCOLS, ConfigError
from pmm_fast.data import normalise
from pmm_fast.engine import build, predict
from pmm_fast.engine.predict import PredictionError, Predictor
from tests.tiny_network import fill_memory, noise, save_network, tiny_network
from tests.tolerances import MERGED_LOGITS

SIZE = (37, 50)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("network") / "network.pt")


@pytest.fixture(scope="module")
def predictor(path):
    return pmm_fast.Predictor(path, device="cpu")


def logits_of(image: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return tiny_network()(normalise(Image.fromarray(image))[None]).logits[0]


def assert_prediction(found: predict.Prediction, image: np.ndarray) -> None:
    """The most probable classes, where two are not as good as equal, and their probability."""
    logits = logits_of(image)
    tolerance = MERGED_LOGITS * logits.abs().max()
    expected = logits.softmax(0)
    assert found.ids.dtype == np.uint8 and found.confidence.dtype == np.float32
    assert found.ids.shape == found.confidence.shape == image.shape[:2]
    chosen = expected.gather(0, torch.from_numpy(found.ids)[None].long())[0]
    best = expected.max(0).values
    assert (best - chosen).max() <= tolerance
    assert abs(torch.from_numpy(found.confidence) - best).max() <= tolerance
    # several classes, so that this says something
    assert len(np.unique(found.ids)) > 3


def test_equal_to_the_network(predictor):
    image = noise(*SIZE)
    found = predictor(image)
    assert_prediction(found, image)
    assert np.array_equal(np.asarray(found.image), image)
    assert found.space.name == "cityscapes19" and found.probabilities is None


def test_with_weights_in_the_layout_of_tensor_cores(path, monkeypatch):
    """What a network gets on a GPU in mixed precision."""
    monkeypatch.setattr(build, "memory_format", lambda autocast, device: torch.channels_last)
    predictor = Predictor(path, device="cpu")
    filters = [weight for weight in predictor.model.parameters() if weight.dim() == 4 and min(weight.shape[1:]) > 1]
    assert filters and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in filters)
    image = noise(*SIZE)
    assert_prediction(predictor(image), image)


def test_every_kind_of_picture(predictor, tmp_path):
    image = noise(*SIZE)
    Image.fromarray(image).save(tmp_path / "a.png")
    expected = predictor(image)
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image)):
        assert np.array_equal(predictor(picture).ids, expected.ids)
    grey = Image.fromarray(image[..., 0])
    assert np.array_equal(predictor(grey).ids, predictor(grey.convert("RGB")).ids)
    turned = Image.fromarray(np.rot90(image))
    turned.getexif()[0x0112] = 6
    assert np.array_equal(predictor(turned).ids, expected.ids)
    assert predictor(noise(1, 1)).ids.shape == (1, 1)


def test_batches(predictor):
    images = [noise(*SIZE, seed) for seed in range(3)]
    for image, found in zip(images, predictor.batch(images), strict=True):
        assert_prediction(found, image)
    mixed = [images[0], noise(20, 60)]
    for image, found in zip(mixed, predictor.batch(mixed), strict=True):
        assert_prediction(found, image)
    assert predictor.batch([]) == []


def test_images_of_equal_size_go_together(predictor, monkeypatch):
    shapes = []
    run = predictor.model.predict_coarse
    monkeypatch.setattr(predictor.model, "predict_coarse", lambda *a: (shapes.append(tuple(a[0].shape)), run(*a))[1])
    predictor.batch([noise(*SIZE), noise(*SIZE)])
    assert shapes == [(2, 3, *SIZE)]
    shapes.clear()
    Predictor(predictor.model, "cpu", "sliding").batch([noise(*SIZE), noise(*SIZE)])
    assert shapes == [(1, 3, *SIZE)] * 2


@pytest.mark.parametrize("name", ["whole", "sliding", "pooling", "released-folder"])
def test_probabilities_of_every_class(predictor, name):
    image, protocol = noise(*SIZE), replace(EVAL_PROTOCOLS[name], crop=24)
    plain = Predictor(predictor.model, "cpu", protocol)(image)
    found = Predictor(predictor.model, "cpu", protocol, probabilities=True)(image)
    assert found.probabilities.dtype == np.float16 and found.probabilities.shape == (19, *SIZE)
    assert abs(found.probabilities.astype(np.float32).sum(0) - 1).max() < 1e-2
    assert (found.ids == plain.ids).mean() > 0.99
    assert abs(found.confidence - plain.confidence).max() <= MERGED_LOGITS * logits_of(image).abs().max()
    if name == "whole":
        assert abs(found.probabilities - logits_of(image).softmax(0).numpy()).max() < 1e-3
    else:
        assert not np.array_equal(found.confidence, predictor(image).confidence)


def test_noise_is_the_same_for_the_same_image(predictor):
    noisy = Predictor(predictor.model, "cpu", "released-train")
    image = noise(*SIZE)
    first, other = noisy(image), Predictor(predictor.model, "cpu", "released-train", seed=1)(image)
    assert np.array_equal(first.confidence, noisy.batch([noise(*SIZE, 1), image])[1].confidence)
    assert not np.array_equal(first.confidence, other.confidence)


def test_mixed_precision(predictor):
    image = noise(*SIZE)
    exact, found = predictor(image), Predictor(predictor.model, "cpu", amp=True)(image)
    assert not np.array_equal(exact.confidence, found.confidence) and found.confidence.dtype == np.float32
    assert (exact.ids == found.ids).mean() > 0.9


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((4, 4, 3), np.float32), r"expected uint8 \[H, W, 3\], RGB, got float32 \[4, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), r"got uint8 \[4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8 \[0, 4, 3\]"),
        (Image.new("I;16", (4, 4)), "expected 8 bits a channel, got mode I;16"),
        (None, "expected a path, a PIL image or a uint8 array, got NoneType"),
        ("nowhere.png", r"nowhere.png: cannot be read as an image"),
    ],
)
def test_wrong_pictures(predictor, image, reason):
    with pytest.raises(ValueError, match=reason):
        predictor(image)


def test_wrong_networks(tmp_path, predictor):
    with pytest.raises(ConfigError, match=r"eval\.protocol: expected one of whole, .* got 'slidng'.*sliding"):
        Predictor(predictor.model, "cpu", "slidng")
    with pytest.raises(ValueError, match="device: expected auto"):
        Predictor(predictor.model, "tpu")
    nameless = tiny_network()
    nameless.label_space = None
    with pytest.raises(PredictionError, match=r"does not say which classes"):
        Predictor(nameless)
    nameless.label_space = "camvid11" if nameless.num_classes != 11 else "cityscapes19"
    with pytest.raises(PredictionError, match=rf"the network has {nameless.num_classes} classes, its label space"):
        Predictor(nameless)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match=r"image.png: no checkpoint.*PNG"):
        Predictor(tmp_path / "image.png")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"amp_dtype": "float16"}, "amp_dtype: expected one of bf16, fp16, got 'float16'"),
        ({"tile_batch": -1}, "tile_batch: expected at least 0, got -1"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
    ],
)
def test_wrong_arguments(predictor, arguments, reason):
    with pytest.raises(PredictionError, match=reason):
        Predictor(predictor.model, "cpu", **arguments)


def raising(error: Exception):
    def refuse(*_: object) -> None:
        raise error

    return refuse


@pytest.mark.parametrize("full", [raising(torch.OutOfMemoryError("CUDA out of memory")), fill_memory])
def test_too_little_memory(predictor, monkeypatch, full):
    monkeypatch.setattr(predictor.model, "predict_coarse", full)
    with pytest.raises(PredictionError, match=r"cpu has too little memory for 1 image of 50 x 37; smaller"):
        predictor(noise(*SIZE))
    with pytest.raises(PredictionError, match=r"cpu has too little memory for 2 images of 50 x 37; smaller"):
        predictor.batch([noise(*SIZE)] * 2)


@pytest.mark.parametrize("count", [1, 2])
def test_what_the_network_cannot_predict(predictor, monkeypatch, count):
    images = [noise(*SIZE)] * count
    monkeypatch.setattr(predictor.model, "predict_coarse", raising(ValueError("maps of two positions or more")))
    with pytest.raises(PredictionError, match="maps of two positions"):
        predictor.batch(images)
    monkeypatch.setattr(predictor.model, "predict_coarse", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        predictor.batch(images)
    monkeypatch.undo()
    network = tiny_network()
    network.memory.slots[3] = torch.nan
    with pytest.raises(PredictionError, match="the network gives logits that are not finite"):
        Predictor(network, "cpu").batch(images)


def test_bytes_go_to_the_device(predictor, monkeypatch):
    seen, photometric = [], ops.photometric
    monkeypatch.setattr(ops, "photometric", lambda *a: (seen.append(a[0].dtype), photometric(*a))[1])
    predictor.batch([noise(*SIZE)] * 2)
    assert seen == [torch.uint8] * 2
