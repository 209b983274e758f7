"""Which step a call is: runs that break off, change, come in halves or are longer than planned."""

import copy
import functools

import pytest
import torch

import toca_kernels as toca
from models import (
    NULL,
    SOURCES,
    NaiveToCa,
    assert_close,
    attention_of,
    batched_guidance,
    blocks_of,
    call_model,
    guided,
    mlp_of,
    run_pipeline,
    sample,
    separate_guidance,
    timesteps,
    tiny_dit,
    tiny_model,
    tiny_pipeline,
)
from toca_kernels import ToCaConfig
from toca_kernels import steps as finding
from toca_kernels.blocks import row_mlp

CONFIG = ToCaConfig(interval=3, fresh_ratio=0.3, grid=2, bonus=0.6)
STEPS = 5  # 0 and 3 are full


@pytest.fixture(params=SOURCES)
def model(request):
    return tiny_model(request.param)


class Trap:
    """Raises at a place in the model, in one step of a run."""

    def __init__(self):
        self.step = self.armed = None
        self.sprung = False
        self.error = KeyboardInterrupt

    def arm(self, step, error=KeyboardInterrupt):
        self.armed, self.error, self.sprung = step, error, False

    def enter(self, step, x):
        """`each_step` of a loop."""
        self.step = step

    def spring(self, *_):
        if self.armed == self.step:
            self.armed, self.sprung = None, True
            raise self.error


def between_blocks(model, trap, monkeypatch):
    blocks_of(model)[1].register_forward_pre_hook(trap.spring)


def after_the_attention(model, trap, monkeypatch):
    attention_of(blocks_of(model)[1]).register_forward_hook(trap.spring)


def before_the_mlp(model, trap, monkeypatch):
    mlp_of(blocks_of(model)[1]).register_forward_pre_hook(trap.spring)


def after_the_caches_were_written(model, trap, monkeypatch):
    own = row_mlp.partial_mlp

    @functools.wraps(own)
    def partial_mlp(*args, **kwargs):
        out = own(*args, **kwargs)
        trap.spring()
        return out

    monkeypatch.setattr(row_mlp, "partial_mlp", partial_mlp)


def after_the_last_block(model, trap, monkeypatch):
    blocks_of(model)[-1].register_forward_hook(trap.spring)


def between_steps(model, trap, monkeypatch):
    trap.enter = lambda step, x: (setattr(trap, "step", step), trap.spring())


PLACES = {  # place -> the steps that come by
    between_blocks: range(STEPS),
    after_the_attention: (0, 3),
    before_the_mlp: range(STEPS),
    after_the_caches_were_written: (1, 2, 4),
    after_the_last_block: range(STEPS),
    between_steps: range(STEPS),
}


def sample_to_the_trap(model, trap, labels=(3, 7), **kwargs):
    def each_step(step, x):
        trap.enter(step, x)

    return sample(model, STEPS, each_step=each_step, labels=labels, **kwargs)


# --- runs that break off -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "full_steps"),
    [
        *((place, "exact") for place in PLACES),
        (after_the_attention, "fused"),
        (before_the_mlp, "fused"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_run_after_one_that_broke_off_is_clean(model, place, full_steps, monkeypatch):
    """At every step; the next run has the same labels, then others."""
    trap = Trap()
    place(model, trap, monkeypatch)
    with toca.enabled(model, CONFIG.replace(full_steps=full_steps), num_steps=STEPS) as session:
        clean = {labels: sample_to_the_trap(model, trap, labels) for labels in ((3, 7), (1, 2))}
        tokens = session.summary().tokens_recomputed
        for step in range(STEPS):
            for labels, expected in clean.items():
                trap.arm(step, RuntimeError if step % 2 else KeyboardInterrupt)
                if step in PLACES[place]:
                    with pytest.raises((KeyboardInterrupt, RuntimeError)):
                        sample_to_the_trap(model, trap)
                    assert trap.sprung
                trap.arm(None)
                assert torch.equal(sample_to_the_trap(model, trap, labels), expected), step
                assert session.summary().tokens_recomputed == tokens


@pytest.mark.parametrize("known", [False, True])
def test_a_run_with_known_timesteps_after_one_that_broke_off_is_clean(model, known):
    trap = Trap()
    between_steps(model, trap, None)
    given = timesteps(STEPS) if known else None
    with toca.enabled(model, CONFIG, num_steps=STEPS, timesteps=given):
        clean = sample_to_the_trap(model, trap)
        for step in range(STEPS):
            trap.arm(step)
            with pytest.raises(KeyboardInterrupt):
                sample_to_the_trap(model, trap)
            assert torch.equal(sample_to_the_trap(model, trap), clean), step


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_a_run_after_separate_guidance_broke_off_is_clean(model, branch):
    trap = Trap()
    calls = []

    def predict(model, x, t, labels):
        out = []
        for name, y in (("cond", labels), ("uncond", torch.full_like(labels, NULL))):
            calls.append(name)
            out.append(call_model(model, x, t, y))
        return guided(*out)

    def spring(*_):
        if calls[-1] == branch:
            trap.spring()

    blocks_of(model)[1].register_forward_pre_hook(spring)
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        clean = sample_to_the_trap(model, trap, predict=predict)
        tokens = session.summary().tokens_recomputed
        for step in range(STEPS):
            trap.arm(step)
            with pytest.raises(KeyboardInterrupt):
                sample_to_the_trap(model, trap, predict=predict)
            assert torch.equal(sample_to_the_trap(model, trap, predict=predict), clean), step
            assert session.summary().tokens_recomputed == tokens


@pytest.mark.parametrize("place", [between_blocks, after_the_last_block])
def test_a_pipeline_run_after_one_that_broke_off_is_clean(place):
    pipe = tiny_pipeline()
    trap = Trap()
    place(pipe.transformer, trap, None)
    steps = iter(())
    pipe.transformer.register_forward_pre_hook(lambda *_: trap.enter(next(steps), None))
    with toca.enabled(pipe, CONFIG):
        steps = iter(range(STEPS))
        clean = run_pipeline(pipe, STEPS)
        for step in range(STEPS):
            steps = iter(range(STEPS))
            trap.arm(step)
            with pytest.raises(KeyboardInterrupt):
                run_pipeline(pipe, STEPS)
            steps = iter(range(STEPS))
            assert torch.equal(run_pipeline(pipe, STEPS), clean), step


def test_a_step_that_failed_can_be_called_again(model):
    """After running out of memory, say: the step is run in full, and the run goes on."""
    trap = Trap()
    between_blocks(model, trap, None)

    def predict(*inputs):
        try:
            return batched_guidance(*inputs)
        except KeyboardInterrupt:
            return batched_guidance(*inputs)

    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        session.record_selections = True
        clean = sample_to_the_trap(model, trap)
        trap.arm(3)  # full anyway
        assert torch.equal(sample_to_the_trap(model, trap, predict=predict), clean)
        trap.arm(4)
        latents = sample_to_the_trap(model, trap, predict=predict)
        full = [step for step, chosen in enumerate(session.selections) if chosen is None]
        assert full == [0, 3, 4]
    assert_close(latents, naive(model, torch.float64, full=4), naive(model, full=4))


def naive(model, dtype=torch.float32, full=0):
    """Latents of the naive ToCa; `full` is one step more that is full."""
    model, state = NaiveToCa.on(model, CONFIG, STEPS, dtype=dtype)
    state.full = state.full.copy()
    state.full[full] = True
    return sample(model, STEPS, dtype=dtype)


def test_a_run_over_other_timesteps_after_one_that_broke_off_is_clean(model):
    """The timestep goes back, though not to where the run began.

    After the first step alone that cannot be seen: there is no direction yet, and the lower
    timestep passes for the second step.  `session.reset()` is for that.
    """
    trap = Trap()
    between_steps(model, trap, None)
    other = [t - 5 for t in timesteps(STEPS)[:-1]] + [0]
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        clean = sample(model, STEPS, steps=other)
        for step in range(STEPS):
            trap.arm(step)
            with pytest.raises(KeyboardInterrupt):
                sample_to_the_trap(model, trap)
            if step == 1:
                session.reset()
            assert torch.equal(sample(model, STEPS, steps=other), clean), step


def test_a_first_step_that_broke_off_is_no_beginning(model):
    """The next call begins a run, at whatever timestep, and looks at the weights again."""
    trap = Trap()
    between_blocks(model, trap, None)
    other = [t - 5 for t in timesteps(STEPS)[:-1]] + [0]
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        sample_to_the_trap(model, trap)
        trap.arm(0)
        with pytest.raises(KeyboardInterrupt):
            sample_to_the_trap(model, trap)
        for parameter in mlp_of(blocks_of(model)[1]).parameters():
            parameter.data.mul_(1.5)
        latents = sample(model, STEPS, steps=other)
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        assert torch.equal(sample(model, STEPS, steps=other), latents)


def test_reset_forgets_the_run(model):
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        session.record_selections = True
        clean = sample(model, STEPS)

        def reset(step, x):
            if step == 3:
                session.reset()

        sample(model, STEPS, each_step=reset)
        assert [chosen is None for chosen in session.selections] == [True, False]
        session.reset()
        assert torch.equal(sample(model, STEPS), clean)


# --- runs that are longer or shorter than planned ------------------------------------------------


def test_one_step_too_many_is_refused_and_the_next_run_is_clean(model):
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        clean = sample(model, STEPS)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"expected a run of 5 steps, got one more"):
                sample(model, STEPS + 1)
            assert torch.equal(sample(model, STEPS), clean)


def test_a_run_that_ends_early_is_not_continued(model):
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        clean = sample(model, STEPS)
        for length in range(1, STEPS):
            sample(model, length, steps=timesteps(STEPS)[:length])
            assert torch.equal(sample(model, STEPS), clean)


def test_runs_of_one_step(model):
    expected = sample(model, 1)
    with toca.enabled(model, CONFIG, num_steps=1):
        for _ in range(3):
            assert torch.equal(sample(model, 1), expected)
            sample(model, 1, labels=(1, 2))


def test_a_pipeline_may_change_its_number_of_steps():
    pipe = tiny_pipeline()
    expected = {}
    for steps in (5, 8):
        with toca.enabled(pipe, CONFIG):
            expected[steps] = run_pipeline(pipe, steps)
    with toca.enabled(pipe, CONFIG) as session:
        for steps in (5, 8, 5):
            assert torch.equal(run_pipeline(pipe, steps), expected[steps])
            assert session.summary().steps == steps


def test_a_pipeline_run_is_announced_whatever_its_timesteps():
    """A run broke off after t = 875, the next begins at t = 800: that is no second step."""
    pipe = tiny_pipeline()
    stop = KeyboardInterrupt

    def after_the_first_step(module, inputs):
        if stop is not None and module.called:
            raise stop
        module.called = True

    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_pre_hook(after_the_first_step)
    with toca.enabled(pipe, CONFIG):
        block.called = False
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(pipe, 8)
        stop = None
        after_a_break = run_pipeline(pipe, 5)
    with toca.enabled(pipe, CONFIG):
        assert torch.equal(run_pipeline(pipe, 5), after_a_break)


# --- timesteps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("full_steps", ["exact", "fused"])
def test_announced_timesteps_that_are_not_the_ones_run(model, full_steps):
    """Then nothing is read from the table: the run is what it is without."""
    config = CONFIG.replace(full_steps=full_steps)
    with toca.enabled(model, config, num_steps=STEPS):
        expected = sample(model, STEPS)
    for given in ([t + 1 for t in timesteps(STEPS)], [5] * STEPS):
        with toca.enabled(model, config, timesteps=given) as session:
            assert torch.equal(sample(model, STEPS), expected)
            assert session.summary().modulation_bytes == 0


def test_timesteps_that_leave_the_announced_track(model):
    given = timesteps(STEPS)[:4] + [t + 1 for t in timesteps(STEPS)[4:]]
    exact, rounded = naive(model, torch.float64), naive(model)
    with toca.enabled(model, CONFIG, timesteps=given) as session:
        assert_close(sample(model, STEPS), exact, rounded)
        assert session.summary().modulation_bytes > 0  # the first cached steps were on it


@pytest.mark.parametrize("steps", [timesteps(STEPS)[::-1], [t + 0.5 for t in timesteps(STEPS)]])
def test_timesteps_may_rise_or_be_fractions(model, steps):
    clean = []
    for _ in range(2):
        with toca.enabled(model, CONFIG, num_steps=STEPS, timesteps=steps) as session:
            session.record_selections = True
            clean.append(sample(model, STEPS, steps=steps))
            assert [c is None for c in session.selections] == [s % 3 == 0 for s in range(STEPS)]
            assert torch.equal(sample(model, STEPS, steps=steps), clean[0])


def test_announced_timesteps_need_not_be_monotone(model):
    """Solvers of second order go back, or come twice to the same timestep, also the first."""
    steps = [999, 999, 700, 800, 500]
    with toca.enabled(model, CONFIG, timesteps=steps) as session:
        session.record_selections = True
        for _ in range(2):
            sample(model, STEPS, steps=steps)
            assert [c is None for c in session.selections] == [s % 3 == 0 for s in range(STEPS)]


def test_different_timesteps_in_one_batch_are_refused(model):
    x, y = torch.randn(2, 4, 16, 16), torch.tensor([1, 2])
    with (
        toca.enabled(model, CONFIG, num_steps=STEPS),
        pytest.raises(ValueError, match=r"one timestep for the whole batch, got \[3, 4\]"),
    ):
        call_model(model, x, torch.tensor([3, 4]), y)


@pytest.mark.parametrize("known", [False, True])
def test_one_timestep_and_label_may_serve_the_batch(model, known):
    def predict(model, x, t, labels):
        return call_model(model, x, t[:1], labels[:1])

    given = timesteps(STEPS) if known else None
    with toca.enabled(model, CONFIG, num_steps=STEPS, timesteps=given):
        one = sample(model, STEPS, labels=(3, 3), predict=predict)
        each = sample(model, STEPS, labels=(3, 3), predict=call_model)
    assert torch.allclose(one, each, atol=1e-4)


# --- what may change in the middle of a run ------------------------------------------------------


def switched(model, dtype, change, before, after):
    """Naive latents where step 3 (not full by the plan) begins anew with other inputs.

    Two naive runs: one to the change, one whose first step stands at the change.
    """
    inputs = before
    copied, state = None, None
    for step, t in enumerate(timesteps(STEPS)):
        if step in (0, change):
            copied, state = NaiveToCa.on(model, CONFIG, STEPS, inputs["grid"], dtype)
            state.step = step - 1
            state.full = state.full.copy()
            state.full[step] = True
        x, y = inputs["x"].to(dtype), inputs["y"]
        inputs["out"].append(call_model(copied, x, torch.full((len(y),), t), y))
        if step + 1 == change:
            inputs = after
    return before["out"] + after["out"]


def scene(size=(16, 16), labels=(3, 7)):
    grid = (size[0] // 2, size[1] // 2)
    noise = torch.randn(len(labels), 4, *size, generator=torch.Generator().manual_seed(len(labels)))
    return {"x": noise, "y": torch.tensor(labels), "grid": grid, "out": []}


@pytest.mark.parametrize(("change", "known"), [(1, False), (2, True), (4, True)])  # cached steps
@pytest.mark.parametrize(
    "after",
    [
        pytest.param({"labels": (3, 5)}, id="labels"),
        pytest.param({"labels": (3, 7, 5)}, id="larger-batch"),
        pytest.param({"labels": (3,)}, id="smaller-batch"),
        pytest.param({"size": (8, 8)}, id="smaller-image"),
    ],
)
def test_what_was_cached_for_other_inputs_is_not_read(model, change, after, known):
    """The step of the change is run in full; from there the plan goes on."""
    exact = switched(model, torch.float64, change, scene(), scene(**after))
    rounded = switched(model, torch.float32, change, scene(), scene(**after))
    before, after = scene(), scene(**after)
    given = timesteps(STEPS) if known else None
    with toca.enabled(model, CONFIG, num_steps=STEPS, timesteps=given) as session:
        for step, t in enumerate(timesteps(STEPS)):
            inputs = before if step < change else after
            x, y = inputs["x"], inputs["y"]
            out = call_model(model, x, torch.full((len(y),), t), y)
            assert_close(out, exact[step], rounded[step])
        summary = session.summary()
    # The counts of two shapes do not add up: they begin at the change.
    assert summary.steps == STEPS - change
    tokens = after["grid"][0] * after["grid"][1]
    assert summary.tokens_total == (STEPS - change) * 3 * len(after["y"]) * tokens


def test_the_dtype_may_change_between_runs(model):
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        clean = sample(model, STEPS)
        model.to(torch.bfloat16)
        low = sample(model, STEPS, dtype=torch.bfloat16)
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        assert torch.equal(sample(model, STEPS, dtype=torch.bfloat16), low)
    assert clean.dtype == torch.float32


# --- guidance in two calls -----------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
def test_separate_guidance_calls_equal_the_batched_run(model, known):
    copied, state = NaiveToCa.on(model, CONFIG, STEPS, dtype=torch.float64)
    exact, rounded = sample(copied, STEPS, dtype=torch.float64), naive(model)
    given = timesteps(STEPS) if known else None
    with toca.enabled(model, CONFIG, num_steps=STEPS, timesteps=given) as session:
        session.record_selections = True
        batched = sample(model, STEPS)
        total = session.summary()
        for _ in range(2):
            separate = sample(model, STEPS, predict=separate_guidance)
            assert_close(separate, exact, rounded)
            summary = session.summary()
            for name in ("steps", "full_steps", "tokens_recomputed", "tokens_total", "cache_bytes"):
                assert getattr(summary, name) == getattr(total, name), name
            assert (summary.flops_full, summary.flops_done) == (total.flops_full, total.flops_done)
        # What is recorded is the unconditional branch, the one that opens last.
        for chosen, both in zip(session.selections, state.selections, strict=True):
            assert (chosen is None) == (both is None)
            assert chosen is None or torch.equal(chosen, both[:, 2:])
    assert_close(batched, exact, rounded)


def test_guidance_that_ends_or_begins_in_the_middle_of_a_run(model):
    """The unconditional branch is called in some steps only: full when it begins anew."""
    full = {"cond": [], "uncond": []}

    def predict(model, x, t, labels):
        out = {}
        names = ("cond", "uncond") if t[0] < 600 else ("cond",)
        if t[0] > 900:
            names = ("cond", "uncond")
        for name in names:
            y = labels if name == "cond" else torch.full_like(labels, NULL)
            out[name] = call_model(model, x, t, y)
            branch = session._run.branches[tuple(y.tolist())]
            full[name].append((branch.position - 1, branch.done.full_steps()[-1]))
        return out["cond"]

    with toca.enabled(model, CONFIG, num_steps=7) as session:
        sample(model, 7, predict=predict)
        assert len(session._run.branches) == 2
    assert full["cond"] == [(step, step % 3 == 0) for step in range(7)]
    # t = 999, 832, 666, 500, 333, 166, 0: in steps 0 and 3 to 6
    assert full["uncond"] == [(0, True), (3, True), (4, False), (5, False), (6, True)]


def test_a_branch_that_is_gone_is_not_kept_alive(model):
    """A run broke off after its first step; the next one, with other labels, takes its place."""
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        sample(model, 1, steps=timesteps(STEPS)[:1])
        sample(model, STEPS, labels=(1, 2))
        assert len(session._run.branches) == 1
        assert session.summary().tokens_total == STEPS * 3 * 4 * 64


def test_weights_changed_after_a_broken_first_step_are_read_anew(model):
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        sample(model, 1, steps=timesteps(STEPS)[:1])
        for block in blocks_of(model):
            for parameter in mlp_of(block).parameters():
                parameter.data.mul_(1.5)
        latents = sample(model, STEPS, labels=(1, 2))
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        assert torch.equal(sample(model, STEPS, labels=(1, 2)), latents)


# --- where timesteps and labels are not read -----------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """As on a GPU, where reading them would wait for the device: calls are counted."""
    monkeypatch.setattr(finding, "read_timestep", lambda timestep: None)
    monkeypatch.setattr(
        finding, "_branch_key", lambda call: (call.labels.data_ptr(), tuple(call.labels.shape))
    )


class Labels:
    """Labels that are made once for a run, each time in another place."""

    def __init__(self):
        self.kept = []

    def new(self, *labels):
        self.kept.append(torch.tensor(labels))
        return self.kept[-1]


def test_counted_runs_equal_those_of_read_timesteps(model, request):
    labels = Labels()

    def one_run(separate):
        cond, uncond = labels.new(3, 7), labels.new(NULL, NULL)
        both = labels.new(3, 7, NULL, NULL)

        def predict(model, x, t, y):
            if separate:
                return guided(call_model(model, x, t, cond), call_model(model, x, t, uncond))
            x, t = torch.cat([x, x]), torch.cat([t, t])
            return guided(*call_model(model, x, t, both).chunk(2))

        return sample(model, STEPS, predict=predict)

    expected = {}
    for separate in (False, True):
        with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
            expected[separate] = one_run(separate), session.summary().tokens_recomputed
    request.getfixturevalue("counted")
    for separate, (latents, tokens) in expected.items():
        with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
            for _ in range(3):
                assert torch.equal(one_run(separate), latents)
                assert len(session._run.branches) == 1 + separate
                assert session.summary().tokens_recomputed == tokens


@pytest.mark.usefixtures("counted")
def test_a_counted_run_over_other_timesteps_than_announced_is_refused_at_its_end(model):
    y = torch.tensor([3, 7])
    given = [t + 1 for t in timesteps(STEPS)]

    def predict(model, x, t, _):
        return call_model(model, x, t, y)

    def stop(step, x):
        if step == 3:
            raise KeyboardInterrupt

    # A run that breaks off raises what broke it off, and the model is put back.
    with pytest.raises(KeyboardInterrupt), toca.enabled(model, CONFIG, timesteps=given):
        sample(model, STEPS, predict=predict, each_step=stop)
    assert "forward" not in vars(model)
    with toca.enabled(model, CONFIG, timesteps=given) as session:
        with pytest.raises(RuntimeError, match="the run visited others than were announced"):
            sample(model, STEPS, predict=predict)
        assert session.summary().steps == STEPS
        latents = sample(model, STEPS, predict=predict, steps=given)
    with toca.enabled(model, CONFIG, timesteps=given):
        assert torch.equal(sample(model, STEPS, predict=predict, steps=given), latents)


@pytest.mark.usefixtures("counted")
def test_a_counted_run_that_broke_off_is_forgotten_by_reset(model):
    labels = Labels()

    def one_run(steps):
        y = labels.new(3, 7)
        return sample(
            model,
            steps,
            steps=timesteps(STEPS)[:steps],
            predict=lambda model, x, t, _: call_model(model, x, t, y),
        )

    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        clean = one_run(STEPS)
        for length in range(1, STEPS):
            one_run(length)
            session.reset()
            assert torch.equal(one_run(STEPS), clean)


# --- calls that are no step ----------------------------------------------------------------------


def test_a_block_called_on_its_own_is_untouched():
    model = tiny_dit()
    x, c = torch.randn(2, 64, 32), torch.randn(2, 32)
    expected = model.blocks[1](x, c), model.blocks[1].attn(x), model.blocks[1].mlp(x)
    with toca.enabled(model, CONFIG, num_steps=STEPS):

        def call_blocks(step, latents):
            block = model.blocks[1]
            have = block(x, c), block.attn(x), block.mlp(x)
            assert all(map(torch.equal, have, expected))

        clean = sample(model, STEPS)
        assert torch.equal(sample(model, STEPS, each_step=call_blocks), clean)


def test_two_models_do_not_disturb_each_other():
    models = [tiny_dit(), tiny_dit(seed=1)]
    alone = []
    for model in models:
        with toca.enabled(model, CONFIG, num_steps=STEPS):
            alone.append(sample(model, STEPS))
    second = None

    def other(step, x):
        nonlocal second
        if step == 4:
            second = sample(models[1], STEPS)

    with (
        toca.enabled(models[0], CONFIG, num_steps=STEPS),
        toca.enabled(models[1], CONFIG, num_steps=STEPS),
    ):
        assert torch.equal(sample(models[0], STEPS, each_step=other), alone[0])
        assert torch.equal(second, alone[1])


def test_copying_the_weights_of_an_enabled_model(model):
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        sample(model, STEPS)
        weights = copy.deepcopy(model.state_dict())
    other = tiny_model("facebook" if hasattr(model, "blocks") else "diffusers")
    other.load_state_dict(weights)
    assert torch.equal(sample(other, STEPS), sample(model, STEPS))


def test_an_input_of_another_dtype_costs_a_full_step_and_no_counts(model):
    """As loops do whose scheduler returns float32 for noise in bfloat16."""
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        y = torch.tensor([3, 7])
        for step, t in enumerate(timesteps(STEPS)):
            x = torch.zeros(2, 4, 16, 16, dtype=torch.float32 if step else torch.bfloat16)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                call_model(model, x, torch.full((2,), t), y)
        summary = session.summary()
    assert summary.steps == STEPS
    assert summary.full_steps >= 2
