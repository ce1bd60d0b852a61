"""Tables to the letter."""

from __future__ import annotations

import math

import pytest

from pmm_fast.viz.tables import class_table, results_table

RUNS = {
    "agg": {"a": 0.5, "b": 0.61, "far away": 0.3, "d": 0.2},
    "pinmem": {"a": 0.512, "b": 0.6, "far away": 0.4},
}


def test_plain_table_is_aligned_and_has_means_and_drop() -> None:
    assert results_table(RUNS, ["a", "b"], ["far away", "d"]).splitlines() == [
        "mIoU %     a     b  mean source  far away     d  mean unseen  drop",
        "------  ----  ----  -----------  --------  ----  -----------  ----",
        "agg     50.0  61.0         55.5      30.0  20.0         25.0  30.5",
        "pinmem  51.2  60.0         55.6      40.0     -            -     -",
    ]


def test_one_domain_needs_no_mean_and_repeated_sources_count_once() -> None:
    assert results_table({"agg": {"a": 0.5, "c": 0.3}}, ["a", "a"], ["c"], markdown=True).splitlines() == [
        "| mIoU % | a | c | drop |",
        "| :--- | ---: | ---: | ---: |",
        "| agg | 50.0 | 30.0 | 20.0 |",
    ]


def test_without_unseen_or_without_sources_there_is_no_drop() -> None:
    assert results_table(RUNS, ["a"], []).splitlines()[0] == "mIoU %     a"
    assert results_table(RUNS, [], ["b"]).splitlines()[0] == "mIoU %     b"


def test_class_table() -> None:
    table = class_table({"agg": [0.123, math.nan], "a|b": [1.0, 0.0]}, ["road", "traffic light"])
    assert table.splitlines() == [
        "IoU %           agg    a|b",
        "-------------  ----  -----",
        "road           12.3  100.0",
        "traffic light     -    0.0",
    ]
    assert r"| IoU % | a\|b |" in class_table({"a|b": [1.0]}, ["road"], markdown=True)
    with pytest.raises(ValueError, match="run 'x' has 1 scores, expected 2"):
        class_table({"x": [1.0]}, ["road", "sky"])
