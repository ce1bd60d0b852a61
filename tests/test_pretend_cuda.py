"""The package on a pretend GPU: what it would refuse or wait for on a real one, and that the numbers are the CPU's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import pmm_fast
from pmm_fast import meta, ops, train
from pmm_fast.config import EvalConfig, resolve_protocol
from tests import pretend_cuda
from tests.meta import test_step_host
from tests.meta.tiny import tiny_batch, tiny_problem
from tests.pretend_cuda import CudaTensor, Gpu, move
from tests.street_folders import make_domain
from tests.test_train_command import arguments
from tests.tiny_network import noise, tiny_network
from tests.tolerances import DEVICES, relative_error

pytestmark = pytest.mark.skipif(pretend_cuda.missing() is not None, reason=str(pretend_cuda.missing()))


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretend_cuda.pretend_cuda() as made:
        yield made


def there(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


# --- what a pretend GPU refuses and notes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: there(3) + torch.ones(3),
        lambda: torch.cat([there(3), torch.ones(3)]),
        lambda: torch.stack([there(), torch.ones(())]),
        lambda: torch.where(there(3) > 0, torch.ones(3), there(3)),
        lambda: torch.nn.functional.linear(there(2, 3), torch.ones(4, 3)),
        lambda: there(3).add_(torch.ones(3)),
        lambda: ops.masked_average_pool(there(1, 2, 3, 3), torch.zeros(1, 6, 6, dtype=torch.uint8), 4),
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda: torch.randn(3, generator=torch.Generator("cuda")),
        lambda: torch.ones(3, device="cuda:1"),
        lambda: there(3).numpy(),
        lambda: np.asarray(there(3)),
        lambda: there(3).data_ptr(),
        lambda: there(3).pin_memory(),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_refused(mistake: Callable[[], Any]) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"device|numpy|data pointer|pin"):
        mistake()


@pytest.mark.parametrize(
    "waits, action",
    [
        (True, lambda: there(3).sum().item()),
        (True, lambda: bool(there() > 0)),
        (True, lambda: there(3).cpu()),
        (True, lambda: there(3).tolist()),
        (True, lambda: there(3)[there(3) > 0]),
        (True, lambda: there(3)[[0, 2]]),
        (True, lambda: there(3).nonzero()),
        (True, lambda: torch.tensor([1.0, 2.0], device="cuda")),
        (True, lambda: torch.ones(3).to("cuda")),
        (False, lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True)),
        (False, lambda: torch.randn(3, device="cuda", generator=torch.Generator("cuda")) * torch.tensor(2.0)),
        (False, lambda: torch.full_like(there(3), 2.0).softmax(0)),
        (False, lambda: there(3).to("cuda").new_zeros(2)),
    ],
)
def test_waiting(waits: bool, action: Callable[[], Any], gpu: Gpu) -> None:
    action()
    assert bool(gpu.waits) == waits and not gpu.copies
    with gpu.no_waiting():
        if waits:
            with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
                action()
        else:
            action()


def test_results_are_there_and_computed(gpu: Gpu) -> None:
    x = there(2, 3).requires_grad_()
    loss = (x.sin() @ x.t()).square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert type(second) is CudaTensor and second.device == torch.device("cuda", 0) and second.is_cuda
    with torch.autocast("cuda", torch.bfloat16):
        # autocast of CUDA, which sums in float32
        assert (x @ x.t()).dtype == torch.bfloat16 and x.bfloat16().sum().dtype == torch.float32
    torch.ones(3).to("cuda", non_blocking=True)
    assert sum(gpu.copies.values()) == 1 and not gpu.waits


# --- the step -----------------------------------------------------------------------------------------------------


def assert_equal(found: Any, expected: Any) -> None:
    """The results of two steps, one of them on the GPU."""
    pairs = [*zip(found.grads.values(), expected.grads.values(), strict=True), (found.memory, expected.memory)]
    pairs += zip(found.losses.values(), expected.losses.values(), strict=True)
    pairs += zip(found.buffers.values(), expected.buffers.values(), strict=True)
    for ours, theirs in pairs:
        assert theirs is None or (type(ours) is CudaTensor and torch.equal(ours.inner, theirs))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("mode", ["pinmem", "mldg", "memory-agg", "agg"])
def test_a_step_waits_for_nothing(mode: str, order: int, gpu: Gpu) -> None:
    *given, hyper = tiny_problem(mode, order=order)
    expected = meta.step(*given, hyper)
    arguments = move(given)
    with gpu.no_waiting(), ops.record_backends() as calls:
        found = meta.step(*arguments, hyper)
        if found.memory is not None:
            params, buffers, _, batch, *_ = arguments
            meta.rewrite_memory(params, buffers, found.memory, [batch], hyper)
    assert_equal(found, expected)
    assert {backend for _, backend in calls} == {"cuda"}


def test_a_real_network_in_mixed_precision(gpu: Gpu) -> None:
    """Losses near the CPU's, whose autocast upsamples in bf16, and no map that is joined in two types."""
    given, hyper = test_step_host.problem("agg", autocast=torch.bfloat16)
    expected = meta.step(*given, hyper)
    joined = []

    def look(operation: Any, args: tuple[Any, ...], result: Any) -> None:
        if operation is torch.ops.aten.cat.default:
            joined.append({part.dtype for part in args[0] if part.dim() == 4})

    arguments = move(given)
    with gpu.no_waiting(), test_step_host.Operations(look):
        found = meta.step(*arguments, hyper)
    assert joined and all(kinds == {torch.bfloat16} for kinds in joined)
    assert abs(float(found.losses["total"]) / float(expected.losses["total"]) - 1) < 0.01


@pytest.mark.usefixtures("gpu")
def test_a_captured_step_is_replayed_with_other_values() -> None:
    *given, hyper = tiny_problem("mldg")
    arguments = move(given)
    compiled = meta.CompiledStep("cuda-graph", strict=True, say=lambda line: None)
    compiled(*arguments, hyper)
    given[3:5] = tiny_batch(7), tiny_batch(8)
    arguments[3:5] = move(given[3:5])
    assert_equal(compiled(*arguments, hyper), meta.step(*given, hyper))
    assert compiled.agreements[0].repeat == 0 and compiled.fallback is None
    assert not torch.equal(given[3].images, tiny_problem("mldg")[3].images)


# --- the programs -------------------------------------------------------------------------------------------------


def losses(out: Path) -> list[float]:
    return [json.loads(line)["losses"]["total"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_training_waits_once_an_iteration(tmp_path: Path, gpu: Gpu) -> None:
    """And its checkpoint goes on on the CPU."""
    roots = [str(make_domain(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    options = ["--meta.order", "1", "--log_every", "1", "--compile", "off", "--amp", "--device"]
    out, other = tmp_path / "gpu", tmp_path / "cpu"
    train.main(arguments(roots, out, *options, "cuda"))
    read = {what: count for what, count in gpu.waits.items() if "from cpu" not in what}
    # the losses of each iteration; how many classes the first memory has not met, once
    assert sorted(read.values()) == [1, 2] and all("engine/trainer.py" in what for what in read), read
    moved = {what.split(" at ")[1] for what in gpu.waits if "from cpu" in what}
    assert len(moved) == 1, "nothing but the network goes to the GPU while the host waits"
    train.main(arguments(roots, other, *options, "cpu"))
    assert losses(out) == pytest.approx(losses(other), rel=0.02)
    train.main(arguments(roots, out, *options, "cpu", "--resume", "--iterations", "3"))
    assert len(losses(out)) == 3


@pytest.mark.parametrize("name", ["sliding", "released-pooling"])
def test_predictions_are_those_of_the_cpu(name: str, tmp_path: Path, gpu: Gpu) -> None:
    path, image = tmp_path / "network.pt", Image.fromarray(noise(48, 96))
    pmm_fast.save(tiny_network(), path)
    protocol = resolve_protocol(EvalConfig(protocol=name, crop=48, flip=True))
    here, far = (pmm_fast.Predictor(path, device=device, protocol=protocol)(image) for device in ("cpu", "cuda"))
    assert gpu.operations and np.array_equal(here.ids, far.ids)
    # no number by itself, but for those that are moved with the network
    assert not [what for what in gpu.waits if what.startswith("copy of ()") and "inference.py" in what], gpu.waits
    assert relative_error(torch.from_numpy(far.confidence), torch.from_numpy(here.confidence)) <= DEVICES[torch.float32]
