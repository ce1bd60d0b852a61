"""Logs as they are read and smoothed, and a picture that has the panels there are data for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pmm_fast.viz.curves import PANELS, plot_curves, read_metrics, smoothed


def write(path: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def log(path: Path, **more: float) -> Path:
    lines = [{"iteration": i, "losses": {"total": 3 / i, "train/seg": 1 / i, **more}, "lr": 0.1} for i in range(1, 50)]
    return write(path, lines)


def test_lines_are_read_by_iteration_and_a_cut_one_is_left_out(tmp_path: Path) -> None:
    lines = [{"iteration": 2, "lr": 1}, {"iteration": 1}, {"iteration": 2, "lr": 3}]
    assert read_metrics(write(tmp_path / "m.jsonl", lines, '{"iteration": 3, "l')) == [
        {"iteration": 1},
        {"iteration": 2, "lr": 3},
    ]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"iteration": 1}\nnonsense\n{"iteration": 3}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: expected a JSON object with an iteration, got 'nonsense'"):
        read_metrics(path)


def test_smoothing() -> None:
    values = np.array([1.0, 0.0, 0.0])
    assert smoothed(values, 1).tolist() == [1, 0, 0]
    # span 3 keeps a half: weights 1, 1/2, 1/4 backwards, normalised
    assert smoothed(values, 3) == pytest.approx([1, 0.5 / 1.5, 0.25 / 1.75])
    assert smoothed(np.full(50, 2.0), 9) == pytest.approx(np.full(50, 2.0))


def test_curves_have_a_panel_for_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    agg, pinmem = log(tmp_path / "agg.jsonl"), log(tmp_path / "pinmem.jsonl", **{"train/top_weight": 0.2})
    three = Image.open(plot_curves({"agg": agg}, tmp_path / "new" / "three.png"))
    only_lr = write(tmp_path / "lr.jsonl", [{"iteration": i, "lr": 0.1, "losses": {"total": None}} for i in (1, 2)])
    one = Image.open(plot_curves({"lr": only_lr}, tmp_path / "one.png"))
    assert one.width < three.width and one.height == three.height
    four = Image.open(plot_curves({"agg": agg, "pinmem": pinmem}, tmp_path / "both.png"))
    assert four.height > three.height
    colours = {colour for _, colour in Image.open(tmp_path / "both.png").convert("RGB").getcolors(1 << 20) or []}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def test_panels_read_what_the_trainer_logs() -> None:
    line = {"iteration": 1, "losses": {"total": 1, "train/seg": 2, "test/seg": 3}, "lr": 4, "inner_lr": 5}
    read = {title: [series.read(line) for series in lines] for title, lines in PANELS}
    assert read["total loss"] == [1] and read["segmentation loss"] == [2, 3, None]
    assert read["learning rate"] == [4, 5] and read["mean top weight of the read"] == [None]


def test_nothing_to_draw(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"nothing to draw in .*empty\.jsonl"):
        plot_curves({"x": write(tmp_path / "empty.jsonl", [])}, tmp_path / "x.png")


def test_a_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'pmm_fast\[viz\]'"):
        plot_curves({"a": log(tmp_path / "a.jsonl")}, tmp_path / "x.png")
