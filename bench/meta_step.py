"""Seconds per iteration of the training modes, side by side: ``python bench/meta_step.py``.

One iteration is the step, the SGD update and the memory's rewrite, on random images.  Before anything is timed the
orders are checked against each other: equal at inner learning rate 0, apart otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from pmm_fast import meta, ops
from pmm_fast.models import Segmentor, build_model

VARIANTS = (("agg", 1), ("memory-agg", 1), ("mldg", 1), ("mldg", 2), ("pinmem", 1), ("pinmem", 2))
EQUAL = 1e-3  # float32, relative to the largest gradient entry


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="deeplabv3plus_resnet50")
    parser.add_argument("--crop", type=int, nargs=2, default=[96, 96], help="height width in pixels [96 96]")
    parser.add_argument("--images", type=int, default=2, help="images a domain, two domains [2]")
    parser.add_argument("--iterations", type=int, default=5, help="timed iterations a variant [5]")
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--json", metavar="FILE", help="also write the records here")
    return parser.parse_args()


def batches(options: argparse.Namespace, device: torch.device) -> tuple[meta.Batch, meta.Batch]:
    torch.manual_seed(0)
    shape = (options.images, *options.crop)
    return tuple(  # type: ignore[return-value]
        meta.Batch(
            torch.randn(shape[0], 3, *shape[1:], device=device),
            torch.randint(0, 19, shape, dtype=torch.uint8, device=device),
        )
        for _ in range(2)
    )


def make_iteration(model: Segmentor, mode: str, order: int, options: argparse.Namespace, inner_lr: float = 0.0025):
    """A function that runs one iteration of a variant and returns its gradients."""
    device = next(model.parameters()).device
    params, buffers, memory = meta.split_state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    autocast = torch.bfloat16 if options.amp else None
    hyper = meta.Hyper(meta.Network(model), mode, order, inner_lr=inner_lr, autocast=autocast)
    train, test = batches(options, device)
    if mode not in meta.META_MODES:
        train, test = meta.Batch(*(torch.cat(parts) for parts in zip(train, test, strict=True))), None

    def noise(batch: meta.Batch | None):
        if memory is None or batch is None:
            return None
        size = model.feature_size(*batch.images.shape[2:])
        return ops.gumbel_noise((len(batch.images), 19, *size), device=device)

    def iterate() -> meta.State:
        torch.manual_seed(1)
        result = meta.step(params, buffers, memory, train, test, meta.Noise(noise(train), noise(test)), hyper)
        for name, parameter in params.items():
            parameter.grad = result.grads[name]
        optimizer.step()
        if memory is not None:
            memory.copy_(meta.rewrite_memory(params, buffers, memory, [train], hyper))
        return result.grads

    return iterate


def new_model(options: argparse.Namespace, mode: str, device: torch.device) -> Segmentor:
    torch.manual_seed(0)
    model = build_model(options.architecture, 19, memory=mode in meta.MEMORY_MODES).to(device).train()
    if model.memory is not None:
        model.memory.slots.copy_(ops.normalize(torch.rand_like(model.memory.slots), 1))
    return model


def gate(options: argparse.Namespace, device: torch.device) -> None:
    """Order 2 equals order 1 where the inner step is empty, and only there."""
    distances = []
    for inner_lr in (0.0, 0.0025):
        first, second = (
            make_iteration(new_model(options, "pinmem", device), "pinmem", order, options, inner_lr)()
            for order in (1, 2)
        )
        largest = torch.stack([value.abs().max() for value in first.values()]).max()
        apart = torch.stack([(first[name] - second[name]).abs().max() for name in first]).max()
        distances.append(float(apart / largest))
    print(f"gate: order 2 against order 1: {distances[0]:.1e} at inner lr 0, {distances[1]:.1e} at 0.0025")
    if not distances[0] < EQUAL < distances[1]:
        sys.exit("gate failed: nothing is timed")


def main() -> None:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gate(options, device)
    records = []
    for mode, order in tqdm(VARIANTS, desc="variants", disable=not sys.stderr.isatty()):
        iterate = make_iteration(new_model(options, mode, device), mode, order, options)
        seconds = []
        for index in range(options.iterations + 1):
            start = time.perf_counter()
            iterate()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index:  # the first warms up
                seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        records.append(
            {
                "variant": mode,
                "order": order if mode in meta.META_MODES else None,
                "dtype": "bf16" if options.amp else "float32",
                "compiled": False,
                "seconds_per_step": median,
                "images_per_s": 2 * options.images / median,
                "ratio_agg": median / records[0]["seconds_per_step"] if records else 1.0,
            }
        )
    report(records, options, device)


def report(records: list[dict], options: argparse.Namespace, device: torch.device) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(
        f"{options.architecture}, {options.images} images a domain, 2 domains, crop {options.crop}, {name}, {threads}"
    )
    print(f"torch {torch.__version__}, median of {options.iterations}")
    print(f"{'variant':<12}{'order':>6}{'s/iteration':>13}{'images/s':>10}{'x agg':>8}")
    for record in records:
        print(
            f"{record['variant']:<12}{record['order'] or '-':>6}{record['seconds_per_step']:>13.3f}"
            f"{record['images_per_s']:>10.2f}{record['ratio_agg']:>8.2f}"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
