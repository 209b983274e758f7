"""The shapes that kernels are compiled and modelled for: a transformer and a cached step of it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """Letters as in ops.py.

    Attributes:
        name: for tables.
        B, N, C, H: samples, tokens, channels, heads.
        k: tokens that a cached step recomputes.
        layers: whose tokens are selected together.
        text: keys of cross-attention; 0: none, and the selected tokens query self-attention.
        cell: side of the tiles of which the best token gets a bonus; 1: none.
        ragged: whether layers select different numbers of tokens.
        dtype: of the features.
    """

    name: str
    B: int
    N: int
    C: int
    H: int
    k: int
    layers: int = 28
    text: int = 0
    cell: int = 1
    ragged: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def D(self) -> int:
        return self.C // self.H

    @property
    def rows(self) -> int:
        """Of a selection: layers x samples."""
        return self.layers * self.B

    @property
    def counts(self) -> list[int]:
        """Tokens that each row of a selection takes; ragged: one less in each further layer."""
        return [max(0, self.k - self.ragged * (row // self.B)) for row in range(self.rows)]


# Tokens that a cached step recomputes: facts of the published settings (config.py).
SHAPES = (
    Shape("DiT-XL/2 256", 2, 256, 1152, 16, 18, cell=2, ragged=True),
    Shape("DiT-XL/2 256, batch 64", 64, 256, 1152, 16, 18, cell=2, ragged=True),
    Shape("DiT-XL/2 512", 2, 1024, 1152, 16, 72, cell=2, ragged=True),
    Shape("PixArt-alpha 1024", 2, 4096, 1152, 16, 1229, text=120, cell=4),
    Shape("FLUX 1024", 1, 4608, 3072, 24, 461, layers=38),
    Shape("Wan 1.3B 480p", 2, 32760, 1536, 12, 3276, layers=30, text=512),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that describe a shape of one's own."""
    shape = parser.add_argument_group("one shape of your own, instead of the models'")
    shape.add_argument("--batch", type=int, default=2, help="samples (%(default)s)")
    shape.add_argument("--tokens", type=int, help="tokens of a sample")
    shape.add_argument("--channels", type=int, default=1152, help="channels (%(default)s)")
    shape.add_argument("--heads", type=int, default=16, help="attention heads (%(default)s)")
    shape.add_argument("--selected", type=int, help="tokens a cached step recomputes (7 %%)")
    shape.add_argument("--layers", type=int, default=28, help="layers (%(default)s)")
    shape.add_argument("--text", type=int, default=0, help="keys of cross-attention (none)")
    shape.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(%(default)s)")


def from_arguments(options: argparse.Namespace) -> tuple[Shape, ...]:
    if options.tokens is None:
        return SHAPES
    selected = options.selected or max(1, options.tokens * 7 // 100)
    if not 0 < selected <= options.tokens or options.channels % options.heads:
        raise SystemExit("expected 0 < selected <= tokens, and channels a multiple of heads")
    return (
        Shape(
            f"{options.batch} x {options.tokens} x {options.channels}",
            options.batch,
            options.tokens,
            options.channels,
            options.heads,
            selected,
            layers=options.layers,
            text=options.text,
            dtype=DTYPES[options.dtype],
        ),
    )
