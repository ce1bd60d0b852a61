"""Build, test and measure on a machine with a CUDA GPU, without a network, in under ten minutes: ``make gpu-check``.

Works with the packages of the interpreter that runs it (torch, triton, pip, pytest, hypothesis, numpy, pillow, pyyaml,
tqdm, safetensors, setuptools, pybind11, ninja; nvcc on the path; tests run in parallel where pytest-xdist is), in an
environment of its own that sees them.  Runs the steps of ``bench/gpu_steps.py``: those of the set ``first``, or of the
sets and names given.

Writes, after every step, ``<device>.json`` (``bench/gpu_record.py`` says what is in it); at the end ``<device>.md``,
its tables, and ``<device>-tests.log``, the tests that failed.  A record of the same device and versions that is there,
in the same folder or in ``bench/results``, is continued.  A step that fails or runs out of time does not stop the
others; the exit status is 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import gpu_record, gpu_steps
from bench.gpu_record import Record
from bench.gpu_steps import Step
from bench.revision import VARIABLE, revision

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-gpu"
RESULTS = ROOT / "bench" / "results"
SCRATCH = ROOT / "build" / "gpu-check"
TAIL, TAIL_FAILED = 3000, 20_000  # characters of a step's output that are kept
LOG = 2_000_000  # of the log of the tests
SUMMARY = 15.0  # seconds that the tables take
WORKERS = 12  # processes of tests, at most
LEAST = 5.0  # seconds without which no step begins


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    if options.dry_run:
        print_steps(options)
        return
    # ended from outside, it ends what it has started
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: ended from outside"))
    deadline = time.monotonic() + options.seconds
    # what an interrupted run left is not what this one measures
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    options.out.mkdir(parents=True, exist_ok=True)
    make_environment()
    session = Session(options.out, describe(options.rehearse), options.rehearse, deadline - SUMMARY)
    session.run(options.groups)
    sys.exit(session.finish())


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--steps",
        nargs="+",
        metavar="NAME",
        default=["first"],
        help=f"what to run: {', '.join([*gpu_steps.SETS, *gpu_steps.BY_NAME])} [first]",
    )
    parser.add_argument("--out", type=Path, help="folder of the record [bench/results]")
    parser.add_argument("--seconds", type=float, help="time for everything [570; rehearsal: 3600]")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and stop")
    parser.add_argument("--rehearse", action="store_true", help="run miniatures on the CPU [--out build/gpu-rehearsal]")
    options = parser.parse_args(argv)
    try:
        options.groups = gpu_steps.chosen(options.steps)
    except ValueError as error:
        parser.error(f"--steps: {error}")
    options.seconds = options.seconds or (3600.0 if options.rehearse else 570.0)
    options.out = (options.out or (ROOT / "build" / "gpu-rehearsal" if options.rehearse else RESULTS)).resolve()
    return options


def print_steps(options: argparse.Namespace) -> None:
    """The commands, those that run at once together."""
    for group in options.groups:
        for step in group:
            text = shlex.join(command_of(step, float(step.limit), options.rehearse)) or "needs a GPU"
            print(f"{step.name} (at most {step.limit} s{', at once' if len(group) > 1 else ''}): {text}")


def make_environment() -> None:
    """A virtual environment that also sees the packages of this interpreter, wherever those lie; pip is one of them."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(VENV)], check=True)
    inside = VENV / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    parents = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # addsitedir also reads the folders' own .pth files
    lines = [f"import site; site.addsitedir({path!r})" for path in parents]
    (inside / "parent.pth").write_text("\n".join([*lines, ""]))


def interpreter() -> Path:
    """That of the environment."""
    return VENV / "bin" / "python"


def describe(rehearse: bool) -> Record:
    """The device and the versions; that of a rehearsal has no name, for its figures mean nothing.

    What a rehearsal compiles for is an H100.
    """
    code = (
        "import json, torch, platform, importlib.metadata as m\n"
        "found = {'device': 'rehearsal', 'memory': 0, 'capability': '9.0'}\n"
        f"if not {rehearse}:\n"
        "    p = torch.cuda.get_device_properties(0)\n"
        "    found = {'device': p.name, 'memory': p.total_memory, 'capability': f'{p.major}.{p.minor}'}\n"
        "found |= {'torch': torch.__version__, 'cuda': torch.version.cuda, 'triton': m.version('triton')}\n"
        "print(json.dumps(found | {'python': platform.python_version()}))"
    )
    run = subprocess.run([str(interpreter()), "-c", code], capture_output=True, text=True)
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        sys.exit(f"error: {sys.executable} has no PyTorch with Triton and a CUDA GPU: {lines[-1] if lines else ''}")
    return json.loads(run.stdout.splitlines()[-1]) | {"rehearsal": rehearse}


def command_of(step: Step, seconds: float, rehearse: bool) -> list[str]:
    """The words of a step's command."""
    log = ["-p", "bench.pytest_log", "--test-log", str(tests_file(step))]
    if importlib.util.find_spec("xdist"):
        workers = max(1, min(WORKERS, (os.cpu_count() or 1) - 2))
        log += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "100"]
    if importlib.util.find_spec("pytest_timeout"):
        # one that hangs ends its process, and pytest-xdist starts another
        log += ["--timeout", str(min(100, step.limit // 2)), "--timeout-method", "thread"]
    # a bench ends by itself before it would be ended
    return step.words(gpu_steps.fields(step, interpreter(), SCRATCH, 0.8 * seconds, log), rehearse)


def rest_of(process: subprocess.Popen[str]) -> str:
    """What an ended command has written; a child in a session of its own may live on and hold the pipe open."""
    try:
        return process.communicate(timeout=5)[0]
    except subprocess.TimeoutExpired as error:
        written = error.output or ""
        return written if isinstance(written, str) else written.decode(errors="replace")


def tests_file(step: Step) -> Path:
    """Where a step that runs tests has them written."""
    return SCRATCH / f"{step.name}.jsonl"


@dataclass
class Session:
    """One call: runs steps and keeps the record.

    Attributes:
        out: folder of the record.
        description: device and versions.
        rehearse: miniatures are run.
        deadline: of ``time.monotonic``, when everything must have ended.
    """

    out: Path
    description: Record
    rehearse: bool
    deadline: float
    record: Record = field(init=False)
    failed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _running: set[subprocess.Popen[str]] = field(default_factory=set)
    _texts: list[str] = field(default_factory=list)
    _tested: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stem = re.sub(r"[^a-z0-9]+", "-", self.description["device"].lower()).strip("-")
        self.commit = revision()
        self.record = dict(self.description)
        for folder in (self.out,) if self.rehearse else (self.out, RESULTS):
            earlier = gpu_record.read(folder / f"{self.stem}.json")
            if earlier is None:
                continue
            if gpu_record.continues(earlier, self.description):
                print(f"continuing {folder / self.stem}.json of {earlier['date']}")
                self.record = earlier
                return
            print(f"{folder / self.stem}.json is of other versions, and is not continued")
        print("a new record" + (", of an unknown commit: COMMIT=... names it" if self.commit == "unknown" else ""))

    @property
    def file(self) -> Path:
        """The record's."""
        return self.out / f"{self.stem}.json"

    def run(self, groups: list[list[Step]]) -> None:
        """Groups one after the other, the steps of a group at once."""
        for place, group in enumerate(groups):
            later = sum(max(map(self._limit, others)) for others in groups[place + 1 :])
            with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
                try:
                    started = [pool.submit(self._run_step, step, later) for step in group]
                    for done in concurrent.futures.as_completed(started):
                        done.result()
                except BaseException:
                    self._end_all()
                    raise

    def _limit(self, step: Step) -> float:
        """Seconds: two cores need longer than the sixteen that the limits are for."""
        return step.limit * (10 if self.rehearse else 1)

    def _run_step(self, step: Step, later: float = 0) -> None:
        """One step, and what it gave, into the record; ``later`` are the seconds of those after it."""
        result = self._result(step, later)
        result |= {"commit": self.commit, "date": datetime.date.today().isoformat()}
        with self._lock:
            tests = gpu_record.read_tests(tests_file(step))
            if tests:
                result["tests"] = gpu_record.summarise_tests(tests)
                self._texts.append(gpu_record.tests_text(step.name, tests))
                self._tested.append(step.name)
                if not result["tests"]["passed"] and result["status"] == "ok":
                    result["status"] = "nothing ran"
            gpu_record.add_step(self.record, result, list(gpu_steps.BY_NAME))
            file = Path(gpu_steps.fields(step, VENV, SCRATCH, 0, ())["json"][0])
            # absent, or half written by a step that ran out of time; a JSONDecodeError is a ValueError
            try:
                gpu_record.add_results(self.record, step.fills, json.loads(file.read_text()), result)
            except OSError:
                pass
            except ValueError as error:
                result["status"] = f"wrote no record: {error}" if result["status"] == "ok" else result["status"]
            gpu_record.write(self.record, self.file)
            status = result["status"]
            self.failed |= not status.startswith(("ok", "skipped"))
            tail = [] if status.startswith(("ok", "skipped")) else [result["output"][-TAIL:]]
            print(f"{step.name}: {status}, {result['seconds']:.0f} s", *tail, sep="\n", flush=True)

    def _result(self, step: Step, later: float) -> Record:
        """Run a step, which is ended when its own time or everybody's is up, and what earlier ones left over."""
        start = time.monotonic()
        left = self.deadline - start
        seconds = max(min(self._limit(step), left), left - later)
        status, output = "out of time", ""
        print(f"{step.name} ...", flush=True)
        if self.rehearse and not step.miniature:
            status = "skipped: needs a GPU"
        elif seconds >= LEAST:
            try:
                status, output = self._execute(command_of(step, seconds, self.rehearse), seconds)
            except FileNotFoundError as error:
                status = f"not there: {error.filename}"
        return {
            "name": step.name,
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
            "output": output[-(TAIL if status == "ok" else TAIL_FAILED) :],
        }

    def _execute(self, command: list[str], seconds: float) -> tuple[str, str]:
        """Status and output; a command out of time is ended with all that it has started."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environment("pytest" in command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        with self._kept(process):
            try:
                output, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return "out of time", rest_of(process)
        return "ok" if process.returncode == 0 else f"exit status {process.returncode}", output

    @contextlib.contextmanager
    def _kept(self, process: subprocess.Popen[str]) -> Iterator[None]:
        self._running.add(process)
        try:
            yield
        finally:
            self._running.discard(process)

    def _end_all(self) -> None:
        for process in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _environment(self, tests: bool) -> dict[str, str]:
        build = "cuda" if not self.rehearse or shutil.which("nvcc") else "cpu"
        found = {**os.environ, "PYTHONUNBUFFERED": "1", "PMM_FAST_BUILD": build, VARIABLE: self.commit}
        found |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        found |= {"PMM_FAST_CUDA_ARCHS": self.description["capability"].replace(".", "")}
        # processes side by side, a core each
        return found | ({"OMP_NUM_THREADS": "1"} if tests else {})

    def finish(self) -> bool:
        """Write the log of the tests and the tables; whether a step failed."""
        if self._texts:
            text = "\n\n".join(self._texts)
            name = "-".join([self.stem, *sorted(self._tested)])
            (self.out / f"{name}.log").write_text(text[:LOG])
        files = [str(self.file), "--out", str(self.file.with_suffix(".md"))]
        shown = subprocess.run([str(interpreter()), "bench/gpu_summary.py", *files], cwd=ROOT).returncode == 0
        return self.failed or not shown


if __name__ == "__main__":
    main()
