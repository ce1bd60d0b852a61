"""``python -m pmm_fast.evaluate``: test trained networks on their source and unseen domains and compare them.

python -m pmm_fast.evaluate runs/demo/pinmem
python -m pmm_fast.evaluate runs/demo/agg runs/demo/pinmem --out comparison
python -m pmm_fast.evaluate checkpoint.pt --data.unseen /data/my_town --eval.protocol sliding --eval.flip --amp
"""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmm_fast.config import CHECKPOINT_FILE, Config, ConfigError, Parser, from_dict, run_main, validate

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from pmm_fast.data.folder import FolderDomain
    from pmm_fast.engine.evaluate import DomainResult
    from pmm_fast.models import Segmentor

PROG = "python -m pmm_fast.evaluate"
DESCRIPTION = (
    "Test trained networks on the val split of their source and unseen domains, and compare them: a table, "
    "results.json, results.csv, results.md, pictures, and training curves.  Options override the first run's "
    "configuration; testing is in float32 unless --amp is given."
)
SECTIONS = ("data", "eval", "device", "amp", "amp_dtype", "tf32")
PICTURES = 3


@dataclass
class Run:
    """A trained network: the name it goes by, its folder, and the network."""

    name: str
    folder: Path
    model: Segmentor


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, test, print the table, write the files.

    Raises:
        ValueError: a wrong option, checkpoint or domain (``ConfigError``, ``CheckpointError``, ``DataError``).
    """
    parser = Parser(PROG, DESCRIPTION, sections=SECTIONS)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a checkpoint file")
    parser.own.add_argument("--out", metavar="DIR", help="where to write; default: `evaluation` beside the runs")
    own, options = parser.parse_options(argv)
    # the names are checked before anything is loaded
    names = run_names(own.runs)
    config = stored_config(own.runs[0], options)
    runs, domains = load_runs(names, config), open_domains(config)
    folders = [run.folder for run in runs]
    out = Path(own.out) if own.out else _common(folders) / "evaluation"
    # before testing, which may take hours
    out.mkdir(parents=True, exist_ok=True)
    results, pictures = evaluate_runs(runs, domains, config)
    write(out, runs, domains, config, results, pictures)


def run_names(paths: list[str]) -> dict[str, Path]:
    """A short, unique name for each run: the end of its path, as much of it as it takes.

    Raises:
        ConfigError: the same run is given twice.
    """
    resolved = [Path(path).expanduser().resolve() for path in paths]
    parts = [(path.parent if path.name == CHECKPOINT_FILE else path.with_suffix("")).parts for path in resolved]
    if len(set(parts)) != len(parts):
        raise ConfigError(f"a run is given twice: {', '.join(paths)}")
    length = 1
    while len({part[-length:] for part in parts}) != len(parts):
        length += 1
    return {"/".join(part[-length:]): path for part, path in zip(parts, resolved, strict=True)}


def stored_config(path: str, options: dict[str, Any]) -> Config:
    """The configuration that a run was trained with, with the command line's options on top."""
    from pmm_fast.engine import checkpoint

    base = checkpoint.read_config(path)
    # where and in which precision it was trained is no reason to test there and so
    base.device, base.amp, base.tf32 = "auto", False, False
    config = from_dict(options, "command line", base)
    validate(config, training=False)
    return config


def load_runs(paths: dict[str, Path], config: Config) -> list[Run]:
    """The networks, on the CPU.

    Raises:
        ValueError: one cannot be read, or was trained for other classes than the rest.
    """
    from pmm_fast.engine import checkpoint

    runs = []
    for name, path in paths.items():
        model = checkpoint.load(path)
        if model.label_space != config.data.label_space:
            raise ConfigError(
                f"{path}: trained for the label space {model.label_space}, but this test is in "
                f"{config.data.label_space} (data.label_space of the first run); networks are compared in one space"
            )
        runs.append(Run(name, path if path.is_dir() else path.parent, model))
    return runs


def open_domains(config: Config) -> list[FolderDomain]:
    """Source, then unseen domains, each once, with the images of their val split."""
    from pmm_fast.data.folder import open_domain

    names = list(dict.fromkeys([*config.data.sources, *config.data.unseen]))
    if not names:
        raise ConfigError("data.sources and data.unseen: expected at least one domain to test on, got none")
    return [open_domain(name, config.data, "val") for name in names]


Pictures = dict[str, dict[int, "list[Image.Image]"]]
"""Domain to sample index to cells: image, truth, and each run's prediction."""


def evaluate_runs(
    runs: list[Run], domains: list[FolderDomain], config: Config
) -> tuple[dict[str, list[DomainResult]], Pictures]:
    """Test every network on every domain.

    Returns:
        The results of each run, and the pictures of ``PICTURES`` evenly spaced images of each domain.
    """
    from pmm_fast.data.labels import get_space
    from pmm_fast.data.survey import evenly_spaced
    from pmm_fast.engine.build import amp_type, pick_device, set_float32_precision
    from pmm_fast.engine.evaluate import evaluate_domain
    from pmm_fast.viz.overlays import overlay

    space, device = get_space(config.data.label_space), pick_device(config.device)
    set_float32_precision(config.tf32)
    results: dict[str, list[DomainResult]] = {run.name: [] for run in runs}
    pictures: Pictures = {}
    for domain in domains:
        tested = evenly_spaced(len(domain), config.eval.limit)
        cells: dict[int, list[Image.Image]] = {tested[i]: [] for i in evenly_spaced(len(tested), PICTURES)}

        def keep(
            index: int, image: Image.Image, labels: np.ndarray, prediction: np.ndarray, cells: Any = cells
        ) -> None:
            if index in cells:
                if not cells[index]:
                    cells[index] += [image, overlay(image, labels, space)]
                cells[index].append(overlay(image, prediction, space))

        print(domain.describe(), file=sys.stderr)
        for run in runs:
            print(f"{run.name} on {domain.name} ({device})", file=sys.stderr, flush=True)
            model = run.model.to(device)
            results[run.name].append(
                evaluate_domain(
                    model, domain, space.num_classes, config.eval, device, amp_type(config), on_prediction=keep
                )
            )
        pictures[domain.name] = cells
    return results, pictures


def write(
    out: Path,
    runs: list[Run],
    domains: list[FolderDomain],
    config: Config,
    results: dict[str, list[DomainResult]],
    pictures: Pictures,
) -> None:
    """Print the table and write every file into ``out``."""
    from pmm_fast.data.labels import get_space
    from pmm_fast.engine.evaluate import write_results
    from pmm_fast.viz.overlays import comparison_grid
    from pmm_fast.viz.tables import class_table, results_table

    space = get_space(config.data.label_space)
    scores = {name: {r.name: r.confusion.miou() for r in found} for name, found in results.items()}
    sources, unseen = config.data.sources, config.data.unseen
    settings = {"eval": asdict(config.eval), "amp": config.amp_dtype if config.amp else None}
    write_results(results, out, space.classes, unseen, settings)
    report = ["# mIoU", results_table(scores, sources, unseen, markdown=True)]
    for position, domain in enumerate(domains):
        iou = {name: found[position].confusion.iou().tolist() for name, found in results.items()}
        report += [f"## IoU of every class, {domain.name}", class_table(iou, space.classes, markdown=True)]
        titles = [domain.pairs[index][0].stem for index in pictures[domain.name]]
        grid = comparison_grid(
            list(pictures[domain.name].values()), ["image", "truth", *[run.name for run in runs]], titles, space
        )
        grid.save(out / f"overlays_{re.sub(r'[^0-9A-Za-z-]+', '_', domain.name).strip('_')}.png")
    (out / "results.md").write_text("\n\n".join(report) + "\n", encoding="utf-8")
    _draw_curves(out, runs)
    print(results_table(scores, sources, unseen))
    print(f"\nwritten to {out}")


def _draw_curves(out: Path, runs: list[Run]) -> None:
    from pmm_fast.engine.logging import FILE_NAME
    from pmm_fast.viz.curves import plot_curves

    logs = {run.name: run.folder / FILE_NAME for run in runs if (run.folder / FILE_NAME).is_file()}
    if not logs:
        return
    try:
        plot_curves(logs, out / "curves.png")
    except (ImportError, ValueError) as error:
        # the scores are what was asked for
        print(f"no training curves: {error}", file=sys.stderr)


def _common(folders: list[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    shared = [level[0] for level in zip(*(folder.parts for folder in folders), strict=False) if len(set(level)) == 1]
    return Path(*shared)


if __name__ == "__main__":
    run_main(main)
