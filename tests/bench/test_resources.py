"""The report of registers and stacks; that kernels compile, and to what, is in tests/ops/test_triton.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import resources

REPORT = """
Fatbin elf code:
arch = sm_90
Resource usage:
 Common:
  GLOBAL:106 CONSTANT[4]:32
 Function _ZN3pmm22double_backward_kernelIfLb1ELb0EEEvNS_4CallENS_4PlanE:
  REG:128 STACK:40 SHARED:1024 LOCAL:0 CONSTANT[0]:1168 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN3pmm10add_blocksIdEEvPKT_iiiiiPS1_:
  REG:32 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "programs"),
    [
        (90, 32, 0, 256, 8),  # threads
        (90, 255, 0, 256, 1),  # registers: 256 a thread are 64 K
        (90, 200, 0, 64, 4),  # ten warps' registers, but a quarter has those of two warps, and a half
        (90, 168, 0, 64, 6),
        (90, 169, 0, 64, 4),  # in eights
        (90, 32, 98304, 128, 2),  # shared memory
        (86, 32, 98304, 128, 1),
        (89, 16, 0, 32, 24),  # programs
    ],
)
def test_how_many_programs_fit(arch: int, registers: int, shared: int, threads: int, programs: int) -> None:
    assert resources.resident(resources.CHIPS[arch], registers, shared, threads) == programs


def test_kernels_of_the_built_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(resources, "ROOT", tmp_path)
    monkeypatch.setattr(resources, "_cuobjdump", lambda file, *options: asked.append((file.name, options)) or REPORT)
    assert not list(resources.cuda_records(90)), "not built"
    (tmp_path / "pmm_fast").mkdir()
    (tmp_path / "pmm_fast" / "_CUDA.so").touch()
    first, second = resources.cuda_records(90)
    assert asked == [("_CUDA.so", ("-arch", "sm_90"))]
    assert (first["kernel"], first["registers"], first["stack"]) == (
        "double_backward_kernel<float, true, false>",
        128,
        40,
    )
    assert (second["kernel"], second["shared"], tuple(second)) == ("add_blocks<double>", 16, resources.COLUMNS)


def test_table_and_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = dict.fromkeys(resources.COLUMNS, 7)
    monkeypatch.setattr(resources.backends, "interpreted", lambda: False)
    monkeypatch.setattr(
        resources, "triton_records", lambda arch, cases: [row | {"registers": arch, "call": len(cases)}]
    )
    monkeypatch.setattr(resources, "cuda_records", lambda arch: [row])
    resources.main(["--arch", "80", "--dtype", "bf16", "--json", str(tmp_path / "records.json")])
    cases = [case for case in resources.C.all_cases() if case.size.startswith("paper") and case.dtype == "bf16"]
    assert json.loads((tmp_path / "records.json").read_text()) == [row | {"registers": 80, "call": len(cases)}, row]
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == list(resources.COLUMNS) and lines[1].split() == ["7"] * len(row)


@pytest.mark.parametrize(
    ("interpreted", "arguments", "message"),
    [(True, [], "TRITON_INTERPRET is set"), (False, ["--size", "huge"], "--size huge: there is no such case")],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    interpreted: bool,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(resources.backends, "interpreted", lambda: interpreted)
    with pytest.raises(SystemExit):
        resources.main(arguments)
    assert message in capsys.readouterr().err
    if interpreted:
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), resources.compiling(90):
            pass
