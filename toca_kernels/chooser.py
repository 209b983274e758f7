"""Chooser: which tokens of each module a guidance branch recomputes in the step at hand."""

from __future__ import annotations

import math
import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .blocks.block import Block
from .blocks.taps import Late
from .plan import BoolTable, Plan
from .selectors import SELECTORS
from .track import Track, rank

if TYPE_CHECKING:
    from .branch import Branch
    from .parallel import Share


class Chooser:
    """Selects the tokens of a branch, by the scores that its steps leave behind.

    Attributes:
        selector: what they are scored by.
        leader: the chooser whose selections these are, too: of the guidance branch that is called
            first in each step, where branches share them.
        followers: of a leader.
        selected: module -> layer -> the selection of the last step, for followers.
    """

    def __init__(self, branch: Branch) -> None:
        self._branch = weakref.ref(branch)  # which owns its chooser, and large buffers with it
        self.run = branch.run
        self.selector = SELECTORS[branch.run.config.selector]
        self.leader: Chooser | None = None
        self.followers: list[Chooser] = []
        self.selected: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        self._needs: dict[tuple[str, str], BoolTable] = {}
        self._generator: torch.Generator | None = None

    @property
    def branch(self) -> Branch:
        branch = self._branch()
        assert branch is not None
        return branch

    def learn(self, plan: Plan) -> None:
        """The plan is known."""
        self._needs = {
            (source, module): self._needed(plan, source, module)
            for block in self.run.blocks
            for source, module in block.scoring(self.selector.name)
        }
        if self.selector.source == "given":
            assert self.run.mask is not None
            self.branch.cache.weigh(self.run.mask, self.branch.shares)

    def _needed(self, plan: Plan, source: str, module: str) -> BoolTable:
        """Where `source` must leave the scores of `module` behind."""
        if self.run.layers[source] == self.run.layers[module]:
            return plan.needs_score(module, source=source)
        # Where the last block has no MLP for its text, its attention has no say in one.
        needed = plan.needs_score(module)
        if all(self.run.keeps[source]):
            return needed
        selects = ~plan.full[module] & (plan.k[module] > 0)
        return needed | selects  # an attention that is not cached has new scores in every step

    # --- guidance in calls of its own -----------------------------------------------------------

    @property
    def shares(self) -> bool:
        """Whether a selection serves calls of other branches, too."""
        return self.leader is not None or bool(self.followers)

    def part(self) -> None:
        """Guidance comes in calls of its own: batches have no halves."""
        if self.branch.cache is not None:
            self.run.keep_no_more(self.branch.cache)
            for track in self.branch.cache.tracks.values():
                track.part()

    def follow(self, leader: Chooser) -> None:
        """Select what the branch has selected that is called first in each step."""
        leader = leader.leader or leader
        self.leader = leader
        leader.followers.append(self)
        leader.part()

    def quit(self) -> None:
        """The branch takes no more steps: its scores rank nobody's tokens, the next one leads."""
        leader, followers = self.leader, self.followers
        self.leader, self.followers, self.selected = None, [], {}
        if leader is not None:
            leader.followers.remove(self)
        if followers:
            first, *others = followers
            first.leader, first.followers = None, others
            for other in others:
                other.leader = first

    def _sharing(self) -> list[Chooser]:
        """The choosers of all branches that share selections and have a cache, the leader first."""
        leader = self.leader or self
        return [one for one in (leader, *leader.followers) if one.branch.cache is not None]

    def _scores(self, name: str) -> list[Tensor]:
        """Scores of a module, of all branches that share its selection."""
        own = self.branch.cache.tracks[name].scores
        found = [other.branch.cache.tracks[name].scores for other in self._sharing()]
        return [scores for scores in found if scores.shape == own.shape]

    @property
    def _offset(self) -> float:
        """What is added to the scores: the published one of entropies is 1 + H.

        Branches that share a selection have the map of both, half of its weight on either text:
        ln 2 more than the mean of their entropies.
        """
        shared = self.run.config.share_cfg_selection
        return 1 + math.log(2) * shared if self.selector.source == "queries" else 0.0

    def rank(self) -> None:
        """After a step that left scores behind: of all branches that share them.

        A follower has its own, too: for steps that its leader runs in full or not at all, and for
        modules that have another number of tokens there.
        """
        for one in self._sharing():
            for name, track in one.branch.cache.tracks.items():
                if track.selects and track.rows:
                    rank(track.score, one._scores(name), self._offset, self.run.ranks)

    def _taken_over(self, name: str, track: Track) -> list[bool]:
        """The layers whose selection is the leader's, which it has made in this step."""
        leader = self.leader
        over = [False] * track.layers
        if leader is None or leader.branch.position != self.branch.position + 1:
            return over
        theirs = leader.branch.done.k[-1][name]
        for layer, (index, inverse) in leader.selected.get(name, {}).items():
            full, k = self.branch.done.full[-1][name][layer], self.branch.done.k[-1][name][layer]
            same = inverse.shape == track.scores.shape[1:] and theirs[layer] == k
            if same and not full:
                track.note(layer, index, inverse)
                track.age[layer] = (track.age[layer] + 1).masked_fill(inverse >= 0, 0)
                over[layer] = True
        return over

    def leaves_scores(self, block: Block) -> bool:
        """Whether the step must leave scores behind, for others to read."""
        if not self.selector.left_by_full_steps:
            return False
        scored = [
            (source, name)
            for source, name in block.scoring(self.selector.name)
            if name not in block.never
        ]
        if self.branch.forced:
            return bool(scored) or not block.never
        return any(
            self._needs[pair][self.branch.position, block.layers[pair[1]]] for pair in scored
        )

    def select(self) -> None:
        for name, track in self.branch.cache.tracks.items():
            track.forget_selection()
            if track.forecast:
                track.measure()
            if track.selects:
                track.young(self.branch.done.full[-1][name])
                self._select_of(name, track)
            elif track.forecast:
                track.grow(self.branch.done.full[-1][name])
        compiling = "torch._dynamo" in sys.modules
        for block, state in zip(self.run.blocks, self.branch.states, strict=True):
            for name in block.modules:
                track, layer = self.branch.cache.tracks[name], block.layers[name]
                if state.full[name] or not track.selects or name in state.late:
                    continue
                state.index[name], state.inverse[name] = track.selection(layer)
                if compiling:  # one graph for every k
                    torch._dynamo.maybe_mark_dynamic(state.index[name], 1)

    def _select_of(self, name: str, track: Track) -> None:
        """Select among a module's tokens, in all layers at once or where new scores are known."""
        config = self.run.config
        k = self.branch.done.k[-1][name]
        late, over = self._late(name), self._taken_over(name, track)
        late = [waits and not taken for waits, taken in zip(late, over, strict=True)]
        cached = [
            not (full or waits or taken)
            for full, waits, taken in zip(self.branch.done.full[-1][name], late, over, strict=True)
        ]
        grid = self._grid(name)
        settings: dict[str, Any] = {
            "age_weight": config.age_step,
            "grid": grid,
            "cell": min(config.grid, self.branch.done.tokens[name]) if grid else 1,
            "bonus": config.bonus if grid else 0.0,
        }
        share = self.branch.shares.get(name)
        if any(cached):
            if self.selector.source == "drawn":
                self._draw(track.score, share)
            self.branch.cache.nan += track.select(cached, k, **settings, share=share)
        for block, state in zip(self.run.blocks, self.branch.states, strict=True):
            layer = block.layers.get(name)
            if layer is not None and late[layer]:
                state.late[name] = Late(
                    tuple(scores[layer] for scores in self._scores(name)),
                    self._offset,
                    track.score[layer],
                    track.age[layer],
                    [k[layer]] * track.rows,
                    settings,
                    self.branch.cache.nan,
                    share,
                )

    def _grid(self, name: str) -> tuple[int, ...] | None:
        """The grid in whose cells the best token gets a bonus; texts have none."""
        if self.run.config.bonus == 0 or self.run.config.grid == 1 or name.startswith("txt_"):
            return None
        grid = self.branch.call.grids.get(name)
        share = self.branch.shares.get(name)
        N = self.branch.done.tokens[name] if share is None else share.tokens
        if grid is None or math.prod(grid) != N:
            raise ValueError(
                f"bonus: expected a model whose tokens lie on a known grid, got {name!r} with "
                f"{N} tokens on {grid}; use bonus=0"
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
                full, k = self.branch.done.full[-1], self.branch.done.k[-1]
                selects = (
                    not full[name][layer] and 0 < k[name][layer] < self.branch.done.tokens[name]
                )
                refreshed = full[source][from_layer] or (
                    self.selector.source == "queries" and k[source][from_layer] > 0
                )
                late[layer] = selects and refreshed
        return late

    def _draw(self, score: Tensor, share: Share | None) -> None:
        """The numbers of one device, of which a process takes those of its tokens."""
        whole = score
        if share is not None:
            whole = score.new_empty((*score.shape[:-1], share.tokens))
        self.selector.draw(whole, self._random(score.device))
        if share is not None:
            score.copy_(whole[..., share.places])

    def _random(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device)
            self._generator.manual_seed(self.run.config.seed)
        return self._generator
