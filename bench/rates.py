"""The ceilings of a device, a second: bytes copied, exponentials, products of matrices: ``python bench/rates.py``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import harness
from bench.memory_ops import versions

# side of the matrices, so that a product fills the device
SIDE_GPU, SIDE_CPU = 8192, 512


def matrix_rate(device: torch.device, dtype: torch.dtype, tf32: bool) -> float:
    """Floating-point operations a second of a product of two matrices of random numbers, two for a multiply-add.

    Args:
        device: where.
        dtype: of the matrices.
        tf32: whether float32 may be rounded to TF32 on a GPU.
    """
    side = SIDE_GPU if device.type == "cuda" else SIDE_CPU
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = torch.empty(side, side, device=device, dtype=dtype)
        seconds = harness.least_seconds(lambda: torch.mm(left, right, out=product), device, 0.3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / seconds


def measure(device: torch.device) -> dict[str, float]:
    """All rates, a second, by name."""
    return harness.measure_rates(device).facts() | {
        "bf16_flops_per_s": matrix_rate(device, torch.bfloat16, False),
        "tf32_flops_per_s": matrix_rate(device, torch.float32, True),
        "float32_flops_per_s": matrix_rate(device, torch.float32, False),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[cuda if there is one]")
    parser.add_argument("--json", metavar="FILE", help="write the rates here")
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(", ".join(f"{key} {value}" for key, value in versions(device.type).items()))
    found = measure(device)
    for name, value in found.items():
        print(f"{name:<24}{value / 1e9:>12.1f} G")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
