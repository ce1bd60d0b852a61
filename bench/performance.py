"""Write the tables and pictures of docs/performance.md and the README from the records: ``make performance``.

Reads every file of ``bench/results``.  Between ``<!-- performance: NAME -->`` and ``<!-- /performance -->`` a document
holds what the records say and nothing else; ``--check`` changes nothing, and exits with 1 where a document or a picture
is not what the records give.  Both tell where the order of the backends is not that of their times on a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import performance_page as page
from bench import performance_text as text
from bench import roofline, step_report
from bench.records import Machine, read_machines

ROOT = Path(__file__).resolve().parents[1]
REGION = re.compile(r"(<!-- performance: (\S+) -->\n)(.*?)(<!-- /performance -->)", re.S)

Lines = list[str]


def page_regions(machines: list[Machine], document: Path) -> dict[str, Lines]:
    """What docs/performance.md says, by region."""
    return {
        "machines": page.machine_lines(machines, document),
        "results": page.result_lines(machines, document),
        "targets": page.target_lines(machines),
        "gpu": page.prediction_lines(machines),
        "backends": page.backend_lines(machines),
    }


IN_SHORT: dict[str, tuple[str, Callable[[Machine, Path], Lines]]] = {
    "step": ("meta_step", text.step_in_short),
    "operators": ("memory_ops", text.operators_in_short),
    "loading": ("data_loading", text.loading_in_short),
    "evaluation": ("evaluation", text.evaluation_in_short),
}


def readme_regions(machines: list[Machine], document: Path) -> dict[str, Lines]:
    """What the README says, by region: of the first machine that has a record, a GPU if there is one."""
    regions = {}
    for name, (part, write) in IN_SHORT.items():
        having = [machine for machine in machines if part in machine.parts]
        regions[name] = write(having[0], document) if having else ["Not measured yet.", ""]
        if name == "step" and having:
            picture = f"docs/images/step-{having[0].stem}.png"
            regions[name] += [f"![Seconds of an iteration by part, and peak memory]({picture})", ""]
        if len(having) > 1:
            regions[name] += ["Other machines: [docs/performance.md](docs/performance.md).", ""]
    return regions


def rewritten(document: str, regions: dict[str, Lines]) -> str:
    """A document with every region replaced.

    Raises:
        ValueError: a region is missing, there twice or unknown.
    """
    names = [match[2] for match in REGION.finditer(document)]
    if sorted(names) != sorted(regions):
        raise ValueError(f"expected the regions {', '.join(sorted(regions))} once each, got {', '.join(sorted(names))}")
    return REGION.sub(lambda match: "\n".join([match[1], *map(wrapped, regions[match[2]]), match[4]]), document)


def wrapped(line: str) -> str:
    """A paragraph as lines of the documents' length; tables, headings and pictures as they are."""
    if line.startswith(("|", "#", "!")):
        return line
    # a command is not broken
    joined = re.sub(r"`[^`]+`", lambda span: span[0].replace(" ", "\0"), line)
    return textwrap.fill(joined, 120, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


@dataclass(frozen=True)
class Picture:
    """A picture of some rows; a digest of what it shows stands in the file.  Remove one to have it drawn anew.

    Attributes:
        path: where it belongs.
        draw: writes it, given the path and ``notes``, which stand in the file; what it shows is bound already.
    """

    path: Path
    draw: partial[None]

    @property
    def digest(self) -> str:
        """Of rows, ceilings and title."""
        return hashlib.sha256(json.dumps(self.draw.keywords, sort_keys=True).encode()).hexdigest()[:16]

    def is_current(self) -> bool:
        """Whether the file shows just that."""
        from PIL import Image

        if not self.path.exists():
            return False
        with Image.open(self.path) as image:
            return image.info.get("Source") == self.digest

    def write(self) -> None:
        """Draw it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.draw(str(self.path), notes={"Source": self.digest})


def pictures(machines: list[Machine], folder: Path) -> list[Picture]:
    """A roofline of every machine's operators, and the parts of its iterations."""
    found = []
    for machine in machines:
        if part := machine.parts.get("memory_ops"):
            rates, title = machine.rates(), text.made_by(machine, part)
            ceilings = {"bandwidth": rates["copy_bytes_per_s"], "exponentials": rates.get("exponentials_per_s")}
            draw = partial(roofline.draw, records=part.rows, **ceilings, title=title)
            found.append(Picture(folder / f"roofline-{machine.stem}.png", draw))
        if part := machine.parts.get("meta_step"):
            title = f"{text.step_size(part)}; {text.made_by(machine, part)}"
            draw = partial(step_report.draw, records=part.rows, title=title)
            found.append(Picture(folder / f"step-{machine.stem}.png", draw))
    return found


def update(root: Path, check: bool) -> list[str]:
    """Bring the documents below ``root`` in line with its records, or only look; the files that were not.

    Raises:
        ValueError: a record or a document is not what it should be.
    """
    machines = read_machines(root / "bench" / "results")
    stale = []
    for name, regions in (("docs/performance.md", page_regions), ("README.md", readme_regions)):
        path = root / name
        before = path.read_text()
        try:
            after = rewritten(before, regions(machines, path))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if after != before:
            stale.append(name)
            if not check:
                path.write_text(after)
    for picture in pictures(machines, root / "docs" / "images"):
        if not picture.is_current():
            stale.append(picture.path.relative_to(root).as_posix())
            if not check:
                picture.write()
    for line in page.disagreements(machines):
        print(line)
    return stale


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a file is out of date")
    options = parser.parse_args(argv)
    try:
        stale = update(ROOT, options.check)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name in stale:
        print(f"{name}: {'differs from the records; make performance writes it' if options.check else 'written'}")
    sys.exit(options.check and bool(stale))


if __name__ == "__main__":
    main()
