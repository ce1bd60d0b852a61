"""Strides of any kind: of every argument, of incoming gradients, and those of what is returned."""

import pytest
import torch

from pmm_fast import ops
from tests.ops import matrix
from tests.ops.matrix import CASES, FEW, pairs


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.mT.contiguous().mT


def permuted(x):
    """Dense, in an order of axes that is neither of the two usual ones."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(x):
    """Every second element of the last axis, and a margin around the first."""
    big = torch.full((x.shape[0] + 2, *x.shape[1:-1], 2 * x.shape[-1]), 77, dtype=x.dtype, device=x.device)
    view = big[1:-1, ..., ::2]
    return view.copy_(x)


def expanded(x):
    """The first image, or the first slot, again and again."""
    return x[:1].expand(x.shape)


def flat(x):
    """One number with stride 0 everywhere: a sum's gradient."""
    return x.flatten()[0].expand(x.shape)


def offset(x):
    """Contiguous, but the first element is not where an allocation begins."""
    big = torch.full((x.numel() + 1,), 77, dtype=x.dtype, device=x.device)
    return big[1:].view(x.shape).copy_(x)


def single(x):
    """Axes of size one with senseless strides, which PyTorch allows."""
    return x[:1].as_strided(x[:1].shape, (7, *x.stride()[1:]))


LAYOUTS = [channels_last, permuted, sliced, expanded, offset, single]
SIZES = {"channels": 9, "classes": 5, "size": (4, 5), "label_size": (9, 13)}


def named(change):
    return change.__name__


def tensors_of(arguments, layout):
    """Names of the tensors, differentiable or not, that can have a layout."""
    without = ("memory", "values") if layout is single else ()
    tensors = [key for key, value in arguments.items() if isinstance(value, torch.Tensor) and value.numel() > 1]
    return [key for key in tensors if key not in without]


@pytest.mark.parametrize(("name", "target"), pairs(("pool", "read-values", "pass-values", "pass-one", "loss"), ()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_all_arguments(name, target, dtype, layout):
    if target.compiles and dtype == torch.bfloat16 and layout not in (channels_last, offset):
        pytest.skip("long to compile, and the layouts of float32 show it")
    case = CASES[name]
    arguments = matrix.make(case, target.device, dtype=dtype, **SIZES)
    arguments = matrix.changed(case, arguments, layout, tensors_of(arguments, layout))
    matrix.compare(name, arguments, target, cancelling=1.0 if layout is expanded else 0.0)


ONE_EACH = list(zip(FEW, [sliced, permuted, channels_last, expanded, offset], strict=True))


@pytest.mark.parametrize(("name", "layout"), ONE_EACH)
def test_all_arguments_interpreted(name, layout):
    case = CASES[name]
    arguments = matrix.make(case, dtype=torch.float32, **SIZES)
    arguments = matrix.changed(case, arguments, layout, tensors_of(arguments, layout))
    matrix.compare(name, arguments, matrix.INTERPRETED, cancelling=1.0)


@pytest.mark.parametrize(("name", "target"), pairs(("read-values", "pass-values"), ()))
@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
def test_each_argument(name, target, layout):
    if target.compiles and (name != "pass-values" or layout not in (channels_last, expanded)):
        pytest.skip("long to compile, and all arguments together show it")
    case = CASES[name]
    arguments = matrix.make(case, target.device, dtype=torch.float32, **SIZES)
    if layout is single:
        arguments = matrix.changed(case, arguments, lambda x: x[:1], tensors_of(arguments, layout))
    for key in tensors_of(arguments, layout):
        matrix.compare(name, matrix.changed(case, arguments, layout, [key]), target, cancelling=1.0)


@pytest.mark.parametrize(("name", "target"), pairs(FEW, ("pass-values", "loss")))
@pytest.mark.parametrize("layout", [channels_last, permuted, sliced, expanded, flat, offset], ids=named)
def test_incoming_gradients(name, target, layout):
    case = CASES[name]
    if (target.interpreted or target.compiles) and layout not in (permuted, flat):
        pytest.skip("too slow to interpret or to compile")
    arguments = matrix.make(case, target.device, **SIZES)
    incoming, tangents = ([layout(x) if x.dim() else x for x in grads] for grads in matrix.directions(case, arguments))
    with ops.use_backend("reference"):
        expected = matrix.orders(case, arguments, *([x.contiguous() for x in grads] for grads in (incoming, tangents)))
    with matrix.on(target, case.operator), matrix.poisoned():
        found = matrix.orders(case, arguments, incoming, tangents)
    for order in ("backward", "double_backward"):
        for key, result in found[order].items():
            torch.testing.assert_close(result, expected[order][key], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "target"), pairs(FEW, ("pass-values",), reference=False))
@pytest.mark.parametrize("layout", [*LAYOUTS[:-1], torch.Tensor.contiguous], ids=named)
def test_what_is_returned(name, target, layout):
    """Maps are dense: channels last where the argument is, else contiguous; everything else is contiguous."""
    if (target.interpreted or target.compiles) and layout not in (channels_last, sliced):
        pytest.skip("too slow to interpret or to compile")
    case = CASES[name]
    plain = matrix.make(case, target.device, **SIZES)
    arguments = matrix.changed(case, plain, layout)
    incoming, tangents = matrix.directions(case, plain)
    with matrix.on(target, case.operator):
        found = matrix.orders(case, arguments, incoming, tangents)
    wanted = torch.channels_last if layout is channels_last else torch.contiguous_format
    maps = {"features", "written", "logits", "read"}
    for order, results in found.items():
        for key, result in results.items():
            # autograd adds the two parts of a memory's gradient, and may keep either's strides
            memory_format = wanted if key in maps else torch.contiguous_format
            assert result.is_contiguous(memory_format=memory_format), (order, key, result.stride())


@pytest.mark.parametrize("target", matrix.KERNELS)
def test_two_layouts_in_one_pass(target):
    """Each gradient has the layout of its own argument."""
    case = CASES["pass-values"]
    arguments = matrix.make(case, target.device, dtype=torch.float32, **SIZES)
    arguments["written"] = channels_last(arguments["written"])
    grads = matrix.compare("pass-values", arguments, target)["backward"]
    assert grads["features"].is_contiguous()
    assert grads["written"].is_contiguous(memory_format=torch.channels_last)


def test_poison_shows():
    with matrix.poisoned():
        assert torch.empty(3).isnan().all() and torch.empty(2, 2, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
