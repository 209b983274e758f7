"""TokenCache: the explicit, preallocated state of one run.

For every module of a model a `Track`: its outputs in every layer and, where some of its tokens are
recomputed, their scores, their ages, and what the step at hand selected.  Nothing here decides
anything: the plan does.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .copies import Slabs
from .track import Layout, Track

if TYPE_CHECKING:
    from .parallel import Ranks, Share

_numbers = itertools.count()


class TokenCache:
    """The tracks of a model's modules: those of the plan, and what is kept `beside` them.

    Attributes:
        tracks: name of a module in the plan -> its track.
        nan: scores that were NaN so far; on the device, as reading it would wait for that.
        rounding: (sum of squared errors, sum of squares) of what 8-bit caches were given, sampled
            in the first layer of each module; on the device.
        number: its own; an address may be another cache's later.
        added: what the first block added in the last full step, where a config asks for it.
        off_track: whether a step came at another timestep than was announced; on the device.
        home: the host memory that features lie in; None where they are on the device.
    """

    def __init__(
        self,
        layers: Mapping[str, int],
        device: torch.device,
        *,
        selecting: Collection[str] = (),
        beside: Collection[str] = (),
        keeps: Mapping[str, Sequence[bool]] | None = None,
        cache_dtype: str | None = None,
        forecast: int = 0,
        shared: bool = False,
        home: Slabs | None = None,
    ) -> None:
        self.home = home
        self.tracks = {}
        for name, count in layers.items():
            kept = [True] * count if keeps is None else keeps[name]
            self.tracks[name] = Track(
                name,
                count,
                selects=name in selecting,
                cache_dtype=None if name in beside else cache_dtype,
                forecast=0 if name in beside or not any(kept) else forecast,
                shared=shared,
                keeps=kept,
                planned=name not in beside,
                home=home,
            )
        self.nan = torch.zeros((), dtype=torch.int64, device=device)
        self.rounding = torch.zeros(2, dtype=torch.float32, device=device)
        self.off_track = torch.zeros((), dtype=torch.bool, device=device)
        self.number = next(_numbers)
        self.added: Tensor | None = None
        self._modulation: list[Tensor] = []
        self._every: dict[tuple[int, int], Tensor] = {}

    @property
    def valid(self) -> bool:
        """Whether every layer of every module of the plan may be read."""
        return all(all(track.valid) for track in self.tracks.values() if track.planned)

    @property
    def layout(self) -> dict[str, list[Layout | None]]:
        """What the modules' outputs look like in each layer, of those that all were seen.

        What is kept beside the plan's modules is seen where it is kept, and None elsewhere.
        """
        return {
            name: list(track.layouts)
            for name, track in self.tracks.items()
            if all(track.layouts) or (not track.planned and track.seen)
        }

    def see(self, layout: Mapping[str, Sequence[Layout | None]]) -> None:
        """Learn what the modules' outputs look like; nothing is allocated."""
        for name, layers in layout.items():
            self.tracks[name].layouts = list(layers)

    def hold(self) -> None:
        """Make all buffers of what was seen."""
        for track in self.tracks.values():
            for layer, layout in enumerate(track.layouts):
                if layout is not None and track.keeps[layer]:
                    track.hold(layer, layout)

    def drifted(self, added: Tensor, threshold: float | None, ranks: Ranks | None = None) -> bool:
        """Whether the mean change since the last full step is above a share of the mean.

        Waits for the device: what the step does next depends on it.  The means are those of all
        processes' tokens, so all of them decide alike.
        """
        if self.added is None or self.added.shape != added.shape or threshold is None:
            return True
        magnitudes = [(added - self.added).abs(), self.added.abs()]
        if ranks is None:
            change, before = (one.mean(dtype=torch.float32) for one in magnitudes)
        else:
            change, before = ranks.means(magnitudes)
        return not bool(change <= threshold * before)  # so NaN is far

    def weigh(self, mask: Tensor, shares: Mapping[str, Share] | None = None) -> None:
        """Scores that the user gives, (N,) or (samples, N); modules of other lengths get none.

        Where processes share the tokens, N is that of all of them.
        """
        N, shares = mask.shape[-1], shares or {}
        selecting = [track for track in self.tracks.values() if track.selects and track.rows]
        sizes = {
            track.name: shares[track.name].tokens if shares else track.score.shape[-1]
            for track in selecting
        }
        fitting = [track for track in selecting if sizes[track.name] == N]
        if not fitting:
            lengths = sorted(set(sizes.values()))
            raise ValueError(f"mask: expected weights of {lengths} tokens, got {N}")
        for track in fitting:
            weights = mask if mask.ndim == 2 else mask[None]
            if shares:
                weights = weights[:, shares[track.name].places.to(weights.device)]
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
            track.invalidate()
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
        added = 0 if self.added is None else self.added.nbytes
        return every + added + sum(track.other_nbytes for track in self.tracks.values())

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
