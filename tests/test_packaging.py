"""Source distribution and wheel hold everything that an installation needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import repository

COPIED = ("pmm_fast", "kernels", "csrc", "bench", "docs", "tests")
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, target: Path) -> Path:
    """The file that setuptools makes of a source tree, without network or isolation; ``kind``: sdist or wheel."""
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return target / run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """File names in the sdist, below its folder, and in a wheel that was made from the sdist alone."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    # git keeps no empty folders
    for name in (name for name in COPIED if (repository.ROOT / name).is_dir()):
        shutil.copytree(repository.ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in repository.ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    with tarfile.open(build("sdist", source, folder)) as archive:
        sdist = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        archive.extractall(folder / "unpacked", filter="data")
    wheel = build("wheel", next((folder / "unpacked").iterdir()), folder)
    with zipfile.ZipFile(wheel) as archive:
        return sdist, set(archive.namelist())


def expected(folders, suffixes):
    return {repository.name(path) for path in repository.files(folders, suffixes)}


def test_sdist(built):
    wanted = expected(COPIED, {*repository.CODE, ".yaml", ".txt", ".md"})
    wanted |= {"pmm_fast/py.typed", "Makefile", "README.md", "LICENSE", "pyproject.toml", "setup.py"}
    assert wanted - built[0] == set()


def test_wheel(built):
    modules = {name.replace("kernels/", "pmm_fast/kernels/", 1) for name in expected(("kernels",), (".py",))}
    modules |= expected(("pmm_fast",), (".py", ".yaml", ".txt"))
    assert (modules | {"pmm_fast/py.typed"}) - built[1] == set()


def test_wheel_holds_nothing_else_at_the_top(built):
    tops = {name.split("/")[0] for name in built[1]}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pmm_fast"}


def test_nothing_compiled_is_shipped(built):
    assert not [name for names in built for name in names if name.endswith((".pyc", ".so"))]
