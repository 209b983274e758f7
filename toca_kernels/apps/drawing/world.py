"""The processes of a run: alone, or as torchrun starts them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

_ENDED = (
    "another process of this run has ended; run the same command again, it goes on where it stopped"
)
_POLL = 0.2  # seconds


class World:
    """This process among all of the run.

    They tell each other little: settings at the start and that they are done at the end.  So gloo
    is used on GPUs too; unlike NCCL it needs no device and notices at once who is gone.

    Attributes:
        rank, size: number of this process, and how many there are.
        local_rank: number among those of this machine, and of its GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in each of them."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        with _words():
            dist.all_gather_object(found, value)
        return found

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Until all processes have come here; `meanwhile` is called now and then."""
        if self.size == 1:
            return
        with _words():
            barrier = dist.barrier(async_op=True)
            while not barrier.is_completed():
                meanwhile()
                time.sleep(_POLL)
            barrier.wait()

    def agree(self, act: Callable[[], T]) -> T:
        """What `act` returns, where it succeeds in every process.

        Raises:
            ValueError: in the first process, with what went wrong anywhere.
            SystemExit: with status 2 in the others.
        """
        found, message = None, None
        try:
            found = act()
        except (ValueError, OSError) as error:
            if self.size == 1:
                raise
            message = str(error)
        messages = dict.fromkeys(one for one in self.gather(message) if one is not None)
        if messages:
            if self.rank == 0:
                raise ValueError("; ".join(messages))
            raise SystemExit(2)
        return found  # type: ignore[return-value]


@contextmanager
def world(timeout: float) -> Iterator[World]:
    """The processes that torchrun started, or this one alone.

    Args:
        timeout: minutes that they wait for each other.
    """
    # What torchrun tells its processes by (torch.distributed.run, "Environment Variables").
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World()
        return
    dist.init_process_group("gloo", timeout=timedelta(minutes=timeout))
    try:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        yield World(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()


@contextmanager
def _words() -> Iterator[None]:
    """gloo's errors of a lost connection and of a wait that took too long, in words."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise ConnectionError(_ENDED) from error
