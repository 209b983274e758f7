"""self_attention="partial": the selected queries over all keys, of which theirs are fresh."""

import pytest
import torch
import torch.nn.functional as F

import toca_kernels as toca
from models import blocks_of, epsilons, mlp, modulations, sample, tiny_model
from pipelines import PIPELINES
from published import pixart

STEPS = 6
EVERY = {"attn": 1.0, "mlp": 1.0, "cross_attn": 1.0}
SOME = {"attn": 0.5, "mlp": 1.0, "cross_attn": 0.5}


def config(**settings):
    return toca.ToCaConfig(**{"interval": 3, "self_attention": "partial"} | settings)


def close(have, want):
    return (have - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("source", ["facebook", "diffusers"])
@pytest.mark.parametrize("full_steps", ["exact", "fused"])
def test_every_token_is_the_untouched_model(source, full_steps):
    model = tiny_model(source)
    expected = sample(model, STEPS)
    chosen = config(fresh_ratio=1.0, module_ratio=EVERY, full_steps=full_steps)
    with toca.enabled(model, chosen, num_steps=STEPS) as session:
        assert close(sample(model, STEPS), expected)
        assert close(sample(model, STEPS), expected)
        assert session.summary().flops_ratio == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("name", ["pixart_alpha", "pixart_sigma"])
@pytest.mark.parametrize("selector", ["entropy", "attention", "random"])
def test_every_token_of_a_pipeline(name, selector):
    tiny = PIPELINES[name]
    pipe = tiny()
    expected = tiny.call(pipe, STEPS)
    chosen = config(fresh_ratio=1.0, selector=selector, module_ratio=EVERY)
    with toca.enabled(pipe, chosen):
        assert close(tiny.call(pipe, STEPS), expected)


def test_every_token_of_pixarts_own_code():
    model = pixart.tiny()
    expected = pixart.sample(model, STEPS)
    with toca.enabled(model, config(fresh_ratio=1.0, module_ratio=EVERY), num_steps=STEPS):
        assert close(pixart.sample(model, STEPS), expected)


@pytest.mark.parametrize("name", ["flux", "wan", "latte", "zimage"])
def test_rotary_embeddings_are_refused(name):
    pipe = PIPELINES[name]()
    with pytest.raises(ValueError, match="self_attention: expected 'reuse' for this model"):
        toca.enable(pipe, config(module_ratio=SOME))


def test_a_ratio_for_the_attention_needs_it():
    model = tiny_model("facebook")
    with pytest.raises(ValueError, match=r"module_ratio: expected no ratio for 'attn', whose"):
        toca.enable(model, config(self_attention="reuse", module_ratio=SOME), num_steps=STEPS)
    with pytest.raises(ValueError, match="self_attention: expected one of"):
        config(self_attention="some")


def test_queries_that_are_selected_attend_to_all_keys():
    """One block, one cached step, against the formula written out."""
    model = tiny_model("facebook")
    block = blocks_of(model)[0]
    seen = {}

    def before(module, args, kwargs):
        seen["x"], seen["c"] = args[0].clone(), args[1].clone()

    block.register_forward_pre_hook(before, with_kwargs=True)
    block.register_forward_hook(lambda module, args, out: seen.update(out=out.clone()))
    chosen = config(fresh_ratio=0.3, module_ratio={"attn": 1.0, "mlp": 1.0})
    with toca.enabled(model, chosen, num_steps=4) as session:
        session.record_selections = True
        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        y = torch.tensor([1, 2])
        for t in (900, 600):
            model(x, torch.full((2,), t), y)
            if t == 900:
                kept = dict(seen)
        chosen_attn = session.selections_of("attn")[1][0]
        chosen_mlp = session.selections_of("mlp")[1][0]
    norm1, norm2 = epsilons(block)

    def parts(x, c):
        return modulations(block, x, c).chunk(6, dim=1)

    def normed(x, eps, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]

    def heads(x, c):
        shift, scale, *_ = parts(x, c)
        qkv = block.attn.qkv(normed(x, norm1, shift, scale))
        return qkv.unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)

    old, new = heads(kept["x"], kept["c"]), heads(seen["x"], seen["c"])
    fresh = chosen_attn[:, None, :, None]
    k, v = (torch.where(fresh, new[i], old[i]) for i in (1, 2))
    rows = F.scaled_dot_product_attention(new[0], k, v).transpose(1, 2).flatten(2)
    whole = F.scaled_dot_product_attention(*old).transpose(1, 2).flatten(2)
    cached = torch.where(chosen_attn[..., None], block.attn.proj(rows), block.attn.proj(whole))
    _, _, gate_a, shift, scale, gate = parts(seen["x"], seen["c"])
    _, _, gate_a0, shift_m0, scale_m0, _ = parts(kept["x"], kept["c"])
    x = seen["x"] + gate_a[:, None] * cached
    old_x = kept["x"] + gate_a0[:, None] * block.attn.proj(whole)
    old_mlp = mlp(block, normed(old_x, norm2, shift_m0, scale_m0))
    new_mlp = mlp(block, normed(x, norm2, shift, scale))
    expected = x + gate[:, None] * torch.where(chosen_mlp[..., None], new_mlp, old_mlp)
    assert torch.allclose(seen["out"], expected, atol=1e-5)
