"""Every stock pipeline and every published model structure, enabled.

Expected values come from forward hooks on the stock blocks' own attention modules, written here
from the paper's description (section 3.1), not from the package.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import toca_kernels as toca
from pipelines import PIPELINES
from toca_kernels.blocks.capture import CapturedScores
from toca_kernels.models.flux_flops import flux_flops

STEPS = 6
ALL = {"mlp": 1.0, "cross_attn": 1.0}
RANDOM_ONLY = {"mochi"}  # its attention runs sample by sample
CROSS = {"pixart_alpha", "pixart_sigma", "wan", "wan22", "wan22_ti2v", "ltx", "allegro"}


@pytest.fixture(params=[name for name in PIPELINES if name != "dit"])
def stock(request):
    return request.param, PIPELINES[request.param]


def selector(name):
    if name in RANDOM_ONLY:
        return "random"
    return "entropy" if name in CROSS else "attention"


def config(name, **settings):
    given = {"interval": 3, "fresh_ratio": 0.3, "module_ratio": {"mlp": 1.0, "cross_attn": 0.5}}
    return toca.ToCaConfig(**{**given, "selector": selector(name), **settings})


def close(have, want, tolerance=1e-4):
    return (have - want).norm() <= tolerance * want.norm()


def test_full_steps_are_the_models_own_bit_for_bit(stock):
    name, tiny = stock
    pipe = tiny()
    before = tiny.call(pipe, STEPS)
    with toca.enabled(pipe, config(name, interval=1)) as session:
        assert torch.equal(tiny.call(pipe, STEPS), before)
        summary = session.summary()
    assert (summary.steps, summary.cached_steps) == (STEPS, 0)
    assert summary.flops_ratio == 1
    assert torch.equal(tiny.call(pipe, STEPS), before)


class Reuse:
    """Forward hooks that hand out an attention's output of the last full step."""

    def __init__(self, blocks, is_full):
        self.is_full = is_full
        self.handles = []
        for block in blocks:
            for name in ("attn", "attn1", "attn2", "attention"):
                module = getattr(block, name, None)
                dual = name == "attn2" and type(block).__name__ == "JointTransformerBlock"
                if module is not None and (name != "attn2" or dual):
                    self.handles.append(module.register_forward_hook(self.hook()))

    def hook(self):
        kept = {}

        def hook(module, args, out):
            branch = self.branch
            if self.is_full():
                kept[branch] = out
            return kept[branch]

        return hook


@contextlib.contextmanager
def attention_reused(tiny, pipe, interval):
    """The paper's cached step with every token recomputed: the attention of the last full step."""
    calls = {}
    reuse = None

    def enter(model, args, kwargs):
        text = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        key = tuple(t.data_ptr() for t in (text if isinstance(text, list) else [text]))
        reuse.branch = (id(model), key)
        calls[reuse.branch] = calls.get(reuse.branch, -1) + 1

    def full():
        return calls[reuse.branch] % interval == 0

    reuse = Reuse(tiny.blocks_of(pipe), full)
    handles = [
        model.register_forward_pre_hook(enter, with_kwargs=True) for model in tiny.models(pipe)
    ]
    try:
        yield
    finally:
        for handle in (*handles, *reuse.handles):
            handle.remove()


def test_every_token_recomputed_is_only_the_attention_reused(stock):
    name, tiny = stock
    if name == "flux2":
        pytest.skip("its single block has one module for all: no hook reaches its attention")
    pipe = tiny()
    untouched = tiny.call(pipe, STEPS)
    # Two models share the steps of a run; the second begins where its own full steps lie.
    interval = 2 if name == "wan22" else 3
    with attention_reused(tiny, pipe, interval):
        expected = tiny.call(pipe, STEPS)
    assert not close(expected, untouched)  # the test can see the difference
    chosen = config(name, interval=interval, fresh_ratio=1.0, module_ratio=ALL)
    with toca.enabled(pipe, chosen) as session:
        assert close(tiny.call(pipe, STEPS), expected)
        summary = session.summary()
        assert summary.tokens_recomputed == summary.tokens_total
        assert summary.flops_ratio > 1


class CountRows(TorchFunctionMode):
    """Rows that go through the first linear of every MLP."""

    def __init__(self, blocks):
        super().__init__()
        names = ("ff", "ff_context", "ffn", "feed_forward", "img_mlp", "txt_mlp", "proj_mlp")
        found = (getattr(block, name, None) for block in blocks for name in names)
        firsts = (
            next(part for part in module.modules() if isinstance(part, nn.Linear))
            for module in found
            if module is not None
        )
        self.weights = {id(first.weight) for first in firsts}
        self.rows = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        products = (torch.nn.functional.linear, torch.ops.toca.mlp_rows.default)
        if func in products and id(args[1]) in self.weights:
            self.rows += args[0].shape[:-1].numel()
        return func(*args, **(kwargs or {}))


def test_the_work_done_is_the_plan(stock):
    name, tiny = stock
    if name == "flux2":
        pytest.skip("its single block reads a part of a fused linear")
    pipe = tiny()
    with (
        toca.enabled(pipe, config(name, prepack=False)) as session,
        CountRows(tiny.blocks_of(pipe)) as counted,
    ):
        tiny.call(pipe, STEPS)
        summary = session.summary()
    assert counted.rows == summary.tokens_recomputed < summary.tokens_total


def test_a_run_leaves_nothing_to_the_next(stock):
    name, tiny = stock
    pipe = tiny()
    untouched = tiny.call(pipe, STEPS)

    class Stop(Exception):
        pass

    def stop(pipe, step, timestep, kwargs):
        if step == 3:
            raise Stop
        return {}

    with toca.enabled(pipe, config(name)) as session:
        first = tiny.call(pipe, STEPS)
        assert torch.equal(tiny.call(pipe, STEPS), first)
        if "callback_on_step_end" in type(pipe).__call__.__code__.co_varnames:
            with pytest.raises(Stop):
                tiny.call(pipe, STEPS, seed=1, callback_on_step_end=stop)
        assert torch.equal(tiny.call(pipe, STEPS), first)
        assert session.summary().cached_steps > 0
    assert not close(first, untouched, 1e-6)
    assert torch.equal(tiny.call(pipe, STEPS), untouched)


COMPOSED = {
    "flux": ("DoubleStream", "SingleStream"),
    "flux_true_cfg": ("DoubleStream", "SingleStream"),
    "sd3": ("Block", "DoubleStream"),  # the last block's text ends there
    "qwenimage": ("DoubleStream",),
    "hunyuan_video": ("DoubleStream", "SingleStream"),
    "pixart_alpha": ("SelfCrossMLP",),
    "pixart_sigma": ("SelfCrossMLP",),
    "wan": ("SelfCrossMLP",),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_cached_steps_of_known_blocks_are_composed(name):
    tiny = PIPELINES[name]
    pipe = tiny()
    with toca.enabled(pipe, config(name)) as session:
        tiny.call(pipe, STEPS - 1)  # the last step is a cached one
        blocks = session._blocks
    kinds = {type(block).__name__: block.composed for block in blocks}
    assert tuple(sorted(kinds)) == COMPOSED[name]
    assert all(composed for kind, composed in kinds.items() if kind != "Block")


def test_nothing_recomputed(stock):
    """FORA: every output is reused whole."""
    name, tiny = stock
    pipe = tiny()
    with toca.enabled(pipe, config(name, fresh_ratio=0.0)) as session:
        out = tiny.call(pipe, STEPS)
        assert torch.equal(tiny.call(pipe, STEPS), out)
        summary = session.summary()
    assert torch.isfinite(out).all()
    assert summary.full_steps > 0
    assert summary.cached_steps > 0
    assert summary.tokens_recomputed * summary.steps == summary.full_steps * summary.tokens_total


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_eight_bit_caches(stock, dtype):
    name, tiny = stock
    pipe = tiny()
    untouched = tiny.call(pipe, STEPS)
    with toca.enabled(pipe, config(name)) as session:
        exact = tiny.call(pipe, STEPS)
        exact_bytes = session.summary().cache_bytes
        assert session.summary().cache_error == 0
    with toca.enabled(pipe, config(name, cache_dtype=dtype)) as session:
        out = tiny.call(pipe, STEPS)
        assert torch.equal(tiny.call(pipe, STEPS), out)
        summary = session.summary()
    assert summary.cache_bytes < exact_bytes
    low, high = {"int8": (0.002, 0.02), "fp8": (0.01, 0.04)}[dtype]
    assert low < summary.cache_error < high
    assert "8 bits" in str(summary)
    # Far less than caching itself costs, though not nothing.
    assert 0 < (out - exact).norm() < 0.5 * (exact - untouched).norm() + 0.02 * exact.norm()


# --- the models' own repositories ----------------------------------------------------------------


def published(name):
    module = importlib.import_module(f"published.{name.split('_')[0]}")
    if name == "pixart_ms":
        return module.tiny(multi_scale=True), module.sample
    return module.tiny(), module.sample


PUBLISHED = {"pixart": "entropy", "pixart_ms": "entropy", "stdit": "entropy", "stdit3": "entropy"}
PUBLISHED["flux"] = "attention"
MODULES = {"mlp": 1.0, "cross_attn": 0.5}


def attentions_of(model):
    """What to hook for the attention, in each of the structures."""
    for block in model.modules():
        for name in ("attn", "attn_temp"):
            if hasattr(block, "cross_attn") and hasattr(block, name):
                yield getattr(block, name)
        for name in ("img_attn", "txt_attn"):
            if hasattr(block, name):
                yield getattr(block, name).proj


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_full_steps_bit_for_bit(name):
    model, sample = published(name)
    before = sample(model, STEPS)
    settings = {"interval": 1, "selector": PUBLISHED[name]}
    with toca.enabled(model, toca.ToCaConfig(**settings), num_steps=STEPS) as session:
        assert torch.equal(sample(model, STEPS), before)
        assert session.summary().full_steps == STEPS
    assert torch.equal(sample(model, STEPS), before)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "flux"])
def test_published_every_token_recomputed(name):
    model, sample = published(name)
    untouched = sample(model, STEPS)
    calls = [0]
    handles = []
    for attention in attentions_of(model):

        def hook(module, args, out, kept=[None]):  # noqa: B006  # one for each hook
            if (calls[0] - 1) % 3 == 0:
                kept[:] = [out]
            return kept[0]

        handles.append(attention.register_forward_hook(hook))
    own = model.forward

    def forward(*args, **kwargs):
        calls[0] += 1
        return own(*args, **kwargs)

    model.forward = forward
    expected = sample(model, STEPS)
    del model.forward
    for handle in handles:
        handle.remove()
    assert not close(expected, untouched)
    config = toca.ToCaConfig(
        interval=3, fresh_ratio=1.0, selector=PUBLISHED[name], module_ratio=ALL
    )
    with toca.enabled(model, config, num_steps=STEPS):
        assert close(sample(model, STEPS), expected)
        assert close(sample(model, STEPS), expected)


class PlainFluxToCa:
    """FLUX's cached step from the paper, k = N: attention reused behind its projection."""

    def __init__(self, model):
        self.model = model
        self.calls = 0

    def __enter__(self):
        self.undo = []
        for block in self.model.double_blocks:
            self._patch(block, self._double(block, block.forward))
        for block in self.model.single_blocks:
            self._patch(block, self._single(block, block.forward))
        return self

    def __exit__(self, *_):
        for block in self.undo:
            del block.forward

    def _patch(self, block, forward):
        block.forward = forward
        self.undo.append(block)

    def _double(self, block, own):
        kept = {}
        for name in ("img", "txt"):
            proj = getattr(block, f"{name}_attn").proj
            proj.register_forward_hook(lambda m, args, out, name=name: kept.update({name: out}))

        def forward(img, txt, vec, pe):
            if self.full:
                return own(img=img, txt=txt, vec=vec, pe=pe)
            out = []
            for name, x in (("img", img), ("txt", txt)):
                attn, mlp = getattr(block, f"{name}_mod")(vec)
                x = x + attn.gate * kept[name]
                norm = getattr(block, f"{name}_norm2")
                rows = (1 + mlp.scale) * norm(x) + mlp.shift
                out.append(x + mlp.gate * getattr(block, f"{name}_mlp")(rows))
            return tuple(out)

        return forward

    def _single(self, block, own):
        kept = {}
        C = block.hidden_size
        block.linear2.register_forward_hook(
            lambda m, args, out: kept.update(a=args[0][..., :C]) if self.full else None
        )

        def forward(x, vec, pe):
            if self.full:
                return own(x, vec=vec, pe=pe)
            mod, _ = block.modulation(vec)
            hidden = block.linear1((1 + mod.scale) * block.pre_norm(x) + mod.shift)[..., 3 * C :]
            return x + mod.gate * block.linear2(torch.cat([kept["a"], block.mlp_act(hidden)], 2))

        return forward

    @property
    def full(self):
        return (self.calls - 1) % 3 == 0


def test_flux_every_token_recomputed():
    model, sample = published("flux")
    untouched = sample(model, STEPS)
    with PlainFluxToCa(copy.deepcopy(model)) as plain:
        own = plain.model.forward

        def forward(*args, **kwargs):
            plain.calls += 1
            return own(*args, **kwargs)

        plain.model.forward = forward
        expected = sample(plain.model, STEPS)
    assert not close(expected, untouched)
    config = toca.ToCaConfig(interval=3, fresh_ratio=1.0)
    with toca.enabled(model, config, num_steps=STEPS):
        assert close(sample(model, STEPS), expected)
        assert close(sample(model, STEPS), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_repeat_and_end(name):
    model, sample = published(name)
    untouched = sample(model, STEPS)
    config = toca.ToCaConfig(
        interval=3, fresh_ratio=0.3, selector=PUBLISHED[name], module_ratio=MODULES
    )
    with toca.enabled(model, config, num_steps=STEPS) as session:
        first = sample(model, STEPS)
        assert torch.equal(sample(model, STEPS), first)
        summary = session.summary()
    assert (summary.full_steps, summary.cached_steps) == (2, 4)
    assert not close(first, untouched, 1e-6)
    assert torch.equal(sample(model, STEPS), untouched)


@pytest.mark.parametrize(
    ("name", "preset", "steps"),
    [("pixart", "pixart-dpm20", 20), ("stdit3", "opensora-rflow30", 30), ("flux", "flux-50", 50)],
)
def test_presets_run_as_planned(name, preset, steps):
    model, sample = published(name)
    config = toca.ToCaConfig.preset(preset)
    with toca.enabled(model, config, num_steps=steps) as session:
        out = sample(model, steps)
        done = next(iter(session._run.branches.values())).done
        plan = config.plan(num_steps=steps, num_layers=session._run.layers, num_tokens=done.tokens)
        assert done.plan() == plan
        assert torch.isfinite(out).all()
        assert session.summary().flops_ratio > 1.3


def test_flops_of_flux_are_the_published_ones():
    """74.39 TFLOPs a full step at 1024 x 1024; the published table multiplies that by 50."""
    tokens = {"img": 4096, "txt": 512, "single": 4608}
    layers = {"img": 19, "txt": 19, "single": 38}
    names = [f"{stream}_{kind}" for stream in tokens for kind in ("attn", "mlp")]
    shape = {
        "num_steps": 50,
        "num_layers": {name: layers[name.split("_")[0]] for name in names},
        "num_tokens": {name: tokens[name.split("_")[0]] for name in names},
    }
    flux = {"batch": 1, "channels": 3072, "heads": 24, "mlp_ratio": 4.0, "guidance": True}
    widths = {"in_channels": 64, "context_channels": 4096, "vector_channels": 768}
    plan = toca.ToCaConfig.preset("flux-50").plan(**shape)
    flops = flux_flops(plan, **flux, **widths)
    assert round(flops.full_step * 1e-12, 2) * 50 == pytest.approx(3719.50)
    assert flops.done * 1e-12 < 1263.22  # published, where every step projects the attention again


# --- attention kernels that are not torch's ------------------------------------------------------


def test_entropy_of_packed_xformers_attention(monkeypatch):
    """With a stand-in for xformers, whose block-diagonal masks tell where samples begin."""
    lengths = {"q": [0, 5, 12], "k": [0, 3, 7]}
    bias = SimpleNamespace(
        q_seqinfo=SimpleNamespace(seqstart_py=lengths["q"]),
        k_seqinfo=SimpleNamespace(seqstart_py=lengths["k"]),
    )
    calls = []
    ops = SimpleNamespace(memory_efficient_attention=lambda *a, **k: calls.append(a))
    own = ops.memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k = torch.randn(1, 12, 2, 8), torch.randn(1, 7, 2, 8)
    found = []
    with CapturedScores("entropy", found):
        ops.memory_efficient_attention(q, k, k, attn_bias=bias)
    assert ops.memory_efficient_attention is own
    assert len(calls) == 1
    for (q0, q1), (k0, k1), have in zip(
        itertools.pairwise(lengths["q"]), itertools.pairwise(lengths["k"]), found, strict=True
    ):
        logits = torch.einsum("qhd,khd->hqk", q[0, q0:q1], k[0, k0:k1]) * 8**-0.5
        mean = logits.softmax(dim=-1).mean(dim=0)
        assert torch.allclose(have[0], -(mean * (mean + 1e-7).log()).sum(dim=-1), atol=1e-5)
    with (
        pytest.raises(RuntimeError, match="expected a block-diagonal attn_bias"),
        CapturedScores("entropy", []),
    ):
        ops.memory_efficient_attention(q, k, k)
    assert ops.memory_efficient_attention is own
