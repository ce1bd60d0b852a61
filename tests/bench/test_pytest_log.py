"""bench/pytest_log.py: what is kept of tests that run on another machine."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from bench import gpu_record
from tests import repository

TESTS = """
import sys, types
import pytest

class Broken:
    @staticmethod
    def is_initialized():
        return True

    @staticmethod
    def synchronize():
        raise RuntimeError("an illegal memory access")

@pytest.mark.parametrize("n", range(6))
def test_values(n):
    assert n < 4

def test_breaks():
    sys.modules["torch"] = types.SimpleNamespace(cuda=Broken)
    raise RuntimeError("CUDA error")

@pytest.mark.parametrize("n", range(3))
def test_after(n):
    assert "torch" not in sys.modules

def test_absent():
    pytest.skip("one device")
"""


def test_a_line_for_every_test(tmp_path):
    """Written as they finish, grouped by what was raised; a process whose GPU has failed is replaced."""
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [
        sys.executable,
        *["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.pytest_log", "--rootdir"],
        str(tmp_path),
    ]
    parallel = importlib.util.find_spec("xdist") is not None
    command += ["--test-log", str(tmp_path / "log"), *(["-n", "1"] if parallel else []), str(tmp_path / "test_some.py")]
    subprocess.run(command, cwd=repository.ROOT, capture_output=True)
    tests = gpu_record.read_tests(tmp_path / "log")
    by_name = {test["test"].rpartition("::")[2]: test for test in tests}
    summary = gpu_record.summarise_tests(tests)
    assert summary["skips"] == {"one device": 1} and summary["skipped"] == 1
    broken = by_name["test_breaks"]
    assert broken["error"] == "RuntimeError: CUDA error" and "raise RuntimeError" in broken["trace"]
    # whatever the numbers
    alike = [by_name[f"test_values[{n}]"]["test"] for n in (4, 5)]
    assert {"error": "assert 4 < 4", "count": 2, "tests": alike} in summary["failures"]
    after = [by_name[f"test_after[{n}]"] for n in range(3)]
    if parallel:
        assert "crashed while running" in after[0]["trace"]
        assert [test["outcome"] for test in after] == ["failed", "passed", "passed"]
    text = gpu_record.tests_text("gpu-tests", tests)
    assert text.startswith(f"gpu-tests: {summary['passed']} passed, {summary['failed']} failed, 1 skipped")
    assert "2 x assert 4 < 4" in text
    with (tmp_path / "log").open("a") as file:
        file.write('{"test": "cut o')
    assert gpu_record.read_tests(tmp_path / "log") == tests
