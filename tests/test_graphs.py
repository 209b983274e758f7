"""Replayed steps, on the CPU: a recorder that keeps the kernels of a call, and no Python.

What a CUDA graph keeps is emulated one dispatched operator at a time: every operator runs again on
the very tensors (the memory) that it was recorded with, and its results are copied to where the
recorded ones lie.  Whatever the session does in Python is not repeated, so a replay that depends on
it would give other numbers than an eager run.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import toca_kernels as toca
from dit import random_dit
from toca_kernels.graphs import StepGraphs
from toca_kernels.session import Session
from toca_kernels.track import tensors

STEPS = 12
TIMESTEPS = [float(t) for t in torch.linspace(990, 0, STEPS).long()]


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class KernelRecorder:
    """The recorder of a StepGraphs, for the CPU."""

    nbytes = 0

    def __init__(self) -> None:
        self.records = 0

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.records += 1
        saved = [(t, t.clone()) for t in self.kept()]  # recording must not run anything
        with _Tape() as tape:
            out = call()
        for tensor, value in saved:
            tensor.copy_(value)

        def replay() -> None:
            for func, args, kwargs, recorded in tape.calls:
                new = func(*args, **kwargs)
                leaves = map(pytree.tree_leaves, (recorded, new))
                for old, value in zip(*leaves, strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():
                        old.copy_(value)

        return replay, out

    def kept(self) -> list[Tensor]:
        """State that the model's steps change: restored, because a real record executes nothing."""
        caches = [cache for caches in self.run._kept.values() for cache in caches]
        tracks = [track for cache in caches for track in cache.tracks.values()]
        state = [t for track in tracks for one in track.features for t in tensors(one)]
        state += [
            t for track in tracks for t in (track.scores, track.score, track.age, track.distance)
        ]
        return [
            *state,
            *(t for cache in caches for t in (cache.nan, cache.off_track, cache.rounding)),
        ]


@pytest.fixture
def model():
    return random_dit("S", channels=64, num_heads=4, depth=3, input_size=8)


def with_graphs(model, config, mask=None) -> Session:
    recorder = KernelRecorder()
    session = Session(model, config, STEPS, TIMESTEPS, StepGraphs(recorder), mask)
    recorder.run = session._run
    session._install(None)
    return session


def sample(model, seed=0, labels=(1, 2, 1000, 1000), timesteps=TIMESTEPS):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 4, 8, 8, generator=generator)
    y = torch.tensor(labels)
    outputs = []
    for t in timesteps:
        out = model(x, torch.full((len(labels),), int(t)), y)
        x = x - 0.1 * out[:, :4]
        outputs.append(out)
    return torch.stack(outputs)


CONFIGS = [
    pytest.param(toca.ToCaConfig.preset("dit-ddim50"), id="dit-ddim50"),
    pytest.param(toca.ToCaConfig.preset("dit-ddim50", full_steps="fused"), id="fused"),
    pytest.param(
        toca.ToCaConfig(interval=4, fresh_ratio=0.3, tabulate_modulation=False), id="no table"
    ),
    pytest.param(toca.ToCaConfig(interval=3, fresh_ratio=0.2, selector="norm"), id="norm"),
    pytest.param(toca.ToCaConfig(fresh_ratio=0.3, forecast=1), id="forecast 1"),
    pytest.param(toca.ToCaConfig(interval=2, fresh_ratio=0.3, forecast=2), id="forecast 2"),
    pytest.param(
        toca.ToCaConfig(fresh_ratio=0.3, forecast=1, fresh_every=2, full_steps="fused"),
        id="fused forecast",
    ),
    pytest.param(toca.ToCaConfig(fresh_ratio=0.3, selector="similarity"), id="similarity"),
    pytest.param(
        toca.ToCaConfig(fresh_ratio=0.3, selector="similarity", cache_dtype="int8"),
        id="similarity in 8 bits",
    ),
    pytest.param(toca.ToCaConfig(fresh_ratio=0.3, selector="mask"), id="mask"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_replayed_runs_equal_eager_runs(model, config):
    mask = torch.rand(16) if config.selector == "mask" else None
    with toca.enabled(model, config, timesteps=TIMESTEPS, mask=mask):
        eager = [sample(model, seed) for seed in range(4)]
    session = with_graphs(model, config, mask)
    for seed, expected in enumerate(eager):
        assert torch.equal(sample(model, seed), expected)
    # By the third run every kind of step was recorded.
    before = session._graphs.replayed
    sample(model)
    assert session._graphs.replayed - before == STEPS
    assert session._graphs.fallback == ""
    toca.disable(model)


def test_a_run_with_other_labels_replays_the_same_records(model):
    config = toca.ToCaConfig.preset("dit-ddim50")
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        expected = sample(model, 7, labels=(5, 6, 1000, 1000))
    session = with_graphs(model, config)
    for _ in range(3):
        sample(model)
    records = len(session._graphs)
    assert torch.equal(sample(model, 7, labels=(5, 6, 1000, 1000)), expected)
    assert len(session._graphs) == records
    toca.disable(model)


def test_other_shapes_get_records_of_their_own(model):
    config = toca.ToCaConfig.preset("dit-ddim50")
    few, many = (1, 1000), (1, 2, 3, 1000, 1000, 1000)
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        eager = [sample(model, 0, labels) for labels in (few, many)]
    with_graphs(model, config)
    for _ in range(4):
        assert torch.equal(sample(model, 0, few), eager[0])
        assert torch.equal(sample(model, 0, many), eager[1])
    toca.disable(model)


def test_the_summary_of_a_replayed_run_counts_like_an_eager_one(model):
    config = toca.ToCaConfig.preset("dit-ddim50")
    with toca.enabled(model, config, timesteps=TIMESTEPS) as session:
        sample(model)
        eager = session.summary()
    session = with_graphs(model, config)
    for _ in range(4):
        sample(model)
    replayed = session.summary()
    for name in ("steps", "full_steps", "tokens_recomputed", "flops_done", "nan_scores"):
        assert getattr(replayed, name) == getattr(eager, name)
    assert replayed.graphs == len(session._graphs) > 0
    assert "recorded" in str(replayed)
    toca.disable(model)


def test_an_interrupted_run_does_not_poison_the_replays(model):
    config = toca.ToCaConfig.preset("dit-ddim50")
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        expected = sample(model)
    with_graphs(model, config)
    for stop in (1, 3, 5, 11):
        for _ in range(2):
            sample(model, timesteps=TIMESTEPS[:stop])
            assert torch.equal(sample(model), expected)
    toca.disable(model)


def test_random_selection_is_not_replayed(model):
    config = toca.ToCaConfig.preset("dit-ddim50", selector="random")
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        expected = sample(model)
    session = with_graphs(model, config)
    for _ in range(3):
        assert torch.equal(sample(model), expected)
    assert session._graphs.replayed == 0
    assert "random" in session.summary().graph_fallback
    toca.disable(model)


def test_gated_steps_are_not_replayed(model):
    config = toca.ToCaConfig(interval=STEPS, residual_threshold=0.5)
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        expected = sample(model)
    session = with_graphs(model, config)
    for _ in range(3):
        assert torch.equal(sample(model), expected)
    assert session._graphs.replayed == 0
    assert "residual_threshold" in session.summary().graph_fallback
    toca.disable(model)


def sample_apart(model, seed=0):
    """Guidance in calls of its own."""
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    outputs = []
    for t in TIMESTEPS:
        times = torch.full((4,), int(t))
        both = [model(x, times, torch.full((4,), label)) for label in (1, 1000)]
        x = x - 0.1 * sum(both)[:, :4]
        outputs.append(sum(both))
    return torch.stack(outputs)


def test_runs_with_and_without_halves_take_turns(model):
    """A selection that is shared between calls has other buffers than one of two halves."""
    config = toca.ToCaConfig(fresh_ratio=0.3, share_cfg_selection=True)
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        eager = [(sample(model, seed), sample_apart(model, seed)) for seed in range(4)]
    session = with_graphs(model, config)
    for seed, (halves, apart) in enumerate(eager):
        for _ in range(2):
            assert torch.equal(sample(model, seed), halves)
        assert torch.equal(sample_apart(model, seed), apart)
    assert session._graphs.replayed
    toca.disable(model)


def test_a_step_that_cannot_be_recorded_runs_eagerly_and_says_why(model):
    config = toca.ToCaConfig.preset("dit-ddim50")
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        expected = sample(model)
    session = with_graphs(model, config)

    def refuse(call):
        call()  # it got some way
        raise RuntimeError("operation not permitted when stream is capturing")

    session._graphs.recorder.record = refuse
    sample(model)
    sample(model)  # the failure forces a full step here
    assert torch.equal(sample(model), expected)
    assert "not permitted" in session.summary().graph_fallback
    toca.disable(model)


def test_rounded_k_needs_few_records(model):
    config = toca.ToCaConfig.preset("dit-ddim50")
    counts = []
    for round_k_to in (1, 8):
        session = with_graphs(model, config.replace(round_k_to=round_k_to))
        for _ in range(3):
            sample(model)
        counts.append(len(session._graphs))
        toca.disable(model)
    assert counts[1] < counts[0]


def test_an_enabled_model_is_not_copied(model):
    with (
        toca.enabled(model, toca.ToCaConfig(), num_steps=4),
        pytest.raises(ValueError, match="expected a model that is not enabled"),
    ):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_cuda_graph_needs_a_cuda_model(model):
    with pytest.raises(ValueError, match="expected a model on a CUDA device, got one on cpu"):
        toca.enable(model, toca.ToCaConfig(), num_steps=4, cuda_graph=True)
    assert "forward" not in vars(model)
