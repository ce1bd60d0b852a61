"""t-SNE by what it must keep, and its picture by colours and places."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from pmm_fast.data import get_space
from pmm_fast.viz.curves import COLOURS
from pmm_fast.viz.embedding import draw_embedding, embed

SPACE = get_space("cityscapes19")


def clusters(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Twenty points around each of three directions, and the directions; the fourth is zero."""
    rng = np.random.default_rng(seed)
    slots = np.zeros((4, 6), np.float32)
    slots[:3, :3] = np.eye(3)
    points = slots[:3].repeat(20, 0) + rng.normal(0, 0.05, (60, 6))
    # length is no information
    return (points * rng.uniform(0.1, 9, (60, 1))).astype(np.float32), slots


@pytest.fixture(scope="module")
def embedded() -> np.ndarray:
    pytest.importorskip("sklearn")
    points, slots = clusters()
    return embed(points, slots)


def test_points_stay_with_their_slot(embedded: np.ndarray) -> None:
    points, slots = embedded[:60], embedded[60:]
    assert embedded.shape == (64, 2) and embedded.dtype == np.float32
    # the empty slot has no place
    assert np.isnan(slots[3]).all() and not np.isnan(embedded[:63]).any()
    distances = np.linalg.norm(points[:, None] - slots[None, :3], axis=2)
    assert (distances.argmin(1) == np.arange(3).repeat(20)).all()
    low, high = embedded[:63].min(0), embedded[:63].max(0)
    assert (low == 0).all() and high == pytest.approx([1, 1])


def test_length_does_not_matter_and_the_seed_repeats(embedded: np.ndarray) -> None:
    points, slots = clusters()
    # powers of two leave the directions as they are, bit for bit
    np.testing.assert_array_equal(embed(points * np.float32(4), slots / 2), embedded)


def test_the_number_of_threads_does_not_matter() -> None:
    pytest.importorskip("sklearn")
    limits = pytest.importorskip("threadpoolctl").threadpool_limits
    # enough for a product that is split among threads
    points = np.random.default_rng(0).normal(size=(200, 128)).astype(np.float32)
    found = []
    for threads in (1, 3):
        with limits(threads):
            found.append(embed(points))
    np.testing.assert_array_equal(*found)


def test_few_points_get_a_perplexity_that_fits() -> None:
    pytest.importorskip("sklearn")
    points, _ = clusters()
    assert not np.isnan(embed(points[:4])).any()
    with pytest.raises(ValueError, match="expected 4 or more vectors that are not zero, got 3"):
        embed(points[:3], np.zeros((5, 6)))
    with pytest.raises(ValueError, match="perplexity: expected above 0 and below 60, the vectors, got 60"):
        embed(points, perplexity=60)


def test_wrong_vectors_are_named() -> None:
    points, slots = clusters()
    with pytest.raises(ValueError, match="points have 6 channels, prototypes 5"):
        embed(points, slots[:, :5])
    with pytest.raises(ValueError, match=r"embed: points: expected floating point rows.*got int64 \[60, 6\]"):
        embed(points.astype(np.int64))
    with pytest.raises(ValueError, match="embed: prototypes: expected finite"):
        embed(points, np.full((2, 6), np.inf))


@pytest.mark.parametrize(("module", "call"), [("sklearn", "embed"), ("matplotlib", "draw")])
def test_a_missing_package_names_the_extra(module: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'pmm_fast\[viz\]'"):
        embed(clusters()[0]) if call == "embed" else draw()


# car and sky in the first domain, car in the second
XY = np.array([[0.1, 0.1], [0.9, 0.1], [0.5, 0.5]])
CLASSES, DOMAINS = np.array([13, 10, 13], np.uint8), np.array([0, 0, 1])


def draw(colour: str = "class", prototypes: np.ndarray | None = None) -> Image.Image:
    return draw_embedding(XY, CLASSES, DOMAINS, SPACE, ["noon", "night"], prototypes, colour)  # type: ignore[arg-type]


def places(picture: Image.Image, colour: tuple[int, ...]) -> list[tuple[float, float]]:
    """Where blobs of a colour stand in the square of the axes: shares of its width and height, from below left."""
    pixels = np.asarray(picture)
    dark = (pixels < 8).all(2)
    rows, columns = (np.nonzero(dark.sum(axis) > 500)[0] for axis in (1, 0))
    inside = pixels[rows[0] : rows[-1], columns[0] : columns[-1]]
    y, x = np.nonzero((inside == colour).all(2))
    spots: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for point in zip(x / inside.shape[1], 1 - y / inside.shape[0], strict=True):
        spots.setdefault((round(point[0] * 10), round(point[1] * 10)), []).append(point)
    return sorted((round(float(a), 1), round(float(b), 1)) for a, b in (np.mean(s, 0) for s in spots.values()))


def rgb(code: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(code[1:]))


def test_colours_are_of_classes_or_of_domains() -> None:
    pytest.importorskip("matplotlib")
    by_class, by_domain = draw("class"), draw("domain")
    assert places(by_class, SPACE.colours[13]) == [(0.1, 0.1), (0.5, 0.5)]
    assert places(by_class, SPACE.colours[10]) == [(0.9, 0.1)]
    assert places(by_domain, rgb(COLOURS[0])) == [(0.1, 0.1), (0.9, 0.1)]
    assert places(by_domain, rgb(COLOURS[1])) == [(0.5, 0.5)]
    assert places(by_domain, SPACE.colours[13]) == []


def test_slots_are_triangles_of_their_class_in_either_picture() -> None:
    pytest.importorskip("matplotlib")
    prototypes = np.full((19, 2), np.nan)
    prototypes[11] = 0.2, 0.8
    for colour in ("class", "domain"):
        picture = draw(colour, prototypes)
        assert places(picture, SPACE.colours[11]) == [(0.2, 0.8)]
        # and in the legend, where those without a place are not
        shown = {found for _, found in picture.getcolors(1 << 20) or []}
        assert SPACE.colours[11] in shown and SPACE.colours[0] not in shown


def test_ids_and_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="colour: expected class or domain, got 'image'"):
        draw("image")
    with pytest.raises(ValueError, match=r"classes: expected 0\.\.18, got 255"):
        draw_embedding(XY, np.array([0, 1, 255]), DOMAINS, SPACE, ["noon", "night"])
    with pytest.raises(ValueError, match=r"domains: expected 0\.\.0, got 1"):
        draw_embedding(XY, CLASSES, DOMAINS, SPACE, ["noon"])
    with pytest.raises(ValueError, match=r"classes: expected \[3\], got \[2\]"):
        draw_embedding(XY, CLASSES[:2], DOMAINS, SPACE, ["noon", "night"])
    with pytest.raises(ValueError, match=r"xy: expected \[N, 2\], got \[2, 3\]"):
        draw_embedding(XY.T[:2], CLASSES[:2], DOMAINS[:2], SPACE, ["noon", "night"])
    with pytest.raises(ValueError, match=r"prototype_xy: expected \[19, 2\], got \[7, 2\]"):
        draw("class", np.zeros((7, 2)))
