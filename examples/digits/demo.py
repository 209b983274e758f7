"""Draws the same digits twice, untouched and with ToCa, and compares time and pictures.

    python examples/digits/demo.py

Prints a table and writes samples.png, tokens.png and demo.json into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import toca_kernels as toca
from digits import (
    GUIDANCE,
    NUM_CLASSES,
    accuracy,
    load_judge,
    load_model,
    sample,
    scheduler,
)
from pictures import draw_samples, draw_tokens

WARMUP_STEPS = 4
SHOWN = 3  # the digit whose steps tokens.png shows


@dataclass
class Run:
    """One pass over the whole sampling loop."""

    images: Tensor
    seconds: float
    noisy: list[Tensor] = field(default_factory=list)  # digit SHOWN, after every step


def timesteps(num_steps: int) -> Tensor:
    """The timesteps that sample() visits."""
    ddim = scheduler()
    ddim.set_timesteps(num_steps)
    return ddim.timesteps


def timed_sample(
    model: torch.nn.Module, labels: Tensor, args: argparse.Namespace, desc: str
) -> Run:
    """Samples once and takes the time."""
    noisy: list[Tensor] = []
    start = time.perf_counter()
    images = sample(
        model,
        labels,
        num_steps=args.steps,
        guidance=args.guidance,
        seed=args.seed,
        desc=desc,
        on_step=lambda step, x: noisy.append(x[_shown(args), 0].clone()),
    )
    return Run(images, time.perf_counter() - start, noisy)


def _shown(args: argparse.Namespace) -> int:
    return min(SHOWN, args.images - 1)


def warm_up(model: torch.nn.Module, labels: Tensor, num_steps: int = WARMUP_STEPS) -> None:
    """A few steps that nobody times: memory is mapped, kernels are loaded."""
    sample(model, labels, num_steps=num_steps, progress=False)


def run_untouched(model: torch.nn.Module, labels: Tensor, args: argparse.Namespace) -> Run:
    """The model as it is."""
    warm_up(model, labels)
    return timed_sample(model, labels, args, "untouched")


def run_toca(
    model: torch.nn.Module, labels: Tensor, args: argparse.Namespace
) -> tuple[Run, toca.Session]:
    """The same loop with token caching switched on."""
    config = toca.ToCaConfig.preset(args.preset)
    with toca.enabled(model, config, num_steps=WARMUP_STEPS, timesteps=timesteps(WARMUP_STEPS)):
        warm_up(model, labels)

    session = toca.enable(model, config, num_steps=args.steps, timesteps=timesteps(args.steps))
    session.record_selections = True
    try:
        run = timed_sample(model, labels, args, "with ToCa")
    finally:
        toca.disable(model)
    return run, session


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; the pixels span 2."""
    error = (images - reference).square().mean().item()
    return 10 * math.log10(4 / error) if error else math.inf


def compare(
    untouched: Run, cached: Run, summary: Any, labels: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """The numbers of the demo."""
    judge = load_judge()
    speedup = untouched.seconds / cached.seconds
    flops_ratio = summary.flops_full / summary.flops_done
    return {
        "preset": args.preset,
        "images": args.images,
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds_untouched": untouched.seconds,
        "seconds_toca": cached.seconds,
        "speedup": speedup,
        "flops_ratio": flops_ratio,
        "efficiency": speedup / flops_ratio,
        "full_steps": summary.full_steps,
        "cached_steps": summary.cached_steps,
        "tokens_recomputed": summary.tokens_recomputed,
        "tokens_total": summary.tokens_total,
        "cache_bytes": summary.cache_bytes,
        "psnr": psnr(cached.images, untouched.images),
        "accuracy_untouched": accuracy(judge, untouched.images, labels),
        "accuracy_toca": accuracy(judge, cached.images, labels),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    share = result["tokens_recomputed"] / result["tokens_total"]
    rows = [
        ("", "untouched", "ToCa"),
        ("seconds", f"{result['seconds_untouched']:.1f}", f"{result['seconds_toca']:.1f}"),
        ("speed-up", "", f"{result['speedup']:.2f}x"),
        ("FLOPs ratio", "", f"{result['flops_ratio']:.2f}x"),
        ("efficiency (speed-up / FLOPs ratio)", "", f"{result['efficiency']:.0%}"),
        ("full / cached steps", f"{result['steps']} / 0", _steps(result)),
        ("tokens recomputed", "100%", f"{share:.1%}"),
        ("PSNR to the untouched sample", "", f"{result['psnr']:.1f} dB"),
        ("digits that the judge reads right", *_accuracies(result)),
    ]
    return "\n".join(f"{name:36}{left:>12}{right:>12}" for name, left, right in rows)


def _steps(result: dict[str, Any]) -> str:
    return f"{result['full_steps']} / {result['cached_steps']}"


def _accuracies(result: dict[str, Any]) -> tuple[str, str]:
    return f"{result['accuracy_untouched']:.1%}", f"{result['accuracy_toca']:.1%}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40, help="number of digits to draw")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps")
    parser.add_argument("--preset", default="dit-ddim50", help="published ToCa settings")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="output folder")
    return parser.parse_args()


def main() -> None:
    """Runs the comparison and writes its files."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    model = load_model(getattr(torch, args.dtype))
    labels = torch.arange(args.images) % NUM_CLASSES

    untouched = run_untouched(model, labels, args)
    cached, session = run_toca(model, labels, args)
    summary = session.summary()
    result = compare(untouched, cached, summary, labels, args)
    print(f"\n{summary}\n\n{table(result)}\n")

    (args.out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_samples(args.out / "samples.png", untouched.images, cached.images, result)
    selections = [
        None if chosen is None else chosen[:, _shown(args)] for chosen in session.selections
    ]
    draw_tokens(args.out / "tokens.png", selections, cached.noisy, args.preset)
    print(f"pictures and demo.json are in {args.out}/")


if __name__ == "__main__":
    main()
