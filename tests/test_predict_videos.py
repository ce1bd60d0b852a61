"""``python -m pmm_fast.predict`` on videos that end before their time."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmm_fast import predict as program
from pmm_fast.data.videos import VideoReader
from pmm_fast.engine.predict_record import DONE_FILE
from tests.tiny_network import noise, save_network

av = pytest.importorskip("av")


def matroska(path: Path, frames: int) -> list[int]:
    """Writes a video, ten frames a second, whose file tells how long it is but not how many frames it has.

    Returns:
        Where each frame begins in the file.
    """
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(32, 48, number), format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        return [packet.pos for packet in container.demux(video=0) if packet.size]


def test_a_video_that_is_cut_off_is_written_but_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "drive.mkv", tmp_path / "out"
    network = save_network(tmp_path / "network.pt")
    arguments = [str(network), str(path), "--out", str(out), "--device", "cpu"]
    begins, content = matroska(path, 30), path.read_bytes()
    path.write_bytes(content[: begins[15]])
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            program.main(arguments)
        told = capsys.readouterr().err
        assert stop.value.code == 1 and "error: 1 of 1 could not be predicted:\n" in told
        assert f"  {path}: cut off: only 15 of about 30 frames could be read\n" in told
        assert (out / DONE_FILE).read_text() == "" and "done already" not in told
        with VideoReader(out / "overlay/drive.mp4") as overlay:
            assert sum(1 for _ in overlay) == 15
    # what is told of the length is an estimate
    path.write_bytes(content[: begins[26]])
    program.main(arguments)
    assert '"frames": 26' in (out / DONE_FILE).read_text()
