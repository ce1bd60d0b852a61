"""What happens around the steps: the domain split of an iteration and the first memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pmm_fast import ops
from pmm_fast.meta.network import State
from pmm_fast.meta.step import Batch, Hyper, Noise, add_class_sums, autocast


def draw_split(num_domains: int, generator: np.random.Generator) -> tuple[list[int], list[int]]:
    """Split the source domains into meta-train and meta-test for one iteration.

    A random permutation is cut at a uniformly drawn place; each side keeps at least one (``train.py:493-500``).

    Args:
        num_domains: D, at least 2 (one source alone is given twice: the G,G protocol).
        generator: source of randomness.

    Returns:
        Positions of the meta-train and of the meta-test domains.

    Raises:
        ValueError: fewer than two domains.
    """
    if num_domains < 2:
        raise ValueError(f"a meta split needs at least 2 domains, got {num_domains}")
    order = generator.permutation(num_domains).tolist()
    cut = int(generator.integers(1, num_domains))
    return order[:cut], order[cut:]


def draw_noise(
    sizes: tuple[int, int], dropped_channels: int, dropout: float, gumbel: bool, generator: torch.Generator
) -> Noise:
    """What is random in one step; nothing is read back from the device.

    Args:
        sizes: number of meta-train and of meta-test images, 0 where there are none.
        dropped_channels: D, the channels of the auxiliary head that the dropout chooses from.
        dropout: probability that one of them is dropped.
        gumbel: whether the reads are noisy.
        generator: source of randomness; its device is that of the results.

    Returns:
        Seeds of the two reads' noise, and the two dropouts; None for a side without images.
    """

    def seed(images: int) -> Tensor | None:
        if not gumbel or not images:
            return None
        return torch.randint(2**62, (1,), generator=generator, device=generator.device)

    def keep(images: int) -> Tensor | None:
        if not dropout or not images:
            return None
        drawn = torch.rand(images, dropped_channels, generator=generator, device=generator.device)
        return (drawn >= dropout) / (1 - dropout)

    return Noise(*map(seed, sizes), *map(keep, sizes))


def initialise_memory(
    params: State, buffers: State, batches: Iterable[Batch], slots: Tensor, hyper: Hyper
) -> tuple[Tensor, Tensor]:
    """The memory before the first iteration: the mean normalised encoder feature of every class.

    Encoder alone, in evaluation mode, without gradient; the writing net is not used (released code
    ``train.py:1000-1042``).

    Args:
        params, buffers: the network at its start.
        batches: training batches, each on the device of the network; of several ranks, each brings its own.
        slots: ``[K, C]``, gives shape and device.
        hyper: precision and network.

    Returns:
        ``memory [K, C]``, unit rows, a zero row for a class never seen, and ``mass [K]`` in feature positions.
    """
    sums, mass = torch.zeros_like(slots), torch.zeros_like(slots[:, 0])
    with torch.no_grad():
        for batch in batches:
            with autocast(hyper, batch.images.device):
                feature = hyper.network("encoder", params, buffers, batch.images, training=False)[0]
                found = ops.masked_average_pool(feature, batch.labels, slots.shape[0])
            sums, mass = sums + found[0], mass + found[1]
        sums, mass = add_class_sums(sums, mass, hyper)
        return ops.update_memory(torch.zeros_like(slots), sums, mass, momentum=0.0), mass
