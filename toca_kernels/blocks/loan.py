"""Loan: caches that do not lie at hand, brought to a block for as long as it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from .block import Block, BlockState


class Loan(Protocol):
    """Brings what does not lie at hand, in one piece on the device, for as long as a block runs."""

    def take(self, block: Block, state: BlockState) -> None:
        """Before the block: put into the state what it will read and write."""

    def give_back(self, block: Block, state: BlockState) -> None:
        """After the block, unless it raised: take what it wrote to where that belongs."""


class _Unseen:
    """A loan whose calls break a compiled block's graph."""

    def __init__(self, loan: Loan, reason: str) -> None:
        self.take: Callable[[Block, BlockState], None] = torch.compiler.disable(
            loan.take, reason=reason
        )
        self.give_back: Callable[[Block, BlockState], None] = torch.compiler.disable(
            loan.give_back, reason=reason
        )


def unseen(loan: Loan, reason: str) -> Loan:
    """The loan as a compiler may meet it; as it is where none is about."""
    # Not imported for this: it takes seconds.
    return _Unseen(loan, reason) if "torch._dynamo" in sys.modules else loan
