"""Where the time of an iteration goes: a clock with named phases, and our step with its phases marked."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

# in the order of an iteration; what none of them covers is the forward passes
PHASES = ("inner_gradient", "outer_gradient", "memory", "optimizer")

# the package's attribute of this name is the function
_STEP = importlib.import_module("pmm_fast.meta.step")


class Clock:
    """Seconds of an iteration and of its phases; on a GPU by events in its queue, so that nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any, Any]] = []
        self._inside = False

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as ``name``; a phase inside a phase belongs to the outer one."""
        if self._inside:
            yield
            return
        self._inside, start = True, self._now()
        try:
            yield
        finally:
            self._inside = False
            self._marks.append((name, start, self._now()))

    def measure(self, iterate: Callable[[], object], remainder: str) -> dict[str, float]:
        """Run an iteration.

        Args:
            iterate: marks its phases on this clock.
            remainder: name of what no phase covers.

        Returns:
            Seconds by phase, of the remainder, and in all (``step``).
        """
        self._marks.clear()
        self._wait()
        start = time.perf_counter()
        iterate()
        self._wait()
        found = {"step": time.perf_counter() - start}
        for name, began, ended in self._marks:
            seconds = began.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - began
            found[name] = found.get(name, 0.0) + seconds
        found[remainder] = found["step"] - sum(found.get(name, 0.0) for name in PHASES)
        return found

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def phases_of_step(self, gradients: tuple[str, ...]) -> Iterator[None]:
        """Inside, ``meta.step`` marks its phases: each gradient that it takes, in order, and the write of M'.

        Args:
            gradients: the phases that the gradients are.
        """
        names = iter(gradients)
        write = _STEP._write_with_constant_encoder

        def timed(differentiate: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                # recomputed blocks differentiate inside the step's own gradients
                if self._inside:
                    return differentiate(*args, **kwargs)
                with self.phase(next(names)):
                    return differentiate(*args, **kwargs)

            return wrapped

        def timed_write(*args: Any, **kwargs: Any) -> Any:
            with self.phase("memory"):
                return write(*args, **kwargs)

        with (
            mock.patch.object(torch.autograd, "grad", timed(torch.autograd.grad)),
            # order 1 adds its outer gradient to the inner one in place
            mock.patch.object(torch.autograd, "backward", timed(torch.autograd.backward)),
            mock.patch.object(_STEP, "_write_with_constant_encoder", timed_write),
        ):
            yield
