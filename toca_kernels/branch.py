"""Branch: one guidance branch of a run, carried through the plan with its cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .blocks.block import Block, BlockState
from .cache import TokenCache
from .chooser import Chooser
from .done import Done
from .models.adapter import ModelCall
from .modulation import ModulationTable
from .ops import free_rows
from .parallel import Share, shares
from .plan import BoolTable, Plan, module_kind
from .room import require
from .track import Features, Layout

if TYPE_CHECKING:
    from .parallel import Ranks
    from .run import Run


class Branch:
    """One guidance branch of a run (the only one where both halves are in one batch)."""

    def __init__(self, run: Run, position: int = 0, first: float | None = None) -> None:
        self.run = run
        self.chooser = Chooser(self)
        self.selector = self.chooser.selector
        self.fused = run.config.full_steps == "fused"
        self.position = position
        self.first = first
        self.last: float | None = None  # of the last step that was finished
        self.text_at: object = None  # where the text lies that the branch holds
        self.done = Done()
        self._before = Done()  # of steps on other inputs
        self.cache: TokenCache = None  # type: ignore[assignment]  # made by the first step
        self.shares: dict[str, Share] = {}  # of each module, where processes share the tokens
        self.discovering = False  # whether the step at hand shows what the outputs look like
        self.signature: Hashable = None
        self.adopted = position
        self._now: float | None = None
        self.call: ModelCall = None  # type: ignore[assignment]  # of the step at hand
        self.forced = False
        self.states: list[BlockState] = []  # of the step at hand, one for each block
        self._plan: Plan
        self._modulation = ModulationTable(run)

    # --- before a step --------------------------------------------------------------------------

    def enter(self, call: ModelCall, timestep: float | None, signature: Hashable) -> None:
        """The next step: what it does is decided here, before the model is called.

        `signature` is all that the shapes and dtypes of the modules' outputs depend on.
        """
        self.call = call
        self._now = timestep
        if self.first is None:
            self.first = timestep
        self._modulation.leave_track(self.position, timestep)
        if self.cache is None or signature != self.signature:
            self.adopt(signature)  # the call holds its text: no other gets its address
        try:
            self.decide()
        except BaseException:
            self.abort()
            raise

    def adopt(self, signature: Hashable) -> None:
        """Take a cache for inputs like this call's."""
        cache = self.run.cache_for(signature, self.call.timestep.device)  # refused: as it was
        self._before, self.done = self.done, Done()
        self.signature = signature
        self.adopted = self.position
        self._modulation.clear()
        self.cache = cache
        if self.chooser.shares:
            self.chooser.part()
        self.discovering = not self.cache.layout
        if not self.discovering:
            try:
                self._learn()
            except BaseException:
                self.cache = None  # type: ignore[assignment]  # adopted anew by the next call
                raise

    def _learn(self) -> None:
        """What the tokens' numbers tell."""
        shapes = {name: self.cache.tracks[name].layout.shape for name in self.run.layers}
        tokens = {name: shape[1] for name, shape in shapes.items()}
        self.done.batch = {name: shape[0] for name, shape in shapes.items()}
        self.shares = {}
        if self.run.ranks is not None:
            tokens = self._shared(self.run.ranks, tokens)
        self._plan = self.run.plan(tokens)
        self.chooser.learn(self._plan)
        self.done.tokens = tokens
        self.done = self.done.after(self._before)

    def _shared(self, ranks: Ranks, tokens: dict[str, int]) -> dict[str, int]:
        """N of each module as the plan is to take it, where processes share the tokens."""
        parts = self.run.adapter.parts(tokens, self.call.grids)
        device = next(self.cache.tracks[name].layout.device for name in tokens)
        self.shares = shares(ranks, parts, device)
        for name in tokens.keys() - parts.keys():  # processes share its samples
            self.done.batch[name] *= ranks.size
        if ranks.together:
            return tokens | {name: share.tokens for name, share in self.shares.items()}
        self.done.shares = dict.fromkeys(self.shares, ranks.size)
        return tokens

    def decide(self) -> None:
        """What the step does: the plan's word, or a full step where nothing is cached."""
        if self.discovering:
            self.forced = True
            full = {name: [True] * layers for name, layers in self.run.layers.items()}
            self.done.full.append(full)
        else:
            tables = {name: table[self.position] for name, table in self._plan.full.items()}
            self.forced = not self.cache.valid and not all(map(np.all, tables.values()))
            if self.forced:
                tables = {name: np.ones_like(row) for name, row in tables.items()}
            elif self.run.config.residual_threshold is not None:
                tables = self._first_full(tables)
            self.done.full.append({name: row.tolist() for name, row in tables.items()})
            self.done.k.append({name: self._rows_of(name, row) for name, row in tables.items()})
            # The first step computes its own modulation, as it does where nothing is known yet.
            if self.position > self.adopted and (self.fused or not self.done.full_steps()[-1]):
                self._modulation.make(self.position, self._now, self.call, self.cache, self._plan)
                self.done.table_bytes = self._modulation.nbytes
        self.states = self._states()
        if self.run.config.residual_threshold is not None:
            self.states[0].watch = self.watch

    def _first_full(self, tables: Mapping[str, BoolTable]) -> dict[str, BoolTable]:
        """The same with the first block in full: what it adds tells whether the step is cached."""
        own = {name: row.copy() for name, row in tables.items()}
        first = self.run.blocks[0]
        for name in first.modules:
            own[name][first.layers[name]] = True
        return own

    def watch(self, args: Any, kwargs: Any, out: Any) -> None:
        """The first block is done: where it has drifted too far, the rest of the step is full."""
        added = self.run.blocks[0].added(args, kwargs, out)
        planned = all(map(all, self.done.full[-1].values()))
        threshold = self.run.config.residual_threshold
        if not planned and not self.cache.drifted(added, threshold, self.run.ranks):
            return
        self.cache.added = added.clone()
        if planned:
            return
        self.forced = True
        done, k = self.done.full[-1], self.done.k[-1]
        for name in done:
            done[name] = [True] * len(done[name])
            k[name] = [self.done.tokens[name]] * len(k[name])
        for name, track in self.cache.tracks.items():
            track.forget_selection()
            if name in done:
                track.young(done[name])
        self.states[1:] = self._states()[1:]
        self.place()

    def _rows_of(self, name: str, full: BoolTable) -> list[int]:
        """k of a module in each layer; all tokens where that takes no longer than k."""
        N = self.done.tokens[name]
        k = np.where(full, N, self._plan.k[name][self.position])
        device = self.cache.tracks[name].layout.device
        if module_kind(name) == "mlp" and self.done.batch[name] * N <= free_rows(device):
            k = np.where(k > 0, N, k)
        return k.tolist()

    def place(self) -> None:
        """Tell every block what to do."""
        for block, state in zip(self.run.blocks, self.states, strict=True):
            block.place(state)

    def _states(self) -> list[BlockState]:
        """What every block is to do."""
        modulation = self._modulation.look_up(self.position, self._now, self.call, self.cache)
        states = [self._state(block) for block in self.run.blocks]
        for state, row in zip(states, modulation or (), strict=False):
            state.modulation = row
        return states

    def _state(self, block: Block) -> BlockState:
        done = self.done.full[-1]
        full = {name: done[name][block.layers[name]] for name in block.modules}
        state = BlockState(full, self.fused)
        if self.chooser.leaves_scores(block):
            compares = self.selector.source == "output"
            state.selector = None if compares else self.selector.name
            state.changes = self.selector.name if compares else None
        state.refreshes = self.selector.source == "queries"
        state.partial = self.run.config.self_attention == "partial"
        if self.run.ranks is not None:
            state.quota = self.run.config.quota
        if self.run.config.cache_dtype and self.run.samples_rounding(block):
            state.rounding = self.cache.rounding
        state.loan = self.run.loan and self.run.loan.lender
        if self.discovering:
            state.holder = _Discovery(self.run, self.cache)
            return state
        for name, layer in block.layers.items():
            if name not in self.cache.tracks:
                continue
            track = self.cache.tracks[name]
            if track.selects:
                state.scores[name] = track.scores[layer]
            if not track.keeps[layer]:
                continue
            state.valid[name] = track.valid[layer]
            B, N, _ = track.layout.shape
            state.features[name] = track.at(layer)
            state.dtypes[name] = track.layout.dtype
            state.every[name] = self.cache.every(B, N)
        return state

    def kind(self) -> Hashable | None:
        """What the kernels of the step depend on, beside the inputs' shapes.

        None where the step is not known before the model is called, or Python reads from it.
        """
        if self.run.record_selections or self.chooser.shares:
            return None
        decided = self.decided()
        return None if decided is None else (self.cache.number, decided)

    def decided(self) -> Hashable | None:
        """What the step does, whatever cache it does it with; None where that is not known yet."""
        if self.discovering or self.run.config.residual_threshold is not None:
            return None
        full, k = self.done.full[-1], self.done.k[-1]
        decided = tuple((name, tuple(full[name]), tuple(k[name])) for name in full)
        scores = tuple(
            (state.selector, state.changes, *(state.valid.values() if state.changes else ()))
            for state in self.states
        )
        computed = tuple(
            tuple(track.computed) for track in self.cache.tracks.values() if track.forecast
        )
        return decided, scores, computed, self.states[0].modulation is None

    # --- the step -------------------------------------------------------------------------------

    def forward(
        self, own: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """The selection of all layers, then the model's own forward: what a graph records."""
        self.place()
        if self.run.loan is not None:
            self.run.loan.begin(self.run.blocks)
        self.choose()
        out = own(*args, **kwargs)
        self.learn_scores()
        return out

    def choose(self) -> None:
        """Before the model is called: the selections that wait for none of its scores."""
        if not self.discovering:
            self.chooser.select()

    def learn_scores(self) -> None:
        """After it: scores and selections that it has left behind."""
        if any(state.selector or state.changes for state in self.states):
            self.chooser.rank()
        for block, state in zip(self.run.blocks, self.states, strict=True):
            for name in state.late:
                track = self.cache.tracks[name]
                track.note(block.layers[name], state.index[name], state.inverse[name])

    # --- after a step ---------------------------------------------------------------------------

    def leave(self, seconds: float) -> None:
        """The step is done: count it."""
        if self.discovering:
            self.learn_layouts()
        self.states = []
        done, cache = self.done, self.cache
        for name, full in done.full[-1].items():
            cache.tracks[name].ran(full)
        if self.run.config.share_cfg_selection:
            self.chooser.selected = {name: t.taken for name, t in cache.tracks.items()}
        self.position += 1
        self.last = self._now
        done.seconds.append(seconds)
        done.cache_bytes = max(done.cache_bytes, cache.nbytes)
        done.other_bytes = max(done.other_bytes, cache.other_nbytes)
        if cache.home is not None:
            done.host_bytes = max(done.host_bytes, cache.home.nbytes)
        if self.run.record_selections:
            done.selections.append(self._recomputed())
        if self.position == self.run.num_steps:  # nothing will be read any more
            self.release()
            if cache.off_track:
                raise RuntimeError(
                    "timesteps: the run visited others than were announced, so its modulation was "
                    "wrong; enable with the timesteps that you sample, or tabulate_modulation=False"
                )

    def learn_layouts(self) -> None:
        """What the first step of a kind has shown: the plan's numbers of tokens."""
        try:
            self._discovered()
        except BaseException:
            self.abort()
            raise

    def _discovered(self) -> None:
        missing = [name for name in self.cache.tracks if name not in self.cache.layout]
        if missing:
            raise RuntimeError(
                f"model: expected a step to call {', '.join(missing)} of its blocks, it did not"
            )
        self._learn()
        self.discovering = False
        self.run.remember(self.signature, self.cache.layout)
        self.done.k.append(
            {name: [self.done.tokens[name]] * layers for name, layers in self.run.layers.items()}
        )

    def _recomputed(self) -> dict[str, Tensor] | None:
        if self.done.full_steps()[-1]:
            return None
        fresh = {
            name: track.recomputed() for name, track in self.cache.tracks.items() if track.selects
        }
        return {
            name: self.shares[name].whole(one).cpu() if self.shares else one
            for name, one in fresh.items()
        }

    @property
    def nan_scores(self) -> int:
        return self.done.nan if self.cache is None else int(self.cache.nan)

    @property
    def cache_error(self) -> float:
        return self.done.rounding if self.cache is None else _relative(self.cache.rounding)

    def release(self) -> None:
        """Give the memory back; what was done stays to be read."""
        cache = self.cache
        self.cache = None  # type: ignore[assignment]
        self.call = None  # type: ignore[assignment]
        self._modulation.clear()
        if cache is not None:
            self.done.nan = int(cache.nan)
            self.done.rounding = _relative(cache.rounding)

    def drop(self) -> None:
        """The run goes on without this branch."""
        self.chooser.quit()
        self.cache = None  # type: ignore[assignment]
        self.call = None  # type: ignore[assignment]
        self._modulation.clear()

    def has_text(self, text: Any) -> bool:
        """Whether the last step was given the same text, wherever it lay."""
        if self.call is None:  # the branch has come to its end
            return False
        mine, other = pytree.tree_leaves(self.call.text), pytree.tree_leaves(text)
        return len(mine) == len(other) and all(
            a.shape == b.shape
            and a.device == b.device
            and a.data_ptr() != b.data_ptr()  # there it would be the one that has been written to
            and torch.equal(a, b)
            for a, b in zip(mine, other, strict=True)
        )

    def ran(self, timestep: float | None) -> bool:
        """Whether the last step was this one: then a call with other labels is its second half.

        Where timesteps are not read, it is the scheduler's count of steps that tells, or only the
        first step is expected to bring a second branch.
        """
        if timestep is None:
            return self.position == self.run.ticks + 1
        return self.last == timestep

    def undecide(self) -> None:
        """The step that was entered is not taken: nothing of it has begun."""
        self.states = []
        del self.done.k[len(self.done.seconds) :], self.done.full[len(self.done.seconds) :]

    def abort(self) -> None:
        """The step did not finish: nothing it left behind may be read."""
        self.undecide()
        if self.cache is not None:
            self.cache.invalidate()


def _relative(sums: Tensor) -> float:
    """The root of (squared errors over squares), 0 where nothing was rounded."""
    error, whole = sums.tolist()
    return math.sqrt(error / whole) if whole else 0.0


class _Discovery:
    """The first step of a kind: buffers are made as the modules' outputs appear."""

    def __init__(self, run: Run, cache: TokenCache) -> None:
        self.run = run
        self.cache = cache

    def hold(self, module: str, layer: int, layout: Layout) -> tuple[Features, Tensor]:
        B, N, _ = layout.shape
        # The second block of a kind: the first has shown what all of them will need.
        if sum(features is not None for features in self.cache.tracks[module].features) == 1:
            require(self.run, self.cache, layout.device)
        features = self.cache.tracks[module].hold(layer, layout)
        if self.run.loan is not None:
            features = self.run.loan.hold(module, features)
        return features, self.cache.every(B, N)

    def see(self, module: str, layer: int, layout: Layout) -> None:
        self.cache.tracks[module].layouts[layer] = layout

    def hold_score(self, scores: dict[str, Tensor], module: str, layer: int, score: Tensor) -> None:
        track = self.cache.tracks[module]
        if track.selects:
            B, N = score.shape
            track.hold_scores(B, N, score.device)
            scores[module] = track.scores[layer]
