"""Functions and programs run by several processes of one gloo group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

TIMEOUT = timedelta(seconds=120)
# these processes share the CPU: gloo alone, also where there is a GPU
ALIKE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_ranks(function: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> list[Any]:
    """What ``function(group, rank, *arguments)`` returns on each of ``size`` ranks; it must be importable by name."""
    torch.multiprocessing.spawn(_run, (function, size, folder, arguments), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def _run(rank: int, function: Callable[..., Any], size: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=TIMEOUT
    )
    assert distributed.group.WORLD is not None
    torch.save(function(distributed.group.WORLD.group_name, rank, *arguments), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def launch(size: int, *argv: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each of ``size`` processes ``python argv``, told what torchrun would tell them.

    Unlike torchrun nobody ends the others when one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ALIKE | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, *argv],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        told = [process.communicate(timeout=TIMEOUT.total_seconds()) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, told, strict=True)]
