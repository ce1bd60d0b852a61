"""Videos frame by frame, read and written with PyAV (extra ``video``)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from pmm_fast.data.convert_files import PART
from pmm_fast.data.files import DataError

_CODECS = ("libx264", "mpeg4")
_DEFAULT_RATE = Fraction(25)


def import_av() -> Any:
    """PyAV's module.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install 'pmm_fast[video]'") from error
    return av


class VideoReader:
    """The frames of a video, one after the other; a context manager.

    Args:
        path: the file.

    Attributes:
        rate: frames a second.
        frames: number of frames as far as the file tells, 0 if it does not.

    Raises:
        ImportError: PyAV is missing.
        DataError: the file is no video, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._av, self._path = import_av(), path
        try:
            self._container = self._av.open(str(path))
        except (self._av.FFmpegError, OSError) as error:
            raise self._unreadable(error) from error
        streams = self._container.streams.video
        if not streams:
            self._container.close()
            raise DataError(f"{path}: cannot be read as a video: it has no pictures")
        self._stream = streams[0]
        self._stream.thread_type = "AUTO"
        self.rate = Fraction(self._stream.average_rate or _DEFAULT_RATE)
        self.frames = self._stream.frames or self._frames_of_duration()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[Image.Image]:
        """RGB images, turned as the camera's rotation asks.

        Raises:
            DataError: a frame cannot be decoded, or there is none; names the file.
        """
        number = 0
        try:
            for frame in self._container.decode(self._stream):
                number += 1
                image = frame.to_image()
                # counted counterclockwise, as Pillow does
                yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
        except (self._av.FFmpegError, OSError) as error:
            raise self._unreadable(error, f" after {number} frames") from error
        if not number:
            raise DataError(f"{self._path}: cannot be read as a video: it has no frame that can be decoded")

    def _frames_of_duration(self) -> int:
        duration = self._container.duration
        return 0 if duration is None else round(duration / self._av.time_base * self.rate)

    def _unreadable(self, error: Exception, where: str = "") -> DataError:
        reason = getattr(error, "strerror", None) or error
        return DataError(f"{self._path}: cannot be read as a video{where}: {reason}")


class VideoWriter:
    """Writes an MP4 file (H.264 where the encoder is there, else MPEG-4); a context manager.

    The file gets its name when the context is left without an error; otherwise nothing is left behind.

    Args:
        path: the file; its folder is made.
        rate: frames a second.

    Raises:
        ImportError: PyAV is missing.
        OSError: the file cannot be written; names it.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._av, self._path, self._rate = import_av(), path, rate
        path.parent.mkdir(parents=True, exist_ok=True)
        self._part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
        self._stream: Any = None
        try:
            self._container = self._av.open(str(self._part), "w", format="mp4")
        except (self._av.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, image: Image.Image) -> None:
        """Append a frame.

        Args:
            image: any mode; the first one decides the size, later ones are resized to it.

        Raises:
            OSError: the file cannot be written; names it.
        """
        try:
            if self._stream is None:
                self._size, self._stream = image.size, self._open_stream(image.size)
            frame = self._av.VideoFrame.from_ndarray(_of_even_size(image, self._size), format="rgb24")
            self._container.mux(self._stream.encode(frame))
        except (self._av.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
                os.replace(self._part, self._path)
            else:
                # why it failed is known already
                with contextlib.suppress(self._av.FFmpegError, OSError):
                    self._container.close()
        finally:
            self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        try:
            if self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
        except (self._av.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error

    def _open_stream(self, size: tuple[int, int]) -> Any:
        codec = next((name for name in _CODECS if name in self._av.codecs_available), _CODECS[-1])
        stream = self._container.add_stream(codec, rate=self._rate)
        # half the resolution of colour needs even sides
        stream.width, stream.height = (side + side % 2 for side in size)
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"} if codec == "libx264" else {"qscale": "3"}
        return stream

    def _unwritable(self, error: Exception) -> OSError:
        return OSError(f"{self._path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def _of_even_size(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The image at a size, uint8 ``[H, W, 3]``; what an odd side lacks to an even one repeats its border."""
    image = image.convert("RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.pad(np.asarray(image), ((0, size[1] % 2), (0, size[0] % 2), (0, 0)), "edge")
