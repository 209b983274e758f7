"""Offload: caches that lie in host memory, brought to the device for the block that reads them.

While a block computes, what the next one will read is copied into one of two sets of working
buffers, and what the block before has written is copied home from the other:

    computes   |  block 0   |  block 1   |  block 2   |
    host to    | 1's caches | 2's caches | 3's caches |
    device to  |            | 0's fresh  | 1's fresh  |
    in set         0            1            0

What a block reads follows from its state: what it reuses or refreshes in rows, and of what it
computes in full the values that a forecast's slopes or a comparison need.  Home goes what it wrote,
whole, also where a tenth of the rows is fresh: those rows alone would be gathered on the device and
scattered by the host, which would have to wait for every block of the device for that, while a
whole copy runs beside the copies in, the other way on the same bus, and takes no longer than those
of the block's other modules.

Nobody guesses at the next step: its first block is fetched when the step begins, which is while the
device still computes the last one, as Python is ahead of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .blocks.block import Block, BlockState
from .blocks.loan import Loan, unseen
from .blocks.touched import read, written
from .copies import Copies, Lane, Mark, Slabs, aligned
from .track import Features, rebuilt, tensors


@dataclass(eq=False)
class _Set:
    """Working buffers of one block.

    Attributes:
        memory: all of it; None in a step that shows what it must hold.
        used: after the last block that computed here.
        arrived: after what was last fetched; None where what computes has waited for it.
        leaving: (first, stop, after it) of the bytes that are on their way home.
        state: whose features are fetched.
        given, spans: module -> its features here, and their (first, stop) in `memory`.
        homes: module -> its features on the host, while a block has the others.
    """

    memory: Tensor | None = None
    used: Mark = None
    arrived: Mark = None
    leaving: list[tuple[int, int, Mark]] = field(default_factory=list)
    state: BlockState | None = None
    given: dict[str, Features] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    homes: dict[str, Features] = field(default_factory=dict)


class Offload:
    """The loan of a run: what its blocks work on, of whichever guidance branch.

    Attributes:
        most: bytes of working buffers, the most that there were.
    """

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self.most = 0
        self._sets = (_Set(), _Set())
        self._turn = 0  # the set that was lent last
        self._lent: _Set | None = None
        self._first: Block | None = None
        self._before: Block | None = None
        self._next: dict[Block, Block] = {}  # as blocks have followed each other so far
        self._returned: dict[Block, Mark] = {}  # after the last copy home
        self._unseen: Loan | None = None

    def slabs(self) -> Slabs:
        """Host memory for one cache."""
        return Slabs(self.copies.pinned)

    @property
    def lender(self) -> Loan:
        """What blocks call; a compiler of theirs does not look into it."""
        reason = "caches come from host memory (cache_device='cpu'): compile with fullgraph=False"
        if self._unseen is None:
            loan = unseen(self, reason)
            if loan is self:
                return self
            self._unseen = loan
        return self._unseen

    @property
    def nbytes(self) -> int:
        """Bytes of working buffers."""
        whole = sum(one.memory.nbytes for one in self._sets if one.memory is not None)
        single = (given for one in self._sets if one.memory is None for given in one.given.values())
        return whole + sum(tensor.nbytes for given in single for tensor in tensors(given))

    # --- a step -----------------------------------------------------------------------------

    def begin(self, blocks: Sequence[Block]) -> None:
        """The states of all blocks are placed: make what they need room for, fetch the first's."""
        states = [block.state for block in blocks if block.state is not None]
        if any(state.holder is not None for state in states):
            self.release()
            return
        size = max(map(size_of, states))
        if any(one.memory is None or one.memory.numel() < size for one in self._sets):
            self.release()
        for one in self._sets:
            if one.memory is None:
                one.memory = self.copies.buffer(size)
                one.used = self.copies.mark()
        self.most = max(self.most, self.nbytes)
        if self._first is not None and self._first.state is not None:
            self._fetch(self._first, self._first.state)

    def take(self, block: Block, state: BlockState) -> None:
        if self._before is None:
            self._first = block
        else:
            self._next[self._before] = block
        self._before = block
        if self._spare.state is not state:
            self._fetch(block, state)
        lent = self._lent = self._spare
        self._turn = 1 - self._turn
        self._join(lent)
        lent.homes = dict(state.features)
        state.features.update(lent.given)
        follows = self._next.get(block)
        if follows is not None and follows.state is not None and state.holder is None:
            self._fetch(follows, follows.state)

    def hold(self, name: str, home: Features) -> Features:
        """Working buffers of what a block has made a home for, in a step that shows its outputs."""
        lent = self._lent
        assert lent is not None
        if name not in lent.given:
            made = [
                self.copies.buffer(one.nbytes).view(one.dtype).view(one.shape)
                for one in tensors(home)
            ]
            lent.given[name], lent.spans[name] = rebuilt(home, made), (0, 0)
            lent.homes[name] = home
            self.most = max(self.most, self.nbytes)
        return lent.given[name]

    def give_back(self, block: Block, state: BlockState) -> None:
        lent = self._lent
        assert lent is not None
        lent.used = self.copies.mark()
        for name in lent.given if state.holder is not None else written(block, state):
            pairs = zip(tensors(lent.homes[name]), tensors(lent.given[name]), strict=True)
            mark = self.copies.copy(Lane.OUT, list(pairs), [lent.used])
            lent.leaving.append((*lent.spans[name], mark))
            self._returned[block] = mark
        state.features.update(lent.homes)
        lent.state, lent.homes = None, {}
        self._lent = None

    def rest(self) -> None:
        """The step is over, or was broken off."""
        if self._lent is not None:
            self._lent.used = self.copies.mark()
        for one in self._sets:
            if one.arrived is not None:  # fetched for a block that did not run
                self.copies.wait(one.arrived)
                one.arrived = None
            if one.memory is None:
                self._join(one)
            one.state, one.homes, one.given, one.spans = None, {}, {}, {}
        self._lent = self._before = None

    def release(self) -> None:
        """Give the working buffers back."""
        for one in self._sets:
            self._join(one)
        self._sets = (_Set(), _Set())

    # --- copies in --------------------------------------------------------------------------

    @property
    def _spare(self) -> _Set:
        return self._sets[1 - self._turn]

    def _join(self, one: _Set) -> None:
        """What computes waits for all copies from and to a set."""
        if one.arrived is not None:
            self.copies.wait(one.arrived)
        for *_, mark in one.leaving:
            self.copies.wait(mark)
        one.arrived, one.leaving = None, []

    def _fetch(self, block: Block, state: BlockState) -> None:
        """Begin to copy what a block will read into the set that is not lent."""
        one = self._spare
        one.state = state
        if one.memory is None:
            self._join(one)  # before what was made here is let go of
            one.given, one.spans = {}, {}
            return
        one.given, one.spans = _carved(one.memory, state.features)
        leaving = {name: list(_within(one.leaving, one.spans[name])) for name in one.given}
        # What must wait for copies home goes last, beside which the others can run.
        for name in sorted(read(block, state), key=lambda name: len(leaving[name]) > 0):
            pairs = zip(tensors(one.given[name]), tensors(state.features[name]), strict=True)
            after = [one.used, *leaving[name]]
            if block in self._returned:
                after.append(self._returned[block])
            one.arrived = self.copies.copy(Lane.IN, list(pairs), after)


def _within(leaving: Sequence[tuple[int, int, Mark]], span: tuple[int, int]) -> Iterator[Mark]:
    """The copies home of bytes that lie in a span."""
    first, stop = span
    return (mark for start, end, mark in leaving if start < stop and first < end)


# --- where what lies -------------------------------------------------------------------------


def size_of(state: BlockState) -> int:
    """Bytes of the working buffers of a block."""
    every = (tensor for one in state.features.values() for tensor in tensors(one))
    return sum(aligned(tensor.nbytes) for tensor in every)


def _carved(
    memory: Tensor, features: Mapping[str, Features]
) -> tuple[dict[str, Features], dict[str, tuple[int, int]]]:
    """Features like these in a piece of memory, and their (first, stop)."""
    given, spans = {}, {}
    used = 0
    for name, home in features.items():
        first, made = used, []
        for one in tensors(home):
            made.append(memory[used : used + one.nbytes].view(one.dtype).view(one.shape))
            used += aligned(one.nbytes)
        given[name], spans[name] = rebuilt(home, made), (first, used)
    return given, spans
