"""benchmarks/gpu.sh, with an interpreter and a sanitizer that only note what they are told."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
PARTS = ("build", "test", "sanitize", "ops", "block", "families", "end_to_end")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

# Says yes to the question for a CUDA device unless told otherwise; fails where told so.
PRETENDER = """#!/usr/bin/env bash
case "$*" in *is_available*) exit "${NO_GPU:-0}" ;; esac
echo "$(basename "$0") $*" >>"$TOLD"
case "$*" in *"${FAILING:-nothing}"*) exit 3 ;; esac
"""


class Machine:
    """A place where gpu.sh finds what it calls."""

    def __init__(self, place: Path) -> None:
        self.out, self.told = place / "out", place / "told"
        self.bin = place / "bin"
        self.bin.mkdir()
        for name in ("python", "compute-sanitizer"):
            program = self.bin / name
            program.write_text(PRETENDER)
            program.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.told.write_text("")
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env=os.environ
            | {
                "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
                "PYTHON": str(self.bin / "python"),
                "OUT": str(self.out),
                "TOLD": str(self.told),
            }
            | environment,
            capture_output=True,
            text=True,
        )

    def calls(self) -> list[str]:
        return self.told.read_text().splitlines()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_every_part_runs_and_is_reported(machine):
    done = machine.run()
    assert done.returncode == 0, done.stdout + done.stderr
    for part in PARTS:
        assert re.search(rf"^{part}: green, \d+ s$", done.stdout, re.MULTILINE)
        assert (machine.out / f"{part}.ok").exists()
        assert (machine.out / f"{part}.log").exists()
    calls = machine.calls()
    assert any("pip install" in call and "--no-deps" in call for call in calls)
    assert any("pytest" in call and "-m gpu" in call for call in calls)
    for name in ("ops", "block", "families", "end_to_end"):
        result = machine.out / f"{name}.json"
        assert any(f"{name}.py --device cuda" in c and str(result) in c for c in calls)


def test_limits_add_up_to_ten_minutes():
    (limits,) = re.findall(r"SECONDS_OF=\((.*)\)", SCRIPT.read_text())
    assert sum(map(int, re.findall(r"=(\d+)", limits))) <= 600


def test_what_is_done_is_not_done_again(machine):
    machine.run()
    done = machine.run()
    assert done.returncode == 0
    assert machine.calls() == []
    assert done.stdout.count("done before") == len(PARTS)
    machine.run("--force", "ops")
    assert len(machine.calls()) == 1


def test_another_commit_is_done_again(machine):
    machine.run("ops")
    (machine.out / "ops.ok").write_text("another\n")
    machine.run("ops")
    assert len(machine.calls()) == 1


def test_a_part_that_fails_is_red_and_the_others_run(machine):
    done = machine.run("ops", "block", FAILING="ops.py")
    assert done.returncode == 1
    assert "ops: RED, status 3" in done.stdout
    assert "block: green" in done.stdout
    assert not (machine.out / "ops.ok").exists()
    assert machine.run("ops", "block").returncode == 0
    assert len(machine.calls()) == 1, "only what failed is repeated"


def test_a_failing_record_of_the_machine_is_red(machine):
    assert machine.run("build", FAILING="timing.machine").returncode == 1


def test_every_tool_looks_at_every_kernel(machine):
    machine.run("sanitize")
    kernels = {
        name
        for path in (ROOT / "toca_kernels" / "triton").glob("*.py")
        for name in re.findall(r"^    launch\(\s*(\w+)", path.read_text(), re.MULTILINE)
    }
    calls = machine.calls()
    assert len(kernels) >= 7
    assert [call.split()[2] for call in calls] == ["memcheck", "racecheck", "initcheck"]
    for call in calls:
        assert set(re.findall(r"kns=(\w+)", call)) >= kernels
        assert "--error-exitcode 1" in call


def test_a_finding_of_one_tool_is_red(machine):
    assert machine.run("sanitize", FAILING="racecheck").returncode == 1
    assert len(machine.calls()) == 3


def test_without_a_gpu_it_says_so_and_does_nothing(machine):
    done = machine.run(NO_GPU="1")
    assert done.returncode == 2
    assert "run this on a machine with an NVIDIA GPU" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not machine.out.exists()


def test_families_are_left_out_without_diffusers(machine):
    done = machine.run("families", FAILING="import diffusers")
    assert done.returncode == 0
    assert "families: left out, diffusers is not installed here" in done.stdout
    assert not any("families.py" in call for call in machine.calls())


def test_an_unknown_part_is_refused(machine):
    done = machine.run("bench")
    assert done.returncode == 2
    assert "got 'bench'" in done.stderr
