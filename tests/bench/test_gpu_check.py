"""bench/gpu_check.py, as far as a machine without a GPU can tell."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from bench import gpu_check
from tests import repository


def test_dry_run_lists_what_exists():
    command = [sys.executable, "bench/gpu_check.py", "--dry-run"]
    run = subprocess.run(command, cwd=repository.ROOT, capture_output=True, text=True, check=True)
    names = [line.split(" (")[0] for line in run.stdout.splitlines()]
    assert names[:3] == ["build", "doctor", "tests"] and set(names) >= {
        "memory_ops",
        "meta_step",
        "photometric",
        "evaluation",
        "memcheck",
    }
    for line in run.stdout.splitlines():
        for word in line.split():
            if word.startswith("bench/"):
                assert (repository.ROOT / word).exists()


@pytest.mark.parametrize(
    ("command", "limit", "status"),
    [
        ([sys.executable, "-c", "print('fine')"], 30, "ok"),
        ([sys.executable, "-c", "print('bad'); raise SystemExit(3)"], 30, "exit status 3"),
        ([sys.executable, "-c", "import time; print('on', flush=True); time.sleep(60)"], 6, "out of time"),
        (["no-such-program"], 30, "not there: no-such-program"),
    ],
)
def test_a_step_never_stops_the_others(command, limit, status):
    step = gpu_check.run("step", command, limit, time.monotonic() + 100)
    assert step["status"] == status and step["name"] == "step"
    if "print" in command[-1]:
        assert step["output"].strip() in ("fine", "bad", "on")


def test_nothing_starts_when_time_is_up():
    step = gpu_check.run("late", [sys.executable, "-c", "print('ran')"], 60, time.monotonic() + 1)
    assert step["status"] == "out of time" and step["output"] == ""


def test_record_and_table(tmp_path):
    row = {"op": "memory_read", "size": "paper", "dtype": "float32", "backend": "triton", "pass": "fwd"}
    row |= {"median_ms": 0.0213, "bandwidth_share": 0.8, "ratio_released": None, "ratio_reference": 12.0}
    (tmp_path / "memory_ops.json").write_text(json.dumps([row]))
    iteration = {"variant": "order2_bf16", "images_per_s": 25.0, "seconds_per_step": 0.32, "peak_bytes": 12.5e9}
    iteration |= {"ratio_released": 4.5, "ratio_released_no_anomaly": None}
    (tmp_path / "meta_step.json").write_text(json.dumps([iteration]))
    look = {"backend": "cuda", "look": "both", "ms_per_image": 0.0456}
    (tmp_path / "photometric.json").write_text(json.dumps([look]))
    image = {"protocol": "whole", "way": "ours", "seconds": 0.05, "network_seconds": 0.04, "rest_seconds": 0.01}
    image |= {"peak_bytes": 1.5e9, "times_released": 3.0, "times_plain": 1.25}
    (tmp_path / "evaluation.json").write_text(json.dumps([image]))
    found = gpu_check.measured(tmp_path)
    assert found == {"memory_ops": [row], "meta_step": [iteration], "photometric": [look], "evaluation": [image]}
    step = {"name": "build", "status": "ok", "seconds": 60.0, "output": ""}
    record = {"device": "A GPU", "date": "2030-01-01", "commit": "0" * 40, "steps": [step], **found}
    table = gpu_check.table(record)
    assert "| build | ok | 60.0 |" in table
    assert "| memory_read | paper | float32 | triton | fwd | 0.0213 | 0.8 |  | 12 |" in table
    assert "| order2_bf16 | 25 | 0.32 | 12.5 | 4.5 |  |" in table
    assert "| cuda | both | 0.0456 |" in table
    assert "| whole | ours | 0.05 | 0.04 | 0.01 | 1.5 | 3 | 1.25 |" in table
