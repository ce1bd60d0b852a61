"""The house style, as far as a program can tell (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import re

import pytest

from tests import repository

FILE_LINES = 500
FUNCTION_LINES = 60
# put together, so that this file does not find itself
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
MACHINE_FOLDERS = ("home", "Users", "root", "opt", "work", "workspace", "mnt", "srv", "scratch")
MACHINE_PATH = re.compile(r"(?<![\w.~)}>-])/(" + "|".join(MACHINE_FOLDERS) + r")/\w")

SOURCES = repository.files(repository.SOURCE_FOLDERS, repository.CODE)
PYTHON = [path for path in SOURCES if path.suffix == ".py"]
PACKAGE = repository.files(("pmm_fast", "kernels"), (".py",))
TEXTS = [
    *SOURCES,
    *repository.files(("docs", "pmm_fast"), (".md", ".yaml", ".txt")),
    *sorted(repository.ROOT.glob("*.md")),
    *(repository.ROOT / name for name in ("Makefile", "pyproject.toml", "setup.py", ".ci/run")),
]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def long_functions(source: str) -> list[str]:
    """Functions of 60 lines or more, docstring and decorators included."""
    return [
        f"{node.name}: {lines} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, Function)
        and (lines := (node.end_lineno or 0) - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1)
        >= FUNCTION_LINES
    ]


def undocumented(source: str) -> list[str]:
    """Public classes and functions of a module without a docstring."""
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, Function | ast.ClassDef) and node.name[0] != "_" and not ast.get_docstring(node)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=repository.name)
def test_file_length(path):
    assert len(path.read_text().splitlines()) < FILE_LINES


@pytest.mark.parametrize("path", PYTHON, ids=repository.name)
def test_function_length(path):
    assert long_functions(path.read_text()) == []


@pytest.mark.parametrize("path", PACKAGE, ids=repository.name)
def test_public_names_have_docstrings(path):
    assert undocumented(path.read_text()) == []


@pytest.mark.parametrize("path", [path for path in PACKAGE if path.stat().st_size], ids=repository.name)
def test_modules_have_docstrings(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", TEXTS, ids=repository.name)
def test_finished_and_free_of_machine_paths(path):
    text = path.read_text()
    assert [match.group() for match in UNFINISHED.finditer(text)] == []
    assert [text[match.start() : match.start() + 40] for match in MACHINE_PATH.finditer(text)] == []


def test_the_checks_see_what_they_look_for():
    body = "\n".join(["    x = 1"] * (FUNCTION_LINES - 1))
    assert long_functions(f"class A:\n  def f():\n{body}") == ["f: 60 lines"]
    assert long_functions(f"def f():\n{body[:-10]}") == []
    assert undocumented("class A: pass\ndef f(): pass\ndef _g(): pass\ndef h():\n    '''Yes.'''") == ["A", "f"]
    assert UNFINISHED.search("# TO" + "DO: later")
    assert MACHINE_PATH.search('cache = "/' + 'home/me/data"') and not MACHINE_PATH.search(
        "/data/town, ~/work/x, a/opt/b"
    )
