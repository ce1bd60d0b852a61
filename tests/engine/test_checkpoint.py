"""Checkpoints: exact, whole or not at all, and clear about what is wrong with one."""

from __future__ import annotations

import argparse
import errno
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file as save_safetensors

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


@pytest.fixture(params=["pt", "safetensors"])
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model in a file of either format."""
    path = tmp_path / f"model.{request.param}"
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


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("memory", [True, False])
def test_round_trip_is_exact(tmp_path: Path, memory: bool, suffix: str) -> None:
    model = make_model(memory=memory, output_stride=8, aux_dropout=0.3)
    pmm_fast.save(model, tmp_path / f"model.{suffix}")
    loaded = pmm_fast.load(tmp_path / f"model.{suffix}", label_space="idd_lite7")
    assert loaded.settings == model.settings and loaded.label_space == "idd_lite7"
    assert not any(module.training for module in loaded.modules())
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    images = torch.randn(1, 3, 48, 64)
    assert torch.equal(loaded(images).logits, model(images).logits)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_the_configuration_is_kept(tmp_path: Path, suffix: str) -> None:
    config = Config(seed=7)
    config.optim.lr = 0.1
    pmm_fast.save(make_model(), tmp_path / f"model.{suffix}", config)
    assert checkpoint.read_config(tmp_path / f"model.{suffix}") == config


def test_both_formats_hold_the_same(tmp_path: Path) -> None:
    model, config = make_model(), Config(seed=7)
    for name in ("model.pt", "model.safetensors"):
        pmm_fast.save(model, tmp_path / name, config)
    assert same(checkpoint.read(tmp_path / "model.pt"), checkpoint.read(tmp_path / "model.safetensors"))
    # what a file is, its content says
    (tmp_path / "model.pt").rename(tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "other.pt")
    assert same(checkpoint.read(tmp_path / "other.pt"), checkpoint.read(tmp_path / "other.safetensors"))


def test_a_safetensors_file_is_what_others_read(tmp_path: Path) -> None:
    model = make_model()
    path = tmp_path / "model.safetensors"
    pmm_fast.save(model, path)
    assert same(load_safetensors(path), dict(sorted(model.state_dict().items())))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == checkpoint.FORMAT and json.loads(metadata["settings"]) == model.settings
    assert json.loads(metadata["label_space"]) == "idd_lite7" and json.loads(metadata["config"]) is None


def test_a_training_does_not_go_into_safetensors(tmp_path: Path) -> None:
    content = {**checkpoint.content_of(make_model()), "training": {"iteration": 1}}
    with pytest.raises(CheckpointError, match=r"a model alone; the state of a training goes into a \.pt"):
        checkpoint.write(tmp_path / "model.safetensors", content)
    assert os.listdir(tmp_path) == []


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


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"just some text\n", ""),
        (bytes(range(256)), ""),
        (b'01234567{"json": 1}', ""),
        (b"", " (the file is empty)"),
        (b"\x89PNG\r\n\x1a\n", " (it looks like a PNG image)"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", " (it looks like a JPEG image)"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_file_of_another_kind(tmp_path: Path, content: bytes, kind: str, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    assert refused(path) == f"{path}: no checkpoint, or damaged or cut off{kind}"


def test_tensors_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_safetensors({"fc.weight": torch.zeros(10, 8), "conv1.weight": torch.zeros(8, 3, 1, 1)}, path, {"format": "pt"})
    assert refused(path).endswith(
        "a checkpoint neither of pmm_fast nor of the released code: weights of an image classifier (fc.weight [10, "
        "8]): a backbone, for --model.weights of a training"
    )
    save_safetensors({"a": torch.zeros(1)}, path)
    assert refused(path).endswith("code: weights of another network (a)")


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
    assert refused(path).endswith(
        "a checkpoint of the released code; convert it: python -m pmm_fast.convert "
        f"{path} {tmp_path / 'last.safetensors'}"
    )
    assert checkpoint.unpack(path)["mean_iu"] == 0.4
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}}, path)
    assert refused(path).endswith(
        "code: a checkpoint of another network, whose state_dict is weights of another network (conv.weight)"
    )
    torch.save(state, path)
    assert "code: the bare state_dict of a released checkpoint" in refused(path)


def test_checkpoint_of_another_format(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"format": "pmm_fast/99"}, path)
    assert refused(path).endswith("expected a checkpoint of format pmm_fast/1, got pmm_fast/99")
    torch.save([1, 2, 3], path)
    assert refused(path).endswith("a checkpoint neither of pmm_fast nor of the released code: a list")
    torch.save({"a": 1, "b": 2}, path)
    assert refused(path).endswith("code: a dictionary with the keys a, b")
    torch.save({}, path)
    assert refused(path).endswith("code: an empty dictionary")


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


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda content: content.pop("model"), "damaged: expected the entries model (settings, label_space, state)"),
        (lambda content: content.pop("config"), "damaged: expected the entries model"),
        (lambda content: content["model"].pop("state"), "damaged: expected the entries model"),
        (
            lambda content: content["model"]["settings"].update(wings=2),
            "another version of pmm_fast: build_model() got",
        ),
        (lambda content: content["model"]["settings"].update(architecture="deeplabv9"), "unknown architecture"),
        (lambda content: content["model"].update(label_space="cityscapes20"), "label space 'cityscapes20'"),
        (lambda content: content["model"].update(label_space="camvid11"), "7 classes, but camvid11 has 11"),
        (lambda content: content["model"]["state"]["memory.slots"].fill_(torch.inf), "not finite in memory.slots"),
    ],
)
def test_what_another_version_wrote_is_refused(tmp_path: Path, change: Callable[[dict], object], expected: str) -> None:
    content = checkpoint.content_of(make_model())
    change(content)
    torch.save(content, tmp_path / "model.pt")
    assert expected in refused(tmp_path / "model.pt")


def test_a_python_object_is_told_from_damage(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "model.pth")
    assert "holds a Python object, argparse.Namespace, and is not read" in refused(tmp_path / "model.pth")


def test_the_folder_of_runs_names_them(tmp_path: Path) -> None:
    pmm_fast.save(make_model(), tmp_path / "agg" / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"no such checkpoint; there are in its folders agg$"):
        pmm_fast.load(tmp_path)
