"""One block of each family at its real shape: a full step, a cached one, and the latter naively.

A diffusers model of one or two layers with random weights gives the blocks what they are called
with, but for Open-Sora's, which are of stdit3.py; they alone are run and timed, on fixed hidden
states.  How many tokens a cached step recomputes is what the family's preset says on average,
without its slopes over layers and steps; --ratio sets k/N of every module that selects.  No time is
reported before the cached step and the naive one agree.

    python benchmarks/families.py --json benchmarks/results/families.json
    python benchmarks/families.py --device cuda --ratio preset 0.1 0.3 --compile
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import naive_families as naive
import timing
import toca_kernels as toca
from family_blocks import FAMILIES, Family, Stack, stack_of, through

try:
    from tqdm import tqdm
except ImportError:  # a bar is all that is missed

    def tqdm(rows: Any, **_: Any) -> Any:
        return rows


STEPS = 1000  # of a run: more than are timed
DRIFT = 0.1  # of the hidden states between the full step and the cached one that is checked
MOST_IN_A_TURN = 5
FRAMES = 4  # of a video of fewer tokens than a frame has
MIB = 2**20


# --- the variants ---------------------------------------------------------------------------------


class Case:
    """A family's blocks on a device, and how its session is called."""

    def __init__(self, family: Family, args: argparse.Namespace) -> None:
        self.family, self.device = family, args.device
        self.grid = _grid(family, args.tokens, args.device)
        self.text, self.depth = args.text or family.text, args.depth or family.depth
        dtype = timing.DTYPES[args.dtype]
        self.stack, self.call = stack_of(
            family, self.grid, self.text, args.heads, self.depth, args.device, dtype
        )

    def full(self) -> tuple[Tensor, ...]:
        return self.stack(*self.call)

    def config(self, ratio: float | None, interval: int) -> toca.ToCaConfig:
        """The family's settings without what changes over the run, a full step every `interval`."""
        preset = toca.ToCaConfig.preset(self.family.preset)
        asked = {} if ratio is None else {"fresh_ratio": ratio}
        modules = dict(preset.module_ratio)
        return preset.replace(
            interval=interval,
            age_weight=preset.age_step * interval,
            warmup=1,
            count_from="start",
            refresh_slope=0.0,
            decide_per_block=False,
            module_interval={},
            step_slope=0.0,
            layer_slope=0.0,
            module_ratio=modules if ratio is None else dict.fromkeys(modules, 1.0),
            share_cfg_selection=preset.share_cfg_selection and self.family.batch % 2 == 0,
            **asked,
        )


def _grid(family: Family, tokens: int | None, device: str) -> tuple[int, ...]:
    if tokens is None:
        return family.cpu_grid if device == "cpu" and family.cpu_grid else family.grid
    frame = family.grid[-2] * family.grid[-1]
    if len(family.grid) == 3 and tokens >= frame:
        return (tokens // frame, *family.grid[1:])
    frames = [min(FRAMES, tokens) for _ in family.grid[:-2]]
    side = naive.image_side(tokens // math.prod(frames))
    return (*frames, side, side)


class Ours:
    """Steps through the package, one after the other, as in a run."""

    def __init__(self, case: Case, config: toca.ToCaConfig, *, cuda_graph: bool = False) -> None:
        self.case, self.stack, self.step = case, case.stack.twin(), 0
        self.session = toca.enable(self.stack, config, num_steps=STEPS, cuda_graph=cuda_graph)

    def __call__(self) -> tuple[Tensor, ...]:
        x, t, text = self.case.call
        self.step += 1
        now = torch.full(t.shape, STEPS - self.step, device=t.device)
        return self.stack(x, now, text)


class Naive:
    """Cached steps in plain torch."""

    def __init__(self, case: Case, config: toca.ToCaConfig) -> None:
        self.stack, self.peer = case.stack, naive.PEERS[case.family.peer]
        self.body = self.peer.step
        found = naive.outputs_of(case.full, [self.peer.kept(b) for b in self.stack.blocks_in_turn])
        tokens = {name: N for out in found for name, N in naive.tokens_of(out).items()}
        plan = config.plan(num_steps=2, num_layers=1, num_tokens=tokens, modules=list(tokens))
        self.k = {name: int(k[1, 0]) for name, k in plan.k.items()}
        self.ratio = {name: k / tokens[name] for name, k in self.k.items() if k}
        grid = naive.grid_of(case.grid, config.grid, config.bonus)
        shared = config.share_cfg_selection
        self.caches = [
            naive.Cache(out, self._k_of(out), config.age_step, grid, config.bonus, shared)
            for out in found
        ]

    def _k_of(self, out: Mapping[str, Tensor]) -> dict[str, int]:
        return {name: k for name, k in self.k.items() if name in out}

    def __call__(self) -> tuple[Tensor, ...]:
        caches = iter(self.caches)

        def step(block: Any, given: dict[str, Any]) -> Any:
            read = {name: given[name] for name in self.peer.reads if name in given}
            return self.body(block, next(caches), **read)

        return through(self.stack.blocks_in_turn, step, self.stack.arguments)

    def compiled(self) -> Naive:
        """The same caches, compiled."""
        other = copy.copy(self)
        other.body = torch.compile(self.peer.step)
        return other


def check(case: Case, ours: Ours, peer: Naive) -> None:
    """No time is reported for a wrong result: both recompute the same tokens of a state that has
    moved on since the full step.  What is compared is what the blocks add."""
    stacks, hidden = (case.stack, ours.stack), case.stack.arguments[case.stack.hidden]
    ours.session.record_selections = True
    ours()
    moved = hidden + DRIFT * torch.randn_like(hidden)
    for stack in stacks:
        stack.arguments[stack.hidden] = moved
    have = ours()
    for name in peer.ratio:
        caches = [cache for cache in peer.caches if name in cache.k]
        for cache, mask in zip(caches, ours.session.selections_of(name)[-1], strict=True):
            cache.chosen[name] = naive.indices(mask, case.device)
    want = peer()
    given = (moved, case.stack.arguments.get("encoder_hidden_states"))
    for stack, cache in itertools.product(stacks, peer.caches):
        stack.arguments[stack.hidden] = hidden
        cache.chosen.clear()
    ours.session.record_selections = False
    for a, b, before in zip(have, want, given, strict=False):
        error = ((a - b).float().norm() / (b - before).float().norm()).item()
        limit = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}[a.dtype]
        if not error < limit:
            label = case.family.label
            raise SystemExit(f"{label}: the cached step differs from plain torch by {error:.2e}")


def interleaved(
    runs: timing.Runs,
    clock: timing.Clock,
    *,
    seconds: float,
    repeats: int,
    after: Mapping[str, Callable[[], object]],
) -> dict[str, float]:
    """Median seconds of each run, in turns, as many as there is time for; short runs several times
    in a turn.  What comes `after` a run is not timed."""

    def call(name: str) -> float:
        elapsed, _ = clock.timed(runs[name])
        after.get(name, lambda: None)()
        return elapsed

    for name in runs:  # compiles, and touches the weights
        call(name)
    started = time.perf_counter()
    found = {name: [call(name)] for name in runs}
    turn = time.perf_counter() - started
    longest = max(values[0] for values in found.values())
    order = [
        name
        for again in range(MOST_IN_A_TURN)
        for name in runs
        if again == 0 or 4 * (again + 1) * found[name][0] < longest
    ]
    turns = max(1, min(repeats, int(seconds / turn)))
    for name in order[len(runs) :] + (turns - 1) * order:  # the first turn has begun
        found[name].append(call(name))
    return {name: statistics.median(values) for name, values in found.items()}


def measure(case: Case, ratio: float | None, args: argparse.Namespace) -> dict[str, Any]:
    torch._dynamo.reset()
    clock, config = timing.Clock(args.device), case.config(ratio, STEPS)
    ours, peer = Ours(case, config), Naive(case, config)
    check(case, ours, peer)
    done = ours.session.summary()  # of one full step and a cached one
    refreshing = Ours(case, case.config(ratio, 2))  # a full step, a cached one
    eight_bits = Ours(case, config.replace(cache_dtype="int8"))
    eight_bits()
    runs: timing.Runs = {
        "full": case.full,
        "naive": peer,
        "toca full": refreshing,
        "toca": ours,
        "toca, int8": eight_bits,
    }
    if args.compile:
        body = torch.compile(Stack.forward)
        runs["full, compiled"] = lambda: body(case.stack, *case.call)
        runs["naive, compiled"] = peer.compiled()
    after = {"toca full": refreshing}
    seconds = interleaved(runs, clock, seconds=args.seconds, repeats=args.repeats, after=after)
    if clock.cuda:
        seconds |= replayed(case, config, runs, clock, args.repeats)
    memory = {
        "cache": done.cache_bytes,
        "int8 cache": eight_bits.session.summary().cache_bytes,
        "packed": done.packed_bytes,
        "other": done.other_bytes,
    }
    full_flops = done.flops_full / 2
    flops = full_flops / (done.flops_done - full_flops)
    return _row(case, peer, flops, seconds, memory) | {"dtype": args.dtype}


def replayed(
    case: Case, config: toca.ToCaConfig, runs: timing.Runs, clock: timing.Clock, repeats: int
) -> dict[str, float]:
    """Seconds of the runs as CUDA graphs: peers captured here, ours by its own switch."""
    ours = Ours(case, config, cuda_graph=True)
    for _ in range(4):  # full, eager, recorded, replayed
        ours()
    done = ours.session.summary()
    if done.graphs == 0 or done.graph_fallback:
        raise SystemExit(f"the cached step is not replayed: {done.graph_fallback}")
    peers = {name: run for name, run in runs.items() if not name.startswith("toca")}
    graphs: timing.Runs = {name: clock.captured(run) for name, run in peers.items()}
    seconds = timing.in_turns(graphs | {"toca": ours}, clock, repeats=repeats)
    return {f"{name}, graphed": value for name, value in seconds.items()}


def _row(
    case: Case, peer: Naive, flops: float, seconds: dict[str, float], memory: dict[str, int]
) -> dict[str, Any]:
    full, ours = seconds["full"], seconds["toca"]
    row: dict[str, Any] = {
        "block": case.family.label,
        "batch": case.family.batch,
        "tokens": "x".join(map(str, case.grid)) + f" + {case.text}",
        "depth": case.depth,
        "k/N": peer.ratio,
        "recomputed": ", ".join(f"{name} {ratio:.0%}" for name, ratio in peer.ratio.items()),
        "FLOPs ratio": flops,
        **{f"{name} ms": 1e3 * value / case.depth for name, value in seconds.items()},
        "speed-up": full / ours,
        "int8 speed-up": full / seconds["toca, int8"],
        "naive speed-up": full / seconds["naive"],
        "over naive": seconds["naive"] / ours,
        "full step": seconds["toca full"] / full,
        "efficiency": full / ours / flops,
        **{f"{name} MiB": value / MIB / case.depth for name, value in memory.items()},
    }
    return row | _compiled_and_graphed(seconds, flops)


def _compiled_and_graphed(seconds: dict[str, float], flops: float) -> dict[str, float]:
    """The ratios of what was compiled and of graphs; nothing where there is neither."""
    row = {
        f"compiled {name} speed-up": seconds["full"] / seconds[f"{name}, compiled"]
        for name in ("full", "naive")
        if f"{name}, compiled" in seconds
    }
    if "toca, graphed" in seconds:
        ours = seconds["toca, graphed"]
        row["graphed speed-up"] = seconds["full, graphed"] / ours
        row["graphed efficiency"] = row["graphed speed-up"] / flops
        peers = [name for name in seconds if name.endswith(", graphed") and "toca" not in name]
        row |= {f"over {name}": seconds[name] / ours for name in peers}
    return row


COLUMNS = {
    "block": "",
    "tokens": "",
    "batch": "d",
    "dtype": "",
    "recomputed": "",
    "full ms": ".1f",
    "full, compiled ms": ".1f",
    "toca full ms": ".1f",
    "naive ms": ".2f",
    "naive, compiled ms": ".2f",
    "toca ms": ".2f",
    "toca, int8 ms": ".2f",
    "over naive": ".2f",
    "speed-up": ".1f",
    "FLOPs ratio": ".1f",
    "efficiency": ".0%",
    "cache MiB": ".1f",
    "int8 cache MiB": ".1f",
    "full, graphed ms": ".3f",
    "toca, graphed ms": ".3f",
    "over naive, graphed": ".2f",
    "over naive, compiled, graphed": ".2f",
    "graphed speed-up": ".1f",
    "graphed efficiency": ".0%",
}


def _ratio(text: str) -> float | None:
    return None if text == "preset" else float(text)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument(
        "--ratio", nargs="+", type=_ratio, default=[None], help="k/N, or 'preset', the default"
    )
    parser.add_argument("--tokens", type=int, help="fewer tokens than the model has")
    parser.add_argument("--text", type=int, help="tokens of the text")
    parser.add_argument("--heads", type=int, help="fewer heads, and channels, than the model has")
    parser.add_argument("--depth", type=int, help="blocks that run in turn (1 or 2)")
    parser.add_argument("--dtype", default="bfloat16", choices=timing.DTYPES)
    parser.add_argument("--repeats", type=int, default=20, help="turns, at most (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="for the turns of a row")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="also torch.compile the peers")
    parser.add_argument("--json", help="file to write the result to")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for name in tqdm(args.rows, desc="families"):
        case = Case(FAMILIES[name], args)
        for ratio in args.ratio:
            rows.append(measure(case, ratio, args))
            timing.write(args.json, "families", rows, args.device)
        del case
        gc.collect()
    print(timing.table(rows, {name: spec for name, spec in COLUMNS.items() if name in rows[0]}))


if __name__ == "__main__":
    main()
