import warnings

import pytest
import torch

from pmm_fast import ops
from pmm_fast.ops import backends
from tests.ops.inputs import make_inputs


def run_all(inputs):
    ops.masked_average_pool(inputs.features, inputs.labels, 4)
    ops.update_memory(inputs.memory, inputs.memory, inputs.memory[:, 0], 0.8)
    ops.memory_read(inputs.features, inputs.memory)
    ops.memory_pass(inputs.features, inputs.written, inputs.labels, inputs.memory)
    ops.upsample_cross_entropy(inputs.features[:, :4], inputs.labels)
    images, looks = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([[0.0, 1, 2, 3, 1, 1, 1, 0, 0]])
    ops.photometric(images, looks, (0.5,) * 3, (0.5,) * 3)
    ops.merge_tiles(torch.zeros(1, 2, 2, 3), [0], [0], (4, 6), (4, 6))


@pytest.fixture
def only(monkeypatch):
    """Make a machine that has some backends and not the others."""

    def have(*names):
        reasons = {name: None if name in (*names, "reference") else f"{name} is not here" for name in backends.BACKENDS}
        monkeypatch.setattr(backends, "missing", reasons.__getitem__)
        monkeypatch.setattr(backends, "_said", set())

    return have


def test_every_operator_goes_through_the_chosen_backend():
    """All but the update of the memory, which is plain PyTorch on every backend."""
    best = "cpu" if backends.missing("cpu") is None else "reference"
    for choice, expected in (("auto", best), ("reference", "reference")):
        with ops.use_backend(choice), ops.record_backends() as calls:
            run_all(make_inputs())
        assert calls == [(name, expected) for name in backends.OPERATORS]


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_an_explicit_backend_never_falls_back(name, only):
    only()
    inputs = make_inputs()
    message = rf"memory_read: backend '{name}' was asked for .*: {name} is not here; available: reference"
    with ops.use_backend(name), pytest.raises(RuntimeError, match=message):
        ops.memory_read(inputs.features, inputs.memory)


def test_an_automatic_choice_falls_back_and_says_so_once(only):
    only()
    inputs = make_inputs()
    with pytest.warns(UserWarning, match="memory_read runs in plain PyTorch, which is slower .cpu: cpu is not here"):
        ops.memory_read(inputs.features, inputs.memory)
    with warnings.catch_warnings(), ops.record_backends() as calls:
        warnings.simplefilter("error")
        ops.memory_read(inputs.features, inputs.memory)
    assert calls == [("memory_read", "reference")]


def test_an_interpreter_is_only_for_those_who_ask(only, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    only("triton")
    inputs = make_inputs()
    assert ops.available_backends("memory_read") == ["triton", "reference"]
    text = ops.explain("memory_read", inputs.features, inputs.memory)
    assert "triton    usable" in text and "reference taken" in text


def test_a_backend_refuses_tensors_of_another_device(only, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    only("cuda", "triton", "cpu")
    inputs = make_inputs()
    text = ops.explain("memory_read", inputs.features, inputs.memory)
    assert text.count("the tensors are on cpu") == 2 and "cpu       taken" in text
    with pytest.raises(ValueError, match="memory_read: all tensors must be on one device, got cpu, meta"):
        ops.explain("memory_read", inputs.features, inputs.memory.to("meta"))


def test_a_transformed_tensor_is_refused(only):
    """A registered operator would be wrong or fail under torch.func; the reference is right."""
    only("cpu")
    inputs = make_inputs()
    with ops.record_backends() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grad = torch.func.grad(lambda x: ops.memory_read(x, inputs.memory)[0].sum())(inputs.features)
    assert calls == [("memory_read", "reference")] and grad.any()


def test_environment_variable_and_its_restoration(monkeypatch):
    monkeypatch.setenv("PMM_FAST_BACKEND", "triton")
    assert backends.requested() == "triton"
    with ops.use_backend("reference"):
        assert backends.requested() == "reference"
    assert backends.requested() == "triton"
    monkeypatch.setenv("PMM_FAST_BACKEND", "gpu")
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        backends.requested()


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown backend 'fast'"), ops.use_backend("fast"):
        pass
    with pytest.raises(ValueError, match="unknown operator 'pool'; expected one of masked_average_pool"):
        ops.available_backends("pool")


def test_explain_says_what_is_taken_and_why_not(only):
    only("cpu")
    text = ops.explain("memory_read", make_inputs().features, make_inputs().memory)
    assert text.splitlines() == [
        "memory_read (backend: auto)",
        "  cuda      cuda is not here",
        "  triton    triton is not here",
        "  cpu       taken",
        "  reference usable",
    ]
    assert ops.available_backends("memory_read") == ["cpu", "reference"]
    with ops.use_backend("reference"):
        assert "reference taken" in ops.explain("memory_read") and "cpu       usable" in ops.explain("memory_read")


def test_a_better_backend_is_taken_unless_it_refuses(monkeypatch, only):
    only("cpu")
    monkeypatch.setattr(backends, "_implementations", dict(backends._implementations))
    backends.register("memory_read", "cpu", lambda *a: "cpu ran", lambda features, *a: None if features.dim() else "no")
    inputs = make_inputs()
    assert backends.dispatch("memory_read", inputs.features, inputs.memory) == "cpu ran"
    backends.register("memory_read", "cpu", lambda *a: "cpu ran", lambda *a: "features too small")
    with ops.record_backends() as calls, pytest.warns(UserWarning, match="features too small"):
        ops.memory_read(inputs.features, inputs.memory)
    assert calls == [("memory_read", "reference")]
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="features too small"):
        ops.memory_read(inputs.features, inputs.memory)
    assert "features too small" in ops.explain("memory_read", inputs.features, inputs.memory)
