"""Builds the CUDA sources for a CPU (tests/cuda/emulator.h) and lets the cuda backend take CPU tensors."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest import mock

from pmm_fast.ops import backends, cuda, extension
from tests.repository import ROOT

SOURCES = ROOT / "csrc" / "cuda"
KERNELS = sorted(SOURCES.glob("*.cu"))
# longjmp between fibers is what the fortified one takes for an attack
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-DPMM_EMULATED", f"-I{SOURCES}", f"-I{ROOT / 'tests' / 'cuda'}"]
# sanitizers, for instance (csrc/README.md)
FLAGS += shlex.split(os.environ.get("PMM_EMULATOR_FLAGS", ""))


def run(command: Sequence[object]) -> str:
    """A command's output; its words are the error's."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}"
    return result.stdout + result.stderr


def includes() -> list[str]:
    """Where Python's and pybind11's headers are."""
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def load(path: Path, name: str = "_CUDA") -> ModuleType:
    """A compiled ``_CUDA``, without putting it among the package's modules; pybind11 runs each name once."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulated_module(folder: Path) -> ModuleType:
    """The sources and their bindings, compiled for this CPU."""
    compiler = shutil.which("g++")
    assert compiler
    library = folder / f"_CUDA{sysconfig.get_config_var('EXT_SUFFIX')}"

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        run([compiler, *FLAGS, *includes(), "-x", "c++", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*KERNELS, SOURCES / "bindings.cpp"]))
    run([compiler, "-shared", *objects, "-o", library])
    return load(library)


@contextlib.contextmanager
def on_cpu(module: ModuleType) -> Iterator[None]:
    """Inside, the backend named cuda runs a module on CPU tensors; no other choice changes."""
    load_extension = extension.load

    def refuses(*args: object, **kwargs: object) -> str | None:
        return None if backends.requested() == "cuda" else "emulated"

    implementations = {
        key: backends.Implementation(value.function, refuses)
        for key, value in backends._implementations.items()
        if key[1] == "cuda"
    }
    with (
        mock.patch.object(extension, "load", lambda name: module if name == "_CUDA" else load_extension(name)),
        mock.patch.object(cuda, "launching", lambda tensor: contextlib.nullcontext()),
        mock.patch.object(cuda, "current_stream", lambda tensor: 0),
        mock.patch.dict(backends._implementations, implementations),
    ):
        yield
