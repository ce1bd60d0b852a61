"""First and second derivatives of every operator on every backend: finite differences, patterns of gradients."""

import pytest
import torch

from pmm_fast import ops
from tests.ops import matrix
from tests.ops.matrix import CASES, FEW, pairs
from tests.tolerances import assert_accurate

SMALL = {"batch": 1, "channels": 3, "classes": 3, "size": (2, 2), "label_size": (3, 5)}
# what is left after a sum's gradient still depends on the features
NONLINEAR = [name for name in CASES if name != "pool-raw"]


@pytest.mark.parametrize(("name", "target"), pairs())
def test_finite_differences_of_first_order(name, target):
    case = CASES[name]
    function, point = matrix.function(case, matrix.make(case, target.device, **SMALL))
    with matrix.on(target, case.operator):
        assert torch.autograd.gradcheck(function, point, fast_mode=target.interpreted)


@pytest.mark.parametrize(("name", "target"), pairs())
def test_finite_differences_of_second_order(name, target):
    case = CASES[name]
    function, point = matrix.function(case, matrix.make(case, target.device, **SMALL))
    with matrix.on(target, case.operator):
        assert torch.autograd.gradgradcheck(function, point, fast_mode=target.interpreted)


@pytest.mark.parametrize(
    ("name", "target"), pairs(("read-values", "pass-values", "pass-one"), ("pass-values",), reference=False)
)
def test_each_argument_alone(name, target):
    """Wanting one gradient, of either order, gives what wanting all gives."""
    case = CASES[name]
    arguments = matrix.make(case, target.device)
    incoming, tangents = matrix.directions(case, arguments)
    with matrix.on(target, case.operator):
        everything = matrix.orders(case, arguments, incoming, tangents)
        for index, argument in enumerate(case.tensors):
            function, (point,) = matrix.function(case, arguments, (argument,))
            (grad,) = torch.autograd.grad(function(point), point, incoming, create_graph=True)
            torch.testing.assert_close(grad, everything["backward"][argument], rtol=1e-12, atol=1e-13)
            (second,) = torch.autograd.grad(grad, point, tangents[index])
            assert second.shape == point.shape and second.isfinite().all()


@pytest.mark.parametrize(
    ("name", "target"), pairs(("read-values", "pass-values", "pass-one"), ("pass-one",), reference=False)
)
def test_second_order_of_each_pair_of_arguments(name, target):
    """The derivative along one gradient with respect to one argument, where nothing else takes part."""
    case = CASES[name]
    arguments = matrix.make(case, target.device)
    incoming, tangents = matrix.directions(case, arguments)
    tensors = case.tensors if not target.interpreted else case.tensors[:2]
    for index, first in enumerate(case.tensors):
        for second in tensors:
            results = []
            for backend in (target, matrix.Target("reference", target.device)):
                with matrix.on(backend, case.operator):
                    function, point = matrix.function(case, arguments, tuple(dict.fromkeys((first, second))))
                    outputs, grads = zip(
                        *((y, grad) for y, grad in zip(function(*point), incoming, strict=True) if y.requires_grad),
                        strict=True,
                    )
                    grad = torch.autograd.grad(outputs, point[0], grads, create_graph=True)[0]
                    # what is linear in all that takes part has no second derivative, and PyTorch no graph of it
                    grad = grad + 0 * sum(x.sum() for x in point)
                    results += torch.autograd.grad(grad, point[-1], tangents[index])
            assert_accurate(*results, results[1], "double_backward")


@pytest.mark.parametrize(("name", "target"), pairs())
def test_nothing_to_differentiate(name, target):
    case = CASES[name]
    arguments = matrix.make(case, target.device)
    with matrix.on(target, case.operator):
        outputs = matrix.call(case, arguments)
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize(("name", "target"), pairs(("read-values", "pass-values", "pass-one"), ("pass-values",)))
def test_each_output_alone(name, target):
    """Gradients of the other outputs are then None, in the backward of the backward too."""
    case = CASES[name]
    arguments = matrix.make(case, target.device)
    incoming, tangents = matrix.directions(case, arguments)
    for index in range(len(case.outputs)):
        alone = [grad if i == index else torch.zeros_like(grad) for i, grad in enumerate(incoming)]
        with matrix.on(target, case.operator):
            expected = matrix.orders(case, arguments, alone, tangents)
            function, point = matrix.function(case, arguments)
            output = function(*point)[index]
            grads = torch.autograd.grad(
                output, point, incoming[index], create_graph=True, allow_unused=True, materialize_grads=True
            )
            second = torch.autograd.grad(grads, point, tangents, allow_unused=True, materialize_grads=True)
        for argument, a, b in zip(case.tensors, grads, second, strict=True):
            torch.testing.assert_close(a, expected["backward"][argument], rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(b, expected["double_backward"][argument], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("name", "target"), pairs(NONLINEAR, ("pool",)))
def test_expanded_incoming_gradients(name, target):
    """A sum has a gradient that is one number with stride 0."""
    case = CASES[name]
    arguments = matrix.make(case, target.device)
    results = []
    for backend in (target, matrix.Target("reference", target.device)):
        with matrix.on(backend, case.operator), matrix.poisoned():
            function, point = matrix.function(case, arguments)
            total = sum(((2 + i) * output.sum() for i, output in enumerate(function(*point))), torch.tensor(0.0))
            grads = torch.autograd.grad(total, point, create_graph=True)
            squares = sum((grad.sum() for grad in grads), torch.tensor(0.0))
            results.append((grads, torch.autograd.grad(squares, point, allow_unused=True, materialize_grads=True)))
    for order, found, expected in zip(("backward", "double_backward"), *results, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert_accurate(a, b, b, order, cancelling=1.0)


@pytest.mark.parametrize(("name", "target"), pairs(FEW, ("pass-values",)))
def test_arguments_that_are_not_leaves(name, target):
    """Through what stands before the operator: the chain rule, with the same tensor in two places."""
    case = CASES[name]
    arguments = matrix.make(case, target.device)
    incoming, _ = matrix.directions(case, arguments)
    results = []
    for backend in (target, matrix.Target("reference", target.device)):
        with matrix.on(backend, case.operator):
            function, point = matrix.function(case, arguments)
            outputs = function(*(torch.sin(x) * x for x in point))
            grads = torch.autograd.grad(outputs, point, incoming, create_graph=True)
            norm = sum(((grad**2).sum() for grad in grads), torch.tensor(0.0))
            results.append((grads, torch.autograd.grad(norm, point)))
    for order, found, expected in zip(("backward", "double_backward"), *results, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert_accurate(a, b, b, order)


@pytest.mark.parametrize("target", matrix.KERNELS)
def test_memory_made_of_the_features(target):
    """Keys and values that depend on the features: gradients arrive by three ways and add."""
    arguments = matrix.make(CASES["read"], target.device, channels=4, classes=3)
    results = []
    for backend in (target, matrix.Target("reference", target.device)):
        features = arguments["features"].detach().requires_grad_()
        with matrix.on(backend, "memory_read"):
            read, scores = ops.memory_read(features, features.mean((2, 3))[:, :4], None, 0.5)
            (grad,) = torch.autograd.grad((read**2).sum() + scores.sin().sum(), features, create_graph=True)
            results.append((grad, *torch.autograd.grad((grad**2).sum(), features)))
    for order, found, expected in zip(("backward", "double_backward"), *results, strict=True):
        assert_accurate(found, expected, expected, order)


@pytest.mark.parametrize(("name", "target"), pairs(interpreted=("pool",), reference=False))
def test_third_order_is_refused_by_name(name, target):
    case = CASES[name]
    function, point = matrix.function(case, matrix.make(case, target.device))
    with matrix.on(target, case.operator):
        grads = torch.autograd.grad([y.square().sum() for y in function(*point)], point, create_graph=True)
        norm = sum(((grad**2).sum() for grad in grads), torch.tensor(0.0))
        second = torch.autograd.grad(norm, point, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"{case.operator}: third derivatives are not supported; .*reference"):
            torch.autograd.grad(second[0].square().sum(), point)


@pytest.mark.parametrize("name", ["pool", "read-values", "pass-values", "loss"])
def test_the_reference_has_third_derivatives(name):
    case = CASES[name]
    function, point = matrix.function(case, matrix.make(case))
    with ops.use_backend("reference"):
        total = sum((y.square().sum() for y in function(*point)), torch.tensor(0.0))
        for _ in range(3):
            grads = torch.autograd.grad(total, point, create_graph=True)
            total = sum(((grad**2).sum() for grad in grads), torch.tensor(0.0))
    assert total.isfinite() and total != 0
