"""Instance selective whitening, the loss of RobustNet: covariances that change with an image's colours go.

Choi et al., CVPR 2021.  Released code: ``network/instance_whitening.py``, ``network/cov_settings.py`` and, in
``network/deepv3plus.py``, ``forward``.  What is whitened are the instance-normalised maps of a backbone
(:mod:`pmm_fast.models.instance_norm`); which of their covariances count is selected once in a run, from images seen
plain and with strongly jittered colours.

Shapes: B images, C channels, h x w positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pmm_fast.ops import compute_dtype


def covariance(maps: Tensor) -> Tensor:
    """Covariances of the channels of each image: sum_p x_cp x_dp / (h w - 1) of instance-normalised maps x.

    The released one has 1e-5 more on its diagonal, which no mask selects.

    Args:
        maps: ``[B, C, h, w]`` floating point, of zero mean in every channel of every image.

    Returns:
        ``[B, C, C]``, float32 for bf16 and fp16; differentiable to any order.
    """
    flat = maps.flatten(2).to(compute_dtype(maps.dtype))
    return flat @ flat.mT / (flat.shape[2] - 1)


def whitening_loss(maps: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Mean absolute selected covariance, of each map over its images, then over the maps.

        mean over maps of  sum_bcd mask_cd |cov_bcd| / (B max(1, sum_cd mask_cd))

    A map without a selected covariance counts as 0 (released: 0/0).  The margin of the released code is 0 for
    ``relax_denom 0``, which all its selective settings have.

    Args:
        maps: ``[B, C, h, w]`` each, as for :func:`covariance`.
        masks: bool ``[C, C]`` each.

    Returns:
        A scalar, differentiable to any order (where no selected covariance is 0).
    """
    losses = []
    for values, mask in zip(maps, masks, strict=True):
        selected = covariance(values).abs() * mask
        losses.append(selected.sum((1, 2)).mean() / mask.sum().clamp(min=1))
    return torch.stack(losses).mean()


def pair_variance(plain: Tensor, jittered: Tensor) -> Tensor:
    """Variance of each covariance within pairs of one image, plain and jittered.

    Two values a, b have the variance (a - b)^2 / 2.

    Args:
        plain, jittered: ``[B, C, h, w]``, maps of the same images.

    Returns:
        float64 ``[B, C, C]``, 0 on and below the diagonal.
    """
    change = covariance(plain).double() - covariance(jittered).double()
    return (change.square() / 2).triu(1)


def select_covariances(variance: Tensor, clusters: int) -> Tensor:
    """The covariances that change most: all but the lowest cluster of the variances.

    As in the released code all C^2 numbers are clustered, the zeros on and below the diagonal included
    (``cov_settings.py:set_mask_matrix``).

    Args:
        variance: ``[C, C]``, mean of :func:`pair_variance` over images, 0 on and below the diagonal.
        clusters: at least 2.

    Returns:
        bool ``[C, C]``, nowhere True on or below the diagonal, on the device of ``variance``.
    """
    labels = cluster_numbers(variance.double().cpu().numpy().ravel(), clusters)
    return torch.from_numpy(labels > 0).view(variance.shape).to(variance.device)


def cluster_numbers(values: np.ndarray, clusters: int) -> np.ndarray:
    """The k-means clusters of numbers: of all partitions one with the least sum of squared distances to the means.

    Clusters of numbers are intervals, so the best end of the last one is found for every number of values and of
    clusters in turn; that end rises with the number of values (Wu, J. Algorithms 1991; the package ``kmeans1d``, which
    the released code calls, finds the same).

    Args:
        values: ``[n]`` finite, n at least 1.
        clusters: at most so many, at least 1; fewer where there are fewer different values.

    Returns:
        int64 ``[n]``, the number of each value's cluster, rising with the values from 0.
    """
    different, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    centred = different.astype(np.float64) - np.average(values)
    weight, linear, square = (np.concatenate([[0.0], np.cumsum(counts * centred**power)]) for power in range(3))

    def spread(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Sum of squared distances to their mean, of the different values from ``start`` to ``stop - 1``."""
        total = linear[stop] - linear[start]
        return square[stop] - square[start] - total**2 / (weight[stop] - weight[start])

    ends = np.arange(1, len(different) + 1)
    least = np.concatenate([[np.inf], spread(np.zeros_like(ends), ends)])
    starts = []
    for _ in range(min(clusters, len(different)) - 1):
        start, least = _best_starts(least, spread)
        starts.append(start)
    labels, end = np.zeros(len(different), np.int64), len(different)
    for start in reversed(starts):
        end = start[end]
        labels[end:] += 1
    return labels[inverse]


def _best_starts(
    least: np.ndarray, spread: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the last of one more cluster starts best, and the least sum of squares then, by the number of values.

    Args:
        least: ``[n + 1]`` with the clusters so far.
        spread: of the values of an interval.

    Returns:
        Two ``[n + 1]``; without values infinite.
    """
    count = len(least) - 1
    best, found = np.zeros(count + 1, np.int64), np.full(count + 1, np.inf)
    step = 1 << (count.bit_length() - 1)
    while step:
        # between ends that are known already: their starts are bounds
        ends = np.arange(step, count + 1, 2 * step)
        low = best[ends - step]
        known = ends + step <= count
        high = ends - 1
        high[known] = np.minimum(high[known], best[ends[known] + step])
        sizes = high - low + 1
        offsets = np.cumsum(sizes) - sizes
        candidates = np.arange(sizes.sum()) + np.repeat(low - offsets, sizes)
        sums = least[candidates] + spread(candidates, np.repeat(ends, sizes))
        found[ends] = np.minimum.reduceat(sums, offsets)
        hits = np.flatnonzero(sums == np.repeat(found[ends], sizes))
        owners = np.searchsorted(offsets, hits, side="right") - 1
        best[ends] = candidates[hits[np.unique(owners, return_index=True)[1]]]
        step //= 2
    return best, found
