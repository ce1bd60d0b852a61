"""``python -m pmm_fast.report``: one HTML file about one or several runs, to be sent to a colleague.

python -m pmm_fast.report runs/demo/pinmem
python -m pmm_fast.report runs/demo/agg runs/demo/pinmem --out comparison.html --images 3
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pmm_fast.config import Config, ConfigError, Parser, from_dict, refuse_several_processes, run_main, validate
from pmm_fast.config.eval_protocols import forget_protocol
from pmm_fast.config.runs import check_writable, common_folder, run_names

PROG = "python -m pmm_fast.report"
DESCRIPTION = (
    "Write one HTML file, which needs nothing else, about trained networks side by side: scores (where "
    "python -m pmm_fast.evaluate has made them), predictions, training curves, memory, features, configuration.  "
    "Options override the first run's configuration."
)
SECTIONS = ("data", "eval", "device", "amp", "amp_dtype", "tf32")
FILE_NAME = "report.html"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, look at the runs, write the file.

    Raises:
        ValueError: a wrong option, a run that is none, or a domain of the command line that is not here
            (``ConfigError``, ``CheckpointError``, ``DataError``).
        OSError: the file cannot be written there.
    """
    parser = Parser(PROG, DESCRIPTION, sections=SECTIONS)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a checkpoint file")
    parser.own.add_argument(
        "--out", metavar="FILE|DIR", help=f"a file that ends in .html, or a folder [{FILE_NAME} in or beside the runs]"
    )
    parser.own.add_argument("--images", metavar="N", default="2", help="images shown of each domain [2]")
    own, options = parser.parse_options(argv)
    refuse_several_processes(PROG)
    names, images = run_names(own.runs), _count(own.images)

    from pmm_fast.data import open_domain
    from pmm_fast.engine.report import make_report, open_runs
    from pmm_fast.viz.report import write

    runs = open_runs(dict(zip(names, own.runs, strict=True)))
    config = chosen_config(runs[0].config, options)
    # domains that the runs name need not be here, but those that are asked for must
    given = options.get("data", {})
    for name in [*given.get("sources", []), *given.get("unseen", [])]:
        open_domain(name, config.data, "val")
    # before the networks run, which may take long
    out = prepare_out(own.out, [run.place for run in runs])
    size = write(make_report(runs, config, images), out)
    print(f"written to {out} ({size / 1e6:.1f} MB)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"command line: --images: expected a whole number from 1, got {text!r}")
    return int(text)


def chosen_config(stored: Config, options: dict[str, Any]) -> Config:
    """What is looked at and how: as the first run was trained, with the command line's options on top.

    Raises:
        ConfigError: an option is wrong, or means another label space than that of the runs.
    """
    # where and in which precision it was trained is no reason to look at it there and so
    evaluation = forget_protocol(stored.eval, options.get("eval", {}))
    base = replace(stored, device="auto", amp=False, tf32=False, eval=evaluation)
    config = from_dict(options, "command line", base)
    validate(config, training=False)
    if config.data.label_space != stored.data.label_space:
        raise ConfigError(
            f"data.label_space: expected {stored.data.label_space}, that of the runs, got {config.data.label_space}"
        )
    return config


def prepare_out(out: str | None, places: list[Path]) -> Path:
    """The file to write, in a folder that is there and can be written to.

    Args:
        out: a file that ends in ``.html``, or a folder; None: ``report.html`` in the run, or beside the runs.
        places: of the runs (``config.runs.run_place``).

    Raises:
        ConfigError: the folder cannot be made, or nothing can be written there.
    """
    path = Path(out).expanduser() if out else common_folder([p if p.is_dir() else p.parent for p in places])
    file = path / FILE_NAME if path.is_dir() or path.suffix.lower() not in (".html", ".htm") else path
    check_writable(file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


if __name__ == "__main__":
    run_main(main)
