"""The last word on time: the best settings timed in turns, and the first that keeps the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...config import ToCaConfig
from ..evaluation.rounds import Rounds, Times
from ..evaluation.settings import UNTOUCHED, Setting
from ..sampling.sampler import Request, Sampler
from .search import Search
from .state import State

TUNED = "tuned"
_SHORT = 3  # settings that are timed: the best one, and the next cheaper ones of the front


def shortlist(search: Search, best: ToCaConfig) -> list[ToCaConfig]:
    """The best, then what none beats among the cheaper ones, the dearest first."""
    cost = search.whole()[best].cost
    cheaper = [config for config, score in search.front() if score.cost < cost and config != best]
    return [best, *reversed(cheaper)][:_SHORT]


def confirm(
    search: Search,
    best: ToCaConfig,
    others: Sequence[Setting],
    sampler: Sampler,
    requests: Sequence[Request],
    state: State,
    *,
    seed: int,
    steps: int,
    rounds: int,
    wanted: tuple[str, float] | None,
    started: Callable[[int], object],
    progress: Callable[[int], object],
) -> tuple[Setting, Mapping[Setting, Times], float]:
    """The setting to write, the times of it and of the others, and how much of the budget's speed
    it has: 1 where the budget is kept.

    Args:
        search: what was found.
        best: by the table of costs.
        others: to compare with.
        sampler, requests, seed, steps, rounds: what is timed; no rounds: nothing is.
        state: where the rounds are kept.
        wanted: ("speedup", x), ("seconds", s of a sample), or ("against", _): as fast as the first
            of the others in the same rounds; None takes the best.
        started, progress: are told how many runs there are, and of each that is done.
    """
    if not rounds:
        return Setting(TUNED, TUNED, best, steps), {}, 1.0
    listed = shortlist(search, best) if wanted else [best]
    timed = [Setting(f"{TUNED} {n}" if n else TUNED, TUNED, c, steps) for n, c in enumerate(listed)]
    base = Setting(UNTOUCHED, UNTOUCHED, None, steps)
    marks = {one: one.fingerprint() for one in (base, *timed, *others)}
    held = Rounds(state.times, state.mark, marks)
    started(held.turns(rounds))
    held.measure(sampler, requests, seed=seed, rounds=rounds, progress=progress)
    found = {one: held.times(one, len(requests)) for one in marks}
    times = {one: measured for one, measured in found.items() if measured is not None}
    limit = times[others[0]].speedup if wanted and wanted[0] == "against" else None
    shares = {one: share(times[one], wanted, limit) for one in timed}
    fitting = [one for one in timed if shares[one] >= 1]
    chosen = fitting[0] if fitting else max(timed, key=lambda one: shares[one])
    named = Setting(TUNED, TUNED, chosen.config, steps)
    return named, {**times, named: times[chosen]}, min(1.0, shares[chosen])


def share(times: Times, wanted: tuple[str, float] | None, limit: float | None) -> float:
    """Speed over what is wanted, at least 1 if it keeps that; `limit`: the other's speed-up."""
    if wanted is None:
        return 1.0
    kind, value = wanted
    if kind == "seconds":
        return value / times.seconds
    return times.speedup / (value if limit is None else limit)
