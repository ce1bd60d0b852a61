"""Ranks with a part of the batch each take the step of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pmm_fast import meta
from pmm_fast.models.batchnorm import BatchNorm2d
from tests.distributed.ranks import run_ranks
from tests.meta.tiny import CHANNELS, TinySegmentor, tiny_batch, tiny_noise
from tests.tolerances import EXACT, relative_error

# images of each rank: none of them as many labelled pixels as another, the last of three without any
PARTS = {2: (2, 2), 3: (2, 1, 1)}
CASES = [
    *(("pinmem", order, scale) for order in (1, 2) for scale in (1.0, 64.0)),
    *(("mldg", order, 1.0) for order in (1, 2)),
    ("memory-agg", 2, 1.0),
    ("agg", 2, 1.0),
]


def whole_batch(seed: int, ignored: bool) -> meta.Batch:
    batch = tiny_batch(seed, images=4)
    batch.labels[0, :7] = 255
    batch.labels[3] = 255
    batch.labels[2, :, :3] = 255
    return batch._replace(labels=torch.full_like(batch.labels, 255)) if ignored else batch


def network(mode: str) -> torch.nn.Module:
    model = TinySegmentor(memory=mode in meta.MEMORY_MODES)
    model.encoder.bn = BatchNorm2d(CHANNELS).double()
    return model


def compute(mode: str, order: int, scale: float, group: str | None, images: slice, ignored: bool = False) -> Any:
    """All that the functions of ``meta`` return, for a part of the batch."""
    model = network(mode)
    params, buffers, memory = meta.split_state(model)
    mtr, mte = (meta.Batch(*(x[images] for x in whole_batch(seed, ignored))) for seed in (1, 2))
    noise = meta.Noise(tiny_noise(3, 4)[images], tiny_noise(4, 4)[images])
    hyper = meta.Hyper(
        meta.Network(model, group), mode, order=order, inner_lr=0.5, cohesion_weight=0.3, loss_scale=scale
    )
    result = meta.step(params, buffers, memory, mtr, mte if mode in meta.META_MODES else None, noise, hyper)
    found = {"losses": result.losses, "grads": result.grads, "buffers": result.buffers}
    found["read"] = meta.read_losses(params, buffers, memory, mtr, hyper)
    if memory is not None:
        first, mass = meta.initialise_memory(params, buffers, [mtr, mte], memory, hyper)
        again = meta.rewrite_memory(params, result.buffers, memory, [mtr, mte], hyper)
        found["memory"] = {"step": result.memory, "first": first, "mass": mass, "again": again}
    return found


def compute_part(group: str, rank: int, parts: tuple[int, ...]) -> Any:
    images = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    found = {case: compute(*case, group, images) for case in CASES}
    return found | {"ignored": compute("pinmem", 2, 1.0, group, images, ignored=True)}


@pytest.fixture(scope="module", params=PARTS, ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run_ranks(compute_part, request.param, folder, PARTS[request.param])


def assert_equal(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for kind, values in expected.items():
        assert found[kind].keys() == values.keys()
        for name, value in values.items():
            # what is zero but for rounding has no relative error
            negligible = max(value.abs().max(), found[kind][name].abs().max()) < 1e-12
            assert negligible or relative_error(found[kind][name], value) < EXACT, (kind, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_equal_one_process(ranks: list[Any], case: tuple[str, int, float]) -> None:
    expected = compute(*case, None, slice(None))
    for rank in ranks:
        assert_equal(rank[case], expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_have_the_same_bits(ranks: list[Any], case: tuple[str, int, float]) -> None:
    for rank in ranks[1:]:
        for kind, values in ranks[0][case].items():
            assert all(torch.equal(rank[case][kind][name], value) for name, value in values.items()), kind


def test_the_orders_differ(ranks: list[Any]) -> None:
    first, second = (ranks[0]["pinmem", order, 1.0]["grads"]["encoder.conv.weight"] for order in (1, 2))
    assert relative_error(second, first) > 1e-3


def test_nothing_labelled_anywhere(ranks: list[Any]) -> None:
    expected = compute("pinmem", 2, 1.0, None, slice(None), ignored=True)
    assert expected["losses"]["train/seg"] == 0
    for rank in ranks:
        assert_equal(rank["ignored"], expected)
