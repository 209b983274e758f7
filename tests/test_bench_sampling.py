"""What benchmarks/sampling.py measures with, and memory over many batches of `toca sample`."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="benchmarks/sampling.py draws the digits example")
pytest.importorskip("sklearn", reason="benchmarks/sampling.py draws the digits example")
pytest.importorskip("tqdm", reason="toca sample needs it")
pytest.importorskip("PIL", reason="toca sample needs it")

import sampling
from sampling import MIB, Point

# Keeps a little of every batch: the kind of mistake that a soak is for.
LEAK = """
    import time
    import torch

    class Leak:
        num_steps = 1
        kept = []

        def __init__(self):
            self.target = torch.nn.Linear(1, 1)

        def timesteps(self, steps):
            return None

        def sample(self, requests, *, seed, steps):
            self.kept.append(torch.ones(MIB_A_BATCH, 1 << 18))  # 1 MiB each
            time.sleep(0.1)
            return torch.zeros(len(requests), 3, 4, 4)

    def sampler(*, device, dtype):
        return Leak()
"""


def points(of: dict[int, float]) -> list[Point]:
    """Samples -> MiB."""
    return [Point(samples, int(held * MIB), int(held * MIB)) for samples, held in of.items()]


def test_slope():
    line = {n: 700 + 0.003 * n for n in range(8, 808, 8)}
    assert sampling.slope(points(line)) == pytest.approx(3 * MIB, rel=1e-4)
    filling = {n: held - 300 * (n <= 200) for n, held in line.items()}  # the first quarter
    assert sampling.slope(points(filling)) == pytest.approx(3 * MIB, rel=1e-4)
    late = {n: held + 300 * (n == 208) for n, held in line.items()}
    assert sampling.slope(points(late)) < -MIB
    assert sampling.slope(points(dict.fromkeys(line, 500.0))) == pytest.approx(0, abs=1)
    with pytest.raises(ValueError, match="soak: expected at least 12 batches, got 11"):
        sampling.slope(points(line)[:11])


def test_growth_above_the_limit_fails(capsys):
    args = sampling.arguments(["--soak", "800", "--most", "3.5"])
    for growth, status in ((3.0, 0), (4.0, 1), (-4.0, 0)):
        grown = points({n: 700 + growth * n / 1000 for n in range(8, 808, 8)})
        row = sampling.soaked(args, grown)
        assert sampling.report_soak(row) == status
        said = capsys.readouterr()
        assert f"{growth:+.3f} MiB per 1,000 samples" in said.out
        assert ("expected at most 3.5 MiB" in said.err) == bool(status)
        assert json.loads(json.dumps(row)) == row


def test_rate_of_each_process():
    """Seconds at which batches of 4 ended: one process, then two of which one is slower."""
    assert sampling.rate([10.0, 12.0, 14.0], 4) == pytest.approx(2.0)
    assert sampling.rate([10.0, 9.0, 12.0, 10.0, 14.0, 11.0], 4, 2) == pytest.approx(3.0)


def test_ratios_are_of_rounds():
    args = sampling.arguments(["--count", "16"])
    rates = {"plain loop": [2.0, 1.0, 4.0], "toca sample": [1.9, 1.0, 3.6]}
    found = {name: [sampling.Run(r, 30.0) for r in values] for name, values in rates.items()}
    base, ours = sampling.rows_of(args, found, (1, 1), threads=1)
    assert base["ratio"] == 1
    assert ours["all ratios"] == pytest.approx([0.95, 1.0, 0.9])
    assert ours["ratio"] == pytest.approx(0.95)
    assert ours["overhead"] == pytest.approx(1 / 0.95 - 1)
    assert ours["samples/s"] == 1.9
    assert base["start-up s"] == pytest.approx(22.0)  # 30 s less 16 samples at 2 a second


def test_the_end_of_a_batch(tmp_path):
    records = tmp_path / "batches"
    records.mkdir()
    for index in range(5):
        picture = tmp_path / f"{index:06d}.png"
        picture.touch()
        os.utime(picture, (0, 10 + index))
    assert sampling.ends(tmp_path, 5, 2) == [11, 13, 14]
    for number in range(3):
        record = records / f"{number:06d}.json"
        record.touch()
        os.utime(record, (0, 20 + number))
    assert sampling.ends(tmp_path, 5, 2) == [20, 21, 22]


def test_other_pictures_are_noticed(tmp_path):
    from PIL import Image

    for folder, colour in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / folder).mkdir()
        Image.new("L", (4, 4), colour).save(tmp_path / folder / "000000.png")
    (tmp_path / "empty").mkdir()
    assert sampling.same_pictures(tmp_path / "a", tmp_path / "b")
    assert not sampling.same_pictures(tmp_path / "a", tmp_path / "c")
    assert not sampling.same_pictures(tmp_path / "a", tmp_path / "empty")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 2])
def test_a_soak_sees_what_a_sampler_keeps(kept, tmp_path):
    script = tmp_path / "leak.py"
    script.write_text(textwrap.dedent(LEAK).replace("MIB_A_BATCH", str(kept)))
    args = sampling.arguments(["--soak", "160", "--most", "50"])
    args.target, args.preset = str(script), None
    row = sampling.soaked(args, sampling.soak(args, tmp_path / "out"))
    assert row["batches seen"] >= 18
    assert row["slope"] == pytest.approx(kept * 1000 / 8, rel=0.1, abs=25)
    assert sampling.report_soak(row) == (1 if kept else 0)


@pytest.mark.slow
def test_memory_is_steady_over_many_batches(tmp_path):
    """The caches of a batch are 32 MiB; a run that kept them would grow by 4,000 MiB per 1,000."""
    args = sampling.arguments(["--soak", "120", "--steps", "3"])
    row = sampling.soaked(args, sampling.soak(args, tmp_path / "out"))
    assert row["batches seen"] >= 12
    assert abs(row["slope"]) < 100
    assert len(list(Path(tmp_path / "out").glob("*.png"))) == 120


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    path = tmp_path / "result.json"
    script = Path(sampling.__file__)
    line = ["--count", "4", "--batch-size", "2", "--steps", "2", "--rounds", "1", "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *line, str(path), "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| run | processes |")
    result = json.loads(path.read_text())
    assert result["machine"]["commit"]
    assert [row["processes"] for row in result["rows"]] == [1, 1, 1, 2]
    assert [*tmp_path.iterdir()] == [path]  # what was drawn is gone
