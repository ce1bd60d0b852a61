"""The double backward of batch norm by Triton's kernels: interpreted without a GPU, the real ones with one."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pmm_fast import ops
from pmm_fast.models import batchnorm
from pmm_fast.ops.backends import missing
from tests import repository
from tests.tolerances import EXACT, assert_accurate, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "float64": torch.float64}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
OP = torch.ops.pmm_fast.batch_norm_double_backward
CASES = [
    # more channels than a tile has, of which the last is not full
    ((3, 10, 9, 5), "float32", "nchw"),
    ((3, 70, 9, 5), "float32", "nhwc"),
    ((3, 70, 9, 5), "bf16", "nhwc"),
    # several tiles an image, of which the last is not full
    ((2, 5, 31, 43), "float64", "nhwc"),
    # one position an image; one channel
    ((4, 6, 1, 1), "fp16", "nchw"),
    ((2, 1, 3, 3), "float32", "nhwc"),
]

pytestmark = [
    pytest.mark.skipif(missing("triton") is not None, reason=str(missing("triton"))),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "nhwc") -> list[Any]:
    """Of the op, with the statistics and sums that the forward and the backward give."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    x, grad, of_x = (
        value.to(DEVICE, dtype, memory_format=LAYOUTS[layout])
        for value in (2 * draw(*shape) + 3, draw(*shape), draw(*shape))
    )
    vectors = [draw(shape[1]).to(DEVICE, ops.compute_dtype(dtype)) for _ in range(4)]
    weight, bias, of_weight, of_bias = vectors
    _, mean, inverse, _ = batchnorm.normalise(x, weight, bias, 1e-5, None)
    _, grad_weight, grad_bias = batchnorm.backward(grad, x, weight, mean, inverse, None)
    return [of_x, of_weight, of_bias, grad, x, weight, mean, inverse, grad_weight, grad_bias]


def by_kernels(values: list[Tensor]) -> tuple[Tensor, ...]:
    with ops.use_backend("triton"):
        return OP(*values, None)


def exact(values: list[Tensor]) -> tuple[Tensor, ...]:
    return batchnorm.double_backward(*(value.double() for value in values), None)


@pytest.mark.parametrize(("shape", "dtype", "layout"), CASES, ids=str)
def test_equals_plain_pytorch(shape: tuple[int, ...], dtype: str, layout: str) -> None:
    values = arguments(shape, DTYPES[dtype], layout)
    with ops.use_backend("reference"):
        plain = OP(*values, None)
    found = by_kernels(values)
    for ours, theirs, expected in zip(found, plain, exact(values), strict=True):
        assert_accurate(ours, theirs, expected, "double_backward")
        # a map of one position or one channel has both layouts
        assert ours.stride() == theirs.stride() or values[4].is_contiguous()


def test_maps_of_other_strides_and_expanded_vectors() -> None:
    values = arguments((2, 6, 8, 5), torch.float64, "nchw")
    wide = torch.zeros(2, 6, 8, 10, dtype=torch.float64, device=DEVICE)
    wide[..., ::2] = values[0]
    values[0], values[3] = wide[..., ::2], values[3].contiguous(memory_format=torch.channels_last)
    one = torch.ones((), dtype=torch.float64, device=DEVICE).expand(6)
    expected = exact([*values[:1], one, *values[2:]])
    for ours, theirs in zip(by_kernels([*values[:1], one, *values[2:]]), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_layer_differentiates_through_the_kernels() -> None:
    layer = batchnorm.BatchNorm2d(3).to(DEVICE, torch.float64)
    x = torch.randn(2, 3, 2, 3, device=DEVICE, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    found = {}
    for backend in ("triton", "reference"):
        with ops.use_backend(backend):
            first = torch.autograd.grad(layer(x).pow(3).sum(), inputs, create_graph=True)
            found[backend] = torch.autograd.grad(sum(value.pow(2).sum() for value in first), inputs)
    for ours, theirs in zip(found["triton"], found["reference"], strict=True):
        assert relative_error(ours, theirs) < EXACT


def test_who_gets_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, unless plain PyTorch is asked for; a CPU only by name; several ranks add up between two passes."""
    taken: list[str] = []
    kernels = batchnorm.kernels
    monkeypatch.setattr(batchnorm, "kernels", lambda *names: taken.append(names[1]) or kernels(*names))
    values = arguments((2, 3, 4, 4), torch.float32)
    for backend, expected in {"auto": DEVICE == "cuda", "reference": False, "triton": True}.items():
        taken.clear()
        with ops.use_backend(backend):
            OP(*values, None)
        assert taken == ["triton"] * expected, backend
    monkeypatch.setattr(batchnorm, "interpreted", lambda: False)
    monkeypatch.setattr(batchnorm, "refuses", lambda *call: None)
    for backend, expected in {"auto": True, "reference": False}.items():
        with ops.use_backend(backend):
            assert batchnorm._has_kernels(values[4]) == expected


def test_the_same_bits_twice() -> None:
    values = arguments((3, 70, 9, 5), torch.float32)
    for first, second in zip(by_kernels(values), by_kernels(values), strict=True):
        assert torch.equal(first, second)


def test_compiles_for_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.models.test_batchnorm_kernels", "90"]
    run = subprocess.run(command, cwd=repository.ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.split().count("compiled") == 3, run.stdout


def compile_all(arch: int) -> None:
    """Compile what a launch with channels last in bf16 would."""
    from pmm_fast.kernels import batch_norm

    from bench import resources

    vector = torch.empty(64)
    x = torch.empty(2, 64, 16, 16, dtype=torch.bfloat16, memory_format=torch.channels_last)
    with resources.compiling(arch) as launches:
        batch_norm.double_backward(x, vector, vector, x, x, *[vector] * 5)
    for launch in launches:
        print("compiled", launch.name)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
