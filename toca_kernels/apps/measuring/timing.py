"""Timing in turns, on the CPU and on CUDA, and the record of where it was done."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ... import __version__, backends

T = TypeVar("T")
Runs = dict[str, Callable[[], object]]

_CALLS_IN_A_GRAPH = 10
_LEAST = 1e-9  # seconds; a difference of two times can be less than nothing


class Spread(NamedTuple):
    """Median and the quantiles on both sides of it, in seconds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
        )


class Clock:
    """Seconds of a call.

    On the CPU that is the wall clock.  On CUDA it is the time between two events around the call,
    on a device that was idle and whose L2 cache holds nothing: launches and Python count, as they
    do for whoever calls an op in a loop.  `in_graphs` leaves them out.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self._evicting = torch.empty(2 * cache, dtype=torch.uint8, device=self.device)

    def timed(self, run: Callable[..., T], *args: Any) -> tuple[float, T]:
        """(seconds, result) of one call."""
        if self.cuda:
            self.evict()
            torch.cuda.synchronize(self.device)
            return self._between_events(run, *args)
        started = time.perf_counter()
        result = run(*args)
        return time.perf_counter() - started, result

    def _between_events(self, run: Callable[..., T], *args: Any) -> tuple[float, T]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run(*args)
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end), result

    def evict(self) -> None:
        """Fill the L2 cache of the device with what nobody reads."""
        self._evicting.zero_()

    def peak_bytes(self, run: Callable[[], object]) -> int | None:
        """Device memory that a call needs beyond what is held before it; None on the CPU."""
        if not self.cuda:
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        return torch.cuda.max_memory_allocated(self.device) - before

    def captured(self, run: Callable[[], object]) -> Callable[[], None]:
        """Capture the kernels of a call as a CUDA graph; returns what replays them.

        They read and write the tensors of this one call.
        """
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run()  # compiles kernels and sets up libraries, which a capture cannot
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
        return graph.replay

    def in_graphs(self, runs: Runs, *, repeats: int) -> dict[str, Spread]:
        """What each run adds to a CUDA graph, cold L2: a graph that evicts and calls, in turns,
        less one that only evicts."""

        def calling(run: Callable[[], object]) -> Callable[[], None]:
            def chain() -> None:
                for _ in range(_CALLS_IN_A_GRAPH):
                    self.evict()
                    run()

            return self.captured(chain)

        only_evicting = calling(lambda: None)
        graphs = {name: calling(run) for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            evicting, _ = self._between_events(only_evicting)
            for name, replay in graphs.items():
                both, _ = self._between_events(replay)
                seconds[name].append(max(both - evicting, _LEAST) / _CALLS_IN_A_GRAPH)
        return {name: Spread.of(values) for name, values in seconds.items()}


def spreads(runs: Runs, clock: Clock, *, repeats: int, warmup: int = 1) -> dict[str, Spread]:
    """Seconds of each run.  A B C A B C ...: a drift of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            elapsed, _ = clock.timed(run)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: Spread.of(values) for name, values in seconds.items()}


def in_turns(runs: Runs, clock: Clock, *, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each run, as in `spreads`."""
    found = spreads(runs, clock, repeats=repeats, warmup=warmup)
    return {name: spread.median for name, spread in found.items()}


# --- the record ----------------------------------------------------------------------------------


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a result depends on."""
    found = {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "toca_kernels": __version__,
        "native": backends()["native"].reason,
    }
    device = torch.device(device)
    return found | (_gpu(device) if device.type == "cuda" else {})


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith("flags")), "")
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    return f"{name} ({', '.join(units)})"


# Key of the record -> what nvidia-smi calls it.
_DRIVER_FIELDS = {
    "driver": "driver_version",
    "SM clock": "clocks.sm",
    "SM clock, most": "clocks.max.sm",
    "memory clock": "clocks.mem",
    "power limit": "power.limit",
}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2 MiB": properties.L2_cache_size / 2**20,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "triton": backends()["triton"].reason,
        **_driver(f"GPU-{properties.uuid}"),
    }


def _driver(uuid: str) -> dict[str, str]:
    """What only the driver's own tool tells; nothing where it is missing."""
    query = f"--query-gpu={','.join(_DRIVER_FIELDS.values())}"
    command = ["nvidia-smi", f"--id={uuid}", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(_DRIVER_FIELDS, values, strict=False))


def write(
    path: str | None, benchmark: str, rows: list[dict[str, Any]], machine: dict[str, Any]
) -> None:
    """Write the result as JSON, with the command that made it."""
    if path is None:
        return
    result = {
        "benchmark": benchmark,
        "command": command(),
        "machine": machine,
        "rows": rows,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")


def command() -> str:
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        start = "python -m toca_kernels"
    else:
        start = f"python {program}" if program.suffix == ".py" else program.name
    return " ".join([start, *sys.argv[1:]])


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
