"""``python -m pmm_fast.train``: train a network.

python -m pmm_fast.train --amp
python -m pmm_fast.train --config gs_r50 --data.root /data --amp
python -m pmm_fast.train --data.sources /data/a /data/b --data.unseen /data/c
python -m pmm_fast.train --config demo --print-config
torchrun --nproc-per-node=4 -m pmm_fast.train --amp
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pmm_fast.config import parse_command_line, run_main

if TYPE_CHECKING:
    from pmm_fast.engine.distributed import Ranks

PROG = "python -m pmm_fast.train"
DESCRIPTION = "Train a network on several labelled domains so that it segments domains it never saw."


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train; the run's folder holds checkpoint, configuration and log.

    As one of torchrun's processes, train together with the others.

    Raises:
        ValueError: a wrong option, or data, weights or a checkpoint that cannot be used.
        NonFiniteLossError: training met a loss that is not finite.
    """
    if not started_by_torchrun():
        _train(argv)
        return
    from pmm_fast.engine import distributed

    with distributed.session() as ranks:
        _train(argv, ranks)


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun started, by the variables that it sets for each."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and {"RANK", "LOCAL_RANK"} <= os.environ.keys()


def _train(argv: list[str] | None, ranks: Ranks | None = None) -> None:
    config = parse_command_line(argv, PROG, DESCRIPTION)
    # torch is loaded after the command line is known to be right
    from pmm_fast.engine.trainer import Trainer

    folder = Trainer(config, ranks).run()
    print(f"{folder}: trained; test it with  python -m pmm_fast.evaluate {folder}")


if __name__ == "__main__":
    run_main(main)
