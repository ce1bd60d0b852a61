"""What is particular to the Triton backend; what all backends share is in test_matrix.py.

Run as a program without ``TRITON_INTERPRET`` it compiles the kernels for a GPU, which needs none: the launchers run as
they are, and each launch is compiled instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pmm_fast import ops
from tests import repository
from tests.ops.inputs import make_inputs
from tests.tolerances import BACKWARD, EXACT, FORWARD, relative_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is a GPU")


def orders(function: Any, inputs: list[Tensor], backend: str) -> list[list[Tensor]]:
    """Outputs, gradients along fixed directions, and gradients of those, on a backend."""
    generator = torch.Generator().manual_seed(1)

    def direction(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    with ops.use_backend(backend), ops.record_backends() as calls:
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*inputs)
        outputs = [x for x in ([outputs] if isinstance(outputs, Tensor) else outputs) if x.requires_grad]
        incoming = [direction(x).requires_grad_() for x in outputs]
        first = torch.autograd.grad(outputs, inputs, incoming, create_graph=True)
        second = torch.autograd.grad(first, [*inputs, *incoming], [direction(x) for x in first], materialize_grads=True)
    assert {name for _, name in calls} == {backend}
    return [outputs, list(first), list(second)]


def assert_equal_orders(function: Any, inputs: list[Tensor], tolerances: tuple[float, float, float]) -> None:
    """Every order on Triton equals the reference's in float64, relative to the largest value of each tensor."""
    expected = orders(function, [x.double() for x in inputs], "reference")
    found = orders(function, inputs, "triton")
    for order, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert relative_error(a, b) <= tolerances[order], (order, index)


EXACTLY = (FORWARD[torch.float64], BACKWARD[torch.float64], 1e-10)


@interpreted
@pytest.mark.parametrize("seeded", [False, True])
def test_float64_scalars_are_not_rounded(seeded):
    # 1/0.7 has no float32, and the noise's constants must not become float32 either
    inputs = make_inputs(size=(2, 3))
    noise = torch.tensor([2**40 + 12345]) if seeded else inputs.noise
    assert_equal_orders(lambda f, m: ops.memory_read(f, m, noise, 0.7), [inputs.features, inputs.memory], EXACTLY)


@interpreted
def test_more_blocks_than_programs_and_tails():
    # 3 programs for 2 x 3 blocks of 16 positions, the last of each image with 3; rows of 7 do not fit blocks of 16
    inputs = make_inputs(size=(5, 7), label_size=(9, 16))
    values = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_equal_orders(
        lambda f, m, n, v: ops.memory_pass(f, f, inputs.labels, m, n, 0.7, 255, v),
        [inputs.features, inputs.memory, inputs.noise, values],
        EXACTLY,
    )
    assert_equal_orders(
        lambda f, w, m: ops.memory_pass(f, w, inputs.labels, m),
        [inputs.features, inputs.written, inputs.memory],
        EXACTLY,
    )


@interpreted
def test_channels_in_chunks_and_split_over_programs():
    # 70 channels: three chunks of a product, and with 16 a block five programs a position; values in one
    inputs = make_inputs(batch=1, channels=70, size=(2, 3))
    values = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_equal_orders(
        lambda f, m, n, v: ops.memory_pass(f, f, inputs.labels, m, n, 0.7, 255, v),
        [inputs.features, inputs.memory, inputs.noise, values],
        EXACTLY,
    )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    # bfloat16 is silently wrong in the interpreter unless it is cast where it is loaded
    inputs = make_inputs(channels=40, classes=19, size=(3, 5), dtype=dtype)
    tolerances = (FORWARD[dtype], BACKWARD[dtype], 4 * BACKWARD[dtype])
    assert_equal_orders(
        lambda f: ops.memory_pass(f, f, inputs.labels, inputs.memory.to(ops.compute_dtype(f.dtype)), None, 0.5),
        [inputs.features],
        tolerances,
    )


@interpreted
@pytest.mark.parametrize(
    ("size", "label_size", "align_corners"),
    [
        ((3, 9), (8, 24), True),
        ((3, 9), (9, 25), False),
        ((3, 7), (3, 7), True),
        ((4, 6), (3, 4), False),
        ((3, 4), (1, 1), True),
        ((1, 1), (4, 5), True),
    ],
)
def test_cross_entropy_tiles(size, label_size, align_corners, monkeypatch):
    from pmm_fast.kernels import upsample_cross_entropy

    # 5 columns and 2 rows a program, so that tiles meet in the middle and end early
    monkeypatch.setattr(upsample_cross_entropy, "_MOST_COLUMNS", 5)
    monkeypatch.setattr(upsample_cross_entropy, "_MOST_ROWS", 2)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, *size, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, *label_size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    labels[0, 0, 0] = 3
    assert_equal_orders(lambda x: ops.upsample_cross_entropy(x, labels, 255, align_corners), [logits], EXACTLY)


@interpreted
def test_cross_entropy_counts_each_pixel_once():
    # the pixels of a tile's first cells are visited twice; a constant direction sees none of the logits' gradient
    logits = torch.randn(1, 3, 4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (1, 9, 18))
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    with ops.use_backend("triton"):
        (first,) = torch.autograd.grad(ops.upsample_cross_entropy(logits, labels), logits, scale, create_graph=True)
        direction = torch.randn_like(first)
        (slope,) = torch.autograd.grad(first, scale, direction)
    assert relative_error(slope, (first * direction).sum()) <= EXACT


@interpreted
def test_gradients_of_strided_maps():
    inputs = make_inputs(size=(4, 6))
    expected = ops.memory_pass(inputs.features, inputs.features, inputs.labels, inputs.memory)
    wide = torch.zeros(2, 6, 4, 12, dtype=torch.float64)
    wide[..., ::2] = inputs.features
    for features in (inputs.features.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        with ops.use_backend("triton"):
            found = ops.memory_pass(features, features, inputs.labels, inputs.memory)
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) <= FORWARD[torch.float64]
    assert found[0].is_contiguous()


@interpreted
def test_a_wrong_label_is_named():
    logits, labels = torch.randn(1, 3, 2, 2), torch.full((1, 4, 4), 2**32 + 1)
    with ops.use_backend("triton"):
        with pytest.raises(ValueError, match=r"labels hold 4294967297, expected classes in 0\.\.2"):
            ops.upsample_cross_entropy(logits, labels)
        with pytest.raises(ValueError, match=r"labels hold 4294967297, expected classes in 0\.\.2"):
            ops.masked_average_pool(logits, labels, 3)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_compiles_for_a_gpu(dtype):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_triton", dtype, "90"],
        cwd=repository.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    compiled = re.findall(r"^(\w+): (\w+)", run.stdout, re.M)
    kernels = {"forward_kernel", "backward_kernel", "double_backward_kernel", "finish_kernel", "merge_kernel"}
    if dtype == "float32":
        kernels |= {"grey_kernel", "change_kernel", "down_kernel", "across_kernel"}
    assert {name for _, name in compiled} == kernels and len(compiled) == (25 if dtype == "float32" else 10), run.stdout


def compile_launch(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], capability: int) -> str:
    """Compile what a launch with these arguments would compile; its registers' line."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import create_function_from_signature

    if isinstance(kernel, Autotuner):
        # the first of the configurations: the others differ in warps and stages alone
        options, kernel = {**options, **kernel.configs[0].all_kwargs()}, kernel.fn
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"debug": False, "instrumentation_mode": "", **options}
    bound, specialization, rest = binder(*arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    compiled = compile(ASTSource(kernel, signature, constants, attributes), target=target, options=parsed.__dict__)
    assert compiled.asm["cubin"]
    return f"{kernel.__name__} {compiled.metadata.shared} bytes shared"


def compile_all(dtype: torch.dtype, capability: int) -> None:
    """Compile the kernels of every operator at a small size with 64 channels and 19 classes."""
    from pmm_fast.kernels import (
        masked_average_pool,
        memory_pass,
        memory_read,
        merge_tiles,
        photometric,
        upsample_cross_entropy,
    )
    from triton.runtime.jit import KernelInterface

    name = ""
    KernelInterface.__getitem__ = lambda kernel, grid: (
        lambda *arguments, **options: print(f"{name}: {compile_launch(kernel, arguments, options, capability)}")
    )
    f, labels = torch.empty(1, 64, 8, 8, dtype=dtype), torch.zeros(1, 16, 16, dtype=torch.uint8)
    compute = ops.compute_dtype(dtype)
    m, e, one = (torch.empty(shape, dtype=compute) for shape in ((19, 64), (1, 19, 8, 8), ()))
    x, seed = torch.empty(1, 19, 8, 8, dtype=dtype), torch.tensor([1])
    five = [True, False, True, True, True]
    name = "pass"
    memory_pass.forward(f, f, labels, m, m, seed, 1.0, 255)
    memory_pass.backward(f, e, m, f, None, labels, m, m, e, 1.0, 255, five)
    memory_pass.double_backward(
        f, None, m, m, e, f, e, m, f, None, labels, m, m, e, 1.0, 255, [True, True, True, *five]
    )
    name = "read"
    memory_read.forward(f, m, m, e, 1.0)
    memory_read.backward(None, e, f, m, m, seed, 1.0, [True, False, False, False])
    name = "pool"
    masked_average_pool.backward(m, f, labels, 255, False)
    if dtype == torch.float32:
        masked_average_pool.forward(f, labels, 19, 255, True)
        masked_average_pool.backward(m, f, labels, 255, True)
        masked_average_pool.double_backward(f, m, f, labels, 255, True)
    name = "loss"
    upsample_cross_entropy.forward(x, labels, 255, True)
    if dtype == torch.float32:
        upsample_cross_entropy.backward(one, x, labels, one, 255, True)
    upsample_cross_entropy.double_backward(x, one, x, labels, one, 255, False)
    name = "merge"
    none, level, sure = torch.empty(0), torch.empty(16, 16, dtype=torch.uint8), torch.empty(16, 16)
    merge_tiles.forward(x.expand(2, -1, -1, -1), torch.zeros(2, 2, dtype=int), (16, 9), (16, 16), none, level, sure)
    if dtype == torch.float32:
        # a size, a tile and a stride of one are compiled as constants
        pixel = torch.zeros(2, 1, dtype=int)
        merge_tiles.forward(x, pixel, (1, 1), (1, 1), none, level, none)
        merge_tiles.forward(x[:, :1], pixel, (1, 9), (1, 9), torch.empty(1, 1, 9), none, none)
        name = "photometric"
        looks = torch.zeros(2, 9)
        # a size of one is compiled as a constant
        for side, radius, contrast in ((8, 5, True), (8, 0, False), (1, 5, True)):
            images = torch.empty(2, 3, side, side, dtype=torch.uint8)
            photometric.forward(images, looks, (1.0,) * 3, (0.0,) * 3, radius, contrast, torch.empty(images.shape))


if __name__ == "__main__":
    compile_all(DTYPES[sys.argv[1]], int(sys.argv[2]))
