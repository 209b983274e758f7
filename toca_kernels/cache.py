"""TokenCache: the explicit, preallocated state of one run.

Module outputs of every layer, the scores of the last full step, the ages of the tokens, and what
the step at hand selected.  Nothing here decides anything: the plan does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .ops import select_tokens


class TokenCache:
    """Cached features of a model whose blocks are `layers` times (attention, MLP).

    Attributes:
        attn, mlp: (layers, B, N, C), the ungated outputs of the modules, dtype of the model.
        score: (layers, rows, N), float32; what the selector left in the last full step.
        age: (layers, rows, N), int32; steps since a token was recomputed.
        valid: whether a layer's caches hold what its last step left there.
        nan: scores that were NaN so far; on the device, as reading it would wait for that.
        off_track: whether a step came at another timestep than was announced; on the device.
        call_shape: shape of the model's input that led to these tokens.
        samples: rows of a selection per layer: B, or B / 2 where guidance halves share theirs.
    """

    def __init__(
        self,
        layers: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        share_halves: bool = False,
    ) -> None:
        B, N, C = shape
        if share_halves and B % 2:
            raise ValueError(
                f"share_cfg_selection: expected a batch of two guidance halves, got {B} samples"
            )
        self.shape = (B, N, C)
        self.layers = layers
        self.samples = B // 2 if share_halves else B
        self.attn = torch.empty((layers, B, N, C), dtype=dtype, device=device)
        self.mlp = torch.empty((layers, B, N, C), dtype=dtype, device=device)
        self.score = torch.zeros((layers, self.samples, N), device=device)
        self.age = torch.zeros((layers, self.samples, N), dtype=torch.int32, device=device)
        # Every token in its own place: what a full step scatters.
        self.every = torch.arange(N, dtype=torch.int32, device=device).repeat(B, 1)
        self.valid = [False] * layers
        self.nan = torch.zeros((), dtype=torch.int64, device=device)
        self.off_track = torch.zeros((), dtype=torch.bool, device=device)
        self.call_shape: tuple[int, ...] = ()
        self._modulation: list[Tensor] = []
        self._selected: dict[int, tuple[Tensor, Tensor]] = {}

    def fits(self, x: Tensor) -> bool:
        """Whether this cache was made for tokens like x."""
        return (tuple(x.shape), x.dtype, x.device) == (
            self.shape,
            self.attn.dtype,
            self.attn.device,
        )

    def invalidate(self) -> None:
        """Forget what is cached; the buffers stay."""
        self.valid = [False] * self.layers
        self.nan.zero_()
        self.off_track.zero_()
        self._selected.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the cached features."""
        return self.attn.nbytes + self.mlp.nbytes

    @property
    def other_nbytes(self) -> int:
        """Bytes of scores, ages and the selection of the step at hand."""
        selected = sum(index.nbytes + slot.nbytes for index, slot in self._selected.values())
        return self.score.nbytes + self.age.nbytes + self.every.nbytes + selected

    def refreshed(self, layer: int) -> None:
        """A full step has written this layer: it is valid and no token is stale."""
        self.age[layer].zero_()
        self.valid[layer] = True

    def record_score(self, layer: int, score: Tensor) -> None:
        """Keep a selector's (B, N) scores, normalised to length 1 over the tokens."""
        if self.samples != score.shape[0]:
            score = score.unflatten(0, (2, self.samples)).mean(dim=0)
        norm = torch.linalg.vector_norm(score, dim=-1, keepdim=True).clamp(min=1e-12)
        torch.div(score, norm, out=self.score[layer])

    def select(
        self,
        cached: Sequence[bool],
        k: Sequence[int],
        *,
        age_weight: float,
        grid: tuple[int, int],
        cell: int,
        bonus: float,
    ) -> None:
        """Choose the tokens of every cached layer of a step.

        One `select_tokens` call serves a run of neighbouring layers, which is all of them in most
        steps.
        """
        self._selected.clear()
        for first, stop in _runs(cached):
            rows = (stop - first) * self.samples
            selection = select_tokens(
                self.score[first:stop].view(rows, -1),
                self.age[first:stop].view(rows, -1),
                [k[layer] for layer in range(first, stop) for _ in range(self.samples)],
                age_weight=age_weight,
                grid=grid,
                cell=min(cell, self.shape[1]),  # one cell is all there is where N is 1
                bonus=bonus,
            )
            for layer in range(first, stop):
                at = (layer - first) * self.samples
                index, inverse = selection.rows(at, at + self.samples)
                if self.samples != self.shape[0]:
                    index, inverse = index.repeat(2, 1), inverse.repeat(2, 1)
                self._selected[layer] = (index, inverse)
            self.nan += selection.nan.sum()

    def selection(self, layer: int) -> tuple[Tensor, Tensor]:
        """(index (B, k), inverse (B, N)) of a layer in the step at hand."""
        return self._selected[layer]

    def fixed_modulation(self, rows: list[Tensor]) -> list[Tensor]:
        """A copy of a step's modulation rows at the same place in every step, for replays."""
        if [row.shape for row in self._modulation] != [row.shape for row in rows]:
            self._modulation = [torch.empty_like(row) for row in rows]
        torch._foreach_copy_(self._modulation, rows)
        return self._modulation

    def recomputed(self) -> Tensor:
        """(layers, B, N) bool: the tokens that the step at hand recomputes."""
        fresh = torch.ones((self.layers, *self.shape[:2]), dtype=torch.bool)
        for layer, (_, inverse) in self._selected.items():
            fresh[layer] = (inverse >= 0).cpu()
        return fresh


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(first, stop) of every run of true flags."""
    first = None
    for position, flag in enumerate([*flags, False]):
        if flag and first is None:
            first = position
        elif not flag and first is not None:
            yield first, position
            first = None
