"""`toca sample` against a plain loop, in one process and in several, and its memory over time.

All draw the digits of examples/digits with the same settings and noise, and write PNG files.  The
plain loop is what a user would write himself: the enabled model, the sampler of the example and
PIL; no checksums, nothing synced, no resuming.  No time is reported before its pictures and those
of the command are the same.

Two ratios are measured, each in rounds whose order changes: the command over the plain loop, both
in this process; and the command in --processes of one thread each over one process of one thread.
Samples per second are of a process, from the end of its first batch to the end of its last, as the
times of the files tell it: loading a model is not in it and is reported of its own.

    python benchmarks/sampling.py --json benchmarks/results/sampling.json
    python benchmarks/sampling.py --soak 2000 --json benchmarks/results/sampling_soak.json

--soak draws that many samples with the command in a process of its own, watches its resident memory
during every batch, and fails where that grows by more than --most MiB over 1,000 samples.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import timing
import toca_kernels as toca
from toca_kernels.apps import sample
from toca_kernels.apps.drawing import files
from toca_kernels.apps.sampling import noise

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "digits"
TORCHRUN = ("torch.distributed.run", "--standalone")

sys.path.insert(0, str(DIGITS))
import digits  # noqa: E402  (lies there)

PARTS = ("plain", "processes")
POLL = 0.02  # seconds between two looks at a process
LEFT_OUT = 0.25  # of a soak's batches: caches, arenas and libraries fill up in the first ones
FEWEST = 12  # batches of a soak
MIB = 2**20


# --- drawing --------------------------------------------------------------------------------------


def plain(args: argparse.Namespace, folder: Path, count: int) -> None:
    """What a user would write himself."""
    model = digits.load_model()
    ddim = digits.scheduler()
    ddim.set_timesteps(args.steps)
    config = toca.ToCaConfig.preset(args.preset)
    steps = ddim.timesteps.tolist()
    folder.mkdir()
    with toca.enabled(model, config, num_steps=args.steps, timesteps=steps):
        for first in range(0, count, args.batch_size):
            indices = range(first, min(first + args.batch_size, count))
            x = digits.sample(
                model,
                torch.tensor([i % digits.NUM_CLASSES for i in indices]),
                num_steps=args.steps,
                noise=noise(0, indices, (1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)),
                progress=False,
            )
            pixels = ((x / 2 + 0.5).clamp(0, 1) * 255 + 0.5).byte().numpy()
            for i, picture in zip(indices, pixels[:, 0], strict=True):
                Image.fromarray(picture).save(folder / f"{i:06d}.png")


def arguments_of(args: argparse.Namespace, folder: Path, count: int) -> list[str]:
    """Those of `toca sample`."""
    given = {
        "--classes": "0-9",
        "--count": count,
        **({} if args.preset is None else {"--preset": args.preset}),
        "--steps": args.steps,
        "--batch-size": args.batch_size,
        "--device": "cpu",
        "--out": folder,
    }
    return [args.target, *(str(one) for pair in given.items() for one in pair)]


def command(args: argparse.Namespace, folder: Path, count: int) -> None:
    """`toca sample` in this process."""
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        sample.run(parser.parse_args(arguments_of(args, folder, count)))


def started(
    args: argparse.Namespace, folder: Path, count: int, processes: int | None = None, **kwargs: Any
) -> subprocess.Popen[str]:
    """`toca sample` in new processes of one thread each; None: one, without torchrun."""
    launcher = () if processes is None else (*TORCHRUN, f"--nproc-per-node={processes}", "-m")
    line = [sys.executable, "-m", *launcher, "toca_kernels", "sample"]
    line += [*arguments_of(args, folder, count), "--threads", "1"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(line, env=environment, text=True, **kwargs)


def in_processes(args: argparse.Namespace, folder: Path, count: int, processes: int) -> None:
    """`toca sample` under torchrun."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with started(args, folder, count, processes, **pipes) as run:
        said, _ = run.communicate()
    if run.returncode:
        raise SystemExit(f"toca sample in {processes} processes failed:\n{said}")


# --- samples per second ---------------------------------------------------------------------------


class Run(NamedTuple):
    """Samples per second of each process, and the seconds of the whole call."""

    rate: float
    seconds: float


def ends(folder: Path, count: int, batch_size: int) -> list[float]:
    """When each batch was done, in seconds: its record was written, or its last picture."""
    found = []
    for number, first in enumerate(range(0, count, batch_size)):
        record = folder / files.BATCHES / f"{number:06d}.json"
        last = folder / f"{min(first + batch_size, count) - 1:06d}.png"
        found.append((record if record.exists() else last).stat().st_mtime_ns / 1e9)
    return found


def rate(ended: Sequence[float], batch_size: int, processes: int = 1) -> float:
    """Samples per second of a process, the mean over all, from its first batch's end to its last's.

    Args:
        ended: when each batch was done; batch b is process b mod P's, and all batches are whole.
    """
    own = [ended[rank::processes] for rank in range(processes)]
    return statistics.fmean(batch_size * (len(one) - 1) / (one[-1] - one[0]) for one in own)


def same_pictures(have: Path, want: Path) -> bool:
    """Whether all pictures of `want` are in `have` too, pixel by pixel."""
    names = [path.name for path in sorted(want.glob("*.png"))]
    return bool(names) and all(
        np.array_equal(np.array(Image.open(have / name)), np.array(Image.open(want / name)))
        for name in names
    )


def in_rounds(
    args: argparse.Namespace,
    place: Path,
    runs: dict[str, tuple[int, Callable[[Path, int], None]]],
) -> dict[str, list[Run]]:
    """Draws in rounds, forwards and backwards in turn.

    Args:
        place: an empty folder to draw into.
        runs: name -> processes, and what draws (folder, count) with them; each process draws
            --count samples.
    """
    found: dict[str, list[Run]] = {name: [] for name in runs}
    for number in tqdm(range(args.rounds), desc=", ".join(runs)):
        folders: dict[str, Path] = {}
        for name in sorted(runs, key=list(runs).index, reverse=number % 2 == 1):
            processes, draw = runs[name]
            folders[name] = place / f"{name.replace(' ', '-')}-{number}"
            count = processes * args.count
            began = time.perf_counter()
            draw(folders[name], count)
            seconds = time.perf_counter() - began
            ended = ends(folders[name], count, args.batch_size)
            found[name].append(Run(rate(ended, args.batch_size, processes), seconds))
        first, *others = (folders[name] for name in runs)
        if not all(same_pictures(other, first) for other in others):
            raise SystemExit(f"{', '.join(runs)}: expected the same pictures from all")
    return found


def rows_of(
    args: argparse.Namespace, found: dict[str, list[Run]], processes: Sequence[int], threads: int
) -> list[dict[str, Any]]:
    """A row for each run; the first one is what the others are compared with."""
    base = next(iter(found.values()))
    rows = []
    for (name, runs), size in zip(found.items(), processes, strict=True):
        ratios = [run.rate / one.rate for run, one in zip(runs, base, strict=True)]
        start = [run.seconds - args.count / run.rate for run in runs]
        rows.append(
            {
                "run": name,
                "processes": size,
                "threads": threads,
                "samples": args.count,
                "steps": args.steps,
                "batch size": args.batch_size,
                "preset": args.preset,
                "rounds": len(runs),
                "samples/s": statistics.median(run.rate for run in runs),
                "start-up s": statistics.median(start),
                "ratio": statistics.median(ratios),
                "overhead": 1 / statistics.median(ratios) - 1,
                "all samples/s": [run.rate for run in runs],
                "all ratios": ratios,
            }
        )
    return rows


COLUMNS = {
    "run": "",
    "processes": "d",
    "threads": "d",
    "samples": "d",
    "samples/s": ".3f",
    "ratio": ".4f",
    "overhead": ".2%",
    "start-up s": ".1f",
}


def throughput(args: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """The command over the plain loop, and several processes over one."""
    rows = []
    if "plain" in args.parts:
        pair = {
            "plain loop": (1, lambda folder, count: plain(args, folder, count)),
            "toca sample": (1, lambda folder, count: command(args, folder, count)),
        }
        found = in_rounds(args, place, pair)
        rows += rows_of(args, found, (1, 1), torch.get_num_threads())
    if "processes" in args.parts:
        sizes = (1, args.processes)
        names = [f"{size} under torchrun" for size in sizes]

        def draw(size: int) -> Callable[[Path, int], None]:
            return lambda folder, count: in_processes(args, folder, count, size)

        several = {name: (size, draw(size)) for name, size in zip(names, sizes, strict=True)}
        rows += rows_of(args, in_rounds(args, place, several), sizes, threads=1)
    return rows


# --- memory ---------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Resident bytes of a process while it drew a batch, and how many samples were done then."""

    samples: int
    middle: int  # the median of many looks: single ones catch a step at different places
    most: int


def resident(pid: int) -> int:
    """Bytes of a process that are in memory; 0 of one that has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def slope(points: Sequence[Point]) -> float:
    """Bytes per 1,000 samples, by least squares over the last three quarters of the points.

    Raises:
        ValueError: fewer points than a line can be trusted with.
    """
    if len(points) < FEWEST:
        raise ValueError(f"soak: expected at least {FEWEST} batches, got {len(points)}")
    late = np.array(points[int(LEFT_OUT * len(points)) :], dtype=np.float64)[:, :2]
    return 1000 * float(np.polyfit(late[:, 0] - late[0, 0], late[:, 1], 1)[0])


def soak(args: argparse.Namespace, folder: Path) -> list[Point]:
    """Draw --soak samples with the command; its memory during every batch, seen from outside."""
    points: list[Point] = []
    done, held = 0, []
    with started(args, folder, args.soak) as run:
        while run.poll() is None:
            held.append(resident(run.pid))
            now = files.count_done(folder)
            if now > done:
                samples = min(now * args.batch_size, args.soak)
                points.append(Point(samples, statistics.median_low(held), max(held)))
                done, held = now, []
            time.sleep(POLL)
    if run.returncode:
        raise SystemExit(f"toca sample failed with status {run.returncode}")
    return points


def soaked(args: argparse.Namespace, points: Sequence[Point]) -> dict[str, Any]:
    """What a soak found; its slope in MiB."""
    return {
        "run": "soak",
        "samples": args.soak,
        "steps": args.steps,
        "batch size": args.batch_size,
        "preset": args.preset,
        "batches seen": len(points),
        "after a quarter": points[int(LEFT_OUT * len(points))].middle / MIB,
        "at the end": points[-1].middle / MIB,
        "most": max(point.most for point in points) / MIB,
        "slope": slope(points) / MIB,
        "limit": args.most,
        "points": [list(point) for point in points],
    }


def report_soak(row: dict[str, Any]) -> int:
    """Print what a soak found; 1 where memory grew by more than the limit."""
    print(
        f"resident memory over {row['samples']} samples: {row['after a quarter']:.1f} MiB after a "
        f"quarter of them, {row['at the end']:.1f} MiB at the end, at most {row['most']:.1f} MiB; "
        f"{row['slope']:+.3f} MiB per 1,000 samples over the last three quarters "
        f"(limit {row['limit']:g})"
    )
    if row["slope"] <= row["limit"]:
        return 0
    print(f"soak: expected at most {row['limit']:g} MiB per 1,000 samples", file=sys.stderr)
    return 1


# --- the command line -----------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--count", type=int, default=32, help="samples of a process in a run (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="default: both")
    parser.add_argument("--processes", type=int, default=2, help="of one thread (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of a run (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--preset", default="dit-ddim50", help="(%(default)s)")
    parser.add_argument("--soak", type=int, metavar="N", help="draw N samples and watch memory")
    parser.add_argument(
        "--most", type=float, default=4.0, help="MiB per 1,000 samples of a soak (%(default)s)"
    )
    parser.add_argument("--folder", help="where to draw: the disk counts; default: temporary")
    parser.add_argument("--json", help="file to write the result to")
    args = parser.parse_args(argv)
    args.target = str(DIGITS / "sampler.py")
    if args.count % args.batch_size or args.count < 2 * args.batch_size:
        parser.error(f"--count: expected two or more batches of {args.batch_size}")
    return args


def main() -> int:
    args = arguments()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(prefix="sampling-", dir=args.folder) as name:
        if args.soak is not None:
            row = soaked(args, soak(args, Path(name) / "soak"))
            timing.write(args.json, "sampling soak", [row])
            return report_soak(row)
        rows = throughput(args, Path(name))
    timing.write(args.json, "sampling", rows)
    print(timing.table(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
