import pytest

from pmm_fast import ops
from pmm_fast.ops import backends
from tests.ops.inputs import make_inputs


def run_all(inputs):
    ops.masked_average_pool(inputs.features, inputs.labels, 4)
    ops.update_memory(inputs.memory, inputs.memory, inputs.memory[:, 0], 0.8)
    ops.memory_read(inputs.features, inputs.memory)
    ops.memory_pass(inputs.features, inputs.written, inputs.labels, inputs.memory)
    ops.upsample_cross_entropy(inputs.features[:, :4], inputs.labels)


def test_every_operator_goes_through_the_chosen_backend():
    for choice in ("auto", "reference"):
        with ops.use_backend(choice), ops.record_backends() as calls:
            run_all(make_inputs())
        assert calls == [(name, "reference") for name in backends.OPERATORS]


@pytest.mark.parametrize("name", ["cpu", "triton", "cuda"])
def test_an_explicit_backend_never_falls_back(name):
    inputs = make_inputs()
    with ops.use_backend(name), pytest.raises(RuntimeError, match=f"'{name}' was asked for .* not part of this build"):
        ops.memory_read(inputs.features, inputs.memory)


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


def test_explain_says_what_is_taken_and_why_not():
    text = ops.explain("memory_read", make_inputs().features, make_inputs().memory)
    assert "reference taken" in text and "cuda      not part of this build" in text
    assert ops.available_backends("memory_read") == ["reference"]


def test_a_better_backend_is_taken_unless_it_refuses(monkeypatch):
    monkeypatch.setattr(backends, "_implementations", dict(backends._implementations))
    backends.register("memory_read", "cpu", lambda *a: "cpu ran", lambda features, *a: None if features.dim() else "no")
    inputs = make_inputs()
    assert backends.dispatch("memory_read", inputs.features, inputs.memory) == "cpu ran"
    assert ops.available_backends("memory_read") == ["cpu", "reference"]
    backends.register("memory_read", "cpu", lambda *a: "cpu ran", lambda *a: "features too small")
    with ops.record_backends() as calls:
        ops.memory_read(inputs.features, inputs.memory)
    assert calls == [("memory_read", "reference")]
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="features too small"):
        ops.memory_read(inputs.features, inputs.memory)
    assert "features too small" in ops.explain("memory_read", inputs.features, inputs.memory)
