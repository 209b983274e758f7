"""One DiT block: a cached step against a full one, and against the same step in plain torch.

Each figure is for one block: a stack of blocks with different weights runs in turn, so no weight
is in the cache when its block comes.  `toca` counts its share of the modulation table, computed
once per run of 50 steps, and of the selection of all layers.  Efficiency: speed-up / FLOPs ratio.
On CUDA each run is also replayed as a CUDA graph ("graphed"): what is left when the host is no
longer in the way.

    python benchmarks/block.py --size XL --tokens 256 --batch 8 --dtype bfloat16
    python benchmarks/block.py --device cuda --size XL --batch 2 64 --dtype bfloat16 --compile
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from tqdm import tqdm

import dit
import naive
import timing
import toca_kernels as toca
from toca_kernels.flops import BlockShape

STEPS = 50
CELL, BONUS, AGE_STEP = 2, 0.6, 0.25 / 3


class Stack(dit.DiT):
    """The blocks of a DiT on fixed hidden states: patch embedding and final layer are left out."""

    hidden: torch.Tensor

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        hidden = self.hidden
        for block in self.blocks:
            hidden = block(hidden, c)
        return hidden


class Case:
    """A shape, its stack of blocks and its inputs."""

    def __init__(
        self, size: str, tokens: int, batch: int, dtype: str, depth: int, device: str
    ) -> None:
        self.size, self.tokens, self.batch, self.dtype, self.depth, self.device = (
            size,
            tokens,
            batch,
            dtype,
            depth,
            device,
        )
        self.side = round(tokens**0.5)
        latent = (batch, 4, 2 * self.side, 2 * self.side)
        self.x = torch.empty(latent, device=device)  # only its size is read
        self.y = torch.arange(batch, device=device)
        self.stack = dit.randomize(self.empty_stack()).to(device, timing.DTYPES[dtype])
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(batch, tokens, dit.SIZES[size][0], generator=generator)
        self.stack.hidden = hidden.to(device, timing.DTYPES[dtype])

    def empty_stack(self) -> Stack:
        channels, heads, _ = dit.SIZES[self.size]
        return Stack(2 * self.side, channels=channels, num_heads=heads, depth=self.depth).eval()

    def twin(self) -> Stack:
        """Another module with the same weights."""
        twin = self.empty_stack()
        twin.load_state_dict(self.stack.state_dict(), assign=True)
        twin.hidden = self.stack.hidden
        return twin.requires_grad_(False)

    def t(self, timestep: float) -> torch.Tensor:
        return torch.full((self.batch,), int(timestep), device=self.device)

    def flops_ratio(self, k: int) -> float:
        """FLOPs of a full block over those of a cached one, as the paper's code counts them."""
        plan = _config(k, self.tokens).plan(
            num_steps=2, num_layers=1, num_tokens=self.tokens, modules=("attn", "mlp")
        )
        channels, heads, _ = dit.SIZES[self.size]
        full, cached = plan.flops(
            BlockShape(batch=self.batch, channels=channels, heads=heads)
        ).steps
        return float(full / cached)


def _config(k: int, tokens: int, **settings: Any) -> toca.ToCaConfig:
    """One full step, then k tokens in every step: ToCa's scores, ages and 2 x 2 bonus."""
    return toca.ToCaConfig(
        interval=STEPS,
        fresh_ratio=(k + 0.5) / tokens,
        age_weight=AGE_STEP * STEPS,
        grid=CELL,
        bonus=BONUS,
        **settings,
    )


class Ours:
    """Cached steps through the package, as in a run; the first one fills the table."""

    def __init__(self, case: Case, k: int, *, cuda_graph: bool = False) -> None:
        self.case, self.stack = case, case.twin()
        self.timesteps = torch.linspace(999, 0, STEPS).long().tolist()
        self.session = toca.enable(
            self.stack, _config(k, case.tokens), timesteps=self.timesteps, cuda_graph=cuda_graph
        )
        self.start()

    def start(self) -> None:
        self.session.reset()
        self.step = 0
        self()

    def __call__(self) -> torch.Tensor:
        if self.step == STEPS:
            self.start()
        out = self.stack(self.case.x, self.case.t(self.timesteps[self.step]), self.case.y)
        self.step += 1
        return out


class Naive:
    """Cached steps in plain torch."""

    def __init__(self, case: Case, k: int, *, compiled: bool) -> None:
        self.case, self.k = case, k
        self.body = torch.compile(naive.cached_block) if compiled else naive.cached_block
        empty = torch.empty(0)
        ages = torch.zeros(case.batch, case.tokens, dtype=torch.int32, device=case.device)
        self.caches = [naive.LayerCache(empty, empty, empty, ages) for _ in case.stack.blocks]
        self.timesteps = torch.linspace(999, 0, STEPS).long().tolist()
        self.step = 1
        stack, c = case.stack, self.condition(999)
        x = stack.hidden
        for block, cache in zip(stack.blocks, self.caches, strict=True):
            x = naive.full_block(block, x, c, cache)

    def condition(self, timestep: float) -> torch.Tensor:
        stack = self.case.stack
        return stack.t_embedder(self.case.t(timestep)) + stack.y_embedder(self.case.y, False)

    def __call__(self) -> torch.Tensor:
        c = self.condition(self.timesteps[self.step % STEPS])
        self.step += 1
        x, grid = self.case.stack.hidden, (self.case.side, self.case.side, CELL)
        for block, cache in zip(self.case.stack.blocks, self.caches, strict=True):
            x = self.body(block, x, c, cache, self.k, AGE_STEP, grid, BONUS)
        return x


def check(ours: torch.Tensor, peer: torch.Tensor) -> None:
    """No time is reported for a wrong result."""
    error = ((ours - peer).float().norm() / peer.float().norm()).item()
    limit = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}[ours.dtype]
    if not error < limit:
        raise SystemExit(f"the cached step differs from plain torch by {error:.2e} (> {limit})")


def measure(
    case: Case, ratios: list[float], clock: timing.Clock, repeats: int, compiled: bool
) -> list[dict[str, Any]]:
    stack, t = case.stack, case.t(500)
    full = {"full": lambda: stack(case.x, t, case.y)}
    if compiled:
        body = torch.compile(Stack.forward)
        full["full, compiled"] = lambda: body(stack, case.x, t, case.y)
    rows = []
    for ratio in ratios:
        torch._dynamo.reset()
        k = int(ratio * case.tokens)
        ours, peer = Ours(case, k), Naive(case, k, compiled=False)
        if clock.cuda:
            ours()  # compiles kernels, which is not part of a run
            ours.start()
        first, _ = clock.timed(ours)  # with the table of all steps
        check(ours(), (peer(), peer())[1])
        runs = {**full, "naive": peer, "toca": ours}
        if compiled:
            runs["naive, compiled"] = Naive(case, k, compiled=True)
        seconds = timing.in_turns(runs, clock, repeats=repeats)
        tabulating = max(0.0, first - seconds["toca"]) / (STEPS - 1)
        seconds["toca"] += tabulating
        if clock.cuda:
            seconds |= replayed(case, k, runs, clock, repeats)
            seconds["toca, graphed"] += tabulating
        rows.append(_row(case, ratio, k, seconds))
    return rows


def replayed(
    case: Case, k: int, runs: timing.Runs, clock: timing.Clock, repeats: int
) -> dict[str, float]:
    """Seconds of the runs as CUDA graphs: peers captured here, ours by its own switch."""
    ours = Ours(case, k, cuda_graph=True)
    for _ in range(3):  # eager, recorded, replayed
        ours()
    done = ours.session.summary()
    if done.graphs == 0 or done.graph_fallback:
        raise SystemExit(f"the cached step is not replayed: {done.graph_fallback}")
    graphs = {name: clock.captured(run) for name, run in runs.items() if name != "toca"}
    seconds = timing.in_turns(graphs | {"toca": ours}, clock, repeats=repeats)
    return {f"{name}, graphed": value for name, value in seconds.items()}


def _row(case: Case, ratio: float, k: int, seconds: dict[str, float]) -> dict[str, Any]:
    milliseconds = {name: 1e3 * value / case.depth for name, value in seconds.items()}
    speedup, flops = seconds["full"] / seconds["toca"], case.flops_ratio(k)
    return {
        "block": f"DiT-{case.size}, {case.tokens} tokens",
        "batch": case.batch,
        "dtype": case.dtype,
        "k/N": ratio,
        "FLOPs ratio": flops,
        **{f"{name} ms": value for name, value in milliseconds.items()},
        "speed-up": speedup,
        "naive speed-up": seconds["full"] / seconds["naive"],
        **{
            f"compiled {name} speed-up": seconds["full"] / seconds[f"{name}, compiled"]
            for name in ("full", "naive")
            if f"{name}, compiled" in seconds
        },
        "efficiency": speedup / flops,
        **_graphed(seconds, flops),
    }


def _graphed(seconds: dict[str, float], flops: float) -> dict[str, float]:
    """The ratios between graphs; nothing where there are none."""
    ours, full = (seconds.get(f"{name}, graphed") for name in ("toca", "full"))
    if ours is None or full is None:
        return {}
    peers = [name for name in seconds if name.endswith(", graphed") and name != "toca, graphed"]
    return {
        "graphed speed-up": full / ours,
        "graphed efficiency": full / ours / flops,
        **{f"over {name}": seconds[name] / ours for name in peers},
    }


COLUMNS = {
    "block": "",
    "batch": "d",
    "dtype": "",
    "k/N": ".0%",
    "full ms": ".1f",
    "full, compiled ms": ".1f",
    "naive ms": ".2f",
    "naive, compiled ms": ".2f",
    "toca ms": ".2f",
    "naive speed-up": ".1f",
    "speed-up": ".1f",
    "FLOPs ratio": ".1f",
    "efficiency": ".0%",
    "full, graphed ms": ".3f",
    "toca, graphed ms": ".3f",
    "over naive, graphed": ".2f",
    "over naive, compiled, graphed": ".2f",
    "graphed speed-up": ".1f",
    "graphed efficiency": ".0%",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", nargs="+", default=["B", "XL"], choices=dit.SIZES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--batch", nargs="+", type=int, default=[2, 8])
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=timing.DTYPES
    )
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.07, 0.15, 0.30])
    parser.add_argument("--depth", type=int, default=4, help="blocks that run in turn")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="also torch.compile the peers")
    parser.add_argument("--json", help="file to write the result to")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    clock = timing.Clock(args.device)
    shapes = list(itertools.product(args.size, args.tokens, args.batch, args.dtype))
    rows: list[dict[str, Any]] = []
    for size, tokens, batch, dtype in tqdm(shapes, desc="shapes"):
        case = Case(size, tokens, batch, dtype, args.depth, args.device)
        rows += measure(case, args.ratio, clock, args.repeats, args.compile)
        timing.write(args.json, "block", rows, args.device)
    print(timing.table(rows, {name: spec for name, spec in COLUMNS.items() if name in rows[0]}))


if __name__ == "__main__":
    main()
