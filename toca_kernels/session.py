"""enable, disable and Session: a model's blocks replaced while it is enabled, and put back."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import models
from .config import ToCaConfig
from .done import Done
from .flops import Flops
from .graphs import CudaGraphs, StepGraphs
from .parallel import around, beneath
from .plan import check_integer
from .recorder import Recorder
from .requests import Batch, Batches, Request
from .run import Run
from .scheduler import Follower
from .summary import Summary, summarize

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
        self._batches = Batches(model)
        self._batch: Batch | None = None
        self._requests: weakref.WeakSet[Request] = weakref.WeakSet()
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
        if self._batch is not None:
            self._batch.check_thread()
            with torch.no_grad():
                return self._batches.call(self._batch, self._own_forward, args, kwargs)
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
        self._run.set_mask(value)
        for other in self.others:
            other.mask = value

    @property
    def selections(self) -> list[Tensor | None]:
        """The tokens that each step of the last run recomputed, of the branch that opened last.

        None for a full step, else (layers, B, N) bool: of the MLP, or of the first module of the
        model that selects; `selections_of` tells of the others.  N is that of all processes, where
        several share the tokens.
        """
        return self._run.selections()

    def selections_of(self, module: str) -> list[Tensor | None]:
        """`selections` of a module, by its name in the plan."""
        return self._run.selections_of(module)

    def reset(self) -> None:
        """Forget the run under way: the next call of the model is the first step of a new one."""
        self._run.branches = {}
        for other in self.others:
            other.reset()

    # --- requests ---------------------------------------------------------------------------

    def request(
        self,
        *,
        num_steps: int | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Request:
        """A run of its own, whose steps are taken in batches with those of others.

        Args:
            num_steps: of this run, one call of the model each (of each guidance branch); None is
                what the model was enabled with.
            timesteps: of this run, as `enable` takes them.
            mask: the weights of its tokens, as `enable` takes them; None: those of the session.

        Raises:
            ValueError: the number of steps is not known, the settings do not fit it, a mask where
                no selector asks for one; steps that are replayed as CUDA graphs, or a pipeline with
                two transformers.
        """
        self._check_enabled()
        if self._graphs is not None:
            raise ValueError("request: expected a model enabled without cuda_graph, got one with")
        if self.config.cache_device is not None:
            raise ValueError(
                "request: expected caches where the model computes, got cache_device="
                f"{self.config.cache_device!r}"
            )
        if self.others:
            raise ValueError(
                f"request: expected a pipeline with one transformer, got {1 + len(self.others)}"
            )
        num_steps, steps = _steps(num_steps, timesteps)
        if num_steps is None:
            num_steps, steps = self._run.num_steps, self._run.timesteps
        if num_steps is None:
            raise ValueError("num_steps: expected the number of steps of the request, got None")
        request = Request(self, self._run.another(num_steps, steps))
        if mask is not None:
            request.mask = mask
        request.record_selections = self.record_selections
        self._requests.add(request)
        return request

    @contextmanager
    def batch(self, rows: Iterable[Request], *, branch: str = "") -> Iterator[None]:
        """Calls of the model in this with block are steps of these requests.

            a, b = session.request(num_steps=50), session.request(num_steps=20)
            with session.batch([a, b]):
                noise = model(x, t, y)  # a row of x, t and y for each, t at its own timestep

        A request takes one step in each call, through its own plan and with its own caches: it
        gives what it gives alone, up to the rounding of matrix products of another shape.

        Args:
            rows: the request of each row of the batch; both guidance halves name it twice.
            branch: where guidance comes in calls of its own, a name for each, called in the same
                order in every step; the first one leads.

        Raises:
            ValueError: by the call: another number of samples, a request that is finished,
                timesteps that differ within one.
        """
        self._check_enabled()
        if self._batch is not None:
            raise ValueError("batch: expected no other with block of batch() around it")
        batch = Batch(rows, branch)
        strangers = [one for one in batch.places if one not in self._requests]
        if strangers:
            raise ValueError(
                f"rows: expected requests of this session, got {len(strangers)} of another"
            )
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

    def _check_enabled(self) -> None:
        if self.model.__dict__.get(_ATTRIBUTE) is not self:
            raise RuntimeError("session: expected one whose model is enabled, got one of before")

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
        for request in self._requests:
            request._run.release()
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
        return summarize([(one, one._run) for one in (self, *self.others)])

    def _flops(self, done: Done) -> Flops:
        return self._adapter.flops(done.plan(), done.batch)


def _steps(
    num_steps: int | None, timesteps: Sequence[float] | Tensor | None
) -> tuple[int | None, list[float] | None]:
    """Both as plain numbers, checked against each other."""
    if num_steps is not None:
        num_steps = check_integer("num_steps", num_steps, low=1)
    if timesteps is None:
        return num_steps, None
    numbers = torch.as_tensor(timesteps).flatten().tolist()
    if num_steps is not None and len(numbers) != num_steps:
        raise ValueError(f"timesteps: expected {num_steps}, got {len(numbers)}")
    return len(numbers), numbers


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
    if cuda_graph and config.cache_device is not None:
        raise ValueError(
            "cuda_graph: expected False with cache_device='cpu': its copies run beside a step on "
            "streams of their own, which no record of the step holds, got True"
        )
    if any(_ATTRIBUTE in model.__dict__ for model in found):
        raise ValueError("model: expected one that is not enabled, got one that already is")
    num_steps, timesteps = _steps(num_steps, timesteps)
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
