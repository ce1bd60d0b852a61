"""Source distribution and wheel hold everything that an installation needs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import pmm_fast
from tests import repository

COPIED = ("pmm_fast", "kernels", "csrc", "bench", "docs", "tests")
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def run_build(kind: str, source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """setuptools on a source tree, without network or isolation; ``kind``: sdist or wheel."""
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, env={**os.environ, **environment})


def build(kind: str, source: Path, target: Path, **environment: str) -> Path:
    """The file that setuptools makes; without compiled modules unless the environment says otherwise."""
    run = run_build(kind, source, target, **({"PMM_FAST_BUILD": "none"} | environment))
    assert run.returncode == 0, run.stderr
    return target / run.stdout.splitlines()[-1]


def copy_source(target: Path) -> Path:
    """The repository's files, as a checkout would have them."""
    compiled = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    # git keeps no empty folders
    for name in (name for name in COPIED if (repository.ROOT / name).is_dir()):
        shutil.copytree(repository.ROOT / name, target / name, ignore=compiled)
    for path in repository.ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """File names in the sdist, below its folder, and in a wheel that was made from the sdist alone."""
    folder = tmp_path_factory.mktemp("build")
    source = copy_source(folder / "source")
    with tarfile.open(build("sdist", source, folder)) as archive:
        sdist = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        archive.extractall(folder / "unpacked", filter="data")
    wheel = build("wheel", next((folder / "unpacked").iterdir()), folder)
    with zipfile.ZipFile(wheel) as archive:
        return sdist, set(archive.namelist())


def expected(folders, suffixes):
    return {repository.name(path) for path in repository.files(folders, suffixes)}


def test_sdist(built):
    wanted = expected(COPIED, {*repository.CODE, ".yaml", ".txt", ".css", ".md"})
    wanted |= {"pmm_fast/py.typed", "Makefile", "README.md", "LICENSE", "pyproject.toml", "setup.py"}
    assert wanted - built[0] == set()


def test_wheel(built):
    modules = {name.replace("kernels/", "pmm_fast/kernels/", 1) for name in expected(("kernels",), (".py",))}
    modules |= expected(("pmm_fast",), (".py", ".yaml", ".txt", ".css"))
    assert (modules | {"pmm_fast/py.typed"}) - built[1] == set()


def test_wheel_holds_nothing_else_at_the_top(built):
    tops = {name.split("/")[0] for name in built[1]}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pmm_fast"}


def test_nothing_compiled_is_shipped(built):
    assert not [name for names in built for name in names if name.endswith((".pyc", ".so"))]


def test_a_compiler_that_fails_does_not_stop_the_installation(tmp_path):
    source = copy_source(tmp_path / "source")
    wheel = build("wheel", source, tmp_path / "wheels", PMM_FAST_BUILD="auto", CXX="false")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        report = json.loads(archive.read("pmm_fast/_build.json"))
    assert not [name for name in names if name.endswith(".so")]
    assert report["_C"].startswith("compiling failed") and report["_CUDA"] != "built"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("cpu", r"pmm_fast\._C: compiling failed.*\(PMM_FAST_BUILD=cpu demands it\)"),
        ("gpu", r"PMM_FAST_BUILD is 'gpu'; expected one of auto, none, cpu, cuda"),
    ],
)
def test_what_is_demanded_must_be_built(tmp_path, choice, message):
    source = copy_source(tmp_path / "source")
    run = run_build("wheel", source, tmp_path / "wheels", PMM_FAST_BUILD=choice, CXX="false")
    assert run.returncode != 0 and re.search(message, run.stderr)


def test_metadata_needs_no_torch_and_no_compiler(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = ['setup.py', '--version']; "
    run = subprocess.run(
        [sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')"],
        cwd=repository.ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": "false", "PMM_FAST_BUILD": "auto"},
    )
    assert run.stdout.splitlines()[-1] == pmm_fast.__version__, run.stderr


def test_none_removes_what_an_earlier_build_left(tmp_path):
    source = copy_source(tmp_path / "source")
    old = source / "pmm_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.write_text("old")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "PMM_FAST_BUILD": "none"}
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    assert not old.exists()
    report = json.loads((source / "pmm_fast" / "_build.json").read_text())
    assert report == dict.fromkeys(("_C", "_CUDA"), "PMM_FAST_BUILD=none when it was installed")


@pytest.mark.parametrize(
    ("package", "reason"), [("pybind11", "the package pybind11 was not"), ("ninja", "ninja was not")]
)
def test_a_missing_build_package_is_named(tmp_path, package, reason):
    source = copy_source(tmp_path / "source")
    # None in sys.modules: as if it were not installed
    code = f"import importlib.util as u, runpy, sys, os; sys.modules[{package!r}] = None; find = u.find_spec; "
    code += f"u.find_spec = lambda name, *a: None if name == {package!r} else find(name, *a); "
    code += "sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    # the compiler's folder, and nothing that the virtual environment adds to it
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "ninja").exists())
    path += os.pathsep + str(tmp_path)
    (tmp_path / "g++").symlink_to(shutil.which("g++") or "false")
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, "PMM_FAST_BUILD": "auto", "PATH": path},
    )
    assert run.returncode == 0, run.stderr
    assert json.loads((source / "pmm_fast" / "_build.json").read_text())["_C"].startswith(reason)
