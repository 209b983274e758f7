"""Requests: samples at different steps of different runs, in one batch.

What a server with continuous batching does: a request joins when it comes and leaves when it is
done, and every call of the model takes all of them one step further, each through its own plan.
The call is split into the groups of rows that do the same in this step (those in a full step, those
that recompute as many tokens); each group is one call of the model's own forward.
"""

from __future__ import annotations

import inspect
import threading
import time
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .blocks.block import OtherLayout
from .branch import Branch
from .joined import Joined
from .rows import Rows
from .run import Run
from .steps import enter_named
from .summary import Summary, summarize

if TYPE_CHECKING:
    from .session import Session


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
        weakref.finalize(self, _forget, run)  # a run and its branches know each other: a cycle

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
        _forget(self._run)


def _forget(run: Run) -> None:
    run.branches = {}


class Batch:
    """The rows of a batch: whose they are, and which guidance branch of theirs is called."""

    def __init__(self, rows: Iterable[Request], branch: str) -> None:
        rows = list(rows)
        self.name = branch
        self.rows = len(rows)
        self._thread = threading.get_ident()
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

    def check_thread(self) -> None:
        """Refuse another thread's calls: they are nobody's step, and blocks have one state."""
        if self._thread != threading.get_ident():
            raise RuntimeError(
                "batch: expected calls of the thread that entered the with block, got another's"
            )


class Batches:
    """Takes the steps of one session's requests."""

    def __init__(self, model: nn.Module) -> None:
        own = getattr(model, "_orig_mod", model)  # of one that torch.compile has wrapped
        self._names = list(inspect.signature(type(own).forward).parameters)[1:]
        self._apart: set[Hashable] = set()  # signatures that cannot be joined, as a step has shown

    def call(
        self,
        batch: Batch,
        own: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """One step of every request of the batch; all of them take it, or none."""
        whole = Rows(batch.rows, args, kwargs, self._names)
        steps = [_Step(one, places, whole) for one, places in batch.places.items()]
        entered: list[_Step] = []
        begun = False
        try:
            for step in steps:
                step.enter(batch.name)
                entered.append(step)
            begun = True
            groups: dict[Hashable, list[_Step]] = {}
            for step in steps:
                groups.setdefault(step.choose(self._apart), []).append(step)
            outs = [out for group in groups.values() for out in self._take(group, whole, own)]
            out = whole.joined(outs)
            for step in steps:
                if step.branch.discovering:
                    step.branch.learn_layouts()
        except BaseException:
            for step in entered:
                if begun:
                    step.branch.abort()
                else:
                    step.branch.undecide()
            raise
        self._leave(steps)
        return out

    def _leave(self, steps: Sequence[_Step]) -> None:
        """The step is taken; what can still fail is an interrupt, and a run that ends and has not
        kept to its timesteps, which a GPU tells only then: those after it take the step anew."""
        left = 0
        try:
            for step in steps:
                step.run.leave(step.branch, step.seconds)
                left += 1
        except BaseException:
            for step in steps[left:]:
                step.branch.abort()
            raise

    def _take(
        self, group: Sequence[_Step], whole: Rows, own: Callable[..., Any]
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

    def __init__(self, request: Request, places: list[int], whole: Rows) -> None:
        self.run = request._run
        self.places = places
        self.args, self.kwargs = whole.take(places)
        self.branch: Branch
        self.seconds = 0.0
        self._masked = whole.masked
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
        packed = frozenset(name for block in branch.run.blocks for name in block.packed)
        # What outputs look like is another request's word until its own first step has shown it:
        # lengths may be told by masks alone.
        unsure = branch.position == branch.adopted and (self._masked or packed)
        if branch.signature in apart or unsure:
            return id(self)
        late = tuple(tuple(state.late) for state in branch.states)
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
