"""t-SNE of features and memory slots, and its picture (extra: viz).

N points, K slots, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from pmm_fast.data.labels import LabelSpace
from pmm_fast.viz.curves import COLOURS

PERPLEXITY = 50.0
"""That of the released code; fewer than 151 vectors get a third of their number."""

FEWEST = 4

# one a domain, none a triangle: those are the slots
_MARKERS = ("o", "s", "X", "D", "P", "p", "*", "h")


def embed(
    points: np.ndarray, prototypes: np.ndarray | None = None, seed: int = 304, perplexity: float | None = None
) -> np.ndarray:
    """Two-dimensional t-SNE of unit vectors, so that distance goes by cosine (``|a - b|^2 = 2 - 2 cos``).

    Rows are normalised first.  A row of zeros, such as an empty slot, has no direction and is left out.  The same
    input and seed give the same result, however many threads there are.

    Args:
        points: features, floating point ``[N, C]``.
        prototypes: slots, floating point ``[K, C]``, or None.
        seed: of the optimisation.
        perplexity: about how many neighbours count; None: ``PERPLEXITY``, less for few vectors.

    Returns:
        float32 ``[N + K, 2]``, prototypes last, both coordinates in 0..1; NaN for rows that were left out.

    Raises:
        ImportError: scikit-learn is missing; names the extra.
        ValueError: wrong shapes, values that are not finite, fewer than four vectors, or a perplexity that is not
            above 0 and below their number.
    """
    vectors = _rows("points", points)
    if prototypes is not None:
        slots = _rows("prototypes", prototypes)
        if slots.shape[1] != vectors.shape[1]:
            raise ValueError(f"embed: points have {vectors.shape[1]} channels, prototypes {slots.shape[1]}")
        vectors = np.concatenate([vectors, slots])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    there = norms[:, 0] > 0
    count = int(there.sum())
    if count < FEWEST:
        raise ValueError(f"embed: expected {FEWEST} or more vectors that are not zero, got {count}")
    if perplexity is None:
        perplexity = min(PERPLEXITY, (count - 1) / 3)
    if not 0 < perplexity < count:
        raise ValueError(f"embed: perplexity: expected above 0 and below {count}, the vectors, got {perplexity}")
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn: pip install 'pmm_fast[viz]'") from error
    units = (vectors[there] / norms[there]).astype(np.float32)
    # several threads add up in another order, which t-SNE amplifies into another picture
    with threadpool_limits(1):
        found = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed).fit_transform(units)
    low, span = found.min(0), np.ptp(found, axis=0)
    result = np.full((len(vectors), 2), np.nan, np.float32)
    result[there] = np.divide(found - low, span, out=np.full_like(found, 0.5), where=span > 0)
    return result


def _rows(name: str, vectors: np.ndarray) -> np.ndarray:
    if vectors.ndim != 2 or vectors.shape[1] < 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise ValueError(
            f"embed: {name}: expected floating point rows of two or more channels, "
            f"got {vectors.dtype} {list(vectors.shape)}"
        )
    if not np.isfinite(vectors).all():
        raise ValueError(f"embed: {name}: expected finite values, got NaN or infinity")
    return vectors.astype(np.float64)


def draw_embedding(
    xy: np.ndarray,
    classes: np.ndarray,
    domains: np.ndarray,
    space: LabelSpace,
    domain_names: Sequence[str],
    prototype_xy: np.ndarray | None = None,
    colour: Literal["class", "domain"] = "class",
    title: str = "",
) -> Image.Image:
    """Draw an embedding: a mark a point, its shape the domain, its colour the class or the domain; slots as triangles.

    Args:
        xy: of the points, ``[N, 2]``.
        classes: id of each point's class, ``[N]``.
        domains: position in ``domain_names`` of each point's domain, ``[N]``.
        space: names and colours of the classes; slots have these colours in either picture.
        domain_names: one a domain.
        prototype_xy: of the slots, ``[K, 2]``, or None; rows of NaN are not drawn.
        colour: what the colour of a point means.
        title: above the picture.

    Returns:
        RGB image with a legend of what it shows.

    Raises:
        ImportError: matplotlib is missing; names the extra.
        ValueError: shapes that do not fit, or ids outside the space or the names.
    """
    _check(xy, classes, domains, space, domain_names, prototype_xy, colour)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing an embedding needs matplotlib: pip install 'pmm_fast[viz]'") from error
    figure = Figure(figsize=(8.4, 6.2), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=[], yticks=[], title=title)
    axes.set_box_aspect(1)
    axes.set_anchor("W")
    _draw_points(axes, xy, classes, domains, space, colour)
    slots = [] if prototype_xy is None else _draw_prototypes(axes, prototype_xy, space)
    handles = _legend(classes, slots, space, domain_names, colour)
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _check(
    xy: np.ndarray,
    classes: np.ndarray,
    domains: np.ndarray,
    space: LabelSpace,
    domain_names: Sequence[str],
    prototype_xy: np.ndarray | None,
    colour: str,
) -> None:
    if colour not in ("class", "domain"):
        raise ValueError(f"draw_embedding: colour: expected class or domain, got {colour!r}")
    if xy.shape != (len(xy), 2):
        raise ValueError(f"draw_embedding: xy: expected [N, 2], got {list(xy.shape)}")
    for name, ids, known in (("classes", classes, space.num_classes), ("domains", domains, len(domain_names))):
        if ids.shape != (len(xy),):
            raise ValueError(f"draw_embedding: {name}: expected [{len(xy)}], got {list(ids.shape)}")
        wrong = ids[(ids < 0) | (ids >= known)]
        if wrong.size:
            raise ValueError(f"draw_embedding: {name}: expected 0..{known - 1}, got {wrong[0]}")
    if prototype_xy is not None and prototype_xy.shape != (space.num_classes, 2):
        raise ValueError(
            f"draw_embedding: prototype_xy: expected [{space.num_classes}, 2], got {list(prototype_xy.shape)}"
        )


def _draw_points(
    axes: Any, xy: np.ndarray, classes: np.ndarray, domains: np.ndarray, space: LabelSpace, colour: str
) -> None:
    size = 32 if len(xy) < 2000 else 14
    for domain in np.unique(domains):
        for index in np.unique(classes[domains == domain]):
            chosen = (classes == index) & (domains == domain)
            paint = _class_colour(space, index) if colour == "class" else _domain_colour(domain)
            axes.scatter(*xy[chosen].T, s=size, color=paint, marker=_marker(domain), edgecolors="white", linewidths=0.3)


def _draw_prototypes(axes: Any, xy: np.ndarray, space: LabelSpace) -> list[int]:
    """Scatter the slots; the classes of those that are there."""
    there = [k for k in range(space.num_classes) if not np.isnan(xy[k]).any()]
    for k in there:
        axes.scatter(*xy[k], s=110, color=_class_colour(space, k), marker="^", edgecolors="black", linewidths=1.2)
    return there


def _legend(
    classes: np.ndarray, slots: Sequence[int], space: LabelSpace, domain_names: Sequence[str], colour: str
) -> list[Any]:
    """The shape of each domain, and the colour of each class as far as the picture has any."""
    if colour == "domain":
        handles = [_handle(_domain_colour(d), _marker(d), name) for d, name in enumerate(domain_names)]
        return handles + [_handle(_class_colour(space, k), "^", f"slot: {space.classes[k]}", "black") for k in slots]
    handles = [_handle("#777777", _marker(d), name) for d, name in enumerate(domain_names)]
    handles += [_handle(_class_colour(space, k), "o", space.classes[k]) for k in sorted({*classes.tolist(), *slots})]
    return handles + ([_handle("white", "^", "memory slots", "black")] if slots else [])


def _class_colour(space: LabelSpace, index: int) -> tuple[float, ...]:
    return tuple(channel / 255 for channel in space.colours[index])


def _domain_colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def _handle(colour: Any, marker: str, name: str, edge: str = "white") -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=colour,
        marker=marker,
        linestyle="",
        markersize=8,
        markeredgecolor=edge,
        markeredgewidth=0.8,
        label=name,
    )
