"""``python -m pmm_fast.predict``: segment images and videos with a trained network.

python -m pmm_fast.predict runs/demo/pinmem street.jpg
python -m pmm_fast.predict runs/demo/pinmem photos "drive/*/left/*.png" drive.mp4 --out predictions --save overlay ids
python -m pmm_fast.predict checkpoint.pt photos --protocol sliding --eval.flip --save confidence --batch 4 --amp
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmm_fast import __version__
from pmm_fast.config import (
    CHECKPOINT_FILE,
    Config,
    ConfigError,
    Parser,
    from_dict,
    refuse_several_processes,
    resolve_protocol,
    run_main,
    validate,
)
from pmm_fast.config.runs import check_writable

if TYPE_CHECKING:
    from pmm_fast.data.inputs import Input
    from pmm_fast.data.labels import LabelSpace
    from pmm_fast.engine.predict import Predictor
    from pmm_fast.engine.predict_record import Record, Wanted

PROG = "python -m pmm_fast.predict"
DESCRIPTION = (
    "Segment images and videos with a trained network, and write overlays, colours, ids and confidences.  A run that "
    "was stopped goes on where it was when it is called again.  Exits with 1 when a file could not be read; all the "
    "others are done."
)
SECTIONS = ("eval", "seed", "device", "amp", "amp_dtype", "tf32")
KINDS = ("overlay", "colours", "ids", "confidence", "probabilities")
IDS = ("train", "cityscapes")
FOLDER = "predictions"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, predict, write the files, print the share of each class.

    Raises:
        ValueError: a wrong option, path or checkpoint (``ConfigError``, ``DataError``, ``CheckpointError``).
        ImportError: a video is asked for and PyAV is missing.
        OSError: a file cannot be written.
        SystemExit: with 1, if some files could not be read; all of them have been named.
    """
    own, options = _parser().parse_options(argv)
    config = from_dict(options, "command line", Config())
    validate(config, training=False)
    if own.classes:
        print_classes(own.checkpoint)
        return
    _check(own, config)
    # everything that can be refused is refused before the network is loaded
    checkpoint = Path(own.checkpoint).expanduser()
    settings = _settings(own, config, checkpoint)
    wanted, items = _asked(own, config, checkpoint)
    check_writable(wanted.folder)
    with _alone_in(wanted.folder):
        record = _open_record(own, wanted, settings, items)
        todo = [item for item in items if own.overwrite or not record.done(item, wanted)]
        if done := len(items) - len(todo):
            print(f"{done} of {len(items)} are done already in {wanted.folder}, skipped", file=sys.stderr)
        predictor = _load(checkpoint, config, wanted)
        classes = predictor.space.classes
        record.begin(settings, {"checkpoint": str(checkpoint), "classes": classes, "version": __version__})
        _predict(predictor, todo, items, wanted, record, own.batch)


def _parser() -> Parser:
    parser = Parser(PROG, DESCRIPTION, sections=SECTIONS)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a run, or a checkpoint file")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image, video, folder, or pattern in quotes (a/*.png)")
    add = parser.own.add_argument
    add("--out", metavar="DIR", help="where to write [predictions in a run, NAME_predictions beside another file]")
    add(
        "--save",
        nargs="+",
        choices=KINDS,
        metavar="KIND",
        default=["overlay"],
        help="what to write, each into a folder of its name; overlay: image under colours; colours: PNG whose palette "
        "shows the ids; ids: grey PNG; confidence: grey PNG of the chosen class's probability; probabilities: float16 "
        "of every class, NPZ [overlay]",
    )
    add("--ids", choices=IDS, default="train", help="ids as trained, or those of Cityscapes' own files [train]")
    add("--alpha", type=float, default=0.55, metavar="X", help="opacity of the colours in overlays, 0..1 [0.55]")
    add("--frames", action="store_true", help="of videos, write overlay and colours as a picture a frame too")
    add("--batch", type=int, default=1, metavar="N", help="images of equal size, or frames, taken together [1]")
    add("--overwrite", action="store_true", help="do everything again, and take the folder of other predictions")
    add("--classes", action="store_true", help="print the classes of the network and exit")
    return parser


def _check(own: argparse.Namespace, config: Config) -> None:
    refuse_several_processes(PROG)
    if not own.paths:
        raise ConfigError("command line: expected images, videos, folders or patterns after the checkpoint, got none")
    if not 0 <= own.alpha <= 1:
        raise ConfigError(f"--alpha: expected 0..1, got {own.alpha}")
    if own.batch < 1:
        raise ConfigError(f"--batch: expected at least 1, got {own.batch}")
    if config.eval.mapillary is not None:
        raise ConfigError("eval.mapillary: is for testing on labelled images of Mapillary (pmm_fast.evaluate)")


def default_out(checkpoint: Path) -> Path:
    """``predictions`` in the folder of a run, ``NAME_predictions`` beside any other checkpoint file."""
    if checkpoint.is_dir():
        return checkpoint / FOLDER
    return checkpoint.with_name(FOLDER if checkpoint.name == CHECKPOINT_FILE else f"{checkpoint.stem}_{FOLDER}")


def print_classes(checkpoint: str) -> None:
    """Print id, colour and name of every class of a network.

    Raises:
        ValueError: the checkpoint cannot be read (``CheckpointError``), or does not say its classes.
    """
    from pmm_fast.data.labels import get_space
    from pmm_fast.engine.checkpoint import read

    name = read(checkpoint)["model"]["label_space"]
    if name is None:
        raise ConfigError(f"{checkpoint}: does not say which classes the network was trained for")
    space = get_space(name)
    print(f"{name}, {space.num_classes} classes")
    for index, (label, colour) in enumerate(zip(space.classes, space.colours, strict=True)):
        print(f"{index:3}  #{bytes(colour).hex()}  {label}")


def _settings(own: argparse.Namespace, config: Config, checkpoint: Path) -> dict[str, Any]:
    """All that the files written depend on, as JSON values."""
    from pmm_fast.engine.checkpoint import CheckpointError, file_of
    from pmm_fast.engine.predict_record import file_digest

    file = file_of(checkpoint)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such checkpoint")
    protocol = resolve_protocol(config.eval)
    fields = {**asdict(protocol), "scales": list(protocol.scales)}
    del fields["mapillary"]
    return {
        "checkpoint": file_digest(file),
        "protocol": fields.pop("name"),
        **fields,
        "seed": config.seed if protocol.noise else None,
        "amp": config.amp_dtype if config.amp else None,
        "alpha": own.alpha,
        "ids": own.ids,
    }


def _asked(own: argparse.Namespace, config: Config, checkpoint: Path) -> tuple[Wanted, list[Input]]:
    """What is to be written, and of what."""
    from pmm_fast.data.inputs import find_inputs
    from pmm_fast.data.survey import evenly_spaced, many
    from pmm_fast.data.videos import import_av
    from pmm_fast.engine.predict_record import Wanted

    out = Path(own.out).expanduser() if own.out else default_out(checkpoint)
    inputs = find_inputs(own.paths, [out / kind for kind in KINDS])
    items = [inputs.found[index] for index in evenly_spaced(len(inputs.found), config.eval.limit)]
    if inputs.others:
        print(f"passed over, neither image nor video: {many(inputs.others, 'file')}", file=sys.stderr)
    if any(item.kind == "video" for item in items):
        import_av()
    return Wanted(out, tuple(dict.fromkeys(own.save)), own.alpha, own.ids, own.frames), items


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder of the outputs against a second run, which would mix two networks in it."""
    from pmm_fast.data.parallel import held

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with held(folder / ".lock", folder):
            yield
    finally:
        # only an empty folder goes
        with suppress(OSError):
            folder.rmdir()


def _open_record(own: argparse.Namespace, wanted: Wanted, settings: dict[str, Any], items: list[Input]) -> Record:
    from pmm_fast.engine.predict_record import Record

    record = Record(wanted.folder)
    if not own.overwrite:
        record.check(settings, items)
    return record


def _load(checkpoint: Path, config: Config, wanted: Wanted) -> Predictor:
    from pmm_fast.engine.build import set_float32_precision
    from pmm_fast.engine.predict import Predictor
    from pmm_fast.viz.predictions import cityscapes_ids

    set_float32_precision(config.tf32)
    predictor = Predictor(
        checkpoint,
        config.device,
        resolve_protocol(config.eval),
        config.amp,
        config.amp_dtype,
        probabilities="probabilities" in wanted.kinds,
        seed=config.seed,
        tile_batch=config.eval.tile_batch,
    )
    if wanted.ids == "cityscapes":
        # refuses a space without such ids
        cityscapes_ids(predictor.space)
    return predictor


def _predict(
    predictor: Predictor, todo: list[Input], items: list[Input], wanted: Wanted, record: Record, batch: int
) -> None:
    """Predict what is left to do, and say what came of it."""
    from pmm_fast.engine.predict_files import predict_files

    start = time.perf_counter()
    failures = predict_files(predictor, todo, wanted, record, batch)
    seconds = time.perf_counter() - start
    print(describe(items, record, predictor.space))
    done = len(todo) - len(failures)
    print(f"\n{done} done now in {seconds:.1f} s on {predictor.device}, written to {wanted.folder}", flush=True)
    if failures:
        print(f"error: {len(failures)} of {len(items)} could not be predicted:", file=sys.stderr)
        print("\n".join(f"  {failure}" for failure in failures), file=sys.stderr)
        raise SystemExit(1)


def describe(items: list[Input], record: Record, space: LabelSpace) -> str:
    """The share of each class in all that is done, this time or before."""
    from pmm_fast.data.contact_sheet import percent

    lines = [line for item in items if (line := record.line(item)) is not None]
    counts = [sum(line["pixels"][index] for line in lines) for index in range(space.num_classes)]
    total, width = max(1, sum(counts)), max(map(len, space.classes))
    shares = [f"{name:{width}}  {percent(count / total):>8}" for name, count in zip(space.classes, counts, strict=True)]
    return "\n".join([f"share of each class in {len(lines)} of {len(items)}", *shares])


if __name__ == "__main__":
    run_main(main)
