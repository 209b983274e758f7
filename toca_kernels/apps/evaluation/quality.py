"""What the samples of a setting are worth: measured once, stored, then gathered into a row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..storing import arrays
from . import metrics
from .features import Extractor, Features
from .generation import Job
from .perceptual import ClipScore, Lpips
from .references import SET_METRICS, Reference
from .rounds import Times
from .settings import Setting, fingerprint

PAIR_METRICS = ("psnr", "ssim", "rel_l2", "lpips")  # against the untouched samples
# Higher is better in the other ones.
LOWER_IS_BETTER = ("rel_l2", "lpips", "fid", "sfid")
_MEANS = (*PAIR_METRICS, "clip", "accuracy", *SET_METRICS)

COLUMNS = (
    "name",
    "policy",
    "steps",
    "seeds",
    "samples",
    *(f"{name}{end}" for name in (*PAIR_METRICS, "clip", "accuracy") for end in ("", "_std")),
    *(f"{name}{end}" for name in SET_METRICS for end in ("", "_std", "_all")),
    "tflops",
    "flops_ratio",
    "seconds",
    "speedup",
    "speedup_slowest",
    "speedup_fastest",
    "rounds",
    "efficiency",
    "nan_scores",
)


@dataclass(frozen=True)
class Judges:
    """What samples are looked at with; None where something is not wanted.

    Attributes:
        extractor, reference: of the metrics of sets; the reference needs the extractor.
        lpips, clip: the networks; `files` are fingerprints of theirs.
    """

    extractor: Extractor | None = None
    reference: Reference | None = None
    lpips: Lpips | None = None
    clip: ClipScore | None = None
    files: str = ""

    @property
    def mark(self) -> str:
        extractor = None if self.extractor is None else self.extractor.fingerprint
        return fingerprint(extractor=extractor, files=self.files)


Measured = dict[str, Tensor]


def measure(job: Job, base: Job, judges: Judges, *, batch: int, folder: Path) -> Measured:
    """All that is known of each sample of a job, from its file if it was measured before.

    Args:
        job, base: of a setting, and of the untouched model with the same seed; both stored.
        judges: what to look with.
        batch: pictures at a time.
        folder: of the files.

    Raises:
        RuntimeError: samples that are not stored, or no longer.
    """
    mark = fingerprint(samples=job.fingerprint, base=base.fingerprint, judges=judges.mark)
    path = folder / f"{mark}.npz"
    held = arrays.read(path, mark)
    if held is None:
        found = _measured(job, base, judges, batch)
        arrays.save(path, mark, {name: value.numpy() for name, value in found.items()})
        return found
    return {name: torch.from_numpy(np.asarray(value)) for name, value in held.items()}


def _measured(job: Job, base: Job, judges: Judges, batch: int) -> Measured:
    images, wanted = (frames(one.pictures()) for one in (job, base))
    parts = list(zip(images.split(batch), wanted.split(batch), strict=True))
    pairs = [(one.float(), other.float()) for one, other in parts]
    found = {
        "psnr": torch.cat([metrics.psnr(*pair) for pair in pairs]),
        "ssim": torch.cat([metrics.ssim(*pair) for pair in pairs]),
        "rel_l2": torch.cat([metrics.relative_l2(*pair) for pair in pairs]),
    }
    if judges.lpips is not None:
        found["lpips"] = torch.cat([judges.lpips(*pair) for pair in pairs])
    conditions = _conditions(job, len(images))
    if judges.clip is not None and all(isinstance(one, str) for one in conditions):
        prompts = [str(one) for one in conditions]
        found["clip"] = torch.cat(
            [
                judges.clip(pair[0], prompts[start : start + batch])
                for start, pair in zip(range(0, len(images), batch), pairs, strict=True)
            ]
        )
    if judges.extractor is not None:
        seen = judges.extractor.of(images, batch=batch)
        found |= {name: one for name, one in seen._asdict().items() if one is not None}
        if seen.classes is not None and all(isinstance(one, int) for one in conditions):
            labels = torch.tensor([int(one) for one in conditions])
            found["accuracy"] = (found.pop("classes") == labels).float()
    return found


def frames(images: Tensor) -> Tensor:
    """(B, C, H, W): videos (B, F, C, H, W) as pictures, frame by frame."""
    return images.flatten(0, 1) if images.ndim == 5 else images


def _conditions(job: Job, count: int) -> list[int | str]:
    """What each picture shows; the frames of a video show the same."""
    each = count // len(job.requests)
    return [request.condition for request in job.requests for _ in range(each)]


# --- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What is known of a setting: its samples by seed, what the session counted, its times."""

    setting: Setting
    measured: Sequence[Measured]
    counted: Sequence[Mapping[str, float]]
    times: Times | None
    samples: int


def rows(found: Sequence[Found], judges: Judges) -> list[dict[str, Any]]:
    """One row for each setting, with COLUMNS; None where something was not measured.

    Means and standard deviations are over the seeds: of the mean over a seed's samples, or of the
    metric of its set.  `_all` is the metric of all samples together, which is less biased.  The
    first of `found` is the untouched model.
    """
    base = found[0]
    costs = _flops(found)
    made = []
    for one, cost in zip(found, costs, strict=True):
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {"name": one.setting.name, "policy": one.setting.policy}
        row |= {"steps": one.setting.steps, "seeds": len(one.measured), "samples": one.samples}
        for name, values in _by_seed(one, judges).items():
            row[name] = statistics.fmean(values)
            if len(values) > 1 and all(map(math.isfinite, values)):
                row[f"{name}_std"] = statistics.stdev(values)
        for name, value in _of_set(_together(one.measured), judges).items():
            row[f"{name}_all"] = value
        row["flops_ratio"] = cost[1]
        row["tflops"] = None if cost[0] is None else cost[0] * 1e-12
        row["nan_scores"] = int(sum(seed["nan_scores"] for seed in one.counted))
        if one.times is not None:
            row |= {"seconds": one.times.seconds, "speedup": one.times.speedup}
            row |= {"speedup_slowest": one.times.slowest, "speedup_fastest": one.times.fastest}
            row["rounds"] = one.times.rounds
            if cost[1] is not None and one.setting != base.setting:
                row["efficiency"] = one.times.speedup / cost[1]
        made.append(row)
    return made


def _by_seed(one: Found, judges: Judges) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for measured in one.measured:
        seed = {name: float(measured[name].double().mean()) for name in _MEANS if name in measured}
        for name, value in {**seed, **_of_set(measured, judges)}.items():
            values.setdefault(name, []).append(value)
    return values


def _together(measured: Sequence[Measured]) -> Measured:
    return {name: torch.cat([one[name] for one in measured]) for name in measured[0]}


def _of_set(measured: Measured, judges: Judges) -> dict[str, float]:
    if "pool" not in measured:
        return {}
    seen = Features(measured["pool"], measured.get("spatial"), measured.get("logits"))
    return (judges.reference or Reference("none")).compare(seen)


def _flops(found: Sequence[Found]) -> list[tuple[float | None, float | None]]:
    """(FLOPs of a sample, ratio to the untouched model) of each setting.

    A session counts what its run would have cost in full: that, by the step, is the untouched
    model's cost, which no session counts.
    """
    base = found[0].setting
    full = None  # of a step and sample
    for one in found:
        total = sum(seed["flops_full"] for seed in one.counted)
        if total and full is None:
            full = total / one.samples / one.setting.steps
    costs: list[tuple[float | None, float | None]] = []
    for one in found:
        done = sum(seed["flops_done"] for seed in one.counted) / one.samples
        if one.setting.config is None:
            cost = None if full is None else full * one.setting.steps
            costs.append((cost, base.steps / one.setting.steps))
        elif full is None or not done:
            costs.append((None, None))
        else:
            costs.append((done, full * base.steps / done))
    return costs
