"""What models may be: their structure, and modules that compute more than their weights say."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import toca_kernels as toca
from models import (
    SOURCES,
    NaiveToCa,
    assert_close,
    attention_of,
    batched_guidance,
    blocks_of,
    call_model,
    mlp_of,
    reuse_attention,
    sample,
    timesteps,
    tiny_dit,
    tiny_model,
    tiny_pipeline,
    tiny_transformer,
)
from toca_kernels import ToCaConfig

CONFIG = ToCaConfig(interval=3, fresh_ratio=0.3, grid=2, bonus=0.6)
EVERY_TOKEN = ToCaConfig(interval=3, fresh_ratio=1.0)
FULL = (0, 3)
STEPS = 5


@pytest.fixture(params=SOURCES)
def model(request):
    return tiny_model(request.param)


def run(model, config=CONFIG, **kwargs):
    with toca.enabled(model, config, num_steps=STEPS):
        return sample(model, STEPS, **kwargs)


def naive(model, dtype=torch.float32, grid=(8, 8), **kwargs):
    return sample(NaiveToCa.on(model, CONFIG, STEPS, grid, dtype)[0], STEPS, dtype=dtype, **kwargs)


def assert_like_the_naive(latents, model, **kwargs):
    assert_close(latents, naive(model, torch.float64, **kwargs), naive(model, **kwargs))


# --- structure -----------------------------------------------------------------------------------


def test_an_unknown_model_is_told_what_it_lacks():
    with pytest.raises(ValueError, match="expected one of the supported families") as error:
        toca.enable(nn.Linear(2, 2), CONFIG)
    message = str(error.value)
    assert "got Linear" in message
    assert "facebookresearch/DiT: blocks, t_embedder, y_embedder, x_embedder" in message
    assert "diffusers DiTTransformer2DModel: transformer_blocks" in message


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda m: delattr(m, "y_embedder"), "y_embedder"),
        (lambda m: delattr(m.blocks[2].mlp, "fc2"), "blocks.2.mlp.fc2"),
        (lambda m: delattr(m.blocks[1].attn, "qkv"), "blocks.1.attn.qkv"),
        (lambda m: setattr(m, "blocks", nn.ModuleList()), "blocks as a ModuleList that is not"),
        (lambda m: setattr(m.blocks[0], "norm2", nn.Identity()), "norm2 of blocks.0"),
        (
            lambda m: setattr(m.blocks[0], "adaLN_modulation", nn.Linear(2, 2)),
            "blocks.0.adaLN_modulation as a Sequential",
        ),
    ],
)
def test_a_dit_with_something_missing(change, missing):
    model = tiny_dit()
    change(model)
    with pytest.raises(ValueError, match=re.escape(missing)):
        toca.enable(model, CONFIG)


def test_other_diffusers_transformers_are_refused():
    with pytest.raises(ValueError, match=r"norm_type='ada_norm_zero' .* 'layer_norm'"):
        toca.enable(with_other_norm(), CONFIG)
    model = tiny_transformer()
    model.transformer_blocks[1].attn2 = nn.Identity()
    with pytest.raises(ValueError, match=re.escape("transformer_blocks.1 without attn2")):
        toca.enable(model, CONFIG)


def with_other_norm():
    model = tiny_transformer()
    model.transformer_blocks[0].norm_type = "layer_norm"
    return model


@pytest.mark.parametrize("thing", [None, "dit", SimpleNamespace(unet=nn.Linear(2, 2))])
def test_what_is_neither_a_model_nor_a_pipeline(thing):
    with pytest.raises(ValueError, match="expected a torch module, or a pipeline with one"):
        toca.enable(thing, CONFIG)


def test_a_pipeline_of_another_kind():
    """Anything with a transformer that is known, whoever wrote it, with or without a scheduler."""
    model = tiny_dit()
    clean = run(model)
    pipe = SimpleNamespace(transformer=model)
    with toca.enabled(pipe, CONFIG, num_steps=STEPS):
        assert torch.equal(sample(model, STEPS), clean)
    toca.enable(pipe, CONFIG, num_steps=STEPS)
    toca.disable(model)  # by the model is as good as by the pipeline


def test_structure_counts_not_the_class():
    class Fork(type(tiny_dit())):
        pass

    model = tiny_dit()
    clean = run(model)
    model.__class__ = Fork
    assert torch.equal(run(model), clean)


def test_arguments_by_position_or_by_name(model):
    def named(model, x, t, y):
        if hasattr(model, "blocks"):
            return model(x=x, t=t, y=y)[:, :4]
        return model(hidden_states=x, timestep=t, class_labels=y, return_dict=False)[0][:, :4]

    assert torch.equal(run(model, predict=named), run(model, predict=call_model))


@pytest.mark.parametrize(
    ("size", "grid"), [((16, 24), (8, 12)), ((10, 14), (5, 7)), ((6, 2), (3, 1)), ((2, 2), (1, 1))]
)
def test_token_grids_that_are_not_square_or_odd(size, grid):
    """Cells of 2 x 2 at an odd border are cut short."""
    model = tiny_dit()
    assert_like_the_naive(run(model, size=size), model, size=size, grid=grid)


def test_an_odd_square_grid_in_diffusers():
    model = tiny_transformer(sample_size=10)
    assert_like_the_naive(run(model, size=(10, 10)), model, size=(10, 10), grid=(5, 5))


# --- modules that are more than their weights ----------------------------------------------------


class Lora(nn.Module):
    """A linear with a low-rank update, as adapters wrap it: no weight, no out_features."""

    def __init__(self, base):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator) * 0.1)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def linears_of(block):
    """{name: (parent, attribute)} of the linears that a cached step needs."""
    if hasattr(block, "mlp"):
        return {
            "fc1": (block.mlp, "fc1"),
            "fc2": (block.mlp, "fc2"),
            "modulation": (block.adaLN_modulation, "1"),
        }
    return {
        "fc1": (block.ff.net[0], "proj"),
        "fc2": (block.ff.net, "2"),
        "modulation": (block.norm1, "linear"),
    }


LINEARS = ("fc1", "fc2", "modulation")


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("late", [False, True], ids=["before-enable", "after-enable"])
def test_a_wrapped_linear_is_called(model, name, late):
    def wrap():
        for block in blocks_of(model):
            parent, attribute = linears_of(block)[name]
            setattr(parent, attribute, Lora(getattr(parent, attribute)))

    stock = run(model)
    if not late:
        wrap()
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        if late:
            wrap()
        latents = sample(model, STEPS)
        assert session.summary().flops_ratio > 1  # needs widths, which the wrapper does not tell
    assert_like_the_naive(latents, model)
    assert (latents - stock).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["forward", "pre"])
@pytest.mark.parametrize("name", [*LINEARS, "mlp", "attention", "norm", "container"])
def test_hooks_that_change_something_are_obeyed(model, name, kind):
    """Scaling hooks, against the same model with hooks that the naive ToCa calls too."""

    def module_of(block):
        if name in LINEARS:
            return getattr(*linears_of(block)[name])
        facebook = hasattr(block, "mlp")
        return {
            "mlp": mlp_of(block),
            "attention": attention_of(block),
            "norm": block.norm2 if facebook else block.norm3,
            "container": block.adaLN_modulation if facebook else block.ff.net[0],
        }[name]

    def hook_up(model):
        for block in blocks_of(model):
            if kind == "forward":
                module_of(block).register_forward_hook(lambda module, inputs, out: out * 1.5)
            else:
                module_of(block).register_forward_pre_hook(
                    lambda module, inputs: (inputs[0] * 1.5, *inputs[1:])
                )
        return model

    stock = run(model, EVERY_TOKEN)
    hooked = hook_up(copy.deepcopy(model))
    exact = sample(reuse_attention(hooked, FULL, torch.float64), STEPS, dtype=torch.float64)
    rounded = sample(reuse_attention(hooked, FULL), STEPS)
    latents = run(hooked, EVERY_TOKEN)
    assert_close(latents, exact, rounded)
    # A pre-hook that scales the input of a LayerNorm changes nothing.
    assert (name, kind) == ("norm", "pre") or (latents - stock).abs().max() > 0.01
    with toca.enabled(model, EVERY_TOKEN, num_steps=STEPS):
        hook_up(model)  # also when they come after enabling
        assert torch.equal(sample(model, STEPS), latents)


def test_hooks_on_some_tokens_only(model):
    """With few tokens recomputed, what a full step left in the cache must have seen the hook."""
    doubled = copy.deepcopy(model)
    for block, other in zip(blocks_of(model), blocks_of(doubled), strict=True):
        mlp_of(block).register_forward_hook(lambda module, inputs, out: out * 2)
        attention_of(block).register_forward_hook(lambda module, inputs, out: out * 2)
        attention = attention_of(other)
        out = attention.proj if hasattr(attention, "proj") else attention.to_out[0]
        for linear in (getattr(*linears_of(other)["fc2"]), out):
            linear.weight.data.mul_(2)
            linear.bias.data.mul_(2)
    assert_like_the_naive(run(model), doubled)


class ScaledNorm(nn.LayerNorm):
    """A subclass is not what its parameters say."""

    def forward(self, x):
        return super().forward(x) * 1.5


def test_a_layer_norm_of_another_kind_is_called(model):
    for block in blocks_of(model):
        name = "norm2" if hasattr(block, "mlp") else "norm3"
        eps = getattr(block, name).eps
        setattr(block, name, ScaledNorm(32, elementwise_affine=False, eps=eps))
    exact = sample(reuse_attention(model, FULL, torch.float64), STEPS, dtype=torch.float64)
    rounded = sample(reuse_attention(model, FULL), STEPS)
    for full_steps in ("exact", "fused"):
        assert_close(run(model, EVERY_TOKEN.replace(full_steps=full_steps)), exact, rounded)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Mish()], ids=repr)
def test_other_activations(activation):
    model = tiny_dit()
    for block in model.blocks:
        block.mlp.act = activation
    exact = sample(reuse_attention(model, FULL, torch.float64), STEPS, dtype=torch.float64)
    rounded = sample(reuse_attention(model, FULL), STEPS)
    assert_close(run(model, EVERY_TOKEN), exact, rounded)


def test_other_activations_in_diffusers():
    model = tiny_transformer(activation_fn="geglu")
    exact = sample(reuse_attention(model, FULL, torch.float64), STEPS, dtype=torch.float64)
    rounded = sample(reuse_attention(model, FULL), STEPS)
    assert_close(run(model, EVERY_TOKEN), exact, rounded)


class NormedMlp(nn.Module):
    """timm's, with a norm between the linears."""

    def __init__(self, stock, norm):
        super().__init__()
        self.fc1, self.act, self.norm, self.fc2 = stock.fc1, stock.act, norm, stock.fc2

    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1(x))))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.Dropout(0.5), nn.LayerNorm(128)], ids=repr)
def test_modules_inside_the_mlp_are_not_skipped(norm):
    model = tiny_dit()
    for block in model.blocks:
        block.mlp = NormedMlp(block.mlp, norm)
    model.eval()
    exact = sample(reuse_attention(model, FULL, torch.float64), STEPS, dtype=torch.float64)
    rounded = sample(reuse_attention(model, FULL), STEPS)
    assert_close(run(model, EVERY_TOKEN), exact, rounded)


def test_a_module_replaced_while_enabled_is_noticed(model):
    """The MLP that is watched is no longer called: nothing it left behind may be read."""
    block = blocks_of(model)[1]
    name = "mlp" if hasattr(block, "mlp") else "ff"
    own = getattr(block, name)
    other = copy.deepcopy(own)
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        clean = sample(model, STEPS)
        with pytest.raises(ValueError, match="expected a model that is not enabled"):
            copy.deepcopy(own)
        setattr(block, name, other)
        with pytest.raises(RuntimeError, match="if modules were replaced, disable the model and"):
            sample(model, STEPS)
        setattr(block, name, own)
        assert torch.equal(sample(model, STEPS), clean)


@pytest.mark.parametrize("size", [1, 16])
def test_a_chunked_feed_forward_is_refused(size):
    model = tiny_transformer()
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(size, dim=1)
    with pytest.raises(RuntimeError, match="mlp of layer 0: expected to be called with all tokens"):
        run(model)


# --- weights that change -------------------------------------------------------------------------


def permute_hidden(linear):
    """Rows change places: no sum over the weights changes."""
    order = torch.arange(linear.weight.shape[0]).flip(0)
    linear.weight.data.copy_(linear.weight.data[order].clone())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda linear: linear.weight.data.mul_(1.5), id="data"),
        pytest.param(permute_hidden, id="permuted"),
        pytest.param(lambda linear: linear.bias.data.add_(0.5), id="bias"),
        pytest.param(lambda linear: linear.weight.data[3, 5].neg_(), id="one-sign"),
        pytest.param(
            lambda linear: linear.load_state_dict(
                {name: value * 1.5 for name, value in linear.state_dict().items()}
            ),
            id="load-state-dict",
        ),
        pytest.param(
            lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight * 1.5)),
            id="new-parameter",
        ),
        pytest.param(
            lambda linear: setattr(linear.weight, "data", linear.weight.data * 1.5), id="new-data"
        ),
        pytest.param(lambda linear: setattr(linear, "bias", None), id="no-bias"),
    ],
)
@pytest.mark.parametrize(
    ("source", "name"), [*(("facebook", n) for n in LINEARS), ("diffusers", "fc1")]
)
def test_weights_changed_between_runs_are_read_anew(source, name, change):
    model, known = tiny_model(source), timesteps(STEPS)
    with toca.enabled(model, CONFIG, timesteps=known):
        before = sample(model, STEPS)
        change(getattr(*linears_of(blocks_of(model)[1])[name]))
        latents = sample(model, STEPS)
    assert not torch.equal(latents, before)
    with toca.enabled(model, CONFIG, timesteps=known):
        assert torch.equal(sample(model, STEPS), latents)


def test_an_mlp_replaced_before_a_run_by_another_width():
    model = tiny_dit()
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        sample(model, STEPS)
        for block in model.blocks:
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(32, 48), nn.Linear(48, 32)
        assert_like_the_naive(sample(model, STEPS), copy_without_session(model))


def copy_without_session(model):
    other = tiny_dit()
    for block, mine in zip(other.blocks, model.blocks, strict=True):
        block.mlp.fc1, block.mlp.fc2 = mine.mlp.fc1, mine.mlp.fc2
    return other


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = tiny_dit()
        inside = run(model)
    assert torch.equal(run(model), inside)


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("full_steps", ["exact", "fused"])
def test_half_precision_is_as_good_as_the_models_own(model, dtype, full_steps):
    """float64 weights are the rounded ones, so that only the arithmetic differs."""
    model = model.to(dtype)
    exact = sample(reuse_attention(model, FULL, torch.float64), STEPS, dtype=torch.float64)
    rounded = sample(reuse_attention(model, FULL, dtype), STEPS, dtype=dtype)
    latents = run(model, EVERY_TOKEN.replace(full_steps=full_steps), dtype=dtype)
    assert latents.dtype == dtype
    assert_close(latents, exact, rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_runs_with_few_tokens(model, dtype):
    model = model.to(dtype)
    known = timesteps(STEPS)
    with toca.enabled(model, CONFIG, timesteps=known) as session:
        latents = sample(model, STEPS, dtype=dtype)
        assert torch.equal(sample(model, STEPS, dtype=dtype), latents)
        assert session.summary().nan_scores == 0
    assert latents.isfinite().all()


def autocast(model, *inputs):
    with torch.autocast("cpu", torch.bfloat16):
        return batched_guidance(model, *inputs).float()


@pytest.mark.parametrize("full_steps", ["exact", "fused"])
def test_autocast_is_as_good_as_the_models_own(model, full_steps):
    exact = sample(reuse_attention(model, FULL, torch.float64), STEPS, dtype=torch.float64)
    rounded = sample(reuse_attention(model, FULL), STEPS, predict=autocast)
    config = EVERY_TOKEN.replace(full_steps=full_steps)
    for known in (None, timesteps(STEPS)):
        with toca.enabled(model, config, num_steps=STEPS, timesteps=known):
            assert_close(sample(model, STEPS, predict=autocast), exact, rounded)


class NormedAttention(nn.Module):
    """q, k and v are float32 behind their norm; under autocast SDPA itself casts them."""

    def __init__(self, stock):
        super().__init__()
        self.qkv, self.proj, self.num_heads = stock.qkv, stock.proj, stock.num_heads
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = (self.norm(t.float()) for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(B, N, C))


def test_autocast_reads_no_weights(model):
    """The MLP is called as a module, in the precision that autocast chooses for it."""
    packed, plain = (
        run(model, CONFIG.replace(prepack=prepack), predict=autocast) for prepack in (True, False)
    )
    assert torch.equal(packed, plain)


def test_autocast_full_steps_keep_their_bits():
    model = tiny_dit()
    for block in model.blocks:
        block.attn = NormedAttention(block.attn)
    x, t, y = torch.randn(2, 4, 16, 16), torch.full((2,), 999), torch.tensor([1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x, t, y)
        with toca.enabled(model, CONFIG, num_steps=STEPS):
            assert torch.equal(model(x, t, y), expected)


def test_a_pipeline_in_half_precision():
    pipe = tiny_pipeline()
    pipe.to(torch.bfloat16)
    with toca.enabled(pipe, CONFIG) as session:
        images = [
            pipe([3], num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images[0]
            for _ in range(2)
        ]
    assert images[0].tobytes() == images[1].tobytes()
    assert session.summary().steps == 8
