"""The operators and backends as tables, and what every test of them does: call, differentiate twice, compare.

A case is one way to call an operator.  A target is a backend on a device.  Letters as in ``pmm_fast/ops/reference.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pmm_fast import ops
from pmm_fast.ops import backends
from tests.ops.inputs import make_inputs
from tests.tolerances import assert_accurate

Arguments = dict[str, Any]
Orders = dict[str, dict[str, Tensor]]


class Case(NamedTuple):
    """An operator with options; ``tensors`` and ``outputs`` are its arguments and outputs that are differentiated."""

    operator: str
    tensors: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    others: tuple[str, ...] = ()  # further tensors: labels, seed
    shared: bool = False  # features and written are one tensor


_READ, _PASS = ("read", "scores"), ("read", "scores", "sums")
CASES = {
    "pool": Case("masked_average_pool", ("features",), ("sums",), {}, ("labels",)),
    "pool-raw": Case("masked_average_pool", ("features",), ("sums",), {"normalize": False}, ("labels",)),
    "read": Case("memory_read", ("features", "memory"), _READ),
    "read-noise": Case("memory_read", ("features", "memory", "noise"), _READ, {"temperature": 0.7}),
    "read-seed": Case("memory_read", ("features", "memory"), _READ, {"temperature": 0.7}, ("seed",)),
    "read-values": Case("memory_read", ("features", "memory", "values", "noise"), _READ, {"temperature": 1.5}),
    "pass": Case("memory_pass", ("features", "written", "memory"), _PASS, {}, ("labels",)),
    "pass-values": Case(
        "memory_pass", ("features", "written", "memory", "values", "noise"), _PASS, {"temperature": 0.7}, ("labels",)
    ),
    "pass-one": Case("memory_pass", ("features", "memory", "noise"), _PASS, {"temperature": 0.7}, ("labels",), True),
    "pass-one-seed": Case(
        "memory_pass", ("features", "memory", "values"), _PASS, {"temperature": 1.5}, ("labels", "seed"), True
    ),
    "loss": Case("upsample_cross_entropy", ("logits",), ("loss",), {}, ("labels",)),
    "loss-corners": Case("upsample_cross_entropy", ("logits",), ("loss",), {"align_corners": False}, ("labels",)),
}
# for what is slow, one case an operator and both forms of the pass
FEW = ("pool", "read-values", "pass-values", "pass-one", "loss")


class Target(NamedTuple):
    """A backend on a device; Triton on the CPU is interpreted."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self == ("triton", "cpu")

    @property
    def compiles(self) -> bool:
        """Whether every new kind of argument, to each of three kernels, takes seconds to compile."""
        return self == ("triton", "cuda")


REFERENCE, CPU, INTERPRETED = Target("reference", "cpu"), Target("cpu", "cpu"), Target("triton", "cpu")
GPU_TARGETS = (Target("triton", "cuda"), Target("cuda", "cuda"))
GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _parameter(target: Target, *values: Any, name: str = "") -> Any:
    title = f"{target.backend}-interpreted" if target.interpreted else f"{target.backend}"
    if target == GPU_TARGETS[0]:
        title = "triton-gpu"
    marks = GPU_MARKS if target.device == "cuda" else []
    return pytest.param(*values, target, id=f"{name}{title}", marks=marks)


TARGETS = [_parameter(target) for target in (REFERENCE, CPU, INTERPRETED, *GPU_TARGETS)]
KERNELS = TARGETS[1:]


def pairs(
    cases: Sequence[str] = tuple(CASES), interpreted: Sequence[str] = FEW, reference: bool = True, gpu: bool = True
) -> list[Any]:
    """Parameters (case, target): cases on every target, but only some on the interpreter, which is slow."""
    targets = [*([REFERENCE] if reference else []), CPU, INTERPRETED, *(GPU_TARGETS if gpu else ())]
    return [
        _parameter(target, case, name=f"{case}-")
        for target in targets
        for case in cases
        if not target.interpreted or case in interpreted
    ]


def why_absent(target: Target, operator: str) -> str | None:
    """Why this machine cannot run an operator on a target, or None."""
    if target.backend == "triton" and target.interpreted != backends.interpreted():
        return "TRITON_INTERPRET is set" if backends.interpreted() else "TRITON_INTERPRET is not set"
    if target.backend == "cuda" and not _has_cuda_module(operator):
        return f"the cuda backend has no {operator}"
    return backends.missing(target.backend)


def _has_cuda_module(operator: str) -> bool:
    try:
        return importlib.util.find_spec(f"pmm_fast.ops.cuda.{operator}") is not None
    except ModuleNotFoundError:
        return False


@contextlib.contextmanager
def on(target: Target, operator: str | None = None) -> Iterator[None]:
    """Run on a target or skip; at the end, it is the target that ran and nothing else."""
    reason = why_absent(target, operator or "masked_average_pool")
    if reason:
        pytest.skip(reason)
    with ops.use_backend(target.backend), ops.record_backends() as calls:
        yield
    assert calls and {backend for _, backend in calls} == {target.backend}, calls


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory from ``torch.empty`` holds NaN, so what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def make(case: Case, device: str = "cpu", seed: int = 0, **sizes: Any) -> Arguments:
    """Random arguments of a case; ``sizes`` as in :func:`tests.ops.inputs.make_inputs`, and ``memory_dtype``."""
    memory_dtype = sizes.pop("memory_dtype", None)
    inputs = make_inputs(seed=seed, **sizes)
    dtype = inputs.features.dtype
    memory_dtype = memory_dtype or ops.compute_dtype(dtype)
    batch, _, *size = inputs.features.shape
    slots = len(inputs.memory)
    generator = torch.Generator().manual_seed(seed + 1)
    everything = inputs._asdict() | {
        "memory": inputs.memory.to(memory_dtype),
        "values": torch.randn(slots, 7, generator=generator, dtype=torch.float64).to(memory_dtype),
        "logits": torch.randn(batch, slots, *size, generator=generator, dtype=torch.float64).to(dtype),
        # what float32 can hold, so that every dtype gets the same noise
        "noise": inputs.noise.float().to(ops.compute_dtype(dtype)),
        "seed": torch.tensor([0x1234_5678_9ABC + seed]),
    }
    arguments = {name: everything[name].to(device) for name in (*case.tensors, *case.others)}
    if "seed" in arguments:
        arguments["noise"] = arguments.pop("seed")
    if case.shared:
        arguments["written"] = arguments["features"]
    if case.operator == "masked_average_pool":
        arguments["num_classes"] = slots
    return arguments | dict(case.options)


def changed(
    case: Case, arguments: Arguments, change: Callable[[Tensor], Tensor], names: Sequence[str] = ()
) -> Arguments:
    """The arguments with a change to the differentiable tensors (or to those named); one tensor stays one."""
    new = {name: change(arguments[name]) for name in names or case.tensors}
    if case.shared and "features" in new:
        new["written"] = new["features"]
    return arguments | new


def call(case: Case, arguments: Arguments) -> tuple[Tensor, ...]:
    """All outputs of an operator, the class masses too."""
    outputs = getattr(ops, case.operator)(**arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def function(case: Case, arguments: Arguments, names: Sequence[str] = ()) -> tuple[Callable[..., Any], list[Tensor]]:
    """The differentiable outputs as a function of the differentiable arguments (or those named), and the point."""
    names = names or case.tensors

    def apply(*tensors: Tensor) -> tuple[Tensor, ...]:
        values = iter(tensors)
        return call(case, changed(case, arguments, lambda _: next(values), names))[: len(case.outputs)]

    return apply, [arguments[name].detach().requires_grad_() for name in names]


def directions(case: Case, arguments: Arguments) -> tuple[list[Tensor], list[Tensor]]:
    """Random gradients of the outputs, and random gradients of the arguments' gradients."""
    # recorded apart: a test may ask for directions while it runs on a target
    with ops.use_backend("reference"), ops.record_backends(), torch.no_grad():
        outputs = call(case, arguments)[: len(case.outputs)]
    generator = torch.Generator().manual_seed(7)
    tensors = [*outputs, *(arguments[name] for name in case.tensors)]
    random = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in tensors]
    return random[: len(outputs)], random[len(outputs) :]


def orders(case: Case, arguments: Arguments, incoming: Sequence[Tensor], tangents: Sequence[Tensor]) -> Orders:
    """Outputs, vector products of the first derivative, and those of the second, by name."""
    arguments = changed(case, arguments, lambda x: x.detach().requires_grad_())
    incoming = [grad.detach().requires_grad_() for grad in incoming]
    inputs = [arguments[name] for name in case.tensors]
    outputs = call(case, arguments)
    named = dict(zip(case.outputs, outputs, strict=False))
    grads = torch.autograd.grad(outputs[: len(incoming)], inputs, incoming, create_graph=True)
    second = torch.autograd.grad(grads, [*inputs, *incoming], tangents, allow_unused=True, materialize_grads=True)
    if len(outputs) > len(incoming):
        named["mass"] = outputs[-1]
    return {
        "forward": named,
        "backward": dict(zip(case.tensors, grads, strict=True)),
        "double_backward": dict(zip((*case.tensors, *case.outputs), second, strict=True)),
    }


def compare(name: str, arguments: Arguments, target: Target, cancelling: float = 0.0) -> Orders:
    """All three orders of a case on a target against the reference in float64; returns what the target computed."""
    case = CASES[name]
    incoming, tangents = directions(case, arguments)
    with on(target, case.operator), poisoned():
        found = orders(case, arguments, incoming, tangents)
    with ops.use_backend("reference"):
        baseline = orders(case, arguments, incoming, tangents)
        exact = changed(case, arguments, Tensor.double)
        expected = orders(case, exact, [x.double() for x in incoming], [x.double() for x in tangents])
    compute = ops.compute_dtype(arguments[case.tensors[0]].dtype)
    for order, results in found.items():
        for key, result in results.items():
            try:
                assert_accurate(result, baseline[order][key], expected[order][key], order, compute, cancelling)
            except AssertionError as error:
                raise AssertionError(f"{name} on {target.backend}, {key}: {error}") from None
    return found
