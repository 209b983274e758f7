"""Draw many samples into a folder, in one process or in several, and resume where it stopped.

    toca sample facebook/DiT-XL-2-256 --classes 0-999 --count 50000 --preset dit-ddim50 \\
        --batch-size 32 --format npz --out dit
    torchrun --nproc-per-node=6 -m toca_kernels sample … the same …
    toca sample PixArt-alpha/PixArt-XL-2-256x256 --prompts captions.json --out pixart
    toca sample DiT-XL-2-256x256.pt --checkout ~/DiT --classes 0-999 --count 50000 --out dit
    toca sample own.py --classes 0-9 --count 100 --out own

Sample i shows the condition i mod (number of conditions), and its noise comes from (--seed, i).
Batch b holds the samples from b·batch_size on, whoever draws it: the same settings end with the
same files, bit for bit, whatever the number of processes and however often the run was stopped.
Another batch size, device or number of CPU threads gives the same samples up to rounding.

A target in Python is a file that defines `sampler(*, device, dtype, **arguments)`; see
`toca_kernels.apps.sampling.Sampler`, and examples/digits/sampler.py for one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..config import ToCaConfig
from ..session import Session, enabled
from .drawing import files
from .drawing.batches import Drawer, Progress
from .drawing.world import World, world
from .measuring.shapes import DTYPES
from .sampling.loading import load
from .sampling.prompts import read_classes, read_prompts
from .sampling.sampler import LatentSampler, Request, Sampler
from .sampling.weights import fingerprint


@dataclass(frozen=True)
class Job:
    """A run: what is drawn, and how.

    Attributes:
        sampler: draws.
        conditions: classes or prompts, taken in turn.
        count: number of samples.
        config: settings of ToCa; None: the model is left as it is.
        steps, seed, batch_size, cuda_graph: as on the command line.
        device: of the model.
        folder, kind: where to, and one of `files.FORMATS`.
    """

    sampler: Sampler
    conditions: Sequence[int | str]
    count: int
    config: ToCaConfig | None
    steps: int
    seed: int
    batch_size: int
    cuda_graph: bool
    device: torch.device
    folder: Path
    kind: str

    @property
    def batches(self) -> int:
        return -(-self.count // self.batch_size)

    def batch(self, number: int) -> list[Request]:
        first = number * self.batch_size
        last = min(first + self.batch_size, self.count)
        return [Request(i, self.conditions[i % len(self.conditions)]) for i in range(first, last)]


# --- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", help="a pipeline (folder or name), a checkpoint of DiT, or a .py with sampler()"
    )
    shown = parser.add_mutually_exclusive_group(required=True)
    shown.add_argument("--classes", help='"0-9", "207,360", or a file of class numbers')
    shown.add_argument("--prompts", help="file: .txt, .csv, .tsv, .json or .jsonl")
    parser.add_argument("--count", type=int, help="samples; default: one of each condition")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--preset", help=", ".join(ToCaConfig.presets()))
    chosen.add_argument("--config", help="saved settings (.json); neither: the untouched model")
    parser.add_argument("--steps", type=int, help="of a run; default: the model's own")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="samples drawn at once (%(default)s)"
    )
    parser.add_argument("--out", required=True, help="folder, new or of this run")
    parser.add_argument(
        "--format",
        choices=files.FORMATS,
        default="png",
        help="npz: one file of uint8 pixels at the end; safetensors: latents (%(default)s)",
    )
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--threads", type=int, help="of each process, on a CPU")
    parser.add_argument(
        "--cuda-graph", action="store_true", help="record steps as CUDA graphs and replay them"
    )
    parser.add_argument("--checkout", help="of facebookresearch/DiT, for its checkpoints")
    parser.add_argument(
        "--call", default="{}", help="arguments of the pipeline or sampler: '{\"guidance\": 1.5}'"
    )
    parser.add_argument(
        "--timeout", type=float, default=30, help="minutes to wait for processes (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw what is missing.

    Raises:
        ValueError: what the settings lack, or a folder of another run.
        OSError: there is no such target, a file cannot be written, or another process has ended.
    """
    with world(args.timeout) as processes, contextlib.ExitStack() as stack:
        job = processes.agree(lambda: _job(args, processes))
        settings = processes.agree(lambda: _settings(args, job))
        everywhere = processes.gather(settings)
        processes.agree(lambda: _compare(everywhere))
        processes.agree(lambda: _claim(stack, processes, job, settings))
        try:
            _draw_all(job, processes)
        except KeyboardInterrupt:
            if processes.rank == 0:
                print(f"stopped; the same command goes on with {job.folder}")
            return 130
        except (ValueError, OSError) as error:
            if processes.size == 1:
                raise
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"process {processes.rank}: {error}") from error
    return 0


def _job(args: argparse.Namespace, processes: World) -> Job:
    for name in ("count", "steps", "batch_size", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if args.seed < 0:
        raise ValueError(f"seed: expected a number >= 0, got {args.seed}")
    conditions: Sequence[int | str] = (
        read_prompts(args.prompts) if args.classes is None else read_classes(args.classes)
    )
    folder = Path(args.out)
    device = _device(args.device, processes)
    if device.type == "cpu":
        # A run goes on with as many as it began with: the last bits depend on it.
        threads = args.threads or files.saved_setting(folder, "threads")
        torch.set_num_threads(threads or torch.get_num_threads())
    sampler = load(
        args.target,
        device=device,
        dtype=DTYPES[args.dtype or _default_dtype(device)],
        arguments=_arguments(args),
    )
    if args.format == "safetensors" and not isinstance(sampler, LatentSampler):
        raise ValueError(f"format: expected png or npz, for {args.target} has no latents()")
    return Job(
        sampler=sampler,
        conditions=conditions,
        count=args.count or len(conditions),
        config=_config(args),
        steps=args.steps or sampler.num_steps,
        seed=args.seed,
        batch_size=args.batch_size,
        cuda_graph=args.cuda_graph,
        device=device,
        folder=folder,
        kind=args.format,
    )


def _device(name: str | None, processes: World) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", processes.local_rank if processes.size > 1 else 0)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one of {torch.cuda.device_count()} GPUs, got {device}; "
            "start one process for each"
        )
    torch.cuda.set_device(device)
    return device


def _default_dtype(device: torch.device) -> str:
    return "float32" if device.type == "cpu" else "bfloat16"


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    try:
        arguments = dict(json.loads(args.call))
    except (TypeError, ValueError):
        raise ValueError(f"call: expected a JSON object, got {args.call!r}") from None
    if args.checkout is not None:
        arguments["checkout"] = args.checkout
    return arguments


def _config(args: argparse.Namespace) -> ToCaConfig | None:
    if args.config is not None:
        return ToCaConfig.load(args.config)
    return None if args.preset is None else ToCaConfig.preset(args.preset)


# --- whose folder it is --------------------------------------------------------------------------


def _settings(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """All that the files depend on, but for the machine."""
    device = job.device.type
    return {
        "arguments": _arguments(args),
        "batch_size": job.batch_size,
        "conditions": _digest(json.dumps(list(job.conditions)).encode()),
        "config": None if job.config is None else job.config.to_dict(),
        "count": job.count,
        "cuda_graph": job.cuda_graph,
        "device": device,
        "dtype": args.dtype or _default_dtype(job.device),
        "format": job.kind,
        "seed": job.seed,
        "steps": job.steps,
        "target": args.target,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "versions": {"toca_kernels": __version__, "torch": torch.__version__},
        "weights": _digest(_code(args.target) + fingerprint(job.sampler.target).encode()),
    }


def _compare(everywhere: Sequence[Mapping[str, Any]]) -> None:
    first = everywhere[0]
    for rank, other in enumerate(everywhere):
        for name, value in other.items():
            if value != first[name]:
                raise ValueError(
                    f"{name}: expected the same in all processes, got {first[name]!r} in process 0 "
                    f"and {value!r} in process {rank}"
                )


def _claim(
    stack: contextlib.ExitStack, processes: World, job: Job, settings: Mapping[str, Any]
) -> None:
    if processes.rank > 0:
        return
    files.make(job.folder)
    stack.enter_context(files.locked(job.folder))
    files.claim(job.folder, settings, "".join(_lines(job)).encode())


def _lines(job: Job) -> Iterator[str]:
    for number in range(job.batches):
        for one in job.batch(number):
            name = "class" if isinstance(one.condition, int) else "prompt"
            line = {"index": one.index, name: one.condition}
            yield json.dumps(line, ensure_ascii=False) + "\n"


def _code(target: str) -> bytes:
    return Path(target).read_bytes() if target.endswith(".py") else b""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- drawing -------------------------------------------------------------------------------------


def _draw_all(job: Job, processes: World) -> None:
    first = processes.rank == 0
    started = time.perf_counter()
    whole = first and files.assembled(job.folder) is not None
    if processes.gather(whole)[0]:
        if first:
            print(f"{job.folder}: all {job.count} samples are there")
        return
    missing = _missing(job, processes)
    before = job.batches - len(missing)
    progress = Progress(job.count, _samples(job, before), shown=first)

    def done() -> int:
        return _samples(job, files.count_done(job.folder))

    try:
        with _prepared(job) as session:
            drawer = Drawer(
                lambda requests: _draw(job, session, requests),
                lambda: None if session is None else session.reset(),
                job.batch_size,
            )
            for number in missing[processes.rank :: processes.size]:
                requests = job.batch(number)
                rows, parts = drawer(requests)
                indices = [one.index for one in requests]
                files.save_batch(job.folder, number, job.kind, indices, rows, parts)
                progress.look(done)
        processes.wait(lambda: progress.look(done))
        progress.look(done, at_once=True)
    finally:
        progress.close()
    if first:
        _finish(job, _samples(job, before), time.perf_counter() - started)
    processes.wait(lambda: None)


def _missing(job: Job, processes: World) -> list[int]:
    """The batches that are not whole; each process looks at its share."""
    mine = [
        number
        for number in range(processes.rank, job.batches, processes.size)
        if not files.is_done(job.folder, number)
    ]
    for number in mine:
        files.forget(job.folder, number)
    return sorted(number for some in processes.gather(mine) for number in some)


def _samples(job: Job, batches: int) -> int:
    return min(job.count, batches * job.batch_size)


@contextlib.contextmanager
def _prepared(job: Job) -> Iterator[Session | None]:
    if job.config is None:
        yield None
        return
    with enabled(
        job.sampler.target,
        job.config,
        num_steps=job.steps,
        timesteps=job.sampler.timesteps(job.steps),
        cuda_graph=job.cuda_graph,
    ) as session:
        yield session


def _draw(job: Job, session: Session | None, requests: Sequence[Request]) -> Tensor:
    if session is not None:
        session.reset()  # a batch knows nothing of the one before
    sampler = job.sampler
    latent = job.kind == "safetensors"
    with torch.no_grad():
        if latent:
            assert isinstance(sampler, LatentSampler)
            rows = sampler.latents(requests, seed=job.seed, steps=job.steps)
        else:
            rows = sampler.sample(requests, seed=job.seed, steps=job.steps)
    if len(rows) != len(requests) or not (latent or rows.ndim in (4, 5)):
        raise ValueError(
            f"sampler: expected (B, C, H, W) or (B, F, C, H, W) with B = {len(requests)}, got the "
            f"shape {tuple(rows.shape)}"
        )
    if not torch.isfinite(rows).all():
        raise ValueError(
            f"samples {requests[0].index} to {requests[-1].index}: expected finite numbers, got "
            "others; try bfloat16 or float32"
        )
    return rows


def _finish(job: Job, before: int, seconds: float) -> None:
    """What is made of all batches, and what the run did."""
    where = job.folder
    if job.kind == "npz":
        where = files.assemble(job.folder, job.batches, job.count)
    drawn = job.count - before
    rate = f", {drawn / seconds:.2f} a second" if drawn else ""
    print(f"{where}: {job.count} samples, {drawn} of them drawn now in {seconds:.1f} s{rate}")
