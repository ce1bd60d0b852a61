"""What is particular to the Triton backend; what all backends share is in test_matrix.py.

Run as a program without ``TRITON_INTERPRET`` it compiles the kernels for a GPU, which needs none (bench/resources.py).
"""

from __future__ import annotations

import json
import os
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


# what is compiled at the paper's size, where no kernel may have a stack
PAPER = {
    "float32": ("masked_average_pool paper", "memory_read paper", "upsample_cross_entropy paper/48"),
    "bf16": ("memory_read paper", "memory_pass paper/one"),
}
# but for these bytes, touched outside the inner loops: what the loss keeps across the pixels of a row, and the double
# backward of a read and a pool of one tensor, which no training takes
STACKS = {("upsample_cross_entropy paper/48", "bwd2"): 200, ("memory_pass paper/one", "bwd2"): 120}
KERNELS = {
    *("read_kernel", "pool_kernel", "backward_kernel", "double_backward_kernel", "outer_kernel", "total_kernel"),
    *("forward_kernel", "finish_kernel", "merge_kernel", "grey_kernel", "change_kernel", "down_kernel"),
    "across_kernel",
}


def test_compiles_for_a_gpu():
    """At the paper's size without a stack; in float64, and where sizes and strides are 1, at all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_triton", "90"],
        cwd=repository.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert {x["kernel"] for x in records} == KERNELS
    paper = [x for x in records if "paper" in x["call"]]
    assert {(x["dtype"], x["call"]) for x in paper} == {(dtype, call) for dtype in PAPER for call in PAPER[dtype]}
    over = [x for x in paper if x["stack"] > STACKS.get((x["call"], x["pass"]), 0)]
    assert not over, over


def compile_all(arch: int) -> None:
    """Compile all kernels and print a record of each launch, a line each."""
    from bench import cases, resources
    from tests.ops import matrix

    sizes = [case for case in cases.all_cases() if f"{case.op} {case.size}" in PAPER[case.dtype]]
    for record in resources.triton_records(arch, sizes):
        print(json.dumps(record))
    # sizes and strides of 1 are compiled as constants, and a tuple within a tuple forgets what they were
    one = {"batch": 1, "channels": 1, "classes": 1, "size": (1, 1), "label_size": (1, 1), "dtype": torch.float32}
    two = {"size": (2, 5), "label_size": (2, 7), "dtype": torch.float32}
    with resources.compiling(arch) as launches, ops.use_backend("triton"):
        for name, size in {"pool": one, "loss": two, "pass-one-seed": {"dtype": torch.float64}}.items():
            case, arguments = matrix.CASES[name], matrix.make(matrix.CASES[name], **size)
            matrix.orders(case, arguments, *matrix.directions(case, arguments))
        for launch in launches:
            print(json.dumps({"call": "small", "pass": "", **resources.record_of(launch, arch)}))


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
