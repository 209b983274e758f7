"""Branch: one guidance branch of a run, carried through the plan with its cache."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .blocks.block import Block, BlockState
from .blocks.self_mlp import CACHED_CHUNKS, SelfMLP
from .blocks.taps import Late
from .cache import Features, Layout, TokenCache, Track, rank
from .done import Done
from .models.adapter import ModelCall
from .ops import free_rows
from .plan import BoolTable, Plan, module_kind
from .selectors import SELECTORS

if TYPE_CHECKING:
    from .run import Run


class Branch:
    """One guidance branch of a run (the only one where both halves are in one batch)."""

    def __init__(self, run: Run, position: int = 0, first: float | None = None) -> None:
        self.run = run
        self.selector = SELECTORS[run.config.selector]
        self.fused = run.config.full_steps == "fused"
        self.position = position
        self.first = first
        self.last: float | None = None  # of the last step that was finished
        self.text_at: object = None  # where the text lies that the branch holds
        self.done = Done()
        self._before = Done()  # of steps on other inputs
        self.cache: TokenCache = None  # type: ignore[assignment]  # made by the first step
        self.discovering = False  # whether the step at hand shows what the outputs look like
        self._signature: Hashable = None
        self.adopted = position
        self.leader: Branch | None = None  # whose selections these are, too
        self.followers: list[Branch] = []
        self.selected: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}  # of the last step
        self._now: float | None = None
        self._call: ModelCall = None  # type: ignore[assignment]  # of the step at hand
        self._forced = False
        self._plan: Plan
        self._needs_score: dict[tuple[str, str], BoolTable] = {}
        self._tables: list[Tensor] | None = None
        self._rows: dict[int, int] = {}
        self._generator: torch.Generator | None = None

    # --- guidance in calls of its own ------------------------------------------------------------

    def follow(self, leader: Branch) -> None:
        """Select what the branch has selected that is called first in each step."""
        leader = leader.leader or leader
        self.leader = leader
        leader.followers.append(self)
        for track in leader.cache.tracks.values() if leader.cache else ():
            track.part()

    def _scores(self, name: str) -> list[Tensor]:
        """Scores of a module, of all branches that share its selection."""
        own = self.cache.tracks[name].scores
        found = [
            other.cache.tracks[name].scores for other in self.followers if other.cache is not None
        ]
        return [own, *(scores for scores in found if scores.shape == own.shape)]

    @property
    def _offset(self) -> float:
        """What is added to the scores: the published one of entropies is 1 + H.

        Branches that share a selection have the map of both, half of its weight on either text:
        ln 2 more than the mean of their entropies.
        """
        shared = self.run.config.share_cfg_selection
        return 1 + math.log(2) * shared if self.selector.source == "queries" else 0.0

    def _rank(self) -> None:
        """After a step that left scores behind."""
        for name, track in self.cache.tracks.items():
            if track.selects and track.rows:
                rank(track.score, self._scores(name), self._offset)

    def _taken_over(self, name: str, track: Track) -> list[bool]:
        """The layers whose selection is the leader's, which it has made in this step."""
        leader = self.leader
        over = [False] * track.layers
        if leader is None or leader.position != self.position + 1:
            return over
        for layer, (index, inverse) in leader.selected.get(name, {}).items():
            full, k = self.done.full[-1][name][layer], self.done.k[-1][name][layer]
            same = inverse.shape == track.scores.shape[1:] and index.shape[1] == k
            if same and not full:
                track.note(layer, index, inverse)
                track.age[layer] = (track.age[layer] + 1).masked_fill(inverse >= 0, 0)
                over[layer] = True
        return over

    # --- before a step --------------------------------------------------------------------------

    def enter(self, call: ModelCall, timestep: float | None, signature: Hashable) -> None:
        """The next step: what it does is decided here, before the model is called.

        `signature` is all that the shapes and dtypes of the modules' outputs depend on.
        """
        self._call = call
        self._now = timestep
        if self.first is None:
            self.first = timestep
        if self._rows and timestep not in (None, self.run.timesteps[self.position]):
            self._rows = {}  # off the announced track: the table does not hold this step
        if self.cache is None or signature != self._signature:
            self.adopt(signature)  # the call holds its text: no other gets its address
        self.decide()

    def adopt(self, signature: Hashable) -> None:
        """Take a cache for inputs like this call's."""
        self._before, self.done = self.done, Done()
        self._signature = signature
        self.adopted = self.position
        self._tables, self._rows = None, {}
        self.cache = self.run.cache_for(signature, self._call.timestep.device)
        if self.leader is not None or self.followers:
            for track in self.cache.tracks.values():
                track.part()
        self.discovering = not self.cache.layout
        if not self.discovering:
            self._learn()

    def _learn(self) -> None:
        """What the tokens' numbers tell."""
        layout = self.cache.layout
        tokens = {name: layout[name][0].shape[1] for name in self.run.layers}
        self._plan = self.run.plan(tokens)
        self._needs_score = {
            (source, module): self._plan.needs_score(
                # Where the last block has no MLP for its text, its attention has no say in one.
                module,
                source=source if self.run.layers[source] == self.run.layers[module] else None,
            )
            for block in self.run.blocks
            for source, module in block.scoring(self.selector.name)
        }
        if self.selector.source == "given":
            assert self.run.mask is not None
            self.cache.weigh(self.run.mask)
        self.done.batch = {name: layout[name][0].shape[0] for name in self.run.layers}
        self.done.tokens = tokens
        self.done = self.done.after(self._before)

    def decide(self) -> None:
        """What the step does: the plan's word, or a full step where nothing is cached."""
        if self.discovering:
            self._forced = True
            full = {name: [True] * layers for name, layers in self.run.layers.items()}
            self.done.full.append(full)
        else:
            tables = {name: table[self.position] for name, table in self._plan.full.items()}
            self._forced = not self.cache.valid and not all(map(np.all, tables.values()))
            if self._forced:
                tables = {name: np.ones_like(row) for name, row in tables.items()}
            elif self.run.config.residual_threshold is not None:
                tables = self._first_full(tables)
            self.done.full.append({name: row.tolist() for name, row in tables.items()})
            self.done.k.append({name: self._rows_of(name, row) for name, row in tables.items()})
            # The first step computes its own modulation, as it does where nothing is known yet.
            if self.position > self.adopted and (self.fused or not self.done.full_steps()[-1]):
                self._tabulate()
        self._place()
        if self.run.config.residual_threshold is not None:
            state = self.run.blocks[0].state
            assert state is not None
            state.watch = self.watch

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
        if not planned and not self.cache.drifted(added, self.run.config.residual_threshold):
            return
        self.cache.added = added.clone()
        if planned:
            return
        self._forced = True
        done, k = self.done.full[-1], self.done.k[-1]
        for name in done:
            done[name] = [True] * len(done[name])
            k[name] = [self.done.tokens[name]] * len(k[name])
        for name, track in self.cache.tracks.items():
            track.forget_selection()
            if name in done:
                track.young(done[name])
        self._place(first=1)

    def _rows_of(self, name: str, full: BoolTable) -> list[int]:
        """k of a module in each layer; all tokens where that takes no longer than k."""
        N = self.done.tokens[name]
        k = np.where(full, N, self._plan.k[name][self.position])
        device = self.cache.tracks[name].layout.device
        if module_kind(name) == "mlp" and self.done.batch[name] * N <= free_rows(device):
            k = np.where(k > 0, N, k)
        return k.tolist()

    def _place(self, first: int = 0) -> None:
        """Tell every block from the first one on what to do."""
        modulation = self._look_up()
        for number, block in enumerate(self.run.blocks[first:], first):
            state = self._state(block)
            state.modulation = modulation[number] if modulation else None
            block.place(state)

    def _state(self, block: Block) -> BlockState:
        done = self.done.full[-1]
        full = {name: done[name][block.layers[name]] for name in block.modules}
        state = BlockState(full, self.fused)
        if self._leaves_scores(block):
            compares = self.selector.source == "output"
            state.selector = None if compares else self.selector.name
            state.changes = self.selector.name if compares else None
        state.refreshes = self.selector.source == "queries"
        state.partial = self.run.config.self_attention == "partial"
        if self.run.config.cache_dtype and 0 in block.layers.values():
            state.rounding = self.cache.rounding
        if self.discovering:
            state.holder = _Discovery(self.cache)
            return state
        for name, layer in block.layers.items():
            if name not in self.cache.tracks:
                continue
            track = self.cache.tracks[name]
            state.valid[name] = track.valid[layer]
            B, N, _ = track.layout.shape
            state.features[name] = track.at(layer)
            state.dtypes[name] = track.layout.dtype
            state.every[name] = self.cache.every(B, N)
            if track.selects:
                state.scores[name] = track.scores[layer]
        return state

    def _leaves_scores(self, block: Block) -> bool:
        """Whether the step must leave scores behind, for others to read."""
        if not self.selector.left_by_full_steps:
            return False
        if self._forced or self.run.config.residual_threshold is not None:
            return True
        return any(
            self._needs_score[source, name][self.position, block.layers[name]]
            for source, name in block.scoring(self.selector.name)
        )

    def kind(self) -> Hashable | None:
        """What the kernels of the step depend on, beside the inputs' shapes.

        None where the step is not known before the model is called, or Python reads from it.
        """
        if self.discovering or self.run.record_selections:
            return None
        if self.run.config.residual_threshold is not None or self.leader or self.followers:
            return None
        full, k = self.done.full[-1], self.done.k[-1]
        decided = tuple((name, tuple(full[name]), tuple(k[name])) for name in full)
        states = [block.state for block in self.run.blocks if block.state]
        scores = tuple(
            (state.selector, state.changes, *(state.valid.values() if state.changes else ()))
            for state in states
        )
        computed = tuple(
            tuple(track.computed) for track in self.cache.tracks.values() if track.forecast
        )
        return id(self.cache), decided, scores, computed, states[0].modulation is None

    # --- the step -------------------------------------------------------------------------------

    def forward(
        self, own: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """The selection of all layers, then the model's own forward: what a graph records."""
        if not self.discovering:
            self._select()
        out = own(*args, **kwargs)
        states = [block.state for block in self.run.blocks if block.state]
        if any(state.selector or state.changes for state in states):
            leads = self.leader is not None and self.leader.cache is not None
            (self.leader if leads else self)._rank()  # type: ignore[union-attr]
        for block in self.run.blocks:
            state = block.state
            if state is None:
                continue
            for name in state.late:
                track = self.cache.tracks[name]
                track.note(block.layers[name], state.index[name], state.inverse[name])
        return out

    def _select(self) -> None:
        for name, track in self.cache.tracks.items():
            track.forget_selection()
            if track.forecast:
                track.measure()
            if track.selects:
                track.young(self.done.full[-1][name])
                self._select_of(name, track)
            elif track.forecast:
                track.grow(self.done.full[-1][name])
        compiling = "torch._dynamo" in sys.modules
        for block in self.run.blocks:
            state = block.state
            assert state is not None
            for name in block.modules:
                track, layer = self.cache.tracks[name], block.layers[name]
                if state.full[name] or not track.selects or name in state.late:
                    continue
                state.index[name], state.inverse[name] = track.selection(layer)
                if compiling:  # one graph for every k
                    torch._dynamo.maybe_mark_dynamic(state.index[name], 1)

    def _select_of(self, name: str, track: Track) -> None:
        """Select among a module's tokens, in all layers at once or where new scores are known."""
        config = self.run.config
        k = self.done.k[-1][name]
        late, over = self._late(name), self._taken_over(name, track)
        late = [waits and not taken for waits, taken in zip(late, over, strict=True)]
        cached = [
            not (full or waits or taken)
            for full, waits, taken in zip(self.done.full[-1][name], late, over, strict=True)
        ]
        grid = self._grid(name)
        settings: dict[str, Any] = {
            "age_weight": config.age_step,
            "grid": grid,
            "cell": min(config.grid, self.done.tokens[name]) if grid else 1,
            "bonus": config.bonus if grid else 0.0,
        }
        if any(cached):
            if self.selector.source == "drawn":
                self.selector.draw(track.score, self._random(track.score.device))
            self.cache.nan += track.select(cached, k, **settings)
        for block in self.run.blocks:
            layer = block.layers.get(name)
            if layer is not None and late[layer]:
                assert block.state is not None
                block.state.late[name] = Late(
                    tuple(scores[layer] for scores in self._scores(name)),
                    self._offset,
                    track.score[layer],
                    track.age[layer],
                    [k[layer]] * track.rows,
                    settings,
                    self.cache.nan,
                )

    def _grid(self, name: str) -> tuple[int, ...] | None:
        """The grid in whose cells the best token gets a bonus; texts have none."""
        if self.run.config.bonus == 0 or self.run.config.grid == 1 or name.startswith("txt_"):
            return None
        grid = self._call.grids.get(name)
        if grid is None or math.prod(grid) != self.done.tokens[name]:
            raise ValueError(
                f"bonus: expected a model whose tokens lie on a known grid, got {name!r} with "
                f"{self.done.tokens[name]} tokens on {grid}; use bonus=0"
            )
        return grid

    def _late(self, name: str) -> list[bool]:
        """In which layers scores come up while the block runs, before the module selects."""
        late = [False] * self.run.layers[name]
        for block in self.run.blocks:
            if name not in block.layers:
                continue
            source = block.ranked_by(name, self.selector.name)
            if source is not None:
                layer, from_layer = block.layers[name], block.layers[source]
                full, k = self.done.full[-1], self.done.k[-1]
                selects = not full[name][layer] and 0 < k[name][layer] < self.done.tokens[name]
                refreshed = full[source][from_layer] or (
                    self.selector.source == "queries" and k[source][from_layer] > 0
                )
                late[layer] = selects and refreshed
        return late

    def _random(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device)
            self._generator.manual_seed(self.run.config.seed)
        return self._generator

    # --- modulation of all steps ----------------------------------------------------------------

    def _look_up(self) -> list[Tensor] | None:
        """The rows of the table for this step, one tensor for each layer; None if it has none."""
        if self._tables is None or self.position not in self._rows:
            return None
        if self._now is None:  # on a device: compared there, and read at the end of the run
            announced = self.run.timesteps[self.position]
            self.cache.off_track |= (self._call.timestep != announced).any()
        assert self._call.labels is not None  # what a table is made from
        labels = self._call.labels.numel()
        first = self._rows[self.position] * labels
        rows = [table[first : first + labels] for table in self._tables]
        return rows if self.run.graphs is None else self.cache.fixed_modulation(rows)

    def _tabulate(self) -> None:
        """Modulations of all remaining cached steps, in one GEMM for each layer."""
        timesteps = self.run.timesteps
        blocks = [block for block in self.run.blocks if isinstance(block, SelfMLP)]
        if self._tables is not None or not self.run.config.tabulate_modulation or not timesteps:
            return
        if len(blocks) < len(self.run.blocks):
            return
        steps = [
            step
            for step in range(self.position, min(self._plan.num_steps, len(timesteps)))
            if self.fused or not all(full[step].all() for full in self._plan.full.values())
        ]
        if not steps or self._now not in (None, timesteps[self.position]):
            return  # these are not the timesteps that were announced: computed step by step
        assert self._call.labels is not None
        labels = self._call.labels.flatten()  # one for each sample, or one for all of them
        t = torch.tensor([timesteps[step] for step in steps], device=self._call.timestep.device)
        t = t.to(self._call.timestep.dtype).repeat_interleave(len(labels))
        like = torch.empty(0, dtype=self.cache.tracks["attn"].layout.dtype, device=t.device)
        conditions = self.run.adapter.conditions(t, labels.repeat(len(steps)), like)
        every = self.fused or self.run.config.self_attention == "partial"
        chunks = slice(None) if every else CACHED_CHUNKS
        self._tables = [
            block.modulate(condition, chunks)
            for block, condition in zip(blocks, conditions, strict=True)
        ]
        self._rows = {step: row for row, step in enumerate(steps)}
        self.done.table_bytes = sum(table.nbytes for table in self._tables)

    # --- after a step ---------------------------------------------------------------------------

    def leave(self, seconds: float) -> None:
        """The step is done: count it."""
        if self.discovering:
            self._discovered()
        done, cache = self.done, self.cache
        for name, full in done.full[-1].items():
            cache.tracks[name].ran(full)
        if self.run.config.share_cfg_selection:
            self.selected = {name: track.taken for name, track in cache.tracks.items()}
        self.position += 1
        self.last = self._now
        done.seconds.append(seconds)
        done.cache_bytes = max(done.cache_bytes, cache.nbytes)
        done.other_bytes = max(done.other_bytes, cache.other_nbytes)
        if self.run.record_selections:
            done.selections.append(self._recomputed())
        if self.position == self.run.num_steps:  # nothing will be read any more
            self.release()
            if cache.off_track:
                raise RuntimeError(
                    "timesteps: the run visited others than were announced, so its modulation was "
                    "wrong; enable with the timesteps that you sample, or tabulate_modulation=False"
                )

    def _discovered(self) -> None:
        missing = [name for name in self.cache.tracks if name not in self.cache.layout]
        if missing:
            raise RuntimeError(
                f"model: expected a step to call {', '.join(missing)} of its blocks, it did not"
            )
        self.discovering = False
        self.run.remember(self._signature, self.cache.layout)
        self._learn()
        self.done.k.append(
            {name: [self.done.tokens[name]] * layers for name, layers in self.run.layers.items()}
        )

    def _recomputed(self) -> dict[str, Tensor] | None:
        if self.done.full_steps()[-1]:
            return None
        return {
            name: track.recomputed() for name, track in self.cache.tracks.items() if track.selects
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
        self._call = None  # type: ignore[assignment]
        self._tables, self._rows = None, {}
        if cache is not None:
            self.done.nan = int(cache.nan)
            self.done.rounding = _relative(cache.rounding)

    def has_text(self, text: Any) -> bool:
        """Whether the last step was given the same text, wherever it lay."""
        if self._call is None:  # the branch has come to its end
            return False
        mine, other = pytree.tree_leaves(self._call.text), pytree.tree_leaves(text)
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

    def abort(self) -> None:
        """The step did not finish: nothing it left behind may be read."""
        del self.done.k[len(self.done.seconds) :], self.done.full[len(self.done.seconds) :]
        if self.cache is not None:
            self.cache.invalidate()


def _relative(sums: Tensor) -> float:
    """The root of (squared errors over squares), 0 where nothing was rounded."""
    error, whole = sums.tolist()
    return math.sqrt(error / whole) if whole else 0.0


class _Discovery:
    """The first step of a kind: buffers are made as the modules' outputs appear."""

    def __init__(self, cache: TokenCache) -> None:
        self.cache = cache

    def hold(self, module: str, layer: int, layout: Layout) -> tuple[Features, Tensor]:
        B, N, _ = layout.shape
        return self.cache.tracks[module].hold(layer, layout), self.cache.every(B, N)

    def hold_score(self, scores: dict[str, Tensor], module: str, layer: int, score: Tensor) -> None:
        track = self.cache.tracks[module]
        if track.selects:
            B, N = score.shape
            track.hold_scores(B, N, score.device)
            scores[module] = track.scores[layer]
