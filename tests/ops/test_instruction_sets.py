"""The CPU kernels in every instruction set that this processor has, not only the best one."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pmm_fast import ops
from pmm_fast.ops import extension
from tests.ops import matrix
from tests.ops.matrix import CASES, CPU

MODULE = None if extension.missing("_C") else extension.load("_C")
SETS = MODULE.instruction_sets() if MODULE else []
# full tiles beside tails of every width, blocks of rows and their remainders
SIZES = [
    {"batch": 2, "channels": 19, "classes": 19, "size": (9, 23), "label_size": (20, 50)},
    {"batch": 1, "channels": 6, "classes": 5, "size": (4, 64), "label_size": (16, 256)},
    {"batch": 1, "channels": 5, "classes": 3, "size": (1, 1), "label_size": (7, 3)},
]

pytestmark = pytest.mark.skipif(MODULE is None, reason=str(extension.missing("_C")))


@contextlib.contextmanager
def using(name):
    before = MODULE.instruction_set()
    MODULE.use_instruction_set(name)
    try:
        assert MODULE.instruction_set() == name
        yield
    finally:
        MODULE.use_instruction_set(before)


def test_the_best_one_is_in_use_and_the_portable_one_is_always_there():
    assert SETS[0] == MODULE.instruction_set() and SETS[-1] == "portable"
    assert [name for name in ("avx512", "avx2", "portable") if name in SETS] == SETS


def test_an_unknown_one_is_refused():
    with pytest.raises(ValueError, match=rf"instruction set avx1024 is not to be had here; expected one of {SETS[0]}"):
        MODULE.use_instruction_set("avx1024")


def test_an_argument_that_no_kernel_has_is_refused():
    with pytest.raises(TypeError, match="no field of the kernel's arguments"):
        MODULE.pass_workspace(order=0, colour=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=["tails", "whole", "one"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_every_order(instruction_set, name, sizes, dtype):
    with using(instruction_set):
        matrix.compare(name, matrix.make(CASES[name], dtype=dtype, **sizes), CPU)


@pytest.mark.parametrize("instruction_set", SETS)
def test_extreme_values(instruction_set):
    labels = torch.randint(0, 5, (1, 8, 8), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(1, 5, 4, 4, generator=torch.Generator().manual_seed(1)) * 1e4
    with using(instruction_set), ops.use_backend("cpu"):
        found = ops.upsample_cross_entropy(logits, labels)
        nan = ops.upsample_cross_entropy(logits.clone().index_fill_(1, torch.tensor([2]), float("nan")), labels)
    with ops.use_backend("reference"):
        expected = ops.upsample_cross_entropy(logits.double(), labels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert nan.isnan()
