"""Outputs and derivatives of every operator on every backend against the reference in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmm_fast import ops
from tests.ops import matrix
from tests.ops.matrix import CASES, FEW, pairs

FLOAT64, FLOAT32, BFLOAT16, FLOAT16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SIZES = {"channels": 20, "classes": 5, "size": (5, 6), "label_size": (13, 17)}
# what each case is tried with: dtype of the features, of the labels, of memory and values
DTYPES = [
    (FLOAT64, torch.uint8, FLOAT64),
    (FLOAT32, torch.int64, FLOAT32),
    (BFLOAT16, torch.uint8, FLOAT32),
    (FLOAT16, torch.int32, FLOAT32),
]
MIXED = [(FLOAT64, FLOAT32), (FLOAT32, FLOAT64), (FLOAT32, BFLOAT16), (BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT64)]
SHAPES = [
    {"batch": 1, "channels": 3},
    {"batch": 1, "size": (1, 1), "label_size": (9, 5)},
    {"batch": 1, "size": (1, 1), "label_size": (1, 1)},
    {"size": (1, 6), "label_size": (8, 1)},
    {"batch": 5, "channels": 250, "classes": 19},
    {"channels": 256, "size": (4, 4), "label_size": (16, 16)},
    {"batch": 1, "channels": 512, "classes": 64, "size": (3, 4)},
    {"classes": 1},
    {"size": (7, 9), "label_size": (7, 9)},
    {"size": (7, 9), "label_size": (3, 4)},
    {"size": (3, 3), "label_size": (61, 40)},
    {"batch": 1, "size": (3, 67), "label_size": (6, 134)},
]
FEW_SHAPES = (1, 7, 9)


@pytest.mark.parametrize(("name", "target"), pairs(interpreted=("pass-values", "loss")))
@pytest.mark.parametrize("dtypes", DTYPES, ids=["float64", "float32", "bfloat16", "float16"])
def test_dtypes(name, target, dtypes):
    if target == matrix.CPU and dtypes[0] == FLOAT16:
        pytest.skip("no float16 on the CPU: test_registration.py tests that it says so")
    dtype, label_dtype, memory_dtype = dtypes
    arguments = matrix.make(
        CASES[name], target.device, dtype=dtype, label_dtype=label_dtype, memory_dtype=memory_dtype, **SIZES
    )
    found = matrix.compare(name, arguments, target)
    kept = {key: x.dtype for key, x in found["forward"].items() if key != "read"}
    assert set(kept.values()) <= {ops.compute_dtype(dtype)}
    assert found["forward"].get("read", torch.empty(0, dtype=dtype)).dtype == dtype
    assert all(grad.dtype == arguments[key].dtype for key, grad in found["backward"].items())


@pytest.mark.parametrize(("name", "target"), pairs(("read-values", "pass-values"), ("read-values",)))
@pytest.mark.parametrize(("dtype", "memory_dtype"), MIXED)
def test_mixed_dtypes(name, target, dtype, memory_dtype):
    arguments = matrix.make(CASES[name], target.device, dtype=dtype, memory_dtype=memory_dtype, **SIZES)
    matrix.compare(name, arguments, target)


@pytest.mark.parametrize(("name", "target"), pairs(FEW, FEW, reference=False))
@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda i: "-".join(map(str, SHAPES[i].values())))
def test_shapes(name, target, shape):
    if target.interpreted and not (shape in FEW_SHAPES or (shape == 4 and name == "pool")):
        pytest.skip("too slow to interpret")
    arguments = matrix.make(CASES[name], target.device, dtype=FLOAT32, **(SIZES | SHAPES[shape]))
    matrix.compare(name, arguments, target, cancelling=1.0)


@pytest.mark.parametrize(("name", "target"), pairs())
def test_empty_batch(name, target):
    case = CASES[name]
    arguments = matrix.make(case, target.device, batch=0)
    found = matrix.compare(name, arguments, target)
    shapes = {key: tuple(output.shape) for key, output in found["forward"].items()}
    expected = {"read": (0, 7 if "values" in arguments else 6, 3, 5), "scores": (0, 4, 3, 5), "sums": (4, 6)}
    expected |= {"mass": (4,), "loss": ()}
    assert shapes == {key: expected[key] for key in shapes}
    assert not any(output.any() for results in found.values() for output in results.values())


def _check(target, name, batch, channels, classes, size, label_size, dtype, label_dtype, ignored, temperature, seed):
    if target == matrix.CPU and dtype == FLOAT16:
        dtype = BFLOAT16
    arguments = matrix.make(
        CASES[name],
        target.device,
        seed,
        batch=batch,
        channels=channels,
        classes=classes,
        size=size,
        label_size=label_size,
        ignored=ignored,
        dtype=dtype,
        label_dtype=label_dtype,
    )
    if "temperature" in arguments:
        arguments["temperature"] = temperature
    # two channels, or one position, may leave nothing but rounding errors
    matrix.compare(name, arguments, target, cancelling=max(1.0, 1 / temperature**2))


ANYTHING = {
    "batch": st.integers(0, 3),
    "channels": st.integers(2, 40),
    "classes": st.sampled_from([1, 2, 3, 4, 5, 8, 19, 33, 64]),
    "size": st.tuples(st.integers(1, 9), st.integers(1, 19)),
    "label_size": st.tuples(st.integers(1, 40), st.integers(1, 40)),
    "dtype": st.sampled_from([FLOAT64, FLOAT32, BFLOAT16, FLOAT16]),
    "label_dtype": st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
    "ignored": st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    "temperature": st.sampled_from([0.3, 1.0, 2.0]),
    "seed": st.integers(0, 2**20),
}
# for the interpreter, and where every size is compiled anew
LITTLE = {
    "batch": st.integers(0, 2),
    "channels": st.integers(2, 20),
    "classes": st.sampled_from([1, 3, 5, 19]),
    "size": st.tuples(st.integers(1, 4), st.integers(1, 7)),
    "label_size": st.tuples(st.integers(1, 13), st.integers(1, 13)),
}
QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("target", matrix.KERNELS)
def test_anything(target):
    """Any operator, any sizes, dtypes, ignored share, temperature, and noise: none, a tensor or a seed."""
    slow = target.interpreted or target.compiles
    examples, sizes = (6, ANYTHING | LITTLE) if slow else (200, ANYTHING)

    @settings(max_examples=examples, **QUIET)
    @given(name=st.sampled_from(list(CASES)), **sizes)
    def check(name, **sizes):
        _check(target, name, **sizes)

    reason = matrix.why_absent(target, "upsample_cross_entropy")
    if reason:
        pytest.skip(reason)
    check()
