"""What a run costs as planned: a table that was measured or counted once, and sums of it.

    step = cached + (full − cached) · Σ_m share_m · f_m + Σ_m mean over layers of extra_m(k / N)

where f_m is the share of module m's layers that are full in the step, and the second sum is over
the others.  A run is the sum of its steps and of what lies outside of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...config import ToCaConfig
from ...plan import Plan

Unit = Literal["seconds", "FLOPs"]
RATIOS = (1 / 16, 1 / 4, 1 / 2)  # k / N at which a module is measured, beside none
ORDERS = (0, 1, 2)


@dataclass(frozen=True)
class CostTable:
    """Costs of the steps of one batch, all in `unit`.

    Attributes:
        unit: of all numbers here.
        outside: of a run, beside the steps: the scheduler, the decoder.
        untouched: of a step of the model without ToCa.
        full: of a full step, by the order of the forecast.
        cached: of a step that recomputes nothing, likewise.
        share: {module: its part of full − cached}; they sum to 1.
        extra: {module: ((k / N, what a step costs more), ...)} with that k in every layer.
        scores: {selector: what a full step costs more that leaves its scores behind}.
        fused: what a full step costs less with full_steps="fused".
    """

    unit: Unit
    outside: float
    untouched: float
    full: tuple[float, ...]
    cached: tuple[float, ...]
    share: Mapping[str, float]
    extra: Mapping[str, tuple[tuple[float, float], ...]]
    scores: Mapping[str, float]
    fused: float = 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CostTable:
        """What `to_dict` made, after a journey through JSON."""
        extra = {m: tuple((float(r), float(c)) for r, c in at) for m, at in values["extra"].items()}
        return cls(
            **{
                **values,
                "full": tuple(values["full"]),
                "cached": tuple(values["cached"]),
                "extra": extra,
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def untouched_run(self, steps: int) -> float:
        """What a run without ToCa costs."""
        return self.outside + steps * self.untouched

    def steps(self, plan: Plan, config: ToCaConfig) -> NDArray[np.float64]:
        """(num_steps,): what each step of a plan costs under a config."""
        cached = self.cached[config.forecast]
        full = self.full[config.forecast]
        if config.full_steps == "fused":
            full -= self.fused
        found = np.full(plan.num_steps, cached)
        selects = np.zeros(plan.num_steps, dtype=bool)
        for name in plan.modules:
            whole = plan.full[name]
            found += (full - cached) * self.share.get(name, 0.0) * whole.mean(axis=1)
            ratio = np.where(whole, 0.0, plan.k[name] / plan.num_tokens[name])
            found += self._extra(name, ratio).mean(axis=1)
            selects |= (ratio > 0).any(axis=1)
        if selects.any():
            every = np.all([plan.full[name].all(axis=1) for name in plan.modules], axis=0)
            found += every * self.scores.get(config.selector, 0.0)
        return found

    def relative(self, plan: Plan, config: ToCaConfig) -> float:
        """Cost of the run over that of the run without ToCa."""
        run = self.outside + float(self.steps(plan, config).sum())
        return run / self.untouched_run(plan.num_steps)

    def _extra(self, name: str, ratio: NDArray[np.float64]) -> NDArray[np.float64]:
        """Between the ratios that were measured, linear; below the first one, the same line."""
        points = self.extra.get(name)
        if not points:
            return np.zeros_like(ratio)
        ratios, costs = (np.array(one) for one in zip(*points, strict=True))
        if len(points) > 1:
            slope = (costs[1:] - costs[:-1]) / (ratios[1:] - ratios[:-1])
            start = max(0.0, costs[0] - slope[0] * ratios[0])
            end = costs[-1] + slope[-1] * (1 - ratios[-1])
        else:
            start, end = 0.0, costs[0] / ratios[0]
        at = np.interp(ratio, [0.0, *ratios, 1.0], [start, *costs, max(costs[-1], end)])
        return np.where(ratio > 0, at, 0.0)


def growing(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Costs over ratios that are not negative and never fall: noise may not make work a gain."""
    highest, found = 0.0, []
    for ratio, cost in sorted(points):
        highest = max(highest, cost)
        found.append((ratio, highest))
    return tuple(found)


def with_seconds(counted: CostTable, **measured: Any) -> CostTable:
    """A table of seconds; the modules' shares are those of their FLOPs."""
    return replace(counted, unit="seconds", **measured)
