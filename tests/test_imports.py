"""Imports go one way, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests import repository

# what each part may import besides itself; `programs` are train, evaluate and other modules with a main
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "ops": {"kernels"},
    "models": {"ops", "kernels"},
    "meta": {"models", "ops"},
    "config": set(),
    "data": {"config", "ops"},
    "viz": {"config", "data"},
    "engine": {"ops", "models", "meta", "config", "data", "viz"},
}
PROGRAM = {*ALLOWED, "package"}
HEAVY = {"torch", "numpy", "PIL", "yaml", "matplotlib", "sklearn", "triton", "tqdm", "safetensors"}


def part_of(module: str) -> str:
    """``pmm_fast.ops.backends`` is of the part ``ops``."""
    parts = module.split(".")
    return "package" if len(parts) == 1 else parts[1]


def module_of(path: str) -> str:
    """The module's dotted name; ``kernels/`` is installed as ``pmm_fast.kernels``."""
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"pmm_fast.{dotted}" if dotted.split(".")[0] == "kernels" else dotted


def imported(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that a source imports, anywhere in it; ``from a import b`` counts as ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parent[: len(parent) - node.level + 1], *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of a module of the package that its part may not have."""
    part = part_of(module)
    if part == "package":
        allowed: set[str] = {"package"}
    else:
        # a package's own subpackages apart, whoever is not in the table is a program
        allowed = {part} | ALLOWED.get(part, PROGRAM)
    wrong = []
    for name in sorted(imported(source, module, is_package)):
        if name.split(".")[0] == "pmm_fast":
            target = part_of(name)
            if target == "__version__":
                continue
            if target not in allowed:
                wrong.append(f"{module} imports {name}")
    return wrong


PACKAGE = repository.files(("pmm_fast", "kernels"), (".py",))
EVERYTHING = repository.files(repository.SOURCE_FOLDERS, (".py",))


@pytest.mark.parametrize("path", PACKAGE, ids=repository.name)
def test_direction(path):
    module = module_of(repository.name(path))
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize("path", EVERYTHING, ids=repository.name)
def test_kernels_only_through_the_package(path):
    names = imported(path.read_text(), module_of(repository.name(path)), path.name == "__init__.py")
    assert not [name for name in names if name.split(".")[0] in ("kernels", "csrc")]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pmm_fast.ops.memory_read", "from pmm_fast.models import Segmentor"),
        ("pmm_fast.ops.memory_read", "def f():\n    import pmm_fast.meta.step"),
        ("pmm_fast.models.memory", "from pmm_fast import meta"),
        ("pmm_fast.meta.step", "from ..engine import optim"),
        ("pmm_fast.data.folder", "from pmm_fast.engine.checkpoint import load"),
        ("pmm_fast.config.cli", "from pmm_fast.data.labels import get_space"),
        ("pmm_fast.viz.tables", "from pmm_fast.engine.metrics import Confusion"),
        ("pmm_fast.engine.trainer", "from pmm_fast.train import main"),
        ("pmm_fast.train", "from pmm_fast import evaluate"),
        ("pmm_fast.kernels.memory_read", "from pmm_fast import ops"),
    ],
)
def test_a_wrong_import_is_seen(module, source):
    assert len(violations(source, module)) == 1


def test_a_direct_import_of_the_kernels_is_seen():
    assert imported("from kernels.memory_read import launch", "tests.x") == {"kernels.memory_read.launch"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("pmm_fast", HEAVY),
        ("pmm_fast.data", HEAVY),
        ("pmm_fast.viz", HEAVY),
        # the command line answers without these
        ("pmm_fast.config", HEAVY - {"yaml"}),
        ("pmm_fast.train", HEAVY - {"yaml"}),
        ("pmm_fast.evaluate", HEAVY - {"yaml"}),
        ("pmm_fast.convert", HEAVY - {"yaml"}),
        ("pmm_fast.export", HEAVY - {"yaml"}),
        ("pmm_fast.predict", HEAVY - {"yaml"}),
        ("pmm_fast.report", HEAVY - {"yaml"}),
        ("pmm_fast.data.prepare", HEAVY - {"yaml"}),
        ("pmm_fast.data.verify", HEAVY - {"yaml"}),
    ],
)
def test_light(module, heavy):
    assert loaded_by(module) & heavy == set()


def test_light_sees_what_is_loaded():
    assert "numpy" in loaded_by("pmm_fast.data.labels")


def loaded_by(module: str) -> set[str]:
    """Top-level names of everything that a fresh interpreter has loaded after importing a module."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=repository.ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())
