"""enable, disable and Session: a model's blocks replaced while it is enabled, and put back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import models
from .config import ToCaConfig
from .done import Done
from .flops import Flops
from .graphs import CudaGraphs, StepGraphs
from .parallel import around, beneath
from .plan import check_integer, module_kind
from .recorder import Recorder
from .run import Run, check_mask
from .scheduler import Follower
from .summary import Summary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ATTRIBUTE = "_toca_session"


class Session:
    """An enabled model.

    Attributes:
        model: the model whose blocks are replaced.
        config: its settings.
        others: sessions of the pipeline's other transformers (Wan 2.2 has two), which `summary`
            and `reset` cover too.
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
        mask: Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self._adapter = models.find(model)
        self._blocks = self._adapter.blocks()
        self._run = Run(self._adapter, self._blocks, config, num_steps, timesteps, mask, group)
        self._run.graphs = self._graphs = graphs
        self.others: list[Session] = []
        self.grids: Mapping[str, tuple[int, ...]] = {}  # of the last call's tokens
        # Beneath the hook that accelerate's offloading puts on and takes off in every run.
        self._forward_name = "_old_forward" if "_old_forward" in vars(model) else "forward"
        self._own_forward = getattr(model, self._forward_name)
        self._undo: list[Callable[[], None]] = []

    def __deepcopy__(self, memo: object) -> Session:
        # The replaced forwards of the copy would run the blocks of the original.
        raise ValueError("deepcopy: expected a model that is not enabled; disable it first")

    # --- the model's forward ----------------------------------------------------------------

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:  # not imported for this: it takes seconds
            # A compiler must not look into the bookkeeping; blocks that were compiled stay so.
            return torch.compiler.disable(self._step)(*args, **kwargs)
        return self._step(*args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.__dict__.get(_ATTRIBUTE) is not self:
            return self._own_forward(*args, **kwargs)  # disabled; whoever patched over it calls it
        if self.model.training:
            raise RuntimeError("model: expected evaluation mode, got training mode; call .eval()")
        call = self._adapter.call(*args, **kwargs)
        if call is None:
            return self._own_forward(*args, **kwargs)
        self.grids = call.grids
        with torch.no_grad():  # cached features carry no gradient: none is promised
            self._follower.look()
            out = self._run.call(call, self._own_forward, args, kwargs)
        return out

    @property
    def record_selections(self) -> bool:
        return self._run.record_selections

    @record_selections.setter
    def record_selections(self, value: bool) -> None:
        self._run.record_selections = value

    @property
    def mask(self) -> Tensor | None:
        """The weights of the tokens, for selector="mask"; another one holds from the next run."""
        return self._run.mask

    @mask.setter
    def mask(self, value: Tensor) -> None:
        if self._run.mask is None:
            raise ValueError("mask: expected a model enabled with selector='mask' and a mask")
        check_mask(value)
        self._run.mask = value
        for other in self.others:
            other.mask = value

    @property
    def selections(self) -> list[Tensor | None]:
        """The tokens that each step of the last run recomputed, of the branch that opened last.

        None for a full step, else (layers, B, N) bool: of the MLP, or of the first module of the
        model that selects; `selections_of` tells of the others.  N is that of all processes, where
        several share the tokens.
        """
        branches = list(self._run.branches.values())
        recorded = branches[-1].done.selections if branches else []
        return [None if step is None else next(iter(step.values()), None) for step in recorded]

    def selections_of(self, module: str) -> list[Tensor | None]:
        """`selections` of a module, by its name in the plan."""
        branches = list(self._run.branches.values())
        recorded = branches[-1].done.selections if branches else []
        return [None if step is None else step[module] for step in recorded]

    def reset(self) -> None:
        """Forget the run under way: the next call of the model is the first step of a new one."""
        self._run.branches = {}
        for other in self.others:
            other.reset()

    # --- patching ---------------------------------------------------------------------------

    def _install(self, follower: Follower | None) -> None:
        self._follower = follower or Follower([self._run])
        self._patch(self.model, self._forward_name, self._forward)
        if hasattr(self.model, "enable_cache"):  # diffusers refuses a second cache by this
            self._patch(self.model, "_cache_config", self.config)
        for block in self._blocks:
            for module, forward in block.replacements():
                self._patch(beneath(module), "forward", forward)
        self.model.__dict__[_ATTRIBUTE] = self

    def _patch(self, target: Any, name: str, replacement: Any) -> None:
        """Set an attribute of the instance; `_uninstall` puts back what was there.

        What somebody else has set since then is theirs and stays.
        """
        attributes = target.__dict__
        before = attributes.get(name)

        def undo() -> None:
            # accelerate moves a forward to and fro between the two names.
            moved = {"forward", "_old_forward"} if name in ("forward", "_old_forward") else {name}
            for at in [at for at in moved if attributes.get(at) is replacement]:
                attributes.pop(at)
                if before is not None:
                    attributes[at] = before
                elif at == "_old_forward":  # what the hook is to call now
                    attributes[at] = type(target).forward.__get__(target)
            for hook in around(target):  # put round ours since then
                if hook.forward is replacement:
                    hook.forward = before or type(target).forward.__get__(target)

        attributes[name] = replacement
        self._undo.append(undo)

    def _uninstall(self) -> None:
        for other in self.others:
            other._uninstall()
        while self._undo:
            self._undo.pop()()
        self.model.__dict__.pop(_ATTRIBUTE, None)
        self._run.release()
        if self._graphs is not None:
            self._graphs.release()
        for block in self._blocks:
            block.release()

    # --- report -----------------------------------------------------------------------------

    def trace(self) -> Recorder:
        """Records what the runs of a with block do; `trace` of what it gives is the last one's.

            with session.trace() as recorder:
                pipe(...)
            recorder.trace.save("run.npz")  # toca report run.npz draws it

        Steps are not replayed as CUDA graphs meanwhile.  `recorder.keep(sample)` after a step keeps
        what the sampler holds.
        """
        return Recorder(self)

    def summary(self) -> Summary:
        """What the last run (or the one under way) did.

        Raises:
            RuntimeError: no step has been run yet.
        """
        runs = [
            (session, [b for b in session._run.branches.values() if b.done.seconds])
            for session in (self, *self.others)
        ]
        runs = [(session, branches) for session, branches in runs if branches]
        if not runs:
            raise RuntimeError("summary: no step has been run yet")
        branches = [branch for _, some in runs for branch in some]
        done = [branch.done for branch in branches]
        counts = [s._flops(branch.done) for s, some in runs for branch in some]
        graphs = [s._graphs for s, _ in runs if s._graphs is not None]
        seconds = sum(sum(d.seconds) for d in done)
        # Branches run side by side, models one after the other.
        steps = sum(max(len(b.done.seconds) for b in some) for _, some in runs)
        full_steps = sum(max(sum(b.done.full_steps()) for b in some) for _, some in runs)
        flops_full, flops_done = sum(c.full for c in counts), sum(c.done for c in counts)
        return Summary(
            steps=steps,
            full_steps=full_steps,
            cached_steps=steps - full_steps,
            tokens_recomputed=sum(_mlp_tokens(d, d.plan().k) for d in done),
            tokens_total=sum(_mlp_tokens(d, d.every()) for d in done),
            flops_full=flops_full,
            flops_done=flops_done,
            flops_ratio=flops_full / flops_done,
            seconds=seconds,
            speedup_estimate=_speedup(done, seconds),
            cache_bytes=sum(d.cache_bytes for d in done),
            modulation_bytes=sum(d.table_bytes for d in done),
            packed_bytes=sum(block.packed_nbytes for s, _ in runs for block in s._blocks),
            other_bytes=sum(d.other_bytes for d in done),
            nan_scores=sum(branch.nan_scores for branch in branches),
            cache_error=max(branch.cache_error for branch in branches),
            graphs=sum(map(len, graphs)),
            graph_bytes=sum(one.nbytes for one in graphs),
            graph_fallback="; ".join(one.fallback for one in graphs if one.fallback),
        )

    def _flops(self, done: Done) -> Flops:
        return self._adapter.flops(done.plan(), done.batch)


def _mlp_tokens(done: Done, k: Mapping[str, Any]) -> int:
    """Tokens in the MLPs, of all samples, layers and steps."""
    return sum(done.batch[name] * int(k[name].sum()) for name in k if module_kind(name) == "mlp")


def _speedup(done: Sequence[Done], seconds: float) -> float:
    full = [s for d in done for s, f in zip(d.seconds, d.full_steps(), strict=True) if f]
    steps = sum(len(d.seconds) for d in done)
    return float(np.mean(full)) * steps / seconds if full and seconds > 0 else 1.0


def enable(
    model_or_pipeline: Any,
    config: ToCaConfig | None = None,
    *,
    num_steps: int | None = None,
    timesteps: Sequence[float] | Tensor | None = None,
    cuda_graph: bool = False,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Session:
    """Turn token-wise caching on for a model, until `disable`.

    The blocks' forwards are replaced on the instance; weights, state dict and class stay as they
    are.  Sample as before: with a pipeline, or in your own loop.

    Args:
        model_or_pipeline: a supported model, or a pipeline whose `transformer` is one.
        config: settings, usually `ToCaConfig.preset(...)`; None is `preset("forecast")`.
        num_steps: steps of a run, one model call each (two with separate guidance calls).  A
            pipeline's scheduler tells it; a model alone cannot.
        timesteps: the timesteps of a run, as the model will be given them, if known: they let
            gates, shifts and scales be computed for all steps at once.  A pipeline's scheduler
            tells them too.
        cuda_graph: record each kind of step as a CUDA graph and replay it; the model must be on a
            CUDA device.  `round_k_to` of the config bounds how many kinds there are.
        mask: for selector="mask": (N,) or (samples, N), the weight of every token in the order of
            the model's tokens; those that weigh most are recomputed.  Modules with another number
            of tokens (a text's) go by age alone.
        group: torch's process group whose processes share the tokens, in the order of its ranks,
            for models whose own code splits them (Open-Sora).  Of diffusers' context parallelism
            the model tells.

    Returns:
        The session: `summary()`, `reset()`, `record_selections`.

    Raises:
        ValueError: the model is of no supported family (the message says what it lacks), is
            already enabled, or the settings do not fit it.
    """
    found, pipe = _parts(model_or_pipeline)
    config = ToCaConfig.preset("forecast") if config is None else config
    if not isinstance(config, ToCaConfig):
        raise ValueError(f"config: expected a ToCaConfig, got {type(config).__name__}")
    if any(_ATTRIBUTE in model.__dict__ for model in found):
        raise ValueError("model: expected one that is not enabled, got one that already is")
    if num_steps is not None:
        num_steps = check_integer("num_steps", num_steps, low=1)
    if timesteps is not None:
        timesteps = torch.as_tensor(timesteps).flatten().tolist()
        num_steps = len(timesteps) if num_steps is None else num_steps
        if len(timesteps) != num_steps:
            raise ValueError(f"timesteps: expected {num_steps}, got {len(timesteps)}")
    for model in found:
        if getattr(model, "_cache_config", None) is not None:
            raise ValueError(
                "model: expected one without another cache, got one with "
                f"{type(model._cache_config).__name__}; call its disable_cache() first"
            )
    sessions = [
        Session(
            model,
            config,
            num_steps,
            timesteps,
            StepGraphs(CudaGraphs(_cuda_device(model))) if cuda_graph else None,
            mask,
            group,
        )
        for model in found
    ]
    follower = Follower([session._run for session in sessions], pipe)
    for session in sessions:
        session._install(follower)
    sessions[0].others = sessions[1:]
    sessions[0]._undo.append(follower.close)
    return sessions[0]


def disable(model_or_pipeline: Any) -> None:
    """Put the model back as it was before `enable`.

    Raises:
        ValueError: the model is not enabled.
    """
    found, _ = _parts(model_or_pipeline)
    session = found[0].__dict__.get(_ATTRIBUTE)
    if session is None:
        raise ValueError("model: expected one that is enabled, got one that is not")
    session._uninstall()


@contextmanager
def enabled(
    model_or_pipeline: Any,
    config: ToCaConfig | None = None,
    *,
    num_steps: int | None = None,
    timesteps: Sequence[float] | Tensor | None = None,
    cuda_graph: bool = False,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Iterator[Session]:
    """`enable` for the length of a with block; the model is put back whatever happens in it."""
    session = enable(
        model_or_pipeline,
        config,
        num_steps=num_steps,
        timesteps=timesteps,
        cuda_graph=cuda_graph,
        mask=mask,
        group=group,
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


def _parts(model_or_pipeline: Any) -> tuple[list[nn.Module], object | None]:
    """(models, pipeline) of a model, or of a pipeline around one or two."""
    if isinstance(model_or_pipeline, nn.Module):
        return [model_or_pipeline], None
    named = (getattr(model_or_pipeline, name, None) for name in ("transformer", "transformer_2"))
    found = [model for model in named if isinstance(model, nn.Module)]
    if not found:
        raise ValueError(
            "model: expected a torch module, or a pipeline with one as its transformer, got "
            f"{type(model_or_pipeline).__name__}"
        )
    return found, model_or_pipeline
