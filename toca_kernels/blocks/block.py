"""What all block families share: the state of a step, and the forward that replaces a block's own.

A full step is the block's own forward.  A cached step is that too, unless a family knows better:
the modules that the taps name return what is cached, and recompute only the rows that were
selected.  So any block whose modules are called once each is served, whatever stands between them;
a family composes the cached step from the fused ops instead, where it knows what stands there.

Everything a block does in a step follows from its `state`, which the run sets before it calls the
model.  A state holds tensors and plain values under the same names in every block, so torch.compile
needs one graph for each kind of step, not one for each block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ops import ForecastCache, read_rows, store_rows
from ..parallel import beneath
from ..plan import Plan, is_module, module_kind
from ..selectors import SELECTORS
from ..track import Features, Layout
from . import linear
from .capture import CapturedScores
from .loan import Loan
from .row_mlp import RowMLP
from .taps import Late, Tap, Tapped, cached_rows, taken_rows

Attends = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]


class OtherLayout(RuntimeError):
    """A module's output is not as in earlier calls with inputs of the same shapes."""


class Holder(Protocol):
    """Makes the buffers of a block while its first step shows what they look like."""

    def hold(self, module: str, layer: int, layout: Layout) -> tuple[Features, Tensor]: ...
    def see(self, module: str, layer: int, layout: Layout) -> None: ...
    def hold_score(
        self, scores: dict[str, Tensor], module: str, layer: int, score: Tensor
    ) -> None: ...


@dataclass
class BlockState:
    """What the step at hand asks of one block; keyed by the modules' names.

    Attributes:
        full: whether a module computes all tokens.
        fused: whether full steps run through the ops.
        selector: whose scores an attention must leave behind; None if nobody reads them.
        changes: whether what a module returns is compared with what it is about to replace.
        valid: whether that may be read.
        features: the caches of this layer; dtypes: what they stand for, where they are 8 bits.
        scores: (B, N) of this layer, where the scores go.
        index, inverse: (B, k) and (B, N) of this layer's selections.
        refreshes: whether rows that are recomputed get new scores, too.
        partial: whether self-attention is recomputed for selected tokens.
        late: selections of this layer that wait for new scores.
        every: (B, N), every token in its own place.
        rounding: where errors of 8-bit caches are summed; None where they are not sampled.
        modulation: this step's row of a table made for all steps; None where there is none.
        watch: called with the block's arguments and result; None where nobody asks.
        loan: brings the caches; None where they are at hand.
        quota: how processes select that share the tokens; None where one has all of them.
        holder: makes `features` and `scores`, in the first step of a kind.
    """

    full: dict[str, bool]
    fused: bool
    selector: str | None = None
    changes: str | None = None
    valid: dict[str, bool] = field(default_factory=dict)
    features: dict[str, Features] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    index: dict[str, Tensor] = field(default_factory=dict)
    inverse: dict[str, Tensor] = field(default_factory=dict)
    refreshes: bool = False
    partial: bool = False
    late: dict[str, Late] = field(default_factory=dict)
    every: dict[str, Tensor] = field(default_factory=dict)
    rounding: Tensor | None = None
    modulation: Tensor | None = None
    holder: Holder | None = None
    watch: Callable[[Any, Any, Any], None] | None = None
    loan: Loan | None = None
    quota: str | None = None


class Block:
    """One block of an enabled model: its replaced forwards, and what they keep.

    Attributes:
        layers: module -> the layer that this block is for it.
        modules: those of them that are in the plan; the others are kept beside them, such as keys
            and values of a text, which no step changes.
        selectors: the selectors that the block has scores for.
        attends: of a block that attends in its own forward, in the order of its keys: the modules
            that get what these receive as scores, and the modules with as many tokens.
        mlps: the MLPs that a family composes from the ops.
        composed: whether the family composes the step at hand; then taps only pass on.
        packed: of what is kept, that which has the rows of all samples one behind the other.
        joint: whether image and text are one sequence in all of its modules.
        never: what the settings do not cache of `layers`; such modules are full in every step.  A
            block that has any runs through taps.
    """

    fuses: ClassVar[bool] = False  # whether full steps can run through the ops

    def __init__(
        self,
        block: nn.Module,
        layers: Mapping[str, int],
        taps: Sequence[Tap],
        attends: Attends = (),
        *,
        ranked: bool = True,
    ) -> None:
        self.block = block
        self.layers = dict(layers)
        self.modules = tuple(name for name in layers if is_module(name))
        self.attends = attends
        self.selectors = tuple(self._selectors(taps, ranked))
        self.composed = False
        self.joint = False
        self.never: frozenset[str] = frozenset()
        self.mlps: Sequence[RowMLP] = ()
        self.state: BlockState | None = None
        self.kept: list[str] = []
        self._hooked = False
        self._own_forward = beneath(block).forward
        self.taps = tuple(Tapped(self, tap) for tap in taps)
        self.packed = frozenset(name for tap in taps if tap.packed for name in tap.outputs)

    def __deepcopy__(self, memo: object) -> Block:
        # The replaced forwards of a copy would run the modules of the original.
        raise ValueError("deepcopy: expected a model that is not enabled; disable it first")

    def __reduce__(self) -> Any:
        raise ValueError(
            "pickle: expected a model that is not enabled, or its state_dict; disable it first"
        )

    def _selectors(self, taps: Sequence[Tap], ranked: bool) -> list[str]:
        """`ranked` says whether scores can be taken from the block's attention."""
        crosses = ranked and any(tap.queries for tap in taps)
        attends = ranked and (self.attends != () or any(tap.keys for tap in taps))
        lacks = [] if crosses else ["queries"]
        lacks += [] if attends else ["keys"]
        return [name for name, one in SELECTORS.items() if one.source not in lacks]

    def replacements(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """(module, the forward that takes its place while the model is enabled)."""
        tapped = ((one.tap.module, one.forward) for one in self.taps)
        return [(self.block, self.forward), *tapped]

    @property
    def packed_nbytes(self) -> int:
        """Bytes of second copies of weights."""
        return sum(mlp.packed_nbytes for mlp in self.mlps)

    def release(self) -> None:
        """Give memory back, after `disable`."""
        for mlp in self.mlps:
            mlp.release()

    def leave_out(self, modules: Collection[str]) -> None:
        """Cache nothing of these modules of the plan, nor what is kept beside them."""
        beside = (one.tap.names for one in self.taps if one.tap.decides in modules)
        self.never = frozenset(modules) | {name for names in beside for name in names}

    def scoring(self, selector: str) -> list[tuple[str, str]]:
        """(module that leaves scores, module whose tokens they rank)."""
        source = SELECTORS[selector].source
        if source == "output":
            return [(name, name) for name in self.modules]
        if source not in ("keys", "queries"):
            return []
        own = [(sources[0], name) for names, sources in self.attends for name in names]
        return own + [
            (one.tap.outputs[0], name) for one in self.taps for name in one.tap.scored(selector)
        ]

    def ranked_by(self, name: str, selector: str) -> str | None:
        """The module that leaves this one's scores and comes before it in the block."""
        if module_kind(name) != "mlp":
            return None
        ranking = (one for one, ranked in self.scoring(selector) if ranked == name != one)
        return next(ranking, None)

    def check(self, plan: Plan, *, partial: bool) -> None:
        """Refuse a plan that asks for what this family does not do.

        `partial` is self_attention="partial".
        """
        if self.attends:  # one forward for all of them
            for name in self.modules[1:]:
                self._check_together(plan, self.modules[0], name)
        for tap in (one.tap for one in self.taps):
            together = (*tap.outputs, *tap.beside, *((tap.rows,) if tap.rows else ()))
            for name in together[1:]:
                if together[0] in plan.full and name in plan.full:
                    self._check_together(plan, together[0], name)
            if partial and tap.keys and not tap.rowwise:
                raise ValueError(
                    "self_attention: expected 'reuse' for this model, whose attention depends on "
                    "where a token is (rotary embeddings) or joins two streams, got 'partial'"
                )
            if tap.cached not in ("whole", "picked") or (partial and tap.rowwise):
                continue
            for name in tap.outputs:
                if name in plan.k and plan.k[name][~plan.full[name]].any():
                    raise ValueError(
                        f"module_ratio: expected no ratio for {name!r}, whose output is reused "
                        "whole (self_attention='reuse'), got one"
                    )

    def _check_together(self, plan: Plan, one: str, other: str) -> None:
        if (one in self.never) != (other in self.never):
            raise ValueError(
                f"modules, layers: expected {one!r} and {other!r} of this model to be cached in "
                "the same layers, as they are computed together, got one of them in layer "
                f"{self.layers[one]}"
            )
        columns = [plan.full[name][:, self.layers[name]] for name in (one, other)]
        if (columns[0] != columns[1]).any():
            raise ValueError(
                f"module_interval: expected one interval for {one!r} and {other!r} of this model, "
                "got two"
            )

    def prepare(self, *, prepack: bool) -> None:
        """Before a run: look again at modules that may have been replaced or changed."""
        for one in self.taps:
            one.check_in_place()
        for mlp in self.mlps:
            tapped = next(one for one in self.taps if one.tap.module is mlp.parts.module)
            mlp.prepare(tapped, prepack=prepack and not self.never)

    def place(self, state: BlockState | None) -> None:
        """Before and after a step."""
        self.state = state
        self._hooked = any(linear.hooked(one.tap.module) for one in self.taps)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if state is None:  # called outside the model's forward: not part of a run
            return self._own_forward(*args, **kwargs)
        if state.loan is not None:
            state.loan.take(self, state)
        self.kept = []  # in composed steps too: a list that grows is compiled anew each time
        # What is cached is what a module's own forward returns: hooks act on it anew in each step.
        taps = self._hooked or len(self.never) > 0
        self.composed = not taps and self.composes(state, args, kwargs)
        out = (
            self.compose(state, args, kwargs)
            if self.composed
            else self._through_taps(state, args, kwargs)
        )
        if state.loan is not None:
            state.loan.give_back(self, state)
        if state.watch is not None:
            state.watch(args, kwargs, out)
        return out

    def added(self, args: Any, kwargs: Any, out: Any) -> Tensor:
        """What the block has added to its hidden states, (B, N, C)."""
        own = getattr(self.block, "_orig_mod", self.block)  # of one that torch.compile has wrapped
        given = inspect.signature(type(own).forward).bind(own, *args, **kwargs).arguments
        x: Tensor = next(given[name] for name in ("hidden_states", "x", "img") if name in given)
        leaves = [one for one in pytree.tree_leaves(out) if isinstance(one, Tensor)]
        like = [one for one in leaves if one.shape == x.shape]
        if not like:
            raise ValueError(
                f"residual_threshold: expected {type(self.block).__name__} to return hidden states "
                f"{tuple(x.shape)} as it was given, it did not"
            )
        if len(like) > 1:  # two streams of as many tokens: this one's is what stayed near
            like.sort(key=lambda one: float((one - x).abs().sum()))
        return like[0] - x

    def composes(self, state: BlockState, args: Any, kwargs: Any) -> bool:
        """Whether this family has a way of its own for this step."""
        return False

    def only_cached(self, state: BlockState) -> bool:
        """Whether no module is full, and none returns another dtype than the residual has."""
        if any(state.full.values()):
            return False
        device = next(iter(state.index.values())).device.type
        return not torch.is_autocast_enabled(device)

    def compose(self, state: BlockState, args: Any, kwargs: Any) -> Any:
        """The block from the ops: each module in full, or its fresh rows and its cache."""
        raise NotImplementedError

    def _through_taps(self, state: BlockState, args: Any, kwargs: Any) -> Any:
        """The block's own forward: bit for bit in a full step."""
        if self.attends and all(state.full.values()) and state.selector:
            out = self._attended(state, args, kwargs)
        else:
            out = self._own_forward(*args, **kwargs)
        full = all(state.full.values())
        names = [
            name for one in self.taps if full or not one.tap.inside for name in one.tap.outputs
        ]
        kept = [name for name in self.kept if name in names]
        if sorted(kept) != sorted(names):
            calls = ", ".join(f"{name} {kept.count(name)} times" for name in names)
            raise RuntimeError(
                f"layer {self.layers[names[0]]}: expected each of its modules to be called once, "
                f"got {calls}; if modules were replaced, disable the model and enable it again, if "
                "projections were fused, unfuse them"
            )
        return out

    def _attended(self, state: BlockState, args: Any, kwargs: Any) -> Any:
        """The block's own forward, in which it attends; the scores of its tokens stay behind."""
        assert state.selector is not None
        found: list[Tensor] = []
        with CapturedScores(state.selector, found):
            out = self._own_forward(*args, **kwargs)
        if not found:
            raise RuntimeError(
                f"selector {state.selector!r}: {type(self.block).__name__} calls neither "
                "scaled_dot_product_attention nor softmax; use selector='random'"
            )
        sizes = [
            (names, sum(self.read_shape(state, source)[1] for source in sources))
            for names, sources in self.attends
        ]
        B = self.read_shape(state, self.attends[0][1][0])[0]
        self.record_keys(state, found, B, sizes)
        return out

    def record_keys(
        self,
        state: BlockState,
        found: Sequence[Tensor],
        B: int,
        sizes: Sequence[tuple[Sequence[str], int]],
    ) -> None:
        """Keep what the keys of an attention received: (modules, tokens), in the keys' order.

        A module may attend slice by slice of its samples and heads; calls on other tokens (of an
        image prompt, say) are not its tokens' scores.
        """
        N = sum(tokens for _, tokens in sizes)
        whole = [one for one in found if one.shape == (B, N)]
        slices = [one for one in found if one.ndim == 3 and one.shape[2] == N]
        rows = sum(len(one) for one in slices)
        if whole:
            scores = torch.stack(whole).mean(dim=0)
        elif rows and rows % B == 0:
            scores = torch.cat(slices).view(B, -1, N).mean(dim=1)
        else:
            raise RuntimeError(
                f"selector {state.selector!r}: expected attention among the {N} tokens of {B} "
                f"samples, got {[tuple(one.shape) for one in found]}; use selector='random'"
            )
        first = 0
        for names, tokens in sizes:
            for name in names:
                self.record(state, name, scores[:, first : first + tokens])
            first += tokens

    def record(self, state: BlockState, name: str, score: Tensor) -> None:
        """Keep the scores of a module's tokens."""
        if state.holder is not None:
            state.holder.hold_score(state.scores, name, self.layers[name], score)
        if name in state.scores:  # else nothing selects there
            if state.scores[name].shape[1] != score.shape[1]:
                raise OtherLayout(
                    f"{name} of layer {self.layers[name]}: expected scores of "
                    f"{state.scores[name].shape[1]} tokens, got {score.shape[1]}"
                )
            state.scores[name].copy_(score)
        if name in state.late:
            state.index[name], state.inverse[name] = state.late[name].select()

    # --- caches -----------------------------------------------------------------------------

    def layout(self, name: str, out: Tensor) -> Layout:
        """What the cache of a module looks like that has returned `out`."""
        return Layout.of(out)

    def hold(self, state: BlockState, name: str, out: Tensor) -> Features:
        """The cache of a module, made in the first step."""
        if state.holder is not None:
            state.features[name], state.every[name] = state.holder.hold(
                name, self.layers[name], self.layout(name, out)
            )
        return state.features[name]

    def write(self, state: BlockState, name: str, out: Tensor) -> None:
        """Write all rows of a module's output to its cache, if it has one."""
        if name in self.never:
            if state.holder is not None and name in self.modules:
                state.holder.see(name, self.layers[name], self.layout(name, out))
            return
        kept = self.hold(state, name, out)
        shape = kept.shape if isinstance(kept, Tensor) else kept.values.shape
        if out.shape != shape:
            raise OtherLayout(
                f"{name} of layer {self.layers[name]}: expected to be called with all tokens, "
                f"{tuple(shape)} in and out, got {tuple(out.shape)}"
            )
        if state.changes and name in state.scores and state.holder is None:
            self._compare(state, name, out)
        if isinstance(kept, Tensor):
            kept.copy_(out)
            return
        if isinstance(kept, ForecastCache):
            store_rows(kept, out.to(kept.values.dtype).contiguous())
            kept.distance.zero_()  # for whoever reads it within this step
            return
        store_rows(kept, out.contiguous())
        if state.rounding is not None:
            whole = out.float()
            error = kept.values.float() * kept.scale[:, :, None] - whole
            state.rounding += torch.stack([error.square().sum(), whole.square().sum()])

    def _compare(self, state: BlockState, name: str, out: Tensor) -> None:
        """Scores of what a module returned, against what is cached; alike where nothing is."""
        assert state.changes is not None
        if state.valid[name]:
            score = SELECTORS[state.changes].changed(out, self.read(state, name))
            self.record(state, name, score)
        else:
            state.scores[name].zero_()

    def read(self, state: BlockState, name: str) -> Tensor:
        """What is cached of a module, in the dtype that it was written in."""
        kept = state.features[name]
        return kept if isinstance(kept, Tensor) else read_rows(kept, dtype=state.dtypes[name])

    def settle(self, state: BlockState, name: str) -> None:
        """After a step: what it recomputed is no longer extrapolated by `read`."""
        kept = state.features[name]
        if isinstance(kept, ForecastCache) and name in state.inverse:
            kept.distance.masked_fill_(state.inverse[name] >= 0, 0.0)

    def read_rows(self, state: BlockState, names: Sequence[str], index: Tensor) -> Tensor:
        """The selected rows of what is cached of modules whose tokens follow each other."""
        if len(names) > 1:
            whole = torch.cat([self.read(state, name) for name in names], dim=1)
            return taken_rows(whole, index)
        return cached_rows(state.features[names[0]], index, state.dtypes[names[0]])

    @staticmethod
    def read_shape(state: BlockState, name: str) -> torch.Size:
        """(B, N, C) of what is cached."""
        kept = state.features[name]
        return kept.shape if isinstance(kept, Tensor) else kept.values.shape
