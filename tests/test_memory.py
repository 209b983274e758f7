"""What a run holds beyond the model, as torch's allocator counts it.

The profiler reports every allocation and every release of torch's CPU allocator, whoever made it:
Python, C++ bodies and oneDNN's packed weights too.
"""

import gc
import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import toca_kernels as toca
from models import NULL, SOURCES, call_model, sample, timesteps, tiny_dit, tiny_transformer
from toca_kernels import ToCaConfig

STEPS = 4  # 0 and 3 are full
C = 256
SIZES = {
    "facebook": lambda: tiny_dit(channels=C, depth=2),
    "diffusers": lambda: tiny_transformer(attention_head_dim=C // 4, num_layers=2),
}
CONFIG = ToCaConfig(interval=3, fresh_ratio=0.3, grid=2, bonus=0.6)


@pytest.fixture(params=SOURCES)
def model(request):
    return SIZES[request.param]()


def held(function):
    """Bytes that are allocated after the call and were not before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return sum(event.self_cpu_memory_usage for event in profiler.events())


def test_the_count_counts():
    kept = []
    assert held(lambda: kept.append(torch.ones(1000))) == 4000
    assert held(lambda: torch.ones(1000) + 1) == 0
    assert held(kept.clear) == -4000


def test_after_every_step_little_is_held_beside_caches_tables_and_packed_weights(model):
    """Below 5 % of the caches at C = 256; the summary tells to the byte what is held."""
    x, y = torch.randn(4, 4, 16, 16), torch.tensor([3, 7, NULL, NULL])
    known = timesteps(STEPS)
    with toca.enabled(model, CONFIG, timesteps=known) as session:
        total = 0
        for step, t in enumerate(known):

            def call(t=t):
                call_model(model, x, torch.full((4,), t), y)

            total += held(call)
            summary = session.summary()
            caches = summary.cache_bytes
            assert caches == 2 * 2 * 4 * 64 * C * 4
            if step == STEPS - 1:  # nothing will be read any more
                caches = table = 0
            else:
                table = summary.modulation_bytes
            rest = total - caches - table - summary.packed_bytes
            assert rest < 0.05 * summary.cache_bytes
            if step < STEPS - 1:
                # What the call was: four timesteps, 32 bytes; what was selected is told at its most
                assert rest <= summary.other_bytes + 64
                assert summary.other_bytes < 0.05 * summary.cache_bytes


@pytest.mark.parametrize("settings", [{}, {"full_steps": "fused"}, {"prepack": False}])
def test_runs_do_not_add_up(model, settings):
    config = CONFIG.replace(**settings)
    with toca.enabled(model, config, timesteps=timesteps(STEPS)) as session:
        sample(model, STEPS)
        packed = session.summary().packed_bytes
        assert abs(held(lambda: sample(model, STEPS))) < 100
        assert abs(held(lambda: sample(model, STEPS, labels=(1, 2)))) < 100
        broken_off = held(lambda: sample(model, 2, steps=timesteps(STEPS)[:2]))
        assert broken_off > session.summary().cache_bytes
        assert abs(broken_off + held(lambda: sample(model, STEPS))) < 100
        assert session.summary().packed_bytes == packed


def test_everything_is_given_back(model):
    """The session still reports; a copy of the weights or a cache it does not keep."""
    sessions = []

    def run():
        with toca.enabled(model, CONFIG, timesteps=timesteps(STEPS)) as session:
            sample(model, STEPS)
            sample(model, 2, steps=timesteps(STEPS)[:2])  # broken off
            sessions.append(session)

    sample(model, STEPS)
    assert abs(held(run)) < 100
    summary = sessions[0].summary()
    assert summary.steps == 2
    assert summary.cache_bytes > 0


def test_a_disabled_model_does_not_keep_its_session(model):
    session = toca.enable(model, CONFIG, num_steps=STEPS)
    sample(model, STEPS)
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is not None  # the model has it
    toca.disable(model)
    gc.collect()
    assert gone() is None
