"""What stands in for ``torch.cuda`` on a pretend GPU (``tests/pretend_cuda.py``)."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# what Python sees, what C++ sees, and where it computes
CUDA, INSIDE, CPU = torch.device("cuda", 0), torch.device("xla", 0), torch.device("cpu")
# XLA among c10::DeviceType
_XLA_PLACE = 9


class CudaGenerator(torch.Generator):
    """A generator that remembers which device it was made for."""

    def __new__(cls, device: Any = "cpu") -> CudaGenerator:
        return super().__new__(cls, device="cpu")

    def __init__(self, device: Any = "cpu") -> None:
        # the modes tell C++ of another device
        self.kind = CUDA if torch.device(device).type in ("cuda", "xla") else CPU

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.kind


class CudaGraph:
    """Records the operations of a capture and runs them again on the same memory."""

    def __init__(self) -> None:
        self.recorded: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def pool(self) -> CudaGraph:
        return self

    def replay(self) -> None:
        for func, args, kwargs, results in self.recorded:
            for old, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    """Everything runs at once, so that a stream has nothing to do."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def synchronize(self) -> None: ...


def torch_cuda(gpu: Any) -> dict[str, Any]:
    """Stand-ins for what the package, its benchmarks and its tests call of ``torch.cuda``."""
    properties = SimpleNamespace(
        name="pretend", total_memory=2**30, major=9, minor=0, multi_processor_count=1, L2_cache_size=2**20
    )

    # torch's compiler wants them to be different functions
    def nothing() -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def debug(mode: Any) -> None:
        gpu.refusing = mode in ("error", 2)

    @contextlib.contextmanager
    def captured(graph: CudaGraph, **options: Any) -> Iterator[None]:
        assert gpu.capture is None
        gpu.capture = graph
        try:
            yield
        finally:
            gpu.capture = None

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing(),
        "_lazy_call": nothing(),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing(),
        "device": contextlib.nullcontext,
        "device_of": contextlib.nullcontext,
        "get_device_name": lambda *args: properties.name,
        "get_device_capability": lambda *args: (properties.major, properties.minor),
        "get_device_properties": lambda *args: properties,
        "synchronize": nothing(),
        "empty_cache": nothing(),
        "manual_seed_all": nothing(),
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "reset_peak_memory_stats": nothing(),
        "set_sync_debug_mode": debug,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": CudaGraph,
        "graph": captured,
    }


def moving(apply: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``nn.Module._apply`` that keeps the parameters the objects that they are, as it does for a GPU."""

    def moved(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(self, fn, recurse)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    return moved


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """C++ asks a device's guard for streams; the CPU's has none."""
    guards = (ctypes.c_void_p * (_XLA_PLACE + 1)).in_dll(
        ctypes.CDLL("libc10.so"), "_ZN3c104impl26device_guard_impl_registryE"
    )
    assert guards[0] and not guards[_XLA_PLACE]
    guards[_XLA_PLACE] = guards[0]
    try:
        yield
    finally:
        guards[_XLA_PLACE] = None
