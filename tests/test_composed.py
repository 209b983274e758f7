"""A cached step composed from the ops does what the block's own forward does through taps."""

import importlib

import pytest
import torch

import toca_kernels as toca
from pipelines import PIPELINES
from toca_kernels.blocks.block import Block

STEPS = 6
STOCK = ("dit", "wan", "flux", "sd3", "hunyuan_video", "qwenimage")
OWN = ("pixart", "stdit", "stdit3")  # the structure of the models' own repositories

SOME = {"mlp": 1.0, "cross_attn": 0.5, "single_mlp": 1.0}
SETTINGS = {
    "some rows": {"fresh_ratio": 0.3, "module_ratio": SOME},
    "MLP rows only": {"fresh_ratio": 0.3, "module_ratio": {"mlp": 1.0}},
    "no rows": {"fresh_ratio": 0.0},
    "no rows, int8": {"fresh_ratio": 0.0, "cache_dtype": "int8"},
    "forecast": {"fresh_ratio": 0.3, "module_ratio": SOME, "forecast": 1, "interval": 2},
}
PERIODS = {"temporal_attn": 2, "cross_attn": 4}  # cached steps with some modules full


def drawn(name, settings):
    """(samples, selections of each module, whether all blocks composed their last step)."""
    if name in STOCK:
        tiny = PIPELINES[name]
        model = tiny()

        def draw():
            return tiny.call(model, STEPS)
    else:
        module = importlib.import_module(f"published.{name}")
        model = module.tiny()

        def draw():
            return module.sample(model, STEPS)

    config = toca.ToCaConfig(**({"interval": 3, "selector": "random"} | settings))
    with toca.enabled(model, config, num_steps=STEPS) as session:
        session.record_selections = True
        out = draw()
        blocks = session._blocks
        composed = [block.composed for block in blocks if type(block) is not Block]
        names = sorted({name for block in blocks for name in block.modules})
        chosen = {
            name: session.selections_of(name)
            for name in names
            if name.endswith(("mlp", "cross_attn"))
        }
    return out, chosen, composed


def alike(name, settings, monkeypatch):
    out, chosen, composed = drawn(name, settings)
    assert composed
    for kind in (kind for kind in subclasses(Block) if "composes" in vars(kind)):
        monkeypatch.setattr(kind, "composes", Block.composes)
    through_taps, also_chosen, never = drawn(name, settings)
    assert not any(never)
    assert chosen.keys() == also_chosen.keys()
    for module, steps in chosen.items():
        for one, other in zip(steps, also_chosen[module], strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    # In 8 bits, a rounding may fall to the other side.
    tolerance = 2e-4 if "cache_dtype" in settings else 2e-5
    assert (out - through_taps).norm() < tolerance * through_taps.norm()
    return composed


def subclasses(kind):
    for one in kind.__subclasses__():
        yield one
        yield from subclasses(one)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", STOCK + OWN)
def test_composed_as_through_taps(name, settings, monkeypatch):
    assert all(alike(name, SETTINGS[settings], monkeypatch))


@pytest.mark.parametrize("cache", [{}, {"cache_dtype": "int8"}, {"forecast": 1}])
def test_periods_of_spatial_and_temporal_attention(cache, monkeypatch):
    """Steps in which one of them is full run through taps, and read what steps from ops left."""
    alike(
        "stdit",
        {"fresh_ratio": 0.0, "interval": 4, "module_interval": PERIODS} | cache,
        monkeypatch,
    )


def test_given_frames_go_through_taps():
    from published import stdit3

    model = stdit3.tiny()
    strength = torch.tensor([[0.0, 1.0, 0.5]])
    config = toca.ToCaConfig(interval=3, fresh_ratio=0.3, selector="random")
    with toca.enabled(model, config, num_steps=STEPS) as session:
        stdit3.sample(model, STEPS, samples=1, strength=strength)
        assert not any(block.composed for block in session._blocks)
