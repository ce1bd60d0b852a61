"""Build script.  Metadata is declared in pyproject.toml; this compiles ``pmm_fast._C`` and ``pmm_fast._CUDA``.

Neither needs torch, here or when it is loaded.  ``PMM_FAST_BUILD`` chooses: ``auto`` (default: what compilers are
there for, CUDA only where a driver is; a failure is reported and the installation goes on without), ``none``, ``cpu``
(must succeed), ``cuda`` (CPU and CUDA must succeed).  ``PMM_FAST_CUDA_ARCHS`` lists compute capabilities, ``80 90`` by
default.  What became of it is written to ``pmm_fast/_build.json``, which ``pmm_fast.ops.explain`` and ``python -m
pmm_fast.doctor`` show.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "none", "cpu", "cuda")

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# sums may be contracted to fused multiply-adds; nothing else of IEEE arithmetic is given up
KERNEL = ["-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", "-Wno-unknown-pragmas"]
# name, bytes in a vector, compiler options
INSTRUCTION_SETS = [("portable", 16, [])]
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS += [
        ("avx2", 32, ["-mavx2", "-mfma"]),
        ("avx512", 64, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]),
    ]


class BuildError(Exception):
    """Why a module cannot be built, in a line for people, and the compiler's words."""


def choice() -> str:
    """``PMM_FAST_BUILD``, checked."""
    value = os.environ.get("PMM_FAST_BUILD", "auto")
    if value not in CHOICES:
        raise SystemExit(f"PMM_FAST_BUILD is {value!r}; expected one of {', '.join(CHOICES)}")
    return value


def find_cxx() -> str:
    """The C++ compiler: ``CXX``, else the first usual name on the path."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BuildError("no C++ compiler (CXX, g++, clang++, c++) was found when it was installed")


def find_nvcc() -> str:
    """The CUDA compiler: on the path, else below ``CUDA_HOME``.

    Without a driver it is not looked for, unless it was asked for: compiling takes minutes.
    """
    if choice() == "auto" and not shutil.which("nvidia-smi"):
        raise BuildError("no NVIDIA driver was found when it was installed (PMM_FAST_BUILD=cuda compiles it anyway)")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for name in ("nvcc", str(Path(home) / "bin" / "nvcc")):
        if path := shutil.which(name):
            return path
    raise BuildError("no nvcc was found when it was installed")


def cuda_home(nvcc: str) -> Path:
    """Where nvcc's own headers and libraries are, asked of nvcc since the one on the path may be a wrapper."""
    run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in run.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    return Path(nvcc).resolve().parents[1]


def includes() -> list[str]:
    """Compiler options for the headers of Python and pybind11."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("the package pybind11 was not there when it was installed") from error
    return [word(f"-I{folder}") for folder in (pybind11.get_include(), sysconfig.get_path("include"))]


def escape(path: object) -> str:
    """A path in a ninja file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def word(text: object) -> str:
    """A word of a command in a ninja file."""
    return shlex.quote(str(text)).replace("$", "$$")


def ninja(lines: list[str], folder: Path, verbose: bool) -> None:
    """Run a ninja file: in parallel, and only what has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))
    command = shutil.which("ninja")
    if not command and not importlib.util.find_spec("ninja"):
        raise BuildError("ninja was not there when it was installed")
    arguments = [command] if command else [sys.executable, "-m", "ninja"]
    run = subprocess.run([*arguments, "-C", str(folder), *(["-v"] if verbose else [])], capture_output=True, text=True)
    if verbose:
        print(run.stdout)
    if run.returncode:
        errors = [line for line in (run.stdout + run.stderr).splitlines() if "error" in line.lower()]
        reason = errors[0].strip() if errors else "ninja failed"
        print(run.stdout + run.stderr, file=sys.stderr)
        raise BuildError(f"compiling failed: {reason[:300]}")


def rule(name: str, command: str) -> list[str]:
    return [f"rule {name}", f"  command = {command}", "  depfile = $out.d", "  deps = gcc"]


def cpu_build(output: Path) -> list[str]:
    """The ninja file of ``_C``: every kernel once per instruction set."""
    cxx = find_cxx()
    answer = subprocess.run([*cxx.split(), "--version"], capture_output=True, text=True).stdout.splitlines()
    version = answer[0] if answer else cxx
    lines = rule("cxx", f"{cxx} -MMD -MF $out.d $flags -c $in -o $out")
    lines += ["rule link", f"  command = {cxx} -shared -fopenmp $in -o $out"]
    sources, objects = ROOT / "csrc" / "cpu", []

    def compile_one(source: Path, target: str, flags: list[str]) -> None:
        lines.extend([f"build {target}: cxx {escape(source)}", f"  flags = {' '.join(flags)}"])
        objects.append(target)

    for name, width, options in INSTRUCTION_SETS:
        for source in sorted(sources.glob("*.cpp")):
            if source.stem != "bindings":
                defines = [f"-DPMM_ISA={name}", f"-DPMM_BYTES={width}"]
                compile_one(source, f"{source.stem}.{name}.o", [*COMMON, *KERNEL, *options, *defines])
    quoted = word('-DPMM_COMPILER="' + version.replace('"', "") + '"')
    compile_one(sources / "bindings.cpp", "bindings.o", [*COMMON, *includes(), quoted])
    return [*lines, f"build {escape(output)}: link {' '.join(objects)}"]


def cuda_build(output: Path) -> list[str]:
    """The ninja file of ``_CUDA``; the CUDA runtime is linked statically, so that it loads without a driver."""
    cxx, nvcc = find_cxx(), find_nvcc()
    home = cuda_home(nvcc)
    archs = (os.environ.get("PMM_FAST_CUDA_ARCHS") or "80 90").split()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # newer devices compile the last one's intermediate code when they first load it
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = ["-std=c++17", "-O3", "--threads=2", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", *codes]
    lines = rule("nvcc", f"{word(nvcc)} -MMD -MF $out.d {' '.join(flags)} -c $in -o $out")
    release = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    version = f"nvcc {release.group(1) if release else ''} for sm_{' sm_'.join(archs)}"
    options = [*COMMON, *includes(), word(f"-I{home}/include"), word(f'-DPMM_COMPILER="{version}"')]
    lines += rule("cxx", f"{cxx} -MMD -MF $out.d {' '.join(options)} -c $in -o $out")
    libraries = " ".join(word(f"-L{home / name}") for name in ("lib64", "lib"))
    lines += ["rule link", f"  command = {cxx} -shared $in -o $out {libraries} -lcudart_static -lrt -ldl -lpthread"]
    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.c*")):
        if source.suffix in (".cu", ".cpp"):
            objects.append(f"{source.stem}{source.suffix}.o")
            lines.append(f"build {objects[-1]}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {escape(source)}")
    return [*lines, f"build {escape(output)}: link {' '.join(objects)}"]


BUILDS = {"_C": cpu_build, "_CUDA": cuda_build}
WANTED = {"none": (), "cpu": ("_C",), "cuda": ("_C", "_CUDA"), "auto": ("_C", "_CUDA")}


class BuildExtensions(build_ext):
    """Compiles each module with ninja and reports what happened."""

    def run(self) -> None:
        self.results: dict[str, str] = {}
        super().run()
        package = ROOT if self.inplace or self.editable_mode else Path(self.build_lib).resolve()
        (package / "pmm_fast").mkdir(parents=True, exist_ok=True)
        (package / "pmm_fast" / "_build.json").write_text(json.dumps(self.results, indent=2) + "\n")
        for name, result in self.results.items():
            print(f"pmm_fast.{name}: {result}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / f"{name}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        required = choice() == "cuda" or (choice() == "cpu" and name == "_C")
        output.unlink(missing_ok=True)
        if name not in WANTED[choice()]:
            self.results[name] = f"PMM_FAST_BUILD={choice()} when it was installed"
            return
        try:
            ninja(BUILDS[name](output), folder, bool(self.verbose > 1))
            self.results[name] = "built"
        except BuildError as error:
            if required:
                raise SystemExit(f"pmm_fast.{name}: {error} (PMM_FAST_BUILD={choice()} demands it)") from error
            self.results[name] = str(error)

    def copy_extensions_to_source(self) -> None:
        """Those that were built; what an earlier build left of the others would not fit the sources."""
        everything = self.extensions
        for ext in everything:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        self.extensions = [ext for ext in everything if self.results[ext.name.rpartition(".")[2]] == "built"]
        super().copy_extensions_to_source()
        self.extensions = everything


class BuildPython(build_py):
    """Leaves the report of an earlier build in the source tree out; build_ext writes this one's."""

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        files = super().find_data_files(package, src_dir)
        return [name for name in files if Path(name).name != "_build.json"]


class MaybeBinary(Distribution):
    """A wheel is tied to a platform only if it may hold compiled modules."""

    def has_ext_modules(self) -> bool:
        return choice() != "none"


setup(
    # always both, so that what an earlier build left goes; the sources are named by the ninja files
    ext_modules=[Extension(f"pmm_fast.{name}", []) for name in BUILDS],
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython},
    distclass=MaybeBinary,
)
