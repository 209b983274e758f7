"""The taps of the block families: which module's output is what, whoever wrote the block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..blocks.block import Block
from ..blocks.taps import Tap


def serial(
    prefix: str,
    attn: nn.Module,
    mlp: nn.Module,
    cross: nn.Module | None = None,
    *,
    text: Sequence[str] = ("to_k", "to_v"),
    ranked: bool = True,
    rowwise: bool = False,
) -> list[Tap]:
    """x += attn(x); x += cross(x, text); x += mlp(x), whatever norms and gates are between.

    `text` names the linears of the cross-attention that read the text alone; `ranked` says that
    the attention's keys are the tokens of the MLP, in the same order; `rowwise` that nothing in the
    attention depends on where a token is.
    """
    a, c, m = f"{prefix}attn", f"{prefix}cross_attn", f"{prefix}mlp"
    selecting = (m,) if cross is None else (c, m)
    keys = ((selecting, (0,)),) if ranked else ()
    taps = [Tap(attn, (a,), keys=keys, rowwise=rowwise), Tap(mlp, (m,), "rows")]
    if cross is not None:
        taps.append(Tap(cross, (c,), "rows", queries=(*selecting, a) if rowwise else selecting))
        taps += [
            Tap(getattr(cross, n), (f"{prefix}text_{n}",), follows=c, packed=n == "kv_linear")
            for n in text
        ]
    return taps


def double(
    attn: nn.Module,
    img_mlp: nn.Module,
    txt_mlp: nn.Module | None,
    *,
    text_first: bool,
    dual: nn.Module | None = None,
) -> list[Tap]:
    """Two streams that attend to each other; the attention returns (image, text)."""
    keys = [(("img_mlp",), (0,)), (() if txt_mlp is None else ("txt_mlp",), (1,))]
    taps = [
        Tap(attn, ("img_attn", "txt_attn"), keys=tuple(keys[::-1] if text_first else keys)),
        Tap(img_mlp, ("img_mlp",), "rows"),
    ]
    if txt_mlp is not None:
        taps.append(Tap(txt_mlp, ("txt_mlp",), "rows"))
    if dual is not None:
        taps.append(Tap(dual, ("dual_attn",)))
    return taps


def single(block: Any, outputs: tuple[str, ...] = ("single_attn",)) -> list[Tap]:
    """x += proj_out([attn(x) | act(proj_mlp(x))])."""
    positions = tuple(range(len(outputs)))
    return [
        Tap(
            block.attn,
            outputs,
            "picked",
            rows="single_mlp",
            keys=((("single_mlp",), positions),),
        ),
        Tap(block.proj_mlp, (), "rows_in", rows="single_mlp", follows="single_mlp"),
        Tap(block.proj_out, ("single_mlp",), "rows_out"),
    ]


def numbered(
    served: Iterable[tuple[list[Tap], Callable[[Mapping[str, int], list[Tap]], Block]]],
) -> list[Block]:
    """The blocks of (taps, what makes a block of its layers and taps), layers counted by module."""
    layers: Counter[str] = Counter()
    blocks = []
    for taps, make in served:
        names = list(dict.fromkeys(name for tap in taps for name in tap.names))
        blocks.append(make({name: layers[name] for name in names}, taps))
        layers.update(names)
    return blocks
