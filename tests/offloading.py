"""A device that exists nowhere, to prove the order of copies with.

`StandIn` computes at once and copies as late as it may: a copy is made when something waits for it,
with what it waits for itself and what its lane was given before, and with nothing else.  `Watched`
spoils every buffer that nobody may read any more.  So a wait that is missing, a buffer that is used
again too early and a copy home that reads too late give other numbers; a copy that is not told to
wait for what computes in its buffer is found by clocks, because here that has always been done.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import toca_kernels as toca
from toca_kernels.blocks.block import Block, BlockState
from toca_kernels.blocks.touched import read
from toca_kernels.copies import Lane
from toca_kernels.offload import Offload
from toca_kernels.track import tensors


@dataclass(eq=False)
class Job:
    """A copy that was asked for.

    Attributes:
        pairs: into and from; buffers of the device by a reference that does not keep them.
        before: the copies that it waits for.
        computed: the mark of what computes that it waits for, itself or through other copies.
    """

    lane: Lane
    pairs: list[tuple[Callable[[], Tensor], Callable[[], Tensor]]]
    before: list[Job]
    computed: int
    done: bool = False


@dataclass
class StandIn:
    """`Copies` on the CPU.

    Attributes:
        deaf: (who, to what) does not wait as it is told: a lane or "computes", to marks after
            "computes" or after "copies".
        asked, made: copies, by lane.
        buffers: what was handed out, and may be gone.
    """

    deaf: frozenset[tuple[Lane | str, str]] = frozenset()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    asked: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(Lane, 0))
    made: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(Lane, 0))

    def __post_init__(self) -> None:
        self.now = 0
        self.last: dict[Lane, Job] = {}
        self.held: list[Tensor] = []  # buffers that a block computes with
        self.used: dict[tuple[int, int], int] = {}  # (first, stop) address -> mark after its use
        self.buffers: list[weakref.ref[Tensor]] = []
        self.homes: list[weakref.ref[Tensor]] = []

    def pinned(self, nbytes: int) -> Tensor:
        home = torch.empty(nbytes, dtype=torch.uint8)
        self.homes.append(weakref.ref(home.untyped_storage()))
        return home

    def buffer(self, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        self.buffers.append(weakref.ref(buffer.untyped_storage()))
        return buffer

    def mark(self) -> int:
        self.now += 1
        for one in self.held:
            self.used[_span(one)] = self.now
        self.held = []
        return self.now

    def wait(self, mark: Any) -> None:
        if isinstance(mark, Job) and ("computes", "copies") not in self.deaf:
            self._make(mark)

    def copy(self, lane: Lane, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Any]) -> Job:
        self.asked[lane] += 1
        after = [mark for mark in after if (lane, _kind(mark)) not in self.deaf]
        jobs = [mark for mark in after if isinstance(mark, Job)]
        if lane in self.last:
            jobs.append(self.last[lane])
        computed = max(
            [mark for mark in after if isinstance(mark, int)] + [job.computed for job in jobs],
            default=0,
        )
        for into, source in pairs:
            assert (into.shape, into.dtype) == (source.shape, source.dtype)
            assert into.is_contiguous()
            assert source.is_contiguous()
            self._check(into if lane is Lane.IN else source, computed)
        kept, lent = (lambda tensor: lambda: tensor), _weakly
        ends = (lent, kept) if lane is Lane.IN else (kept, lent)
        made = [(ends[0](into), ends[1](source)) for into, source in pairs]
        job = self.last[lane] = Job(lane, made, jobs, computed)
        return job

    def finish(self) -> None:
        """Everything that was asked for, as a device does for a host that waits for it."""
        for job in self.last.values():
            self._make(job)

    def _check(self, buffer: Tensor, computed: int) -> None:
        first, stop = _span(buffer)
        for one in self.held:
            start, end = _span(one)
            assert stop <= start or end <= first, "copied while a block computes with it"
        for (start, end), mark in self.used.items():
            if first < end and start < stop:
                assert mark <= computed, "copied without waiting for what computes with it"

    @torch.inference_mode()  # in which tensors made outside and inside of it may be written
    def _make(self, job: Job) -> None:
        waiting = [job]
        while waiting:  # not by calls: a lane is long
            one = waiting[-1]
            first = [other for other in one.before if not other.done]
            if first:
                waiting += first
                continue
            waiting.pop()
            if one.done:
                continue
            one.done, one.before = True, []
            self.made[one.lane] += 1
            for into, source in one.pairs:
                into().copy_(source())
                if one.lane is Lane.OUT:
                    spoil(source())
            one.pairs = []


class Watched(Offload):
    """Buffers are spoiled before a block that does not read them, and after one that has."""

    copies: StandIn

    def take(self, block: Block, state: BlockState) -> None:
        reads = read(block, state)
        super().take(block, state)
        for name, features in state.features.items():
            self.copies.held += tensors(features)
            if name not in reads:
                for one in tensors(features):
                    spoil(one)

    def hold(self, name: str, home: Any) -> Any:
        fresh = name not in self._lent.given
        given = super().hold(name, home)
        if fresh:
            self.copies.held += tensors(given)
        return given

    def give_back(self, block: Block, state: BlockState) -> None:
        given, lent = dict(state.features), self._lent
        before = len(lent.leaving)
        super().give_back(block, state)
        leaving = {span[:2] for span in lent.leaving[before:]}
        for name, features in given.items():
            if state.holder is None and lent.spans[name] not in leaving:
                for one in tensors(features):
                    spoil(one)


def spoil(buffer: Tensor) -> None:
    """What nobody can mistake for a value."""
    if buffer.is_floating_point() and buffer.dtype.itemsize > 1:
        buffer.fill_(float("nan"))
    else:
        buffer.view(torch.uint8).fill_(0x7F)  # of an fp8 value NaN, of an int8 one the largest


def _weakly(buffer: Tensor) -> Callable[[], Tensor]:
    """The tensor, as long as somebody else keeps its memory."""
    storage = weakref.ref(buffer.untyped_storage())
    first, shape, dtype = buffer.storage_offset(), buffer.shape, buffer.dtype

    def found() -> Tensor:
        memory = storage()
        assert memory is not None, "copied from or to memory that was let go of"
        flat = torch.empty(0, dtype=dtype).set_(memory, first, (shape.numel(),))
        return flat.view(shape)

    return found


def _kind(mark: Any) -> str:
    return "copies" if isinstance(mark, Job) else "computes"


def _span(buffer: Tensor) -> tuple[int, int]:
    return buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes


@contextlib.contextmanager
def offloaded(
    thing: Any, config: toca.ToCaConfig, copies: StandIn | None = None, **given: Any
) -> Iterator[toca.Session]:
    """`enabled`, with caches on a host that is not the device's."""
    with toca.enabled(thing, config.replace(cache_device="cpu"), **given) as session:
        for one in (session, *session.others):
            one._run.loan = Watched(copies or StandIn())
        yield session
