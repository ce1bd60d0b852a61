"""Checkpoints: exact, whole or not at all, and clear about what is wrong with one."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pmm_fast
from pmm_fast import convert
from pmm_fast.config import Config
from pmm_fast.engine import checkpoint
from pmm_fast.engine.checkpoint import CheckpointError
from pmm_fast.models import Segmentor, build_model
from tests.street_folders import same


def make_model(seed: int = 0, **options: Any) -> Segmentor:
    torch.manual_seed(seed)
    model = build_model("deeplabv3plus_mobilenet_v2", 7, channels=8, **options)
    if model.memory is not None:
        model.memory.slots.copy_(torch.nn.functional.normalize(torch.randn(7, 8), dim=1))
    model.label_space = "idd_lite7"
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    pmm_fast.save(make_model(), path)
    return path


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A disk that is full after ``size`` bytes: the kernel refuses to let a file grow beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(path: Path, **options: Any) -> str:
    """The message with which a checkpoint is refused; one line that starts with the file."""
    with pytest.raises(CheckpointError) as caught:
        pmm_fast.load(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("memory", [True, False])
def test_round_trip_is_exact(tmp_path: Path, memory: bool) -> None:
    model = make_model(memory=memory, output_stride=8, aux_dropout=0.3)
    pmm_fast.save(model, tmp_path / "model.pt")
    loaded = pmm_fast.load(tmp_path / "model.pt", label_space="idd_lite7")
    assert loaded.settings == model.settings and loaded.label_space == "idd_lite7"
    assert not any(module.training for module in loaded.modules())
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    images = torch.randn(1, 3, 48, 64)
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_the_configuration_is_kept(tmp_path: Path) -> None:
    config = Config(seed=7)
    config.optim.lr = 0.125
    pmm_fast.save(make_model(), tmp_path / "model.pt", config)
    assert checkpoint.read_config(tmp_path / "model.pt") == config


def test_no_configuration_no_training_state(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no configuration"):
        checkpoint.read_config(saved)
    assert "training" not in checkpoint.read(saved)


def test_a_run_folder_stands_for_its_checkpoint(tmp_path: Path) -> None:
    pmm_fast.save(make_model(), tmp_path / checkpoint.FILE_NAME)
    assert pmm_fast.load(tmp_path).num_classes == 7


def test_the_file_is_as_readable_as_any_other(saved: Path) -> None:
    other = saved.with_name("other")
    other.touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_disk_full(saved: Path) -> None:
    before = saved.read_bytes()
    with file_size_limit(len(before) // 2), pytest.raises(CheckpointError) as caught:
        pmm_fast.save(make_model(seed=1), saved)
    message = str(caught.value)
    reason = os.strerror(errno.EFBIG)
    assert message.startswith(f"{saved}: could not write the checkpoint (") and reason in message
    assert message.endswith("; the previous checkpoint is untouched")
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
    assert same(dict(pmm_fast.load(saved).state_dict()), dict(make_model().state_dict()))


def test_disk_full_the_first_time(tmp_path: Path) -> None:
    with file_size_limit(1000), pytest.raises(CheckpointError) as caught:
        pmm_fast.save(make_model(), tmp_path / "model.pt")
    assert "previous" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/file/model.pt: could not write the checkpoint"):
        pmm_fast.save(make_model(), tmp_path / "file" / "model.pt")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(saved: Path) -> None:
    saved.parent.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied.*the previous checkpoint is untouched"):
            pmm_fast.save(make_model(seed=1), saved)
    finally:
        saved.parent.chmod(0o755)
    assert os.listdir(saved.parent) == [saved.name]


def test_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "model.pt").endswith("no such checkpoint")
    with pytest.raises(CheckpointError, match=f"^{tmp_path / checkpoint.FILE_NAME}: no such checkpoint"):
        pmm_fast.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_cut_off_file(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    assert "damaged or cut off" in refused(saved)


@pytest.mark.parametrize("content", [b"just some text\n", b"\x89PNG\r\n\x1a\n", bytes(range(256))])
def test_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert refused(path).startswith(f"{path}: no checkpoint, or damaged or cut off")


def test_a_file_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save({"format": checkpoint.FORMAT, "model": Trap()}, tmp_path / "model.pt")
    assert "no checkpoint, or damaged" in refused(tmp_path / "model.pt")
    assert os.listdir(tmp_path) == ["model.pt"]


def test_released_checkpoint(tmp_path: Path) -> None:
    state, memory = convert.to_released(build_model("deeplabv3plus_resnet18", 19, channels=8), module_prefix=True)
    path = tmp_path / "last.pth"
    torch.save({"state_dict": state, "memory": memory, "epoch": 40, "mean_iu": np.float64(0.4)}, path)
    assert "pmm_fast.convert.from_released" in refused(path)
    torch.save({"state_dict": state, "memory": memory, "epoch": 40}, path)
    assert refused(path).endswith(
        "expected a checkpoint of format pmm_fast/1, got None (a released .pth is read by "
        "pmm_fast.convert.from_released)"
    )


def test_checkpoint_of_another_format(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"format": "pmm_fast/99"}, path)
    assert refused(path).endswith("expected a checkpoint of format pmm_fast/1, got pmm_fast/99")
    torch.save([1, 2, 3], path)
    assert "expected a checkpoint of format pmm_fast/1, got None" in refused(path)


def test_another_label_space(saved: Path) -> None:
    assert refused(saved, label_space="cityscapes19").endswith(
        "trained for the label space idd_lite7 (7 classes), expected cityscapes19"
    )


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_their_settings(saved: Path, change: str) -> None:
    content = checkpoint.read(saved)
    state = content["model"]["state"]
    name = "memory.classifier.bias"
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state[name := "surplus"] = torch.zeros(1)
    else:
        state[name] = torch.zeros(8)
    checkpoint.write(saved, content)
    message = refused(saved)
    assert "the weights do not fit the model" in message and name in message


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, pmm_fast; heavy = {'torch', 'numpy', 'PIL', 'yaml', 'tqdm'} & set(sys.modules); "
        "assert not heavy, heavy; pmm_fast.config.load_preset('demo'); heavy = {'torch', 'PIL'} & set(sys.modules); "
        "assert not heavy, heavy; assert 'load' in dir(pmm_fast) and callable(pmm_fast.load) and 'torch' in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="module 'pmm_fast' has no attribute 'lode'"):
        _ = pmm_fast.lode
