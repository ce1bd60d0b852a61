"""Milliseconds an image of ``ops.photometric``, every backend beside Pillow: ``python bench/photometric.py``.

Eight crops as the loaders deliver them (uint8, channels last), on a GPU if there is one, where calls follow one another
as fast as the host launches them.  A backend is timed only after its results were compared with Pillow's: the same
levels, but for a blur's rounding of ties.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import call_seconds
from bench.memory_ops import first_line, versions
from bench.report import write_json
from pmm_fast import ops
from pmm_fast.data.transforms import MEAN, NO_JITTER, STD, render
from pmm_fast.ops.backends import interpreted

IMAGES = 8
ROUNDS = 15
# a blur's level that is half-way may be rounded either way: at most this share of them, by one level
TIES = 5e-5
SIGMA = 1.3


def make_looks() -> dict[str, Tensor]:
    """Looks of each kind, float32 ``[8, 9]``: every third order of operations, strong factors, the widest blur."""
    rng = np.random.default_rng(0)
    orders = list(itertools.permutations(range(4)))[::3]
    jitter = [[*order, *rng.uniform(0.2, 1.8, 3), int(rng.integers(-76, 77))] for order in orders]
    plain = [list(NO_JITTER)] * IMAGES
    kinds = {"normalise": (plain, 0.0), "blur": (plain, SIGMA), "jitter": (jitter, 0.0), "both": (jitter, SIGMA)}
    return {
        kind: torch.tensor([[*row, sigma] for row in rows], dtype=torch.float32)
        for kind, (rows, sigma) in kinds.items()
    }


def make_images(side: int) -> Tensor:
    """uint8 ``[8, 3, side, side]``, channels last: smooth gradients with noise."""
    rng = np.random.default_rng(1)
    ramp = np.linspace(0, 200, side)
    pixels = ramp[:, None, None] * 0.5 + ramp[None, :, None] * 0.5 + rng.integers(0, 56, (IMAGES, side, side, 3))
    return torch.from_numpy(pixels.astype(np.uint8)).permute(0, 3, 1, 2)


def pillow(images: Tensor, looks: Tensor) -> Tensor:
    """The law in Pillow and NumPy, one image after the other."""
    pixels = images.permute(0, 2, 3, 1).numpy()
    return torch.stack([render(image, look) for image, look in zip(pixels, looks.numpy(), strict=True)])


def differs(found: Tensor, expected: Tensor, blurred: bool) -> str | None:
    """Why results are not those of Pillow, or None."""
    levels = (found.cpu() - expected).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    share = float((levels > 0.01).float().mean())
    # a NaN is not <= either
    if not levels.max() <= 1.01 or not share <= (TIES if blurred else 0):
        return f"{float(levels.max()):.3g} levels from Pillow at most, {share:.2e} of the values differ"
    return None


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """The median duration of a call, after two that warm up."""
    times = [call_seconds(call, device) for _ in range(ROUNDS + 2)]
    return 1e3 * statistics.median(times[2:])


def backends_on(device: torch.device) -> list[str]:
    """The backends that take images on a device."""
    takes = {"reference", device.type}
    if interpreted() == (device.type == "cpu"):
        takes.add("triton")
    return [name for name in ops.available_backends("photometric") if name in takes]


def run(images: Tensor, looks: Tensor) -> Tensor:
    """The operator on the backend that is chosen."""
    return ops.photometric(images, looks, MEAN, STD)


def measure(backend: str, images: Tensor, kinds: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Milliseconds an image by kind of look; nothing is timed before all kinds are right.

    Raises:
        ValueError: a result is not Pillow's.
    """
    call = pillow if backend == "pillow" else run
    with ops.use_backend("auto" if backend == "pillow" else backend):
        for kind, looks in kinds.items():
            if reason := differs(call(images, looks), expected[kind], kind in ("blur", "both")):
                raise ValueError(f"{kind}: {reason}")
        return {
            kind: median_ms(lambda looks=looks: call(images, looks), images.device) / IMAGES
            for kind, looks in kinds.items()
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=768, help="of the square crops, in pixels [768]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run [cuda if there is one]")
    parser.add_argument("--json", metavar="FILE", help="write the records here, as a list")
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    facts = versions(device.type)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    images, kinds = make_images(options.side), make_looks()
    expected = {kind: pillow(images, looks) for kind, looks in kinds.items()}
    records, failed = [], False
    print(f"{'backend':<12}" + "".join(f"{kind:>12}" for kind in kinds) + "   ms an image")
    for backend in ("pillow", *backends_on(device)):
        try:
            times = measure(backend, images if backend == "pillow" else images.to(device), kinds, expected)
        except Exception as error:
            print(f"gate: FAILED: {backend}: {first_line(error)}", flush=True)
            failed = True
            continue
        print(f"{backend:<12}" + "".join(f"{ms:>12.3f}" for ms in times.values()), flush=True)
        about = {"op": "photometric", "backend": backend, "side": options.side}
        records += [about | {"look": kind, "ms_per_image": ms} | facts for kind, ms in times.items()]
    if options.json:
        write_json(options.json, records)
    if failed:
        sys.exit("error: the gate failed, these were not timed")


if __name__ == "__main__":
    main()
