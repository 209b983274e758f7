"""Copies between a device and pinned host memory, and all that their order depends on.

The only file that knows how a device runs them: `offload` decides what is copied and what waits for
what, through `Copies` alone, so its decisions can be proven with copies that are made elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

ALIGNMENT = 512  # of tensors side by side, as torch's own allocators align them

Mark = Any  # a point in what a device has been given to do


class Lane(Enum):
    """A queue of copies beside what the device computes; each lane's run one after the other."""

    IN = "host to device"
    OUT = "device to host"


class Copies(Protocol):
    """A device that copies while it computes.

    Calls return before the work is done.  What is computed is one queue and each lane is one; they
    know nothing of each other but for the marks that they wait for.
    """

    device: torch.device

    def pinned(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 on the host, which the device copies from and to on its own."""

    def buffer(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 on the device, of the memory that it computes in.

        To be let go of once what computes waits for every copy from and to it.
        """

    def mark(self) -> Mark:
        """After all that has been given to be computed so far."""

    def wait(self, mark: Mark) -> None:
        """What is given to be computed from now on waits for the mark."""

    def copy(
        self, lane: Lane, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Mark]
    ) -> Mark:
        """Copy (into, from) of one shape and dtype, contiguous, after the marks and all that the
        lane was given before; the mark is after it."""


class CudaCopies:
    """CUDA streams and events.  The host waits for none of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lanes = {lane: torch.cuda.Stream(device) for lane in Lane}

    def pinned(self, nbytes: int) -> Tensor:
        # torch keeps it for later requests, and hands it out again only after copies that use it.
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def copy(
        self, lane: Lane, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Mark]
    ) -> Mark:
        stream = self._lanes[lane]
        for mark in after:
            stream.wait_event(mark)
        with torch.cuda.stream(stream):
            for into, source in pairs:
                into.copy_(source, non_blocking=True)
        return stream.record_event()


class Slabs:
    """Tensors in large pieces of host memory.

    torch pins powers of two, so a tensor of 369 MiB alone would take 512; eleven of them fit into
    4 GiB.

    Attributes:
        nbytes: of all pieces.
    """

    def __init__(self, pinned: Callable[[int], Tensor]) -> None:
        self.nbytes = 0
        self._pinned = pinned
        self._slab: Tensor | None = None
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if self._slab is None or self._used + nbytes > self._slab.numel():
            self._slab = self._pinned(slab_size(nbytes))
            self._used = 0
            self.nbytes += self._slab.numel()
        tensor = self._slab[self._used : self._used + nbytes].view(dtype).view(*shape)
        self._used += aligned(nbytes)
        return tensor


def meta_slabs() -> Slabs:
    """Slabs of which only the size is asked."""
    return Slabs(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device="meta"))


def slab_size(nbytes: int) -> int:
    """Of the powers of two that hold one to eight or more tensors of a size, that which wastes
    least."""
    size = max(ALIGNMENT, aligned(nbytes))
    smallest = 1 << (size - 1).bit_length()
    return min((smallest << more for more in range(4)), key=lambda slab: (slab % size / slab, slab))


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
