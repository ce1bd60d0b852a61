"""Which implementation of an operator runs, and why.

Backends: ``reference`` (plain PyTorch), ``cpu`` (C++), ``triton``, ``cuda`` (C++).  The choice is automatic (the best
one that can take the call) unless a name is given by :func:`use_backend` or by the environment variable
``PMM_FAST_BACKEND``.  An automatic choice may fall back, and says so once; a named backend never falls back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

BACKENDS = ("cuda", "triton", "cpu", "reference")  # best first
OPERATORS = ("masked_average_pool", "update_memory", "memory_read", "memory_pass", "upsample_cross_entropy")
_NOT_BUILT = "not part of this build"

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
    _implementations[operator, backend] = Implementation(function, refuses or (lambda *args, **kwargs: None))


def requested() -> str:
    """The backend asked for: by :func:`use_backend`, else by ``PMM_FAST_BACKEND``, else ``auto``."""
    name = _chosen.get() or os.environ.get("PMM_FAST_BACKEND", "auto")
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
    return [name for name in BACKENDS if (operator, name) in _implementations]


def _refusals(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, str | None]:
    """Backend name to the reason it cannot take this call (None: it can), best backend first."""
    reasons: dict[str, str | None] = {}
    for name in BACKENDS:
        implementation = _implementations.get((operator, name))
        reasons[name] = implementation.refuses(*args, **kwargs) if implementation else _NOT_BUILT
    return reasons


def _choose(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    wanted, reasons = requested(), _refusals(operator, args, kwargs)
    if wanted == "auto":
        return next(name for name, reason in reasons.items() if reason is None)
    if reasons[wanted] is not None:
        raise RuntimeError(
            f"{operator}: backend {wanted!r} was asked for but cannot take this call: {reasons[wanted]}; "
            f"available: {', '.join(available_backends(operator))}"
        )
    return wanted


def dispatch(operator: str, *args: Any, **kwargs: Any) -> Any:
    """Call the chosen implementation of an operator."""
    name = _choose(operator, args, kwargs)
    calls = _calls.get()
    if calls is not None:
        calls.append((operator, name))
    return _implementations[operator, name].function(*args, **kwargs)


def explain(operator: str, *args: Any, **kwargs: Any) -> str:
    """Why each backend would or would not run ``operator`` on these arguments, one line a backend.

    Without arguments it tells what this machine has.

    Raises:
        ValueError: unknown operator.
    """
    _check_operator(operator)
    if args or kwargs:
        reasons = _refusals(operator, args, kwargs)
    else:
        available = available_backends(operator)
        reasons = {name: None if name in available else _NOT_BUILT for name in BACKENDS}
    wanted = requested()
    usable = [name for name, reason in reasons.items() if reason is None]
    taken = wanted if wanted != "auto" else usable[0]
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
