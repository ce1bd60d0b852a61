"""``python -m pmm_fast.export``: a trained network as one file that runs without pmm_fast.

python -m pmm_fast.export runs/demo/pinmem --format onnx
python -m pmm_fast.export model.pt --format pt2 --out street.pt2 --output classes
python -m pmm_fast.export model.pt --format onnx --static --height 768 --width 1536
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pmm_fast.config import CHECKPOINT_FILE, ConfigError, Parser, run_main

if TYPE_CHECKING:
    from pmm_fast.engine.export import ExportReport
    from pmm_fast.models import Segmentor

PROG = "python -m pmm_fast.export"
DESCRIPTION = (
    "Write a trained network as one file that runs without pmm_fast: .pt2 (torch.export) or ONNX.  The memory is "
    "frozen inside.  The file is opened again, compared with the network on random images, and kept only if both agree."
)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, export, print the comparison.

    Raises:
        ValueError: a wrong option, checkpoint or file name, or a network that cannot be exported.
        ImportError: ONNX without the extra ``onnx``.
    """
    parser = Parser(PROG, DESCRIPTION, sections=())
    parser.add_argument("checkpoint", metavar="CKPT", help="folder of a run, or a checkpoint file")
    add = parser.own.add_argument
    add("--format", choices=("pt2", "onnx"), default="pt2", help="pt2 (default) or onnx (extra: onnx)")
    add("--out", metavar="FILE", help="file to write; default: the checkpoint's name with the format's ending")
    add("--output", choices=("logits", "classes"), default="logits", help="logits (default) or class ids, uint8")
    add("--height", type=int, default=512, metavar="N", help="of the images that speed is measured with [512]")
    add("--width", type=int, default=1024, metavar="N", help="their width [1024]")
    add("--static", action="store_true", help="for one image of --height and --width, not for any number and size")
    add("--force", action="store_true", help="replace an existing file")
    own, _ = parser.parse_options(argv)
    if min(own.height, own.width) < 1:
        raise ConfigError(f"--height and --width: expected at least 1, got {own.height} and {own.width}")

    from pmm_fast.engine import checkpoint
    from pmm_fast.engine.export import export_model

    source = Path(own.checkpoint).expanduser()
    model = checkpoint.load(source)
    _print_network(source, model)
    stored = source / CHECKPOINT_FILE if source.is_dir() else source
    report = export_model(
        model,
        Path(own.out).expanduser() if own.out else stored.with_suffix(f".{own.format}"),
        own.format,
        size=(own.height, own.width),
        static=own.static,
        output=own.output,
        force=own.force,
        say=lambda line: print(f"{line} ...", file=sys.stderr, flush=True),
    )
    _print_report(report, model, own.static, own.output)


def _print_network(source: Path, model: Segmentor) -> None:
    memory = "no memory" if model.memory is None else f"memory {' x '.join(map(str, model.memory.slots.shape))}"
    print(f"{source}: {model.architecture}, {model.num_classes} classes ({model.label_space}), {memory}")


def _print_report(report: ExportReport, model: Segmentor, static: bool, output: str) -> None:
    import torch

    height, width = report.checks[0].shape[2:]
    stride = model.settings["output_stride"]
    taken = f"[1, 3, {height}, {width}]" if static else f"[N, 3, H, W], H and W above {stride}"
    print(f"{report.path}: {report.size / 1e6:.1f} MB, from images {taken} to {output}")
    for check in report.checks:
        deviation = "" if check.deviation is None else f"{check.deviation:.1e} of the largest logit apart, "
        shape = " x ".join(map(str, check.shape))
        print(f"  {shape}: {deviation}{100 * check.agreement:.4g} % of the classes equal")
    print(
        f"  1 x 3 x {height} x {width} on this CPU, {torch.get_num_threads()} threads: network "
        f"{1000 * report.model_seconds:.0f} ms, file {1000 * report.exported_seconds:.0f} ms"
    )


if __name__ == "__main__":
    run_main(main)
