"""What the tuner found, in tables and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...config import ToCaConfig
from ..evaluation.rounds import Times
from ..measuring import timing
from . import schedule
from .cost import ORDERS, RATIOS, CostTable
from .probe import Gram, Probe
from .search import Goal
from .trials import Score

_GAPS = (1, 2, 4)  # steps that a module's output is reused for


@dataclass(frozen=True)
class Line:
    """One setting of the comparison at the end.

    Attributes:
        name: "tuned", or what --against said.
        config: the setting.
        held_out: its score on samples that were not tuned on.
        times: measured in turns with the others; None where nothing was timed.
    """

    name: str
    config: ToCaConfig
    held_out: Score
    times: Times | None

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **quality(self.held_out),
            "flops ratio": 1 / self.held_out.flops,
            "expected speed-up": 1 / self.held_out.cost,
            "speed-up": None if self.times is None else self.times.speedup,
            "seconds": None if self.times is None else self.times.seconds,
        }


@dataclass(frozen=True)
class Findings:
    """All that is reported.

    Attributes:
        steps: of a run.
        goal: what was wanted.
        table: what steps cost.
        probe: what the full runs showed.
        modules: those that can recompute some of their tokens.
        front: settings that no other beats, on the samples that tune.
        lines: the tuned settings, then those they are compared with.
        met: whether the goal is.
    """

    steps: int
    goal: Goal
    table: CostTable
    probe: Probe
    modules: Sequence[str]
    front: Sequence[tuple[ToCaConfig, Score]]
    lines: Sequence[Line]
    met: bool

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        front = zip(front_rows(self.front), self.front, strict=True)
        return {
            "steps": self.steps,
            "budget": {"kind": self.goal.kind, "limit": self.goal.limit, "met": self.met},
            "costs": self.table.to_dict(),
            "sensitivity": {
                name: one_step(gram).round(6).tolist() for name, gram in self.probe.grams.items()
            },
            "front": [{**row, "config": config.to_dict()} for row, (config, _) in front],
            "compared": [{**line.row(), "config": line.config.to_dict()} for line in self.lines],
        }

    def __str__(self) -> str:
        table, compared = self.table, [line.row() for line in self.lines]
        unit = {"step": "", table.unit: ".3g", "of untouched": ".1%"}
        errors = sensitivities(self.probe.grams)
        shares = {name: ".1%" for name in errors[0] if "order" in name}
        count = len(self.lines[0].held_out.psnr)
        parts = {
            "What steps cost": printed(costs(table, self.modules), unit),
            "Relative error of what is reused for 1, 2 and 4 steps": printed(errors, shares),
            "Settings that none beats, on the samples that tune": printed(front_rows(self.front)),
            f"On {count} other samples": printed(compared),
        }
        text = "".join(f"{title}\n\n{body}\n\n" for title, body in parts.items())
        chosen = described(self.lines[0].config)
        return f"{text}chosen    {chosen}\nbudget    {self.verdict}"

    @property
    def verdict(self) -> str:
        """Whether the budget is kept, in words."""
        goal, limit = self.goal, f"{self.goal.limit:g}"
        wanted = (
            f"{goal.limit:.1%} of the untouched run's {self.table.unit}"
            if goal.kind == "cost"
            else f"{goal.kind.upper()} of {limit}"
        )
        if not self.met:
            return f"NOT MET: {wanted}; these are the nearest settings that were found"
        if goal.kind != "cost" and not goal.meets(self.lines[0].held_out):
            return f"met on the samples that tune, but not on the others: {wanted}; ask for more"
        return f"met: {wanted}"


def quality(score: Score) -> dict[str, Any]:
    """Means over the samples, and the standard error of the PSNR's."""
    count = len(score.psnr)
    error = statistics.stdev(score.psnr) / math.sqrt(count) if count > 1 else None
    return {"psnr": score.mean_psnr, "±": error, "ssim": score.mean_ssim}


# --- tables --------------------------------------------------------------------------------------


def costs(table: CostTable, modules: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each kind of step, its cost over that of an untouched one; of these modules."""
    rows = [("untouched", table.untouched)]
    rows += [(f"full, forecast of order {order}", table.full[order]) for order in ORDERS]
    if table.fused:
        rows.append(("full, fused", table.full[0] - table.fused))
    rows += [(f"full, leaves {name} scores", table.full[0] + c) for name, c in table.scores.items()]
    rows += [(f"cached, forecast of order {order}", table.cached[order]) for order in ORDERS]
    for name in modules:
        for ratio, cost in table.extra.get(name, ()):
            if ratio in RATIOS:
                rows.append((f"cached, {name} k/N = {ratio:.3g}", table.cached[0] + cost))
    return [
        {"step": name, table.unit: cost, "of untouched": cost / table.untouched}
        for name, cost in rows
    ]


def sensitivities(grams: Mapping[str, Gram]) -> list[dict[str, Any]]:
    """Relative error of each module's output after 1, 2 and 4 steps of reuse, by order, and the
    layer and the step where one step of plain reuse does most harm."""
    rows = []
    for name, gram in grams.items():
        row: dict[str, Any] = {"module": name}
        for order in ORDERS:
            for gap in _GAPS:
                row[f"{gap}, order {order}"] = _error(gram, order, gap)
        one = one_step(gram)
        row["worst layer"] = int(one.mean(axis=1).argmax()) if one.size else None
        row["worst step"] = int(one.mean(axis=0).argmax()) + 1 if one.size else None
        rows.append(row)
    return rows


def one_step(gram: Gram) -> Gram:
    """(layers, steps − 1): relative error in each step of what the step before returned."""
    steps = gram.shape[1]
    found = [np.sqrt(schedule.stale_error(gram, 0, 0, s - 1, s)[:, 0]) for s in range(1, steps)]
    return np.stack(found, axis=1) if found else np.zeros((len(gram), 0))


def _error(gram: Gram, order: int, gap: int) -> float | None:
    """Root mean square, full steps as far apart as the reuse asks, all three of them there."""
    h = gap + 1
    at = range(2 * h, gram.shape[1] - gap)
    squares = [schedule.stale_error(gram, order, h, f, f + gap).mean() for f in at]
    return math.sqrt(statistics.fmean(squares)) if squares else None


def front_rows(front: Sequence[tuple[ToCaConfig, Score]]) -> list[dict[str, Any]]:
    return [
        {
            "speed-up": 1 / score.cost,
            "flops ratio": 1 / score.flops,
            **quality(score),
            "settings": described(config),
        }
        for config, score in front
    ]


def described(config: ToCaConfig) -> str:
    """What sets a config apart, in a few words."""
    parts = [f"order {config.forecast}"]
    if config.full_at is None:
        parts.append(f"interval {config.interval}")
    else:
        parts.append("full at " + " ".join(map(str, config.full_at)))
    if config.residual_threshold is not None:
        parts.append(f"and above a drift of {config.residual_threshold:g}")
    if config.fresh_ratio:
        parts.append(f"{config.fresh_ratio:.0%} by {config.selector}")
        if config.fresh_every > 1:
            parts.append(f"every {config.fresh_every}")
        if config.layer_ratio:
            parts.append("by error")
    return ", ".join(parts)


_FORMATS = {
    "name": "",
    "psnr": ".2f",
    "±": ".2f",
    "ssim": ".4f",
    "flops ratio": ".2f",
    "expected speed-up": ".2f",
    "speed-up": ".2f",
    "seconds": ".3g",
    "settings": "",
}


def printed(rows: Sequence[Mapping[str, Any]], formats: Mapping[str, str] | None = None) -> str:
    """A table without the columns in which nothing is known."""
    known = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    chosen = formats or _FORMATS
    return timing.table([dict(row) for row in rows], {name: chosen.get(name, "") for name in known})
