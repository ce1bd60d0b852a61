"""What every operator demands of its arguments, in one wording."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_map(operator: str, name: str, tensor: Tensor, axes: str = "[B, C, h, w]") -> None:
    """A floating-point map with four axes and at least one channel."""
    if tensor.dim() != 4 or tensor.shape[1] == 0:
        raise ValueError(f"{operator}: {name} must be {axes}, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{operator}: {name} must be floating point, got {tensor.dtype}")


def check_labels(operator: str, labels: Tensor, batch: int, num_classes: int, sampled: bool = True) -> None:
    """Integer labels ``[B, H, W]``, not empty if they are sampled; the values are looked at by whoever reads them."""
    empty = sampled and batch > 0 and labels.numel() == 0
    if labels.dim() != 3 or labels.shape[0] != batch or empty:
        raise ValueError(f"{operator}: labels must be [B, H, W] with B = {batch}, got shape {tuple(labels.shape)}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"{operator}: labels must have an integer dtype, got {labels.dtype}")
    if num_classes < 1:
        raise ValueError(f"{operator}: num_classes must be positive, got {num_classes}")


def comparable_labels(labels: Tensor, *numbers: int) -> Tensor:
    """Labels in a type that holds the numbers too: PyTorch would wrap them (uint8 255 equals -1)."""
    limits = torch.iinfo(labels.dtype)
    # PyTorch compares no unsigned type but uint8
    comparable = labels.dtype not in (torch.uint16, torch.uint32, torch.uint64)
    return labels if comparable and all(limits.min <= n <= limits.max for n in numbers) else labels.long()


def check_label_values(operator: str, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Every label is a class or the ignore index; on a GPU an assertion on the device, which the host does not await.

    For implementations that do not look themselves.  A graph traced with fake labels asserts it of the real ones.
    """
    if labels.numel() == 0 or torch.compiler.is_compiling():
        return
    labels = comparable_labels(labels, num_classes, ignore_index)
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if labels.device.type != "cpu" or isinstance(labels, FakeTensor):
        torch._assert_async(~wrong.any(), f"{operator}: a label is neither a class in 0..{num_classes - 1} nor ignored")
    elif wrong.any():
        values = sorted(set(labels[wrong].tolist()))[:5]
        raise ValueError(
            f"{operator}: labels hold {', '.join(map(str, values))}, expected classes in 0..{num_classes - 1} "
            f"or the ignore index {ignore_index}"
        )


def check_memory(operator: str, memory: Tensor, channels: int) -> None:
    """A memory ``[K, C]`` as wide as the features, with at least one slot."""
    if memory.dim() != 2 or memory.shape[1] != channels or memory.shape[0] == 0:
        raise ValueError(f"{operator}: memory must be [K, C] with C = {channels}, got shape {tuple(memory.shape)}")
    if memory.dtype not in _FLOATS:
        raise ValueError(f"{operator}: memory must be floating point, got {memory.dtype}")


def is_seed(noise: Tensor | None) -> bool:
    """Whether noise is given as the seed it is drawn from."""
    return noise is not None and noise.dtype == torch.int64


def check_noise(operator: str, noise: Tensor | None, features: Tensor, slots: int, temperature: float) -> None:
    """Noise ``[B, K, h, w]``, a seed (int64, one element) or None, and a positive temperature."""
    expected = (features.shape[0], slots, *features.shape[2:])
    if noise is not None and is_seed(noise):
        if noise.numel() != 1:
            raise ValueError(f"{operator}: a seed of noise must have one element, got shape {tuple(noise.shape)}")
    elif noise is not None and not noise.dtype.is_floating_point:
        raise ValueError(f"{operator}: noise must be floating point, or an int64 seed, got {noise.dtype}")
    elif noise is not None and tuple(noise.shape) != expected:
        raise ValueError(f"{operator}: noise must be [B, K, h, w] = {expected}, got shape {tuple(noise.shape)}")
    if not temperature > 0:
        raise ValueError(f"{operator}: temperature must be positive, got {temperature}")


def check_values(operator: str, values: Tensor | None, slots: int) -> None:
    """Values ``[K, D]`` with one row a slot, or None."""
    if values is None:
        return
    if values.dim() != 2 or values.shape[0] != slots or values.shape[1] == 0:
        raise ValueError(f"{operator}: values must be [K, D] with K = {slots}, got shape {tuple(values.shape)}")
    if values.dtype not in _FLOATS:
        raise ValueError(f"{operator}: values must be floating point, got {values.dtype}")


def check_images(operator: str, images: Tensor) -> None:
    """8-bit RGB images ``[N, 3, h, w]``."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"{operator}: images must be [N, 3, h, w], got shape {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        raise ValueError(f"{operator}: images must be uint8, got {images.dtype}")


def check_statistics(operator: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Mean and standard deviation of three channels."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(map(math.isfinite, values)):
            raise ValueError(f"{operator}: {name} must be three numbers, got {tuple(values)}")
    if min(std) <= 0:
        raise ValueError(f"{operator}: std must be positive, got {tuple(std)}")


def check_tiles(
    operator: str,
    logits: Tensor,
    tops: Sequence[int],
    lefts: Sequence[int],
    tile: tuple[int, int],
    size: tuple[int, int],
) -> None:
    """Logits ``[T, K, h, w]`` of T tiles that lie inside an image and cover it."""
    if logits.dim() != 4 or logits.numel() == 0:
        raise ValueError(f"{operator}: logits must be [T, K, h, w] and not empty, got shape {tuple(logits.shape)}")
    if logits.dtype not in _FLOATS:
        raise ValueError(f"{operator}: logits must be floating point, got {logits.dtype}")
    for name, given in (("tops", tops), ("lefts", lefts)):
        if len(given) != len(logits):
            raise ValueError(f"{operator}: {name} must be T = {len(logits)} numbers, got {len(given)}")
    (tile_height, tile_width), (height, width) = tile, size
    if not (0 < tile_height <= height and 0 < tile_width <= width):
        raise ValueError(
            f"{operator}: a tile must have pixels and fit into the image, got {tile_height} x {tile_width} "
            f"in {height} x {width}"
        )
    for index, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        if not (0 <= top <= height - tile_height and 0 <= left <= width - tile_width):
            raise ValueError(
                f"{operator}: tile {index} of {tile_height} x {tile_width} at row {top}, column {left} is not inside "
                f"the image of {height} x {width}"
            )
    _check_covered(operator, tops, lefts, tile, size)


def _check_covered(
    operator: str, tops: Sequence[int], lefts: Sequence[int], tile: tuple[int, int], size: tuple[int, int]
) -> None:
    """Every pixel lies in a tile: the first of each part that the edges of the tiles cut the image into does."""

    def parts(starts: Sequence[int], length: int, end: int) -> tuple[list[int], Tensor]:
        """Where the parts along an axis begin, and which tiles cover each, ``[parts, T]``."""
        begins = sorted({0, *starts, *(start + length for start in starts)} - {end})
        offset = torch.tensor(begins)[:, None] - torch.tensor(list(starts))
        return begins, ((offset >= 0) & (offset < length)).float()

    rows, covers_row = parts(tops, tile[0], size[0])
    columns, covers_column = parts(lefts, tile[1], size[1])
    missed = (covers_row @ covers_column.T == 0).nonzero().tolist()
    if missed:
        row, column = rows[missed[0][0]], columns[missed[0][1]]
        raise ValueError(
            f"{operator}: no tile covers the pixel at row {row}, column {column} of the image of {size[0]} x {size[1]}"
        )


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Operators choose their own precision: float32 sums, norms and softmax whatever autocast says."""
    if not torch.amp.is_autocast_available(tensor.device.type):
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
