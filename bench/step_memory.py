"""What fits into which card: peak memory of a training iteration, computed: ``python bench/step_memory.py``.

The iteration runs on fake tensors, which have a shape and a storage but no content, while every storage is followed
from its allocation to its end: the tensors alive at most, for any size, on any machine.  The operators are those of the
CPU; on a GPU a few small intermediates differ.  Not in it: what an allocator loses to fragments, workspaces of the
convolutions, and the CUDA context (about half a gigabyte together).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from pmm_fast import meta
from pmm_fast.models import ARCHITECTURES, build_model

GB = 1e9
CARDS = (12, 24, 80)
# of a card, what is left to tensors: context, fragments and workspaces take the rest
USABLE = 0.9
# (order, mixed precision, checkpointed activations)
METHODS = tuple(itertools.product((1, 2), (False, True), (False, True)))


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operators return while they live.

    Attributes:
        now, peak: bytes alive, and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def watch(self, tensors: Any) -> None:
        """Count the storages of tensors until they end."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            self._known.add(key)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.watch(found)
        return found


class Setting(NamedTuple):
    """One iteration's size and method."""

    architecture: str
    crop: int
    images: int  # a domain, two domains
    order: int
    amp: bool
    checkpoint: bool


def iteration_bytes(setting: Setting) -> int:
    """Bytes alive at most in one iteration, parameters, momentum and batch included."""
    model = build_model(setting.architecture, 19)
    network = meta.Network(model, checkpoint_activations=setting.checkpoint)
    hyper = meta.Hyper(network, order=setting.order, autocast=torch.bfloat16 if setting.amp else None)
    real = meta.split_state(model)
    crop, images = setting.crop, setting.images
    with FakeTensorMode() as fake, LiveBytes() as live:
        params, buffers = ({name: fake.from_tensor(value) for name, value in part.items()} for part in real[:2])
        memory, seed = torch.empty(19, 256), torch.zeros(1, dtype=torch.int64)
        live.watch((params, buffers))
        momentum = {name: torch.empty_like(value) for name, value in params.items()}
        batches = [
            meta.Batch(torch.empty(images, 3, crop, crop), torch.empty(images, crop, crop, dtype=torch.uint8))
            for _ in range(2)
        ]
        result = meta.step(params, buffers, memory, *batches, meta.Noise(seed, seed), hyper)
        for name, grad in result.grads.items():
            momentum[name].add_(grad + params[name])
        del result, grad
        meta.rewrite_memory(params, buffers, memory, batches[:1], hyper)
        return live.peak


def images_that_fit(setting: Setting, limits: list[float]) -> list[int]:
    """For every limit in bytes, images a domain whose iteration stays below it; 0 when two do not.

    The peak is the largest of many straight lines in the number of images, so between two computed numbers it lies
    below the straight line that joins them: what is returned fits, and is rarely one short.
    """
    numbers, peaks = [2], [iteration_bytes(setting._replace(images=2))]
    while peaks[-1] <= max(limits):
        numbers.append(2 * numbers[-1])
        peaks.append(iteration_bytes(setting._replace(images=numbers[-1])))
    found = []
    for limit in limits:
        last = sum(peak <= limit for peak in peaks) - 1
        if last < 0:
            found.append(0)
            continue
        slope = (peaks[last + 1] - peaks[last]) / (numbers[last + 1] - numbers[last])
        found.append(numbers[last] + int((limit - peaks[last]) / slope))
    return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="deeplabv3plus_resnet50", choices=ARCHITECTURES, metavar="NAME")
    parser.add_argument("--crop", type=int, default=768, help="side of a training crop in pixels [768]")
    parser.add_argument("--images", type=int, default=4, help="images a domain, two domains [4]")
    parser.add_argument("--cards", type=float, nargs="+", default=list(CARDS), help="card sizes in GB [12 24 80]")
    parser.add_argument("--json", metavar="FILE", help="also write the records here")
    options = parser.parse_args(argv)
    if options.crop < 1 or options.images < 2:
        parser.error(f"--crop must be at least 1 and --images at least 2, got {options.crop} and {options.images}")
    return options


def main(argv: list[str] | None = None) -> None:
    """Compute and print the table."""
    options = arguments(argv)
    records = []
    for order, amp, checkpoint in tqdm(METHODS, desc="computing", disable=not sys.stderr.isatty()):
        setting = Setting(options.architecture, options.crop, options.images, order, amp, checkpoint)
        record: dict[str, Any] = setting._asdict() | {"peak_bytes": iteration_bytes(setting)}
        fits = images_that_fit(setting, [USABLE * card * GB for card in options.cards])
        record["images_that_fit"] = dict(zip(options.cards, fits, strict=True))
        records.append(record)
    print(f"{options.architecture}, crops of {options.crop} x {options.crop}, 2 domains x {options.images} images")
    heads = "".join(f"{f'{card:g} GB':>8}" for card in options.cards)
    print(f"{'order':>5}  {'precision':<9}  {'checkpointed':<12}{'peak GB':>9}   images a domain within{heads}")
    for record in records:
        precision, kept = "bf16" if record["amp"] else "float32", "yes" if record["checkpoint"] else "no"
        columns = "".join(f"{images:>8}" for images in record["images_that_fit"].values())
        peak = record["peak_bytes"] / GB
        print(f"{record['order']:>5}  {precision:<9}  {kept:<12}{peak:>9.2f}{' ' * 25}{columns}")
    print(f"computed, not measured; tensors within {USABLE:.0%} of the card")
    if options.json:
        Path(options.json).write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
