"""``python -m pmm_fast.export``: from a checkpoint to a file, what it prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pmm_fast
from pmm_fast.config import ConfigError
from pmm_fast.engine.checkpoint import CheckpointError
from pmm_fast.engine.export import ExportError
from pmm_fast.export import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = pmm_fast.build_model("deeplabv2_resnet18", 7, channels=8)
    model.label_space = "idd_lite7"
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    pmm_fast.save(model, path)
    return path


def test_a_run_becomes_a_file(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = checkpoint.with_suffix(".pt2")
    main([str(checkpoint.parent), "--static", "--height", "64", "--width", "96"])
    out, err = capsys.readouterr()
    assert "deeplabv2_resnet18, 7 classes (idd_lite7), memory 7 x 8" in out
    megabytes = written.stat().st_size / 1e6
    assert f"{written}: {megabytes:.1f} MB, from images [1, 3, 64, 96] to logits" in out
    assert "1 x 3 x 64 x 96: " in out and "of the largest logit apart, 100 % of the classes equal" in out
    assert "network " in out and " ms, file " in out
    assert "tracing the network" in err
    with pytest.raises(ExportError, match=r"checkpoint.pt2 exists; --force replaces it"):
        main([str(checkpoint)])


def test_what_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG")
    with pytest.raises(CheckpointError, match=r"picture\.png"):
        main([str(picture)])
    with pytest.raises(CheckpointError, match="absent"):
        main([str(tmp_path / "absent")])
    with pytest.raises(ExportError, match=r"street.onnx: a file of format pt2 must be called \*.pt2"):
        main([str(checkpoint), "--out", str(tmp_path / "street.onnx")])
    with pytest.raises(ConfigError, match=r"--height and --width: expected at least 1, got 0 and 1024"):
        main([str(checkpoint), "--height", "0"])
    with pytest.raises(ConfigError, match="invalid choice: 'torchscript'"):
        main([str(checkpoint), "--format", "torchscript"])
    with pytest.raises(ConfigError, match=r"unknown option --heigth; did you mean --height"):
        main([str(checkpoint), "--heigth", "64"])
    assert list(tmp_path.iterdir()) == [picture]
