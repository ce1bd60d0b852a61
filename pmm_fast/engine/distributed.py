"""Several processes on one batch, as ``torchrun`` starts them; docs/distributed.md has how and why.

Without torchrun nothing here touches ``torch.distributed``.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor

from pmm_fast.ops.collective import RankLostError, sum_over_ranks

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others: more than what one may do for all, a compilation or a download, takes.  With
gloo, a process that ends is noticed at once."""


class RankError(ValueError):
    """What went wrong on one rank, with its number."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a batch; as it stands, the only one.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on its machine.
        group: name of their process group; None for a process alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: str | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here.

        Raises:
            RankLostError: one of them is gone.
        """
        if self.group is not None:
            sum_over_ranks(torch.zeros(1), self.group)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """A block that a machine's first rank goes through before the others, to make the files that they all need."""
        if self.local_rank != 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    def device(self, name: str) -> str:
        """The device of this rank for the option ``device``: the GPU of its local rank, if it is to be a GPU.

        Raises:
            ValueError: a certain GPU was asked for, or there are fewer GPUs than ranks on this machine.
        """
        if self.group is None or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise ValueError(f"device: with several processes expected auto, cuda or cpu, got {name!r}")
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise ValueError(f"device: process {self.local_rank} of this machine has no GPU of its own, it has {count}")
        return f"cuda:{self.local_rank}"

    def check_equal(self, values: Mapping[str, Tensor], what: str) -> None:
        """Make sure that all ranks hold the same bits.

        Args:
            values: tensors by name.
            what: what they are, for the message.

        Raises:
            ValueError: they differ; names the ranks that differ from rank 0.
        """
        if self.group is None:
            return
        own = 0
        for value in values.values():
            own = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, own)
        sums = torch.zeros(self.size, dtype=torch.int64)
        sums[self.rank] = own
        sums = sum_over_ranks(sums, self.group)
        if others := (sums != sums[0]).nonzero().flatten().tolist():
            raise ValueError(f"{what} differs from that of rank 0 on rank {', '.join(map(str, others))}")


@contextlib.contextmanager
def session() -> Iterator[Ranks]:
    """The process group of this process, from torchrun's variables, for as long as the block lasts.

    GPU tensors go through NCCL, CPU tensors through gloo.  Only rank 0 prints to stdout.  An error on one rank ends all
    of them: the first to fail says what happened, the others exit without a word.

    Yields:
        This process's :class:`Ranks`.

    Raises:
        RankError: what a user can mend, with the rank it happened on; the others cannot be reached.
        SystemExit: with code 1, on the ranks that failed because another had.
    """
    store, ranks = _join()
    with contextlib.ExitStack() as stack:
        if not ranks.first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield ranks
            # nobody reports success before all have come this far
            ranks.barrier()
        except (Exception, KeyboardInterrupt) as error:
            _end(error, store, ranks)
    torch.distributed.destroy_process_group()


def _join() -> tuple[Any, Ranks]:
    """The store that torchrun's processes share, and this process's place among them."""
    # before there is a group: its functions take the group of that moment for a default and would keep it, and with it
    # gloo's threads, which abort the process if the interpreter ends under them
    import torch.distributed.nn
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        shared = distributed.PrefixStore("ranks", store)
        distributed.init_process_group(backend, store=shared, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RankError(f"rank {os.environ['RANK']}: cannot join the other processes ({reason})") from error
    assert distributed.group.WORLD is not None
    return store, Ranks(rank, size, int(os.environ["LOCAL_RANK"]), distributed.group.WORLD.group_name)


def _end(error: BaseException, store: Any, ranks: Ranks) -> NoReturn:
    """Leave after an error; only the first rank to come here tells it."""
    try:
        first = store.add("failures", 1) == 1
    except RuntimeError:
        # the store went with the process that kept it
        first = True
    if not first:
        raise SystemExit(1) from None
    if isinstance(error, ValueError | OSError | ImportError | RankLostError):
        raise RankError(f"rank {ranks.rank}: {error}") from error
    # torch puts the rank before every line of a traceback
    raise error
