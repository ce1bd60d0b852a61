"""What the compiled step does when something fails: alone it falls back, in a group all ranks do the same."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import distributed

from pmm_fast import meta
from pmm_fast.meta import compile as compile_module
from pmm_fast.meta import trace as trace_module
from tests.distributed.ranks import run_ranks
from tests.meta.test_compile import assert_same, problem, silent, with_old_statistics
from tests.tolerances import COMPILED


def test_an_engine_that_fails(monkeypatch):
    def broken(graph, values, earlier):
        raise OSError("no C++ compiler found")

    monkeypatch.setitem(compile_module.ENGINES, "graph", broken)
    arguments, hyper = problem(mode="agg")
    compiled, lines = silent()
    for _ in range(2):
        assert_same(compiled(*arguments, hyper), meta.step(*arguments, hyper), COMPILED)
    assert len([line for line in lines if "OSError: no C++ compiler found" in line]) == 1
    strict, _ = silent(strict=True)
    with pytest.raises(meta.CompileError, match="engine 'graph' cannot compile the step: OSError"):
        strict(*arguments, hyper)
    with pytest.raises(ValueError, match="unknown engine 'gpu'; expected one of graph, inductor, cuda-graph"):
        meta.CompiledStep("gpu")


def runs_out(graph, values, earlier):
    """An engine whose function fails when it is run, with a tensor that its frame holds."""

    def run(inputs):
        held.append(weakref.ref(local := torch.zeros(1)))
        raise MemoryError(f"no {len(local)} byte left")

    return run


held: list[weakref.ref] = []


def test_an_engine_whose_function_fails(monkeypatch):
    monkeypatch.setitem(compile_module.ENGINES, "graph", runs_out)
    arguments, hyper = problem(mode="agg")
    compiled, lines = silent()
    for _ in range(2):
        assert_same(compiled(*arguments, hyper), meta.step(*arguments, hyper), COMPILED)
    assert len([line for line in lines if "cannot run the step: MemoryError: no 1 byte left; every step" in line]) == 1
    assert compiled.graphs == 0
    strict, _ = silent(strict=True)
    with pytest.raises(meta.CompileError, match="engine 'graph' cannot run the step: MemoryError") as caught:
        strict(*arguments, hyper)
    assert isinstance(caught.value.__cause__, MemoryError)


@pytest.mark.parametrize("stage", ["trace", "engine", "run"])
def test_what_failed_is_freed(stage, monkeypatch):
    """The error holds the frames that it went through and so graphs and their memory; no cycle may hold the error."""

    def broken(*arguments, **options):
        runs_out(None, None, None)(None)

    if stage == "trace":
        monkeypatch.setattr(compile_module, "trace", broken)
    else:
        monkeypatch.setitem(compile_module.ENGINES, "graph", broken if stage == "engine" else runs_out)
    arguments, hyper = problem(mode="agg")
    compiled, _ = silent()
    gc.collect()
    gc.disable()
    try:
        compiled(*arguments, hyper)
        assert compiled.fallback is not None and held[-1]() is None
    finally:
        gc.enable()


@pytest.fixture
def group():
    """The name of a process group with this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD.group_name
    distributed.destroy_process_group()


def test_a_verdict_is_that_of_all_ranks(group, monkeypatch):
    """Another rank's graph differs: this one, whose own is right, must not go on alone."""
    arguments, hyper = problem()
    hyper.network.group = group
    compiled, _ = silent(strict=True)
    for _ in range(2):
        assert_same(compiled(*arguments, hyper), meta.step(*arguments, hyper), COMPILED)
    assert compiled.graphs == 1
    said = torch.tensor(list(b"lost"), dtype=torch.int32)
    stages = {2: "cannot compile the step: rank 0: lost", 3: "is not the eager one: rank 0: lost"}
    for vote, stage in stages.items():
        votes = itertools.count(1)

        def add(x, group, votes=votes, vote=vote):
            return F.pad(said, (0, x.shape[1] - len(said))) + x if next(votes) == vote else x

        monkeypatch.setattr(compile_module, "sum_over_ranks", add)
        compiled, lines = silent()
        assert_same(compiled(*arguments, hyper), meta.step(*arguments, hyper), COMPILED)
        assert stage in (compiled.fallback or "") and stage in lines[-1] and compiled.graphs == 0


@pytest.mark.parametrize("stage", ["compile", "run"])
def test_an_engine_that_fails_in_a_group(stage, group, monkeypatch):
    """The other ranks are inside a step by then: no verdict, an error that ends them."""
    arguments, hyper = problem(mode="agg")
    hyper.network.group = group

    def broken(graph, values, earlier):
        raise MemoryError

    monkeypatch.setitem(compile_module.ENGINES, "graph", broken if stage == "compile" else runs_out)
    compiled, _ = silent()
    with pytest.raises(meta.CompileError, match=f"cannot {stage} the step: MemoryError.*with the option compile off"):
        compiled(*arguments, hyper)


def fail_on_rank_1(group: str, rank: int) -> dict[str, str | None]:
    """What a rank tells when tracing fails on rank 1, when the trace is wrong there, and the error with ``strict``."""
    arguments, hyper = problem(mode="agg")
    hyper.network.group = group

    def broken(call, fuses):
        raise OSError("a cause of its own")

    told = {}
    for name, trace in (("trace", broken), ("check", with_old_statistics)):
        compile_module.trace = trace if rank == 1 else trace_module.trace
        compiled, _ = silent()
        compiled(*arguments, hyper)
        told[name] = compiled.fallback
        with pytest.raises((meta.CompileError, meta.CompileMismatchError)) as caught:
            silent(strict=True)[0](*arguments, hyper)
        told[f"{name}, strict"] = str(caught.value)
    return told


def test_every_rank_tells_what_failed_on_another(tmp_path):
    first, second = run_ranks(fail_on_rank_1, 2, tmp_path)
    assert first == second
    for name, cause in (("trace", "rank 1: OSError: a cause of its own"), ("check", "rank 1: value error 1.00e+00 >")):
        assert cause in first[name] and cause in first[f"{name}, strict"] and "rank 0" not in first[name]
