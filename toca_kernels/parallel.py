"""Tokens shared among processes: who holds which, and selections that all of them make together.

Under sequence parallelism every process holds a part of the tokens, and with them the caches of
this part.  A cached step of a process needs nothing of the others.  What they exchange is small:
scores of a full step (blocks/split_attention.py), and, where all of them select together
(`quota="global"`), the histograms of a radix selection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ops import Selection, select_tokens

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DIGITS = 256  # of a radix selection: four digits of 8 bits make a float32
_SPLIT_HOOKS = ("ContextParallelSplitHook", "ContextParallelGatherHook")


class Ranks:
    """The processes that share the tokens, in the order of their parts.

    Attributes:
        group: torch's process group.
        rank, size: this process's place in it, and how many there are.
        together: whether they select together (`quota="global"`) or each in its part.
    """

    def __init__(self, group: ProcessGroup, *, together: bool) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.together = together

    @classmethod
    def of(cls, model: nn.Module, group: ProcessGroup | None, *, together: bool) -> Ranks | None:
        """Of a group that is given, or of diffusers' context parallelism; None for one process."""
        if group is None:
            config = getattr(model, "_parallel_config", None)
            mesh = getattr(
                getattr(config, "context_parallel_config", None), "_flattened_mesh", None
            )
            group = None if mesh is None else mesh.get_group()
        if group is None or dist.get_world_size(group) == 1:
            return None
        if dist.get_rank(group) < 0:
            raise ValueError("group: expected one that this process is a member of, got another")
        return cls(group, together=together)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, in their place."""
        dist.all_reduce(values, group=self.group)
        return values

    def most(self, values: Tensor) -> Tensor:
        """The largest of all processes' values, in their place."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """All processes' values, which have one shape: (size, ...)."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.stack(parts)

    def any(self, flag: bool) -> bool:
        """Whether it holds on some process: all of them get the same answer."""
        on_cpu = "gloo" in str(dist.get_backend(self.group))
        device = None if on_cpu else torch.accelerator.current_accelerator()
        return bool(self.most(torch.tensor(int(flag), device=device)))

    def means(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each tensor, over all processes' parts of it."""
        sums = [value.sum(dtype=torch.float32) for value in values]
        counts = [torch.full_like(sums[0], value.numel()) for value in values]
        totals = self.sum(torch.stack([*sums, *counts]))
        return [a / b for a, b in zip(*totals.chunk(2), strict=True)]

    def length(self, score: Tensor) -> Tensor:
        """The L2 norm of scores (..., N) over all tokens, (..., 1).

        Selecting together, it is the norm over the parts of all processes.  Else a process takes
        the other parts to be like its own and multiplies by sqrt(size), without asking: so the
        weight of the age beside a score is that of one process.
        """
        own = torch.linalg.vector_norm(score, dim=-1, keepdim=True)
        if not self.together:
            return own * math.sqrt(self.size)
        return self.sum(own.square()).sqrt()


@dataclass(frozen=True)
class Share:
    """This process's part of a module's tokens.

    The tokens of one device are `parts` that follow each other (text and image, or frames); each of
    them is split among the processes.

    Attributes:
        ranks: the processes.
        sizes: for each process, how many tokens of each part it holds.
        device: where the tokens are.
    """

    ranks: Ranks
    sizes: tuple[tuple[int, ...], ...]
    device: torch.device

    @property
    def tokens(self) -> int:
        """N of all processes."""
        return sum(map(sum, self.sizes))

    @cached_property
    def places(self) -> Tensor:
        """(N here,): which tokens of one device these are; ascending."""
        starts, first = [], 0
        for part in zip(*self.sizes, strict=True):
            starts.append(first + sum(part[: self.ranks.rank]))
            first += sum(part)
        own = zip(starts, self.sizes[self.ranks.rank], strict=True)
        ranges = [torch.arange(start, start + size) for start, size in own]
        return torch.cat(ranges).to(self.device)

    @cached_property
    def _parts(self) -> Tensor:
        """(N here,): the part that each token belongs to."""
        sizes = torch.tensor(self.sizes[self.ranks.rank])
        return torch.repeat_interleave(sizes).to(self.device)

    def whole(self, own: Tensor) -> Tensor:
        """(..., N of all) of flags (..., N here)."""
        every = torch.zeros((*own.shape[:-1], self.tokens), dtype=torch.int32, device=self.device)
        every[..., self.places] = own.to(every)
        return self.ranks.sum(every) > 0

    # --- selecting --------------------------------------------------------------------------

    def select(
        self,
        score: Tensor,
        age: Tensor,
        k: Sequence[int],
        *,
        age_weight: float = 0.0,
        grid: Sequence[int] | None = None,
        cell: int = 1,
        bonus: float = 0.0,
    ) -> Selection:
        """`select_tokens` of one device, each process for the tokens that it holds.

        Selecting together, k and the grid are those of all tokens, and so is the selection: the k
        largest of all, equal ones by their place on one device.  A process has some of them, others
        of each row, so its rows are filled up to the longest row with tokens that are not
        selected: `inverse` tells which are.  Else each process selects k of its own; cells of a
        grid end where its part does.
        """
        together = self.ranks.together and any(k)  # of nothing, nobody need be asked
        if not together and bonus == 0.0:
            return select_tokens(score, age, k, age_weight=age_weight)
        total = score + age_weight * age.float()
        nan = total.isnan()
        total = total.masked_fill(nan, -torch.inf)
        if bonus != 0.0 and cell > 1:
            assert grid is not None
            best = self._best(total, grid, cell, together)
            total = torch.where(best, total * (1.0 + total.new_tensor(bonus)), total)
        if not together:  # no selection depends on more than the sum
            selection = select_tokens(total, age, k)
            return Selection(
                selection.index, selection.inverse, nan.sum(dim=1, dtype=torch.int32), selection.k
            )
        chosen, counts = self._chosen(_ordered(total), k)
        age += 1
        age.masked_fill_(chosen, 0)
        index, inverse, widths = _filled(chosen, counts, k)
        return Selection(index, inverse, nan.sum(dim=1, dtype=torch.int32), widths)

    def _best(self, total: Tensor, grid: Sequence[int], cell: int, together: bool) -> Tensor:
        """(R, N) bool: the first maximum of every cell x cell tile of the grid of all tokens."""
        rows, cols = grid[-2:]
        frame, place = self.places // (rows * cols), self.places % (rows * cols)
        down, across = -(-rows // cell), -(-cols // cell)
        tile = (frame * down + place // cols // cell) * across + place % cols // cell
        # The value above, the place below it, the lower the better: one maximum finds both.
        key = (_ordered(total) << 31) + (2**31 - 1 - self.places)
        tiles = self.tokens // (rows * cols) * down * across
        most = key.new_full((len(total), tiles), -1)
        most.scatter_reduce_(1, tile.expand_as(key), key, "amax")
        if together:
            self.ranks.most(most)
        return most.gather(1, tile.expand_as(key)) == key

    def _chosen(self, key: Tensor, k: Sequence[int]) -> tuple[Tensor, Tensor]:
        """((R, N) bool, (size, R)): which tokens are the k largest, and how many on each process.

        A radix selection: from the highest 8 bits down, the histogram of those keys that agree with
        the k-th so far says what its next 8 bits are.  4 histograms are summed over the processes.
        """
        R = len(key)
        wanted = torch.tensor(k, device=key.device)
        left = wanted.clamp(min=1)  # how many of the keys that agree are selected
        found = torch.zeros_like(left)
        for shift in (24, 16, 8, 0):
            agrees = (key >> (shift + 8)) == found[:, None]
            histogram = torch.zeros((R, _DIGITS), dtype=torch.int32, device=key.device)
            digit = (key >> shift) & (_DIGITS - 1)
            histogram.scatter_add_(1, digit, agrees.int())
            self.ranks.sum(histogram)
            from_above = histogram.flip(1).cumsum(1).flip(1)  # keys of this digit or a higher one
            here = (from_above >= left[:, None]).sum(1) - 1
            higher = (from_above - histogram).gather(1, here[:, None])[:, 0]
            left = left - higher
            found = (found << 8) + here
        above, equal = key > found[:, None], key == found[:, None]
        return self._with_equal(above, equal, left, wanted)

    def _with_equal(
        self, above: Tensor, equal: Tensor, left: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Those above, and of those that are equal to the k-th the first `left` of one device."""
        parts = len(self.sizes[0])
        counts = torch.zeros((len(above), 1 + parts), dtype=torch.int32, device=above.device)
        counts[:, 0] = above.sum(1)
        counts[:, 1:].scatter_add_(1, self._parts.expand_as(equal), equal.int())
        every = self.ranks.gather(counts)  # (size, R, 1 + parts)
        # One device has all processes' tokens of the first part, then those of the second.
        equals = every[:, :, 1:].permute(1, 2, 0)  # (R, parts, size)
        before = equals.flatten(1).cumsum(1).view_as(equals) - equals
        taken = torch.minimum((left[:, None, None] - before).clamp(min=0), equals)
        own = taken[:, :, self.ranks.rank]
        first = counts[:, 1:].cumsum(1) - counts[:, 1:]
        position = equal.cumsum(1) - 1 - first.gather(1, self._parts.expand_as(equal))
        some = wanted > 0
        chosen = above | (equal & (position < own.gather(1, self._parts.expand_as(equal))))
        chosen &= some[:, None]
        return chosen, (every[:, :, 0] + taken.sum(1).T) * some


def _ordered(total: Tensor) -> Tensor:
    """float32 as int64 from 0 to 2**32 - 1, in the same order."""
    bits = (total + 0.0).view(torch.int32).to(torch.int64)  # -0 as 0: they are equal
    return torch.where(bits >= 0, bits + 2**31, -1 - bits)


def _filled(
    chosen: Tensor, counts: Tensor, k: Sequence[int]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """(index, inverse, the rows' lengths) of a selection whose rows are filled up.

    Rows of one k, such as a layer's, become as long as the longest of them on any process: then all
    of them compute equally much, and in equal shapes.
    """
    longest: dict[int, int] = {}
    for value, most in zip(k, counts.amax(dim=0).tolist(), strict=True):
        longest[value] = max(longest.get(value, 0), most)
    N = chosen.shape[1]
    widths = tuple(min(longest[value], N) for value in k)
    selected = chosen.cumsum(1)
    others = selected[:, -1:] + (~chosen).cumsum(1)
    slot = torch.where(chosen, selected, others) - 1
    tokens = torch.arange(N, device=chosen.device).expand_as(slot)
    order = torch.empty_like(slot).scatter_(1, slot, tokens)
    flat = [row[:width] for row, width in zip(order, widths, strict=True)]
    index = torch.cat(flat) if flat else order.new_zeros(0)
    return index, torch.where(chosen, slot, -1).to(torch.int32), widths


def shares(
    ranks: Ranks, parts: Mapping[str, Sequence[int]], device: torch.device
) -> dict[str, Share]:
    """The processes' parts of each module's tokens: they tell each other once in a run.

    Args:
        parts: for each module the parts of its tokens that this process holds.
    """
    own = [size for sizes in parts.values() for size in sizes]
    every = ranks.gather(torch.tensor(own, dtype=torch.int64, device=device)).tolist()
    made, first = {}, 0
    for name, sizes in parts.items():
        stop = first + len(sizes)
        made[name] = Share(ranks, tuple(tuple(row[first:stop]) for row in every), device)
        first = stop
    return made


# --- diffusers' hooks ----------------------------------------------------------------------------


class _NoHooks:
    hooks: Mapping[str, Any] = MappingProxyType({})


def beneath(module: nn.Module) -> Any:
    """What holds the forward of a module that sees the process's own tokens.

    diffusers splits the tokens in a hook round the first block: beneath it, else the module.
    """
    for hook in getattr(module, "_diffusers_hook", _NoHooks).hooks.values():
        if type(hook).__name__ in _SPLIT_HOOKS:
            return hook.fn_ref
    return module


def around(module: Any) -> list[Any]:
    """The hooks of a module, each of which holds the forward beneath it."""
    return [hook.fn_ref for hook in getattr(module, "_diffusers_hook", _NoHooks).hooks.values()]
