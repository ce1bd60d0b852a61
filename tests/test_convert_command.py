"""``python -m pmm_fast.convert`` as its users meet it: files there and back, what it prints, what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pmm_fast
from pmm_fast import convert
from pmm_fast.config import CHECKPOINT_FILE, Config, run_main
from pmm_fast.engine import checkpoint
from pmm_fast.models import Segmentor, build_model
from tests.released import released_keys, released_slots, released_weights
from tests.released_networks import network_keys
from tests.street_folders import same

Content = dict[str, Any]


def released_file(path: Path, keys: dict[str, list[int]], **more: object) -> Content:
    """A checkpoint as the released code writes it."""
    state_dict = {f"module.{name}": tensor for name, tensor in released_weights(keys).items()}
    content = {"state_dict": state_dict, "memory": released_slots(), "epoch": 40, "mean_iu": 0, **more}
    torch.save(content, path)
    return content


@pytest.fixture(scope="module")
def shuffle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    """A released checkpoint of the smallest trunk, with all that a training leaves in it."""
    path = tmp_path_factory.mktemp("released") / "last_None_epoch_40_mean-iu_0.00000.pth"
    optimizer = {"state": {}, "param_groups": [{"lr": 0.01, "params": [0, 1]}]}
    return path, released_file(path, network_keys("shufflenet_v2"), optimizer=optimizer, scheduler={"last_epoch": 5})


@pytest.fixture(scope="module")
def small() -> Segmentor:
    """A network of ours that the released code has too, of other sizes and classes."""
    torch.manual_seed(0)
    model = build_model("deeplabv3plus_mobilenet_v2_released", 7, channels=8)
    assert model.memory is not None
    model.memory.slots.normal_()
    model.label_space = "idd_lite7"
    return model.eval()


def run(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The command's lines."""
    convert.main([str(word) for word in words])
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *words: object, lines: int = 1) -> str:
    """The error with which the command ends; nothing is printed before it."""
    with pytest.raises(SystemExit) as caught:
        run_main(convert.main, [str(word) for word in words])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and err.startswith("error: ") and "Traceback" not in err
    assert len(err.splitlines()) == lines
    return err.removeprefix("error: ").rstrip("\n")


def test_the_papers_network(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    released_file(tmp_path / "r50.pth", released_keys("deeplabv3plus_resnet50"))
    out = tmp_path / "r50.safetensors"
    assert run(capsys, tmp_path / "r50.pth", out) == [
        f"{tmp_path}/r50.pth: a checkpoint of the released code",
        "architecture: deeplabv3plus_resnet50, output stride 16",
        "classes: 19 (cityscapes19)",
        "parameters: 45,284,057",
        "memory: 19 x 256",
        "left out: epoch (40), mean_iu (0)",
        f"written to {out} (181.4 MB)",
    ]
    model = pmm_fast.load(out, label_space="cityscapes19")
    assert model.memory is not None and torch.equal(model.memory.slots, released_slots())


def test_there_and_back_is_bit_exact(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shuffle: tuple[Path, Content]
) -> None:
    source, content = shuffle
    for name in ("model.safetensors", "model.pt"):
        lines = run(capsys, source, tmp_path / name)
        assert lines[1:6] == [
            "architecture: deeplabv3plus_shufflenet_v2, output stride 16",
            "classes: 19 (cityscapes19)",
            lines[3],
            "memory: 19 x 256",
            "left out: epoch (40), mean_iu (0), optimizer, scheduler",
        ]
    assert same(checkpoint.read(tmp_path / "model.pt"), checkpoint.read(tmp_path / "model.safetensors"))
    lines = run(capsys, tmp_path / "model.safetensors", tmp_path / "back.pth")
    assert lines[0] == f"{tmp_path}/model.safetensors: a checkpoint of pmm_fast" and "left out" not in " ".join(lines)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == ["state_dict", "memory", "epoch", "mean_iu"] and back["epoch"] == back["mean_iu"] == 0
    assert list(back["state_dict"]) == list(content["state_dict"])
    assert same(back["state_dict"], content["state_dict"]) and torch.equal(back["memory"], content["memory"])


def test_the_output_stride_can_be_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shuffle: tuple[Path, Content]
) -> None:
    out = tmp_path / "model.safetensors"
    assert run(capsys, shuffle[0], out, "--output-stride", 32)[1].endswith("output stride 32")
    assert pmm_fast.load(out).settings["output_stride"] == 32
    words = ("--architecture", "deeplabv3plus_shufflenet_v2", "--instance-norm", "none", "--force")
    assert run(capsys, shuffle[0], out, *words)[1].endswith("output stride 16")


def test_a_baseline_without_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys = {name: shape for name, shape in network_keys("shufflenet_v2").items() if not name.startswith("memory.")}
    content = released_file(tmp_path / "agg.pth", keys)
    del content["memory"]
    torch.save(content, tmp_path / "agg.pth")
    assert "memory: none" in run(capsys, tmp_path / "agg.pth", tmp_path / "agg.pt")
    run(capsys, tmp_path / "agg.pt", tmp_path / "back.pth")
    assert list(torch.load(tmp_path / "back.pth", weights_only=True)) == ["state_dict", "epoch", "mean_iu"]


def test_a_run_into_either_format(capsys: pytest.CaptureFixture[str], tmp_path: Path, small: Segmentor) -> None:
    config = Config(seed=7)
    content = {**checkpoint.content_of(small, config), "training": {"iteration": 3}}
    checkpoint.write(tmp_path / "run" / CHECKPOINT_FILE, content)
    for name in ("model.safetensors", "model.pt"):
        lines = run(capsys, tmp_path / "run", tmp_path / name)
        assert lines[0] == f"{tmp_path}/run: a checkpoint of pmm_fast"
        assert lines[2] == "classes: 7 (idd_lite7)" and lines[5] == "left out: the state of the training"
        assert checkpoint.read_config(tmp_path / name) == config
        assert same(dict(pmm_fast.load(tmp_path / name).state_dict()), dict(small.state_dict()))
        assert "training" not in checkpoint.read(tmp_path / name)
    lines = run(capsys, tmp_path / "run", tmp_path / "released.pth")
    assert lines[5] == "left out: the state of the training, the configuration, label space idd_lite7"


def image(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))


def classifier(path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(2, 3, 7, 7), "fc.weight": torch.zeros(1000, 8)}, path)


def other_network(path: Path) -> None:
    torch.save({"state_dict": {"model.up.weight": torch.zeros(1), "model.down.weight": torch.zeros(1)}}, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (image, "no checkpoint, or damaged or cut off (it looks like a PNG image)"),
        (Path.touch, "no checkpoint, or damaged or cut off (the file is empty)"),
        (
            classifier,
            "a checkpoint neither of pmm_fast nor of the released code: weights of an image classifier (fc.weight "
            "[1000, 8]): a backbone, for --model.weights of a training",
        ),
        (
            other_network,
            "a checkpoint neither of pmm_fast nor of the released code: a checkpoint of another network, whose "
            "state_dict is weights of another network (model.up.weight, model.down.weight)",
        ),
        (lambda path: None, "no such checkpoint"),
    ],
)
def test_files_of_another_kind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    source = tmp_path / "in.pth"
    make(source)
    assert refused(capsys, source, tmp_path / "out.safetensors") == f"{source}: {message}"
    assert not (tmp_path / "out.safetensors").exists()


def change(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    changed = dict(state_dict)
    del changed["module.layer1.0.branch1.0.weight"]
    return {**changed, "module.surplus": torch.zeros(1), "module.dsn.4.bias": torch.zeros(7)}


def test_what_does_not_fit_is_listed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shuffle: tuple[Path, Content]
) -> None:
    content = shuffle[1]
    torch.save({**content, "state_dict": change(content["state_dict"])}, tmp_path / "in.pth")
    message = refused(capsys, tmp_path / "in.pth", tmp_path / "out.pt", lines=4)
    assert message.splitlines() == [
        f"{tmp_path}/in.pth: the checkpoint is no deeplabv3plus_shufflenet_v2:",
        "  missing: layer1.0.branch1.0.weight",
        "  unexpected: surplus",
        "  of another shape: dsn.4.bias (7,), expected (19,)",
    ]
    torch.save({key: value for key, value in content.items() if key != "memory"}, tmp_path / "in.pth")
    assert refused(capsys, tmp_path / "in.pth", tmp_path / "out.pt").endswith("but the checkpoint has no key memory")
    assert os.listdir(tmp_path) == ["in.pth"]


def test_misuse_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shuffle: tuple[Path, Content], small: Segmentor
) -> None:
    source, ours = shuffle[0], tmp_path / "ours.pt"
    pmm_fast.save(small, ours)
    other = build_model("deeplabv3plus_mobilenet_v2", 3, channels=8)
    pmm_fast.save(other, tmp_path / "other.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINT_FILE).symlink_to(ours)
    before = ours.read_bytes()
    for words, message in [
        ((source, ours), f"{ours}: exists already; --force overwrites it"),
        ((ours, ours, "--force"), f"{ours}: is what is to be converted; give the result another name"),
        ((tmp_path / "run", ours, "--force"), f"{ours}: is what is to be converted; give the result another name"),
        ((source, tmp_path / "x.onnx"), "expected a name that ends in .safetensors, .pt or .pth"),
        ((source, tmp_path / "x.pth"), "is of the released code already; name OUT .safetensors or .pt"),
        ((ours, tmp_path / "x.pth", "--output-stride", 8), f"are for released checkpoints; {ours} says its own"),
        ((source, tmp_path / "x.pt", "--output-stride", 4), "argument --output-stride"),
        ((source, tmp_path / "x.pt", "--architecture", "deeplabv2_shufflenet"), "Did you mean deeplabv2_shufflenet_v2"),
        (
            (tmp_path / "other.pt", tmp_path / "x.pth"),
            f"{tmp_path}/other.pt: deeplabv3plus_mobilenet_v2 has no counter",
        ),
        ((source,), "the following arguments are required: OUT"),
    ]:
        assert message in refused(capsys, *words), words
    assert ours.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["other.pt", "ours.pt", "run"]


def test_an_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path, small: Segmentor) -> None:
    pmm_fast.save(small, tmp_path / "in.pt")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit) as caught:
        run_main(convert.main, [str(tmp_path / "in.pt"), str(tmp_path / "file" / "out.safetensors")])
    assert caught.value.code == 2
    assert "could not write the checkpoint" in capsys.readouterr().err


def test_other_names_of_the_module_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'from_relased'"):
        _ = convert.from_relased


def altered(content: Content, **entries: object) -> Content:
    """The checkpoint with other entries in its ``state_dict``; None takes one away."""
    changed = content["state_dict"] | {f"module.{name.replace('__', '.')}": value for name, value in entries.items()}
    return content | {"state_dict": {name: value for name, value in changed.items() if value is not None}}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        # the odd one out is named, not all the others
        ({"final2__0__weight": torch.zeros(19, 100, 1, 1)}, "of another shape: final2.0.weight (19, 100, 1, 1), exp"),
        ({"final2__0__weight": torch.zeros(18, 256, 1, 1)}, "of another shape: final2.0.weight (18, 256, 1, 1), exp"),
        ({"final2__0__weight": None}, "missing: final2.0.weight"),
        (
            {"final2__0__weight": None, "final3__0__weight": torch.zeros(1)},
            "missing: final2.0.weight\n  unexpected: fin",
        ),
        ({"final2__0__weight": "text"}, "expected tensors, got module.final2.0.weight (a str)"),
        ({"final2__0__weight": torch.full((19, 256, 1, 1), torch.nan)}, "not finite in final2.0.weight"),
    ],
)
def test_a_wrong_parameter_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shuffle: Any, entries: dict[str, Any], expected: str
) -> None:
    torch.save(altered(shuffle[1], **entries), tmp_path / "wrong.pth")
    with pytest.raises(SystemExit):
        run_main(convert.main, [str(tmp_path / "wrong.pth"), str(tmp_path / "out.safetensors")])
    told = capsys.readouterr().err
    assert expected in told and told.count("final1") == 0
    assert not (tmp_path / "out.safetensors").exists()


def test_classes_get_their_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = build_model("deeplabv3plus_mobilenet_v2", 16, channels=8)
    pmm_fast.save(model, tmp_path / "unnamed.pt")
    out = tmp_path / "named.safetensors"
    assert "classes: 16 (synthia16)" in run(capsys, tmp_path / "unnamed.pt", out, "--label-space", "synthia16")
    assert pmm_fast.load(out).label_space == "synthia16"
    assert "cityscapes19 has 19 classes, the network 16" in refused(
        capsys, tmp_path / "unnamed.pt", tmp_path / "b.pt", "--label-space", "cityscapes19"
    )
    assert "but the network was trained for synthia16" in refused(
        capsys, out, tmp_path / "b.pt", "--label-space", "camvid11"
    )
