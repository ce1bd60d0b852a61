"""Exponentials of numbers in registers: how many a GPU takes a second, for ``bench/harness.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDS = 256
_BLOCK = 1024


@triton.jit
def exponentials_kernel(numbers, out, size, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """x <- exp(-x), ROUNDS times; stays between 0 and 1."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(numbers + o_x, mask=o_x < size, other=0.0)
    for _ in range(ROUNDS):
        b_x = tl.exp(-b_x)
    tl.store(out + o_x, b_x, mask=o_x < size)


def exponentials(numbers: Tensor) -> Tensor:
    """The exponential of minus each float32 number, of that again, and so on, ``ROUNDS`` times; on a GPU."""
    out = torch.empty_like(numbers)
    exponentials_kernel[triton.cdiv(len(numbers), _BLOCK),](numbers, out, len(numbers), ROUNDS=ROUNDS, BLOCK=_BLOCK)
    return out
