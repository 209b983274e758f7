"""Taps: where a block's own forward shows what a module returned, or is handed what is cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import ForecastCache, QuantizedCache, read_rows, select_tokens, store_rows
from ..selectors import SELECTORS
from ..track import Features, rank
from .capture import CapturedScores
from .kept_keys import KeptKeys

if TYPE_CHECKING:
    from ..parallel import Share
    from .block import Block, BlockState


def _outputs(args: tuple[Any, ...], out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True, eq=False)
class Tap:
    """How a module of a block is served.

    Attributes:
        module: what the block calls, once in a step.
        outputs: the names in the plan of the tensors that it returns, in their order; of a text's
            keys and values, names that no plan has.
        cached: what a cached step does in its place:
            "whole": return what is cached.
            "rows": call it, a function of each row, for the selected rows; return the cache.
            "rows_in": the same, and return these rows only: the block works on them.
            "rows_out": call it, with the rows that "rows_in" has returned; return the cache.
            "picked": return the selected rows of what is cached.
            "seen": call it; a full step only looks on.
        rows: the module whose selected rows are meant; the first output where None.
        follows: the module whose full steps are the tap's; the first output where None.
        keys: of an attention, in the order of its keys: the modules whose tokens they are, which
            get what they receive as scores, and the positions of as many tokens in the outputs.
        queries: of a cross-attention, the modules that are ranked by the entropy of its queries.
        take: (positional arguments, what the call returned) -> the tensors to keep.
        rowwise: of an attention, whether it treats every token alike but for what it attends to: no
            rotary embedding.  Then it can be recomputed for some of them.
        packed: whether the rows of all samples follow each other, (1, their sum, C): texts.
        on_rows: called for "rows" instead of the module: (selected rows, selected rows of the
            modules `beside`, ...) -> their outputs.
    """

    module: nn.Module
    outputs: tuple[str, ...]
    cached: str = "whole"
    rows: str | None = None
    follows: str | None = None
    keys: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...] = ()
    queries: tuple[str, ...] = ()
    take: Callable[[tuple[Any, ...], Any], tuple[Tensor, ...]] = _outputs
    rowwise: bool = False
    packed: bool = False
    on_rows: Callable[..., Tensor] | None = None
    beside: tuple[str, ...] = ()

    @property
    def decides(self) -> str:
        """The module whose full steps are the tap's."""
        return self.follows or self.outputs[0]

    @property
    def inside(self) -> bool:
        """Whether the module is a part of another tap's, called only if that one is."""
        return self.follows is not None or self.cached == "seen"

    @property
    def selection(self) -> str:
        """The module whose selected rows are the tap's."""
        return self.rows or self.outputs[0]

    @property
    def names(self) -> tuple[str, ...]:
        """All that may be kept for the tap."""
        entropy = (self.entropy,) if self.queries else ()
        return (*self.outputs, *entropy, *(self.kept_keys if self.rowwise else ()))

    @property
    def kept_keys(self) -> tuple[str, str]:
        """The names of an attention's keys and values, (B, N, H D)."""
        return f"{self.outputs[0]}_kept_keys", f"{self.outputs[0]}_kept_values"

    @property
    def entropy(self) -> str:
        """The name of the (B, N, 1) entropy of each query, as it was last computed."""
        return f"{self.outputs[0]}_entropy"

    def scored(self, selector: str | None) -> tuple[str, ...]:
        """The modules whose scores are found here."""
        source = SELECTORS[selector].source if selector else None
        if source == "queries":
            return self.queries
        if source != "keys":
            return ()
        own = self.outputs if self.rowwise else ()
        return (*own, *(name for names, _ in self.keys for name in names))


class Tapped:
    """The forward that takes the place of a tapped module's own.

    `plain` says that nobody else had replaced it.
    """

    def __init__(self, block: Block, tap: Tap) -> None:
        self.block = block
        self.tap = tap
        self.plain = "forward" not in vars(tap.module)
        self._own = tap.module.forward
        named = block.block.named_modules()
        self._path = next((path for path, module in named if module is tap.module), None)

    def __deepcopy__(self, memo: object) -> Tapped:
        raise ValueError("deepcopy: expected a model that is not enabled; disable it first")

    def check_in_place(self) -> None:
        """Refuse a module that was replaced or wrapped since, where what stands in its place is
        given the rows of some tokens, or gives them on."""
        if self.tap.cached in ("whole", "rows") or self._path is None:
            return
        now = self.block.block.get_submodule(self._path)
        if now is not self.tap.module:
            raise RuntimeError(
                f"{self._path}: expected the module that the model was enabled with, got "
                f"{type(now).__name__} in its place; disable the model and enable it again"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.block.state
        if state is None:
            return self._own(*args, **kwargs)
        composed = self.block.composed  # then it is the block that keeps and selects
        full = state.full[self.tap.decides]
        if not full and (not composed or (self.tap.follows and self.tap.cached == "whole")):
            self.block.kept.extend(self.tap.outputs)
            return self._cached(state, args, kwargs)
        if not full and self.tap.queries:  # composed: these are the selected rows
            return self._refreshed(state, state.index[self.tap.selection], args, kwargs)
        if full and state.selector and self.tap.scored(state.selector):
            out = self._scored(state, args, kwargs)
        else:
            out = self._call(state, args, kwargs)
        if full and not composed and self.tap.outputs:
            self._keep(state, args, out)
        return out

    def _call(self, state: BlockState, args: Any, kwargs: Any) -> Any:
        """The module's own forward; an attention leaves its keys behind, or meets kept ones."""
        if not (self.tap.rowwise and state.partial):
            return self._own(*args, **kwargs)
        full = state.full[self.tap.decides]
        names = self.tap.kept_keys

        def exchange(*pair: Tensor) -> Sequence[Tensor]:
            for name, one in zip(names, pair, strict=True):
                if full:
                    self.block.write(state, name, one)
                else:
                    write_rows(state.features[name], one, state.index[self.tap.outputs[0]])
            return pair if full else [self.block.read(state, name) for name in names]

        with KeptKeys(exchange):
            return self._own(*args, **kwargs)

    # --- full steps -------------------------------------------------------------------------

    def _keep(self, state: BlockState, args: tuple[Any, ...], out: Any) -> None:
        taken = self.tap.take(args, out)
        if len(taken) != len(self.tap.outputs):
            raise RuntimeError(
                f"{type(self.tap.module).__name__}: expected {len(self.tap.outputs)} outputs, "
                f"{', '.join(self.tap.outputs)}, got {len(taken)}"
            )
        for name, one in zip(self.tap.outputs, taken, strict=True):
            self.block.write(state, name, one)
        self.block.kept.extend(self.tap.outputs)

    def _scored(self, state: BlockState, args: Any, kwargs: Any) -> Any:
        """The attention module's own forward; the scores of its tokens are left behind."""
        tap = self.tap
        assert state.selector is not None
        found: list[Tensor] = []
        with CapturedScores(state.selector, found, split=state.quota is not None):
            out = self._call(state, args, kwargs)
        if not found:
            raise RuntimeError(
                f"selector {state.selector!r}: {type(tap.module).__name__} of layer "
                f"{self.block.layers[tap.outputs[0]]} calls neither scaled_dot_product_attention "
                "nor softmax; use selector='random'"
            )
        taken = tap.take(args, out)
        B, N = taken[0].shape[:2]
        if state.selector == "entropy":
            entropy = _entropies(found, B, N)
            self.block.write(state, tap.entropy, entropy[:, :, None])
            for name in tap.queries:
                self.block.record(state, name, entropy)
            return out
        own = tap.outputs if tap.rowwise else ()
        sizes = [
            ((*own, *names), sum(taken[p].shape[1] for p in positions))
            for names, positions in tap.keys
        ]
        self.block.record_keys(state, found, B, sizes)
        return out

    # --- cached steps -----------------------------------------------------------------------

    def _cached(self, state: BlockState, args: Any, kwargs: Any) -> Any:
        tap = self.tap
        if tap.cached == "seen":
            return self._own(*args, **kwargs)
        if tap.cached == "picked":
            rows = self.block.read_rows(state, tap.outputs, state.index[tap.selection])
            # All of them as the first one: the block puts them together again.
            return (rows, *(rows[:, :0] for _ in tap.outputs[1:])) if tap.outputs[1:] else rows
        if tap.cached == "whole" and not (tap.rowwise and state.partial):
            return self._whole(state)
        index = state.index[tap.selection]
        if index.shape[1] == 0 and tap.cached != "rows_in":
            return self._whole(state)
        if tap.cached == "rows_out":
            rows = self._own(*args, **kwargs)
        elif tap.on_rows is not None:
            others = (self.block.read_rows(state, (name,), index) for name in tap.beside)
            rows = tap.on_rows(
                taken_rows(args[0] if args else kwargs["hidden_states"], index), *others
            )
        else:
            args, kwargs = _with_rows(args, kwargs, index)
            rows = self._refreshed(state, index, args, kwargs)
        if tap.cached == "rows_in":
            return rows
        write_rows(state.features[tap.outputs[0]], rows, index, self._own_rows(state, index))
        return self.block.read(state, tap.outputs[0])

    def _own_rows(self, state: BlockState, index: Tensor) -> Tensor | None:
        """(B, k): which of the rows are selected; None where all of them are.

        Where processes select together, rows are filled up with others, which must not be kept.
        """
        if state.quota != "global":
            return None
        return state.inverse[self.tap.selection].gather(1, index) >= 0

    def _whole(self, state: BlockState) -> Any:
        """All that is cached, as the module returns it."""
        features = [self.block.read(state, name) for name in self.tap.outputs]
        return tuple(features) if len(features) > 1 else next(iter(features), None)

    def _refreshed(self, state: BlockState, index: Tensor, args: Any, kwargs: Any) -> Any:
        """The module's own forward for the selected rows; their entropy is new, too."""
        if not self.tap.queries or not state.refreshes:
            return self._call(state, args, kwargs)
        found: list[Tensor] = []
        with CapturedScores("entropy", found, split=state.quota is not None):
            out = self._own(*args, **kwargs)
        entropy = state.features[self.tap.entropy]
        assert isinstance(entropy, Tensor)
        own = self._own_rows(state, index)
        write_rows(entropy, _entropies(found, *index.shape)[:, :, None], index, own)
        for name in self.tap.queries:
            self.block.record(state, name, entropy[:, :, 0])
        return out


@dataclass
class Late:
    """A selection that waits for scores of the same step.

    Attributes:
        scores: of the layer, (B, N), of this guidance branch and of those that share with it.
        offset: what is added to them.
        score, age: of the layer, (rows, N); k: for each row; settings: the other arguments of
            `select_tokens`.
        nan: NaN scores are added here.
        share: this process's part of the tokens, where several share them.
    """

    scores: tuple[Tensor, ...]
    offset: float
    score: Tensor
    age: Tensor
    k: list[int]
    settings: dict[str, Any]
    nan: Tensor
    share: Share | None = None

    def select(self) -> tuple[Tensor, Tensor]:
        """(index (B, k), inverse (B, N))."""
        ranks = None if self.share is None else self.share.ranks
        rank(self.score, self.scores, self.offset, ranks)
        choose = select_tokens if self.share is None else self.share.select
        selection = choose(self.score, self.age, self.k, **self.settings)
        self.nan += selection.nan.sum()
        index, inverse = selection.rows(0, len(self.k))
        halves = len(self.scores[0]) // len(self.k) if self.k else 1
        return (index.repeat(2, 1), inverse.repeat(2, 1)) if halves == 2 else (index, inverse)


def _entropies(found: Sequence[Tensor], B: int, N: int) -> Tensor:
    """(B, N): of the last call for all queries (the text's, where an image prompt has one before),
    or of one sample after the other."""
    if not found:
        raise RuntimeError(
            "selector 'entropy': expected a cross-attention that calls "
            "scaled_dot_product_attention, got another; use selector='random'"
        )
    if found[-1].numel() == B * N:
        return found[-1].reshape(B, N)
    if sum(one.numel() for one in found) != B * N:
        raise RuntimeError(
            f"selector 'entropy': expected one entropy for each of {N} tokens of {B} samples, got "
            f"{[tuple(one.shape) for one in found]}; use selector='random'"
        )
    return torch.cat([one.flatten() for one in found]).view(B, N)


def write_rows(features: Features, rows: Tensor, index: Tensor, own: Tensor | None = None) -> None:
    """features[b, index[b, j]] = rows[b, j]; where `own` (B, k) is given, of those rows only."""
    places = index[:, :, None].expand(-1, -1, rows.shape[2])

    def put(into: Tensor, fresh: Tensor, at: Tensor) -> None:
        if own is not None:
            keeps = own[:, :, None] if fresh.ndim == 3 else own
            fresh = torch.where(keeps, fresh, into.gather(1, at))
        into.scatter_(1, at, fresh)

    if isinstance(features, Tensor):
        put(features, rows.to(features.dtype), places)  # under autocast they may differ
    elif isinstance(features, ForecastCache):
        tensors = (features.values, *features.slopes)
        taken = [one.gather(1, places) for one in tensors]
        distance = features.distance.gather(1, index)
        store_rows(
            ForecastCache(taken[0], tuple(taken[1:]), distance, features.computed),
            rows.to(taken[0].dtype).contiguous(),
        )
        for one, fresh in zip(tensors, taken, strict=True):
            put(one, fresh, places)
        # For whoever reads them within this step.
        put(features.distance, torch.zeros_like(distance), index)
    else:
        values, scale = features.values, features.scale
        packed = QuantizedCache(values.new_empty(rows.shape), scale.new_empty(rows.shape[:2]))
        store_rows(packed, rows.contiguous())
        put(scale, packed.scale, index)
        put(values.view(torch.int8), packed.values.view(torch.int8), places)


def taken_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, j]], (B, k, C)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def cached_rows(features: Features, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The selected rows of a cache, (B, k, C), or all; in `dtype` if it is no plain tensor."""
    if isinstance(features, Tensor):
        return features if index is None else taken_rows(features, index)
    return read_rows(features, index, dtype=dtype)


def _with_rows(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module, with the selected rows of its hidden states."""
    if args:
        return (taken_rows(args[0], index), *args[1:]), kwargs
    name = next(name for name in ("hidden_states", "x") if name in kwargs)
    return args, {**kwargs, name: taken_rows(kwargs[name], index)}
