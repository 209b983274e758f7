"""enable, disable and Session: what a run computes, selects and reports, and what it leaves behind.

The measure is a naive ToCa in plain torch (models.NaiveToCa), in float64, and its own rounding.
"""

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toca_kernels as toca
from models import (
    SOURCES,
    InDouble,
    NaiveToCa,
    assert_close,
    attention_of,
    batched_guidance,
    blocks_of,
    call_model,
    mlp_of,
    reuse_attention,
    run_pipeline,
    sample,
    timesteps,
    tiny_dit,
    tiny_model,
    tiny_pipeline,
)
from toca_kernels import ToCaConfig, branch
from toca_kernels.blocks.capture import CapturedScores
from toca_kernels.flops import BlockShape
from toca_kernels.ops import free_rows

CONFIG = ToCaConfig(interval=3, fresh_ratio=0.3, grid=2, bonus=0.6)


@pytest.fixture(params=SOURCES)
def model(request):
    return tiny_model(request.param)


def run(model, config, num_steps=8, *, record=False, timesteps=None, **kwargs):
    """One enabled run: (latents, session)."""
    with toca.enabled(model, config, num_steps=num_steps, timesteps=timesteps) as session:
        session.record_selections = record
        return sample(model, num_steps, **kwargs), session


def naive(model, config, num_steps=8, dtype=torch.float32, grid=(8, 8), **kwargs):
    """The same run of the naive ToCa: (latents, NaiveToCa)."""
    model, state = NaiveToCa.on(model, config, num_steps, grid, dtype)
    return sample(model, num_steps, dtype=dtype, **kwargs), state


def assert_same_selections(have, want):
    assert len(have) == len(want)
    for step, (ours, theirs) in enumerate(zip(have, want, strict=True)):
        if theirs is None:
            assert ours is None, f"step {step} was not full"
        else:
            assert ours is not None, f"step {step} was full"
            assert torch.equal(ours, theirs), f"step {step} recomputed other tokens"


# --- what is computed ----------------------------------------------------------------------------


def test_always_full_is_the_untouched_model_to_the_bit(model):
    expected = sample(model, 6)
    latents, session = run(model, ToCaConfig(interval=1), 6)
    assert torch.equal(latents, expected)
    assert session.summary().cached_steps == 0


def test_always_full_is_the_untouched_pipeline_to_the_bit():
    pipe = tiny_pipeline()
    expected = run_pipeline(pipe, 6)
    with toca.enabled(pipe, ToCaConfig(interval=1)):
        assert torch.equal(run_pipeline(pipe, 6), expected)


@pytest.mark.parametrize("selector", ["attention", "norm", "random"])
def test_full_steps_keep_their_bits_while_scores_are_taken(model, selector):
    untouched = copy.deepcopy(model)
    equal = []

    def predict(model, *inputs):
        out = batched_guidance(model, *inputs)
        if session.selections[-1] is None:
            equal.append(torch.equal(out, batched_guidance(untouched, *inputs)))
        return out

    with toca.enabled(model, CONFIG.replace(selector=selector), num_steps=8) as session:
        session.record_selections = True
        sample(model, 8, predict=predict)
    assert equal == [True] * 3  # steps 0, 3 and 6


@pytest.mark.parametrize("known", [False, True])
def test_fused_full_steps_are_the_model_within_rounding(model, known):
    exact = sample(copy.deepcopy(model).double(), 6, dtype=torch.float64)
    config = ToCaConfig(interval=1, full_steps="fused")
    latents, _ = run(model, config, 6, timesteps=timesteps(6) if known else None)
    assert_close(latents, exact, sample(model, 6))


@pytest.mark.parametrize("full_steps", ["exact", "fused"])
def test_every_token_recomputed_is_attention_reuse(model, full_steps):
    config = ToCaConfig(interval=3, fresh_ratio=1.0, full_steps=full_steps)
    full = (0, 3, 6)
    exact = sample(reuse_attention(model, full, torch.float64), 8, dtype=torch.float64)
    rounded = sample(reuse_attention(model, full), 8)
    latents, session = run(model, config, record=True)
    assert_close(latents, exact, rounded)
    assert all(chosen is None or chosen.all() for chosen in session.selections)
    # The reuse is no rounding error: this test would see an attention that is not reused.
    assert (latents - sample(model, 8)).abs().max() > 100 * (rounded - exact).abs().max()


# Steps in which the published code runs layer 0 in full and the other layers from the cache.
@pytest.mark.parametrize(
    ("preset", "num_steps", "quirks", "changes"),
    [
        pytest.param("dit-ddim50", 50, [4, 17], {}, id="ddim50"),
        pytest.param("dit-ddim50", 50, [4, 17], {"full_steps": "fused"}, id="ddim50-fused"),
        pytest.param("dit-ddpm250", 24, [5, 8, 21], {}, id="ddpm250-at-24-steps"),
        pytest.param("dit-ddim50", 12, [3, 8], {"fresh_ratio": 0.4}, id="many-tokens"),
        pytest.param("dit-ddim50", 12, [], {"fresh_ratio": 0.0}, id="fora"),
        pytest.param("dit-ddim50", 12, [3, 8], {"age_weight": 0.0, "bonus": 0.0}, id="score-only"),
    ],
)
def test_agrees_with_the_naive_toca(model, preset, num_steps, quirks, changes):
    config = ToCaConfig.preset(preset, **changes)
    full = config.plan(num_steps=num_steps, num_layers=3, num_tokens=64).full["mlp"]
    assert [s for s in range(num_steps) if full[s].tolist() == [True, False, False]] == quirks
    exact, state = naive(model, config, num_steps, torch.float64)
    rounded, _ = naive(model, config, num_steps)
    assert state.margin > 1e-6  # ten times the rounding of a score: the selection is not luck
    latents, session = run(model, config, num_steps, record=True)
    assert_same_selections(session.selections, state.selections)
    assert_close(latents, exact, rounded)
    assert (latents - sample(model, num_steps)).abs().max() > 0.01  # caching leaves its mark


def test_agrees_with_the_naive_toca_in_a_pipeline():
    pipe = tiny_pipeline()
    config, model = ToCaConfig.preset("dit-ddim50"), pipe.transformer
    with toca.enabled(pipe, config) as session:
        session.record_selections = True
        images = run_pipeline(pipe, 20)
    assert session.summary().modulation_bytes > 0  # the scheduler told the timesteps
    pipe.transformer, state = NaiveToCa.on(model, config, 20)
    rounded = run_pipeline(pipe, 20)
    assert_same_selections(session.selections, state.selections)
    pipe.transformer = InDouble(NaiveToCa.on(model, config, 20, dtype=torch.float64)[0])
    assert_close(images, run_pipeline(pipe, 20).double(), rounded)


@pytest.mark.parametrize("full_steps", ["exact", "fused"])
@pytest.mark.parametrize(
    ("known", "change"),
    [
        pytest.param(True, {}, id="both"),
        pytest.param(False, {}, id="timesteps-unknown"),
        pytest.param(True, {"tabulate_modulation": False}, id="not-tabulated"),
        pytest.param(True, {"prepack": False}, id="not-packed"),
    ],
)
def test_tabulating_and_packing_change_rounding_only(model, known, change, full_steps):
    config = CONFIG.replace(full_steps=full_steps, **change)
    exact, state = naive(model, config, dtype=torch.float64)
    rounded, _ = naive(model, config)
    latents, session = run(model, config, record=True, timesteps=timesteps(8) if known else None)
    assert_same_selections(session.selections, state.selections)
    assert_close(latents, exact, rounded)
    summary = session.summary()
    assert (summary.modulation_bytes > 0) == (known and config.tabulate_modulation)
    if not config.prepack:
        assert summary.packed_bytes == 0


def test_layer_norms_with_parameters(model):
    for block in blocks_of(model):
        norm = "norm2" if hasattr(block, "mlp") else "norm3"
        affine = nn.LayerNorm(32, eps=getattr(block, norm).eps)
        affine.weight.data.normal_(1.0, 0.3)
        affine.bias.data.normal_()
        setattr(block, norm, affine.requires_grad_(False))
    exact = sample(reuse_attention(model, (0, 3, 6), torch.float64), 8, dtype=torch.float64)
    rounded = sample(reuse_attention(model, (0, 3, 6)), 8)
    assert_close(run(model, ToCaConfig(fresh_ratio=1.0))[0], exact, rounded)


def test_gradients_are_not_recorded(model):
    model.requires_grad_(True)
    assert not run(model, CONFIG)[0].requires_grad


# --- runs one after the other --------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["attention", "random"])
def test_a_second_run_equals_the_first_to_the_bit(model, selector):
    with toca.enabled(model, CONFIG.replace(selector=selector), num_steps=8) as session:
        session.record_selections = True
        first, chosen = sample(model, 8), session.selections
        sample(model, 8, labels=(1, 2))
        sample(model, 8, labels=(3, 7, 5))
        assert torch.equal(sample(model, 8), first)
        assert_same_selections(session.selections, chosen)


def test_a_second_pipeline_run_equals_the_first_to_the_bit():
    pipe = tiny_pipeline()
    with toca.enabled(pipe, CONFIG):
        first = run_pipeline(pipe, 8)
        run_pipeline(pipe, 5)
        assert torch.equal(run_pipeline(pipe, 8), first)


# --- what is left behind -------------------------------------------------------------------------


def state_of(model):
    """Everything about a model that enabling could leave something in."""
    return {
        name: (set(vars(module)), dict(module._forward_hooks), dict(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def test_disabled_the_model_is_as_before(model):
    expected, keys, before = sample(model, 4), list(model.state_dict()), state_of(model)
    toca.enable(model, CONFIG, num_steps=8)
    assert list(model.state_dict()) == keys
    sample(model, 8)
    toca.disable(model)
    assert state_of(model) == before
    assert not any("forward" in names for names, _, _ in before.values())
    assert torch.equal(sample(model, 4), expected)


def test_a_disabled_pipeline_is_as_before():
    pipe = tiny_pipeline()
    expected, before = run_pipeline(pipe, 3), set(vars(pipe.scheduler))
    toca.enable(pipe, CONFIG)
    run_pipeline(pipe, 8)
    toca.disable(pipe)
    assert set(vars(pipe.scheduler)) == before
    assert torch.equal(run_pipeline(pipe, 3), expected)
    with toca.enabled(pipe, CONFIG):  # and can be enabled again
        run_pipeline(pipe, 3)


def test_a_with_block_puts_the_model_back_whatever_happens(model):
    before = state_of(model)

    def stop(step, x):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, CONFIG, each_step=stop)
    assert state_of(model) == before


def test_forwards_that_were_patched_before_are_used_and_put_back(model):
    block = blocks_of(model)[1]
    modules = [model, block, attention_of(block), mlp_of(block)]
    calls = []
    for module in modules:
        own = module.forward

        def patched(*args, own=own, module=module, **kwargs):
            calls.append(module)
            return own(*args, **kwargs)

        module.forward = patched
    patches = [module.forward for module in modules]
    exact, state = naive(tiny_like(model), CONFIG, dtype=torch.float64)
    rounded, _ = naive(tiny_like(model), CONFIG)
    latents, session = run(model, CONFIG, record=True)
    assert [module.forward for module in modules] == patches
    assert_same_selections(session.selections, state.selections)
    assert_close(latents, exact, rounded)
    counted = [calls.count(module) for module in modules]
    assert counted == [8, 3, 3, 8]  # cached steps skip the block and the attention


def tiny_like(model):
    return tiny_model("facebook" if hasattr(model, "blocks") else "diffusers")


def test_what_others_patch_while_enabled_stays_theirs(model):
    """As accelerate's hooks do; they keep what they found, which then is a forward of ours."""
    expected = sample(model, 4)
    toca.enable(model, CONFIG, num_steps=8)
    modules = [model, blocks_of(model)[1], attention_of(blocks_of(model)[1])]
    for module in modules:
        module.forward = (lambda found: lambda *args, **kwargs: found(*args, **kwargs))(
            module.forward
        )
    theirs = [module.forward for module in modules]
    toca.disable(model)
    assert [module.forward for module in modules] == theirs
    assert torch.equal(sample(model, 4), expected)
    assert torch.equal(sample(model, 4), expected)


def test_a_disabled_session_still_reports_but_holds_no_features(model):
    _, session = run(model, CONFIG)
    assert session.summary().steps == 8
    assert all(branch.cache is None for branch in session._run.branches.values())


# --- trouble -------------------------------------------------------------------------------------


def test_enabling_twice(model):
    toca.enable(model, CONFIG, num_steps=8)
    with pytest.raises(ValueError, match="got one that already is"):
        toca.enable(model, CONFIG, num_steps=8)
    toca.disable(model)
    toca.enable(model, CONFIG, num_steps=8)


def test_disabling_what_is_not_enabled(model):
    with pytest.raises(ValueError, match="got one that is not"):
        toca.disable(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"selector": "entropy"},
            "selector: expected one of attention, norm, similarity, random, mask",
        ),
        ({"module_interval": {"attn": 2}}, "module_interval: expected one interval"),
        ({"module_ratio": {"attn": 1.0, "mlp": 1.0}}, "module_ratio: expected no ratio for 'attn'"),
        ({"module_ratio": {"cross_attn": 1.0}}, "module_ratio: expected a factor for one of"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_once(model, settings, message):
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        toca.enable(model, CONFIG.replace(**settings), num_steps=8)
    assert state_of(model) == before


def test_without_a_config_everything_is_forecast(model):
    untouched = sample(model, 8)
    with toca.enabled(model, num_steps=8):
        out = sample(model, 8)
    assert not torch.equal(out, untouched)
    with toca.enabled(model, ToCaConfig.preset("forecast"), num_steps=8):
        assert torch.equal(sample(model, 8), out)


@pytest.mark.parametrize("config", [{"interval": 3}, "dit-ddim50", ToCaConfig])
def test_a_config_of_the_wrong_type(model, config):
    with pytest.raises(ValueError, match="config: expected a ToCaConfig, got"):
        toca.enable(model, config, num_steps=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps: expected an integer >= 1, got 0"),
        ({"num_steps": 2.5}, "num_steps: expected an integer >= 1, got 2.5"),
        ({"num_steps": 3, "timesteps": [2, 1]}, "timesteps: expected 3, got 2"),
    ],
)
def test_steps_that_make_no_sense(model, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        toca.enable(model, CONFIG, **arguments)


def test_the_number_of_steps_is_needed(model):
    with (
        toca.enabled(model, CONFIG),
        pytest.raises(ValueError, match=r"num_steps: .*enable\(\.\.\., num_steps=50\)"),
    ):
        sample(model, 8)


def test_training_mode_is_refused(model):
    with toca.enabled(model.train(), CONFIG, num_steps=8):
        with pytest.raises(RuntimeError, match=r"got training mode; call \.eval\(\)"):
            sample(model, 8)
        model.eval()
        sample(model, 8)


def test_summary_before_the_first_step(model):
    with (
        toca.enabled(model, CONFIG, num_steps=8) as session,
        pytest.raises(RuntimeError, match="no step has been run yet"),
    ):
        session.summary()


# --- selections ----------------------------------------------------------------------------------


class ExplicitAttention(nn.Module):
    """Attention that writes its map out, as older code does."""

    def __init__(self, stock, softmax):
        super().__init__()
        self.qkv, self.proj, self.num_heads = stock.qkv, stock.proj, stock.num_heads
        self.softmax = softmax

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


def explicit(softmax):
    def change(model):
        for block in model.blocks:
            block.attn = ExplicitAttention(block.attn, softmax)
        return model

    return change


def legacy_processor(model):
    """diffusers' processor from before scaled_dot_product_attention: a (B * H, N, N) map."""
    from diffusers.models.attention_processor import AttnProcessor

    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    return model


@pytest.mark.parametrize(
    ("source", "change"),
    [
        pytest.param("facebook", lambda model: model, id="sdpa"),
        pytest.param("facebook", explicit(lambda w: w.softmax(dim=-1)), id="tensor-softmax"),
        pytest.param("facebook", explicit(lambda w: torch.softmax(w, -1)), id="torch-softmax"),
        pytest.param("facebook", explicit(lambda w: F.softmax(w, dim=-1)), id="f-softmax"),
        pytest.param("facebook", explicit(nn.Softmax(dim=-1)), id="module-softmax"),
        pytest.param("diffusers", legacy_processor, id="diffusers-legacy"),
    ],
)
def test_attention_scores_are_the_column_sums_of_the_map(source, change):
    stock = tiny_model(source)
    model = change(copy.deepcopy(stock))
    exact, state = naive(stock, CONFIG, dtype=torch.float64)
    latents, session = run(model, CONFIG, record=True)
    assert_same_selections(session.selections, state.selections)
    assert_close(latents, exact, naive(stock, CONFIG)[0])


def test_attention_that_cannot_be_read_is_refused():
    model = tiny_dit()
    for block in model.blocks:
        block.attn = ExplicitAttention(block.attn, lambda w: w.exp() / w.exp().sum(-1, True))
    with pytest.raises(RuntimeError, match=r"calls neither .* use selector='random'"):
        run(model, CONFIG)
    run(model, CONFIG.replace(selector="random"))


def test_scores_under_a_mask_are_those_of_the_explicit_map():
    x = torch.randn(2, 3, 10, 8)
    k, v = torch.randn(2, 2, 3, 10, 8)
    boolean = torch.rand(2, 1, 10, 10) > 0.3
    boolean[..., 0] = True
    for mask in (boolean, torch.randn(1, 3, 10, 10), torch.ones(2, 1, 1, 10).bool()):
        found = []
        with CapturedScores("attention", found):
            out = F.scaled_dot_product_attention(x, k, v, attn_mask=mask)
        assert torch.equal(out, F.scaled_dot_product_attention(x, k, v, attn_mask=mask))
        every = torch.eye(10).expand(2, 3, 10, 10)  # the values are the map's columns
        weights = F.scaled_dot_product_attention(x, k, every, attn_mask=mask)
        assert torch.allclose(found[0], weights.sum(dim=2).mean(dim=1), atol=1e-5)
        mean = weights.mean(dim=1)
        with CapturedScores("entropy", found):
            F.scaled_dot_product_attention(x, k, v, attn_mask=mask)
        entropy = -(mean * (mean + 1e-7).log()).sum(dim=-1)
        assert torch.allclose(found[1], entropy, atol=1e-5)


def test_scores_of_grouped_queries():
    q, k, v = torch.randn(2, 4, 10, 8), *torch.randn(2, 2, 2, 10, 8)
    found = []
    with CapturedScores("attention", found):
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        F.scaled_dot_product_attention(q, *(t.repeat_interleave(2, dim=1) for t in (k, v)))
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_causal_attention_is_refused():
    q = torch.randn(1, 1, 4, 8)
    with (
        pytest.raises(RuntimeError, match="expected attention among all tokens, got a causal"),
        CapturedScores("attention", []),
    ):
        F.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_norm_selects_the_smallest_values():
    """The value norm of DuCa: tokens with a small |v|, summed over heads, come first."""
    model = tiny_dit()
    values = {}
    for layer, block in enumerate(model.blocks):

        def keep(module, inputs, out, layer=layer):
            values[layer] = out.chunk(3, dim=2)[2]

        block.attn.qkv.register_forward_hook(keep)
    config = ToCaConfig(interval=2, fresh_ratio=0.25, selector="norm", age_weight=0.0)
    _, session = run(model, config, 2, record=True)
    chosen = session.selections[1]
    for layer, value in values.items():
        length = value.unflatten(2, (4, 8)).double().norm(dim=3).sum(dim=2)
        smallest = torch.zeros_like(length, dtype=torch.bool)
        smallest.scatter_(1, length.argsort(dim=1)[:, :16], True)
        assert torch.equal(chosen[layer], smallest)


def test_random_is_drawn_from_the_seed(model):
    def chosen(seed):
        config = CONFIG.replace(selector="random", seed=seed)
        return [mask for mask in run(model, config, record=True)[1].selections if mask is not None]

    first, again, other = chosen(0), chosen(0), chosen(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[2])  # drawn anew, not once per run
    assert not torch.equal(first[0][:, 0], first[0][:, 2])  # and for every sample


@pytest.mark.parametrize("selector", ["attention", "norm", "random"])
def test_guidance_halves_can_share_a_selection(model, selector):
    shared = CONFIG.replace(selector=selector, share_cfg_selection=True)
    for mask in run(model, shared, record=True)[1].selections:
        assert mask is None or torch.equal(mask[:, :2], mask[:, 2:])
    apart = run(model, CONFIG.replace(selector=selector), record=True)[1].selections
    assert any(mask is not None and not torch.equal(mask[:, :2], mask[:, 2:]) for mask in apart)


def test_shared_halves_that_are_equal_select_as_one_does(model):
    """Both halves with the same labels: the mean of their scores is the score of either."""

    def twice(model, x, t, labels):
        x, t, y = torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, labels])
        return call_model(model, x, t, y)[: len(labels)]

    both, shared = run(model, CONFIG.replace(share_cfg_selection=True), record=True, predict=twice)
    single, alone = run(model, CONFIG, record=True, predict=call_model)
    for mask, of_one in zip(shared.selections, alone.selections, strict=True):
        assert (mask is None) == (of_one is None)
        assert mask is None or torch.equal(mask[:, :2], of_one)
    assert torch.allclose(both, single, atol=1e-4)


def test_an_odd_batch_has_no_halves_to_share(model):
    """Guidance that is off: every sample selects for itself."""
    labels = (3, 7, 9)
    shared, ours = run(
        model,
        CONFIG.replace(share_cfg_selection=True),
        record=True,
        predict=call_model,
        labels=labels,
    )
    alone, own = run(model, CONFIG, record=True, predict=call_model, labels=labels)
    assert torch.equal(shared, alone)
    assert_same_selections(ours.selections, own.selections)


def test_recorded_selections_are_the_plan(model):
    config = ToCaConfig.preset("dit-ddim50")
    _, session = run(model, config, 12, record=True)
    plan = config.plan(num_steps=12, num_layers=3, num_tokens=64)
    for step, mask in enumerate(session.selections):
        if plan.full["mlp"][step].all():
            assert mask is None
        else:
            assert (mask.shape, mask.dtype) == ((3, 4, 64), torch.bool)
            assert (mask.sum(dim=2) == torch.tensor(plan.k["mlp"][step])[:, None]).all()


def test_selections_are_of_the_last_run_and_recorded_on_request(model):
    with toca.enabled(model, CONFIG, num_steps=8) as session:
        sample(model, 8)
        assert session.selections == []
        session.record_selections = True
        for _ in range(2):
            sample(model, 8)
            assert [mask is None for mask in session.selections] == [
                step % 3 == 0 for step in range(8)
            ]


# --- the report ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, ToCaConfig.preset("dit-ddim50")])
def test_summary_counts_what_was_planned(model, config):
    _, session = run(model, config, 12)
    summary = session.summary()
    plan = config.plan(num_steps=12, num_layers=3, num_tokens=64, modules=["attn", "mlp"])
    flops = plan.flops(BlockShape(batch=4, channels=32, heads=4))
    full_steps = int(plan.full["mlp"].all(axis=1).sum())
    assert (summary.steps, summary.full_steps) == (12, full_steps)
    assert summary.cached_steps == 12 - full_steps
    assert summary.tokens_recomputed == 4 * plan.tokens("mlp")
    assert summary.tokens_total == 4 * 12 * 3 * 64
    assert (summary.flops_full, summary.flops_done) == (flops.full, flops.done)
    assert summary.flops_ratio == flops.ratio
    assert summary.cache_bytes == 2 * 3 * 4 * 64 * 32 * 4  # attention and MLP, float32
    assert summary.packed_bytes in (0, 3 * 2 * 32 * 128 * 4)  # 0 where oneDNN cannot pack
    assert summary.seconds > 0
    assert summary.speedup_estimate > 0
    assert summary.nan_scores == 0


def test_summary_is_of_the_last_run_so_far(model):
    with toca.enabled(model, CONFIG, num_steps=8) as session:
        sample(model, 8)

        def check(step, x):
            if step > 0:
                assert session.summary().steps == step

        sample(model, 8, each_step=check)
        assert session.summary().steps == 8


def test_summary_prints(model):
    _, session = run(model, CONFIG)
    text = str(session.summary())
    assert text.startswith("steps       8 (3 full, 5 cached)\n")
    assert re.search(r"^memory +0\.2 MiB caches, .* 0\.01 MiB other$", text, re.MULTILINE)
    assert "NaN" not in text
    broken = dataclasses.replace(session.summary(), nan_scores=3)
    assert str(broken).endswith("WARNING     3 scores were NaN")


def test_nan_is_counted_and_does_no_other_harm(model):
    """One sample of the batch is NaN: the others come out as they do without it."""

    def poison(step, x):
        x[1] = torch.nan

    clean, session = run(model, CONFIG, predict=call_model)
    assert session.summary().nan_scores == 0
    latents, session = run(model, CONFIG, predict=call_model, each_step=poison)
    # 5 cached steps select among the 64 scores of one sample in 3 layers, all of them NaN
    assert session.summary().nan_scores == 5 * 64 * 3
    assert latents[1].isnan().all()
    assert torch.equal(latents[0], clean[0])


def test_everything_nan(model):
    for parameter in attention_of(blocks_of(model)[1]).parameters():
        parameter.fill_(torch.nan)
    latents, session = run(model, CONFIG)
    assert latents.isnan().all()
    # Cached steps 1 and 2 in layers 1 and 2; then the latents are NaN too, in all three layers.
    assert session.summary().nan_scores == (2 * 2 + 3 * 3) * 64 * 4
    assert "scores were NaN" in str(session.summary())


def test_numpy_and_tensor_timesteps(model):
    for given in (np.array(timesteps(8)), torch.tensor(timesteps(8)), timesteps(8)):
        with toca.enabled(model, CONFIG, timesteps=given) as session:
            sample(model, 8)
        assert session.summary().modulation_bytes > 0


def test_where_all_rows_cost_no_more_than_some_all_are_recomputed(monkeypatch):
    """The dense guard: as on a GPU, whose GEMM of a few rows reads the weights all the same."""
    model = tiny_dit()
    every = CONFIG.replace(fresh_ratio=1.0, step_slope=0.0, layer_slope=0.0)
    expected, _ = run(model, every)
    monkeypatch.setattr(branch, "free_rows", lambda device: 10**9)
    latents, session = run(model, CONFIG.replace(step_slope=0.0))
    assert torch.equal(latents, expected)
    summary = session.summary()
    assert summary.tokens_recomputed == summary.tokens_total
    monkeypatch.setattr(branch, "free_rows", lambda device: 1)
    _, session = run(model, CONFIG.replace(step_slope=0.0))
    assert session.summary().tokens_recomputed < summary.tokens_total


def test_on_a_cpu_time_follows_the_rows():
    assert free_rows(torch.device("cpu")) == 0
    assert free_rows(torch.device("cuda")) > 0
