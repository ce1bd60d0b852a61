"""python -m pmm_fast.doctor."""

from __future__ import annotations

import json

import pytest
import torch

from pmm_fast import doctor, ops
from pmm_fast.ops import backends, extension
from pmm_fast.ops.cpu import memory_read, merge_tiles, photometric

NEEDS_CPU = pytest.mark.skipif(extension.missing("_C") is not None, reason=str(extension.missing("_C")))


@NEEDS_CPU
def test_report_shows_the_build_and_right_kernels(capsys, monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", ("cuda", "cpu", "reference"))
    doctor.main([])
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and f"built by {extension.load('_C').compiler}" in text
    for operator in backends.OPERATORS:
        (line,) = (line for line in text.splitlines() if line.strip().startswith(f"cpu {operator}"))
        assert line.endswith("right")
    assert ("cuda       usable" in text) == (backends.missing("cuda") is None)


@NEEDS_CPU
def test_a_wrong_kernel_is_reported(capsys, monkeypatch):
    backward = memory_read.backward

    def wrong(*arguments):
        grads = backward(*arguments)
        return (grads[0] * 1.01, *grads[1:])

    monkeypatch.setattr(memory_read, "backward", wrong)
    monkeypatch.setattr(backends, "BACKENDS", ("cpu", "reference"))
    with pytest.raises(SystemExit) as stopped:
        doctor.main([])
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and "wrong results: cpu memory_read;" in printed.err
    assert "cpu memory_read" in printed.out and "WRONG" in printed.out


@NEEDS_CPU
def test_wrong_colours_are_reported(monkeypatch):
    forward = photometric.forward

    def wrong(*arguments):
        forward(*arguments)
        arguments[-1].copy_(arguments[-1].roll(1, -1))

    monkeypatch.setattr(backends, "BACKENDS", ("cpu", "reference"))
    assert doctor.collect()["checks"]["cpu photometric"]["right"]
    monkeypatch.setattr(photometric, "forward", wrong)
    assert not doctor.collect()["checks"]["cpu photometric"]["right"]


@NEEDS_CPU
@pytest.mark.parametrize("result", [-3, -2, -1])
def test_wrong_tiles_are_reported(monkeypatch, result):
    """The average, the classes or the confidence, a pixel further on."""
    forward = merge_tiles.forward

    def wrong(*arguments):
        forward(*arguments)
        arguments[result].copy_(arguments[result].roll(1, -1))

    monkeypatch.setattr(backends, "BACKENDS", ("cpu", "reference"))
    assert doctor.collect()["checks"]["cpu merge_tiles"]["right"]
    monkeypatch.setattr(merge_tiles, "forward", wrong)
    assert not doctor.collect()["checks"]["cpu merge_tiles"]["right"]


@NEEDS_CPU
def test_nan_is_not_right(monkeypatch):
    double_backward = memory_read.double_backward

    def wrong(*arguments):
        *grads, of_values, of_noise = double_backward(*arguments)
        return (*grads, torch.full_like(of_values, float("nan")), of_noise)

    monkeypatch.setattr(memory_read, "double_backward", wrong)
    monkeypatch.setattr(backends, "BACKENDS", ("cpu", "reference"))
    assert not doctor.collect()["checks"]["cpu memory_read"]["right"]


@NEEDS_CPU
def test_a_kernel_that_raises_is_reported(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(memory_read, "forward", broken)
    monkeypatch.setattr(backends, "BACKENDS", ("cpu", "reference"))
    checks = doctor.collect()["checks"]
    assert checks["cpu memory_read"] == {"errors": [], "failure": "RuntimeError: no such luck", "right": False}
    assert checks["cpu memory_pass"]["right"]


def test_json_without_checks(capsys):
    doctor.main(["--json", "--no-check"])
    report = json.loads(capsys.readouterr().out)
    assert report["checks"] == {} and set(report["backends"]) == set(backends.BACKENDS)
    assert report["backends"]["reference"] is None and report["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ('{"_C": "no C++ compiler was found"}', "not part of this build: no C\\+\\+ compiler was found"),
        ('{"_C": "built"}', "it was built, but the file is gone"),
        ("not json", "nothing was compiled when it was installed"),
        (None, "nothing was compiled when it was installed"),
    ],
)
def test_an_absent_extension_says_why_and_changes_no_result(tmp_path, monkeypatch, report, message):
    path = tmp_path / "_build.json"
    if report is not None:
        path.write_text(report)

    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(extension, "_REPORT", path)
    monkeypatch.setattr(extension.importlib, "import_module", absent)
    monkeypatch.setattr(backends, "_said", set())
    extension._load.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=message):
            extension.load("_C")
        features, memory = torch.randn(1, 4, 2, 2), torch.randn(3, 4)
        with pytest.warns(UserWarning, match=f"plain PyTorch, which is slower .*{message}"):
            found = ops.memory_read(features, memory)
        with ops.use_backend("reference"):
            assert torch.equal(found[0], ops.memory_read(features, memory)[0])
        with ops.use_backend("cpu"), pytest.raises(RuntimeError, match=message):
            ops.memory_read(features, memory)
    finally:
        extension._load.cache_clear()


def test_a_module_that_does_not_load_is_named(monkeypatch):
    def broken(name):
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(extension.importlib, "import_module", broken)
    extension._load.cache_clear()
    try:
        assert extension.missing("_C") == "the compiled module does not load: pmm_fast._C: undefined symbol"
    finally:
        extension._load.cache_clear()
