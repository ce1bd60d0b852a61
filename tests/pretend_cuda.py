"""A pretend GPU: tensors that say they are on ``cuda:0`` and compute on the CPU, with a real GPU's refusals.

    with pretend_cuda() as gpu:
        x = torch.randn(3, device="cuda")
        x + torch.ones(3)                      # refused: two devices
        with gpu.no_waiting():
            x.sum().item()                     # refused: the host would wait
        gpu.waits                              # what made the host wait so far, and where

So mixed devices, waits of the host, generators and page-locked memory of the wrong kind, and captured graphs that read
values back, are found on a machine without a GPU, with the numbers of the CPU.  What it cannot know: cuDNN's choices of
layout, streams, the threads of autograd on a GPU, and the kernels, in whose place the CPU's run.

PyTorch without CUDA has no autograd for CUDA tensors.  So to C++ they are of type ``xla``, which autograd takes without
its threads, and CUDA's autocast takes as its own; Python sees ``cuda``.

``python -m pytest -p tests.pretend_cuda tests/meta/test_gpu_step.py`` rehearses tests that need a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from pmm_fast.ops import backends, chain, cuda, extension
from tests.pretend_torch_cuda import CPU, CUDA, INSIDE, CudaGenerator, CudaGraph, guarded, moving, torch_cuda

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
# a number, or a size, that the data decides
_READING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten.multinomial.default,
}
_COPYING = {aten._to_copy.default, aten.copy_.default}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_WAIT = "called a synchronizing CUDA operation"


class CudaTensor(Tensor):
    """A tensor on the pretend GPU; ``inner`` holds its values."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_xla = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=INSIDE,
            _extra_dispatch_keys=_KEYS,
        )
        # an address handed to a kernel of the CPU would be 0
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _current is not None, "a tensor of a pretend GPU outlived it"
        return _current.run(func, args, kwargs or {})

    def get_device(self) -> int:
        return 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = CudaTensor(self.inner.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"{self.inner} on {CUDA}"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)


class Gpu:
    """The state of a pretend GPU.

    Attributes:
        waits: how often the host had to wait, by operation and line of the package.
        copies: copies from memory that is not page-locked although they were not to be waited for, likewise.
        operations: how many operations ran on the GPU.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.operations = 0
        self.refusing = False
        self.pinned: dict[int, Tensor] = {}
        self.capture: CudaGraph | None = None
        self.mode = _Operations()

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Whatever makes the host wait is an error."""
        before, self.refusing = self.refusing, True
        try:
            yield
        finally:
            self.refusing = before

    def wait(self, what: str) -> None:
        """Note, or refuse, that the host waits."""
        if self.refusing or self.capture is not None:
            raise RuntimeError(f"{_WAIT}: {what}")
        self.waits[f"{what} at {_caller()}"] += 1

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy in page-locked memory."""
        if isinstance(tensor, CudaTensor):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
        copied = tensor.clone()
        self.pinned[copied.untyped_storage().data_ptr()] = copied
        return copied

    def is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, CudaTensor) and tensor.untyped_storage().data_ptr() in self.pinned

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation below autograd."""
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tracing = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        if tracing or any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        if func.namespace == "aten" and func._can_decompose():
            # inside a registered operator autograd has not taken it apart
            with self.mode:
                return func.decompose(*args, **kwargs)
        if func is aten.is_pinned.default:
            return self.is_pinned(args[0])
        if func is aten._pin_memory.default:
            return self.pin(args[0])
        if kwargs.get("pin_memory"):
            return self.pin(func(*args, **kwargs | {"pin_memory": False}))
        there = [leaf for leaf in leaves if isinstance(leaf, CudaTensor)]
        device = kwargs.get("device")
        # code that is called from C++ is not seen by the mode that renames devices
        if device is not None and device.type == "cuda":
            device = INSIDE
        if not (there or device == INSIDE):
            return func(*args, **kwargs)
        self.operations += 1
        if func.namespace == "pmm_fast":
            with self.mode:
                return _registered(func, args, kwargs)
        if func is aten.record_stream.default:
            return None
        self._check_devices(func, args, leaves)
        self._check_waits(func, args, kwargs)
        if device == INSIDE:
            kwargs = kwargs | {"device": CPU}
        inside = tree_map_only(CudaTensor, lambda x: x.inner, (args, kwargs))
        results = func(*inside[0], **inside[1])
        if self.capture is not None:
            self.capture.recorded.append((func, *inside, results))
        to_host = device not in (None, INSIDE)
        if to_host or (func is aten.copy_.default and not isinstance(args[0], CudaTensor)):
            return args[0] if func is aten.copy_.default else results
        results = tree_map_only(Tensor, CudaTensor, results)
        return return_and_correct_aliasing(func, args, kwargs, results)

    def _check_devices(self, func: Any, args: Any, leaves: list[Tensor]) -> None:
        """A number of the CPU may take part elementwise, and a CPU tensor may be an index; all else is refused."""
        here = [leaf for leaf in leaves if not isinstance(leaf, CudaTensor)]
        if not here or func in _COPYING or func is aten._foreach_copy_.default:
            return
        if func in _INDEXING and isinstance(args[0], CudaTensor):
            here = [value for value in here if not any(value is index for index in args[1])]
        if torch.Tag.pointwise in func.tags or func in _INDEXING:
            here = [value for value in here if value.dim() > 0]
        if here and len(here) < len(leaves):
            shapes = ", ".join(str(tuple(value.shape)) for value in here)
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu: "
                f"{func} has {shapes} on {here[0].device}"
            )

    def _check_waits(self, func: Any, args: Any, kwargs: Any) -> None:
        if func in _READING:
            self.wait(str(func))
        if func in _INDEXING:
            for index in args[1]:
                if index is not None and (index.device.type == "cpu" or index.dtype in (torch.bool, torch.uint8)):
                    self.wait(f"{func} by {index.dtype} on {index.device}")
        if func in _COPYING:
            source = args[1] if func is aten.copy_.default else args[0]
            target = args[0].device.type if func is aten.copy_.default else (kwargs.get("device") or source.device).type
            positional = func is aten.copy_.default and len(args) > 2 and args[2]
            crossing = isinstance(source, CudaTensor) != (target in ("xla", "cuda"))
            if crossing and target != "meta":
                self._check_copy(source, bool(positional or kwargs.get("non_blocking")))

    def _check_copy(self, source: Tensor, non_blocking: bool) -> None:
        kind = f"copy of {tuple(source.shape)} from {source.device}"
        if not non_blocking:
            self.wait(kind)
        elif not isinstance(source, CudaTensor) and not self.is_pinned(source):
            self.copies[f"{kind} at {_caller()}"] += 1


_current: Gpu | None = None


def _caller() -> str:
    """The innermost line of the package, or else of the tests, that is being run."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
    frames = [frame for frame in frames if frame.filename != __file__] or frames
    ours = [frame for frame in frames if "pmm_fast" in Path(frame.filename).relative_to(ROOT).parts] or frames
    last = ours[-1]
    return f"{Path(last.filename).relative_to(ROOT)}:{last.lineno}"


class _Operations(TorchDispatchMode):
    """Operations that make a tensor on the GPU of none."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled inside, and to say so would import the compiler, which does not take these stand-ins
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _current is not None
        return _current.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """``cuda`` among the arguments becomes what C++ knows; page-locked memory and generators are looked after."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _current is not None
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0].to(INSIDE, non_blocking=kwargs.get("non_blocking", False))
        # a registered operator takes "cuda" for the name of a backend
        if not isinstance(func, OpOverload) and func is not torch.device:
            args = [_inside(value) for value in args]
            kwargs = {name: _inside(value) for name, value in kwargs.items()}
        generator = kwargs.get("generator")
        if generator is None:
            generator = next((arg for arg in args if isinstance(arg, CudaGenerator)), None)
        if isinstance(generator, CudaGenerator):
            _check_generator(generator, args, kwargs)
        return func(*args, **kwargs)


def _inside(value: Any) -> Any:
    """A device, by its name or not, as C++ is told it."""
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        value = torch.device(value)
    if isinstance(value, torch.device) and value.type == "cuda":
        if value.index:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return INSIDE
    return value


def _check_generator(generator: CudaGenerator, args: Any, kwargs: Any) -> None:
    device = kwargs.get("device") or next((arg.device for arg in args if isinstance(arg, Tensor)), CPU)
    wanted = "cuda" if torch.device(device).type in ("xla", "cuda") else "cpu"
    if generator.device.type != wanted:
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{generator.device.type}'")


def _kernels(operator: str) -> ModuleType:
    """The CPU's kernels of an operator, for tensors of the pretend GPU alone."""
    module = ModuleType(f"pretend_cuda_kernels.{operator}")
    real = importlib.import_module(f"pmm_fast.ops.cpu.{operator}")
    for name in ("forward", "backward", "double_backward"):
        if hasattr(real, name):
            setattr(module, name, _on_the_gpu(f"{operator}.{name}", getattr(real, name)))
    return module


def _on_the_gpu(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        assert _current is not None
        leaves = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        strangers = [leaf for leaf in leaves if not isinstance(leaf, CudaTensor)]
        assert not strangers, f"{name}: a kernel was given the address of a tensor on the CPU"
        inside = tree_map_only(CudaTensor, lambda x: x.inner, args)
        results = _in_float32(kernel, *inside)
        if _current.capture is not None:
            _current.capture.recorded.append((_in_float32, (kernel, *inside), {}, results))
        return tree_map_only(Tensor, CudaTensor, results)

    return launch


def _in_float32(kernel: Callable[..., Any], *args: Any) -> Any:
    """The CPU has no kernels for float16."""
    halves = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dtype == torch.float16]
    wide = {id(half): half.float() for half in halves}
    results = kernel(*tree_map_only(Tensor, lambda x: wide.get(id(x), x), args))
    for half in halves:
        half.copy_(wide[id(half)])
    return results


def _registered(func: OpOverload, args: Any, kwargs: Any) -> Any:
    """A registered operator, its results in the types that it says they have."""
    operator = OPDEFS[func.name()]
    results = operator._init_fn(*args, **kwargs)
    if not any(isinstance(leaf, Tensor) and leaf.dtype == torch.float16 for leaf in tree_leaves((args, kwargs))):
        return results
    promised = operator._abstract_fn(*args, **kwargs)
    return tree_map(lambda result, like: result.to(like.dtype), results, promised)


def missing() -> str | None:
    """Why there can be no pretend GPU, or None."""
    if torch.version.cuda is not None:
        return "this PyTorch knows real GPUs"
    return extension.missing("_C")


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Gpu]:
    """Inside, ``cuda`` is a device of this machine."""
    global _current
    assert _current is None and missing() is None, missing()
    gpu = _current = Gpu()
    # where it is not asked by its name, the C++ of pmm_fast is there
    absent = extension.missing
    fake_device = FakeTensor.device.fget

    def seen(tensor: FakeTensor) -> torch.device:
        return CUDA if fake_device(tensor) == INSIDE else fake_device(tensor)

    with contextlib.ExitStack() as stack:
        stack.callback(_leave)
        stack.enter_context(guarded())
        stack.enter_context(mock.patch.multiple(torch.cuda, create=True, **torch_cuda(gpu)))
        stack.enter_context(mock.patch.object(torch, "Generator", CudaGenerator))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", moving(nn.Module._apply)))
        stack.enter_context(
            mock.patch.object(extension, "missing", lambda name: None if name == "_CUDA" else absent(name))
        )
        stack.enter_context(mock.patch.object(cuda, "unusable", lambda tensor: None))
        stack.enter_context(mock.patch.object(backends, "_triton_missing", lambda: "a pretend GPU runs no Triton"))
        stack.enter_context(mock.patch.object(FakeTensor, "device", property(seen)))
        stack.enter_context(mock.patch.object(FakeTensor, "_normalize_fake_device", staticmethod(_inside)))
        stack.enter_context(mock.patch.dict(chain._PACKAGES, cuda="pretend_cuda_kernels"))
        stack.enter_context(
            mock.patch.dict(
                sys.modules, {f"pretend_cuda_kernels.{name}": _kernels(name) for name in backends.OPERATORS}
            )
        )
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # torch.tensor(..., device="cuda") and lists as indices: made on the CPU, then copied
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(_Functions())
        stack.enter_context(gpu.mode)
        yield gpu


def _leave() -> None:
    global _current
    _current = None


def move(value: Any, device: Any = "cuda") -> Any:
    """A nest of dictionaries, lists and tuples on another device."""
    return tree_map_only(Tensor, lambda x: x.detach().to(device), copy.copy(value))


def pytest_configure(config: Any) -> None:
    """As a plugin: the whole session has a pretend GPU."""
    stack = contextlib.ExitStack()
    stack.enter_context(pretend_cuda())
    config.add_cleanup(stack.close)
