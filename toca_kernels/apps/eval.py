"""Sample with a list of settings and say what each costs and what its samples are worth.

    toca eval examples/digits/sampler.py --settings settings.json --classes 0-9 --out quality
    toca eval ./PixArt-XL-2-256x256 --settings settings.json --prompts captions_val2017.json \\
        --features weights-inception-2015-12-05-6726825d.pth --reference coco_256.npz --out quality

Every setting draws the same samples: same noise, same conditions.  They are compared with those of
the untouched model (PSNR, SSIM, relative L2, LPIPS) and, as sets, with real pictures (FID, sFID,
precision, recall, inception score), and looked at for what they should show (accuracy, CLIP score).
Seconds are measured in a phase of its own, on a small batch, every setting in turn.

All that is drawn and measured lies in --out, whole or not at all: a run that was broken off goes on
where it was, and after a change of the settings only what changed is done again.  samples/ holds
the samples, measured/ their features and metrics; results.csv, results.json, side_by_side.png and
pareto_*.png are written anew each time.  With --export, export/ holds an .npz of each setting's
samples as ADM's evaluator and its likes read them.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .evaluation import features, references
from .evaluation.generation import Job, Source, check, generate, jobs
from .evaluation.metrics import missing
from .evaluation.pareto import draw_pareto
from .evaluation.perceptual import ClipScore, Lpips
from .evaluation.quality import COLUMNS, Found, Judges, frames, measure, rows
from .evaluation.references import Reference
from .evaluation.rounds import Rounds
from .evaluation.settings import Setting, fingerprint, read_settings
from .evaluation.side_by_side import SHOWN, draw_side_by_side
from .measuring import timing
from .measuring.shapes import DTYPES
from .sampling import prompts
from .sampling.sampler import Sampler
from .storing import whole
from .storing.pictures import save_samples

_DRAWN = ("fid", "psnr")  # metrics that get a plot
_SHOWN = {  # columns of the printed table -> format
    "name": "",
    "psnr": ".1f",
    "ssim": ".4f",
    "lpips": ".4f",
    "fid": ".4g",
    "sfid": ".4g",
    "precision": ".3f",
    "recall": ".3f",
    "is": ".2f",
    "clip": ".2f",
    "accuracy": ".1%",
    "flops_ratio": ".2f",
    "speedup": ".2f",
    "efficiency": ".0%",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", help="a .py file that defines sampler(...), or a diffusers pipeline"
    )
    parser.add_argument("--settings", required=True, help="what to compare (.json, a list)")
    parser.add_argument("--out", required=True, type=Path, help="folder for all that is made")
    shown = parser.add_mutually_exclusive_group(required=True)
    shown.add_argument("--classes", help='numbers like "0-9", or a file of them')
    shown.add_argument("--prompts", help="a file of prompts (.txt, .csv, .tsv, .json, .jsonl)")
    drawn = parser.add_argument_group("samples")
    drawn.add_argument("--samples", type=int, default=100, help="of a seed (%(default)s)")
    drawn.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    drawn.add_argument("--seed", type=int, default=0, help="the first one (%(default)s)")
    drawn.add_argument(
        "--steps", type=int, help="of settings that do not say; default: the sampler's own"
    )
    drawn.add_argument("--batch", type=int, default=20, help="drawn at a time (%(default)s)")
    drawn.add_argument("--arguments", default="{}", help="of the sampler or pipeline, JSON")
    drawn.add_argument("--device", help="default: cuda where there is one")
    drawn.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    drawn.add_argument("--workers", type=int, default=1, help="processes that draw (%(default)s)")
    drawn.add_argument("--threads", type=int, help="of each of them; default: shared evenly")
    judged = parser.add_argument_group("quality")
    judged.add_argument("--features", help="a network for FID and the like (.py, .pt, .pth)")
    judged.add_argument("--reference", help="real pictures or statistics of them (.npz)")
    judged.add_argument("--lpips", help="weights of torchvision's alexnet or vgg16 (.pth)")
    judged.add_argument("--clip", help="folder of a CLIP model, for prompts")
    judged.add_argument(
        "--export", action="store_true", help="samples of each setting for ImageNet evaluators"
    )
    timed = parser.add_argument_group("time")
    timed.add_argument("--time-rounds", type=int, default=5, help="0: none (%(default)s)")
    timed.add_argument("--time-batch", type=int, default=4, help="samples (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Draw, measure, time and write.

    Raises:
        ValueError: arguments or files that cannot be used; the message says why.
        OSError: a file that is not there.
    """
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name.replace('_', '-')}: expected at least {least}, got {value}")
    for package, purpose in _NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise missing(package, purpose)
    source = Source.asked(args)
    conditions = prompts.asked(args)
    sampler = source.load()
    settings = read_settings(args.settings, args.steps or sampler.num_steps)
    check(sampler, settings)
    judges = _judges(args, source)
    todo = jobs(
        settings,
        source,
        sampler,
        conditions=conditions,
        samples=args.samples,
        seeds=range(args.seed, args.seed + args.seeds),
        batch=args.batch,
        folder=args.out / "samples",
    )
    _draw(args, todo, source, sampler)
    rounds = _time(args, todo, source, sampler)
    found = _gather(args, settings, todo, judges, rounds)
    _write(args, source, found, rows(found, judges), todo, judges)
    if args.export:
        _export(args, settings, todo)
    return 0


_NEEDED = {  # by all evaluations; said before the samples are drawn
    "torchmetrics": "computes SSIM",
    "matplotlib": "draws the pictures",
    "tqdm": "shows the progress",
}
_LEAST = {
    "samples": 4,  # precision and recall look at the third neighbour
    "seeds": 1,
    "seed": 0,
    "steps": 1,
    "batch": 1,
    "workers": 1,
    "threads": 1,
    "time_rounds": 0,
    "time_batch": 1,
}


# --- what is asked for ---------------------------------------------------------------------------


def _judges(args: argparse.Namespace, source: Source) -> Judges:
    beside = Path(source.target).with_name("quality.py")
    path = args.features
    if path is None and source.target.endswith(".py") and beside.is_file():
        path = beside
    if args.reference is not None and path is None:
        raise ValueError("reference: expected a network with --features, whose features it is of")
    extractor = None if path is None else features.load(path, source.device)
    reference = None
    if extractor is not None and args.reference is not None:
        reference = references.read(args.reference, extractor)
    elif extractor is not None and extractor.reference is not None:
        reference = Reference.of(extractor.name, extractor.of(extractor.reference()))
    lpips = None if args.lpips is None else Lpips(args.lpips).to(source.device)
    if args.clip is not None and args.prompts is None:
        raise ValueError("clip: expected samples of --prompts, got classes")
    clip = None if args.clip is None else ClipScore(args.clip, source.device)
    files = fingerprint(
        lpips=None if args.lpips is None else features.file_hash(args.lpips),
        clip=None if args.clip is None else str(Path(args.clip).resolve()),
    )
    return Judges(extractor, reference, lpips, clip, files)


# --- drawing, timing, measuring ------------------------------------------------------------------


def _progress(total: int, what: str, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=total == 0)


def _draw(args: argparse.Namespace, all_jobs: list[Job], source: Source, sampler: Sampler) -> None:
    todo = [job for job in _distinct(all_jobs) if not job.is_done()]
    with _progress(len(todo) * args.samples, "samples", "sample") as bar:
        generate(
            todo,
            source,
            sampler,
            workers=args.workers,
            threads=args.threads,
            progress=bar.update,
        )


def _distinct(all_jobs: list[Job]) -> list[Job]:
    """Settings of two names may be the same."""
    return list({job.fingerprint: job for job in all_jobs}.values())


def _time(
    args: argparse.Namespace, all_jobs: list[Job], source: Source, sampler: Sampler
) -> Rounds | None:
    if not args.time_rounds:
        return None
    requests = all_jobs[0].requests[: args.time_batch]
    about = fingerprint(
        target=source.target,
        arguments=dict(source.arguments),
        dtype=source.dtype,
        machine=timing.machine(source.device),
        seed=args.seed,
        requests=[(one.index, one.condition) for one in requests],
    )
    marks = {job.setting: job.setting.fingerprint() for job in all_jobs}
    rounds = Rounds(args.out / "times.json", about, marks)
    with _progress(rounds.turns(args.time_rounds), "timing", "run") as bar:
        rounds.measure(
            sampler, requests, seed=args.seed, rounds=args.time_rounds, progress=bar.update
        )
    return rounds


def _gather(
    args: argparse.Namespace,
    settings: Sequence[Setting],
    all_jobs: list[Job],
    judges: Judges,
    rounds: Rounds | None,
) -> list[Found]:
    base = {job.seed: job for job in all_jobs if job.setting == settings[0]}
    found = []
    with _progress(len(all_jobs), "quality", "set") as bar:
        for setting in settings:
            own = [job for job in all_jobs if job.setting == setting]
            measured = []
            for job in own:
                measured.append(
                    measure(job, base[job.seed], judges, batch=64, folder=args.out / "measured")
                )
                bar.update(1)
            times = None
            if rounds is not None:
                times = rounds.times(setting, min(args.time_batch, args.samples))
            counted = [job.counted() for job in own]
            found.append(Found(setting, measured, counted, times, args.samples * args.seeds))
    return found


# --- what is written -----------------------------------------------------------------------------


def _write(
    args: argparse.Namespace,
    source: Source,
    found: Sequence[Found],
    made: Sequence[dict[str, Any]],
    all_jobs: Sequence[Job],
    judges: Judges,
) -> None:
    settings = [one.setting for one in found]
    _write_csv(args.out / "results.csv", made)
    whole.save_json(
        args.out / "results.json",
        {
            "benchmark": "eval",
            "command": timing.command(),
            "machine": timing.machine(source.device),
            "target": source.target,
            "arguments": dict(source.arguments),
            "dtype": source.dtype,
            "seeds": [args.seed, args.seeds],
            "features": None if judges.extractor is None else judges.extractor.name,
            "reference": None if judges.reference is None else judges.reference.name,
            "settings": [setting.plain() for setting in settings],
            "rows": [{name: _plain(one) for name, one in row.items()} for row in made],
        },
    )
    title = f"{Path(source.target).name}: {args.seeds} × {args.samples} samples"
    plain = {one.policy for one in settings[1:] if one.config is None}
    for metric in _DRAWN:
        path = args.out / f"pareto_{metric}.png"
        draw_pareto(path, made, metric, plain=plain, title=title)
    first = [next(job for job in all_jobs if job.setting == one) for one in settings]
    images = [job.pictures()[:SHOWN] for job in first]
    captions = [str(request.condition) for request in first[0].requests]
    draw_side_by_side(args.out / "side_by_side.png", made, images, captions=captions, title=title)
    shown = {
        name: spec for name, spec in _SHOWN.items() if any(row[name] is not None for row in made)
    }
    print(timing.table(list(made), shown))
    print(f"\nresults.csv, results.json and the pictures are in {args.out}")


def _write_csv(path: Path, made: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(made)  # None is an empty cell
    whole.save_text(path, text.getvalue())


def _export(args: argparse.Namespace, settings: Sequence[Setting], all_jobs: list[Job]) -> None:
    for number, setting in enumerate(settings):
        parts = [
            functools.partial(lambda job: frames(job.pictures()), job)
            for job in all_jobs
            if job.setting == setting
        ]
        save_samples(args.out / "export" / f"{number:02d}-{setting.slug}.npz", parts)


def _plain(value: Any) -> Any:
    """JSON has no infinity: the PSNR of samples to themselves."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
