"""The augmentation against plain implementations: whole-image resize, float64 blur, colour arithmetic by formula."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pmm_fast.data.labels import IGNORE
from pmm_fast.data.transforms import (
    JITTER,
    MEAN,
    STD,
    STRONG_JITTER,
    Augment,
    colour_jitter,
    crop_image,
    crop_labels,
    denormalise,
    draw_window,
    gaussian_blur,
    normalise,
    shift_hue,
    transform,
)

PLAIN = {"scale": (1.0, 1.0), "flip": 0.0, "jitter": 0.0, "blur": False}


def apply(augment: Augment, image: Image.Image, labels: np.ndarray, rng: np.random.Generator, strong: bool = False):
    """A transform drawn and carried out in full: the normalised image and its labels."""
    return transform(image, labels, augment.draw(image.size, rng, strong))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def plain_crop(image: Image.Image, labels: np.ndarray, crop: tuple[int, int], factor: float, u: tuple[float, float]):
    """The released order of work: resize everything, add the border, cut; ``u`` places the crop, 0..1."""
    scaled = (max(1, int(image.width * factor)), max(1, int(image.height * factor)))
    # columns, then rows, as Pillow did when the released code was written
    image = image.resize((scaled[0], image.height), Image.Resampling.BICUBIC)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    mask = Image.fromarray(labels).resize(scaled, Image.Resampling.NEAREST)
    pad = [(target - side) // 2 + 1 if target > side else 0 for side, target in zip(scaled, crop[::-1], strict=True)]
    if any(pad):
        image = ImageOps.expand(image, border=(*pad, *pad), fill=(0, 0, 0))
        mask = ImageOps.expand(mask, border=(*pad, *pad), fill=IGNORE)
    x, y = (round(v * (side - target)) for v, side, target in zip(u, image.size, crop[::-1], strict=True))
    box = (x, y, x + crop[1], y + crop[0])
    return np.asarray(image.crop(box)).astype(int), np.asarray(mask.crop(box)), (scaled, x - pad[0], y - pad[1])


class Scripted:
    """Stands in for a generator: ``draw_window`` gets the factor and the places that a test wants."""

    def __init__(self, factor: float, u: tuple[float, float]) -> None:
        self.factor, self.u = factor, list(u)

    def uniform(self, low: float, high: float) -> float:
        return self.factor

    def integers(self, low: int, high: int) -> int:
        return low + round(self.u.pop(0) * (high - 1 - low))


# --- scale and crop -----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    crop=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    factor=st.floats(0.5, 2.0),
    u=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_crop_equals_resizing_everything(
    size: tuple[int, int], crop: tuple[int, int], factor: float, u: tuple[float, float]
) -> None:
    pixels = noise(*size)
    labels = np.random.default_rng(1).integers(0, 19, size).astype(np.uint8)
    image = Image.fromarray(pixels)
    expected, expected_labels, place = plain_crop(image, labels, crop, factor, u)
    window = draw_window(image.size, crop, (0.5, 2.0), Scripted(factor, u))  # type: ignore[arg-type]
    assert (window.scaled, window.left, window.top) == place
    got = np.asarray(crop_image(image, window)).astype(int)
    assert got.shape == (*crop, 3)
    # the box is single precision: a value at a tie may round the other way, and so once more in the second pass
    assert np.abs(got - expected).max() <= 2
    for step in (1, -1):
        got_labels = crop_labels(labels, window, mirror=step < 0)
        assert got_labels.dtype == np.uint8 and got_labels.flags.c_contiguous
        np.testing.assert_array_equal(got_labels, expected_labels[:, ::step])


@pytest.mark.parametrize("factor", [0.5, 0.731, 1.0, 1.37, 2.0])
def test_crop_of_a_full_size_image(factor: float) -> None:
    # large coordinates: the box is single precision inside Pillow, the nearest positions are sums of many steps
    labels = np.random.default_rng(1).integers(0, 256, (526, 957)).astype(np.uint8)
    image = Image.fromarray(noise(526, 957))
    expected, expected_labels, _ = plain_crop(image, labels, (256, 384), factor, (0.77, 0.91))
    window = draw_window(image.size, (256, 384), (0.5, 2.0), Scripted(factor, (0.77, 0.91)))  # type: ignore[arg-type]
    difference = np.abs(np.asarray(crop_image(image, window)).astype(int) - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 5e-3
    np.testing.assert_array_equal(crop_labels(labels, window), expected_labels)


def test_scale_and_place_are_uniform() -> None:
    rng = np.random.default_rng(0)
    windows = [draw_window((100, 60), (20, 30), (0.5, 2.0), rng) for _ in range(4000)]
    widths = np.array([w.scaled[0] for w in windows])
    # width / 100 is the factor: mean 1.25, standard deviation 1.5 / sqrt(12); five standard errors
    assert abs(widths.mean() / 100 - 1.245) < 5 * 0.433 / 4000**0.5
    assert abs(widths.std() / 100 - 0.433) < 0.02 and widths.min() < 52 and widths.max() > 198
    assert all(abs(w.scaled[1] - 0.6 * w.scaled[0]) <= 1 for w in windows)
    for corner, room in (
        ([w.left for w in windows], [w.scaled[0] - 30 for w in windows]),
        ([w.top for w in windows], [w.scaled[1] - 20 for w in windows]),
    ):
        place = np.array(corner) / np.array(room)
        assert place.min() == 0 and place.max() == 1
        assert abs(place.mean() - 0.5) < 5 * 0.29 / 4000**0.5 and abs(place.std() - 0.289) < 0.02


def test_border_of_a_small_image() -> None:
    # 10 wide, crop 15: border (15 - 10) // 2 + 1 = 3 at both ends, so the crop begins at -3 .. -2
    rng = np.random.default_rng(0)
    lefts = {draw_window((10, 40), (15, 15), (1.0, 1.0), rng).left for _ in range(50)}
    assert lefts == {-3, -2}
    white = Image.new("RGB", (10, 40), "white")
    image, labels = apply(Augment((15, 15), **PLAIN), white, np.zeros((40, 10), np.uint8), rng)
    assert (labels == IGNORE).any(0).sum() == 5 and (labels == 0).sum() == 150
    assert (denormalise(image)[labels.numpy() == IGNORE] == 0).all()
    assert (denormalise(image)[labels.numpy() == 0] == 255).all()


# --- the whole transform --------------------------------------------------------------------------------------------


def test_nothing_random_is_the_identity() -> None:
    pixels, labels = noise(24, 32), np.arange(24 * 32, dtype=np.uint8).reshape(24, 32)
    image, target = apply(Augment((24, 32), **PLAIN), Image.fromarray(pixels), labels, np.random.default_rng(0))
    assert image.dtype == torch.float32 and target.dtype == torch.uint8 and image.is_contiguous()
    assert torch.equal(image, normalise(Image.fromarray(pixels)))
    np.testing.assert_array_equal(target, labels)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    crop=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 2**32),
)
def test_any_size_works(size: tuple[int, int], crop: tuple[int, int], seed: int) -> None:
    augment = Augment(crop, (0.5, 2.0), flip=0.5, jitter=0.5, blur=True)
    rng = np.random.default_rng(seed)
    image, labels = apply(augment, Image.fromarray(noise(*size)), np.zeros(size, np.uint8), rng)
    assert image.shape == (3, *crop) and labels.shape == crop
    assert image.isfinite().all() and set(labels.unique().tolist()) <= {0, IGNORE}


def test_mirror_turns_image_and_labels_together_half_of_the_time() -> None:
    pixels, labels = noise(4, 6), np.arange(24, dtype=np.uint8).reshape(4, 6)
    augment = Augment((4, 6), **{**PLAIN, "flip": 0.5})
    count = 0
    for seed in range(400):
        image, target = apply(augment, Image.fromarray(pixels), labels, np.random.default_rng(seed))
        mirrored = bool(target[0, 0] == 5)
        step = -1 if mirrored else 1
        np.testing.assert_array_equal(target, labels[:, ::step])
        np.testing.assert_array_equal(denormalise(image), pixels[:, ::step])
        count += mirrored
    assert abs(count - 200) < 50  # five standard deviations of 10


def test_shares_of_jitter_and_blur() -> None:
    pixels, labels = noise(6, 6), np.zeros((6, 6), np.uint8)

    def changed(count: int, strong: bool = False, **options: object) -> int:
        augment, image = Augment((6, 6), **{**PLAIN, **options}), Image.fromarray(pixels)  # type: ignore[arg-type]
        results = (apply(augment, image, labels, np.random.default_rng(seed), strong)[0] for seed in range(count))
        return sum(bool((denormalise(result) != pixels).any()) for result in results)

    assert abs(changed(400, jitter=0.5) - 200) < 50
    assert changed(50, strong=True) == 50
    # a sigma below about 0.29 changes no rounded value: one in eight
    assert 30 <= changed(50, blur=True) < 50


@pytest.mark.parametrize("strong", [False, True])
def test_jitter_factors_fill_their_ranges(strong: bool) -> None:
    augment = Augment((2, 2), **{**PLAIN, "jitter": 0.0 if strong else 1.0})
    looks = np.array([augment.draw((2, 2), np.random.default_rng(seed), strong).look for seed in range(1000)])
    assert looks.dtype == np.float32 and (looks[:, 8] == 0).all() and (looks[:, 7] == np.trunc(looks[:, 7])).all()
    # the shift of hue is in steps of 1/256, of which it may use 255
    drawn = np.concatenate([looks[:, 4:7], looks[:, 7:8] / 255, looks[:, :4]], 1)
    for column, (strength, centre) in enumerate(zip(STRONG_JITTER if strong else JITTER, (1, 1, 1, 0), strict=True)):
        assert np.abs(drawn[:, column] - centre).max() <= strength
        assert abs(drawn[:, column].min() - (centre - strength)) < 0.02 * strength
        assert abs(drawn[:, column].max() - (centre + strength)) < 0.02 * strength
        assert abs(drawn[:, column].mean() - centre) < 0.1 * strength
    assert len({tuple(row) for row in drawn[:, 4:]}) == 24


def test_options_do_not_shift_the_random_numbers() -> None:
    ends = set()
    for options in ({}, {"flip": 1.0}, {"jitter": 1.0}, {"blur": True}):
        for strong in (False, True):
            rng = np.random.default_rng(5)
            Augment((8, 8), **{**PLAIN, **options}).draw((9, 9), rng, strong)
            ends.add(rng.random())
    assert len(ends) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": (0, 8)}, r"crop: expected .* got \[0, 8\]"),
        ({"crop": (8,)}, r"crop: expected .* got \[8\]"),
        ({"scale": (2.0, 0.5)}, r"scale: expected .* got \[2.0, 0.5\]"),
        ({"scale": (0.0, 0.5)}, r"scale: expected .* got \[0.0, 0.5\]"),
        ({"flip": 1.5}, r"flip: expected a probability in \[0, 1\], got 1.5"),
        ({"jitter": -0.5}, r"jitter: expected a probability in \[0, 1\], got -0.5"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**{"crop": (8, 8), **PLAIN, **options})


# --- colour, blur, normalisation --------------------------------------------------------------------------------------


def plain_jitter(pixels: np.ndarray, step: int, factor: float) -> np.ndarray:
    values = pixels.astype(float)
    grey = values @ [0.299, 0.587, 0.114]
    other = (0.0, np.floor(grey.mean() + 0.5), grey[..., None])[step]
    return np.clip(other + (values - other) * factor, 0, 255)


@pytest.mark.parametrize("factor", [0.2, 0.6, 1.0, 1.4, 1.8])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_brightness_contrast_saturation(step: int, factor: float) -> None:
    pixels = noise(16, 16)
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[step] = factor
    got = np.asarray(colour_jitter(Image.fromarray(pixels), factors, [step])).astype(float)
    # Pillow truncates, and its grey is rounded to a level
    assert np.abs(got - plain_jitter(pixels, step, factor)).max() <= 2


@pytest.mark.parametrize("shift", [-76, -25, 0, 25, 76])
def test_hue_turns(shift: float) -> None:
    pixels = np.array([[(200, 40, 40), (40, 200, 40), (60, 60, 220), (180, 180, 30), (128, 128, 128)]], np.uint8)
    got = np.asarray(shift_hue(Image.fromarray(pixels), shift)).astype(int)
    for before, after in zip(pixels[0] / 255, got[0], strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = np.array(colorsys.hsv_to_rgb((hue + shift / 255) % 1, saturation, value)) * 255
        # hue has 256 steps, each up to 6 * 180 / 256 levels of a channel, and is rounded twice
        assert np.abs(after - expected).max() <= 9


@pytest.mark.parametrize("shift", [-76, -1, 25, 76])
def test_hue_wraps_in_eight_bits(shift: float) -> None:
    image = Image.fromarray(noise(32, 32))
    planes = np.array(image.convert("HSV"))
    planes[..., 0] = (planes[..., 0].astype(int) + shift).astype(np.uint8)
    expected = np.asarray(Image.fromarray(planes, "HSV").convert("RGB"))
    np.testing.assert_array_equal(np.asarray(shift_hue(image, shift)), expected)


def test_jitter_keeps_its_order() -> None:
    image, factors = Image.fromarray(noise(8, 8)), [1.4, 0.6, 1.3, 25]
    by_hand = plain_jitter(plain_jitter(np.asarray(image), 0, 1.4), 1, 0.6)
    got = np.asarray(colour_jitter(image, factors, [0, 1])).astype(float)
    assert np.abs(got - by_hand).max() <= 3
    other = np.asarray(colour_jitter(image, factors, [1, 0])).astype(float)
    assert np.abs(got - other).max() > 10


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(st.integers(1, 70), st.integers(1, 20)), sigma=st.floats(0.15, 1.3), seed=st.integers(0, 99))
def test_blur_against_float64(size: tuple[int, int], sigma: float, seed: int) -> None:
    pixels = noise(*size, seed)
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    padded = np.pad(pixels.astype(float), ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    expected = sum(
        taps[i] * taps[j] * padded[i : i + size[0], j : j + size[1]] for i in range(len(taps)) for j in range(len(taps))
    )
    got = gaussian_blur(pixels, sigma)
    assert got.dtype == torch.float32 and got.shape == (3, *size) and got.is_contiguous()
    assert torch.equal(got, got.round())
    # rounded to nearest; float32 may decide a tie the other way
    assert np.abs(got.permute(1, 2, 0).double().numpy() - expected).max() <= 0.5 + 1e-3


def test_normalise_is_imagenet() -> None:
    pixels = noise(7, 9)
    expected = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    got = normalise(Image.fromarray(pixels))
    assert got.dtype == torch.float32 and got.shape == (3, 7, 9) and got.is_contiguous()
    np.testing.assert_allclose(got.permute(1, 2, 0), expected, atol=2e-6)
    with pytest.raises(ValueError, match="expected mode RGB, got L"):
        normalise(Image.new("L", (2, 2)))


def test_denormalise_returns_every_level() -> None:
    pixels = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    np.testing.assert_array_equal(denormalise(normalise(Image.fromarray(pixels))), pixels)
    assert denormalise(torch.full((3, 1, 1), 99.0)).max() == 255
