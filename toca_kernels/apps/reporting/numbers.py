"""The sections of the report that are numbers: charts and tables, which need no script."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from html import escape
from typing import Any

import numpy as np

from ...config import ToCaConfig
from ...trace import Trace
from . import charts, images
from .html import (
    MEMORY,
    MIB,
    flops_text,
    flops_unit,
    html_legend,
    html_table,
    part_name,
    seconds_text,
)

OLDEST = 8  # steps; older tokens share its colour


def timing(trace: Trace) -> str:
    full = trace.full_steps
    css = ["full" if one else "cached" for one in full]
    kind = ["full" if one else "cached" for one in full]
    seconds, flops, every = trace.seconds, trace.flops, trace.full_flops
    unit, name = flops_unit(float(every.max()))
    lines, key = [], []
    if trace.untouched_seconds is not None:
        lines = [charts.Line((1e3 * trace.untouched_seconds).tolist(), "untouched")]
        key = [("untouched", "untouched model")]
    time = charts.bars(
        (1e3 * seconds).tolist(),
        css,
        lines=lines,
        unit="milliseconds",
        label=f"Time of each step in milliseconds, {seconds.sum():.3f} s in all",
        title=lambda step: f"step {step}, {kind[step]}: {1e3 * seconds[step]:.2f} ms",
    )
    work = charts.bars(
        (flops / unit).tolist(),
        css,
        lines=[charts.Line((every / unit).tolist(), "untouched")],
        unit=name,
        label=f"{name} of each step, {flops.sum() / unit:.4g} of {every.sum() / unit:.4g} in all",
        title=lambda step: f"step {step}, {kind[step]}: {flops[step] / unit:.4g} {name}",
    )
    steps = html_legend(("full", "full step"), ("cached", "cached step"), *key)
    return f"""<section id="timing"><h2>Time, FLOPs and ages</h2>
<div class="charts">
<figure><figcaption>Time of each step</figcaption>{time}{steps}</figure>
<figure><figcaption>FLOPs of each step</figcaption>{work}
{html_legend(("full", "full step"), ("cached", "cached step"), ("untouched", "a step in full"))}
</figure>
{_achieved(trace, css)}
{"".join(_ages(trace))}
{_totals(trace)}
</div></section>"""


def _achieved(trace: Trace, css: Sequence[str]) -> str:
    ideal, achieved = trace.ideal_step_speedups, trace.step_speedups
    if achieved is None:
        return ""
    chart = charts.dots(
        achieved.tolist(),
        css,
        lines=[charts.Line(ideal.tolist(), "ideal"), charts.Line([1.0], "one")],
        unit="speed-up",
        label="Speed-up of each step over a full one, achieved and ideal",
        title=lambda step: f"step {step}: {achieved[step]:.2f}× achieved, {ideal[step]:.2f}× ideal",
    )
    return f"""<figure><figcaption>Speed-up of each step over a full one</figcaption>{chart}
{html_legend(("full", "full step"), ("cached", "cached step"), ("ideal", "ideal: its FLOPs ratio"))}
</figure>"""


def _totals(trace: Trace) -> str:
    """Achieved against ideal, of the run and of its cached steps."""
    cached = ~trace.full_steps
    reference = trace.full_step_seconds
    rows = []
    for name, steps in (("whole run", np.ones_like(cached)), ("cached steps", cached)):
        if reference is None or not steps.any():
            continue
        seconds = float(trace.seconds[steps].sum())
        whole = steps.all() and trace.untouched_seconds is not None
        without = (
            float(trace.untouched_seconds.sum()) if whole else reference * int(steps.sum())  # type: ignore[union-attr]  # whole
        )
        done, every = float(trace.flops[steps].sum()), float(trace.full_flops[steps].sum())
        rows.append(
            (
                name,
                f"{int(steps.sum())}",
                seconds_text(without),
                seconds_text(seconds),
                f"{without / seconds:.2f}×",
                flops_text(every),
                flops_text(done),
                f"{every / done:.2f}×",
                f"{(without / seconds) / (every / done):.0%}",
            )
        )
    head = [
        "",
        "steps",
        "time without",
        "time with ToCa",
        "speed-up",
        "FLOPs without",
        "FLOPs with ToCa",
        "FLOPs ratio",
        "efficiency",
    ]
    source = (
        "the untouched model" if trace.untouched_seconds is not None else "this run's full steps"
    )
    caption = f"Achieved against ideal; time without ToCa from {source}"
    return f'<div class="wide">{html_table(head, rows, caption)}</div>'


def _ages(trace: Trace) -> Iterator[str]:
    """A chart for each module that selects."""
    for at, part in enumerate(trace.parts):
        for name in images.viewed_modules(part):
            table = part.age_histogram(name)
            steps, ages = table.shape
            kinds = min(ages, OLDEST + 1)
            some = np.zeros((steps, OLDEST + 1))
            some[:, : min(ages, OLDEST)] = table[:, :OLDEST]
            some[:, OLDEST] = table[:, OLDEST:].sum(axis=1)
            shares = np.zeros((trace.num_steps, OLDEST + 1))
            shares[part.first : part.first + steps] = 100 * some / table.sum(axis=1, keepdims=True)
            chart = charts.stacks(
                shares.tolist(),
                [_age(age) for age in range(OLDEST + 1)],
                unit="% of tokens",
                label=f"Ages of the tokens of {name} after each step",
            )
            label = f"{part_name(trace, part)}: {name}" if len(trace.parts) > 1 else name
            legend = html_legend(*((f"age{age}", _age(age)) for age in range(kinds)))
            yield (
                f'<figure class="ages" data-part="{at}" data-module="{escape(name)}"><figcaption>'
                f"Ages of the tokens of {escape(label)}: at most {ages - 1} steps</figcaption>"
                f"{chart}{legend}</figure>"
            )


def _age(age: int) -> str:
    if age == 0:
        return "computed in the step"
    return f"{age} {'step' if age == 1 else 'steps'}" + (" and more" if age == OLDEST else "")


def modules(trace: Trace) -> str:
    rows, maps = [], []
    for part in trace.parts:
        plan = part.plan
        for name in plan.modules:
            label = f"{part_name(trace, part)}: {name}" if len(trace.parts) > 1 else name
            full, k, N = plan.full[name], plan.k[name], plan.num_tokens[name]
            cached = k[~full]
            grid = " × ".join(map(str, part.grids[name])) if name in part.grids else ""
            rows.append(
                (
                    label,
                    str(plan.num_layers[name]),
                    f"{N}" + (f" ({grid})" if grid else ""),
                    str(part.batch[name]),
                    str(int(full.all(axis=1).sum())),
                    f"{cached.min()} to {cached.max()}" if cached.size else "–",
                    f"{cached.mean():.1f}" if cached.size else "–",
                    f"{cached.mean() / N:.1%}" if cached.size else "–",
                    f"{k.sum() / (k.size * N):.1%}",
                )
            )
            maps.append(_map(full, k / N, label))
    head = [
        "module",
        "layers",
        "tokens",
        "batch",
        "full steps",
        "k",
        "mean k",
        "k / N",
        "computed",
    ]
    legend = html_legend(
        ("full", "full"), ("cached", "k tokens recomputed; stronger: more"), ("reused", "reused")
    )
    return f"""<section id="modules"><h2>Modules</h2>
<p>k is the number of tokens that a layer recomputes in a cached step; the last column counts full
steps, too.</p>
{html_table(head, rows, "Modules of the plan, as it was done")}
<p>What each layer did: steps from left to right, layers from top to bottom.</p>
<div class="maps">{"".join(maps)}</div>
{legend}</section>"""


def _map(full: Any, share: Any, label: str) -> str:
    """One pixel for each step and layer: blue where full, else orange, as strong as k."""
    pixels = np.zeros((*full.T.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(full.T[..., None], (47, 111, 178), (232, 119, 24))
    alpha = np.where(full.T, 1.0, np.sqrt(share.T))
    pixels[..., 3] = (255 * alpha).round()
    alt = f"{label}: {full.shape[0]} steps, {full.shape[1]} layers"
    return (
        f'<figure class="map"><img class="small" src="{images.data_uri(pixels)}" '
        f'alt="{escape(alt)}"><figcaption>{escape(label)}</figcaption></figure>'
    )


def settings(trace: Trace) -> str:
    default = ToCaConfig()
    both = {
        field.name: (getattr(trace.config, field.name), getattr(default, field.name))
        for field in fields(ToCaConfig)
    }
    rows = [
        (name, _setting(value), _setting(usual))
        for name, (value, usual) in both.items()
        if value != usual
    ]
    every = json.dumps(trace.config.to_dict(), indent=2)
    memory = [(text, f"{trace.memory.get(name, 0) * MIB:.2f} MiB") for name, text in MEMORY.items()]
    versions = [(name, str(value)) for name, value in trace.versions.items()]
    return f"""<section id="settings"><h2>Memory, settings and versions</h2>
<div class="tables">
{html_table(["memory", "most held"], memory, "Memory beside the model")}
{html_table(["setting", "value", "default"], rows, "Settings other than the defaults")}
{html_table(["", ""], versions, "Where it ran")}
</div>
<details><summary>All settings, as ToCaConfig.load reads them</summary>
<pre>{escape(every)}</pre></details></section>"""


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {one:g}" for name, one in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
