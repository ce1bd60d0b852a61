"""What a report says of runs: their scores, what they see, their memory, how they were trained.

Every section is made by itself.  Where one cannot be made (a domain that is not here, a network without a memory, a
package that is not installed) it says so in its place, and the others are made all the same.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from pmm_fast import __version__
from pmm_fast.config import Config, ConfigError, describe_order, from_dict, to_dict, to_yaml
from pmm_fast.config.runs import run_place, unique_ends
from pmm_fast.data.labels import LabelSpace, get_space
from pmm_fast.engine import checkpoint
from pmm_fast.engine.build import amp_type, pick_device, place, set_float32_precision
from pmm_fast.engine.logging import FILE_NAME as LOG_FILE
from pmm_fast.engine.logging import progress_bar
from pmm_fast.engine.report_pictures import (
    EXCUSES,
    Run,
    example_blocks,
    feature_blocks,
    look_at,
    memory_blocks,
)
from pmm_fast.viz.curves import Line, plot_curves, read_metrics
from pmm_fast.viz.matrices import draw_confusion
from pmm_fast.viz.report import Block, Cell, Code, Folded, Gallery, Note, Picture, Report, Section, Table, Text
from pmm_fast.viz.report_tables import class_table, difference_table, score_table, training_table
from pmm_fast.viz.results import RunScores, find_scores


def open_runs(paths: Mapping[str, str | Path]) -> list[Run]:
    """Load networks, on the CPU.

    Args:
        paths: name of each run to its folder or checkpoint.

    Raises:
        ValueError: one is no run, holds no configuration, or was trained for other classes than the first.
    """
    runs: list[Run] = []
    for name, path in paths.items():
        content = checkpoint.read(path)
        if content["config"] is None:
            raise ConfigError(f"{path}: holds no configuration; a report is about runs of python -m pmm_fast.train")
        config = from_dict(content["config"], origin=str(path))
        if runs and config.data.label_space != runs[0].config.data.label_space:
            raise ConfigError(
                f"{path}: trained for the label space {config.data.label_space}, but {runs[0].path} for "
                f"{runs[0].config.data.label_space}; a report is about runs of one label space"
            )
        iteration = content.get("training", {}).get("iteration")
        runs.append(Run(name, str(path), run_place(path), config, iteration, checkpoint.rebuild(content, path)))
    return runs


def make_report(runs: Sequence[Run], config: Config, images: int) -> Report:
    """Look at runs from all sides; progress is shown on stderr.

    Args:
        runs: from ``open_runs``; at least one.
        config: where the domains lie and which are shown (``data``), how they are segmented (``eval``), and on which
            device.
        images: pictures of each domain, at least one.
    """
    device, space = pick_device(config.device), get_space(config.data.label_space)
    set_float32_precision(config.tf32)
    for run in runs:
        place(run.model, device, amp_type(config))
    shown = list(dict.fromkeys([*config.data.sources, *config.data.unseen]))
    known = [name for run in runs for name in (*run.config.data.sources, *run.config.data.unseen)]
    titles = domain_titles([*shown, *known])
    seen = [look_at(name, titles[name], runs, config, images, device) for name in progress_bar("examples", shown)]
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    sections = [
        Section("Runs", [runs_table(runs, titles)]),
        Section("Scores", score_blocks(runs, space, titles)),
        Section("Examples", example_blocks(runs, seen, space, config)),
        Section("Training", training_blocks(runs)),
        Section("Memory", memory_blocks(runs, seen, space, config)),
        Section("Features", feature_blocks(runs, seen, space, config)),
        Section("Configuration", configuration_blocks(runs)),
    ]
    return Report(
        "Pin the Memory: " + ", ".join(run.name for run in runs),
        f"Semantic segmentation of {len(shown)} domains in {space.num_classes} classes ({space.name}); {made}",
        sections,
        f"Made on {made} by pmm_fast {__version__} with PyTorch {torch.__version__} and Python "
        f"{platform.python_version()} on {device}.",
    )


def domain_titles(names: Sequence[str]) -> dict[str, str]:
    """What domains are called in a report: folders by as much of the end of their paths as tells them apart."""
    paths = list(dict.fromkeys(Path(name) for name in names if Path(name).is_absolute()))
    ends = dict(zip(paths, unique_ends(paths), strict=True))
    titles = {name: ends.get(Path(name), name) for name in names}
    # a folder may end as a domain is called
    clash = len(set(titles.values())) < len({Path(name) for name in names})
    return {name: name for name in names} if clash else titles


# --- runs ---------------------------------------------------------------------------------------------------------


def runs_table(runs: Sequence[Run], titles: Mapping[str, str]) -> Table:
    """What was trained, how long, on what, and what it has never seen."""

    def domains(names: Sequence[str]) -> str:
        return ", ".join(titles[name] for name in names) or "-"

    facts = {
        "method": [f"{run.config.meta.mode}, {describe_order(run.config)}" for run in runs],
        "network": [run.model.architecture for run in runs],
        "parameters": [f"{sum(p.numel() for p in run.model.parameters()):,}" for run in runs],
        "iterations": [_iterations(run) for run in runs],
        "trained on": [domains(run.config.data.sources) for run in runs],
        "unseen": [domains(run.config.data.unseen) for run in runs],
        "crop": [" x ".join(map(str, run.config.data.crop)) for run in runs],
        "images a domain": [str(run.config.data.batch_per_domain) for run in runs],
        "seed": [str(run.config.seed) for run in runs],
        "precision": [run.config.amp_dtype if run.config.amp else "float32" for run in runs],
        "path": [run.path for run in runs],
    }
    rows = [(name, list(map(Cell, values))) for name, values in facts.items()]
    return Table("What was trained; unseen domains are never trained on.", ["", *_names(runs)], rows, words=True)


def _iterations(run: Run) -> str:
    wanted = run.config.optim.iterations
    return f"{wanted:,}" if run.iteration in (None, wanted) else f"{run.iteration:,} of {wanted:,}"


def _names(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


# --- scores -------------------------------------------------------------------------------------------------------


def score_blocks(runs: Sequence[Run], space: LabelSpace, titles: Mapping[str, str]) -> list[Block]:
    """Scores, classes and confusion matrices, as ``evaluate`` wrote them; else how to make them."""
    found, problems = find_scores({run.name: run.place for run in runs}, space.classes)
    blocks: list[Block] = [Note(f"Not used: {problem}.") for problem in problems]
    command = shlex.join(["python", "-m", "pmm_fast.evaluate", *(run.path for run in runs)])
    missing = [run.name for run in runs if run.name not in found]
    if missing:
        blocks.append(Note(f"No scores of {', '.join(missing)}; they are made by: {command}"))
    if not found:
        return blocks
    for name, scores in found.items():
        trained = next(run.place / checkpoint.FILE_NAME for run in runs if run.name == name)
        if trained.is_file() and trained.stat().st_mtime > scores.file.stat().st_mtime:
            blocks.append(Note(f"{name} has been trained on since it was tested; new scores are made by: {command}"))
    if len({str(scores.settings) for scores in found.values()}) > 1:
        blocks.append(Note("The runs were tested under different settings: their scores do not compare."))
    renamed = {
        name: RunScores(scores.file, scores.settings, {titles.get(d, d): s for d, s in scores.domains.items()})
        for name, scores in found.items()
    }
    sources = {run.name: [titles[domain] for domain in run.config.data.sources] for run in runs}
    return [
        *blocks,
        *(Text(text) for text in dict.fromkeys(map(_origin, found.values()))),
        score_table(renamed, sources),
        class_table(renamed, space.classes),
        *_confusions(renamed, space.classes),
    ]


def _origin(scores: RunScores) -> str:
    """How and when runs were tested, in a sentence."""
    settings = scores.settings.get("eval", {})
    few = f", at most {settings['limit']} images a domain" if settings.get("limit") else ""
    when = datetime.fromtimestamp(scores.file.stat().st_mtime).astimezone().strftime("%Y-%m-%d %H:%M")
    return f"Tested under the protocol {settings.get('protocol')}{few}; {scores.file.name} of {when}."


def _confusions(runs: Mapping[str, RunScores], classes: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    for domain in dict.fromkeys(domain for scores in runs.values() for domain in scores.domains):
        tested = {run: scores.domains[domain] for run, scores in runs.items() if domain in scores.domains}
        pictures = [
            Picture(
                draw_confusion(score.confusion, classes),
                f"{run}, {score.images} images",
                f"Confusion matrix of {run} on {domain}",
            )
            for run, score in tested.items()
        ]
        about = "What the pixels of each true class (rows) were taken for (columns), in percent of the class."
        blocks.append(Folded(f"Confusion matrix, {domain}", [Gallery(pictures, about, size="large")]))
    return blocks


# --- training -----------------------------------------------------------------------------------------------------


def training_blocks(runs: Sequence[Run]) -> list[Block]:
    """Training curves, and what the logs say in numbers."""
    files = {run.name: run.place / LOG_FILE for run in runs}
    blocks: list[Block] = []
    logs: dict[str, list[Line]] = {}
    for name, file in files.items():
        if not file.is_file():
            blocks.append(Note(f"No training log of {name}: no {file.name} in {file.parent}"))
            continue
        try:
            lines = read_metrics(file)
            if not lines:
                raise ValueError(f"{file} is empty")
            logs[name] = lines
        except EXCUSES as error:
            blocks.append(Note(f"No training log of {name}: {error}"))
    if not logs:
        return blocks
    try:
        with TemporaryDirectory() as folder:
            curves = Image.open(plot_curves({name: files[name] for name in logs}, Path(folder) / "curves.png"))
            curves.load()
        about = "Training by iteration, losses smoothed (faint: as logged)."
        blocks.append(Picture(curves, about, f"Losses, learning rates and top weights of {', '.join(logs)}"))
    except EXCUSES as error:
        blocks.append(Note(f"No curves: {error}"))
    return [*blocks, training_table(logs)]


# --- configuration ------------------------------------------------------------------------------------------------


def configuration_blocks(runs: Sequence[Run]) -> list[Block]:
    """In which options the runs differ (one run: from the defaults), and all of them, folded."""
    configs = {run.name: to_dict(run.config) for run in runs}
    if len(configs) == 1:
        configs["the defaults"] = to_dict(Config())
    table = difference_table(configs)
    return [
        table or Text("The runs have the same options."),
        *(Folded(f"All options of {run.name}", [Code(to_yaml(run.config))]) for run in runs),
    ]
