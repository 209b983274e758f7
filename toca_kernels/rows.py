"""Rows: the arguments of a model's call, and what it returns, by the samples of its batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# What a model is given once for all samples; places of tokens also with a dimension of samples.
_SHARED = ("img_ids", "txt_ids", "image_rotary_emb", "freqs_cis", "rope_interpolation_scale")
# What it is given in a list of one for each.
_LISTS = ("img_shapes", "txt_seq_lens")
_HIDDEN = ("hidden_states", "x", "img")


class Rows:
    """The arguments of a call, and what it returns, by the rows of its batch.

    A tensor has a row for each sample where its first dimension says so, wherever it lies in what
    is given; so has a list where the hidden states are one.  All else is every sample's.  A mask of
    the prompts may serve both guidance halves.

    Attributes:
        masked: whether the call has a mask.
    """

    def __init__(
        self, rows: int, args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]
    ) -> None:
        self._rows = rows
        self._kwargs = kwargs
        beyond = [""] * (len(args) - len(names))
        self._args = list(zip([*names, *beyond], args, strict=False))
        given = {**dict(self._args), **kwargs}
        x = next((given[name] for name in _HIDDEN if name in given), args[0] if args else None)
        if not isinstance(x, (Tensor, list)) or len(x) != rows:
            got = len(x) if isinstance(x, (Tensor, list)) else type(x).__name__
            raise ValueError(f"rows: expected a request for each of {got} samples, got {rows}")
        self._lists = isinstance(x, list)
        self.masked = any("mask" in name and one is not None for name, one in given.items())

    def take(self, places: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of some of the rows."""
        args = tuple(self._of(name, one, places) for name, one in self._args)
        return args, {name: self._of(name, one, places) for name, one in self._kwargs.items()}

    def _of(self, name: str, value: Any, places: Sequence[int]) -> Any:
        if isinstance(value, Tensor):
            return self._of_tensor(name, value, places)
        if isinstance(value, list) and len(value) == self._rows and (self._lists or name in _LISTS):
            return [value[place] for place in places]
        if isinstance(value, dict):
            return {key: self._of(str(key), one, places) for key, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._of(name, one, places) for one in value)
        return value

    def _of_tensor(self, name: str, value: Tensor, places: Sequence[int]) -> Tensor:
        rows = len(value) if value.ndim else 0
        halved = "mask" in name and 0 < rows < self._rows and self._rows % rows == 0
        if not (rows == self._rows or halved) or (name in _SHARED and value.ndim < 3):
            return value
        if list(places) == list(range(rows)):
            return value
        return value.index_select(0, torch.tensor(places, device=value.device) % rows)

    def joined(self, outs: Sequence[tuple[Sequence[int], Any]]) -> Any:
        """What the groups returned, in the order of the batch."""
        if len(outs) == 1 and list(outs[0][0]) == list(range(self._rows)):
            return outs[0][1]
        order = [place for places, _ in outs for place in places]
        back = sorted(range(self._rows), key=order.__getitem__)
        flat = [pytree.tree_flatten(out, is_leaf=_is_list) for _, out in outs]
        counts = [len(places) for places, _ in outs]
        leaves = [
            _in_order(parts, counts, back)
            for parts in zip(*(some for some, _ in flat), strict=True)
        ]
        return pytree.tree_unflatten(leaves, flat[0][1])


def _is_list(one: Any) -> bool:
    return isinstance(one, list)


def _in_order(parts: Sequence[Any], counts: Sequence[int], back: Sequence[int]) -> Any:
    """Of what each group returned, what the whole batch would have."""
    kinds = {type(part) for part in parts}
    if kinds <= {Tensor} and all(
        part.ndim and len(part) == count for part, count in zip(parts, counts, strict=True)
    ):
        every = torch.cat(list(parts))
        return every.index_select(0, torch.tensor(back, device=every.device))
    if kinds == {list} and [len(part) for part in parts] == list(counts):
        rows = [one for part in parts for one in part]
        return [rows[place] for place in back]
    if kinds <= {type(None), bool, int, float, str} and all(part == parts[0] for part in parts):
        return parts[0]
    raise ValueError(
        "batch: expected the model to return tensors or lists with a row for each sample, got "
        f"{', '.join(sorted(kind.__name__ for kind in kinds))} for {sum(counts)} samples in "
        f"{len(counts)} groups"
    )
