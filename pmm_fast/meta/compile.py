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
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pmm_fast.meta.agreement import Agreement, compare
from pmm_fast.meta.engines import ENGINES, Compiled, cache_folder
from pmm_fast.meta.network import State
from pmm_fast.meta.step import META_MODES, Batch, Hyper, Noise, StepResult, step
from pmm_fast.meta.trace import Call, CompileError, Traced, take_apart, trace
from pmm_fast.ops.collective import RankLostError, sum_over_ranks

T = TypeVar("T")

# graphs that one run may need: three domains are split 1 + 2 or 2 + 1, which are two layouts, and nine give eight
MAX_GRAPHS = 8
# of what each rank tells the others
TEXT_BYTES = 1000
# seconds between two signs of life
HEARTBEAT = 10.0
# what `--compile on` takes, by device type
BEST_ENGINES = {"cpu": "graph", "cuda": "cuda-graph"}
# iterations after which tracing was measured to have paid, where it was: docs/compile.md
PAYS_AFTER = {"cpu": 200}


class CompileMismatchError(ValueError):
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
    In a group of ranks the verdicts are exchanged, so that all go on alike and tell which rank had what; an engine that
    fails on one of them is an error.

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
            CompileError: with ``strict``: the step cannot be compiled, or has more than eight layouts.  In a group also
                without: the engine failed on this rank.
            CompileMismatchError: with ``strict``: the compiled step differs from eager mode.
        """
        arguments = (params, buffers, memory, batch_mtr, batch_mte, noise, hyper)
        if self.fallback is not None:
            return step(*arguments)
        call = take_apart(*arguments)
        entry = self._entries.get(call.key)
        if entry is not None and entry.checked:
            return _run(entry, call)
        # a graph that is given up may be held by nothing, or its memory would stay
        del entry
        # before anything is traced: an argument that does not fit gets its own error
        expected = step(*arguments)
        self._begin(call, expected, hyper)
        if self.fallback is not None and call.device.type == "cuda":
            torch.cuda.empty_cache()
        return expected

    def _begin(self, call: Call, expected: StepResult, hyper: Hyper) -> None:
        """Compile a new layout, and check the first batch of one; a gradient that is not finite tells nothing."""
        if call.key not in self._entries and len(self._entries) >= MAX_GRAPHS:
            self._no_room()
            return
        # the sums of a step over ranks need all of them
        finite = _told_by_ranks(None if _is_finite(expected) else "not finite", hyper, call.device) is None
        # before there is a graph, whose memory eager mode cannot use
        others = self._others(call, hyper) if finite else (None, None)
        if call.key not in self._entries:
            traced = self._trace(call, hyper)
            compiled = None if traced is None else self._attempt("compile", hyper, self._build, traced, call)
            if traced is None or compiled is None:
                return
            self._entries[call.key] = _Entry(traced, compiled)
        entry = self._entries[call.key]
        if not finite:
            return
        agreement = self._attempt("run", hyper, self._compare, entry, call, expected, others, hyper)
        if agreement is None:
            return
        self.agreements.append(agreement)
        failure = None if agreement.failure is None else f"{agreement.failure} ({agreement})"
        why = _told_by_ranks(failure, hyper, call.device)
        if why is None:
            entry.checked = True
            self.say(f"compile: checked against eager mode: {agreement}")
        else:
            self._give_up(f"the compiled step is not the eager one: {why}", CompileMismatchError)

    def _trace(self, call: Call, hyper: Hyper) -> Traced | None:
        """The graph of a new layout, or None where the step stays eager.  Runs no collective of the step."""
        traced = cause = None
        try:
            with self._stage("tracing the step") as seconds:
                traced = trace(call, fuses=self.engine == "inductor")
        # whatever a compiler raises is told, and is no reason to stop training
        except Exception as error:
            cause = error
        why = _told_by_ranks(None if cause is None else _describe(cause), hyper, call.device)
        if traced is None or why is not None:
            try:
                self._give_up(f"engine {self.engine!r} cannot compile the step: {why}", CompileError, cause)
            finally:
                # the error holds this frame, which would hold it, and with it all that its frames hold
                del cause
            return None
        self.trace_seconds += seconds()
        self.nodes = len(traced.graph.graph.nodes)
        self.say(f"compile: traced in {seconds():.0f} s, {self.nodes:,} nodes")
        return traced

    def _attempt(self, what: str, hyper: Hyper, work: Callable[..., T], *arguments: Any) -> T | None:
        """What may fail, or None: then the steps are eager.  In a group an error of one rank ends them all."""
        try:
            return work(*arguments)
        except RankLostError:
            raise
        except Exception as error:
            text = f"engine {self.engine!r} cannot {what} the step: {_describe(error)}"
            if hyper.network.group is not None:
                # the others may be in a sum of the step, which would take a verdict for this rank's part of it
                raise CompileError(f"{text}; with the option compile off the step is eager") from error
            self._give_up(text, CompileError, error)
        return None

    def _build(self, traced: Traced, call: Call) -> Compiled:
        with self._stage(f"compiling the step ({self.engine})") as seconds:
            earlier = [entry.compiled for entry in self._entries.values()]
            compiled = ENGINES[self.engine](traced.graph, call.values, earlier)
        self.compile_seconds += seconds()
        where = f", cached in {cache_folder()}" if self.engine == "inductor" else ""
        self.say(f"compile: engine {self.engine!r} ready in {seconds():.0f} s{where}")
        return compiled

    def _others(self, call: Call, hyper: Hyper) -> tuple[StepResult | None, StepResult | None]:
        """What else the check needs of eager mode: order 1 beside order 2, and the same step again on a GPU."""
        with self._stage("running eager mode to check against") as seconds:
            two_sided = hyper.order == 2 and hyper.mode in META_MODES
            first_order = call.at_order(1) if two_sided else None
            # sums by atomic additions and some kernels of cuDNN give other bits every time
            repeat = call.at_order(hyper.order) if call.device.type == "cuda" else None
            if repeat is not None and not _is_finite(repeat):
                repeat = None
        self.check_seconds += seconds()
        return first_order, repeat

    def _compare(
        self,
        entry: _Entry,
        call: Call,
        expected: StepResult,
        others: tuple[StepResult | None, StepResult | None],
        hyper: Hyper,
    ) -> Agreement:
        with self._stage("checking the step against eager mode") as seconds:
            found = _run(entry, call)
            agreement = compare(found, expected, others[0], hyper.autocast, others[1])
        self.check_seconds += seconds()
        return agreement

    def _no_room(self) -> None:
        text = f"{MAX_GRAPHS} layouts of the step are compiled, further ones run eagerly"
        if self.strict:
            raise CompileError(text)
        if not self._full:
            self._full = True
            self.say(f"compile: {text}")

    def _give_up(self, text: str, error: type[ValueError], cause: Exception | None = None) -> None:
        # what was captured for other layouts holds memory
        self._entries.clear()
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


def _is_finite(result: StepResult) -> bool:
    return bool(torch.stack([grad.isfinite().all() for grad in result.grads.values()]).all())


def _told_by_ranks(text: str | None, hyper: Hyper, device: torch.device) -> str | None:
    """What any rank has to tell, the same on all of them, which must go on alike or one would wait for ever."""
    group = hyper.network.group
    if group is None:
        return text
    # a row of bytes for each rank, added up
    rows = torch.zeros(torch.distributed.get_world_size(), TEXT_BYTES, dtype=torch.int32)
    said = (text or "").encode()[:TEXT_BYTES]
    rows[torch.distributed.get_rank(), : len(said)] = torch.tensor(list(said), dtype=torch.int32)
    sums = sum_over_ranks(rows.to(device), group).tolist()
    lines = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in sums]
    return "; ".join(f"rank {rank}: {line}" for rank, line in enumerate(lines) if line) or None


def _describe(error: Exception, lines: int = 3) -> str:
    first = " ".join(line.strip() for line in str(error).strip().splitlines()[:lines])
    return f"{type(error).__name__}: {first}"
