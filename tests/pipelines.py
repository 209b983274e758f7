"""Stock diffusers pipelines around tiny transformers with random weights, offline.

`PIPELINES` holds one `TinyPipeline` per family that people run today: what builds it, how it is
called, and what an adapter must know of it.  Prompts are given as embeddings, so that there is no
text encoder, and the result is the latents, so that there is no autoencoder (DiTPipeline, which
always decodes, has a tiny one, and so have those in `FROM_IMAGE`, which start from an image).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from models import diffusers
from published import noise, randomize

HEADS, HEAD_DIM = 4, 16
WIDTH = HEADS * HEAD_DIM
TEXT = 32  # channels of a prompt embedding
SEPARATE = (("cond",), ("uncond",))
UNCOND_FIRST = (("uncond", "cond"),)
COND_FIRST = (("cond", "uncond"),)
UNGUIDED = (("cond",),)


@dataclass(frozen=True)
class TinyPipeline:
    """How a stock pipeline is built and called, and what there is to know of its transformer.

    Attributes:
        pipeline: the name of its class in diffusers.
        model: the name of its transformer's class, and `settings` what that is made with.
        scheduler: the name of its scheduler's class, and `schedule` what that is made with.
        prompt: the arguments that stand for the prompt, made anew for every call.
        arguments: the other arguments of a call.
        grid: patches of the latents: (rows, columns), or (frames, rows, columns).
        text: tokens of the prompt as the blocks see them.
        blocks: the classes of the blocks.
        calls: one step's calls of the transformer: the guidance branches in each one's batch.
        transformers: the attributes of the pipeline that hold a transformer.
        components: what else the pipeline is made with; what is not said is None.
        since: a version of diffusers that runs this; earlier ones may have the classes and fail.
    """

    pipeline: str
    model: str
    settings: Mapping[str, Any]
    scheduler: str
    prompt: Callable[[], dict[str, Any]]
    arguments: Mapping[str, Any]
    grid: tuple[int, ...]
    text: int
    blocks: tuple[str, ...]
    calls: tuple[tuple[str, ...], ...]
    schedule: Mapping[str, Any] = field(default_factory=dict)
    transformers: tuple[str, ...] = ("transformer",)
    components: Callable[[], dict[str, Any]] = dict
    since: tuple[int, int] = (0, 35)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def batched(self) -> bool:
        """Whether both guidance branches are in one call."""
        return len(self.calls[0]) > 1

    def __call__(self) -> Any:
        """The pipeline, or a skipped test where this diffusers cannot have it."""
        import pytest

        library = diffusers()
        if self.pipeline != "DiTPipeline":
            pytest.importorskip("transformers", reason="diffusers' pipelines import transformers")
        if not hasattr(library, self.pipeline) or not hasattr(library, self.model):
            pytest.skip(f"this diffusers has no {self.pipeline}")
        if tuple(int(part) for part in library.__version__.split(".")[:2]) < self.since:
            pytest.skip(f"needs diffusers {self.since}")
        made = {
            name: randomize(getattr(library, self.model)(**self.settings), seed)
            for seed, name in enumerate(self.transformers)
        }
        made["scheduler"] = getattr(library, self.scheduler)(**self.schedule)
        made |= self.components()
        kind = getattr(library, self.pipeline)
        required = {
            name: None
            for name, parameter in inspect.signature(kind.__init__).parameters.items()
            if name != "self" and parameter.default is parameter.empty
        }
        pipe = kind(**(required | made))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe: Any, steps: int, seed: int = 0, **arguments: Any) -> Tensor:
        """The latents after `steps` steps from the noise of `seed`; `arguments` go before ours."""
        generator = torch.Generator().manual_seed(seed)
        stock = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
        given = stock | dict(self.arguments) | self.prompt() | arguments
        return torch.as_tensor(pipe(**given, return_dict=False)[0])

    def models(self, pipe: Any) -> list[nn.Module]:
        return [getattr(pipe, name) for name in self.transformers]

    def blocks_of(self, pipe: Any) -> list[nn.Module]:
        """All blocks that a cache may touch: those in the model's own lists, in their order.

        Blocks that refine the text or the image before the others are left alone.
        """
        return [
            block
            for model in self.models(pipe)
            for name, blocks in model.named_children()
            if isinstance(blocks, nn.ModuleList) and not name.endswith("refiner")
            for block in blocks
            if type(block).__name__ in self.blocks
        ]


def prompt(length: int, *, channels: int = TEXT, **others: Any) -> Callable[[], dict[str, Any]]:
    """A prompt and its negative, by the names that most pipelines have for them."""
    return lambda: {
        "prompt_embeds": noise(1, length, channels, seed=1),
        "negative_prompt_embeds": noise(1, length, channels, seed=2),
        **{name: make() for name, make in others.items()},
    }


def mask(length: int, valid: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ones for the first `valid` tokens, zeros for the padding after them."""
    valid = length if valid is None else valid
    return (torch.arange(length) < valid).to(dtype)[None]


def masked_prompt(length: int, valid: int, **kind: Any) -> Callable[[], dict[str, Any]]:
    """A padded prompt, and a negative as long as its embedding."""
    return prompt(
        length,
        prompt_attention_mask=functools.partial(mask, length, valid, **kind),
        negative_prompt_attention_mask=functools.partial(mask, length, **kind),
    )


def pooled_prompt(length: int) -> Callable[[], dict[str, Any]]:
    return prompt(
        length,
        pooled_prompt_embeds=lambda: noise(1, TEXT, seed=1),
        negative_pooled_prompt_embeds=lambda: noise(1, TEXT, seed=2),
    )


def without_negative(make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: t for name, t in make().items() if not name.startswith("negative")}


def tiny_decoder(**settings: Any) -> dict[str, Any]:
    stock = {"block_out_channels": (4,), "norm_num_groups": 2, "layers_per_block": 1}
    return {"vae": randomize(diffusers().AutoencoderKL(sample_size=16, **stock, **settings))}


def tiny_video_decoder() -> dict[str, Any]:
    stock = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return {"vae": randomize(diffusers().AutoencoderKLWan(**stock))}


class NoDecoder(nn.Module):
    """What a pipeline that will not do without an autoencoder asks of it before the first step."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.temporal_compression_ratio, self.spatial_compression_ratio = 4, 16
        self.device, self.dtype = torch.device("cpu"), torch.float32


SIZE = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
SQUARE = {"height": 128, "width": 128}  # latents of 16 x 16, 64 patches
CLIP = {"height": 64, "width": 64, "num_frames": 9}  # latents of 3 x 8 x 8, 48 patches
FLOW = "FlowMatchEulerDiscreteScheduler"
SHIFTED = {"shift": 3.0}
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}
ROPE = (4, 6, 6)

PIXART = {
    **SIZE,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "cross_attention_dim": WIDTH,
    "sample_size": 16,
    "patch_size": 2,
    "caption_channels": TEXT,
    "norm_type": "ada_norm_single",
}
FLUX = {
    **SIZE,
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "joint_attention_dim": TEXT,
    "pooled_projection_dim": TEXT,
    "guidance_embeds": True,
    "axes_dims_rope": ROPE,
}
SD3 = {
    **SIZE,
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": TEXT,
    "pos_embed_max_size": 32,
}
WAN = {
    **SIZE,
    "patch_size": (1, 2, 2),
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT,
    "freq_dim": 32,
    "ffn_dim": 160,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
# Milder than the published schedules, whose first step magnifies what a random model predicts.
BETAS = {"beta_start": 1e-4, "beta_end": 2e-3}
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

PIPELINES: dict[str, TinyPipeline] = {
    "dit": TinyPipeline(
        pipeline="DiTPipeline",
        model="DiTTransformer2DModel",
        settings={
            **SIZE,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "sample_size": 16,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,  # the pipeline's null class
            "norm_type": "ada_norm_zero",
        },
        scheduler="DDIMScheduler",
        schedule={"clip_sample": False, **BETAS},
        prompt=lambda: {"class_labels": [3, 7]},
        arguments={"guidance_scale": 4.0, "output_type": "np"},
        grid=(8, 8),
        text=0,
        blocks=("BasicTransformerBlock",),
        calls=COND_FIRST,
        components=tiny_decoder,
    ),
    "pixart_alpha": TinyPipeline(
        pipeline="PixArtAlphaPipeline",
        model="PixArtTransformer2DModel",
        settings=PIXART,
        scheduler="DPMSolverMultistepScheduler",
        schedule=BETAS,
        prompt=masked_prompt(12, valid=9),
        arguments={
            **SQUARE,
            "guidance_scale": 4.5,
            "negative_prompt": None,
            "use_resolution_binning": False,
        },
        grid=(8, 8),
        text=12,
        blocks=("BasicTransformerBlock",),
        calls=UNCOND_FIRST,
    ),
    "pixart_sigma": TinyPipeline(
        pipeline="PixArtSigmaPipeline",
        model="PixArtTransformer2DModel",
        settings=PIXART | {"use_additional_conditions": False},
        scheduler="DPMSolverMultistepScheduler",
        schedule=BETAS,
        prompt=masked_prompt(20, valid=13),
        arguments={
            **SQUARE,
            "width": 192,
            "guidance_scale": 4.5,
            "negative_prompt": None,
            "use_resolution_binning": False,
        },
        grid=(8, 12),
        text=20,
        blocks=("BasicTransformerBlock",),
        calls=UNCOND_FIRST,
    ),
    "flux": TinyPipeline(
        pipeline="FluxPipeline",
        model="FluxTransformer2DModel",
        settings=FLUX,
        scheduler=FLOW,
        schedule=DYNAMIC,
        prompt=without_negative(pooled_prompt(8)),
        arguments={**SQUARE, "guidance_scale": 3.5},
        grid=(8, 8),
        text=8,
        blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        calls=UNGUIDED,
    ),
    "flux_true_cfg": TinyPipeline(
        pipeline="FluxPipeline",
        model="FluxTransformer2DModel",
        settings=FLUX | {"guidance_embeds": False},
        scheduler=FLOW,
        schedule=DYNAMIC,
        prompt=pooled_prompt(8),
        arguments={**SQUARE, "true_cfg_scale": 3.0},
        grid=(8, 8),
        text=8,
        blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        calls=SEPARATE,
    ),
    "chroma": TinyPipeline(
        pipeline="ChromaPipeline",
        model="ChromaTransformer2DModel",
        settings={
            **SIZE,
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": ROPE,
            "approximator_num_channels": 16,
            "approximator_hidden_dim": WIDTH,
            "approximator_layers": 1,
        },
        scheduler=FLOW,
        schedule=DYNAMIC,
        prompt=masked_prompt(10, valid=7),
        arguments={**SQUARE, "guidance_scale": 4.0},
        grid=(8, 8),
        text=10,
        blocks=("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
        calls=SEPARATE,
    ),
    "flux2": TinyPipeline(
        pipeline="Flux2Pipeline",
        model="Flux2Transformer2DModel",
        settings={
            **SIZE,
            "patch_size": 1,
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "joint_attention_dim": TEXT,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        scheduler=FLOW,
        schedule=DYNAMIC,
        prompt=without_negative(prompt(9)),
        arguments=SQUARE,
        grid=(8, 8),
        text=9,
        blocks=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
        calls=UNGUIDED,
    ),
    "sd3": TinyPipeline(
        pipeline="StableDiffusion3Pipeline",
        model="SD3Transformer2DModel",
        settings=SD3,
        scheduler=FLOW,
        schedule=SHIFTED,
        prompt=pooled_prompt(10),
        arguments={**SQUARE, "guidance_scale": 7.0},
        grid=(8, 8),
        text=10,
        blocks=("JointTransformerBlock",),
        calls=UNCOND_FIRST,
    ),
    "sd35": TinyPipeline(
        pipeline="StableDiffusion3Pipeline",
        model="SD3Transformer2DModel",
        settings=SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        scheduler=FLOW,
        schedule=SHIFTED,
        prompt=pooled_prompt(10),
        arguments={**SQUARE, "guidance_scale": 7.0},
        grid=(8, 8),
        text=10,
        blocks=("JointTransformerBlock",),
        calls=UNCOND_FIRST,
    ),
    "auraflow": TinyPipeline(
        pipeline="AuraFlowPipeline",
        model="AuraFlowTransformer2DModel",
        settings={
            **SIZE,
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 3,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": WIDTH,
            "pos_embed_max_size": 64,
        },
        scheduler=FLOW,
        schedule=SHIFTED,
        prompt=masked_prompt(10, valid=7),
        arguments={**SQUARE, "guidance_scale": 3.5},
        grid=(8, 8),
        text=18,  # 8 of them registers
        blocks=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
        calls=UNCOND_FIRST,
    ),
    "qwenimage": TinyPipeline(
        pipeline="QwenImagePipeline",
        model="QwenImageTransformer2DModel",
        settings={
            **SIZE,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": ROPE,
        },
        scheduler=FLOW,
        schedule=DYNAMIC,
        prompt=prompt(
            9,
            prompt_embeds_mask=lambda: mask(9, dtype=torch.long),
            negative_prompt_embeds_mask=lambda: mask(9, dtype=torch.long),
        ),
        arguments={**SQUARE, "true_cfg_scale": 4.0},
        grid=(8, 8),
        text=9,
        blocks=("QwenImageTransformerBlock",),
        calls=SEPARATE,
    ),
    "zimage": TinyPipeline(
        pipeline="ZImagePipeline",
        model="ZImageTransformer2DModel",
        settings={
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": WIDTH,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "cap_feat_dim": TEXT,
            "axes_dims": list(ROPE),
            "axes_lens": [256, 32, 32],
        },
        scheduler=FLOW,
        schedule=DYNAMIC,
        prompt=lambda: {
            "prompt_embeds": [noise(9, TEXT, seed=1)],
            "negative_prompt_embeds": [noise(7, TEXT, seed=2)],
        },
        arguments={**SQUARE, "guidance_scale": 4.0},
        grid=(8, 8),
        text=32,  # padded to a multiple of 32
        blocks=("ZImageTransformerBlock",),
        calls=COND_FIRST,
    ),
    "lumina2": TinyPipeline(
        pipeline="Lumina2Pipeline",
        model="Lumina2Transformer2DModel",
        settings={
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": WIDTH,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "num_attention_heads": HEADS,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "axes_dim_rope": ROPE,
            "axes_lens": (64, 32, 32),
            "cap_feat_dim": TEXT,
        },
        scheduler=FLOW,
        schedule=DYNAMIC,
        prompt=masked_prompt(10, valid=10, dtype=torch.long),
        arguments={**SQUARE, "guidance_scale": 4.0},
        grid=(8, 8),
        text=10,
        blocks=("Lumina2TransformerBlock",),
        calls=SEPARATE,
    ),
    "wan": TinyPipeline(
        pipeline="WanPipeline",
        model="WanTransformer3DModel",
        settings=WAN,
        scheduler="UniPCMultistepScheduler",
        schedule=UNIPC,
        prompt=prompt(12),
        arguments={**CLIP, "guidance_scale": 5.0},
        grid=(3, 4, 4),
        text=12,
        blocks=("WanTransformerBlock",),
        calls=SEPARATE,
    ),
    "wan22": TinyPipeline(
        pipeline="WanPipeline",
        model="WanTransformer3DModel",
        settings=WAN,
        scheduler="UniPCMultistepScheduler",
        schedule=UNIPC,
        prompt=prompt(12),
        arguments={**CLIP, "guidance_scale": 5.0, "guidance_scale_2": 3.0},
        grid=(3, 4, 4),
        text=12,
        blocks=("WanTransformerBlock",),
        calls=SEPARATE,
        transformers=("transformer", "transformer_2"),
        components=lambda: {"boundary_ratio": 0.875},
    ),
    "wan22_ti2v": TinyPipeline(
        pipeline="WanPipeline",
        model="WanTransformer3DModel",
        settings=WAN,
        scheduler="UniPCMultistepScheduler",
        schedule=UNIPC,
        prompt=prompt(12),
        arguments={**CLIP, "guidance_scale": 5.0},
        grid=(3, 4, 4),
        text=12,
        blocks=("WanTransformerBlock",),
        calls=SEPARATE,
        components=lambda: {"expand_timesteps": True},  # a timestep, and modulation, per token
    ),
    "ltx": TinyPipeline(
        pipeline="LTXPipeline",
        model="LTXVideoTransformer3DModel",
        settings={
            **SIZE,
            "in_channels": 8,
            "out_channels": 8,
            "patch_size": 1,
            "patch_size_t": 1,
            "cross_attention_dim": WIDTH,
            "num_layers": 3,
            "caption_channels": TEXT,
            "qk_norm": "rms_norm_across_heads",
        },
        scheduler=FLOW,
        schedule=DYNAMIC,
        prompt=masked_prompt(12, valid=9),
        arguments={"height": 128, "width": 192, "num_frames": 17, "guidance_scale": 3.0},
        grid=(3, 4, 6),
        text=12,
        blocks=("LTXVideoTransformerBlock",),
        calls=UNCOND_FIRST,
    ),
    "cogvideox": TinyPipeline(
        pipeline="CogVideoXPipeline",
        model="CogVideoXTransformer3DModel",
        settings={
            **SIZE,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 32,
            "text_embed_dim": TEXT,
            "num_layers": 3,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 12,
            "use_rotary_positional_embeddings": True,
        },
        scheduler="CogVideoXDDIMScheduler",
        schedule={"prediction_type": "v_prediction"},
        prompt=prompt(12),
        arguments={**CLIP, "guidance_scale": 6.0},
        grid=(3, 4, 4),
        text=12,
        blocks=("CogVideoXBlock",),
        calls=UNCOND_FIRST,
    ),
    "hunyuan_video": TinyPipeline(
        pipeline="HunyuanVideoPipeline",
        model="HunyuanVideoTransformer3DModel",
        settings={
            **SIZE,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 3,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": TEXT,
            "pooled_projection_dim": TEXT,
            "rope_axes_dim": ROPE,
        },
        scheduler=FLOW,
        schedule={"shift": 7.0},
        prompt=lambda: {
            "prompt_embeds": noise(1, 10, TEXT, seed=1),
            "pooled_prompt_embeds": noise(1, TEXT, seed=1),
            "prompt_attention_mask": mask(10, valid=7),
        },
        arguments={**CLIP, "guidance_scale": 6.0},
        grid=(3, 4, 4),
        text=10,
        blocks=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
        calls=UNGUIDED,
    ),
    "hunyuan_video15": TinyPipeline(
        pipeline="HunyuanVideo15Pipeline",
        model="HunyuanVideo15Transformer3DModel",
        settings={
            **SIZE,
            "in_channels": 9,
            "out_channels": 4,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "text_embed_dim": TEXT,
            "text_embed_2_dim": TEXT,
            "image_embed_dim": 16,
            "rope_axes_dim": ROPE,
            "task_type": "t2v",
        },
        scheduler=FLOW,
        schedule={"shift": 7.0},
        prompt=prompt(
            10,
            prompt_embeds_mask=lambda: mask(10, 7, dtype=torch.long),
            negative_prompt_embeds_mask=lambda: mask(10, 5, dtype=torch.long),
            prompt_embeds_2=lambda: noise(1, 6, TEXT, seed=3),
            negative_prompt_embeds_2=lambda: noise(1, 6, TEXT, seed=4),
            prompt_embeds_mask_2=lambda: mask(6, 2, dtype=torch.long),
            negative_prompt_embeds_mask_2=lambda: mask(6, 0, dtype=torch.long),
        ),
        arguments=CLIP,
        grid=(3, 4, 4),
        text=745,  # 729 of them an image's, masked out
        blocks=("HunyuanVideo15TransformerBlock",),
        calls=SEPARATE,
        components=lambda: {
            "vae": NoDecoder(latent_channels=4),
            "guider": diffusers().ClassifierFreeGuidance(guidance_scale=4.0),
        },
    ),
    "mochi": TinyPipeline(
        pipeline="MochiPipeline",
        model="MochiTransformer3DModel",
        settings={
            **SIZE,
            "patch_size": 2,
            "num_layers": 3,
            "pooled_projection_dim": 48,
            "in_channels": 12,
            "text_embed_dim": TEXT,
            "time_embed_dim": 16,
            "max_sequence_length": 12,
        },
        scheduler=FLOW,
        schedule={"invert_sigmas": True},
        prompt=masked_prompt(12, valid=9, dtype=torch.bool),
        arguments={"height": 64, "width": 64, "num_frames": 13, "guidance_scale": 4.5},
        grid=(3, 4, 4),
        text=12,
        blocks=("MochiTransformerBlock",),
        calls=UNCOND_FIRST,
    ),
    "allegro": TinyPipeline(
        pipeline="AllegroPipeline",
        model="AllegroTransformer3DModel",
        settings={
            "num_attention_heads": HEADS,
            "attention_head_dim": 24,  # of three axes, each even
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "cross_attention_dim": 96,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 3,
            "caption_channels": TEXT,
        },
        scheduler="EulerAncestralDiscreteScheduler",
        schedule=BETAS,
        prompt=masked_prompt(12, valid=9),
        arguments={**CLIP, "guidance_scale": 7.5, "negative_prompt": None},
        grid=(3, 4, 4),
        text=12,
        blocks=("AllegroTransformerBlock",),
        calls=UNCOND_FIRST,
    ),
    "latte": TinyPipeline(
        pipeline="LattePipeline",
        model="LatteTransformer3DModel",
        settings={
            **SIZE,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": WIDTH,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": TEXT,
            "video_length": 3,
        },
        scheduler="DDIMScheduler",
        schedule={"clip_sample": False, **BETAS},
        prompt=prompt(12),
        arguments={
            "height": 64,
            "width": 64,
            "video_length": 3,
            "guidance_scale": 7.5,
            "negative_prompt": None,
            "mask_feature": False,
            "clean_caption": False,
        },
        grid=(3, 4, 4),
        text=12,
        blocks=("BasicTransformerBlock",),
        calls=UNCOND_FIRST,
    ),
}

PIPELINES["qwenimage_padded"] = replace(
    PIPELINES["qwenimage"],
    prompt=prompt(
        9,
        prompt_embeds_mask=lambda: mask(9, 7, dtype=torch.long),
        negative_prompt_embeds_mask=lambda: mask(9, dtype=torch.long),  # becomes None
    ),
    since=(0, 38),
)

# With less strength they skip the first of their scheduler's timesteps.
START = {"image": noise(1, 3, 16, 16, seed=4).sigmoid(), "strength": 1.0}
FROM_IMAGE: dict[str, TinyPipeline] = {
    "flux": replace(
        PIPELINES["flux"],
        pipeline="FluxImg2ImgPipeline",
        arguments={**START, "height": 16, "width": 16, "guidance_scale": 3.5},
        components=functools.partial(tiny_decoder, shift_factor=0.0),
    ),
    "sd3": replace(
        PIPELINES["sd3"],
        pipeline="StableDiffusion3Img2ImgPipeline",
        arguments={**START, "height": 16, "width": 16, "guidance_scale": 7.0},
        components=functools.partial(tiny_decoder, shift_factor=0.0),
    ),
    "wan": replace(  # it does not tell its scheduler which timestep comes first
        PIPELINES["wan"],
        pipeline="WanVideoToVideoPipeline",
        arguments={
            "video": [noise(9, 3, 64, 64, seed=4).sigmoid()],
            "height": 64,
            "width": 64,
            "guidance_scale": 5.0,
            "strength": 1.0,
        },
        components=tiny_video_decoder,
    ),
}
