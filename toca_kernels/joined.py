"""Joined: the steps of several branches as one step, each with a cache of its own.

What is fused: nothing.  The blocks run as they do for one branch, on all rows at once; what a block
reads and writes is put together for as long as it runs.  Rows that lie behind each other in memory
are read where they are.  A module that is full writes all rows anew, so there they get one tensor
together, at no cost; rows that stay together from then on are never copied again.  Others, in a
cached step, are copied into a buffer that serves all layers, and what was recomputed is copied
back: that traffic is the price of a batch whose members change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .blocks.block import Block, BlockState
from .blocks.loan import unseen
from .blocks.touched import decided, read, written
from .branch import Branch
from .ops import ForecastCache
from .track import Features, rebuilt, tensors


class Joined:
    """A step that branches take together; all have decided the same for it."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        self.branches = branches
        self.run = branches[0].run
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def forward(self, own: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The model's own forward, on the rows of all of them in their order."""
        joint = [
            _join(self, number, states)
            for number, states in enumerate(
                zip(*(branch.states for branch in self.branches), strict=True)
            )
        ]
        try:
            for block, state in zip(self.run.blocks, joint, strict=True):
                block.place(state)
            out = own(*args, **kwargs)
        finally:
            for block, state in zip(self.run.blocks, joint, strict=True):
                block.place(None)
                state.late, state.loan = {}, None  # they know the state: a cycle, and its buffers
        for branch in self.branches:
            branch.learn_scores()
        return out

    def copied(self, name: str, at: int, parts: Sequence[Tensor], dim: int) -> Tensor:
        """These parts in one piece, until a block of the same module asks again."""
        buffer = self._buffers.get((name, at))
        if buffer is None or buffer.shape != _shape(parts, dim) or buffer.dtype != parts[0].dtype:
            buffer = self._buffers[name, at] = parts[0].new_empty(_shape(parts, dim))
        torch.cat([_bytes(part) for part in parts], dim, out=_bytes(buffer))
        return buffer


def _join(joined: Joined, number: int, states: Sequence[BlockState]) -> BlockState:
    """What the branches ask of a block, in one."""
    first = states[0]
    state = BlockState(
        full=first.full,
        fused=first.fused,
        selector=first.selector,
        changes=first.changes,
        valid=first.valid,
        dtypes=first.dtypes,
        index={name: torch.cat([one.index[name] for one in states]) for name in first.index},
        inverse={name: torch.cat([one.inverse[name] for one in states]) for name in first.inverse},
        refreshes=first.refreshes,
        partial=first.partial,
        rounding=None if first.rounding is None else torch.zeros_like(first.rounding),
        modulation=_modulation(joined, number),
    )
    for name in first.late:
        state.late[name] = _LateOfAll(state, states, name)  # type: ignore[assignment]
    state.loan = unseen(
        _Lent(joined, states), "rows of a batch are joined: compile without fullgraph"
    )
    return state


def _modulation(joined: Joined, number: int) -> Tensor | None:
    """Rows of the branches' tables; one row may be that of all samples of a branch."""
    rows = []
    for branch in joined.branches:
        row = branch.states[number].modulation
        if row is None:
            return None
        rows.append(row.expand(max(branch.done.batch.values()), -1))
    return torch.cat(rows)


class _Lent:
    """The caches of one block, of all branches."""

    def __init__(self, joined: Joined, states: Sequence[BlockState]) -> None:
        self._joined = joined
        self._states = states
        self._copied: dict[str, Features] = {}

    def take(self, block: Block, state: BlockState) -> None:
        first = self._states[0]
        old = read(block, first)
        for name in first.features:
            state.features[name] = self._whole(block, state, name, old)
            if name not in block.packed:
                state.every[name] = torch.cat([one.every[name] for one in self._states])
        for name in first.scores:
            state.scores[name] = torch.cat([one.scores[name] for one in self._states])

    def _whole(self, block: Block, state: BlockState, name: str, old: Collection[str]) -> Features:
        """What all have of a module, in one; with what is in it only if it is among the `old`."""
        parts = [one.features[name] for one in self._states]
        full = state.full[decided(block)[name][0]]
        dim = 1 if name in block.packed else 0
        columns = list(zip(*map(tensors, parts), strict=True))
        together = [_adjacent(column, dim, alone=full) for column in columns]
        whole: list[Tensor] = []
        for at, (column, found) in enumerate(zip(columns, together, strict=True)):
            if found is not None:
                whole.append(found)
            elif not full:
                whole.append(self._joined.copied(name, at, column, dim))
            elif name in old:
                every = torch.cat([_bytes(one) for one in column], dim)
                whole.append(every.view(column[0].dtype))
            else:
                whole.append(column[0].new_empty(_shape(column, dim)))
        features = rebuilt(parts[0], whole)
        if isinstance(features, ForecastCache):
            distances = [part.distance for part in parts if isinstance(part, ForecastCache)]
            features = features._replace(distance=torch.cat(distances))
        if None in together:
            if full:
                self._move(block, name, columns, whole, dim)
            else:
                self._copied[name] = features
        return features

    def _move(
        self,
        block: Block,
        name: str,
        columns: Sequence[Sequence[Tensor]],
        whole: Sequence[Tensor],
        dim: int,
    ) -> None:
        """From now on the branches' features lie in one tensor."""
        sizes = [one.shape[dim] for one in columns[0]]
        pieces = zip(*(one.split(sizes, dim) for one in whole), strict=True)
        layer = block.layers[name]
        for branch, state, held in zip(self._joined.branches, self._states, pieces, strict=True):
            track = branch.cache.tracks[name]
            features = track.features[layer]
            assert features is not None
            track.features[layer] = rebuilt(features, held)
            state.features[name] = rebuilt(state.features[name], held)

    def give_back(self, block: Block, state: BlockState) -> None:
        for name in written(block, state):
            if name in self._copied:
                rows = state.index[decided(block)[name][1]]
                for whole, column in self._columns(name, self._copied[name]):
                    _give_rows(whole, column, rows)
        self._copied = {}
        for name, scores in state.scores.items():
            parts = scores.split([len(one.scores[name]) for one in self._states])
            for one, part in zip(self._states, parts, strict=True):
                one.scores[name].copy_(part)
        if state.rounding is not None:
            for one in self._states:
                if one.rounding is not None:
                    one.rounding.add_(state.rounding)

    def _columns(self, name: str, features: Features) -> Any:
        parts = (tensors(one.features[name]) for one in self._states)
        return zip(tensors(features), zip(*parts, strict=True), strict=True)


class _LateOfAll:
    """Selections that wait for scores of the same step: each branch makes its own."""

    def __init__(self, state: BlockState, states: Sequence[BlockState], name: str) -> None:
        self._state, self._states, self._name = state, states, name

    def select(self) -> tuple[Tensor, Tensor]:
        name = self._name
        parts = self._state.scores[name].split([len(one.scores[name]) for one in self._states])
        for one, part in zip(self._states, parts, strict=True):
            one.scores[name].copy_(part)
            one.index[name], one.inverse[name] = one.late[name].select()
        index = torch.cat([one.index[name] for one in self._states])
        return index, torch.cat([one.inverse[name] for one in self._states])


def _give_rows(whole: Tensor, column: Sequence[Tensor], index: Tensor) -> None:
    """column[r][b, index[.., j]] = whole[.., index[.., j]]."""
    sizes = list(map(len, column))
    pieces = zip(column, _bytes(whole).split(sizes), index.split(sizes), strict=True)
    for into, part, places in pieces:
        if part.ndim == 3:
            places = places[:, :, None].expand(-1, -1, part.shape[2])
        _bytes(into).scatter_(1, places, part.gather(1, places))


def _shape(column: Sequence[Tensor], dim: int) -> tuple[int, ...]:
    shape = list(column[0].shape)
    shape[dim] = sum(one.shape[dim] for one in column)
    return tuple(shape)


def _adjacent(column: Sequence[Tensor], dim: int, *, alone: bool) -> Tensor | None:
    """One tensor over these, if they lie behind each other; `alone`: and nothing else is there."""
    first = column[0]
    storage, end = first.untyped_storage(), first.data_ptr()
    for one in column:
        there = one.untyped_storage().data_ptr() == storage.data_ptr()
        if not there or one.data_ptr() != end or not one.is_contiguous():
            return None
        end += one.nbytes
    if alone and storage.nbytes() != end - first.data_ptr():
        return None
    return first.as_strided(_shape(column, dim), first.stride())


def _bytes(x: Tensor) -> Tensor:
    """The same memory in a dtype that everything is implemented for."""
    return x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x
