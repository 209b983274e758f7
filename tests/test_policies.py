"""Policies beside ToCa's own: what they select, when they cache, and what stands for the rest.

The measure is a naive implementation in plain torch (models.NaiveToCa), in float64.
"""

import math

import numpy as np
import pytest
import torch

import toca_kernels as toca
from models import (
    SOURCES,
    NaiveToCa,
    assert_close,
    blocks_of,
    mlp_of,
    sample,
    tiny_dit,
    tiny_model,
)
from pipelines import PIPELINES
from toca_kernels import ToCaConfig

CONFIG = ToCaConfig(interval=3, fresh_ratio=0.3, grid=2, bonus=0.6)
STEPS = 8


@pytest.fixture(params=SOURCES)
def model(request):
    return tiny_model(request.param)


def run(model, config, num_steps=STEPS, **options):
    with toca.enabled(model, config, num_steps=num_steps, **options) as session:
        session.record_selections = True
        return sample(model, num_steps), session


def naive(model, config, dtype=torch.float32):
    model, state = NaiveToCa.on(model, config, STEPS, (8, 8), dtype)
    return sample(model, STEPS, dtype=dtype), state


def assert_like_the_naive(model, config):
    exact, state = naive(model, config, torch.float64)
    latents, session = run(model, config)
    for ours, theirs in zip(session.selections, state.selections, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert_close(latents, exact, naive(model, config)[0])


# --- when ----------------------------------------------------------------------------------------


def test_alternation_is_the_naive_one(model):
    config = CONFIG.replace(interval=4, fresh_every=2)
    assert_like_the_naive(model, config)
    done = run(model, config)[1]._run
    branch = next(iter(done.branches.values()))
    recomputed = [sum(k["mlp"]) for k in branch.done.k]
    N = 3 * 64
    assert recomputed == [N, 0, 3 * 19, 0, N, 0, 3 * 19, 0]


def test_full_steps_and_factors_as_they_are_given(model):
    factors = tuple(0.5 + 0.1 * step for step in range(STEPS))
    config = CONFIG.replace(
        full_at=(0, 2, 5), step_ratio=factors, layer_ratio={"mlp": (0.5, 1.0, 1.5)}
    )
    assert_like_the_naive(model, config)


def drifts(model, config):
    """Of each step, by hooks on the first block alone: how far its residual has moved."""
    found, held = [], {}

    def hook(module, args, kwargs, out):
        x = args[0] if args else kwargs["hidden_states"]
        added = out - x
        drift = math.inf
        if held:
            drift = ((added - held["at"]).abs().mean() / held["at"].abs().mean()).item()
        found.append(drift)
        if drift > config.residual_threshold or math.isinf(drift):
            held["at"] = added.clone()

    handle = blocks_of(model)[0].register_forward_hook(hook, with_kwargs=True)
    out, session = run(model, config)
    handle.remove()
    return found, session, out


def test_the_gate_decides_by_the_first_block(model):
    config = CONFIG.replace(interval=STEPS, residual_threshold=1.0)
    found, session, _ = drifts(model, config)
    full = [selected is None for selected in session.selections]
    assert full == [drift > config.residual_threshold for drift in found]
    assert 1 < sum(full) < STEPS
    assert_gated_like_the_naive(model, session, config, full)
    branch = next(iter(session._run.branches.values()))
    for step, k in enumerate(branch.done.k):
        rest = [64, 64] if full[step] else [19, 19]
        assert k["mlp"] == [64, *rest]
        assert k["attn"] == ([64] * 3 if full[step] else [64, 0, 0])


def assert_gated_like_the_naive(model, session, config, full):
    """What the naive ToCa selects whose first layer is always full, and all where ours are."""
    copied, state = NaiveToCa.on(model, config, STEPS, (8, 8))
    state.full = np.repeat(np.array(full)[:, None], 3, axis=1)
    state.full[:, 0] = True
    sample(copied, STEPS)
    for step, ours in enumerate(session.selections):
        assert ours is None or torch.equal(ours, torch.stack(state.fresh[step])), step


def test_the_gate_compares_with_the_latest_full_step(model):
    """Also where that was the plan's."""
    config = CONFIG.replace(interval=3, residual_threshold=1.0)
    held, drift = None, []

    def hook(module, args, kwargs, out):
        nonlocal held
        added = out - (args[0] if args else kwargs["hidden_states"])
        far = held is None or (added - held).abs().mean() > held.abs().mean()
        planned = len(drift) % 3 == 0
        drift.append(bool(far or planned))
        if drift[-1]:
            held = added.clone()

    handle = blocks_of(model)[0].register_forward_hook(hook, with_kwargs=True)
    _, session = run(model, config)
    handle.remove()
    assert [selected is None for selected in session.selections] == drift
    assert 3 < sum(drift) < STEPS
    assert_gated_like_the_naive(model, session, config, drift)


def test_a_gate_that_lets_nothing_pass_is_the_untouched_model(model):
    expected = sample(model, STEPS)
    latents, session = run(model, CONFIG.replace(interval=STEPS, residual_threshold=0.0))
    assert torch.equal(latents, expected)
    assert session.summary().cached_steps == 0


def test_a_gate_that_lets_all_pass_keeps_the_first_block_full(model):
    _, gated = run(model, CONFIG.replace(residual_threshold=1e9))
    _, plain = run(model, CONFIG)
    for ours, theirs in zip(gated.selections, plain.selections, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or ours[0].all()
    assert gated.summary().cached_steps == plain.summary().cached_steps


def test_a_gated_run_of_a_pipeline_with_two_streams():
    tiny = PIPELINES["flux"]
    pipe = tiny()
    before = tiny.call(pipe, STEPS)
    settings = {"interval": STEPS, "fresh_ratio": 0.3}
    with toca.enabled(pipe, ToCaConfig(residual_threshold=0.0, **settings)) as session:
        assert torch.equal(tiny.call(pipe, STEPS), before)
    with toca.enabled(pipe, ToCaConfig(residual_threshold=0.5, **settings)) as session:
        tiny.call(pipe, STEPS)
        assert session.summary().cached_steps > 0


# --- which ---------------------------------------------------------------------------------------


def test_similarity_selects_what_changed_most(model):
    outputs = {}
    for layer, block in enumerate(blocks_of(model)):

        def keep(module, inputs, out, layer=layer):
            outputs.setdefault(layer, []).append(out)

        mlp_of(block).register_forward_hook(keep)
    config = ToCaConfig(full_at=(0, 1), fresh_ratio=0.25, selector="similarity", age_weight=0.0)
    chosen = run(model, config, 3)[1].selections[2]
    for layer, (first, second, *_) in outputs.items():
        change = 1 - torch.cosine_similarity(second.double(), first.double(), dim=2)
        most = torch.zeros_like(change, dtype=torch.bool)
        most.scatter_(1, change.argsort(dim=1, descending=True)[:, :16], True)
        assert torch.equal(chosen[layer], most)


def test_similarity_knows_nothing_after_one_full_step(model):
    config = ToCaConfig(full_at=(0,), fresh_ratio=0.25, selector="similarity", age_weight=0.0)
    for _ in range(2):  # the second run finds the first one's buffers
        chosen = run(model, config, 2)[1].selections[1]
        assert chosen[..., :16].all()
        assert not chosen[..., 16:].any()


def test_similarity_needs_what_modules_return():
    with pytest.raises(ValueError, match="full_steps: expected 'exact' with selector 'similarity'"):
        toca.enable(
            tiny_dit(), CONFIG.replace(selector="similarity", full_steps="fused"), num_steps=4
        )


MASKED = ToCaConfig(interval=4, fresh_ratio=0.25, selector="mask")


def test_the_masked_tokens_are_recomputed(model):
    weights = torch.zeros(64)
    weights[20:36] = 1.0
    for selected in run(model, MASKED.replace(age_weight=0.0), mask=weights)[1].selections:
        assert selected is None or torch.equal(selected, (weights > 0).expand_as(selected))


def test_every_sample_has_its_own_mask(model):
    weights = torch.zeros(2, 64)
    weights[0, :16], weights[1, 48:] = 1.0, 1.0
    selected = run(model, MASKED.replace(age_weight=0.0), mask=weights)[1].selections[1]
    expected = (weights > 0).repeat(2, 1)  # both guidance halves
    assert torch.equal(selected, expected.expand_as(selected))


def test_what_the_mask_leaves_goes_by_age(model):
    selected = run(model, MASKED, mask=torch.ones(64))[1].selections
    assert not (selected[1] & selected[2]).any()
    assert not ((selected[1] | selected[2]) & selected[3]).any()


def test_another_mask_holds_from_the_next_run(model):
    first, second = torch.zeros(64), torch.zeros(64)
    first[:16], second[-16:] = 1.0, 1.0
    config = MASKED.replace(age_weight=0.0)
    with toca.enabled(model, config, num_steps=4, mask=first) as session:
        session.record_selections = True
        sample(model, 4)
        assert session.selections[1][..., :16].all()
        session.mask = second
        sample(model, 4)
        assert session.selections[1][..., -16:].all()


def test_masks_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="mask: expected the weights of the tokens with selector"):
        toca.enable(model, MASKED, num_steps=4)
    with pytest.raises(ValueError, match=r"mask: expected .* none with another, got"):
        toca.enable(model, CONFIG, num_steps=4, mask=torch.ones(64))
    for mask, message in ((torch.ones(63), r"of \[64\] tokens, got 63"), (torch.ones(3, 64), "3")):
        with (
            pytest.raises(ValueError, match=f"mask: expected .*{message}"),
            toca.enabled(model, MASKED, num_steps=4, mask=mask),
        ):
            sample(model, 4)


# --- what stands for the rest --------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_forecasts_are_the_naive_ones(model, order, ratio):
    assert_like_the_naive(model, CONFIG.replace(interval=2, forecast=order, fresh_ratio=ratio))


@pytest.mark.parametrize("full_steps", ["exact", "fused"])
def test_forecasts_over_longer_intervals(model, full_steps):
    assert_like_the_naive(model, CONFIG.replace(forecast=1, full_steps=full_steps))


def test_one_full_step_tells_no_slope(model):
    once = CONFIG.replace(full_at=(0,))
    assert torch.equal(run(model, once.replace(forecast=2))[0], run(model, once)[0])


def test_a_forecast_is_forgotten_with_its_run(model):
    config = CONFIG.replace(interval=2, forecast=2)
    with toca.enabled(model, config, num_steps=STEPS):
        first = sample(model, STEPS)

        def stop(step, x):
            if step == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sample(model, STEPS, each_step=stop)
        assert torch.equal(sample(model, STEPS), first)


def test_a_forecast_keeps_one_tensor_more_for_each_order(model):
    sizes = [run(model, CONFIG.replace(forecast=m))[1].summary().cache_bytes for m in range(3)]
    assert sizes[1] == 2 * sizes[0]
    assert sizes[2] == 3 * sizes[0]


FULL_AT, RUN = (0, 2, 3), 7


def outputs_of_taps(session, call):
    """(what the call returns, by tap: what its module handed out in each call of the model)."""
    seen, handles = {}, []
    for number, block in enumerate(session._blocks):
        for tapped in block.taps:
            tap = tapped.tap
            if tap.cached not in ("whole", "rows") or tap.inside or not tap.outputs:
                continue
            if not all(name in block.modules for name in tap.outputs):
                continue

            def keep(module, args, out, key=(number, tap.outputs)):
                parts = out if isinstance(out, tuple) else (out,)
                tensors = [part.double() for part in parts if torch.is_tensor(part)]
                seen.setdefault(key, []).append(tensors)

            handles.append(tap.module.register_forward_hook(keep))
    result = call()
    for handle in handles:
        handle.remove()
    return result, seen


def extrapolated(outputs, order):
    """What the steps between must hand out, from the full steps 0, 2 and 3."""
    first, slope = outputs[0], (outputs[2] - outputs[0]) / 2
    latest, newer = outputs[3], outputs[3] - outputs[2]
    expected = {1: first}
    for step in range(4, RUN):
        d = step - 3
        curve = d * d / 2 * (newer - slope) if order == 2 else 0
        expected[step] = latest + d * newer + curve
    return expected


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", [name for name in PIPELINES if name != "wan22"])
def test_forecasts_in_every_family(name, order):
    """By the formula where hooks make all blocks run their own code; and the ops agree."""
    tiny = PIPELINES[name]
    pipe = tiny()
    untouched = tiny.call(pipe, RUN)
    config = ToCaConfig(full_at=FULL_AT, fresh_ratio=0.0, forecast=order, selector="random")
    with toca.enabled(pipe, config) as session:
        result = tiny.call(pipe, RUN)
        hooked, seen = outputs_of_taps(session, lambda: tiny.call(pipe, RUN))
        assert torch.equal(tiny.call(pipe, RUN), result)
    assert (hooked - result).norm() <= 1e-5 * result.norm()
    assert torch.equal(tiny.call(pipe, RUN), untouched)
    assert seen
    per_step = len(tiny.calls)  # guidance branches with calls of their own
    for outputs in seen.values():
        assert len(outputs) == RUN * per_step
        for branch in range(per_step):
            for part in zip(*outputs[branch::per_step], strict=True):
                for step, want in extrapolated(part, order).items():
                    assert (part[step] - want).norm() <= 1e-5 * want.norm(), step


def test_eight_bits_drown_a_forecast():
    with pytest.raises(ValueError, match="cache_dtype: expected None with a forecast"):
        ToCaConfig(forecast=1, cache_dtype="int8")
