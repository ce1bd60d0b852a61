"""Build, test and measure on a machine with a CUDA GPU, without a network, in under ten minutes: ``make gpu-check``.

Works with the packages of the interpreter that runs it (torch, triton, pytest, hypothesis, numpy, pillow, pyyaml, tqdm,
safetensors, setuptools, pybind11, ninja; nvcc on the path), in an environment of its own that sees them.  Writes
``<device>.json`` (versions, every step with its time and the end of its output, the records of memory_ops, meta_step,
photometric and evaluation in bench) and ``<device>.md``, a short table.  A step that fails or runs out of time does not
stop the others; the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-gpu"
PYTHON = VENV / "bin" / "python"
TAIL = 4000  # characters of a step's output that are kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="bench/results", help="folder of the record [bench/results]")
    parser.add_argument("--seconds", type=float, default=570, help="time for everything [570]")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and stop")
    options = parser.parse_args()
    out = (ROOT / options.out).resolve()
    scratch = out / "parts"
    if options.dry_run:
        for name, command, limit in steps(scratch):
            print(f"{name} (at most {limit} s): {' '.join(map(str, command))}")
        return
    out.mkdir(parents=True, exist_ok=True)
    # what an interrupted run left is not what this one measures
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    deadline = time.monotonic() + options.seconds
    make_environment()
    description = describe()
    results = [run(name, command, limit, deadline) for name, command, limit in steps(scratch)]
    record = description | {"steps": results} | measured(scratch)
    stem = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    (out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"{stem}.md").write_text(table(record))
    shutil.rmtree(scratch)
    print(table(record))
    sys.exit(any(step["status"] != "ok" for step in results))


def steps(scratch: Path) -> list[tuple[str, list[object], int]]:
    """Name, command and limit in seconds of everything that is done, most important first."""
    test = [PYTHON, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    install = [PYTHON, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
    # rounds end in time for the compiled variant, which comes last and is kept out of the record if it is cut off
    meta_step = ["bench/meta_step.py", "--preset", "paper", "--iterations", "6", "--limit", "110"]
    evaluation = ["bench/evaluation.py", "--size", "1024", "2048", "--architecture", "deeplabv3plus_resnet50"]
    sanitize = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    return [
        ("build", install, 180),
        ("doctor", [PYTHON, "-m", "pmm_fast.doctor"], 90),
        ("tests", [*test, "-m", "gpu and not slow", "tests"], 200),
        ("meta_step", [PYTHON, *meta_step, "--json", scratch / "meta_step.json"], 150),
        ("memory_ops", [PYTHON, "bench/memory_ops.py", "--limit", "100", "--json", scratch / "memory_ops.json"], 130),
        ("photometric", [PYTHON, "bench/photometric.py", "--json", scratch / "photometric.json"], 60),
        ("evaluation", [PYTHON, *evaluation, "--json", scratch / "evaluation.json"], 60),
        ("memcheck", [*sanitize, "memcheck", PYTHON, "-m", "pmm_fast.doctor"], 90),
        ("racecheck", [*sanitize, "racecheck", PYTHON, "-m", "pmm_fast.doctor"], 90),
        ("slow tests", [*test, "-m", "gpu and slow", "tests"], 120),
    ]


def make_environment() -> None:
    """A virtual environment that also sees the packages of this interpreter, wherever those lie."""
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inside = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    parents = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # addsitedir also reads the folders' own .pth files
    lines = [f"import site; site.addsitedir({path!r})" for path in parents]
    Path(inside, "parent.pth").write_text("\n".join([*lines, ""]))


def run(name: str, command: list[object], limit: int, deadline: float) -> dict[str, object]:
    """One step, ended when its own time or everybody's is up."""
    seconds = min(limit, deadline - time.monotonic())
    start = time.monotonic()
    print(f"{name} ...", flush=True)
    status, output = "out of time", ""
    try:
        if seconds >= 5:
            status, output = execute([str(part) for part in command], seconds)
    except FileNotFoundError as error:
        status, output = f"not there: {error.filename}", ""
    took = time.monotonic() - start
    print(f"{name}: {status}, {took:.0f} s", *([output[-TAIL:]] if status != "ok" else []), sep="\n", flush=True)
    return {"name": name, "status": status, "seconds": round(took, 1), "output": output[-TAIL:]}


def execute(command: list[str], seconds: float) -> tuple[str, str]:
    """Status and output; a command out of time is ended with all that it has started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PMM_FAST_BUILD": "cuda", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "out of time", process.communicate()[0]
    return "ok" if process.returncode == 0 else f"exit status {process.returncode}", output


def describe() -> dict[str, object]:
    """The device, the versions and the commit."""
    code = (
        "import json, torch, platform; p = torch.cuda.get_device_properties(0); "
        "import importlib.metadata as m; print(json.dumps({'device': p.name, 'memory': p.total_memory, "
        "'capability': f'{p.major}.{p.minor}', 'torch': torch.__version__, 'cuda': torch.version.cuda, "
        "'triton': m.version('triton'), 'python': platform.python_version()}))"
    )
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    if found.returncode:
        reason = found.stderr.strip().splitlines()[-1]
        sys.exit(f"error: {sys.executable} has no PyTorch with Triton and a CUDA GPU: {reason}")
    details = json.loads(found.stdout)
    return details | {"commit": commit(), "date": datetime.date.today().isoformat()}


def commit() -> str:
    """What was measured; a copied tree may have no git."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def measured(scratch: Path) -> dict[str, object]:
    """The benches' records, where they got so far."""
    files = {name: scratch / f"{name}.json" for name in ("memory_ops", "meta_step", "photometric", "evaluation")}
    found: dict[str, object] = {}
    for name, file in files.items():
        # absent, or half written by a step that ran out of time
        with contextlib.suppress(OSError, json.JSONDecodeError):
            found[name] = json.loads(file.read_text())
    return found


def table(record: dict) -> str:
    """The record in short, as Markdown."""
    versions = ", ".join(f"{name} {record.get(name)}" for name in ("torch", "triton", "cuda", "python"))
    lines = [f"# {record['device']}", "", f"{record['date']}, commit {record['commit'][:12]}; {versions}", ""]
    lines += ["| step | status | seconds |", "|---|---|---|"]
    lines += [f"| {step['name']} | {step['status']} | {step['seconds']} |" for step in record["steps"]]
    if rows := record.get("meta_step"):
        lines += [
            "",
            "| iteration | images/s | s | peak GB | x released | x without anomaly mode |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            values = (row["images_per_s"], row["seconds_per_step"], row["peak_bytes"] / 1e9)
            ratios = (row["ratio_released"], row["ratio_released_no_anomaly"])
            lines.append("| " + " | ".join([row["variant"], *map(number, (*values, *ratios))]) + " |")
    if rows := record.get("memory_ops"):
        lines += [
            "",
            "| operator | size | dtype | backend | pass | ms | of bandwidth | x released | x reference |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            cells = [row["op"], row["size"], row["dtype"], row["backend"], row["pass"], number(row["median_ms"])]
            ratios = ("bandwidth_share", "ratio_released", "ratio_reference")
            lines.append("| " + " | ".join(cells + [number(row.get(name)) for name in ratios]) + " |")
    if rows := record.get("photometric"):
        lines += ["", "| photometric | look | ms an image |", "|---|---|---|"]
        lines += [f"| {row['backend']} | {row['look']} | {number(row['ms_per_image'])} |" for row in rows]
    if rows := record.get("evaluation"):
        lines += ["", "| evaluation | way | s an image | network | rest | peak GB | x released | x plain |"]
        lines.append("|---|---|---|---|---|---|---|---|")
        for row in rows:
            values = [row[name] for name in ("seconds", "network_seconds", "rest_seconds")]
            values += [row["peak_bytes"] / 1e9, row["times_released"], row["times_plain"]]
            lines.append("| " + " | ".join([row["protocol"], row["way"], *map(number, values)]) + " |")
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
