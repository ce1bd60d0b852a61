"""The bench's own logic: what it measures, how it counts, what it prints and writes."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from bench import cases as C
from bench import harness, memory_ops, report
from bench.cases import Work, work

CPU = torch.device("cpu")
RATES = harness.Rates(bandwidth=1e9, exponentials=1e9, products=1e9)


def case_of(op, size, dtype="float32"):
    return next(case for case in C.all_cases() if (case.op, case.size, case.dtype) == (op, size, dtype))


# the figures of docs/ops, MB
@pytest.mark.parametrize(
    ("op", "size", "expected"),
    [
        ("masked_average_pool", "paper", (18.9, 37.7, 56.6)),
        ("memory_read", "paper", (39.1, 58.0, 97.2)),
        ("memory_pass", "paper/one", (39.1, 58.0, 97.2)),
        ("memory_pass", "paper/two", (58.0, 95.8, 153.8)),
        ("upsample_cross_entropy", "paper/192", (27.1, 49.5, 71.9)),
        ("upsample_cross_entropy", "paper/48", (6.1, 7.5, 8.9)),
    ],
)
def test_bytes_are_those_of_the_documentation(op, size, expected):
    case = case_of(op, size)
    found = [work(case, which).moved / 1e6 for which in ("fwd", "bwd", "bwd2")]
    assert found == pytest.approx(expected, rel=0.01)
    assert work(case, "fwd+bwd").moved == work(case, "fwd").moved + work(case, "bwd").moved


def test_exponentials():
    assert work(case_of("upsample_cross_entropy", "paper/48"), "bwd").exponentials == 8 * 19 * 768 * 768
    assert work(case_of("memory_read", "paper"), "fwd").exponentials == 3 * 8 * 19 * 48 * 48
    assert work(case_of("masked_average_pool", "paper"), "fwd").exponentials == 0


def test_bf16_moves_half_of_the_features():
    ratio = work(case_of("masked_average_pool", "paper", "bf16"), "bwd").moved / 37.75e6
    assert ratio == pytest.approx(0.5, rel=0.01)


def test_labels_look_like_a_street():
    inputs = C.make_inputs(case_of("masked_average_pool", "paper"), CPU)
    again = C.make_inputs(case_of("masked_average_pool", "paper"), CPU)
    assert torch.equal(inputs.labels, again.labels) and inputs.labels.dtype == torch.uint8
    ignored = (inputs.labels == 255).float().mean()
    assert 0.05 < ignored < 0.2
    assert (inputs.labels[:, 1:] == inputs.labels[:, :-1]).float().mean() > 0.95
    assert set(inputs.labels.unique().tolist()) <= {*range(19), 255} and len(inputs.labels.unique()) > 15


def test_one_tensor_and_two_tensors():
    one, two = (C.make_inputs(case_of("memory_pass", f"small/{name}"), CPU) for name in ("one", "two"))
    assert len(one.maps) == 1 and len(two.maps) == 2 and not torch.equal(*two.maps)


def test_peak_counts_what_lives_together():
    def call():
        first = torch.empty(1000, 1000)
        second = torch.empty(1000, 1000)
        del first
        third = torch.empty(500, 1000)
        del second
        return third

    peak, kept, _ = harness.cpu_peak(call)
    assert (peak, kept) == (8_000_000, 2_000_000)


def test_peaks_of_the_passes():
    case = case_of("masked_average_pool", "small")
    runner = harness.Runner(C.released_variant(case.op), C.make_inputs(case, CPU))
    peaks = harness.peaks(runner, CPU, True)
    one_hot = 2 * 96 * 96 * 20
    assert peaks["fwd"] >= one_hot * (8 + 8 + 4)
    assert peaks["fwd+bwd"] >= max(peaks["fwd"], peaks["bwd"])
    assert set(peaks) == set(C.PASSES)
    # a clock on a GPU must record a graph of its own, on the stream that captures
    assert runner._second is None


def test_percentiles():
    measured = harness.Measured({"fwd": [3.0, 1.0, 2.0, 5.0, 4.0, 6.0]})
    assert [measured.percentile("fwd", p) for p in (0, 20, 50, 80, 100)] == [1, 2, 3.5, 5, 6]


class Fake:
    """A clock that says what it is told."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def first(self):
        self.log.append(self.name)
        return {"fwd": 0.5}


def test_implementations_take_turns():
    log, ticks = [], []
    clocks = {"a": Fake("a", log), "b": Fake("b", log)}
    found, failed = harness.time_together(clocks, "first", 0.0, lambda: ticks.append(1))
    assert not failed and log == ["a", "b"] * harness.ROUNDS == log and len(ticks) == 2 * harness.ROUNDS
    assert found == {"a": {"fwd": [0.5] * 3}, "b": {"fwd": [0.5] * 3}}


def test_one_that_fails_ends_alone():
    class Broken(Fake):
        def first(self):
            if len(self.log) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().first()

    log = []
    found, failed = harness.time_together({"a": Broken("a", log), "b": Fake("b", log)}, "first", 0.0, lambda: None)
    assert list(found) == ["b"] and len(found["b"]["fwd"]) == harness.ROUNDS
    assert str(failed["a"]) == "CUDA out of memory" and failed["a"].__traceback__ is None


def records(cpu, released):
    case = case_of("masked_average_pool", "paper")
    measured = {
        "cpu": harness.Measured({key: [value] for key, value in cpu.items()}, dict.fromkeys(cpu, 30)),
        "released": harness.Measured({key: [value] for key, value in released.items()}, dict.fromkeys(released, 1000)),
    }
    return report.records_of(case, measured, list(C.PASSES), RATES)


def test_records():
    found = records({"fwd": 0.01, "bwd": 0.02}, {"fwd": 2.0})
    assert [tuple(record) for record in found] == [report.KEYS] * 3
    forward, backward, _ = found
    assert forward["median_ms"] == pytest.approx(10) and forward["ratio_released"] == pytest.approx(200)
    assert forward["ratio_reference"] is None and backward["ratio_released"] is None
    assert forward["bandwidth_share"] == pytest.approx(forward["bytes_moved"] / 0.01 / 1e9)
    assert all(len(report.row(record)) == len(report.HEADER) for record in found)


def test_targets():
    found = records({"fwd": 0.01, "bwd": 0.02, "fwd+bwd": 0.03, "bwd2": 0.07}, {"fwd": 2.0, "fwd+bwd": 2.1})
    lines = report.target_lines(found, ["cpu"], "cpu", RATES)
    verdicts = [line.split()[-1] for line in lines[1:] if not line.startswith(" ")]
    # 200x of 150x, 70x of 80x, 3 % of 2 %, 3.5x of 3x
    assert verdicts == ["met", "MISSED", "MISSED", "MISSED"]
    floors = [line for line in lines if line.startswith("    ")]
    assert len(floors) == 2 and "floor" in floors[0]
    assert not report.target_lines([], ["cpu"], "cpu", RATES)


def test_floor_is_the_slowest_part():
    assert report.floor_seconds(Work(2_000_000_000, 1_000_000_000, 500_000_000), RATES) == 2
    assert report.floor_seconds(Work(1, 3_000_000_000, 500_000_000), RATES) == 3


def test_pace_leaves_out_what_would_not_end(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(memory_ops.time, "monotonic", lambda: now[0])
    paper, small = case_of("memory_read", "paper"), case_of("memory_read", "small")
    pace = memory_ops.Pace(100, "cpu")
    assert pace.fits(paper)
    pace.add(paper, 30)
    now[0] = 30
    assert pace.fits(paper) and not pace.fits(paper, 40)
    now[0] = 80
    assert not pace.fits(paper) and pace.fits(small)


def test_on_a_gpu_a_large_case_takes_little_longer():
    pace = memory_ops.Pace(100, "cuda")
    assert pace.weight(case_of("memory_pass", "fill/two")) < 2 * pace.weight(case_of("memory_pass", "paper/two"))


@pytest.mark.parametrize(
    ("words", "count"),
    [("", 6 + 5 + 2), ("--full", 32), ("--size paper --dtype float32", 6), ("--op memory_pass --size paper/one", 2)],
)
def test_choice_of_cases(words, count):
    options = memory_ops.arguments([*words.split(), "--device", "cpu"])
    assert len(memory_ops.chosen_cases(options)) == count


def test_a_run(tmp_path, capfd):
    words = "--op masked_average_pool --size small --dtype float32 --backend reference released --seconds 0.01"
    files = [str(tmp_path / name) for name in ("a.json", "a.csv", "a.png")]
    with pytest.raises(SystemExit) as ended:
        memory_ops.main([*words.split(), "--device", "cpu", "--json", files[0], "--csv", files[1], "--plot", files[2]])
    assert not ended.value.code
    found = json.loads((tmp_path / "a.json").read_text())
    assert [(r["backend"], r["pass"]) for r in found] == [(b, p) for b in ("reference", "released") for p in C.PASSES]
    assert list(found[0])[: len(report.KEYS)] == list(report.KEYS)
    about = {"device", "torch", "triton", "commit", "threads", "date", *RATES.facts()}
    assert about == set(found[0]) - set(report.KEYS)
    assert len(list(csv.DictReader((tmp_path / "a.csv").open()))) == len(found)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "skipped: cpu: " in capfd.readouterr().out


def test_a_wrong_backend_fails_the_run(monkeypatch, capsys):
    right = C.reference_variant("masked_average_pool")

    def wrong(op):
        def run(inputs, noise):
            sums, mass = right.function(inputs, noise)
            return sums * 1.01, mass

        return C.Variant("released", run)

    monkeypatch.setattr(memory_ops.C, "released_variant", wrong)
    words = "--op masked_average_pool --size small --dtype float32 --backend released --seconds 0.01 --device cpu"
    with pytest.raises(SystemExit) as ended:
        memory_ops.main(words.split())
    assert ended.value.code == 1
    assert "FAILED: fwd, value 0: relative error 1.0e-02" in capsys.readouterr().out


def test_compiling_comes_last_where_time_is_limited(monkeypatch):
    asked = []

    def run_case(case, variants, options, tick):
        asked.append([variant.name for variant in variants])
        measured = {v.name: harness.Measured({"fwd": [1.0 if v.name == "released" else 0.5]}) for v in variants}
        return memory_ops.Outcome(measured)

    monkeypatch.setattr(memory_ops, "run_case", run_case)
    words = "--op masked_average_pool --dtype float32 --backend released compiled --limit 500 --device cpu"
    options = memory_ops.arguments(words.split())
    cases = [case_of("masked_average_pool", "paper"), case_of("masked_average_pool", "small")]
    session = memory_ops.Session(options, cases, [], RATES, {})
    session.run()
    assert asked == [["released"], ["released"], ["compiled"], ["compiled"]]
    assert [r["ratio_compiled"] for r in session.records(cases[0])] == [0.5, 1.0]
    options.limit = memory_ops.COMPILING - 1
    session.run()
    assert any("no time left" in remark for remark in session.remarks)
