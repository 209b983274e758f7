"""Pipelines and schedulers are followed: where a run begins, which timesteps it has, its steps.

Expected values come from a bare model that was told the number of its steps.
"""

import contextlib
import copy
import functools
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")

import diffusers
from diffusers import DiffusionPipeline

import toca_kernels as toca
import toca_kernels.diffusers
from pipelines import FROM_IMAGE, PIPELINES
from published import noise
from toca_kernels import scheduler

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own
STEPS = 6
CONFIG = toca.ToCaConfig(interval=3, fresh_ratio=0.3, step_slope=0.5, selector="random")
HOW = ("enable", "enable_cache")


def enable(how, pipe):
    return toca.enable(pipe, CONFIG) if how == "enable" else pipe.transformer.enable_cache(CONFIG)


@contextlib.contextmanager
def unwrapped():
    """As where toca_kernels.diffusers was not imported."""
    wrapped = DiffusionPipeline.progress_bar
    DiffusionPipeline.progress_bar = wrapped.__wrapped__
    yield
    DiffusionPipeline.progress_bar = wrapped


def told(pipe, num_steps, call):
    """What a pipeline returns that nobody follows."""
    with unwrapped(), toca.enabled(pipe.transformer, CONFIG, num_steps=num_steps):
        return call()


@functools.cache
def cached(name, steps=STEPS):
    pipe, tiny = PIPELINES[name](), PIPELINES[name]
    return told(pipe, steps, lambda: tiny.call(pipe, steps))


def methods(*targets):
    """What following replaces."""
    names = ("set_timesteps", "set_begin_index", "step", "progress_bar")
    return [{name: vars(one)[name] for name in names if name in vars(one)} for one in targets]


def replace_scheduler(pipe, kind=None):
    old = pipe.scheduler
    pipe.scheduler = (kind or type(old)).from_config(old.config)
    return old


# --- runs that start from an image ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how", "kind"),
    [
        ("flux", "enable", None),
        ("flux", "enable_cache", None),
        ("sd3", "enable", None),
        ("sd3", "enable", "FlowMatchHeunDiscreteScheduler"),
        ("wan", "enable", None),
        ("wan", "enable_cache", None),
    ],
)
def test_a_run_that_starts_from_an_image_is_planned_for_its_steps(name, how, kind):
    """The scheduler of order 2 is put in after enabling."""
    tiny = FROM_IMAGE[name]
    run, steps = functools.partial(tiny.call, strength=0.5), 7 if kind else 4
    bare, pipe = tiny(), tiny()
    if kind:
        replace_scheduler(bare, getattr(diffusers, kind))
    expected = told(bare, steps, lambda: run(bare, 8))
    assert not torch.equal(told(bare, 8, lambda: run(bare, 8)), expected)  # the plan tells
    session = enable(how, pipe)
    if kind:
        replace_scheduler(pipe, getattr(diffusers, kind))
    with unwrapped() if how == "enable" else contextlib.nullcontext():
        for _ in range(2):
            assert torch.equal(run(pipe, 8), expected)
            assert session.summary().steps == session._run.num_steps == steps
        assert tiny.call(pipe, 5).isfinite().all()
        assert session.summary().steps == session._run.num_steps == (9 if kind else 5)


@pytest.mark.parametrize(
    ("kind", "skipped"),
    [
        ("FlowMatchEulerDiscreteScheduler", 3),
        ("FlowMatchHeunDiscreteScheduler", 6),
        ("UniPCMultistepScheduler", 3),
    ],
)
def test_a_loop_of_fewer_steps_has_the_last_timesteps(kind, skipped):
    one = getattr(diffusers, kind)()
    one.set_timesteps(8)
    every = one.timesteps.tolist()
    assert scheduler._last_timesteps(one, 8) == every
    assert scheduler._last_timesteps(one, 5) == every[skipped:]


def test_what_a_progress_bar_is_given():
    pipe = PIPELINES["sd3"]()
    run = toca.enable(pipe, CONFIG)._run
    pipe.scheduler.set_timesteps(8)
    every = pipe.scheduler.timesteps
    for given, expected in (
        ((every[:-1],), every[:-1]),
        ((every.flip(0),), every.flip(0)),
        ((range(5),), every[3:]),
        ((None, 8), every),
        ((None, 50), every),  # of several runs
        (((t for t in every[:2]),), every),  # nothing new
        ((None, 0), every),
    ):
        pipe.progress_bar(*given)
        assert run.timesteps == expected.tolist()
        assert run.num_steps == len(expected)


# --- which scheduler -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_another_scheduler_is_followed(how):
    tiny = PIPELINES["flux"]
    pipe = tiny()
    session = enable(how, pipe)
    tiny.call(pipe, 4)
    old = replace_scheduler(pipe)
    assert torch.equal(tiny.call(pipe, STEPS), cached("flux"))
    assert session.summary().steps == STEPS
    assert methods(old) == [{}]
    new, pipe.scheduler = pipe.scheduler, old
    assert torch.equal(tiny.call(pipe, STEPS), cached("flux"))
    toca.disable(pipe)
    assert methods(pipe, old, new) == [{}, {}, {}]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deep", "pickled"]
)
@pytest.mark.parametrize("how", HOW)
def test_a_copy_of_the_scheduler_counts_for_nobody(how, copied):
    tiny = PIPELINES["wan"]
    pipe = tiny()
    run = enable(how, pipe)._run
    tiny.call(pipe, STEPS)
    other = copied(pipe.scheduler)
    other.set_timesteps(3)
    other.step(torch.ones(1), other.timesteps[0], torch.ones(1))
    assert (len(other.timesteps), len(pipe.scheduler.timesteps)) == (3, STEPS)
    assert (pipe.scheduler.step_index, other.step_index) == (STEPS, 1)
    assert (run.num_steps, run.ticks) == (STEPS, STEPS)
    pipe.scheduler = other  # from now on it counts
    assert torch.equal(tiny.call(pipe, 4), cached("wan", 4))
    assert (run.num_steps, run.ticks) == (4, 4)


@pytest.mark.parametrize("how", HOW)
def test_two_pipelines_around_one_transformer(how):
    tiny = PIPELINES["flux"]
    pipe, second = tiny(), tiny()
    second.transformer = pipe.transformer
    enable(how, pipe)
    for _ in range(2):
        assert torch.equal(tiny.call(pipe, STEPS), cached("flux"))
        assert torch.equal(tiny.call(second, 4), cached("flux", 4))
    toca.disable(pipe)
    assert methods(pipe, pipe.scheduler, second, second.scheduler) == [{}] * 4


def test_two_pipelines_around_one_transformer_without_the_wrapped_class():
    """Theirs is one scheduler, as `from_pipe` has it, or the second is refused."""
    tiny, from_image = PIPELINES["sd3"], FROM_IMAGE["sd3"]
    pipe, second = tiny(), from_image()
    run = functools.partial(from_image.call, second, 8, strength=0.5)
    second.transformer = pipe.transformer
    expected = told(second, 4, run)
    with unwrapped(), toca.enabled(pipe, CONFIG) as session:
        tiny.call(pipe, STEPS)
        with pytest.raises(ValueError, match="scheduler: expected the one that announced"):
            run()
        second.scheduler = pipe.scheduler
        assert torch.equal(run(), expected)
        assert session.summary().steps == session._run.num_steps == 4


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("order", [1, -1])
def test_two_pipelines_with_one_scheduler(how, order):
    tiny = PIPELINES["flux"]
    pipes = [tiny(), tiny()]
    shared = pipes[1].scheduler = pipes[0].scheduler
    own = shared.step

    def step(*args, **kwargs):  # somebody else's
        calls.append(args)
        return own(*args, **kwargs)

    shared.step, calls = step, []
    sessions = [enable(how, pipe) for pipe in pipes]
    assert torch.equal(tiny.call(pipes[0], STEPS), cached("flux"))
    assert torch.equal(tiny.call(pipes[1], 4), cached("flux", 4))
    assert [session.summary().steps for session in sessions] == [STEPS, 4]
    assert torch.equal(tiny.call(pipes[0], STEPS), cached("flux"))
    assert len(calls) == 2 * STEPS + 4
    left, last = pipes[::order]
    toca.disable(left)
    assert torch.equal(tiny.call(last, 4), cached("flux", 4))
    assert sessions[pipes.index(last)]._run.ticks == 4
    toca.disable(last)
    assert methods(shared, *pipes) == [{"step": step}, {}, {}]


def test_a_method_put_over_ours_stays():
    pipe, tiny = PIPELINES["flux"](), PIPELINES["flux"]
    session = toca.enable(pipe, CONFIG)
    ours = pipe.scheduler.step
    pipe.scheduler.step = theirs = lambda *args, **kwargs: ours(*args, **kwargs)
    assert torch.equal(tiny.call(pipe, STEPS), cached("flux"))
    toca.disable(pipe)
    assert methods(pipe.scheduler) == [{"step": theirs}]
    tiny.call(pipe, STEPS)
    assert session._run.ticks == STEPS  # of the first run: it has ended
    with toca.enabled(pipe, CONFIG):
        assert torch.equal(tiny.call(pipe, STEPS), cached("flux"))
    assert methods(pipe.scheduler) == [{"step": theirs}]


def test_a_session_does_not_keep_its_pipeline():
    """Its text encoders may be large."""
    pipe = PIPELINES["flux"]()
    model, followed = pipe.transformer, weakref.ref(pipe)
    toca.enable(pipe, CONFIG)
    del pipe
    gc.collect()
    assert followed() is None
    toca.disable(model)


def test_enabling_a_pipeline_leaves_its_class_alone():
    pipe = PIPELINES["flux"]()
    classes = [vars(kind) for kind in (*type(pipe).__mro__, *type(pipe.scheduler).__mro__)]
    before = [dict(names) for names in classes]
    with toca.enabled(pipe, CONFIG):
        assert [dict(names) for names in classes] == before


# --- loops of one's own --------------------------------------------------------------------------


def own_loop(pipe, *, steps=STEPS, skip=0, stop=None):
    """SD3, unguided, with the pipeline's scheduler; no progress bar."""
    one, x = pipe.scheduler, noise(1, 4, 16, 16, seed=0)
    text = PIPELINES["sd3"].prompt()
    given = {"encoder_hidden_states": text["prompt_embeds"]}
    given["pooled_projections"] = text["pooled_prompt_embeds"]
    one.set_timesteps(steps + skip)
    if skip:
        one.set_begin_index(skip)
    for t in one.timesteps[skip:][:stop]:
        out = pipe.transformer(x, timestep=t.expand(1), **given).sample
        x = one.step(out, t, x).prev_sample
    return x


@pytest.mark.parametrize("kind", [None, "FlowMatchHeunDiscreteScheduler"])
def test_loops_of_ones_own(kind):
    pipe = PIPELINES["sd3"]()
    if kind:
        replace_scheduler(pipe, getattr(diffusers, kind))
    every, last = (11, 9) if kind else (STEPS, STEPS - 2)
    expected = told(pipe, every, lambda: own_loop(pipe))
    with toca.enabled(pipe, CONFIG) as session:
        assert torch.equal(own_loop(pipe), expected)
        own_loop(pipe, stop=2)  # broken off
        assert torch.equal(own_loop(pipe), expected)
        old = replace_scheduler(pipe)
        for _ in range(2):
            assert torch.equal(own_loop(pipe), expected)
            assert session.summary().steps == session._run.num_steps == every
        assert methods(old) == [{}]
    if not kind:
        expected = told(pipe, last, lambda: own_loop(pipe, steps=last, skip=2))
        with toca.enabled(pipe, CONFIG) as session:
            assert torch.equal(own_loop(pipe, steps=last, skip=2), expected)
            replace_scheduler(pipe)
            assert torch.equal(own_loop(pipe, steps=last, skip=2), expected)
            assert session._run.num_steps == last


def test_a_scheduler_that_tells_no_timesteps():
    one = SimpleNamespace(set_timesteps=lambda steps: None)
    pipe = SimpleNamespace(transformer=PIPELINES["sd3"]().transformer, scheduler=one)
    with toca.enabled(pipe, CONFIG, num_steps=STEPS) as session:
        one.set_timesteps(3)
        assert session._run.num_steps == STEPS


def test_an_unused_scheduler_does_not_overrule_what_was_said():
    """A loop that asks no scheduler, with a pipeline that was given another one."""
    pipe = PIPELINES["sd3"]()
    expected = told(pipe, STEPS, lambda: own_loop(pipe))
    other = PIPELINES["sd3"]()
    other.transformer = pipe.transformer
    with toca.enabled(pipe, CONFIG, num_steps=STEPS):
        replace_scheduler(pipe)
        assert torch.equal(own_loop(other), expected)
