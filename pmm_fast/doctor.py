"""``python -m pmm_fast.doctor``: what this installation has, what it lacks and why, and whether its kernels are right.

The text to put into a report of a problem.  Exits with 1 when a kernel gives wrong numbers.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

from pmm_fast.config import Parser, run_main

if TYPE_CHECKING:
    from torch import Tensor

PROG = "python -m pmm_fast.doctor"
DESCRIPTION = "Show versions, devices, compiled modules and backends, and check every kernel against plain PyTorch."
PACKAGES = ("torch", "triton", "numpy", "pillow", "pyyaml", "tqdm", "safetensors")
OPTIONAL = ("matplotlib", "scikit-learn", "tensorboard", "nvidia-dali-cuda130")
VARIABLES = ("PMM_FAST_BACKEND", "PMM_FAST_BUILD", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
# float32, relative to the largest value, of results and derivatives: far above rounding, far below a mistake
RIGHT = 1e-4


def main(argv: list[str] | None = None) -> None:
    """Print the report; exit with 1 if a check failed.

    Raises:
        ConfigError: an unknown option.
        SystemExit: a kernel is wrong.
    """
    parser = Parser(PROG, DESCRIPTION, sections=())
    parser.own.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.own.add_argument("--no-check", action="store_true", help="do not run the kernels")
    own, _ = parser.parse_options(argv)
    report = collect(check=not own.no_check)
    print(json.dumps(report, indent=2) if own.json else render(report))
    wrong = [name for name, result in report["checks"].items() if not result["right"]]
    if wrong:
        print(f"error: wrong results: {', '.join(wrong)}; please report this with the text above", file=sys.stderr)
        raise SystemExit(1)


def collect(check: bool = True) -> dict[str, Any]:
    """The report: versions, machine, compiled modules, backends by operator with reasons, results of the checks."""
    import torch

    from pmm_fast import __version__
    from pmm_fast.ops import backends, extension

    return {
        "pmm_fast": __version__,
        "python": platform.python_version(),
        # the metadata of a wheel from PyPI leave out which CUDA it is built for
        "packages": {name: _version(name) for name in (*PACKAGES, *OPTIONAL)} | {"torch": torch.__version__},
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "compiled": {name: extension.missing(name) or _build(name) for name in ("_C", "_CUDA")},
        "backends": {name: backends.missing(name) for name in backends.BACKENDS},
        "checks": _check_all() if check else {},
    }


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"pmm_fast {report['pmm_fast']}, Python {report['python']}, {report['system']}"]
    lines.append("packages    " + ", ".join(f"{k} {v or 'absent'}" for k, v in report["packages"].items()))
    lines.append("devices     " + "; ".join([f"CPU with {report['threads']} threads", *report["devices"]]))
    if report["environment"]:
        lines.append("environment " + " ".join(f"{k}={v}" for k, v in report["environment"].items()))
    lines += ["", "compiled modules"]
    lines += [f"  {name:<10} {text}" for name, text in report["compiled"].items()]
    lines += ["", "backends of the operators, best first (pmm_fast.ops.explain tells about one call)"]
    lines += [f"  {name:<10} {reason or 'usable'}" for name, reason in report["backends"].items()]
    if report["checks"]:
        lines += [
            "",
            "relative errors of values, first and second derivatives, float32 against plain PyTorch in float64",
        ]
        for name, result in report["checks"].items():
            errors = "  ".join(f"{error:.0e}" for error in result["errors"]) or result["failure"]
            lines.append(f"  {name:<34} {errors:<28} {'right' if result['right'] else 'WRONG'}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    return [
        f"cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
        for i, p in enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count())))
    ]


def _build(name: str) -> str:
    from pmm_fast.ops import extension

    module = extension.load(name)
    if name == "_C":
        others = ", ".join(module.instruction_sets()[1:])
        return f"built by {module.compiler}; uses {module.instruction_set()}" + (f" (also {others})" if others else "")
    return f"built by {getattr(module, 'compiler', 'an unnamed compiler')}"


def _check_all() -> dict[str, dict[str, Any]]:
    """Every operator on every usable backend, on the device that it is for."""
    import torch

    from pmm_fast.ops import backends

    results: dict[str, dict[str, Any]] = {}
    for name in backends.BACKENDS:
        if backends.missing(name) is not None or name == "reference":
            continue
        on_gpu = name == "cuda" or (name == "triton" and not backends.interpreted())
        for operator in backends.OPERATORS:
            outcome: dict[str, Any] = {"errors": [], "failure": "", "right": False}
            try:
                outcome["errors"] = _errors(operator, name, torch.device("cuda" if on_gpu else "cpu"))
                outcome["right"] = all(error < RIGHT for error in outcome["errors"])
            except Exception as error:
                outcome["failure"] = f"{type(error).__name__}: {error}"
            results[f"{name} {operator}"] = outcome
    return results


def _errors(operator: str, backend: str, device: Any) -> list[float]:
    """Relative errors of values, first and second derivatives on a small random input."""
    import torch

    from pmm_fast import ops

    if operator == "photometric":
        return [_photometric_error(backend, device)]
    if operator == "merge_tiles":
        return [_merge_error(backend, device)]
    with ops.use_backend("reference"):
        expected = _derivatives(operator, device, exact=True)
    with ops.use_backend(backend):
        found = _derivatives(operator, device, exact=False)
    # torch's maximum, which a NaN passes through
    return [float(torch.stack([*map(_error, *pair)]).max()) for pair in zip(found, expected, strict=True)]


def _photometric_error(backend: str, device: Any) -> float:
    """The mean error relative to the mean value: a blurred level half-way between two may be rounded to either."""
    import torch

    from pmm_fast import ops

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 24, 28), generator=generator).byte().to(device)
    looks = torch.tensor([[3, 2, 1, 0, 1.2, 0.7, 1.5, 9, 0], [0, 1, 2, 3, 0.8, 1.3, 0.6, -20, 1.1]])
    results = []
    for name in ("reference", backend):
        with ops.use_backend(name):
            results.append(ops.photometric(images, looks, (0.5,) * 3, (0.25,) * 3).double())
    expected, found = results
    return float((found - expected).abs().mean() / expected.abs().mean())


def _merge_error(backend: str, device: Any) -> float:
    """The largest error of the average and of the confidence, and how far a class chosen is below the best."""
    import torch

    from pmm_fast import ops

    logits = torch.randn(4, 19, 6, 7, generator=torch.Generator().manual_seed(0)).to(device)
    places = [0, 0, 11, 11], [0, 13, 0, 13], (17, 23), (28, 36)
    with ops.use_backend("reference"):
        expected = ops.merge_tiles(logits.double(), *places).double()
    with ops.use_backend(backend):
        average, (classes, confidence) = ops.merge_tiles(logits, *places), ops.segment_tiles(logits, *places, True)
    assert confidence is not None
    chosen = expected.gather(0, classes.long().unsqueeze(0))[0]
    pairs = [(average, expected), (confidence, expected.softmax(0).amax(0)), (chosen, expected.amax(0))]
    return float(torch.stack([_error(*pair) for pair in pairs]).max())


def _error(found: Tensor, expected: Tensor) -> Tensor:
    return (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)


def _derivatives(operator: str, device: Any, exact: bool) -> list[list[Tensor]]:
    """Values, gradients, and gradients of a fixed combination of the gradients."""
    import torch

    from pmm_fast import ops

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return values.to(device, torch.float64 if exact else torch.float32).requires_grad_()

    features, written, memory, logits = draw(2, 32, 6, 7), draw(2, 32, 6, 7), draw(19, 32), draw(2, 19, 6, 7)
    labels = torch.randint(0, 19, (2, 24, 28), generator=generator).to(device)
    seed = torch.tensor([7], device=device)
    calls: dict[str, tuple[Any, list[Tensor]]] = {
        "masked_average_pool": (lambda: ops.masked_average_pool(features, labels, 19), [features]),
        "memory_read": (lambda: ops.memory_read(features, memory, seed), [features, memory]),
        "memory_pass": (
            lambda: ops.memory_pass(features, written, labels, memory, seed),
            [features, written, memory],
        ),
        "upsample_cross_entropy": (lambda: (ops.upsample_cross_entropy(logits, labels),), [logits]),
    }
    function, inputs = calls[operator]
    values = list(function())
    total = torch.stack([(value * torch.cos(value)).sum() for value in values if value.requires_grad]).sum()
    first = torch.autograd.grad(total, inputs, create_graph=True)
    second = torch.autograd.grad(torch.stack([(grad * torch.sin(3 * grad)).sum() for grad in first]).sum(), inputs)
    return [[value.detach() for value in group] for group in (values, first, second)]


if __name__ == "__main__":
    run_main(main)
