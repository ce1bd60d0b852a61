"""The compiled step against the eager one, from both sides, and what it does when they differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from pmm_fast import meta, ops
from pmm_fast.meta import compile as compile_module
from pmm_fast.meta import trace as trace_module
from pmm_fast.models.batchnorm import BatchNorm2d
from pmm_fast.ops import backends
from tests.meta.tiny import CHANNELS, CLASSES, TinySegmentor, tiny_batch, tiny_problem
from tests.tolerances import COMPILED

PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bf16": (torch.float32, torch.bfloat16),
}
BACKENDS = ["reference", "cpu"]


def cast(value, dtype):
    """The floating-point tensors of a nest of dictionaries and tuples in another type."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    return None if value is None else type(value)(*(cast(item, dtype) for item in value))


def problem(precision="float64", mode="pinmem", **options):
    """A step of the tiny network with the batch norm of the real ones: torch's own is traced wrongly in bf16."""
    dtype, autocast = PRECISIONS[precision]
    *arguments, hyper = tiny_problem(mode, autocast=autocast, **options)
    model = TinySegmentor(memory=mode in meta.MEMORY_MODES)
    model.encoder.bn = BatchNorm2d(CHANNELS)
    hyper = replace(hyper, network=meta.Network(model))
    return [cast(argument, dtype) for argument in arguments], hyper


def silent(engine="graph", **options):
    """A compiled step that keeps its lines."""
    lines: list[str] = []
    compiled = meta.CompiledStep(engine, say=lines.append, **options)
    return compiled, lines


def flat(result: meta.StepResult) -> Tensor:
    return torch.cat([grad.double().flatten() for grad in result.grads.values()])


def apart(found: meta.StepResult, expected: meta.StepResult) -> float:
    return float((flat(found) - flat(expected)).norm() / flat(expected).norm())


def assert_same(found: meta.StepResult, expected: meta.StepResult, tolerance: float) -> None:
    """Every output, name by name."""
    torch.testing.assert_close(found.losses, expected.losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.memory, expected.memory, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.buffers, expected.buffers, rtol=tolerance, atol=tolerance)
    assert list(found.grads) == list(expected.grads) and list(found.losses) == list(expected.losses)
    assert apart(found, expected) <= tolerance


def needs(backend):
    if backend == "cpu" and backends.missing("cpu"):
        pytest.skip(backends.missing("cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("order", [1, 2])
def test_equal_to_eager_from_both_sides(order, precision, backend):
    """On a batch that the graph was not traced with."""
    needs(backend)
    arguments, hyper = problem(precision, order=order)
    other = [*arguments[:3], *(cast(tiny_batch(seed), arguments[3].images.dtype) for seed in (7, 8)), arguments[5]]
    with ops.use_backend(backend), ops.record_backends() as calls:
        compiled, _ = silent(strict=True)
        compiled(*arguments, hyper)
        before = len(calls)
        found = compiled(*other, hyper)
        assert len(calls) == before, "a graph chooses no backend: this was eager mode"
        expected, first = (meta.step(*other, replace(hyper, order=n)) for n in (order, 1))
        assert calls and {name for _, name in calls} == {backend}
    assert_same(found, expected, COMPILED)
    if order == 2:
        assert apart(found, first) > 100 * COMPILED
    assert not any(value.requires_grad for value in found.grads.values())


@pytest.mark.parametrize("mode", ["memory-agg", "mldg", "agg"])
def test_the_other_modes(mode):
    arguments, hyper = problem(mode=mode)
    compiled, _ = silent(strict=True)
    for _ in range(2):
        assert_same(compiled(*arguments, hyper), meta.step(*arguments, hyper), COMPILED)


def test_checkpointed_activations():
    """Blocks that compute again are functions of their own to autograd, and plain operations in a graph."""
    model = TinySegmentor()
    model.encoder.conv = nn.Sequential(model.encoder.conv, BatchNorm2d(CHANNELS)).double()
    model.encoder.bn = nn.Identity()
    params, buffers, _ = meta.split_state(model)
    arguments, hyper = problem()
    arguments[:2] = [cast(params, torch.float64), cast(buffers, torch.float64)]
    plain = meta.step(*arguments, replace(hyper, network=meta.Network(model)))
    hyper = replace(hyper, network=meta.Network(model, checkpoint_activations=True))
    compiled, _ = silent(strict=True)
    compiled(*arguments, hyper)
    assert_same(compiled(*arguments, hyper), plain, COMPILED)
    assert compiled.agreements[0].share == pytest.approx(1)


@pytest.mark.slow
def test_inductor_and_its_cache(monkeypatch, tmp_path):
    needs("cpu")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    arguments, hyper = problem("float32", mode="mldg")
    expected, first = (meta.step(*arguments, replace(hyper, inner_lr=0.3, order=order)) for order in (2, 1))
    for expected_hits in (0, 1):
        hits = counters["inductor"]["fxgraph_cache_hit"]
        compiled, lines = silent("inductor", strict=True)
        compiled(*arguments, hyper)
        found = compiled(*arguments, replace(hyper, inner_lr=0.3))
        assert_same(found, expected, COMPILED)
        assert apart(found, first) > 100 * COMPILED
        assert any("cached in" in line for line in lines) and compiled.compile_seconds > 0
        assert counters["inductor"]["fxgraph_cache_hit"] - hits == expected_hits


@pytest.mark.parametrize("as_tensor", [False, True])
def test_inner_rate_and_loss_scale_are_inputs(as_tensor):
    arguments, hyper = problem()
    compiled, _ = silent(strict=True)
    results = []
    for inner_lr, loss_scale in ((0.5, 1024.0), (0.1, 1024.0), (0.1, 64.0)):
        asked = replace(hyper, inner_lr=inner_lr, loss_scale=loss_scale)
        given = replace(asked, inner_lr=torch.tensor(inner_lr), loss_scale=torch.tensor(loss_scale))
        results.append(compiled(*arguments, given if as_tensor else asked))
        # a float32 tensor holds 0.1 less exactly
        assert_same(results[-1], meta.step(*arguments, asked), 1e-6 if as_tensor else COMPILED)
    assert compiled.graphs == 1
    assert apart(results[0], results[1]) > 1e-2
    compiled(*arguments, replace(hyper, loss_scale=1.0))
    assert compiled.graphs == 2


def test_another_layout_is_traced_anew():
    arguments, hyper = problem()
    params, buffers, memory, mtr, mte, noise = arguments
    compiled, _ = silent(strict=True)
    fewer = [
        params,
        buffers,
        memory,
        meta.Batch(*(part[:2] for part in mtr)),
        mte,
        noise._replace(train=noise.train[:2]),
    ]
    small = meta.Batch(mtr.images, mtr.labels.to(torch.uint8))
    seeds = meta.Noise(torch.tensor([3]), torch.tensor([4]))
    cases = [
        (arguments, hyper),
        (fewer, hyper),
        ([params, buffers, memory, small, mte, noise], hyper),
        ([params, buffers, memory, mtr, mte, seeds], hyper),
        (arguments, replace(hyper, aux_weight=0.1)),
        (arguments, replace(hyper, order=1)),
    ]
    for _ in range(2):
        for count, (case, settings) in enumerate(cases, 1):
            assert_same(compiled(*case, settings), meta.step(*case, settings), COMPILED)
            assert compiled.graphs >= count
    assert compiled.graphs == len(cases)
    with ops.use_backend("reference"):
        compiled(*arguments, hyper)
    assert compiled.graphs == len(cases) + 1


def test_no_more_graphs_than_allowed(monkeypatch):
    monkeypatch.setattr(compile_module, "MAX_GRAPHS", 1)
    arguments, hyper = problem(mode="agg")
    another = replace(hyper, aux_weight=0.1)
    compiled, lines = silent()
    compiled(*arguments, hyper)
    for _ in range(2):
        assert_same(compiled(*arguments, another), meta.step(*arguments, another), COMPILED)
    assert compiled.graphs == 1 and compiled.fallback is None
    assert len([line for line in lines if "1 layouts of the step are compiled" in line]) == 1
    strict, _ = silent(strict=True)
    strict(*arguments, hyper)
    with pytest.raises(meta.CompileError, match="further ones run eagerly"):
        strict(*arguments, another)


def test_parameters_are_never_stale():
    """Changed in place, as an optimiser does it, or replaced: the graph holds none of them."""
    arguments, hyper = problem()
    compiled, _ = silent(strict=True)
    old = compiled(*arguments, hyper)
    for value in arguments[0].values():
        value.mul_(1.1)
    changed = compiled(*arguments, hyper)
    assert_same(changed, meta.step(*arguments, hyper), COMPILED)
    assert apart(changed, old) > 1e-3
    arguments[0] = {name: value * 1.1 for name, value in arguments[0].items()}
    assert_same(compiled(*arguments, hyper), meta.step(*arguments, hyper), COMPILED)
    assert apart(compiled(*arguments, hyper), changed) > 1e-3


def test_nothing_given_is_changed():
    arguments, hyper = problem(mode="agg")
    compiled, _ = silent(strict=True)
    compiled(*arguments, hyper)
    before = cast(arguments[1], torch.float32)
    result = compiled(*arguments, hyper)
    assert all(torch.equal(before[name], value.float()) for name, value in arguments[1].items())
    assert not torch.equal(result.buffers["encoder.bn.running_mean"], arguments[1]["encoder.bn.running_mean"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_refuses_a_label_out_of_range(backend):
    needs(backend)
    arguments, hyper = problem(mode="agg")
    with ops.use_backend(backend):
        compiled, _ = silent(strict=True)
        compiled(*arguments, hyper)
        arguments[3].labels[0, 0, 0] = CLASSES
        with pytest.raises(
            (ValueError, RuntimeError), match=r"upsample_cross_entropy: (labels hold 4|a label is neither)"
        ):
            compiled(*arguments, hyper)


def of_first_order(call, fuses):
    """A trace that loses the second derivative, as several ways through torch.compile do."""
    return trace_module.trace(replace(call, run=lambda *values: call.run(*values, order=1)))


def without_a_small_gradient(call, fuses):
    """A trace in which the gradient of one small parameter is gone."""

    def run(*values):
        result = call.run(*values)
        name = "memory.classifier.weight"
        return result._replace(grads=result.grads | {name: torch.zeros_like(result.grads[name])})

    return trace_module.trace(replace(call, run=run))


def with_old_statistics(call, fuses):
    def run(*values):
        result = call.run(*values)
        return result._replace(buffers={name: value * 0 for name, value in result.buffers.items()})

    return trace_module.trace(replace(call, run=run))


@pytest.mark.parametrize("wrong", [of_first_order, without_a_small_gradient, with_old_statistics])
def test_a_wrong_graph_is_caught(wrong, monkeypatch):
    monkeypatch.setattr(compile_module, "trace", wrong)
    arguments, hyper = problem()
    compiled, lines = silent()
    for _ in range(3):
        assert_same(compiled(*arguments, hyper), meta.step(*arguments, hyper), COMPILED)
    assert compiled.fallback is not None and compiled.graphs == 0
    assert len([line for line in lines if "every step is eager from here on" in line]) == 1
    strict, _ = silent(strict=True)
    with pytest.raises(meta.CompileMismatchError, match=r"error \d\.\d\de-?\d+ >|error 1\.00e\+00 >"):
        strict(*arguments, hyper)


def test_eager_mode_is_run_twice_on_a_gpu(monkeypatch):
    monkeypatch.setattr(trace_module.Call, "device", torch.device("cuda"))
    arguments, hyper = problem(mode="mldg")
    compiled, lines = silent(strict=True)
    compiled(*arguments, hyper)
    assert compiled.agreements[0].repeat == 0 and "eager mode repeats its gradient to 0.0e+00" in lines[-1]


def test_orders_too_near_to_be_told_apart_are_said_to_be():
    arguments, hyper = problem("float32", inner_lr=1e-9)
    compiled, lines = silent(strict=True)
    compiled(*arguments, hyper)
    assert "too near to be told" in lines[-1] and not compiled.agreements[0].told
    compiled, lines = silent(strict=True)
    compiled(*arguments, replace(hyper, inner_lr=0.5))
    assert "too near" not in lines[-1] and compiled.agreements[0].told
    assert compiled.agreements[0].share == pytest.approx(1, abs=1e-3)


def test_a_batch_without_finite_gradients_checks_nothing():
    arguments, hyper = problem(mode="agg")
    broken = list(arguments)
    broken[3] = meta.Batch(arguments[3].images.clone(), arguments[3].labels)
    broken[3].images[0, 0, 0, 0] = float("inf")
    compiled, _ = silent(strict=True)
    assert not flat(compiled(*broken, hyper)).isfinite().all()
    assert compiled.graphs == 1 and not compiled.agreements
    for _ in range(2):
        compiled(*arguments, hyper)
        assert compiled.graphs == 1 and len(compiled.agreements) == 1


def test_an_engine_is_given_what_it_made_before(monkeypatch):
    given, made = [], []

    def engine(graph, values, earlier):
        given.append(list(earlier))
        made.append(lambda inputs: graph(*inputs))
        return made[-1]

    monkeypatch.setitem(compile_module.ENGINES, "graph", engine)
    arguments, hyper = problem(mode="agg")
    compiled, _ = silent(strict=True)
    compiled(*arguments, hyper)
    compiled(*arguments, replace(hyper, aux_weight=0.1))
    assert given == [[], made[:1]]


def test_copies_by_type():
    """What a captured graph does with its inputs and results: every tensor, whatever type its neighbours have."""
    types = (torch.float32, torch.int64, torch.uint8, torch.float32, torch.bfloat16)
    sources = [torch.arange(1, 4 + i).to(dtype) for i, dtype in enumerate(types)]
    targets = [torch.zeros_like(source) for source in sources]
    meta.copy_tensors(targets, sources)
    assert all(map(torch.equal, targets, sources))


def test_a_cuda_graph_needs_a_gpu():
    arguments, hyper = problem(mode="agg")
    compiled, _ = silent("cuda-graph", strict=True)
    with pytest.raises(meta.CompileError, match="needs tensors on a CUDA device, got cpu"):
        compiled(*arguments, hyper)


def test_dropout_drawn_inside_is_refused():
    model = TinySegmentor()
    model.aux_head = nn.Sequential(nn.Dropout2d(0.5), model.aux_head)
    arguments, hyper = problem()
    arguments[0] = cast(meta.split_state(model)[0], torch.float64)
    compiled, _ = silent(strict=True)
    with pytest.raises(meta.CompileError, match=r"draws random numbers itself .*Noise\.train_keep"):
        compiled(*arguments, replace(hyper, network=meta.Network(model)))


def test_an_argument_that_does_not_fit_gets_the_error_of_the_step():
    arguments, hyper = problem()
    compiled, _ = silent()
    with pytest.raises(ValueError, match="'pinmem' needs a meta-test batch"):
        compiled(*arguments[:4], None, arguments[5], hyper)
    assert compiled.fallback is None


def test_progress(monkeypatch):
    monkeypatch.setattr(compile_module, "HEARTBEAT", 0.01)
    arguments, hyper = problem(mode="agg")
    compiled, lines = silent()
    compiled(*arguments, hyper)
    assert any(line.startswith("compile: tracing the step ... ") for line in lines)
    assert f"{compiled.nodes:,} nodes" in "\n".join(lines) and compiled.trace_seconds > 0
    assert "checked against eager mode: gradient error" in lines[-1]
    count = len(lines)
    compiled(*arguments, hyper)
    assert len(lines) == count


def test_choice_of_engine():
    for kind in ("cpu", "cuda"):
        device = torch.device(kind)
        assert meta.choose_engine("on", device, 1) in compile_module.ENGINES
        assert meta.choose_engine("off", device, 10**6) is None
        assert meta.choose_engine("auto", device, 1) is None
    assert meta.choose_engine("auto", torch.device("cpu"), 10**6) == "graph"
    # no record says that it pays there
    assert meta.choose_engine("auto", torch.device("cuda"), 10**6) is None
