"""What only a GPU has: streams, graphs, other devices, tensors beyond 32-bit indices, labels asserted on the device."""

import fcntl
import gc
import subprocess
import sys

import pytest
import torch

from pmm_fast import ops
from tests import repository
from tests.ops import matrix
from tests.ops.matrix import CASES, FEW

pytestmark = matrix.GPU_MARKS
SIZES = {"channels": 64, "classes": 19, "size": (12, 12), "label_size": (48, 48), "dtype": torch.float32}
PAIRS = [pytest.param(name, target, id=f"{name}-{target.backend}") for target in matrix.GPU_TARGETS for name in FEW]


def flattened(results):
    return [x.detach() for named in results.values() for x in named.values()]


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_a_stream_that_is_not_the_default_one(name, target):
    """Inputs that are still being written on a stream, while another one is busy: the kernels wait for their own."""
    case = CASES[name]
    with matrix.on(target, case.operator):
        arguments = matrix.make(case, target.device, **SIZES)
        directions = matrix.directions(case, arguments)
        expected = flattened(matrix.orders(case, arguments, *directions))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            late = {key: torch.zeros_like(arguments[key]) for key in case.tensors}
            torch.cuda._sleep(50_000_000)
            for key, tensor in late.items():
                tensor.copy_(arguments[key])
            shared = {"written": late["features"]} if case.shared else {}
            found = flattened(matrix.orders(case, arguments | late | shared, *directions))
        stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_derivatives_that_are_asked_for_on_another_stream(name, target):
    """Each runs where what it differentiates ran, and who asked waits for it."""
    case = CASES[name]
    arguments = matrix.make(case, target.device, **SIZES)
    incoming, tangents = matrix.directions(case, arguments)
    with matrix.on(target, case.operator):
        orders = matrix.orders(case, arguments, incoming, tangents)
        function, point = matrix.function(case, arguments)
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            torch.cuda._sleep(50_000_000)
            outputs = function(*point)
        with torch.cuda.stream(streams[1]):
            grads = torch.autograd.grad(outputs, point, incoming, create_graph=True)
        with torch.cuda.stream(streams[2]):
            second = torch.autograd.grad(grads, point, tangents)
        streams[2].synchronize()
    for order, found in (("backward", grads), ("double_backward", second)):
        assert all(torch.equal(x, orders[order][key]) for key, x in zip(case.tensors, found, strict=True))


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_capture_in_a_graph(name, target):
    """All three orders in one graph, replayed on other data: nothing waits for the host."""
    case = CASES[name]
    with matrix.on(target, case.operator):
        arguments = matrix.make(case, target.device, **SIZES)
        directions = matrix.directions(case, arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                matrix.orders(case, arguments, *directions)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = flattened(matrix.orders(case, arguments, *directions))
        for key in case.tensors:
            arguments[key].mul_(0.7).add_(0.1)
        graph.replay()
        torch.cuda.synchronize()
        expected = flattened(matrix.orders(case, arguments, *directions))
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_second_device(name, target):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    arguments = matrix.make(CASES[name], "cuda:1", **SIZES)
    assert torch.cuda.current_device() == 0
    matrix.compare(name, arguments, target)


@pytest.mark.parametrize("target", [pytest.param(target, id=target.backend) for target in matrix.GPU_TARGETS])
def test_automatic_choice_on_a_gpu_is_not_the_reference(target):
    with matrix.on(target):
        arguments = matrix.make(CASES["pool"], target.device, **SIZES)
        matrix.call(CASES["pool"], arguments)
    with ops.record_backends() as calls:
        matrix.call(CASES["pool"], arguments)
    assert calls[0][1] in ("cuda", "triton")


@pytest.fixture
def much_memory(tmp_path_factory):
    """The memory of the device for one test at a time, of however many processes."""
    with (tmp_path_factory.getbasetemp().parent / "gpu-memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


IMAGES = 3
# of maps of 256 channels, and of logits of 19 classes
SIDE, LOGITS_SIDE = 1728, 6400


def large_arguments(case, device):
    """An image of 2^31 / IMAGES elements and more, in half precision, made where it is wanted."""
    generator = torch.Generator(device).manual_seed(0)
    is_loss = "logits" in case.tensors
    slots, side = 19, LOGITS_SIDE if is_loss else SIDE

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    width = slots if is_loss else 256
    maps = {key: draw(1, width, side, side, dtype=torch.bfloat16) for key in ("features", "written", "logits")}
    others = {
        "memory": ops.normalize(draw(slots, width), 1),
        "values": draw(slots, 7),
        "noise": draw(1, slots, side, side),
        "labels": torch.randint(slots, (1, side, side), generator=generator, device=device, dtype=torch.uint8),
    }
    arguments = {key: (maps | others)[key] for key in (*case.tensors, *case.others)}
    if case.shared:
        arguments["written"] = arguments["features"]
    if case.operator == "masked_average_pool":
        arguments["num_classes"] = slots
    return arguments | dict(case.options)


def large_directions(case, arguments, device):
    """Random gradients as :func:`matrix.directions` gives them, made on the device."""
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        outputs = matrix.call(case, arguments)[: len(case.outputs)]
    tensors = [*outputs, *(arguments[name] for name in case.tensors)]
    random = [torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype) for x in tensors]
    return random[: len(outputs)], random[len(outputs) :]


def repeated(x):
    """An image as often as there are IMAGES, without a copy."""
    return x.expand(IMAGES, *x.shape[1:]) if x.dim() >= 3 else x


@pytest.mark.slow
@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_more_than_two_to_the_31_elements(name, target):
    """All three orders, of the last of some equal images and of the sums over all, against one image alone."""
    case, device = CASES[name], target.device
    with matrix.on(target, case.operator):
        arguments = large_arguments(case, device)
        directions = large_directions(case, arguments, device)
        alone = matrix.orders(case, arguments, *directions)
        per_image = [key for key in arguments if key in ("features", "written", "labels", "noise", "logits")]
        arguments = matrix.changed(case, arguments, lambda x: repeated(x).contiguous(), per_image)
        assert arguments[per_image[0]].numel() > 2**31
        together = matrix.orders(case, arguments, *([repeated(x) for x in grads] for grads in directions))
    # a mean over the images is what it is of one, and its gradient is divided among them
    of_map, of_sum = (IMAGES, 1) if "logits" in arguments else (1, 1 / IMAGES)
    for order, results in together.items():
        for key, result in results.items():
            expected = alone[order][key].detach()
            found = (of_map * result[-1:] if result.dim() == 4 else of_sum * result).detach()
            assert (found - expected).abs().amax() <= 1e-2 * expected.abs().amax(), (order, key)


LABELS = """
import torch
from pmm_fast import ops
labels = torch.full((1, 4, 4), 77, dtype=torch.uint8, device="cuda")
with ops.use_backend({backend!r}):
    ops.{call}
torch.cuda.synchronize()
"""
LABEL_CALLS = {
    "masked_average_pool": "masked_average_pool(torch.randn(1, 8, 2, 2, device='cuda'), labels, 19)",
    "upsample_cross_entropy": "upsample_cross_entropy(torch.randn(1, 19, 2, 2, device='cuda'), labels)",
}


@pytest.mark.parametrize("target", [pytest.param(target, id=target.backend) for target in matrix.GPU_TARGETS])
@pytest.mark.parametrize("operator", list(LABEL_CALLS))
def test_a_wrong_label_is_asserted_on_the_device(operator, target):
    """In a process of its own: a failed assertion ends the use of the device."""
    reason = matrix.why_absent(target, operator)
    if reason:
        pytest.skip(reason)
    code = LABELS.format(backend=target.backend, call=LABEL_CALLS[operator])
    run = subprocess.run([sys.executable, "-c", code], cwd=repository.ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "assert" in run.stderr.lower()
