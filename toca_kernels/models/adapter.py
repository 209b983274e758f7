"""What every adapter offers, and how missing structure is put into words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..blocks.block import Block
from ..flops import Flops
from ..plan import Plan


@dataclass(frozen=True)
class ModelCall:
    """What one call of the model says about the step at hand.

    Attributes:
        timestep: the call's timestep, (), (1,) or (B,).
        labels: class labels, (B,): what sets the two guidance branches apart; None where `text`
            does.
        text: the text that the model was given; known by where it lies, which no step changes.
        grids: (rows, cols) or (frames, rows, cols) of the tokens of a module, for the bonus of
            the best token of a cell; modules that are not named have no cells.
    """

    timestep: Tensor
    labels: Tensor | None
    grids: Mapping[str, tuple[int, ...]]
    text: Any = None


class Adapter:
    """A model seen as a list of blocks of one family; one subclass for each source."""

    name: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # read by attribute names that `missing` has looked for

    @classmethod
    def missing(cls, model: nn.Module) -> str:
        """What keeps `model` from being of this kind, in words; empty if nothing does."""
        raise NotImplementedError

    def blocks(self) -> Sequence[Block]:
        """The blocks in their order, layers counted from 0 in every list of one kind."""
        raise NotImplementedError

    def call(self, *args: Any, **kwargs: Any) -> ModelCall | None:
        """Read the arguments of the model's forward; None for a call that is not one of a run's."""
        raise NotImplementedError

    def conditions(self, timesteps: Tensor, labels: Tensor, like: Tensor) -> Iterator[Tensor]:
        """For each block the (n, C) input of its modulation at n (timestep, label) pairs.

        `like` is a tensor of hidden states: its dtype is what the blocks would see.
        """
        raise NotImplementedError

    def parts(
        self, tokens: Mapping[str, int], grids: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Of what this process's tokens consist, each part shared among the processes for itself.

        `tokens` is N of each module here, `grids` are those of the call.  A module that is not in
        the result has all its tokens here, of a share of its samples.
        """
        return {name: (N,) for name, N in tokens.items()}

    def flops(self, done: Plan, batch: Mapping[str, int]) -> Flops:
        """FLOPs of what was done; `batch` is B of each module."""
        raise NotImplementedError


def width(module: nn.Module, default: int) -> int:
    """Output channels of a linear, also where it is wrapped (LoRA) or replaced."""
    widths = [getattr(m, "out_features", None) for m in module.modules()]
    return max((w for w in widths if isinstance(w, int)), default=default)


def lacking(module: object, paths: Sequence[str]) -> list[str]:
    """Those of the dotted attribute paths that the module does not have."""
    with warnings.catch_warnings():  # diffusers warns of names that are in a model's config, too
        warnings.simplefilter("ignore", FutureWarning)
        return [path for path in paths if find_attribute(module, path) is None]


def find_attribute(module: object, path: str) -> Any:
    """module.a.b for "a.b"; None where a part is missing or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def positional(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The first arguments of a model, given by position or by name."""
    found = list(args[: len(names)])
    for name in names[len(found) :]:
        shorter = "t" if name == "timestep" and name not in kwargs else name
        found.append(kwargs[shorter])
    return found
