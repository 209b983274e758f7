"""`toca tune`: schedules, costs, the search; what it stores, repeats and refuses."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import diffusers, tiny_dit
from pipelines import PIPELINES
from toca_kernels import ToCaConfig, enable, enabled
from toca_kernels.apps import tune
from toca_kernels.apps.evaluation.rounds import Times
from toca_kernels.apps.evaluation.settings import Setting
from toca_kernels.apps.sampling import Request
from toca_kernels.apps.sampling.loading import load
from toca_kernels.apps.tuning import confirm, cost, probe, schedule, search, space, timed
from toca_kernels.apps.tuning.state import State
from toca_kernels.apps.tuning.trials import Score, Trials
from toca_kernels.ops import ForecastCache, read_rows, store_rows

pytest.importorskip("tqdm", reason="it shows the progress")
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries

DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "sampler.py"
STEPS = 8

# A tiny random DiT with a loop around it; it notes what it draws, and can be made to break off.
SAMPLER = """
from pathlib import Path
import torch
from models import batched_guidance, separate_guidance, tiny_dit
from toca_kernels.apps.sampling import noise

class Tiny:
    num_steps = {steps}

    def __init__(self, folder, predict):
        self.target, self.drawn, self.predict = tiny_dit(), Path(folder) / "drawn", predict

    def timesteps(self, steps):
        return torch.linspace(999, 0, steps).round().tolist()

    def sample(self, requests, *, seed, steps):
        with open(self.drawn, "a") as file:
            file.write("x")
        if self.drawn.stat().st_size == int((self.drawn.parent / "breaks").read_text()):
            raise KeyboardInterrupt
        x = noise(seed, [one.index for one in requests], (4, 16, 16))
        y = torch.tensor([one.condition for one in requests])
        for t in self.timesteps(steps):
            out = self.predict(self.target, x, torch.full((len(y),), int(t)), y)
            x = x - out / steps
        return (x[:, :3] / 4 + 0.5).clamp(0, 1)

def sampler(*, device, dtype, folder, separate=False):
    return Tiny(folder, separate_guidance if separate else batched_guidance)
"""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "sampler.py").write_text(SAMPLER.format(steps=STEPS))
    (tmp_path / "breaks").write_text("0")
    return tmp_path / "sampler.py"


def drawn(sampler: Path) -> int:
    """Calls of the sampler so far."""
    return (sampler.parent / "drawn").stat().st_size


def loaded(sampler: Path, **given: bool):
    folder = {"folder": str(sampler.parent), **given}
    return load(str(sampler), device="cpu", dtype=torch.float32, arguments=folder)


def arguments(sampler: Path, out: str, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    given = ["--classes", "0-9", "--samples", "4", "--held-out", "2", "--cost", "flops"]
    given += ["--trials", "24", "--arguments", json.dumps({"folder": str(sampler.parent)})]
    return parser.parse_args([str(sampler), "--out", str(sampler.parent / out), *given, *more])


def run(sampler: Path, out: str, *more: str) -> Path:
    args = arguments(sampler, out, *more)
    assert tune.run(args) == 0
    return args.out


def report(out: Path) -> dict:
    return json.loads(out.with_suffix(".report.json").read_text())


# --- schedules -----------------------------------------------------------------------------------


def outputs(steps: int, modules: int = 3, width: int = 5) -> torch.Tensor:
    """(modules, steps, width): smooth, with jolts here and there."""
    generator = torch.Generator().manual_seed(0)
    moves = torch.randn(modules, steps, width, generator=generator, dtype=torch.float64)
    moves *= torch.rand(1, steps, 1, generator=generator) ** 2
    return moves.cumsum(1) + 3


def gram(y: torch.Tensor) -> np.ndarray:
    return (y @ y.mT).numpy()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_errors_are_those_of_the_forecast_cache(order):
    y = outputs(9)
    found = schedule.schedule_errors(gram(y), order, (0, 2, 4, 6))
    for module, rows in enumerate(y):
        values = torch.zeros(1, 1, y.shape[2])
        slopes = tuple(torch.zeros_like(values) for _ in range(order))
        distance, computed = torch.ones(1, 1), 0
        for step, want in enumerate(rows):
            cache = ForecastCache(values, slopes, distance, min(computed, order + 1))
            if step in (0, 2, 4, 6):
                whole = want.float()[None, None].contiguous()
                store_rows(cache, whole) if order else values.copy_(whole)
                distance.fill_(1)
                computed += 1
                assert found[module, step] == 0
                continue
            have = read_rows(cache, dtype=torch.float32)[0, 0] if order else values[0, 0]
            error = (have.double() - want).square().sum() / want.square().sum()
            assert found[module, step] == pytest.approx(float(error.clamp(max=4.0)), rel=1e-4)
            distance += 1


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("slope", [0.0, 1.5])
def test_schedules_are_the_best_of_all(order, slope):
    steps = 8
    inner, weights = gram(outputs(steps)), schedule.importance(steps, slope)
    gaps = schedule.gap_errors(schedule.mean_errors(inner, order, steps), weights)

    def error(full: tuple[int, ...]) -> float:
        return float((schedule.schedule_errors(inner, order, full).mean(0) * weights).sum())

    for count, found in enumerate(schedule.best_full_steps(gaps), start=1):
        every = [(0, *rest) for rest in itertools.combinations(range(1, steps), count - 1)]
        assert len(found) == count
        assert error(found) == pytest.approx(min(map(error, every)), abs=1e-12)


def test_schedules_with_short_gaps_reach_the_end():
    inner = gram(outputs(12))
    gaps = schedule.gap_errors(schedule.mean_errors(inner, 1, 4), np.ones(12))
    few, *rest = schedule.best_full_steps(gaps)[1:]
    assert few is None
    for found in rest:
        assert max(b - a for a, b in itertools.pairwise([*found, 12])) <= 4
    assert len(rest) == 10


# --- costs ---------------------------------------------------------------------------------------

FLOPS = cost.CostTable(
    unit="FLOPs",
    outside=0.0,
    untouched=100.0,
    full=(100.0,) * 3,
    cached=(10.0,) * 3,
    share={"attn": 0.4, "mlp": 0.6},
    extra={},
    scores={},
)
SHAPES = probe.Shapes({"attn": 4, "mlp": 4}, {"attn": 64, "mlp": 64})


def synthetic() -> dict[str, timed.Seconds]:
    """A machine on which 16 k / N + 1 are added by the MLP; it slows down, and hiccups once."""

    def seconds(full: float, cached: float) -> timed.Seconds:
        return timed.Seconds([full, 3 * full, 9e9], [cached, 3 * cached, 9e9])

    found = {f"order {order}": seconds(20.0 + order, 4.0 + order) for order in cost.ORDERS}
    found |= {f"mlp {ratio}": seconds(20.0, 5.0 + 16 * ratio) for ratio in cost.RATIOS}
    found |= {"scores attention": seconds(22.0, 9.0), "scores random": seconds(19.0, 9.0)}
    return found | {"fused": seconds(17.0, 4.0)}


def seconds_table() -> cost.CostTable:
    return timed.table(FLOPS, synthetic(), timed.Seconds([18.0, 54.0, 18.0], [], [6.0, 18.0, 9e9]))


def test_the_table_of_synthetic_timings():
    found = seconds_table()
    assert (found.unit, found.outside, found.untouched) == ("seconds", 6.0, 18.0)
    assert (found.full, found.cached) == ((20.0, 21.0, 22.0), (4.0, 5.0, 6.0))
    assert found.scores == {"attention": 2.0, "random": 0.0}
    assert found.fused == 3.0
    assert found.extra == {"mlp": ((1 / 16, 2.0), (1 / 4, 5.0), (1 / 2, 9.0))}
    assert cost.CostTable.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_runs_cost_the_sum_of_their_steps():
    table = seconds_table()
    config = ToCaConfig(full_at=(0, 2), fresh_ratio=0.5, layer_ratio={"mlp": (2.0, 1.0, 0.5, 0.0)})
    plan = SHAPES.plan(config, 4)
    # k / N of the layers: 1, 1/2, 1/4 and 0, where nothing is added.
    cached = 4.0 + (1 + 16 * 1 + 1 + 16 * 0.5 + 1 + 16 * 0.25 + 0) / 4
    full = 20.0 + 2.0  # leaves scores of the attention
    assert table.steps(plan, config).tolist() == pytest.approx([full, cached] * 2)
    few = config.replace(fresh_ratio=2.5 / 64, layer_ratio={})  # k = 2, less than was measured
    assert table.steps(SHAPES.plan(few, 4), few)[1] == pytest.approx(4.0 + 1 + 16 * 2 / 64)
    whole = 6.0 + 2 * (full + cached)
    assert table.relative(plan, config) == pytest.approx(whole / (6.0 + 4 * 18.0))
    reused = config.replace(fresh_ratio=0.0, forecast=2, full_steps="fused")
    assert table.steps(SHAPES.plan(reused, 4), reused).tolist() == [19.0, 6.0] * 2


def test_layers_and_modules_that_are_full_count_for_their_part():
    table, plan = seconds_table(), SHAPES.plan(ToCaConfig(full_at=(0,), fresh_ratio=0.0), 2)
    plan.full["attn"].setflags(write=True)
    plan.full["attn"][1] = [True, False, False, True]
    idle = ToCaConfig(fresh_ratio=0.0)
    assert table.steps(plan, idle)[1] == pytest.approx(4.0 + 16.0 * 0.4 / 2)


def test_noise_does_not_make_work_a_gain():
    assert cost.growing([(0.5, 3.0), (0.1, -1.0), (0.25, 4.0)]) == (
        (0.1, 0.0),
        (0.25, 4.0),
        (0.5, 4.0),
    )


@pytest.mark.parametrize("separate", [False, True])
def test_the_flops_are_what_a_session_counts(tiny, separate):
    sampler = loaded(tiny, separate=separate)
    requests = [Request(0, 1), Request(1, 2)]
    found = probe.probe(sampler, [requests], seed=0, steps=STEPS)
    config = ToCaConfig(interval=3, fresh_ratio=0.4, layer_slope=0.3)
    with enabled(sampler.target, config, num_steps=STEPS) as session:
        sampler.sample(requests, seed=0, steps=STEPS)
        ratio = session.summary().flops_ratio
    planned = found.flops.relative(found.shapes.plan(config, STEPS), config)
    assert 1 / planned == pytest.approx(ratio, rel=1e-3)
    state = State(tiny.parent / "state", {})
    table = replace(found.flops, unit="seconds")  # costs follow from the table, not the session
    trials = Trials(sampler, {"few": requests}, table, state, seed=0, steps=STEPS, batch=1)
    ran = trials.run(config, "few")
    assert ran.cost == pytest.approx(planned)
    assert 1 / ran.flops == pytest.approx(ratio)
    # Costs by another table are not those that are stored.
    slow = replace(table, untouched=table.untouched * 2)
    trials = Trials(sampler, {"few": requests}, slow, state, seed=0, steps=STEPS, batch=1)
    assert trials.run(config, "few").cost == pytest.approx(planned / 2)
    assert found.shapes == probe.Shapes({"attn": 3, "mlp": 3}, {"attn": 64, "mlp": 64})


@pytest.mark.parametrize("separate", [False, True])
def test_inner_products_are_those_of_the_modules_outputs(tiny, separate):
    sampler = loaded(tiny, separate=separate)
    requests = [Request(0, 1), Request(1, 2)]
    seen: list[torch.Tensor] = []
    hook = sampler.target.blocks[1].mlp.register_forward_hook(lambda m, a, out: seen.append(out))
    sampler.sample(requests, seed=0, steps=STEPS)
    hook.remove()
    found = probe.probe(sampler, [requests], seed=0, steps=STEPS).grams["mlp"][1]
    rows = torch.stack(seen[1::2] if separate else seen).flatten(1).double()
    whole = (rows @ rows.T).numpy()
    # Some values stand for all of them.
    scale = found[0, 0] / whole[0, 0]
    assert found == pytest.approx(whole * scale, rel=0.05, abs=0.05 * found.max())
    have, want = (schedule.stale_error(one[None], 0, 0, 0, 5) for one in (found, whole))
    assert have == pytest.approx(want, rel=0.05)


def test_both_transformers_of_a_pipeline_count():
    diffusers()
    tiny, steps = PIPELINES["wan22"], 6
    pipe = tiny()

    def sample(requests, *, seed, steps):
        return tiny.call(pipe, steps)

    sampler = SimpleNamespace(target=pipe, timesteps=lambda steps: None, sample=sample)
    found = probe.probe(sampler, [[Request(0, "")]], seed=0, steps=steps)
    with enabled(pipe, ToCaConfig(interval=2, fresh_ratio=0.0, selector="random")) as session:
        sample([], seed=0, steps=steps)
        assert session.others[0].summary().steps > 0
        whole = session.summary().flops_full
    assert found.flops.untouched_run(steps) == pytest.approx(whole)
    for gram in found.grams.values():
        assert (gram.diagonal(axis1=1, axis2=2) > 0).all()


# --- goals ---------------------------------------------------------------------------------------


def score(relative: float, psnr: float, ssim: float = 0.9) -> Score:
    return Score(relative, relative, (psnr,), (ssim,))


def test_ranks():
    costs = search.Goal("cost", 0.5)
    order = [score(0.5, 40.0), score(0.3, 30.0), score(0.6, 50.0), score(0.7, 60.0)]
    assert sorted(order, key=costs.rank, reverse=True) == order
    quality = search.Goal("psnr", 35.0)
    order = [score(0.5, 36.0), score(0.6, 50.0), score(0.2, 34.0), score(0.1, 30.0)]
    assert sorted(order, key=quality.rank, reverse=True) == order
    assert search.Goal("ssim", 0.95).meets(score(1.0, 20.0, 0.96))
    with pytest.raises(ValueError, match="min-ssim: expected torchmetrics"):
        search.Goal("ssim", 0.9).rank(Score(1.0, 1.0, (30.0,)))


def test_what_is_timed_must_keep_the_budget():
    times = Times(seconds=0.2, speedup=1.9, slowest=1.8, fastest=2.0, rounds=5)
    assert confirm.share(times, None, None) == 1
    assert confirm.share(times, ("speedup", 1.9), None) == 1
    assert confirm.share(times, ("speedup", 3.8), None) == 0.5
    assert confirm.share(times, ("seconds", 0.1), None) == 0.5
    assert confirm.share(times, ("against", 0.0), 1.9) == 1
    assert confirm.share(times, ("against", 0.0), 3.8) == 0.5


def test_the_search_goes_on_where_the_clock_disagrees_with_the_table(tiny, monkeypatch):
    limits = []

    def slow(search, best, others, *args, **options):
        limits.append(search.goal.limit)
        return Setting("tuned", "tuned", best, STEPS), {}, (0.8 if len(limits) < 3 else 1.0)

    monkeypatch.setattr(tune, "confirm", slow)
    budget = report(run(tiny, "tuned.json", "--speedup", "1.5"))["budget"]
    assert budget == {"kind": "cost", "limit": pytest.approx(1 / 1.5), "met": True}
    assert limits == pytest.approx([1 / 1.5, 0.8 / 1.5, 0.64 / 1.5])


@pytest.mark.parametrize("count", [4, 5, 16])
def test_parts_of_the_samples(count):
    sizes = search.split(count)
    assert sum(sizes) == count
    assert min(sizes) >= 1


# --- the command ---------------------------------------------------------------------------------


def test_it_keeps_the_budget_and_is_not_worse_than_what_it_starts_from(tiny, capsys):
    out = run(tiny, "tuned.json", "--against", "dit-ddim50", "--trials", "60")
    found = report(out)
    tuned, preset = found["compared"]
    assert (tuned["name"], preset["name"]) == ("tuned", "dit-ddim50")
    assert tuned["flops ratio"] >= preset["flops ratio"] * 0.999
    assert found["budget"]["met"]
    assert ToCaConfig.load(out) == ToCaConfig.from_dict(tuned["config"])
    front = [(row["speed-up"], row["psnr"]) for row in found["front"]]
    assert front == sorted(front, key=lambda at: (-at[0], at[1]))
    held = json.loads((out.with_suffix(".tuning") / "trials.json").read_text())
    for trial in held.values():
        gated = trial["config"]["residual_threshold"] is not None
        if not gated and trial["config"] != preset["config"]:  # nothing that costs too much is run
            assert trial["cost"] <= found["budget"]["limit"] * 1.002
    mine = {name: [] for name in ("tuned", "dit-ddim50")}
    for key, trial in held.items():
        for line in found["compared"]:
            if trial["config"] == line["config"] and not key.endswith(tune.HELD_OUT):
                mine[line["name"]] += trial["psnr"]
    # The preset may have dropped out after the first part.
    seen = len(mine["dit-ddim50"])
    assert np.mean(mine["tuned"][:seen]) >= np.mean(mine["dit-ddim50"]) - 1e-9
    shown = capsys.readouterr().out
    assert "What steps cost" in shown
    assert "met: " in shown


def test_what_is_written_holds_for_its_number_of_steps_alone(tiny):
    config = ToCaConfig.load(run(tiny, "tuned.json", "--speedup", "1.5"))
    model = tiny_dit()
    with pytest.raises(ValueError, match=r"step_ratio: expected 9 factors.* got 8"):
        enable(model, config, num_steps=STEPS + 1)
    enable(model, config, num_steps=STEPS)


def test_two_runs_write_the_same(tiny):
    one, other = (run(tiny, name, "--speedup", "2") for name in ("one.json", "other.json"))
    assert one.read_text() == other.read_text()
    assert report(one)["front"] == report(other)["front"]


def test_a_repeated_run_draws_nothing_and_another_budget_only_what_is_new(tiny):
    first = run(tiny, "first.json", "--speedup", "2")
    once = drawn(tiny)
    again = run(tiny, "again.json", "--speedup", "2", "--state", str(first.with_suffix(".tuning")))
    assert drawn(tiny) == once
    assert again.read_text() == first.read_text()
    other = run(tiny, "o.json", "--speedup", "1.4", "--state", str(first.with_suffix(".tuning")))
    more = drawn(tiny) - once
    assert more > 0
    assert report(other)["compared"][0]["flops ratio"] >= 1.4 * 0.999


@pytest.mark.parametrize("breaks", [1, 2, 9, 17])
def test_a_run_that_was_broken_off_goes_on(tiny, breaks):
    whole = run(tiny, "whole.json", "--speedup", "2")
    calls = drawn(tiny)
    (tiny.parent / "drawn").unlink()
    (tiny.parent / "breaks").write_text(str(breaks))
    with pytest.raises(KeyboardInterrupt):
        run(tiny, "resumed.json", "--speedup", "2")
    assert not (tiny.parent / "resumed.json").exists()
    resumed = run(tiny, "resumed.json", "--speedup", "2")
    assert resumed.read_text() == whole.read_text()
    # At most the call that broke off and the untouched samples of three parts are drawn again.
    assert drawn(tiny) <= calls + 5
    assert report(resumed)["front"] == report(whole)["front"]


def test_quality_is_met_at_the_least_cost(tiny):
    out = run(tiny, "tuned.json", "--min-psnr", "32", "--trials", "50")
    found = report(out)
    kept = [row for row in found["front"] if row["psnr"] >= 32]
    assert kept
    best = max(kept, key=lambda row: row["speed-up"])
    assert best["config"] == found["compared"][0]["config"]


def test_no_setting_reaches_the_quality(tiny, capsys):
    # It would, with all steps full, but not after so few runs.
    run(tiny, "tuned.json", "--min-psnr", "149", "--trials", "6")
    assert "NOT MET: PSNR of 149" in capsys.readouterr().out


def test_seconds_are_measured_and_kept(tiny):
    pytest.importorskip("torchmetrics", reason="it computes SSIM")
    options = ("--cost", "seconds", "--time-rounds", "1", "--time-batch", "2", "--speedup", "1.1")
    out = run(tiny, "tuned.json", *options, "--against", "dit-ddim50", "--trials", "12")
    found = report(out)
    assert found["costs"]["unit"] == "seconds"
    assert set(found["costs"]["extra"]) == {"mlp"}
    tuned, preset = found["compared"]
    assert tuned["speed-up"] > 0
    assert preset["seconds"] > 0
    assert tuned["ssim"] is not None
    once = drawn(tiny)
    again = run(
        tiny,
        "again.json",
        *options,
        "--against",
        "dit-ddim50",
        "--trials",
        "12",
        "--state",
        str(out.with_suffix(".tuning")),
    )
    assert drawn(tiny) == once
    assert again.read_text() == out.read_text()


PIPELINE = """
from models import tiny_pipeline
from toca_kernels.apps.sampling.pipeline_sampler import PipelineSampler

def sampler(*, device, dtype, folder):
    return PipelineSampler(tiny_pipeline(), {"guidance_scale": 4.0})
"""


def test_pipelines_are_tuned_too(tmp_path):
    pytest.importorskip("diffusers", reason="it has the pipeline")
    (tmp_path / "sampler.py").write_text(PIPELINE)
    out = run(tmp_path / "sampler.py", "tuned.json", "--steps", "6", "--speedup", "1.5")
    found = report(out)
    assert found["budget"]["met"]
    assert found["compared"][0]["flops ratio"] >= 1.5 * 0.999


def test_no_new_run_after_the_time_is_over():
    assert not search.deadline(None)()
    assert search.deadline(1e-12)()
    assert not search.deadline(60.0)()


def test_modules_and_selectors_are_what_the_model_takes(tiny):
    sampler = loaded(tiny)
    found = probe.probe(sampler, [[Request(0, 1)]], seed=0, steps=STEPS)
    allowed = space.Space.of(sampler, found, STEPS)
    assert allowed.modules == ("mlp",)
    assert allowed.selectors == ("attention", "similarity", "random", "norm")
    assert allowed.fuses
    candidates = space.Candidates(allowed, found, found.flops, STEPS)
    first = candidates.first([0.5])
    assert len(first) == len(set(first)) > 20
    planned = [one for one in first if one.residual_threshold is None]
    assert max(map(candidates.cost, planned)) <= 0.5
    for config in (planned[0], first[-1], ToCaConfig.preset("dit-ddim50")):
        around = candidates.neighbours(config)
        assert config not in around
        for one in around:
            assert space.fits(sampler, one, STEPS)


def test_neighbours_put_full_steps_where_the_errors_want_them(tiny):
    sampler = loaded(tiny)
    found = probe.probe(sampler, [[Request(0, 1)]], seed=0, steps=STEPS)
    allowed = space.Space.of(sampler, found, STEPS)
    candidates = space.Candidates(allowed, found, found.flops, STEPS)
    limit = 0.6
    best = candidates.scheduled(allowed.idle.replace(forecast=1), 0.0, limit)
    full = best.full_at
    inner = schedule.stack(found.grams)
    whole = schedule.schedule_errors(inner, 1, full).mean(0).sum()
    assert candidates.error(full, 1) == pytest.approx(whole)
    # Spoil one step: the way back is among the neighbours, and costs the same.
    for old, new in itertools.product(full[1:], set(range(1, STEPS)) - set(full)):
        spoilt = best.replace(full_at=tuple({*full, new} - {old}))
        assert candidates.error(spoilt.full_at, 1) >= candidates.error(full, 1)
        assert best in candidates.neighbours(spoilt)
        assert candidates.cost(spoilt) == candidates.cost(best) <= limit


def test_tokens_go_where_errors_are(tiny):
    sampler = loaded(tiny)
    found = probe.probe(sampler, [[Request(0, 1)]], seed=0, steps=STEPS)
    allowed = space.Space.of(sampler, found, STEPS)
    candidates = space.Candidates(allowed, found, found.flops, STEPS)
    config = ToCaConfig(full_at=(0, 4), fresh_ratio=0.2, step_ratio=(1.0,) * STEPS)
    spread = candidates.spread(config)
    errors = schedule.schedule_errors(found.grams["mlp"], 0, (0, 4))
    steps, layers = np.array(spread.step_ratio), np.array(spread.layer_ratio["mlp"])
    assert (steps.argsort() == errors.mean(0).argsort()).all()
    assert (layers.argsort() == errors.mean(1).argsort()).all()
    assert steps[[1, 2, 3, 5, 6, 7]].mean() == pytest.approx(1, abs=1e-2)
    assert layers.mean() == pytest.approx(1, abs=1e-2)
    assert dict(spread.module_ratio) == {"mlp": 1.0}


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "budget: expected --speedup, --seconds, --min-psnr or --min-ssim, or --against"),
        (("--speedup", "0.5"), "speedup: expected at least 1, got 0.5"),
        (("--speedup", "-2"), "speedup: expected more than 0, got -2"),
        (("--min-ssim", "2"), "min-ssim: expected at most 1, got 2"),
        (("--seconds", "1"), "seconds: expected --cost seconds, got --cost flops"),
        (("--speedup", "2", "--samples", "3"), "samples: expected at least 4, got 3"),
        (("--speedup", "2", "--out", "x.txt"), "out: expected a file that ends in .json"),
        (("--speedup", "2", "--arguments", "[1]"), "arguments: expected a JSON object"),
        (("--speedup", "2", "--against", "pixart-dpm20"), "against: expected settings that fit"),
        (("--speedup", "2", "--against", "best"), "preset: expected one of"),
        (("--speedup", "2", "--steps", "1"), "steps: expected at least 2, got 1"),
        (("--speedup", "2", "--trials", "2"), "trials: expected at least 3, got 2"),
        (("--speedup", "2", "--minutes", "1e-9"), "minutes: expected enough to run one setting"),
    ],
)
def test_refusals(tiny, given, message):
    with pytest.raises(ValueError, match=message):
        tune.run(arguments(tiny, "tuned.json", *given))
    assert not (tiny.parent / "tuned.json").exists()


def test_a_state_of_other_settings_is_refused(tiny, tmp_path):
    out = run(tiny, "tuned.json", "--speedup", "2")
    where = ("--state", str(out.with_suffix(".tuning")))
    with pytest.raises(ValueError, match=r"steps: 8, not 6.*name another folder with --state"):
        run(tiny, "other.json", "--speedup", "2", "--steps", "6", *where)
    with pytest.raises(ValueError, match="seed: 0, not 3"):
        run(tiny, "other.json", "--speedup", "2", "--seed", "3", *where)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="state: expected a folder of toca tune or an empty one"):
        State(tmp_path / "full", {})
    with pytest.raises(ValueError, match="state: expected a folder, got the file"):
        State(tmp_path / "full" / "letter.txt", {})
    (out.with_suffix(".tuning") / "trials.json").write_text("{")
    with pytest.raises(ValueError, match=r"trials\.json: expected what toca tune has stored"):
        run(tiny, "other.json", "--speedup", "2", *where)
    assert not (tiny.parent / "other.json").exists()


# --- the digits ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_beats_the_preset_on_digits_that_it_was_not_tuned_on(tmp_path):
    pytest.importorskip("diffusers", reason="it has the digits' transformer")
    pytest.importorskip("sklearn", reason="it has the digits")
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    out = tmp_path / "tuned.json"
    given = ["--classes", "0-9", "--steps", "20", "--against", "dit-ddim50", "--cost", "flops"]
    given += ["--samples", "6", "--held-out", "6", "--trials", "40", "--out", str(out)]
    assert tune.run(parser.parse_args([str(DIGITS), *given])) == 0
    tuned, preset = report(out)["compared"]
    assert tuned["flops ratio"] >= preset["flops ratio"]
    assert tuned["psnr"] > preset["psnr"] + 1
