"""The chains of registered ops as PyTorch sees them: opcheck, tracing, compiling, autocast; and which backend ran."""

import shutil
import sysconfig

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from pmm_fast import ops
from pmm_fast.ops import backends
from tests.ops import matrix
from tests.ops.matrix import CASES, FEW, pairs
from tests.tolerances import EXACT

SIZES = {"channels": 6, "classes": 3, "size": (3, 4), "label_size": (5, 7)}


class Recorder(TorchDispatchMode):
    """Lists every registered op of this package that runs, with its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pmm_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def chain(case, arguments, target):
    """The three calls of a chain that differentiating twice makes."""
    incoming, tangents = matrix.directions(case, arguments)
    with matrix.on(target, case.operator), Recorder() as recorder:
        matrix.orders(case, arguments, incoming, tangents)
    return recorder.calls


def differentiable(values):
    return [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x for x in values]


@pytest.mark.parametrize(("name", "target"), pairs(reference=False))
def test_a_chain_of_three(name, target):
    case = CASES[name]
    calls = chain(case, matrix.make(case, target.device, **SIZES), target)
    suffixes = ("", "_backward", "_double_backward")
    assert [op.name() for op, _ in calls] == [f"pmm_fast::{case.operator}{suffix}" for suffix in suffixes]
    assert all(args[-1] == target.backend for _, args in calls)


@pytest.mark.parametrize(("name", "target"), pairs(interpreted=("pool", "pass-one"), reference=False))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
def test_opcheck(name, target, layout):
    case = CASES[name]
    layouts = {
        "contiguous": torch.Tensor.contiguous,
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
        "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
    }
    if target.interpreted and layout != "channels_last":
        pytest.skip("too slow to interpret")
    if name not in ("pool", "pass-values", "loss") and layout != "contiguous":
        pytest.skip("another case of this operator, or the pass that reads as it does, shows it")
    arguments = matrix.changed(case, matrix.make(case, target.device, **SIZES), layouts[layout])
    forward, backward, double_backward = chain(case, arguments, target)
    for op, args in (forward, backward):
        torch.library.opcheck(op, differentiable(args))
    # differentiating this one raises, so it is checked as what it is
    op, args = double_backward
    torch.library.opcheck(op, [x.detach() if isinstance(x, torch.Tensor) else x for x in args])


@pytest.mark.parametrize(("name", "target"), pairs(reference=False, interpreted=()))
def test_fakes_at_unusual_sizes(name, target):
    """Shapes, dtypes and strides that tracing assumes: an empty batch, one position, two dtypes."""
    if target.compiles and name not in FEW:
        pytest.skip("long to compile, and another case of this operator shows it")
    case = CASES[name]
    for sizes in ({"batch": 0}, {"size": (1, 1)}, {"classes": 1}, {"dtype": torch.bfloat16}):
        for op, args in chain(case, matrix.make(case, target.device, **(SIZES | sizes)), target):
            constants = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            torch.library.opcheck(op, constants, test_utils=("test_schema", "test_faketensor"))


def second_order_step(case, arguments):
    """All tensors to the gradient of a gradient's norm, as the meta-learning step has it; and the tensors."""
    names = [key for key in arguments if isinstance(arguments[key], torch.Tensor) and (key, case.shared) != WRITTEN]

    def step(*tensors):
        named = dict(zip(names, tensors, strict=True))
        if case.shared:
            named["written"] = named["features"]
        outputs = matrix.call(case, arguments | named)[: len(case.outputs)]
        total = sum(((1 + i) * y.square().sum() for i, y in enumerate(outputs)), outputs[0].new_zeros(()))
        inputs = [named[key] for key in case.tensors]
        grads = torch.autograd.grad(total, inputs, create_graph=True)
        return torch.autograd.grad(sum((grad.square().sum() for grad in grads), total), inputs)

    return step, [arguments[key].detach().requires_grad_(key in case.tensors) for key in names]


WRITTEN = ("written", True)


@pytest.mark.parametrize(("name", "target"), pairs(FEW, ("pass-one",)))
@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_tracing_a_step_of_second_order(name, target, tracing_mode):
    """make_fx of a loss, its gradient and that one's: the graph computes what eager computes, on new data too."""
    case = CASES[name]
    if target.backend == "reference" and tracing_mode == "real" and "labels" in case.others:
        pytest.skip("the reference looks at the labels, which a real tracer does not allow")
    with matrix.on(target, case.operator):
        step, point = second_order_step(case, matrix.make(case, target.device, **SIZES))
        _, others = second_order_step(case, matrix.make(case, target.device, seed=5, **SIZES))
        graph = make_fx(step, tracing_mode=tracing_mode)(*point)
        for inputs in (point, others):
            for found, expected in zip(graph(*inputs), step(*inputs), strict=True):
                torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    names = {str(node.target) for node in graph.graph.nodes}
    suffixes = ("", "_backward", "_double_backward")
    wanted = {f"pmm_fast.{case.operator}{suffix}.default" for suffix in suffixes}
    assert wanted <= names or target.backend == "reference"


@pytest.mark.parametrize(("name", "target"), pairs(FEW, ("pass-one",), reference=False))
def test_compiled_forward_and_backward(name, target):
    case = CASES[name]
    apply, point = matrix.function(case, matrix.make(case, target.device, **SIZES))
    incoming, _ = matrix.directions(case, matrix.make(case, target.device, **SIZES))
    torch._dynamo.reset()
    compiled = torch.compile(apply, backend="aot_eager")
    with matrix.on(target, case.operator):
        results = []
        for f in (compiled, apply):
            outputs = f(*point)
            results.append([*outputs, *torch.autograd.grad(outputs, point, incoming)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("name", "target"), pairs(FEW, (), reference=False))
def test_registered_op_compiles_without_a_break(name, target):
    """Called directly: the choice of a backend stays outside of the graph."""
    case = CASES[name]
    (op, args), *_ = chain(case, matrix.make(case, target.device, **SIZES), target)
    args = differentiable(args)
    floats = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.requires_grad]

    def apply(*tensors):
        values = iter(tensors)
        outputs = op(*(next(values) if i in floats else x for i, x in enumerate(args)))
        return [y for y in outputs if y.requires_grad] if isinstance(outputs, tuple) else [outputs]

    point = [args[i] for i in floats]
    torch._dynamo.reset()
    compiled = torch.compile(apply, backend="aot_eager", fullgraph=True)
    results = []
    for f in (compiled, apply):
        outputs = f(*point)
        results.append([*outputs, *torch.autograd.grad([y.sin().sum() for y in outputs], point)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("name", "target"), pairs(interpreted=("pass-one",)))
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
    ids=["float32", "bfloat16", "float16"],
)
def test_autocast_changes_nothing(name, target, dtype, autocast):
    if dtype == torch.float16 and target.device == "cpu":
        pytest.skip("no float16 on the CPU")
    if target.compiles and name not in FEW:
        pytest.skip("long to compile, and another case of this operator shows it")
    case = CASES[name]
    arguments = matrix.make(case, target.device, dtype=dtype, **SIZES)
    incoming, tangents = matrix.directions(case, arguments)
    apply, point = matrix.function(case, arguments)
    results = []
    with matrix.on(target, case.operator):
        for inside in (False, True):
            with torch.autocast(target.device, autocast, inside):
                outputs = apply(*point)
            # plain PyTorch can keep its promise only where gradients are taken outside of autocast, as they should be
            with torch.autocast(target.device, autocast, inside and target.backend != "reference"):
                grads = torch.autograd.grad(outputs, point, incoming, create_graph=True)
                # differentiating what is linear gives nothing
                second = torch.autograd.grad(grads, point, tangents, allow_unused=True) if name != "pool-raw" else ()
            results.append([*outputs, *grads, *second])
    for found, expected in zip(*results, strict=True):
        assert (found is None and expected is None) or (found.dtype == expected.dtype and torch.equal(found, expected))


def test_the_cpu_backend_is_built_where_there_is_a_compiler():
    """A build that failed without a word would turn every test of the backend into a skip."""
    compilers = ("c++", "g++", "clang++", (sysconfig.get_config_var("CXX") or "c++").split()[0])
    if not any(map(shutil.which, compilers)):
        pytest.skip("no C++ compiler")
    for operator in backends.OPERATORS:
        assert "cpu" in ops.available_backends(operator), ops.explain(operator)


def test_triton_is_interpreted_where_it_is_installed():
    pytest.importorskip("triton")
    for operator in backends.OPERATORS:
        assert torch.cuda.is_available() or "triton" in ops.available_backends(operator), ops.explain(operator)


@pytest.mark.parametrize("name", FEW)
def test_the_cpu_backend_has_no_float16(name, monkeypatch):
    case = CASES[name]
    arguments = matrix.make(case, dtype=torch.float16)
    message = rf"{case.operator}: backend 'cpu' was asked for but cannot take this call: no float16 on the CPU"
    if backends.missing("cpu"):
        pytest.skip(backends.missing("cpu"))
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        matrix.call(case, arguments)
    monkeypatch.setattr(backends, "_said", set())
    with ops.record_backends() as calls, pytest.warns(UserWarning, match=r"plain PyTorch.*no float16 on the CPU"):
        matrix.call(case, arguments)
    assert calls == [(case.operator, "reference")]
