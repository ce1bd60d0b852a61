"""Seconds an image of the test protocols beside the released code's way: ``python bench/evaluation.py``.

Three ways of one protocol, on one image and one network, in turns: the released one (a tile at a time, logits at full
size to the CPU, sums in float64 and a copy of every class there), plain PyTorch (tiles in batches, logits upsampled and
summed on the device), and ``engine.inference.segment``.  Nothing is timed before all three gave the same classes,
wherever the two best are further apart than rounding.  Noise in the read is off, for it would differ.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import harness
from bench.memory_ops import first_line, versions
from bench.report import write_json
from pmm_fast.config import EVAL_PROTOCOLS, EvalProtocol
from pmm_fast.data.streets import render
from pmm_fast.data.transforms import normalise
from pmm_fast.engine.build import set_float32_precision
from pmm_fast.engine.inference import segment, tile_starts
from pmm_fast.models import Segmentor, build_model
from pmm_fast.models.segmentor import Output

CLASSES = 19
PROTOCOLS = ("whole", "released-pooling", "released-sliding")
TILE_BATCH = 8
# of the largest logit; nearer classes may change places by rounding
CLEAR = 1e-4

Way = Callable[[Segmentor, Image.Image, EvalProtocol, torch.device], np.ndarray]
"""Network on the device, image, protocol and device to classes ``[H, W]`` on the CPU."""


def windows_of(
    pixels: Tensor, protocol: EvalProtocol
) -> tuple[list[Tensor], list[tuple[int, int]], tuple[int, int], int]:
    """Tiles of an image ``[3, H, W]`` and of its mirrored one, where they begin, their size, and how many an image."""
    height, width = pixels.shape[1:]
    side = protocol.crop if protocol.method == "sliding" else max(height, width)
    tile = min(side, height), min(side, width)
    places = [
        (top, left)
        for top in tile_starts(height, tile[0], protocol.overlap)
        for left in tile_starts(width, tile[1], protocol.overlap)
    ]
    views = [pixels, pixels.flip(-1)] if protocol.flip else [pixels]
    windows = [view[:, top : top + tile[0], left : left + tile[1]] for view in views for top, left in places]
    return windows, places * len(views), tile, len(places)


def released(model: Segmentor, image: Image.Image, protocol: EvalProtocol, device: torch.device) -> np.ndarray:
    """As ``eval.py`` and the end of ``train.py`` go about it."""
    windows, places, tile, half = windows_of(normalise(image), protocol)
    with torch.no_grad():
        outputs = [model(window[None].to(device)).logits for window in windows]
    if protocol.method == "whole":
        return outputs[0].max(1)[1].cpu().numpy()[0]
    if protocol.method == "pooling":
        mean = torch.zeros(1, CLASSES, *tile, dtype=torch.float64)
        for number, logits in enumerate(outputs, 1):
            mean.add_((torch.softmax(logits.cpu(), 1) - mean) / number)
        return mean.max(1)[1].numpy()[0]
    scattered = torch.cat(outputs).cpu().numpy()
    merged = [_reverse(scattered[start : start + half], places[:half], image) for start in range(0, len(windows), half)]
    if protocol.flip:
        merged[1] = merged[1][..., ::-1]
    return np.argmax(np.mean(merged, axis=0), axis=0)


def _reverse(tiles: np.ndarray, places: list[tuple[int, int]], image: Image.Image) -> np.ndarray:
    """One image from its tiles in float64, with a thread for each class that resizes it to what it is already."""
    total = np.zeros((CLASSES, image.height, image.width))
    counts = np.zeros((CLASSES, image.height, image.width))
    for tile, (top, left) in zip(tiles, places, strict=True):
        rows, columns = slice(top, top + tile.shape[1]), slice(left, left + tile.shape[2])
        # as released: classes and rows where rows and columns are meant, a factor that all classes of a pixel share
        # unless a tile begins in one of the rows 1 to 18
        counts[rows, columns] += 1
        total[:, rows, columns] += tile
    total = total / counts
    resized: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda k=k: resized.update({k: total[k].copy()})) for k in range(CLASSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return np.stack([resized[k] for k in range(CLASSES)])


def plain(model: Segmentor, image: Image.Image, protocol: EvalProtocol, device: torch.device) -> np.ndarray:
    """Tiles in batches, everything on the device, nothing fused."""
    windows, places, tile, half = windows_of(normalise(image).to(device), protocol)
    total = torch.zeros(CLASSES, image.height, image.width, device=device)
    counts = torch.zeros(image.height, image.width, device=device)
    with torch.no_grad():
        for start in range(0, len(windows), TILE_BATCH):
            logits = model(torch.stack(windows[start : start + TILE_BATCH])).logits
            for number, one in enumerate(logits, start):
                top, left = places[number]
                if number >= half:
                    one, left = one.flip(-1), image.width - left - tile[1]
                total[:, top : top + tile[0], left : left + tile[1]] += one
                counts[top : top + tile[0], left : left + tile[1]] += 1
    return total.div_(counts).argmax(0).to(torch.uint8).cpu().numpy()


def ours(model: Segmentor, image: Image.Image, protocol: EvalProtocol, device: torch.device) -> np.ndarray:
    """``engine.inference.segment``."""
    size = image.height, image.width
    return segment(model, image, size, protocol, device).classes.cpu().numpy()


WAYS: dict[str, Way] = {"released": released, "plain": plain, "ours": ours}


# --- gate ---------------------------------------------------------------------------------------------------------


def margins(model: Segmentor, image: Image.Image, protocol: EvalProtocol, device: torch.device) -> np.ndarray:
    """How far the best class of every pixel is from the next, of the largest logit, ``[H, W]``."""
    windows, places, tile, half = windows_of(normalise(image).to(device), protocol)
    total = torch.zeros(CLASSES, image.height, image.width, dtype=torch.float64)
    counts = torch.zeros(image.height, image.width)
    with torch.no_grad():
        for number, (window, (top, left)) in enumerate(zip(windows, places, strict=True)):
            one = model(window[None]).logits[0].cpu().double()
            if number >= half:
                one, left = one.flip(-1), image.width - left - tile[1]
            total[:, top : top + tile[0], left : left + tile[1]] += one
            counts[top : top + tile[0], left : left + tile[1]] += 1
    average = total / counts
    best = average.topk(2, 0).values
    return ((best[0] - best[1]) / average.abs().max()).numpy()


def differs(found: np.ndarray, expected: np.ndarray, margin: np.ndarray) -> str | None:
    """Why classes are not those expected, or None."""
    clear = margin > CLEAR
    if not clear.mean() > 0.9:
        return f"only {clear.mean():.1%} of the pixels have a class that is clearly the best"
    wrong = int((found != expected)[clear].sum())
    return f"{wrong} of {found.size} pixels have another class" if wrong else None


# --- measuring ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def network_seconds(model: Segmentor, device: torch.device) -> Iterator[list[float]]:
    """Durations of the network's calls meanwhile, up to the logits at the decoder's resolution."""
    spent: list[float] = []
    right = model.predict_coarse

    def timed(images: Tensor, noise: Tensor | None = None) -> Output:
        _wait(device)
        start = time.perf_counter()
        output = right(images, noise)
        _wait(device)
        spent.append(time.perf_counter() - start)
        return output

    # shadows the method
    model.predict_coarse = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        del model.predict_coarse


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    model: Segmentor, image: Image.Image, protocol: EvalProtocol, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """A record a way, behind the gate.

    Raises:
        ValueError: a way has other classes than the released one.
    """
    margin = margins(model, image, protocol, device)
    expected = released(model, image, protocol, device)
    for name, way in (each for each in WAYS.items() if each[0] != "released"):
        if reason := differs(way(model, image, protocol, device), expected, margin):
            raise ValueError(f"{name}: {reason}")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            with network_seconds(model, device) as network:
                start = time.perf_counter()
                way(model, image, protocol, device)
                seconds[name].append((time.perf_counter() - start, sum(network)))
    peak_of = harness.cuda_peak if device.type == "cuda" else harness.cpu_peak
    records: list[dict[str, Any]] = []
    for name, times in seconds.items():
        whole, network = (statistics.median(part) for part in zip(*times, strict=True))
        rest = statistics.median(total - inside for total, inside in times)
        peak, _, _ = peak_of(partial(WAYS[name], model, image, protocol, device))
        record: dict[str, Any] = {"protocol": protocol.name, "way": name, "seconds": whole}
        records.append(record | {"network_seconds": network, "rest_seconds": rest, "peak_bytes": peak})
    return records


def add_ratios(records: list[dict[str, Any]]) -> None:
    """How many times faster than the other two ways each is: whole images, and what is not the network."""
    for record in records:
        for other in ("released", "plain"):
            base = next(each for each in records if each["way"] == other)
            record[f"times_{other}"] = base["seconds"] / record["seconds"]
            record[f"rest_times_{other}"] = base["rest_seconds"] / record["rest_seconds"]


def new_model(architecture: str, channels: int, device: torch.device) -> Segmentor:
    """A network of random weights whose memory and logits vary."""
    torch.manual_seed(0)
    model = build_model(architecture, CLASSES, channels=channels).eval()
    assert model.memory is not None
    model.memory.slots.copy_(torch.nn.functional.normalize(torch.rand_like(model.memory.slots), dim=1))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # batch norms that do something
            if name.endswith("weight") and tensor.dim() == 1:
                tensor.uniform_(0.8, 2)
    return model.to(device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), default=[512, 1024], help="pixels [512 1024]")
    parser.add_argument("--crop", type=int, help="tile side [3/8 of the width, the released 768 of 2048]")
    parser.add_argument("--architecture", default="deeplabv3plus_mobilenet_v2")
    parser.add_argument("--channels", type=int, default=256, help="width of the feature map and the memory [256]")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help=", ".join(PROTOCOLS))
    parser.add_argument("--rounds", type=int, default=5, help="timed repeats of each way [5]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run [cuda if there is one]")
    parser.add_argument("--json", metavar="FILE", help="write the records here, as a list; kept up to date")
    options = parser.parse_args(argv)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    height, width = options.size
    crop = options.crop or width * 3 // 8
    facts = {"height": height, "width": width, "crop": crop, "architecture": options.architecture}
    facts |= versions(device.type)
    set_float32_precision(tf32=False)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    model, image = (
        new_model(options.architecture, options.channels, device),
        render("night", "val", 0, (height, width))[0],
    )
    records: list[dict[str, Any]] = []
    failed = False
    print(
        f"{'protocol':<18}{'way':<10}{'s/image':>9}{'network':>9}{'rest':>9}{'peak MB':>9}{'x rel.':>8}{'x plain':>9}"
    )
    for name in options.protocols:
        protocol = replace(EVAL_PROTOCOLS[name], crop=crop, noise=False)
        try:
            found = measure(model, image, protocol, device, options.rounds)
        except Exception as error:
            print(f"gate: FAILED: {name}: {first_line(error)}", flush=True)
            failed = True
            continue
        add_ratios(found)
        for record in found:
            cells = [f"{record[key]:>9.3f}" for key in ("seconds", "network_seconds", "rest_seconds")]
            cells += [f"{record['peak_bytes'] / 1e6:>9.0f}", f"{record['times_released']:>8.2f}"]
            print(f"{name:<18}{record['way']:<10}{''.join(cells)}{record['times_plain']:>9.2f}", flush=True)
        records += [record | facts for record in found]
        if options.json:
            write_json(options.json, records)
    if failed:
        sys.exit("error: the gate failed, these were not timed")


if __name__ == "__main__":
    main()
