"""What only a GPU has: streams, graphs, other devices, tensors beyond 32-bit indices, labels asserted on the device."""

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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_more_than_two_to_the_31_elements(name, target):
    """Half precision, and the last image against the same image alone."""
    case = CASES[name]
    sizes = {"channels": 4096, "classes": 3, "size": (512, 512), "label_size": (512, 512), "dtype": torch.bfloat16}
    batch = 3
    with matrix.on(target, case.operator):
        one = matrix.make(case, **(sizes | {"batch": 1, "channels": 8}))
        if "logits" in one:
            # 2^31 label pixels would be another test; here the logits are many
            one["logits"] = torch.randn(1, 4096, 512, 512, dtype=torch.bfloat16)
        for key in ("features", "written"):
            if key in one:
                one[key] = torch.randn(1, 4096, 512, 512, dtype=torch.bfloat16)
        if "memory" in one:
            one["memory"] = ops.normalize(torch.randn(3, 4096), 1)
        if case.shared:
            one["written"] = one["features"]
        one = {key: x.to(target.device) if isinstance(x, torch.Tensor) else x for key, x in one.items()}
        per_image = [key for key in ("features", "written", "labels", "noise", "logits") if key in one]
        many = matrix.changed(case, one, lambda x: x.expand(batch, *x.shape[1:]).contiguous(), per_image)
        assert many[per_image[0]].numel() > 2**31
        with torch.no_grad():
            single, outputs = matrix.call(case, one), matrix.call(case, many)
    for key, a, b in zip((*case.outputs, "mass"), single, outputs, strict=False):
        last = b[-1:] if key in ("read", "scores") else b / batch if key in ("sums", "mass") else b
        torch.testing.assert_close(last, a, rtol=1e-2, atol=1e-3)


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
