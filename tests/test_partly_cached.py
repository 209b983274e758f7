"""`modules` and `layers`: what is not cached runs as it is, in every step, and takes no memory."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import toca_kernels as toca
from models import SOURCES, sample, timesteps, tiny_dit, tiny_model
from pipelines import PIPELINES
from test_families import (
    PUBLISHED,
    STEPS,
    CountRows,
    attention_reused,
    close,
    config,
    published,
)
from toca_kernels.flops import BlockShape

DIT = toca.ToCaConfig(interval=3, fresh_ratio=0.3, selector="attention")
SINGLE = {"flux", "flux_true_cfg", "chroma", "flux2", "hunyuan_video"}  # one linear for both
STOCK = [name for name in PIPELINES if name != "dit"]


def attentions(name):
    return ("attn", "single_mlp") if name in SINGLE else ("attn",)


def parts(name):
    """Settings that leave something out."""
    single = ("single_attn",) if name in SINGLE else ()
    single += ("single_txt_attn",) if name == "hunyuan_video" else ()
    return [
        {"modules": attentions(name)},
        {"layers": (0,)},
        {"modules": ("mlp", *single), "layers": (-1,)},
    ]


def first_blocks(tiny, pipe):
    """The first of each list of blocks."""
    every = tiny.blocks_of(pipe)
    lists = [
        blocks
        for model in tiny.models(pipe)
        for blocks in model.children()
        if isinstance(blocks, nn.ModuleList)
    ]
    return [blocks[0] for blocks in lists if blocks[0] in every]


# --- the plan ------------------------------------------------------------------------------------

SHAPE = {
    "num_steps": 12,
    "num_layers": {"attn": 4, "img_mlp": 4, "txt_mlp": 3},
    "num_tokens": {"attn": 80, "img_mlp": 64, "txt_mlp": 16},
}
BASE = toca.ToCaConfig(interval=3, fresh_ratio=0.5)


@pytest.mark.parametrize(
    ("settings", "cached"),
    [
        ({"modules": ("attn",)}, {"attn": [0, 1, 2, 3]}),
        ({"modules": ("attn", "txt_mlp")}, {"attn": [0, 1, 2, 3], "txt_mlp": [0, 1, 2]}),
        ({"layers": (0, -1)}, {"attn": [0, 3], "img_mlp": [0, 3], "txt_mlp": [0, 2]}),
        ({"layers": range(2, 4)}, {"attn": [2, 3], "img_mlp": [2, 3], "txt_mlp": [2]}),
        (
            {"layers": {"mlp": (1,), "txt_mlp": (0, 2)}},
            {"attn": [0, 1, 2, 3], "img_mlp": [1], "txt_mlp": [0, 2]},
        ),
        ({"modules": ("mlp",), "layers": (1,)}, {"img_mlp": [1], "txt_mlp": [1]}),
    ],
)
def test_the_plan_is_full_where_nothing_is_cached(settings, cached):
    every, plan = BASE.plan(**SHAPE), BASE.replace(**settings).plan(**SHAPE)
    for name, layers in SHAPE["num_layers"].items():
        for layer in range(layers):
            full, k = plan.full[name][:, layer], plan.k[name][:, layer]
            if layer in cached.get(name, []):
                assert (full == every.full[name][:, layer]).all()
                assert (k == every.k[name][:, layer]).all()
            else:
                assert full.all()
                assert (k == SHAPE["num_tokens"][name]).all()


def test_the_first_layer_still_decides_for_the_period():
    """Not the layers that happen to be cached: the schedule of the others is as it was."""
    preset = toca.ToCaConfig.preset("dit-ddim50")
    shape = {"num_steps": 50, "num_layers": 28, "num_tokens": 256}
    every, plan = preset.plan(**shape), preset.replace(layers=range(14, 28)).plan(**shape)
    assert (plan.full["mlp"][:, 14:] == every.full["mlp"][:, 14:]).all()
    assert plan.full["mlp"][:, :14].all()
    block = BlockShape(batch=2, channels=1152, heads=16)
    assert every.flops(block).done < plan.flops(block).done < plan.flops(block).full


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules": ("img_attn",)}, r"modules: expected some of the modules .* got 'img_attn'"),
        ({"modules": ("cross_attn",)}, r"kinds \['attn', 'mlp'\], got 'cross_attn'"),
        ({"layers": (0, 4)}, r"layers: expected numbers from -4 to 3 for the .* got \[4\]"),
        ({"layers": (-5,)}, r"got \[-5\]"),
        ({"layers": {"txt_mlp": (3,)}}, r"from -3 to 2 for txt_mlp, got \[3\]"),
        ({"layers": {"cross_attn": (0,)}}, r"layers: expected some of the modules"),
    ],
)
def test_what_a_model_has_not(settings, said):
    with pytest.raises(ValueError, match=said):
        BASE.replace(**settings).plan(**SHAPE)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules": ()}, "modules: expected None or one or more names"),
        ({"modules": "attn"}, "modules: expected None or one or more names, got 'attn'"),
        ({"modules": ("head",)}, "modules: module: expected one of"),
        ({"layers": ()}, "layers: expected one or more numbers of layers"),
        ({"layers": 3}, "layers: expected one or more numbers of layers, got 3"),
        ({"layers": (1.0,)}, "layers: expected numbers of layers, got 1.0"),
        ({"layers": (True,)}, "layers: expected numbers of layers, got True"),
        ({"layers": {"mlp": ()}}, r"layers\['mlp'\]: expected one or more"),
    ],
)
def test_what_is_no_setting(settings, said):
    with pytest.raises(ValueError, match=said):
        toca.ToCaConfig(**settings)


def test_equal_settings_are_equal_and_saved(tmp_path):
    one = toca.ToCaConfig(modules=["mlp", "attn"], layers=range(3))
    assert one == toca.ToCaConfig(modules=("attn", "mlp"), layers=(2, 1, 0, 0))
    by_module = toca.ToCaConfig(layers={"mlp": [1, 0]})
    for given in (one, by_module):
        given.save(tmp_path / "config.json")
        assert toca.ToCaConfig.load(tmp_path / "config.json") == given
        assert isinstance(hash(given), int)


# --- every stock pipeline ------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("name", STOCK)
def test_invariants(name, part):
    """Full steps bit for bit, runs that repeat, rows as planned, memory as estimated."""
    tiny, settings = PIPELINES[name], parts(name)[part]
    pipe = tiny()
    untouched = tiny.call(pipe, STEPS)
    with toca.enabled(pipe, config(name, interval=1, **settings)):
        assert torch.equal(tiny.call(pipe, STEPS), untouched)
    chosen = config(name, interval=2, prepack=False, **settings)
    with toca.enabled(pipe, chosen) as session:
        with CountRows(tiny.blocks_of(pipe)) as counted:
            first = tiny.call(pipe, STEPS)
        summary = session.summary()
        if name != "flux2":  # its single block reads a part of a fused linear
            assert counted.rows == summary.tokens_recomputed
        assert summary.flops_ratio > 1
        assert torch.equal(tiny.call(pipe, STEPS), first)
    assert not close(first, untouched, 1e-6)
    assert torch.equal(tiny.call(pipe, STEPS), untouched)
    arguments = {"batch": len(tiny.calls[0]), "tokens": tiny.grid, "text_tokens": tiny.text}
    told = [
        one.memory(model, branches=len(tiny.calls), num_steps=STEPS, **arguments)
        for model in tiny.models(pipe)
        for one in (chosen, config(name))
    ]
    assert sum(one.cache_bytes for one in told[::2]) == summary.cache_bytes
    assert summary.cache_bytes < sum(one.cache_bytes for one in told[1::2])
    assert sum(one.other_bytes for one in told[::2]) == pytest.approx(summary.other_bytes, rel=0.02)


@pytest.mark.parametrize("layers", [None, (0,)])
@pytest.mark.parametrize("name", [name for name in STOCK if name != "flux2"])
def test_only_the_attention_is_reused(name, layers):
    """By hooks on the stock blocks' attention, of all blocks or of the first of each list."""
    tiny = PIPELINES[name]
    pipe = tiny()
    untouched = tiny.call(pipe, STEPS)
    blocks = tiny.blocks_of(pipe) if layers is None else first_blocks(tiny, pipe)
    some = SimpleNamespace(models=tiny.models, blocks_of=lambda pipe: blocks)
    with attention_reused(some, pipe, 2):
        expected = tiny.call(pipe, STEPS)
    assert not close(expected, untouched)
    ratio = {"single_mlp": 1.0} if name in SINGLE else {"mlp": 1.0}
    chosen = config(
        name,
        interval=2,
        fresh_ratio=1.0,
        module_ratio=ratio,
        modules=attentions(name),
        layers=layers,
    )
    with toca.enabled(pipe, chosen):
        assert close(tiny.call(pipe, STEPS), expected)


@pytest.mark.parametrize("name", ["flux", "hunyuan_video"])
def test_streams_that_go_together(name):
    pipe = PIPELINES[name]()
    for modules in (("attn",), ("img_attn",), ("single_mlp",)):
        with pytest.raises(ValueError, match="to be cached in the same layers, as they are comp"):
            toca.enable(pipe, config(name, modules=modules))
    with pytest.raises(ValueError, match="modules: expected some of the modules"):
        toca.enable(pipe, config(name, modules=("cross_attn",)))
    with pytest.raises(ValueError, match=r"layers: expected numbers from -3 to 2"):
        toca.enable(pipe, config(name, layers=(3,)))


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_dtype": "int8"},
        {"forecast": 2},
        {"selector": "similarity"},
        {"selector": "norm", "share_cfg_selection": True},
        {"residual_threshold": 0.3},
    ],
)
@pytest.mark.parametrize("name", ["wan", "sd3", "flux"])
def test_with_other_settings(name, settings):
    tiny = PIPELINES[name]
    pipe = tiny()
    for part in parts(name):
        given = {"interval": 2} | settings
        with toca.enabled(pipe, config(name, **part, **given)) as session:
            first = tiny.call(pipe, STEPS)
            assert torch.isfinite(first).all()
            assert torch.equal(tiny.call(pipe, STEPS), first)
            summary = session.summary()
            assert summary.cache_bytes > 0
            assert (summary.cache_error > 0) == ("cache_dtype" in settings)


# --- DiT, and the models' own repositories -------------------------------------------------------


class PartlyReused:
    """A DiT whose modules of some layers return, in cached steps, what they returned before."""

    def __init__(self, model, names, layers, full):
        self.step, self.full = -1, full
        blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
        first = blocks[0].register_forward_pre_hook(self.count)
        self.handles = [first]
        for layer in layers:
            for name in names:
                module = getattr(blocks[layer], name)
                self.handles.append(module.register_forward_hook(self.hook()))

    def count(self, *_):
        self.step += 1

    def hook(self):
        kept = []

        def hook(module, args, out):
            if self.step in self.full:
                kept[:] = [out]
            return kept[0]

        return hook

    def remove(self):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("settings", "names", "layers"),
    [
        ({"modules": ("attn",)}, ("attn",), (0, 1, 2)),
        ({"modules": ("mlp",)}, ("mlp",), (0, 1, 2)),
        ({"layers": (1,)}, ("attn", "mlp"), (1,)),
        ({"layers": {"attn": (0,), "mlp": (-1,)}}, None, None),
    ],
)
@pytest.mark.parametrize("full_steps", ["exact", "fused"])
def test_dit_reuses_what_is_cached(source, settings, names, layers, full_steps):
    model = tiny_model(source)
    untouched = sample(model, STEPS)
    given = {"facebook": ("attn", "mlp"), "diffusers": ("attn1", "ff")}[source]
    own = dict(zip(("attn", "mlp"), given, strict=True))
    by_module = [(("attn",), (0,)), (("mlp",), (2,))]
    pairs = by_module if names is None else [(names, layers)]
    hooks = [
        PartlyReused(model, [own[one] for one in some], where, (0, 3)) for some, where in pairs
    ]
    expected = sample(model, STEPS)
    for one in hooks:
        one.remove()
    assert not close(expected, untouched)
    chosen = DIT.replace(fresh_ratio=0.0, full_steps=full_steps, **settings)
    with toca.enabled(model, chosen, timesteps=timesteps(STEPS)) as session:
        have = sample(model, STEPS)
        assert close(have, expected)
        assert torch.equal(sample(model, STEPS), have)
        done = next(iter(session._run.branches.values())).done
        plan = chosen.plan(
            num_steps=STEPS, num_layers={"attn": 3, "mlp": 3}, num_tokens={"attn": 64, "mlp": 64}
        )
        assert done.plan() == plan
        told = chosen.memory(model, batch=4, tokens=64, num_steps=STEPS)
        summary = session.summary()
        assert (told.cache_bytes, told.modulation_bytes, told.packed_bytes) == (
            summary.cache_bytes,
            summary.modulation_bytes,
            summary.packed_bytes,
        )
    assert torch.equal(sample(model, STEPS), untouched)


def test_dit_selects_by_the_attention_of_the_step_itself():
    """Of an attention that runs in every step: the tokens it attends to now, not long ago."""
    model = tiny_dit()
    chosen = DIT.replace(interval=6, modules=("mlp",), age_weight=0.0)
    with toca.enabled(model, chosen, num_steps=STEPS) as session:
        session.record_selections = True
        sample(model, STEPS)
        chosen_tokens = [one for one in session.selections if one is not None]
    assert len(chosen_tokens) == STEPS - 1
    k = int(np.float32(0.3) * 64)
    assert all((one.sum(dim=2) == k).all() for one in chosen_tokens)
    assert any((one != chosen_tokens[0]).any() for one in chosen_tokens[1:])


@pytest.mark.parametrize("settings", [{"self_attention": "partial"}, {}])
def test_dit_with_partial_attention(settings):
    model = tiny_dit()
    ratio = {"attn": 0.5, "mlp": 1.0}
    for part in ({"modules": ("attn",)}, {"layers": (1, 2)}, {"layers": {"attn": (1,)}}):
        given = settings | part | ({"module_ratio": ratio} if settings else {})
        with toca.enabled(model, DIT.replace(**given), num_steps=STEPS):
            first = sample(model, STEPS)
            assert torch.equal(sample(model, STEPS), first)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_structures(name):
    model, run = published(name)
    untouched = run(model, STEPS)
    together = name == "flux"  # attends in the block's own forward
    settings = [{"layers": (0,)}, {"layers": (-1,)}]
    if together:
        settings.append({"modules": ("single_attn", "single_mlp")})
        with pytest.raises(ValueError, match="to be cached in the same layers"):
            toca.enable(model, toca.ToCaConfig(modules=("attn",)), num_steps=STEPS)
    else:
        settings += [{"modules": ("attn",)}, {"modules": ("mlp",)}, {"modules": ("cross_attn",)}]
    for part in settings:
        given = {"fresh_ratio": 0.3, "selector": PUBLISHED[name], **part}
        with toca.enabled(model, toca.ToCaConfig(interval=1, **given), num_steps=STEPS):
            assert torch.equal(run(model, STEPS), untouched)
        chosen = toca.ToCaConfig(interval=3, **given)
        with toca.enabled(model, chosen, num_steps=STEPS) as session:
            first = run(model, STEPS)
            assert torch.equal(run(model, STEPS), first)
            assert session.summary().flops_ratio > 1
        assert not close(first, untouched, 1e-6)
        assert torch.equal(run(model, STEPS), untouched)
