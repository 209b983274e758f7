"""Timing in turns, and the record of where it was done."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import toca_kernels as toca

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def in_turns(
    runs: dict[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each run.  A B C A B C ...: a drift of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            elapsed, _ = timed(run)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def timed(run: Callable[..., T], *args: Any) -> tuple[float, T]:
    """(seconds, result) of one call."""
    started = time.perf_counter()
    result = run(*args)
    return time.perf_counter() - started, result


def machine() -> dict[str, Any]:
    """What a result depends on."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "toca_kernels": toca.__version__,
        "native": toca.backends()["native"].reason,
        "commit": _commit(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith("flags")), "")
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    return f"{name} ({', '.join(units)})"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def write(path: str | None, benchmark: str, rows: list[dict[str, Any]]) -> None:
    """Write the result as JSON, with the command that made it."""
    if path is None:
        return
    result = {
        "benchmark": benchmark,
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "rows": rows,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as a Markdown table; `columns` maps a key to its format."""
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for row in rows:
        cells = [
            format(row[key], spec) if row.get(key) is not None else ""
            for key, spec in columns.items()
        ]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)
