"""Policies where runs are broken off, guidance ends, blocks are compiled, models come in pairs."""

import gc
import weakref

import pytest
import torch

import toca_kernels as toca
from models import NULL, blocks_of, call_model, mlp_of, sample, tiny_dit, tiny_model
from pipelines import PIPELINES
from toca_kernels import ToCaConfig

SHARED = ToCaConfig(interval=3, fresh_ratio=0.25, age_weight=0.0, share_cfg_selection=True)


@pytest.mark.parametrize("first", ["labels", "other"])
def test_after_guidance_has_ended_the_rest_selects_by_its_own_scores(first):
    calls, looked = 0, 0

    def predict(model, x, t, labels):
        nonlocal calls
        other = [torch.full_like(labels, NULL)] if calls < 3 else []
        calls += 1
        given = [*other, labels] if first == "other" else [labels, *other]
        return {id(y): call_model(model, x, t, y) for y in given}[id(labels)]

    def look(step, x):
        nonlocal looked
        if step >= 7:  # the full step 6 was this branch's alone
            [branch] = session._run.branches.values()
            track = branch.cache.tracks["mlp"]
            own = track.scores / track.scores.norm(dim=-1, keepdim=True)
            assert torch.allclose(track.score, own)
            assert not branch.chooser.shares
            looked += 1

    model = tiny_dit()
    with toca.enabled(model, SHARED, num_steps=12) as session:
        sample(model, 12, predict=predict, each_step=look)
    assert looked == 5


def test_caches_of_a_run_that_was_broken_off_are_freed_at_once():
    model, caches = tiny_dit(), []
    gc.collect()
    gc.disable()
    try:
        with toca.enabled(model, SHARED, num_steps=8) as session:

            def stop(step, x):
                if step == 2:
                    [branch] = session._run.branches.values()
                    caches.append(weakref.ref(branch.cache))
                    raise KeyboardInterrupt

            for _ in range(3):
                with pytest.raises(KeyboardInterrupt):
                    sample(model, 8, each_step=stop)
            assert [cache() is None for cache in caches] == [True, True, False]
    finally:
        gc.enable()


def test_a_gate_over_blocks_that_were_compiled_before():
    model = tiny_dit()
    for layer, block in enumerate(model.blocks):
        model.blocks[layer] = torch.compile(block, backend="eager")
    with toca.enabled(
        model, ToCaConfig(interval=4, residual_threshold=1e9), num_steps=4
    ) as session:
        sample(model, 4)
        assert session.summary().cached_steps == 3


@pytest.mark.parametrize("source", ["facebook", "diffusers"])
def test_rows_of_a_hooked_mlp_under_autocast(source):
    model = tiny_model(source)
    mlp_of(blocks_of(model)[0]).register_forward_hook(lambda *args: None)
    with (
        toca.enabled(model, ToCaConfig(interval=2), num_steps=4),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        assert sample(model, 4).isfinite().all()


def test_another_mask_holds_in_every_transformer_of_a_pipeline():
    tiny = PIPELINES["wan22"]
    pipe, N = tiny(), tiny.tokens
    masks = torch.zeros(2, N)
    masks[0, :4], masks[1, -4:] = 1.0, 1.0
    config = ToCaConfig(interval=7, fresh_ratio=4.5 / N, selector="mask", age_weight=0.0)
    with toca.enabled(pipe, config, mask=masks[0]) as session:
        session.mask = masks[1]
        both = (session, *session.others)
        for one in both:
            one.record_selections = True
        tiny.call(pipe, 7)
        for one in both:
            chosen = [step for step in one.selections if step is not None]
            assert chosen
            assert all(step[..., -4:].all() for step in chosen)
