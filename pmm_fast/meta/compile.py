"""The compiled step: called like :func:`pmm_fast.meta.step`, checked against it, never silently different from it.

Each layout of the arguments gets a graph of its own (:mod:`pmm_fast.meta.trace`), which an engine turns into a
function.  Its first batch is computed by eager mode too and the results are compared from two sides: they are those of
the order asked for, and of order 1 they are not.  What routes lead through ``torch.compile``, and which of them are
silently wrong: docs/compile.md.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pmm_fast.meta.agreement import Agreement, compare
from pmm_fast.meta.engines import ENGINES, Compiled, cache_folder
from pmm_fast.meta.network import State
from pmm_fast.meta.step import META_MODES, Batch, Hyper, Noise, StepResult, step
from pmm_fast.meta.trace import Call, CompileError, Traced, take_apart, trace
from pmm_fast.ops.collective import sum_over_ranks

# graphs that one run may need: the splits of three domains are two, a last batch that is smaller makes four
MAX_GRAPHS = 8
# seconds between two signs of life
HEARTBEAT = 10.0
# what `--compile on` takes, by device type
BEST_ENGINES = {"cpu": "graph", "cuda": "cuda-graph"}
# iterations after which tracing was measured to have paid, where it was: docs/compile.md
PAYS_AFTER = {"cpu": 200}


class CompileMismatchError(RuntimeError):
    """The compiled step computes something else than the eager one."""


def choose_engine(wanted: Literal["auto", "on", "off"], device: torch.device, iterations: int) -> str | None:
    """The engine for the option ``compile``: the device's best; None is eager mode.

    Args:
        wanted: ``on``, ``off``, or ``auto``: on where docs/compile.md has measured that it pays.
        device: of the network.
        iterations: how many the run has.
    """
    pays = device.type in PAYS_AFTER and iterations >= PAYS_AFTER[device.type]
    return BEST_ENGINES[device.type] if wanted == "on" or (wanted == "auto" and pays) else None


def print_to_stderr(text: str) -> None:
    """The default of what :class:`CompiledStep` says its lines with."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class _Entry:
    """The graph of one layout and the function made of it; the first finite batch checks it."""

    traced: Traced
    compiled: Compiled
    checked: bool = False


class CompiledStep:
    """:func:`pmm_fast.meta.step`, traced once for every layout of its arguments and then run by an engine.

    The first call of a layout traces, compiles, and compares with eager mode; it returns eager mode's result.  A
    layout is shape, dtype, strides and device of every tensor, what is None, the fields of ``Hyper`` except
    ``inner_lr`` and ``loss_scale``, and the backend of the operators; another one is traced anew, the ninth and later
    run eagerly.
    What cannot be compiled or differs from eager mode is told with its numbers, and from then on every step is eager.

    Args:
        engine: ``graph`` (the traced operations one by one), ``inductor`` (fused by ``torch.compile``'s Inductor,
            cached between runs) or ``cuda-graph`` (captured once and replayed by the GPU).
        strict: raise instead of falling back to eager mode.
        say: takes each line of progress.

    Attributes:
        graphs: how many layouts were compiled.
        nodes: operations in the last graph.
        trace_seconds, compile_seconds, check_seconds: time spent so far.
        agreements: what the checks found, a :class:`~pmm_fast.meta.agreement.Agreement` each.
        fallback: why the steps are eager, or None.

    Raises:
        ValueError: no such engine.
    """

    def __init__(self, engine: str, strict: bool = False, say: Callable[[str], None] = print_to_stderr) -> None:
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; expected one of {', '.join(ENGINES)}")
        self.engine, self.strict, self.say = engine, strict, say
        self.nodes = 0
        self.trace_seconds = self.compile_seconds = self.check_seconds = 0.0
        self.agreements: list[Agreement] = []
        self.fallback: str | None = None
        self._entries: dict[Hashable, _Entry] = {}
        self._full = False

    @property
    def graphs(self) -> int:
        """How many layouts were compiled."""
        return len(self._entries)

    def __call__(
        self,
        params: State,
        buffers: State,
        memory: Tensor | None,
        batch_mtr: Batch,
        batch_mte: Batch | None,
        noise: Noise,
        hyper: Hyper,
    ) -> StepResult:
        """One step; arguments, result and errors are those of :func:`pmm_fast.meta.step`.

        Raises:
            CompileError: with ``strict``: the step cannot be compiled, or has more than eight layouts.
            CompileMismatchError: with ``strict``: the compiled step differs from eager mode.
        """
        arguments = (params, buffers, memory, batch_mtr, batch_mte, noise, hyper)
        if self.fallback is not None:
            return step(*arguments)
        call = take_apart(*arguments)
        entry = self._entries.get(call.key)
        if entry is not None and entry.checked:
            return _run(entry, call)
        # before anything is traced: an argument that does not fit gets its own error
        expected = step(*arguments)
        if entry is None:
            entry = self._compile(call, hyper)
        if entry is not None:
            self._check(entry, call, expected, hyper)
        return expected

    def _compile(self, call: Call, hyper: Hyper) -> _Entry | None:
        """The graph of a new layout, or None where the step stays eager."""
        if len(self._entries) >= MAX_GRAPHS:
            self._no_room()
            return None
        device = call.values[0].device
        cause: Exception | None = None
        try:
            entry = self._build(call)
        # whatever a compiler raises is told, and is no reason to stop training
        except Exception as error:
            cause = error
        if _on_any_rank(cause is not None, hyper, device):
            why = "on another rank" if cause is None else f"{type(cause).__name__}: {_first_lines(str(cause))}"
            self._give_up(f"engine {self.engine!r} cannot compile the step: {why}", CompileError, cause)
            return None
        self._entries[call.key] = entry
        return entry

    def _build(self, call: Call) -> _Entry:
        with self._stage("tracing the step") as seconds:
            traced = trace(call)
        self.trace_seconds += seconds()
        self.nodes = len(traced.graph.graph.nodes)
        self.say(f"compile: traced in {seconds():.0f} s, {self.nodes:,} nodes")
        with self._stage(f"compiling the step ({self.engine})") as seconds:
            compiled = ENGINES[self.engine](traced.graph, call.values)
        self.compile_seconds += seconds()
        where = f", cached in {cache_folder()}" if self.engine == "inductor" else ""
        self.say(f"compile: engine {self.engine!r} ready in {seconds():.0f} s{where}")
        return _Entry(traced, compiled)

    def _check(self, entry: _Entry, call: Call, expected: StepResult, hyper: Hyper) -> None:
        """Compare the first batch of a graph; one whose eager gradient is not finite tells nothing and is passed by."""
        if not torch.stack([grad.isfinite().all() for grad in expected.grads.values()]).all():
            return
        with self._stage("checking the step against eager mode") as seconds:
            found = _run(entry, call)
            two_sided = hyper.order == 2 and hyper.mode in META_MODES
            first_order = call.at_order(1) if two_sided else None
            agreement = compare(found, expected, first_order, hyper.autocast)
        self.check_seconds += seconds()
        self.agreements.append(agreement)
        failed = _on_any_rank(agreement.failure is not None, hyper, call.values[0].device)
        if failed:
            why = agreement.failure or "on another rank"
            self._entries.clear()
            self._give_up(f"the compiled step is not the eager one: {why} ({agreement})", CompileMismatchError)
        else:
            entry.checked = True
            self.say(f"compile: checked against eager mode: {agreement}")

    def _no_room(self) -> None:
        text = f"{MAX_GRAPHS} layouts of the step are compiled, further ones run eagerly"
        if self.strict:
            raise CompileError(text)
        if not self._full:
            self._full = True
            self.say(f"compile: {text}")

    def _give_up(self, text: str, error: type[RuntimeError], cause: Exception | None = None) -> None:
        if self.strict:
            raise error(text) from cause
        self.fallback = text
        self.say(f"compile: {text}; every step is eager from here on")

    @contextlib.contextmanager
    def _stage(self, text: str) -> Iterator[Callable[[], float]]:
        """Say every few seconds what is being waited for; gives a function of the seconds since the start."""
        start, done = time.perf_counter(), threading.Event()

        def seconds() -> float:
            return time.perf_counter() - start

        def beat() -> None:
            while not done.wait(HEARTBEAT):
                self.say(f"compile: {text} ... {seconds():.0f} s")

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield seconds
        finally:
            done.set()
            thread.join()


def _run(entry: _Entry, call: Call) -> StepResult:
    with torch.no_grad():
        return entry.traced.result(entry.compiled(call.values))


def _on_any_rank(verdict: bool, hyper: Hyper, device: torch.device) -> bool:
    """Whether any rank says so: all of them must go on in the same way, or one would wait for the others for ever."""
    if hyper.network.group is None:
        return verdict
    return bool(sum_over_ranks(torch.tensor(float(verdict), device=device), hyper.network.group))


def _first_lines(text: str, count: int = 3) -> str:
    return " ".join(line.strip() for line in text.strip().splitlines()[:count])
