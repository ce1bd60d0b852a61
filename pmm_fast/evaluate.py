"""``python -m pmm_fast.evaluate``: test trained networks on their source and unseen domains and compare them.

python -m pmm_fast.evaluate runs/demo/pinmem
python -m pmm_fast.evaluate runs/demo/agg runs/demo/pinmem --out comparison
python -m pmm_fast.evaluate weights.safetensors --data.root /data --data.unseen cityscapes bdd100k --protocol sliding
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pmm_fast.config import (
    Config,
    ConfigError,
    Parser,
    forget_protocol,
    from_dict,
    refuse_several_processes,
    resolve_protocol,
    run_main,
    validate,
)
from pmm_fast.config.eval_protocols import describe_eval
from pmm_fast.config.runs import check_writable, common_folder, run_names

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from pmm_fast.data.folder import FolderDomain
    from pmm_fast.engine.evaluate import DomainResult
    from pmm_fast.models import Segmentor
    from pmm_fast.viz.comparison import Example

PROG = "python -m pmm_fast.evaluate"
DESCRIPTION = (
    "Test trained networks on the val split of their source and unseen domains, and compare them: a table, "
    "results.json, results.csv, results.md, pictures, and training curves.  Options override the first run's "
    "configuration; --protocol replaces its test settings altogether; testing is in float32 unless --amp is given."
)
SECTIONS = ("data", "eval", "seed", "device", "amp", "amp_dtype", "tf32")
PICTURES = 3


class IncompleteError(ValueError):
    """Some domains could not be tested; the scores of the others are written."""


@dataclass
class Run:
    """A trained network: the name it goes by, its folder, and the network."""

    name: str
    folder: Path
    model: Segmentor


@dataclass
class Tested:
    """What was found on one domain.

    Attributes:
        domain: the domain.
        results: name of each run to its scores; a run that failed is missing.
        examples: rows of the picture.
        failures: what went wrong, of each run; empty if nothing did.
    """

    domain: FolderDomain
    results: dict[str, DomainResult] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, test, print the table, write the files.

    Raises:
        ValueError: a wrong option, checkpoint or domain (``ConfigError``, ``CheckpointError``, ``DataError``), or a
            domain that could not be tested to its end (``IncompleteError``, after the others were written).
    """
    parser = Parser(PROG, DESCRIPTION, sections=SECTIONS)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a checkpoint file")
    parser.own.add_argument("--out", metavar="DIR", help="where to write; default: `evaluation` beside the runs")
    own, options = parser.parse_options(argv)
    refuse_several_processes(PROG)
    # the names are checked before anything is loaded
    names = run_names(own.runs)
    runs, config = load_runs(names, options)
    domains = open_domains(config)
    out = Path(own.out) if own.out else default_out([run.folder for run in runs], config.eval.limit)
    # before testing, which may take hours
    check_writable(out)
    tested: list[Tested] = []
    try:
        for domain in domains:
            tested.append(evaluate_on(runs, domain, config))
            # what is known so far outlives whatever happens to the next one
            write_scores(out, runs, config, tested)
    finally:
        # also where it cannot be written
        if tested:
            print(f"{scores_table(runs, config, tested)}\n\n{describe_test(config)}", flush=True)
    write_report(out, runs, config, tested)
    print(f"\nwritten to {out}")
    if failures := [failure for each in tested for failure in each.failures]:
        raise IncompleteError(f"not tested to the end: {'; '.join(failures)}")


def default_out(folders: list[Path], limit: int) -> Path:
    """Where to write without ``--out``: ``evaluation`` beside the runs.

    A test on a few images does not replace one on all of them: it goes to ``evaluation_limit_N`` then, and a line on
    stderr says so.

    Args:
        folders: those of the runs.
        limit: images a domain at most; 0: all.
    """
    out = common_folder(folders) / "evaluation"
    if not limit or not _holds_all_images(out / "results.json"):
        return out
    few = out.with_name(f"{out.name}_limit_{limit}")
    print(f"{out} holds a test on all images; this one on a few is written to {few}", file=sys.stderr)
    return few


def _holds_all_images(file: Path) -> bool:
    """Whether a file has the scores of a test without a limit."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["settings"]["eval"]["limit"] == 0
    except (OSError, ValueError, KeyError, TypeError):
        # there is none, or nothing in it that could be lost
        return False


# --- before the test ----------------------------------------------------------------------------------------------


def load_runs(paths: Mapping[str, Path], options: Mapping[str, Any]) -> tuple[list[Run], Config]:
    """The networks, on the CPU, and the configuration of their test.

    Args:
        paths: name of each run to its folder or checkpoint file.
        options: those of the command line.

    Raises:
        ValueError: a checkpoint cannot be read, its network is for other classes than the rest, or an option is wrong.
    """
    from pmm_fast.engine import checkpoint

    runs: list[Run] = []
    config = Config()
    for name, path in paths.items():
        content = checkpoint.read(path)
        if not runs:
            config = choose_config(path, content, options)
        _check_space(path, content["model"], config.data.label_space)
        runs.append(Run(name, path if path.is_dir() else path.parent, checkpoint.rebuild(content, path)))
    return runs, config


def choose_config(path: Path, content: Mapping[str, Any], options: Mapping[str, Any]) -> Config:
    """The configuration of a test: what the checkpoint stores, then the command line's options.

    A checkpoint without a configuration (a converted one) has no domains, and the label space of its network.

    Raises:
        ConfigError: an option is wrong, or there are no domains to test on.
    """
    if content["config"] is not None:
        base = from_dict(content["config"], str(path))
        # where and in which precision it was trained is no reason to test there and so
        base.device, base.amp, base.tf32 = "auto", False, False
    else:
        base = Config()
        base.data.sources, base.data.unseen = [], []
        base.data.label_space = content["model"]["label_space"] or base.data.label_space
    base.eval = forget_protocol(base.eval, options.get("eval", {}))
    config = from_dict(options, "command line", base)
    validate(config, training=False)
    if not config.data.sources and not config.data.unseen:
        hint = "" if content["config"] is not None else f"; {path} holds no configuration that names any"
        raise ConfigError(f"data.sources and data.unseen: expected at least one domain to test on, got none{hint}")
    return config


def _check_space(path: Path, model: Mapping[str, Any], label_space: str) -> None:
    from pmm_fast.data.labels import get_space

    space, classes = get_space(label_space), model["settings"]["num_classes"]
    if model["label_space"] not in (None, label_space):
        raise ConfigError(
            f"{path}: trained for the label space {model['label_space']}, but this test is in {label_space} "
            "(data.label_space of the first run); networks are compared in one space"
        )
    if classes != space.num_classes:
        raise ConfigError(
            f"{path}: a network of {classes} classes, but this test is in {label_space}, which has "
            f"{space.num_classes}; --data.label_space names another"
        )


def open_domains(config: Config) -> list[FolderDomain]:
    """Source, then unseen domains, each once, with the images of their val split.

    Raises:
        ConfigError: some are not there or not whole, each with the reason.
    """
    from pmm_fast.data.folder import open_domain

    domains, problems = [], []
    for name in dict.fromkeys([*config.data.sources, *config.data.unseen]):
        try:
            domains.append(open_domain(name, config.data, "val"))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return domains


# --- the test -----------------------------------------------------------------------------------------------------


def evaluate_on(runs: list[Run], domain: FolderDomain, config: Config) -> Tested:
    """Test every network on a domain; what goes wrong is noted, for other networks and domains must not suffer.

    What is wrong with the domain would meet the next network too, so that ends its test; a network that fails does not.

    Args:
        runs: the networks.
        domain: the domain.
        config: protocol, device, precision.
    """
    from pmm_fast.data.files import DataError
    from pmm_fast.data.labels import get_space
    from pmm_fast.data.survey import evenly_spaced
    from pmm_fast.engine.build import amp_type, pick_device, place, set_float32_precision
    from pmm_fast.engine.evaluate import evaluate_domain
    from pmm_fast.engine.inference import is_out_of_memory
    from pmm_fast.viz.comparison import Example

    space, device = get_space(config.data.label_space), pick_device(config.device)
    set_float32_precision(config.tf32)
    indices = evenly_spaced(len(domain), config.eval.limit)
    shown = {indices[i] for i in evenly_spaced(len(indices), PICTURES)}
    examples: dict[int, Example] = {}

    def keep(index: int, image: Image.Image, labels: np.ndarray, prediction: np.ndarray) -> None:
        if index in shown:
            example = examples.setdefault(index, Example(domain.pairs[index][0].stem, image, labels, []))
            examples[index] = Example(example.title, image, labels, [*example.predictions, prediction])

    tested = Tested(domain)
    print(domain.describe(), file=sys.stderr)
    for run in runs:
        ignored = resolve_protocol(config.eval).noise and run.model.memory is None
        note = ", without noise: it has no memory" if ignored else ""
        print(f"{run.name} on {domain.name} ({device}){note}", file=sys.stderr, flush=True)
        try:
            options = (space.num_classes, config.eval, device, amp_type(config), config.seed)
            place(run.model, device, amp_type(config))
            result = evaluate_domain(run.model, domain, *options, on_prediction=keep)
            tested.results[run.name] = result
        except (ValueError, OSError) as error:
            tested.failures.append(_failure(run, domain, str(error)))
            if isinstance(error, DataError | OSError):
                break
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            advice = f"{device} has too little memory; --eval.tile_batch 1 takes least, tiles less than whole images"
            tested.failures.append(_failure(run, domain, advice))
    tested.examples = [example for example in examples.values() if len(example.predictions) == len(runs)]
    return tested


def _failure(run: Run, domain: FolderDomain, reason: str) -> str:
    message = f"{run.name} on {domain.name}: {reason}"
    print(f"error: {message}", file=sys.stderr)
    return message


# --- after the test -----------------------------------------------------------------------------------------------


def write_scores(out: Path, runs: list[Run], config: Config, tested: list[Tested]) -> None:
    """Write ``results.json`` and ``results.csv`` of the domains so far."""
    from pmm_fast.data.labels import get_space
    from pmm_fast.engine.evaluate import write_results

    protocol = {
        "protocol" if key == "name" else key: value for key, value in asdict(resolve_protocol(config.eval)).items()
    }
    settings = {
        "eval": protocol | {"limit": config.eval.limit},
        "seed": config.seed,
        "amp": config.amp_dtype if config.amp else None,
    }
    results = {run.name: [each.results[run.name] for each in tested if run.name in each.results] for run in runs}
    classes = get_space(config.data.label_space).classes
    write_results(results, out, classes, config.data.unseen, settings, config.eval.protocol)


def describe_test(config: Config) -> str:
    """How it was tested, in a sentence."""
    few = f", at most {config.eval.limit} images a domain" if config.eval.limit else ""
    return f"Protocol {config.eval.protocol}: {describe_eval(resolve_protocol(config.eval))}{few}."


def scores_table(runs: list[Run], config: Config, tested: list[Tested], markdown: bool = False) -> str:
    """The mIoU of every run and domain; what was not tested has a dash."""
    from pmm_fast.viz.tables import results_table

    scores = {
        run.name: {
            each.domain.name: each.results[run.name].confusion.miou() for each in tested if run.name in each.results
        }
        for run in runs
    }
    return results_table(scores, config.data.sources, config.data.unseen, markdown=markdown)


def write_report(out: Path, runs: list[Run], config: Config, tested: list[Tested]) -> None:
    """Write the table with those of the classes into ``results.md``, and draw the pictures."""
    from pmm_fast.data.convert_files import write_whole
    from pmm_fast.data.labels import get_space
    from pmm_fast.viz.tables import class_table

    classes = get_space(config.data.label_space).classes
    report = ["# mIoU", describe_test(config), scores_table(runs, config, tested, markdown=True)]
    for each in tested:
        iou = {name: result.confusion.iou().tolist() for name, result in each.results.items()}
        if iou:
            report += [f"## IoU of every class, {each.domain.name}", class_table(iou, classes, markdown=True)]
    text = "\n\n".join(report) + "\n"
    write_whole(out / "results.md", lambda part: part.write_text(text, encoding="utf-8"))
    for each in tested:
        _draw(out, runs, config, each)
    _draw_curves(out, runs)


def _draw(out: Path, runs: list[Run], config: Config, tested: Tested) -> None:
    """The pictures of a domain: a confusion matrix a run, and images with every run's prediction."""
    from pmm_fast.data.labels import get_space
    from pmm_fast.viz.comparison import draw_comparison
    from pmm_fast.viz.matrices import draw_confusion

    space, domain = get_space(config.data.label_space), tested.domain.name
    for name, result in tested.results.items():
        picture = draw_confusion(result.confusion.matrix.numpy(), space.classes, f"{name} on {domain}")
        _save(picture, out / f"confusion_{_file_name(name)}_{_file_name(domain)}.png")
    if tested.examples:
        picture = draw_comparison(tested.examples, [run.name for run in runs], space)
        _save(picture, out / f"overlays_{_file_name(domain)}.png")


def _save(picture: Image.Image, path: Path) -> None:
    from pmm_fast.data.convert_files import write_whole

    write_whole(path, lambda part: picture.save(part, "PNG"))


def _file_name(name: str) -> str:
    return re.sub(r"[^0-9A-Za-z-]+", "_", name).strip("_")


def _draw_curves(out: Path, runs: list[Run]) -> None:
    from pmm_fast.data.convert_files import write_whole
    from pmm_fast.engine.logging import FILE_NAME
    from pmm_fast.viz.curves import plot_curves

    logs = {run.name: run.folder / FILE_NAME for run in runs if (run.folder / FILE_NAME).is_file()}
    if not logs:
        return
    try:
        # matplotlib goes by the end of the name
        with TemporaryDirectory(prefix=".curves-", dir=out) as folder:
            drawn = Path(folder) / "curves.png"
            write_whole(out / "curves.png", lambda part: os.replace(plot_curves(logs, drawn), part))
    except (ImportError, ValueError) as error:
        # the scores are what was asked for
        print(f"no training curves: {error}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
