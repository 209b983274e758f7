"""Seconds of every setting, measured in turns on one small batch.

Quality may be sampled while the machine is busy; time may not.  In each round every setting runs
once, and what counts is its ratio to the untouched model in the same round: a drift of the machine
meets both.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..sampling.sampler import Request, Sampler
from ..storing import whole
from .generation import sampling_with
from .settings import Setting

Round = dict[str, float]  # setting's mark -> seconds


@dataclass(frozen=True)
class Times:
    """What was measured of one setting.

    Attributes:
        seconds: of a sample, median over the rounds.
        speedup: seconds of the untouched model over its own, median over the rounds.
        slowest, fastest: the speed-ups of the worst and of the best round.
        rounds: how many.
    """

    seconds: float
    speedup: float
    slowest: float
    fastest: float
    rounds: int


class Rounds:
    """Rounds of measurements in a file, which grows by one round at a time.

    Args:
        path: the file.
        about: a fingerprint of what all times depend on; a file of another one is begun anew.
        marks: setting -> what its times are kept under; the first one is the untouched model.
    """

    def __init__(self, path: Path, about: str, marks: Mapping[Setting, str]) -> None:
        self._path = path
        self._about = about
        self._marks = dict(marks)
        self._base = next(iter(marks))
        self._rounds = self._read()

    def _read(self) -> list[Round]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if found["about"] == self._about:
                return [
                    {str(mark): float(seconds) for mark, seconds in one.items()}
                    for one in found["rounds"]
                ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # none yet, or one that was spoilt
        return []

    def missing(self, setting: Setting, rounds: int) -> int:
        """How many rounds a setting lacks."""
        return max(0, rounds - len(self._pairs(setting)))

    def _pairs(self, setting: Setting) -> list[tuple[float, float]]:
        """(seconds of the untouched model, its own) in the rounds that have both."""
        base, mark = self._marks[self._base], self._marks[setting]
        return [(one[base], one[mark]) for one in self._rounds if base in one and mark in one]

    def measure(
        self,
        sampler: Sampler,
        requests: Sequence[Request],
        *,
        seed: int,
        rounds: int,
        progress: Callable[[int], object],
    ) -> None:
        """Measure until every setting has been in as many rounds; the first one is not counted.

        It loads kernels and maps memory.  Each round begins with another setting.
        """
        warm = False
        while True:
            lacking = [one for one in self._marks if self.missing(one, rounds)]
            if not lacking:
                return
            turn = lacking if self._base in lacking else [self._base, *lacking]
            shift = len(self._rounds) % len(turn)
            found: Round = {}
            for setting in turn[shift:] + turn[:shift]:
                found[self._marks[setting]] = _seconds(sampler, setting, requests, seed)
                progress(1)
            if warm:
                self._rounds.append(found)
                whole.save_json(self._path, {"about": self._about, "rounds": self._rounds})
            warm = True

    def turns(self, rounds: int) -> int:
        """How many runs `measure` will take."""
        lacking = {one: self.missing(one, rounds) for one in self._marks}
        longest = max(lacking.values())
        if not longest:
            return 0
        own = sum(count for one, count in lacking.items() if one is not self._base)
        first = sum(1 for one, count in lacking.items() if count and one is not self._base)
        return own + first + longest + 1

    def times(self, setting: Setting, samples: int) -> Times | None:
        """What was measured of a setting, of as many samples at a time; None if nothing was."""
        pairs = self._pairs(setting)
        if not pairs:
            return None
        ratios = [base / own for base, own in pairs]
        return Times(
            seconds=statistics.median(own for _, own in pairs) / samples,
            speedup=statistics.median(ratios),
            slowest=min(ratios),
            fastest=max(ratios),
            rounds=len(pairs),
        )


def _seconds(sampler: Sampler, setting: Setting, requests: Sequence[Request], seed: int) -> float:
    """Of one run, from the call of the sampler until its pictures are on the CPU."""
    with sampling_with(sampler, setting), torch.no_grad():
        started = time.perf_counter()
        sampler.sample(requests, seed=seed, steps=setting.steps)
        return time.perf_counter() - started
