"""bench/performance.py: the documents say what the records say, and would for a GPU's record, which is made up here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from bench import cases as C
from bench import performance, performance_page, report, step_report
from bench import performance_text as text
from bench.harness import Rates
from bench.records import read_machines
from tests import repository

CPU = "cpu-2-cores-amd-epyc"
GPU = "Pretend GPU 9000"
RATES = Rates(bandwidth=2e12, exponentials=4e12, products=30e12)
# times the floor; the released chain in seconds
FACTORS = {"cuda": 1.25, "triton": 1.5, "reference": 20.0, "released": 40.0}
VERSIONS = {"device": GPU, "torch": "2.11.0+cu130", "triton": "3.6.0", "commit": "abcdef123456", "threads": 16}


def operator_rows(**changed):
    """Rows of memory_ops at fixed multiples of the floor; ``changed``: "backend" -> (op, factor) instead."""
    rows = []
    for case in C.all_cases():
        if case.size.split("/")[0] not in ("paper", "fill"):
            continue
        for backend, factor in FACTORS.items():
            if backend == "released" and (case.dtype != "float32" or case.size.startswith("fill")):
                continue
            if backend in changed and changed[backend][0] == case.op:
                factor = changed[backend][1]
            for which in C.PASSES:
                ms = 1e3 * factor * report.floor_seconds(C.work(case, which), RATES)
                row = {"op": case.op, "size": case.size, "dtype": case.dtype, "backend": backend, "pass": which}
                row |= {"median_ms": ms, "p20_ms": 0.99 * ms, "p80_ms": 1.01 * ms, "extra_peak_bytes": 10**6}
                moved = C.work(case, which).moved
                row |= {"bytes_moved": moved, "bandwidth_share": moved / ms * 1e3 / RATES.bandwidth}
                rows.append(row | dict.fromkeys(("ratio_released", "ratio_reference", "ratio_compiled")) | VERSIONS)
    return rows


def step_rows():
    """Rows of meta_step: order 2 in bf16, compiled, is 6 times as fast as released and takes 1.5 times order 1."""
    seconds = {"released": 1.2, "released_no_anomaly": 0.5, "order1": 0.4, "order2": 0.7, "order2_bf16": 0.3}
    seconds |= {"order1_bf16_compiled": 0.2 / 1.5, "order2_bf16_compiled": 0.2}
    rows = []
    for name, took in seconds.items():
        row = {"variant": name, "order": 2 if "order2" in name else 1, "dtype": "bf16" if "bf16" in name else "float32"}
        row |= {"compiled": "compiled" in name, "checkpointed": False, "images_per_s": 8 / took, "repeats": 6}
        row |= {
            "seconds_per_step": took,
            "p20_s": took,
            "p80_s": took,
            "kept_bytes": 10**9,
            "split_s": {"forward": took},
        }
        row |= {"peak_bytes": 40e9 if name.startswith("released") else 15e9}
        row |= {"ratio_released": 1.2 / took, "ratio_released_no_anomaly": 0.5 / took, "compile_seconds": None}
        row |= {"multiply_adds_millions": 9e6 if "order2" in name else 5e6, "tf32": True, "engine": "cuda-graph"}
        row |= {"architecture": "deeplabv3plus_resnet50", "crop": [768, 768], "images_a_domain": 4}
        rows.append(row | VERSIONS)
    return rows


def gpu_record(**parts):
    """A file of bench/gpu_check.py."""
    record = VERSIONS | {"memory": 80e9, "capability": "9.0", "cuda": "13.0", "python": "3.12.3", "date": "2000-01-01"}
    record["steps"] = [
        {"name": "build", "status": "ok", "seconds": 60.0, "output": ""},
        {"name": "evaluation", "status": "out of time", "seconds": 60.0, "output": ""},
    ]
    record["rates"] = RATES.facts() | {"bf16_flops_per_s": 7e14}
    return record | parts


@pytest.fixture
def root(tmp_path):
    """The documents with the records of one CPU, in a folder that may be changed."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/performance.md"):
        shutil.copy(repository.ROOT / name, tmp_path / name)
    for pattern in (f"bench/results/*{CPU}.json", f"docs/images/*-{CPU}.png"):
        for path in repository.ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(repository.ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    # whatever else has been measured since
    performance.update(tmp_path, check=False)
    return tmp_path


def add(root, record, name="pretend-gpu-9000.json"):
    (root / "bench/results" / name).write_text(json.dumps(record))


def regions(path):
    """The written parts of a document, by name."""
    return {match[2]: match[3] for match in performance.REGION.finditer(path.read_text())}


def cells(region, *beginning):
    """The cells of the one row of a region that begins like this."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in region.splitlines() if line.startswith("|")]
    (found,) = [row for row in rows if row[: len(beginning)] == list(beginning)]
    return found[len(beginning) :]


def just_measured():
    """Records that are not committed as they are; a copied tree without git has none."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "status", "--porcelain", "bench/results"]
    return subprocess.run(command, cwd=repository.ROOT, capture_output=True, text=True).stdout.strip()


def test_documents_and_pictures_say_what_the_records_say():
    stale = performance.update(repository.ROOT, check=True)
    # `make gpu-check` writes its record and then runs the tests
    if stale and (new := just_measured()):
        pytest.skip(f"make performance is still to bring into the documents: {new}")
    assert stale == []


def test_figures_of_a_record_reach_the_documents(root):
    readme = regions(root / "README.md")
    path = root / f"bench/results/meta-step-{CPU}.json"
    rows = json.loads(path.read_text())
    next(row for row in rows if row["variant"] == "order2")["seconds_per_step"] = 12.345
    path.write_text(json.dumps(rows))
    picture = f"docs/images/step-{CPU}.png"
    before = (root / "README.md").read_text()
    assert performance.update(root, check=True) == ["docs/performance.md", "README.md", picture]
    # looking changes nothing
    assert (root / "README.md").read_text() == before
    assert performance.update(root, check=False) == ["docs/performance.md", "README.md", picture]
    assert performance.update(root, check=True) == []
    assert cells(regions(root / "README.md")["step"], "order 2, the exact gradient")[0] == "12.3"
    assert {name for name, old in readme.items() if regions(root / "README.md")[name] != old} == {"step"}


def test_a_figure_typed_by_hand_is_noticed(root):
    path = root / "docs/performance.md"
    path.write_text(re.sub(r"\d+ of (\d+) met", r"\1 of \1 met", path.read_text()))
    assert performance.update(root, check=True) == ["docs/performance.md"]


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are left out."""
    monkeypatch.setattr(performance, "pictures", lambda machines, folder: [])


def test_a_gpu_becomes_the_headline(root, undrawn):
    add(root, gpu_record(memory_ops=operator_rows(), meta_step=step_rows()))
    performance.update(root, check=False)
    readme, page = regions(root / "README.md"), regions(root / "docs/performance.md")
    assert GPU in readme["step"] and "4 images of 768 x 768" in readme["step"] and "CUDA graph" in readme["step"]
    assert cells(readme["step"], "order 2, bf16, compiled") == ["0.200", "40.0", "**6.00**", "2.50", "15.0 GB"]
    assert "1.80 times the multiply-adds" in readme["step"] and "1.50 (bf16, compiled)" in readme["step"]
    # 1.25 and 40 times 18.97 MB over 2 TB/s
    ours, released, times, _ = cells(readme["operators"], "`masked_average_pool`")
    assert ours.startswith("12 / ") and ours.endswith("µs") and released.startswith("0.38 / ") and times == "32 / 32"
    assert "Other machines" in readme["step"] and "Other machines" not in readme["loading"]
    # what was not measured on the GPU is still the CPU's
    assert "AMD EPYC" in readme["loading"] and "AMD EPYC" in readme["evaluation"]
    assert page["results"].index(GPU) < page["results"].index("AMD EPYC")
    assert "700 TFLOP/s" in page["results"] and "2.00 TB/s" in page["results"]
    _, _, share, floor, *_ = cells(page["results"], "`masked_average_pool`", "fill")
    assert share == floor == "80 % / 80 % / 80 %"
    assert "**Not so: evaluation (out of time).**" in page["results"]
    assert "Not measured here: loading, testing, colours and blur." in page["results"]
    assert "2000-01-01" in page["machines"] and "abcdef123456" in page["machines"]


def test_smaller_parts_of_a_gpu_record(root, undrawn):
    training = {"iterations": 60, "seconds": 41.0, "first_loss": 3.1, "last_loss": 1.9, "miou": {"noon": 20.0}}
    looks = [{"backend": "cuda", "side": 768, "look": "blur", "ms_per_image": 0.02} | VERSIONS]
    problems = ["memory_ops, row 3: p20_ms is missing"]
    add(root, gpu_record(training={"amp": training}, photometric=looks, problems=problems))
    performance.update(root, check=False)
    results = regions(root / "docs/performance.md")["results"].split("### AMD")[0]
    assert cells(results, "amp") == ["60", "41.0", "3.10 / 1.90", "noon 20.0"]
    assert cells(results, "cuda") == ["20.0 µs"] and "* memory_ops, row 3: p20_ms is missing" in results


def test_targets_of_a_gpu(root, undrawn):
    add(root, gpu_record(memory_ops=operator_rows(cuda=("memory_read", 1.5)), meta_step=step_rows()))
    performance.update(root, check=False)
    targets = regions(root / "docs/performance.md")["targets"].split("### AMD")[0]
    assert "not measured" not in targets
    assert cells(targets, "`masked_average_pool`, paper, fwd: times faster than released") == [
        "at least 20",
        "32.0",
        "met",
    ]
    share = "fill, fwd: share of the copy bandwidth"
    assert cells(targets, f"`masked_average_pool`, {share}") == ["at least 75 %", "80 %", "met"]
    assert cells(targets, f"`memory_read`, {share}") == ["at least 75 %", "67 %", "**missed**"]
    compiled = "`order2_bf16_compiled`: "
    assert cells(targets, f"{compiled}times faster than `released`") == ["at least 5", "6.00", "met"]
    assert cells(targets, f"{compiled}times faster than `released_no_anomaly`") == ["at least 3", "2.50", "**missed**"]
    assert cells(targets, f"{compiled}peak memory, share of `released`") == ["at most 50 %", "38 %", "met"]
    count = len(report.TARGETS_GPU) + len(step_report.TARGETS_GPU)
    assert targets.count("| met |") + targets.count("| **missed** |") + targets.count("| - | - |") == count


def test_predictions_stand_beside_what_was_measured(root, undrawn):
    region = regions(root / "docs/performance.md")["gpu"]
    assert "Nothing was measured on a GPU yet" in region
    row = cells(region, "`masked_average_pool`", "paper")
    # 18.97 MB over 3.35 TB/s
    assert row[0].startswith("19.0 /") and row[1].startswith("5.66 /") and len(row) == 4
    add(root, gpu_record(memory_ops=operator_rows()))
    performance.update(root, check=False)
    region = regions(root / "docs/performance.md")["gpu"]
    assert "Nothing was measured" not in region
    assert cells(region, "`masked_average_pool`", "paper")[:4] == row
    assert cells(region, "`masked_average_pool`", "paper")[4].startswith("11.9 /")


def test_the_slower_backend_is_named(root, undrawn, capsys):
    faster = operator_rows(triton=("upsample_cross_entropy", 1.0))
    add(root, gpu_record(memory_ops=faster))
    performance.update(root, check=False)
    region = regions(root / "docs/performance.md")["backends"]
    assert cells(region, "`masked_average_pool`", "paper")[-2:] == ["cuda", "fastest, 1.20 times"]
    assert cells(region, "`upsample_cross_entropy`, 48 to 768", "paper")[-2:] == [
        "cuda",
        "**triton is 1.25 times as fast**",
    ]
    said = capsys.readouterr().out.splitlines()
    losses = [
        case for case in C.all_cases() if case.op == "upsample_cross_entropy" and case.size[:4] in ("pape", "fill")
    ]
    assert len(said) == len(losses) and "dispatch takes cuda, but triton is 1.25 times as fast" in said[0]


def test_backends_within_their_spread_are_alike(root):
    add(root, gpu_record(memory_ops=operator_rows(triton=("memory_read", 1.24))))
    machine = read_machines(root / "bench/results")[0]
    operators = text.Operators(machine)
    case = next(case for case in operators.cases if case.op == "memory_read")
    assert performance_page.verdict(operators, case) == "as fast as triton within the spread"
    assert performance_page.disagreements([machine]) == []


def test_a_record_of_the_ceilings_alone(root, undrawn):
    add(root, gpu_record())
    performance.update(root, check=False)
    page, readme = regions(root / "docs/performance.md"), regions(root / "README.md")
    assert "700 TFLOP/s" in page["results"] and "operators, one training iteration" in page["results"]
    assert f"### {GPU}\n" in page["targets"] and "Nothing was measured on a GPU yet" in page["gpu"]
    assert "AMD EPYC" in readme["operators"] and GPU not in readme["operators"]


def test_no_record_at_all(root, undrawn):
    shutil.rmtree(root / "bench/results")
    performance.update(root, check=False)
    assert all("Not measured yet." in region for region in regions(root / "README.md").values())


def test_pictures_of_a_gpu_are_drawn_once(root):
    add(root, gpu_record(memory_ops=operator_rows()))
    stale = performance.update(root, check=False)
    assert "docs/images/roofline-pretend-gpu-9000.png" in stale
    assert (root / "docs/images/roofline-pretend-gpu-9000.png").stat().st_size > 20000
    assert performance.update(root, check=False) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "bad.json: not JSON"),
        ("[]", "bad.json: no record"),
        ('[{"op": 1}]', "bad.json: no record"),
        (json.dumps({"device": "x", "rehearsal": True}), "bad.json: a rehearsal"),
    ],
)
def test_what_is_no_record_is_named(root, monkeypatch, content, message):
    (root / "bench/results/bad.json").write_text(content)
    monkeypatch.setattr(performance, "ROOT", root)
    with pytest.raises(SystemExit, match=message):
        performance.main(["--check"])


def test_an_unknown_case_is_named(root):
    rows = operator_rows()[:1]
    rows[0]["size"] = "huge"
    add(root, gpu_record(memory_ops=rows))
    with pytest.raises(ValueError, match="knows no masked_average_pool huge"):
        performance.update(root, check=True)


def test_a_lost_region_is_an_error(root):
    path = root / "README.md"
    path.write_text(path.read_text().replace("<!-- performance: step -->", ""))
    with pytest.raises(ValueError, match=r"README\.md: expected the regions .* got evaluation, loading, operators"):
        performance.update(root, check=True)


def test_the_command_says_what_differs(root, monkeypatch, capsys):
    monkeypatch.setattr(performance, "ROOT", root)
    with pytest.raises(SystemExit) as ended:
        performance.main(["--check"])
    assert not ended.value.code and capsys.readouterr().out == ""
    path = root / "README.md"
    path.write_text(path.read_text().replace("| order 1 | ", "| order 1 | 0"))
    with pytest.raises(SystemExit) as ended:
        performance.main(["--check"])
    assert ended.value.code == 1 and capsys.readouterr().out.startswith("README.md: differs from the records")


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [(2083.4, 3, "2083"), (99.97, 3, "100"), (0.0213, 3, "0.0213"), (1.0, 3, "1.00"), (9.96, 2, "10"), (None, 3, "-")],
)
def test_numbers(value, digits, expected):
    assert text.number(value, digits) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.868, "0.87"), (9.999, "10.0"), (13.58, "13.6"), (1676.2, "1676"), (0.0123, "0.012")]
)
def test_ratios(value, expected):
    assert text.ratio(value) == expected


def test_durations_and_sizes():
    assert text.durations([0.0213, 0.5, None]) == "21.3 / 500 / - µs"
    assert text.durations([1.2, 1200.0]) == "1.20 / 1200 ms"
    assert text.size_of(1.54e9) == "1540 MB" and text.size_of(17.66e9) == "17.7 GB"
    assert text.rate_of(39.42e9) == "39.4 G" and text.percent(0.0018) == "0.18 %"


def test_paragraphs_are_wrapped_but_not_commands():
    line = "word " * 21 + "`python bench/meta_step.py --preset paper` and the end"
    first, second = performance.wrapped(line).splitlines()
    assert len(first) <= 120 and second.startswith("`python bench/meta_step.py --preset paper` and")
    assert performance.wrapped("| " + "x " * 100) == "| " + "x " * 100
