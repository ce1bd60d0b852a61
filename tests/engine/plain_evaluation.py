"""The test protocols once more, to be read: one tile after the other through ``model.forward``, averages in float64.

``released_sliding`` is what the released ``eval.py`` computes from the logits of its tiles, its division by the wrong
counts included.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pmm_fast import ops
from pmm_fast.config import EvalProtocol
from pmm_fast.data.transforms import normalise
from pmm_fast.engine.inference import _mix

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin, as the released code counts them: steps of the stride, moved back at the border."""
    stride = math.ceil(round(tile * (1 - overlap), 6))
    steps = max(1, math.ceil((length - tile) / stride) + 1)
    return [max(0, min(step * stride + tile, length) - tile) for step in range(steps)]


def forward(model: torch.nn.Module, window: Tensor, seed: int | None) -> Tensor:
    """Logits ``[K, h, w]`` of one window, float64."""
    noise = None
    if seed is not None:
        shape = (1, model.num_classes, *model.feature_size(window.shape[1], window.shape[2]))
        noise = ops.seeded_gumbel_noise(torch.tensor(seed), shape)
    with torch.no_grad():
        return model(window[None], noise).logits[0].double()


def views(
    model: torch.nn.Module, image: Image.Image, protocol: EvalProtocol, scale: float, seeds: list[int]
) -> list[list[tuple[int, int, Tensor]]]:
    """(top, left, logits) of every tile of the image and of the mirrored one, each in its own coordinates."""
    width, height = image.size
    if protocol.height:
        width, height = round(width * protocol.height / height), protocol.height
    width, height = int(width * scale), int(height * scale)
    pixels = normalise(image.resize((width, height), FILTERS[protocol.resample]))
    side = int(protocol.crop * max(1.0, scale)) if protocol.method == "sliding" else max(width, height)
    found = []
    for view in [pixels, pixels.flip(-1)][: 1 + protocol.flip]:
        tiles = []
        for top in starts(height, side, protocol.overlap):
            for left in starts(width, side, protocol.overlap):
                window = view[:, top : top + side, left : left + side]
                tiles.append((top, left, forward(model, window, seeds.pop(0) if seeds else None)))
        found.append(tiles)
    return found


def resize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """``[K, h, w]`` to ``[K, H, W]``, corners not aligned."""
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]


def scores(
    model: torch.nn.Module, image: Image.Image, size: tuple[int, int], protocol: EvalProtocol, seed: int = 0
) -> Tensor:
    """Averaged logits, or probabilities under pooling, float64 ``[K, H, W]``."""
    seeds = [_mix(seed, number) for number in range(100)] if protocol.noise and model.memory is not None else []
    averages = []
    for scale in protocol.scales:
        both = views(model, image, protocol, scale, seeds)
        width = max(left + tile.shape[2] for _, left, tile in both[0])
        height = max(top + tile.shape[1] for top, _, tile in both[0])
        total, count = torch.zeros(model.num_classes, height, width, dtype=torch.float64), torch.zeros(height, width)
        for number, tiles in enumerate(both):
            for top, left, tile in tiles:
                if number:
                    left, tile = width - left - tile.shape[2], tile.flip(-1)
                if protocol.method == "pooling":
                    averages.append(resize(tile, size).softmax(0))
                total[:, top : top + tile.shape[1], left : left + tile.shape[2]] += tile
                count[top : top + tile.shape[1], left : left + tile.shape[2]] += 1
        if protocol.method != "pooling":
            averages.append(resize(total / count, size))
    return torch.stack(averages).mean(0)


def released_sliding(both: list[list[tuple[int, int, Tensor]]], size: tuple[int, int]) -> np.ndarray:
    """Classes from the tiles of an image and its mirrored one at one scale, as ``reverse_mapping`` merges them.

    Its array of counts has the classes first, but is indexed as if rows came first: ``counts[y1:y2, x1:x2]`` are
    classes y1..y2 of rows x1..x2.
    """
    merged = []
    for number, tiles in enumerate(both):
        classes = tiles[0][2].shape[0]
        height = max(top + tile.shape[1] for top, _, tile in tiles)
        width = max(left + tile.shape[2] for _, left, tile in tiles)
        total, counts = np.zeros((classes, height, width)), np.zeros((classes, height, width))
        for top, left, tile in tiles:
            bottom, right = top + tile.shape[1], left + tile.shape[2]
            counts[top:bottom, left:right] += 1
            total[:, top:bottom, left:right] += tile.numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            average = total / counts
        average = average[..., ::-1].copy() if number else average
        merged.append(resize(torch.from_numpy(average), size).numpy())
    return np.mean(merged, axis=0).argmax(0)
