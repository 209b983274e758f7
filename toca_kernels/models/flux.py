"""black-forest-labs/flux: DoubleStreamBlock and SingleStreamBlock.

Its blocks attend in their own forward, by modules' weights: what is kept is the output of the
linears behind the attention, and a cached step is always composed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..blocks import linear
from ..blocks.block import Block
from ..blocks.double_stream import DoubleParts, DoubleStream, Modulation, StreamParts
from ..blocks.row_mlp import MLPParts, Norm
from ..blocks.single_stream import SingleParts, SingleStream
from ..blocks.taps import Tap
from ..flops import Flops
from ..plan import Plan
from .adapter import Adapter, ModelCall, lacking
from .families import numbered
from .flux_flops import flux_flops

_DOUBLE = tuple(
    f"{stream}_{part}"
    for stream in ("img", "txt")
    for part in ("mod", "norm1", "attn.qkv", "attn.proj", "norm2", "mlp")
)
_SINGLE = ("linear1", "linear2", "pre_norm", "mlp_act", "modulation", "hidden_size")


class Flux(Adapter):
    name = "black-forest-labs/flux"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._text_tokens = 1

    @classmethod
    def missing(cls, model: nn.Module) -> str:
        for name, needs in (("double_blocks", _DOUBLE), ("single_blocks", _SINGLE)):
            blocks = getattr(model, name, None)
            if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
                return f"{name} as a ModuleList that is not empty"
            for layer, block in enumerate(blocks):
                names = lacking(block, needs)
                if names:
                    return ", ".join(f"{name}.{layer}.{one}" for one in names)
        return ""

    def blocks(self) -> Sequence[Block]:
        double = [
            (_double_taps(b), functools.partial(_double, b)) for b in self.model.double_blocks
        ]
        single = [
            (_single_taps(b), functools.partial(_single, b)) for b in self.model.single_blocks
        ]
        return numbered([*double, *single])

    def call(self, *args: Any, **kwargs: Any) -> ModelCall:
        names = ("img", "img_ids", "txt", "txt_ids", "timesteps")
        given = dict(zip(names, args, strict=False)) | kwargs
        return ModelCall(given["timesteps"], None, {}, given["txt"])

    def parts(
        self, tokens: Mapping[str, int], grids: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        both = (tokens["txt_attn"], tokens["img_attn"])
        return {name: both if name.startswith("single_") else (N,) for name, N in tokens.items()}

    def flops(self, done: Plan, batch: Mapping[str, int]) -> Flops:
        model = self.model
        block = model.double_blocks[0]
        return flux_flops(
            done,
            batch=batch["img_mlp"],
            channels=block.img_attn.proj.out_features,
            heads=block.num_heads,
            mlp_ratio=block.img_mlp[0].out_features / block.img_mlp[0].in_features,
            in_channels=model.img_in.in_features,
            context_channels=model.txt_in.in_features,
            vector_channels=model.vector_in.in_layer.in_features,
            guidance=bool(list(getattr(model, "guidance_in", nn.Identity()).parameters())),
        )


# --- double stream -------------------------------------------------------------------------------


def _double_taps(block: Any) -> list[Tap]:
    return [
        Tap(block.img_attn.proj, ("img_attn",)),
        Tap(block.txt_attn.proj, ("txt_attn",)),
        Tap(block.img_mlp, ("img_mlp",), "rows"),
        Tap(block.txt_mlp, ("txt_mlp",), "rows"),
    ]


def _double(block: Any, layers: Mapping[str, int], taps: list[Tap]) -> DoubleStream:
    def stream(name: str) -> StreamParts:
        module, norm = getattr(block, f"{name}_mlp"), f"{name}_norm2"
        modulate = getattr(block, f"{name}_mod")

        def modulation(img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Modulation:
            attn, mlp = modulate(vec)
            one, *others = (m.squeeze(1) for m in (attn.gate, mlp.shift, mlp.scale, mlp.gate))
            return one, *others

        return StreamParts(
            name,
            hidden=lambda img, txt, vec, pe: img if name == "img" else txt,
            modulation=modulation,
            mlp=MLPParts(
                module, lambda: Norm.of(getattr(block, norm)), lambda: _mlp_linears(module)
            ),
        )

    parts = DoubleParts(block, (stream("img"), stream("txt")), pack=lambda img, txt: (img, txt))
    keys = ((("txt_mlp",), ("txt_attn",)), (("img_mlp",), ("img_attn",)))
    return DoubleStream(parts, layers, taps, attends=keys)


def _mlp_linears(mlp: Any) -> tuple[nn.Linear, nn.Linear, str] | None:
    if not isinstance(mlp, nn.Sequential) or len(mlp) != 3:
        return None
    fc1, act, fc2 = mlp
    activation = linear.activation_of(act)
    if activation is None or not linear.plain(fc1) or not linear.plain(fc2):
        return None
    return fc1, fc2, activation


# --- single stream -------------------------------------------------------------------------------


def _single_taps(block: Any) -> list[Tap]:
    C = block.hidden_size
    # The attention is the first part of what the second linear reads.
    return [
        Tap(
            block.linear2,
            ("single_mlp", "single_attn"),
            "rows",
            take=lambda args, out: (out, args[0][..., :C]),
        )
    ]


def _single(block: Any, layers: Mapping[str, int], taps: list[Tap]) -> SingleStream:
    C = block.hidden_size

    def modulation(x: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mod, _ = block.modulation(vec)
        return mod.shift.squeeze(1), mod.scale.squeeze(1), mod.gate.squeeze(1)

    def expand(rows: Tensor) -> Tensor:
        out: Tensor = block.mlp_act(linear.outputs_from(block.linear1, rows, 3 * C))
        return out

    parts = SingleParts(
        block,
        hidden=lambda x, vec, pe: x,
        modulation=modulation,
        norm=lambda: Norm.of(block.pre_norm),
        expand=expand,
        contract=block.linear2,
        attention=("single_attn",),
        pack=lambda out, x, vec, pe: out,
    )
    return SingleStream(parts, layers, taps, attends=((("single_mlp",), ("single_attn",)),))
