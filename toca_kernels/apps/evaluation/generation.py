"""The samples of every setting, from the same noise and conditions; stored, so that a run that was
broken off goes on where it was."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...session import Session, enabled
from ..measuring.shapes import DTYPES
from ..sampling import loading
from ..sampling.sampler import Request, Sampler
from ..storing import arrays
from .settings import Setting

COUNTED = ("flops_full", "flops_done", "nan_scores")
_POLL = 0.2  # seconds between looks at what the workers have done


@dataclass(frozen=True)
class Source:
    """Where a sampler is from: enough for another process to load it too."""

    target: str
    device: str
    dtype: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def asked(cls, args: argparse.Namespace) -> Source:
        """What a command line asks for: its target, device, dtype and arguments (JSON)."""
        try:
            arguments = dict(json.loads(args.arguments))
        except (TypeError, ValueError):
            raise ValueError(f"arguments: expected a JSON object, got {args.arguments!r}") from None
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = torch.device(device).type
        dtype = args.dtype or ("float32" if kind == "cpu" else "bfloat16")
        return cls(args.target, device, dtype, arguments)

    def load(self) -> Sampler:
        return loading.load(
            self.target,
            device=torch.device(self.device),
            dtype=DTYPES[self.dtype],
            arguments=self.arguments,
        )


@dataclass(frozen=True)
class Job:
    """The samples of one setting and seed.

    Attributes:
        setting, seed: how they are drawn.
        requests: what is drawn.
        batch: how many at a time.
        fingerprint: of all that they depend on.
        path: the file they go to.
    """

    setting: Setting
    seed: int
    requests: tuple[Request, ...]
    batch: int
    fingerprint: str
    path: Path

    def is_done(self) -> bool:
        """Whether the samples are stored, whole."""
        return arrays.read(self.path, self.fingerprint) is not None

    def pictures(self) -> Tensor:
        """The samples (B, C, H, W) or (B, F, C, H, W), float16.

        Raises:
            RuntimeError: they are not stored.
        """
        return torch.from_numpy(self._read("images")["images"])

    def counted(self) -> dict[str, float]:
        """What the session counted while it drew them, summed over batches.

        Raises:
            RuntimeError: they are not stored.
        """
        return {name: float(value) for name, value in self._read(*COUNTED).items()}

    def _read(self, *names: str) -> arrays.Arrays:
        held = arrays.read(self.path, self.fingerprint, names)
        if held is None:
            raise RuntimeError(f"{self.path}: expected samples of {self.setting.name}, got none")
        return held


def jobs(
    settings: Sequence[Setting],
    source: Source,
    sampler: Sampler,
    *,
    conditions: Sequence[int | str],
    samples: int,
    seeds: Sequence[int],
    batch: int,
    folder: Path,
) -> list[Job]:
    """Those of every seed and setting, the first seed's before the next one's.

    The sample with number i, counted through all seeds, shows condition i mod their number.
    """
    weights = weights_mark(sampler.target)
    found = []
    for place, seed in enumerate(seeds):
        numbers = range(place * samples, (place + 1) * samples)
        requests = tuple(Request(i, conditions[i % len(conditions)]) for i in numbers)
        about = {
            "target": Path(source.target).name,
            "weights": weights,
            "arguments": dict(source.arguments),
            "device": torch.device(source.device).type,
            "dtype": source.dtype,
            "seed": seed,
            "batch": batch,
            "requests": [(request.index, request.condition) for request in requests],
        }
        if Path(source.target).is_file():
            about["file"] = hashlib.sha256(Path(source.target).read_bytes()).hexdigest()
        for setting in settings:
            mark = setting.fingerprint(**about)
            path = folder / f"{mark}.npz"
            found.append(Job(setting, seed, requests, batch, mark, path))
    return found


def weights_mark(target: Any) -> str:
    """A hash of some numbers of every parameter: other weights have another."""
    parts = [getattr(target, name, None) for name in ("transformer", "transformer_2")]
    models = [target] if isinstance(target, nn.Module) else parts
    found = hashlib.sha256()
    for model in models:
        if isinstance(model, nn.Module):
            for name, weight in model.named_parameters():
                some = weight.detach().flatten()[:64].float().cpu().numpy()
                found.update(f"{name} {tuple(weight.shape)}".encode() + some.tobytes())
    return found.hexdigest()[:16]


# --- drawing -------------------------------------------------------------------------------------


@contextlib.contextmanager
def sampling_with(sampler: Sampler, setting: Setting) -> Iterator[Session | None]:
    """The sampler's model as a setting wants it; None where it is untouched."""
    if setting.config is None:
        yield None
        return
    steps = setting.steps
    with enabled(
        sampler.target, setting.config, num_steps=steps, timesteps=sampler.timesteps(steps)
    ) as session:
        yield session


def check(sampler: Sampler, settings: Sequence[Setting]) -> None:
    """Refuse settings that do not fit the model, before any of them is drawn.

    Raises:
        ValueError: the first that does not; the message names it.
    """
    for setting in settings:
        try:
            with sampling_with(sampler, setting):
                pass
        except ValueError as error:
            raise ValueError(f"{setting.name}: {error}") from None


def draw(sampler: Sampler, job: Job, progress: Callable[[int], object]) -> None:
    """Draw the samples of a job and store them.

    Raises:
        ValueError: settings that do not fit the model, or a sampler that returns something else
            than pictures.
    """
    images, counted = [], dict.fromkeys(COUNTED, 0.0)
    with sampling_with(sampler, job.setting) as session:
        for start in range(0, len(job.requests), job.batch):
            requests = job.requests[start : start + job.batch]
            if session is not None:
                session.reset()
            with torch.no_grad():
                found = sampler.sample(requests, seed=job.seed, steps=job.setting.steps)
            if found.ndim not in (4, 5) or len(found) != len(requests):
                raise ValueError(
                    f"sampler: expected {len(requests)} pictures (B, C, H, W) or videos "
                    f"(B, F, C, H, W), got a shape of {tuple(found.shape)}"
                )
            if not bool(torch.isfinite(found).all()):
                raise ValueError(
                    f"{job.setting.name}: expected pictures of finite numbers, got some that are "
                    "not; try bfloat16 or float32, or leave this setting out"
                )
            images.append(found.detach().cpu().half().numpy())
            if session is not None:
                summary = session.summary()
                for name in COUNTED:
                    counted[name] += getattr(summary, name)
            progress(len(requests))
    arrays.save(job.path, job.fingerprint, {"images": np.concatenate(images), **counted})


def generate(
    todo: Sequence[Job],
    source: Source,
    sampler: Sampler,
    *,
    workers: int,
    threads: int | None,
    progress: Callable[[int], object],
) -> None:
    """Draw and store the samples of all jobs.

    Args:
        todo: the jobs.
        source: of the sampler, for workers of their own.
        sampler: the one of this process, which draws if there is one worker.
        workers: processes at work.
        threads: of each; None shares this process's.
        progress: is told of every batch how many samples it had.
    """
    if workers == 1 or len(todo) < 2:
        with _threads(threads):
            for job in todo:
                draw(sampler, job, progress)
        return
    each = threads or max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")  # threads do not survive a fork
    told = context.Queue()
    with ProcessPoolExecutor(
        min(workers, len(todo)), context, _start_worker, (source, each, told)
    ) as pool:
        waiting: set[Future[None]] = {pool.submit(_work, job) for job in todo}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
                for count in _drained(told):
                    progress(count)
                for one in done:
                    one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _drained(queue: Any) -> Iterable[int]:
    while not queue.empty():
        yield queue.get()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# What a worker process holds between its jobs.
_worker: dict[str, Any] = {}


def _start_worker(source: Source, threads: int, told: Any) -> None:
    torch.set_num_threads(threads)
    _worker.update(sampler=source.load(), told=told)


def _work(job: Job) -> None:
    draw(_worker["sampler"], job, _worker["told"].put)
