"""A short training on generated streets and its test, by a user's commands: ``python bench/end_to_end.py``.

In bf16, with everything as the preset ``demo`` has it but for ImageNet weights and the numbers of images.  Fails where
a command fails, where a loss is not finite, or where the losses of a run of some length do not fall.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# iterations after which the losses must have fallen
LONG = 40


def run(module: str, *words: str) -> None:
    """``python -m module words``, what it says shown.

    Raises:
        SystemExit: the command failed.
    """
    command = [sys.executable, "-m", module, *words]
    print("$ python", *command[1:], flush=True)
    status = subprocess.run(command).returncode
    if status:
        sys.exit(f"error: {module}: exit status {status}")


def losses_of(folder: Path) -> list[float | None]:
    """The total loss of every logged iteration; None where it was not finite."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["losses"]["total"] for line in lines]


def what_is_wrong(losses: list[float | None]) -> str | None:
    """Why these are not the losses of a training that works, or None."""
    finite = [loss for loss in losses if loss is not None]
    if len(finite) < len(losses):
        return f"{len(losses) - len(finite)} of {len(losses)} losses are not finite"
    part = max(1, len(finite) // 4)
    first, last = sum(finite[:part]) / part, sum(finite[-part:]) / part
    if len(finite) >= LONG and last > 0.95 * first:
        return f"the losses did not fall: {first:.3f} in the first quarter, {last:.3f} in the last"
    return None


def scores_of(folder: Path) -> dict[str, float]:
    """The mIoU of every domain."""
    (domains,) = json.loads((folder / "results.json").read_text())["runs"].values()
    return {name: result["miou"] for name, result in domains.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the run, its test and its streets go")
    parser.add_argument("--device", default="auto", help="[auto]")
    parser.add_argument("--iterations", type=int, default=60, help="[60]")
    parser.add_argument("--compile", default="off", choices=("on", "off"), help="[off]")
    parser.add_argument("--json", metavar="FILE", help="write the record here")
    options = parser.parse_args(argv)
    start, trained, tested = time.monotonic(), options.folder / "run", options.folder / "evaluation"
    device = ("--device", options.device)
    words = "--config demo --amp --model.weights none --data.streets_images 24 --loader torch --strict --log_every 1"
    words += f" --iterations {options.iterations} --compile {options.compile}"
    streets = ("--data.cache", str(options.folder / "streets"))
    run("pmm_fast.train", *words.split(), *streets, *device, "--out", str(trained))
    losses = losses_of(trained)
    run("pmm_fast.evaluate", str(trained), "--eval.limit", "4", *device, "--out", str(tested))
    found: dict[str, Any] = {"iterations": options.iterations, "seconds": round(time.monotonic() - start, 1)}
    found |= {"first_loss": losses[0], "last_loss": losses[-1], "miou": scores_of(tested)}
    name = "bf16, compiled" if options.compile == "on" else "bf16"
    print(f"{name}: {json.dumps(found)}")
    if options.json:
        Path(options.json).write_text(json.dumps({name: found}, indent=1) + "\n")
    if wrong := what_is_wrong(losses):
        sys.exit(f"error: {wrong}")


if __name__ == "__main__":
    main()
