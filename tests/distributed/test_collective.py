"""The sum over ranks, its derivatives, and what a rank knows about the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pmm_fast.engine.distributed import Ranks
from pmm_fast.ops.collective import count_ranks, sum_over_ranks
from tests.distributed.ranks import launch, run_ranks


def differentiate(x: torch.Tensor, group: str, weight: float) -> list[torch.Tensor]:
    """y = S(x), L = sum_r w_r sum y^3, its gradient g, and the gradient of sum_r w_r sum g^2."""
    y = sum_over_ranks(x, group)
    (first,) = torch.autograd.grad(weight * (y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(weight * (first**2).sum(), x)
    return [y.detach(), first.detach(), second]


def use_collective(group: str, rank: int) -> dict[str, Any]:
    x = (torch.arange(6.0, dtype=torch.float64).view(2, 3) + rank).T.requires_grad_()
    torch.library.opcheck(torch.ops.pmm_fast.sum_over_ranks, (x, group))
    found: dict[str, Any] = {"eager": differentiate(x, group, rank + 1.0), "x": x.detach()}
    for mode in ("real", "fake"):
        found[mode] = make_fx(lambda x: differentiate(x, group, rank + 1.0), tracing_mode=mode)(x)(x)
    found["integers"] = sum_over_ranks(torch.tensor([rank, 7]), group)
    found["count"] = count_ranks(group)
    return found


def test_sum_and_its_derivatives(tmp_path: Path) -> None:
    ranks = run_ranks(use_collective, 2, tmp_path)
    y = ranks[0]["x"] + ranks[1]["x"]
    # the weights add up to 3, and what reaches g on each rank is summed again: g = 9 y^2, dg/dy = 18 y
    expected = [y, 9 * y**2, 3 * 2 * 9 * y**2 * 18 * y]
    for rank, found in enumerate(ranks):
        for way in ("eager", "real", "fake"):
            for value, wanted in zip(found[way], expected, strict=True):
                assert torch.equal(value, wanted), way
        assert torch.equal(found["x"], (torch.arange(6.0, dtype=torch.float64).view(2, 3) + rank).T)
        assert found["integers"].tolist() == [1, 14] and found["count"] == 2


def use_ranks(group: str, rank: int, folder: Path) -> str | None:
    ranks = Ranks(rank, 3, rank, group)
    with ranks.first_alone():
        made = folder / "made"
        if rank == 0:
            made.touch()
        assert made.exists()
    state = {"a": torch.arange(5.0), "b": torch.tensor(3)}
    ranks.check_equal(state, "the model")
    if rank == 2:
        # by one bit, and of a value that compares as equal
        state["a"][0] = -0.0
    try:
        ranks.check_equal(state, "the model")
    except ValueError as error:
        return str(error)
    return None


def test_ranks_wait_for_the_first_and_compare_their_bits(tmp_path: Path) -> None:
    assert run_ranks(use_ranks, 3, tmp_path, tmp_path) == ["the model differs from that of rank 0 on rank 2"] * 3


def test_a_process_alone_needs_no_others() -> None:
    alone = Ranks()
    alone.barrier()
    with alone.first_alone():
        alone.check_equal({"a": torch.ones(1)}, "the model")
    assert alone.first and alone.device("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    "name, gpus, expected",
    [("auto", 4, "cuda:2"), ("cuda", 4, "cuda:2"), ("cpu", 4, "cpu"), ("auto", 0, "auto")],
)
def test_a_rank_takes_the_device_of_its_number(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert Ranks(6, 8, 2, "group").device(name) == expected
    with pytest.raises(ValueError, match="expected auto, cuda or cpu, got 'cuda:0'"):
        Ranks(6, 8, 2, "group").device("cuda:0")


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"^device: process 2 of this machine has no GPU of its own, it has 2$"):
        Ranks(2, 4, 2, "group").device("auto")


LEAVES_NO_THREAD = """
import os, torch
from pmm_fast.engine import distributed
from pmm_fast.ops.collective import sum_over_ranks

def threads():
    return sorted(open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task"))

with distributed.session() as ranks:
    # this imports what takes the group for a default argument
    sum_over_ranks(torch.zeros(1), ranks.group)
    inside = threads()
print(len([name for name in inside if "gloo" in name]), [name for name in threads() if "gloo" in name])
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
def test_a_session_leaves_no_thread_behind() -> None:
    # a thread that frees a tensor while the interpreter ends aborts the process
    ((code, out, err),) = launch(1, "-c", LEAVES_NO_THREAD)
    assert code == 0, err
    count, left = out.split(maxsplit=1)
    assert int(count) > 0 and left.strip() == "[]"
