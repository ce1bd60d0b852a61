"""Whose scores stand in which file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from pmm_fast.viz.results import find_scores

CLASSES = ["road", "sky"]


def store(folder: Path, scores: dict[str, float], age: int = 0, **change: Any) -> Path:
    """A ``results.json`` as ``evaluate`` writes it, with the mean IoU of each run."""
    content = {
        "settings": {"eval": {"protocol": "whole"}},
        "classes": CLASSES,
        "runs": {
            name: {"a": {"miou": miou, "iou": {"road": miou, "sky": None}, "confusion": [[1, 2], [3, 4]], "images": 5}}
            for name, miou in scores.items()
        },
        **change,
    }
    file = folder / "evaluation/results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    os.utime(file, (1e9 - age, 1e9 - age))
    return file


def found(places: dict[str, Path]) -> dict[str, float]:
    scores, problems = find_scores(places, CLASSES)
    assert problems == []
    return {name: score.domains["a"].miou for name, score in scores.items()}


def test_what_is_read(tmp_path: Path) -> None:
    file = store(tmp_path, {"one": 0.25})
    score = find_scores({"me": tmp_path / "one"}, CLASSES)[0]["me"]
    assert score.file == file and score.settings == {"eval": {"protocol": "whole"}}
    domain = score.domains["a"]
    assert domain.miou == domain.iou[0] == 0.25 and math.isnan(domain.iou[1]) and domain.images == 5
    assert domain.confusion.tolist() == [[1, 2], [3, 4]]


def test_the_file_with_most_runs_counts_then_the_newest(tmp_path: Path) -> None:
    one, two = {"1": tmp_path / "one", "2": tmp_path / "two"}.values()
    store(tmp_path, {"one": 0.1, "two": 0.2, "three": 0.3}, age=9)
    store(one, {"one": 0.9})
    assert found({"1": one, "2": two}) == {"1": 0.1, "2": 0.2}
    # alone, its own newer file says more
    assert found({"1": one}) == {"1": 0.9}
    store(one, {"one": 0.9}, age=10)
    assert found({"1": one}) == {"1": 0.1}


def test_runs_are_known_by_the_ends_of_their_paths(tmp_path: Path) -> None:
    places = {"x": tmp_path / "x/agg", "y": tmp_path / "y/agg"}
    store(tmp_path, {"x/agg": 0.1, "y/agg": 0.2})
    assert found(places) == {"x": 0.1, "y": 0.2}
    # whose scores these are cannot be known
    store(tmp_path, {"agg": 0.3})
    assert found(places) == {}
    assert found({"x": places["x"], "z": tmp_path / "z"}) == {"x": 0.3}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classes": ["road", "car"]}, "scores of other classes (road, car)"),
        ({"runs": []}, "expected the results.json of python -m pmm_fast.evaluate"),
        ({"runs": {"one": {"a": {}}}}, "expected the results.json of python -m pmm_fast.evaluate"),
        (
            {"runs": {"one": {"a": {"miou": 1, "iou": {"road": 1}, "confusion": [[1]], "images": 1}}}},
            "expected scores and confusion matrices of 2 classes",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = store(tmp_path, {"one": 0.1}, **change)
    assert find_scores({"one": tmp_path / "one"}, CLASSES) == ({}, [f"{file}: {message}"])


def test_no_json(tmp_path: Path) -> None:
    file = store(tmp_path, {})
    file.write_text("{")
    scores, problems = find_scores({"one": tmp_path / "one"}, CLASSES)
    assert scores == {} and len(problems) == 1 and problems[0].startswith(f"{file}: ")
