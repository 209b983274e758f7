"""Requests that share batches: which rows go together, what is copied, errors, refusals."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import toca_kernels as toca
from models import NULL, blocks_of, call_model, tiny_dit, tiny_model
from pipelines import PIPELINES
from toca_kernels.joined import Joined
from toca_kernels.track import tensors

SETTINGS = toca.ToCaConfig(interval=3, fresh_ratio=0.3)
SIZE = (4, 16, 16)


@pytest.fixture
def model():
    return tiny_model("facebook")


def rows_of_forwards(model):
    """How many rows each call of the model's blocks has."""
    seen = []
    blocks_of(model)[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def step(model, session, requests, t=500.0, **changes):
    """One step of these requests, a row each."""
    B = len(requests)
    generator = torch.Generator().manual_seed(0)
    x = changes.get("x", torch.randn(B, *SIZE, generator=generator))
    times = changes.get("times", torch.full((len(x),), t))
    with session.batch(requests):
        return call_model(model, x, times, torch.full((len(x),), NULL))


def held(request):
    """Every tensor of features that a request holds."""
    (branch,) = request._run.branches.values()
    return [
        one
        for track in branch.cache.tracks.values()
        for features in track.features
        for one in tensors(features)
    ]


def test_rows_that_do_the_same_go_together(model):
    seen = rows_of_forwards(model)
    with toca.enabled(model, SETTINGS, num_steps=9) as session:
        a, b, c, d = (session.request() for _ in range(4))
        step(model, session, [a])  # the first one shows what outputs look like
        seen.clear()
        step(model, session, [a, b, c])  # a is cached, b and c are full
        assert sorted(seen) == [1, 2]
        seen.clear()
        step(model, session, [b, a, c])  # all cached, k alike
        assert seen == [3]
        seen.clear()
        step(model, session, [d, a, b, c])  # a and d full, b and c cached
        assert seen == [2, 2]
        assert [one.position for one in (a, b, c, d)] == [4, 3, 3, 1]


def test_rows_that_stay_together_are_not_copied(model, monkeypatch):
    copies = []
    buffer = Joined.copied
    monkeypatch.setattr(Joined, "copied", lambda *args: copies.append(1) or buffer(*args))
    with toca.enabled(model, SETTINGS, num_steps=20) as session:
        a, b = session.request(), session.request()
        step(model, session, [a])
        a.close()
        for _ in range(10):  # from the first step on they are in lockstep
            step(model, session, [a, b])
        assert not copies
        assert all(
            one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
            for one, other in zip(held(a), held(b), strict=True)
        )
        c = session.request()
        for _ in range(6):
            step(model, session, [a, b, c])
        assert copies
        # Whoever is left holds no memory of those who went, from its next full step on.
        a.close()
        for _ in range(3):
            step(model, session, [b])
        assert all(one.untyped_storage().nbytes() == one.nbytes for one in held(b))


def test_requests_leave_the_usual_run_alone(model):
    labels, times = torch.full((2,), NULL), torch.full((2,), 1.0)
    x = torch.randn(2, *SIZE)

    def usual(session, between):
        out = []
        for n in range(6):
            out.append(call_model(model, x, times * (9 - n), labels))
            between(session)
        return torch.stack(out)

    with toca.enabled(model, SETTINGS, num_steps=6) as session:
        want = usual(session, lambda session: None)
    with toca.enabled(model, SETTINGS, num_steps=6) as session:
        requests = [session.request() for _ in range(2)]
        assert torch.equal(usual(session, lambda session: step(model, session, requests)), want)
        assert session.summary().steps == 6
        assert all(one.finished for one in requests)


def test_caches_are_freed_with_the_last_step_and_by_close(model):
    with toca.enabled(model, SETTINGS, num_steps=2) as session:
        a, b = session.request(), session.request()
        step(model, session, [a, b])
        step(model, session, [a])
        assert a.finished
        assert next(iter(a._run.branches.values())).cache is None
        assert a.summary().steps == 2
        b.close()
        assert not b._run.branches
        with pytest.raises(RuntimeError, match="no step has been run"):
            b.summary()


@pytest.mark.parametrize("at", [0, 1])
def test_after_an_error_no_request_has_taken_the_step(model, at):
    with toca.enabled(model, SETTINGS, num_steps=8) as session:
        a, b, c = (session.request() for _ in range(3))
        step(model, session, [a])
        for _ in range(2):
            step(model, session, [a, b])
        positions = [one.position for one in (a, b, c)]
        calls = []

        def fail(module, args):
            calls.append(1)
            if len(calls) == at + 1:
                raise KeyboardInterrupt

        handle = blocks_of(model)[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            step(model, session, [a, b, c])
        handle.remove()
        assert [one.position for one in (a, b, c)] == positions
        assert all(block.state is None for block in session._blocks)
        out = step(model, session, [a, b, c])  # nothing that was left half-written is read
        assert torch.isfinite(out).all()
        assert [one.position for one in (a, b, c)] == [one + 1 for one in positions]
    plain = call_model(
        model,
        torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(0)),
        torch.full((3,), 500.0),
        torch.full((3,), NULL),
    )
    assert torch.allclose(out, plain, atol=1e-5)  # all of them took a full step


def test_a_disabled_model_is_as_before(model):
    x, t, y = torch.randn(2, *SIZE), torch.full((2,), 5.0), torch.full((2,), NULL)
    before = call_model(model, x, t, y)
    with toca.enabled(model, SETTINGS, num_steps=4) as session:
        requests = [session.request() for _ in range(2)]
        step(model, session, requests)
    for one in requests:
        assert one.position == 1  # what was done stays to be read
        assert all(branch.cache is None for branch in one._run.branches.values())
    with pytest.raises(RuntimeError, match="whose model is enabled"):
        session.request(num_steps=3)
    with pytest.raises(RuntimeError, match="whose model is enabled"), session.batch(requests):
        pass
    assert torch.equal(call_model(model, x, t, y), before)


def test_what_does_not_fit_is_refused(model):
    with toca.enabled(model, SETTINGS) as session:
        with pytest.raises(ValueError, match="num_steps: expected the number of steps"):
            session.request()
        with pytest.raises(ValueError, match="timesteps: expected 3, got 2"):
            session.request(num_steps=3, timesteps=[2, 1])
        a, b = session.request(num_steps=1), session.request(timesteps=[9.0, 5.0, 1.0])
        assert b.num_steps == 3
        with pytest.raises(ValueError, match="rows: expected a request for each of 3 samples, got"):
            step(model, session, [a, b], x=torch.randn(3, *SIZE))
        with pytest.raises(ValueError, match="got none"):
            step(model, session, [], x=torch.randn(3, *SIZE))
        with pytest.raises(ValueError, match="expected requests of this session, got int at 0"):
            step(model, session, [3])
        with pytest.raises(ValueError, match="one timestep for the whole batch"):
            step(model, session, [b, a, b], times=torch.tensor([9.0, 5.0, 5.0]))
        with session.batch([a]), pytest.raises(ValueError, match="no other with block"):
            step(model, session, [a])
        step(model, session, [a, b])
        with pytest.raises(ValueError, match="at most 1 steps"):
            step(model, session, [a, b])
        assert (a.position, b.position) == (1, 1)
        other = tiny_dit()
        with (
            toca.enabled(other, SETTINGS, num_steps=3) as second,
            pytest.raises(ValueError, match="of this session, got 1 of another"),
        ):
            step(other, second, [second.request(), b])
    with (
        toca.enabled(model, SETTINGS.replace(step_ratio=(1.0, 0.5))) as session,
        pytest.raises(ValueError, match="step_ratio: expected 3 factors"),
    ):
        session.request(num_steps=3)


def test_a_pipeline_with_two_transformers_is_refused():
    pipe = PIPELINES["wan22"]()
    with (
        toca.enabled(pipe, SETTINGS.replace(selector="random")) as session,
        pytest.raises(ValueError, match="one transformer, got 2"),
    ):
        session.request(num_steps=3)


def test_announced_timesteps_are_tabulated(model):
    times = [900.0, 600.0, 300.0, 1.0]
    with toca.enabled(model, SETTINGS) as session:
        a, b = session.request(timesteps=times), session.request(timesteps=times)
        c = session.request(num_steps=4)
        step(model, session, [c], times=torch.tensor(times[:1]))
        for n, t in enumerate(times):
            rows = [a, b] if n == 3 else [a, b, c]
            after = [] if n == 3 else [times[n + 1]]
            step(model, session, rows, times=torch.tensor([t, t, *after]))
        assert a.summary().modulation_bytes == b.summary().modulation_bytes > 0
        assert c.summary().modulation_bytes == 0


def test_compiled_blocks(model):
    torch._dynamo.reset()
    with toca.enabled(model, SETTINGS, num_steps=6) as session:
        want = _staggered(model, session)
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend="aot_eager")
    with toca.enabled(model, SETTINGS, num_steps=6) as session:
        have = _staggered(model, session)
    torch._dynamo.reset()
    assert torch.allclose(have, want, atol=1e-5)


def _staggered(model, session):
    a, b = session.request(), session.request()
    out = [step(model, session, [a])]
    out += [step(model, session, [b, a], 500.0 - n) for n in range(5)]
    return torch.cat(out)


def test_masks_of_their_own(model):
    masks = [torch.rand(64, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    settings = SETTINGS.replace(selector="mask", age_weight=0.0)
    with toca.enabled(model, settings, num_steps=2, mask=masks[0]) as session:
        a, b = session.request(), session.request(mask=masks[1])
        for one in (a, b):
            one.record_selections = True
        for _ in range(2):
            step(model, session, [a, b])
        k = int(0.3 * 64)
        for one, mask in zip((a, b), masks, strict=True):
            chosen = one.selections[1][0, 0].nonzero().flatten()
            assert sorted(chosen.tolist()) == sorted(mask.topk(k).indices.tolist())
    with (
        toca.enabled(model, SETTINGS, num_steps=2) as session,
        pytest.raises(ValueError, match="expected a model enabled with selector='mask'"),
    ):
        session.request(mask=masks[0])


def test_another_threads_call_is_nobodys_step(model):
    with toca.enabled(model, SETTINGS, num_steps=4) as session:
        a, caught = session.request(), []

        def call():
            try:
                call_model(model, torch.randn(1, *SIZE), torch.ones(1), torch.tensor([NULL]))
            except RuntimeError as error:
                caught.append(str(error))

        with session.batch([a]):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        assert "got another's" in caught[0]
        assert a.position == 0


class Boxed(nn.Module):
    """Returns what nobody knows how to put together."""

    def __init__(self, model, box):
        super().__init__()
        self.blocks, self.t_embedder = model.blocks, model.t_embedder
        self.y_embedder, self.x_embedder = model.y_embedder, model.x_embedder
        self.model, self.box = (model,), box

    def forward(self, x, t, y):
        return self.box(type(self.model[0]).forward(self.model[0], x, t, y))


@pytest.mark.parametrize(
    "box", [lambda out: SimpleNamespace(sample=out), lambda out: (out, torch.tensor(1.0))]
)
def test_what_cannot_be_put_together_is_refused_and_no_step_taken(model, box):
    boxed = Boxed(model, box).eval()
    with toca.enabled(boxed, SETTINGS, num_steps=4) as session:
        a, b = session.request(), session.request()
        x, t, y = torch.randn(2, *SIZE), torch.ones(2), torch.tensor([NULL, NULL])
        with session.batch([a]):
            boxed(x[:1], t[:1], y[:1])
        with session.batch([a, b]), pytest.raises(ValueError, match="a row for each sample"):
            boxed(x, t, y)  # a is cached, b is full
        assert (a.position, b.position) == (1, 0)


def test_a_request_that_cannot_begin_says_so_each_time(model):
    settings = SETTINGS.replace(selector="mask")
    with toca.enabled(model, settings, num_steps=3, mask=torch.rand(64)) as session:
        for known in (False, True):
            a, b = session.request(mask=torch.rand(10)), session.request()
            for _ in range(2):
                with pytest.raises(ValueError, match=r"expected weights of \[64\] tokens, got 10"):
                    step(model, session, [b, a])
                assert (a.position, b.position) == (0, 0)
            if not known:
                step(model, session, [b])  # from now on it is known what outputs look like


def test_refused_neighbours_cost_nothing(model):
    with toca.enabled(model, SETTINGS, num_steps=6) as session:
        a, late = session.request(), session.request(num_steps=1)
        step(model, session, [a])
        step(model, session, [late])
        with pytest.raises(ValueError, match="at most 1 steps"):
            step(model, session, [a, late])
        step(model, session, [a])
        assert a.summary().full_steps == 1  # its second step is a cached one all the same


def test_memory_of_steps_and_requests_needs_no_collector(model):
    with toca.enabled(model, SETTINGS, num_steps=9) as session:
        a, b = session.request(), session.request()
        step(model, session, [a])
        gc.collect()
        gc.disable()
        try:
            made = []
            new = Joined.__init__

            def init(self, *args):
                new(self, *args)
                made.append(weakref.ref(self))

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Joined, "__init__", init)
                for _ in range(3):
                    step(model, session, [a, b])
            assert made
            assert not any(one() for one in made)
            features = weakref.ref(held(b)[0])
            assert features() is not None
            del b
            assert features() is None
        finally:
            gc.enable()
