"""The same bits each time and for any number of threads; how much memory a call takes; that graphs are freed."""

import gc
import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pmm_fast import ops
from tests.ops import matrix
from tests.ops.matrix import CASES, FEW, pairs

SIZES = {"channels": 40, "classes": 19, "size": (11, 13), "label_size": (50, 61), "dtype": torch.float32}
SMALL = {"channels": 9, "classes": 5, "dtype": torch.float32}
# features of 8.4 MB, logits of 0.6 MB, and 22.4 MB where logits are upsampled
LARGE = {"batch": 2, "channels": 256, "classes": 19, "size": (64, 64), "label_size": (384, 384), "dtype": torch.float32}
# what the cpu backend may take for each thread, in bytes
THREAD_WORKSPACE = 256 * 1024
# the pieces that it cuts a walk over positions into, each with its own sums
CHUNKS = 64


def flattened(results):
    return {(order, key): x.detach() for order, named in results.items() for key, x in named.items()}


@pytest.mark.parametrize(("name", "target"), pairs(interpreted=("pass-values", "loss"), reference=False))
def test_two_runs_are_equal(name, target):
    case = CASES[name]
    arguments = matrix.make(case, target.device, **(SMALL if target.interpreted else SIZES))
    directions = matrix.directions(case, arguments)
    with matrix.on(target, case.operator):
        first, second = (flattened(matrix.orders(case, arguments, *directions)) for _ in range(2))
    assert all(torch.equal(result, second[key]) for key, result in first.items())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [SIZES, SIZES | {"batch": 1, "size": (1, 5)}, SIZES | {"batch": 7, "size": (2, 3)}])
def test_threads_do_not_change_a_bit(name, sizes):
    case = CASES[name]
    arguments = matrix.make(case, **sizes)
    directions = matrix.directions(case, arguments)
    threads, results = torch.get_num_threads(), []
    with matrix.on(matrix.CPU, case.operator):
        try:
            for number in (1, 2, 5):
                torch.set_num_threads(number)
                results.append(flattened(matrix.orders(case, arguments, *directions)))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(result, other[key]) for key, result in results[0].items())


def peak_bytes(function):
    """The most that PyTorch had allocated at one time during a call, beyond what there was, and the call's result."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    total = peak = 0
    for event in events:
        total += event.nbytes()
        peak = max(peak, total)
    return peak, result


def size_of(tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


def workspace(arguments):
    """The most scratch memory beside the results, in bytes: sums of every chunk, or rows between bands of logits."""
    if "logits" in arguments:
        return size_of([arguments["logits"]]) + THREAD_WORKSPACE
    slots, channels, depth = 19, arguments["features"].shape[1], arguments.get("values", torch.empty(0, 256)).shape[1]
    # a second order sums into the keys, the values, the incoming class sums, and their masses
    return CHUNKS * 4 * slots * (2 * channels + depth + 1) + THREAD_WORKSPACE


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FEW)
def test_peak_memory_on_the_cpu(name, one_thread):
    """Each order takes its results and a workspace that grows neither with the features nor with the label map."""
    case = CASES[name]
    arguments = matrix.make(case, **LARGE)
    apply, point = matrix.function(case, arguments)
    incoming, tangents = matrix.directions(case, arguments)
    incoming = [grad.requires_grad_() for grad in incoming]
    with matrix.on(matrix.CPU, case.operator):
        forward, outputs = peak_bytes(lambda: apply(*point))
        backward, grads = peak_bytes(lambda: torch.autograd.grad(outputs, point, incoming, create_graph=True))
        double, second = peak_bytes(lambda: torch.autograd.grad(grads, [*point, *incoming], tangents))
    for order, peak, results in (
        ("forward", forward, outputs),
        ("backward", backward, grads),
        ("double", double, second),
    ):
        assert peak >= size_of(results), "the meter sees less than there is"
        assert peak <= size_of(results) + workspace(arguments), order


def test_the_meter_sees_what_the_reference_takes():
    """It upsamples the logits in full: K values a label pixel."""
    case = CASES["loss"]
    apply, point = matrix.function(case, matrix.make(case, **LARGE))
    with ops.use_backend("reference"):
        peak, _ = peak_bytes(lambda: apply(*point))
    assert peak > 4 * 19 * 2 * 384 * 384


@pytest.mark.parametrize(("name", "target"), pairs(FEW, ("pass-one",)))
def test_fifty_steps_of_second_order_leave_nothing(name, target):
    """Graphs of the second order are freed by counting references alone."""
    case = CASES[name]
    apply, point = matrix.function(case, matrix.make(case, target.device, **SMALL))
    losses = []
    gc.collect()
    gc.disable()
    try:
        with matrix.on(target, case.operator):
            for _ in range(5 if target.interpreted else 50):
                loss = sum((y.square().sum() for y in apply(*point)), torch.tensor(0.0, device=target.device))
                grads = torch.autograd.grad(loss, point, create_graph=True)
                sum((grad.square().sum() for grad in grads), loss).backward()
                losses += [weakref.ref(x) for x in (loss, *grads)]
                del loss, grads
                assert all(reference() is None for reference in losses)
    finally:
        gc.enable()
