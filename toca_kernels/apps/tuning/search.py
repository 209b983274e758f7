"""The search: many settings on a few samples, the better ones on more, then their neighbours."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...config import ToCaConfig
from ..evaluation.pareto import front
from .space import Candidates
from .trials import Score

PARTS = ("few", "more", "rest")  # of the samples that tune; each setting sees them in this order
_KEPT = 3  # one in so many goes on to more samples
_STARTS = 3  # settings whose neighbours are tried
_LEVELS = (1.15, 1.4, 1.8, 2.4, 3.2, 4.2)  # speed-ups to begin with, where a quality is asked for
_SLACK = 1.001  # a cost that meets a limit, but for rounding


@dataclass(frozen=True)
class Goal:
    """What is wanted: the best quality at a cost, or the least cost at a quality.

    Attributes:
        kind: "cost": at most `limit` of the untouched run; "psnr" or "ssim": a mean of at least
            `limit`.
    """

    kind: Literal["cost", "psnr", "ssim"]
    limit: float

    def rank(self, score: Score) -> tuple[bool, float]:
        """Better settings have the larger rank: those that meet the limit, then the others."""
        if self.kind == "cost":
            meets = score.cost <= self.limit * _SLACK
            return meets, score.mean_psnr if meets else -score.cost
        quality = score.mean_psnr if self.kind == "psnr" else score.mean_ssim
        if quality is None:
            raise ValueError(
                "min-ssim: expected torchmetrics, and pictures of at least 11×11 pixels"
            )
        meets = quality >= self.limit
        return meets, -score.cost if meets else quality

    def meets(self, score: Score) -> bool:
        return self.rank(score)[0]

    def levels(self) -> tuple[float, ...]:
        """Costs to begin with."""
        return (self.limit,) if self.kind == "cost" else tuple(1 / one for one in _LEVELS)


@dataclass
class Search:
    """Halving, then climbing; every decision follows from scores and the seed.

    Attributes:
        candidates: makes settings.
        run: the score of a setting on one of PARTS.
        goal: what is wanted.
        trials: how many runs it may take.
        seed: of the order in which neighbours are tried.
        stop: says when the time is over.
        found: {setting: its scores on the parts so far}.
    """

    candidates: Candidates
    run: Callable[[ToCaConfig, str], Score]
    goal: Goal
    trials: int
    seed: int = 0
    stop: Callable[[], bool] = lambda: False
    found: dict[ToCaConfig, list[Score]] = field(default_factory=dict)
    taken: int = 0

    def score(self, config: ToCaConfig, parts: int) -> Score | None:
        """On so many parts; None where runs or time do not last."""
        held = self.found.setdefault(config, [])
        while len(held) < parts:
            if self.taken >= self.trials or self.stop():
                return None
            held.append(self.run(config, PARTS[len(held)]))
            self.taken += 1
        return Score.joined(held[:parts])

    def search(self, given: Sequence[ToCaConfig] = ()) -> ToCaConfig:
        """The best setting; `given` ones are candidates beside its own.

        Raises:
            ValueError: not enough runs or time to see one setting on all samples.
        """
        first = self.candidates.first(self.goal.levels())
        ranked = self._halve(list(dict.fromkeys([*given, *first])))
        for start in ranked[:_STARTS]:
            self._climb(start)
        return self.best()

    def best(self) -> ToCaConfig:
        """The best setting of those that were seen on all samples; ValueError if none was."""
        best = self.whole()
        if not best:
            what = "minutes" if self.stop() else "trials"
            raise ValueError(f"{what}: expected enough to run one setting on all samples")
        return max(best, key=lambda config: self.goal.rank(best[config]))

    def whole(self) -> dict[ToCaConfig, Score]:
        """Those that were seen on all samples."""
        return {
            config: Score.joined(scores)
            for config, scores in self.found.items()
            if len(scores) == len(PARTS)
        }

    def front(self) -> list[tuple[ToCaConfig, Score]]:
        """Those of `whole` that no other one beats in cost and PSNR, by cost."""
        every = list(self.whole().items())
        best = front([(1 / one.cost, one.mean_psnr) for _, one in every], lower=False)
        return sorted((every[at] for at in best), key=lambda pair: pair[1].cost)

    # --- its parts ------------------------------------------------------------------------------

    def _halve(self, configs: list[ToCaConfig]) -> list[ToCaConfig]:
        """All on few samples, the better third on more, the best of these on all; best first."""
        # Half of the runs are left for the neighbours.
        alive = configs[: max(1, self.trials // 2 - 2 * _STARTS)]
        for parts in range(1, len(PARTS) + 1):
            scored = [(config, self.score(config, parts)) for config in alive]
            known = [(config, one) for config, one in scored if one is not None]
            known.sort(key=lambda pair: self.goal.rank(pair[1]), reverse=True)
            if not known:
                break
            alive = [config for config, _ in known]
            if parts < len(PARTS):
                alive = alive[: max(_STARTS, len(alive) // _KEPT)]
        return alive

    def _climb(self, config: ToCaConfig) -> None:
        """To a better neighbour while there is one: better on few samples, on more and on all."""
        order = random.Random(self.seed)
        best: ToCaConfig | None = config
        while best is not None:
            around = self.candidates.neighbours(best)
            order.shuffle(around)
            at = best
            worth = (one for one in around if self._worth(one, at))
            best = next((one for one in worth if self._beats(one, at)), None)

    def _worth(self, config: ToCaConfig, best: ToCaConfig) -> bool:
        """Whether a run can show a gain, as far as plans tell."""
        if self.taken >= self.trials or self.stop():
            return False
        if config.residual_threshold is not None or best.residual_threshold is not None:
            return True
        cost, own = self.candidates.cost(config), self.candidates.cost(best)
        if self.goal.kind == "cost":
            return cost <= self.goal.limit * _SLACK and not _less(config, best)
        whole = self.score(best, len(PARTS))
        meets = whole is not None and self.goal.meets(whole)
        return cost < own if meets else not _less(config, best)

    def _beats(self, config: ToCaConfig, best: ToCaConfig) -> bool:
        for parts in range(1, len(PARTS) + 1):
            mine, theirs = self.score(config, parts), self.score(best, parts)
            if mine is None or theirs is None or self.goal.rank(mine) <= self.goal.rank(theirs):
                return False
        return True


def _less(config: ToCaConfig, best: ToCaConfig) -> bool:
    """Whether it only leaves full steps out."""
    if config.full_at is None or best.full_at is None:
        return False
    return set(config.full_at) < set(best.full_at) and config.forecast == best.forecast


def deadline(minutes: float | None) -> Callable[[], bool]:
    """Says whether so many minutes have passed since now."""
    started = time.monotonic()
    return lambda: minutes is not None and time.monotonic() - started > 60 * minutes


def split(count: int) -> tuple[int, ...]:
    """Sizes of PARTS: a quarter, a quarter and the rest of the samples, none of them empty."""
    few = max(1, count // 4)
    return few, few, count - 2 * few
