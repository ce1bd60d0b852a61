"""``python -m pmm_fast.train``: train a network.

python -m pmm_fast.train --amp
python -m pmm_fast.train --config gs_r50 --data.root /data --amp
python -m pmm_fast.train --data.sources /data/a /data/b --data.unseen /data/c
python -m pmm_fast.train --config demo --print-config
"""

from __future__ import annotations

from pmm_fast.config import parse_command_line, run_main

PROG = "python -m pmm_fast.train"
DESCRIPTION = "Train a network on several labelled domains so that it segments domains it never saw."


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train; the run's folder holds checkpoint, configuration and log.

    Raises:
        ValueError: a wrong option, or data, weights or a checkpoint that cannot be used.
        NonFiniteLossError: training met a loss that is not finite.
    """
    config = parse_command_line(argv, PROG, DESCRIPTION)
    from pmm_fast.engine.trainer import Trainer

    folder = Trainer(config).run()
    print(f"{folder}: trained; test it with  python -m pmm_fast.evaluate {folder}")


if __name__ == "__main__":
    run_main(main)
