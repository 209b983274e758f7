"""Time every op on this machine, against its own copy and GEMM rates and against its peers.

    toca bench                                             the models' shapes, on a GPU if any
    toca bench --op select_tokens --shape FLUX --json result.json
    toca bench --device cpu --tokens 1024 --channels 768 --heads 12 --dtype float32

Each backend is compared with the reference first, and a wrong result gets no time.  Times are of
a call, host included; on CUDA also of the call inside a CUDA graph, which is how cached steps run.
Both start from a cold L2 cache there.  Speed-ups and rates are of times in a graph where both have
one.  Bytes are counted from the shapes, every input read once and every output written once; "of a
copy" is the time of a copy that moves as many bytes over the time of the op.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._backends import NAMES, backends, native_on_cuda, resolve
from .measuring import shapes, timing
from .measuring.cases import CASES, Case, Inputs
from .measuring.shapes import DTYPES, SHAPES, Shape
from .measuring.timing import Clock, Runs, Spread

Row = dict[str, Any]

# --- the gate ------------------------------------------------------------------------------------

# Of the largest value: above what rounding does, far below what a wrong row would.
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


def disagreement(have: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype) -> str:
    """How a backend's results differ from the reference's, in words; empty if only by rounding."""
    for a, b in zip(have, want, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} {tuple(a.shape)} instead of {b.dtype} {tuple(b.shape)}"
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return f"{int((a != b).sum())} of {b.numel()} indices differ from the reference"
            continue
        error = (a.double() - b.double()).abs().amax() / b.double().abs().amax()
        if not error <= _LIMITS[dtype]:
            return f"differs from the reference by {float(error):.1e} of the largest value"
    return ""


# --- measuring -----------------------------------------------------------------------------------


def bodies(op: str, device: torch.device) -> list[str]:
    """The backends with a body of the op here, but for the reference where there is another."""
    found = [name for name in NAMES[1:] if device.type in backends()[name].devices]
    return [name for name in found if _has_body(op, name, device)] or ["reference"]


def _has_body(op: str, backend: str, device: torch.device) -> bool:
    if op == "partial_mlp":  # composed of other ops
        return True
    op = op.removesuffix("_forecast")  # with other caches
    if backend == "native" and device.type == "cuda":
        return native_on_cuda(op)
    return hasattr(importlib.import_module(f"..{backend}", __package__), op)


@dataclass(frozen=True)
class Times:
    """Of every run of a case: a call, and the same in a CUDA graph."""

    call: dict[str, Spread]
    graph: dict[str, Spread]

    def best(self, name: str) -> float:
        return (self.graph.get(name) or self.call[name]).median

    def ratio(self, slow: str, fast: str) -> float | None:
        """Time of one over time of the other, both measured in the same way."""
        if slow not in self.call or fast not in self.call:
            return None
        times = self.graph if slow in self.graph and fast in self.graph else self.call
        return times[slow].median / times[fast].median


def measure(
    case: Case,
    names: Sequence[str],
    clock: Clock,
    dtype: torch.dtype,
    *,
    repeats: int,
    compiled: bool,
) -> list[Row]:
    """A row for each backend: times, or what is wrong with it."""
    found = {name: _gate(case, name, dtype) for name in names}
    runs: Runs = {name: case.run(name) for name, wrong in found.items() if not wrong}
    if not runs:
        return [{"backend": name, "failed": wrong} for name, wrong in found.items()]
    half = max(case.work.bytes // 2, 1)  # a copy reads each of its bytes and writes it
    source, target = (torch.zeros(half, dtype=torch.uint8, device=clock.device) for _ in range(2))
    runs |= {"reference": case.run("reference"), "copy": lambda: target.copy_(source)}
    if compiled:
        runs["compiled"] = torch.compile(case.plain)
    runs |= case.peers
    runs, skipped = _that_run(runs)
    times = _time(case, runs, clock, repeats)
    peaks = {name: clock.peak_bytes(run) for name, run in runs.items()}
    return [
        {"backend": name, "failed": wrong}
        if wrong
        else _row(case, name, times, peaks) | ({"skipped": skipped} if skipped else {})
        for name, wrong in found.items()
    ]


def _gate(case: Case, backend: str, dtype: torch.dtype) -> str:
    try:
        return disagreement(case.result(backend), case.result("reference"), dtype)
    except Exception as error:  # whatever a kernel raises is a finding about this backend only
        return _one_line(error)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _that_run(runs: Runs) -> tuple[Runs, dict[str, str]]:
    """(runs that work here, name -> why not of the others); also their first warm-up."""
    skipped: dict[str, str] = {}
    for name, run in runs.items():
        try:
            run()
        except Exception as error:  # a peer that does not exist or fit here is left out
            skipped[name] = _one_line(error)
    return {name: run for name, run in runs.items() if name not in skipped}, skipped


def _time(case: Case, runs: Runs, clock: Clock, repeats: int) -> Times:
    call = timing.spreads(runs, clock, repeats=repeats)
    if not clock.cuda:
        return Times(call, {})
    capturable = {name: run for name, run in runs.items() if name not in case.eager_only}
    return Times(call, clock.in_graphs(capturable, repeats=repeats))


def _row(case: Case, name: str, times: Times, peaks: dict[str, int | None]) -> Row:
    call, graph, best = times.call[name], times.graph.get(name), times.best(name)
    row: Row = {
        "backend": name,
        "us": 1e6 * call.median,
        "us p20": 1e6 * call.p20,
        "us p80": 1e6 * call.p80,
        "graph us": 1e6 * graph.median if graph else None,
        "bytes": case.work.bytes,
        "flops": case.work.flops,
        "GB/s": 1e-9 * case.work.bytes / best,
        "of a copy": times.ratio("copy", name),
        "TFLOP/s": 1e-12 * case.work.flops / best if case.work.flops else None,
        "speed-up": times.ratio("reference", name),
        "compiled speed-up": times.ratio("compiled", name),
        "peak bytes": peaks[name],
        "peers": {
            peer: {
                "us": 1e6 * times.call[peer].median,
                "graph us": 1e6 * times.graph[peer].median if peer in times.graph else None,
                "speed-up": times.ratio(peer, name),
                "peak bytes": peaks[peer],
            }
            for peer in case.peers
            if peer in times.call
        },
    }
    row["over peers"] = "; ".join(_over(case, row, peer) for peer in row["peers"])
    return row


def _over(case: Case, row: Row, peer: str) -> str:
    found = row["peers"][peer]
    if peer == case.adds_to:
        return f"adds {1 / found['speed-up']:.0%} to {peer}"
    text = f"{found['speed-up']:.2f}x {peer}"
    if peer == case.memory_of and found["peak bytes"] is not None:
        text += f", its memory {found['peak bytes'] / 2**20:.0f} MiB for "
        text += f"{row['peak bytes'] / 2**20:.0f}"
    return text


def rates(clock: Clock, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """What this machine does at best: bytes of a long copy, FLOPs of a large square product."""
    size, side = (2**30, 8192) if clock.cuda else (2**28, 1024)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=clock.device) for _ in range(2))
    a = torch.randn(side, side, device=clock.device).to(dtype)
    runs: Runs = {"copy": lambda: target.copy_(source), "GEMM": lambda: torch.mm(a, a)}
    seconds = timing.in_turns(runs, clock, repeats=repeats)
    return {
        "copy GB/s": 2e-9 * size / seconds["copy"],
        "GEMM TFLOP/s": 2e-12 * side**3 / seconds["GEMM"],
    }


# --- the command ---------------------------------------------------------------------------------

COLUMNS = {
    "op": "",
    "shape": "",
    "dtype": "",
    "backend": "",
    "us": ".1f",
    "us p20": ".1f",
    "us p80": ".1f",
    "graph us": ".1f",
    "GB/s": ".0f",
    "of a copy": ".0%",
    "TFLOP/s": ".2f",
    "of a GEMM": ".0%",
    "speed-up": ".2f",
    "compiled speed-up": ".2f",
    "over peers": "",
}
# By default: no longer than what fits beside the map of all heads, which the published code stores;
# and on a CPU only what takes a minute.
_LARGEST = {"cuda": {"N": 4608, "B": 64}, "cpu": {"N": 256, "B": 8}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", choices=CASES, default=list(CASES), metavar="OP")
    parser.add_argument(
        "--backend", nargs="+", choices=NAMES, help="default: every one that has a body here"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--repeats", type=int, default=20, help="(%(default)s)")
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile the plain PyTorch body"
    )
    parser.add_argument("--json", help="file to write the result to")
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="WORD",
        help="shapes of models with this name, or with this in their name: "
        + ", ".join(repr(shape.name) for shape in _of_models()),
    )
    shapes.add_arguments(parser)


def run(
    args: argparse.Namespace, machine: Callable[[torch.device], dict[str, Any]] = timing.machine
) -> int:
    """Measure and print; 1 if a backend was wrong or failed.

    Raises:
        ValueError: a shape, a device or a backend that is not to be had here.
    """
    device = _device(args.device)
    chosen = _shapes(args, device)
    if args.repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {args.repeats}")
    for name in args.backend or ():
        _require(name, device)
    clock = Clock(device)
    rows: list[Row] = []
    with torch.inference_mode():
        best = rates(clock, DTYPES[args.dtype], args.repeats)
        where = machine(device) | best
        for shape, op in _progress([(shape, op) for shape in chosen for op in args.op]):
            rows += _job(op, shape, args, clock, best)
            timing.write(args.json, "ops", rows, where)
    _report(rows, where)
    return int(any("failed" in row for row in rows))


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: torch {torch.__version__} finds no CUDA device here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _of_models() -> list[Shape]:
    """The shapes of the models, and DiT's at the batch between latency and throughput."""
    first = SHAPES[0]
    return [first, replace(first, name=f"{first.name}, batch 8", B=8), *SHAPES[1:]]


def _shapes(args: argparse.Namespace, device: torch.device) -> list[Shape]:
    if args.tokens is not None:
        return list(shapes.from_arguments(args))
    found = [replace(shape, dtype=DTYPES[args.dtype]) for shape in _of_models()]
    if args.shape is None:
        largest = _LARGEST[device.type]
        return [shape for shape in found if largest["N"] >= shape.N and largest["B"] >= shape.B]
    words = [word.lower() for word in args.shape]
    named = [shape for shape in found if shape.name.lower() in words]
    named = named or [s for s in found if any(word in s.name.lower() for word in words)]
    if not named:
        names = ", ".join(repr(shape.name) for shape in found)
        raise ValueError(f"shape: expected a part of one of {names}, got {args.shape}")
    return named


def _require(backend: str, device: torch.device) -> None:
    try:
        resolve(backend, device)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _progress(jobs: Sequence[tuple[Shape, str]]) -> Iterable[tuple[Shape, str]]:
    try:
        from tqdm import tqdm
    except ImportError:
        return jobs
    bar: Iterator[tuple[Shape, str]] = iter(tqdm(jobs, desc="ops", leave=False))
    return bar


def _job(
    op: str, shape: Shape, args: argparse.Namespace, clock: Clock, best: dict[str, float]
) -> list[Row]:
    given = args.backend or bodies(op, clock.device)
    names = [name for name in given if _has_body(op, name, clock.device)]
    case = CASES[op](Inputs(shape, clock.device)) if names else None
    if case is None:
        return []
    if args.compile:
        torch._dynamo.reset()
    found = measure(case, names, clock, shape.dtype, repeats=args.repeats, compiled=args.compile)
    for row in found:
        if row.get("TFLOP/s"):
            row["of a GEMM"] = row["TFLOP/s"] / best["GEMM TFLOP/s"]
    return [{"op": op, "shape": shape.name, "dtype": args.dtype} | row for row in found]


def _report(rows: Sequence[Row], where: dict[str, Any]) -> None:
    timed = [row for row in rows if "failed" not in row]
    if timed:
        shown = {key: spec for key, spec in COLUMNS.items() if any(row.get(key) for row in timed)}
        print(timing.table(timed, shown))
    device = where.get("device") or f"{where['cpu']}, {where['threads']} threads"
    print(
        f"\n{device}: a long copy {where['copy GB/s']:.0f} GB/s, "
        f"a large GEMM {where['GEMM TFLOP/s']:.2f} TFLOP/s"
    )
    for row in rows:
        place = f"{row['op']}, {row['shape']}, {row['dtype']}, {row['backend']}"
        if "failed" in row:
            print(f"FAILED {place}: {row['failed']}")
        for name, reason in row.get("skipped", {}).items():
            print(f"left out beside {place}: {name}: {reason}")
