"""The record of ``bench/gpu_check.py``, ``<device>.json``: what is in it, whether it is whole, how it grows.

A dictionary of

* ``device``, ``memory`` (bytes), ``capability``, ``torch``, ``cuda``, ``triton``, ``python``; ``commit`` and ``date``
  of what was measured last;
* ``rehearsal``: true where a machine without a GPU ran miniatures, whose figures mean nothing;
* ``steps``, a list: ``name``, ``status`` (``ok``, ``exit status N``, ``out of time``, ``not there: ...``,
  ``nothing ran``, ``wrote no record: ...``, ``skipped: ...``), ``seconds``, ``output`` (its end), ``commit``, ``date``;
  of a step that runs tests also ``tests``: ``passed``, ``failed``, ``skipped`` (numbers), ``failures`` (a list of
  ``error``, ``count`` and names of ``tests``, most frequent first) and ``skips`` (reason to number);
* ``rates``, a second: ``copy_bytes_per_s`` (read plus written), ``exponentials_per_s``, ``products_per_s`` (float32
  multiply-adds without TF32), ``bf16_flops_per_s``, ``tf32_flops_per_s``, ``float32_flops_per_s``;
* the rows of the benches, lists of dictionaries with the keys of the bench and ``step``, ``commit`` and ``date``:
  ``memory_ops`` (``bench/report.py``), ``meta_step`` (``bench/step_report.py``), ``photometric``, ``evaluation``,
  ``resources``;
* ``training``, by way of training: ``iterations``, ``seconds`` of everything (beside other programs), ``first_loss``,
  ``last_loss``, and ``miou`` by domain;
* ``problems``, sentences: what of all that is not as it should be; absent where nothing is.

What was not run is not in it.  A step that is run again replaces what it wrote before, and rows of another step that
are about the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

VERSIONS = ("device", "capability", "torch", "cuda", "triton", "python", "rehearsal")
RATES = (
    *("copy_bytes_per_s", "exponentials_per_s", "products_per_s"),
    *("bf16_flops_per_s", "tf32_flops_per_s", "float32_flops_per_s"),
)
TRAINING = ("iterations", "seconds", "first_loss", "last_loss", "miou")
# of the rows of a bench: what tells them apart, and numbers that each has
ROWS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "memory_ops": (
        ("op", "size", "dtype", "backend", "pass"),
        ("median_ms", "p20_ms", "p80_ms", "bytes_moved", "bandwidth_share"),
    ),
    "meta_step": (("variant",), ("seconds_per_step", "images_per_s", "peak_bytes", "repeats")),
    "photometric": (("backend", "look"), ("ms_per_image",)),
    "evaluation": (("protocol", "way"), ("seconds", "network_seconds", "rest_seconds", "peak_bytes")),
    "resources": ((), ()),
}
STEP = {"name": str, "status": str, "seconds": (int, float), "output": str, "commit": str, "date": str}
TEST_NAMES = 200  # of a kind of failure, in the record
PLACES = re.compile(r"0x[0-9a-f]+|\d[\d.,]*(e[+-]?\d+)?")


def read(path: Path) -> Record | None:
    """A record, or None where there is no file.

    Raises:
        ValueError: the file is no record.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict) or "device" not in found:
        raise ValueError(f"{path}: expected a dictionary that names a device")
    return found


def write(record: Record, path: Path) -> None:
    """Write a record with its problems; the file is replaced at once, so that it is always whole."""
    record.pop("problems", None)
    if found := problems(record):
        record["problems"] = found
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, path)


def continues(record: Record, description: Record) -> bool:
    """Whether a record was made by the device and the versions of ``description``."""
    return all(record.get(key) == description[key] for key in VERSIONS)


def add_step(record: Record, step: Record, order: Sequence[str]) -> None:
    """Put a step that has ended into its place, that of its name in ``order``."""
    record["steps"] = [other for other in record.get("steps", []) if other["name"] != step["name"]] + [step]
    record["steps"].sort(key=lambda one: order.index(one["name"]) if one["name"] in order else len(order))
    record["commit"], record["date"] = step["commit"], step["date"]


def add_results(record: Record, part: str, content: Any, step: Record) -> None:
    """Put what a step has written into a part of the record.

    Raises:
        ValueError: it is no list of rows, or no dictionary where the part is one.
    """
    rows = content if isinstance(content, list) else [content]
    if isinstance(content, list) != (part in ROWS) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"what {step['name']} wrote is not what {part} holds")
    if part not in ROWS:
        record[part] = record.get(part, {}) | content
        return
    stamp = {key: step[key] for key in ("commit", "date")} | {"step": step["name"]}
    new = [row | stamp for row in content]
    known = {_identity(part, row) for row in new}
    rows = record.get(part, [])
    old = [row for row in rows if row.get("step") != step["name"] and _identity(part, row) not in known]
    # a step that has measured nothing replaces nothing
    if new:
        record[part] = old + new


def problems(record: Record) -> list[str]:
    """What of a record is not as the head of this file says, in sentences."""
    found = [f"{key} is missing" for key in (*VERSIONS, "commit", "date", "steps") if key not in record]
    for step in record.get("steps", []):
        wrong = [key for key, kind in STEP.items() if not isinstance(step.get(key), kind)]
        found += [f"step {step.get('name')}: {key} is {step.get(key)!r}" for key in wrong]
    if "rates" in record:
        found += _wrong_numbers("rates", record["rates"], RATES)
    for name, content in record.get("training", {}).items():
        found += [f"training, {name}: {key} is missing" for key in TRAINING if key not in content]
    for part, (texts, numbers) in ROWS.items():
        rows = record.get(part, [])
        for index, row in enumerate(rows):
            found += [f"{part}, row {index}: {key} is missing" for key in texts if key not in row]
            found += _wrong_numbers(f"{part}, row {index}", row, numbers)
        if texts and len({_identity(part, row) for row in rows}) < len(rows):
            found.append(f"{part}: two rows are about the same")
    return found


def _identity(part: str, row: Record) -> tuple[object, ...]:
    """What tells a row from the others of its part."""
    return tuple(row.get(key) for key in ROWS[part][0])


def _wrong_numbers(place: str, content: Record, keys: Sequence[str]) -> list[str]:
    """Sentences about numbers that are not there, not positive or not finite."""
    values = {key: content.get(key) for key in keys}
    fine = {key: isinstance(value, int | float) and 0 < value < float("inf") for key, value in values.items()}
    return [f"{place}: {key} is {values[key]!r}" for key in keys if not fine[key]]


def read_tests(path: Path) -> list[Record]:
    """The lines of ``bench/pytest_log.py``; a last one that was cut off is left out."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return found


def group_failures(tests: list[Record]) -> list[tuple[str, list[Record]]]:
    """Failed tests by what was raised, whatever its numbers, most frequent first."""
    groups: dict[str, list[Record]] = {}
    for test in tests:
        if test["outcome"] == "failed":
            groups.setdefault(PLACES.sub("#", test["error"]), []).append(test)
    return [(group[0]["error"], group) for group in sorted(groups.values(), key=len, reverse=True)]


def summarise_tests(tests: list[Record]) -> Record:
    """What a step's ``tests`` are in a record."""
    count = {outcome: sum(test["outcome"] == outcome for test in tests) for outcome in ("passed", "failed", "skipped")}
    skips: dict[str, int] = {}
    for test in tests:
        if test["outcome"] == "skipped":
            skips[test["error"]] = skips.get(test["error"], 0) + 1
    failures = [
        {"error": error, "count": len(group), "tests": [test["test"] for test in group[:TEST_NAMES]]}
        for error, group in group_failures(tests)
    ]
    return count | {"failures": failures, "skips": dict(sorted(skips.items(), key=lambda item: -item[1]))}


def tests_text(name: str, tests: list[Record]) -> str:
    """A step's failures with a traceback of each kind, its slowest tests and why tests were skipped."""
    summary = summarise_tests(tests)
    lines = [f"{name}: " + ", ".join(f"{summary[key]} {key}" for key in ("passed", "failed", "skipped")), ""]
    for error, group in group_failures(tests):
        lines += [f"{len(group)} x {error}", *(f"    {test['test']}" for test in group), "", group[0]["trace"], ""]
    slowest = sorted(tests, key=lambda test: -test["seconds"])[:30]
    lines += ["slowest, seconds", *(f"{test['seconds']:>8.1f}  {test['test']}" for test in slowest), ""]
    lines += ["skipped", *(f"{count:>8}  {reason}" for reason, count in summary["skips"].items()), ""]
    return "\n".join(lines)
