"""`toca sample`: files, resuming, folders of others, memory and disks that are too small."""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from toca_kernels import room
from toca_kernels.apps import sample
from toca_kernels.apps.drawing import batches, files
from toca_kernels.apps.drawing.batches import Drawer, Progress
from toca_kernels.apps.sampling import noise
from toca_kernels.apps.sampling.loading import load
from toca_kernels.apps.storing.pictures import to_bytes

DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "sampler.py"

# Draws at once: every sample is its noise, shifted by its condition.  What goes wrong is told by a
# file beside it, for it is no setting of the run.
OWN = """
    import json
    import time
    from pathlib import Path

    import torch
    from toca_kernels.apps.sampling import noise

    WRONG = Path(__file__).with_name("wrong.json")

    class Own:
        num_steps = 3

        def __init__(self, weight, shape):
            self.target = torch.nn.Linear(1, 1)
            torch.nn.init.constant_(self.target.weight, weight)
            torch.nn.init.zeros_(self.target.bias)
            self.shape = shape

        def timesteps(self, steps):
            return None

        def sample(self, requests, *, seed, steps):
            return (self.latents(requests, seed=seed, steps=steps) / 4 + 0.5).clamp(0, 1)

        def latents(self, requests, *, seed, steps):
            wrong = json.loads(WRONG.read_text()) if WRONG.exists() else {}
            indices = [request.index for request in requests]
            if len(requests) > wrong.get("room", 99):
                raise {"cuda": torch.OutOfMemoryError("CUDA out of memory"),
                       "cpu": RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
                       "other": RuntimeError("shapes do not fit")}[wrong["error"]]
            if wrong.get("stop") in indices:
                raise KeyboardInterrupt
            time.sleep(wrong.get("seconds", 0))
            of = torch.tensor([len(str(request.condition)) for request in requests])
            x = noise(seed, indices, self.shape) + 0.1 * of.view(-1, *[1] * len(self.shape))
            return x * float("nan") if wrong.get("nan") else x

    def sampler(*, device, dtype, weight=1.0, shape=(3, 8, 6)):
        return Own(weight, shape)
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    for name in ("tqdm", "PIL", "safetensors"):
        pytest.importorskip(name, reason="toca sample needs it")
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "own.py"
    path.write_text(textwrap.dedent(OWN))
    return str(path)


def wrong(own: str, **what: object) -> None:
    """What the sampler does wrong from now on."""
    Path(own).with_name("wrong.json").write_text(json.dumps(what))


def arguments(*argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    return parser.parse_args([str(one) for one in argv])


def draw(target: str, out: Path, *argv: object, count: int = 10, size: int = 4, **call) -> int:
    shown = () if "--prompts" in argv else ("--classes", "0-9")
    given = ("--count", count, "--batch-size", size, "--out", out, "--device", "cpu")
    return sample.run(arguments(target, *shown, *given, "--call", json.dumps(call), *argv))


def contents(folder: Path) -> dict[str, bytes]:
    """All files, by their path in the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Changes where a file is written anew."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def expected(target: str, count: int = 10, **call) -> np.ndarray:
    sampler = load(target, device="cpu", dtype=torch.float32, arguments=call)
    conditions = [i % 10 for i in range(count)]
    rows = sampler.sample(
        [sample.Request(i, one) for i, one in enumerate(conditions)], seed=0, steps=3
    )
    return to_bytes(rows)


# --- what is written -----------------------------------------------------------------------------


def test_pictures(own, tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "out"
    assert draw(own, out) == 0
    said = capsys.readouterr()
    assert f"{out}: 10 samples, 10 of them drawn now" in said.out
    assert "10/10" in said.err
    assert re.search(r"[\d.]+samples?/s", said.err)  # samples per second
    want = expected(own)
    assert want.shape == (10, 8, 6, 3)
    assert len(np.unique(want)) > 100
    for index, pixels in enumerate(want):
        assert np.array_equal(np.array(Image.open(out / f"{index:06d}.png")), pixels)
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert lines[3] == {"index": 3, "class": 3}
    assert sorted({path.suffix for path in out.rglob("*.*")}) == [".json", ".jsonl", ".png"]


def test_rounding():
    levels = torch.tensor([0.0, 0.4 / 255, 0.5 / 255, 1.4 / 255, 254.6 / 255, 1.0])
    rows = levels.view(1, 1, 1, 6)
    assert to_bytes(rows).ravel().tolist() == [0, 0, 1, 1, 255, 255]


@pytest.mark.parametrize("shape", [(3, 8, 6), (1, 8, 6), (5, 3, 8, 6)])
def test_one_file_for_evaluators(own, tmp_path, shape):
    out = tmp_path / "out"
    assert draw(own, out, "--format", "npz", shape=shape) == 0
    name = {3: "8x6x3", 4: "5x8x6x3"}[len(shape)]
    path = out / f"samples_10x{name}.npz"
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        pixels = archive["arr_0"]
    assert pixels.dtype == np.uint8
    want = expected(own, shape=shape)
    assert np.array_equal(pixels, np.repeat(want, 3, -1) if shape[0] == 1 else want)
    # As the ADM evaluator opens it: the header alone, then rows of the stream.
    with zipfile.ZipFile(path).open("arr_0.npy") as entry:
        assert np.lib.format.read_magic(entry) == (1, 0)
        found = np.lib.format.read_array_header_1_0(entry)
    assert found == (pixels.shape, False, np.dtype(np.uint8))


def test_frames_of_a_video(own, tmp_path):
    out = tmp_path / "out"
    assert draw(own, out, count=2, shape=(5, 3, 8, 6)) == 0
    names = [f"{i:06d}_{frame:04d}.png" for i in range(2) for frame in range(5)]
    assert sorted(path.name for path in out.glob("*.png")) == names


def test_latents_and_prompts(own, tmp_path):
    from safetensors.torch import load_file

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a ship\nan old ship\n")
    out = tmp_path / "out"
    given = ("--prompts", prompts, "--format", "safetensors", "--seed", 5)
    assert draw(own, out, *given, count=6) == 0
    found = [load_file(out / "batches" / f"{batch:06d}.safetensors") for batch in range(2)]
    assert torch.cat([one["index"] for one in found]).tolist() == [*range(6)]
    latents = torch.cat([one["latents"] for one in found])
    lengths = torch.tensor([6, 11] * 3).view(-1, 1, 1, 1)
    assert torch.equal(latents, noise(5, range(6), (3, 8, 6)) + 0.1 * lengths)
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert lines[3] == {"index": 3, "prompt": "an old ship"}


@pytest.fixture
def digits_here(monkeypatch) -> None:
    for name in ("diffusers", "sklearn", "tqdm"):
        pytest.importorskip(name, reason="the digits example needs it")
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_digits_with_toca(digits_here, tmp_path):
    """The last batch has another size; a batch knows nothing of the one before."""
    settings = ("--preset", "dit-ddim50", "--steps", 4, "--format", "safetensors")
    whole, second = tmp_path / "whole", tmp_path / "second"
    assert draw(str(DIGITS), whole, *settings, count=3, size=2) == 0
    draw(str(DIGITS), second, *settings, count=3, size=2)
    assert contents(whole) == contents(second)
    (second / "batches" / "000001.safetensors").unlink()
    assert draw(str(DIGITS), second, *settings, count=3, size=2) == 0
    assert contents(whole) == contents(second)
    plain = tmp_path / "plain"
    assert draw(str(DIGITS), plain, *settings[2:], count=3, size=2) == 0
    name = "batches/000000.safetensors"
    assert contents(plain)[name] != contents(whole)[name]


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", files.FORMATS)
def test_what_is_there_is_kept(kind, own, tmp_path, capsys):
    out = tmp_path / "out"
    draw(own, out, "--format", kind)
    before = stamps(out)
    assert draw(own, out, "--format", kind) == 0
    assert stamps(out) == before
    said = capsys.readouterr().out
    assert "all 10 samples are there" in said or " 0 of them drawn now" in said


@pytest.mark.parametrize("kind", files.FORMATS)
def test_a_run_that_was_stopped_ends_with_the_same_files(kind, own, tmp_path, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    draw(own, whole, "--format", kind)
    wrong(own, stop=6)
    assert draw(own, out, "--format", kind) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert files.is_done(out, 0)
    assert not files.is_done(out, 1)
    partial = out / "batches" / ".000001.npz.abcd.partial"  # of a process that was killed
    partial.write_bytes(b"half")
    before = stamps(out)
    wrong(own)
    assert draw(own, out, "--format", kind) == 0
    assert "6 of them drawn now" in capsys.readouterr().out
    assert contents(out) == contents(whole)
    assert not partial.exists()
    after = stamps(out)
    assert all(after[name] == stamp for name, stamp in before.items() if name in after)


def spoil(out: Path, kind: str) -> set[str]:
    """Damages files of batches 0 to 3 in four ways; returns which must be written anew."""
    batches = out / "batches"
    if kind == "png":
        name = {0: "000001.png", 1: "000002.png", 2: "000005.png"}
    else:
        name = {batch: f"batches/{batch:06d}.{kind}" for batch in range(3)}
    content = (out / name[0]).read_bytes()
    middle = len(content) // 2
    (out / name[0]).write_bytes(
        content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    )
    (out / name[1]).write_bytes((out / name[1]).read_bytes()[:-7])
    (out / name[2]).unlink()
    (batches / "000003.json").write_text("{")
    records = {f"batches/{batch:06d}.json" for batch in range(4)}
    return {*name.values(), *records}


@pytest.mark.parametrize("kind", files.FORMATS)
def test_damaged_files_are_found_and_nothing_else_is_touched(kind, own, tmp_path):
    out = tmp_path / "out"
    draw(own, out, "--format", kind, size=2)
    for path in (*out.glob("samples_*"), *out.glob("done.json")):
        path.unlink()  # whole, it would stand for the batches
    whole, before = contents(out), stamps(out)
    spoiled = spoil(out, kind)
    assert contents(out) != whole
    assert draw(own, out, "--format", kind, size=2) == 0
    have, after = contents(out), stamps(out)
    assert {name: have[name] for name in whole} == whole
    assert {name for name in whole if after[name] != before[name]} == spoiled


def test_a_damaged_file_of_all_samples_is_made_anew(own, tmp_path):
    out = tmp_path / "out"
    draw(own, out, "--format", "npz")
    whole, before = contents(out), stamps(out)
    path = next(out.glob("samples_*"))
    path.write_bytes(path.read_bytes()[:-1])
    assert draw(own, out, "--format", "npz") == 0
    assert contents(out) == whole
    assert {name for name, stamp in stamps(out).items() if stamp != before[name]} == {path.name}


# --- folders of others ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 12}, "count: 10 there, 12 now"),
        ({"size": 5}, "batch_size: 4 there, 5 now"),
        ({"weight": 2.0}, 'arguments: {} there, {"weight": 2.0} now'),
        (["--seed", "1"], "seed: 0 there, 1 now"),
        (["--steps", "4"], "steps: 3 there, 4 now"),
        (["--format", "npz"], 'format: "png" there, "npz" now'),
        (["--dtype", "bfloat16"], 'dtype: "float32" there, "bfloat16" now'),
        (["--classes", "0-8"], "conditions: "),
    ],
)
def test_a_folder_of_another_run_is_refused(change, words, own, tmp_path):
    out = tmp_path / "out"
    draw(own, out)
    before = contents(out)
    argv, given = (change, {}) if isinstance(change, list) else ([], change)
    with pytest.raises(ValueError, match="belongs to another run") as refusal:
        draw(own, out, *argv, **given)
    assert words in str(refusal.value)
    assert contents(out) == before


def test_other_weights_are_another_run(own, tmp_path):
    out = tmp_path / "out"
    draw(own, out)
    script = Path(own)
    kept = script.read_text()
    script.write_text(kept.replace("weight=1.0", "weight=1.5"))
    with pytest.raises(ValueError, match=r"another run \(weights: "):
        draw(own, out)
    script.write_text(kept)
    assert draw(own, out) == 0


def test_samples_of_nobody_are_left_alone(own, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "000000.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"has 000000.png and no run.json; give another --out"):
        draw(own, out)
    assert (out / "000000.png").read_bytes() == b"mine"
    (out / "000000.png").unlink()
    (out / "run.json").write_text("?")
    with pytest.raises(ValueError, match="expected a run's settings"):
        draw(own, out)


def test_two_runs_do_not_write_to_one_folder(own, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    at = os.open(out, os.O_RDONLY)
    fcntl.flock(at, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another run is writing there"):
        draw(own, out)
    os.close(at)
    assert draw(own, out) == 0


def test_a_resumed_run_keeps_its_threads(own, tmp_path, with_threads):
    out = tmp_path / "out"
    assert draw(own, out, "--threads", 1) == 0
    with_threads(2, lambda: draw(own, out))
    with pytest.raises(ValueError, match="threads: 1 there, 2 now"):
        draw(own, out, "--threads", 2)


# --- memory, disks and settings ------------------------------------------------------------------


@pytest.mark.parametrize("error", ["cuda", "cpu"])
def test_memory_that_runs_out_halves_the_batch(error, own, tmp_path, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    draw(own, whole, size=8)
    wrong(own, room=3, error=error)
    assert draw(own, out, size=8) == 0
    said = capsys.readouterr().err
    assert "out of memory with 8 samples at once, going on with 4" in said
    assert said.count("out of memory") == 2  # from then on 2 at once
    have, want = contents(out), contents(whole)
    records = [json.loads(have[f"batches/{batch:06d}.json"]) for batch in range(2)]
    assert [one.get("parts") for one in records] == [[2, 2, 2, 2], None]
    assert {n: c for n, c in have.items() if "0.json" not in n} == {
        n: c for n, c in want.items() if "0.json" not in n
    }


def test_no_memory_for_one_sample(own, tmp_path):
    wrong(own, room=0, error="cuda")
    words = "expected enough for a batch of 1, there is not: CUDA out of memory$"
    with pytest.raises(ValueError, match=words):
        draw(own, tmp_path / "out")
    wrong(own, room=0, error="other")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        draw(own, tmp_path / "out")


def test_no_memory_for_one_sample_repeats_the_numbers_of_the_refusal(
    digits_here, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(room, "free_bytes", lambda device: 1 << 20)
    argv = ("--preset", "dit-ddim50", "--steps", 4)
    with pytest.raises(ValueError, match="expected enough for a batch of 1") as refusal:
        draw(str(DIGITS), tmp_path / "out", *argv, count=2, size=2)
    assert "out of memory with 2 samples at once, going on with 1" in capsys.readouterr().err
    assert "caches of one guidance branch: " in str(refusal.value)
    assert re.search(r"[\d.]+ MiB needed for attn, mlp, ", str(refusal.value))
    assert "1.00 MiB free on cpu" in str(refusal.value)
    assert "with cache_dtype='int8'" in str(refusal.value)
    assert not list((tmp_path / "out").glob("*.png"))


def test_memory_of_a_failed_call_is_freed_before_the_next():
    """The error holds the frames of the call, and they its tensors."""
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def call(requests):
        assert all(one() is None for one in held)
        x = torch.zeros(8)
        held.append(weakref.ref(x))
        if len(requests) > 1:
            raise torch.OutOfMemoryError
        return x[None].clone()

    drawer = Drawer(call, lambda: None, 4)
    assert drawer([sample.Request(i, 0) for i in range(4)])[1] == [1, 1, 1, 1]


def test_looking_at_the_folder_takes_little_of_the_time(tmp_path, monkeypatch):
    """50,000 samples are thousands of files: counting them after each batch takes ever longer."""
    now, looks = [0.0], []
    monkeypatch.setattr(batches.time, "perf_counter", lambda: now[0])

    def count() -> int:
        now[0] += 0.05
        looks.append(now[0])
        return 8 * len(looks)

    progress = Progress(10**6, 0, shown=True)
    try:
        for _ in range(1000):  # batches of 0.1 s each
            now[0] += 0.1
            progress.look(count)
        assert 10 <= len(looks) <= 20  # 1 % of 100 s in looks of 0.05 s
        progress.look(count, at_once=True)
        assert progress.reached == 8 * len(looks)
    finally:
        progress.close()
    hidden = Progress(10, 0, shown=False)
    hidden.look(lambda: pytest.fail("nobody sees it"), at_once=True)


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob("*.partial"))


def test_a_folder_that_cannot_be_made(own, tmp_path):
    out = tmp_path / "out"
    out.write_text("a file")
    for place in (out, out / "below"):
        with pytest.raises(OSError, match=f"{place}: cannot be made: "):
            draw(own, place)
    assert out.read_text() == "a file"


@contextlib.contextmanager
def disk(at: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(at)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


class Lockable:
    """A folder that can be made unwritable with all in it, and writable again.

    Permissions do that; root writes all the same, so for it the folder is a disk of its own, which
    is mounted read-only.
    """

    def __init__(self, at: Path) -> None:
        self.at, self.reason = at, "Permission denied"
        if os.geteuid() == 0:
            self.reason = "Read-only file system"

    def lock(self, shut: bool = True) -> None:
        if os.geteuid():
            for place in (self.at, *self.at.rglob("*")):
                if place.is_dir():
                    place.chmod(0o555 if shut else 0o755)
            return
        command = ["mount", "-o", f"remount,{'ro' if shut else 'rw'}", str(self.at)]
        for _ in range(200):  # it is refused while a process has a file open to write
            if not subprocess.run(command, capture_output=True).returncode:
                return
            time.sleep(0.01)
        subprocess.run(command, check=True)


@pytest.fixture
def lockable(tmp_path) -> Iterator[Lockable]:
    at = tmp_path / "lockable"
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            stack.enter_context(disk(at, "4m"))
        else:
            at.mkdir()
        folder = Lockable(at)
        stack.callback(folder.lock, False)
        yield folder


def test_a_folder_that_is_unwritable_from_the_start(own, lockable):
    lockable.lock()
    out = lockable.at / "out"
    with pytest.raises(OSError, match=f"{out}: cannot be made: {lockable.reason}"):
        draw(own, out)
    assert not out.exists()


@pytest.mark.parametrize("kind", files.FORMATS)
def test_a_folder_that_becomes_unwritable(kind, own, tmp_path, lockable, monkeypatch, capsys):
    out, whole = lockable.at / "out", tmp_path / "whole"
    draw(own, whole, "--format", kind)
    save = files.save_batch

    def save_batch(folder: Path, number: int, *of_it: object) -> None:
        lockable.lock(number == 1)
        save(folder, number, *of_it)

    monkeypatch.setattr(files, "save_batch", save_batch)
    name = "000004.png" if kind == "png" else f"000001.{kind}"
    with pytest.raises(OSError, match=f"{name}: cannot be written: {lockable.reason}"):
        draw(own, out, "--format", kind)
    monkeypatch.undo()
    assert partials(out) == []
    assert files.count_done(out) == 1
    assert contents(out).items() <= contents(whole).items()
    lockable.lock(False)
    assert draw(own, out, "--format", kind) == 0
    assert "6 of them drawn now" in capsys.readouterr().out
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("kind", files.FORMATS)
def test_a_whole_folder_may_be_unwritable(kind, own, lockable):
    out = lockable.at / "out"
    draw(own, out, "--format", kind)
    before = stamps(out)
    lockable.lock()
    assert draw(own, out, "--format", kind) == 0
    assert stamps(out) == before


def test_a_file_that_cannot_be_written_leaves_nothing(own, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    draw(own, whole)
    synced: list[int] = []

    def full(at: int) -> None:
        synced.append(at)
        if len(synced) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"\.png: cannot be written: No space left on device; make"):
        draw(own, out)
    assert partials(out) == []
    written = contents(out)
    assert written.items() <= contents(whole).items()
    assert 2 < len(written) < len(contents(whole))
    monkeypatch.undo()
    assert draw(own, out) == 0
    assert contents(out) == contents(whole)


@pytest.fixture
def small_disk(tmp_path):
    with disk(tmp_path / "disk", "64k") as at:
        yield at


@pytest.mark.parametrize("kind", files.FORMATS)
def test_a_full_disk(kind, own, tmp_path, small_disk):
    out, whole = small_disk / "out", tmp_path / "whole"
    shape = (3, 24, 24)
    draw(own, whole, "--format", kind, count=24, shape=shape)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(40 << 10))
    with pytest.raises(OSError, match="cannot be written: No space left on device"):
        draw(own, out, "--format", kind, count=24, shape=shape)
    assert partials(out) == []
    assert contents(out).items() <= contents(whole).items()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert draw(own, out, "--format", kind, count=24, shape=shape) == 0
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--count", "0"], "count: expected at least 1, got 0"),
        (["--batch-size", "0"], "batch_size: expected at least 1"),
        (["--steps", "0"], "steps: expected at least 1"),
        (["--seed", "-1"], "seed: expected a number >= 0"),
        (["--call", "[1]"], "expected a JSON object"),
        (["--call", '{"colour": 1}'], "unexpected keyword argument 'colour'"),
        (["--classes", "9-0"], "expected a range that runs up"),
        (["--preset", "nothing"], "preset: expected one of"),
    ],
)
def test_refusals_are_in_words(argv, words, own, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)):
        draw(own, tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


def test_samples_that_are_not_finite_are_refused(own, tmp_path):
    wrong(own, nan=True)
    with pytest.raises(ValueError, match="samples 0 to 3: expected finite numbers"):
        draw(own, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_sampler_without_latents(own, tmp_path):
    script = Path(own)
    script.write_text(script.read_text().replace("latents", "_latents"))
    with pytest.raises(ValueError, match="format: expected png or npz"):
        draw(own, tmp_path / "out", "--format", "safetensors")
