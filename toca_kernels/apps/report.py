"""Pictures of what happened: one HTML page that shows what ToCa did to a run.

    toca report examples/digits/sampler.py --preset dit-ddim50 --classes 0-7 --out report.html
    toca report ./pipeline --preset pixart-dpm20 --prompts prompts.txt --count 2 --trace run.npz
    toca report run.npz

All runs start from the same noise: the untouched model and the same with ToCa in turns, both timed;
and once more with ToCa, now recording which tokens every step recomputes, which takes time of its
own.  Times are medians over the rounds; with one round they are as quiet as the machine is.

`session.trace()` records your own sampling loop; `Trace.save` what this command draws.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ToCaConfig
from ..recorder import Recorder
from ..session import enabled
from ..trace import Floats, Trace
from .measuring import timing
from .measuring.shapes import DTYPES
from .measuring.watch import Watch
from .reporting.page import page
from .sampling import loading, prompts
from .sampling.sampler import Request, Sampler
from .storing.whole import save_text

_WARMUP = 4  # steps
_COUNT = 8


# --- measuring -----------------------------------------------------------------------------------


def record(
    sampler: Sampler,
    requests: Sequence[Request],
    config: ToCaConfig,
    *,
    seed: int,
    steps: int,
    rounds: int = 1,
    cuda_graph: bool = False,
) -> Trace:
    """Sample untouched and with ToCa, and record what the steps did.

    Args:
        sampler: see sampling/sampler.py.
        requests: what to draw, in one batch.
        config: the settings.
        seed: of the noise.
        steps: of a run.
        rounds: how often both are timed.
        cuda_graph: time steps that are replayed as CUDA graphs, after a run that records them.

    Returns:
        A trace with the samples, the times of both, and what the model was given in each step.

    Raises:
        ValueError: what `enable` refuses.
    """
    settings: dict[str, Any] = {"num_steps": steps, "timesteps": sampler.timesteps(steps)}
    with enabled(sampler.target, config, **settings) as session:
        found = [one.model for one in (session, *session.others)]  # refused before the first run

    def run(watches: Sequence[Watch] = ()) -> Tensor:
        with contextlib.ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.watching())
            return sampler.sample(requests, seed=seed, steps=steps).float().cpu()

    with torch.no_grad():
        sampler.sample(requests, seed=seed, steps=min(steps, _WARMUP))
        plain, timed = ([[Watch(m) for m in found] for _ in range(rounds)] for _ in range(2))
        for watches, watches_of_toca in zip(plain, timed, strict=True):
            untouched = run(watches)
            with enabled(sampler.target, config, **settings, cuda_graph=cuda_graph):
                if cuda_graph:
                    run()
                result = run(watches_of_toca)
        with (
            enabled(sampler.target, config, **settings) as session,
            session.trace() as recorder,
            _keeping(recorder, found, result),
        ):
            run()
    trace = recorder.trace
    machine = {"timed rounds": rounds} | timing.machine(_device(found))
    return dataclasses.replace(
        trace,
        seconds=np.median([_per_step(trace, one) for one in timed], axis=0),
        untouched_seconds=np.median([_per_step(trace, one) for one in plain], axis=0),
        captions=tuple(_caption(one) for one in requests),
        result=result.numpy(),
        untouched=untouched.numpy(),
        versions={name: str(value) for name, value in machine.items()},
    )


def _device(found: Sequence[nn.Module]) -> torch.device:
    return next(found[0].parameters()).device


def _caption(request: Request) -> str:
    condition = request.condition
    return condition if isinstance(condition, str) else f"class {condition}"


def _per_step(trace: Trace, watches: Sequence[Watch]) -> Floats:
    """Seconds of each step, from those of the models' calls.

    Where guidance did not run in all steps, calls do not tell which step they are of: then the
    mean of the model's steps.
    """
    total = np.zeros(trace.num_steps)
    for number, watch in enumerate(watches):
        name = f"transformer_{number + 1}" if number else "transformer"
        parts = [part for part in trace.parts if part.model == name]
        if not parts:
            continue
        first = min(part.first for part in parts)
        steps = max(part.first + part.plan.num_steps for part in parts) - first
        seconds = np.array(watch.seconds)
        if len(seconds) % steps:
            total[first : first + steps] += seconds.sum() / steps
        else:
            total[first : first + steps] += seconds.reshape(steps, -1).sum(axis=1)
    return total


@contextlib.contextmanager
def _keeping(recorder: Recorder, found: Sequence[nn.Module], result: Tensor) -> Iterator[None]:
    """Keeps what the models are given in each step: what the step before it left."""
    with contextlib.ExitStack() as stack:
        for model in found:
            stack.enter_context(_looking(model, lambda x: _keep(recorder, x, result)))
        yield


@contextlib.contextmanager
def _looking(model: nn.Module, look: Callable[[Tensor], None]) -> Iterator[None]:
    """`look` sees the first input of every call that can be a picture.

    The model's forward is wrapped and not hooked: published samplers call it directly.
    """
    own, attributes = model.forward, vars(model)
    before = attributes.get("forward")

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim in (4, 5)]
        if given:
            look(given[0])
        return own(*args, **kwargs)

    attributes["forward"] = forward
    try:
        yield
    finally:
        attributes.pop("forward")
        if before is not None:
            attributes["forward"] = before


def _keep(recorder: Recorder, x: Tensor, result: Tensor) -> None:
    """Keep the model's input (m B, C, [F,] H, W) as B pictures in [0, 1].

    Where the model paints pixels they are in [-1, 1]; of latents it is the first three channels,
    scaled to their spread.
    """
    if len(x) < len(result) or not recorder.started:
        return
    pictures = x[: len(result)].detach().float()
    if pictures.ndim == 5:
        pictures = pictures.transpose(1, 2)
    if pictures.shape[1:] == result.shape[1:]:
        recorder.keep(pictures / 2 + 0.5)
        return
    pictures = pictures[..., :3, :, :]
    dims = tuple(range(1, pictures.ndim))
    mean, spread = pictures.mean(dims, keepdim=True), pictures.std(dims, keepdim=True)
    recorder.keep((pictures - mean) / (6 * spread.clamp(min=1e-6)) + 0.5)


# --- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        help="a saved trace (.npz); or what to sample: a Python file with a sampler, a DiT "
        "checkpoint, a diffusers pipeline",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--preset", help=", ".join(ToCaConfig.presets()))
    chosen.add_argument("--config", help="saved settings (.json)")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--classes", help='class numbers, "0-9" or "207,360", or a file of them')
    shown.add_argument("--prompts", help="a file of prompts (.txt, .csv, .tsv, .json, .jsonl)")
    shown.add_argument("--prompt", action="append", help="one prompt; may be repeated")
    parser.add_argument(
        "--count", type=int, help=f"samples, one batch; default: one each, at most {_COUNT}"
    )
    parser.add_argument("--steps", type=int, help="of a run; default: the sampler's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often both runs are timed (%(default)s)"
    )
    parser.add_argument(
        "--cuda-graph", action="store_true", help="time steps that are replayed as CUDA graphs"
    )
    parser.add_argument(
        "--call", default="{}", help="arguments of the pipeline or sampler: '{\"guidance\": 1.5}'"
    )
    parser.add_argument("--title", help="of the page; default: the target's name")
    parser.add_argument("--trace", help="file to save the trace to (.npz)")
    parser.add_argument("--out", default="report.html", help="the page (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Sample and record, or read what was recorded, and write the page.

    Raises:
        ValueError: a target that is not supported, settings that do not fit it, or a file that is
            no trace.
        OSError: there is no such target, or a file cannot be written.
    """
    for path in (args.out, args.trace):
        if path is not None:  # found out now and not after the runs
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    if args.target.endswith(".npz"):
        _refuse_settings(args)
        trace = Trace.load(args.target)
    else:
        trace = _recorded(args)
    if args.trace is not None:
        trace.save(args.trace)
    title = args.title or "/".join(Path(args.target).parts[-2:])
    save_text(Path(args.out), page(trace, title))
    print(f"{args.out}: {trace.num_steps} steps, FLOPs ratio {trace.flops_ratio:.2f}, ", end="")
    print("not timed" if trace.speedup is None else f"speed-up {trace.speedup:.2f}")
    return 0


def _refuse_settings(args: argparse.Namespace) -> None:
    """A saved trace was sampled already."""
    names = ("preset", "config", "classes", "prompts", "prompt", "count", "steps", "trace")
    given = [name for name in names if getattr(args, name) is not None]
    if given:
        raise ValueError(
            f"{given[0]}: expected to be left out where {args.target} is a saved trace"
        )


def _recorded(args: argparse.Namespace) -> Trace:
    config = _config(args)
    requests = _requests(args)
    try:
        arguments = dict(json.loads(args.call))
    except (TypeError, ValueError):
        raise ValueError(f"call: expected a JSON object, got {args.call!r}") from None
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    sampler = loading.load(args.target, device=device, dtype=dtype, arguments=arguments)
    steps = sampler.num_steps if args.steps is None else args.steps
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, the first is full, got {steps}")
    if args.rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {args.rounds}")
    return record(
        sampler,
        requests,
        config,
        seed=args.seed,
        steps=steps,
        rounds=args.rounds,
        cuda_graph=args.cuda_graph,
    )


def _config(args: argparse.Namespace) -> ToCaConfig:
    if args.config is not None:
        return ToCaConfig.load(args.config)
    if args.preset is None:
        raise ValueError(f"preset: expected --config or one of {', '.join(ToCaConfig.presets())}")
    return ToCaConfig.preset(args.preset)


def _requests(args: argparse.Namespace) -> list[Request]:
    conditions: Sequence[int | str]
    if args.prompt is not None:
        conditions = args.prompt
    elif args.prompts is not None:
        conditions = prompts.read_prompts(args.prompts)
    else:
        conditions = prompts.read_classes("0-7" if args.classes is None else args.classes)
    count = min(len(conditions), _COUNT) if args.count is None else args.count
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    return [Request(at, conditions[at % len(conditions)]) for at in range(count)]
