"""What `toca bench` and the benchmarks measure with; times themselves are not tested."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models import diffusers
from toca_kernels import native
from toca_kernels.apps import bench
from toca_kernels.apps.bench import disagreement, measure
from toca_kernels.apps.measuring import roofline, timing
from toca_kernels.apps.measuring.cases import CASES, Inputs
from toca_kernels.apps.measuring.shapes import SHAPES, Shape
from toca_kernels.apps.measuring.timing import Clock, Spread

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
SHAPE = Shape("tiny", B=2, N=16, C=32, H=2, k=5, layers=3, text=8, cell=2, dtype=torch.float32)


class PretendedGPU(Clock):
    """A clock whose device launches at once: eviction takes 2 ms, a call what it sleeps."""

    def __init__(self) -> None:
        self.device, self.cuda = CPU, True
        self.events: list[str] = []

    def evict(self) -> None:
        self.events.append("evict")
        time.sleep(0.002)

    def timed(self, run, *args):
        return self._between_events(run, *args)

    def _between_events(self, run, *args):
        started = time.perf_counter()
        result = run(*args)
        return time.perf_counter() - started, result

    def captured(self, run):
        run()
        return run

    def peak_bytes(self, run):
        run()
        return 3 * 2**20


# --- the clock -----------------------------------------------------------------------------------


def test_quantiles():
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Spread(3.5, 2.0, 5.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_runs_take_turns():
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = timing.in_turns(runs, Clock("cpu"), repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert set(seconds) == {"a", "b"}


def test_a_call_is_timed_and_its_result_returned():
    seconds, result = Clock("cpu").timed(lambda x: time.sleep(0.01) or x, 7)
    assert result == 7
    assert seconds >= 0.01


def test_time_in_a_graph_leaves_the_eviction_out():
    clock = PretendedGPU()
    runs = {"slow": lambda: time.sleep(0.004), "nothing": lambda: None}
    spread = clock.in_graphs(runs, repeats=3)
    assert 0.003 < spread["slow"].median < 0.02
    assert spread["nothing"].median < 0.002
    assert clock.events.count("evict") > 0


# --- cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CASES)
def test_cases_are_right_and_can_be_repeated(op):
    case = CASES[op](Inputs(SHAPE, CPU))
    want = case.result("reference")
    for backend in bench.bodies(op, CPU):
        assert not disagreement(case.result(backend), want, torch.float32)
        case.run(backend)()
        case.run(backend)()
    for peer in case.peers.values():
        peer()


@pytest.mark.parametrize("op", [op for op in CASES if op != "select_tokens"])
def test_what_the_compiler_gets_is_the_op(op):
    case = CASES[op](Inputs(SHAPE, CPU))
    result = case.plain()
    result = list(result) if isinstance(result, tuple) else [result]
    assert not disagreement(result, case.result("reference")[: len(result)], torch.float32)


def test_the_stored_map_has_the_same_scores():
    case = CASES["attention_scores"](Inputs(SHAPE, CPU))
    assert not disagreement([case.peers["stored map"]()], case.result("reference"), torch.float32)


def test_bytes_and_flops_by_hand():
    B, N, C, k, L, e = 2, 16, 32, 5, 8, 4
    x, row = B * N * C * e, C * e
    gather = 2 * B * k * row + B * k * row + 3 * B * row + 8 * B * k
    mlp = 2 * B * k * row + (2 * 4 * C * C + 4 * C + C) * e
    # x, out, attention; of the MLP old rows and fresh ones, which are also written; gates, inverse
    scatter = 3 * x + B * (N - k) * row + 2 * B * k * row + 2 * B * row + 4 * B * N
    # of both caches slopes and distances: of the MLP those of old rows, and of fresh ones what is
    # written, and what the difference is taken from
    forecast = scatter + x + B * (N - k) * row + 2 * B * k * row + 2 * 4 * B * N
    rows = 3 * B
    by_hand = {
        "gather_modulate": gather,
        "mlp_rows": mlp,
        "scatter_residual": scatter,
        "scatter_residual_forecast": forecast,
        "partial_mlp": gather + mlp + scatter,
        "select_tokens": rows * (N * (4 + 4 + 4 + 4) + 8 * k + 4),
        "attention_scores": 2 * x + 4 * B * 2 * N + 4 * B * N,
        "scored_attention": 4 * x + 2 * (4 * B * 2 * N) + 4 * B * N,  # q, k, v, out; lse twice
        "partial_attention": 2 * B * k * row + 2 * B * L * row + 4 * B * 2 * k,
        "attention_entropy": B * k * row + B * L * row + 4 * B * 2 * k + 4 * B * k + B * L,
    }
    found = {op: CASES[op](Inputs(SHAPE, CPU)) for op in by_hand}
    assert {op: case.work.bytes for op, case in found.items()} == by_hand
    assert set(by_hand) == set(CASES)
    assert found["mlp_rows"].work.flops == found["partial_mlp"].work.flops
    assert found["mlp_rows"].work.flops == 2 * B * k * (2 * C * 4 * C)
    assert found["attention_scores"].work.flops == 2 * B * N * N * C
    assert found["scored_attention"].work.flops == 2 * (2 * B * N * N * C)
    assert found["partial_attention"].work.flops == 2 * (2 * B * k * L * C)
    assert found["attention_entropy"].work.flops == 2 * B * k * L * C


def test_bytes_of_a_ragged_selection():
    ragged = Shape("ragged", B=2, N=16, C=32, H=2, k=2, layers=4, ragged=True)
    assert ragged.counts == [2, 2, 1, 1, 0, 0, 0, 0]
    assert roofline.work(ragged)["select_tokens"].bytes == 8 * (16 * 16 + 4) + 8 * (2 * 2 + 2 * 1)


def test_the_roofline_is_the_slowest_of_the_rates():
    (text,) = [line for line in roofline.as_markdown().splitlines() if "mlp_rows | FLUX" in line]
    assert text.split(" | ")[2:4] == ["156.69", "69.61"]
    a100 = roofline.DEVICES[0]
    assert roofline.Work(1, 1).seconds(a100) == a100.kernel
    assert roofline.Work(a100.bytes, 1).seconds(a100) == 1
    assert roofline.Work(1, a100.attention, attention=True).seconds(a100) == 1
    assert roofline.Work(1, 1, a100.exponentials).seconds(a100) == 1


def test_the_shapes_of_flux_and_pixart_are_those_of_the_models():
    found = {shape.name: shape for shape in SHAPES}
    flux, pixart = found["FLUX 1024"], found["PixArt-alpha 1024"]
    assert (flux.N, flux.C, flux.H, flux.D, flux.text) == (4096 + 512, 3072, 24, 128, 0)
    assert (pixart.N, pixart.C, pixart.H, pixart.D, pixart.text) == (4096, 1152, 16, 72, 120)


def test_ops_that_a_shape_does_not_have():
    plain = Shape("no text", B=1, N=16, C=32, H=2, k=5)
    assert CASES["attention_entropy"](Inputs(plain, CPU)) is None


def chosen(*argv: str, device: str = "cpu") -> list[str]:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return [shape.name for shape in bench._shapes(parser.parse_args(argv), torch.device(device))]


def test_shapes_by_name():
    assert chosen() == ["DiT-XL/2 256", "DiT-XL/2 256, batch 8"]
    assert {"DiT-XL/2 256, batch 64", "PixArt-alpha 1024", "FLUX 1024"} < set(chosen(device="cuda"))
    assert chosen("--shape", "flux") == ["FLUX 1024"]
    assert chosen("--shape", "DiT-XL/2 256") == ["DiT-XL/2 256"], "a whole name is that shape only"
    assert len(chosen("--shape", "dit", "flux")) > 3
    assert len(chosen("--tokens", "64")) == 1


# --- the gate ------------------------------------------------------------------------------------


def test_disagreements_are_put_into_words():
    have, want = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 2.0])
    assert not disagreement([want + 1e-6], [want], torch.float32)
    assert "by 5.0e-01 of the largest" in disagreement([have], [want], torch.bfloat16)
    assert "nan" in disagreement([torch.full((4,), torch.nan)], [want], torch.bfloat16)
    index = torch.tensor([1, 2, 3])
    assert not disagreement([index], [index], torch.float32)
    assert "1 of 3 indices" in disagreement([torch.tensor([1, 2, 4])], [index], torch.float32)
    assert "instead of" in disagreement([have[:3]], [want], torch.float32)


def rows_of(op, clock=None, **options):
    settings = {"repeats": 2, "compiled": False} | options
    names = bench.bodies(op, CPU)
    return measure(
        CASES[op](Inputs(SHAPE, CPU)), names, clock or Clock("cpu"), torch.float32, **settings
    )


@pytest.fixture
def wrong_body(monkeypatch, request):
    """A native scatter_residual that forgets the caches."""
    if native._C is None:
        pytest.skip("the native backend is not built")

    def scatter_residual(x, gates, caches, fresh, inverse, out, *_):
        out.copy_(x)

    monkeypatch.setattr(native, "scatter_residual", scatter_residual)


def test_a_wrong_result_gets_no_time(wrong_body):
    (row,) = rows_of("scatter_residual")
    assert "differs from the reference" in row["failed"]
    assert set(row) == {"backend", "failed"}


def test_a_wrong_result_is_a_failure_of_the_command(wrong_body, capsys):
    from toca_kernels.cli import main

    argv = ["--device", "cpu", "--tokens", "16", "--channels", "32", "--heads", "2"]
    ops = ["--op", "scatter_residual", "gather_modulate"]
    assert main(["bench", *argv, *ops, "--repeats", "1"]) == 1
    text = capsys.readouterr().out
    assert "FAILED scatter_residual" in text
    assert "| gather_modulate |" in text


def test_a_backend_that_raises_is_a_finding(monkeypatch):
    if native._C is None:
        pytest.skip("the native backend is not built")

    def gather_modulate(*_):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(native, "gather_modulate", gather_modulate)
    (row,) = rows_of("gather_modulate")
    assert row["failed"] == "RuntimeError: no such kernel"


def test_a_peer_that_does_not_run_is_left_out(monkeypatch):
    def topk(*_):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(torch, "topk", topk)
    (row,) = rows_of("select_tokens")
    assert row["peers"] == {}
    assert row["skipped"] == {"torch.topk": "OutOfMemoryError: too much"}


# --- on a GPU, pretended -------------------------------------------------------------------------


def test_rates_are_of_times_in_a_graph_where_there_is_one():
    (row,) = rows_of("attention_scores", PretendedGPU())
    assert row["graph us"] is not None
    assert row["GB/s"] == pytest.approx(1e-3 * row["bytes"] / row["graph us"])
    assert row["peers"]["SDPA"]["graph us"] is not None
    assert "adds " in row["over peers"]
    assert "stored map, its memory 3 MiB for 3" in row["over peers"]


def test_what_a_graph_cannot_hold_is_not_captured():
    clock = PretendedGPU()
    captured: list[object] = []
    clock.captured = lambda run: captured.append(run) or run
    (row,) = rows_of("select_tokens", clock)
    assert row["graph us"] is not None
    assert len(captured) == 4  # the eviction, the op, a copy and torch.topk; not the reference
    assert row["speed-up"] > 0


# --- the record ----------------------------------------------------------------------------------


def test_the_record_says_how_and_where(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/ops.py", "--op", "mlp_rows"])
    path = tmp_path / "new" / "ops.json"
    timing.write(str(path), "ops", [{"us": 1.5}], {"cpu": "one"})
    assert json.loads(path.read_text()) == {
        "benchmark": "ops",
        "command": "python benchmarks/ops.py --op mlp_rows",
        "machine": {"cpu": "one"},
        "rows": [{"us": 1.5}],
    }
    timing.write(None, "ops", [], {})


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("somewhere/bin/toca", "toca bench"),
        ("somewhere/toca_kernels/__main__.py", "python -m toca_kernels bench"),
    ],
)
def test_the_record_names_the_command_not_its_place(program, command, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "bench"])
    timing.write(str(tmp_path / "r.json"), "ops", [], {})
    assert json.loads((tmp_path / "r.json").read_text())["command"] == command


def test_the_machine():
    found = timing.machine("cpu")
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert "device" not in found


def test_tables_leave_out_what_is_missing():
    text = timing.table([{"a": 1.25, "b": None}, {"a": 2.0, "b": 0.5}], {"a": ".1f", "b": ".0%"})
    assert text == "| a | b |\n| --- | --- |\n| 1.2 |  |\n| 2.0 | 50% |"


# --- the scripts ---------------------------------------------------------------------------------


FAMILIES = (
    "flux-double",
    "flux-single",
    "pixart-1024",
    "wan-1.3b",
    "sd3.5-medium",
    "qwen-image",
    "stdit3-480p",
)


@pytest.fixture
def tiny_family(request):
    """A family's blocks, few and narrow, with its session and its peer."""
    import families

    if families.FAMILIES[request.param].model != "STDiT3":  # whose blocks are of benchmarks/
        diffusers()
    tiny = "--tokens 64 --text 8 --heads 2 --dtype float32 --depth 2"
    with torch.no_grad():
        case = families.Case(families.FAMILIES[request.param], families.arguments(tiny.split()))
        config = case.config(0.3, families.STEPS)
        yield case, families.Ours(case, config), families.Naive(case, config)


@pytest.mark.parametrize("tiny_family", FAMILIES, indirect=True)
def test_a_family_has_a_peer_that_agrees(tiny_family):
    import families

    families.check(*tiny_family)
    _, ours, peer = tiny_family
    done = ours.session.summary()
    assert (done.full_steps, done.cached_steps) == (1, 1)
    assert all(0.25 <= ratio <= 0.3 for ratio in peer.ratio.values())


@pytest.mark.parametrize("tiny_family", FAMILIES, indirect=True)
def test_a_peer_that_forgets_its_fresh_rows_gets_no_time(tiny_family, monkeypatch):
    import families

    monkeypatch.setattr(
        families.naive.Cache, "write", lambda self, name, index, rows: self.out[name]
    )
    with pytest.raises(SystemExit, match="differs from plain torch"):
        families.check(*tiny_family)


@pytest.mark.parametrize("tiny_family", ["stdit3-480p"], indirect=True)
def test_flops_of_a_spatial_and_a_temporal_block(tiny_family):
    """A token attends to its frame in the one and to its place in all frames in the other."""
    import families

    families.check(*tiny_family)
    case, ours, peer = tiny_family
    (T, rows, cols), C = case.grid, case.stack.arguments["x"].shape[2]
    assert (T, rows * cols, len(case.stack.blocks_in_turn)) == (4, 16, 2 * case.depth)
    samples = case.family.batch * case.depth
    linears, mlp = 2 * (3 + 1 + 2 + 8) * C**2, 2 * 8 * C**2  # keys of the text are not counted
    full = samples * T * rows * cols * (2 * linears + 4 * C * (T + rows * cols))
    cached = samples * sum(peer.k.values()) * mlp
    assert set(peer.ratio) == {"spatial_mlp", "temporal_mlp"}
    done = ours.session.summary()
    assert (done.flops_full, done.flops_done) == (2 * full, full + cached)


def test_families_without_diffusers(monkeypatch):
    import family_blocks

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RuntimeError, match="expected diffusers"):
        family_blocks.build(family_blocks.FAMILIES["flux-double"], 2, 1, "cpu")


def test_pages_show_results_of_both_devices(tmp_path, monkeypatch):
    import readme

    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    record = {"torch": "2.13", "commit": "abc", "cpu": "one", "threads": 2}
    for place, machine in (("gpu/block", {"device": "H100", "cuda": "13.0"}), ("block", {})):
        path = tmp_path / f"{place}.json"
        rows = [{"block": "a", "graphed speed-up": None}, {"block": "b", "graphed speed-up": 4.0}]
        timing.write(str(path), "block", rows, record | machine)
    page = "<!-- results: {} -->\n<!-- end -->\n"
    old = page.format("gpu/block").replace("<!-- end", "old\n<!-- end")
    text = readme.updated(old)
    assert "(H100, CUDA 13.0, torch 2.13, commit abc)" in text
    assert "| block | graphed speed-up |" in text
    assert readme.updated(text) == text
    assert "(one, 2 threads, torch 2.13" in readme.rendered("block")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("ops.py", "--tokens 16 --channels 32 --heads 2 --repeats 1"),
        ("block.py", "--size S --tokens 16 --batch 1 --dtype float32 --depth 1 --repeats 1"),
        ("end_to_end.py", "--size S --tokens 16 --batch 1 2 --depth 1 --steps 4 --dtype float32"),
        ("families.py", "--tokens 64 --text 8 --heads 2 --dtype float32 --repeats 1 --depth 1"),
    ],
)
def test_the_benchmarks_run(script, arguments, tmp_path):
    if script == "families.py":
        diffusers()
    path = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / script), "--device", "cpu", *arguments.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--json", str(path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["machine"]["commit"]
    assert result["rows"]
    assert done.stdout.startswith("| ")
