"""What runs are called and where what is said about several of them together belongs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pmm_fast.config.cli import CHECKPOINT_FILE
from pmm_fast.config.load import ConfigError


def run_place(path: str | Path) -> Path:
    """What a run is known by: its folder, or the path of its checkpoint file without the suffix."""
    resolved = Path(path).expanduser().resolve()
    if resolved.is_dir():
        return resolved
    return resolved.parent if resolved.name == CHECKPOINT_FILE else resolved.with_suffix("")


def unique_ends(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths, of one number of parts, that tell them apart; the paths are all different."""
    length = 1
    while len({path.parts[-length:] for path in paths}) != len(paths):
        length += 1
    return ["/".join(path.parts[-length:]) for path in paths]


def run_names(paths: Sequence[str]) -> dict[str, Path]:
    """A short, unique name for each run: the end of its path, as much of it as it takes.

    Args:
        paths: folders of runs, or checkpoint files.

    Returns:
        Name to absolute path, in order.

    Raises:
        ConfigError: the same run is given twice.
    """
    places = [run_place(path) for path in paths]
    if len(set(places)) != len(places):
        raise ConfigError(f"a run is given twice: {', '.join(paths)}")
    return {name: Path(path).expanduser().resolve() for name, path in zip(unique_ends(places), paths, strict=True)}


def check_writable(folder: Path) -> None:
    """Try whether a folder of ``--out`` can be written, or made; nothing is left behind.

    Raises:
        ConfigError: it cannot.
    """
    there = next(level for level in (folder, *folder.absolute().parents) if level.exists())
    trial = there / f".{os.getpid()}.trial"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"--out: {folder} cannot be written: {error.strerror}") from error


def common_folder(folders: Sequence[Path]) -> Path:
    """The deepest folder that holds all these absolute folders; of one folder, that folder."""
    return Path(os.path.commonpath(folders))
