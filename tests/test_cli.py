"""The `toca` command: what it prints, and how it refuses."""

import json
import re
import subprocess
import sys

import pytest
import torch

from toca_kernels import ToCaConfig, __version__, backends
from toca_kernels.apps.measuring.cases import CASES
from toca_kernels.cli import main

TINY = ["--device", "cpu", "--repeats", "2", "--dtype", "float32"]
TINY += ["--batch", "2", "--tokens", "16", "--channels", "32", "--heads", "2", "--layers", "3"]


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused: status 2, one line on stderr, which is returned."""

    def call(*argv: str) -> str:
        try:
            status = main(argv)
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert err.startswith("toca")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return call


def run_module(*argv: str, before: str = "") -> subprocess.CompletedProcess[str]:
    command = ["-m", "toca_kernels", *argv]
    if before:
        call = f"from toca_kernels.cli import main; raise SystemExit(main({list(argv)}))"
        command = ["-c", f"{before}; {call}"]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True)


# --- the command itself --------------------------------------------------------------------------


def test_it_runs_as_a_module():
    done = run_module("--version")
    assert (done.returncode, done.stdout) == (0, f"toca_kernels {__version__}\n")
    done = run_module("plan", "dit-ddim50", "--steps", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "toca plan: num_steps: expected an integer >= 1, got 0\n"


def test_help_names_every_subcommand(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    for name in ("bench", "check", "sample", "eval", "tune", "report", "aot", "plan"):
        assert re.search(rf"^ +{name} ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["backends", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_an_unknown_command_is_refused(argv, message, refused):
    assert message in refused(*argv)


# --- backends ------------------------------------------------------------------------------------


def test_backends_says_what_is_usable_and_why(capsys):
    assert main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(backends())
    for line, (name, status) in zip(lines, backends().items(), strict=True):
        assert line.split()[0] == name
        assert line.endswith(status.reason)
        assert ("not usable" in line) == (not status.available)


# --- plan ----------------------------------------------------------------------------------------


def test_plan_of_a_preset(capsys):
    assert main(["plan", "dit-ddim50"]) == 0
    text = capsys.readouterr().out
    assert "Plan of 50 steps" in text
    assert "mlp: 28 layers, N = 256" in text
    assert "(2.32x less)" in text


def test_plan_of_another_shape(capsys):
    argv = ["plan", "dit-ddpm250", "--steps", "12", "--layers", "4", "--tokens", "64"]
    assert main([*argv, "--channels", "384", "--heads", "6", "--batch", "1"]) == 0
    text = capsys.readouterr().out
    assert "Plan of 12 steps" in text
    assert "attn: 4 layers, N = 64" in text
    assert "batch 1" in text


def test_plan_of_a_saved_config(capsys, tmp_path):
    path = tmp_path / "own.json"
    ToCaConfig(interval=1).save(path)
    assert main(["plan", str(path), "--steps", "7"]) == 0
    assert "(1.00x less)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "toca plan: preset: expected one of ['dit-ddim50'"),
        (["dit-ddim50", "--heads", "7"], "heads: expected a divisor of channels=1152, got 7"),
        (["dit-ddim50", "--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
        (["flux-50"], "module_ratio: expected a factor for one of the modules"),
        (["no/such.json"], "No such file or directory: 'no/such.json'"),
        ([], "the following arguments are required: preset"),
    ],
)
def test_plan_refuses(argv, message, refused):
    assert message in refused("plan", *argv)


# --- aot -----------------------------------------------------------------------------------------


def test_aot_gets_the_rest_of_the_line(monkeypatch):
    aot = pytest.importorskip("toca_kernels.apps.aot", reason="Triton is not installed")
    given: list[list[str]] = []
    monkeypatch.setattr(aot, "main", given.append)
    assert main(["aot", "select_tokens", "--tokens", "64"]) == 0
    assert given == [["select_tokens", "--tokens", "64"]]


def test_aot_says_what_is_missing():
    done = run_module("aot", before="import sys; sys.modules['triton'] = None")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "toca aot: Triton is missing: pip install 'toca_kernels[triton]'\n"


# --- bench ---------------------------------------------------------------------------------------


def test_bench_times_every_op(capsys, tmp_path):
    path = tmp_path / "result" / "ops.json"
    assert main(["bench", *TINY, "--text", "8", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["benchmark"] == "ops"
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["copy GB/s"] > 0
    assert f"a long copy {result['machine']['copy GB/s']:.0f} GB/s" in text
    rows = result["rows"]
    assert [row["op"] for row in rows] == list(CASES)
    for row in rows:
        assert f"| {row['op']} |" in text
        assert row["us p20"] <= row["us"] <= row["us p80"]
        assert row["speed-up"] > 0
        assert row["of a copy"] > 0
        assert row["GB/s"] == pytest.approx(1e-3 * row["bytes"] / row["us"])
    peers = {row["op"]: set(row["peers"]) for row in rows}
    assert peers["attention_scores"] == {"SDPA", "stored map"}
    assert peers["select_tokens"] == {"torch.topk"}
    assert peers["partial_attention"] == {"SDPA"}
    assert peers["mlp_rows"] == {"F.linear"}


def test_bench_filters(tmp_path):
    path = tmp_path / "ops.json"
    argv = ["--op", "select_tokens", "gather_modulate", "--backend", "reference"]
    assert main(["bench", *TINY, *argv, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["op"], row["backend"]) for row in rows] == [
        ("select_tokens", "reference"),
        ("gather_modulate", "reference"),
    ]
    assert {row["dtype"] for row in rows} == {"float32"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "nothing"], "argument --op: invalid choice: 'nothing'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--shape", "GPT"], "shape: expected a part of one of 'DiT-XL/2 256'"),
        (["--tokens", "64", "--heads", "7"], "channels a multiple of heads"),
        (["--repeats", "0"], "repeats: expected at least 1, got 0"),
    ],
)
def test_bench_refuses(argv, message, refused):
    assert message in refused("bench", "--device", "cpu", *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_bench_refuses_what_is_not_here(refused):
    assert "finds no CUDA device here" in refused("bench", "--device", "cuda")
    assert "backend 'triton'" in refused("bench", "--device", "cpu", "--backend", "triton")
