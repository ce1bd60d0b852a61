"""The bench of the iteration: what it counts, when it refuses, what it prints and writes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import harness, meta_step, released_step, step_gate, step_report
from bench.phases import PHASES, Clock
from bench.step_variants import VARIANTS, Ours, Setup, count_products, new_iteration, products_of
from pmm_fast import meta
from tests.meta.tiny import tiny_problem

CPU = torch.device("cpu")
PAPER = Setup("deeplabv3plus_resnet50", (768, 768), 4, CPU)
SMALL = Setup("deeplabv3plus_mobilenet_v2", (32, 32), 2, CPU, channels=8)
WORDS = ["--architecture", "deeplabv3plus_mobilenet_v2", "--channels", "8", "--crop", "32", "32"]
WORDS += ["--device", "cpu", "--iterations", "2"]


# the counts of the released network's layers: 167.1 with everything, 107.5 what a rewrite needs
def test_products_of_the_paper():
    products = count_products(PAPER)
    assert products.whole / 1e3 == pytest.approx(167.1, rel=0.005)
    assert (products.encoder + products.writer) / 1e3 == pytest.approx(107.5, rel=0.005)
    assert products.first == pytest.approx(384**2 * 64 * 3 * 49 / 1e6)
    assert products_of(VARIANTS["released"], PAPER) / 1e6 == pytest.approx(5.30, rel=0.02)


def test_order_two_needs_six_more_products():
    first, second = (products_of(VARIANTS[name], PAPER) for name in ("order1", "order2"))
    products = count_products(PAPER)
    assert second - first == pytest.approx(PAPER.images * (6 * products.whole - 4 * products.first))
    assert products_of(VARIANTS["plain"], PAPER) < first
    assert products_of(VARIANTS["order2_checkpointed"], PAPER) is None


def test_phases_cover_the_step_and_leave_no_trace():
    grad, clock = torch.autograd.grad, Clock(CPU)
    with clock.phases_of_step(("inner_gradient", "outer_gradient")):
        found = clock.measure(lambda: meta.step(*tiny_problem()), "forward")
    assert set(found) == {"step", "forward", "inner_gradient", "outer_gradient", "memory"}
    assert all(seconds > 0 for seconds in found.values())
    assert found["step"] == pytest.approx(sum(found.values()) - found["step"])
    assert torch.autograd.grad is grad


def test_a_phase_inside_a_phase_belongs_to_the_outer_one():
    clock = Clock(CPU)

    def iterate():
        with clock.phase("memory"), clock.phase("optimizer"):
            pass

    assert set(clock.measure(iterate, "forward")) == {"step", "memory", "forward"}


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.compiled])
def test_every_eager_variant_runs(name):
    clock, iterate = Clock(CPU), new_iteration(VARIANTS[name], SMALL)
    found = clock.measure(lambda: iterate(clock), "forward")
    assert found["forward"] > 0 and "outer_gradient" in found
    assert ("optimizer" in found) != VARIANTS[name].alone
    assert ("inner_gradient" in found) == (VARIANTS[name].order is not None)


def test_an_iteration_of_ours_trains():
    iterate = Ours(VARIANTS["order2"], SMALL)
    weight, memory = iterate.params["decoder.classify.weight"].detach().clone(), iterate.memory.clone()
    mean = iterate.buffers["encoder.project.1.running_mean"].clone()
    iterate(Clock(CPU))
    assert not torch.equal(iterate.params["decoder.classify.weight"], weight)
    assert not torch.equal(iterate.memory, memory)
    assert not torch.equal(iterate.buffers["encoder.project.1.running_mean"], mean)


def test_peak_counts_the_copies_of_the_network():
    iteration, kept, peak = meta_step.weigh(lambda: new_iteration(VARIANTS["released"], SMALL), CPU)
    held = sum(parameter.nbytes for parameter in iteration.step.net.parameters())
    # theta, its gradient, its momentum, and two theta'; the images and the buffers are small
    assert 5 * held < kept < 5.5 * held
    # during an iteration the old theta' are there beside the new ones, a copy at a time, and the activations
    assert peak > kept + 0.5 * held


def measured(seconds, peak=100):
    return harness.Measured({"step": [seconds], "forward": [seconds]}, {"step": peak, "kept": peak // 2})


def test_records_targets_and_floor():
    times = {"released": (3.0, 200), "released_no_anomaly": (2.0, 200), "order1": (1.0, 100), "order2": (1.6, 130)}
    found = {VARIANTS[name]: measured(*values) for name, values in times.items()}
    records = step_report.records_of(found, SMALL)
    assert [tuple(record) for record in records] == [step_report.KEYS] * 4
    order1 = records[2]
    assert (order1["ratio_released"], order1["ratio_released_no_anomaly"]) == (3, 2)
    assert order1["images_per_s"] == 4 and order1["dtype"] == "float32" and order1["order"] == 1
    assert all(len(step_report.row(record)) == len(step_report.HEADER) for record in records)
    lines = step_report.target_lines(records, "cpu")
    verdicts = [line.split()[-1] for line in lines if ">=" in line or "<=" in line]
    assert verdicts == ["yes", "yes", "no", "yes", "no"]
    assert "1.60x the time for" in lines[-1] and "six more products" in lines[-1]
    assert step_report.target_lines([], "cpu") == []


def test_the_gap_to_a_plain_pass():
    found = {VARIANTS["order2_bf16"]: measured(4.0), VARIANTS["plain_bf16"]: measured(1.0)}
    work = products_of(VARIANTS["order2_bf16"], SMALL) / products_of(VARIANTS["plain_bf16"], SMALL)
    (line,) = step_report.plain_lines({r["variant"]: r for r in step_report.records_of(found, SMALL)})
    assert f"4.00x the time of a plain forward and backward in bf16 for {work:.2f}x" in line
    assert f"{work / 4:.0%} of its rate" in line


def test_a_run(tmp_path, capsys):
    names = ["released", "released_no_anomaly", "order1", "order2_bf16", "order2_checkpointed"]
    files = [str(tmp_path / name) for name in ("a.json", "a.png")]
    with pytest.raises(SystemExit) as ended:
        meta_step.main([*WORDS, "--variants", *names, "--json", files[0], "--plot", files[1]])
    assert not ended.value.code
    records = json.loads((tmp_path / "a.json").read_text())
    assert [record["variant"] for record in records] == names
    for record in records:
        assert list(record)[: len(step_report.KEYS)] == list(step_report.KEYS)
        assert (
            record["peak_bytes"] > record["kept_bytes"] > 0 and record["repeats"] == 2 and record["compiled"] is False
        )
        assert set(record["split_s"]) == {"forward", *PHASES}
        assert {"device", "torch", "commit", "threads", "compile_seconds", "graph_nodes"} <= set(record)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "gate: released is order 1" in printed and "FAILED" not in printed and "order1_bf16:" not in printed


def test_a_released_step_that_is_perturbed_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(released_step, "COHESION_WEIGHT", 0.021)
    monkeypatch.setattr(meta_step.Session, "run", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit) as ended:
        meta_step.main([*WORDS, "--variants", "released", "order1"])
    assert ended.value.code not in (0, None)
    assert "gate: FAILED: released is order 1" in capsys.readouterr().out


def test_an_order_two_that_is_order_one_is_not_timed(monkeypatch):
    right = step_gate.run_ours
    monkeypatch.setattr(step_gate, "run_ours", lambda setup, order, *rest, **named: right(setup, 1, *rest, **named))
    fine = [fine for fine, _ in step_gate.judge(SMALL, [])]
    assert fine == [True, False]


def test_autocast_that_points_elsewhere_fails(monkeypatch):
    right = step_gate.run_ours

    def wrong(setup, order, dtype, variant):
        found = right(setup, order, dtype, variant)
        if variant is not None:
            found.grads = {name: value.flip(0) for name, value in found.grads.items()}
        return found

    setup = step_gate.autocast_setup(SMALL)
    assert step_gate.check_autocast(setup, VARIANTS["order1_bf16"])[0]
    monkeypatch.setattr(step_gate, "run_ours", wrong)
    assert not step_gate.check_autocast(setup, VARIANTS["order1_bf16"])[0]


def test_what_fails_is_named_and_the_rest_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(meta_step, "passes_gate", lambda *_: True)
    words = [*WORDS, "--variants", "order1_compiled", "order1", "--engine", "steam"]
    with pytest.raises(SystemExit) as ended:
        meta_step.main(words)
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "order1_compiled         NOT AVAILABLE: " in printed and "steam" in printed
    assert any(line.startswith("order1  ") for line in printed.splitlines())


def test_on_a_gpu_one_variant_after_the_other(monkeypatch, tmp_path, capsys):
    """Each has the memory for itself; what there is no time for is said, and what was timed stays in the file."""
    names = ["released", "order2_bf16_compiled", "order1"]
    options = meta_step.arguments([*WORDS, "--json", str(tmp_path / "a.json")])
    session = meta_step.Session(replace(SMALL, device=torch.device("cuda")), options, {"device": "H"})
    seen = []

    def prepare(variant):
        session._ready[variant] = lambda clock: None
        session._compiling[variant] = {}
        session.measured[variant] = harness.Measured(peak_bytes={"step": 2, "kept": 1})

    def measure(self, iterate, remainder):
        seen.append([variant.name for variant in session._ready])
        return {"step": 1.0, remainder: 1.0}

    monkeypatch.setattr(session, "_prepare", prepare)
    monkeypatch.setattr(session, "_is_late", lambda: len(seen) >= 4)
    monkeypatch.setattr(meta_step, "release_memory", lambda device: None)
    monkeypatch.setattr(Clock, "measure", measure)
    session.run([VARIANTS[name] for name in names])
    assert seen == [["released"]] * 2 + [["order2_bf16_compiled"]] * 2
    session.finish()
    assert "order1                  NOT MEASURED: 130 s were over" in capsys.readouterr().out
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["variant"] for row in rows] == names[:2] and not session.failed


def test_what_a_row_tells_of_a_compiled_step():
    step = meta.CompiledStep("inductor")
    step.trace_seconds, step.compile_seconds, step.check_seconds, step.nodes = 1.0, 2.0, 4.0, 9
    found = meta_step.compile_facts(SimpleNamespace(step=step))
    assert found["compiled_by"] == "inductor" and found["compile_seconds"] == 7 and found["graph_nodes"] == 9
    assert found["compile_split_s"] == {"trace": 1, "compile": 2, "check": 4}
    plain = meta_step.compile_facts(SimpleNamespace(step=meta.step))
    assert list(plain) == list(found) and set(plain.values()) == {None}


def test_variants_choose_engine_and_search():
    assert VARIANTS["order2_bf16_inductor"].engine == "inductor" and VARIANTS["order2_bf16_compiled"].engine is None
    searched = Ours(VARIANTS["order2_bf16_searched"], SMALL)
    seen = []
    searched._iterate = lambda clock: seen.append(torch.backends.cudnn.benchmark)
    searched(Clock(CPU))
    assert seen == [True] and not torch.backends.cudnn.benchmark


def test_presets_and_refusals(capsys):
    paper = meta_step.arguments(["--preset", "paper", "--device", "cpu", "--images", "3"])
    assert (paper.crop, paper.images, paper.tf32) == ((768, 768), 3, True)
    assert "order2_bf16_compiled" in paper.variants and "released" in paper.variants
    small = meta_step.arguments(["--device", "cpu", "--tf32"])
    assert (small.crop, small.images, small.tf32) == ((192, 192), 2, True)
    with pytest.raises(SystemExit):
        meta_step.arguments(["--iterations", "0"])
    assert "--iterations: expected a positive number, got 0" in capsys.readouterr().err
