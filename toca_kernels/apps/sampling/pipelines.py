"""A diffusers pipeline from a folder or the hub, and a call of it that always starts alike.

A transformer alone gets the stock pipeline of its class, without text encoders and decoder.  Where
a pipeline has no text encoder, the prompt's embeddings are made up: noise of the right shape.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Class of a transformer -> its stock pipeline and scheduler.  (DiTPipeline always decodes.)
STOCK = {
    "AuraFlowTransformer2DModel": ("AuraFlowPipeline", "FlowMatchEulerDiscreteScheduler"),
    "CogVideoXTransformer3DModel": ("CogVideoXPipeline", "CogVideoXDDIMScheduler"),
    "FluxTransformer2DModel": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
    "LTXVideoTransformer3DModel": ("LTXPipeline", "FlowMatchEulerDiscreteScheduler"),
    "PixArtTransformer2DModel": ("PixArtAlphaPipeline", "DPMSolverMultistepScheduler"),
    "QwenImageTransformer2DModel": ("QwenImagePipeline", "FlowMatchEulerDiscreteScheduler"),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "WanTransformer3DModel": ("WanPipeline", "UniPCMultistepScheduler"),
}
_WIDTHS = (  # what a transformer's config calls the channels of a prompt embedding
    "joint_attention_dim",
    "caption_channels",
    "text_dim",
    "text_embed_dim",
    "cap_feat_dim",
    "cross_attention_dim",
)
_LENGTHS = ("max_text_seq_length", "max_sequence_length")
_LENGTH = 64  # tokens of a made-up prompt, where the model does not fix it
_PROMPT = "a photo of a lighthouse on a cliff at sunset, waves breaking below"


def load(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline of a folder or of a name on the hub, on a device.

    Raises:
        ValueError: diffusers is missing, or a transformer alone whose pipeline is not known.
        OSError: there is no such pipeline.
    """
    try:
        import diffusers
    except ImportError:
        raise ValueError("diffusers is missing: pip install diffusers transformers") from None
    folder = Path(name)
    config, index = folder / "config.json", folder / "model_index.json"
    given = _dtype(diffusers, dtype)
    try:
        if config.is_file() and not index.exists():
            pipe = _around(diffusers, folder, json.loads(config.read_text())["_class_name"], given)
        else:
            # What a saved pipeline did not have must be said again.
            parts = json.loads(index.read_text()) if index.exists() else {}
            given |= {part: None for part, where in parts.items() if where == [None, None]}
            pipe = diffusers.DiffusionPipeline.from_pretrained(name, **given)
    except ValueError as error:
        if "low_cpu_mem_usage" in str(error):  # diffusers' words for it do not say so
            raise ValueError(f"{name} needs accelerate: pip install accelerate") from None
        raise
    return pipe.to(device)


def _dtype(library: Any, dtype: torch.dtype) -> dict[str, Any]:
    if dtype == torch.float32:  # the default; saying so asks for more of what is installed
        return {}
    version = tuple(int(part) for part in library.__version__.split(".")[:2])
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}


def _around(library: Any, folder: Path, kind: str, given: Mapping[str, Any]) -> Any:
    """The stock pipeline of a transformer that lies alone in a folder."""
    if kind not in STOCK:
        raise ValueError(
            f"{folder}: expected a pipeline, or a transformer alone of the classes "
            f"{', '.join(STOCK)}, got {kind}; give the folder of its pipeline"
        )
    names = STOCK[kind]
    pipeline, scheduler = (getattr(library, name) for name in names)
    made = {
        "transformer": getattr(library, kind).from_pretrained(folder, **given),
        "scheduler": scheduler(**_schedule(names[1])),
    }
    parameters = inspect.signature(pipeline.__init__).parameters
    required = [
        name
        for name, parameter in parameters.items()
        if name != "self" and parameter.default is parameter.empty
    ]
    return pipeline(**(dict.fromkeys(required) | made))


def _schedule(name: str) -> dict[str, Any]:
    """Settings that a scheduler for flow matching needs and does not have by default."""
    return (
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if "UniPC" in name else {}
    )


def caller(pipe: Any, steps: int, arguments: Mapping[str, Any]) -> Callable[[], Tensor]:
    """Calls the pipeline for the same prompt and noise; returns the latents, or what it returns
    where it always decodes.

    Args:
        pipe: the pipeline.
        steps: steps of a run.
        arguments: arguments of the call, which go before those that are chosen here.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {"num_inference_steps": steps}
    if "class_labels" in takes:
        given |= {"class_labels": [207, 360], "output_type": "np"}
    else:
        given |= {"output_type": "latent"} | _prompt(pipe, takes, arguments)
    given |= arguments

    def call() -> Tensor:
        noise = torch.Generator().manual_seed(0)
        out = pipe(**given, generator=noise, return_dict=False)[0]
        return torch.as_tensor(out)

    return call


def _prompt(pipe: Any, takes: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    if "prompt" in arguments or "prompt_embeds" in arguments:
        return {}
    if getattr(pipe, "text_encoder", None) is not None:
        return {"prompt": _PROMPT}
    config = pipe.transformer.config
    width = next((config[name] for name in _WIDTHS if config.get(name)), None)
    if width is None:
        raise ValueError(
            f"{type(pipe).__name__}: expected a text encoder, or a transformer whose config has "
            f"one of {', '.join(_WIDTHS)}; use check() in Python"
        )
    length = next((config[name] for name in _LENGTHS if config.get(name)), _LENGTH)
    kind = {"dtype": pipe.transformer.dtype, "device": pipe.transformer.device}
    made: dict[str, Any] = {"prompt": None, "negative_prompt": None}
    for seed, name in enumerate(takes):
        noise = torch.Generator().manual_seed(seed)
        if name.endswith("pooled_prompt_embeds"):
            C = config["pooled_projection_dim"]
            made[name] = torch.randn(1, C, generator=noise).to(**kind)
        elif name in ("prompt_embeds", "negative_prompt_embeds"):
            x = torch.randn(1, length, width, generator=noise).to(**kind)
            of_lists = "list[" in str(takes[name].annotation).lower()
            made[name] = [x[0]] if of_lists else x
        elif "prompt" in name and name.endswith("mask"):
            made[name] = torch.ones(1, length, dtype=torch.long, device=kind["device"])
    return {name: value for name, value in made.items() if name in takes}
