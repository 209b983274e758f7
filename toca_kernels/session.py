"""enable, disable and Session: a model's blocks replaced while it is enabled, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import models
from .blocks.self_mlp import SelfMLP
from .config import ToCaConfig
from .flops import BlockShape, Flops
from .graphs import CudaGraphs, StepGraphs
from .plan import Plan, check_integer
from .run import Branch, Done, Run

_ATTRIBUTE = "_toca_session"


@dataclass(frozen=True)
class Summary:
    """What the last run did, counted while it ran; since the last change of labels, batch or image
    size, where they changed in the middle of it.

    Attributes:
        steps: steps run; full_steps of them in full in every layer, cached_steps in some layer
            from the cache.
        tokens_recomputed, tokens_total: tokens that went through an MLP, summed over steps, layers
            and samples, and how many would have without ToCa.
        flops_full, flops_done, flops_ratio: by the convention of the paper's code (flops.py).
        seconds: in the model's forward.
        speedup_estimate: (mean seconds of a full step) * steps / seconds.  Full steps carry the
            scores, so measure the untouched model for the true figure.
        cache_bytes: cached features; modulation_bytes: table of gates, shifts and scales;
            packed_bytes: second copies of MLP weights; other_bytes: scores, ages, selections.
        nan_scores: scores that were NaN: the model's output is not to be trusted.
        graphs, graph_bytes: recorded steps, and the memory of their pool (cuda_graph=True).
        graph_fallback: why steps are not replayed although they should be; empty if they are.
    """

    steps: int
    full_steps: int
    cached_steps: int
    tokens_recomputed: int
    tokens_total: int
    flops_full: int
    flops_done: int
    flops_ratio: float
    seconds: float
    speedup_estimate: float
    cache_bytes: int
    modulation_bytes: int
    packed_bytes: int
    other_bytes: int
    nan_scores: int
    graphs: int = 0
    graph_bytes: int = 0
    graph_fallback: str = ""

    def __str__(self) -> str:
        mib = 1 / 2**20
        share = self.tokens_recomputed / max(self.tokens_total, 1)
        efficiency = self.speedup_estimate / self.flops_ratio
        lines = [
            f"steps       {self.steps} ({self.full_steps} full, {self.cached_steps} cached)",
            f"tokens      {self.tokens_recomputed:,} of {self.tokens_total:,} recomputed "
            f"({share:.1%})",
            f"FLOPs       {self.flops_done * 1e-12:.4g} of {self.flops_full * 1e-12:.4g} TFLOPs, "
            f"{self.flops_ratio:.2f}x less",
            f"seconds     {self.seconds:.2f}, about {self.speedup_estimate:.2f}x faster than full "
            f"steps only: {efficiency:.0%} of the FLOPs ratio",
            f"memory      {self.cache_bytes * mib:.1f} MiB caches, "
            f"{self.modulation_bytes * mib:.1f} MiB modulation, "
            f"{self.packed_bytes * mib:.1f} MiB packed weights, "
            f"{self.other_bytes * mib:.2f} MiB other",
        ]
        if self.graphs:
            lines.append(
                f"graphs      {self.graphs} recorded, {self.graph_bytes * mib:.1f} MiB pool"
            )
        if self.graph_fallback:
            lines.append(f"no graphs   {self.graph_fallback}")
        if self.nan_scores:
            lines.append(f"WARNING     {self.nan_scores} scores were NaN")
        return "\n".join(lines)


class Session:
    """An enabled model.

    Attributes:
        model: the model whose blocks are replaced.
        config: its settings.
        record_selections: set to True to keep, in `selections`, which tokens each step of a run
            recomputed: None for a full step, else a (layers, B, N) bool tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ToCaConfig,
        num_steps: int | None,
        timesteps: Sequence[float] | None,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self._adapter = models.find(model)
        self._blocks = [
            SelfMLP(parts, layer, self._step, prepack=config.prepack)
            for layer, parts in enumerate(self._adapter.blocks())
        ]
        self._run = Run(self._adapter, self._blocks, config, num_steps, timesteps)
        self._run.graphs = self._graphs = graphs
        self._own_forward = model.forward
        self._undo: list[Callable[[], None]] = []

    def __deepcopy__(self, memo: object) -> Session:
        # The replaced forwards of the copy would run the blocks of the original.
        raise ValueError("deepcopy: expected a model that is not enabled; disable it first")

    def _step(self) -> Branch | None:
        return self._run.active

    # --- the model's forward ----------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.__dict__.get(_ATTRIBUTE) is not self:
            return self._own_forward(*args, **kwargs)  # disabled; whoever patched over it calls it
        if self.model.training:
            raise RuntimeError("model: expected evaluation mode, got training mode; call .eval()")
        call = self._adapter.call(*args, **kwargs)
        with torch.no_grad():  # cached features carry no gradient: none is promised
            out = self._run.call(call, self._own_forward, args, kwargs)
        return out

    @property
    def record_selections(self) -> bool:
        return self._run.record_selections

    @record_selections.setter
    def record_selections(self, value: bool) -> None:
        self._run.record_selections = value

    @property
    def selections(self) -> list[Tensor | None]:
        """The tokens that each step of the last run recomputed, of the branch that opened last."""
        branches = list(self._run.branches.values())
        return branches[-1].done.selections if branches else []

    def reset(self) -> None:
        """Forget the run under way: the next call of the model is the first step of a new one."""
        self._run.branches = {}

    # --- patching ---------------------------------------------------------------------------

    def _install(self, scheduler: object | None) -> None:
        self._patch(self.model, "forward", self._forward)
        for block in self._blocks:
            for module, forward in block.replacements():
                self._patch(module, "forward", forward)
        if scheduler is not None and hasattr(scheduler, "set_timesteps"):
            self._patch(scheduler, "set_timesteps", self._announcing(scheduler))
        self.model.__dict__[_ATTRIBUTE] = self

    def _announcing(self, scheduler: Any) -> Callable[..., Any]:
        """The scheduler's set_timesteps, which now also announces a run."""
        own = scheduler.set_timesteps

        @functools.wraps(own)  # pipelines read its signature
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            timesteps = torch.as_tensor(scheduler.timesteps).tolist()
            self._run.begin(len(timesteps), timesteps)
            return out

        return set_timesteps

    def _patch(self, target: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Set an attribute of the instance; `_uninstall` puts back what was there.

        What somebody else has set since then is theirs and stays.
        """
        attributes = target.__dict__
        before = attributes.get(name)

        def undo() -> None:
            if attributes.get(name) is not replacement:
                return
            if before is None:
                attributes.pop(name, None)
            else:
                attributes[name] = before

        attributes[name] = replacement
        self._undo.append(undo)

    def _uninstall(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.model.__dict__.pop(_ATTRIBUTE, None)
        self._run.release()
        for block in self._blocks:
            block.release()

    # --- report -----------------------------------------------------------------------------

    def summary(self) -> Summary:
        """What the last run (or the one under way) did.

        Raises:
            RuntimeError: no step has been run yet.
        """
        branches = [b for b in self._run.branches.values() if b.done.seconds]
        done = [branch.done for branch in branches]
        if not done:
            raise RuntimeError("summary: no step has been run yet")
        counts = [self._flops(d) for d in done]
        graphs = self._graphs
        seconds = sum(sum(d.seconds) for d in done)
        steps = max(len(d.seconds) for d in done)
        full_steps = max(sum(map(all, d.full)) for d in done)
        flops_full, flops_done = sum(c.full for c in counts), sum(c.done for c in counts)
        return Summary(
            steps=steps,
            full_steps=full_steps,
            cached_steps=steps - full_steps,
            tokens_recomputed=sum(d.samples * int(np.sum(d.k)) for d in done),
            tokens_total=sum(d.samples * d.tokens * np.size(d.k) for d in done),
            flops_full=flops_full,
            flops_done=flops_done,
            flops_ratio=flops_full / flops_done,
            seconds=seconds,
            speedup_estimate=_speedup(done, seconds),
            cache_bytes=sum(d.cache_bytes for d in done),
            modulation_bytes=sum(d.table_bytes for d in done),
            packed_bytes=sum(block.packed_nbytes for block in self._blocks),
            other_bytes=sum(d.other_bytes for d in done),
            nan_scores=sum(branch.nan_scores for branch in branches),
            graphs=0 if graphs is None else len(graphs),
            graph_bytes=0 if graphs is None else graphs.nbytes,
            graph_fallback="" if graphs is None else graphs.fallback,
        )

    def _flops(self, done: Done) -> Flops:
        heads, mlp_ratio = self._adapter.shape()
        full, k = np.array(done.full), np.array(done.k, dtype=np.int64)
        plan = Plan(
            num_steps=len(k),
            num_layers={"attn": k.shape[1], "mlp": k.shape[1]},
            num_tokens={"attn": done.tokens, "mlp": done.tokens},
            full={"attn": full, "mlp": full},
            k={"attn": np.where(full, done.tokens, 0), "mlp": k},
        )
        shape = BlockShape(
            batch=done.samples, channels=done.channels, heads=heads, mlp_ratio=mlp_ratio
        )
        return plan.flops(shape)


def _speedup(done: Sequence[Done], seconds: float) -> float:
    full = [s for d in done for s, layers in zip(d.seconds, d.full, strict=True) if all(layers)]
    steps = sum(len(d.seconds) for d in done)
    return float(np.mean(full)) * steps / seconds if full and seconds > 0 else 1.0


def enable(
    model_or_pipeline: Any,
    config: ToCaConfig,
    *,
    num_steps: int | None = None,
    timesteps: Sequence[float] | Tensor | None = None,
    cuda_graph: bool = False,
) -> Session:
    """Turn token-wise caching on for a model, until `disable`.

    The blocks' forwards are replaced on the instance; weights, state dict and class stay as they
    are.  Sample as before: with a pipeline, or in your own loop.

    Args:
        model_or_pipeline: a supported model, or a pipeline whose `transformer` is one.
        config: settings, usually `ToCaConfig.preset(...)`.
        num_steps: steps of a run, one model call each (two with separate guidance calls).  A
            pipeline's scheduler tells it; a model alone cannot.
        timesteps: the timesteps of a run, as the model will be given them, if known: they let
            gates, shifts and scales be computed for all steps at once.  A pipeline's scheduler
            tells them too.
        cuda_graph: record each kind of step as a CUDA graph and replay it; the model must be on a
            CUDA device.  `round_k_to` of the config bounds how many kinds there are.

    Returns:
        The session: `summary()`, `reset()`, `record_selections`.

    Raises:
        ValueError: the model is of no supported family (the message says what it lacks), is
            already enabled, or the settings do not fit it.
    """
    model, scheduler = _parts(model_or_pipeline)
    if not isinstance(config, ToCaConfig):
        raise ValueError(f"config: expected a ToCaConfig, got {type(config).__name__}")
    if _ATTRIBUTE in model.__dict__:
        raise ValueError("model: expected one that is not enabled, got one that already is")
    if num_steps is not None:
        num_steps = check_integer("num_steps", num_steps, low=1)
    if timesteps is not None:
        timesteps = torch.as_tensor(timesteps).flatten().tolist()
        num_steps = len(timesteps) if num_steps is None else num_steps
        if len(timesteps) != num_steps:
            raise ValueError(f"timesteps: expected {num_steps}, got {len(timesteps)}")
    graphs = StepGraphs(CudaGraphs(_cuda_device(model))) if cuda_graph else None
    session = Session(model, config, num_steps, timesteps, graphs)
    session._install(scheduler)
    return session


def disable(model_or_pipeline: Any) -> None:
    """Put the model back as it was before `enable`.

    Raises:
        ValueError: the model is not enabled.
    """
    model, _ = _parts(model_or_pipeline)
    session = model.__dict__.get(_ATTRIBUTE)
    if session is None:
        raise ValueError("model: expected one that is enabled, got one that is not")
    session._uninstall()


@contextmanager
def enabled(
    model_or_pipeline: Any,
    config: ToCaConfig,
    *,
    num_steps: int | None = None,
    timesteps: Sequence[float] | Tensor | None = None,
    cuda_graph: bool = False,
) -> Iterator[Session]:
    """`enable` for the length of a with block; the model is put back whatever happens in it."""
    session = enable(
        model_or_pipeline,
        config,
        num_steps=num_steps,
        timesteps=timesteps,
        cuda_graph=cuda_graph,
    )
    try:
        yield session
    finally:
        session._uninstall()


def _cuda_device(model: nn.Module) -> torch.device:
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a model on a CUDA device, got one on {device}")
    return device


def _parts(model_or_pipeline: Any) -> tuple[nn.Module, object | None]:
    """(model, scheduler) of a model, or of a pipeline around one."""
    if isinstance(model_or_pipeline, nn.Module):
        return model_or_pipeline, None
    model = getattr(model_or_pipeline, "transformer", None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            "model: expected a torch module, or a pipeline with one as its transformer, got "
            f"{type(model_or_pipeline).__name__}"
        )
    return model, getattr(model_or_pipeline, "scheduler", None)
