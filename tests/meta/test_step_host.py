"""What a step must not do: read a value back, widen its labels, copy its parameters, run parts that nothing needs."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pmm_fast import meta, ops
from pmm_fast.meta.network import State
from pmm_fast.models import build_model
from pmm_fast.ops import backends

CLASSES, IMAGES, SIZE = 5, 2, 32
aten = torch.ops.aten
# their result is a number or has a size that the data decides: on a GPU the host would wait for it
READING = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
}
# these read the memory itself, so no operation shows
READING_METHODS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}
COPYING = {aten.clone.default, aten._to_copy.default, aten.copy_.default}
CASES = [
    pytest.param(mode, order, autocast, id=f"{mode}-order {order}-{'float32' if autocast is None else 'bf16'}")
    for mode in ("pinmem", "memory-agg", "mldg", "agg")
    for order in (1, 2)
    for autocast in (None, torch.bfloat16)
]


class Operations(TorchDispatchMode):
    """Calls ``look(operation, arguments, result)`` for every operation, also for those inside the registered ones."""

    def __init__(self, look: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
        super().__init__()
        self.look = look

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operation.namespace == "pmm_fast":
            with self:
                result = OPDEFS[operation.name()]._init_fn(*args, **(kwargs or {}))
        else:
            result = operation(*args, **(kwargs or {}))
        self.look(operation, args, result)
        return result


class Methods(TorchFunctionMode):
    """Refuses the methods that read a tensor without an operation."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert function not in READING_METHODS, f"{function.__name__} reads a value back"
        return function(*args, **(kwargs or {}))


def is_reading(operation: Any, args: tuple[Any, ...]) -> bool:
    """Whether the host waits for the result; an index with a mask does too."""
    masked = operation is aten.index.Tensor and any(
        x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )
    return operation in READING or masked


def refuse_reading(operation: Any, args: tuple[Any, ...], result: Any) -> None:
    assert not is_reading(operation, args), f"{operation} reads a value back"


class CountingNetwork(meta.Network):
    """Counts the calls of each part."""

    calls: Counter[str]

    def __call__(self, name: str, params: State, buffers: State, *inputs: Any, training: bool = True) -> Any:
        self.calls[name] += 1
        return super().__call__(name, params, buffers, *inputs, training=training)


def problem(mode: str = "pinmem", order: int = 1, autocast: torch.dtype | None = None) -> tuple[list[Any], meta.Hyper]:
    """A step of a real network, small, with all that training gives it."""
    torch.manual_seed(0)
    model = build_model("deeplabv3plus_mobilenet_v2", CLASSES, channels=16, memory=mode in meta.MEMORY_MODES)
    params, buffers, memory = meta.split_state(model)
    if memory is not None:
        memory.copy_(ops.normalize(torch.rand_like(memory), 1))
    mtr, mte = (
        meta.Batch(torch.randn(IMAGES, 3, SIZE, SIZE), torch.randint(CLASSES, (IMAGES, SIZE, SIZE), dtype=torch.uint8))
        for _ in range(2)
    )
    mtr.labels[:, :4] = 255
    test = mte if mode in meta.META_MODES else None
    noise = draw_noise(model.aux_head.dropped_channels, mode)
    network = CountingNetwork(model)
    network.calls = Counter()
    return [params, buffers, memory, mtr, test, noise], meta.Hyper(network, mode, order=order, autocast=autocast)


def draw_noise(dropped_channels: int, mode: str) -> meta.Noise:
    sizes = (IMAGES, IMAGES if mode in meta.META_MODES else 0)
    generator = torch.Generator().manual_seed(1)
    return meta.draw_noise(sizes, dropped_channels, 0.1, mode in meta.MEMORY_MODES, generator)


@pytest.fixture(autouse=True)
def fused() -> Any:
    """The fused operators; the reference has a test of its own."""
    if backends.missing("cpu"):
        pytest.skip(backends.missing("cpu"))
    with ops.use_backend("cpu"):
        yield


@pytest.mark.parametrize(("mode", "order", "autocast"), CASES)
def test_a_step_reads_nothing_back(mode: str, order: int, autocast: torch.dtype | None) -> None:
    arguments, hyper = problem(mode, order, autocast)
    with Methods(), Operations(refuse_reading):
        meta.step(*arguments, hyper)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_what_happens_around_a_step_reads_nothing_back(autocast: torch.dtype | None) -> None:
    (params, buffers, memory, mtr, mte, noise), hyper = problem(autocast=autocast)
    with Methods(), Operations(refuse_reading):
        draw_noise(noise.train_keep.shape[1], "pinmem")
        meta.rewrite_memory(params, buffers, memory, [mtr, mte], hyper)
        meta.initialise_memory(params, buffers, [mtr, mte], memory, hyper)
        meta.read_losses(params, buffers, memory, mtr, hyper)


def test_the_reference_reads_labels_alone_and_on_the_cpu_alone() -> None:
    """It checks them there, where nothing waits; kernels check them while they run."""
    found: Counter[str] = Counter()

    def look(operation: Any, args: tuple[Any, ...], result: Any) -> None:
        if is_reading(operation, args):
            frames = [frame.name for frame in traceback.extract_stack() if "pmm_fast" in frame.filename]
            found[frames[-1]] += 1

    arguments, hyper = problem(order=2)
    with ops.use_backend("reference"), Operations(look):
        meta.step(*arguments, hyper)
    assert set(found) == {"check_label_values"}, found


@pytest.mark.parametrize(("mode", "order", "autocast"), CASES)
def test_full_size_labels_stay_bytes(mode: str, order: int, autocast: torch.dtype | None) -> None:
    """Kernels read them as they are; all else sees a few of their pixels."""
    arguments, hyper = problem(mode, order, autocast)
    readers: Counter[str] = Counter()

    def look(operation: Any, args: tuple[Any, ...], result: Any) -> None:
        for value in args:
            if isinstance(value, Tensor) and value.dtype == torch.uint8 and value.shape[1:] == (SIZE, SIZE):
                readers[str(operation)] += 1
        for value in result if isinstance(result, tuple | list) else (result,):
            wide = isinstance(value, Tensor) and value.shape == (IMAGES, SIZE, SIZE) and value.dtype != torch.uint8
            assert not wide, f"{operation} makes {value.dtype} of the size of the labels"

    with Operations(look):
        result = meta.step(*arguments, hyper)
        if result.memory is not None:
            meta.rewrite_memory(*arguments[:2], result.memory, [arguments[3]], hyper)
    other = {name for name in readers if not name.startswith("pmm_fast.")}
    assert readers["pmm_fast.upsample_cross_entropy.default"] and other <= {"aten.index.Tensor"}, readers


@pytest.mark.parametrize(("mode", "order", "autocast"), CASES)
def test_no_copy_of_the_parameters(mode: str, order: int, autocast: torch.dtype | None) -> None:
    """Mixed precision rounds them, which is another type; the adapted ones are a sum, and there once."""
    arguments, hyper = problem(mode, order, autocast)
    params = arguments[0]
    places = {value.untyped_storage().data_ptr(): name for name, value in params.items()}
    sums: Counter[str] = Counter()

    def look(operation: Any, args: tuple[Any, ...], result: Any) -> None:
        own = [x for x in args if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in places]
        for value in own:
            name = places[value.untyped_storage().data_ptr()]
            assert operation not in COPYING or result.dtype != value.dtype, f"{operation} copies {name}"
            sums[name] += operation is aten.add.Tensor

    with Operations(look):
        meta.step(*arguments, hyper)
    assert set(sums.values()) == {int(mode in meta.META_MODES)}


@pytest.mark.parametrize("order", [1, 2])
def test_only_what_is_needed_runs(order: int) -> None:
    arguments, hyper = problem(order=order)
    params, buffers, memory, mtr, *_ = arguments
    calls = hyper.network.calls
    meta.step(*arguments, hyper)
    # encoder: meta-train, memory rewrite, meta-test; the rewrite has neither decoder nor heads nor read
    assert calls == {
        "encoder": 3,
        "memory.writer": 2,
        "memory.fusion": 2,
        "memory.classifier": 1,
        "decoder": 2,
        "aux_head": 2,
    }
    calls.clear()
    meta.rewrite_memory(params, buffers, memory, [mtr], hyper)
    assert calls == {"encoder": 1, "memory.writer": 1}
