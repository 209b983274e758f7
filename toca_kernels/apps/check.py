"""Run a few steps in full and with ToCa, and say for each module what caching does to it.

    toca check black-forest-labs/FLUX.1-dev --preset flux-50 --device cuda --dtype bfloat16
    toca check ./pipeline --config own.json --steps 20 --call '{"height": 512, "width": 512}'

Three runs from the same noise: the untouched model, which is timed; the same with ToCa and an
interval of 1, whose cache holds what every module returned; and the run that is asked about.  The
error of a module is that of what is cached after a cached step, against what the full run computed
in the same step: what it reuses and how far the run has drifted, together.  It is measured in the
first, middle and last layer.

Few steps lie far apart, so the errors are larger than those of a run of 50 with the same settings:
what is safe here is safe there.

In Python `check(model_or_pipeline, call, config, steps)` does this for any sampling loop.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..config import ToCaConfig
from ..plan import Plan
from ..session import Session, enabled
from .measuring import timing
from .measuring.shapes import DTYPES
from .measuring.watch import Watch, relative
from .sampling import pipelines

# Relative errors.  On the trained model of examples/digits: where the result is off by 4 % (36 dB)
# its modules are by 0.08 to 0.24, where it is by 14 % (25 dB) they are by 0.2 to 0.5.
_MODULE_LIMIT = 0.3
_SAFE, _DOUBTFUL = 0.05, 0.2


# --- the report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleReport:
    """What caching does to one module.

    Attributes:
        module: its name in the plan; behind "transformer_2." for the second one of a pipeline.
        layers: how many layers have it.
        error: relative error of its output in cached steps, mean over steps and measured layers;
            None if no step of it was cached.
        worst_layer, worst_error: the measured layer with the largest mean error.
        k_share: k / N, mean over cached steps and all layers; 0 where its output is reused whole.
    """

    module: str
    layers: int
    error: float | None
    worst_layer: int | None
    worst_error: float | None
    k_share: float | None


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes:
        steps, cached_steps: of the run with ToCa.
        exact: whether full steps under ToCa give the untouched model's result, bit for bit.
        modules: one report for each module of the plan.
        full_seconds, cached_seconds: of a step; median of the untouched model, and of cached steps.
        error, psnr: of the result against the untouched one; psnr in dB, None where they are equal.
        cache_bytes, other_bytes: memory of the caches, and of scores, ages and selections.
        nan_scores: scores that were NaN.
    """

    steps: int
    cached_steps: int
    exact: bool
    modules: tuple[ModuleReport, ...]
    full_seconds: float
    cached_seconds: float | None
    error: float
    psnr: float | None
    cache_bytes: int
    other_bytes: int
    nan_scores: int

    @property
    def verdict(self) -> str:
        """What is safe and what to lower, in words."""
        if not math.isfinite(self.error) or self.nan_scores:
            return "NOT SAFE: the run gave numbers that are not finite; try bfloat16 or float32"
        if not self.exact:
            return (
                "NOT SAFE: full steps do not repeat the untouched model; "
                "is something in it random from call to call?"
            )
        if not self.cached_steps:
            return "nothing was cached: check more steps, or raise the interval"
        worst = sorted(
            (one for one in self.modules if (one.error or 0) > _MODULE_LIMIT),
            key=lambda one: -(one.error or 0),
        )
        fine = [one.module for one in self.modules if one not in worst]
        if self.error <= _SAFE:
            return f"safe: the result is off by {self.error:.1%}"
        start = "NOT SAFE" if self.error > _DOUBTFUL else "doubtful, look at the pictures"
        text = f"{start}: the result is off by {self.error:.1%}"
        if fine and worst:
            text += f"; fine as it is: {', '.join(fine)}"
        return f"{text}; {_advice(worst)}"

    def __str__(self) -> str:
        columns = {
            "module": "",
            "layers": "",
            "error": ".2e",
            "worst layer": "",
            "its error": ".2e",
            "k / N": ".1%",
        }
        rows = [dict(zip(columns, astuple(one), strict=True)) for one in self.modules]
        mib = 1 / 2**20
        lines = [
            timing.table(rows, columns),
            "",
            f"steps     {self.steps}, {self.cached_steps} of them cached",
            f"a step    {1e3 * self.full_seconds:.1f} ms untouched{self._cached_time()}",
            f"result    relative error {self.error:.2e}, "
            + ("equal" if self.psnr is None else f"PSNR {self.psnr:.1f} dB"),
            f"memory    {self.cache_bytes * mib:.1f} MiB caches, "
            f"{self.other_bytes * mib:.2f} MiB scores and selections",
            f"verdict   {self.verdict}",
        ]
        return "\n".join(lines)

    def _cached_time(self) -> str:
        if self.cached_seconds is None:
            return ""
        ratio = self.full_seconds / self.cached_seconds
        return f", {1e3 * self.cached_seconds:.1f} ms cached, {ratio:.2f}x as fast"


def _advice(worst: Sequence[ModuleReport]) -> str:
    """What to change for these modules, the worst first."""
    # Two transformers share their settings.
    chosen = dict.fromkeys(one.module.rpartition(".")[2] for one in worst if one.k_share)
    if not chosen:
        return "lower the interval"
    return f"raise fresh_ratio, or module_ratio of {', '.join(chosen)}; or lower the interval"


# --- measuring -----------------------------------------------------------------------------------


def check(
    model_or_pipeline: Any, call: Callable[[], Tensor], config: ToCaConfig, steps: int
) -> Report:
    """Run `call` untouched, in full steps that are looked at, and with ToCa.

    Args:
        model_or_pipeline: what `enable` takes.
        call: samples with it for `steps` steps and returns the result; always from the same noise.
        config: the settings that are asked about.
        steps: steps of a run.

    Raises:
        ValueError: what `enable` refuses.
    """
    with enabled(model_or_pipeline, config, num_steps=steps) as session:
        found = [one.model for one in (session, *session.others)]  # refused before the first run
    with torch.no_grad():
        plain = [Watch(model) for model in found]
        untouched = _run(plain, call)
        with enabled(model_or_pipeline, _always_full(config), num_steps=steps) as session:
            full = _watches(session)
            exact = torch.equal(_run(full, call), untouched)
        with enabled(model_or_pipeline, config, num_steps=steps) as session:
            cached = _watches(session, full)
            result = _run(cached, call)
            summary, reports = session.summary(), tuple(_reports(session, cached))
    error = relative(result.float(), untouched.float())
    # The first call of a run carries what is done once: of full steps there are others.
    times = [one.per_step(range(len(one.seconds) > 1, len(one.seconds)), steps) for one in plain]
    cached_times = [one.per_step(sorted(one.cached), steps) for one in cached]
    return Report(
        steps=summary.steps,
        cached_steps=summary.cached_steps,
        exact=exact,
        modules=reports,
        full_seconds=sum(one for one in times if one is not None),
        cached_seconds=sum(one or 0.0 for one in cached_times) or None,
        error=error,
        psnr=_psnr(result, untouched),
        cache_bytes=summary.cache_bytes,
        other_bytes=summary.other_bytes,
        nan_scores=summary.nan_scores,
    )


def _run(watches: Sequence[Watch], call: Callable[[], Tensor]) -> Tensor:
    with contextlib.ExitStack() as stack:
        for watch in watches:
            stack.enter_context(watch.watching())
        return call().detach().cpu()


def _watches(session: Session, references: Sequence[Watch] | None = None) -> list[Watch]:
    sessions = (session, *session.others)
    beside: Sequence[Watch | None] = references or [None] * len(sessions)
    return [Watch(one.model, one, other) for one, other in zip(sessions, beside, strict=True)]


def _always_full(config: ToCaConfig) -> ToCaConfig:
    """The same modules with every step in full: nothing but what they return is looked at."""
    return ToCaConfig(
        interval=1,
        selector="random",
        module_ratio=config.module_ratio,
        tabulate_modulation=False,
        prepack=False,
    )


def _reports(session: Session, watches: Sequence[Watch]) -> Iterator[ModuleReport]:
    for number, (one, watch) in enumerate(zip((session, *session.others), watches, strict=True)):
        plans = [b.done.plan() for b in one._run.branches.values() if b.done.seconds]
        for name, layers in one._run.layers.items():
            means = {at: statistics.mean(found) for at, found in watch.errors[name].items()}
            worst = max(means, key=lambda at: means[at]) if means else None
            yield ModuleReport(
                module=f"transformer_{number + 1}.{name}" if number else name,
                layers=layers,
                error=statistics.mean(means.values()) if means else None,
                worst_layer=worst,
                worst_error=None if worst is None else means[worst],
                k_share=_k_share(plans, name),
            )


def _k_share(plans: Sequence[Plan], name: str) -> float | None:
    shares = [
        float(plan.k[name][~plan.full[name]].mean()) / plan.num_tokens[name]
        for plan in plans
        if not plan.full[name].all()
    ]
    return statistics.mean(shares) if shares else None


def _psnr(have: Tensor, want: Tensor) -> float | None:
    """Of the range that the untouched result spans."""
    mse = float((have.float() - want.float()).square().mean())
    peak = float(want.max() - want.min())
    return 10 * math.log10(peak**2 / mse) if mse > 0 and peak > 0 else None


# --- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a diffusers pipeline, or its transformer: folder or name")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--preset", help=", ".join(ToCaConfig.presets()))
    chosen.add_argument("--config", help="saved settings (.json)")
    parser.add_argument("--steps", type=int, default=10, help="of a run (%(default)s)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument(
        "--call", default="{}", help='arguments of the pipeline: \'{"height": 512, "width": 512}\''
    )
    parser.add_argument("--json", help="file to write the report to")


def run(args: argparse.Namespace) -> int:
    """Load, measure and print.

    Raises:
        ValueError: a model that is not supported, or settings that do not fit it.
        OSError: there is no such model.
    """
    if args.steps < 2:
        raise ValueError(f"steps: expected at least 2, the first is full, got {args.steps}")
    try:
        arguments = dict(json.loads(args.call))
    except (TypeError, ValueError):
        raise ValueError(f"call: expected a JSON object, got {args.call!r}") from None
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    config = _config(args)
    pipe = pipelines.load(args.model, device, dtype)
    if getattr(pipe, "transformer", None) is None:
        known = ", ".join(adapter.name for adapter in models.ADAPTERS)
        raise ValueError(
            f"model: expected a pipeline around a transformer ({known}), got "
            f"{type(pipe).__name__}, which has none"
        )
    if config is None:
        config = ToCaConfig(selector=_selector(pipe))
    report = check(pipe, pipelines.caller(pipe, args.steps, arguments), config, args.steps)
    print(report)
    if args.json is not None:
        found = {
            "model": args.model,
            "machine": timing.machine(device),
            "config": config.to_dict(),
            **asdict(report),
            "verdict": report.verdict,
        }
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _config(args: argparse.Namespace) -> ToCaConfig | None:
    if args.config is not None:
        return ToCaConfig.load(args.config)
    return None if args.preset is None else ToCaConfig.preset(args.preset)


def _selector(pipe: Any) -> Any:
    """The best one that all blocks have scores for."""
    blocks = models.find(pipe.transformer).blocks()
    known = ("entropy", "attention", "random")
    return next(one for one in known if all(one in block.selectors for block in blocks))
