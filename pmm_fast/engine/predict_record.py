"""What a folder of predictions holds, so that a run that was stopped goes on and no prediction is taken for another's.

Two files at the top of the folder: ``predict.json`` says with what everything in it was made, ``predictions.jsonl`` has
a line for every input that is done.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmm_fast.config import ConfigError
from pmm_fast.data.convert_files import write_whole
from pmm_fast.data.inputs import Input
from pmm_fast.viz.predictions import KINDS, Ids, Kind, output_file

SETTINGS_FILE = "predict.json"
DONE_FILE = "predictions.jsonl"
FILMED: tuple[Kind, ...] = ("overlay", "colours")
"""What is written of a video as a video; all else is a file a frame."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What is written, and where.

    Attributes:
        folder: the folder of predictions.
        kinds: of ``KINDS``.
        alpha: opacity of overlays.
        ids: of id maps.
        frames: of videos, also a picture a frame of what is written as a video.
    """

    folder: Path
    kinds: tuple[Kind, ...]
    alpha: float
    ids: Ids
    frames: bool

    @property
    def filmed(self) -> tuple[Kind, ...]:
        """The kinds that are written of a video as a video."""
        return tuple(kind for kind in self.kinds if kind in FILMED)

    @property
    def framed(self) -> tuple[Kind, ...]:
        """The kinds of which every frame of a video gets a file."""
        return tuple(kind for kind in self.kinds if self.frames or kind not in FILMED)

    def video_file(self, kind: Kind, name: str) -> Path:
        """The video of a kind."""
        return self.folder / kind / f"{name}.mp4"

    def outputs(self, item: Input) -> set[str]:
        """What is written of an input, in words: kinds, and ``KIND frames`` for pictures beside a video."""
        pictures = self.filmed if self.frames and item.kind == "video" else ()
        return {*self.kinds, *(f"{kind} frames" for kind in pictures)}

    def files(self, item: Input, frames: int = 0) -> list[Path]:
        """Every file of an input.

        Args:
            item: the input.
            frames: number of frames of a video.
        """
        if item.kind == "image":
            return [output_file(self.folder, kind, item.name) for kind in self.kinds]
        stills = [
            output_file(self.folder, kind, frame_name(item.name, n)) for kind in self.framed for n in range(frames)
        ]
        return [self.video_file(kind, item.name) for kind in self.filmed] + stills


def frame_name(name: str, number: int) -> str:
    """The name of the outputs of one frame of a video, frames counted from 0."""
    return f"{name}_frames/{number + 1:06d}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Record:
    """What a folder says of itself; nothing is written until :meth:`begin`.

    Args:
        folder: the folder of predictions, which need not exist.

    Raises:
        ConfigError: its record is damaged, or the folder has outputs but no record.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._settings = self._read_settings()
        self._lines = self._read_lines() if self._settings is not None else {}

    def check(self, settings: Mapping[str, Any], inputs: Sequence[Input]) -> None:
        """Refuse to mix predictions.

        Args:
            settings: what predictions depend on, JSON values.
            inputs: what is asked for.

        Raises:
            ConfigError: the folder was made with other settings, holds the outputs of another file under a name, or
                holds outputs that are on no record.
        """
        advice = "choose another --out, or --overwrite"
        if self._settings is None:
            strangers = [kind for kind in KINDS if any((self.folder / kind).glob("*"))]
            if strangers:
                raise ConfigError(
                    f"--out: {self.folder / strangers[0]} holds files that no prediction is recorded of; {advice}"
                )
            return
        different = _differences(self._settings, settings)
        if different:
            raise ConfigError(f"--out: {self.folder} was made with {', '.join(different)}; {advice}")
        for item in inputs:
            line = self._lines.get(item.name)
            if line is not None and line["source"] != str(item.path):
                raise ConfigError(
                    f"--out: {self.folder} holds, as {item.name}, outputs of {line['source']}, not of {item.path}; "
                    f"{advice}"
                )

    def begin(self, settings: Mapping[str, Any], note: Mapping[str, Any]) -> None:
        """Write with what the folder is made; lines of predictions made with other settings are forgotten.

        Args:
            settings: as for :meth:`check`.
            note: what is worth knowing, but may differ.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._settings is None or _differences(self._settings, settings):
            self._lines = {}
        self._settings = {**settings, "note": dict(note)}
        text = json.dumps(self._settings, indent=1) + "\n"
        # the lines first: with the old settings an old line would be taken for true
        lines = "".join(json.dumps(line) + "\n" for line in self._lines.values())
        write_whole(self.folder / DONE_FILE, lambda part: part.write_text(lines, encoding="utf-8"))
        write_whole(self.folder / SETTINGS_FILE, lambda part: part.write_text(text, encoding="utf-8"))

    def line(self, item: Input) -> Line | None:
        """The line of an input, if it is the file that it was."""
        line = self._lines.get(item.name)
        return line if line is not None and identity(item).items() <= line.items() else None

    def done(self, item: Input, wanted: Wanted) -> bool:
        """Whether all that is wanted of an input is there."""
        line = self.line(item)
        # files of other kinds may be those of another network or of an earlier original
        if line is None or not wanted.outputs(item) <= {*line.get("kinds", ())}:
            return False
        return all(file.exists() for file in wanted.files(item, line["frames"]))

    def add(self, item: Input, read: Line, wanted: Wanted, pixels: Sequence[int], frames: int = 0) -> None:
        """Note that all that is wanted of an input is written; may be called from several threads.

        Args:
            item: the input.
            read: its :func:`identity` before it was read: it may be another file by now.
            wanted: what was written; what is on record of the same file stays so.
            pixels: number of pixels of each class.
            frames: number of frames of a video.

        Raises:
            OSError: the record cannot be written.
        """
        before = self._lines.get(item.name, {})
        known = before.get("kinds", ()) if read.items() <= before.items() else ()
        kinds = sorted({*known, *wanted.outputs(item)})
        line = {"name": item.name, **read, "kinds": kinds, "frames": frames, "pixels": list(pixels)}
        with self._lock, (self.folder / DONE_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            self._lines[item.name] = line

    def _read_settings(self) -> Line | None:
        path = self.folder / SETTINGS_FILE
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            raise ConfigError(f"{path}: expected what a folder of predictions was made with, as JSON; remove the file")
        return settings

    def _read_lines(self) -> dict[str, Line]:
        path = self.folder / DONE_FILE
        lines = {}
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
                lines[line["name"]] = line
            except (ValueError, KeyError, TypeError):
                # cut off when a run was killed: its input is done again
                continue
        return lines


def identity(item: Input) -> Line:
    """What tells whether a file is the one that it was: path, size and time; the path alone where there is none."""
    try:
        status = item.path.stat()
    except OSError:
        return {"source": str(item.path)}
    return {"source": str(item.path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """``alpha 0.5 (now 0.7)`` for every setting that differs."""
    if stored.get("checkpoint") != asked["checkpoint"]:
        return ["another checkpoint"]
    return [
        f"{name} {_plain(stored.get(name))} (now {_plain(value)})"
        for name, value in asked.items()
        if stored.get(name) != value
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
