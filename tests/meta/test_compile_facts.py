"""What PyTorch does with second derivatives it is asked to compile: the reproductions of docs/compile.md.

They pin the present behaviour.  One that fails after an update of PyTorch means that docs/compile.md has to be read
again, not that the package is wrong.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from tests.tolerances import EXACT

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
IMAGES, LABELS = torch.randn(2, 3, 6, 6).double(), torch.randint(0, 3, (2, 4, 4))
NAMES, THETA = zip(*((name, value.detach()) for name, value in NET.named_parameters()), strict=True)
RATE = 0.5


def loss(theta) -> Tensor:
    buffers = {name: value.clone() for name, value in NET.named_buffers()}
    return F.cross_entropy(functional_call(NET, (dict(zip(NAMES, theta, strict=True)), buffers), (IMAGES,)), LABELS)


def adapt(*theta, order=2):
    grads = torch.autograd.grad(loss(theta), theta, create_graph=order == 2)
    return [value - RATE * grad for value, grad in zip(theta, grads, strict=True)]


def leaves():
    return [value.clone().requires_grad_() for value in THETA]


def step(*theta, inner=adapt, order=2):
    """The gradient of the loss after an inner step."""
    theta = [value.detach().requires_grad_() for value in theta]
    adapted = inner(*theta) if order == 2 else [x.detach().requires_grad_() for x in adapt(*theta, order=1)]
    return torch.autograd.grad(loss(adapted), theta if order == 2 else adapted)


def distance(found, expected) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


EXPECTED, FIRST = step(*THETA), step(*THETA, order=1)

# PyTorch 2.11 refuses a new leaf inside a compiled region, whatever the option
leaves_in_a_region = pytest.mark.skipif(torch.__version__ < (2, 13), reason="refused by older versions of PyTorch")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def test_the_orders_differ():
    assert distance(EXPECTED, FIRST) > 1e-2


def test_tracing_the_whole_step_is_exact():
    assert distance(make_fx(step)(*THETA)(*THETA), EXPECTED) < EXACT


def test_a_tensor_from_outside_is_refused_by_a_fake_trace():
    with FakeTensorMode():
        fakes = [torch.empty(value.shape, dtype=value.dtype) for value in THETA]
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        make_fx(step, tracing_mode="fake")(*fakes)


@pytest.mark.parametrize("table", [{}, core_aten_decompositions()], ids=["plain", "core_aten"])
def test_tracing_the_inner_part_alone_is_wrong_without_a_word(table):
    inner = make_fx(adapt, decomposition_table=table)(*leaves())
    assert distance(step(*THETA, inner=inner), EXPECTED) > 1e-3


def test_tracing_the_inner_part_without_its_detach_is_exact():
    inner = make_fx(adapt, decomposition_table={torch.ops.aten.detach.default: lambda x: x})(*leaves())
    assert distance(step(*THETA, inner=inner), EXPECTED) < EXACT


def test_differentiating_a_compiled_loss_twice_is_refused():
    compiled = torch.compile(lambda *theta: loss(theta), backend="aot_eager")

    def inner(*theta):
        grads = torch.autograd.grad(compiled(*theta), theta, create_graph=True)
        return [value - RATE * grad for value, grad in zip(theta, grads, strict=True)]

    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        step(*THETA, inner=inner)


@leaves_in_a_region
def test_a_gradient_inside_a_compiled_region_needs_an_option():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="trace_autograd_ops"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(*THETA)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        assert distance(torch.compile(step, backend="aot_eager", fullgraph=True)(*THETA), EXPECTED) < EXACT


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def step_with_a_function(w):
    w = w.detach().requires_grad_()
    (grad,) = torch.autograd.grad((Square.apply(w) * w).sum(), w, create_graph=True)
    adapted = w - 0.1 * grad
    return torch.autograd.grad((Square.apply(adapted) * adapted).sum(), w)


@leaves_in_a_region
def test_an_autograd_function_in_a_compiled_region_is_wrong_without_a_word():
    w = torch.tensor([1.0, 2.0, 3.0])
    expected = step_with_a_function(w)
    assert distance(make_fx(step_with_a_function)(w)(w), expected) == 0
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = torch.compile(step_with_a_function, backend="aot_eager", fullgraph=True)(w)
    assert distance(found, expected) > 1


def test_a_module_in_a_global_gives_stale_results():
    compiled = torch.compile(lambda params: functional_call(NET, params, (IMAGES,)), backend="eager")
    own = dict(NET.named_parameters())
    first = compiled(own)
    others = {name: value.detach() + 1 for name, value in own.items()}
    assert not torch.allclose(functional_call(NET, others, (IMAGES,)), first)
    torch.testing.assert_close(compiled(others), first)


def test_batch_norm_statistics_of_bf16_are_traced_as_bf16():
    """They are float32; the casts that autograd derives from the wrong type round them in the second derivative."""

    def statistics():
        x, one, zero = torch.ones(2, 3, 4, 4, dtype=torch.bfloat16), torch.ones(3), torch.zeros(3)
        return torch.native_batch_norm(x, one, zero, zero.clone(), one.clone(), True, 0.1, 1e-5)[1].dtype

    with FakeTensorMode():
        assert statistics() == torch.bfloat16
    assert statistics() == torch.float32
