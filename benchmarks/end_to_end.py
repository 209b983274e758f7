"""A whole sampling run of DiT with random weights: untouched, with ToCa, and with naive ToCa.

The runs go step by step in turns, so a drift of the machine meets all of them.  The untouched
model costs the same in every step and is timed in every `--every`-th.  Seconds are of the model's
forward; the sampler's own arithmetic is left out.  On CUDA the untouched model and ToCa also run as
CUDA graphs ("graphed"), which want few different k: --round-k-to.

    python benchmarks/end_to_end.py --preset dit-ddim50 --batch 8 --dtype bfloat16
    python benchmarks/end_to_end.py --device cuda --batch 2 --round-k-to 16 --compile
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

import dit
import naive
import timing
import toca_kernels as toca
from toca_kernels.flops import BlockShape


class NaiveModel:
    """The same plan in plain torch: full steps keep the scores, cached steps use no kernels."""

    def __init__(self, model: dit.DiT, plan: toca.Plan, config: toca.ToCaConfig) -> None:
        self.model, self.plan, self.config, self.step = model, plan, config, 0
        self.caches = [naive.LayerCache(*(torch.zeros(0) for _ in range(4))) for _ in model.blocks]

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        model, config = self.model, self.config
        if self.step == self.plan.num_steps:
            self.step = 0
        side = x.shape[-1] // model.patch_size
        hidden = model.x_embedder(x) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(y, False)
        for layer, (block, cache) in enumerate(zip(model.blocks, self.caches, strict=True)):
            if self.plan.full["mlp"][self.step, layer]:
                cache.age = torch.zeros(hidden.shape[:2], dtype=torch.int32, device=hidden.device)
                hidden = naive.full_block(block, hidden, c, cache)
            else:
                k, grid = int(self.plan.k["mlp"][self.step, layer]), (side, side, config.grid)
                hidden = naive.cached_block(
                    block, hidden, c, cache, k, config.age_step, grid, config.bonus
                )
        self.step += 1
        return model.final_layer(hidden, c)


class Setting:
    """The model in its variants, all with the same weights, and the inputs of a step."""

    def __init__(self, args: argparse.Namespace, batch: int) -> None:
        self.side = round(args.tokens**0.5)
        self.channels, self.heads, depth = dit.SIZES[args.size]
        self.depth = args.depth or depth
        self.model = dit.randomize(self._empty()).to(args.device, timing.DTYPES[args.dtype])
        self.config = toca.ToCaConfig.preset(args.preset, round_k_to=args.round_k_to)
        self.plan = self.config.plan(
            num_steps=args.steps,
            num_layers=self.depth,
            num_tokens=args.tokens,
            modules=("attn", "mlp"),
        )
        self.timesteps = torch.linspace(999, 0, args.steps).long().tolist()
        self.sessions: dict[str, toca.Session] = {}
        self.variants: dict[str, Any] = {
            "untouched": self.model,
            "exact": self._enabled("exact"),
            "fused": self._enabled("fused"),
            "naive": NaiveModel(self.model, self.plan, self.config),
        }
        if args.compile:
            self.variants["compiled"] = functools.partial(
                torch.compile(dit.DiT.forward), self.model
            )
        generator = torch.Generator().manual_seed(0)
        size = 2 * self.side
        self.x = torch.randn(batch, 4, size, size, generator=generator)
        self.x = self.x.to(args.device, timing.DTYPES[args.dtype])
        self.y = torch.arange(batch, device=args.device)
        if args.device == "cuda":
            self.variants |= {
                "exact, graphed": self._enabled("exact", cuda_graph=True),
                "fused, graphed": self._enabled("fused", cuda_graph=True),
                "untouched, graphed": self._replayed(timing.Clock(args.device)),
            }

    def _empty(self) -> dit.DiT:
        shape = {"channels": self.channels, "num_heads": self.heads, "depth": self.depth}
        return dit.DiT(2 * self.side, **shape).requires_grad_(False).eval()

    def _enabled(self, full_steps: str, *, cuda_graph: bool = False) -> dit.DiT:
        twin = self._empty()
        twin.load_state_dict(self.model.state_dict(), assign=True)
        twin.requires_grad_(False)
        config = self.config.replace(full_steps=full_steps)
        session = toca.enable(twin, config, timesteps=self.timesteps, cuda_graph=cuda_graph)
        self.sessions[f"{full_steps}, graphed" if cuda_graph else full_steps] = session
        return twin

    def _replayed(self, clock: timing.Clock) -> Callable[..., torch.Tensor]:
        """The untouched model as a CUDA graph of the inputs at hand."""
        t = self.y.clone()
        outputs: list[torch.Tensor] = []
        replay = clock.captured(lambda: outputs.append(self.model(self.x, t, self.y)))

        def run(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            t.copy_(timestep)
            replay()
            return outputs[-1]

        return run

    def flops_ratio(self) -> float:
        shape = BlockShape(batch=len(self.x), channels=self.channels, heads=self.heads)
        return self.plan.flops(shape).ratio


def run(setting: Setting, clock: timing.Clock, every: int) -> dict[str, float]:
    """Seconds of a whole run of each variant."""
    seconds: dict[str, list[float]] = {name: [] for name in setting.variants}
    same_every_step = ("untouched", "compiled", "untouched, graphed")
    for name in same_every_step:
        if name in setting.variants:  # compiles, and touches the weights
            setting.variants[name](setting.x, torch.full_like(setting.y, 999), setting.y)
    changing = [run for name, run in setting.variants.items() if name not in same_every_step]
    for timestep in 2 * setting.timesteps if clock.cuda else []:  # compile; then record graphs
        for variant in changing:
            variant(setting.x, torch.full_like(setting.y, timestep), setting.y)
    for step, timestep in enumerate(tqdm(setting.timesteps, desc="steps")):
        t = torch.full_like(setting.y, timestep)
        outputs = {}
        for name, variant in setting.variants.items():
            if name in same_every_step and step % every:
                continue
            elapsed, outputs[name] = clock.timed(variant, setting.x, t, setting.y)
            seconds[name].append(elapsed)
        if step == 0 and not torch.equal(outputs["exact"], outputs["untouched"]):
            raise SystemExit("the first full step differs from the untouched model")
        for name in ("exact", "fused"):
            check_replay(setting, outputs, name)
    steps = len(setting.timesteps)
    return {name: statistics.mean(values) * steps for name, values in seconds.items()}


def check_replay(setting: Setting, outputs: dict[str, torch.Tensor], name: str) -> None:
    """A replayed step computes what the eager one does, and is replayed."""
    have, want = outputs.get(f"{name}, graphed"), outputs[name]
    if have is None:
        return
    error = ((have - want).float().norm() / want.float().norm()).item()
    if not error < 3e-2:
        raise SystemExit(f"{name}: a replayed step differs from an eager one by {error:.2e}")
    fallback = setting.sessions[f"{name}, graphed"].summary().graph_fallback
    if fallback:
        raise SystemExit(f"{name}: steps are not replayed: {fallback}")


def measure(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    setting = Setting(args, batch)
    seconds = run(setting, timing.Clock(args.device), args.every)
    ratio = setting.flops_ratio()
    row: dict[str, Any] = {
        "model": f"DiT-{args.size}, {args.tokens} tokens, {setting.depth} blocks",
        "run": f"{args.preset}, {args.steps} steps",
        "batch": batch,
        "dtype": args.dtype,
        "FLOPs ratio": ratio,
        **{f"{name} s": value for name, value in seconds.items()},
    }
    for name, value in seconds.items():
        row[f"{name} speed-up"] = seconds["untouched"] / value
    row["efficiency"] = row["exact speed-up"] / ratio
    if "untouched, graphed" in seconds:
        row["graphed speed-up"] = seconds["untouched, graphed"] / seconds["exact, graphed"]
        row["graphed efficiency"] = row["graphed speed-up"] / ratio
    row["memory"] = {
        name: {
            key: getattr(session.summary(), key)
            for key in (
                "cache_bytes",
                "modulation_bytes",
                "packed_bytes",
                "other_bytes",
                "graph_bytes",
            )
        }
        for name, session in setting.sessions.items()
    }
    return row


COLUMNS = {
    "model": "",
    "run": "",
    "batch": "d",
    "dtype": "",
    "FLOPs ratio": ".2f",
    "untouched s": ".1f",
    "compiled speed-up": ".2f",
    "naive speed-up": ".2f",
    "exact speed-up": ".2f",
    "fused speed-up": ".2f",
    "efficiency": ".0%",
    "untouched, graphed speed-up": ".2f",
    "exact, graphed speed-up": ".2f",
    "fused, graphed speed-up": ".2f",
    "graphed speed-up": ".2f",
    "graphed efficiency": ".0%",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", default="XL", choices=dit.SIZES)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--depth", type=int, help="blocks; default: the published number")
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--dtype", default="bfloat16", choices=timing.DTYPES)
    parser.add_argument("--preset", default="dit-ddim50", choices=toca.ToCaConfig.presets())
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--round-k-to", type=int, default=1)
    parser.add_argument("--every", type=int, default=5, help="steps in which untouched is timed")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--json", help="file to write the result to")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        rows.append(measure(args, batch))
        timing.write(args.json, "end_to_end", rows, args.device)
    print(timing.table(rows, {name: spec for name, spec in COLUMNS.items() if name in rows[0]}))


if __name__ == "__main__":
    main()
