"""Quality against cost: a line for each policy, over measured seconds and over FLOPs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .quality import LOWER_IS_BETTER

Row = Mapping[str, Any]
_TITLES = {
    "psnr": "PSNR to the untouched samples, dB",
    "ssim": "SSIM to the untouched samples",
    "rel_l2": "relative L2 error to the untouched samples",
    "lpips": "LPIPS to the untouched samples",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "precision",
    "recall": "recall",
    "is": "inception score",
    "clip": "CLIP score",
    "accuracy": "accuracy",
}
_COSTS = {
    "speedup": "times as fast as the untouched model, measured",
    "flops_ratio": "times fewer FLOPs than the untouched model",
}
_TICKS = (0.5, 0.7, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 15, 20, 30)
_MARKERS = "osD^vPX<>*"
_COLORS = (*(f"C{at}" for at in range(10)), "navy", "gold", "teal", "magenta", "lime", "tan")
# Places of a label beside its point, in points, with its alignment; the first that is free.
_PLACES = (
    (6, 5, "left", "bottom"),
    (6, -5, "left", "top"),
    (-6, 5, "right", "bottom"),
    (-6, -5, "right", "top"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
)
_BEST = "beaten by none"
_ROOM = 24  # points that may all be named
_WIDE = 4.0  # a logarithmic axis where the largest value is so many times the least


def new_figure(**size: Any) -> Any:
    """A figure of matplotlib that needs no screen and is kept nowhere."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", **size)
    FigureCanvasAgg(figure)
    return figure


def front(points: Sequence[tuple[float, float]], *, lower: bool) -> list[int]:
    """Which points (cost ratio, quality) no other one beats in both; `lower` values are better."""
    sign = -1 if lower else 1
    kept = []
    for at, (x, y) in enumerate(points):
        beaten = any(a >= x and sign * b >= sign * y and (a, b) != (x, y) for a, b in points)
        if not beaten:
            kept.append(at)
    return kept


def draw_pareto(
    path: Path, rows: Sequence[Row], metric: str, *, plain: Collection[str], title: str
) -> bool:
    """Draw quality over speed-up and over the ratio of FLOPs, where they are known.

    Args:
        path: of the picture.
        rows: of quality.rows, the untouched model first.
        metric: the column to draw.
        plain: policies of the untouched model, with fewer steps: they are what caching must beat.
        title: above the picture.

    Returns:
        False where there is nothing to draw: no setting has the metric and a cost.
    """
    costs = [cost for cost in _COSTS if any(_known(row, cost, metric) for row in rows[1:])]
    if not costs:
        return False
    figure = new_figure(figsize=(6.6 * len(costs) + 2.6, 6.2))
    axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axis, cost in zip(axes, costs, strict=True):
        _panel(axis, rows, metric, cost, plain)
    axes[0].set_ylabel(f"{_TITLES[metric]}  ({_direction(metric)} is better)", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    order = [*dict.fromkeys(row["policy"] for row in rows[1:]), rows[0]["name"], _BEST]
    order = [name for name in order if name in named]
    figure.legend([named[name] for name in order], order, loc="outside right upper", frameon=False)
    figure.suptitle(title, fontsize=13)
    figure.canvas.draw()
    for axis, cost in zip(axes, costs, strict=True):
        _label(axis, rows, metric, cost)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True


def _known(row: Row, cost: str, metric: str) -> bool:
    """Whether a row is a point; the untouched samples have no finite PSNR to themselves."""
    return all(row.get(name) is not None and math.isfinite(row[name]) for name in (cost, metric))


def _direction(metric: str) -> str:
    return "lower" if metric in LOWER_IS_BETTER else "higher"


def _lines(rows: Sequence[Row], metric: str, cost: str) -> Iterator[tuple[str, list[Row]]]:
    """The points of each policy, by cost; the untouched model has none."""
    policies = dict.fromkeys(row["policy"] for row in rows[1:])
    for policy in policies:
        own = [row for row in rows[1:] if row["policy"] == policy and _known(row, cost, metric)]
        yield policy, sorted(own, key=lambda row: row[cost])


def _panel(axis: Any, rows: Sequence[Row], metric: str, cost: str, plain: Collection[str]) -> None:
    base = rows[0]
    for at, (policy, own) in enumerate(_lines(rows, metric, cost)):
        style: dict[str, Any] = {
            "color": _COLORS[at % len(_COLORS)],
            "marker": _MARKERS[at % len(_MARKERS)],
        }
        if policy in plain:
            style = {"color": "black", "marker": "x", "linestyle": "--"}
        x, y = ([row[name] for row in own] for name in (cost, metric))
        deviations = [row.get(f"{metric}_std") or 0.0 for row in own]
        ranges = None
        if cost == "speedup":
            ranges = [
                [row["speedup"] - row["speedup_slowest"] for row in own],
                [row["speedup_fastest"] - row["speedup"] for row in own],
            ]
        axis.errorbar(
            x, y, yerr=deviations, xerr=ranges, label=policy, elinewidth=0.7, markersize=6, **style
        )
    if _known(base, cost, metric):
        axis.plot(1, base[metric], "*", color="black", markersize=14, label=base["name"], zorder=5)
        axis.axhline(base[metric], color="gray", linestyle=":", linewidth=1)
    points = [row for row in rows if _known(row, cost, metric)]
    best = front([(row[cost], row[metric]) for row in points], lower=_lower(metric))
    axis.plot(
        [points[at][cost] for at in best],
        [points[at][metric] for at in best],
        "o",
        markersize=13,
        markerfacecolor="none",
        markeredgecolor="black",
        markeredgewidth=0.8,
        label=_BEST,
    )
    _scale(axis, [row[cost] for row in points], [row[metric] for row in points])
    axis.set_xlabel(_COSTS[cost], fontsize=11)
    axis.grid(alpha=0.25)


def _lower(metric: str) -> bool:
    return metric in LOWER_IS_BETTER


def _scale(axis: Any, x: Sequence[float], y: Sequence[float]) -> None:
    from matplotlib.ticker import NullFormatter

    axis.set_xscale("log")
    low, high = min(*x, 1.0), max(*x, 1.0)
    axis.set_xlim(low / 1.06, high * 1.12)
    ticks = [tick for tick in _TICKS if low / 1.05 <= tick <= high * 1.1]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
    if min(y) > 0 and max(y) > _WIDE * min(y):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}" if max(y) < 20 * min(y) else NullFormatter())


def _label(axis: Any, rows: Sequence[Row], metric: str, cost: str) -> None:
    """Name the points that none beats, and the others where there are few."""
    points = [row for row in rows if _known(row, cost, metric)]
    best = front([(row[cost], row[metric]) for row in points], lower=_lower(metric))
    rest = [at for at in range(len(points)) if at not in best]
    order = [*best, *(rest if len(points) <= _ROOM else [])]
    marks = axis.transData.transform([(row[cost], row[metric]) for row in points])
    taken: list[Any] = []
    for at in order:
        for dx, dy, ha, va in _PLACES:
            text = axis.annotate(
                points[at]["name"],
                (points[at][cost], points[at][metric]),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=8 if at in best else 7,
                color="black" if at in best else "gray",
            )
            box = text.get_window_extent()
            inside = axis.bbox.containsx(box.x0) and axis.bbox.containsx(box.x1)
            inside = inside and axis.bbox.containsy(box.y0) and axis.bbox.containsy(box.y1)
            hit = any(box.overlaps(other) for other in taken)
            hit = hit or any(box.contains(*mark) for mark in marks)
            if inside and not hit:
                taken.append(box)
                break
            text.remove()
