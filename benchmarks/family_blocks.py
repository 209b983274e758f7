"""The blocks that families.py times: real shapes, and models that give the inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stdit3 import RotaryEmbedding, STDiT3Block


@dataclass(frozen=True)
class Family:
    """A block at its real shape.

    Attributes:
        label: for tables.
        model: diffusers' class; settings: its arguments, with `layers` of which the block is one.
            STDiT3 is of stdit3.py: its "block" is a pair of a spatial and a temporal one.
        layers: the argument that counts them; spare: how many more the model needs, to be left out.
        peer: which cached step of naive_families.py is its own.
        preset: whose ratios it gets.
        grid: rows and columns of the tokens, or frames, rows and columns; cpu_grid: a smaller one.
        text, batch: tokens of the text; samples.
        depth: blocks that run in turn, so that no weight is in a cache when its block comes.
    """

    label: str
    model: str
    settings: dict[str, Any]
    peer: str
    preset: str
    grid: tuple[int, ...]
    text: int
    batch: int = 1
    layers: str = "num_layers"
    spare: int = 0
    depth: int = 2
    cpu_grid: tuple[int, ...] | None = None


_FLUX = {"num_attention_heads": 24, "guidance_embeds": True}
_PIXART = {"num_attention_heads": 16, "attention_head_dim": 72, "caption_channels": 4096}

# Shapes of the published models.  Wan has no published ratio: it gets Open-Sora's, as a video model
# with cross-attention; SD3.5 and Qwen-Image get those of FLUX's double stream blocks.
FAMILIES = {
    "flux-double": Family(
        "FLUX.1 1024, double",
        "FluxTransformer2DModel",
        {**_FLUX, "num_single_layers": 0},
        "double",
        "flux-50",
        (64, 64),
        512,
        depth=1,
    ),
    "flux-single": Family(
        "FLUX.1 1024, single",
        "FluxTransformer2DModel",
        {**_FLUX, "num_layers": 0},
        "single",
        "flux-50",
        (64, 64),
        512,
        layers="num_single_layers",
        depth=1,
    ),
    "pixart-512": Family(
        "PixArt-alpha 512",
        "PixArtTransformer2DModel",
        {**_PIXART, "sample_size": 64},
        "pixart",
        "pixart-dpm20",
        (32, 32),
        120,
        batch=2,
    ),
    "pixart-1024": Family(
        "PixArt-alpha 1024",
        "PixArtTransformer2DModel",
        {**_PIXART, "sample_size": 128},
        "pixart",
        "pixart-dpm20",
        (64, 64),
        120,
        batch=2,
    ),
    "wan-1.3b": Family(
        "Wan2.1 1.3B 480p",
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960},
        "wan",
        "opensora-rflow30",
        (21, 30, 52),
        512,
        cpu_grid=(5, 30, 52),
    ),
    "stdit3-480p": Family(
        "Open-Sora 1.2 480p, pair",
        "STDiT3",
        {"num_attention_heads": 16, "attention_head_dim": 72},
        "stdit3",
        "opensora-rflow30",
        (15, 30, 53),
        300,
        batch=2,
        depth=1,
    ),
    "sd3.5-medium": Family(
        "SD3.5-medium 1024",
        "SD3Transformer2DModel",
        {"num_attention_heads": 24, "attention_head_dim": 64, "qk_norm": "rms_norm"},
        "double",
        "flux-50",
        (64, 64),
        333,
        batch=2,
        spare=1,  # the last one has no MLP for its text
        depth=1,
    ),
    "qwen-image": Family(
        "Qwen-Image 1024",
        "QwenImageTransformer2DModel",
        {"num_attention_heads": 24},
        "double",
        "flux-50",
        (64, 64),
        512,
        depth=1,
    ),
}


# --- a family's blocks, and what they are called with --------------------------------------------


Call = tuple[Tensor, Tensor, Tensor]  # what a model is called with: latents, timestep, text


def stack_of(
    family: Family,
    grid: tuple[int, ...],
    text: int,
    heads: int | None,
    depth: int,
    device: str,
    dtype: torch.dtype,
) -> tuple[Stack, Call]:
    """A family's blocks on their arguments, and how their session is called."""
    if family.model == "STDiT3":
        return _pairs(family, grid, text, heads, depth, device, dtype)
    model = build(family, heads, depth, device)
    nn.Module.to(model, device, dtype)  # diffusers' own warns
    inputs = _moved(inputs_of(family, grid, text), device, dtype)
    name = "single_transformer_blocks" if family.peer == "single" else "transformer_blocks"
    name = name if hasattr(model, name) else "blocks"
    blocks = getattr(model, name)[:depth]
    stack = Stack({name: blocks}, arguments_of(model, blocks[0], inputs), model.config)
    call = (inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"])
    return stack.eval(), call


def _pairs(
    family: Family,
    grid: tuple[int, ...],
    text: int,
    heads: int | None,
    depth: int,
    device: str,
    dtype: torch.dtype,
) -> tuple[Stack, Call]:
    """Spatial and temporal blocks of STDiT3 in turn; both guidance halves have a whole text."""
    head_dim, heads = family.settings["attention_head_dim"], heads or _heads(family)
    B, C, T, S = family.batch, heads * head_dim, grid[0], grid[1] * grid[2]
    with torch.device(device):
        turn = RotaryEmbedding(head_dim).rotate_queries_or_keys
        spatial = [STDiT3Block(C, heads) for _ in range(depth)]
        temporal = [STDiT3Block(C, heads, rope=turn, temporal=True) for _ in range(depth)]
    lists = {
        "spatial_blocks": nn.ModuleList(spatial),
        "temporal_blocks": nn.ModuleList(temporal),
    }
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "x": torch.randn(B, T * S, C, generator=generator),
        "y": torch.randn(1, B * text, C, generator=generator),
        "t": torch.randn(B, 6 * C, generator=generator),
        "mask": [text] * B,
        "T": T,
        "S": S,
    }
    stack = Stack(lists, _moved(arguments, device, dtype), patch_size=(1, 2, 2))
    video = torch.zeros(B, 4, T, 2 * grid[1], 2 * grid[2], device=device, dtype=dtype)
    call = (video, torch.full((B,), 0.5, device=device), stack.arguments["y"])
    return randomize(stack.requires_grad_(False).to(device, dtype)).eval(), call


def _heads(family: Family) -> int:
    return family.settings["num_attention_heads"]


def _moved(inputs: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: move(one) for name, one in value.items()}
        return value.to(device, dtype) if isinstance(value, Tensor) else value

    return {name: move(value) for name, value in inputs.items()}


def build(family: Family, heads: int | None, depth: int, device: str) -> nn.Module:
    """The model with random weights; `heads` makes it narrower, with heads of the same size."""
    try:
        import diffusers
    except ImportError:
        raise RuntimeError(
            "benchmarks/families.py: expected diffusers, whose blocks it times, and it is not "
            "installed; pip install 'toca_kernels[examples]'"
        ) from None
    settings = family.settings | {family.layers: depth + family.spare}
    head_dim, whole = settings.get("attention_head_dim", 128), _heads(family)
    heads = heads or whole
    settings |= {"num_attention_heads": heads, "attention_head_dim": head_dim}
    if "ffn_dim" in settings:
        settings["ffn_dim"] = settings["ffn_dim"] * heads // whole
    if family.peer == "pixart":
        settings["cross_attention_dim"] = heads * head_dim
    if family.model == "SD3Transformer2DModel":
        settings["caption_projection_dim"] = heads * head_dim
    with torch.device(device):
        model: nn.Module = getattr(diffusers, family.model)(**settings)
    return randomize(model.requires_grad_(False).to(device)).eval()


def randomize(model: nn.Module) -> nn.Module:
    """As dit.randomize, where the model is; the weights of norms stay near 1."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        std = parameter[0].numel() ** -0.5 if parameter.ndim >= 2 else 0.05
        parameter.normal_(std=std, generator=generator)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and isinstance(weight, Tensor):
            weight.add_(1)
    return model


def inputs_of(family: Family, grid: tuple[int, ...], text: int) -> dict[str, Any]:
    """What the model is called with, without a batch's further samples."""
    B, N, generator = family.batch, grid[0] * grid[1], torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(B, *shape, generator=generator)

    common = {"timestep": torch.full((B,), 0.5)}
    if family.model.startswith("Flux"):
        places = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))
        return common | {
            "hidden_states": normal(N, 64),
            "encoder_hidden_states": normal(text, 4096),
            "pooled_projections": normal(768),
            "guidance": torch.full((B,), 3.5),
            "img_ids": torch.cat([torch.zeros(N, 1), places], dim=1),
            "txt_ids": torch.zeros(text, 3),
        }
    if family.model.startswith("Qwen"):
        return common | {
            "hidden_states": normal(N, 64),
            "encoder_hidden_states": normal(text, 3584),
            "img_shapes": [[(1, *grid)]] * B,
        }
    rows, columns = 2 * grid[-2], 2 * grid[-1]
    if family.model.startswith("Wan"):
        video = normal(16, grid[0], rows, columns)
        return common | {"hidden_states": video, "encoder_hidden_states": normal(text, 4096)}
    if family.model.startswith("SD3"):
        return common | {
            "hidden_states": normal(16, rows, columns),
            "encoder_hidden_states": normal(text, 4096),
            "pooled_projections": normal(2048),
        }
    valid = torch.arange(text) < torch.tensor([[text // 8], [text // 2]])  # of either prompt
    return common | {
        "hidden_states": normal(4, rows, columns),
        "encoder_hidden_states": normal(text, 4096),
        "encoder_attention_mask": valid.float(),
        "added_cond_kwargs": {
            "resolution": torch.tensor([[8.0 * rows, 8.0 * columns]]).repeat(B, 1),
            "aspect_ratio": torch.ones(B, 1),
        },
    }


class _Reached(Exception):
    pass


def arguments_of(model: nn.Module, block: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the model calls its block with."""
    found: dict[str, Any] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.update(inspect.signature(block.forward).bind(*args, **kwargs).arguments)
        raise _Reached

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(**inputs)
    except _Reached:
        return found
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} did not call its block")


class Stack(nn.Module):
    """Blocks of a model on fixed arguments; embeddings and the last layer are left out.

    Attributes:
        lists: the model's lists of blocks, of which one each runs in turn.
        arguments: what a block is called with, the hidden states first.
        config, patch_size: the model's, as far as it has them.
    """

    def __init__(
        self,
        lists: dict[str, nn.ModuleList],
        arguments: dict[str, Any],
        config: Any = None,
        patch_size: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        for name, blocks in lists.items():
            setattr(self, name, blocks)
        self.names, self.arguments = tuple(lists), arguments
        self.config, self.patch_size = config, patch_size

    @property
    def lists(self) -> dict[str, nn.ModuleList]:
        return {name: getattr(self, name) for name in self.names}

    @property
    def blocks_in_turn(self) -> list[nn.Module]:
        return [block for one_each in zip(*self.lists.values(), strict=True) for block in one_each]

    @property
    def hidden(self) -> str:
        """The name of the hidden states among the arguments."""
        return next(iter(self.arguments))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, ...]:
        """All arguments are for the session, which finds the step out from them."""
        return through(self.blocks_in_turn, lambda block, given: block(**given), self.arguments)

    def twin(self) -> Stack:
        """Other modules with the same weights."""
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        lists = copy.deepcopy(self.lists, shared)
        return Stack(lists, dict(self.arguments), self.config, self.patch_size).eval()


def through(
    blocks: Any, step: Callable[[Any, dict[str, Any]], Any], arguments: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Block by block; (hidden states,) or (hidden states, text)."""
    given, hidden = dict(arguments), next(iter(arguments))
    for block in blocks:
        out = step(block, given)
        if isinstance(out, Tensor):
            given[hidden] = out
        else:
            given["encoder_hidden_states"], given[hidden] = out
    if isinstance(out, Tensor):
        return (out,)
    return given[hidden], given["encoder_hidden_states"]
