"""Run a few steps in full and with ToCa, and say for each module what caching does to it.

    toca check black-forest-labs/FLUX.1-dev --preset flux-50 --device cuda --dtype bfloat16
    toca check ./pipeline --config own.json --steps 20 --call '{"height": 512, "width": 512}'

Three runs from the same noise: the untouched model, which is timed; the same with ToCa and an
interval of 1, whose cache holds what every module returned; and the run that is asked about.  The
error of a module is that of what is cached after a cached step, against what the full run computed
in the same step: what it reuses and how far the run has drifted, together.  It is measured in the
first, middle and last layer.

In Python `check(model_or_pipeline, call, config, steps)` does this for any sampling loop.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..blocks.block import Block, BlockState
from ..config import ToCaConfig
from ..plan import Plan
from ..session import Session, enabled
from . import timing

_TOKENS = 1024  # of a sample, evenly spread, are compared: a video's would not fit in memory
# Relative errors.  A trained DiT on digits that keeps 44 dB shows 0.1 to 0.2 in its modules, so
# those below are taken for harmless; of the result, less is lost than in any one module.
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
            text += f"; {', '.join(fine)} would do as it is"
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
        rows = [
            dict(zip(columns, asdict(one).values(), strict=True))
            | {"worst layer": one.worst_layer, "its error": one.worst_error, "k / N": one.k_share}
            for one in self.modules
        ]
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
        return f", {1e3 * self.cached_seconds:.1f} ms cached, {ratio:.2f}x faster"


def _advice(worst: Sequence[ModuleReport]) -> str:
    """What to change for these modules, the worst first."""
    chosen = [one.module.rpartition(".")[2] for one in worst if one.k_share]
    if not chosen:
        return "lower the interval"
    return f"raise fresh_ratio, or module_ratio of {', '.join(chosen)}; or lower the interval"


# --- measuring -----------------------------------------------------------------------------------


class Watch:
    """Looks at every call of one model: its time, and the caches of some layers after it.

    Attributes:
        seconds: of each call.
        cached: numbers of the calls in which something came from the cache.
        outputs: (call, module, layer) -> what is cached, on the CPU; filled where there is no
            `reference`.
        errors: module -> layer -> relative error in each cached call; against the reference.
    """

    def __init__(
        self, model: nn.Module, session: Session | None = None, reference: Watch | None = None
    ) -> None:
        self.model = model
        self.seconds: list[float] = []
        self.cached: set[int] = set()
        self.outputs: dict[tuple[int, str, int], Tensor] = {}
        self.errors: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._reference = reference
        self._watched = _some(session._run.blocks) if session is not None else {}
        self._states: dict[Block, BlockState] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        """Calls inside are looked at.

        The model's forward is wrapped and not hooked: published samplers call it directly.
        """
        own, attributes = self.model.forward, vars(self.model)
        before = attributes.get("forward")

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._synchronize()
            started = time.perf_counter()
            out = own(*args, **kwargs)
            self._synchronize()
            self._after(time.perf_counter() - started)
            return out

        handles = [block.block.register_forward_hook(self._noting(block)) for block in self._watched]
        attributes["forward"] = forward
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            attributes.pop("forward")
            if before is not None:
                attributes["forward"] = before

    def _synchronize(self) -> None:
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _noting(self, block: Block) -> Callable[..., None]:
        """Keeps the step's state, to be read when the time has been taken."""

        def note(*args: Any) -> None:
            if block.state is not None:
                self._states[block] = block.state

        return note

    def _after(self, seconds: float) -> None:
        call = len(self.seconds)
        self.seconds.append(seconds)
        for block, state in self._states.items():
            for name in self._watched[block]:
                at = call, name, block.layers[name]
                if self._reference is None:
                    self.outputs[at] = _sample(block.read(state, name))
                elif not state.full[name]:
                    self.cached.add(call)
                    want = self._reference.outputs[at].float()
                    error = _relative(_sample(block.read(state, name)).float(), want)
                    self.errors[name][at[2]].append(error)
        self._states = {}

    def per_step(self, calls: Sequence[int], steps: int) -> float | None:
        """Seconds of a step, from the median of these calls."""
        if not calls:
            return None
        median = statistics.median(self.seconds[call] for call in calls)
        return median * len(self.seconds) / steps


def _some(blocks: Sequence[Block]) -> dict[Block, list[str]]:
    """The blocks that are the first, middle or last layer of a module, and of which."""
    last: dict[str, int] = {}
    for block in blocks:
        last |= {name: block.layers[name] for name in block.modules}
    found = {
        block: [
            name
            for name in block.modules
            if block.layers[name] in (0, last[name] // 2, last[name])
        ]
        for block in blocks
    }
    return {block: names for block, names in found.items() if names}


def _sample(x: Tensor) -> Tensor:
    """Some of a module's tokens, on the CPU; spaced oddly, so that they are not one column."""
    return x[:, :: math.ceil(x.shape[1] / _TOKENS) | 1].to("cpu", copy=True)


def _relative(have: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm; 0 where both are zero."""
    norm, off = float(want.norm()), float((have - want).norm())
    return off / norm if norm else float(off > 0)


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
            summary, reports = session.summary(), _reports(session, cached)
    error = _relative(result.float(), untouched.float())
    # The first call of a run carries what is done once: of full steps there are others.
    times = [one.per_step(range(len(one.seconds) > 1, len(one.seconds)), steps) for one in plain]
    cached_times = [one.per_step(sorted(one.cached), steps) for one in cached]
    return Report(
        steps=summary.steps,
        cached_steps=summary.cached_steps,
        exact=exact,
        modules=tuple(reports),
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
    beside = references or [None] * len(sessions)
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
