"""What samples are compared with as a set: real pictures, or statistics of them in a file."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .features import Extractor, Features
from .metrics import Statistics, frechet, inception_score, precision_recall

SET_METRICS = ("fid", "sfid", "precision", "recall", "is")


@dataclass(frozen=True)
class Reference:
    """The real set.

    Attributes:
        name: where it is from.
        pool, spatial: statistics, for FID and sFID; None where they are not known.
        points: (M, D) pooled features, for precision and recall; None likewise.
    """

    name: str
    pool: Statistics | None = None
    spatial: Statistics | None = None
    points: Tensor | None = None

    @classmethod
    def of(cls, name: str, features: Features) -> Reference:
        """Of the features of real pictures."""
        spatial = None if features.spatial is None else Statistics.of(features.spatial)
        return cls(name, Statistics.of(features.pool), spatial, features.pool)

    def compare(self, features: Features) -> dict[str, float]:
        """SET_METRICS of samples, those that are known: distances to, and overlap with, this set.

        Raises:
            ValueError: features of another width than the reference's, or too few samples.
        """
        found: dict[str, float] = {}
        if self.pool is not None:
            found["fid"] = frechet(Statistics.of(features.pool), self.pool)
        if self.spatial is not None and features.spatial is not None:
            found["sfid"] = frechet(Statistics.of(features.spatial), self.spatial)
        if self.points is not None:
            found["precision"], found["recall"] = precision_recall(self.points, features.pool)
        if features.logits is not None:
            found["is"] = inception_score(features.logits)
        return found


def read(path: str | Path, extractor: Extractor, *, batch: int = 64) -> Reference:
    """The reference of an .npz file as the usual evaluators have it.

    It holds mu and sigma, which are pooled statistics (pytorch-fid, EDM), with mu_s and sigma_s for
    spatial ones (ADM); or pictures in arr_0, uint8 (N, H, W, C), as ADM's batches of samples; or
    both (its VIRTUAL_imagenet256_labeled.npz), where the statistics go before those of the
    pictures, and the pictures serve precision and recall.

    Raises:
        ValueError: no .npz file, nothing of the above in it, or statistics of other features.
        OSError: it cannot be read.
    """
    if not zipfile.is_zipfile(path):
        open(path, "rb").close()  # says so if it is not there
        raise ValueError(f"{path}: expected an .npz file")
    try:
        with np.load(path, allow_pickle=False) as held:
            wanted = ("mu", "sigma", "mu_s", "sigma_s", "arr_0")
            arrays = {name: held[name] for name in wanted if name in held}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: expected an .npz file: {error}") from None
    try:
        pool, spatial = _statistics(arrays, "mu", "sigma"), _statistics(arrays, "mu_s", "sigma_s")
        points = None
        if "arr_0" in arrays:
            seen = extractor.of(_pictures(arrays["arr_0"]), batch=batch)
            points = seen.pool
            pool = pool or Statistics.of(seen.pool)
            if spatial is None and seen.spatial is not None:
                spatial = Statistics.of(seen.spatial)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if pool is None:
        raise ValueError(f"{path}: expected mu and sigma, or arr_0, got neither")
    return Reference(Path(path).name, pool, spatial, points)


def _statistics(arrays: Mapping[str, Any], mu: str, sigma: str) -> Statistics | None:
    if mu not in arrays or sigma not in arrays:
        return None
    return Statistics(
        *(torch.from_numpy(np.asarray(arrays[one], np.float64)) for one in (mu, sigma))
    )


def _pictures(array: Any) -> Tensor:
    """uint8 (N, H, W, C) as (N, C, H, W)."""
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(
            f"arr_0: expected pictures (N, H, W, C) in uint8, got a shape of {array.shape} in "
            f"{array.dtype}"
        )
    return torch.from_numpy(array).permute(0, 3, 1, 2)
