"""The page of `toca report`: a trace as one HTML file that needs nothing else, not even a network.

Charts and tables are written here and can be read without the script; page.js draws the tokens.
"""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import torch

from ...trace import Part, Trace
from ..evaluation.metrics import psnr
from . import images, numbers
from .html import MEMORY, MIB, html_legend, part_name, sample_caption, sample_count

_SHOWN = 24  # samples, before and after


def page(trace: Trace, title: str) -> str:
    """The HTML of a trace; the title is plain text, as all of the trace's own texts are."""
    folder = files(__package__)
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    script = folder.joinpath("page.js").read_text(encoding="utf-8")
    body = "\n".join(
        [
            _header(trace, title),
            _tiles(trace),
            _samples(trace),
            _viewer(trace),
            numbers.timing(trace),
            numbers.modules(trace),
            numbers.settings(trace),
        ]
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}: ToCa report</title>
<style>
{style}</style>
</head>
<body>
{body}
<script type="application/json" id="trace">{_json(_scene(trace))}</script>
<script>
{script}</script>
</body>
</html>
"""


def _json(value: Any) -> str:
    """JSON that can stand inside of an HTML element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _scene(trace: Trace) -> dict[str, Any]:
    """What the script draws from."""
    samples = {
        str(step): [
            [images.picture(frame, 256) for frame in images.frames(sample)]
            for sample in kept[: images.VIEWED]
        ]
        for step, kept in sorted(trace.samples.items())
    }
    return {
        "steps": trace.num_steps,
        "captions": [sample_caption(trace, at) for at in range(sample_count(trace))],
        "samples": samples,
        "parts": [
            {
                "name": part_name(trace, part),
                "first": part.first,
                "steps": part.plan.num_steps,
                "modules": images.tokens(part, trace),
            }
            for part in trace.parts
        ],
    }


# --- sections ------------------------------------------------------------------------------------


def _header(trace: Trace, title: str) -> str:
    machine = [trace.versions[key] for key in ("device", "cpu") if trace.versions.get(key)]
    threads = trace.versions.get("threads")
    if threads and "device" not in trace.versions:
        machine.append(f"{threads} thread{'' if threads == '1' else 's'}")
    where = f" on {', '.join(machine)}" if machine else ""
    full = int(trace.full_steps.sum())
    return f"""<header>
<h1>{escape(title)}</h1>
<p>{escape(trace.model)} with ToCa, {trace.num_steps} steps: {full} in full,
{trace.num_steps - full} from the cache{escape(where)}.</p>
</header>"""


def _tiles(trace: Trace) -> str:
    speedup, ratio = trace.speedup, trace.flops_ratio
    measured = trace.untouched_seconds is not None
    computed = sum(part.plan.k[name].sum() * part.batch[name] for part, name in _mlps(trace))
    every = sum(
        part.plan.k[name].size * part.plan.num_tokens[name] * part.batch[name]
        for part, name in _mlps(trace)
    )
    tiles = [
        (
            "speed-up",
            "–" if speedup is None else f"{speedup:.2f}×",
            "measured, whole run" if measured else "estimated from this run's full steps",
        ),
        ("FLOPs ratio", f"{ratio:.2f}×", "the ideal speed-up"),
        (
            "efficiency",
            "–" if speedup is None else f"{speedup / ratio:.0%}",
            "speed-up over FLOPs ratio",
        ),
        ("tokens recomputed", f"{computed / every:.1%}", "of those in MLPs, full steps included"),
    ]
    if trace.result is not None and trace.untouched is not None:
        mean = np.mean([one for one in _psnr(trace) if not np.isinf(one)] or [np.inf])
        tiles.append(("PSNR", _decibels(float(mean)), "to the untouched samples, mean"))
    memory = sum(trace.memory.get(name, 0) for name in MEMORY)
    tiles.append(("memory", f"{memory * MIB:.1f} MiB", "beside the model"))
    items = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></dd></div>"
        for name, value, note in tiles
    )
    return f'<dl class="tiles">{items}</dl>'


def _mlps(trace: Trace) -> list[tuple[Part, str]]:
    return [(part, name) for part in trace.parts for name in part.plan.modules if "mlp" in name]


def _psnr(trace: Trace) -> list[float]:
    assert trace.result is not None
    assert trace.untouched is not None
    return psnr(torch.tensor(trace.result), torch.tensor(trace.untouched)).tolist()


def _decibels(value: float) -> str:
    if np.isnan(value):
        return "not finite"
    return "equal" if np.isinf(value) else f"{value:.1f} dB"


def _samples(trace: Trace) -> str:
    result, untouched = trace.result, trace.untouched
    if result is None:
        return ""
    count = min(len(result), _SHOWN)
    columns: list[tuple[str, Any]] = [("ToCa", result)]
    quality = [""] * count
    if untouched is not None:
        quality = [_decibels(one) for one in _psnr(trace)]
        scale = images.difference_scale(result[:count], untouched[:count])
        difference = np.abs(result - untouched) * scale
        columns = [("untouched", untouched), *columns, (f"difference × {scale}", difference)]
    figures = []
    for at in range(count):
        caption = sample_caption(trace, at)
        cells = "".join(_frames(name, samples[at], at, caption) for name, samples in columns)
        figures.append(
            f'<figure class="sample"><div class="row">{cells}</div>'
            f"<figcaption><span>{escape(caption)}</span><b>{quality[at]}</b></figcaption></figure>"
        )
    more = f" The first {count} of {len(result)} samples." if count < len(result) else ""
    text = "From left to right: " + ", ".join(name for name, _ in columns) + "." + more
    return f"""<section id="samples"><h2>Samples</h2>
<p>{escape(text)}</p>
<div class="samples">{"".join(figures)}</div></section>"""


def _frames(name: str, sample: images.Pixels, at: int, caption: str) -> str:
    shown = images.frames(sample)
    small = " small" if max(sample.shape[-2:]) < 128 else ""
    parts = [
        f'<img class="frame{small}" data-column="{escape(name)}" data-sample="{at}" '
        f'data-frame="{frame}" alt="{escape(f"{name}: {caption}")}" src="{images.picture(pixels)}"'
        + (" hidden>" if frame else ">")
        for frame, pixels in enumerate(shown)
    ]
    return f'<div class="frames">{"".join(parts)}</div>'


def _viewer(trace: Trace) -> str:
    beneath = '<option value="step">what the step starts from</option>' if trace.samples else ""
    controls = [
        ("part", "model"),
        ("module", "module"),
        ("layer", "layer"),
        ("row", "sample"),
    ]
    selects = "".join(
        f'<label>{text}<select id="{name}"></select></label>' for name, text in controls
    )
    legend = html_legend(
        ("full", "full step: every token"),
        ("cached", "recomputed token; stronger: in more layers"),
        ("reused", "taken from the cache"),
    )
    return f"""<section id="tokens"><h2>Tokens recomputed</h2>
<p>Drag the slider or press play. The address of this page keeps what is shown, as in
<code>#step=7&amp;layer=2</code>.</p>
<noscript><p>The tokens are drawn by a script, which this viewer does not run.</p></noscript>
<form class="controls" autocomplete="off">{selects}
<label>beneath<select id="beneath"><option value="result">the final sample</option>{beneath}
<option value="none">nothing</option></select></label>
<label id="frame-label" hidden>frame<input id="frame" type="range" min="0" value="0"></label>
</form>
<div class="viewer">
{_canvas("overlay", "In this step", "state")}
<div class="player"><button id="play" type="button">Play</button>
<input id="step" type="range" min="0" max="{trace.num_steps - 1}" value="0" aria-label="step"></div>
<output id="state" for="step"></output></figure>
{_canvas("heat", "In the whole run", "heat-state")}
<div class="scale"><span>least</span><i class="often"></i><span>most often</span></div>
<output id="heat-state"></output></figure>
{_canvas("age", "Age after this step", "age-state")}
<div class="scale"><span>new</span><i class="old"></i><span>{numbers.OLDEST} steps old</span></div>
<output id="age-state"></output></figure>
</div>
{legend}
<div id="strip" class="strip" role="group" aria-label="all steps"></div></section>"""


def _canvas(name: str, caption: str, state: str) -> str:
    """The start of a figure that the script draws and describes in `state`."""
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<canvas id="{name}" role="img" aria-label="{caption}" aria-describedby="{state}">'
        "</canvas>"
    )
