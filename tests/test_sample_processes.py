"""`toca sample` in several processes: the same files as in one, and processes that are killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from test_sample import DIGITS, contents, draw, lockable, own, wrong

__all__ = ["lockable", "own"]  # fixtures

pytestmark = pytest.mark.slow
PACKAGE = Path(__file__).parents[1]
COUNT = 48
LIMIT = 120  # seconds

# What the `toca` command does with it.
MAIN = """
import argparse, sys
from toca_kernels.apps import sample

parser = argparse.ArgumentParser()
sample.add_arguments(parser)
try:
    sys.exit(sample.run(parser.parse_args()))
except (ValueError, OSError) as error:
    print(f"toca sample: {error}", file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a command, in a process group of its own, with its output in one pipe."""
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    started: list[subprocess.Popen] = []

    def begin(launcher: list[str], *argv: object, **variables: str) -> subprocess.Popen:
        command = [sys.executable, *launcher, str(script), *map(str, argv), "--device", "cpu"]
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def options(target: str, out: Path, *argv: object) -> list[object]:
    common = ["--classes", "0-9", "--threads", 1, "--out", out]
    return [target, *common, *argv]


def until(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    limit = time.monotonic() + LIMIT
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def done(out: Path) -> int:
    return len(list((out / "batches").glob("*.json")))


def test_several_processes_draw_what_one_draws(start, tmp_path):
    """Shares of one size and of different ones, and a last batch that is smaller."""
    for name in ("diffusers", "sklearn", "tqdm"):
        pytest.importorskip(name, reason="the digits example needs it")
    settings = ["--count", 11, "--batch-size", 2, "--steps", 4, "--preset", "dit-ddim50"]
    settings += ["--format", "npz"]
    alone = tmp_path / "alone"
    process = start([], *options(str(DIGITS), alone, *settings))
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    several = tmp_path / "several"
    process = start(torchrun(4), *options(str(DIGITS), several, *settings))
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    assert said.count("11 samples, 11 of them drawn now") == 1  # by the first process
    assert said.count("0/11") == 1
    assert "11/11" in said  # also those of the other processes
    assert contents(several) == contents(alone)
    assert "samples_11x32x32x3.npz" in contents(alone)


def test_processes_that_are_killed(start, own, tmp_path):
    """One of them, then all of them; however many resume, they end with the same files."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    draw(own, whole, "--threads", 1, "--format", "npz", count=COUNT, size=2)
    given = options(own, out, "--count", COUNT, "--batch-size", 2, "--format", "npz")
    given += ["--call", "{}"]
    wrong(own, seconds=0.4)

    process = start(torchrun(4), *given)
    until(lambda: done(out) >= 3, process)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in said
    first = done(out)
    assert 3 <= first < COUNT // 2

    process = start(torchrun(2), *given)
    until(lambda: done(out) >= first + 3, process)
    workers = children(process.pid)
    assert len(workers) == 2
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT)
    second = done(out)
    assert first + 3 <= second < COUNT // 2
    assert contents(out).items() <= {**contents(whole), **partials(out)}.items()

    wrong(own)
    process = start(torchrun(4), *given)
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    assert f"{COUNT} samples, {COUNT - 2 * second} of them drawn now" in said
    assert contents(out) == contents(whole)


def test_a_folder_that_becomes_unwritable_under_two_processes(start, own, tmp_path, lockable):
    out, whole = lockable.at / "out", tmp_path / "whole"
    draw(own, whole, "--threads", 1, count=COUNT, size=2)
    given = options(own, out, "--count", COUNT, "--batch-size", 2, "--call", "{}")
    wrong(own, seconds=0.4)
    process = start(torchrun(2), *given)
    until(lambda: done(out) >= 3, process)
    lockable.lock()
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    told = rf"toca sample: process [01]: \S+: cannot be written: {lockable.reason}"
    assert re.search(told, said), said
    assert 3 <= done(out) < COUNT // 2
    assert contents(out).items() <= {**contents(whole), **partials(out)}.items()
    lockable.lock(False)
    wrong(own)
    assert draw(own, out, "--threads", 1, count=COUNT, size=2) == 0  # alone
    assert contents(out) == contents(whole)


def partials(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if ".partial" in name}


def test_who_is_left_ends_in_words_without_an_agent(start, own, tmp_path):
    """As a cluster's launcher starts them, where nobody ends the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out"
    given = options(own, out, "--count", COUNT, "--batch-size", 2)
    wrong(own, seconds=0.2)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    first, second = (start([], *given, **variables, RANK=str(rank)) for rank in range(2))
    until(lambda: done(out) >= 2, first)
    second.kill()
    said, _ = first.communicate(timeout=LIMIT)
    assert first.returncode == 2, said
    assert "another process of this run has ended; run the same command again" in said
    assert "Traceback" not in said
    assert done(out) >= COUNT // 4  # its own share


def test_what_is_refused_is_told_once(start, own, tmp_path):
    out = tmp_path / "out"
    draw(own, out, "--threads", 1)
    given = options(own, out, "--count", 12, "--batch-size", 4, "--call", "{}")
    process = start(torchrun(2), *given)
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert said.count("count: 10 there, 12 now") == 1
