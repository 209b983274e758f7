"""LPIPS and CLIP score, of networks whose weights the user gives; nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..storing.pictures import rgb
from .features import state_dict
from .metrics import missing

_TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # layers behind which LPIPS compares
_FIRST = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}  # shape of the first weight
# Mean and deviation that LPIPS gives pictures in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018), version 0.1.

        d = Σ_l mean_hw Σ_c w_lc (f_lc(x) − f_lc(y))²

    where f_l is the l-th map of the backbone, of length 1 at every place.

    Args:
        backbone: weights of torchvision's alexnet or vgg16 (.pth); which of them, their shapes say.
        heads: w (.pth, with lin0.model.1.weight, ...); None takes those that torchmetrics brings.

    Raises:
        ValueError: weights of something else, or torchmetrics is missing.
        OSError: there is no such file.
    """

    def __init__(self, backbone: str | Path, heads: str | Path | None = None) -> None:
        super().__init__()
        weights = state_dict(backbone)
        first = tuple(weights.get("features.0.weight", torch.empty(0)).shape)
        if first not in _FIRST:
            raise ValueError(
                f"{backbone}: expected weights of torchvision's alexnet or vgg16, got "
                f"features.0.weight of shape {first}"
            )
        self.kind = _FIRST[first]
        self.layers = nn.Sequential(*_layers(self.kind))
        start = "features."
        own = {name[len(start) :]: one for name, one in weights.items() if name.startswith(start)}
        _load(self.layers, own, backbone)
        path = _own_heads(self.kind) if heads is None else Path(heads)
        found = state_dict(path)
        self.heads = nn.ParameterList()
        for place, tap in enumerate(_TAPS[self.kind]):
            head = found.get(f"lin{place}.model.1.weight", torch.empty(0)).float().flatten()
            channels = self._channels(tap)
            if head.shape != (channels,):
                raise ValueError(
                    f"{path}: expected lin{place}.model.1.weight with {channels} numbers for "
                    f"{self.kind}, got {len(head)}"
                )
            self.heads.append(nn.Parameter(head))
        self.requires_grad_(False).eval()

    def _channels(self, tap: int) -> int:
        layer = self.layers[tap - 1]
        assert isinstance(layer, nn.Conv2d)
        return layer.out_channels

    @torch.no_grad()
    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """(B,) distances of pictures (B, 1 or 3, H, W) in [0, 1]."""
        both = [self._maps(rgb(x)) for x in (images, references)]
        total = torch.zeros(len(images))
        for head, one, other in zip(self.heads, *both, strict=True):
            apart = (one - other).square()
            total = total + torch.einsum("bchw,c->bhw", apart, head).mean((1, 2)).cpu()
        return total

    def _maps(self, images: Tensor) -> Iterator[Tensor]:
        weight = self.heads[0]
        x = images.to(weight)
        shift, scale = (x.new_tensor(one).view(1, 3, 1, 1) for one in (_SHIFT, _SCALE))
        x = (2 * x - 1 - shift) / scale
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if place in _TAPS[self.kind]:
                yield x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()


def _layers(kind: str) -> Iterator[nn.Module]:
    """The convolutional part of the backbone, up to the last ReLU."""
    if kind == "alex":
        yield from (nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2))
        yield from (nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2))
        for before, after in ((192, 384), (384, 256), (256, 256)):
            yield from (nn.Conv2d(before, after, 3, padding=1), nn.ReLU())
        return
    before = 3
    for after, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if before != 3:
            yield nn.MaxPool2d(2, 2)
        for _ in range(depth):
            yield from (nn.Conv2d(before, after, 3, padding=1), nn.ReLU())
            before = after


def _load(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


def _own_heads(kind: str) -> Path:
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise missing("torchmetrics", "brings the heads of LPIPS")
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{kind}.pth"


class ClipScore:
    """max(100 · cos(image, text), 0) of CLIP's embeddings (Hessel et al. 2021).

    Args:
        folder: a CLIP model of transformers, with its tokenizer and processor.
        device: where it runs.

    Raises:
        ValueError: transformers is missing, or it does not take what lies there for CLIP.
        OSError: there is no such folder.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        try:
            import transformers
        except ImportError as error:
            raise missing(error.name or "transformers", "loads CLIP") from None
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        library: Any = transformers  # its types say less than its classes do
        self._model = library.CLIPModel.from_pretrained(str(folder)).to(device).eval()
        self._tokenizer = library.CLIPTokenizer.from_pretrained(str(folder))
        self._processor = library.CLIPImageProcessor.from_pretrained(str(folder))
        self._device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) scores of pictures (B, 1 or 3, H, W) in [0, 1] and their prompts.

        Prompts are cut where they are longer than the model reads.
        """
        if len(images) != len(prompts):
            raise ValueError(f"prompts: expected one for each of {len(images)}, got {len(prompts)}")
        pictures = [(one * 255).round().to(torch.uint8) for one in rgb(images.clamp(0, 1))]
        seen = self._processor(images=pictures, return_tensors="pt")["pixel_values"]
        length = self._model.config.text_config.max_position_embeddings
        read = self._tokenizer(
            list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=length
        )
        image = _embedding(self._model.get_image_features(seen.to(self._device)))
        text = _embedding(
            self._model.get_text_features(
                read["input_ids"].to(self._device), read["attention_mask"].to(self._device)
            )
        )
        return (100 * torch.cosine_similarity(image, text)).clamp(min=0).cpu()


def _embedding(found: Any) -> Tensor:
    """transformers 5 returns the outputs around it."""
    embedding = found if isinstance(found, Tensor) else found.pooler_output
    assert isinstance(embedding, Tensor)
    return embedding.float()
