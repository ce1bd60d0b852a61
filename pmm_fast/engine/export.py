"""A trained network as one file that runs where pmm_fast is not installed: ``.pt2`` (torch.export) or ONNX.

The file takes normalised images and holds the memory frozen among its weights.  In it the operators are plain PyTorch
and the layers PyTorch's own, so nothing of pmm_fast is called by it.  Before it gets its name it is opened again and
compared with the network on random images.

Shapes: N images of H x W pixels, K classes, C channels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pmm_fast import __version__, ops
from pmm_fast.data.labels import get_space
from pmm_fast.data.transforms import MEAN, STD
from pmm_fast.engine.inference import is_out_of_memory
from pmm_fast.models import Segmentor
from pmm_fast.models.conv import Conv2d
from pmm_fast.ops.merge_tiles import MOST_CLASSES

Format = Literal["pt2", "onnx"]
OutputKind = Literal["logits", "classes"]
FORMATS: tuple[Format, ...] = ("pt2", "onnx")
OUTPUTS: tuple[OutputKind, ...] = ("logits", "classes")

METADATA = "pmm_fast.json"
"""Under which name a file holds :func:`describe`: an extra file of a ``.pt2``, an entry of ONNX's metadata."""

TOLERANCE = 1e-4
"""Of the largest logit: runtimes add up in another order (measured: 1e-7 in PyTorch, 1e-5 in onnxruntime)."""

_INPUT = "images"
_RUNS = 5

Run = Callable[[Tensor], Tensor]


class ExportError(ValueError):
    """A network that cannot be exported, or an exported file that does not compute what the network does."""


@dataclass(frozen=True)
class Check:
    """An exported file beside its network on random images.

    Attributes:
        shape: of the images, ``(N, 3, H, W)``.
        deviation: largest difference of two logits, of the largest logit; None where the file returns classes.
        agreement: share of the pixels that get the same class.
    """

    shape: tuple[int, ...]
    deviation: float | None
    agreement: float


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_model` wrote.

    Attributes:
        path: the file.
        size: of the file, in bytes.
        checks: one for every shape that was tried.
        model_seconds, exported_seconds: median time of the network and of the file, one image of ``shape``.
    """

    path: Path
    size: int
    checks: tuple[Check, ...]
    model_seconds: float
    exported_seconds: float


def export_model(
    model: Segmentor,
    path: str | Path,
    file_format: Format = "pt2",
    *,
    size: tuple[int, int] = (512, 1024),
    static: bool = False,
    output: OutputKind = "logits",
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> ExportReport:
    """Write a network as a file that needs no pmm_fast, and check that it computes the same.

    The file maps ``images [N, 3, H, W]`` (float32, normalised by ImageNet's mean and deviation) to ``logits
    [N, K, H, W]`` float32, or to the classes ``[N, H, W]`` uint8 that are the largest there.

    Args:
        model: the network; it is neither changed nor moved.
        path: file to write, atomically; its name ends in ``.pt2`` or ``.onnx``.
        file_format: ``pt2`` or ``onnx``.
        size: H and W that speed is measured at; with ``static`` the only ones that the file takes.
        static: one image of ``size``; else any N, and any H and W above the network's output stride.
        output: ``logits`` or ``classes``.
        force: replace an existing file.
        say: called with a line before each stage.

    Returns:
        :class:`ExportReport`.

    Raises:
        ExportError: an unknown format or output, a name that does not fit, an existing file, a network that cannot be
            traced, too little memory, a file that cannot be written or deviates from the network; nothing is left then.
        ImportError: ONNX without its packages.
    """
    path, stride = Path(path), model.settings["output_stride"]
    _check_request(model, file_format, output, size)
    _check_place(path, file_format, force)
    if file_format == "onnx":
        _require_onnx()
    about = describe(model, output, None if static else stride, size)
    with _enough_memory(size), _part(path) as part, torch.no_grad():
        network = copy.deepcopy(model).cpu().float().eval()
        say("tracing the network")
        program = _trace(_Inference(network, output), size if static else None, stride)
        say(f"writing {path}")
        with _writing(path):
            _write(program, part, file_format, about)
        say("comparing the file with the network")
        checks, seconds = _check(network, _open(part, file_format), _shapes(size, static, stride))
        report = ExportReport(path, part.stat().st_size, checks, *seconds)
        with _writing(path):
            os.replace(part, path)
    return report


@contextlib.contextmanager
def _enough_memory(size: tuple[int, int]) -> Iterator[None]:
    """Says that memory ran out, and what takes less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ExportError(
            f"export: too little memory for images of {size[0]} x {size[1]}; a smaller --height and --width take less"
        ) from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says of which file it is that it cannot be written; torch's writers raise RuntimeError on a full disk."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"{path}: could not be written ({reason})") from error


@contextlib.contextmanager
def _part(path: Path) -> Iterator[Path]:
    """The same name in a folder of its own: torch.export reads no file that is not called ``*.pt2``."""
    with _writing(path):
        folder = tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent)
    with folder:
        yield Path(folder.name) / path.name


def describe(model: Segmentor, output: OutputKind, stride: int | None, size: tuple[int, int]) -> dict[str, Any]:
    """What a file says about itself: plain values, stored as JSON under ``METADATA``.

    Args:
        model: the network.
        output: what the file returns.
        stride: sizes must be above it; None: the file takes one image of ``size`` and no other.
        size: (H, W).
    """
    space = None if model.label_space is None else get_space(model.label_space)
    return {
        "pmm_fast": __version__,
        "architecture": model.architecture,
        "input": {
            "name": _INPUT,
            "shape": [1, 3, *size] if stride is None else ["N", 3, "H", "W"],
            "smallest": None if stride is None else [stride + 1, stride + 1],
            "mean": list(MEAN),
            "std": list(STD),
        },
        "output": output,
        "label_space": model.label_space,
        "num_classes": model.num_classes,
        "classes": None if space is None else list(space.classes),
        "colours": None if space is None else [list(colour) for colour in space.colours],
        "memory": None if model.memory is None else list(model.memory.slots.shape),
    }


class _Inference(nn.Module):
    """The parts of a network that a prediction needs, with PyTorch's own layers."""

    def __init__(self, model: Segmentor, output: OutputKind) -> None:
        super().__init__()
        self.network = copy.deepcopy(model)
        self.output = output
        # what only training needs would be stored too
        del self.network.aux_head
        if self.network.memory is not None:
            del self.network.memory.writer, self.network.memory.classifier
        self.network.whitening = None
        _use_plain_convolutions(self.network)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images).logits
        return logits if self.output == "logits" else logits.argmax(1).to(torch.uint8)


def _use_plain_convolutions(network: nn.Module) -> None:
    """PyTorch's forward for our convolutions, which leave kernel taps out by the size of the map: it must be free."""
    for module in network.modules():
        if isinstance(module, Conv2d):
            module.forward = functools.partial(nn.Conv2d.forward, module)  # type: ignore[method-assign]


def _check_request(model: Segmentor, file_format: Format, output: OutputKind, size: tuple[int, int]) -> None:
    if file_format not in FORMATS or output not in OUTPUTS:
        raise ExportError(
            f"export: expected a format of {', '.join(FORMATS)} and an output of {', '.join(OUTPUTS)}, "
            f"got {file_format} and {output}"
        )
    if output == "classes" and model.num_classes > MOST_CLASSES:
        raise ExportError(f"export: at most {MOST_CLASSES} classes fit uint8, the network has {model.num_classes}")
    stride = model.settings["output_stride"]
    if min(size) <= stride:
        raise ExportError(f"export: height and width must be above the output stride {stride}, got {size[0]} {size[1]}")


def _check_place(path: Path, file_format: Format, force: bool) -> None:
    if path.suffix != f".{file_format}":
        raise ExportError(f"{path}: a file of format {file_format} must be called *.{file_format}")
    if path.exists() and not force:
        raise ExportError(f"{path} exists; --force replaces it")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: no folder {path.parent}")


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"exporting to ONNX needs the extra onnx: pip install 'pmm_fast[onnx]' ({error})") from error


def _trace(network: nn.Module, size: tuple[int, int] | None, stride: int) -> torch.export.ExportedProgram:
    """The network as a graph: for one image of ``size``, or (None) for any number of images of any size."""
    shapes = None
    example = torch.zeros(1, 3, *size) if size else torch.zeros(2, 3, 4 * stride, 6 * stride)
    if not size:
        sides = (torch.export.Dim(name, min=stride + 1) for name in ("height", "width"))
        shapes = {_INPUT: dict(zip((0, 2, 3), (torch.export.Dim("batch", min=1), *sides), strict=True))}
    try:
        with ops.use_backend("reference"):
            program = torch.export.export(network.eval(), (example,), dynamic_shapes=shapes)
    # the tracer raises whatever it meets
    except Exception as error:
        reason = str(error).strip().splitlines()[0].partition(" For more information")[0]
        remedy = "" if size else "; --static exports it for one size (--height, --width)"
        raise ExportError(f"export: the network cannot be traced: {reason}{remedy}") from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            _clean(module)
    return program


def _clean(module: torch.fx.GraphModule) -> None:
    """Takes out what a graph remembers of this machine: files of the source, and the device it was traced on."""
    for node in list(module.graph.nodes):
        node.meta.pop("stack_trace", None)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    module.recompile()


def _write(program: torch.export.ExportedProgram, path: Path, file_format: Format, about: dict[str, Any]) -> None:
    text = json.dumps(about)
    if file_format == "pt2":
        # into memory first: on a full disk PyTorch's own writer ends the process from its destructor
        archive = io.BytesIO()
        torch.export.save(program, archive, extra_files={METADATA: text})
        path.write_bytes(archive.getbuffer())
        return
    # names of the dynamic axes
    axes = {axis: name for axis, name in enumerate(about["input"]["shape"]) if isinstance(name, str)}
    with _quiet("torch.onnx"):
        onnx_program = torch.onnx.export(
            program, verbose=False, output_names=[about["output"]], dynamic_shapes={_INPUT: axes} if axes else None
        )
    assert onnx_program is not None
    onnx_program.model.metadata_props[METADATA] = text
    onnx_program.save(path, external_data=False)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a logger to errors: the exporter warns of packages that the network does not need, and of its own code."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _open(path: Path, file_format: Format) -> Run:
    """A file as a function of images."""
    if file_format == "pt2":
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {_INPUT: images.numpy()})[0])


def _shapes(size: tuple[int, int], static: bool, stride: int) -> list[tuple[int, ...]]:
    """Shapes to try: the one asked for, and where any is taken a few smaller ones that no stride divides."""
    shapes: list[tuple[int, ...]] = [(1, 3, *size)]
    if not static:
        shapes += [(2, 3, 5 * stride + 3, 3 * stride + 1), (3, 3, stride + 1, 2 * stride + 1)]
    return shapes


def _check(
    network: Segmentor, run: Run, shapes: list[tuple[int, ...]]
) -> tuple[tuple[Check, ...], tuple[float, float]]:
    """A file beside its network on images of some shapes, and the median time of either on one of the first shape."""
    checks = tuple(_compare(network, run, shape) for shape in shapes)
    images = torch.zeros(shapes[0])
    return checks, (_median_seconds(network, images), _median_seconds(run, images))


def _compare(network: Segmentor, run: Run, shape: tuple[int, ...]) -> Check:
    """The file and the network on the same random images.

    Raises:
        ExportError: the file raises, or differs by more than rounding.
    """
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = network(images).logits
    try:
        found = run(images)
    # runtimes raise whatever they meet
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ExportError(f"export: the file does not run on images {list(shape)}: {error}") from error
    # logits that are all zero have no scale
    scale = float(expected.abs().max()) or 1.0
    margin = TOLERANCE * scale
    deviation = None
    classes = found
    if found.dtype.is_floating_point:
        deviation, classes = float((found - expected).abs().max()), found.argmax(1)
    best = expected.max(1, keepdim=True).values
    chosen = expected.gather(1, classes.long()[:, None])
    # a pixel may get another class where its logits tie but for rounding; NaN fails too
    if not float((best - chosen).max()) <= 2 * margin or not (deviation is None or deviation <= margin):
        raise ExportError(
            f"export: the file differs from the network on images {list(shape)} by more than rounding: "
            f"{deviation} in the logits, allowed {margin:.3g}; nothing was written"
        )
    agreement = float((classes.long() == expected.argmax(1)).double().mean())
    return Check(shape, None if deviation is None else deviation / scale, agreement)


def _median_seconds(function: Callable[[Tensor], object], images: Tensor) -> float:
    """Median time of a call, after one that warms up."""
    function(images)
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        function(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
