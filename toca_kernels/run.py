"""One run: which step is at hand, found out from the model's calls.

A model's forward tells its timestep and labels, nothing more.  `Run` finds out from those where a
run begins and which guidance branch a call belongs to.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import steps
from .blocks.block import Block, OtherLayout
from .branch import Branch
from .cache import TokenCache
from .config import ToCaConfig
from .copies import CudaCopies, Slabs, meta_slabs
from .models.adapter import Adapter, ModelCall
from .offload import Offload
from .parallel import Ranks
from .plan import Plan, cached_layers, module_kind
from .room import CacheTooLarge, require
from .selectors import SELECTORS
from .track import Layout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Graphs(Protocol):
    """What replays steps; graphs.StepGraphs is one."""

    def call(
        self, branch: Branch, forward: Callable[..., Any], args: Sequence[Any], kwargs: Any
    ) -> Any: ...


class Run:
    """The run that is under way, found out from the model's calls.

    A run begins with the first call, with the first after `begin` announced it, and when the
    timestep returns to where the run started or moves against its direction.  A call with other
    labels at the first timestep opens a second guidance branch.  On a GPU timesteps are not read
    back, so only calls are counted there.
    """

    def __init__(
        self,
        adapter: Adapter,
        blocks: Sequence[Block],
        config: ToCaConfig,
        num_steps: int | None,
        timesteps: Sequence[float] | None,
        mask: Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        self.adapter = adapter
        self.blocks = blocks
        self.config = config
        self.num_steps = num_steps
        self.timesteps = list(timesteps) if timesteps is not None else []
        self.announced = False
        self.ticks = 0  # steps that a scheduler has taken since it announced the run
        self.record_selections = False
        self.mask = mask
        self.graphs: Graphs | None = None
        self.loan: Offload | None = None  # where caches do not lie at hand
        self.group = group
        self.ranks: Ranks | None = None  # of the call at hand: the processes that share its tokens
        self._branches: dict[object, Branch] = {}
        self.layers = dict(Counter(name for block in blocks for name in block.modules))
        self.keeps = self._keeps()
        partial = config.self_attention == "partial"
        selector = SELECTORS[config.selector]
        self.kept_layers = dict(
            Counter(
                name
                for block in blocks
                for name in block.layers
                if (selector.source == "queries" or not name.endswith("_entropy"))
                and (partial or "_kept_" not in name)
                and (name in self.layers or any(self.keeps[name]))
            )
        )
        self._layouts: dict[Hashable, dict[str, list[Layout | None]]] = {}
        self._kept: dict[Hashable, list[TokenCache]] = {}
        self._plans: dict[Hashable, Plan] = {}
        for block in blocks:
            if config.selector not in block.selectors:
                raise ValueError(
                    f"selector: expected one of {', '.join(block.selectors)} for the blocks of "
                    f"this model, got {config.selector!r}"
                )
            if config.full_steps == "fused" and not block.fuses:
                raise ValueError(
                    "full_steps: expected 'exact' for this model, whose full steps are its own, "
                    "got 'fused'"
                )
        if config.full_steps == "fused" and selector.source == "output":
            raise ValueError(
                f"full_steps: expected 'exact' with selector {config.selector!r}, which compares "
                "what modules return, got 'fused'"
            )
        if mask is not None:
            _check_mask(mask)
        if (mask is None) != (selector.source != "given"):
            raise ValueError(
                "mask: expected the weights of the tokens with selector='mask', and none with "
                f"another, got {'none' if mask is None else tuple(mask.shape)} with "
                f"{config.selector!r}"
            )
        steps = num_steps or len(config.step_ratio or ()) or 1000
        # Refuses settings that do not fit the model.
        self._make_plan(steps, dict.fromkeys(self.layers, 4096))

    def _keeps(self) -> dict[str, list[bool]]:
        """For everything that a block may keep and each of its layers: whether it is cached."""
        self._leave_out(self.config)
        keeps: dict[str, dict[int, bool]] = {}
        for block in self.blocks:
            for name, layer in block.layers.items():
                keeps.setdefault(name, {})[layer] = name not in block.never
        return {name: [kept for _, kept in sorted(of.items())] for name, of in keeps.items()}

    def _leave_out(self, config: ToCaConfig) -> None:
        """Tell the blocks which of their modules are not cached."""
        cached = cached_layers(config, self.layers)
        for block in self.blocks:
            block.leave_out([n for n in block.modules if not cached[n][block.layers[n]]])

    def allows(self, config: ToCaConfig) -> bool:
        """Whether the model could be enabled with these settings, of which `modules` differ."""
        before = [block.never for block in self.blocks]
        try:
            self._leave_out(config)
            plan = config.plan(
                num_steps=self.num_steps or 1,
                num_layers=self.layers,
                num_tokens=dict.fromkeys(self.layers, 4096),
            )
            for block in self.blocks:
                block.check(plan, partial=config.self_attention == "partial")
        except ValueError:
            return False
        finally:
            for block, never in zip(self.blocks, before, strict=True):
                block.never = never
        return True

    def samples_rounding(self, block: Block) -> bool:
        """Whether the block is the first that caches some module."""
        return any(
            name not in block.never and layer == self.keeps[name].index(True)
            for name, layer in block.layers.items()
        )

    @property
    def branches(self) -> Mapping[object, Branch]:
        """The guidance branches of the run, by what tells them apart."""
        return self._branches

    @branches.setter
    def branches(self, branches: Mapping[object, Branch]) -> None:
        stay = set(map(id, branches.values()))
        gone = [branch for branch in self._branches.values() if id(branch) not in stay]
        self._branches = dict(branches)
        for branch in gone:  # else its caches would lie there until cycles are collected
            branch.drop()

    def keep_no_more(self, cache: TokenCache) -> None:
        """A cache whose buffers have been replaced: no recorded step holds for it."""
        for kept in self._kept.values():
            kept[:] = [one for one in kept if one is not cache]

    def begin(self, timesteps: Sequence[float]) -> None:
        """A run is announced; with its first call the last one's branches are forgotten."""
        self.announced = True
        self.ticks = 0
        self.num_steps = len(timesteps)
        self.timesteps = list(timesteps)

    def release(self) -> None:
        self._kept.clear()
        for branch in self.branches.values():
            branch.release()
        if self.loan is not None:
            self.loan.release()

    def _home_of_caches(self, device: torch.device) -> Slabs | None:
        """Host memory for a cache of what a device computes; None where it lies on the device."""
        if self.config.cache_device is None:
            return None
        if device.type == "meta":  # an estimate
            return meta_slabs()
        if device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"cache_device: expected None for a model on {device}, got 'cpu', which copies on "
                "CUDA streams"
            )
        if device.type == "cuda" and (self.loan is None or self.loan.copies.device != device):
            self.loan = Offload(CudaCopies(device))
        return None if self.loan is None else self.loan.slabs()

    def another(self, num_steps: int, timesteps: Sequence[float] | None) -> Run:
        """A run of its own on the same blocks, whose branches are named by whoever calls.

        What is learnt of layouts and plans, all of them know.
        """
        other = copy.copy(self)
        other.num_steps, other.timesteps = num_steps, list(timesteps or ())
        other.announced, other.ticks, other.graphs = False, 0, None
        other._branches, other._kept = {}, {}
        other._make_plan(num_steps, dict.fromkeys(self.layers, 4096))
        return other

    def set_mask(self, mask: Tensor) -> None:
        """Other weights of the tokens, from the next run on."""
        if self.mask is None:
            raise ValueError("mask: expected a model enabled with selector='mask' and a mask")
        _check_mask(mask)
        self.mask = mask

    def prepare(self) -> None:
        """Before a run: look again at modules that may have been replaced or changed."""
        for block in self.blocks:
            block.prepare(prepack=self.config.prepack)

    def plan(self, tokens: Mapping[str, int]) -> Plan:
        assert self.num_steps is not None
        key = (self.num_steps, tuple(tokens.items()))
        if key not in self._plans:
            self._plans[key] = self._make_plan(self.num_steps, tokens)
        return self._plans[key]

    def _make_plan(self, num_steps: int, tokens: Mapping[str, int]) -> Plan:
        plan = self.config.plan(
            num_steps=num_steps, num_layers=self.layers, num_tokens=dict(tokens)
        )
        for block in self.blocks:
            block.check(plan, partial=self.config.self_attention == "partial")
        return plan

    def selections(self) -> list[Tensor | None]:
        """The tokens that each step recomputed, of the branch that opened last.

        None for a full step, else (layers, B, N) bool: of the MLP, or of the first module of the
        model that selects.
        """
        recorded = self._recorded()
        return [None if step is None else next(iter(step.values()), None) for step in recorded]

    def selections_of(self, module: str) -> list[Tensor | None]:
        """`selections` of a module, by its name in the plan."""
        return [None if step is None else step[module] for step in self._recorded()]

    def _recorded(self) -> list[dict[str, Tensor] | None]:
        branches = list(self._branches.values())
        return branches[-1].done.selections if branches else []

    def cache_for(self, signature: Hashable, device: torch.device) -> TokenCache:
        """A cache for calls of this signature; where steps are replayed, an earlier run's if free.

        Its buffers are made by the step that shows what the modules' outputs look like, or here
        where one has.
        """
        taken = {id(branch.cache) for branch in self.branches.values()}
        for cache in self._kept.get(signature, ()):
            if id(cache) not in taken:
                cache.invalidate()
                return cache
        config = self.config
        cache = TokenCache(
            self.kept_layers,
            device,
            selecting=[
                name
                for name in self.layers
                if any(self.keeps[name])
                and (module_kind(name) != "attn" or config.self_attention == "partial")
            ],
            keeps=self.keeps,
            beside=self.kept_layers.keys() - self.layers.keys(),
            cache_dtype=config.cache_dtype,
            forecast=config.forecast,
            shared=config.share_cfg_selection,
            home=self._home_of_caches(device),
        )
        cache.see(self._layouts.get(signature, {}))
        require(self, cache, device)
        cache.hold()
        if self.graphs is not None:
            self._kept.setdefault(signature, []).append(cache)
        return cache

    def remember(self, signature: Hashable, layout: Mapping[str, Sequence[Layout | None]]) -> None:
        """What the modules' outputs look like in calls of this signature."""
        self._layouts[signature] = {name: list(layers) for name, layers in layout.items()}

    def call(
        self,
        call: ModelCall,
        forward: Callable[..., object],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> object:
        """Run the model's own forward as the next step of the branch that `call` belongs to."""
        self.ranks = self.find_ranks()
        branch = steps.enter(self, call, self.signature(args, kwargs))
        started = time.perf_counter()
        out = self.take_step(branch, forward, args, kwargs)
        self.leave(branch, time.perf_counter() - started)
        return out

    def take_step(
        self, branch: Branch, forward: Callable[..., object], args: Any, kwargs: Any
    ) -> object:
        """The model's own forward as the step that a branch has entered."""
        try:
            return self._forward(branch, forward, args, kwargs)
        except OtherLayout:
            self.look_anew(branch)
            return self._forward(branch, forward, args, kwargs)

    def look_anew(self, branch: Branch) -> None:
        """Lengths that masks tell and shapes do not: those of an earlier run do not hold.

        Called while the step's `OtherLayout` is handled, which is raised again where the branch
        has begun to read its cache.
        """
        if branch.discovering or branch.position != branch.adopted:
            raise
        self._layouts.pop(branch.signature, None)
        self._kept.pop(branch.signature, None)
        branch.adopt(branch.signature)
        branch.decide()

    def leave(self, branch: Branch, seconds: float) -> None:
        """A branch's step is done."""
        branch.leave(seconds)
        # A branch that fell behind belongs to a run that was broken off in its first step, or to
        # guidance that ended early.
        self.branches = {k: b for k, b in self.branches.items() if branch.position - b.position < 2}
        if self.loan is not None and all(b.cache is None for b in self.branches.values()):
            self.loan.release()  # the run is over

    def find_ranks(self) -> Ranks | None:
        """The processes that share the tokens of the next call."""
        ranks = Ranks.of(self.adapter.model, self.group, together=self.config.quota == "global")
        if ranks is not None and self.config.self_attention == "partial":
            raise ValueError(
                "self_attention: expected 'reuse' where processes share the tokens, as keys are "
                "kept of a process's own tokens only, got 'partial'"
            )
        return ranks

    def _forward(
        self, branch: Branch, forward: Callable[..., object], args: Any, kwargs: Any
    ) -> object:
        try:
            with _eager() if branch.discovering else contextlib.nullcontext():
                if self.graphs is None:
                    return branch.forward(forward, args, kwargs)
                return self.graphs.call(branch, forward, args, kwargs)
        except BaseException as error:
            branch.abort()
            if isinstance(error, CacheTooLarge):
                self.keep_no_more(branch.cache)
                branch.release()  # else what fits of it would lie there
            raise
        finally:
            if self.loan is not None:
                self.loan.rest()
            for block in self.blocks:
                block.place(None)

    def signature(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
        """All that the shapes and dtypes of the modules' outputs depend on."""
        inputs = [
            (tuple(leaf.shape), leaf.dtype, leaf.device)
            for leaf in pytree.tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.ndim > 1
        ]
        weight = next(self.adapter.model.parameters())
        # Not the weight's device: an offloaded weight is somewhere else until it is used.
        kind = next((device.type for _, _, device in inputs), weight.device.type)
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        inference = torch.is_inference_mode_enabled()  # what it makes cannot be written outside
        part = None if self.ranks is None else (self.ranks.rank, self.ranks.size)
        return tuple(inputs), weight.dtype, weight.device, autocast, inference, part


def _check_mask(mask: object) -> None:
    """Refuse what cannot be the weights of tokens."""
    if not isinstance(mask, Tensor) or mask.ndim not in (1, 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected a tensor, (N,) or (samples, N), got {shape}")


def _eager() -> contextlib.AbstractContextManager[object]:
    """Compiled blocks run as they are written: buffers are made on the way."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; importing it takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
