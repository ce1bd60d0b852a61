"""Generated streets: labelled street scenes in several domains, drawn on demand, for when no data set is at hand.

A scene has the 19 Cityscapes classes in a plausible perspective (see `streets_layout`, `streets_scene`); a domain
is a `StreetStyle`: camera, layout, palette, light, weather and sensor.  ``noon``, ``suburb`` and ``overcast`` are meant
to be trained on; ``night``, ``fog``, ``rain`` and ``winter`` are far enough from them that a network trained without
care fails there.  Everything follows from ``(domain, split, index, size)``.
"""

from __future__ import annotations

import difflib
import os
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import current_process, get_all_start_methods, get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pmm_fast.data.streets_render import render_surface
from pmm_fast.data.streets_scene import draw_scene
from pmm_fast.data.streets_style import STREETS, StreetStyle

__all__ = ["STREETS", "VERSION", "StreetStyle", "ensure_streets", "render"]

VERSION = 1  # raised whenever the pictures change, so that no cache mixes two generations
SMALLEST = 32  # pixels


def _style(domain: str) -> StreetStyle:
    """The style of a domain; raises `ValueError` with a suggestion for an unknown name."""
    if domain in STREETS:
        return STREETS[domain]
    close = difflib.get_close_matches(str(domain), STREETS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown street domain {domain!r}.{hint} Known: {', '.join(STREETS)}")


def _check_size(size: tuple[int, int]) -> tuple[int, int]:
    """``size`` as two ints; raises `ValueError` if a side is too small to draw a street in."""
    height, width = (int(side) for side in size)
    if min(height, width) < SMALLEST:
        raise ValueError(f"street images need at least {SMALLEST} x {SMALLEST} pixels, got {height} x {width}")
    return height, width


def render(
    domain: str, split: str, index: int, size: tuple[int, int] = (256, 512)
) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Draw one labelled street scene.

    Args:
        domain: a key of `STREETS`.
        split: any name; scenes of different splits never coincide.
        index: number of the scene, 0 or more.
        size: height and width in pixels.

    Returns:
        RGB image, and uint8 train ids ``[H, W]`` (0..18, 255 for what belongs to no class).

    Raises:
        ValueError: unknown domain, negative index, or a side below 32 pixels.
    """
    style = _style(domain)
    size = _check_size(size)
    if index < 0:
        raise ValueError(f"index must be 0 or more, got {index}")
    # crc32, since Python's own hash of strings changes from one process to the next
    seed = [zlib.crc32(domain.encode()), zlib.crc32(split.encode()), index, VERSION]
    rng = np.random.default_rng(seed)
    return render_surface(draw_scene(style, rng, size), style, rng)


def _replace(image: Image.Image, path: Path) -> None:
    """Write a PNG so that the file is either absent or whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # low compression: noise does not compress, and writing is a fifth of the time
        image.save(part, format="PNG", compress_level=1)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write(task: tuple[str, str, int, tuple[int, int], Path]) -> None:
    """Draw one scene into the cache; the label first, so that an image implies its label."""
    domain, split, index, size, root = task
    image, label = render(domain, split, index, size)
    name = f"{index:05d}.png"
    _replace(Image.fromarray(label), root / "labels" / split / name)
    _replace(image, root / "images" / split / name)


def _cache_folder(cache: Path | None) -> Path:
    """The cache: the argument, else ``PMM_FAST_CACHE``, else ``~/.cache/pmm_fast``."""
    chosen = cache or os.environ.get("PMM_FAST_CACHE") or "~/.cache/pmm_fast"
    return Path(chosen).expanduser()


def ensure_streets(
    domain: str, split: str, count: int, size: tuple[int, int], cache: Path | None = None, progress: bool = True
) -> Path:
    """Make sure that scenes 0 to ``count - 1`` of a domain lie on disk; only missing files are drawn.

    Files are ``<cache>/streets-v<VERSION>-<H>x<W>/<domain>/{images,labels}/<split>/NNNNN.png``.

    Args:
        domain: a key of `STREETS`.
        split: ``train`` or ``val`` (any folder name will do).
        count: how many scenes, 1 or more.
        size: height and width in pixels.
        cache: folder to keep them in; default ``$PMM_FAST_CACHE`` or ``~/.cache/pmm_fast``.
        progress: show a progress bar with the time left.

    Returns:
        The domain's folder, which holds ``images`` and ``labels``.

    Raises:
        ValueError: unknown domain, ``count`` below 1, a side below 32 pixels, or a split that is no folder name.
        OSError: the cache cannot be written.
    """
    _style(domain)
    height, width = _check_size(size)
    if count < 1:
        raise ValueError(f"count must be 1 or more, got {count}")
    if not split or split in (".", "..") or Path(split).name != split:
        raise ValueError(f"split must be a plain folder name, got {split!r}")
    folder = _cache_folder(cache)
    root = folder / f"streets-v{VERSION}-{height}x{width}" / domain
    try:
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            if not os.access(root / kind / split, os.W_OK | os.X_OK):
                raise PermissionError("no permission to write")
    except OSError as error:
        message = f"cannot write the cache of generated streets in {folder}: {error.strerror or error}"
        raise OSError(f"{message}; choose another folder with data.cache or PMM_FAST_CACHE") from error
    have = {kind: {entry.name for entry in os.scandir(root / kind / split)} for kind in ("images", "labels")}
    names = [f"{index:05d}.png" for index in range(count)]
    missing = [i for i, name in enumerate(names) if name not in have["images"] or name not in have["labels"]]
    tasks = [(domain, split, index, (height, width), root) for index in missing]
    if tasks:
        _write_all(tasks, f"drawing streets/{domain} {split}", progress)
    return root


def _write_all(tasks: list[tuple[str, str, int, tuple[int, int], Path]], title: str, progress: bool) -> None:
    """Draw the scenes, on all cores if there are enough of them to pay for starting processes."""
    workers = min(os.cpu_count() or 1, len(tasks))
    bar = tqdm(total=len(tasks), desc=title, unit="image", disable=not progress)
    with bar:
        # a worker of a data loader may not start processes of its own
        if workers == 1 or len(tasks) < 16 or current_process().daemon:
            for task in tasks:
                _write(task)
                bar.update()
            return
        # fork, as torch's data loader does: spawn would run an unguarded script of the caller again in each worker
        method = "fork" if "fork" in get_all_start_methods() else "spawn"
        with ProcessPoolExecutor(workers, mp_context=get_context(method)) as pool:
            for _ in pool.map(_write, tasks, chunksize=4):
                bar.update()
