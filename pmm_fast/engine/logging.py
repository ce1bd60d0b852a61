"""Run logs: one JSON line per logged iteration, TensorBoard on request.  Progress bars."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

FILE_NAME = "metrics.jsonl"


class RunLog:
    """Writes ``metrics.jsonl`` in a run's folder, and TensorBoard events beside it.

    Args:
        folder: the run's folder.
        start: iterations done before; lines of later ones, left by an interrupted run that is being resumed, are
            dropped.
        tensorboard: also write TensorBoard events.

    Raises:
        ImportError: TensorBoard asked for but not installed; names the extra.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool = False) -> None:
        path = folder / FILE_NAME
        kept = []
        if start > 0 and path.exists():
            kept = [line for line in path.read_text().splitlines() if _iteration(line) <= start]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = _tensorboard(folder, start) if tensorboard else None

    def write(self, iteration: int, losses: dict[str, float], **values: Any) -> None:
        """Log one iteration (counted from 1): losses by name, and further numbers; null where one is not finite."""
        line = {"iteration": iteration, "losses": _finite(losses), **_finite(values)}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in {**{f"loss/{key}": loss for key, loss in losses.items()}, **values}.items():
                self._board.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _iteration(line: str) -> float:
    """The iteration of a line; infinite for a line that an interruption cut off."""
    try:
        return json.loads(line)["iteration"]
    except ValueError:
        return math.inf


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: true needs TensorBoard: pip install 'pmm_fast[tensorboard]'") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)


def progress_bar(
    title: str,
    items: Iterable[Any] | None = None,
    total: int | None = None,
    unit: str = "it",
    initial: int = 0,
    shown: bool = True,
) -> tqdm:
    """A progress bar on stderr with an estimate; where stderr is a file, a line now and then.

    Args:
        title: what is going on.
        items: iterated over; None: the caller says ``update``.
        total: how many there are, where ``items`` does not tell; None: not known.
        unit: what is counted.
        initial: how many were done before.
        shown: False for a bar that stays silent.
    """
    return tqdm(
        items,
        title,
        total,
        unit=unit,
        initial=initial,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
        disable=not shown,
    )
