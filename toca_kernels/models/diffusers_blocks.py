"""diffusers' text-to-image and text-to-video transformers but DiT, by the classes of their blocks.

`KINDS` says for each class of block which modules it calls, what their outputs are and in which
order an attention has its keys.  All else (norms, modulation, gates, masks, rotary embeddings) is
the block's own code, which runs in every step.  Blocks are recognised by the name of their class
and by their modules, so a copy or a subclass works as the original does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import linear
from ..blocks.block import Block
from ..blocks.taps import Tap
from ..flops import Flops
from ..plan import Plan
from . import crossing
from .adapter import Adapter, ModelCall, find_attribute, lacking, width
from .families import double, numbered, serial, single
from .flux_flops import flux_flops
from .linear_flops import linear_flops
from .streams import double_stream, qwen_double_stream, single_stream

_LISTS = (
    "blocks",
    "layers",
    "transformer_blocks",
    "temporal_transformer_blocks",
    "joint_transformer_blocks",
    "single_transformer_blocks",
)


@dataclass(frozen=True)
class Kind:
    """How the blocks of one class are served.

    Attributes:
        needs: attributes that such a block has.
        taps: (block, prefix of its modules' names) -> its taps.
        ranked: whether scores can be taken from its attention.
        joint: whether image and text are one sequence in all of its modules.
        make: (block, layers, taps) -> the block of a family that composes cached steps.
    """

    needs: tuple[str, ...]
    taps: Callable[[Any, str], list[Tap]]
    ranked: bool = True
    joint: bool = False
    make: Callable[[Any, Mapping[str, int], list[Tap]], Block] | None = None


# --- kinds of blocks -----------------------------------------------------------------------------


def fused_single(block: Any) -> list[Tap]:
    """FLUX.2: attn holds it all, [qkv | mlp] in one linear and [attention | mlp] in the other."""
    attn = block.attn
    C = attn.inner_dim

    def on_rows(rows: Tensor, attention: Tensor) -> Tensor:
        hidden = attn.mlp_act_fn(linear.outputs_from(attn.to_qkv_mlp_proj, rows, 3 * C))
        out: Tensor = attn.to_out(torch.cat([attention, hidden], dim=-1))
        return out

    return [
        Tap(
            attn,
            ("single_mlp",),
            "rows",
            keys=((("single_mlp",), (0,)),),
            on_rows=on_rows,
            beside=("single_attn",),
        ),
        Tap(attn.to_out, ("single_attn",), "seen", take=lambda args, out: (args[0][..., :C],)),
    ]


def _double(block: Any, text_first: bool) -> list[Tap]:
    """`double` by the names that most blocks have for it."""
    dual = getattr(block, "attn2", None)
    return double(block.attn, block.ff, block.ff_context, text_first=text_first, dual=dual)


_DOUBLE = ("attn", "ff")
_TEXT_FIRST = Kind((*_DOUBLE, "ff_context"), lambda b, p: _double(b, text_first=True))
_IMAGE_FIRST = Kind(_DOUBLE, lambda b, p: _double(b, text_first=False))
_ADA = ("norm1.linear", "norm1.silu", "norm1_context.linear", "norm2")
_SINGLE = Kind(("attn", "proj_mlp", "proj_out"), lambda b, p: single(b))
_CROSS = Kind(("attn1", "attn2.to_k", "ff"), lambda b, p: serial(p, b.attn1, b.ff, b.attn2))

_BOTH = ("single_attn", "single_txt_attn")
_TEXT_IMAGE = ("txt_attn", "img_attn")

KINDS: dict[str, Kind] = {
    "AllegroTransformerBlock": _CROSS,
    "AuraFlowJointTransformerBlock": _TEXT_FIRST,
    "AuraFlowSingleTransformerBlock": Kind(
        ("attn", "ff"), lambda b, p: serial("single_", b.attn, b.ff)
    ),
    # ada_norm_single: PixArt, and Latte's two lists, of which one has no cross-attention.
    "BasicTransformerBlock": Kind(
        ("attn1", "ff", "scale_shift_table"),
        lambda b, p: serial(p, b.attn1, b.ff, b.attn2, rowwise=not p),
        make=crossing.pixart,
    ),
    "ChromaSingleTransformerBlock": _SINGLE,
    "ChromaTransformerBlock": _TEXT_FIRST,
    "CogVideoXBlock": Kind(
        ("attn1", "ff"),
        lambda b, p: [
            Tap(b.attn1, ("img_attn", "txt_attn"), keys=((("mlp",), (1, 0)),)),
            Tap(b.ff, ("mlp",), "rows"),  # of both streams, the text first
        ],
    ),
    "Flux2SingleTransformerBlock": Kind(
        ("attn.to_qkv_mlp_proj", "attn.to_out", "attn.mlp_act_fn"), lambda b, p: fused_single(b)
    ),
    "Flux2TransformerBlock": _TEXT_FIRST,
    "FluxSingleTransformerBlock": replace(
        _SINGLE,
        needs=(*_SINGLE.needs, "act_mlp", "norm.linear"),
        make=single_stream(text_first=True),
    ),
    "FluxTransformerBlock": replace(
        _TEXT_FIRST,
        needs=(*_TEXT_FIRST.needs, *_ADA),
        make=double_stream(text_first_out=True),
    ),
    "HunyuanVideo15TransformerBlock": _IMAGE_FIRST,
    "HunyuanVideoSingleTransformerBlock": Kind(
        (*_SINGLE.needs, "act_mlp", "norm.linear"),
        lambda b, p: single(b, _BOTH),
        make=single_stream(text_first=False, attention=_BOTH),
    ),
    "HunyuanVideoTransformerBlock": replace(
        _IMAGE_FIRST,
        needs=(*_IMAGE_FIRST.needs, *_ADA),
        make=double_stream(text_first_out=False),
    ),
    "JointTransformerBlock": replace(  # SD3
        _IMAGE_FIRST,
        needs=(*_IMAGE_FIRST.needs, *_ADA),
        make=double_stream(text_first_out=True),
    ),
    "LTXVideoTransformerBlock": _CROSS,
    "Lumina2TransformerBlock": Kind(
        ("attn", "feed_forward"), lambda b, p: serial(p, b.attn, b.feed_forward), joint=True
    ),
    # Its attention runs sample by sample, on the text that the mask admits.
    "MochiTransformerBlock": Kind(
        ("attn1", "ff"),
        lambda b, p: double(b.attn1, b.ff, b.ff_context, text_first=False),
        ranked=False,
    ),
    "QwenImageTransformerBlock": Kind(
        ("attn", "img_mlp", "txt_mlp"),
        lambda b, p: double(b.attn, b.img_mlp, b.txt_mlp, text_first=True),
        make=qwen_double_stream,
    ),
    "WanTransformerBlock": Kind(
        ("attn1", "attn2.to_k", "ffn", "norm3", "scale_shift_table"),
        lambda b, p: serial(p, b.attn1, b.ffn, b.attn2),
        make=crossing.wan,
    ),
    "ZImageTransformerBlock": Kind(
        ("attention", "feed_forward"),
        lambda b, p: serial(p, b.attention, b.feed_forward),
        joint=True,
    ),
}


# --- the adapter ---------------------------------------------------------------------------------


class DiffusersTransformer(Adapter):
    name = "diffusers transformer"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._served: list[Block] = []

    @classmethod
    def missing(cls, model: nn.Module) -> str:
        blocks = _blocks(model)
        if not blocks:
            return f"one of {', '.join(_LISTS)} as a ModuleList that is not empty"
        for at, _, block in blocks:
            kind = _kind(block)
            if kind is None:
                return f"a block of a known class as {at} (it is {type(block).__name__})"
            names = lacking(block, kind.needs)
            if names:
                return ", ".join(f"{at}.{name}" for name in names)
        return ""

    def blocks(self) -> Sequence[Block]:
        served = []
        for _, prefix, block in _blocks(self.model):
            kind = _kind(block)
            assert kind is not None
            served.append((kind.taps(block, prefix), functools.partial(_made, block, kind)))
        self._served = numbered(served)
        return self._served

    def call(self, *args: Any, **kwargs: Any) -> ModelCall | None:
        if kwargs.get("skip_layers") is not None:  # another network: not one of the run's steps
            return None
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        t = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        # A timestep for each token: those of an image that is given stay at 0.
        return ModelCall(t.amax() if t.ndim > 1 else t, None, self._grids(x), text)

    def _grids(self, x: Tensor | list[Tensor]) -> dict[str, tuple[int, ...]]:
        """Of latents that are not packed yet: (B, C, [frames,] rows, columns)."""
        patch = find_attribute(self.model, "config.patch_size")
        if not isinstance(x, Tensor) or x.ndim < 4 or patch is None:
            return {}
        sizes = x.shape[2:]
        patches = (patch,) * len(sizes) if isinstance(patch, int) else tuple(patch)
        frames = find_attribute(self.model, "config.patch_size_t")
        if len(sizes) == 3 and isinstance(patch, int):
            patches = (frames or 1, patch, patch)
        if len(patches) != len(sizes):
            return {}
        grid = tuple(size // one for size, one in zip(sizes, patches, strict=True))
        return dict.fromkeys(("mlp", "cross_attn", "img_mlp"), grid)

    def parts(
        self, tokens: Mapping[str, int], grids: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        image_first = ("single_attn", "single_txt_attn")
        pairs = [[tokens.get(name, 0) for name in pair] for pair in (_TEXT_IMAGE, image_first)]
        # Both streams in one module; that of single stream blocks tells their order.
        joint = {sum(pair): tuple(pair) for pair in pairs if all(pair)}
        streams = (*_TEXT_IMAGE, *image_first) if all(pairs[1]) else _TEXT_IMAGE
        return {name: (N,) if name in streams else joint.get(N, (N,)) for name, N in tokens.items()}

    def flops(self, done: Plan, batch: Mapping[str, int]) -> Flops:
        model = self.model
        embed = find_attribute(model, "time_text_embed.text_embedder.linear_1")
        if type(model).__name__ != "FluxTransformer2DModel" or embed is None:
            return linear_flops(done, self._served, batch)
        block = model.transformer_blocks[0]
        C = model.x_embedder.out_features
        return flux_flops(
            done,
            batch=batch["img_mlp"],
            channels=C,
            heads=block.attn.heads,
            mlp_ratio=width(block.ff.net[0], default=4 * C) / C,
            in_channels=model.x_embedder.in_features,
            context_channels=model.context_embedder.in_features,
            vector_channels=embed.in_features,
            guidance=hasattr(model.time_text_embed, "guidance_embedder"),
        )


def _made(block: nn.Module, kind: Kind, layers: Mapping[str, int], taps: list[Tap]) -> Block:
    if kind.make is not None:
        return kind.make(block, layers, taps)
    made = Block(block, layers, taps, ranked=kind.ranked)
    made.joint = kind.joint
    return made


def _blocks(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """(where it is, prefix of its modules' names, block) of the lists that a model has."""
    found = [name for name in _LISTS if isinstance(getattr(model, name, None), nn.ModuleList)]
    prefixes = dict.fromkeys(found, "")
    if "temporal_transformer_blocks" in found:
        prefixes |= {"transformer_blocks": "spatial_", "temporal_transformer_blocks": "temporal_"}
    return [
        (f"{name}.{layer}", prefixes[name], block)
        for name in found
        for layer, block in enumerate(getattr(model, name))
    ]


def _kind(block: nn.Module) -> Kind | None:
    own = getattr(block, "_orig_mod", block)  # of a block that torch.compile has wrapped
    names = (cls.__name__ for cls in type(own).__mro__)
    return next((KINDS[name] for name in names if name in KINDS), None)
