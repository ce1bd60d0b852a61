import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pmm_fast import meta, ops
from pmm_fast.models import batchnorm, build_model
from pmm_fast.models.batchnorm import BatchNorm2d
from tests.distributed.ranks import run_ranks
from tests.tolerances import DOUBLE_BACKWARD, EXACT, relative_error

CHANNELS = 3
OPS = (
    torch.ops.pmm_fast.batch_norm.default,
    torch.ops.pmm_fast.batch_norm_backward.default,
    torch.ops.pmm_fast.batch_norm_double_backward.default,
)


def both(dtype=torch.float64):
    torch.manual_seed(0)
    ours, plain = BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(CHANNELS))
        ours.bias.copy_(torch.randn(CHANNELS))
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    return ours.to(dtype), plain.to(dtype)


def image(dtype=torch.float64, memory_format=torch.contiguous_format):
    x = torch.randn(4, CHANNELS, 5, 6, dtype=torch.float64) * 2 + 3
    return x.to(dtype=dtype, memory_format=memory_format).requires_grad_()


def derivatives(layer, x):
    """Output, first and second derivatives of a function that bends in input, weight and offset."""
    inputs = (x, *layer.parameters())
    output = layer(x)
    first = torch.autograd.grad(output.pow(3).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(value.pow(2).sum() for value in first), inputs)
    return [output, *first, *second]


def as_function(layer):
    """The layer as a function of its input and parameters."""
    names = dict(layer.named_parameters())
    return lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_values_are_those_of_nn_batchnorm(dtype):
    ours, plain = both(torch.promote_types(dtype, torch.float32))
    for training, keeps in ((True, True), (True, False), (False, True)):
        for layer in (ours, plain):
            layer.train(training)
        # running statistics may differ in the last bit
        plain.load_state_dict(ours.state_dict())
        x = image(dtype)
        with torch.set_grad_enabled(keeps):
            assert torch.equal(ours(x), plain(x)) and ours(x).dtype == dtype
            plain(x)
        for name, value in plain.named_buffers():
            assert relative_error(getattr(ours, name), value) < 1e-6


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
def test_equals_nn_batchnorm_to_second_order(memory_format):
    ours, plain = both()
    x = image(memory_format=memory_format)
    for found, expected in zip(derivatives(ours, x), derivatives(plain, x), strict=True):
        assert relative_error(found, expected) < EXACT


def test_gradcheck():
    ours, _ = both()
    inputs = (image(), *ours.parameters())
    assert torch.autograd.gradcheck(as_function(ours), inputs)
    assert torch.autograd.gradgradcheck(as_function(ours), inputs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_second_derivatives_in_other_types_are_near_the_truth(dtype):
    ours, plain = both(torch.float32)
    x = image(dtype)
    exact = derivatives(copy.deepcopy(plain).double(), x.detach().double().requires_grad_())
    for found, expected in zip(derivatives(ours, x)[4:], exact[4:], strict=True):
        # three powers and a square lie between: each rounds
        assert relative_error(found, expected) < 3 * DOUBLE_BACKWARD[dtype]


def test_large_mean_and_small_deviation():
    ours, plain = both(torch.float32)
    x = (torch.randn(4, CHANNELS, 5, 6) * 0.1 + 50).requires_grad_()
    exact = derivatives(copy.deepcopy(plain).double(), x.detach().double().requires_grad_())
    for found, baseline, expected in zip(derivatives(ours, x), derivatives(plain, x), exact, strict=True):
        assert relative_error(found, expected) <= 3 * relative_error(baseline, expected) + 1e-4


# opcheck takes seconds a case
@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    ((torch.float32, torch.channels_last), (torch.bfloat16, torch.contiguous_format)),
    ids=("float32 nhwc", "bf16 nchw"),
)
def test_opcheck(dtype, memory_format):
    ours, _ = both(torch.float32)
    x, grad, of_x = (image(dtype, memory_format) for _ in range(3))
    weight, bias = ours.weight, ours.bias
    # not those of x, for which the sums that opcheck differentiates vanish
    mean, inverse = torch.randn(CHANNELS), torch.rand(CHANNELS)
    # the sum that opcheck differentiates through AOT is constant here: its gradients are rounding alone
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS[0], (x, weight, bias, 1e-5, None), test_utils=checks)
    torch.library.opcheck(OPS[1], (grad, x, weight, mean, inverse, None))
    vectors = [torch.randn(CHANNELS) for _ in range(4)]
    arguments = (of_x, *vectors[:2], grad, x, weight, mean, inverse, *vectors[2:], None)
    torch.library.opcheck(OPS[2], [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments])


@pytest.mark.parametrize("opened", (False, True), ids=("ops", "opened"))
@pytest.mark.parametrize("mode", ("real", "fake"))
def test_traced_with_its_derivatives(opened, mode):
    ours, _ = both()
    parameters = list(ours.parameters())
    names = [name for name, _ in ours.named_parameters()]

    def second_order(x, buffers, *values):
        state = dict(zip(names, values, strict=True)) | {name: value.clone() for name, value in buffers.items()}
        output = torch.func.functional_call(ours, state, x)
        (first,) = torch.autograd.grad(output.pow(3).sum(), x, create_graph=True)
        return (*torch.autograd.grad(first.pow(2).sum(), (x, values[0])), state["running_var"])

    table = batchnorm.DECOMPOSITIONS if opened else {}
    buffers = dict(ours.named_buffers())
    graph = make_fx(second_order, decomposition_table=table, tracing_mode=mode)(image(), buffers, *parameters)
    found = {node.target for node in graph.graph.nodes if "pmm_fast" in str(node.target)}
    assert len(found) == (0 if opened else 3)
    x = image()
    for traced, eager in zip(graph(x, buffers, *parameters), second_order(x, buffers, *parameters), strict=True):
        assert relative_error(traced, eager) < EXACT


def test_third_order_is_refused():
    ours, _ = both()
    x = image()
    value = ours(x).pow(3).sum()
    for _ in range(2):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        value = grad.pow(2).sum()
    with pytest.raises(RuntimeError, match="batch_norm: third derivatives are not supported"):
        torch.autograd.grad(value, x)


def test_one_value_a_channel_is_refused():
    ours, _ = both()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ours(torch.randn(1, CHANNELS, 1, 1, dtype=torch.float64))


def _on_a_rank(group, rank, sizes):
    """Output, first and second derivatives and buffers of one of several ranks, which weighs its loss by its number."""
    ours, _ = both()
    ours.group = group
    torch.manual_seed(1)
    x = image().detach().split(sizes)[rank].requires_grad_()
    inputs = (x, *ours.parameters())
    output = ours(x)
    first = torch.autograd.grad(output.pow(3).sum(), inputs, create_graph=True)
    second = torch.autograd.grad((rank + 1) * sum(value.pow(2).sum() for value in first), inputs)
    return [value.detach() for value in (output, *first, *second, *ours.buffers())]


def test_ranks_together_equal_one_process(tmp_path):
    sizes = (3, 1)
    ours, plain = both()
    torch.manual_seed(1)
    parts = [part.requires_grad_() for part in image().detach().split(sizes)]
    x = torch.cat(parts)
    plain(x)
    # each rank's weight and offset are its own, so that their gradients are those of its images
    state = [[value.detach().clone().requires_grad_() for value in ours.parameters()] for _ in sizes]
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    normal = ((x - mean) / (variance + ours.eps).sqrt()).split(sizes)
    outputs = [n * w.view(1, -1, 1, 1) + b.view(1, -1, 1, 1) for n, (w, b) in zip(normal, state, strict=True)]
    inputs = [value for part, values in zip(parts, state, strict=True) for value in (part, *values)]
    first = torch.autograd.grad(sum(output.pow(3).sum() for output in outputs), inputs, create_graph=True)
    loss = sum((index // 3 + 1) * value.pow(2).sum() for index, value in enumerate(first))
    second = torch.autograd.grad(loss, inputs)
    results = run_ranks(_on_a_rank, 2, tmp_path, sizes)
    for rank, found in enumerate(results):
        own = slice(3 * rank, 3 * rank + 3)
        expected = (outputs[rank], *first[own], second[3 * rank], *plain.buffers())
        for value, wanted in zip((*found[:5], *found[7:]), expected, strict=True):
            assert relative_error(value, wanted) < EXACT
    # which rank has which part of these is nobody's concern: they are added up
    for index in (1, 2):
        total = sum(found[4 + index] for found in results)
        assert relative_error(total, second[index] + second[3 + index]) < EXACT


def test_second_derivative_of_small_values_is_finite_in_fp16():
    x = (torch.randn(4, 3, 5, 5) * 0.01).half().requires_grad_()

    def second_derivative(layer):
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum() * 1e-6, x)[0]

    assert second_derivative(BatchNorm2d(3)).isfinite().all()
    assert not second_derivative(nn.BatchNorm2d(3)).isfinite().all()  # or this class has no reason to be


def test_order_2_step_in_fp16_is_near_float32():
    torch.manual_seed(0)
    model = build_model("deeplabv3plus_resnet18", 4, channels=8, aux_dropout=0.0).train()
    params, buffers, memory = meta.split_state(model)
    memory.copy_(ops.normalize(torch.rand_like(memory), 1))
    batches = [meta.Batch(torch.randn(3, 3, 32, 48), torch.randint(0, 4, (3, 32, 48))) for _ in range(2)]
    gradients = []
    for autocast, scale in ((None, 1.0), (torch.float16, 16.0)):
        hyper = meta.Hyper(meta.Network(model), autocast=autocast, loss_scale=scale)
        grads = meta.step(params, buffers, memory, *batches, meta.Noise(), hyper).grads
        gradients.append(torch.cat([value.flatten() for value in grads.values()]))
    assert gradients[1].isfinite().all()
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95
