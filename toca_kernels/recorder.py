"""Recorder: what `session.trace()` gives.

    with session.trace() as recorder:
        pipe(...)
    recorder.trace.save("run.npz")

A with block, because recording has a price: while selections are copied to the host no step is
replayed as a CUDA graph.  It switches `session.record_selections` on for its length and leaves it
as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .done import Done
from .plan import BoolTable
from .trace import Part, Trace

if TYPE_CHECKING:
    from .branch import Branch
    from .session import Session


class Recorder:
    """Records the runs of its with block; `trace` is that of the last one."""

    def __init__(self, session: Session) -> None:
        self._sessions = (session, *session.others)
        self._trace: Trace | None = None
        self._before: list[bool] = []
        self._known: dict[Branch, int] = {}
        self._samples: dict[int, NDArray[np.uint8]] = {}
        self._samples_of: Branch | None = None

    def __enter__(self) -> Recorder:
        self._before = [session.record_selections for session in self._sessions]
        self._known = {branch: branch.position for _, branch in self._branches()}
        for session in self._sessions:
            session.record_selections = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        for session, before in zip(self._sessions, self._before, strict=True):
            session.record_selections = before
        found = list(self._branches())
        if kind is None and any(self._known.get(b) != b.position for _, b in found):
            self._trace = self._made(found)

    @property
    def trace(self) -> Trace:
        """Of the last run in the with block.

        Raises:
            RuntimeError: the with block has not ended, or no step was run in it.
        """
        if self._trace is None:
            raise RuntimeError("trace: expected a with block that has ended and that ran a step")
        return self._trace

    @property
    def started(self) -> bool:
        """Whether a step has been run, so that there is a sample to keep."""
        return any(True for _ in self._branches())

    def keep(self, sample: Tensor) -> None:
        """What the sampler holds after the step that has just been run, to be drawn beneath the
        tokens of the next one.

        Args:
            sample: (B, C, H, W) or (B, F, C, H, W) in [0, 1]; kept in 8 bits.

        Raises:
            ValueError: another shape.
            RuntimeError: no step has been run.
        """
        if sample.ndim not in (4, 5):
            raise ValueError(
                f"sample: expected (B, C, H, W) or (B, F, C, H, W), got {tuple(sample.shape)}"
            )
        if not self.started:
            raise RuntimeError("keep: expected a step that has been run, got none")
        positions: dict[Session, list[int]] = {}
        for session, branch in self._branches():
            if not positions and self._samples_of is not branch:
                self._samples, self._samples_of = {}, branch
            positions.setdefault(session, []).append(branch.position)
        # A step is done when its last guidance branch is; of two models the later one runs.
        step = min(max(positions.values(), key=max)) - 1
        pixels = sample.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
        self._samples[step] = pixels.numpy()

    def _branches(self) -> Iterator[tuple[Session, Branch]]:
        for session in self._sessions:
            for branch in session._run.branches.values():
                if branch.done.seconds:
                    yield session, branch

    def _made(self, found: Sequence[tuple[Session, Branch]]) -> Trace:
        parts = []
        seconds = np.zeros(max(branch.position for _, branch in found))
        for session, branch in found:
            done = branch.done
            if len(done.selections) != len(done.seconds):
                raise RuntimeError(
                    "trace: expected a run that begins in the with block, got one that had "
                    f"{len(done.seconds) - len(done.selections)} steps before it"
                )
            first = branch.position - len(done.seconds)
            seconds[first : branch.position] += done.seconds
            parts.append(self._part(session, branch, first))
        summary = self._sessions[0].summary()
        memory = {
            name: getattr(summary, name)
            for name in ("cache_bytes", "modulation_bytes", "packed_bytes", "other_bytes")
        }
        main = self._sessions[0]
        return Trace(
            model=type(main.model).__name__,
            config=main.config,
            parts=tuple(parts),
            seconds=seconds,
            memory=memory,
            samples=dict(self._samples),
            versions={"torch": torch.__version__},
        )

    def _part(self, session: Session, branch: Branch, first: int) -> Part:
        number = self._sessions.index(session)
        plan = branch.done.plan()
        flops = session._flops(branch.done)
        return Part(
            model=f"transformer_{number + 1}" if number else "transformer",
            branch=list(session._run.branches.values()).index(branch),
            first=first,
            plan=plan,
            batch=dict(branch.done.batch),
            grids={
                module: grid
                for module, grid in session.grids.items()
                if int(np.prod(grid)) == plan.num_tokens.get(module)
            },
            flops=flops.steps,
            full_flops=flops.full_step,
            selections=_selections(branch.done),
        )


def _selections(done: Done) -> dict[str, BoolTable]:
    names = next((list(step) for step in done.selections if step is not None), [])
    tokens, tables = done.plan().num_tokens, {}
    for name in names:
        shape = (len(done.k[0][name]), done.batch[name], tokens[name])
        steps = [
            np.ones(shape, dtype=np.bool_) if step is None else step[name].numpy()
            for step in done.selections
        ]
        tables[name] = np.stack(steps)
    return tables
