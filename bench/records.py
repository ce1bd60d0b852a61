"""The records under ``bench/results`` by machine: what ``bench/performance.py`` writes its documents from.

A GPU has one file, ``DEVICE.json``, of ``bench/gpu_check.py``: a dictionary that names the device, the versions, the
commit and the steps, and holds a list of rows for every bench.  A CPU has a file of rows a bench: ``MACHINE.json`` of
``bench/memory_ops.py``, and those of the other benches with the bench's name before it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pmm_fast.ops.backends import BACKENDS

Row = dict[str, Any]

# what the name of a CPU's file begins with; without any it is of memory_ops
PREFIXES = {
    "meta-step-": "meta_step",
    "data-loading-": "data_loading",
    "evaluation-": "evaluation",
    "photometric-": "photometric",
}
PARTS = ("memory_ops", *PREFIXES.values(), "resources")
RATES = ("copy_bytes_per_s", "exponentials_per_s", "products_per_s")


@dataclass(frozen=True)
class Part:
    """The rows of one bench, and where they stand.

    Attributes:
        rows: as the bench wrote them.
        source: the file.
        facts: device, torch, threads, commit, of the first row, or of the file.
    """

    rows: list[Row]
    source: Path
    facts: Row


@dataclass
class Machine:
    """What is known of one machine.

    Attributes:
        stem: of its files; names its pictures.
        title: for a heading.
        gpu: whether it is one.
        parts: by name of the bench; what was not measured is missing.
        record: a GPU's file but for the parts: versions, steps, rates.
    """

    stem: str
    title: str
    gpu: bool
    parts: dict[str, Part] = field(default_factory=dict)
    record: Row = field(default_factory=dict)

    def rows(self, part: str) -> list[Row]:
        """The rows of a bench, none where it was not run."""
        return self.parts[part].rows if part in self.parts else []

    def rates(self) -> dict[str, float]:
        """Ceilings by name, a second; the copy bandwidth of older rows is what their shares are shares of."""
        found = dict(self.record.get("rates") or {})
        for row in self.rows("memory_ops"):
            seconds = row["median_ms"] / 1e3
            known = {"copy_bytes_per_s": row["bytes_moved"] / seconds / row["bandwidth_share"]}
            return found | known | {name: row[name] for name in RATES if row.get(name)}
        return found

    def kernels(self) -> list[str]:
        """The kernel backends with rows, in the order in which the dispatch takes them."""
        names = {row["backend"] for row in self.rows("memory_ops")}
        return [name for name in BACKENDS if name in names and name != "reference"]


def read_machines(folder: Path) -> list[Machine]:
    """Every machine with a record in a folder, GPUs first.

    Raises:
        ValueError: a file that is no record, with its name.
    """
    found: dict[str, Machine] = {}
    for path in sorted(folder.glob("*.json")):
        content = _content(path)
        if isinstance(content, dict):
            found[path.stem] = _of_gpu(path, content)
        else:
            prefix = next((prefix for prefix in PREFIXES if path.stem.startswith(prefix)), "")
            stem = path.stem.removeprefix(prefix)
            machine = found.setdefault(stem, Machine(stem, _title(stem, content[0]["device"]), False))
            machine.parts[PREFIXES.get(prefix, "memory_ops")] = Part(content, path, content[0])
    return sorted(found.values(), key=lambda machine: (not machine.gpu, machine.stem))


def _content(path: Path) -> Row | list[Row]:
    """A file as it is, if it is a record."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}: not JSON ({error})") from error
    rows = [content] if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and "device" in row for row in rows):
        raise ValueError(f"{path.name}: no record: expected rows that name a device, or one dictionary that does")
    if isinstance(content, dict) and content.get("rehearsal"):
        raise ValueError(f"{path.name}: a rehearsal without a GPU, whose figures mean nothing")
    return content


def _of_gpu(path: Path, content: Row) -> Machine:
    machine = Machine(path.stem, content["device"], True)
    machine.record = {key: value for key, value in content.items() if key not in PARTS}
    facts = {key: value for key, value in machine.record.items() if not isinstance(value, list | dict)}
    for name in PARTS:
        if content.get(name):
            rows = content[name]
            machine.parts[name] = Part(rows, path, facts | {key: rows[0][key] for key in facts if key in rows[0]})
    return machine


def _title(stem: str, device: str) -> str:
    """A CPU's name; how many of its cores there were is in the name of the file alone."""
    cores = re.match(r"cpu-(\d+)-cores", stem)
    return f"{device} ({cores[1]} cores)" if cores else device
