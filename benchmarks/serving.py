"""Digits for many who ask at different times: batches whose members come and go, with ToCa.

The same orders (20, 30 and 50 steps, one arriving after every third call of the model) are drawn

    untouched in batches    the model as it is, rows at different steps in one batch
    ToCa one by one         what a server does that cannot mix steps
    ToCa in batches         requests through their own plans, in one batch
    ToCa in lockstep        sorted by their steps beforehand: what mixing would cost nothing against

in turns, round by round.  Seconds are of everything, schedulers too.

    python benchmarks/serving.py --capacity 8 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import timing
import toca_kernels as toca

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))
from digits import load_model, sample
from serve import Order, serve, some_orders


def variants(
    model: torch.nn.Module, config: toca.ToCaConfig, orders: Sequence[Order], capacity: int
) -> dict[str, Callable[[], Any]]:
    def untouched() -> None:
        serve(model, orders, capacity=capacity)

    def one_by_one() -> None:
        with toca.enabled(model, config) as session:
            serve(model, orders, capacity=1, session=session)

    def in_batches() -> None:
        with toca.enabled(model, config) as session:
            serve(model, orders, capacity=capacity, session=session)

    def in_lockstep() -> None:
        for steps in sorted({order.steps for order in orders}):
            alike = [order for order in orders if order.steps == steps]
            with toca.enabled(model, config, num_steps=steps):
                for first in range(0, len(alike), capacity):
                    some = alike[first : first + capacity]
                    noise = torch.cat([order.noise() for order in some])
                    labels = torch.tensor([order.label for order in some])
                    sample(model, labels, num_steps=steps, noise=noise, progress=False)

    return {
        "untouched in batches": untouched,
        "ToCa one by one": one_by_one,
        "ToCa in batches": in_batches,
        "ToCa in lockstep": in_lockstep,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=12, help="digits (%(default)s)")
    parser.add_argument("--capacity", type=int, default=8, help="at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--presets", nargs="+", default=["dit-ddim50", "forecast"])
    parser.add_argument("--dtype", choices=timing.DTYPES, default="float32")
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--json", help="file for the result")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model, orders = load_model(timing.DTYPES[args.dtype]), some_orders(args.count)
    rows = []
    for preset in args.presets:
        runs = variants(model, toca.ToCaConfig.preset(preset), orders, args.capacity)
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                taken[name].append(time.perf_counter() - started)
        for name, seconds in taken.items():
            over = [a / b for a, b in zip(taken["untouched in batches"], seconds, strict=True)]
            rows.append(
                {
                    "preset": preset,
                    "variant": name,
                    "digits": len(orders),
                    "capacity": args.capacity,
                    "dtype": args.dtype,
                    "threads": torch.get_num_threads(),
                    "seconds": statistics.median(seconds),
                    "speedup": statistics.median(over),
                    "rounds": seconds,
                }
            )
            print(f"{preset:12} {name:22} {rows[-1]['seconds']:7.2f} s {rows[-1]['speedup']:6.2f}x")
    timing.write(args.json, "serving", rows)


if __name__ == "__main__":
    main()
