"""``python bench/evaluation.py``: a record of every way, and no figure for a protocol that one of them gets wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import evaluation as bench

TINY = ["--size", "64", "72", "--crop", "44", "--channels", "8", "--rounds", "1", "--device", "cpu"]
KEYS = {"seconds", "network_seconds", "rest_seconds", "peak_bytes", "times_released", "rest_times_plain"}


def test_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([*TINY, "--json", str(tmp_path / "r.json")])
    rows = json.loads((tmp_path / "r.json").read_text())
    assert [(row["protocol"], row["way"]) for row in rows] == [(p, w) for p in bench.PROTOCOLS for w in bench.WAYS]
    assert all(row[key] > 0 for row in rows for key in KEYS) and all(
        row["device"] and row["crop"] == 44 for row in rows
    )
    assert all(row["times_released"] == 1 for row in rows if row["way"] == "released")
    for row in rows:
        assert row["network_seconds"] + row["rest_seconds"] == pytest.approx(row["seconds"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [tuple(line.split()[:2]) for line in lines] == [(row["protocol"], row["way"]) for row in rows]


def test_a_wrong_way_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench.WAYS["ours"]

    def spoiled(model: object, image: object, protocol: object, device: object) -> np.ndarray:
        classes = right(model, image, protocol, device)
        return np.roll(classes, 1, 1) if protocol.flip else classes

    monkeypatch.setitem(bench.WAYS, "ours", spoiled)
    with pytest.raises(SystemExit, match="gate failed"):
        bench.main([*TINY, "--json", str(tmp_path / "r.json"), "--protocols", "whole", "released-sliding"])
    assert {row["protocol"] for row in json.loads((tmp_path / "r.json").read_text())} == {"whole"}
    told = capsys.readouterr().out
    assert "gate: FAILED: released-sliding: ValueError: ours: " in told and "pixels have another class" in told


def test_the_gate_wants_clear_classes() -> None:
    classes = np.zeros((4, 4), int)
    assert (
        bench.differs(classes, classes, np.zeros((4, 4)))
        == "only 0.0% of the pixels have a class that is clearly the best"
    )
    assert bench.differs(classes, classes, np.ones((4, 4))) is None
    assert bench.differs(classes + 1, classes, np.ones((4, 4))) == "16 of 16 pixels have another class"
