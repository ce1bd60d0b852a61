"""What a training batch is: D domains x B images, each a pure function of (seed, stream, iteration, domain, slot).

Every random choice about a sample, the image included, comes from a generator seeded with those five numbers.  So a
batch is the same whatever loads it and with however many workers, a run continues at any iteration without saved loader
state, and of several ranks each loads its own slots of the batch that one process would have loaded whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pmm_fast.config.schema import DataConfig
from pmm_fast.data.folder import FolderDomain
from pmm_fast.data.transforms import Augment

Strong = Callable[[int], Collection[int]]
"""The positions of the domains that get the strong jitter in an iteration."""


class Key(NamedTuple):
    """Which sample: the ``slot``-th image of a domain in an iteration, and whether it gets the strong jitter."""

    iteration: int
    domain: int
    slot: int
    strong: bool


class Batch(NamedTuple):
    """One iteration's data, as the loaders give it.

    Attributes:
        images: uint8 ``[D, B, 3, h, w]``, channels last in memory.
        labels: uint8 ``[D, B, h, w]``, 255 for ignore.
        looks: float32 ``[D, B, 9]``, colours and blur that are still to be applied (``Augment.draw``).
    """

    images: torch.Tensor
    labels: torch.Tensor
    looks: torch.Tensor


class Sampling:
    """What a sample is, by ``Key``; images are drawn uniformly with replacement.

    Args:
        domains: the source domains, in the order of ``data.sources``.
        config: the augmentation.
        seed: of the run, not negative.
        stream: tells independent uses of one seed apart, not negative.

    Raises:
        ValueError: no domains, an empty domain, a negative seed or stream, or an augmentation value outside its range.
    """

    def __init__(self, domains: Sequence[FolderDomain], config: DataConfig, seed: int, stream: int = 0) -> None:
        if not domains:
            raise ValueError("domains: expected at least one source domain, got none")
        for domain in domains:
            if not len(domain):
                raise ValueError(f"domain {domain.name!r}: expected images, got none")
        for name, value in (("seed", seed), ("stream", stream)):
            if value < 0:
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        self.domains = list(domains)
        self.seed, self.stream = seed, stream
        self.augment = Augment(config.crop, config.scale, config.flip, config.jitter, config.blur)

    def pick(self, key: Key) -> tuple[FolderDomain, int, np.random.Generator]:
        """A sample's domain and image, and the generator that its transform is to be drawn from."""
        rng = np.random.default_rng([self.seed, self.stream, key.iteration, key.domain, key.slot])
        domain = self.domains[key.domain]
        return domain, int(rng.integers(len(domain))), rng


class Iterations:
    """The keys of each iteration from ``start`` to ``stop - 1``, domain by domain.

    Args:
        sampling: what the samples are.
        config: batch size, and the domains that always get the strong jitter.
        start: first iteration; that of a resumed run, or 0.
        stop: one past the last iteration.
        strong: which domains get the strong jitter, by iteration; None: ``config.strong_domains``, always.
        rank: which of the equal parts of each batch, from 0.
        ranks: in how many parts a batch is divided, between processes that train together.

    Raises:
        ValueError: a range or rank that makes no sense, a strong domain that does not exist, or a batch that the ranks
            cannot share evenly.
    """

    def __init__(
        self,
        sampling: Sampling,
        config: DataConfig,
        start: int,
        stop: int,
        strong: Strong | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if not 0 <= start <= stop:
            raise ValueError(f"iterations: expected 0 <= start <= stop, got start {start}, stop {stop}")
        for position in config.strong_domains:
            if not 0 <= position < len(sampling.domains):
                raise ValueError(
                    f"data.strong_domains: expected positions 0..{len(sampling.domains) - 1} in data.sources, "
                    f"got {position}"
                )
        if config.batch_per_domain < 1:
            raise ValueError(f"data.batch_per_domain: expected 1 or more, got {config.batch_per_domain}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank: expected 0..{ranks - 1}, one of {ranks} processes, got {rank}")
        if config.batch_per_domain % ranks:
            raise ValueError(
                f"data.batch_per_domain: expected a multiple of {ranks}, the number of processes that share a batch, "
                f"got {config.batch_per_domain}"
            )
        self.sampling, self.start, self.stop = sampling, start, stop
        self._strong: Strong = strong or (lambda iteration: config.strong_domains)
        share = config.batch_per_domain // ranks
        self._slots = range(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[list[Key]]:
        for iteration in range(self.start, self.stop):
            strong = self._strong(iteration)
            yield [
                Key(iteration, domain, slot, domain in strong)
                for domain in range(len(self.sampling.domains))
                for slot in self._slots
            ]

    def __len__(self) -> int:
        return self.stop - self.start
