"""Videos, read and written frame by frame."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_fast.data.files import DataError
from pmm_fast.data.videos import VideoReader, VideoWriter

RATE = Fraction(30000, 1001)
SIZE = (47, 33)
# of colours, out of 255: a video is compressed
LOSS = 12


def frame(number: int) -> np.ndarray:
    """Four plain quarters in different colours, one of them by number."""
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[:16, :24] = (200, 40, 40)
    pixels[:16, 24:] = (40, 200, 40)
    pixels[16:, :24] = (40, 40, 200)
    pixels[16:, 24:] = 30 + 40 * number
    return pixels


def write(path: Path, frames: int = 5) -> Path:
    with VideoWriter(path, RATE) as video:
        for number in range(frames):
            video.write(Image.fromarray(frame(number)))
    return path


@pytest.fixture(scope="module", autouse=True)
def av():
    return pytest.importorskip("av")


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("film") / "film.mp4")


def middles(image: Image.Image) -> np.ndarray:
    """The colours in the middle of the four quarters."""
    pixels = np.asarray(image).astype(int)
    rows, columns = (np.array([side // 4, 3 * side // 4]) for side in pixels.shape[:2])
    return pixels[rows[:, None], columns]


def test_frames_come_back(film):
    with VideoReader(film) as video:
        assert video.rate == RATE and video.frames == 5
        frames = list(video)
    assert len(frames) == 5 and {image.mode for image in frames} == {"RGB"}
    # odd sides get one more pixel, a copy of the last
    assert {image.size for image in frames} == {(48, 34)}
    for number, image in enumerate(frames):
        assert abs(middles(image) - middles(Image.fromarray(frame(number)))).max() < LOSS
        pixels = np.asarray(image).astype(int)
        assert abs(pixels[33] - pixels[32]).max() < LOSS and abs(pixels[:, 47] - pixels[:, 46]).max() < LOSS
    assert [path.name for path in film.parent.iterdir()] == ["film.mp4"]


def test_frames_are_turned_upright(film, tmp_path):
    content = bytearray(film.read_bytes())
    track = content.index(b"tkhd")
    one = (1 << 16).to_bytes(4, "big")
    matrix = content.index(one + bytes(12) + one, track)
    # x' = -y, y' = x: a quarter turn clockwise
    minus = (-(1 << 16)).to_bytes(4, "big", signed=True)
    content[matrix : matrix + 20] = bytes(4) + one + bytes(4) + minus + bytes(4)
    (tmp_path / "turned.mp4").write_bytes(content)
    with VideoReader(tmp_path / "turned.mp4") as video:
        image = next(iter(video))
    assert image.size == (34, 48)
    assert abs(middles(image) - np.rot90(middles(Image.fromarray(frame(0))), -1)).max() < LOSS


def test_what_is_no_video(tmp_path, film):
    whole = film.read_bytes()
    for name, data in (("garbage.mp4", b"garbage" * 99), ("empty.avi", b""), ("cut.mp4", whole[: len(whole) // 3])):
        (tmp_path / name).write_bytes(data)
        with (
            pytest.raises(DataError, match=f"{name}: cannot be read as a video"),
            VideoReader(tmp_path / name) as video,
        ):
            list(video)
    with pytest.raises(DataError, match=r"nowhere.mp4: cannot be read as a video: No such file"):
        VideoReader(tmp_path / "nowhere.mp4")


def test_nothing_is_left_of_an_interrupted_video(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", RATE) as video:
        # as many as the encoder holds back before it writes any
        for number in range(80):
            video.write(Image.fromarray(frame(number % 5)))
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        VideoWriter(tmp_path / "file/a.mp4", RATE)
