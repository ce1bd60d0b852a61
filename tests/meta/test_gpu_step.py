"""The step on a GPU: nothing waits for the host, the numbers are the CPU's, a captured graph is the eager step."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.step_variants import Setup, new_batches, new_model
from pmm_fast import meta, ops
from pmm_fast.meta.agreement import SHARE, compare
from pmm_fast.models import batchnorm, build_model
from tests.meta.tiny import CLASSES, tiny_batch, tiny_noise, tiny_problem
from tests.ops.matrix import GPU_MARKS
from tests.tolerances import AUTOCAST_STEP, COMPILED, DEVICES, EXACT, relative_error

pytestmark = GPU_MARKS
DEVICE, ENGINE = "cuda", "cuda-graph"
SIZE, IMAGES = 64, 2


def moved(value: Any, dtype: torch.dtype | None = None, device: str = DEVICE) -> Any:
    """A nest of dictionaries and tuples on another device, its floating-point tensors in a type."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: moved(item, dtype, device) for key, item in value.items()}
    return None if value is None else type(value)(*(moved(item, dtype, device) for item in value))


def real_problem(
    mode: str = "pinmem",
    dtype: torch.dtype = torch.float32,
    checkpoint: bool = False,
    **options: Any,
) -> tuple[list[Any], meta.Hyper]:
    """A step of a real network, small, with bytes for labels and all noise, on the device."""
    torch.manual_seed(0)
    model = build_model("deeplabv3plus_resnet18", CLASSES, channels=16, memory=mode in meta.MEMORY_MODES)
    state = meta.split_state(model)
    if model.memory is not None:
        model.memory.slots.copy_(ops.normalize(torch.rand_like(model.memory.slots), 1))
    mtr, mte = (
        meta.Batch(torch.randn(IMAGES, 3, SIZE, SIZE), torch.randint(CLASSES, (IMAGES, SIZE, SIZE), dtype=torch.uint8))
        for _ in range(2)
    )
    noise = draw_noise(mode, model.aux_head.dropped_channels, "cpu")
    hyper = meta.Hyper(meta.Network(model, None, checkpoint), mode, inner_lr=0.01, **options)
    test = mte if mode in meta.META_MODES else None
    return [moved(value, dtype) for value in (*state, mtr, test, noise)], hyper


def channels_last(value: Any) -> Any:
    """A nest with its maps and filters in the layout of tensor cores."""
    if isinstance(value, Tensor):
        return value.to(memory_format=torch.channels_last) if value.dim() == 4 else value
    if isinstance(value, dict):
        return {key: channels_last(item) for key, item in value.items()}
    return None if value is None else type(value)(*(channels_last(item) for item in value))


def draw_noise(mode: str, dropped_channels: int, device: str) -> meta.Noise:
    sizes = (IMAGES, IMAGES if mode in meta.META_MODES else 0)
    generator = torch.Generator(device).manual_seed(1)
    return meta.draw_noise(sizes, dropped_channels, 0.1, mode in meta.MEMORY_MODES, generator)


def vector(result: meta.StepResult) -> Tensor:
    return torch.cat([grad.double().flatten().cpu() for grad in result.grads.values()])


def apart(found: meta.StepResult, expected: meta.StepResult) -> float:
    return float((vector(found) - vector(expected)).norm() / vector(expected).norm())


def assert_near(found: meta.StepResult, expected: meta.StepResult, tolerance: float) -> None:
    """Gradient, losses, memory and buffers, wherever they are."""
    assert apart(found, expected) <= tolerance
    pairs = [(found.memory, expected.memory)] if expected.memory is not None else []
    for ours, theirs in ((found.losses, expected.losses), (found.buffers, expected.buffers)):
        assert list(ours) == list(theirs)
        pairs += [(ours[name], value) for name, value in theirs.items()]
    for ours, theirs in pairs:
        assert relative_error(ours.cpu(), theirs.cpu()) <= tolerance


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def full_precision() -> Iterator[None]:
    """float32 without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("mode", ["pinmem", "memory-agg", "mldg", "agg"])
def test_the_host_does_not_wait(mode: str, order: int, autocast: torch.dtype | None) -> None:
    arguments, hyper = real_problem(mode, order=order, autocast=autocast)

    def iteration() -> None:
        params, buffers, memory, mtr, mte, _ = arguments
        noise = draw_noise(mode, 32, DEVICE)
        result = meta.step(params, buffers, memory, mtr, mte, noise, hyper)
        if memory is not None:
            meta.rewrite_memory(params, result.buffers, memory, [mtr], hyper)

    # kernels are compiled and chosen by the first
    iteration()
    with no_waiting():
        iteration()


def test_waiting_is_noticed() -> None:
    value = torch.ones((), device=DEVICE)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.usefixtures("full_precision")
def test_equals_float64_on_the_cpu(order: int, dtype: torch.dtype) -> None:
    *arguments, hyper = tiny_problem(order=order)
    expected = meta.step(*arguments, hyper)
    other = meta.step(*arguments, replace(hyper, order=3 - order))
    found = meta.step(*(moved(value, dtype) for value in arguments), hyper)
    assert all(grad.device.type == DEVICE and grad.dtype == dtype for grad in found.grads.values())
    assert_near(found, expected, DEVICES[dtype])
    assert apart(found, other) > 10 * DEVICES[dtype]


def tiny_call(seed: int, sizes: tuple[int, int]) -> list[Any]:
    """Batches and noise of a layout: the numbers of meta-train and meta-test images."""
    batches = [tiny_batch(seed + part, images) for part, images in enumerate(sizes)]
    noise = meta.Noise(*(tiny_noise(seed + 2 + part, images) for part, images in enumerate(sizes)))
    return [moved(value) for value in (*batches, noise)]


def compare_compiled(rounds: int) -> None:
    """Two layouts in turns, each round with other values: compiled by the first, replayed by the others."""
    *arguments, hyper = tiny_problem()
    params, buffers, memory = (moved(value) for value in arguments[:3])
    compiled = meta.CompiledStep(ENGINE, strict=True, say=lambda line: None)
    earlier: list[tuple[meta.StepResult, meta.StepResult]] = []
    for number in range(rounds):
        for sizes in ((3, 3), (2, 4)):
            # as after an optimiser step: other values, in other places
            params = {name: value * 1.01 for name, value in params.items()}
            call = [params, buffers, memory, *tiny_call(10 * number, sizes), hyper]
            found, expected = compiled(*call), meta.step(*call)
            assert_near(found, expected, COMPILED)
            assert apart(found, meta.step(*call[:-1], replace(hyper, order=1))) > 10 * COMPILED
            earlier.append((found, expected))
    assert compiled.graphs == 2 and compiled.fallback is None
    # a replay writes into no result that was given out before
    for found, expected in earlier:
        assert_near(found, expected, COMPILED)


def test_captured_step_equals_eager_in_two_layouts() -> None:
    compare_compiled(rounds=3)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.usefixtures("full_precision")
def test_captured_step_of_the_published_network(autocast: torch.dtype | None) -> None:
    """Checked by itself from both sides; trained on, each step is near the eager one of order 2 and not of order 1."""
    setup = Setup("deeplabv3plus_resnet50", (SIZE, SIZE), IMAGES, torch.device(DEVICE), channels=64, inner_lr=0.01)
    model = new_model(setup)
    hyper = meta.Hyper(meta.Network(model), inner_lr=setup.inner_lr, autocast=autocast)
    noise = draw_noise("pinmem", model.aux_head.dropped_channels, DEVICE)
    arguments = [*meta.split_state(model), *new_batches(setup), noise]
    if autocast is not None:
        arguments = [channels_last(value) for value in arguments]
    compiled = meta.CompiledStep(ENGINE, strict=True, say=lambda line: None)
    # raises if the check of the first call fails
    result = compiled(*arguments, hyper)
    for _ in range(2):
        # in place, as an optimiser does it: the layout stays
        for name, value in arguments[0].items():
            value.detach().sub_(result.grads[name], alpha=0.01)
        result = compiled(*arguments, hyper)
        expected, again = (meta.step(*arguments, hyper) for _ in range(2))
        first_order = meta.step(*arguments, replace(hyper, order=1))
        agreement = compare(result, expected, first_order, autocast, again)
        assert agreement.failure is None and agreement.told, str(agreement)
        assert abs(agreement.share - 1) < SHARE, str(agreement)
    assert compiled.graphs == 1 and compiled.fallback is None


def test_batch_norm_has_kernels_in_a_step() -> None:
    """Their double backward, eager and in the graph; plain PyTorch agrees."""
    arguments, hyper = real_problem(dtype=torch.float64)
    taken: list[str] = []
    whole = batchnorm.kernels
    with mock.patch.object(batchnorm, "kernels", lambda *names: taken.append(names[0]) or whole(*names)):
        found = meta.step(*arguments, hyper)
    assert set(taken) == {"batch_norm"}
    with ops.use_backend("reference"):
        assert_near(found, meta.step(*arguments, hyper), EXACT)


class Growing(Dataset):
    """Tensors of which no two have one size, so that each needs page-locked memory of its own."""

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(16384 + index)


def test_captured_while_a_loader_pins_its_batches() -> None:
    """Page-locked memory is allocated on another thread while the step is captured and replayed."""
    stop, pinned, errors = threading.Event(), [], []

    def load() -> None:
        try:
            for batch in DataLoader(Growing(), batch_size=None, pin_memory=True):
                # kept, or the next one would be given the same memory
                pinned.append(batch)
                if stop.wait(0.001):
                    return
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        while not pinned and thread.is_alive():
            time.sleep(0.01)
        compare_compiled(rounds=2)
    finally:
        stop.set()
        thread.join()
    assert not errors, errors
    assert pinned and all(batch.is_pinned() for batch in pinned[:3])


@pytest.mark.parametrize("order", [1, 2])
def test_bf16_and_channels_last_are_near_float32(order: int) -> None:
    arguments, hyper = real_problem(order=order)
    exact = vector(meta.step(*arguments, hyper))
    mixed = replace(hyper, autocast=torch.bfloat16)
    result = meta.step(*(channels_last(value) for value in arguments), mixed)
    assert all(grad.dtype == torch.float32 for grad in result.grads.values())
    found = vector(result)
    assert found.isfinite().all()
    assert 1 - torch.nn.functional.cosine_similarity(found, exact, dim=0) < AUTOCAST_STEP
    assert abs(found.norm() / exact.norm() - 1) < AUTOCAST_STEP
    # it was not float32 that ran
    assert (found - exact).norm() > 1e-4 * exact.norm()


@pytest.mark.parametrize("order", [1, 2])
def test_checkpointed_activations(order: int) -> None:
    plain, again = (
        meta.step(*arguments, hyper)
        for arguments, hyper in (real_problem(dtype=torch.float64, checkpoint=c, order=order) for c in (False, True))
    )
    assert_near(again, plain, EXACT)
