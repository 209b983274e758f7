"""What diffusers' users do to a pipeline, with a cache on it: it works, or it is refused in words.

Expected values come from the stock pipeline, from weights that say the same in another way, or
from a pipeline to which the thing was never done.
"""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

import diffusers
from diffusers.hooks import apply_group_offloading

import toca_kernels as toca
import toca_kernels.diffusers
from pipelines import PIPELINES
from published import noise

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own
STEPS = 6
ENTROPY = {"pixart_alpha", "wan", "wan22"}
TAPPED = {*ENTROPY, "sd3"}  # not all of their blocks are composed from the ops
VIDEO = {"wan", "wan22", "hunyuan_video"}
NAMES = (
    "flux",
    "flux_true_cfg",
    "pixart_alpha",
    "sd3",
    "wan",
    "wan22",
    "qwenimage",
    "hunyuan_video",
)
WITH_MIXIN = [name for name in NAMES if name not in ("pixart_alpha", "sd3")]
CALLED_BACK = [name for name in NAMES if name != "pixart_alpha"]
MLPS = ("ff", "ff_context", "ffn", "img_mlp", "txt_mlp")
ATTENTIONS = ("attn", "attn1", "attn2")
LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "to_add_out", "net.0.proj", "net.2")
LINEARS += ("add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp", "proj_out")

each = pytest.mark.parametrize("name", NAMES)
early_or_late = pytest.mark.parametrize("late", [False, True], ids=["before", "after"])


def config(name, **settings):
    given = {"interval": 3, "fresh_ratio": 0.3, "module_ratio": {"mlp": 1.0, "cross_attn": 0.5}}
    given["selector"] = "entropy" if name in ENTROPY else "attention"
    return toca.ToCaConfig(**{**given, **settings})


def full(name):
    return config(name, interval=1)


def close(have, want, tolerance=1e-4):
    return (have - want).norm() <= tolerance * want.norm()


@functools.cache
def stock(name):
    return PIPELINES[name].call(PIPELINES[name](), STEPS)


@functools.cache
def cached(name, **arguments):
    """What a pipeline returns to which nothing else was done."""
    pipe = PIPELINES[name]()
    with toca.enabled(pipe, config(name)):
        return PIPELINES[name].call(pipe, STEPS, **arguments)


@contextlib.contextmanager
def enabled_around(pipe, settings, change, *, late):
    """`change` is made before the pipeline is enabled, or after."""
    if not late:
        change()
    with toca.enabled(pipe, settings) as session:
        if late:
            change()
        yield session


def parts(tiny, pipe, names):
    """Modules of the blocks, by name."""
    for block in tiny.blocks_of(pipe):
        yield from (child for name, child in block.named_children() if name in names)


def linears(tiny, pipe):
    """(parent, attribute, linear) of what LoRA is trained on."""
    return [
        (block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
        for block in tiny.blocks_of(pipe)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and f".{name}".endswith(tuple(f".{n}" for n in LINEARS))
    ]


@contextlib.contextmanager
def full_attentions(tiny, pipe):
    """How often the first block's attention was computed, in a list of one."""
    attention = next(parts(tiny, pipe, ("attn", "attn1")))
    count = [0]

    def hook(module, args, out):
        count[0] += 1

    handle = attention.to_q.register_forward_hook(hook)
    yield count
    handle.remove()


# --- enable_cache --------------------------------------------------------------------------------


@pytest.fixture(params=WITH_MIXIN)
def mixed(request):
    """(name, tiny, pipe) of models that have diffusers' CacheMixin, with their caches enabled."""
    name, tiny = request.param, PIPELINES[request.param]
    pipe = tiny()
    for model in tiny.models(pipe):
        model.enable_cache(config(name))
    return name, tiny, pipe


def test_enable_cache_is_enable(mixed):
    name, tiny, pipe = mixed
    for model in tiny.models(pipe):
        assert model.is_cache_enabled
    for _ in range(2):
        assert torch.equal(tiny.call(pipe, STEPS), cached(name))
    for model in tiny.models(pipe):
        model.disable_cache()
        assert not model.is_cache_enabled
    assert torch.equal(tiny.call(pipe, STEPS), stock(name))
    assert "step" not in vars(pipe.scheduler)


def test_enable_cache_returns_the_session():
    pipe, tiny = PIPELINES["flux"](), PIPELINES["flux"]
    session = pipe.transformer.enable_cache(config("flux"))
    tiny.call(pipe, STEPS)
    summary = session.summary()
    assert (summary.steps, summary.cached_steps) == (STEPS, 4)
    toca.disable(pipe)  # as good as disable_cache
    assert not pipe.transformer.is_cache_enabled
    pipe.transformer.enable_cache(config("flux"))


def test_enable_cache_after_an_interrupted_or_failed_run(mixed):
    name, tiny, pipe = mixed

    def interrupt(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 2
        return {}

    def fail(pipe, step, timestep, kwargs):
        raise KeyboardInterrupt

    tiny.call(pipe, STEPS, seed=1, callback_on_step_end=interrupt)
    assert torch.equal(tiny.call(pipe, STEPS), cached(name))
    with pytest.raises(KeyboardInterrupt):
        tiny.call(pipe, STEPS, seed=1, callback_on_step_end=fail)
    assert torch.equal(tiny.call(pipe, STEPS), cached(name))


def test_enable_cache_learns_another_number_of_steps(mixed):
    name, tiny, pipe = mixed
    fresh = tiny()
    with toca.enabled(fresh, config(name)):
        expected = tiny.call(fresh, 4)
    tiny.call(pipe, STEPS)
    assert torch.equal(tiny.call(pipe, 4), expected)


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_two_transformers_are_disabled_in_any_order(order):
    tiny = PIPELINES["wan22"]
    pipe = tiny()
    for model in tiny.models(pipe):
        model.enable_cache(config("wan22"))
    tiny.call(pipe, STEPS)
    for model in tiny.models(pipe)[:: 1 if order == "forward" else -1]:
        model.disable_cache()
    assert torch.equal(tiny.call(pipe, STEPS), stock("wan22"))
    assert "step" not in vars(pipe.scheduler)


def record_calls(pipe):
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    return calls, handle


def test_a_loop_of_ones_own_has_to_say_its_steps():
    pipe, tiny = PIPELINES["flux"](), PIPELINES["flux"]
    model = pipe.transformer
    calls, handle = record_calls(pipe)
    tiny.call(pipe, STEPS)
    handle.remove()
    with toca.enabled(model, config("flux"), num_steps=STEPS):
        expected = [model(*args, **kwargs)[0] for args, kwargs in calls]
    model.enable_cache(config("flux"))
    with pytest.raises(ValueError, match=r"num_steps=50"):
        model(*calls[0][0], **calls[0][1])
    model.disable_cache()
    session = model.enable_cache(config("flux"), num_steps=STEPS)
    for _ in range(2):
        for (args, kwargs), want in zip(calls, expected, strict=True):
            assert torch.equal(model(*args, **kwargs)[0], want)
    assert session.summary().steps == STEPS
    model(*calls[0][0], **calls[0][1])
    model._reset_stateful_cache()  # as a pipeline does at its end
    for (args, kwargs), want in zip(calls, expected, strict=True):
        assert torch.equal(model(*args, **kwargs)[0], want)


def test_other_configs_and_pipelines_see_no_difference():
    tiny = PIPELINES["flux"]
    pipe = tiny()
    with pytest.raises(ValueError, match=r"is not supported"):
        pipe.transformer.enable_cache(object())
    pipe.transformer.disable_cache()  # diffusers warns
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e-9))
    assert pipe.transformer.is_cache_enabled
    assert close(tiny.call(pipe, STEPS), stock("flux"))
    pipe.transformer.disable_cache()
    assert torch.equal(tiny.call(pipe, STEPS), stock("flux"))


def test_enable_cache_on_a_model_of_no_family():
    model = PIPELINES["flux"]().transformer
    model.transformer_blocks[0] = nn.Identity()
    with pytest.raises(ValueError, match="supported families"):
        model.enable_cache(config("flux"))
    assert not model.is_cache_enabled


# --- two caches at once --------------------------------------------------------------------------

OTHERS = {
    "first-block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "pyramid": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "ours": lambda: config("flux"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("first", ["enable", "enable_cache"])
def test_another_cache_after_ours_is_refused(first, other):
    pipe = PIPELINES["flux"]()
    if first == "enable":
        toca.enable(pipe, config("flux"))
    else:
        pipe.transformer.enable_cache(config("flux"))
    with pytest.raises(ValueError, match="already been enabled"):
        pipe.transformer.enable_cache(OTHERS[other]())
    with pytest.raises(ValueError, match="already is"):
        toca.enable(pipe, config("flux"))
    assert torch.equal(PIPELINES["flux"].call(pipe, STEPS), cached("flux"))


@pytest.mark.parametrize("other", ["first-block", "pyramid"])
@pytest.mark.parametrize("second", ["enable", "enable_cache"])
def test_ours_after_another_cache_is_refused(second, other):
    pipe = PIPELINES["flux"]()
    pipe.transformer.enable_cache(OTHERS[other]())
    enable = functools.partial(toca.enable, pipe)
    if second == "enable_cache":
        enable = pipe.transformer.enable_cache
    with pytest.raises(ValueError, match=r"already been enabled|without another cache"):
        enable(config("flux"))


# --- runs ----------------------------------------------------------------------------------------


def change_prompt(after, *, in_place=False):
    """A callback after a step: another prompt."""

    def callback(pipe, step, timestep, kwargs):
        text = kwargs["prompt_embeds"]
        other = noise(*text.shape, seed=9)
        if step != after:
            return {}
        if in_place:
            text.copy_(other)
            return {}
        return {"prompt_embeds": other}

    inputs = ["latents", "prompt_embeds"]
    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": inputs}


@pytest.mark.parametrize("name", CALLED_BACK)
@pytest.mark.parametrize("how", ["replaced", "written"])
def test_a_prompt_changed_by_a_callback(name, how):
    """The step that sees it first is full: nothing is known of the new prompt."""
    tiny = PIPELINES[name]
    pipe = tiny()
    changed = functools.partial(change_prompt, 1, in_place=how == "written")
    expected = tiny.call(pipe, STEPS, **changed())
    assert not close(expected, stock(name))
    with toca.enabled(pipe, full(name)):
        assert torch.equal(tiny.call(pipe, STEPS, **changed()), expected)
    with toca.enabled(pipe, config(name)) as session, full_attentions(tiny, pipe) as count:
        latents = tiny.call(pipe, STEPS, **changed())
        if name != "wan22":  # its first model has no step left
            assert count == [3 * len(tiny.calls)]  # 0, 2 and 3
        assert torch.equal(tiny.call(pipe, STEPS, **changed()), latents)
        assert torch.equal(tiny.call(pipe, STEPS), cached(name))
        assert session.summary().steps == STEPS


@pytest.mark.parametrize("name", CALLED_BACK)
def test_interrupted_by_a_callback(name):
    tiny = PIPELINES[name]
    pipe = tiny()

    def interrupt(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 2
        return {}

    with toca.enabled(pipe, config(name)) as session:
        tiny.call(pipe, STEPS, seed=1, callback_on_step_end=interrupt)
        assert session.summary().steps == 3
        assert torch.equal(tiny.call(pipe, STEPS), cached(name))
        assert session.summary().steps == STEPS


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_guidance_that_ends_early(name):
    """As diffusers' guides have it: a callback turns guidance off after half of the steps."""
    tiny = PIPELINES[name]
    pipe = tiny()

    def unguided(pipe, step, timestep, kwargs):
        if step < 2:
            return {}
        pipe._guidance_scale = 1.0
        return {key: value[-1:] for key, value in kwargs.items()}

    batched = ["prompt_embeds", "pooled_prompt_embeds"] if name == "sd3" else []
    given = {"callback_on_step_end": unguided, "callback_on_step_end_tensor_inputs": batched}
    expected = tiny.call(pipe, STEPS, **given)
    with toca.enabled(pipe, full(name)):
        assert torch.equal(tiny.call(pipe, STEPS, **given), expected)
    with toca.enabled(pipe, config(name)):
        latents = tiny.call(pipe, STEPS, **given)
        assert torch.equal(tiny.call(pipe, STEPS, **given), latents)
        assert torch.equal(tiny.call(pipe, STEPS), cached(name))


def variants(name):
    """Arguments of runs that follow each other."""
    tiny = PIPELINES[name]
    video = name in VIDEO
    size = {"height": 32, "width": 64} if video else {"height": 96, "width": 64}
    twice = {key: torch.cat([t, t.flip(1)]) for key, t in tiny.prompt().items()}
    found = [{}, size, twice, {"num_inference_steps": 4}]
    if name != "sd3":  # it does not repeat a pooled prompt that is given
        found.append({f"num_{'videos' if video else 'images'}_per_prompt": 2})
    return [*found, {}]


@each
def test_runs_of_different_sizes_prompts_and_batches(name):
    tiny = PIPELINES[name]
    alone, plain = [], []
    for given in variants(name):
        pipe = tiny()
        plain.append(tiny.call(pipe, STEPS, **given))
        with toca.enabled(pipe, config(name)):
            alone.append(tiny.call(pipe, STEPS, **given))
    pipe = tiny()
    for settings, expected in ((config(name), alone), (full(name), plain)):
        with toca.enabled(pipe, settings):
            for given, want in zip(variants(name), expected, strict=True):
                assert torch.equal(tiny.call(pipe, STEPS, **given), want)


# --- LoRA ----------------------------------------------------------------------------------------


class Lora(nn.Module):
    """A linear with a low-rank update, as peft wraps it."""

    def __init__(self, base, seed):
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(noise(2, base.in_features, seed=seed) * base.in_features**-0.5)
        self.up = nn.Parameter(noise(base.out_features, 2, seed=seed) * 0.3)

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def wrap(tiny, pipe):
    for seed, (parent, attribute, linear) in enumerate(linears(tiny, pipe)):
        setattr(parent, attribute, Lora(linear, seed))


def fuse(tiny, pipe):
    for seed, (_, _, linear) in enumerate(linears(tiny, pipe)):
        lora = Lora(linear, seed)
        linear.weight.data += lora.up @ lora.down


@functools.cache
def fused(name):
    tiny = PIPELINES[name]
    pipe = tiny()
    fuse(tiny, pipe)
    with toca.enabled(pipe, config(name)):
        return tiny.call(pipe, STEPS)


@each
def test_lora_before(name):
    tiny = PIPELINES[name]
    pipe = tiny()
    wrap(tiny, pipe)
    expected = tiny.call(pipe, STEPS)
    with toca.enabled(pipe, full(name)):
        assert torch.equal(tiny.call(pipe, STEPS), expected)
    with toca.enabled(pipe, config(name)) as session:
        assert close(tiny.call(pipe, STEPS), fused(name))
        assert session.summary().flops_ratio > 1
    assert not close(fused(name), cached(name))


@each
def test_lora_after(name):
    """The linears of a single stream hand each other some rows: there it has to come before."""
    tiny = PIPELINES[name]
    pipe = tiny()
    refused = name in ("flux", "flux_true_cfg", "hunyuan_video")
    with toca.enabled(pipe, config(name)):
        assert torch.equal(tiny.call(pipe, STEPS), cached(name))
        wrap(tiny, pipe)
        if refused:
            with pytest.raises(RuntimeError, match="disable the model and enable it again"):
                tiny.call(pipe, STEPS)
        else:
            assert close(tiny.call(pipe, STEPS), fused(name))


@each
def test_lora_fused_between_runs(name):
    tiny = PIPELINES[name]
    pipe = tiny()
    with toca.enabled(pipe, config(name)):
        assert torch.equal(tiny.call(pipe, STEPS), cached(name))
        fuse(tiny, pipe)
        assert torch.equal(tiny.call(pipe, STEPS), fused(name))


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
def test_peft(name):
    """Loaded, fused and unfused by diffusers, enabled all the while."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    tiny = PIPELINES[name]
    pipe = tiny()
    targets = [n for n in LINEARS if name == "flux" or not n.startswith("proj_")]
    lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(0)
    for model in tiny.models(pipe):
        model.add_adapter(lora)
    expected = tiny.call(pipe, STEPS)
    assert not close(expected, stock(name))
    with toca.enabled(pipe, full(name)):
        assert torch.equal(tiny.call(pipe, STEPS), expected)
    with toca.enabled(pipe, config(name)):
        loaded = tiny.call(pipe, STEPS)
        for model in tiny.models(pipe):
            model.fuse_lora()
        assert close(tiny.call(pipe, STEPS), loaded)
        for model in tiny.models(pipe):
            model.unfuse_lora()
        assert close(tiny.call(pipe, STEPS), loaded)
        for model in tiny.models(pipe):
            model.disable_adapters()
        assert close(tiny.call(pipe, STEPS), cached(name))


# --- offloading and precision --------------------------------------------------------------------


@early_or_late
@pytest.mark.parametrize("name", ["flux", "pixart_alpha", "wan22"])
def test_model_offload(name, late):
    """Its hook is taken off and put on again at the end of every run."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    tiny = PIPELINES[name]
    pipe = tiny()
    offload = functools.partial(pipe.enable_model_cpu_offload, device="cpu")
    with enabled_around(pipe, config(name), offload, late=late):
        for _ in range(3):
            assert torch.equal(tiny.call(pipe, STEPS), cached(name))
    assert torch.equal(tiny.call(pipe, STEPS), stock(name))


@early_or_late
@pytest.mark.parametrize("name", ["flux", "pixart_alpha", "wan"])
def test_sequential_offload(name, late):
    """Weights are on the meta device until they are used."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    tiny = PIPELINES[name]
    pipe = tiny()
    offload = functools.partial(accelerate.cpu_offload, pipe.transformer, torch.device("cpu"))
    with enabled_around(pipe, config(name), offload, late=late):
        for _ in range(2):
            assert close(tiny.call(pipe, STEPS), cached(name))
    assert torch.equal(tiny.call(pipe, STEPS), stock(name))


@early_or_late
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("name", ["flux", "pixart_alpha", "wan22"])
def test_group_offload(name, kind, late):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    tiny = PIPELINES[name]
    pipe = tiny()

    def offload():
        for model in tiny.models(pipe):
            apply_group_offloading(
                model,
                onload_device=torch.device("cpu"),
                offload_device=torch.device("cpu"),
                offload_type=kind,
                num_blocks_per_group=1 if kind == "block_level" else None,
            )

    with enabled_around(pipe, config(name), offload, late=late) as session:
        for _ in range(2):
            assert close(tiny.call(pipe, STEPS), cached(name))
        assert session.summary().cached_steps > 0
    assert torch.equal(tiny.call(pipe, STEPS), stock(name))


def in_bfloat16(tiny):
    pipe = tiny()
    pipe.to(torch.bfloat16)
    prompt = {
        key: value.bfloat16() if value.is_floating_point() and "mask" not in key else value
        for key, value in tiny.prompt().items()
    }
    return pipe, functools.partial(tiny.call, pipe, STEPS, **prompt)


def assert_cached_again(pipe, name, call, expected):
    with toca.enabled(pipe, full(name)):
        assert torch.equal(call(), expected)
    with toca.enabled(pipe, config(name)) as session:
        latents = call()
        assert torch.equal(call(), latents)
        assert session.summary().cached_steps > 0
        assert session.summary().nan_scores == 0
    # Caching costs about what it costs in float32.
    error = (cached(name) - stock(name)).norm() / stock(name).norm()
    assert (latents.float() - expected.float()).norm() < 2 * error * expected.float().norm()
    assert torch.equal(call(), expected)


@each
def test_bfloat16(name):
    pipe, call = in_bfloat16(PIPELINES[name])
    assert_cached_again(pipe, name, call, call())


@pytest.mark.parametrize("name", ["flux", "pixart_alpha", "sd3", "wan22"])
@early_or_late
def test_layerwise_casting(name, late):
    """Weights are stored in 8 bits, and bfloat16 while they are used."""
    tiny = PIPELINES[name]
    pipe, call = in_bfloat16(tiny)

    def cast():
        for model in tiny.models(pipe):
            model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)

    before = call()
    with enabled_around(pipe, config(name), cast, late=late):
        early = call()
    expected = call()
    assert not torch.equal(expected, before)
    assert_cached_again(pipe, name, call, expected)
    with toca.enabled(pipe, config(name)):
        assert torch.equal(call(), early)


# --- modules -------------------------------------------------------------------------------------


def scaled(module, args, out):
    return tuple(1.5 * one for one in out) if isinstance(out, tuple) else 1.5 * out


def enlarge(tiny, pipe, names):
    """Weights that make the modules' outputs as much larger as `scaled` does."""
    for module in parts(tiny, pipe, names):
        for linear in last_linears(module):
            linear.weight.mul_(1.5)
            if linear.bias is not None:
                linear.bias.mul_(1.5)


def last_linears(module):
    """Those that an MLP or an attention ends with."""
    if not hasattr(module, "to_q"):
        return [m for m in module.modules() if isinstance(m, nn.Linear)][-1:]
    out = getattr(module, "to_out", None)
    ends = [None if out is None else out[0], getattr(module, "to_add_out", None)]
    found = [linear for linear in ends if linear is not None]
    return found or [module.to_v]  # a single stream's attention is projected elsewhere


@pytest.mark.parametrize(
    ("names", "late"), [(MLPS, False), (ATTENTIONS, True)], ids=["mlp-before", "attention-after"]
)
@each
def test_hooks_that_change_an_output(name, names, late):
    tiny = PIPELINES[name]
    hooked, larger = tiny(), tiny()

    def hook_up():
        for module in parts(tiny, hooked, names):
            module.register_forward_hook(scaled)

    enlarge(tiny, larger, names)
    with toca.enabled(larger, config(name)):
        expected = tiny.call(larger, STEPS)
    assert not close(expected, cached(name))
    with enabled_around(hooked, config(name), hook_up, late=late):
        assert close(tiny.call(hooked, STEPS), expected)
    assert close(tiny.call(hooked, STEPS), tiny.call(larger, STEPS))


@each
def test_hooks_that_only_look(name):
    tiny = PIPELINES[name]
    pipe = tiny()
    seen = []

    def look(module, args, kwargs, out):
        seen.append(type(module).__name__)

    def hook_up():
        for module in (*tiny.blocks_of(pipe), *parts(tiny, pipe, (*MLPS, *ATTENTIONS))):
            module.register_forward_hook(look, with_kwargs=True)

    with enabled_around(pipe, config(name), hook_up, late=True):
        assert close(tiny.call(pipe, STEPS), cached(name))
    assert seen.count(tiny.blocks[0]) >= STEPS


def test_hooks_on_blocks_are_obeyed():
    tiny = PIPELINES["sd3"]
    pipe = tiny()
    for block in tiny.blocks_of(pipe):
        block.register_forward_hook(lambda block, args, out: (out[0], 1.1 * out[1]))
    expected = tiny.call(pipe, STEPS)
    with toca.enabled(pipe, full("sd3")):
        assert torch.equal(tiny.call(pipe, STEPS), expected)
    with toca.enabled(pipe, config("sd3")):
        latents = tiny.call(pipe, STEPS)
        assert torch.equal(tiny.call(pipe, STEPS), latents)
    assert not close(latents, cached("sd3"))


def larger_by(processor):
    """A processor like it, whose outputs are as much larger as those of `scaled`."""
    kind = type(processor)

    @functools.wraps(kind.__call__)  # Attention passes on the arguments that it names
    def call(self, *args, **kwargs):
        return scaled(None, None, kind.__call__(self, *args, **kwargs))

    return type(kind.__name__, (kind,), {"__call__": call})()


@pytest.mark.parametrize("name", NAMES)
def test_processors_replaced_between_runs(name):
    tiny = PIPELINES[name]
    pipe, larger = tiny(), tiny()
    enlarge(tiny, larger, ATTENTIONS)
    with toca.enabled(larger, config(name)):
        expected = tiny.call(larger, STEPS)
    with toca.enabled(pipe, config(name)):
        assert torch.equal(tiny.call(pipe, STEPS), cached(name))
        for module in parts(tiny, pipe, ATTENTIONS):
            module.set_processor(larger_by(module.processor))
        assert close(tiny.call(pipe, STEPS), expected)


@pytest.mark.parametrize("selector", ["attention", "entropy", "random"])
def test_a_processor_with_a_softmax_of_its_own(selector):
    tiny, settings = PIPELINES["pixart_alpha"], config("pixart_alpha", selector=selector)
    pipe = tiny()
    with toca.enabled(pipe, settings):
        expected = tiny.call(pipe, STEPS)
    pipe.transformer.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    with toca.enabled(pipe, settings):
        if selector == "entropy":
            with pytest.raises(RuntimeError, match=r"use selector='random'"):
                tiny.call(pipe, STEPS)
        else:
            assert close(tiny.call(pipe, STEPS), expected)


@early_or_late
@each
def test_fused_projections(name, late):
    """The text's keys and values come from a linear of their own then, which is not looked for."""
    tiny = PIPELINES[name]
    pipe = tiny()
    if not hasattr(tiny.models(pipe)[0], "fuse_qkv_projections"):
        pytest.skip("this diffusers cannot fuse this model's projections")

    def fuse_projections():
        for model in tiny.models(pipe):
            model.fuse_qkv_projections()

    with enabled_around(pipe, config(name), fuse_projections, late=late):
        if name in ENTROPY:
            with pytest.raises(RuntimeError, match="each of its modules to be called once"):
                tiny.call(pipe, STEPS)
        else:
            assert close(tiny.call(pipe, STEPS), cached(name))


@pytest.mark.parametrize("name", ["flux", "wan", "qwenimage"])
def test_attention_backends(name):
    tiny = PIPELINES[name]
    pipe = tiny()
    with toca.enabled(pipe, config(name)):
        tiny.call(pipe, STEPS)
        pipe.transformer.set_attention_backend("_native_math")
        assert close(tiny.call(pipe, STEPS), cached(name))


def test_chunked_feed_forward_is_refused():
    tiny = PIPELINES["sd3"]
    pipe = tiny()
    pipe.transformer.enable_forward_chunking(2, dim=1)
    with (
        toca.enabled(pipe, config("sd3")),
        pytest.raises(RuntimeError, match=r"called once, .* img_mlp 32 times"),
    ):
        tiny.call(pipe, STEPS)


@early_or_late
@pytest.mark.parametrize("name", ["flux", "pixart_alpha", "wan", "qwenimage"])
def test_compiled_blocks(name, late):
    """One graph for each kind of block and step, not one for each block."""
    tiny = PIPELINES[name]
    pipe = tiny()
    given = {"fullgraph": True, "backend": "aot_eager"}

    def compile_blocks():
        if name == "pixart_alpha":  # diffusers does not name its repeated blocks
            for block in tiny.blocks_of(pipe):
                block.compile(**given)
        else:
            pipe.transformer.compile_repeated_blocks(**given)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with enabled_around(pipe, config(name), compile_blocks, late=late) as session:
        assert close(tiny.call(pipe, STEPS), cached(name))
        tiny.call(pipe, STEPS)
        assert session.summary().cached_steps == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    torch._dynamo.reset()


# --- more inputs ---------------------------------------------------------------------------------


def test_skip_layer_guidance():
    """Its calls skip blocks: they are no steps of the run."""
    tiny = PIPELINES["sd3"]
    pipe = tiny()
    given = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0}
    given["skip_layer_guidance_stop"] = 0.9
    expected = tiny.call(pipe, STEPS, **given)
    assert not close(expected, stock("sd3"))
    with toca.enabled(pipe, full("sd3")):
        assert torch.equal(tiny.call(pipe, STEPS, **given), expected)
    with toca.enabled(pipe, config("sd3")) as session:
        latents = tiny.call(pipe, STEPS, **given)
        assert torch.equal(tiny.call(pipe, STEPS, **given), latents)
        assert (session.summary().steps, session.summary().cached_steps) == (STEPS, 4)


def test_an_ip_adapter_is_refused():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    tiny = PIPELINES["flux"]
    pipe = tiny()
    for block in pipe.transformer.transformer_blocks:
        processor = FluxIPAdapterAttnProcessor(hidden_size=64, cross_attention_dim=64)
        block.attn.set_processor(processor)
    given = {"joint_attention_kwargs": {"ip_hidden_states": [noise(1, 4, 64, seed=3)]}}
    tiny.call(pipe, STEPS, **given)
    with (
        toca.enabled(pipe, config("flux")),
        pytest.raises(RuntimeError, match="expected 2 outputs, img_attn, txt_attn, got 3"),
    ):
        tiny.call(pipe, STEPS, **given)


def test_controlnet_residuals():
    tiny = PIPELINES["flux"]
    pipe = tiny()
    residual = noise(1, tiny.tokens, 64, seed=3)
    given = {
        "controlnet_block_samples": [residual],
        "controlnet_single_block_samples": [residual / 2],
    }
    model = pipe.transformer

    class Controlled(type(model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs, **given)

    model.__class__ = Controlled
    expected = tiny.call(pipe, STEPS)
    assert not close(expected, stock("flux"))
    with toca.enabled(pipe, full("flux")):
        assert torch.equal(tiny.call(pipe, STEPS), expected)
    with toca.enabled(pipe, config("flux")) as session:
        latents = tiny.call(pipe, STEPS)
        assert torch.equal(tiny.call(pipe, STEPS), latents)
        assert session.summary().cached_steps == 4
        error = (latents - expected).norm() / expected.norm()
        assert 0 < error < (cached("flux") - stock("flux")).norm() / stock("flux").norm()
        given.clear()  # the next run has no control
        have, want = tiny.call(pipe, STEPS), cached("flux")
        assert close(have, want, 1e-5), (have - want).norm() / want.norm()
