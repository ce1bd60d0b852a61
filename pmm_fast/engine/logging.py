"""Run logs: one JSON line per logged iteration, TensorBoard on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


class RunLog:
    """Writes ``metrics.jsonl`` in a run's folder, and TensorBoard events beside it.

    Args:
        folder: the run's folder.
        start: first iteration that will be logged; lines of later iterations, left by an interrupted run that is
            being resumed, are dropped.
        tensorboard: also write TensorBoard events.

    Raises:
        ImportError: TensorBoard asked for but not installed; names the extra.
    """

    def __init__(self, folder: Path, start: int, tensorboard: bool = False) -> None:
        path = folder / FILE_NAME
        kept = []
        if start > 0 and path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["iteration"] <= start]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = _tensorboard(folder, start) if tensorboard else None

    def write(self, iteration: int, losses: dict[str, float], **values: Any) -> None:
        """Log one iteration (counted from 1): losses by name, and further numbers."""
        self._file.write(json.dumps({"iteration": iteration, "losses": losses, **values}) + "\n")
        if self._board is not None:
            for name, value in {**{f"loss/{key}": loss for key, loss in losses.items()}, **values}.items():
                self._board.add_scalar(name, value, iteration)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: true needs TensorBoard: pip install 'pmm_fast[tensorboard]'") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start)
