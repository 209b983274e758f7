"""Requests: samples at different steps of different runs, in one batch.

What a server with continuous batching does: a request joins when it comes and leaves when it is
done, and every call of the model takes all of them one step further, each through its own plan.
The call is split into the groups of rows that do the same in this step (those in a full step, those
that recompute as many tokens); each group is one call of the model's own forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .blocks.block import OtherLayout
from .branch import Branch
from .joined import Joined
from .run import Run
from .steps import enter_named
from .summary import Summary, summarize

if TYPE_CHECKING:
    from .session import Session

# What a model is given once for all samples (places of tokens also with a dimension of samples).
_SHARED = ("img_ids", "txt_ids", "image_rotary_emb", "freqs_cis")


class Request:
    """A run of its own: one sample (or both guidance halves of one, or several in lockstep).

    Made by `Session.request`; its steps are taken by calls of the model in `Session.batch`.

    Attributes:
        num_steps: of its run.
        record_selections: set to True to keep, in `selections`, which tokens each step recomputed.
    """

    def __init__(self, session: Session, run: Run) -> None:
        self._session = session
        self._run = run
        self.num_steps: int = run.num_steps or 0

    @property
    def position(self) -> int:
        """How many steps it has taken."""
        return max((branch.position for branch in self._run.branches.values()), default=0)

    @property
    def finished(self) -> bool:
        """Whether it has taken all of them; its caches are freed then."""
        return self.position >= self.num_steps

    @property
    def mask(self) -> Tensor | None:
        """The weights of its tokens, for selector="mask"; set before its first step."""
        return self._run.mask

    @mask.setter
    def mask(self, value: Tensor) -> None:
        self._run.set_mask(value)

    @property
    def record_selections(self) -> bool:
        return self._run.record_selections

    @record_selections.setter
    def record_selections(self, value: bool) -> None:
        self._run.record_selections = value

    @property
    def selections(self) -> list[Tensor | None]:
        """The tokens that each step recomputed, as `Session.selections` tells them."""
        return self._run.selections()

    def summary(self) -> Summary:
        """What its steps so far did; `seconds` is its share of those of the batches.

        Raises:
            RuntimeError: no step has been run yet.
        """
        return summarize([(self._session, self._run)])

    def close(self) -> None:
        """Free its caches, wherever it is; its next step would be its first."""
        self._run.branches = {}


class Batch:
    """The rows of a batch: whose they are, and which guidance branch of theirs is called."""

    def __init__(self, rows: Sequence[Request], branch: str) -> None:
        self.name = branch
        self.rows = len(rows)
        self.places: dict[Request, list[int]] = {}
        for place, request in enumerate(rows):
            if not isinstance(request, Request):
                raise ValueError(
                    f"rows: expected requests of this session, got {type(request).__name__} at "
                    f"{place}"
                )
            self.places.setdefault(request, []).append(place)
        if not self.places:
            raise ValueError("rows: expected the request of each row of the batch, got none")


class Batches:
    """Takes the steps of one session's requests."""

    def __init__(self) -> None:
        self._apart: set[Hashable] = set()  # signatures that cannot be joined, as a step has shown

    def call(
        self,
        batch: Batch,
        own: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """One step of every request of the batch; all of them take it, or none."""
        whole = _Rows(batch.rows, args, kwargs)
        steps = [_Step(one, places, whole) for one, places in batch.places.items()]
        entered: list[_Step] = []
        try:
            for step in steps:
                step.enter(batch.name)
                entered.append(step)
            groups: dict[Hashable, list[_Step]] = {}
            for step in steps:
                groups.setdefault(step.choose(self._apart), []).append(step)
            outs = [out for group in groups.values() for out in self._take(group, whole, own)]
        except BaseException:
            for step in entered:
                step.branch.abort()
            raise
        for step in steps:
            step.run.leave(step.branch, step.seconds)
        return whole.joined(outs)

    def _take(
        self, group: Sequence[_Step], whole: _Rows, own: Callable[..., Any]
    ) -> Iterator[tuple[list[int], Any]]:
        """(rows, what the model returned for them) of steps that are alike."""
        if len(group) == 1:
            yield group[0].places, group[0].alone(own)
            return
        places = [place for step in group for place in step.places]
        args, kwargs = whole.take(places)
        started = time.perf_counter()
        try:
            out = Joined([step.branch for step in group]).forward(own, args, kwargs)
        except OtherLayout:
            # The model packs or pads its samples by lengths that shapes do not tell.
            if not any(step.branch.position == step.branch.adopted for step in group):
                self._apart.add(group[0].branch.signature)
            for step in group:
                yield step.places, step.alone(own)
            return
        seconds = time.perf_counter() - started
        for step in group:
            step.seconds += seconds * len(step.places) / len(places)
        yield places, out


class _Step:
    """The step that a request takes in a call of the model."""

    def __init__(self, request: Request, places: list[int], whole: _Rows) -> None:
        self.run = request._run
        self.places = places
        self.args, self.kwargs = whole.take(places)
        self.branch: Branch
        self.seconds = 0.0
        self._chosen = False

    def enter(self, name: str) -> None:
        if self.run.find_ranks() is not None:
            raise ValueError(
                "request: expected a process that has all tokens, got one that shares them"
            )
        call = self.run.adapter.call(*self.args, **self.kwargs)
        if call is None:
            raise ValueError("request: expected a call that is one of a run's steps, got another")
        signature = self.run.signature(self.args, self.kwargs)
        self.branch = enter_named(self.run, name, call, signature)

    def choose(self, apart: Collection[Hashable]) -> Hashable:
        """Select its tokens; returns what steps must have in common to be taken together."""
        branch = self.branch
        decided = branch.decided()
        if decided is None:
            return id(self)
        started = time.perf_counter()
        branch.choose()
        self._chosen = True
        self.seconds += time.perf_counter() - started
        if branch.signature in apart:
            return id(self)
        late = tuple(tuple(state.late) for state in branch.states)
        packed = frozenset(name for block in branch.run.blocks for name in block.packed)
        shapes = tuple(
            layout.shape
            for name, layouts in branch.cache.layout.items()
            for layout in layouts
            if layout is not None and name not in packed
        )
        return branch.signature, decided, late, shapes

    def alone(self, own: Callable[..., Any]) -> Any:
        """Take it by itself."""
        started = time.perf_counter()
        try:
            if not self._chosen:
                return self.run.take_step(self.branch, own, self.args, self.kwargs)
            return Joined([self.branch]).forward(own, self.args, self.kwargs)
        except OtherLayout:
            self.branch.abort()
            self.run.look_anew(self.branch)
            return self.run.take_step(self.branch, own, self.args, self.kwargs)
        finally:
            self.seconds += time.perf_counter() - started


class _Rows:
    """The arguments of a call, and what it returns, by the rows of its batch.

    A tensor has a row for each sample where its first dimension says so, a list where it is as
    long; all else is every sample's.  A mask of the prompts may serve both guidance halves.
    """

    def __init__(self, rows: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._rows = rows
        self._args, self._kwargs = args, kwargs
        # The hidden states come first, or are named so.
        names = ("hidden_states", "x", "img")
        x = args[0] if args else next((kwargs[name] for name in names if name in kwargs), None)
        if not isinstance(x, (Tensor, list)) or len(x) != rows:
            got = len(x) if isinstance(x, (Tensor, list)) else type(x).__name__
            raise ValueError(f"rows: expected a request for each of {got} samples, got {rows}")

    def take(self, places: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of some of the rows."""
        index = torch.tensor(places)
        args = tuple(self._of("", one, index) for one in self._args)
        return args, {name: self._of(name, one, index) for name, one in self._kwargs.items()}

    def _of(self, name: str, value: Any, index: Tensor) -> Any:
        every = index.tolist() == list(range(self._rows))

        def pick(one: Any) -> Any:
            if isinstance(one, Tensor) and one.ndim and len(one) == self._rows:
                if every:
                    return one
                return one.index_select(0, index.to(one.device))
            if (
                isinstance(one, Tensor)
                and "mask" in name
                and one.ndim
                and self._rows % len(one) == 0
            ):
                return one.index_select(0, index.to(one.device) % len(one))
            if isinstance(one, list):
                return [one[place] for place in index.tolist()]
            return one

        def is_batch(one: Any) -> bool:
            return isinstance(one, list) and len(one) == self._rows and "controlnet" not in name

        if name in _SHARED and not (isinstance(value, Tensor) and value.ndim == 3):
            return value
        return pytree.tree_map(pick, value, is_leaf=is_batch)

    def joined(self, outs: Sequence[tuple[Sequence[int], Any]]) -> Any:
        """What the groups returned, in the order of the batch."""
        if len(outs) == 1 and list(outs[0][0]) == list(range(self._rows)):
            return outs[0][1]
        order = [place for places, _ in outs for place in places]
        back = torch.tensor(sorted(range(self._rows), key=order.__getitem__))

        def is_batch(one: Any) -> bool:
            return isinstance(one, list)

        flat = [pytree.tree_flatten(out, is_leaf=is_batch) for _, out in outs]
        leaves: list[Any] = []
        for parts in zip(*(some for some, _ in flat), strict=True):
            if isinstance(parts[0], list):
                every = [one for part in parts for one in part]
                leaves.append([every[place] for place in back.tolist()])
            elif isinstance(parts[0], Tensor):
                leaves.append(torch.cat(parts).index_select(0, back.to(parts[0].device)))
            else:
                leaves.append(parts[0])
        return pytree.tree_unflatten(leaves, flat[0][1])
