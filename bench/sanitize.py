"""Every kernel of a backend at small sizes, for ``compute-sanitizer ... python bench/sanitize.py`` on the C++ kernels.

All operators in three orders, at sizes that are no multiples of a vector or a tile, with as many channels as a real
feature, and in half precision; the merging of tiles; the looks.  Results are compared with the reference as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.memory_ops import first_line
from pmm_fast import ops
from pmm_fast.ops import backends
from tests.ops import looks, matrix, tiles

SIZES: tuple[dict[str, Any], ...] = (
    {"batch": 2, "channels": 5, "classes": 4, "size": (3, 5), "label_size": (7, 11)},
    {"batch": 1, "channels": 256, "classes": 19, "size": (12, 13), "label_size": (48, 50)},
    {"batch": 0, "channels": 5, "classes": 4, "size": (3, 4), "label_size": (6, 8)},
)
DTYPES = (torch.float32, torch.bfloat16)


def checks(target: matrix.Target) -> dict[str, Callable[[], object]]:
    """Every check by name."""
    found: dict[str, Callable[[], object]] = {}
    for name, case in matrix.CASES.items():
        for sizes in SIZES:
            for dtype in DTYPES:
                title = f"{name}, {sizes['channels']} channels of {sizes['size']}, {dtype}"
                found[title] = partial(compare, name, case, target, sizes, dtype)
    for name, tiling in tiles.CASES.items():
        found[f"merge_tiles, {name}"] = partial(merge, tiling, target)
    for size in ((13, 31), (40, 70)):
        found[f"photometric, {size}"] = partial(look, size, target)
    return found


def compare(name: str, case: matrix.Case, target: matrix.Target, sizes: dict[str, Any], dtype: torch.dtype) -> None:
    """An operator in three orders against the reference."""
    arguments = matrix.make(case, target.device, dtype=dtype, **sizes)
    matrix.compare(name, arguments, target, cancelling=0.1)


def merge(case: tiles.Case, target: matrix.Target) -> None:
    """Tiles against PyTorch's upsampling."""
    tiles.assert_merged(tiles.make(case).to(target.device), case.tiling)


def look(size: tuple[int, int], target: matrix.Target) -> None:
    """Looks, blurred and not, against Pillow."""
    images, wanted = looks.random_images(6, size), looks.random_looks(looks.ORDERS[:6], (1.3, 0.0))
    looks.assert_rendered(looks.photometric(images.to(target.device), wanted), images, wanted)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=("cuda", "triton", "cpu"), default="cuda", help="[cuda]")
    options = parser.parse_args(argv)
    if reason := backends.missing(options.backend):
        sys.exit(f"error: --backend {options.backend}: {reason}")
    target = matrix.Target(options.backend, "cpu" if options.backend == "cpu" else "cuda")
    failed = 0
    everything = checks(target)
    for title, check in everything.items():
        try:
            with ops.use_backend(options.backend):
                check()
                if target.device == "cuda":
                    torch.cuda.synchronize()
        except Exception as error:
            failed += 1
            print(f"FAILED: {title}: {first_line(error)}", flush=True)
    print(f"{options.backend}: {len(everything) - failed} of {len(everything)} checks passed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
