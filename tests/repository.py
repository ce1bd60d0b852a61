"""The repository as text: where it is, and its files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE_FOLDERS = ("pmm_fast", "kernels", "csrc", "bench", "tests")
CODE = {".py", ".cpp", ".cu", ".h", ".hpp", ".cuh"}


def files(folders: Iterable[str], suffixes: Iterable[str]) -> list[Path]:
    """Files of some kinds below some folders of the repository, sorted."""
    wanted = set(suffixes)
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in wanted and path.is_file() and "__pycache__" not in path.parts
    )


def name(path: Path) -> str:
    """A file's path in the repository."""
    return path.relative_to(ROOT).as_posix()
