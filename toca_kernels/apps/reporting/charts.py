"""Charts of `toca report` as inline SVG; colours are classes of page.css."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 620, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 12, 42


@dataclass(frozen=True)
class Line:
    """A horizontal line, or one through a value for each step.

    Attributes:
        values: one for each step, or one for all.
        css: its class.
    """

    values: Sequence[float]
    css: str


class _Axes:
    """Steps along x, a quantity along y: from 0, or on a logarithmic scale."""

    def __init__(self, steps: int, ticks: Sequence[float], y_label: str, label: str) -> None:
        self.steps = steps
        self.low, self.top = ticks[0], ticks[-1]
        self.slot = (WIDTH - _LEFT - _RIGHT) / max(steps, 1)
        self.parts = [
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(label)}">'
        ]
        for tick in ticks:
            y = self.y(tick)
            self.parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                f"{tick:g}</text>"
            )
        every = next(n for n in (1, 2, 5, 10, 20, 25, 50, 100, 250, 1000) if steps / n <= 20)
        for step in range(0, steps, every):
            self.parts.append(
                f'<text class="tick" x="{self.x(step) + self.slot / 2:.1f}" '
                f'y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{step}</text>'
            )
        middle = (_TOP + HEIGHT - _BOTTOM) / 2
        self.parts.append(
            f'<text class="axis" x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 8}" '
            f'text-anchor="middle">step</text>'
            f'<text class="axis" transform="translate(14 {middle:.0f}) rotate(-90)" '
            f'text-anchor="middle">{escape(y_label)}</text>'
        )

    def x(self, step: float) -> float:
        return _LEFT + step * self.slot

    def y(self, value: float) -> float:
        if self.low > 0:
            share = math.log(max(value, self.low) / self.low) / math.log(self.top / self.low)
        else:
            share = value / self.top
        return HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP)

    def bar(self, step: int, low: float, high: float, css: str, title: str) -> None:
        gap = min(2.0, 0.15 * self.slot)
        y = self.y(high)
        self.parts.append(
            f'<rect class="{css}" x="{self.x(step) + gap / 2:.2f}" y="{y:.2f}" '
            f'width="{self.slot - gap:.2f}" height="{max(self.y(low) - y, 0):.2f}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def dot(self, step: int, value: float, css: str, title: str) -> None:
        self.parts.append(
            f'<circle class="{css}" cx="{self.x(step) + self.slot / 2:.2f}" '
            f'cy="{self.y(value):.2f}" r="{min(4.0, 0.45 * self.slot):.2f}">'
            f"<title>{escape(title)}</title></circle>"
        )

    def line(self, line: Line) -> None:
        if len(line.values) == 1:
            y = self.y(line.values[0])
            path = f"M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"
        else:  # a stair: a value holds for its whole step
            path = "".join(
                f"{'L' if step else 'M'}{self.x(step):.1f} {self.y(value):.1f}"
                f"H{self.x(step + 1):.1f}"
                for step, value in enumerate(line.values)
            )
        self.parts.append(f'<path class="{line.css}" d="{path}" fill="none"/>')

    def svg(self) -> str:
        return "".join([*self.parts, "</svg>"])


def bars(
    values: Sequence[float],
    classes: Sequence[str],
    *,
    lines: Sequence[Line] = (),
    unit: str,
    label: str,
    title: Callable[[int], str],
) -> str:
    """A bar for each step, with lines across."""
    most = max([*values, *(value for line in lines for value in line.values)])
    axes = _Axes(len(values), nice_ticks(most), unit, label)
    for step, (value, css) in enumerate(zip(values, classes, strict=True)):
        axes.bar(step, 0.0, value, css, title(step))
    for line in lines:
        axes.line(line)
    return axes.svg()


def dots(
    values: Sequence[float],
    classes: Sequence[str],
    *,
    lines: Sequence[Line],
    unit: str,
    label: str,
    title: Callable[[int], str],
) -> str:
    """A dot for each step, with lines across, on a logarithmic scale."""
    every = [*values, *(value for line in lines for value in line.values)]
    axes = _Axes(len(values), log_ticks(min(every), max(every)), unit, label)
    for line in lines:
        axes.line(line)
    for step, (value, css) in enumerate(zip(values, classes, strict=True)):
        axes.dot(step, value, css, title(step))
    return axes.svg()


def stacks(
    shares: Sequence[Sequence[float]], names: Sequence[str], *, unit: str, label: str
) -> str:
    """A stacked bar for each step; piece i has the class "age{i}"."""
    axes = _Axes(len(shares), nice_ticks(100.0), unit, label)
    for step, pieces in enumerate(shares):
        low = 0.0
        for at, share in enumerate(pieces):
            if share > 0:
                title = f"step {step}, {names[at]}: {share:.1f} % of the tokens"
                axes.bar(step, low, low + share, f"age{at}", title)
                low += share
    return axes.svg()


def nice_ticks(top: float) -> list[float]:
    """4 to 8 round numbers from 0 to the first at or above `top`."""
    if not top > 0 or not math.isfinite(top):
        return [0.0, 1.0]
    unit = 10.0 ** math.floor(math.log10(top / 4))
    step = next(unit * n for n in (1, 2, 2.5, 5, 10) if top / (unit * n) <= 6)
    return [float(f"{step * at:.12g}") for at in range(math.ceil(top / step - 1e-9) + 1)]


def log_ticks(low: float, top: float) -> list[float]:
    """1, 2, 5, 10, ... from the last at or below `low` to the first at or above `top`; powers of
    ten where those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(top)) + 1)
    digits = (1, 2, 5) if len(decades) <= 3 else (1,)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
    first = max(at for at, tick in enumerate(ticks) if tick <= low)
    last = min(at for at, tick in enumerate(ticks) if tick >= top)
    return ticks[first : max(last, first + 1) + 1]
