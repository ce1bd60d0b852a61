"""bench/gpu_check.py and what it is made of, as far as a machine without a GPU can tell."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import pytest

from bench import end_to_end, gpu_check, gpu_record, gpu_steps, gpu_summary, memory_ops, meta_step, report, step_report
from bench.gpu_steps import Step
from bench.revision import revision
from tests import repository

GPU = {
    "device": "A GPU",
    "memory": 80,
    "capability": "9.0",
    "torch": "2",
    "cuda": "13",
    "triton": "3",
    "python": "3.12",
}
PYTHON = sys.executable


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session that runs whatever it is given."""
    monkeypatch.setattr(gpu_check, "SCRATCH", tmp_path / "parts")
    monkeypatch.setattr(gpu_check, "LEAST", 0.5)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    for name in ("parts", "results", "out"):
        (tmp_path / name).mkdir()
    return lambda seconds=100.0, **other: gpu_check.Session(
        tmp_path / "out", GPU | {"rehearsal": False} | other, False, time.monotonic() + seconds
    )


def script(name, code, limit=60, fills=""):
    """A step that runs a line of Python; ``{json}`` is its last argument."""
    return Step(name, f"'{PYTHON}' -c \"{code}\" {{json}}", limit, fills=fills)


@pytest.fixture
def writes(tmp_path):
    """Makes a step that writes rows."""
    numbers = itertools.count()

    def make(name, content, fills):
        source = tmp_path / f"{next(numbers)}.json"
        source.write_text(json.dumps(content))
        return Step(name, f"cp {source} {{json}}", 60, fills=fills)

    return make


# --- which steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", gpu_steps.SETS)
def test_a_set_begins_with_the_build_and_fits_a_call(name):
    groups = gpu_steps.chosen([name])
    assert groups[0][0].name == "build"
    if name != "tests":
        assert groups[1][0].name == "rates"
    assert sum(max(step.limit for step in group) for group in groups) <= 570 - gpu_check.SUMMARY


def test_sets_are_everything():
    assert set(gpu_steps.BY_NAME) == {"build"}.union(*gpu_steps.SETS.values())


def test_what_measures_runs_alone():
    groups = gpu_steps.chosen(list(gpu_steps.SETS))
    together = [step.name for group in groups if len(group) > 1 for step in group]
    alone = {
        "build",
        "rates",
        "memory_ops",
        "meta_step",
        "meta_step-rest",
        "memory_ops-compiled",
        "photometric",
        "evaluation",
    }
    assert len(together) == len(set(together)) and not alone & set(together)
    names = [step.name for group in groups for step in group]
    assert names == list(gpu_steps.BY_NAME)


def test_unknown_step(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--steps", "first", "nonsense"])
    assert "--steps: unknown step 'nonsense'; expected first, figures, tests, build, " in capsys.readouterr().err


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize("name", gpu_steps.BY_NAME)
def test_commands_name_what_exists(name, rehearse):
    """Programs, their options, and where they can be asked, their values."""
    step = gpu_steps.BY_NAME[name]
    words = gpu_check.command_of(step, 100.0, rehearse)
    assert not any(field in " ".join(words) for field in ("{", "}"))
    if rehearse and not step.miniature:
        assert words == []
        return
    programs = [word for word in words if word.startswith("bench/")]
    for program in programs:
        source = (repository.ROOT / program).read_text()
        options = [word for word in words[words.index(program) :] if word.startswith("--")]
        assert all(f'"{option}"' in source for option in options), (program, options)
    for module in (memory_ops, meta_step):
        program = f"bench/{module.__name__.rpartition('.')[2]}.py"
        if program in programs:
            options = module.arguments(words[words.index(program) + 1 :])
            assert options.limit == 80 or rehearse


# --- running them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "limit", "status"),
    [
        ("print('fine')", 30, "ok"),
        ("print('bad'); raise SystemExit(3)", 30, "exit status 3"),
        # what it has started ends with it
        ("import subprocess; print('on', flush=True); subprocess.run(['sleep', '60'])", 1, "out of time"),
    ],
)
def test_a_step_never_stops_the_others(session, code, limit, status):
    one, start = session(), time.monotonic()
    # the last steps have what is left over
    one.deadline = start + limit + 10
    one.run([[script("rates", code, limit), script("doctor", "print('too')")]])
    assert time.monotonic() - start < 50
    steps = {step["name"]: step for step in gpu_record.read(one.file)["steps"]}
    assert steps["rates"]["status"] == status and steps["doctor"]["status"] == "ok"
    assert steps["rates"]["output"].strip() in ("fine", "bad", "on") and steps["doctor"]["output"] == "too\n"
    assert one.failed == (status != "ok")


def test_a_child_in_a_session_of_its_own_does_not_hold_the_others_up(session):
    one, start = session(), time.monotonic()
    one.deadline = start + 8
    code = "import subprocess; print('on', flush=True); subprocess.run(['sleep', '30'], start_new_session=True)"
    one.run([[script("rates", code, 1)]])
    assert time.monotonic() - start < 25
    assert one.record["steps"][0]["status"] == "out of time" and one.record["steps"][0]["output"].strip() == "on"


def test_a_step_has_its_time_and_what_those_after_it_do_not_need(session):
    one = session()
    one.deadline = time.monotonic() + 100
    given = []
    one._execute = lambda command, seconds: (given.append(round(seconds)), ("ok", ""))[1]
    one.run([[script("rates", "", 30)], [script("doctor", "", 50)]])
    # of 100: 50 are another's; then all
    assert given == [50, 100]
    one.deadline = time.monotonic() + 60
    one.run([[script("rates", "", 30)], [script("doctor", "", 50)]])
    assert given[2:] == [30, 60]


def test_a_program_that_is_not_there(session):
    one = session()
    one.run([[Step("rates", "no-such-program", 30)]])
    assert one.record["steps"][0]["status"] == "not there: no-such-program" and one.failed


def test_nothing_starts_when_time_is_up(session):
    one = session(seconds=0.4)
    one.run([[script("rates", "print('ran')")]])
    assert one.record["steps"][0]["status"] == "out of time" and one.record["steps"][0]["output"] == ""


def test_the_record_is_written_after_every_step(session):
    """So a call that is cut off loses nothing; its steps are in the order of the table."""
    one = session()
    one.run([[script("doctor", "print(1)")]])
    assert [step["name"] for step in gpu_record.read(one.file)["steps"]] == ["doctor"]
    one.run([[script("rates", "print(2)")]])
    assert [step["name"] for step in gpu_record.read(one.file)["steps"]] == ["rates", "doctor"]
    assert one.file.name == "a-gpu.json" and not list(one.file.parent.glob("*.part"))


# --- rows -----------------------------------------------------------------------------------------------------------


def op_row(backend="cuda", ms=1.0, **other):
    row = {"op": "memory_read", "size": "paper", "dtype": "float32", "backend": backend, "pass": "fwd"}
    row |= {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "bytes_moved": 10, "bandwidth_share": 0.5}
    return row | {"ratio_released": None, "ratio_reference": 12.0} | other


def step_row(variant, seconds, peak=1e9, **other):
    row = {
        "variant": variant,
        "seconds_per_step": seconds,
        "images_per_s": 8 / seconds,
        "peak_bytes": peak,
        "repeats": 5,
    }
    return row | {"ratio_released": None, "ratio_released_no_anomaly": None} | other


def test_a_second_call_completes_the_first(session, writes):
    first = session()
    first.run([[writes("memory_ops", [op_row("cuda", 1.0), op_row("triton", 2.0)], "memory_ops")]])
    second = session()
    second.run([[writes("memory_ops-compiled", [op_row("compiled", 3.0), op_row("triton", 4.0)], "memory_ops")]])
    record = gpu_record.read(second.file)
    found = {row["backend"]: (row["median_ms"], row["step"]) for row in record["memory_ops"]}
    assert found == {
        "cuda": (1, "memory_ops"),
        "compiled": (3, "memory_ops-compiled"),
        "triton": (4, "memory_ops-compiled"),
    }
    assert [step["name"] for step in record["steps"]] == ["memory_ops", "memory_ops-compiled"]
    assert "problems" not in record and record["memory_ops"][0]["commit"] == record["commit"] == revision()


def test_a_step_again_replaces_its_rows(session, writes):
    one = session()
    one.run([[writes("memory_ops", [op_row("cuda", 1.0), op_row("triton", 2.0)], "memory_ops")]])
    # a backend that has become wrong is not measured, and what it was is no longer true
    one.run([[writes("memory_ops", [op_row("cuda", 5.0)], "memory_ops")]])
    assert [(row["backend"], row["median_ms"]) for row in one.record["memory_ops"]] == [("cuda", 5)]
    # where everything failed, it stays what it was at its commit
    one.run([[writes("memory_ops", [], "memory_ops")]])
    assert len(one.record["memory_ops"]) == 1 and len(one.record["steps"]) == 1


@pytest.mark.parametrize("text", ["[{", "{}", "[1]"])
def test_what_is_no_record_is_said(session, text):
    """Nor does it stop the others."""
    one = session()
    one.run([[script("memory_ops", f"import sys; open(sys.argv[1], 'w').write('{text}')", fills="memory_ops")]])
    assert (
        "memory_ops" not in one.record
        and one.record["steps"][0]["status"].startswith("wrote no record: ")
        and one.failed
    )


@pytest.mark.parametrize("folder", ["out", "results"])
def test_which_record_is_continued(session, tmp_path, folder, capsys):
    old = GPU | {"rehearsal": False, "commit": "0", "date": "2030-01-01", "steps": [], "note": "kept"}
    (tmp_path / folder / "a-gpu.json").write_text(json.dumps(old))
    assert session().record["note"] == "kept"
    other = session(torch="2.1")
    assert "note" not in other.record and "of other versions, and is not continued" in capsys.readouterr().out


def test_training_of_two_steps(session, writes):
    found = {"iterations": 3, "seconds": 1.0, "first_loss": 2.0, "last_loss": 1.0, "miou": {"noon": 0.1}}
    one = session()
    one.run([[writes("training", {"bf16": found}, "training")]])
    one.run([[writes("training-compiled", {"bf16, compiled": found}, "training")]])
    assert list(one.record["training"]) == ["bf16", "bf16, compiled"] and "problems" not in one.record


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"torch": ...}, "torch is missing"),
        ({"steps": [{"name": "a", "status": "ok", "seconds": 1, "output": "", "commit": "0"}]}, "step a: date is None"),
        ({"rates": {"copy_bytes_per_s": 0.0}}, "rates: copy_bytes_per_s is 0.0"),
        ({"rates": {}}, "rates: bf16_flops_per_s is None"),
        ({"training": {"bf16": {}}}, "training, bf16: last_loss is missing"),
        ({"memory_ops": [op_row(ms=float("nan"))]}, "memory_ops, row 0: median_ms is nan"),
        ({"memory_ops": [op_row(), op_row(ms=2.0)]}, "memory_ops: two rows are about the same"),
        ({"meta_step": [{"seconds_per_step": 1}]}, "meta_step, row 0: variant is missing"),
    ],
)
def test_problems(tmp_path, change, problem):
    fine = GPU | {"rehearsal": False, "commit": "0", "date": "2030-01-01", "steps": []}
    assert gpu_record.problems(fine) == []
    broken = {key: value for key, value in (fine | change).items() if value is not ...}
    assert problem in gpu_record.problems(broken)
    # written all the same, and said
    gpu_record.write(broken, tmp_path / "a.json")
    assert problem in gpu_record.read(tmp_path / "a.json")["problems"]


def test_rows_have_the_keys_of_their_benches():
    for part, keys in (("memory_ops", report.KEYS), ("meta_step", step_report.KEYS)):
        assert set(itertools.chain(*gpu_record.ROWS[part])) <= set(keys)


@pytest.mark.parametrize("path", sorted(gpu_check.ROOT.glob("bench/results/*.json")), ids=lambda path: path.stem)
def test_records_of_gpus_are_whole(path):
    content = json.loads(path.read_text())
    if isinstance(content, dict):
        assert gpu_record.problems(content) == [] and not content["rehearsal"]


def test_tests_of_which_none_ran_are_no_success(session):
    line = json.dumps({"test": "a::b", "outcome": "skipped", "seconds": 0.0, "error": "no CUDA device", "trace": ""})
    one = session()
    gpu_check.tests_file(gpu_steps.BY_NAME["gpu-tests"]).write_text(line + "\n")
    one.run([[script("gpu-tests", "print('1 skipped')")]])
    step = one.record["steps"][0]
    assert step["status"] == "nothing ran" and one.failed and step["tests"]["skips"] == {"no CUDA device": 1}


# --- what is said ---------------------------------------------------------------------------------------------------


def record_of(**parts):
    step = {"name": "build", "status": "ok", "seconds": 60.0, "output": "", "commit": "abc", "date": "2030-01-01"}
    stamp = {"commit": "abc", "date": "2030-01-01", "step": "x"}
    rows = {name: [row | stamp for row in part] if isinstance(part, list) else part for name, part in parts.items()}
    return GPU | {"rehearsal": False, "commit": "abc", "date": "2030-01-01", "steps": [step]} | rows


def test_targets_met_and_missed():
    pool = {"op": "masked_average_pool", "size": "paper", "pass": "fwd+bwd"}
    rows = [op_row("cuda", 2.0, **pool), op_row("triton", 0.5, **pool), op_row("released", 15.0, **pool)]
    record = record_of(
        memory_ops=rows,
        meta_step=[
            step_row("released", 6.0, 2e9),
            step_row("released_no_anomaly", 2.0, 2e9),
            step_row("order2_bf16_compiled", 1.0, 0.8e9, ratio_released=6.0),
            step_row("order1_bf16_compiled", 0.5),
        ],
    )
    assert gpu_record.problems(record) == []
    text = "\n".join(gpu_summary.targets(record))
    assert (
        "| masked_average_pool paper fwd+bwd: times faster than released | >= 20x | cuda 7.5x, triton 30x | met |"
        in text
    )
    assert "| masked_average_pool paper fwd: times faster than released | >= 20x |  | not measured |" in text
    assert "| order2_bf16_compiled: times faster than released | >= 5x | 6x | met |" in text
    assert "| order2_bf16_compiled: times faster than released_no_anomaly | >= 3x | 2x | **MISSED** |" in text
    assert "| order2_bf16_compiled: peak memory, share of released | <= 50% | 40% | met |" in text
    assert "| order2_bf16_compiled: time, multiple of order1_bf16_compiled | <= 1.3x | 2x | **MISSED** |" in text
    assert text.count("\n") == 2 + len(report.TARGETS_GPU) + len(step_report.TARGETS_GPU)


def test_every_target_that_was_asked_for_is_there():
    asked = {(target.op, target.quantity): target.asked for target in report.TARGETS_GPU}
    assert asked["masked_average_pool", "released"] == 20 and asked["upsample_cross_entropy", "released"] == 10
    operators = ("masked_average_pool", "memory_read", "memory_pass", "upsample_cross_entropy")
    assert all(asked[op, "bwd"] == 3 for op in operators) and all(asked[op, "copy"] == 0.75 for op in operators[:3])
    steps = {(target.variant, target.against, target.quantity): target.asked for target in step_report.TARGETS_GPU}
    best, released = "order2_bf16_compiled", "released"
    assert steps[best, released, "speed"] == 5 and steps[best, f"{released}_no_anomaly", "speed"] == 3
    assert steps[best, released, "memory"] == 0.5 and steps[best, "order1_bf16_compiled", "time"] == 1.3


def test_tables(tmp_path, capsys):
    look = {"backend": "cuda", "look": "both", "ms_per_image": 0.0456}
    image = {"protocol": "whole", "way": "ours", "seconds": 0.05, "network_seconds": 0.04, "rest_seconds": 0.01}
    image |= {"peak_bytes": 1.5e9, "times_released": 3.0, "times_plain": 1.25}
    trained = {
        "iterations": 60,
        "seconds": 30,
        "first_loss": 3.0,
        "last_loss": 2.0,
        "miou": {"noon": 0.25, "fog": None},
    }
    record = record_of(
        memory_ops=[op_row("triton", 0.0213)],
        meta_step=[step_row("order2_bf16", 0.32, 12.5e9, ratio_released=4.5, compile_seconds=2.0)],
        photometric=[look],
        evaluation=[image],
        resources=[{"kernel": "walk", "registers": 99}],
        training={"bf16": trained},
        rates=dict.fromkeys(gpu_record.RATES, 3e12),
    )
    record["steps"][0]["tests"] = gpu_record.summarise_tests(
        [{"test": "a::b", "outcome": "failed", "seconds": 1.0, "error": "no", "trace": "no"}]
    )
    gpu_record.write(record, tmp_path / "a.json")
    gpu_summary.main([str(tmp_path / "a.json"), "--out", str(tmp_path / "a.md")])
    text, shown = (tmp_path / "a.md").read_text(), capsys.readouterr().out
    assert text.startswith(shown.rstrip()) and "rehearsal" not in text
    for line in (
        "| copy, read plus written | 3e+03 GB/s |",
        "| build | ok | 60 | abc | 0 passed, 1 failed, 0 skipped |",
        "* build: 1 x `no`, e.g. a::b",
        "| bf16 | 60 | 3 | 2 | noon 25.0%, fog  |",
        "| order2_bf16 | 25 | 0.32 | 12.5 | 4.5 |  | 2 | abc |",
    ):
        assert line in shown
    for line in (
        "| memory_read | paper | float32 | triton | fwd | 0.0213 | 0.5 |  | 12 | abc |",
        "| cuda | both | 0.0456 |",
        "| whole | ours | 0.05 | 0.04 | 0.01 | 1.5 | 3 | 1.25 |",
        "| kernel | registers |",
    ):
        assert line in text and line not in shown


def test_an_empty_record_has_tables_and_a_rehearsal_is_called_one():
    text = "\n".join(gpu_summary.short(record_of(steps=[]) | {"rehearsal": True}))
    assert "No figure here means anything" in text and "not measured" in text and "MISSED" not in text


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "wrong"),
    [
        ([2.0, 1.0, 2.0], None),
        ([2.0 - i / 40 for i in range(40)], None),
        ([2.0] * 40, "the losses did not fall: 2.000 in the first quarter, 2.000 in the last"),
        ([2.0, None], "1 of 2 losses are not finite"),
    ],
)
def test_losses(tmp_path, losses, wrong):
    lines = [json.dumps({"iteration": i, "losses": {"total": loss}}) for i, loss in enumerate(losses, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert end_to_end.losses_of(tmp_path) == losses and end_to_end.what_is_wrong(losses) == wrong


def test_the_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("PMM_FAST_COMMIT", "0123456789ab")
    assert revision() == "0123456789ab"
    monkeypatch.setenv("PMM_FAST_COMMIT", "")
    monkeypatch.setenv("PATH", str(Path("/nowhere")))
    assert revision() == "unknown"
