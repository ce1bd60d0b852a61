"""Which covariances a whitening run trains away: statistics over pairs of images, taken once in a run.

RobustNet's selection (Choi et al., CVPR 2021; released code ``train.py:validate_for_cov_stat``): images plain and with
strongly jittered colours go through the network in evaluation mode; covariances that change between the two are
selected, in several trials whose selections are intersected.

Shapes: D domains, B images of each in a batch, C channels of a map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from pmm_fast import meta
from pmm_fast.config import Config
from pmm_fast.data import Batch, FolderDomain, make_loader
from pmm_fast.data.transforms import NO_JITTER
from pmm_fast.engine.distributed import Ranks
from pmm_fast.engine.feed import prepare
from pmm_fast.ops.collective import sum_over_ranks


def select_masks(
    network: meta.Network,
    params: meta.State,
    buffers: meta.State,
    sources: Sequence[FolderDomain],
    config: Config,
    stream: int,
    device: torch.device,
    ranks: Ranks,
    progress: Callable[[int, str], tqdm],
) -> list[Tensor]:
    """The masks of the whitening loss, from statistics of a network as it stands.

    A trial of a domain selects, by :func:`pmm_fast.meta.select_covariances`, from the mean of
    :func:`pmm_fast.meta.pair_variance` over its images; a covariance counts if every trial of every domain selects it.
    An image is a crop of the training size, from the image at its own scale, not mirrored; in the other half of the
    pair it is strongly jittered and blurred.  The images depend on the seed alone.

    Args:
        network: whose encoder hands out maps to be whitened.
        params, buffers: its values.
        sources: the training domains.
        config: of the run; ``whitening.images`` is rounded up to whole batches.
        stream: of random numbers, see :class:`pmm_fast.data.sampling.Sampling`.
        device: of the network.
        ranks: the processes that share the images; each gets the masks of them all.
        progress: total and text to a progress bar.

    Returns:
        bool ``[C, C]`` for each map.
    """
    data, settings = replace(config.data, scale=[1.0, 1.0], flip=0.0, blur=True), config.whitening
    count = -(-settings.images // data.batch_per_domain)
    total, images = count * settings.trials, count * data.batch_per_domain

    def all_strong(iteration: int) -> range:
        return range(len(sources))

    loader = make_loader(sources, data, config.seed, 0, total, stream, device, all_strong, ranks.rank, ranks.size)
    masks: list[Tensor] = []
    with (
        contextlib.closing(loader.__iter__()) as batches,
        progress(total, "select covariances") as bar,
        torch.no_grad(),
    ):
        for _ in range(settings.trials):
            sums: list[Tensor] = []
            for _ in range(count):
                found = _variances(network, params, buffers, next(batches), device)
                sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
                bar.update()
            chosen = [_select(domains, images, settings.clusters, ranks) for domains in sums]
            masks = [a & b for a, b in zip(masks, chosen, strict=True)] if masks else chosen
    return masks


def _variances(
    network: meta.Network, params: meta.State, buffers: meta.State, batch: Batch, device: torch.device
) -> list[Tensor]:
    """The variances of a batch's pairs, summed over the images of each domain: ``[D, C, C]`` for each map."""
    plain = batch._replace(looks=batch.looks.new_tensor([*NO_JITTER, 0]).expand_as(batch.looks))
    maps = []
    for half in (plain, batch):
        images = prepare(half, device)[0].flatten(0, 1)
        maps.append(network("encoder.backbone", params, buffers, images, training=False).whitened)
    pairs = (meta.pair_variance(*both) for both in zip(*maps, strict=True))
    return [variances.unflatten(0, (len(batch.looks), -1)).sum(1) for variances in pairs]


def _select(sums: Tensor, images: int, clusters: int, ranks: Ranks) -> Tensor:
    """The covariances of one map that every domain selects in a trial, from ``[D, C, C]`` sums of this rank."""
    means = (sums if ranks.group is None else sum_over_ranks(sums, ranks.group)) / images
    return torch.stack([meta.select_covariances(variance, clusters) for variance in means]).all(0)
