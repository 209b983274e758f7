"""Find the settings of a model for a budget, from a handful of prompts or classes.

    toca tune examples/digits/sampler.py --classes 0-9 --steps 20 --speedup 2 --out tuned.json
    toca tune DiT-XL-2-256x256.pt --arguments '{"checkout": "DiT"}' --classes 0-999 \\
        --against dit-ddim50 --out tuned.json
    toca tune ./PixArt-XL-2-256x256 --prompts prompts.txt --min-psnr 30 --out tuned.json

The budget is a speed-up, seconds for a sample, a PSNR or SSIM to the untouched samples, or, where
none is named, what the first of --against costs.

One run in full steps shows how every module's output changes from step to step, hence what reusing
or extrapolating it costs in accuracy; a table says what steps cost, measured here or counted in
FLOPs.  From both follow the first candidates.  They are run on a few samples, the better ones on
more, and the neighbours of the best until --trials or --minutes are spent.  What is chosen is timed
in turns with --against, and compared with it on samples that took no part.

--out is for `ToCaConfig.load`; it holds for this number of steps, and `enable` refuses another one.
The report lies beside it.  All that is measured lies in the folder --state: a run that was broken
off goes on where it was, and one that is repeated from there writes the same.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import ToCaConfig
from .evaluation.generation import Source, weights_mark
from .evaluation.metrics import missing
from .evaluation.rounds import Times
from .evaluation.settings import Setting, fingerprint
from .measuring import timing
from .measuring.shapes import DTYPES
from .sampling import prompts
from .sampling.sampler import Request, Sampler
from .storing import whole
from .tuning import probe as probing
from .tuning import timed
from .tuning.confirm import confirm
from .tuning.cost import CostTable
from .tuning.probe import Probe
from .tuning.report import Findings, Line
from .tuning.search import PARTS, Goal, Search, deadline, split
from .tuning.space import Candidates, Space, fits
from .tuning.state import State
from .tuning.trials import Score, Trials

_PROBED = 8  # samples that are looked at in full runs
HELD_OUT = "held-out"
_ATTEMPTS = 3  # searches, where what was chosen turns out to take longer than the table says
_LEAST = {
    "samples": 4,
    "held_out": 2,
    "batch": 1,
    "trials": 3,
    "seed": 0,
    "steps": 2,
    "time_rounds": 0,
    "time_batch": 1,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", help="a .py file that defines sampler(...), a DiT checkpoint or a pipeline"
    )
    parser.add_argument("--out", required=True, type=Path, help="file for the settings (.json)")
    shown = parser.add_mutually_exclusive_group(required=True)
    shown.add_argument("--classes", help='numbers like "0-9", or a file of them')
    shown.add_argument("--prompts", help="a file of prompts (.txt, .csv, .tsv, .json, .jsonl)")
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--speedup", type=float, help="over the untouched model")
    wanted.add_argument("--seconds", type=float, help="for a sample, of --time-batch at a time")
    wanted.add_argument("--min-psnr", type=float, help="to the untouched samples, dB")
    wanted.add_argument("--min-ssim", type=float, help="to the untouched samples")
    parser.add_argument(
        "--against", action="append", default=[], help="a preset or settings (.json) to beat"
    )
    drawn = parser.add_argument_group("samples")
    drawn.add_argument("--steps", type=int, help="of a run; default: the sampler's own")
    drawn.add_argument("--samples", type=int, default=16, help="that tune (%(default)s)")
    drawn.add_argument("--held-out", type=int, default=16, help="that compare (%(default)s)")
    drawn.add_argument("--batch", type=int, default=8, help="drawn at a time (%(default)s)")
    drawn.add_argument("--seed", type=int, default=0, help="of samples and search (%(default)s)")
    drawn.add_argument("--arguments", default="{}", help="of the sampler or pipeline, JSON")
    drawn.add_argument("--device", help="default: cuda where there is one")
    drawn.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    spent = parser.add_argument_group("search")
    spent.add_argument("--trials", type=int, default=100, help="runs (%(default)s)")
    spent.add_argument("--minutes", type=float, help="no new run after that many")
    spent.add_argument("--state", type=Path, help="folder; default: beside --out")
    spent.add_argument(
        "--cost", choices=("seconds", "flops"), default="seconds", help="what counts (%(default)s)"
    )
    spent.add_argument("--time-rounds", type=int, help="default: 5, with --cost flops none")
    spent.add_argument("--time-batch", type=int, default=4, help="samples (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, search, compare and write.

    Raises:
        ValueError: arguments or files that cannot be used; the message says why.
        OSError: a file that is not there.
    """
    _check(args)
    source = Source.asked(args)
    conditions = prompts.asked(args)
    sampler = source.load()
    steps = sampler.num_steps if args.steps is None else args.steps
    against = _against(args, sampler, steps)
    about = _about(args, source, sampler, conditions)
    state = State(args.state or args.out.with_suffix(".tuning"), about)
    parts = _parts(args, conditions)
    tuning = [request for name in PARTS for request in parts[name]]
    found = _probe(args, sampler, tuning[:_PROBED], steps, state)
    space = Space.of(sampler, found, steps)
    table = _table(args, sampler, tuning[: args.time_batch], steps, space, found, state)
    candidates = Candidates(space, found, table, steps)
    given = [config for _, config in against]
    goal = asked = _goal(args, table, candidates, given, steps)
    trials = Trials(sampler, parts, table, state, seed=args.seed, steps=steps, batch=args.batch)
    others = [Setting(name, name, config, steps) for name, config in against]
    over = deadline(args.minutes)
    for _ in range(_ATTEMPTS):
        search = _search(args, candidates, trials, goal, given, over)
        chosen, times, share = _confirm(args, sampler, search, others, trials, steps, state)
        if share >= 1 or over():
            break
        # The table was too hopeful by this much.
        goal = replace(goal, limit=goal.limit * share)
    lines = _lines(trials, [chosen, *others], times)
    met = share >= 1
    score = search.whole()[lines[0].config]
    met = met and goal.meets(score)
    findings = Findings(steps, asked, table, found, space.modules, search.front(), lines, met)
    _write(args, source, findings)
    return 0


# --- what is asked for ---------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name.replace('_', '-')}: expected at least {least}, got {value}")
    for name in ("speedup", "seconds", "min_psnr", "min_ssim", "minutes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name.replace('_', '-')}: expected more than 0, got {value}")
    wanted = (args.speedup, args.seconds, args.min_psnr, args.min_ssim)
    if all(one is None for one in wanted) and not args.against:
        raise ValueError(
            "budget: expected --speedup, --seconds, --min-psnr or --min-ssim, or --against to "
            "take its cost from, got none"
        )
    if args.speedup is not None and args.speedup < 1:
        raise ValueError(f"speedup: expected at least 1, got {args.speedup}")
    if args.min_ssim is not None and args.min_ssim > 1:
        raise ValueError(f"min-ssim: expected at most 1, got {args.min_ssim}")
    if args.seconds is not None and args.cost == "flops":
        raise ValueError("seconds: expected --cost seconds, got --cost flops, which has none")
    if args.out.suffix != ".json":
        raise ValueError(f"out: expected a file that ends in .json, got {args.out}")
    if importlib.util.find_spec("tqdm") is None:
        raise missing("tqdm", "shows the progress")
    if args.min_ssim is not None and importlib.util.find_spec("torchmetrics") is None:
        raise missing("torchmetrics", "computes SSIM")


def _against(
    args: argparse.Namespace, sampler: Sampler, steps: int
) -> list[tuple[str, ToCaConfig]]:
    found = []
    for name in dict.fromkeys(args.against):
        saved = name.endswith(".json")
        config = ToCaConfig.load(name) if saved else ToCaConfig.preset(name)
        if not fits(sampler, config, steps):
            raise ValueError(f"against: expected settings that fit the model, {name} does not")
        found.append((name, config))
    return found


def _about(
    args: argparse.Namespace, source: Source, sampler: Sampler, conditions: Sequence[int | str]
) -> dict[str, Any]:
    """All that the measurements depend on; the budget is not among them."""
    about: dict[str, Any] = {
        "target": Path(source.target).name,
        "weights": weights_mark(sampler.target),
        "arguments": dict(source.arguments),
        "device": source.device,
        "dtype": source.dtype,
        "shown": args.classes or args.prompts,
        "conditions": fingerprint(conditions=list(conditions)),
        "steps": sampler.num_steps if args.steps is None else args.steps,
        "samples": args.samples,
        "held-out": args.held_out,
        "batch": args.batch,
        "seed": args.seed,
        "cost": args.cost,
    }
    if Path(source.target).is_file():
        about["file"] = hashlib.sha256(Path(source.target).read_bytes()).hexdigest()[:16]
    if args.cost == "seconds":
        about |= {"time-batch": args.time_batch, "machine": timing.machine(source.device)}
    return about


def _parts(args: argparse.Namespace, conditions: Sequence[int | str]) -> dict[str, list[Request]]:
    """Samples of each part; those held out come after those that tune."""
    found, first = {}, 0
    sizes = (*split(args.samples), args.held_out)
    for name, count in zip((*PARTS, HELD_OUT), sizes, strict=True):
        numbers = range(first, first + count)
        found[name] = [Request(i, conditions[i % len(conditions)]) for i in numbers]
        first += count
    return found


def _goal(
    args: argparse.Namespace,
    table: CostTable,
    candidates: Candidates,
    against: Sequence[ToCaConfig],
    steps: int,
) -> Goal:
    if args.min_psnr is not None:
        return Goal("psnr", args.min_psnr)
    if args.min_ssim is not None:
        return Goal("ssim", args.min_ssim)
    if args.speedup is not None:
        return Goal("cost", 1 / args.speedup)
    if args.seconds is not None:
        return Goal("cost", args.seconds * args.time_batch / table.untouched_run(steps))
    return Goal("cost", candidates.cost(against[0]))


# --- measuring -----------------------------------------------------------------------------------


def _progress(total: int, what: str, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=total == 0)


def _probe(
    args: argparse.Namespace,
    sampler: Sampler,
    requests: Sequence[Request],
    steps: int,
    state: State,
) -> Probe:
    found = state.probe()
    if found is None:
        batches = [requests[at : at + args.batch] for at in range(0, len(requests), args.batch)]
        with _progress(len(requests), "looking", "sample") as bar:
            found = probing.probe(
                sampler, batches, seed=args.seed, steps=steps, progress=bar.update
            )
        state.keep_probe(found)
    return found


def _table(
    args: argparse.Namespace,
    sampler: Sampler,
    requests: Sequence[Request],
    steps: int,
    space: Space,
    found: Probe,
    state: State,
) -> CostTable:
    if args.cost == "flops":
        return found.flops
    table = state.costs()
    if table is None:
        rounds = _rounds(args) or 1
        with _progress(timed.runs(space, rounds), "timing steps", "run") as bar:
            table = timed.measure(
                sampler,
                requests,
                space,
                found.flops,
                seed=args.seed,
                steps=steps,
                rounds=rounds,
                progress=bar.update,
            )
        state.keep_costs(table)
    return table


def _rounds(args: argparse.Namespace) -> int:
    default = 5 if args.cost == "seconds" else 0
    return default if args.time_rounds is None else int(args.time_rounds)


def _search(
    args: argparse.Namespace,
    candidates: Candidates,
    trials: Trials,
    goal: Goal,
    given: Sequence[ToCaConfig],
    over: Callable[[], bool],
) -> Search:
    with _progress(args.trials, "tuning", "run") as bar:

        def counted(config: ToCaConfig, part: str) -> Score:
            score = trials.run(config, part)
            bar.update(1)
            return score

        search = Search(candidates, counted, goal, args.trials, args.seed, over)
        search.search(given)
    return search


def _confirm(
    args: argparse.Namespace,
    sampler: Sampler,
    search: Search,
    others: Sequence[Setting],
    trials: Trials,
    steps: int,
    state: State,
) -> tuple[Setting, Mapping[Setting, Times], float]:
    requests = [request for name in PARTS for request in trials.requests(name)]
    with _progress(min(1, _rounds(args)), "timing the result", "run") as bar:
        return confirm(
            search,
            search.best(),
            others,
            sampler,
            requests[: args.time_batch],
            state,
            seed=args.seed,
            steps=steps,
            rounds=_rounds(args),
            wanted=_wanted(args),
            started=lambda total: bar.reset(total),
            progress=bar.update,
        )


def _lines(
    trials: Trials, settings: Sequence[Setting], times: Mapping[Setting, Times]
) -> list[Line]:
    """What all are worth on samples that took no part."""
    lines = []
    with _progress(len(settings), "held-out samples", "setting") as bar:
        for setting in settings:
            assert setting.config is not None
            score = trials.run(setting.config, HELD_OUT)
            lines.append(Line(setting.name, setting.config, score, times.get(setting)))
            bar.update(1)
    return lines


def _wanted(args: argparse.Namespace) -> tuple[str, float] | None:
    """What the measured times must show: ("speedup", x), ("seconds", s), ("against", 0) or no
    matter."""
    if args.cost == "flops" or args.min_psnr is not None or args.min_ssim is not None:
        return None
    if args.speedup is not None:
        return "speedup", args.speedup
    return ("against", 0.0) if args.seconds is None else ("seconds", args.seconds)


# --- what is written -----------------------------------------------------------------------------


def _write(args: argparse.Namespace, source: Source, found: Findings) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found.lines[0].config.save(args.out)
    beside = args.out.with_suffix(".report.json")
    about = {
        "command": timing.command(),
        "machine": timing.machine(source.device),
        "target": source.target,
    }
    whole.save_json(beside, {**about, **found.plain()})
    print(found)
    print(f"{args.out} is for runs of {found.steps} steps; the report is in {beside}")
