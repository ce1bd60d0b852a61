"""What ``python bench/meta_step.py`` says: records, table, picture, and what was asked beside what was found.

A record is a dictionary that begins with the keys of ``KEYS``; None where nothing was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.harness import Measured
from bench.phases import PHASES
from bench.step_variants import Setup, Variant, products_of

Record = dict[str, Any]

KEYS = (
    "variant",
    "order",
    "dtype",
    "compiled",
    "checkpointed",
    "images_per_s",
    "seconds_per_step",
    "p20_s",
    "p80_s",
    "repeats",
    "peak_bytes",
    "kept_bytes",
    "ratio_released",
    "ratio_released_no_anomaly",
    "split_s",
    "multiply_adds_millions",
)
BASELINES = ("released", "released_no_anomaly")
PARTS = ("forward", *PHASES)


def records_of(measured: dict[Variant, Measured], setup: Setup) -> list[Record]:
    """A record for every variant; a ratio is the baseline's median over the row's."""
    by_name = {variant.name: found for variant, found in measured.items()}
    records = []
    for variant, found in measured.items():
        median = found.percentile("step", 50)
        record: Record = {"variant": variant.name}
        record |= {key: getattr(variant, key) for key in ("order", "dtype", "compiled", "checkpointed")}
        record |= {"images_per_s": 2 * setup.images / median, "seconds_per_step": median}
        record |= {"p20_s": found.percentile("step", 20), "p80_s": found.percentile("step", 80)}
        record |= {"repeats": len(found.seconds["step"]), "peak_bytes": found.peak_bytes["step"]}
        record["kept_bytes"] = found.peak_bytes["kept"]
        for name in BASELINES:
            other = by_name.get(name)
            record[f"ratio_{name}"] = other.percentile("step", 50) / median if other else None
        record["split_s"] = {which: found.percentile(which, 50) for which in found.seconds if which != "step"}
        record["multiply_adds_millions"] = products_of(variant, setup)
        records.append(record)
    return records


HEADER = (
    f"{'variant':<24}{'images/s':>9}{'s':>9}{'p20':>9}{'p80':>9}{'peak MB':>9}{'kept':>6}{'released':>10}"
    f"{'no anomaly':>11}{'forward':>10}{'inner':>8}{'outer':>8}{'memory':>8}{'SGD':>8}"
)
LEGEND = (
    "s: seconds an iteration, median. peak MB: the most that is alive in an iteration, kept: what stays between two\n"
    "(weights, momentum, images, copies). released, no anomaly: how many times faster than the released iteration as\n"
    "shipped, and without its anomaly mode. Then the seconds of: forward passes; inner and outer gradient; both\n"
    "rewrites of the memory; SGD. A compiled step is one piece, shown under forward."
)


def row(record: Record) -> str:
    """A line of the table."""
    text = f"{record['variant']:<24}{record['images_per_s']:>9.2f}"
    text += "".join(f"{record[key]:>9.3f}" for key in ("seconds_per_step", "p20_s", "p80_s"))
    text += f"{record['peak_bytes'] / 1e6:>9.0f}{record['kept_bytes'] / 1e6:>6.0f}"
    for name, width in zip(BASELINES, (10, 11), strict=True):
        ratio = record[f"ratio_{name}"]
        text += f"{'' if ratio is None else f'{ratio:.2f}x':>{width}}"
    split = dict(record["split_s"])
    split["forward"] = split.pop("compiled", split.get("forward"))
    for part, width in zip(PARTS, (10, 8, 8, 8, 8), strict=True):
        text += f"{f'{split[part]:.3f}' if part in split else '':>{width}}"
    return text


@dataclass(frozen=True)
class Target:
    """A figure that was asked for.

    Attributes:
        variant: whose figure.
        against: the variant that it is compared with.
        quantity: ``speed``, times faster; ``time`` or ``memory``, multiple of the other's.
        asked: at least, for a speed, or at most.
    """

    variant: str
    against: str
    quantity: str
    asked: float

    def found(self, records: dict[str, Record]) -> float | None:
        """The figure, or None where a variant that it needs was not measured."""
        mine, other = records.get(self.variant), records.get(self.against)
        if mine is None or other is None:
            return None
        key = "peak_bytes" if self.quantity == "memory" else "seconds_per_step"
        ratio = mine[key] / other[key]
        return 1 / ratio if self.quantity == "speed" else ratio

    def met(self, found: float) -> bool:
        """Whether a figure is what was asked for."""
        return found >= self.asked if self.quantity == "speed" else found <= self.asked


TARGETS_CPU = (
    Target("order1", "released_no_anomaly", "speed", 1.2),
    Target("order1", "released", "speed", 1.5),
    Target("order1_bf16", "released_no_anomaly", "speed", 2),
    Target("order2", "order1", "time", 1.5),
    Target("order1", "released", "memory", 0.6),
    Target("order2", "released", "memory", 0.6),
    # what training runs on a CPU, and what it can be asked to
    Target("order1_compiled", "released_no_anomaly", "speed", 1.2),
    Target("order1_compiled", "released", "speed", 1.5),
    Target("order1_bf16_compiled", "released_no_anomaly", "speed", 2),
    Target("order2_compiled", "order1_compiled", "time", 1.5),
    Target("order1_compiled", "released", "memory", 0.6),
    Target("order1_checkpointed", "released", "memory", 0.6),
)
TARGETS_GPU = (
    Target("order2_bf16_compiled", "released", "speed", 5),
    Target("order2_bf16_compiled", "released_no_anomaly", "speed", 3),
    Target("order2_bf16_compiled", "released", "memory", 0.5),
    Target("order2_bf16", "released", "memory", 0.5),
    Target("order2_bf16", "order1_bf16", "time", 1.3),
    Target("order2_bf16_compiled", "order1_bf16_compiled", "time", 1.3),
)


QUANTITIES = {"speed": "times faster than", "time": "time, multiple of", "memory": "peak memory, share of"}


def target_lines(records: list[Record], device: str) -> list[str]:
    """Asked and found, for every target whose variants were measured; what limits the time of order 2."""
    by_name = {record["variant"]: record for record in records}
    lines = []
    for target in TARGETS_GPU if device == "cuda" else TARGETS_CPU:
        found = target.found(by_name)
        if found is None:
            continue
        form, sign = (
            ("{:.0%}" if target.quantity == "memory" else "{:.2f}x"),
            ">=" if target.quantity == "speed" else "<=",
        )
        name = f"{target.variant}: {QUANTITIES[target.quantity]} {target.against}"
        verdict = "yes" if target.met(found) else "no"
        lines.append(f"{name:<64}{f'{sign} {form.format(target.asked)}':>11}{form.format(found):>9}  {verdict}")
    if lines:
        lines.insert(0, f"\n{'target':<64}{'asked':>11}{'found':>9}  met")
    return lines + floor_lines(by_name) + plain_lines(by_name)


def floor_lines(records: dict[str, Record]) -> list[str]:
    """Order 2 over order 1 by the multiply-adds that both must do."""
    one, two = (records.get(name) for name in ("order1", "order2"))
    if one is None or two is None:
        return []
    counts = [record["multiply_adds_millions"] / 1e3 for record in (one, two)]
    seconds = [record["seconds_per_step"] for record in (one, two)]
    rates = ", ".join(f"{count / second:.0f}" for count, second in zip(counts, seconds, strict=True))
    times = f"{seconds[1] / seconds[0]:.2f}x the time for {counts[1] / counts[0]:.2f}x the multiply-adds"
    return [
        f"order 2 / order 1: {times} of the convolutions ({counts[1]:.0f} G / {counts[0]:.0f} G): six more products of "
        f"each convolution of the inner pass; {rates} G a second in order 1, 2"
    ]


def plain_lines(records: dict[str, Record]) -> list[str]:
    """How near a variant comes to the rate of a plain forward and backward of the same images in its dtype."""
    lines = []
    for record in records.values():
        plain = records.get("plain" if record["dtype"] == "float32" else "plain_bf16")
        if plain is None or plain is record or record["multiply_adds_millions"] is None:
            continue
        # multiply-adds a second, as a share of those of the plain pass
        times = record["seconds_per_step"] / plain["seconds_per_step"]
        work = record["multiply_adds_millions"] / plain["multiply_adds_millions"]
        lines.append(
            f"{record['variant']}: {times:.2f}x the time of a plain forward and backward in {record['dtype']} for "
            f"{work:.2f}x its multiply-adds, {work / times:.0%} of its rate"
        )
    return lines


COLOURS = {
    "forward": "tab:blue",
    "inner_gradient": "tab:orange",
    "outer_gradient": "tab:red",
    "memory": "tab:green",
    "optimizer": "tab:purple",
    "compiled": "tab:cyan",
}


def draw(path: str, records: list[Record], title: str, notes: dict[str, str] | None = None) -> None:
    """Two panels of bars, a variant each: seconds an iteration by part, and peak memory; ``notes`` stay in the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (times, peaks) = pyplot.subplots(
        1, 2, figsize=(13, 1.5 + 0.4 * len(records)), sharey=True, layout="constrained", width_ratios=(2, 1)
    )
    names = [record["variant"] for record in records]
    starts = [0.0] * len(records)
    for part, colour in COLOURS.items():
        widths = [record["split_s"].get(part, 0.0) for record in records]
        if any(widths):
            times.barh(names, widths, left=starts, color=colour, label=part.replace("_", " "))
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for index, record in enumerate(records):
        times.text(starts[index], index, f" {record['images_per_s']:.2f} images/s", va="center", fontsize=8)
    times.set(xlabel="seconds an iteration", xlim=(0, 1.2 * max(starts)))
    times.invert_yaxis()
    peaks.barh(names, [record["peak_bytes"] / 1e9 for record in records], color="tab:grey")
    peaks.set(xlabel="peak memory, GB")
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130, metadata=notes)
    pyplot.close(figure)
