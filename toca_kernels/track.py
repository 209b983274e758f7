"""Track: what is cached of one module, in every layer, and which of its tokens matter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .copies import Slabs
from .ops import ForecastCache, QuantizedCache, select_tokens

if TYPE_CHECKING:
    from .parallel import Ranks, Share

Features = Tensor | QuantizedCache | ForecastCache

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Layout(NamedTuple):
    """What a module's outputs look like: (B, N, C), in a dtype, on a device."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        B, N, C = x.shape
        return cls((B, N, C), x.dtype, x.device)


class Track:
    """The outputs of one module, ungated, and which of their tokens matter.

    Attributes:
        name: the module's name in the plan.
        layers: how many blocks have the module.
        layouts: of each layer's outputs; None before the first is held.
        features: for each layer, what its last step left there; None before the first.
        valid: whether that may be read.
        scores: (layers, B, N), float32; what the selector left in the last full step.
        score: (layers, rows, N), float32; the same as they rank, see `rank`.
        age: (layers, rows, N), int32; steps since a token was recomputed.
        planned: whether the module is in the plan; else what is kept beside one that is.
        keeps: for each layer, whether its outputs are cached; the others' are only looked at.
        rows: rows of a selection per layer: B, or B / 2 where guidance halves share theirs.
        forecast: order of the expansion that is read; 0 reads what is cached as it is.
        distance: (layers, B, N), float32; of a forecast, age + 1 at the start of the step.
        computed: how many times each layer ran in full, as far as a forecast asks: 0, 1 or more.
    """

    def __init__(
        self,
        name: str,
        layers: int,
        *,
        selects: bool = True,
        cache_dtype: str | None = None,
        forecast: int = 0,
        shared: bool = False,
        keeps: Sequence[bool] | None = None,
        planned: bool = True,
        home: Slabs | None = None,
    ) -> None:
        self.name = name
        self.keeps = [True] * layers if keeps is None else list(keeps)
        self.layers = layers
        self.selects = selects
        self.layouts: list[Layout | None] = [None] * layers
        self.features: list[Features | None] = [None] * layers
        self.valid = [False] * layers
        self.scores = torch.empty(0)
        self.score = torch.empty(0)
        self.age = torch.empty(0, dtype=torch.int32)
        self.rows = 0
        self.forecast = forecast
        self.distance = torch.empty(0)
        self.computed = [0] * layers
        self._eight_bits = EIGHT_BITS[cache_dtype] if cache_dtype else None
        self.shared = shared
        self.planned = planned
        self._home = home
        self._selected: dict[int, tuple[Tensor, Tensor]] = {}

    def hold(self, layer: int, layout: Layout) -> Features:
        """The buffers of a layer that is kept, made where there are none."""
        B, N, _ = layout.shape
        if (self.selects or self.forecast) and self.age.numel() == 0:
            self.hold_scores(B, N, layout.device)
        self.layouts[layer] = layout
        features = self.features[layer]
        if features is None:
            values, *others = (self._empty(*one, layout.device) for one in self.parts(layout))
            features = values
            if self._eight_bits:
                features = QuantizedCache(values, *others)
            if self.forecast:
                features = ForecastCache(values, tuple(others), self.distance[layer], 0)
            self.features[layer] = features
        return features

    def parts(self, layout: Layout) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """(shape, dtype) of the tensors that hold a layer's features."""
        B, N, _ = layout.shape
        values = (layout.shape, self._eight_bits or layout.dtype)
        scale = [((B, N), torch.float32)] if self._eight_bits else []
        return [values, *scale, *([values] * self.forecast)]

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._home is not None:
            return self._home.empty(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=device)

    def hold_scores(self, B: int, N: int, device: torch.device) -> None:
        """Scores and ages of all layers, for selections among B times N tokens."""
        if self.age.numel():
            return
        self.rows = self._rows_of(B)
        self.scores = torch.zeros((self.layers, B, N), device=device)
        self.score = torch.zeros((self.layers, self.rows, N), device=device)
        self.age = torch.zeros((self.layers, self.rows, N), dtype=torch.int32, device=device)
        if self.forecast:
            self.distance = torch.ones((self.layers, B, N), device=device)

    def layer_nbytes(
        self, layout: Layout, *, eight: bool = False, forecast: int | None = None
    ) -> int:
        """Bytes of a layer's features; also what they would be in 8 bits, or with another forecast.

        What is kept beside the plan's modules is neither.
        """
        B, N, C = layout.shape
        if self.planned and (eight or self._eight_bits):
            return B * N * (C + 4)
        order = self.forecast if forecast is None or not self.planned else forecast
        return B * N * C * layout.dtype.itemsize * (1 + order)

    def all_scores_nbytes(self, layout: Layout, *, forecast: int | None = None) -> int:
        """Bytes of scores, ages and distances of all layers."""
        order = self.forecast if forecast is None else forecast
        if not (self.selects or order):
            return 0
        B, N, _ = layout.shape
        return self.layers * N * 4 * (B + 2 * self._rows_of(B) + B * (order > 0))

    def to_come(self) -> int:
        """Bytes that are not allocated yet, where layers not seen are like one that was."""
        return self.scores_to_come() + sum(map(self.layer_nbytes, self.layers_to_come()))

    def scores_to_come(self) -> int:
        """The same of scores, ages and distances alone."""
        return 0 if self.age.numel() else self.all_scores_nbytes(self.layout)

    def layers_to_come(self) -> Iterator[Layout]:
        """Of the layers whose features are not allocated yet."""
        layers = zip(self.layouts, self.features, self.keeps, strict=True)
        for layout, features, kept in layers:
            if kept and features is None:
                yield layout or self.layout

    @property
    def score_nbytes(self) -> int:
        """Bytes of scores, ages and distances."""
        tensors = (self.scores, self.score, self.age, self.distance)
        return sum(tensor.nbytes for tensor in tensors)

    def _rows_of(self, B: int) -> int:
        return B // 2 if self.shared and B % 2 == 0 else B

    @property
    def halves(self) -> int:
        """2 where guidance halves of a batch share their selection, else 1."""
        return self.scores.shape[1] // self.rows if self.rows else 1

    def part(self) -> None:
        """Guidance comes in calls of its own: this batch has no halves."""
        self.shared = False
        if self.halves == 2:
            self.rows *= 2
            self.score, self.age = self.score.repeat(1, 2, 1), self.age.repeat(1, 2, 1)

    def at(self, layer: int) -> Features:
        """The features of a layer, as the step at hand reads them."""
        features = self.features[layer]
        assert features is not None
        if isinstance(features, ForecastCache):
            # A slope that is not known yet is zero, so few kinds of steps are told apart; only
            # a second slope must not be taken from a single first one.
            known = self.computed[layer]
            every = known > 1 or (known == 1 and self.forecast == 1)
            return features._replace(computed=self.forecast + 1 if every else known)
        return features

    @property
    def layout(self) -> Layout:
        """Of the first layer that was seen: B and N are the same in all of them."""
        return next(layout for layout in self.layouts if layout is not None)

    @property
    def seen(self) -> bool:
        """Whether the outputs of every layer that is kept have been seen."""
        pairs = zip(self.layouts, self.keeps, strict=True)
        return all(layout is not None or not kept for layout, kept in pairs)

    @property
    def nbytes(self) -> int:
        """Bytes of the features."""
        return sum(tensor.nbytes for f in self.features for tensor in tensors(f))

    @property
    def other_nbytes(self) -> int:
        """Bytes of scores, ages and the selection of the step at hand."""
        selected = sum(index.nbytes + inverse.nbytes for index, inverse in self._selected.values())
        return selected + self.score_nbytes

    def forget_selection(self) -> None:
        self._selected.clear()

    def note(self, layer: int, index: Tensor, inverse: Tensor) -> None:
        """A selection of the step at hand that was made elsewhere."""
        self._selected[layer] = (index, inverse)

    def young(self, layers: Sequence[bool]) -> None:
        """No token of these layers is stale: they run in full."""
        if self.age.numel():
            for first, stop in _runs(layers):
                self.age[first:stop].zero_()

    def grow(self, full: Sequence[bool]) -> None:
        """Before a step in which nobody selects: all tokens are a step older but in full layers."""
        self.age += 1
        self.young(full)

    def measure(self) -> None:
        """Before a step changes the ages: how far the tokens are from where they were computed."""
        for half in self.distance.chunk(self.halves, dim=1):
            half.copy_(self.age).add_(1)

    def ran(self, full: Sequence[bool]) -> None:
        """After a step."""
        self.valid = [was or now for was, now in zip(self.valid, full, strict=True)]
        counts = zip(self.computed, full, strict=True)
        self.computed = [min(count + now, 2) for count, now in counts]

    def invalidate(self) -> None:
        """What is cached may not be read."""
        self.valid = [False] * self.layers
        self.computed = [0] * self.layers
        self.forget_selection()

    def select(
        self,
        cached: Sequence[bool],
        k: Sequence[int],
        *,
        age_weight: float,
        grid: Sequence[int] | None = None,
        cell: int = 1,
        bonus: float = 0.0,
        share: Share | None = None,
    ) -> Tensor:
        """Choose the tokens of every cached layer of a step; returns how many scores were NaN.

        One `select_tokens` call serves a run of neighbouring layers, which is all of them in most
        steps; that of a `share` where processes share the tokens.
        """
        choose = select_tokens if share is None else share.select
        nan = torch.zeros((), dtype=torch.int64, device=self.age.device)
        N = self.age.shape[-1]
        for first, stop in _runs(cached):
            rows = (stop - first) * self.rows
            selection = choose(
                self.score[first:stop].view(rows, N),
                self.age[first:stop].view(rows, N),
                [k[layer] for layer in range(first, stop) for _ in range(self.rows)],
                age_weight=age_weight,
                grid=grid,
                # One cell is all there is where N is 1.
                cell=min(cell, N if share is None else share.tokens),
                bonus=bonus,
            )
            for layer in range(first, stop):
                at = (layer - first) * self.rows
                index, inverse = selection.rows(at, at + self.rows)
                if self.halves == 2:
                    index, inverse = index.repeat(2, 1), inverse.repeat(2, 1)
                self._selected[layer] = (index, inverse)
            nan = nan + selection.nan.sum()
        return nan

    @property
    def taken(self) -> dict[int, tuple[Tensor, Tensor]]:
        """The selections of the step at hand, by layer."""
        return dict(self._selected)

    def selection(self, layer: int) -> tuple[Tensor, Tensor]:
        """(index (B, k), inverse (B, N)) of a layer in the step at hand."""
        return self._selected[layer]

    def recomputed(self) -> Tensor:
        """(layers, B, N) bool: the tokens that the step at hand recomputes."""
        fresh = torch.ones((self.layers, *self.layout.shape[:2]), dtype=torch.bool)
        for layer, (_, inverse) in self._selected.items():
            fresh[layer] = (inverse >= 0).cpu()
        return fresh


def tensors(features: Features | None) -> tuple[Tensor, ...]:
    """The tensors that hold a layer's features."""
    if isinstance(features, QuantizedCache):
        return features.values, features.scale
    if isinstance(features, ForecastCache):
        return features.values, *features.slopes
    return () if features is None else (features,)


def rebuilt(features: Features, parts: Sequence[Tensor]) -> Features:
    """Features like these, of other `tensors`."""
    if isinstance(features, QuantizedCache):
        return QuantizedCache(*parts)
    if isinstance(features, ForecastCache):
        return features._replace(values=parts[0], slopes=tuple(parts[1:]))
    return parts[0]


def rank(into: Tensor, scores: Sequence[Tensor], offset: float, ranks: Ranks | None = None) -> None:
    """A selector's scores as they rank, normalised to length 1 over the tokens.

    Args:
        into: (..., rows, N).
        scores: (..., B, N) of each guidance branch that shares the selection: their mean ranks.
            Where rows = B / 2, so does the mean of the batch's halves.
        offset: added to the scores.
        ranks: the processes that share the tokens, if any do.
    """
    score = scores[0] if len(scores) == 1 else torch.stack(list(scores)).mean(dim=0)
    if into.shape[-2] != score.shape[-2]:
        score = score.unflatten(-2, (2, into.shape[-2])).mean(dim=-3)
    score = score + offset
    if ranks is None:
        norm = torch.linalg.vector_norm(score, dim=-1, keepdim=True)
    else:
        norm = ranks.length(score)
    torch.div(score, norm.clamp(min=1e-12), out=into)


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(first, stop) of every run of true flags."""
    first = None
    for position, flag in enumerate([*flags, False]):
        if flag and first is None:
            first = position
        elif not flag and first is not None:
            yield first, position
            first = None
