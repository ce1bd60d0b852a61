"""``python -m pmm_fast.train`` as several processes: the run of one, whole or not at all, and one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pmm_fast import train
from pmm_fast.engine import checkpoint
from tests.distributed.ranks import ALIKE, TIMEOUT, launch
from tests.street_folders import SIZE, SPACE, log_lines, make_domain
from tests.tolerances import RANKS, relative_error

Result = list[tuple[int, str, str]]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("domains")
    return [str(make_domain(root / name, seed)) for seed, name in enumerate(("alpha", "beta"))]


def arguments(roots: list[str], out: Path, iterations: int, *more: str) -> list[str]:
    """A run without what is drawn per rank."""
    text = (
        f"--data.unseen --data.label_space {SPACE} --data.crop {SIZE[0]} {SIZE[1]} --data.batch_per_domain 4 "
        "--data.workers 0 --loader torch --model.channels 8 --model.weights none --model.aux_dropout 0 "
        f"--no-memory.gumbel --memory.init_iterations 1 --optim.lr 1e-4 --optim.horizon 100 --device cpu --log_every 1 "
        f"--iterations {iterations}"
    )
    return ["--data.sources", *roots, *text.split(), "--out", str(out), *more]


def torchrun(*argv: str) -> str:
    """What the command prints as two processes under the real torchrun."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pmm_fast.train"]
    environment = {**os.environ, **ALIKE}
    done = subprocess.run(
        [sys.executable, *run, *argv], capture_output=True, text=True, env=environment, timeout=2 * TIMEOUT.seconds
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("source ") == 2 and "2 processes, the first on cpu" in done.stderr
    return done.stdout


@pytest.mark.slow
def test_torchrun_trains_like_one_process(roots: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(arguments(roots, one, 1))
    assert torchrun(*arguments(roots, two, 1)) == f"{two}: trained; test it with  python -m pmm_fast.evaluate {two}\n"
    assert sorted(os.listdir(two)) == sorted(os.listdir(one))
    (found,), (expected,) = log_lines(two), log_lines(one)
    assert found["losses"] == pytest.approx(expected["losses"], rel=RANKS[torch.float32])


def run_double(size: int, *argv: str) -> None:
    for code, _, err in launch(size, "-m", "tests.distributed.altered", "double", *argv):
        assert code == 0, err


@pytest.mark.slow
def test_another_number_of_processes_continues_the_run(roots: list[str], tmp_path: Path) -> None:
    straight, one, two = tmp_path / "straight", tmp_path / "one", tmp_path / "two"
    run_double(1, *arguments(roots, straight, 3))
    run_double(1, *arguments(roots, one, 1))
    run_double(2, *arguments(roots, one, 3, "--resume"))
    run_double(2, *arguments(roots, two, 1))
    run_double(1, *arguments(roots, two, 3, "--resume"))
    expected, wanted = log_lines(straight), checkpoint.read(straight)
    # far enough that another gradient would be noticed
    assert expected[0]["losses"]["train/seg"] != pytest.approx(expected[2]["losses"]["train/seg"], rel=1e-3)
    for folder in (one, two):
        for line, other in zip(log_lines(folder), expected, strict=True):
            assert line["losses"] == pytest.approx(other["losses"], rel=RANKS[torch.float64])
            assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=RANKS[torch.float64])
        found = checkpoint.read(folder)
        for name, value in wanted["model"]["state"].items():
            # a bias before a batch norm moves by rounding alone
            if value.abs().max() > 1e-12:
                assert relative_error(found["model"]["state"][name], value) < RANKS[torch.float64], name


def errors(told: Result) -> list[str]:
    """The error messages of processes that have all failed without a traceback."""
    assert all(code != 0 for code, _, _ in told) and not any(out for _, out, _ in told), told
    assert not any("Traceback" in err for _, _, err in told), told
    return [line for _, _, err in told for line in err.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, expected",
    [
        ("user", "error: rank 1: image.png: cannot be read"),
        ("killed", "error: rank 0: another rank is gone or does not answer"),
        ("nan", ": iteration 2: loss or gradient is not finite, from domain "),
        ("drift", ": iteration 2: the model differs from that of rank 0 on rank 1"),
    ],
)
def test_one_failing_ends_all_with_one_message(roots: list[str], tmp_path: Path, kind: str, expected: str) -> None:
    argv = arguments(roots, tmp_path, 3, "--checkpoint_every", "2")
    (message,) = errors(launch(2, "-m", "tests.distributed.altered", kind, *argv))
    assert expected in message
    if kind == "nan":
        assert f"from domain {roots[0]};" in message
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_bug_on_one_rank_is_shown_once(roots: list[str], tmp_path: Path) -> None:
    (first, _, silent), (second, _, err) = launch(
        2, "-m", "tests.distributed.altered", "bug", *arguments(roots, tmp_path, 3)
    )
    assert first and second
    assert "Traceback" not in silent and err.endswith("[rank1]: RuntimeError: no such luck\n")


@pytest.mark.parametrize(
    "more, expected",
    [
        ("--data.batch_per_domain 3", "data.batch_per_domain: expected a multiple of 2, the number of processes"),
        ("--optim.lr fast", "command line: optim.lr: expected a number, got 'fast'"),
        ("--device cuda:1", "device: with several processes expected auto, cuda or cpu, got 'cuda:1'"),
        ("--resume", "holds no checkpoint.pt to continue from"),
    ],
)
def test_what_is_wrong_for_all_is_said_once(roots: list[str], tmp_path: Path, more: str, expected: str) -> None:
    argv = arguments(roots, tmp_path / "run", 1, *more.split())
    (message,) = errors(launch(2, "-m", "pmm_fast.train", *argv))
    assert message.startswith("error: rank ") and expected in message
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
