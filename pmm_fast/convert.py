"""``python -m pmm_fast.convert``: checkpoints of the released code to ours and back, and one format of ours to another.

python -m pmm_fast.convert last_None_epoch_40_mean-iu_0.00000.pth model.safetensors
python -m pmm_fast.convert model.safetensors released.pth
python -m pmm_fast.convert runs/gs_r50/pinmem model.safetensors

``convert.from_released`` and ``convert.to_released`` are those of :mod:`pmm_fast.models.released`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pmm_fast.config import CHECKPOINT_FILE, ConfigError, Parser, run_main

if TYPE_CHECKING:
    from pmm_fast.models import Segmentor
    from pmm_fast.models.released import from_released, to_released

__all__ = ["from_released", "main", "to_released"]

PROG = "python -m pmm_fast.convert"
DESCRIPTION = (
    "Convert a checkpoint of the released code (its .pth) to ours and back, or one of ours to the other format.  What "
    "IN is, is seen by its content; the name of OUT says what it becomes: .safetensors or .pt ours, .pth the released "
    "code's."
)
OURS, RELEASED = (".safetensors", ".pt"), ".pth"


class Conversion(NamedTuple):
    """What is to be written, and what there is to say about it.

    Attributes:
        kind: what was read, in words.
        model: its network.
        content: of the new file.
        left_out: what of the old one is not in it.
    """

    kind: str
    model: Segmentor
    content: dict[str, Any]
    left_out: list[str]


def __getattr__(name: str) -> Any:
    # torch only when they are asked for
    if name in ("from_released", "to_released"):
        from pmm_fast.models import released

        return getattr(released, name)
    raise AttributeError(f"module 'pmm_fast.convert' has no attribute {name!r}")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, convert, and tell what was read, what was left out and what was written.

    Raises:
        ValueError: a wrong option, or a file that cannot be read, converted or written (``ConfigError``,
            ``CheckpointError``).
    """
    parser = Parser(PROG, DESCRIPTION, sections=())
    parser.add_argument("source", metavar="IN", help="a checkpoint of the released code or of ours, or a run's folder")
    parser.add_argument("target", metavar="OUT", help="file to write: NAME.safetensors, NAME.pt or NAME.pth")
    parser.own.add_argument(
        "--architecture", metavar="NAME", help="of a released one; default: recognised by its names"
    )
    parser.own.add_argument(
        "--output-stride",
        type=int,
        choices=(8, 16, 32),
        metavar="N",
        help="of a released one, 8, 16 or 32; default: that of the released function of the architecture",
    )
    parser.own.add_argument(
        "--instance-norm",
        choices=("none", "ibn", "isw"),
        help="of a released one; default: recognised by its names, which do not tell a MobileNetV2 with isw from one "
        "with none",
    )
    parser.own.add_argument(
        "--label-space", metavar="NAME", help="of a network that does not say what its classes are; 19 are cityscapes19"
    )
    parser.own.add_argument("--force", action="store_true", help="overwrite OUT")
    own, _ = parser.parse_options(argv)
    source, target = Path(own.source).expanduser(), Path(own.target).expanduser()
    check_target(source, target, own.force)
    converted = convert(source, target, own)
    print("\n".join([f"{source}: {converted.kind}", *describe(converted.model)]))
    if converted.left_out:
        print(f"left out: {', '.join(converted.left_out)}")
    from pmm_fast.engine import checkpoint

    checkpoint.write(target, converted.content)
    print(f"written to {target} ({target.stat().st_size / 1e6:.1f} MB)")


def check_target(source: Path, target: Path, force: bool) -> None:
    """Whether ``target`` may be written, before anything is read.

    Raises:
        ConfigError: its name says no format, it exists, or it is what is read.
    """
    if target.suffix not in (*OURS, RELEASED):
        raise ConfigError(f"{target}: expected a name that ends in .safetensors, .pt or .pth")
    read = source / CHECKPOINT_FILE if source.is_dir() else source
    if target.resolve() == read.resolve():
        raise ConfigError(f"{target}: is what is to be converted; give the result another name")
    if target.exists() and not force:
        raise ConfigError(f"{target}: exists already; --force overwrites it")


def convert(source: Path, target: Path, options: argparse.Namespace) -> Conversion:
    """Read ``source`` and turn it into what ``target`` is to hold.

    Args:
        source: file or run folder.
        target: its suffix says into what.
        options: ``architecture``, ``output_stride`` and ``instance_norm`` of a released checkpoint, and
            ``label_space``, or None.

    Raises:
        CheckpointError: ``source`` is no checkpoint, or one that does not fit.
        ConfigError: an option or a suffix that does not fit what ``source`` is.
    """
    from pmm_fast.engine import checkpoint
    from pmm_fast.models.released import is_released

    content = checkpoint.unpack(source)
    try:
        if is_released(content):
            return _from_released(content, source, target, options)
        return _from_ours(checkpoint.checked(content, source), source, target, options)
    except (ConfigError, checkpoint.CheckpointError):
        raise
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{source}: {str(error).removeprefix('from_released: ')}") from error


def _from_released(content: Any, source: Path, target: Path, options: argparse.Namespace) -> Conversion:
    from pmm_fast.engine import checkpoint
    from pmm_fast.models.released import from_released_checkpoint

    if target.suffix == RELEASED:
        raise ConfigError(f"{target}: {source} is of the released code already; name OUT .safetensors or .pt")
    model, left_out = from_released_checkpoint(
        content, options.architecture, output_stride=options.output_stride, instance_norm=options.instance_norm
    )
    _name_classes(model, options.label_space)
    return Conversion("a checkpoint of the released code", model, checkpoint.content_of(model), left_out)


def _from_ours(content: dict[str, Any], source: Path, target: Path, options: argparse.Namespace) -> Conversion:
    from pmm_fast.engine import checkpoint
    from pmm_fast.models.released import not_in_released, to_released_checkpoint

    if options.architecture or options.output_stride or options.instance_norm:
        raise ConfigError(
            f"--architecture, --output-stride and --instance-norm are for released checkpoints; {source} says its own"
        )
    model = checkpoint.rebuild(content, source)
    if options.label_space:
        _name_classes(model, options.label_space)
        content["model"]["label_space"] = model.label_space
    left_out = ["the state of the training"] if "training" in content else []
    if target.suffix in OURS:
        new = {key: value for key, value in content.items() if key != "training"}
        return Conversion("a checkpoint of pmm_fast", model, new, left_out)
    if content["config"] is not None:
        left_out.append("the configuration")
    new = to_released_checkpoint(model)
    return Conversion("a checkpoint of pmm_fast", model, new, left_out + not_in_released(model))


def _name_classes(model: Segmentor, name: str | None) -> None:
    """Let a network without a label space have the one of that name.

    Raises:
        ConfigError: it has another, or another number of classes than that space.
    """
    from pmm_fast.data.labels import get_space

    if name is None:
        return
    if model.label_space not in (None, name):
        raise ConfigError(f"--label-space: {name!r}, but the network was trained for {model.label_space}")
    if get_space(name).num_classes != model.num_classes:
        raise ConfigError(
            f"--label-space: {name} has {get_space(name).num_classes} classes, the network {model.num_classes}"
        )
    model.label_space = name


def describe(model: Segmentor) -> list[str]:
    """Lines about a network: architecture, classes, size, memory."""
    settings = model.settings
    memory = "none" if model.memory is None else "{} x {}".format(*model.memory.slots.shape)
    norm = settings["instance_norm"]
    space = model.label_space or "no label space; --label-space NAME says which they are"
    return [
        f"architecture: {model.architecture}, output stride {settings['output_stride']}"
        + ("" if norm == "none" else f", instance norm {norm}"),
        f"classes: {model.num_classes} ({space})",
        f"parameters: {sum(parameter.numel() for parameter in model.parameters()):,}",
        f"memory: {memory}",
    ]


if __name__ == "__main__":
    run_main(main)
