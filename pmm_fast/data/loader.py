"""Training batches: D domains x B images, each a pure function of (seed, stream, iteration, domain, slot).

Every random choice about a sample, the image included, comes from a generator seeded with those five numbers.  So a
batch is the same whatever the number of workers, a run continues at any iteration without saved loader state, and of
several ranks each loads its own slots of the batch that one process would have loaded whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pmm_fast.config.schema import DataConfig
from pmm_fast.data.folder import DataError, FolderDomain
from pmm_fast.data.transforms import Augment

# batches each worker may have ready: enough to hide an uneven image, small enough to bound memory
_PREFETCH = 2


class Key(NamedTuple):
    """Which sample: the ``slot``-th image of a domain in an iteration."""

    iteration: int
    domain: int
    slot: int


class Batch(NamedTuple):
    """One iteration's data.

    Attributes:
        images: float32 ``[D, B, 3, h, w]``, normalised.
        labels: uint8 ``[D, B, h, w]``, 255 for ignore.
    """

    images: torch.Tensor
    labels: torch.Tensor


class _Failure(NamedTuple):
    """A ``DataError`` on its way out of a worker, where torch would bury its message under a traceback."""

    message: str


Sample = tuple[torch.Tensor, torch.Tensor] | _Failure


class MixedDomains(Dataset[Sample]):
    """Augmented samples of several domains, by ``Key``; images are drawn uniformly with replacement.

    Args:
        domains: the source domains, in the order of ``data.sources``.
        config: augmentation, and which domains get the strong jitter.
        seed: of the run, not negative.
        stream: tells independent uses of one seed apart, not negative.
        strong: False: ``config.strong_domains`` is disregarded.

    Raises:
        ValueError: no domains, an empty domain, a negative seed or stream, a strong domain that does not exist, or an
            augmentation value outside its range.
    """

    def __init__(
        self, domains: Sequence[FolderDomain], config: DataConfig, seed: int, stream: int = 0, strong: bool = True
    ) -> None:
        if not domains:
            raise ValueError("domains: expected at least one source domain, got none")
        for domain in domains:
            if not len(domain):
                raise ValueError(f"domain {domain.name!r}: expected images, got none")
        for name, value in (("seed", seed), ("stream", stream)):
            if value < 0:
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        for position in config.strong_domains:
            if not 0 <= position < len(domains):
                raise ValueError(
                    f"data.strong_domains: expected positions 0..{len(domains) - 1} in data.sources, got {position}"
                )
        self.domains = list(domains)
        self.seed, self.stream = seed, stream
        chosen = set(config.strong_domains) if strong else set()
        self.augments = [
            Augment(config.crop, config.scale, config.flip, config.jitter, config.blur, strong=position in chosen)
            for position in range(len(domains))
        ]

    def __getitem__(self, key: Key) -> Sample:
        """Image float32 ``[3, h, w]`` and labels uint8 ``[h, w]``; a ``_Failure`` where the files are at fault."""
        rng = np.random.default_rng([self.seed, self.stream, *key])
        domain = self.domains[key.domain]
        try:
            image, labels = domain.load(int(rng.integers(len(domain))))
        except DataError as error:
            return _Failure(f"domain {domain.name!r}: {error}")
        return self.augments[key.domain](image, labels, rng)


class _Iterations:
    """The keys of each iteration from ``start`` to ``stop``, as DataLoader's batch sampler."""

    def __init__(self, start: int, stop: int, domains: int, slots: range) -> None:
        self.start, self.stop, self.domains, self.slots = start, stop, domains, slots

    def __iter__(self) -> Iterator[list[Key]]:
        for iteration in range(self.start, self.stop):
            yield [Key(iteration, domain, slot) for domain in range(self.domains) for slot in self.slots]

    def __len__(self) -> int:
        return self.stop - self.start


class _Collate:
    """Stack the samples of one iteration, domain by domain."""

    def __init__(self, domains: int) -> None:
        self.domains = domains

    def __call__(self, samples: list[Sample]) -> Batch | _Failure:
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for sample in samples:
            if isinstance(sample, _Failure):
                return sample
            pairs.append(sample)
        images, labels = (torch.stack(part).unflatten(0, (self.domains, -1)) for part in zip(*pairs, strict=True))
        return Batch(images, labels)


class BatchLoader(DataLoader):
    """A ``DataLoader`` of ``Batch`` that raises a worker's ``DataError`` with its own message."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            yield batch


def make_loader(
    domains: Sequence[FolderDomain],
    config: DataConfig,
    seed: int,
    start: int,
    stop: int,
    stream: int = 0,
    pin_memory: bool = False,
    strong: bool = True,
    rank: int = 0,
    ranks: int = 1,
) -> BatchLoader:
    """The batches of iterations ``start`` to ``stop - 1``.

    Args:
        domains: the source domains.
        config: batch size, augmentation, workers.
        seed: of the run.
        start: first iteration; that of a resumed run, or 0.
        stop: one past the last iteration.
        stream: 0 for training; the passes that initialise the memory take others.
        pin_memory: page-locked batches, for copies to a GPU that overlap with computing.
        strong: False: no domain gets the strong jitter (initialisation of the memory).
        rank: which of the equal parts of each batch to load, from 0.
        ranks: in how many parts a batch is divided, between processes that train together.

    Returns:
        An iterable of ``Batch``; iterating raises ``DataError`` where files are at fault.

    Raises:
        ValueError: see ``MixedDomains``; or a range, batch size or number of workers that makes no sense; or a batch
            that the ranks cannot share evenly.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"iterations: expected 0 <= start <= stop, got start {start}, stop {stop}")
    if config.batch_per_domain < 1:
        raise ValueError(f"data.batch_per_domain: expected 1 or more, got {config.batch_per_domain}")
    if config.batch_per_domain % ranks:
        raise ValueError(
            f"data.batch_per_domain: expected a multiple of {ranks}, the number of processes that share a batch, "
            f"got {config.batch_per_domain}"
        )
    if config.workers < 0:
        raise ValueError(f"data.workers: expected 0 or more, got {config.workers}")
    # a worker without an iteration to prepare would only cost its start
    workers = min(config.workers, stop - start)
    share = config.batch_per_domain // ranks
    return BatchLoader(
        MixedDomains(domains, config, seed, stream, strong),
        batch_sampler=_Iterations(start, stop, len(domains), range(rank * share, (rank + 1) * share)),
        collate_fn=_Collate(len(domains)),
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        # without its own generator, starting to iterate would draw from torch's global one
        generator=torch.Generator(),
    )


def _start_worker(_: int) -> None:
    # parallelism is the workers'; threads on top would fight over the same cores
    torch.set_num_threads(1)
