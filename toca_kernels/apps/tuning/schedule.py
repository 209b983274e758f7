"""Which steps to run in full: the errors of stale outputs, and the schedule with the least of them.

What is reused of a module in step s = f + d, where steps f, f − h and f − 2h were full, is a sum of
what it returned in those (Taylor's polynomial of finite differences, as `ForecastCache` has it):

    order 0:  y_f
    order 1:  y_f + (d/h) (y_f − y_{f−h})
    order 2:  the same + (d²/2h²) (y_f − 2 y_{f−h} + y_{f−2h})

so its squared error follows from inner products of outputs of a full run, without another run.
(The full steps before the last two are taken to be as far apart as those.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_WORST = 4.0  # a relative squared error counts no more: what is that wrong is of no use at all
_WHOLE = 64  # steps up to which every gap is looked at
_REACH = 40  # gaps of longer runs


def reach(steps: int) -> int:
    """The longest gap between full steps that is looked at."""
    return steps if steps <= _WHOLE else _REACH


def stale_error(gram: Floats, order: int, h: int, f: int, s: Floats | int) -> Floats:
    """Relative squared errors (modules, len(s)) in steps s of what is reused of step f.

    Args:
        gram: (modules, steps, steps) inner products of outputs.
        order: of the forecast; a lower one where there are not as many full steps.
        h: distance of the full steps before; 0: f was the first.
        f: the last full step.
        s: steps to look at.
    """
    at = np.atleast_1d(np.asarray(s, dtype=np.int64))
    d = (at - f).astype(np.float64)
    order = min(order, 0 if h == 0 else 1 if f - 2 * h < 0 else 2)
    one = d / h if order else 0 * d
    two = d**2 / (2 * h**2) if order == 2 else 0 * d
    past = [f, f - h, f - 2 * h][: order + 1]
    c = np.stack([1 + one + two, -one - 2 * two, two])[: order + 1]
    own = gram[:, at, at]
    mixed = np.einsum("is,mis->ms", c, gram[:, past][:, :, at])
    past_gram = gram[:, past][:, :, past]
    squared = own - 2 * mixed + np.einsum("is,mij,js->ms", c, past_gram, c)
    relative = squared / np.maximum(own, np.finfo(np.float64).tiny)
    return np.clip(relative, 0.0, _WORST)


def stack(grams: Mapping[str, Floats]) -> Floats:
    """(modules × layers, steps, steps) of all modules."""
    return np.concatenate([grams[name] for name in grams])


def mean_errors(gram: Floats, order: int, longest: int) -> Floats:
    """(h, f, d): mean over the modules of `stale_error` in step f + d, where f − h was full.

    Row h = 0 is for a first full step; NaN where there is no such step.
    """
    steps = gram.shape[1]
    found = np.full((longest + 1, steps, longest + 1), np.nan)
    for f in range(steps):
        after = np.arange(f + 1, min(f + longest, steps))
        for h in range(min(longest, f) + 1):
            if order == 0 and h > 0:
                found[h, f] = found[0, f]
            else:
                found[h, f, after - f] = stale_error(gram, order, h, f, after).mean(axis=0)
    return found


def gap_errors(errors: Floats, weights: Floats) -> Floats:
    """(h, f, g): weighted sums of `mean_errors` over the steps between f and f + g.

    Infinite where f − h or f + g is no step; f + g = steps is the end of the run.

    Args:
        errors: (h, f, d).
        weights: (steps,): how much an error in a step counts.
    """
    longest, steps = errors.shape[0] - 1, errors.shape[1]
    found = np.full_like(errors, np.inf)
    for f in range(steps):
        last = min(longest, steps - f)
        each = errors[:, f, 1:last] * weights[f + 1 : f + last]
        found[:, f, 1] = 0.0
        found[:, f, 2 : last + 1] = np.cumsum(each, axis=1)
        found[min(longest, f) + 1 :, f] = np.inf
    return found


def best_full_steps(gaps: Floats) -> list[tuple[int, ...] | None]:
    """The full steps with the least error, step 0 among them: 1 of them, 2 of them, and so on.

    None where the gaps are too short for so few.  Dynamic programming over (distance of the last
    two full steps, last full step), V_1(0, 0) = 0:

        V_{i+1}(g, f + g) = min over h of V_i(h, f) + E(h, f, g)

    and a run of i full steps ends with the least V_i(h, f) + E(h, f, steps − f).

    Args:
        gaps: (h, f, g), of `gap_errors`.
    """
    longest, steps = gaps.shape[0] - 1, gaps.shape[1]
    ends = np.full((longest + 1, steps), np.inf)
    for f in range(max(0, steps - longest), steps):
        ends[:, f] = gaps[:, f, steps - f]
    value = np.full((longest + 1, steps), np.inf)
    value[0, 0] = 0.0
    choices: list[NDArray[np.int64]] = []
    found: list[tuple[int, ...] | None] = []
    while True:
        whole = value + ends
        h, last = divmod(int(whole.argmin()), steps)
        found.append(_traced(choices, h, last) if np.isfinite(whole[h, last]) else None)
        if len(found) == steps:
            return found
        after, chosen = np.full_like(value, np.inf), np.zeros(value.shape, dtype=np.int64)
        for f in range(steps - 1):
            totals = value[:, f, None] + gaps[:, f]  # (h, g)
            best = totals.argmin(axis=0)
            g = np.arange(1, min(longest, steps - 1 - f) + 1)
            after[g, f + g], chosen[g, f + g] = totals[best[g], g], best[g]
        choices.append(chosen)
        value = after


def _traced(choices: Sequence[NDArray[np.int64]], h: int, f: int) -> tuple[int, ...]:
    """The full steps up to f, the one before it at f − h."""
    found = [f]
    for chosen in reversed(choices):
        h, f = int(chosen[h, f]), f - h
        found.append(f)
    return tuple(reversed(found))


def importance(steps: int, slope: float) -> Floats:
    """(steps,) weights exp(slope · u), u from −1 in the first step to 1 in the last."""
    return np.exp(slope * np.linspace(-1.0, 1.0, steps))


def schedule_errors(gram: Floats, order: int, full: Sequence[int]) -> Floats:
    """(modules, steps) relative squared errors of a schedule that recomputes nothing else."""
    steps = gram.shape[1]
    found = np.zeros((len(gram), steps))
    stops = [*full[1:], steps]
    for at, (f, stop) in enumerate(zip(full, stops, strict=True)):
        between = np.arange(f + 1, stop)
        if len(between):
            h = f - full[at - 1] if at else 0
            found[:, between] = stale_error(gram, order, h, f, between)
    return found
