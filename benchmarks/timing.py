"""The package's timing, with the commit in the record."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch

from toca_kernels.apps.measuring import timing
from toca_kernels.apps.measuring.shapes import DTYPES
from toca_kernels.apps.measuring.timing import Clock, Runs, in_turns, table

__all__ = ["DTYPES", "Clock", "Runs", "in_turns", "machine", "table", "write"]


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a result depends on."""
    return {**timing.machine(device), "commit": _commit()}


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def write(
    path: str | None,
    benchmark: str,
    rows: list[dict[str, Any]],
    device: torch.device | str = "cpu",
) -> None:
    """Write the result as JSON, with the command, the machine and the commit that made it."""
    timing.write(path, benchmark, rows, machine(device))
