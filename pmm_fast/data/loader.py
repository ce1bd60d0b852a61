"""Loaders of training batches: torch's with Pillow, and the choice between it and DALI's.

Both load the samples of :mod:`pmm_fast.data.sampling`; on a CPU they give the same bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from pmm_fast.config.schema import DataConfig
from pmm_fast.data.crop import crop_drawn
from pmm_fast.data.folder import DataError, FolderDomain
from pmm_fast.data.sampling import Batch, Iterations, Key, Sampling, Strong
from pmm_fast.data.transforms import crop_labels

# batches each worker may have ready: enough to hide an uneven image, small enough to bound memory
PREFETCH = 2

CPU = torch.device("cpu")


class Batches(Protocol):
    """Batches in their order; the next raises ``DataError`` where its files are at fault."""

    def __next__(self) -> Batch:
        """The next batch."""

    def close(self) -> None:
        """Stop loading."""


class Loader(Protocol):
    """What can be loaded, once or more often."""

    def __len__(self) -> int:
        """Number of batches."""

    def __iter__(self) -> Batches:
        """Its batches from the first; loading starts now or with the first that is asked for."""


class _Failure(NamedTuple):
    """A ``DataError`` on its way out of a worker, where torch would bury its message under a traceback."""

    message: str


Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor] | _Failure


class MixedDomains(Dataset[Sample]):
    """Cropped samples of several domains, by ``Key``."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def __getitem__(self, key: Key) -> Sample:
        """Image uint8 ``[h, w, 3]``, labels uint8 ``[h, w]``, look float32 ``[9]``; a ``_Failure`` for bad files."""
        domain, index, rng = self.sampling.pick(key)
        try:
            image, labels = domain.load(index)
        except DataError as error:
            return _Failure(f"domain {domain.name!r}: {error}")
        draw = self.sampling.augment.draw(image.size, rng, key.strong)
        pixels, classes = crop_drawn(image, draw), crop_labels(labels, draw.window, draw.mirror)
        return torch.from_numpy(pixels), torch.from_numpy(classes), torch.from_numpy(draw.look)


class _Collate:
    """Stack the samples of one iteration, domain by domain."""

    def __init__(self, domains: int) -> None:
        self.domains = domains

    def __call__(self, samples: list[Sample]) -> Batch | _Failure:
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for sample in samples:
            if isinstance(sample, _Failure):
                return sample
            parts.append(sample)
        images, labels, looks = (
            torch.stack(part).unflatten(0, (self.domains, -1)) for part in zip(*parts, strict=True)
        )
        return Batch(images.permute(0, 1, 4, 2, 3), labels, looks)


class TorchLoader(DataLoader):
    """A ``DataLoader`` of ``Batch`` that raises a worker's ``DataError`` with its own message."""

    def __init__(self, iterations: Iterations, workers: int, pin_memory: bool) -> None:
        # a worker without an iteration to prepare would only cost its start
        workers = min(workers, len(iterations))
        super().__init__(
            MixedDomains(iterations.sampling),
            batch_sampler=iterations,
            collate_fn=_Collate(len(iterations.sampling.domains)),
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            # without its own generator, starting to iterate would draw from torch's global one
            generator=torch.Generator(),
        )

    def __iter__(self) -> Generator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            yield batch


def _start_worker(_: int) -> None:
    # parallelism is the workers'; threads on top would fight over the same cores
    torch.set_num_threads(1)


def choose_loader(wanted: str) -> tuple[str, str]:
    """Which loader runs for ``data.loader``, and why.

    Returns:
        ``dali`` or ``torch``, and the reason.

    Raises:
        ValueError: ``dali`` was asked for and is not installed.
    """
    installed = importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else None
    if wanted == "dali" and not installed:
        raise ValueError("data.loader: dali was asked for, but DALI is not installed (the extra: pmm_fast[dali])")
    if wanted != "auto":
        return wanted, "as asked"
    return (
        ("dali", "DALI is installed") if installed else ("torch", "DALI is not installed (the extra: pmm_fast[dali])")
    )


def make_loader(
    domains: Sequence[FolderDomain],
    config: DataConfig,
    seed: int,
    start: int,
    stop: int,
    stream: int = 0,
    device: torch.device = CPU,
    strong: Strong | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Loader:
    """The batches of iterations ``start`` to ``stop - 1``, by the loader that ``config.loader`` names.

    Args:
        domains: the source domains.
        config: loader, batch size, augmentation, workers.
        seed: of the run.
        start: first iteration; that of a resumed run, or 0.
        stop: one past the last iteration.
        stream: 0 for training; the passes that initialise the memory take others.
        device: where batches are going.  For a GPU, DALI's images are made there; all else is page-locked, so that
            copies overlap with computing.
        strong: which domains get the strong jitter, by iteration; None: ``config.strong_domains``, always.
        rank: which of the equal parts of each batch to load, from 0.
        ranks: in how many parts a batch is divided, between processes that train together.

    Raises:
        ValueError: see ``Sampling``, ``Iterations`` and ``choose_loader``; or a negative number of workers.
    """
    if config.workers < 0:
        raise ValueError(f"data.workers: expected 0 or more, got {config.workers}")
    sampling = Sampling(domains, config, seed, stream)
    iterations = Iterations(sampling, config, start, stop, strong, rank, ranks)
    if choose_loader(config.loader)[0] == "torch":
        return TorchLoader(iterations, config.workers, pin_memory=device.type == "cuda")
    # here and not at the top: an extra, which takes a second to load
    from pmm_fast.data.dali import DaliLoader

    return DaliLoader(iterations, config.workers, device)
