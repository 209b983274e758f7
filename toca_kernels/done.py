"""Done: what the steps of a run did."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from .plan import IntTable, Plan


@dataclass
class Done:
    """What the steps of a run did, counted as they ran.

    Attributes:
        k: for each step, tokens that each module computed in each layer; N where it was full.
        full: for each step, which layers of each module ran in full.
        seconds: of each step, the model's forward.
        batch, tokens: B and N of each module; empty before the first step.
        shares: how many times as many tokens all processes have that share them, each of which
            selects for itself; modules that are not named have what is in `tokens`.
        nan: scores that were NaN.
        rounding: relative error of 8-bit caches, root mean square.
        cache_bytes, other_bytes, table_bytes: memory of the features, of scores, ages and
            selections, and of the modulation table; the most that was held.
        host_bytes: pinned host memory that the features lie in; 0 where they are on the device.
        selections: where the run records them, the tokens that each step recomputed: None for a
            full step, else (layers, B, N) bool for each module.
    """

    k: list[dict[str, list[int]]] = field(default_factory=list)
    full: list[dict[str, list[bool]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    batch: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    shares: dict[str, int] = field(default_factory=dict)
    nan: int = 0
    rounding: float = 0.0
    cache_bytes: int = 0
    other_bytes: int = 0
    table_bytes: int = 0
    host_bytes: int = 0
    selections: list[dict[str, Tensor] | None] = field(default_factory=list)

    def after(self, before: Done) -> Done:
        """The steps before and these, where they are of as many tokens; else these alone."""
        if (before.batch, before.tokens) != (self.batch, self.tokens):
            return self
        return replace(
            self,
            k=before.k + self.k,
            full=before.full + self.full,
            seconds=before.seconds + self.seconds,
            cache_bytes=max(before.cache_bytes, self.cache_bytes),
            other_bytes=max(before.other_bytes, self.other_bytes),
            host_bytes=max(before.host_bytes, self.host_bytes),
            selections=before.selections + self.selections,
        )

    def full_steps(self) -> list[bool]:
        """Whether each step was full in every layer of every module."""
        return [all(map(all, full.values())) for full in self.full]

    def every(self) -> dict[str, IntTable]:
        """k of the same steps without ToCa."""
        plan = self.plan()
        return {name: np.full_like(k, plan.num_tokens[name]) for name, k in plan.k.items()}

    def plan(self) -> Plan:
        """The tables of what was done, by all processes that share the tokens."""
        names = list(self.tokens)
        times = {name: self.shares.get(name, 1) for name in names}
        return Plan(
            num_steps=len(self.k),
            num_layers={name: len(self.k[0][name]) for name in names},
            num_tokens={name: self.tokens[name] * times[name] for name in names},
            full={name: np.array([full[name] for full in self.full]) for name in names},
            k={
                name: np.array([k[name] for k in self.k], dtype=np.int64) * times[name]
                for name in names
            },
        )
