"""The table of costs in seconds: steps of all kinds, timed in rounds."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...config import ToCaConfig
from ...session import Session
from ..evaluation.generation import sampling_with
from ..evaluation.settings import Setting
from ..measuring.watch import Watch
from ..sampling.sampler import Request, Sampler
from .cost import ORDERS, RATIOS, CostTable, growing, with_seconds
from .space import Space

_STEPS = 8  # of a run that is timed
_FULL = (0, 1, 2, 5)  # of these; three in a row, so that a forecast of order 2 is under way
_RATIO = 0.25  # at which the scores of a selector are timed


@dataclass
class Seconds:
    """Of a step, the median of a run, and of what lies outside of them; one for each round."""

    full: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)


def variants(space: Space) -> dict[str, ToCaConfig]:
    """The runs from which the table follows, by the name of what they tell."""
    base = space.idle.replace(full_at=_FULL, step_ratio=None)
    found = {f"order {order}": base.replace(forecast=order) for order in ORDERS}
    for name in space.modules:
        for ratio in RATIOS:
            found[f"{name} {ratio}"] = base.replace(
                selector="random", fresh_ratio=ratio, module_ratio={name: 1.0}
            )
    if space.modules:
        for selector in space.selectors:
            found[f"scores {selector}"] = base.replace(
                selector=selector, fresh_ratio=_RATIO, module_ratio={space.modules[-1]: 1.0}
            )
    if space.fuses:
        found["fused"] = base.replace(full_steps="fused")
    return found


def measure(
    sampler: Sampler,
    requests: Sequence[Request],
    space: Space,
    counted: CostTable,
    *,
    seed: int,
    steps: int,
    rounds: int,
    progress: Callable[[int], object],
) -> CostTable:
    """Time every variant once in each round, the untouched model among them."""
    kinds = variants(space)
    seconds = {name: Seconds() for name in kinds}
    untouched = Seconds()
    for turn in range(rounds + 1):
        for name, config in [("", None), *kinds.items()]:
            into = Seconds() if turn == 0 else seconds.get(name, untouched)  # the first one warms
            setting = Setting(name, name, config, steps if config is None else _STEPS)
            _time(sampler, setting, requests, seed, into)
            progress(1)
    return table(counted, seconds, untouched)


def runs(space: Space, rounds: int) -> int:
    """How many runs `measure` takes."""
    return (1 + len(variants(space))) * (rounds + 1)


def table(counted: CostTable, seconds: Mapping[str, Seconds], untouched: Seconds) -> CostTable:
    """The costs that follow, whose names are those of `variants`.

    Medians of ratios, since the machine drifts: of full steps to the untouched ones of the same
    round, of cached steps to the full ones of the same run.
    """
    base = statistics.median(untouched.full)

    def full(name: str) -> float:
        return base * _ratio(seconds[name].full, untouched.full)

    def cached(name: str, whole: float) -> float:
        return whole * _ratio(seconds[name].cached, seconds[name].full)

    fulls = [full(f"order {order}") for order in ORDERS]
    reused = [cached(f"order {order}", fulls[order]) for order in ORDERS]
    extra: dict[str, list[tuple[float, float]]] = {}
    scores, fused = {}, 0.0
    for name in seconds:
        kind, _, what = name.partition(" ")
        if kind == "scores":
            scores[what] = max(0.0, full(name) - fulls[0])
        elif kind == "fused":
            fused = max(0.0, fulls[0] - full(name))
        elif kind != "order":
            more = cached(name, fulls[0]) - reused[0]
            extra.setdefault(kind, []).append((float(what), more))
    return with_seconds(
        counted,
        outside=base * _ratio(untouched.outside, untouched.full),
        untouched=base,
        full=tuple(fulls),
        cached=tuple(reused),
        extra={name: growing(points) for name, points in extra.items()},
        scores=scores,
        fused=fused,
    )


def _ratio(some: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(some, others, strict=True))


def _time(
    sampler: Sampler, setting: Setting, requests: Sequence[Request], seed: int, into: Seconds
) -> None:
    """One run; its steps go to `into`, but the first, which carries what is done once."""
    with sampling_with(sampler, setting) as session, contextlib.ExitStack() as stack:
        sessions = [] if session is None else [session, *session.others]
        found = [one.model for one in sessions] or _models(sampler.target)
        watches = [stack.enter_context(Watch(model).watching()) for model in found]
        started = time.perf_counter()
        with torch.no_grad():
            sampler.sample(requests, seed=seed, steps=setting.steps)
        whole = time.perf_counter() - started
        into.outside.append(max(0.0, whole - sum(sum(watch.seconds) for watch in watches)))
        if not sessions:
            calls = [seconds for watch in watches for seconds in watch.seconds]
            into.full.append(statistics.median(calls) * len(calls) / setting.steps)
            return
        pairs = [_sorted(one, watch) for one, watch in zip(sessions, watches, strict=True)]
        into.full.append(statistics.median(one for full, _ in pairs for one in full))
        into.cached.append(statistics.median(one for _, cached in pairs for one in cached))


def _sorted(session: Session, watch: Watch) -> tuple[list[float], list[float]]:
    """(full, cached) steps of one model, but the first; of guidance in calls of its own, both."""
    branches = [b for b in session._run.branches.values() if b.done.seconds]
    found: tuple[list[float], list[float]] = ([], [])
    for step, full in enumerate(branches[0].done.full_steps() if branches else ()):
        calls = watch.seconds[step * len(branches) : (step + 1) * len(branches)]
        if step:
            found[0 if full else 1].append(sum(calls))
    return found


def _models(target: object) -> list[torch.nn.Module]:
    if isinstance(target, torch.nn.Module):
        return [target]
    named = (getattr(target, name, None) for name in ("transformer", "transformer_2"))
    return [model for model in named if isinstance(model, torch.nn.Module)]
