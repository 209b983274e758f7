"""ModulationTable: gates, shifts and scales of all cached steps of a run, from one GEMM a layer.

They depend on the timestep and the label alone, so they are known before the steps are taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks.self_mlp import CACHED_CHUNKS, SelfMLP
from .models.adapter import ModelCall
from .plan import Plan

if TYPE_CHECKING:
    from .cache import TokenCache
    from .run import Run


class ModulationTable:
    """The modulation of a branch's steps, as far as its timesteps were announced."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._fused = run.config.full_steps == "fused"
        self._tables: list[Tensor] | None = None
        self._rows: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._tables or ())

    def clear(self) -> None:
        self._tables, self._rows = None, {}

    def leave_track(self, position: int, timestep: float | None) -> None:
        """A step comes at this timestep: if another was announced, the table does not hold it."""
        if self._rows and timestep not in (None, self.run.timesteps[position]):
            self._rows = {}

    def look_up(
        self, position: int, now: float | None, call: ModelCall, cache: TokenCache
    ) -> list[Tensor] | None:
        """The rows of the table for this step, one tensor for each layer; None if it has none."""
        if self._tables is None or position not in self._rows:
            return None
        if now is None:  # on a device: compared there, and read at the end of the run
            announced = self.run.timesteps[position]
            cache.off_track |= (call.timestep != announced).any()
        assert call.labels is not None  # what a table is made from
        labels = call.labels.numel()
        first = self._rows[position] * labels
        rows = [table[first : first + labels] for table in self._tables]
        return rows if self.run.graphs is None else cache.fixed_modulation(rows)

    def make(
        self, position: int, now: float | None, call: ModelCall, cache: TokenCache, plan: Plan
    ) -> None:
        """Modulations of all remaining cached steps, in one GEMM for each layer."""
        timesteps = self.run.timesteps
        blocks = [block for block in self.run.blocks if isinstance(block, SelfMLP)]
        if self._tables is not None or not self.run.config.tabulate_modulation or not timesteps:
            return
        if len(blocks) < len(self.run.blocks):
            return
        steps = [
            step
            for step in range(position, min(plan.num_steps, len(timesteps)))
            if self._fused or not all(full[step].all() for full in plan.full.values())
        ]
        if not steps or now not in (None, timesteps[position]):
            return  # these are not the timesteps that were announced: computed step by step
        assert call.labels is not None
        labels = call.labels.flatten()  # one for each sample, or one for all of them
        t = torch.tensor([timesteps[step] for step in steps], device=call.timestep.device)
        t = t.to(call.timestep.dtype).repeat_interleave(len(labels))
        like = torch.empty(0, dtype=cache.tracks["attn"].layout.dtype, device=t.device)
        conditions = self.run.adapter.conditions(t, labels.repeat(len(steps)), like)
        every = self._fused or self.run.config.self_attention == "partial"
        chunks = slice(None) if every else CACHED_CHUNKS
        self._tables = [
            block.modulate(condition, chunks) if not block.never else condition[:0]
            for block, condition in zip(blocks, conditions, strict=True)
        ]
        self._rows = {step: row for row, step in enumerate(steps)}
