"""Launches of the kernels of _walk.py: how many programs, and how much each holds.

Letters: see _common.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from pmm_fast.kernels._common import (
    OPTIONS,
    Labels,
    Map,
    aligned_axis,
    as_map,
    compute_dtype,
    resident_programs,
    scalar_bits,
    triton_dtype,
)
from pmm_fast.kernels._walk import Grid, Memory, outer_kernel, pool_kernel, total_kernel
from torch import Tensor

# kernels that visit each position by itself.  Triton lays a product of three tf32 passes out with sixteen positions a
# warp: two warps have 32, and further ones would do the same work again.  Wider chunks do not fit into the registers
_VISIT = {"BLOCK_P": 32, "CHUNK": 16, "num_warps": 2, "num_stages": 1}
# the most slots that two warps take
_MOST_SLOTS = 32
# kernels that add up over positions; a program holds the sums of as many channels as make so many elements
_POOL, _POOL_SUMS = {"BLOCK_P": 32, "CHUNK": 32, "num_warps": 8, "num_stages": 3}, 8192
_OUTER, _OUTER_SUMS = {"BLOCK_P": 64, "num_warps": 4, "num_stages": 3}, 2048
# most elements of the factors of an outer product in shared memory; slots count for half as many again, since they are
# turned there.  Two blocks of each of two pairs then fit the 99 KB that a program may have on small cards
_FACTORS = 7168
# a float64 product is written out and needs the smallest blocks
_SMALLEST = 16
# columns of a block of totals
_BLOCK_N = 64

# a map ``[B, K, h, w]`` and one ``[B, C, h, w]``
Pair = tuple[Tensor | None, Tensor | None]


class Sizes(NamedTuple):
    """What the launches of a call derive from its shapes."""

    grid: Grid
    slots: int
    channels: int
    depth: int  # channels of the values
    height: int
    device: torch.device
    dtype: torch.dtype

    def slots_map(self, wanted: bool = True) -> Tensor | None:
        """A workspace ``[B, K, h, w]``."""
        shape = (self.grid.images, self.slots, self.height, self.grid.width)
        return torch.empty(shape, device=self.device, dtype=self.dtype) if wanted else None


def measure(features: Tensor, slots: int, values: Tensor | None, labels: Tensor | None) -> Sizes:
    """The sizes of ``features [B, C, h, w]``, ``values [K, D]`` and ``labels [B, H, W]``."""
    images, channels, height, width = features.shape
    rows, columns = map(aligned_axis, labels.shape[1:] if labels is not None else (1, 1), (height, width))
    grid = Grid(images, height * width, width, rows, columns)
    depth = values.shape[1] if values is not None else 0
    return Sizes(grid, slots, channels, depth, height, features.device, compute_dtype(features.dtype))


def _constants(sizes: Sizes, options: dict[str, int]) -> dict[str, Any]:
    """What a launch gives to the compiler."""
    block_k = max(_SMALLEST, triton.next_power_of_2(sizes.slots))
    shape = {"K": sizes.slots, "C": sizes.channels, "BLOCK_K": block_k, "COMPUTE": triton_dtype(sizes.dtype)}
    blocks = {name: _SMALLEST for name in ("BLOCK_P", "CHUNK") if name in options and sizes.dtype == torch.float64}
    return {**OPTIONS, **options, **blocks, **shape}


def _blocks(sizes: Sizes, constants: dict[str, Any]) -> int:
    """How many blocks of positions there are."""
    return sizes.grid.images * triton.cdiv(sizes.grid.positions, constants["BLOCK_P"])


def _widest(sizes: Sizes, elements: int, constants: dict[str, Any]) -> int:
    """The channels of a block of sums."""
    return _SMALLEST if sizes.dtype == torch.float64 else max(_SMALLEST, elements // constants["BLOCK_K"])


def visit(kernel: Any, sizes: Sizes, *args: Any) -> None:
    """Run a kernel that visits each position by itself, unless there is none."""
    constants = _constants(sizes, _VISIT) | {"D": sizes.depth}
    if sizes.slots > _MOST_SLOTS:
        # slots are spread over warps as soon as there are more of them than positions
        constants["num_warps"] = min(8, constants["BLOCK_K"] // 32)
        constants["BLOCK_P"] = max(_SMALLEST, min(_VISIT["BLOCK_P"], 4096 // constants["BLOCK_K"]))
    if blocks := _blocks(sizes, constants):
        kernel[blocks,](*args, sizes.grid, **constants)


def pool(
    sizes: Sizes, features: Tensor, labels: Labels, normalize: bool, reading: tuple[Any, ...] = (None,) * 5
) -> tuple[Tensor, Tensor]:
    """``sums [K, C]`` and ``mass [K]`` of ``features [B, C, h, w]``; the same walk reads them if ``reading`` is given.

    Args:
        reading: memory, noise, seed, and the maps of the read and the scores, or nothing.
    """
    constants = _constants(sizes, _POOL) | {"D": sizes.depth}
    block_c = min(_widest(sizes, _POOL_SUMS, constants), max(_SMALLEST, triton.next_power_of_2(sizes.channels)))
    splits = triton.cdiv(sizes.channels, block_c)
    # a multiprocessor has room for one; and few, so that the partial sums stay small
    programs = min(_blocks(sizes, constants), triton.cdiv(resident_programs(sizes.device), 2 * splits))
    sums = features.new_empty((programs, sizes.slots, sizes.channels), dtype=sizes.dtype)
    mass = features.new_empty((programs, sizes.slots), dtype=sizes.dtype)
    if programs:
        args = (as_map(features), labels, *reading, sums, mass, sizes.grid)
        pool_kernel[programs, splits](*args, NORMALIZE=normalize, BLOCK_C=block_c, **constants)
    total, total_mass = _totals(sums, mass)
    return total, total_mass


def outer(sizes: Sizes, first: Pair, second: Pair, more: Pair) -> tuple[Tensor | None, Tensor | None]:
    """Sums over positions of the outer products of pairs ``u [B, K, h, w]``, ``x [B, C, h, w]``; a None adds nothing.

    Returns:
        ``[K, C]`` of the first two pairs and ``[K, D]`` of the last one, None where there is nothing to add.
    """
    constants = _constants(sizes, _OUTER) | {"D": sizes.depth}
    block_c = _widest(sizes, _OUTER_SUMS, constants)
    position = 3 * constants["BLOCK_K"] // 2 + block_c
    while constants["BLOCK_P"] > _SMALLEST and constants["BLOCK_P"] * position > _FACTORS:
        constants["BLOCK_P"] //= 2
    maps: list[Map | None] = []
    for pair in (first, second, more):
        maps += [None, None] if any(x is None for x in pair) else [as_map(x) for x in pair]
    widths = [sizes.channels if maps[0] or maps[2] else 0, sizes.depth if maps[4] else 0]
    splits = [triton.cdiv(width, block_c) for width in widths]
    programs = min(_blocks(sizes, constants), triton.cdiv(resident_programs(sizes.device), max(sum(splits), 1)))
    partial = [
        torch.empty((programs, sizes.slots, width), dtype=sizes.dtype, device=sizes.device) if width else None
        for width in widths
    ]
    if programs and any(splits):
        outer_kernel[programs, sum(splits)](*maps, *partial, sizes.grid, BLOCK_C=block_c, SPLITS=splits[0], **constants)
    totals = iter(_totals(*(x for x in partial if x is not None)))
    of_first, of_more = (None if x is None else next(totals) for x in partial)
    return of_first, of_more


def _totals(*partial: Tensor) -> list[Tensor]:
    """The sums over programs of one or two ``[programs, ...]``, in one launch and in a fixed order."""
    totals = [x.new_empty(x.shape[1:]) if len(x) else x.new_zeros(x.shape[1:]) for x in partial]
    if totals and len(partial[0]):
        sizes = [x.numel() for x in totals]
        absent = (None,) * (2 - len(totals))
        args = (*partial, *absent, *totals, *absent, len(partial[0]), *sizes, *(0 for _ in absent))
        blocks = sum(triton.cdiv(size, _BLOCK_N) for size in sizes)
        total_kernel[blocks,](*args, ROWS=16, BLOCK=_BLOCK_N, **OPTIONS)
    return totals


def as_memory(
    keys: Tensor, values: Tensor, noise: Tensor | None, temperature: float
) -> tuple[Memory, Map | None, Tensor | None]:
    """The memory, the noise and its seed as the kernels take them."""
    memory = Memory(keys.contiguous(), values.contiguous(), scalar_bits(1 / temperature))
    is_seed = noise is not None and noise.dtype == torch.int64
    return memory, None if is_seed else as_map(noise), noise if is_seed else None
