"""Lists of image names: text files that say which images a split holds.

A list has one name a line; empty lines and lines that begin with ``#`` do not count.  Lists of numbered images may be
written in short: the first line that counts is ``numbers of N digits``, and then follow, separated by blanks or line
ends, single numbers (``12``), runs (``15-20``), and ``!NAME``, which takes away every number of the list ``NAME.txt``
beside it.  So ``1-10 !odd`` with 5 digits may stand for ``00002``, ``00004``, ..., ``00010``.
"""

from __future__ import annotations

import re
from pathlib import Path

from pmm_fast.data.files import DataError

LISTS = Path(__file__).parent / "lists"

_SHORT = re.compile(r"numbers of (\d+) digits")
_RUN = re.compile(r"(\d+)(?:-(\d+))?")


def shipped_list(name: str) -> Path:
    """The file of a list that is part of the package, such as ``gtav_val``."""
    return LISTS / f"{name}.txt"


def read_list(path: Path) -> dict[str, str]:
    """The names on a list.

    Args:
        path: the text file, in either form.

    Returns:
        Each name, with ``/`` between folders, and the place where it stands ("FILE, line 3"), in the order of the file;
        numbers in ascending order.

    Raises:
        DataError: the file cannot be read, names nothing, or breaks the rules of the short form.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a list of images: {error}") from error
    lines = {
        number: line.strip().replace("\\", "/").removeprefix("./") for number, line in enumerate(text.splitlines(), 1)
    }
    lines = {number: line for number, line in lines.items() if line and not line.startswith("#")}
    if lines and (short := _SHORT.fullmatch(next(iter(lines.values())))):
        tokens = [token for line in list(lines.values())[1:] for token in line.split()]
        names = {f"{number:0{short[1]}d}": str(path) for number in _numbers(path, tokens)}
    else:
        names = {line: f"{path}, line {number}" for number, line in lines.items()}
    if not names:
        raise DataError(f"{path} names no image")
    return names


def _numbers(path: Path, tokens: list[str]) -> list[int]:
    numbers: set[int] = set()
    without: set[int] = set()
    for token in tokens:
        if token.startswith("!"):
            without |= {int(name) for name in read_list(path.parent / f"{token[1:]}.txt")}
        elif run := _RUN.fullmatch(token):
            numbers |= set(range(int(run[1]), int(run[2] or run[1]) + 1))
        else:
            raise DataError(f"{path}: expected numbers, runs like 15-20 or !LIST, got {token!r}")
    return sorted(numbers - without)
