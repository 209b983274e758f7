"""What `ToCaConfig.memory` tells before a run, against what the run then held."""

import importlib

import pytest
import torch

import toca_kernels as toca
from models import diffusers, sample, timesteps, tiny_dit
from offloading import offloaded
from pipelines import PIPELINES
from toca_kernels.room import readable

STEPS = 6
CROSS = {"pixart_alpha", "pixart_sigma", "wan", "wan22", "wan22_ti2v", "ltx", "allegro"}
SETTINGS = {
    "plain": {"module_ratio": {"mlp": 1.0, "cross_attn": 0.5}},
    "int8": {"cache_dtype": "int8", "share_cfg_selection": True, "prepack": False},
    "forecast": {"forecast": 2, "selector": "random"},
}


def config(name, settings):
    selector = "entropy" if name in CROSS else "random" if name == "mochi" else "attention"
    interval = 2 if name == "wan22" else 3  # two models share the steps
    given = {"interval": interval, "fresh_ratio": 0.3, "selector": selector}
    return toca.ToCaConfig(**(given | SETTINGS[settings]))


def check(estimates, summary):
    """Caches and tables to the byte; scores, ages and selections to 2 %."""
    assert sum(one.cache_bytes for one in estimates) == summary.cache_bytes > 0
    assert sum(one.modulation_bytes for one in estimates) == summary.modulation_bytes
    assert sum(one.packed_bytes for one in estimates) == summary.packed_bytes
    assert sum(one.other_bytes for one in estimates) == pytest.approx(summary.other_bytes, rel=0.02)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", PIPELINES)
def test_of_every_stock_pipeline(name, settings):
    tiny = PIPELINES[name]
    pipe = tiny()
    chosen = config(name, settings)
    arguments = {
        "batch": len(tiny.calls[0]) * (2 if name == "dit" else 1),
        "tokens": tiny.grid,
        "text_tokens": tiny.text,
        "branches": len(tiny.calls),
        "num_steps": STEPS,
    }
    told = [chosen.memory(model, **arguments) for model in tiny.models(pipe)]
    with torch.device("meta"):
        unbuilt = getattr(diffusers(), tiny.model)(**tiny.settings)
    assert chosen.memory(unbuilt, device="cpu", **arguments) == told[0]
    with toca.enabled(pipe, chosen) as session:
        tiny.call(pipe, STEPS)
        check(told, session.summary())


APART = ("dit", "wan", "flux", "hunyuan_video", "latte", "wan22")


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", APART)
def test_caches_in_host_memory(name, settings):
    """Working buffers to the byte; of the host's memory, laid out in another order where it is made
    step by step, at most a tenth and a piece more than the caches."""
    tiny = PIPELINES[name]
    pipe = tiny()
    chosen = config(name, settings).replace(cache_device="cpu")
    arguments = {
        "batch": len(tiny.calls[0]) * (2 if name == "dit" else 1),
        "tokens": tiny.grid,
        "text_tokens": tiny.text,
        "branches": len(tiny.calls),
        "num_steps": STEPS,
        "device": "cuda",
    }
    told = [chosen.memory(model, **arguments) for model in tiny.models(pipe)]
    with offloaded(pipe, chosen) as session:
        tiny.call(pipe, STEPS)
        first = session.summary()
        tiny.call(pipe, STEPS)
        second = session.summary()
    caches = sum(one.cache_bytes for one in told)
    assert first.cache_bytes == second.cache_bytes == caches
    working = sum(one.working_bytes for one in told)
    assert first.working_bytes == second.working_bytes == working
    assert second.host_bytes == sum(one.host_bytes for one in told) >= caches
    assert first.host_bytes >= caches
    assert all(
        one.total == one.working_bytes + one.other_bytes + one.modulation_bytes for one in told
    )
    said = str(told[0])
    assert "pinned on the host" in said
    assert f"{'total on the device':46} {readable(told[0].total):>11}" in said
    at_hand = chosen.memory(tiny.models(pipe)[0], **(arguments | {"device": "cpu"}))
    assert (at_hand.host_bytes, at_hand.working_bytes) == (0, 0)


PUBLISHED = {
    "pixart": {"batch": 4, "tokens": (8, 8), "text_tokens": 5.5},
    "stdit": {"batch": 4, "tokens": (3, 4, 4), "text_tokens": 5.5},
    "stdit3": {"batch": 4, "tokens": (3, 4, 4), "text_tokens": 5.5},
    "flux": {"batch": 1, "tokens": 64, "text_tokens": 8},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_of_published_structures(name, settings):
    module = importlib.import_module(f"published.{name}")
    model = module.tiny()
    chosen = config(name, settings)
    if settings != "forecast" and name != "flux":
        chosen = chosen.replace(selector="entropy")
    told = chosen.memory(model, num_steps=STEPS, **PUBLISHED[name])
    with toca.enabled(model, chosen, num_steps=STEPS) as session:
        module.sample(model, STEPS)
        check([told], session.summary())


@pytest.mark.parametrize(
    "settings",
    [
        {"self_attention": "partial", "module_ratio": {"attn": 0.5, "mlp": 1.0}},
        {"residual_threshold": 1e6},
        {"full_steps": "fused", "round_k_to": 8},
        {"fresh_ratio": 0.0},
        {"step_slope": -0.5, "layer_slope": 0.5},
    ],
)
def test_of_settings(settings):
    model = tiny_dit()
    chosen = toca.ToCaConfig(**({"interval": 3, "fresh_ratio": 0.3} | settings))
    told = chosen.memory(model, batch=4, tokens=64, num_steps=STEPS)
    with toca.enabled(model, chosen, timesteps=timesteps(STEPS)) as session:
        sample(model, STEPS)
        check([told], session.summary())


def test_in_words():
    """Two branches hold twice as much, and weights are packed once; on meta they are not."""
    model = tiny_dit()
    one = toca.ToCaConfig().memory(model, batch=2, tokens=(8, 8))
    two = toca.ToCaConfig().memory(model, batch=2, tokens=(8, 8), branches=2)
    assert (two.cache_bytes, two.packed_bytes) == (2 * one.cache_bytes, one.packed_bytes)
    assert two.total == sum(
        (two.cache_bytes, two.other_bytes, two.modulation_bytes, two.packed_bytes)
    )
    said = str(two)
    assert "attn" in said
    assert "2 branches" in said
    assert f"{two.total / 2**20:.2f} MiB" in said
    assert toca.ToCaConfig().memory(model, batch=2, tokens=64, device="cuda").packed_bytes == 0
    bfloat16 = toca.ToCaConfig().memory(model, batch=2, tokens=64, dtype=torch.bfloat16)
    assert 2 * bfloat16.cache_bytes == one.cache_bytes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch": 0}, "batch: expected an integer >= 1"),
        ({"tokens": 0}, "tokens: expected an integer >= 1"),
        ({"tokens": "64"}, "tokens: expected their number, or"),
        ({"text_tokens": -1}, "text_tokens: expected a number >= 0, got -1"),
        ({"branches": 0}, "branches: expected an integer >= 1"),
        ({"num_steps": 0}, "num_steps: expected an integer >= 1"),
    ],
)
def test_refused(arguments, said):
    given = {"batch": 1, "tokens": 64} | arguments
    with pytest.raises(ValueError, match=said):
        toca.ToCaConfig().memory(tiny_dit(), **given)


def test_frames_must_be_told_where_they_matter():
    model = importlib.import_module("published.stdit3").tiny()
    chosen = toca.ToCaConfig.preset("opensora-rflow30")
    with pytest.raises(ValueError, match=r"expected \(frames, rows, columns\)"):
        chosen.memory(model, batch=1, tokens=48, text_tokens=10)
    with pytest.raises(ValueError, match="model: expected one of the supported families"):
        chosen.memory(torch.nn.Linear(2, 2), batch=1, tokens=48)
