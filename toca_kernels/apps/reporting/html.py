"""Words and pieces of HTML that the sections of the report share; every text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ...trace import Part, Trace

MIB = 1 / 2**20
MEMORY = {
    "cache_bytes": "cached features",
    "modulation_bytes": "table of gates, shifts and scales",
    "packed_bytes": "second copies of MLP weights",
    "other_bytes": "scores, ages and selections",
}


def sample_count(trace: Trace) -> int:
    return len(trace.captions) if trace.result is None else len(trace.result)


def sample_caption(trace: Trace, at: int) -> str:
    return trace.captions[at] if at < len(trace.captions) else f"sample {at}"


def part_name(trace: Trace, part: Part) -> str:
    alone = sum(other.model == part.model for other in trace.parts) == 1
    return part.model if alone else f"{part.model}, guidance branch {part.branch + 1}"


def flops_unit(most: float) -> tuple[float, str]:
    """FLOPs in a unit for numbers up to `most`, and its name."""
    units = ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))
    return next((one for one in units if most >= one[0]), (1.0, "FLOPs"))


def flops_text(value: float) -> str:
    unit, name = flops_unit(value)
    return f"{value / unit:.4g} {name}"


def seconds_text(value: float) -> str:
    return f"{1e3 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    """Of plain texts; the first column is the rows' heading."""
    top = "".join(f'<th scope="col">{escape(one)}</th>' for one in head)
    lines = [
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(one)}</td>" for one in rest)
        + "</tr>"
        for first, *rest in rows
    ]
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def html_legend(*entries: tuple[str, str]) -> str:
    """(class, text) of each entry."""
    items = "".join(
        f'<li><span class="key {css}"></span>{escape(text)}</li>' for css, text in entries
    )
    return f'<ul class="legend">{items}</ul>'
