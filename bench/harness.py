"""Measuring one case: seconds and peak memory of every pass, and what the machine can do.

The passes of an implementation: ``fwd`` with the graph recorded, ``bwd`` all first derivatives, ``fwd+bwd`` the two in
one go, ``bwd2`` the derivatives of ``bwd``.  Seconds are taken with ``perf_counter`` on a CPU; on a GPU a pass is
captured as a CUDA graph and replayed between two events, with something else read into the L2 cache before each replay.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.cases import Inputs, Variant
from bench.gate import differentiable

ROUNDS = 3
# calls between two events
AT_ONCE = 8


def cpu_name() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


@dataclass(frozen=True)
class Rates:
    """What the machine reaches in this run, a second: bytes copied (read plus written), exponentials, multiply-adds."""

    bandwidth: float
    exponentials: float
    products: float

    def facts(self) -> dict[str, float]:
        """By the names that they have in a record."""
        return {
            "copy_bytes_per_s": self.bandwidth,
            "exponentials_per_s": self.exponentials,
            "products_per_s": self.products,
        }


def least_seconds(call: Callable[[], object], device: torch.device, seconds: float = 0.5) -> float:
    """The shortest duration of a call, repeated for about ``seconds``: limits are what the machine can do at best."""
    call(), call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        times.append(call_seconds(call, device))
    return min(times)


def call_seconds(call: Callable[[], object], device: torch.device) -> float:
    """The duration of a call; on a GPU of one of several in a row, so that the launch of the first hardly counts."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(AT_ONCE):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / AT_ONCE


def measure_rates(device: torch.device) -> Rates:
    """Copy a buffer far larger than the caches, take exponentials of one that fits them, multiply two matrices."""
    large, side = (2**31, 4096) if device.type == "cuda" else (2**28, 768)
    source = torch.rand(large // 4, device=device)
    target = torch.empty_like(source)
    copy = least_seconds(lambda: target.copy_(source), device)
    matrix, product = torch.rand(side, side, device=device), torch.empty(side, side, device=device)
    multiply = least_seconds(lambda: torch.mm(matrix, matrix, out=product), device, 0.2)
    exponentials = _cuda_exponentials(device) if device.type == "cuda" else _cpu_exponentials()
    return Rates(2 * large / copy, exponentials, side**3 / multiply)


def _cpu_exponentials() -> float:
    """Exponentials a second: by one thread and multiplied, since starting the others takes longer than so few."""
    count, threads = 2**15, torch.get_num_threads()
    numbers, out = torch.rand(count), torch.empty(count)
    torch.set_num_threads(1)
    taken = least_seconds(lambda: torch.exp(numbers, out=out), torch.device("cpu"), 0.2)
    torch.set_num_threads(threads)
    return threads * count / taken


def _cuda_exponentials(device: torch.device) -> float:
    """Exponentials a second: many of each number, for torch.exp on a GPU waits for memory."""
    # here and not at the top: Triton decides when a kernel is defined whether it is interpreted
    from bench.exponentials import ROUNDS as TIMES
    from bench.exponentials import exponentials

    numbers = torch.rand(2**22, device=device)
    return len(numbers) * TIMES / least_seconds(lambda: exponentials(numbers), device, 0.2)


@dataclass
class Measured:
    """What was found out about one implementation of a case, by pass."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def percentile(self, which: str, percent: int) -> float:
        """Seconds that ``percent`` of the repeats stay below, interpolated."""
        ordered = sorted(self.seconds[which])
        place = (len(ordered) - 1) * percent / 100
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class Runner:
    """The passes of one implementation as calls without arguments."""

    def __init__(self, variant: Variant, inputs: Inputs) -> None:
        self.variant = variant
        self.inputs = inputs.convert()
        self.leaves = self.inputs.leaves()
        self._gradients: list[Tensor] = []
        self._of_leaves = [torch.randn_like(leaf) for leaf in self.leaves]
        self._second: Callable[[], tuple[Tensor, ...]] | None = None

    def forward(self) -> tuple[Tensor, ...]:
        return self.variant.function(self.inputs, None)

    def draw_gradients(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The gradients that come in, the same ones every time."""
        if not self._gradients:
            self._gradients = [torch.randn_like(output) for output in differentiable(outputs)]
        return self._gradients

    def backward(self, outputs: tuple[Tensor, ...], keep: bool = False) -> tuple[Tensor, ...]:
        """First derivatives; ``keep`` the graph for another time."""
        return torch.autograd.grad(
            differentiable(outputs), self.leaves, self.draw_gradients(outputs), retain_graph=keep
        )

    def second(self) -> Callable[[], tuple[Tensor, ...]]:
        """The double backward, to be called repeatedly; forward and recorded backward run once, now."""
        if self._second is None:
            outputs = self.forward()
            incoming = [gradient.detach().requires_grad_() for gradient in self.draw_gradients(outputs)]
            first = torch.autograd.grad(differentiable(outputs), self.leaves, incoming, create_graph=True)
            ends = (*self.leaves, *incoming)
            self._second = lambda: torch.autograd.grad(first, ends, self._of_leaves, retain_graph=True)
        return self._second

    def release(self) -> None:
        """Let go of the graph that the double backward works on."""
        self._second = None


class Clock:
    """Times the passes of a runner on a CPU."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def first(self) -> dict[str, float]:
        """One forward and one backward."""
        start = time.perf_counter()
        outputs = self.runner.forward()
        middle = time.perf_counter()
        self.runner.backward(outputs)
        end = time.perf_counter()
        return {"fwd": middle - start, "bwd": end - middle, "fwd+bwd": end - start}

    def second(self) -> dict[str, float]:
        """One double backward; the graph it works on is made once."""
        call = self.runner.second()
        start = time.perf_counter()
        call()
        return {"bwd2": time.perf_counter() - start}


class Side:
    """What the clocks of a case share on a GPU: the stream that all is captured on, and the memory of the graphs.

    Replays follow one another and nobody looks at their results, so each may use the memory of the others.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        # four times the largest L2 cache there is
        self._other = torch.zeros(2**26, device="cuda")
        self._sum = torch.zeros((), device="cuda")

    def empty_cache(self) -> None:
        """Fill the L2 cache with something else, by reading: what is written would be carried out later, in the time
        of what is measured."""
        torch.sum(self._other, (0,), out=self._sum)


def _waits(call: Callable[[], object]) -> bool:
    """Whether a call waits for the host: its capture would fail, and leave PyTorch 2.11's generator in it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


class GraphClock:
    """Times the passes of a runner on a GPU: replays of CUDA graphs, so that launches do not count.

    What cannot be captured is run as it is, between the same events.  The released code's waits for the host are left
    out (``bench/released_ops.py``), to its advantage.
    """

    def __init__(self, runner: Runner, side: Side) -> None:
        self.runner, self.side = runner, side
        self._calls: dict[str, Callable[[], object]] = {}
        self.not_captured: set[str] = set()

    def first(self) -> dict[str, float]:
        """A replay each of forward, backward, and the two together."""
        return {which: self._time(which) for which in ("fwd", "bwd", "fwd+bwd")}

    def second(self) -> dict[str, float]:
        """A replay of the double backward."""
        return {"bwd2": self._time("bwd2")}

    def _call_of(self, which: str) -> Callable[[], object]:
        """A pass as a call; what it needs has been computed on the stream that captures, as a derivative must be."""
        runner = self.runner
        if which == "fwd":
            return runner.forward
        if which == "fwd+bwd":
            return lambda: runner.backward(runner.forward())
        if which == "bwd2":
            return runner.second()
        outputs = runner.forward()
        return lambda: runner.backward(outputs, keep=True)

    def _capture(self, which: str) -> Callable[[], object]:
        self.side.stream.wait_stream(torch.cuda.current_stream())
        # around the capture too: one that fails leaves its stream the current one
        with torch.cuda.stream(self.side.stream):
            call = self._call_of(which)
            for _ in range(2):
                call()
            torch.cuda.synchronize()
            if _waits(call):
                self.not_captured.add(which)
                return call
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.side.pool, stream=self.side.stream):
                    call()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                torch.cuda.synchronize()
                self.not_captured.add(which)
                return call

        def replay(kept: object = call) -> None:
            # the call keeps what the graph reads
            graph.replay()

        return replay

    def _time(self, which: str) -> float:
        if which not in self._calls:
            self._calls[which] = self._capture(which)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.side.stream):
            self.side.empty_cache()
            start.record()
            self._calls[which]()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clocks(runners: dict[str, Runner], device: torch.device) -> dict[str, Clock | GraphClock]:
    """A clock for each implementation of a case."""
    if device.type != "cuda":
        return {name: Clock(runner) for name, runner in runners.items()}
    side = Side()
    return {name: GraphClock(runner, side) for name, runner in runners.items()}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what native code writes to stderr: some builds of the profiler announce every start and stop there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def cpu_peak(call: Callable[[], object]) -> tuple[int, int, object]:
    """Highest and final balance of the bytes that a call allocates through torch, and what it returns."""
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    balances = [0, *itertools.accumulate(event.nbytes() for event in events)]
    return max(balances), balances[-1], result


def cuda_peak(call: Callable[[], object]) -> tuple[int, int, object]:
    """The same on a GPU, from the allocator's own account."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before, result


def peaks(runner: Runner, device: torch.device, twice: bool) -> dict[str, int]:
    """Peak bytes of every pass above what was allocated before it; outputs and what is saved count."""
    peak_of = cuda_peak if device.type == "cuda" else cpu_peak
    held: list[tuple[Tensor, ...]] = []
    forward, kept, _ = peak_of(lambda: held.append(runner.forward()))
    runner.draw_gradients(held[0])
    backward, _, _ = peak_of(lambda: runner.backward(held[0]))
    held.clear()
    found = {"fwd": forward, "bwd": backward, "fwd+bwd": max(forward, kept + backward)}
    if twice:
        found["bwd2"] = peak_of(runner.second())[0]
        # a clock makes its own: a graph can only be captured on the stream that it was recorded on
        runner.release()
    return found


def time_together(
    clocks: dict[str, Clock | GraphClock],
    part: str,
    seconds: float,
    tick: Callable[[], object],
    least: int = 3,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Exception]]:
    """Durations of a clock's ``part`` ("first" or "second") for several implementations, in turns.

    Each gets about ``seconds`` of time in ``ROUNDS`` turns, and at least ``least`` repeats.  They are warm: their
    memory has been measured before.

    Returns:
        Durations by implementation and pass; and what ended an implementation, which then has no durations.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in clocks}
    failed: dict[str, Exception] = {}
    for _ in range(ROUNDS):
        for name, clock in clocks.items():
            run = getattr(clock, part)
            spent, repeats = 0.0, 0
            while name in found and (repeats * ROUNDS < least or spent < seconds / ROUNDS):
                began = time.perf_counter()
                try:
                    durations = run()
                except Exception as error:
                    # without the frames, which hold what was on the device
                    failed[name] = error.with_traceback(None)
                    del found[name]
                    break
                for which, duration in durations.items():
                    found[name].setdefault(which, []).append(duration)
                spent += time.perf_counter() - began
                repeats += 1
            tick()
    return found, failed
