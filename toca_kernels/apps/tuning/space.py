"""The settings that a model allows, the first candidates among them, and their neighbours."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...config import ToCaConfig
from ...plan import Plan
from ..evaluation.generation import sampling_with
from ..evaluation.settings import Setting
from ..sampling.sampler import Sampler
from . import schedule
from .cost import ORDERS, CostTable
from .probe import Probe

_SELECTORS = ("attention", "entropy", "similarity", "random", "norm")
_SLOPES = (0.0, 1.0, -1.0)  # of the weights of errors over the run
_RATIOS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
_FIRST_RATIOS = (0.1, 0.25)
_THRESHOLDS = (0.05, 0.1, 0.2, 0.4)
_EVERY = (1, 2, 3)
_AGES = (0.0, 0.25, 1.0)
_MOST = 4.0  # times the mean: a factor of a step or a layer
_SWAPS = 12  # schedules with one full step elsewhere that are tried: those of the least error
_GAIN = 0.02  # of a full step that fused ones must save; less is noise


def fits(sampler: Sampler, config: ToCaConfig, steps: int) -> bool:
    """Whether the model takes these settings."""
    try:
        with sampling_with(sampler, Setting("", "", config, steps)):
            return True
    except ValueError:
        return False


@dataclass(frozen=True)
class Space:
    """What a model allows.

    Attributes:
        modules: that can recompute some of their tokens.
        selectors: that it has scores for.
        fuses: whether its full steps can run through the ops.
        idle: settings that recompute nothing in cached steps.
    """

    modules: tuple[str, ...]
    selectors: tuple[str, ...]
    fuses: bool
    idle: ToCaConfig

    @classmethod
    def of(cls, sampler: Sampler, probe: Probe, steps: int) -> Space:
        """Found out by asking the model."""
        base = ToCaConfig(full_at=(0,), fresh_ratio=0.0, selector="random")

        def takes(**changes: Any) -> bool:
            return fits(sampler, base.replace(**changes), steps)

        some = {"fresh_ratio": 0.5}
        modules = tuple(
            name for name in probe.shapes.layers if takes(module_ratio={name: 1.0}, **some)
        )
        selectors = tuple(name for name in _SELECTORS if takes(selector=name))
        # Drawing random numbers costs more than scores that nobody reads.
        still = next(name for name in (*selectors, "random") if name != "similarity")
        idle = base.replace(selector=still)
        return cls(modules, selectors, takes(full_steps="fused"), idle)


class Candidates:
    """Makes settings for a run of `steps` steps; costs are those of the table.

    Every one that names its full steps also has `step_ratio`, with a factor for every step: it
    ties the settings to the number of steps, and `enable` refuses another one.
    """

    def __init__(self, space: Space, probe: Probe, table: CostTable, steps: int) -> None:
        self.space, self.probe, self.table, self.steps = space, probe, table, steps
        self._gram = schedule.stack(probe.grams)
        self._every = {name: len(gram) for name, gram in probe.grams.items()}
        fused = space.fuses and table.fused > _GAIN * table.full[0]
        self._base = space.idle.replace(full_steps="fused" if fused else "exact")

    # --- costs and errors -----------------------------------------------------------------------

    def plan(self, config: ToCaConfig) -> Plan:
        return self.probe.shapes.plan(config, self.steps)

    def cost(self, config: ToCaConfig) -> float:
        """As planned, over that of the untouched run."""
        return self.table.relative(self.plan(config), config)

    # --- full steps -----------------------------------------------------------------------------

    @functools.cached_property
    def _longest(self) -> int:
        return schedule.reach(self.steps)

    @functools.cache  # noqa: B019  (one for each run of the tuner)
    def _gaps(self, order: int, slope: float) -> schedule.Floats:
        weights = schedule.importance(self.steps, slope)
        return schedule.gap_errors(self._errors(order), weights)

    @functools.cache  # noqa: B019
    def _errors(self, order: int) -> schedule.Floats:
        return schedule.mean_errors(self._gram, order, self._longest)

    @functools.cache  # noqa: B019
    def schedules(self, order: int, slope: float) -> list[tuple[int, ...]]:
        """The best one by the additive model for every number of full steps, few ones first."""
        found = schedule.best_full_steps(self._gaps(order, slope))
        return [one for one in found if one is not None]

    def error(self, full: Sequence[int], order: int) -> float:
        """Of a schedule, by the additive model: the sum over what lies between its full steps."""
        gaps, total = self._gaps(order, 0.0), 0.0
        for at, (f, stop) in enumerate(zip(full, [*full[1:], self.steps], strict=True)):
            h = f - full[at - 1] if at else 0
            if max(h, stop - f) > self._longest:
                return math.inf
            total += float(gaps[h, f, stop - f])
        return total

    def scheduled(
        self, config: ToCaConfig, slope: float, limit: float, *, spread: bool = False
    ) -> ToCaConfig:
        """With as many full steps as the limit of cost allows; `spread` distributes the tokens."""
        known = self.schedules(config.forecast, slope)

        def placed(at: int) -> ToCaConfig:
            one = config.replace(full_at=known[at], step_ratio=(1.0,) * self.steps)
            return self.spread(one) if spread and one.fresh_ratio else one

        low, high = 0, len(known) - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.cost(placed(middle)) <= limit:
                low = middle
            else:
                high = middle - 1
        return placed(low)

    # --- tokens ---------------------------------------------------------------------------------

    def spread(self, config: ToCaConfig) -> ToCaConfig:
        """The same amount of tokens, by error per cost: more where what is stale is more wrong.

        Step and layer factors are proportional to the relative error there, mean 1; the module
        factors to the errors per cost, the largest 1, and 0 below a quarter of it.
        """
        assert config.full_at is not None
        each = schedule.schedule_errors(self._gram, config.forecast, config.full_at)
        first, errors = 0, {}
        for name, layers in self._every.items():
            errors[name] = each[first : first + layers]
            first += layers
        worth = {name: self._worth(name, errors[name]) for name in self.space.modules}
        most = max(worth.values(), default=0.0)
        if most <= 0:
            return config
        chosen = {name: one / most for name, one in worth.items() if one >= most / 4}
        mine = np.concatenate([errors[name] for name in chosen])
        return config.replace(
            step_ratio=_factors(mine.mean(axis=0)),
            layer_ratio={name: _factors(errors[name].mean(axis=1)) for name in chosen},
            module_ratio={name: round(one, 3) for name, one in chosen.items()},
        )

    def _worth(self, name: str, errors: schedule.Floats) -> float:
        """Error that is saved per cost."""
        points = self.table.extra.get(name, ())
        cost = points[-1][1] / points[-1][0] if points else 0.0
        return float(errors.sum()) / cost if cost > 0 else float(errors.sum())

    # --- the first ones -------------------------------------------------------------------------

    def first(self, limits: Sequence[float]) -> list[ToCaConfig]:
        """A grid over orders, weights, ratios, selectors and gates for these costs, best guesses
        first."""
        found: list[ToCaConfig] = []
        for slope in _SLOPES:
            for limit in limits:
                for order in (1, 2, 0):
                    one = self._base.replace(forecast=order)
                    found.append(self.scheduled(one, slope, limit))
            if slope == 0:
                found.extend(self._gated())
        for limit in limits:
            found.extend(self._recomputing(limit))
        return list(dict.fromkeys(found))

    def _recomputing(self, limit: float) -> Iterator[ToCaConfig]:
        if not self.space.modules:
            return
        for ratio in _FIRST_RATIOS:
            for selector in self.space.selectors[:2]:
                for order in (1, 0):
                    for every in (1, 2):
                        one = self.selecting(
                            self._base, fresh_ratio=ratio, selector=selector, forecast=order
                        ).replace(fresh_every=every)
                        yield self.scheduled(one, 0.0, limit, spread=every == 1)

    def _gated(self) -> Iterator[ToCaConfig]:
        """The first block decides; the first steps are full, so that a forecast is under way.

        Nobody selects, but a gated step leaves scores wherever the selector has some: not "random".
        """
        for order in (1, 0):
            for threshold in _THRESHOLDS:
                yield self._base.replace(
                    selector="random",
                    forecast=order,
                    full_at=tuple(range(min(order + 1, self.steps))),
                    step_ratio=(1.0,) * self.steps,
                    residual_threshold=threshold,
                )

    def selecting(self, config: ToCaConfig, **changes: Any) -> ToCaConfig:
        """With tokens recomputed in all modules that can; scores in place of no selection."""
        changes.setdefault("selector", config.selector)
        if changes["selector"] == "similarity":
            changes["full_steps"] = "exact"
        if not any(config.module_ratio.get(name) for name in self.space.modules):
            changes.setdefault("module_ratio", dict.fromkeys(self.space.modules, 1.0))
        return config.replace(**changes)

    # --- neighbours -----------------------------------------------------------------------------

    def neighbours(self, config: ToCaConfig) -> list[ToCaConfig]:
        """Settings that differ in one thing: a full step, order, ratio, selector or gate."""
        found = [*self._moved(config), *self._changed(config)]
        return [one for one in dict.fromkeys(found) if one != config and self._valid(one)]

    def _valid(self, config: ToCaConfig) -> bool:
        try:
            self.plan(config)
        except ValueError:
            return False
        return True

    def _moved(self, config: ToCaConfig) -> Iterator[ToCaConfig]:
        """One full step less, one more, or one elsewhere: nearby, or where the model likes it."""
        full = config.full_at
        if full is None:
            return
        others = [step for step in range(1, self.steps) if step not in full]
        for step in full[1:]:
            yield config.replace(full_at=tuple(set(full) - {step}))
        for step in others:
            yield config.replace(full_at=(*full, step))
        swaps = [
            (
                self.error(tuple(sorted({*full, new} - {old})), config.forecast),
                abs(new - old),
                new,
                old,
            )
            for old in full[1:]
            for new in others
        ]
        near = [one for one in swaps if one[1] == 1]
        for *_, new, old in dict.fromkeys([*near, *sorted(swaps)[:_SWAPS]]):
            yield config.replace(full_at=tuple({*full, new} - {old}))

    def _changed(self, config: ToCaConfig) -> Iterator[ToCaConfig]:
        for order in ORDERS:
            if config.cache_dtype is None:
                yield config.replace(forecast=order)
        for ratio in _beside(_RATIOS, config.fresh_ratio) if self.space.modules else ():
            if ratio:
                yield self.selecting(config, fresh_ratio=ratio)
            else:
                yield config.replace(fresh_ratio=0.0)
        if config.residual_threshold is not None:
            for factor in (0.6, 0.8, 1.25, 1.6):
                at = round(config.residual_threshold * factor, 4)
                yield config.replace(residual_threshold=at)
        if not config.fresh_ratio:
            return
        for selector in self.space.selectors:
            yield self.selecting(config, selector=selector)
        for every in _EVERY:
            yield config.replace(fresh_every=every)
        for weight in _AGES:
            yield config.replace(age_weight=weight)
        if config.full_at is not None:
            yield self.spread(config)
            yield config.replace(
                step_ratio=(1.0,) * self.steps,
                layer_ratio={},
                module_ratio=dict.fromkeys(self.space.modules, 1.0),
            )


def _beside(levels: Sequence[float], at: float) -> list[float]:
    """The next lower and the next higher one."""
    return [*[one for one in levels if one < at][-1:], *[one for one in levels if one > at][:1]]


def _factors(errors: schedule.Floats) -> tuple[float, ...]:
    """Proportional to the errors, mean 1 over those that are not 0."""
    some = errors[errors > 0]
    mean = float(some.mean()) if len(some) else 1.0
    return tuple(round(min(float(one) / mean, _MOST), 3) for one in errors)
