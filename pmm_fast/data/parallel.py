"""Work on many files: in several processes, with a progress bar; none of them outlives the program.  Or in threads."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection, get_all_start_methods, get_context, parent_process
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from pmm_fast.data.files import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = min(8, os.cpu_count() or 1)
"""Images read or written at once beside a network: either takes longer than a GPU needs for one."""

# below this many tasks starting processes costs more than it saves
_ALONE = 16
_CHUNK = 4

_function: Callable[[int], object] | None = None


def for_each(
    function: Callable[[int], Result], tasks: list[int], workers: int, title: str
) -> Iterator[tuple[int, Result]]:
    """Call a function for every task, in processes of their own, and show progress and the time left on stderr.

    Args:
        function: of a task's number; reaches the processes once (by fork where there is fork), however many tasks.
        tasks: the numbers.
        workers: processes; 1 (or very few tasks) works in this one.
        title: of the progress bar.

    Yields:
        Each task with its result, in the order of ``tasks``.

    Raises:
        OSError: a process was killed.
        Exception: whatever ``function`` raises first; what has not begun then is not done.
    """
    with tqdm(total=len(tasks), desc=title, unit="image") as bar:
        if workers == 1 or len(tasks) < _ALONE:
            for task in tasks:
                yield task, function(task)
                bar.update()
            return
        method = "fork" if "fork" in get_all_start_methods() else "spawn"
        pool = ProcessPoolExecutor(min(workers, len(tasks)), get_context(method), _begin, (function,))
        try:
            for task, result in zip(tasks, pool.map(_call, tasks, chunksize=_CHUNK), strict=True):
                yield task, result  # type: ignore[misc]
                bar.update()
        except BrokenProcessPool:
            raise OSError("a worker process was killed (out of memory?): run again with fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(function: Callable[[int], object]) -> None:
    global _function
    _function = function
    # Ctrl-C reaches every process of the terminal; the first one ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a pool's process whose parent was killed would wait for its next task for ever
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _call(task: int) -> object:
    assert _function is not None
    return _function(task)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Sequence[Item], ahead: int
) -> Iterator[Result]:
    """``function`` of every item, in order, ``ahead`` of them at a time in the threads of ``pool``."""
    rest = iter(items)
    begun = deque(pool.submit(function, item) for item in islice(rest, ahead))
    while begun:
        result = begun.popleft().result()
        begun.extend(pool.submit(function, item) for item in islice(rest, 1))
        yield result


@contextmanager
def held(path: Path, folder: Path) -> Iterator[None]:
    """Hold a folder against a second run, by a lock file; the system lets go of it however this run ends.

    Args:
        path: the lock file, in a folder that exists.
        folder: what is held, for the message.

    Raises:
        DataError: another run holds it.
    """
    # to be written to, though nothing is: network file systems lock nothing else
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a run that was about to end may have removed what was opened here
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError
        except BlockingIOError:
            raise DataError(f"another run is writing {folder}") from None
        try:
            yield
        finally:
            path.unlink()
