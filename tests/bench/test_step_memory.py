"""The computed peak of an iteration against the peak that the profiler sees in a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import step_memory
from bench.harness import cpu_peak
from pmm_fast import meta, ops
from pmm_fast.models import build_model

ARCHITECTURE = "deeplabv3plus_mobilenet_v2"


def measured_step(order: int, checkpoint: bool) -> int:
    """Bytes of a real step above its arguments."""
    torch.manual_seed(0)
    model = build_model(ARCHITECTURE, 19)
    model.memory.slots.copy_(ops.normalize(torch.rand_like(model.memory.slots), 1))
    params, buffers, memory = meta.split_state(model)
    batches = [meta.Batch(torch.randn(2, 3, 128, 128), torch.zeros(2, 128, 128, dtype=torch.uint8)) for _ in range(2)]
    hyper = meta.Hyper(meta.Network(model, checkpoint_activations=checkpoint), order=order)
    seed = torch.zeros(1, dtype=torch.int64)

    return cpu_peak(lambda: meta.step(params, buffers, memory, *batches, meta.Noise(seed, seed), hyper))[0]


@pytest.mark.parametrize("order, checkpoint", [(1, False), (2, False), (2, True)])
def test_computed_peak_is_the_measured_one(order: int, checkpoint: bool) -> None:
    model = build_model(ARCHITECTURE, 19)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    batch = 2 * 2 * 128 * 128 * (3 * 4 + 1)
    computed = step_memory.iteration_bytes(step_memory.Setting(ARCHITECTURE, 128, 2, order, False, checkpoint))
    # parameters and momentum
    expected = measured_step(order, checkpoint) + 2 * parameters + batch
    assert computed == pytest.approx(expected, rel=0.05)


def test_more_images_need_more_and_what_fits_fits() -> None:
    setting = step_memory.Setting(ARCHITECTURE, 64, 2, 1, False, False)
    needs = [step_memory.iteration_bytes(setting._replace(images=images)) for images in range(2, 8)]
    assert needs == sorted(needs)
    found = step_memory.images_that_fit(setting, [needs[0] - 1, needs[3], needs[-1]])
    assert found[0] == 0
    for images, limit in zip(found[1:], (needs[3], needs[-1]), strict=True):
        assert images > 2 and step_memory.iteration_bytes(setting._replace(images=images)) <= limit


def test_table_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_memory, "METHODS", ((1, False, False), (1, False, True)))
    target = tmp_path / "memory.json"
    options = ["--architecture", ARCHITECTURE, "--crop", "64", "--images", "2", "--cards", "0.2"]
    step_memory.main([*options, "--json", str(target)])
    printed = capsys.readouterr().out
    assert "0.2 GB" in printed and "computed, not measured" in printed
    records = json.loads(target.read_text())
    assert [record["checkpoint"] for record in records] == [False, True]
    assert records[1]["images_that_fit"]["0.2"] >= records[0]["images_that_fit"]["0.2"] > 1
    with pytest.raises(SystemExit):
        step_memory.main(["--images", "1"])
    assert "--images at least 2" in capsys.readouterr().err
