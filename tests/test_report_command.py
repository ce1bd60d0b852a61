"""``python -m pmm_fast.report``: what stands in the file, with and without what it takes, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pmm_fast import evaluate
from pmm_fast import report as program
from pmm_fast.config import run_main
from pmm_fast.data import DataError, Listing, list_domain
from pmm_fast.data import folder as data_folder
from pmm_fast.engine import report_pictures
from pmm_fast.engine.report import domain_titles
from tests.street_folders import make_domains, train
from tests.tiny_network import fill_memory
from tests.viz.test_report import Tags, parse

SECTIONS = ["Runs", "Scores", "Examples", "Training", "Memory", "Features", "Configuration"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with domains and two short runs, ``agg`` and ``pinmem``, one domain unseen; nothing was tested."""
    root = make_domains(tmp_path_factory.mktemp("report"))
    for mode in ("agg", "pinmem"):
        train(root, root / "runs" / mode, {"meta.mode": mode, "data.unseen": ["gamma"]})
    return root


@pytest.fixture(scope="module")
def tested(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, tested together."""
    root = tmp_path_factory.mktemp("tested")
    shutil.copytree(trained / "runs", root / "runs")
    evaluate.main([str(root / "runs/agg"), str(root / "runs/pinmem"), "--device", "cpu", "--eval.limit", "2"])
    return root


@pytest.fixture(scope="module")
def of_both(tested: Path) -> Tags:
    """The report of both runs, tested."""
    program.main([str(tested / "runs/agg"), str(tested / "runs/pinmem"), "--device", "cpu", "--images", "1"])
    return parse((tested / "runs/report.html").read_text(encoding="utf-8"))


def made(out: Path, *argv: str) -> Tags:
    program.main([*argv, "--out", str(out), "--device", "cpu", "--images", "1"])
    return parse(out.read_text(encoding="utf-8"))


def titles(tags: Tags) -> list[str]:
    """What the navigation leads to."""
    return [attributes["href"] for name, attributes in tags.seen if name == "a"]  # type: ignore[misc]


def alts(tags: Tags) -> list[str]:
    return [attributes["alt"] or "" for name, attributes in tags.seen if name == "img"]


def only(*names: str) -> Callable[..., Listing]:
    """What lists domains, on a machine that has but these."""

    def listing(name: str, *arguments: Any) -> Listing:
        if name not in names:
            raise DataError(f"{name} is not here")
        return list_domain(name, *arguments)

    return listing


def notes(tags: Tags) -> int:
    return sum(attributes.get("class") == "note" for _, attributes in tags.seen)


# --- what it says -------------------------------------------------------------------------------------------------


def test_everything_is_there(of_both: Tags) -> None:
    assert titles(of_both) == [f"#{title.lower()}" for title in SECTIONS]
    assert "agg, no meta-learning" in of_both.text and "pinmem, order 2 (exact)" in of_both.text
    # the one thing that is missing
    assert notes(of_both) == 1 and "agg has no memory (mode agg)." in of_both.text
    # the one difference
    assert "meta.mode" in of_both.text and "Options that differ between agg and pinmem" in of_both.text
    assert "All options of pinmem" in of_both.text and "architecture: deeplabv3plus_mobilenet_v2" in of_both.text


def test_pictures(of_both: Tags) -> None:
    shown = alts(of_both)
    for domain in ("alpha", "beta", "gamma"):
        of_it = [alt for alt in shown if alt.endswith(f" of {domain}")]
        assert sum(alt.startswith("Classes that ") for alt in of_it) == 2
        assert sum(alt.startswith("Where agg and pinmem differ") for alt in of_it) == 1
        # the first six classes: this label space has too few of those that are usually shown
        assert sum(alt.startswith("Where pinmem reads the slot of ") for alt in of_it) == 6
        assert sum(alt == f"Confusion matrix of {run} on {domain}" for alt in shown for run in ("agg", "pinmem")) == 2
    assert sum(alt.startswith("Two-dimensional map") for alt in shown) == 4
    assert sum(alt.startswith("Matrix of the cosines") for alt in shown) == 1
    assert sum(alt.startswith("Losses, ") for alt in shown) == 1
    assert all(shown) and "gamma (unseen)" in of_both.text and "alpha (trained on)" in of_both.text


def test_scores_are_those_of_the_test(of_both: Tags, tested: Path) -> None:
    stored = json.loads((tested / "runs/evaluation/results.json").read_text())["runs"]
    for run in stored.values():
        for domain in run.values():
            assert f"{100 * domain['miou']:.1f}" in of_both.text
    means = [(run["alpha"]["miou"] + run["beta"]["miou"]) / 2 - run["gamma"]["miou"] for run in stored.values()]
    assert all(f"{100 * drop:.1f}" in of_both.text for drop in means)
    assert "Tested under the protocol whole, at most 2 images a domain; results.json of 20" in of_both.text


def test_without_scores_it_says_how_to_make_them(trained: Path, tmp_path: Path) -> None:
    run = str(trained / "runs/pinmem/checkpoint.pt")
    found = made(tmp_path / "alone.html", run)
    assert f"No scores of pinmem; they are made by: python -m pmm_fast.evaluate {run}" in found.text
    assert "mIoU" not in found.text and not any(alt.startswith("Confusion") for alt in alts(found))
    # alone, it is compared with the defaults; and there is nothing to differ from in pictures
    assert "Options that differ between pinmem and the defaults" in found.text
    assert not any("differ from the truth" in alt for alt in alts(found))
    assert titles(found) == [f"#{title.lower()}" for title in SECTIONS] and notes(found) == 1


def test_what_cannot_be_made_is_told_and_the_rest_is_made(
    tested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    shutil.copytree(tested / "runs/pinmem", root / "pinmem")
    shutil.copytree(tested / "runs/evaluation", root / "evaluation")
    (root / "pinmem/metrics.jsonl").unlink()
    os.utime(root / "pinmem/checkpoint.pt", (4e9, 4e9))
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    monkeypatch.setattr(data_folder, "list_domain", only("alpha", "beta"))
    found = made(tmp_path / "out.html", str(root / "pinmem"))
    assert "pinmem has been trained on since it was tested; new scores are made by" in found.text
    assert f"No training log of pinmem: no metrics.jsonl in {root / 'pinmem'}" in found.text
    assert "No t-SNE: t-SNE needs scikit-learn: pip install 'pmm_fast[viz]'" in found.text
    assert found.text.count("No pictures: gamma is not here") == 1
    assert found.text.count("Nothing of gamma: it could not be read or segmented (see Examples).") == 2
    assert sum(alt.endswith(" of beta") and alt.startswith("Classes that ") for alt in alts(found)) == 1


def test_without_matplotlib_there_are_no_curves(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(report_pictures, "_features", lambda *arguments: (_ for _ in ()).throw(ValueError("broken")))
    found = made(tmp_path / "out.html", str(trained / "runs/pinmem"))
    assert "No curves: training curves need matplotlib: pip install 'pmm_fast[viz]'" in found.text
    assert "seconds an iteration" in found.text and "Nothing of gamma: broken" in found.text


def test_too_little_memory_is_told_in_its_place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    excuse = "cpu has too little memory; --eval.tile_batch 1, "
    run = [str(trained / "runs/pinmem"), "--data.sources", "alpha", "--eval.tile_batch", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(report_pictures, "segment", lambda *_, tile_batch: (batches.append(tile_batch), fill_memory()))
        found = made(tmp_path / "out.html", *run)
    assert batches == [3, 3] and found.text.count(f"No pictures: {excuse}") == 2
    for name in ("read_assignment", "collect_features"):
        monkeypatch.setattr(report_pictures, name, fill_memory)
    found = made(tmp_path / "out.html", *run)
    for domain in ("alpha", "gamma"):
        assert f"Nothing of pinmem on {domain}: {excuse}" in found.text
        assert f"Nothing of {domain}: {excuse}" in found.text
    assert titles(found) == [f"#{title.lower()}" for title in SECTIONS]


def test_it_is_written_beside_the_runs_or_where_it_is_asked(tmp_path: Path) -> None:
    places = [tmp_path / "runs/agg", tmp_path / "runs/pinmem"]
    for place in places:
        place.mkdir(parents=True)
    assert program.prepare_out(None, places[:1]) == places[0] / "report.html"
    assert program.prepare_out(None, places) == tmp_path / "runs/report.html"
    assert program.prepare_out(None, [tmp_path / "runs/best"]) == tmp_path / "runs/report.html"
    assert program.prepare_out(str(tmp_path / "new/name.HTML"), places) == tmp_path / "new/name.HTML"
    assert program.prepare_out(str(tmp_path / "new.er"), places) == tmp_path / "new.er/report.html"
    assert [path.name for path in (tmp_path / "new").iterdir()] == []


def test_domains_have_short_names() -> None:
    assert domain_titles(["/a/town", "/b/town", "gtav", "/a/town/"]) == {
        "/a/town": "a/town",
        "/b/town": "b/town",
        "gtav": "gtav",
        "/a/town/": "a/town",
    }
    # two that would have one name keep theirs
    assert domain_titles(["/a/town", "town"]) == {"/a/town": "/a/town", "town": "town"}


# --- what is refused ----------------------------------------------------------------------------------------------


def no_run(folder: Path) -> Path:
    folder.mkdir()
    return folder


def no_checkpoint(folder: Path) -> Path:
    (folder.with_suffix(".pt")).write_text("nothing")
    return folder.with_suffix(".pt")


def no_configuration(folder: Path) -> Path:
    from pmm_fast.engine import checkpoint
    from pmm_fast.models import build_model

    checkpoint.save(build_model("deeplabv3plus_mobilenet_v2", 7, channels=8), folder / "checkpoint.pt")
    return folder


def other_classes(folder: Path) -> Path:
    from pmm_fast.config import Config
    from pmm_fast.engine import checkpoint
    from pmm_fast.models import build_model

    checkpoint.save(build_model("deeplabv3plus_mobilenet_v2", 19, channels=8), folder / "checkpoint.pt", Config())
    return folder


@pytest.mark.parametrize(
    "make, options, expected",
    [
        (no_run, "", "other/checkpoint.pt: no such checkpoint"),
        (no_checkpoint, "", "other.pt: no checkpoint, or damaged or cut off"),
        (no_configuration, "", "other: holds no configuration; a report is about runs of python -m pmm_fast.train"),
        (
            other_classes,
            "",
            "other: trained for the label space cityscapes19, but RUN for idd_lite7; a report is about",
        ),
        (lambda folder: folder.parent / "run.gone", "", "run.gone: no such checkpoint"),
        (None, "--data.unseen nowhere", "unknown domain 'nowhere'"),
        (None, "RUN/checkpoint.pt", "a run is given twice: RUN, RUN/checkpoint.pt"),
        (None, "--images 0", "command line: --images: expected a whole number from 1, got '0'"),
        (None, "--images two", "command line: --images: expected a whole number from 1, got 'two'"),
        (None, "--data.label_space camvid11", "data.label_space: expected idd_lite7, that of the runs, got camvid11"),
        (None, "--imags 2", "command line: unknown option --imags; did you mean --images? (see --help)"),
        (None, "--protocol hole", "eval.protocol: expected one of whole, "),
        (None, "--device gpu", "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (None, "--out RUN/checkpoint.pt/x.html", "--out: RUN/checkpoint.pt cannot be written: Not a directory"),
        # nobody may write there, not even root
        (None, "--out /proc/report.html", "--out: /proc cannot be written: "),
    ],
)
def test_mistakes(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Path] | None,
    options: str,
    expected: str,
) -> None:
    from pmm_fast.engine import report

    def worked(*arguments: Any) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr(report, "look_at", worked)
    run, out = str(trained / "runs/agg"), tmp_path / "out.html"
    more = [str(make(tmp_path / "other"))] if make else []
    argv = [run, *more, *options.replace("RUN", run).split()]
    argv += [] if "--out" in argv else ["--out", str(out)]
    with pytest.raises(SystemExit) as caught:
        run_main(program.main, argv)
    told, err = capsys.readouterr()
    assert caught.value.code == 2 and told == "" and err.startswith("error: ") and err.count("\n") == 1
    assert expected.replace("RUN", run) in err
    assert not out.exists()


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'PIL'))); from pmm_fast import report; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}report.main(['--help'])"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "--images N" in done.stdout and "--data.unseen" in done.stdout, done.stderr
