"""``python -m pmm_fast.train``, but for what the first argument changes.

``double``: everything in float64.  Others: what goes wrong on rank 1 in its second iteration.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pmm_fast import train
from pmm_fast.config import run_main
from pmm_fast.engine.feed import Feed
from pmm_fast.engine.trainer import Trainer


def use_double() -> None:
    following = Feed.__next__

    def double(self: Feed) -> tuple[Tensor, Tensor]:
        images, labels = following(self)
        return images.double(), labels

    torch.set_default_dtype(torch.float64)
    Feed.__next__ = double  # type: ignore[method-assign]


def spoil(kind: str) -> None:
    iterate = Trainer._iterate

    def spoiled(self: Trainer, batches: Iterator[Any]) -> Any:
        if self.ranks.rank == 1 and self.iteration == 1:
            if kind == "user":
                raise OSError("image.png: cannot be read")
            if kind == "bug":
                raise RuntimeError("no such luck")
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "nan":
                images, labels = next(batches)
                images[0] = torch.nan
                batches = iter([(images, labels)])
            if kind == "drift":
                next(iter(self.params.values())).data += 1
        return iterate(self, batches)

    Trainer._iterate = spoiled  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1] == "double":
        use_double()
    else:
        spoil(sys.argv[1])
    run_main(train.main, sys.argv[2:])
