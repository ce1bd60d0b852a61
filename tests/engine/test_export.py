"""Exported files: they compute what the network does, need no pmm_fast, and a file that is wrong is never left."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pmm_fast import ops
from pmm_fast.data.transforms import MEAN, STD
from pmm_fast.engine import export
from pmm_fast.engine.export import METADATA, ExportError, export_model
from pmm_fast.models import Segmentor, SemanticMemory
from pmm_fast.models.blocks import AuxHead, Stages, conv_bn_relu
from pmm_fast.models.conv import Conv2d
from pmm_fast.models.deeplabv3plus import DeepLabV3PlusDecoder, DeepLabV3PlusEncoder
from tests import repository
from tests.tiny_network import fill_memory

CLASSES, CHANNELS, STRIDE = 7, 8, 16


class SmallBackbone(nn.Module):
    """Three maps from three layers."""

    low_level_channels, aux_channels, channels = 4, 6, 8

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv2d(3, 4, 3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.middle = Conv2d(4, 6, 3, 4, 1)
        self.last = conv_bn_relu(6, 8, 3, dilation=2)

    def forward(self, images: Tensor) -> Stages:
        low_level = self.stem(images)
        aux = self.middle(low_level)
        return Stages(low_level, aux, self.last(aux))


def small_network(memory: bool = True) -> Segmentor:
    """A DeepLabV3+ of few layers, its batch norms and memory as after some training."""
    torch.manual_seed(0)
    backbone = SmallBackbone()
    settings = {"architecture": "deeplabv3plus_small", "num_classes": CLASSES, "output_stride": STRIDE}
    model = Segmentor(
        DeepLabV3PlusEncoder(backbone, CHANNELS, STRIDE),  # type: ignore[arg-type]
        DeepLabV3PlusDecoder(4, CHANNELS, CLASSES),
        AuxHead(6, CHANNELS, CLASSES, 0.1),
        SemanticMemory(CLASSES, CHANNELS, temperature=0.1) if memory else None,
        settings,
    )
    model.label_space = "idd_lite7"
    if model.memory is not None:
        model.memory.slots.copy_(ops.normalize(torch.rand(CLASSES, CHANNELS), 1))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Segmentor:
    return small_network()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the exported files of this module lie, beside a picture."""
    path = tmp_path_factory.mktemp("exported")
    pixels = np.random.default_rng(0).integers(0, 256, (41, 83, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "street.png")
    return path


@pytest.fixture(scope="module")
def pt2(model: Segmentor, folder: Path) -> export.ExportReport:
    return export_model(model, folder / "street.pt2", "pt2", size=(64, 96))


@pytest.fixture(scope="module")
def onnx(model: Segmentor, folder: Path) -> export.ExportReport:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    return export_model(model, folder / "street.onnx", "onnx", size=(64, 96))


def expected_classes(model: Segmentor, folder: Path) -> np.ndarray:
    levels = np.asarray(Image.open(folder / "street.png"), np.float32) / 255
    images = (levels - np.float32(MEAN)) / np.float32(STD)
    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(2, 0, 1)[None])).logits[0].argmax(0).numpy()


def run_documented(block: int, folder: Path) -> tuple[np.ndarray, dict]:
    """A Python block of docs/export.md in a process that cannot import pmm_fast: its classes, what the file says."""
    text = (repository.ROOT / "docs/export.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[block]
    blocked = "import sys\nsys.modules['pmm_fast'] = None\n"
    stored = "\nnp.save('classes.npy', np.asarray(classes))\nopen('about.json', 'w').write(json.dumps(about))\n"
    subprocess.run([sys.executable, "-c", blocked + code + stored], cwd=folder, check=True)
    return np.load(folder / "classes.npy"), json.loads((folder / "about.json").read_text())


@pytest.mark.parametrize("file_format", ["pt2", "onnx"])
def test_runs_without_the_package(
    model: Segmentor, folder: Path, file_format: str, request: pytest.FixtureRequest
) -> None:
    report = request.getfixturevalue(file_format)
    assert report.path == folder / f"street.{file_format}" and report.size == report.path.stat().st_size
    assert report.model_seconds > 0 and report.exported_seconds > 0
    shapes = [check.shape for check in report.checks]
    assert shapes[0] == (1, 3, 64, 96) and len({shape[0] for shape in shapes}) == len(set(shapes)) == 3
    assert all(check.agreement > 0.999 and check.deviation < export.TOLERANCE for check in report.checks)
    classes, about = run_documented(["onnx", "pt2"].index(file_format), folder)
    expected = expected_classes(model, folder)
    assert len(np.unique(expected)) > 2 and (classes == expected).mean() > 0.999
    assert about["label_space"] == "idd_lite7" and len(about["classes"]) == len(about["colours"]) == CLASSES
    assert about["memory"] == [CLASSES, CHANNELS] and about["output"] == "logits"
    assert about["input"]["smallest"] == [17, 17] and about["input"]["mean"] == list(MEAN)


def test_nothing_of_this_machine_and_no_training_parts_are_stored(pt2: export.ExportReport, model: Segmentor) -> None:
    stored = pt2.path.read_bytes()
    assert str(repository.ROOT).encode() not in stored and str(pt2.path.parent).encode() not in stored
    program = torch.export.load(pt2.path)
    assert not [name for name in program.state_dict if "aux_head" in name or "writer" in name or "classifier" in name]
    targets = {str(n.target) for m in program.graph_module.modules() for n in m.graph.nodes if n.op == "call_function"}
    assert not [name for name in targets if "pmm_fast" in name or "assert_tensor_metadata" in name]
    assert any("conv2d" in name for name in targets)
    # the network that was exported is as it was
    assert model.aux_head is not None and isinstance(model.encoder.backbone.stem[0], Conv2d)
    assert "forward" not in vars(model.encoder.backbone.stem[0])


def test_names_of_the_onnx_graph(onnx: export.ExportReport) -> None:
    import onnx as onnx_package

    graph = onnx_package.load(onnx.path).graph
    described = [
        (value.name, [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim])
        for value in (*graph.input, *graph.output)
    ]
    assert described == [("images", ["N", 3, "H", "W"]), ("logits", ["N", CLASSES, "H", "W"])]


def test_classes_of_one_size_without_a_memory(tmp_path: Path) -> None:
    model = small_network(memory=False)
    report = export_model(model, tmp_path / "a.pt2", size=(40, 56), static=True, output="classes")
    (check,) = report.checks
    assert check.shape == (1, 3, 40, 56) and check.deviation is None and check.agreement > 0.999
    extra = {METADATA: ""}
    network = torch.export.load(report.path, extra_files=extra).module()
    about = json.loads(extra[METADATA])
    assert about["input"]["shape"] == [1, 3, 40, 56] and about["memory"] is None and about["output"] == "classes"
    images = torch.randn(1, 3, 40, 56)
    found = network(images)
    assert found.dtype == torch.uint8 and torch.equal(found, model(images).logits.argmax(1).to(torch.uint8))
    with pytest.raises(Exception, match="40"):
        network(torch.randn(1, 3, 48, 56))


def raising(logits: Tensor) -> Tensor:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits + 1e-3 * logits.abs().max(), "differs from the network on images .* in the logits"),
        (lambda logits: logits * torch.nan, "differs from the network"),
        (lambda logits: logits.argmin(1).to(torch.uint8), "differs from the network"),
        (raising, r"does not run on images \[1, 3, 40, 56\]: no such kernel"),
    ],
)
def test_a_file_that_differs_is_not_left(
    model: Segmentor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], message: str
) -> None:
    monkeypatch.setattr(export, "_trace", lambda *_: None)
    monkeypatch.setattr(export, "_write", lambda program, path, *_: path.write_text("wrong"))
    monkeypatch.setattr(export, "_open", lambda *_: lambda images: change(model(images).logits))
    older = tmp_path / "a.pt2"
    older.write_text("right")
    with pytest.raises(ExportError, match=message):
        export_model(model, older, size=(40, 56), force=True)
    assert list(tmp_path.iterdir()) == [older] and older.read_text() == "right"
    # with the same stand-ins, what agrees is kept
    change = torch.clone
    export_model(model, older, size=(40, 56), force=True)
    assert older.read_text() == "wrong"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 704\nat 5")])
def test_a_file_that_cannot_be_written_is_not_left(
    model: Segmentor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(program: object, path: Path, *_: object) -> None:
        path.write_text("half")
        raise error

    monkeypatch.setattr(export, "_trace", lambda *_: None)
    monkeypatch.setattr(export, "_write", fail)
    with pytest.raises(ExportError, match=r"a.pt2: could not be written \((.*No space left.*|unexpected pos 704)\)$"):
        export_model(model, tmp_path / "a.pt2", size=(40, 56))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    code = (
        "import sys, resource, signal, torch; from pathlib import Path; from pmm_fast.engine import export; "
        "program = torch.export.export(torch.nn.Linear(100, 100), (torch.zeros(1, 100),)); "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: export._write(program, Path(sys.argv[1]), 'pt2', {})\n"
        "except OSError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.pt2")]
    found = subprocess.run(command, cwd=repository.ROOT, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout) == (0, "[Errno 27] File too large\n"), found.stderr


@pytest.mark.parametrize("place", [(export.tempfile, "TemporaryDirectory"), (export.os, "replace")])
def test_a_folder_that_cannot_be_written_to(
    model: Segmentor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[object, str]
) -> None:
    def fail(*_: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(export, "_trace", lambda *_: None)
    monkeypatch.setattr(export, "_write", lambda program, path, *_: path.write_text("right"))
    monkeypatch.setattr(export, "_open", lambda *_: lambda images: model(images).logits)
    monkeypatch.setattr(*place, fail)
    with pytest.raises(ExportError, match=r"a.pt2: could not be written \(.*Permission denied\)$"):
        export_model(model, tmp_path / "a.pt2", size=(40, 56))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_no_fault_of_the_file(
    model: Segmentor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_trace", lambda *_: None)
    monkeypatch.setattr(export, "_write", lambda program, path, *_: path.write_text("right"))
    monkeypatch.setattr(export, "_open", lambda *_: None)
    # while it is written, in the file, in the network
    for place, full in (("_write", fill_memory), ("_open", lambda *_: fill_memory), ("_check", fill_memory)):
        with monkeypatch.context() as patch:
            patch.setattr(export, place, full)
            with pytest.raises(ExportError, match="export: too little memory for images of 40 x 56; a smaller"):
                export_model(model, tmp_path / "a.pt2", size=(40, 56))
    # what is no want of memory is a bug
    monkeypatch.setattr(export, "_check", lambda *_: raising(torch.empty(0)))
    with pytest.raises(RuntimeError, match="no such kernel"):
        export_model(model, tmp_path / "a.pt2", size=(40, 56))
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_all_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_network()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    monkeypatch.setattr(export, "_trace", lambda *_: None)
    monkeypatch.setattr(export, "_write", lambda program, path, *_: path.write_text("right"))
    monkeypatch.setattr(export, "_open", lambda *_: lambda images: model(images).logits)
    report = export_model(model, tmp_path / "a.pt2", size=(40, 56), static=True)
    assert report.checks == (export.Check((1, 3, 40, 56), 0.0, 1.0),)


class FixedDecoder(nn.Module):
    """Does something else with high maps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, feature: Tensor, low_level: Tensor) -> Tensor:
        return self.inner(feature * 2 if low_level.shape[2] > 30 else feature, low_level)


def test_sizes_that_cannot_be_free_are_said(tmp_path: Path) -> None:
    model = copy.deepcopy(small_network())
    model.decoder = FixedDecoder(model.decoder)
    with pytest.raises(ExportError, match=r"cannot be traced: .*height.*; --static exports it for one size"):
        export_model(model, tmp_path / "a.pt2", size=(40, 56))
    assert list(tmp_path.iterdir()) == []


def test_refusals(model: Segmentor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken.pt2"
    taken.write_text("mine")
    with pytest.raises(ExportError, match=r"taken.pt2 exists; --force replaces it"):
        export_model(model, taken)
    assert taken.read_text() == "mine"
    with pytest.raises(ExportError, match=r"a file of format onnx must be called \*.onnx"):
        export_model(model, taken, "onnx", force=True)
    with pytest.raises(ExportError, match="above the output stride 16, got 16 40"):
        export_model(model, tmp_path / "a.pt2", size=(16, 40))
    with pytest.raises(
        ExportError, match="expected a format of pt2, onnx and an output of logits, classes, got pt2 and"
    ):
        export_model(model, tmp_path / "a.pt2", output="colours")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="no folder"):
        export_model(model, tmp_path / "none/a.pt2")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs the extra onnx: pip install 'pmm_fast\[onnx\]'"):
        export_model(model, tmp_path / "a.onnx", "onnx")
