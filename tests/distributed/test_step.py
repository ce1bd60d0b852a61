"""Ranks with a part of the batch each take the step of one process with the whole batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pmm_fast import meta, ops
from pmm_fast.models import build_model
from pmm_fast.models.batchnorm import BatchNorm2d
from tests.distributed.ranks import run_ranks
from tests.meta.test_whitening import whitened_model
from tests.meta.tiny import CHANNELS, TinySegmentor, tiny_batch, tiny_noise
from tests.tolerances import EXACT, RANKS_BF16, relative_error

# images of each rank: none of them as many labelled pixels as another, the last of three without any
PARTS = {2: (2, 2), 3: (2, 1, 1)}
CASES = [
    *(("pinmem", order, scale) for order in (1, 2) for scale in (1.0, 64.0)),
    *(("mldg", order, 1.0) for order in (1, 2)),
    ("memory-agg", 2, 1.0),
    ("agg", 2, 1.0),
    ("whitened agg", 2, 1.0),
]


def whole_batch(seed: int, ignored: bool) -> meta.Batch:
    batch = tiny_batch(seed, images=4)
    batch.labels[0, :7] = 255
    batch.labels[3] = 255
    batch.labels[2, :, :3] = 255
    return batch._replace(labels=torch.full_like(batch.labels, 255)) if ignored else batch


def network(mode: str) -> torch.nn.Module:
    model = whitened_model() if mode == "whitened agg" else TinySegmentor(memory=mode in meta.MEMORY_MODES)
    model.encoder.bn = BatchNorm2d(CHANNELS).double()
    return model


def compute(mode: str, order: int, scale: float, group: str | None, images: slice, ignored: bool = False) -> Any:
    """All that the functions of ``meta`` return, for a part of the batch."""
    model = network(mode)
    params, buffers, memory = meta.split_state(model)
    mtr, mte = (meta.Batch(*(x[images] for x in whole_batch(seed, ignored))) for seed in (1, 2))
    noise = meta.Noise(tiny_noise(3, 4)[images], tiny_noise(4, 4)[images])
    mode = mode.removeprefix("whitened ")
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
            assert is_equal(found[kind][name], value), (kind, name)


def is_equal(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.double(), expected.double()
    # what is zero but for rounding has no relative error
    negligible = max(expected.abs().max(), found.abs().max()) < 1e-12
    return bool(negligible or relative_error(found, expected) < EXACT)


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


# --- the options of a step ----------------------------------------------------------------------------------------


def compute_checkpointed(group: str | None, images: slice, checkpoint: bool) -> meta.StepResult:
    """A step of order 2 in float64 of a network that has blocks, which synchronise their batch norms."""
    torch.manual_seed(0)
    model = build_model("deeplabv3plus_mobilenet_v2", 5, channels=16, aux_dropout=0.0).double()
    model.memory.slots.copy_(ops.normalize(torch.rand_like(model.memory.slots), 1))
    batches = [
        meta.Batch(
            torch.randn(4, 3, 32, 32, dtype=torch.float64)[images],
            torch.randint(5, (4, 32, 32), dtype=torch.uint8)[images],
        )
        for _ in range(2)
    ]
    hyper = meta.Hyper(meta.Network(model, group, checkpoint), inner_lr=0.01)
    return meta.step(*meta.split_state(model), *batches, meta.Noise(), hyper)


def compute_bf16(group: str | None, images: slice, autocast: torch.dtype | None = torch.bfloat16) -> meta.StepResult:
    model = network("pinmem").float()
    whole = [whole_batch(seed, False) for seed in (1, 2)]
    mtr, mte = (meta.Batch(batch.images[images].float(), batch.labels[images]) for batch in whole)
    noise = meta.Noise(tiny_noise(3, 4)[images].float(), tiny_noise(4, 4)[images].float())
    hyper = meta.Hyper(meta.Network(model, group), inner_lr=0.5, cohesion_weight=0.3, autocast=autocast)
    return meta.step(*meta.split_state(model), mtr, mte, noise, hyper)


def compute_compiled(group: str, images: slice) -> dict[str, Any]:
    """A compiled step on another batch than the one that it was made with, and the eager steps of that."""
    model = network("pinmem")
    noise = meta.Noise(tiny_noise(3, 4)[images], tiny_noise(4, 4)[images])
    hyper = meta.Hyper(meta.Network(model, group), inner_lr=0.5, cohesion_weight=0.3)
    compiled = meta.CompiledStep("graph", strict=True, say=lambda line: None)
    for seed in (1, 7):
        batches = [meta.Batch(*(x[images] for x in whole_batch(seed + part, False))) for part in (0, 1)]
        arguments = (*meta.split_state(model), *batches, noise)
        found = compiled(*arguments, hyper)
    eager = [meta.step(*arguments, replace(hyper, order=order)) for order in (1, 2)]
    results = zip(("compiled", "order 1", "order 2"), (found, *eager), strict=True)
    return {name: result._asdict() for name, result in results} | {"graphs": compiled.graphs}


def compute_options(group: str, rank: int) -> Any:
    images = slice(2 * rank, 2 * rank + 2)
    return {
        "checkpointed": compute_checkpointed(group, images, True)._asdict(),
        "bf16": compute_bf16(group, images)._asdict(),
        "compiled": compute_compiled(group, images),
    }


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(compute_options, 2, tmp_path_factory.mktemp("options"))


def vector(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.double().flatten() for grad in grads.values()])


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return float((vector(found) - vector(expected)).norm() / vector(expected).norm())


@pytest.mark.parametrize("option", ["checkpointed", "bf16"])
def test_options_give_the_same_bits_on_all_ranks(options: list[Any], option: str) -> None:
    first, second = (rank[option] for rank in options)
    assert torch.equal(first["memory"], second["memory"])
    for kind in ("losses", "grads", "buffers"):
        assert all(torch.equal(second[kind][name], value) for name, value in first[kind].items()), kind


def assert_step(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The gradient as one vector: some parameters of a network with batch norm have none but rounding."""
    assert apart(found["grads"], expected["grads"]) < EXACT
    assert is_equal(found["memory"], expected["memory"])
    for kind in ("losses", "buffers"):
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            assert is_equal(found[kind][name], value), (kind, name)


def test_checkpointed_activations_over_ranks(options: list[Any]) -> None:
    """Blocks computed again meet in the same sums: order 2, against one process that keeps everything."""
    expected = compute_checkpointed(None, slice(None), False)
    for rank in options:
        assert_step(rank["checkpointed"], expected._asdict())


def test_bf16_over_ranks(options: list[Any]) -> None:
    expected, exact = compute_bf16(None, slice(None)), compute_bf16(None, slice(None), None)
    for rank in options:
        found = rank["bf16"]
        assert apart(found["grads"], expected.grads) < RANKS_BF16 < apart(found["grads"], exact.grads)
        for name, value in expected.losses.items():
            assert relative_error(found["losses"][name], value) < RANKS_BF16, name


def test_compiled_over_ranks(options: list[Any]) -> None:
    """Two-sided, on a batch that the graph was not made with."""
    for rank in options:
        found = rank["compiled"]
        assert found["graphs"] == 1
        assert_step(found["compiled"], found["order 2"])
        assert apart(found["compiled"]["grads"], found["order 1"]["grads"]) > 1e-3
    first, second = (rank["compiled"]["compiled"]["grads"] for rank in options)
    assert all(torch.equal(second[name], value) for name, value in first.items())
