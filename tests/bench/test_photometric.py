"""``python bench/photometric.py``: a record of every backend, and no figure for one that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import photometric as bench
from pmm_fast import ops


def test_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--side", "24", "--device", "cpu", "--json", str(tmp_path / "r.json")])
    rows = json.loads((tmp_path / "r.json").read_text())
    kinds = ["normalise", "blur", "jitter", "both"]
    backends = ["pillow", *bench.backends_on(torch.device("cpu"))]
    assert "reference" in backends
    assert [(row["backend"], row["look"]) for row in rows] == [(name, kind) for name in backends for kind in kinds]
    assert all(row["ms_per_image"] > 0 and row["side"] == 24 and row["device"] for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == backends


def test_a_backend_of_another_device_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "available_backends", lambda operator: ["cuda", "triton", "cpu", "reference"])
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for interpreted, expected in ((False, {cuda: ["cuda", "triton"], cpu: ["cpu"]}), (True, {cpu: ["triton", "cpu"]})):
        monkeypatch.setattr(bench, "interpreted", lambda interpreted=interpreted: interpreted)
        for device, names in expected.items():
            assert bench.backends_on(device) == [*names, "reference"]


@pytest.mark.parametrize("wrong", ["a level", "NaN"])
def test_a_wrong_backend_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    right = ops.photometric

    def spoiled(*arguments: object) -> torch.Tensor:
        out = right(*arguments)
        out[0, 0, 0, 0] = torch.nan if wrong == "NaN" else out[0, 0, 0, 0] + 0.1
        return out

    monkeypatch.setattr(ops, "photometric", spoiled)
    with pytest.raises(SystemExit, match="gate failed"):
        bench.main(["--side", "16", "--device", "cpu", "--json", str(tmp_path / "r.json")])
    assert {row["backend"] for row in json.loads((tmp_path / "r.json").read_text())} == {"pillow"}
    assert "gate: FAILED: reference: ValueError: normalise: " in capsys.readouterr().out
