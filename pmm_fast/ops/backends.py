"""Which implementation of an operator runs, and why.

Backends: ``reference`` (plain PyTorch), ``cpu`` (C++), ``triton``, ``cuda`` (C++).  The choice is automatic (the best
one that can take the call) unless a name is given by :func:`use_backend` or by the environment variable
``PMM_FAST_BACKEND``.  An automatic choice may fall back, and says so once if it ends in plain PyTorch; a named backend
never falls back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from pmm_fast.ops import extension

BACKENDS = ("cuda", "triton", "cpu", "reference")  # best first
OPERATORS = (
    "masked_average_pool",
    "memory_read",
    "memory_pass",
    "upsample_cross_entropy",
    "photometric",
    "merge_tiles",
)
# arguments, by place, that may be on the CPU whatever device the call is for
HOST_ARGUMENTS = {"photometric": (1,)}

_chosen: ContextVar[str | None] = ContextVar("pmm_fast_backend", default=None)
_calls: ContextVar[list[tuple[str, str]] | None] = ContextVar("pmm_fast_backend_calls", default=None)


@dataclass(frozen=True)
class Implementation:
    """One backend's function for one operator; ``refuses`` returns why it cannot take a call, or None."""

    function: Callable[..., Any]
    refuses: Callable[..., str | None]


_implementations: dict[tuple[str, str], Implementation] = {}


def register(
    operator: str, backend: str, function: Callable[..., Any], refuses: Callable[..., str | None] | None = None
) -> None:
    """Make ``function`` the ``backend`` implementation of ``operator`` (called once by the operator's module)."""
    assert operator in OPERATORS and backend in BACKENDS, (operator, backend)
    _implementations[operator, backend] = Implementation(function, refuses or (lambda *args: None))


def register_kernels(operator: str, function: Callable[..., Any]) -> None:
    """Register the kernel backends of an operator; ``function`` takes the call's arguments and ``backend``."""
    for backend in ("cpu", "triton", "cuda"):
        register(operator, backend, partial(function, backend=backend), partial(refuses, backend))


def interpreted() -> bool:
    """Whether Triton kernels are interpreted on the CPU (to be tested without a GPU)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


def missing(backend: str) -> str | None:
    """Why this machine does not have a backend, or None."""
    if backend == "cpu":
        return extension.missing("_C")
    if backend == "cuda":
        return extension.missing("_CUDA") or (None if torch.cuda.is_available() else "no CUDA device")
    if backend == "triton":
        if torch.cuda.is_available() or interpreted():
            return _triton_missing()
        return _triton_missing() or "no CUDA device (TRITON_INTERPRET=1 interprets the kernels, slowly)"
    return None


def refuses(backend: str, *args: Any) -> str | None:
    """Why a kernel backend cannot take a call, or None; the first argument is the map that the operator walks over."""
    reason = missing(backend)
    if reason:
        return reason
    tensor: Tensor = args[0]
    device = tensor.device.type
    expected = "cpu" if backend == "cpu" or (backend == "triton" and interpreted()) else "cuda"
    if device != expected:
        return f"the tensors are on {device}"
    if backend == "cpu" and tensor.dtype == torch.float16:
        return "no float16 on the CPU"
    if any(torch._C._functorch.is_functorch_wrapped_tensor(arg) for arg in args if isinstance(arg, Tensor)):
        return "torch.func transforms cannot see into a registered operator"
    if backend == "cuda" and not torch.compiler.is_compiling():
        # imported late, since the package imports torch's CUDA side
        from pmm_fast.ops import cuda

        return cuda.unusable(tensor)
    return None


def requested() -> str:
    """The backend asked for: by :func:`use_backend`, else by ``PMM_FAST_BACKEND``, else ``auto``."""
    name = _chosen.get() or os.environ.get("PMM_FAST_BACKEND") or "auto"
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"unknown backend {name!r}; expected auto, {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on one backend.

    Args:
        name: ``reference``, ``cpu``, ``triton``, ``cuda``, or ``auto``.

    Raises:
        ValueError: unknown name.  A named backend that cannot take a call raises ``RuntimeError`` at that call.
    """
    token = _chosen.set(name)
    try:
        requested()
        yield
    finally:
        _chosen.reset(token)


def _check_operator(operator: str) -> None:
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; expected one of {', '.join(OPERATORS)}")


def available_backends(operator: str) -> list[str]:
    """The backends that this machine has for an operator, best first."""
    _check_operator(operator)
    return [name for name in BACKENDS if (operator, name) in _implementations and missing(name) is None]


def _refusals(operator: str, args: tuple[Any, ...]) -> dict[str, str | None]:
    """Backend name to the reason it cannot take this call (None: it can), best backend first."""
    host = [args[place] for place in HOST_ARGUMENTS.get(operator, ()) if args[place].device.type == "cpu"]
    tensors = (arg for arg in args if isinstance(arg, Tensor) and not any(arg is other for other in host))
    devices = dict.fromkeys(str(arg.device) for arg in tensors)
    if len(devices) > 1:
        raise ValueError(f"{operator}: all tensors must be on one device, got {', '.join(devices)}")
    reasons: dict[str, str | None] = {}
    for name in BACKENDS:
        reasons[name] = _implementations[operator, name].refuses(*args)
    return reasons


def _automatic(reasons: dict[str, str | None]) -> str:
    """The best backend that can take a call; an interpreter is only for those who ask for it."""
    return next(name for name, reason in reasons.items() if reason is None and not (name == "triton" and interpreted()))


def _choose(operator: str, args: tuple[Any, ...]) -> str:
    wanted, reasons = requested(), _refusals(operator, args)
    if wanted == "auto":
        taken = _automatic(reasons)
        if taken == "reference":
            _say_once(operator, args[0], reasons)
        return taken
    if reasons[wanted] is not None:
        raise RuntimeError(
            f"{operator}: backend {wanted!r} was asked for but cannot take this call: {reasons[wanted]}; "
            f"available: {', '.join(available_backends(operator))}"
        )
    return wanted


_said: set[tuple[str, str]] = set()


def _say_once(operator: str, tensor: Tensor, reasons: dict[str, str | None]) -> None:
    """Tell that plain PyTorch runs although kernels exist for the device, with the reason."""
    names = ("cpu",) if tensor.device.type == "cpu" else ("cuda", "triton")
    why = "; ".join(f"{name}: {reasons[name]}" for name in names)
    if (operator, why) not in _said:
        _said.add((operator, why))
        warnings.warn(f"pmm_fast: {operator} runs in plain PyTorch, which is slower ({why})", stacklevel=5)


def dispatch(operator: str, *args: Any) -> Any:
    """Call the chosen implementation of an operator.

    Raises:
        ValueError: tensors on different devices.
        RuntimeError: the backend asked for cannot take the call.
    """
    name = _choose(operator, args)
    calls = _calls.get()
    if calls is not None:
        calls.append((operator, name))
    return _implementations[operator, name].function(*args)


def explain(operator: str, *args: Any) -> str:
    """Why each backend would or would not run ``operator`` on these arguments, one line a backend.

    The arguments are the operator's, in its order; without any it tells what this machine has.

    Raises:
        ValueError: unknown operator, or tensors on different devices.
    """
    _check_operator(operator)
    reasons = _refusals(operator, args) if args else {name: missing(name) for name in BACKENDS}
    wanted = requested()
    taken = wanted if wanted != "auto" else _automatic(reasons)
    lines = [f"{operator} (backend: {wanted})"]
    for name, reason in reasons.items():
        verdict = reason or ("taken" if name == taken else "usable")
        lines.append(f"  {name:<9} {verdict}")
    return "\n".join(lines)


@contextlib.contextmanager
def record_backends() -> Iterator[list[tuple[str, str]]]:
    """List the (operator, backend) of every call inside the block, in order: shows which implementation really ran."""
    calls: list[tuple[str, str]] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)
