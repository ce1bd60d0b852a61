"""The log of a run: valid JSON lines, continued without gaps, and TensorBoard where it is asked for."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from pmm_fast.engine.logging import FILE_NAME, RunLog


def write(folder: Path, start: int, iterations: range, tensorboard: bool = False, value: float = 0.5) -> None:
    log = RunLog(folder, start, tensorboard)
    for iteration in iterations:
        log.write(iteration, {"total": value, "train/seg": 2 * value}, lr=0.1)
    log.close()


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / FILE_NAME).read_text().splitlines()]


def test_one_json_object_a_line(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 3))
    assert lines(tmp_path) == [
        {"iteration": iteration, "losses": {"total": 0.5, "train/seg": 1.0}, "lr": 0.1} for iteration in (1, 2)
    ]


def test_lines_are_there_before_the_log_is_closed(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(1, {"total": 1.0})
    assert [line["iteration"] for line in lines(tmp_path)] == [1]
    log.close()


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write(1, {"total": math.nan, "train/seg": 1.0}, gradient_norm=math.inf)
    log.close()
    assert lines(tmp_path) == [{"iteration": 1, "losses": {"total": None, "train/seg": 1.0}, "gradient_norm": None}]


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4))
    write(tmp_path, 0, range(1, 2))
    assert [line["iteration"] for line in lines(tmp_path)] == [1]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6), value=1.0)
    write(tmp_path, 3, range(4, 7), value=2.0)
    assert [(line["iteration"], line["losses"]["total"]) for line in lines(tmp_path)] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0),
    ]  # fmt: skip


def test_a_line_that_an_interruption_cut_off_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4))
    path = tmp_path / FILE_NAME
    path.write_text(path.read_text()[:-20])
    write(tmp_path, 2, range(3, 4))
    assert [line["iteration"] for line in lines(tmp_path)] == [1, 2, 3]


def test_missing_tensorboard_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard: true .* pip install 'pmm_fast\[tensorboard\]'"):
        RunLog(tmp_path, 0, tensorboard=True)


def test_tensorboard_events_of_a_resumed_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, range(1, 6), tensorboard=True, value=1.0)
    write(tmp_path, 3, range(4, 7), tensorboard=True, value=2.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss/total", "loss/train/seg", "lr"}
    found = [(event.step, event.value) for event in events.Scalars("loss/total")]
    assert found == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
