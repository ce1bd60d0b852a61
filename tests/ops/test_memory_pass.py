import pytest
import torch

from pmm_fast import ops
from tests.ops import matrix
from tests.ops.inputs import make_inputs
from tests.tolerances import assert_accurate


@pytest.mark.parametrize("target", matrix.TARGETS)
@pytest.mark.parametrize("shared", [False, True])
def test_is_the_read_of_features_and_the_pool_of_written(target, shared):
    inputs = make_inputs()._replace(**({"written": make_inputs().features} if shared else {}))
    inputs = type(inputs)(*(tensor.to(target.device) for tensor in inputs))
    written = inputs.features if shared else inputs.written
    with matrix.on(target):
        found = ops.memory_pass(inputs.features, written, inputs.labels, inputs.memory, inputs.noise, 0.5)
        read, scores = ops.memory_read(inputs.features, inputs.memory, inputs.noise, 0.5)
        sums, mass = ops.masked_average_pool(written, inputs.labels, 4)
    for a, b in zip(found, (read, scores, sums, mass), strict=True):
        assert_accurate(a, b, b, "forward")


@pytest.mark.parametrize("target", matrix.TARGETS)
def test_one_tensor_has_the_sum_of_the_gradients_of_two(target):
    case, one = matrix.CASES["pass"], matrix.CASES["pass"]._replace(tensors=("features", "memory"), shared=True)
    arguments = matrix.make(one, target.device)
    twice = arguments | {"written": arguments["features"].clone()}
    incoming, tangents = matrix.directions(one, arguments)
    with matrix.on(target, "memory_pass"):
        shared = matrix.orders(one, arguments, incoming, tangents)
        separate = matrix.orders(case, twice, incoming, [tangents[0], tangents[0], tangents[1]])
    for order in ("backward", "double_backward"):
        total = separate[order]["features"] + separate[order]["written"]
        assert_accurate(shared[order]["features"], total, total, order)
        assert_accurate(shared[order]["memory"], separate[order]["memory"], separate[order]["memory"], order)


def test_bad_arguments():
    inputs = make_inputs()
    message = r"written must be like features, \(2, 6, 3, 5\) torch.float64, got \(2, 6, 3, 4\) torch.float64"
    with pytest.raises(ValueError, match=message):
        ops.memory_pass(inputs.features, inputs.written[..., :4], inputs.labels, inputs.memory)
    with pytest.raises(ValueError, match=r"got \(2, 6, 3, 5\) torch.float32"):
        ops.memory_pass(inputs.features, inputs.written.float(), inputs.labels, inputs.memory)
    with pytest.raises(ValueError, match=r"labels hold 9, expected classes in 0\.\.3"):
        ops.memory_pass(inputs.features, inputs.written, torch.full((2, 7, 11), 9), inputs.memory)
    with pytest.raises(ValueError, match=r"values must be \[K, D\] with K = 4, got shape \(3, 6\)"):
        ops.memory_pass(inputs.features, inputs.written, inputs.labels, inputs.memory, values=torch.zeros(3, 6))
