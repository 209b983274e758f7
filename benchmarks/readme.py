"""Write the tables of README.md and of pages in docs/ from benchmarks/results.

A page names a result as <!-- results: block_b --> or, of a GPU, <!-- results: gpu/block -->.

--check only compares.

    python benchmarks/readme.py
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from timing import table

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("speed", "gpu", "quality")),
)

COLUMNS: dict[str, dict[str, str]] = {
    "block": {
        "block": "",
        "batch": "d",
        "dtype": "",
        "k/N": ".0%",
        "FLOPs ratio": ".1f",
        "speed-up": ".1f",
        "naive speed-up": ".1f",
        "compiled naive speed-up": ".1f",
        "compiled full speed-up": ".2f",
        "efficiency": ".0%",
        "graphed speed-up": ".1f",
        "over naive, graphed": ".2f",
        "over naive, compiled, graphed": ".2f",
        "graphed efficiency": ".0%",
    },
    "families": {
        "block": "",
        "tokens": "",
        "batch": "d",
        "dtype": "",
        "recomputed": "",
        "FLOPs ratio": ".1f",
        "speed-up": ".1f",
        "int8 speed-up": ".1f",
        "naive speed-up": ".1f",
        "compiled naive speed-up": ".1f",
        "compiled full speed-up": ".2f",
        "efficiency": ".0%",
        "graphed speed-up": ".1f",
        "over naive, graphed": ".2f",
        "over naive, compiled, graphed": ".2f",
        "graphed efficiency": ".0%",
        "full step": ".2f",
        "cache MiB": ".0f",
        "int8 cache MiB": ".0f",
    },
    "ops": {
        "op": "",
        "shape": "",
        "dtype": "",
        "backend": "",
        "us": ".1f",
        "graph us": ".1f",
        "of a copy": ".0%",
        "of a GEMM": ".0%",
        "speed-up": ".2f",
        "compiled speed-up": ".2f",
        "over peers": "",
    },
    "end_to_end": {
        "model": "",
        "run": "",
        "batch": "d",
        "dtype": "",
        "FLOPs ratio": ".2f",
        "exact speed-up": ".2f",
        "fused speed-up": ".2f",
        "naive speed-up": ".2f",
        "compiled speed-up": ".2f",
        "efficiency": ".0%",
        "untouched, graphed speed-up": ".2f",
        "exact, graphed speed-up": ".2f",
        "fused, graphed speed-up": ".2f",
        "graphed speed-up": ".2f",
        "graphed efficiency": ".0%",
    },
}


def rendered(name: str) -> str:
    """The table of one result file, with the command and the machine that made it."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    rows: list[dict[str, Any]] = result["rows"]
    filled = {key for row in rows for key, value in row.items() if value is not None}
    columns = {k: v for k, v in COLUMNS[result["benchmark"]].items() if k in filled}
    machine = result["machine"]
    device = (
        f"{machine['device']}, CUDA {machine['cuda']}"
        if "device" in machine
        else f"{machine['cpu']}, {machine['threads']} threads"
    )
    where = f"{device}, torch {machine['torch']}, commit {machine['commit']}"
    return f"`{result['command']}` ({where})\n\n{table(rows, columns)}"


def updated(text: str) -> str:
    """The text with every table between its markers renewed."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{rendered(match[2])}\n{match[3]}"

    return re.sub(
        r"(<!-- results: ([\w/]+) -->)\n.*?(<!-- end -->)", replace, text, flags=re.DOTALL
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date")
    args = parser.parse_args()
    for page in PAGES:
        old = page.read_text()
        new = updated(old)
        if args.check and old != new:
            raise SystemExit(f"{page.name}: its tables differ from benchmarks/results")
        page.write_text(new)


if __name__ == "__main__":
    main()
