"""What ``python bench/data_loading.py`` says: records, table, picture, and what was asked beside what was found.

A record is a dictionary with the keys of ``KEYS``, in the units that their names have; None where nothing was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.released_loading import JITTER_SHARE

Record = dict[str, Any]

KEYS = (
    "files",
    "workers",
    "pipeline",
    "images_per_s",
    "error_percent",
    "cpu_ms_per_image",
    "ratio_released",
    "ratio_torch",
    "cpu_ratio_released",
    "cpu_ratio_torch",
    "images",
    "seconds",
    "stages_ms",
)
BASELINES = ("released", "torch")
STAGES = ("image", "labels", "crop", "label_crop", "jitter", "blur", "normalise")


@dataclass(frozen=True)
class Throughput:
    """What a pipeline did while it was watched.

    Attributes:
        images: how many came.
        seconds: in what time.
        cpu_seconds: spent by all of its processes.
        error: of the rate, relative: the standard error of the time between batches over its mean.
    """

    images: int
    seconds: float
    cpu_seconds: float
    error: float

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds

    @property
    def cpu(self) -> float:
        """CPU seconds an image."""
        return self.cpu_seconds / self.images


def records_of(files: str, workers: int, found: Mapping[str, Throughput], stages: Mapping[str, Any]) -> list[Record]:
    """A record for every pipeline on some files; a ratio says how many times better than the baseline.

    Args:
        files: name of the kind.
        workers: processes or threads.
        found: what was measured, by pipeline.
        stages: milliseconds of each stage, by pipeline; those without are missing.
    """
    records = []
    for name, here in found.items():
        record: Record = {"files": files, "workers": workers, "pipeline": name, "images_per_s": here.rate}
        record |= {"error_percent": 100 * here.error, "cpu_ms_per_image": 1e3 * here.cpu}
        for baseline in BASELINES:
            other = found.get(baseline)
            record[f"ratio_{baseline}"] = here.rate / other.rate if other else None
            record[f"cpu_ratio_{baseline}"] = other.cpu / here.cpu if other else None
        record |= {"images": here.images, "seconds": here.seconds, "stages_ms": stages.get(name)}
        records.append({key: record[key] for key in KEYS})
    return records


HEADER = (
    f"{'files':<9}{'workers':>7}  {'pipeline':<14}{'images/s':>9}{'+-':>6}{'CPU ms':>8}{'released':>10}{'torch':>8}"
    f"{'(CPU:':>9}{'released':>9}{'torch)':>8}"
)
LEGEND = (
    "images/s: by the clock; +-: standard error. CPU ms: an image, of all processes and threads together. released,\n"
    "torch: how many times faster than these by the clock, in brackets by CPU time. workers: processes, or dali's\n"
    "threads; torch and dali leave the look (jitter, blur, normalisation) to one thread of the main process besides.\n"
    "Stages: alone, on one thread; jitter as if every image had it, where half have."
)
STAGE_HEADER = f"{'':<9}{'CPU ms':>7}  {'pipeline':<14}" + "".join(f"{stage:>11}" for stage in STAGES)


def row(record: Record) -> str:
    """A line of the table."""
    text = f"{record['files']:<9}{record['workers']:>7}  {record['pipeline']:<14}{record['images_per_s']:>9.1f}"
    text += f"{record['error_percent']:>5.0f}%{record['cpu_ms_per_image']:>8.1f}"
    for key, width in zip(("ratio_", "cpu_ratio_"), ((10, 8), (18, 8)), strict=True):
        for baseline, columns in zip(BASELINES, width, strict=True):
            ratio = record[key + baseline]
            text += f"{'' if ratio is None else f'{ratio:.2f}x':>{columns}}"
    return text


def stage_row(files: str, name: str, stages: Mapping[str, float]) -> str:
    """A line of the table of stages."""
    return f"{files:<9}{'':>7}  {name:<14}" + "".join(f"{stages[stage]:>11.2f}" for stage in STAGES)


@dataclass(frozen=True)
class Target:
    """A figure that was asked for.

    Attributes:
        pipeline: whose; ``best`` is the fastest there is.
        against: the pipeline that it is to be ``asked`` times faster than.
        files: kinds, of which a batch has equal parts.
        asked: at least.
    """

    pipeline: str
    against: str
    files: tuple[str, ...]
    asked: float


ALL = ("gtav", "synthia", "jpeg")
TARGETS = (
    *(
        Target("dali", against, files, 1.5)
        for against in ("torch", "torch_pillow")
        for files in (*((kind,) for kind in ALL), ALL)
    ),
    Target("best", "released", ("gtav",), 5),
)


def costs(records: list[Record], files: tuple[str, ...], workers: int) -> dict[str, tuple[float, float]]:
    """Seconds by the clock and CPU milliseconds of an image, by pipeline, of those measured on all the files."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record["files"] in files and record["workers"] == workers:
            cost = 1 / record["images_per_s"], record["cpu_ms_per_image"]
            found.setdefault(record["pipeline"], []).append(cost)
    return {
        name: (statistics.mean(cost[0] for cost in each), statistics.mean(cost[1] for cost in each))
        for name, each in found.items()
        if len(each) == len(files)
    }


def ratios(records: list[Record], target: Target, workers: int) -> tuple[str, tuple[float, float]] | None:
    """The pipeline of a target and how many times it is faster, by the clock and by CPU time; None if not measured."""
    here = costs(records, target.files, workers)
    name = min(here, key=here.__getitem__) if target.pipeline == "best" and here else target.pipeline
    if name not in here or target.against not in here:
        return None
    mine, other = here[name], here[target.against]
    return name, (other[0] / mine[0], other[1] / mine[1])


def target_lines(records: list[Record]) -> list[str]:
    """Asked and found, by the clock and by CPU time, for every target whose pipelines were measured."""
    lines = []
    for target in TARGETS:
        for workers in sorted({record["workers"] for record in records}):
            compared = ratios(records, target, workers)
            if compared is None:
                continue
            name, times = compared
            title = f"{name} / {target.against}, {' + '.join(target.files)}, {workers} worker{'s' * (workers > 1)}"
            line = f"{title:<56}{f'>= {target.asked:g}x':>9}"
            for ratio in times:
                line += f"{ratio:>9.2f}x {'met' if ratio >= target.asked else 'missed':<6}"
            lines.append(line.rstrip())
    if lines:
        lines.insert(0, f"\n{'target':<56}{'asked':>9}{'images/s':>10}{'by CPU time':>18}")
    return lines


COLOURS = dict(
    zip(
        STAGES,
        ("tab:blue", "tab:cyan", "tab:orange", "tab:olive", "tab:red", "tab:purple", "tab:green"),
        strict=True,
    )
)


def mean_stages(record: Record) -> dict[str, float]:
    """CPU milliseconds an image by stage, jitter by how often it is applied, and the rest of what was measured.

    What stages, measured alone, come to beyond the whole is not shown: there is no negative rest.
    """
    stages = {
        stage: ms * (JITTER_SHARE if stage == "jitter" else 1) for stage, ms in (record["stages_ms"] or {}).items()
    }
    return stages | {"rest": max(record["cpu_ms_per_image"] - sum(stages.values()), 0.0)}


def draw(path: str, records: list[Record], title: str) -> None:
    """A row of two panels for every kind of file: images a second, and CPU milliseconds an image by stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(record["files"] for record in records))
    names = list(dict.fromkeys(record["pipeline"] for record in records))
    counts = sorted({record["workers"] for record in records})
    thickness = 0.8 / len(counts)
    figure, axes = pyplot.subplots(
        len(kinds), 2, figsize=(12, 1.2 + 2 * len(kinds)), squeeze=False, layout="constrained", width_ratios=(2, 3)
    )
    for kind, (rates, times) in zip(kinds, axes, strict=True):
        for place, workers in enumerate(counts):
            rows = [record for record in records if (record["files"], record["workers"]) == (kind, workers)]
            shift = (place - (len(counts) - 1) / 2) * thickness
            places = [names.index(record["pipeline"]) + shift for record in rows]
            grey = str(0.75 - 0.4 * place / max(len(counts) - 1, 1))
            values = [record["images_per_s"] for record in rows]
            bars = rates.barh(places, values, thickness, color=grey, label=f"{workers} worker{'s' * (workers > 1)}")
            rates.bar_label(bars, fmt=" %.1f", fontsize=8)
            for record in rows if place == 0 else []:
                start = 0.0
                for stage, width in mean_stages(record).items():
                    colour = COLOURS.get(stage, "lightgrey")
                    times.barh(names.index(record["pipeline"]), width, left=start, color=colour, label=stage)
                    start += width
                text = f" {record['cpu_ms_per_image']:.0f} ms"
                times.text(start, names.index(record["pipeline"]), text, va="center", fontsize=8)
        rates.set(title=f"{kind}: images a second", yticks=range(len(names)), yticklabels=names)
        times.set(title=f"{kind}: CPU ms an image, {counts[0]} worker{'s' * (counts[0] > 1)}", yticks=[])
        for panel in (rates, times):
            panel.margins(x=0.15)
            panel.invert_yaxis()
    axes[0, 0].legend(loc="upper right", fontsize=8)
    # every bar brought its label again
    shown = dict(zip(*reversed(axes[0, 1].get_legend_handles_labels()), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=8, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
