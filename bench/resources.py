"""What the compilers make of every kernel: ``python bench/resources.py``, on any machine.

Triton's kernels are compiled and not run: the operators are called on CPU tensors, forward, backward and double
backward, and a driver without a device takes note of each launch.  Of ``pmm_fast._CUDA``, where it is built, the
numbers are those of ``cuobjdump``; threads and dynamic shared memory of these are chosen at the launch.

A kernel with a stack writes what its registers have no room for to memory.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import cases as C
from bench import report
from pmm_fast import ops
from pmm_fast.ops import backends

ROOT = Path(__file__).resolve().parents[1]
Record = dict[str, Any]
COLUMNS = (
    *("backend", "call", "dtype", "pass", "kernel", "registers", "stack", "shared"),
    *("threads", "programs", "resident", "waves", "seconds"),
)
LEGEND = (
    "registers a thread; stack and shared memory in bytes; resident: programs that fit a multiprocessor at once; "
    "waves: programs over how many fit the chip; seconds: to compile, 0 where it had been"
)


class Chip(NamedTuple):
    """Limits of a multiprocessor, and how many a card has; launches are made for that one."""

    shared: int  # bytes, of all programs together
    program_shared: int  # bytes, of one program
    threads: int
    programs: int
    multiprocessors: int


# CUDA C++ Programming Guide, technical specifications by compute capability; A100, A40, L40, H100
CHIPS = {
    80: Chip(164 * 1024, 163 * 1024, 2048, 32, 108),
    86: Chip(100 * 1024, 99 * 1024, 1536, 16, 84),
    89: Chip(100 * 1024, 99 * 1024, 1536, 24, 142),
    90: Chip(228 * 1024, 227 * 1024, 2048, 32, 132),
}
# of a quarter of a multiprocessor
_REGISTERS = 16 * 1024


class Launch(NamedTuple):
    """A kernel that would have run, how it was compiled, and the time since the launch before."""

    name: str
    grid: tuple[int, int, int]
    cubin: bytes
    shared: int
    threads: int
    seconds: float


class _Driver:
    """What Triton asks of a driver, for a device that is not there."""

    def __init__(self, arch: int) -> None:
        self.launches: list[Launch] = []
        self.utils = self
        self._arch, self._since = arch, time.perf_counter()

    def get_current_device(self) -> int:
        # kernels are kept by device
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": CHIPS[self._arch].program_shared}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[None, bytes, int, int, int]:
        """Module, function, registers, spills and most threads; the launcher gets the function."""
        return None, cubin, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, stream: int, cubin: bytes, *rest: Any) -> None:
            now = time.perf_counter()
            threads, seconds = 32 * metadata.num_warps, now - self._since
            self.launches.append(Launch(metadata.name, (x, y, z), cubin, metadata.shared, threads, seconds))
            self._since = time.perf_counter()

        return launch


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[Launch]]:
    """Inside, backend ``triton`` takes CPU tensors, and launches are compiled for an architecture and listed.

    Results are not computed: whatever memory held.

    Raises:
        RuntimeError: Triton interprets kernels (``TRITON_INTERPRET``), so that there is nothing to compile.
    """
    from pmm_fast.kernels import _common
    from triton.runtime.driver import driver

    if backends.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted and not compiled")
    driver_stub = _Driver(arch)
    # how many programs launches are for
    programs = 2 * CHIPS[arch].multiprocessors
    _common.resident_programs.cache_clear()
    try:
        with (
            mock.patch.object(_common, "_PROGRAMS_INTERPRETED", programs),
            mock.patch.object(backends, "interpreted", lambda: True),
            mock.patch.object(driver, "_active", driver_stub),
        ):
            yield driver_stub.launches
    finally:
        _common.resident_programs.cache_clear()


def _cuobjdump(file: str | Path, *options: str) -> str:
    """The report of resources of a compiled file; Triton brings the program along."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", *options, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _usage(text: str) -> list[tuple[str, dict[str, int]]]:
    """Names of kernels, and what each needs: REG a thread, STACK, SHARED in bytes."""
    found = re.findall(r"Function (\S+):\s+(REG:.*)", text)
    return [(name, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}) for name, line in found]


def resident(chip: Chip, registers: int, shared: int, threads: int) -> int:
    """How many programs fit a multiprocessor, by NVIDIA's cuda_occupancy.h.

    Registers come in eights a thread, and each quarter of a multiprocessor has its own; a program takes 1 KB more of
    shared memory than it asks for.
    """
    warps = 4 * (_REGISTERS // (32 * -(-registers // 8) * 8))
    return min(warps // (threads // 32), chip.shared // (shared + 1024), chip.threads // threads, chip.programs)


def record_of(launch: Launch, arch: int) -> Record:
    """The columns that tell of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.cubin)
        file.flush()
        ((_, usage),) = _usage(_cuobjdump(file.name))
    chip, programs = CHIPS[arch], launch.grid[0] * launch.grid[1] * launch.grid[2]
    fit = resident(chip, usage["REG"], launch.shared, launch.threads)
    return {
        "kernel": launch.name,
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "shared": launch.shared,
        "threads": launch.threads,
        "programs": programs,
        "resident": fit,
        "waves": round(programs / (fit * chip.multiprocessors), 2),
        "seconds": round(launch.seconds, 1),
    }


def _passes(function: Callable[[], tuple[Tensor, ...]], leaves: tuple[Tensor, ...]) -> Iterator[str]:
    """Run forward, backward and double backward of a function; the name of each when it has run."""
    outputs = [x for x in function() if x.requires_grad]
    yield "fwd"
    incoming = [torch.ones_like(x).requires_grad_() for x in outputs]
    first = torch.autograd.grad(outputs, leaves, incoming, create_graph=True)
    yield "bwd"
    torch.autograd.grad(first, [*leaves, *incoming], [torch.ones_like(x) for x in first], materialize_grads=True)
    yield "bwd2"


def _without_derivatives() -> dict[str, Callable[[], object]]:
    """Calls at the paper's size of operators that are not differentiated: crops to train on, tiles of a test image."""
    looks = torch.tensor([[0, 1, 2, 3, 1.2, 0.8, 1.1, 9.0, 1.0]]).repeat(8, 1)
    images, tiles = torch.zeros(8, 3, 768, 768, dtype=torch.uint8), torch.zeros(8, 19, 192, 192)
    places = [0, 256] * 4, [0, 0, 426, 426, 853, 853, 1280, 1280]
    return {
        "photometric": lambda: ops.photometric(images, looks, (0.5,) * 3, (0.5,) * 3),
        "merge_tiles": lambda: ops.merge_tiles(tiles, *places, (768, 768), (1024, 2048)),
        "segment_tiles": lambda: ops.segment_tiles(tiles, *places, (768, 768), (1024, 2048), confidence=True),
    }


def triton_records(arch: int, cases: list[C.Case]) -> Iterator[Record]:
    """A record for every launch of the cases, and of the operators without derivatives, as they are compiled."""
    with compiling(arch) as launches:

        def taken(**where: str) -> Iterator[Record]:
            for launch in launches:
                found = {"backend": "triton"} | where | record_of(launch, arch)
                yield {key: found[key] for key in COLUMNS}
            launches.clear()

        for case in cases:
            inputs = C.make_inputs(case, torch.device("cpu")).convert()
            variant = C.backend_variant(case.op, "triton")
            for which in _passes(lambda: variant.function(inputs, None), inputs.leaves()):  # noqa: B023
                yield from taken(call=f"{case.op} {case.size}", dtype=case.dtype, **{"pass": which})
        for name, call in _without_derivatives().items():
            with ops.use_backend("triton"):
                call()
            yield from taken(call=name, dtype="float32", **{"pass": "fwd"})


def cuda_records(arch: int) -> Iterator[Record]:
    """A record for every kernel that the built C++ module has for an architecture; none where it is not built."""
    for file in sorted((ROOT / "pmm_fast").glob("_CUDA*.so")):
        for name, needs in _usage(_cuobjdump(file, "-arch", f"sm_{arch}")):
            # the name without its parameters
            plain = re.sub(r"^void |pmm::|\(.*", "", torch._C._demangle(name))
            found: Record = {"backend": "cuda", "kernel": plain, "registers": needs["REG"]}
            found |= {"stack": needs["STACK"], "shared": needs["SHARED"]}
            yield {key: found.get(key, "") for key in COLUMNS}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, choices=list(CHIPS), help="compute capability [90]")
    parser.add_argument("--size", default="paper", help="which cases of bench/memory_ops.py [paper]")
    parser.add_argument("--dtype", nargs="+", choices=list(C.DTYPES), default=list(C.DTYPES), help="[all]")
    parser.add_argument("--json", metavar="FILE", help="write the records here, as a list; kept up to date")
    options = parser.parse_args(argv)
    cases = [x for x in C.all_cases() if x.size.split("/")[0] == options.size and x.dtype in options.dtype]
    if not cases:
        parser.error(f"--size {options.size}: there is no such case in bench/memory_ops.py")
    if backends.interpreted():
        parser.error("TRITON_INTERPRET is set, so that there is nothing to compile")
    form = "{:<8}{:<33}{:<8}{:<5}{:<44} {:>9}{:>6}{:>7}{:>8}{:>9}{:>9}{:>6}{:>8}"
    print(form.format(*COLUMNS))
    records: list[Record] = []
    for record in itertools.chain(triton_records(options.arch, cases), cuda_records(options.arch)):
        print(form.format(*record.values()), flush=True)
        records.append(record)
        if options.json:
            report.write_json(options.json, records)
    print(LEGEND)


if __name__ == "__main__":
    main()
