"""TokenCache: the explicit, preallocated state of one run.

For every module of a model a `Track`: its outputs in every layer and, where some of its tokens are
recomputed, their scores, their ages, and what the step at hand selected.  Nothing here decides
anything: the plan does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import QuantizedCache, select_tokens

Features = Tensor | QuantizedCache

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
        score: (layers, rows, N), float32; what the selector left in the last full step.
        age: (layers, rows, N), int32; steps since a token was recomputed.
        rows: rows of a selection per layer: B, or B / 2 where guidance halves share theirs.
    """

    def __init__(
        self,
        name: str,
        layers: int,
        *,
        selects: bool = True,
        cache_dtype: str | None = None,
        share_halves: bool = False,
    ) -> None:
        self.name = name
        self.layers = layers
        self.selects = selects
        self.layouts: list[Layout | None] = [None] * layers
        self.features: list[Features | None] = [None] * layers
        self.valid = [False] * layers
        self.score = torch.empty(0)
        self.age = torch.empty(0, dtype=torch.int32)
        self.rows = 0
        self._eight_bits = EIGHT_BITS[cache_dtype] if cache_dtype else None
        self._share_halves = share_halves
        self._selected: dict[int, tuple[Tensor, Tensor]] = {}

    def hold(self, layer: int, layout: Layout) -> Features:
        """The buffers of a layer, made where there are none."""
        B, N, C = layout.shape
        if self.selects and self.age.numel() == 0:
            self.hold_scores(B, N, layout.device)
        self.layouts[layer] = layout
        features = self.features[layer]
        if features is None:
            dtype = self._eight_bits or layout.dtype
            values = torch.empty((B, N, C), dtype=dtype, device=layout.device)
            features = values
            if self._eight_bits:
                scale = torch.empty((B, N), dtype=torch.float32, device=layout.device)
                features = QuantizedCache(values, scale)
            self.features[layer] = features
        return features

    def hold_scores(self, B: int, N: int, device: torch.device) -> None:
        """Scores and ages of all layers, for selections among B times N tokens."""
        if self._share_halves and B % 2:
            raise ValueError(
                f"share_cfg_selection: expected a batch of two guidance halves, got {B} samples"
            )
        if self.age.numel():
            return
        self.rows = B // 2 if self._share_halves else B
        self.score = torch.zeros((self.layers, self.rows, N), device=device)
        self.age = torch.zeros((self.layers, self.rows, N), dtype=torch.int32, device=device)

    @property
    def layout(self) -> Layout:
        """Of the first layer: B and N are the same in all of them."""
        layout = self.layouts[0]
        assert layout is not None
        return layout

    @property
    def nbytes(self) -> int:
        """Bytes of the features."""
        return sum(tensor.nbytes for f in self.features for tensor in tensors(f))

    @property
    def other_nbytes(self) -> int:
        """Bytes of scores, ages and the selection of the step at hand."""
        selected = sum(index.nbytes + inverse.nbytes for index, inverse in self._selected.values())
        return self.score.nbytes + self.age.nbytes + selected

    def forget_selection(self) -> None:
        self._selected.clear()

    def note(self, layer: int, index: Tensor, inverse: Tensor) -> None:
        """A selection of the step at hand that was made elsewhere."""
        self._selected[layer] = (index, inverse)

    def young(self, layers: Sequence[bool]) -> None:
        """No token of these layers is stale: they run in full."""
        if self.selects and self.age.numel():
            for first, stop in _runs(layers):
                self.age[first:stop].zero_()

    def select(
        self,
        cached: Sequence[bool],
        k: Sequence[int],
        *,
        age_weight: float,
        grid: Sequence[int] | None = None,
        cell: int = 1,
        bonus: float = 0.0,
    ) -> Tensor:
        """Choose the tokens of every cached layer of a step; returns how many scores were NaN.

        One `select_tokens` call serves a run of neighbouring layers, which is all of them in most
        steps.
        """
        nan = torch.zeros((), dtype=torch.int64, device=self.age.device)
        N = self.age.shape[-1]
        for first, stop in _runs(cached):
            rows = (stop - first) * self.rows
            selection = select_tokens(
                self.score[first:stop].view(rows, N),
                self.age[first:stop].view(rows, N),
                [k[layer] for layer in range(first, stop) for _ in range(self.rows)],
                age_weight=age_weight,
                grid=grid,
                cell=min(cell, N),  # one cell is all there is where N is 1
                bonus=bonus,
            )
            for layer in range(first, stop):
                at = (layer - first) * self.rows
                index, inverse = selection.rows(at, at + self.rows)
                if self._share_halves:
                    index, inverse = index.repeat(2, 1), inverse.repeat(2, 1)
                self._selected[layer] = (index, inverse)
            nan = nan + selection.nan.sum()
        return nan

    def selection(self, layer: int) -> tuple[Tensor, Tensor]:
        """(index (B, k), inverse (B, N)) of a layer in the step at hand."""
        return self._selected[layer]

    def recomputed(self) -> Tensor:
        """(layers, B, N) bool: the tokens that the step at hand recomputes."""
        fresh = torch.ones((self.layers, *self.layout.shape[:2]), dtype=torch.bool)
        for layer, (_, inverse) in self._selected.items():
            fresh[layer] = (inverse >= 0).cpu()
        return fresh


class TokenCache:
    """The tracks of a model's modules: those of the plan, and what is kept `beside` them.

    Attributes:
        tracks: name of a module in the plan -> its track.
        nan: scores that were NaN so far; on the device, as reading it would wait for that.
        rounding: (sum of squared errors, sum of squares) of what 8-bit caches were given, sampled
            in the first layer of each module; on the device.
        added: what the first block added in the last full step, where a config asks for it.
        off_track: whether a step came at another timestep than was announced; on the device.
    """

    def __init__(
        self,
        layers: Mapping[str, int],
        device: torch.device,
        *,
        selecting: Collection[str] = (),
        beside: Collection[str] = (),
        cache_dtype: str | None = None,
        share_halves: bool = False,
    ) -> None:
        self.tracks = {
            name: Track(
                name,
                count,
                selects=name in selecting,
                cache_dtype=None if name in beside else cache_dtype,
                share_halves=share_halves,
            )
            for name, count in layers.items()
        }
        self._planned = [track for name, track in self.tracks.items() if name not in beside]
        self.nan = torch.zeros((), dtype=torch.int64, device=device)
        self.rounding = torch.zeros(2, dtype=torch.float32, device=device)
        self.off_track = torch.zeros((), dtype=torch.bool, device=device)
        self.added: Tensor | None = None
        self._modulation: list[Tensor] = []
        self._every: dict[tuple[int, int], Tensor] = {}

    @property
    def valid(self) -> bool:
        """Whether every layer of every module of the plan may be read."""
        return all(all(track.valid) for track in self._planned)

    @property
    def layout(self) -> dict[str, list[Layout]]:
        """What the modules' outputs look like in each layer, of those that all were held."""
        return {
            name: [one for one in track.layouts if one is not None]
            for name, track in self.tracks.items()
            if all(track.layouts)
        }

    def hold(self, layout: Mapping[str, Sequence[Layout]]) -> None:
        """Make all buffers of a model whose outputs look like this."""
        for name, layers in layout.items():
            for layer, one in enumerate(layers):
                self.tracks[name].hold(layer, one)

    def drifted(self, added: Tensor, threshold: float | None) -> bool:
        """Whether the mean change since the last full step is above a share of the mean.

        Waits for the device: what the step does next depends on it.
        """
        if self.added is None or self.added.shape != added.shape or threshold is None:
            return True
        change = (added - self.added).abs().mean(dtype=torch.float32)
        return bool(change > threshold * self.added.abs().mean(dtype=torch.float32))

    def weigh(self, mask: Tensor) -> None:
        """Scores that the user gives, (N,) or (samples, N); modules of other lengths get none."""
        N = mask.shape[-1]
        selecting = [track for track in self.tracks.values() if track.selects and track.rows]
        fitting = [track for track in selecting if track.score.shape[-1] == N]
        if not fitting:
            lengths = sorted({track.score.shape[-1] for track in selecting})
            raise ValueError(f"mask: expected weights of {lengths} tokens, got {N}")
        for track in fitting:
            weights = mask if mask.ndim == 2 else mask[None]
            if track.rows % len(weights):
                raise ValueError(
                    f"mask: expected one row for all of {track.rows} samples, or as many, got "
                    f"{len(weights)}"
                )
            weights = weights.repeat(track.rows // len(weights), 1)
            track.score.copy_(weights.to(track.score).expand_as(track.score))

    def invalidate(self) -> None:
        """Forget what is cached; the buffers stay."""
        for track in self.tracks.values():
            track.valid = [False] * track.layers
            track.forget_selection()
        self.nan.zero_()
        self.rounding.zero_()
        self.off_track.zero_()
        self.added = None

    @property
    def nbytes(self) -> int:
        return sum(track.nbytes for track in self.tracks.values())

    @property
    def other_nbytes(self) -> int:
        every = sum(tensor.nbytes for tensor in self._every.values())
        return every + sum(track.other_nbytes for track in self.tracks.values())

    def every(self, B: int, N: int) -> Tensor:
        """(B, N): every token in its own place, which is what a full step scatters."""
        if (B, N) not in self._every:
            places = torch.arange(N, dtype=torch.int32, device=self.nan.device)
            self._every[B, N] = places.repeat(B, 1)
        return self._every[B, N]

    def fixed_modulation(self, rows: list[Tensor]) -> list[Tensor]:
        """A copy of a step's modulation rows at the same place in every step, for replays."""
        if [row.shape for row in self._modulation] != [row.shape for row in rows]:
            self._modulation = [torch.empty_like(row) for row in rows]
        torch._foreach_copy_(self._modulation, rows)
        return self._modulation


def tensors(features: Features | None) -> tuple[Tensor, ...]:
    """The tensors that hold a layer's features."""
    if isinstance(features, QuantizedCache):
        return features.values, features.scale
    return () if features is None else (features,)


def record_score(into: Tensor, score: Tensor) -> None:
    """Keep a selector's (B, N) scores in (rows, N), normalised to length 1 over the tokens.

    Where two guidance halves share their selection (rows = B / 2), the mean of both.
    """
    if into.shape[0] != score.shape[0]:
        score = score.unflatten(0, (2, into.shape[0])).mean(dim=0)
    norm = torch.linalg.vector_norm(score, dim=-1, keepdim=True).clamp(min=1e-12)
    torch.div(score, norm, out=into)


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(first, stop) of every run of true flags."""
    first = None
    for position, flag in enumerate([*flags, False]):
        if flag and first is None:
            first = position
        elif not flag and first is not None:
            yield first, position
            first = None
