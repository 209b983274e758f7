"""Runs of settings on samples: how near they come to the untouched ones, and what they cost."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...config import ToCaConfig
from ...session import Session
from ..evaluation import metrics
from ..evaluation.generation import sampling_with
from ..evaluation.quality import frames
from ..evaluation.settings import Setting, fingerprint
from ..sampling.sampler import Request, Sampler
from .cost import CostTable
from .state import State

_MOST = 150.0  # dB: of samples that are equal, whose PSNR is infinite
_WINDOW = 11  # pixels that SSIM needs


@dataclass(frozen=True)
class Score:
    """What samples of one setting are worth.

    Attributes:
        cost: of the run over that of the untouched model, by the table and as the run went.
        flops: the same in FLOPs.
        psnr, ssim: to the untouched samples, one for each; no ssim of small pictures.
    """

    cost: float
    flops: float
    psnr: tuple[float, ...]
    ssim: tuple[float, ...] = ()

    @property
    def mean_psnr(self) -> float:
        return statistics.fmean(self.psnr)

    @property
    def mean_ssim(self) -> float | None:
        return statistics.fmean(self.ssim) if self.ssim else None

    @classmethod
    def joined(cls, parts: Sequence[Score]) -> Score:
        """Of more samples."""
        sizes = [len(part.psnr) for part in parts]

        def mean(values: Sequence[float]) -> float:
            return sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)

        return cls(
            mean([part.cost for part in parts]),
            mean([part.flops for part in parts]),
            tuple(one for part in parts for one in part.psnr),
            tuple(one for part in parts for one in part.ssim),
        )


class Trials:
    """Runs settings on parts of the samples, each once: what the state holds is not run again.

    Args:
        sampler, seed, steps, batch: how samples are drawn.
        parts: {name: requests}; all settings are run on the same ones.
        table: what runs cost.
        state: where the results are kept.
    """

    def __init__(
        self,
        sampler: Sampler,
        parts: Mapping[str, Sequence[Request]],
        table: CostTable,
        state: State,
        *,
        seed: int,
        steps: int,
        batch: int,
    ) -> None:
        self._sampler, self._parts, self._table, self._state = sampler, dict(parts), table, state
        self._seed, self._steps, self._batch = seed, steps, batch
        self._mark = fingerprint(**table.to_dict())
        self._untouched: dict[str, Tensor] = {}

    def requests(self, part: str) -> Sequence[Request]:
        """The samples of a part."""
        return self._parts[part]

    def run(self, config: ToCaConfig, part: str) -> Score:
        """The score of a setting on one part."""
        setting = Setting("", "", config, self._steps)
        key = f"{setting.fingerprint()} {part}"
        held = self._state.trials.get(key)
        if held is None or held["table"] != self._mark:
            held = {"table": self._mark, **self._run(setting, part)}
            self._state.keep(key, held)
        return Score(held["cost"], held["flops"], tuple(held["psnr"]), tuple(held["ssim"]))

    def _run(self, setting: Setting, part: str) -> dict[str, Any]:
        base = self._base(part)
        assert setting.config is not None
        images, done, full, cost = [], 0.0, 0.0, 0.0
        with sampling_with(self._sampler, setting) as session, torch.no_grad():
            assert session is not None
            for requests in self._batches(part):
                session.reset()
                images.append(self._sample(requests))
                summary = session.summary()
                done, full = done + summary.flops_done, full + summary.flops_full
                cost += len(requests) * self._cost(session, setting.config)
        made, flops = torch.cat(images), done / full
        return {
            "config": setting.config.to_dict(),
            "cost": flops if self._table.unit == "FLOPs" else cost / len(made),
            "flops": flops,
            "psnr": [_number(one) for one in metrics.psnr(made, base).tolist()],
            "ssim": self._ssim(made, base),
        }

    def _ssim(self, made: Tensor, base: Tensor) -> list[float]:
        """One for each sample: of a video the mean of its frames."""
        if min(made.shape[-2:]) < _WINDOW or importlib.util.find_spec("torchmetrics") is None:
            return []
        finite = made.nan_to_num(0.0, 0.0, 0.0)
        each = metrics.ssim(frames(finite), frames(base))
        return [float(one) for one in each.view(len(made), -1).mean(dim=1)]

    def _base(self, part: str) -> Tensor:
        if part not in self._untouched:
            with torch.no_grad():
                drawn = [self._sample(requests) for requests in self._batches(part)]
            self._untouched[part] = torch.cat(drawn)
        return self._untouched[part]

    def _batches(self, part: str) -> list[Sequence[Request]]:
        requests = self._parts[part]
        return [requests[at : at + self._batch] for at in range(0, len(requests), self._batch)]

    def _sample(self, requests: Sequence[Request]) -> Tensor:
        found = self._sampler.sample(requests, seed=self._seed, steps=self._steps)
        if found.ndim not in (4, 5) or len(found) != len(requests):
            raise ValueError(
                f"sampler: expected {len(requests)} pictures (B, C, H, W) or videos "
                f"(B, F, C, H, W), got a shape of {tuple(found.shape)}"
            )
        return found.float()

    def _cost(self, session: Session, config: ToCaConfig) -> float:
        """Of the run that is over, by the table, over that of the untouched run.

        The table counts both of two guidance calls together: each is half a step.
        """
        total = self._table.outside
        for one in (session, *session.others):
            branches = [b for b in one._run.branches.values() if b.done.seconds]
            for branch in branches:
                steps = self._table.steps(branch.done.plan(), config)
                total += float(steps.sum()) / len(branches)
        return total / self._table.untouched_run(self._steps)


def _number(psnr: float) -> float:
    """Within what JSON and a mean can hold; samples that are no numbers are as bad as can be."""
    return -_MOST if math.isnan(psnr) else max(-_MOST, min(_MOST, psnr))
