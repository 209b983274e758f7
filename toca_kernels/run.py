"""One run: which step is at hand, what the plan says of it, and what was done.

A model's forward tells its timestep and labels, nothing more.  `Run` finds out from those where a
run begins and which guidance branch a call belongs to; `Branch` carries one branch's cache through
the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .blocks.self_mlp import CACHED_CHUNKS, SELECTORS, SelfMLP
from .cache import TokenCache
from .config import ToCaConfig
from .models.adapter import Adapter, ModelCall
from .plan import BoolTable, Plan


@dataclass
class Done:
    """What the steps of a run did, counted as they ran.

    Attributes:
        k: for each step, tokens computed in the MLP of each layer; N where the step was full.
        full: for each step, which layers ran in full.
        seconds: of each step, the model's forward.
        samples, tokens, channels: B, N and C, 0 before the first step.
        nan: scores that were NaN.
        cache_bytes, other_bytes, table_bytes: memory of the features, of scores, ages and
            selections, and of the modulation table; the most that was held.
        selections: where the run records them, the tokens that each step recomputed: None for a
            full step, else (layers, B, N) bool.
    """

    k: list[list[int]] = field(default_factory=list)
    full: list[list[bool]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    channels: int = 0
    nan: int = 0
    cache_bytes: int = 0
    other_bytes: int = 0
    table_bytes: int = 0
    selections: list[Tensor | None] = field(default_factory=list)


class Branch:
    """One guidance branch of a run (the only one where both halves are in one batch)."""

    def __init__(self, run: Run, position: int = 0, first: float | None = None) -> None:
        self.run = run
        self.fused = run.config.full_steps == "fused"
        self.position = position
        self.first = first
        self.last: float | None = None  # of the last step that was finished
        self._now: float | None = None
        self.done = Done()
        self.cache: TokenCache = None  # type: ignore[assignment]  # made by the first step
        self._ahead = False  # whether the step at hand was decided before the model was called
        self._call: ModelCall
        self._forced = False
        self._plan: Plan
        self._needs_score: BoolTable
        self._tables: list[Tensor] | None = None
        self._modulation: list[Tensor] | None = None
        self._rows: dict[int, int] = {}
        self._generator: torch.Generator | None = None

    # --- what the blocks ask (blocks.self_mlp.Step) -------------------------------------------

    def begin(self, x: Tensor) -> None:
        """First block of a step: everything that is decided or selected once for all layers."""
        if not self._ahead:
            if self.cache is None or not self.cache.fits(x):
                self._adopt(self.run.make_cache(x))
            self._decide()
        self._ahead = False
        cached = [not full for full in self.done.full[-1]]
        if any(cached):
            self._select(cached, self.done.k[-1])

    def plan_ahead(self) -> Hashable | None:
        """Decide the step before the model is called, so that its kernels can be replayed.

        Returns what the kernels of the step depend on, beside the shapes of the inputs; None where
        that is not known before, and then the step is decided on the way, in `begin`.
        """
        if self.cache is None:
            kept = self.run.kept_cache(self._call)
            if kept is None:
                return None
            self._adopt(kept)
        elif self.cache.call_shape != self._call.shape:
            return None
        if self.run.record_selections:  # read by Python in every step
            return None
        self._decide()
        self._ahead = True
        layers = range(self.cache.layers)
        selectors = tuple(self.selector(layer) for layer in layers if self.full(layer))
        full, k = tuple(self.done.full[-1]), tuple(self.done.k[-1])
        return id(self.cache), full, k, selectors, self.modulation(0) is None

    def _adopt(self, cache: TokenCache) -> None:
        if self.done.seconds:  # another image size: the counts of the two do not add up
            self.done = Done()
        self.cache = cache
        self.cache.call_shape = self._call.shape
        self._tables = None
        self._plan = self.run.plan(cache.shape[1])
        self._needs_score = self._plan.needs_score("mlp")
        self.done.samples, self.done.tokens, self.done.channels = cache.shape

    def _decide(self) -> None:
        """What the step at hand does: the plan's word, or a full step where nothing is cached."""
        full = self._plan.full["mlp"][self.position]
        self._forced = bool((~full).any()) and not all(self.cache.valid)
        if self._forced:
            full = np.ones_like(full)
        k = np.where(full, self.cache.shape[1], self._plan.k["mlp"][self.position])
        self.done.k.append(k.tolist())
        self.done.full.append(full.tolist())
        if self.fused or not full.all():
            self._tabulate()
        self._modulation = self._look_up()

    def _look_up(self) -> list[Tensor] | None:
        """The rows of the table for this step, one tensor for each layer; None if it has none."""
        if self._tables is None or self.position not in self._rows:
            return None
        if self._now is None:  # on a device: compared there, and read at the end of the run
            announced = self.run.timesteps[self.position]
            self.cache.off_track |= (self._call.timestep != announced).any()
        labels = self._call.labels.numel()
        first = self._rows[self.position] * labels
        rows = [table[first : first + labels] for table in self._tables]
        return rows if self.run.graphs is None else self.cache.fixed_modulation(rows)

    def full(self, layer: int) -> bool:
        return self.done.full[-1][layer]

    def selector(self, layer: int) -> str | None:
        """The selector whose scores this full step must leave behind, if any reads them."""
        if self.run.config.selector == "random":
            return None
        needed = self._forced or self._needs_score[self.position, layer]
        return self.run.config.selector if needed else None

    def modulation(self, layer: int) -> Tensor | None:
        """This step's rows of the layer's table; None where there is no table for this step."""
        return None if self._modulation is None else self._modulation[layer]

    # --- inside a step ------------------------------------------------------------------------

    def _select(self, cached: Sequence[bool], k: Sequence[int]) -> None:
        config = self.run.config
        if config.selector == "random":
            self.cache.score.uniform_(generator=self._random())
        self.cache.select(
            cached,
            k,
            age_weight=config.age_step,
            grid=self._call.grid,
            cell=config.grid,
            bonus=config.bonus,
        )

    def _random(self) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(self.cache.score.device)
            self._generator.manual_seed(self.run.config.seed)
        return self._generator

    def _tabulate(self) -> None:
        """Modulations of all remaining cached steps, in one GEMM for each layer."""
        timesteps = self.run.timesteps
        if self._tables is not None or not self.run.config.tabulate_modulation or not timesteps:
            return
        steps = [
            step
            for step in range(self.position, min(self._plan.num_steps, len(timesteps)))
            if self.fused or not self._plan.full["mlp"][step].all()
        ]
        if not steps or self._now not in (None, timesteps[self.position]):
            return  # these are not the timesteps that were announced: computed step by step
        labels = self._call.labels.flatten()  # one for each sample, or one for all of them
        t = torch.tensor([timesteps[step] for step in steps], device=self._call.timestep.device)
        t = t.to(self._call.timestep.dtype).repeat_interleave(len(labels))
        conditions = self.run.adapter.conditions(t, labels.repeat(len(steps)), self.cache.attn)
        chunks = slice(None) if self.fused else CACHED_CHUNKS
        self._tables = [
            block.modulate(condition, chunks)
            for block, condition in zip(self.run.blocks, conditions, strict=True)
        ]
        self._rows = {step: row for row, step in enumerate(steps)}
        self.done.table_bytes = sum(table.nbytes for table in self._tables)

    def enter(self, call: ModelCall, timestep: float | None) -> None:
        self._call = call
        self._now = timestep
        if self.first is None:
            self.first = timestep
        if self._rows and timestep not in (None, self.run.timesteps[self.position]):
            self._rows = {}  # off the announced track: the table does not hold this step

    def leave(self, seconds: float) -> None:
        done, cache = self.done, self.cache
        for layer, full in enumerate(done.full[-1]):  # a replay runs no Python of the blocks
            cache.valid[layer] |= full
        self._ahead = False
        self.position += 1
        self.last = self._now
        done.seconds.append(seconds)
        done.cache_bytes = max(done.cache_bytes, cache.nbytes)
        done.other_bytes = max(done.other_bytes, cache.other_nbytes)
        if self.run.record_selections:
            done.selections.append(None if all(done.full[-1]) else cache.recomputed())
        if self.position == self.run.num_steps:  # nothing will be read any more
            self.release()
            if cache.off_track:
                raise RuntimeError(
                    "timesteps: the run visited others than were announced, so its modulation was "
                    "wrong; enable with the timesteps that you sample, or tabulate_modulation=False"
                )

    @property
    def nan_scores(self) -> int:
        return self.done.nan if self.cache is None else int(self.cache.nan)

    def release(self) -> None:
        """Give the memory back; what was done stays to be read."""
        cache = self.cache
        self.cache = None  # type: ignore[assignment]
        self._tables, self._modulation, self._rows = None, None, {}
        if cache is not None:
            self.done.nan = int(cache.nan)

    def ran(self, timestep: float | None) -> bool:
        """Whether the last step was this one: then a call with other labels is its second half.

        Where timesteps are not read, only the first step is expected to bring a second branch.
        """
        return self.position == 1 if timestep is None else self.last == timestep

    def abort(self) -> None:
        """The step did not finish: nothing it left behind may be read."""
        self._ahead = False
        del self.done.k[len(self.done.seconds) :], self.done.full[len(self.done.seconds) :]
        if self.cache is not None:
            self.cache.invalidate()


class Graphs(Protocol):
    """What replays steps; graphs.StepGraphs is one."""

    def call(
        self, branch: Branch, forward: Callable[..., Any], args: Sequence[Any], kwargs: Any
    ) -> Any: ...


class Run:
    """The run that is under way, found out from the model's calls.

    A run begins with the first call, when `begin` announced it (a scheduler's set_timesteps), and
    when the timestep returns to where the run started or moves against its direction.  A call with
    other labels at the first timestep opens a second guidance branch.  On a GPU timesteps are not
    read back, so only calls are counted there.
    """

    def __init__(
        self,
        adapter: Adapter,
        blocks: Sequence[SelfMLP],
        config: ToCaConfig,
        num_steps: int | None,
        timesteps: Sequence[float] | None,
    ) -> None:
        self.adapter = adapter
        self.blocks = blocks
        self.config = config
        self.num_steps = num_steps
        self.timesteps = list(timesteps) if timesteps is not None else []
        self.record_selections = False
        self.graphs: Graphs | None = None
        self._kept: list[TokenCache] = []
        self.active: Branch | None = None
        self.branches: dict[object, Branch] = {}
        self._plans: dict[tuple[int, int], Plan] = {}
        if config.selector not in SELECTORS:
            raise ValueError(
                f"selector: expected one of {', '.join(SELECTORS)} for blocks without "
                f"cross-attention, got {config.selector!r}"
            )
        self._make_plan(num_steps=1000, tokens=4096)  # refuses settings that do not fit the model

    def begin(self, num_steps: int, timesteps: Sequence[float]) -> None:
        """A run is about to start: forget the last one."""
        self.num_steps = num_steps
        self.timesteps = list(timesteps)
        self.branches = {}

    def release(self) -> None:
        for branch in self.branches.values():
            branch.release()

    def plan(self, tokens: int) -> Plan:
        assert self.num_steps is not None
        key = (self.num_steps, tokens)
        if key not in self._plans:
            self._plans[key] = self._make_plan(self.num_steps, tokens)
        return self._plans[key]

    def _make_plan(self, num_steps: int, tokens: int) -> Plan:
        plan = self.config.plan(
            num_steps=num_steps,
            num_layers=len(self.blocks),
            num_tokens=tokens,
            modules=("attn", "mlp"),
        )
        if (plan.full["attn"] != plan.full["mlp"]).any():
            raise ValueError(
                "module_interval: expected one interval for the attention and the MLP of this "
                f"model, got {dict(self.config.module_interval)}"
            )
        if plan.k["attn"][~plan.full["attn"]].any():
            raise ValueError(
                "module_ratio: expected no ratio for 'attn', whose output is reused whole in "
                f"this model, got {dict(self.config.module_ratio)}"
            )
        return plan

    def make_cache(self, x: Tensor) -> TokenCache:
        """A cache for tokens like x; where steps are replayed it is kept for the next run."""
        cache = TokenCache(
            len(self.blocks),
            x.shape,
            x.dtype,
            x.device,
            share_halves=self.config.share_cfg_selection,
        )
        if self.graphs is not None:
            self._kept.append(cache)
        return cache

    def kept_cache(self, call: ModelCall) -> TokenCache | None:
        """A cache of an earlier run for inputs like this call's, if one is free."""
        taken = {id(branch.cache) for branch in self.branches.values()}
        for cache in self._kept:
            if cache.call_shape == call.shape and id(cache) not in taken:
                cache.invalidate()
                return cache
        return None

    def call(
        self,
        call: ModelCall,
        forward: Callable[..., object],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> object:
        """Run the model's own forward as the next step of the branch that `call` belongs to."""
        branch = self._branch(call)
        self.active = branch
        started = time.perf_counter()
        try:
            if self.graphs is None:
                out = forward(*args, **kwargs)
            else:
                out = self.graphs.call(branch, forward, args, kwargs)
        except BaseException:
            branch.abort()
            raise
        finally:
            self.active = None
        branch.leave(time.perf_counter() - started)
        # A branch that fell behind belongs to a run that was broken off in its first step, or to
        # guidance that ended early.
        self.branches = {k: b for k, b in self.branches.items() if branch.position - b.position < 2}
        return out

    def _branch(self, call: ModelCall) -> Branch:
        if self.num_steps is None:
            raise ValueError(
                "num_steps: expected the number of sampling steps, as enable(..., num_steps=50); "
                "only a pipeline's scheduler can tell it"
            )
        timestep = _read(call.timestep)
        key = _branch_key(call.labels)
        branch = self.branches.get(key)
        if branch is None or self._restarts(branch, timestep):
            branch = self._open(key, timestep)
        if branch.position >= self.num_steps:
            raise ValueError(
                f"num_steps: expected a run of {self.num_steps} steps, got one more, at timestep "
                f"{timestep}; enable with the number of steps that you sample"
            )
        branch.enter(call, timestep)
        return branch

    def _open(self, key: object, timestep: float | None) -> Branch:
        """A new branch: of a new run, of the step at hand, or in the place of one that changed."""
        others = {k: b for k, b in self.branches.items() if k != key}
        peers = {k: b for k, b in others.items() if b.ran(timestep)}
        position, first = 0, None
        if key not in self.branches:
            # Without peers, the labels or the batch changed in the middle of a run: it goes on
            # where it was, with a full step, because this branch has nothing cached.
            for other in peers.values() or others.values():
                if peers or not self._restarts(other, timestep):
                    position, first = other.position - bool(peers), other.first
                    break
        if position == 0:
            for block in self.blocks:
                block.prepare()
        branch = Branch(self, position, first)
        self.branches = {**peers, key: branch}
        return branch

    def _restarts(self, branch: Branch, timestep: float | None) -> bool:
        """Whether this call starts a new run of the branch rather than its next step."""
        if branch.position == 0:  # its first step was not finished
            return True
        if timestep is None:
            return branch.position >= (self.num_steps or 0)
        coming = self.timesteps[branch.position :][:1]
        if coming == [timestep]:  # announced, so it need not be monotone
            return False
        if timestep == branch.first:
            return True
        if branch.last is None or branch.first is None:
            return False
        direction = branch.last - branch.first
        return direction != 0 and (timestep - branch.last) * direction < 0


def _read(timestep: Tensor) -> float | None:
    """The timestep as a number, where reading it does not wait for a device."""
    if not isinstance(timestep, Tensor):
        return float(timestep)
    if timestep.device.type != "cpu" or timestep.numel() == 0:
        return None
    values = timestep.flatten()
    if (values != values[0]).any():
        raise ValueError(
            f"timestep: expected one timestep for the whole batch, got {values.unique().tolist()}"
        )
    return float(values[0])


def _branch_key(labels: Tensor) -> object:
    """What tells guidance branches apart: the labels, or where they live on a device."""
    if labels.device.type == "cpu":
        return tuple(labels.flatten().tolist())
    return labels.data_ptr(), tuple(labels.shape)
