"""The network whose features stand for pictures: of FID, sFID, precision, recall, inception score.

It is given by its file:

    FILE.py     a function features() that returns a function of pictures (B, C, H, W) in [0, 1],
                which returns features (B, D), or a mapping with some of the fields of `Features`;
                a function reference() may return real pictures (N, C, H, W) in [0, 1]
    FILE.pt     TorchScript, of the same pictures; returns (B, D), or (pool, spatial, logits).  One
                whose forward knows return_features, as the Inception of NVIDIA's evaluators does,
                gets pictures of 0 to 255
    FILE.pth    weights of torch-fidelity's Inception v3 (weights-inception-2015-12-05-*.pth), the
                network that published FIDs of ImageNet and COCO are of
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sampling import python_file
from ..storing.pictures import rgb
from .metrics import missing

_ADM_CHANNELS = 7  # of the feature map that sFID is taken of: 17 · 17 · 7 = 2023 numbers


class Features(NamedTuple):
    """What a network says of pictures.

    Attributes:
        pool: (B, D), of FID, precision and recall.
        spatial: (B, D'), of sFID: some channels of a map in the middle, not averaged over places.
        logits: (B, classes), of the inception score.
        classes: (B,), the class that a picture is read as, in the numbers that samples are drawn
            by; their accuracy is reported.
    """

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None
    classes: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A network, and real pictures if it brings some.

    Attributes:
        name: of its file.
        fingerprint: of what the file holds.
        extract: pictures (B, C, H, W) in [0, 1] to features.
        reference: makes real pictures; None where the file has none.
    """

    name: str
    fingerprint: str
    extract: Callable[[Tensor], Features]
    reference: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def of(self, images: Tensor, *, batch: int = 64) -> Features:
        """Features of any number of pictures, in [0, 1] or uint8; on the CPU in float32.

        Raises:
            ValueError: the network returns something else than features of these pictures.
        """
        if not len(images):
            raise ValueError("features: expected some pictures, got none")
        parts = [self._part(part) for part in images.split(batch)]

        def joined(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if any(value is None for value in values) else torch.cat(values)

        pool = torch.cat([part.pool for part in parts])
        return Features(pool, joined("spatial"), joined("logits"), joined("classes"))

    def _part(self, images: Tensor) -> Features:
        whole = images.dtype == torch.uint8
        found = self.extract(images.float() / 255 if whole else images.float())
        for name, value in found._asdict().items():
            shape = (len(images),) if name == "classes" else (len(images), -1)
            if value is not None and (len(value) != len(images) or value.ndim != len(shape)):
                raise ValueError(
                    f"{self.name}: expected {name} of {len(images)} pictures, got a shape of "
                    f"{tuple(value.shape)}"
                )
        spatial, logits = (
            None if one is None else one.float().cpu() for one in (found.spatial, found.logits)
        )
        classes = None if found.classes is None else found.classes.cpu()
        return Features(found.pool.float().cpu(), spatial, logits, classes)


def load(path: str | Path, device: torch.device | str = "cpu") -> Extractor:
    """The network of a file.

    Raises:
        ValueError: a file that is not what its ending says, or an optional package is missing.
        OSError: there is no such file.
    """
    path, device = Path(path), torch.device(device)
    kinds = {".py": _of_python, ".pt": _of_torchscript, ".pth": _of_inception}
    if path.suffix not in kinds:
        raise ValueError(f"features: expected a file that ends in {', '.join(kinds)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    extract, reference = kinds[path.suffix](path, device)
    return Extractor(path.name, file_hash(path), extract, reference)


def file_hash(path: str | Path) -> str:
    """Of what a file holds."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()[:16]


Loaded = tuple[Callable[[Tensor], Features], Callable[[], Tensor] | None]


def _of_python(path: Path, device: torch.device) -> Loaded:
    module = python_file.module(path)
    make = getattr(module, "features", None)
    if not callable(make):
        raise ValueError(f"{path}: expected a function features(), there is none")
    run = make()
    if not callable(run):
        raise ValueError(
            f"{path}: expected features() to return a function, got {type(run).__name__}"
        )
    return lambda images: _features(path.name, run(images)), getattr(module, "reference", None)


def _features(name: str, found: Any) -> Features:
    if isinstance(found, Tensor):
        return Features(found)
    try:
        made = Features(**found) if isinstance(found, Mapping) else Features(*found)
    except TypeError:
        made = None
    if made is None or not isinstance(made.pool, Tensor):
        raise ValueError(
            f"{name}: expected a tensor, or one for each of some of {', '.join(Features._fields)}, "
            f"got {type(found).__name__}"
        )
    return made


# --- networks in files of weights ----------------------------------------------------------------


def _of_torchscript(path: Path, device: torch.device) -> Loaded:
    try:
        network: Any = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{path}: expected TorchScript: {_brief(error)}") from None
    known = {argument.name for argument in network.forward.schema.arguments}

    def extract(images: Tensor) -> Features:
        images = images.to(device)
        if "return_features" in known:
            return _features(path.name, network(_bytes(images).float(), return_features=True))
        return _features(path.name, network(images))

    return extract, None


def _of_inception(path: Path, device: torch.device) -> Loaded:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        package = error.name or "torch_fidelity"
        raise missing(package, "has the Inception that FID is defined by") from None
    names = ["2048", "logits_unbiased"]
    state_dict(path)  # torch-fidelity would execute what is in it
    try:
        network = FeatureExtractorInceptionV3(
            "inception", names, feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:
        raise ValueError(
            f"{path}: expected weights of torch-fidelity's Inception v3: {_brief(error)}"
        ) from None
    network = network.to(device).eval()
    maps: list[Tensor] = []
    # "mixed_6/conv" of the evaluator of ADM, which defined sFID's numbers.
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *given: maps.append(given[-1]))

    def extract(images: Tensor) -> Features:
        maps.clear()
        pool, logits = network(_bytes(rgb(images.to(device))))
        # That evaluator keeps channels last.
        spatial = maps.pop()[:, :_ADM_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(pool, spatial, logits)

    return extract, None


def state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights of a checkpoint; nothing in it is executed.

    Raises:
        ValueError: it is none.
        OSError: there is no such file.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what is not a checkpoint fails in many ways
        raise ValueError(f"{path}: expected a checkpoint: {_brief(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a state dict, got {type(found).__name__}")
    return found


def _brief(error: Exception) -> str:
    """The first of the lines that torch writes."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _bytes(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)
