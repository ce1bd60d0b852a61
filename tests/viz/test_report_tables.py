"""The tables of a report: which number stands where, and which is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmm_fast.viz.report import Table
from pmm_fast.viz.report_tables import best_of, class_table, difference_table, score_table, training_table
from pmm_fast.viz.results import DomainScore, RunScores

NAN = math.nan


def scores(**domains: float | tuple[float, ...]) -> RunScores:
    """Scores of domains: a mean IoU, or the IoU of every class."""
    found = {}
    for name, value in domains.items():
        iou = value if isinstance(value, tuple) else (value,)
        found[name] = DomainScore(float(np.nanmean(iou)), iou, np.zeros((len(iou), len(iou)), np.int64), 1)
    return RunScores(Path("results.json"), {}, found)


def texts(table: Table) -> list[list[str]]:
    """The rows, best ones with a star, hints in brackets."""
    return [
        [title, *(cell.text + "*" * cell.best + (f" [{cell.hint}]" if cell.hint else "") for cell in cells)]
        for title, cells in table.rows
    ]


def test_scores_by_what_was_trained_on() -> None:
    runs = {"one": scores(a=0.5, b=0.3, c=0.2, d=0.1), "two": scores(a=0.4, b=0.6, c=0.2, d=0.2)}
    table = score_table(runs, {"one": ["b", "a"], "two": ["a", "b", "elsewhere"]})
    assert table.groups == [("", 1), ("trained on", 3), ("unseen", 3), ("", 1)]
    assert table.header == ["", "a", "b", "mean", "c", "d", "mean", "drop"]
    assert texts(table) == [
        ["one", "50.0*", "30.0", "40.0", "20.0", "10.0", "15.0", "25.0*"],
        ["two", "40.0", "60.0*", "50.0*", "20.0", "20.0*", "20.0*", "30.0"],
    ]
    assert "best of each column in bold" in table.caption


def test_one_run_has_no_best_and_one_domain_no_mean() -> None:
    table = score_table({"one": scores(a=0.5)}, {"one": []})
    assert table.header == ["", "a"] and table.groups == [("", 1), ("unseen", 1)]
    assert texts(table) == [["one", "50.0"]] and "bold" not in table.caption


def test_a_missing_domain_leaves_no_mean() -> None:
    runs = {"one": scores(a=0.5, b=0.3), "two": scores(a=0.4)}
    assert texts(score_table(runs, {"one": ["a", "b"], "two": ["a", "b"]})) == [
        ["one", "50.0*", "30.0", "40.0"],
        ["two", "40.0", "-", "-"],
    ]


def test_one_runs_source_is_anothers_unseen_domain() -> None:
    runs = {"one": scores(a=0.5, b=0.3), "two": scores(a=0.4, b=0.6)}
    table = score_table(runs, {"one": ["a"], "two": ["b"]})
    assert table.groups == [] and table.header == ["", "a", "b", "mean seen", "mean unseen", "drop"]
    assert texts(table) == [
        ["one", "50.0* [seen]", "30.0 [unseen]", "50.0", "30.0", "20.0"],
        ["two", "40.0 [unseen]", "60.0* [seen]", "60.0*", "40.0*", "20.0"],
    ]


@pytest.mark.parametrize(
    "values, small, best",
    [
        ((0.1, 0.2, NAN), False, "20.0"),
        ((0.1, 0.2), True, "10.0"),
        ((0.1, NAN), False, ""),
        ((), False, ""),
        # the same as they are written
        ((0.0, 0.0004), False, ""),
    ],
)
def test_best(values: tuple[float, ...], small: bool, best: str) -> None:
    assert best_of(values, small) == best


def test_classes() -> None:
    runs = {"one": scores(a=(0.5, NAN), b=(0.1, 0.2)), "two": scores(a=(0.6, NAN))}
    table = class_table(runs, ["road", "sky"])
    assert table.header == ["class", "one", "two", "one"] and table.groups == [("", 1), ("a", 2), ("b", 1)]
    assert texts(table) == [["road", "50.0", "60.0*", "10.0"], ["sky", "-", "-", "20.0"]]
    assert [[cell.share for cell in cells] for _, cells in table.rows] == [[0.5, 0.6, 0.1], [None, None, 0.2]]
    alone = class_table({"one": runs["one"]}, ["road", "sky"])
    assert alone.header == ["class", "a", "b"] and alone.groups == []


def test_training() -> None:
    def lines(**losses: float) -> list[dict[str, Any]]:
        # the last two of twenty are the last tenth
        return [
            {"iteration": 50 * i, "losses": {k: v * (i > 18) for k, v in losses.items()}, "seconds": 0.1 * i}
            for i in range(1, 21)
        ]

    one, two = lines(seg=1.0, total=2.0), lines(**{"seg": 3.0, "train/top_weight": 0.25, "total": 4.0})
    two[0]["data_wait"], two[1]["data_wait"] = 0.5, 0.25
    two[-1]["losses"]["seg"] = None
    table = training_table({"one": one, "two": two})
    assert table.header == ["", "one", "two"]
    assert texts(table) == [
        ["iterations", "1,000", "1,000"],
        ["seconds an iteration", "1.05", "1.05"],
        ["waiting for data", "-", "37.5 %"],
        ["loss seg", "1.000", "3.000"],
        ["mean top weight of the read", "-", "0.250"],
        ["loss total", "2.000", "4.000"],
    ]


def test_differences() -> None:
    def config(mode: str, **more: Any) -> Mapping[str, Any]:
        return {"out": mode, "meta": {"mode": mode, "order": 2}, "data": {"crop": [1, 2], **more}}

    table = difference_table({"one": config("agg", flip=True), "two": config("pinmem", flip=False, extra=[])})
    assert table is not None and table.words
    assert texts(table) == [["meta.mode", "agg", "pinmem"], ["data.flip", "on", "off"], ["data.extra", "-", "none"]]
    assert difference_table({"one": config("agg"), "two": {**config("agg"), "out": "elsewhere"}}) is None
