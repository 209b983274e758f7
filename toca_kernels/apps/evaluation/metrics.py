"""Quality in numbers: of pictures against pictures, and of a set of pictures against a set.

Pictures are (B, C, H, W) in [0, 1].  Sets are known by their features (B, D), which a network makes
(features.py); nothing here knows which.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

_EXTRA = "pip install 'toca_kernels[eval]'"
_ROWS = 1024  # of a distance matrix at a time


def missing(package: str, purpose: str) -> ValueError:
    """What to raise where an optional package is not installed."""
    return ValueError(f"{package} is missing, which {purpose}: {_EXTRA}")


# --- pairs of pictures ---------------------------------------------------------------------------


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio 10 log10(1 / mean squared error) in dB; inf where equal.

    Raises:
        ValueError: shapes that differ.
    """
    _same_shape(images, references)
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return -10 * error.log10()


def relative_l2(images: Tensor, references: Tensor) -> Tensor:
    """(B,) ‖image − reference‖₂ / ‖reference‖₂.

    Raises:
        ValueError: shapes that differ.
    """
    _same_shape(images, references)
    wanted = references.double().flatten(1)
    off = (images.double().flatten(1) - wanted).norm(dim=1)
    return off / wanted.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """(B,) structural similarity (Wang et al. 2004; 11×11 Gaussian window of σ = 1.5).

    Raises:
        ValueError: shapes that differ, pictures smaller than the window, or no torchmetrics.
    """
    _same_shape(images, references)
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"ssim: expected at least 11×11 pixels, got {tuple(images.shape[-2:])}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other optional packages of its own
            from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise missing(error.name or "torchmetrics", "computes SSIM") from None
    found = structural_similarity_index_measure(
        images.float(), references.float(), data_range=1.0, reduction="none"
    )
    assert isinstance(found, Tensor)
    return found.reshape(len(images))


def _same_shape(images: Tensor, references: Tensor) -> None:
    if images.shape != references.shape:
        raise ValueError(
            f"images: expected the shape of their references, {tuple(references.shape)}, got "
            f"{tuple(images.shape)}"
        )


# --- sets of pictures ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mu: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        D = self.mu.numel()
        if self.mu.shape != (D,) or self.sigma.shape != (D, D):
            raise ValueError(
                "statistics: expected a mean (D,) and a covariance (D, D), got "
                f"{tuple(self.mu.shape)} and {tuple(self.sigma.shape)}"
            )

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Of features (B, D); the covariance is divided by B − 1, as NumPy's is.

        Raises:
            ValueError: fewer than two rows, or numbers that are not finite.
        """
        _matrix("features", features, rows=2)
        x = features.double()
        mu = x.mean(0)
        x = x - mu
        return cls(mu, x.T @ x / (len(x) - 1))


def frechet(one: Statistics, other: Statistics) -> float:
    """Fréchet distance of two Gaussians: ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½).

    Of pooled Inception features this is FID (Heusel et al. 2017), of spatial ones sFID (Nash et al.
    2021).  The root's trace is that of (Σ₁^½ Σ₂ Σ₁^½)^½, whose eigenvalues are real and not
    negative, also where a covariance is singular because D exceeds the number of samples.

    Raises:
        ValueError: features of different widths, or numbers that are not finite.
    """
    if one.mu.shape != other.mu.shape:
        raise ValueError(
            f"statistics: expected features of the same width, got {len(one.mu)} and "
            f"{len(other.mu)}; are they of the same network?"
        )
    numbers = (one.mu, one.sigma, other.mu, other.sigma)
    if not all(bool(torch.isfinite(part).all()) for part in numbers):
        raise ValueError("statistics: expected finite numbers, got some that are not")
    mu1, s1, mu2, s2 = (part.double() for part in numbers)
    values, vectors = torch.linalg.eigh((s1 + s1.T) / 2)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ s2 @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * shared
    return max(float(distance), 0.0)  # rounding


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Each set stands for the union of the balls round its points that reach to their k-th nearest
    neighbour in it.  Precision is the share of fake points inside the real set's union, recall the
    share of real points inside the fake set's.

    Args:
        real: (M, D) features.
        fake: (N, D) features.
        k: the neighbour, the point itself not counted.

    Raises:
        ValueError: fewer than k + 1 points, different widths, or numbers that are not finite.
    """
    for name, features in (("real", real), ("fake", fake)):
        _matrix(name, features, rows=k + 1)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features: expected sets of the same width, got {real.shape[1]} and {fake.shape[1]}"
        )
    # float64: distances come from a product, which loses half of the digits of near points.
    real, fake = real.double(), fake.double()
    return (
        _covered(fake, real, _radii(real, k)),
        _covered(real, fake, _radii(fake, k)),
    )


def _radii(points: Tensor, k: int) -> Tensor:
    found = []
    for start in range(0, len(points), _ROWS):
        distances = torch.cdist(points[start : start + _ROWS], points)
        rows = torch.arange(len(distances))
        distances[rows, start + rows] = 0.0  # the point itself, exactly
        found.append(distances.kthvalue(k + 1, dim=1).values)
    return torch.cat(found)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of the points that lie in some ball."""
    inside = [
        (torch.cdist(points[start : start + _ROWS], centres) <= radii).any(dim=1)
        for start in range(0, len(points), _ROWS)
    ]
    return float(torch.cat(inside).double().mean())


def inception_score(logits: Tensor, *, split: int = 5000) -> float:
    """exp(mean KL(p(y|x) ‖ p(y))) of a classifier's logits (B, classes) (Salimans et al. 2016).

    The mean over runs of `split` samples in their order, as the usual ImageNet evaluator takes it.

    Raises:
        ValueError: no rows, or numbers that are not finite.
    """
    _matrix("logits", logits, rows=1)
    scores = []
    for part in logits.double().split(split):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - torch.tensor(len(part)).double().log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def _matrix(name: str, features: Tensor, *, rows: int) -> None:
    if features.ndim != 2 or len(features) < rows:
        raise ValueError(
            f"{name}: expected at least {rows} rows of features (B, D), got a shape of "
            f"{tuple(features.shape)}"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{name}: expected finite numbers, got some that are not")
