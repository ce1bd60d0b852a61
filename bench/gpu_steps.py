"""What ``bench/gpu_check.py`` runs: the steps, in what order, which of them at once, and the sets that fit one call.

A command is a line with these fields: ``{python}`` the interpreter, ``{json}`` a file for the step's rows, ``{log}``
pytest's options for a log and for processes, ``{folder}`` a folder of the step's own, ``{seconds}`` what is left to it.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of the step.
        command: the line.
        limit: seconds that it has; more where the steps after it still have theirs.
        miniature: the line of a rehearsal, which has no GPU; empty: there is none, the step is skipped.
        fills: the part of the record that its rows belong to.
    """

    name: str
    command: str
    limit: int
    miniature: str = ""
    fills: str = ""

    def words(self, values: Mapping[str, Sequence[str]], rehearse: bool = False) -> list[str]:
        """The command as a list; a field that is a word of its own may stand for several or none."""
        found: list[str] = []
        for word in shlex.split(self.miniature if rehearse else self.command):
            if word[1:-1] in values and word[0] + word[-1] == "{}":
                found.extend(values[word[1:-1]])
            else:
                found.append(word)
        return found


def _anywhere(name: str, command: str, limit: int, fills: str = "") -> Step:
    """A step that a rehearsal does in full."""
    return Step(name, command, limit, command, fills)


def _sanitizer(tool: str, options: str = "", miniature: str = "") -> Step:
    """A tool of compute-sanitizer on the C++ kernels.

    PyTorch's allocator would hide what is read or written beyond a tensor: blocks of memory are larger, and shared.
    """
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = f"--tool {tool} {options} --kernel-name kns=3pmm --error-exitcode 9 --print-limit 20"
    command = f"env PYTORCH_NO_CUDA_MEMORY_CACHING=1 {path} {options} {{python}} bench/sanitize.py"
    return Step(tool, command, 80, miniature)


_PYTEST = "{python} -m pytest -p no:cacheprovider --tb=short {log}"
_TRAIN = "{python} bench/end_to_end.py --folder {folder} --json {json}"
_STEP = "{python} bench/meta_step.py --preset paper --iterations 6 --limit {seconds} --json {json}"
_STEP_SMALL = (
    "{python} bench/meta_step.py --architecture deeplabv3plus_mobilenet_v2 --channels 16 --crop 32 32 --iterations 1 "
    "--device cpu --limit {seconds} --json {json}"
)
_REST = (
    "released released_no_anomaly order2 order1 order2_bf16_searched order2_bf16_checkpointed order2_compiled "
    "order1_compiled plain_bf16 plain order2_bf16_inductor"
)
_OPS = "{python} bench/memory_ops.py --seconds 0.4 --limit {seconds} --json {json}"
_OPS_SMALL = (
    "{python} bench/memory_ops.py --device cpu --size small --dtype float32 --op masked_average_pool "
    "--seconds 0.05 --json {json}"
)
_EVALUATION = "{python} bench/evaluation.py --json {json}"

STEPS = (
    _anywhere("build", "{python} -m pip install --no-build-isolation --no-deps --no-index -e .", 110),
    _anywhere("rates", "{python} bench/rates.py --json {json}", 25, "rates"),
    _anywhere("doctor", "{python} -m pmm_fast.doctor", 100),
    Step(
        "gpu-tests",
        f"{_PYTEST} -m 'gpu and not slow' tests/ops tests/meta tests/data/test_dali.py",
        140,
        "{python} -m pytest -p no:cacheprovider --collect-only -m gpu tests/ops tests/meta",
    ),
    # calls that CUDA refuses are not errors of a kernel: PyTorch asks the driver for what it may not have
    _sanitizer("memcheck", "--report-api-errors no", "{python} bench/sanitize.py --backend cpu"),
    _sanitizer("racecheck"),
    _sanitizer("synccheck"),
    Step("training", _TRAIN, 80, f"{_TRAIN} --device cpu --iterations 3", "training"),
    Step(
        "training-compiled",
        f"{_TRAIN} --compile on",
        100,
        f"{_TRAIN} --compile on --device cpu --iterations 2",
        "training",
    ),
    _anywhere("resources", "{python} bench/resources.py --json {json}", 60, "resources"),
    Step(
        "memory_ops",
        f"{_OPS} --size paper fill --backend cuda triton released reference",
        85,
        f"{_OPS_SMALL} --backend cpu released reference",
        "memory_ops",
    ),
    # the variants of the preset, what was asked for first, as far as the time goes
    Step("meta_step", _STEP, 110, f"{_STEP_SMALL} --variants released released_no_anomaly order2", "meta_step"),
    Step(
        "meta_step-rest", f"{_STEP} --variants {_REST}", 180, f"{_STEP_SMALL} --variants released order1", "meta_step"
    ),
    Step(
        "memory_ops-compiled",
        f"{_OPS} --size paper --backend cuda triton released reference compiled",
        80,
        f"{_OPS_SMALL} --backend cpu reference",
        "memory_ops",
    ),
    Step(
        "photometric",
        "{python} bench/photometric.py --json {json}",
        30,
        "{python} bench/photometric.py --side 48 --json {json}",
        "photometric",
    ),
    Step(
        "evaluation",
        f"{_EVALUATION} --size 1024 2048 --architecture deeplabv3plus_resnet50 --rounds 3",
        60,
        f"{_EVALUATION} --size 64 128 --channels 16 --protocols whole --rounds 1 --device cpu",
        "evaluation",
    ),
    Step(
        "all-tests",
        f"{_PYTEST} -m 'not gpu' tests",
        340,
        f"{_PYTEST} tests/test_imports.py tests/config/test_load.py",
    ),
    Step("slow-gpu-tests", f"{_PYTEST} -m 'gpu and slow' tests/ops tests/meta", 200),
)
BY_NAME = {step.name: step for step in STEPS}

# those that do not measure run at once; what is measured runs alone
AT_ONCE = (
    ("doctor", "gpu-tests"),
    ("memcheck", "racecheck", "synccheck", "training", "training-compiled"),
    ("all-tests", "slow-gpu-tests"),
)

# each fits one call of ten minutes even if every step takes all its time; every call builds, for a machine may be bare
SETS = {
    "first": (
        *("rates", "doctor", "gpu-tests"),
        *("memcheck", "racecheck", "synccheck", "training"),
        *("memory_ops", "meta_step"),
    ),
    "figures": (
        *("rates", "resources", "meta_step-rest"),
        *("memory_ops-compiled", "photometric", "evaluation"),
    ),
    "tests": ("training-compiled", "all-tests", "slow-gpu-tests"),
}


def chosen(names: Sequence[str]) -> list[list[Step]]:
    """The steps of names and sets, in the order of ``STEPS``; those of a list run at once.

    The build is one of them: it takes seconds where it has been done.

    Raises:
        ValueError: a name that is neither a step nor a set.
    """
    wanted = {"build"}
    for name in names:
        if name not in SETS and name not in BY_NAME:
            raise ValueError(f"unknown step {name!r}; expected {', '.join([*SETS, *BY_NAME])}")
        wanted |= set(SETS.get(name, (name,)))
    groups: list[list[Step]] = []
    for step in STEPS:
        if step.name not in wanted:
            continue
        together = next((names for names in AT_ONCE if step.name in names), ())
        if groups and groups[-1][0].name in together:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def fields(step: Step, python: Path, parts: Path, seconds: float, log: Sequence[str]) -> dict[str, list[str]]:
    """What the fields of a step's command stand for."""
    return {
        "python": [str(python)],
        "json": [str(parts / f"{step.name}.json")],
        "folder": [str(parts / step.name)],
        "log": [*log],
        "seconds": [f"{seconds:.0f}"],
    }
