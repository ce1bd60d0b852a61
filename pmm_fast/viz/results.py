"""Scores as ``python -m pmm_fast.evaluate`` wrote them: finding the files, and reading them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmm_fast.config.runs import common_folder

FOLDER, FILE_NAME = "evaluation", "results.json"


@dataclass(frozen=True)
class DomainScore:
    """What a network scored on a domain.

    Attributes:
        miou: mean IoU, 0..1, NaN where there is none.
        iou: of every class, 0..1 or NaN.
        confusion: pixels, int64 ``[K, K]``, rows the truth, columns the prediction.
        images: number of images tested.
    """

    miou: float
    iou: tuple[float, ...]
    confusion: np.ndarray
    images: int


@dataclass(frozen=True)
class RunScores:
    """What a network scored.

    Attributes:
        file: where that is written.
        settings: how it was tested, as the file has it.
        domains: name of each domain to its score, in the order of the test.
    """

    file: Path
    settings: Mapping[str, Any]
    domains: Mapping[str, DomainScore]


def find_scores(places: Mapping[str, Path], classes: Sequence[str]) -> tuple[dict[str, RunScores], list[str]]:
    """The scores of runs, from ``evaluation/results.json`` in or beside them.

    The file with the most of the runs counts, since its scores compare; of several, the newest.  A run is known in it
    by the end of its path, as ``evaluate`` names it.

    Args:
        places: name of each run to what ``config.runs.run_place`` says of it.
        classes: of their label space.

    Returns:
        The scores of the runs that were found, in the order of ``places``; and what is wrong with files that were not
        used, in sentences.
    """
    folders = [common_folder(list(places.values()))]
    folders += [folder for place in places.values() for folder in (place, place.parent)]
    files = {folder / FOLDER / FILE_NAME: None for folder in folders}
    found: list[dict[str, RunScores]] = []
    problems = []
    for file in sorted(filter(Path.is_file, files), key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            stored = _read(file, classes)
        except (OSError, ValueError) as error:
            problems.append(f"{file}: {error}")
            continue
        found.append({name: stored[key] for name, place in places.items() if (key := _key(place, places, stored))})
    # a stable sort: the newest of equally complete ones stays first
    found.sort(key=len, reverse=True)
    chosen = {name: next((scores[name] for scores in found if name in scores), None) for name in places}
    return {name: scores for name, scores in chosen.items() if scores is not None}, problems


def _key(place: Path, places: Mapping[str, Path], stored: Mapping[str, RunScores]) -> str | None:
    """The name of a run in a file; None where the file does not have it, or has one that could be another's."""
    for key in stored:
        parts = tuple(key.split("/"))
        named = [other for other in places.values() if other.parts[-len(parts) :] == parts]
        if named == [place]:
            return key
    return None


def _read(file: Path, classes: Sequence[str]) -> dict[str, RunScores]:
    """Every run of a file.

    Raises:
        ValueError: it is not what ``evaluate`` writes, or of other classes.
        OSError: it cannot be read.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    try:
        if content["classes"] != list(classes):
            raise ValueError(f"scores of other classes ({', '.join(content['classes'])})")
        return {
            run: RunScores(file, content["settings"], {d: _score(each, len(classes)) for d, each in domains.items()})
            for run, domains in content["runs"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("expected the results.json of python -m pmm_fast.evaluate") from error


def _score(record: Mapping[str, Any], count: int) -> DomainScore:
    confusion = np.array(record["confusion"], np.int64)
    if confusion.shape != (count, count) or len(record["iou"]) != count:
        raise ValueError(f"expected scores and confusion matrices of {count} classes")
    numbers = [math.nan if value is None else float(value) for value in (record["miou"], *record["iou"].values())]
    return DomainScore(numbers[0], tuple(numbers[1:]), confusion, record["images"])
