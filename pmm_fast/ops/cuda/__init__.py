"""The CUDA kernels of the operators (csrc/cuda), with the arguments that the chain of registered ops passes.

The kernels take addresses.  Maps may have any strides as long as their last two axes can be seen as one (contiguous,
channels last, slices of either along the batch or the channels, expanded); another map is copied first.  Matrices are
copied where their rows are not a multiple of eight numbers, labels where they are not contiguous.

B images, C channels, D width of the values, K slots or classes, h x w positions, H x W label pixels.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmm_fast.ops import extension
from pmm_fast.ops.checks import is_seed
from pmm_fast.ops.reference import compute_dtype

FORWARD, BACKWARD, DOUBLE_BACKWARD = range(3)

# as csrc/cuda/operators.h counts them
_TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
    torch.int8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
}
_ROW = 8  # numbers that a matrix row is padded to a multiple of


def module() -> ModuleType:
    """The compiled kernels."""
    return extension.load("_CUDA")


_reasons: dict[torch.device, str | None] = {}


def unusable(tensor: Tensor) -> str | None:
    """Why the tensor's device cannot run the compiled kernels, or None; asked once a device."""
    if tensor.device not in _reasons:
        with launching(tensor):
            reason = module().unusable()
        compiler = getattr(module(), "compiler", "an unnamed compiler")
        _reasons[tensor.device] = f"what {compiler} built does not run on {tensor.device}: {reason}" if reason else None
    return _reasons[tensor.device]


def launching(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the current one."""
    return torch.cuda.device_of(tensor)


def current_stream(tensor: Tensor) -> int:
    """The address of the stream that the tensor's device is working on."""
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _joined(tensor: Tensor) -> tuple[int, int, int] | None:
    """Strides of the batch, the channels and the positions, or None where the last two axes cannot be seen as one."""
    batch, channel, row, column = tensor.stride()
    height, width = tensor.shape[2:]
    if height > 1 and width > 1 and row != width * column:
        return None
    return batch, channel, column if width > 1 else row


def type_of(tensor: Tensor) -> int:
    """The number of a tensor's type."""
    return _TYPES[tensor.dtype]


class Call:
    """One call of the kernels: names the arguments, keeps what was copied for them, and launches."""

    def __init__(self, tensor: Tensor, slots: int, kind: str = "Call") -> None:
        self._tensor = tensor
        self._alive: list[Tensor] = []
        self._dtype = compute_dtype(tensor.dtype)
        self._fields = getattr(module(), kind)()
        self._fields.compute = _TYPES[self._dtype]
        self._fields.batch, _, self._fields.height, self._fields.width = tensor.shape
        self._fields.slots = slots

    def set(self, name: str, value: int | float | bool) -> None:
        """A number."""
        setattr(self._fields, name, value)

    def map(self, name: str, tensor: Tensor | None) -> None:
        """A map ``[B, channels, h, w]``; nothing where it is absent or empty."""
        if tensor is None or tensor.numel() == 0:
            return
        strides = _joined(tensor)
        if strides is None:
            tensor = tensor.contiguous()
            strides = (tensor.stride(0), tensor.stride(1), 1)
        self._alive.append(tensor)
        setattr(self._fields, name, (tensor.data_ptr(), _TYPES[tensor.dtype], *strides))

    def matrix(self, name: str, tensor: Tensor | None) -> None:
        """A matrix ``[K, columns]`` that is read: rows padded to whole 16 bytes, on a 16-byte address."""
        if tensor is None or tensor.numel() == 0:
            return
        tensor, missing = tensor.detach(), -tensor.shape[1] % _ROW
        # a padding of nothing would be a copy
        tensor = (F.pad(tensor, (0, missing)) if missing else tensor).contiguous()
        self.address(name, tensor.clone() if tensor.data_ptr() % 16 else tensor)

    def address(self, name: str, tensor: Tensor | None) -> None:
        """A contiguous tensor as it is; nothing where it is absent or empty."""
        if tensor is None or tensor.numel() == 0:
            return
        self._alive.append(tensor)
        setattr(self._fields, name, tensor.data_ptr())

    def labels(self, labels: Tensor, ignore_index: int) -> None:
        """Labels ``[B, H, W]`` in their own integer type."""
        labels = (labels if labels.dtype in _TYPES else labels.to(torch.int64)).contiguous()
        self._alive.append(labels)
        self._fields.labels = (labels.data_ptr(), _TYPES[labels.dtype], *labels.shape[1:], ignore_index)

    def noise(self, noise: Tensor | None) -> None:
        """Noise as a map, or the seed it is drawn from, which stays on the device."""
        if is_seed(noise):
            self.address("seed", noise)
        else:
            self.map("noise", noise)

    def run(self, operator: str, order: int) -> None:
        """Launch; ``RuntimeError`` with operator and shape where a launch fails."""
        kernels = module()
        with launching(self._tensor):
            blocks, per_block = getattr(kernels, f"{operator}_workspace")(order, self._fields)
            workspace = self._tensor.new_empty(blocks * per_block, dtype=self._dtype)
            self._fields.blocks = blocks
            self.address("workspace", workspace)
            self._fields.stream = current_stream(self._tensor)
            getattr(kernels, operator)(order, self._fields)


def memory_call(features: Tensor, slots: int) -> Call:
    """A call of a memory operator on ``features`` that neither reads nor pools yet."""
    call = Call(features, slots)
    call.set("channels", features.shape[1])
    call.map("features", features)
    return call


def add_read(call: Call, keys: Tensor, values: Tensor, noise: Tensor | None, temperature: float) -> None:
    """Let a call read the memory."""
    call.set("read", True)
    call.set("depth", values.shape[1])
    call.set("temperature", temperature)
    call.matrix("keys", keys)
    call.matrix("values", values)
    call.noise(noise)


def add_pool(call: Call, labels: Tensor, ignore_index: int, normalize: bool = True) -> None:
    """Let a call pool its features."""
    call.set("pool", True)
    call.set("normalize", normalize)
    call.labels(labels, ignore_index)
