"""A plugin of pytest, ``-p bench.pytest_log --test-log FILE``: one JSON line a finished test, written as it finishes.

So a run that is cut off loses nothing.  A line has ``test``, ``outcome`` (passed, failed, skipped), ``seconds``, and
where it did not pass ``error`` (one line: what was raised, or why it was skipped) and ``trace``.

Under pytest-xdist a process whose GPU has failed (an illegal access, a failed assertion on the device) ends before its
next test, since everything after it would fail too; pytest-xdist counts that one test as failed and starts another
process for the rest.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

TRACE = 4000  # characters of a traceback that are kept, its end


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--test-log", metavar="FILE", help="write a JSON line for every test that has finished")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Guard())
    elif path := config.getoption("--test-log"):
        config.pluginmanager.register(Log(Path(path)))


class Log:
    """Writes the lines, in the process that pytest was started in."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # of a test that passed only the call; of another the part that ended it
        if report.when == "call" or not report.passed:
            self._write(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, 0.0)

    def _write(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(seconds, 2)}
        if not report.passed:
            line |= {"error": reason(report), "trace": report.longreprtext[-TRACE:]}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test did not pass, in a line."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    lines = [line for line in report.longreprtext.splitlines() if line.strip()] or [report.outcome]
    raised = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (raised or lines[-1:])[0][:300]


class Guard:
    """Ends a process of pytest-xdist whose GPU can no longer be used."""

    def __init__(self) -> None:
        self.broken = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.broken |= report.failed and gpu_failed()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> None:
        if self.broken:
            os._exit(70)


def gpu_failed() -> bool:
    """Whether this process has used a GPU and can no longer."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        # a capture that failed leaves the generator in it
        torch.rand((), device="cuda")
    except RuntimeError:
        return True
    return False
