"""session.trace() and Trace: what was recorded, derived, saved and read back."""

from __future__ import annotations

import dataclasses
import json
import zipfile

import numpy as np
import pytest
import torch

import toca_kernels as toca
from models import SOURCES, sample, separate_guidance, tiny_dit, tiny_model
from pipelines import PIPELINES
from toca_kernels.trace import Trace

CONFIG = toca.ToCaConfig(interval=3, fresh_ratio=0.3, grid=2, bonus=0.6)
STEPS = 8


def traced(model, config=CONFIG, **kwargs):
    """(trace, session) of a run of STEPS steps."""
    with toca.enabled(model, config, num_steps=STEPS) as session:
        with session.trace() as recorder:
            sample(model, STEPS, **kwargs)
        return recorder.trace, session


def of_pipeline(name, config=None, **settings):
    tiny = PIPELINES[name]
    pipe = tiny()
    config = config or toca.ToCaConfig(
        interval=3,
        fresh_ratio=0.3,
        selector="random",
        module_ratio={"mlp": 1.0, "cross_attn": 0.5},
        **settings,
    )
    with toca.enabled(pipe, config) as session:
        with session.trace() as recorder:
            tiny.call(pipe, STEPS)
        return recorder.trace, session.summary()


def assert_equal(one: Trace, other: Trace) -> None:
    for field in dataclasses.fields(Trace):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name == "parts":
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                assert (a.model, a.branch, a.first) == (b.model, b.branch, b.first)
                assert a.plan == b.plan
                assert (a.batch, a.grids, a.full_flops) == (b.batch, b.grids, b.full_flops)
                np.testing.assert_array_equal(a.flops, b.flops)
                assert a.selections.keys() == b.selections.keys()
                for name in a.selections:
                    np.testing.assert_array_equal(a.selections[name], b.selections[name])
        elif field.name == "samples":
            assert ours.keys() == theirs.keys()
            for step in ours:
                np.testing.assert_array_equal(ours[step], theirs[step])
        elif isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs, field.name


# --- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_a_trace_is_what_the_session_says(source):
    trace, session = traced(tiny_model(source))
    summary = session.summary()
    (part,) = trace.parts
    assert (part.model, part.branch, part.first, trace.num_steps) == ("transformer", 0, 0, STEPS)
    assert part.plan == CONFIG.plan(
        num_steps=STEPS, num_layers=3, num_tokens=64, modules=("attn", "mlp")
    )
    assert part.grids == {"mlp": (8, 8)}
    assert part.batch == {"attn": 4, "mlp": 4}
    for step, chosen in enumerate(session.selections):
        ours = torch.from_numpy(part.fresh("mlp")[step])
        assert torch.equal(ours, torch.ones(3, 4, 64).bool() if chosen is None else chosen)
    assert (part.fresh("mlp").sum(axis=3) == part.plan.k["mlp"][:, :, None]).all()
    assert trace.full_steps.tolist() == [step % 3 == 0 for step in range(STEPS)]
    assert int(trace.flops.sum()) == summary.flops_done
    assert int(trace.full_flops.sum()) == summary.flops_full
    assert trace.flops_ratio == pytest.approx(summary.flops_ratio)
    assert trace.seconds.sum() == pytest.approx(summary.seconds)
    assert (trace.seconds > 0).all()
    assert trace.memory["cache_bytes"] == summary.cache_bytes > 0
    assert trace.config == CONFIG


def test_a_module_that_is_reused_whole_is_fresh_in_full_steps_only():
    trace, _ = traced(tiny_dit())
    (part,) = trace.parts
    fresh = part.fresh("attn")
    assert "attn" not in part.selections
    assert fresh.shape == (STEPS, 3, 4, 64)
    assert [one.all() for one in fresh] == [step % 3 == 0 for step in range(STEPS)]
    assert [one.any() for one in fresh] == [step % 3 == 0 for step in range(STEPS)]
    with pytest.raises(ValueError, match=r"expected one of .*'mlp'.*, got 'cross_attn'"):
        part.fresh("cross_attn")


def test_separate_guidance_gives_two_parts():
    trace, session = traced(tiny_dit(), predict=separate_guidance)
    assert [(part.model, part.branch) for part in trace.parts] == [
        ("transformer", 0),
        ("transformer", 1),
    ]
    assert [part.batch["mlp"] for part in trace.parts] == [2, 2]
    summary = session.summary()
    assert int(trace.flops.sum()) == summary.flops_done
    assert trace.seconds.sum() == pytest.approx(summary.seconds)
    one, two = (part.fresh("mlp") for part in trace.parts)
    assert (one != two).any()
    assert np.array_equal(two[1], session.selections[1].numpy())


def test_two_models_follow_each_other():
    trace, summary = of_pipeline("wan22")
    models = [(part.model, part.first, part.plan.num_steps) for part in trace.parts]
    switch = models[0][2]
    assert 0 < switch < STEPS
    assert (
        models == [("transformer", 0, switch)] * 2 + [("transformer_2", switch, STEPS - switch)] * 2
    )
    assert trace.num_steps == STEPS
    assert int(trace.flops.sum()) == summary.flops_done
    assert int(trace.full_flops.sum()) == summary.flops_full
    assert trace.seconds.sum() == pytest.approx(summary.seconds)
    assert (trace.seconds > 0).all()
    assert trace.full_steps.sum() == summary.full_steps
    assert trace.parts[0].grids["mlp"] == (3, 4, 4)


@pytest.mark.parametrize("name", ["flux", "pixart_alpha", "qwenimage", "hunyuan_video"])
def test_every_selection_has_k_tokens(name):
    trace, summary = of_pipeline(name)
    assert int(trace.flops.sum()) == summary.flops_done
    for part in trace.parts:
        for module, chosen in part.selections.items():
            k = part.plan.k[module]
            assert (chosen.sum(axis=3) == k[:, :, None]).all(), module
            assert (k > 0).all()


def test_without_cached_steps_everything_is_fresh():
    trace, _ = traced(tiny_dit(), toca.ToCaConfig(interval=1))
    (part,) = trace.parts
    assert part.selections == {}
    assert part.fresh("mlp").all()
    assert trace.flops_ratio == 1.0
    assert part.age_histogram("mlp").tolist() == [[3 * 4 * 64]] * STEPS


def test_where_no_token_is_recomputed():
    trace, _ = traced(tiny_dit(), toca.ToCaConfig(interval=4, fresh_ratio=0.0))
    (part,) = trace.parts
    ages = part.ages("mlp")
    for step in range(STEPS):
        assert (ages[step] == step % 4).all()
    assert part.age_histogram("mlp")[6].tolist() == [0, 0, 3 * 4 * 64, 0]


# --- ages ----------------------------------------------------------------------------------------


def test_ages_are_those_that_the_selection_saw():
    model, seen = tiny_dit(), {}
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:

        def look(step, x):
            if step:
                (branch,) = session._run.branches.values()
                seen[step - 1] = branch.cache.tracks["mlp"].age.clone().numpy()

        with session.trace() as recorder:
            sample(model, STEPS, each_step=look)
    ages = recorder.trace.parts[0].ages("mlp")
    assert len(seen) == STEPS - 1
    for step, expected in seen.items():
        np.testing.assert_array_equal(ages[step], expected)
    assert ages.max() == 2


def test_the_histogram_counts_the_ages():
    part = traced(tiny_dit())[0].parts[0]
    ages, table = part.ages("mlp"), part.age_histogram("mlp")
    assert (table.sum(axis=1) == 3 * 4 * 64).all()
    for age in range(table.shape[1]):
        assert table[:, age].tolist() == (ages == age).sum(axis=(1, 2, 3)).tolist()


# --- the with block ------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
def test_the_session_records_as_before_when_the_block_ends(before):
    model = tiny_dit()
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        session.record_selections = before
        with session.trace() as recorder:
            assert session.record_selections
            sample(model, STEPS)
        assert session.record_selections is before
        assert len(session.selections) == STEPS
        sample(model, STEPS)
        assert len(session.selections) == STEPS * before
        assert recorder.trace.num_steps == STEPS
        with pytest.raises(KeyError), session.trace() as recorder:
            raise KeyError
        assert session.record_selections is before
        with pytest.raises(RuntimeError, match="that has ended and that ran a step"):
            _ = recorder.trace


def test_a_trace_is_of_the_last_run_and_stays():
    model = tiny_dit()
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        with session.trace() as recorder:
            with pytest.raises(RuntimeError, match="that has ended"):
                _ = recorder.trace
            sample(model, STEPS, labels=(1, 2, 3))
            sample(model, STEPS)
        kept = recorder.trace.parts[0].fresh("mlp").copy()
        sample(model, STEPS, labels=(5, 6))
        assert recorder.trace.parts[0].batch["mlp"] == 4
        np.testing.assert_array_equal(recorder.trace.parts[0].fresh("mlp"), kept)


def test_a_block_without_a_step_has_no_trace():
    model = tiny_dit()
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        session.record_selections = True
        sample(model, STEPS)
        with session.trace() as recorder:
            pass
        with pytest.raises(RuntimeError, match="that ran a step"):
            _ = recorder.trace


def test_a_run_that_began_before_the_block_is_refused():
    model = tiny_dit()

    def enter(step, x):
        if step == 3:
            recorder.__enter__()

    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        recorder = session.trace()
        sample(model, STEPS, each_step=enter)
        with pytest.raises(RuntimeError, match=r"begins in the with block.*3 steps before it"):
            recorder.__exit__(None, None, None)
        assert not session.record_selections


# --- samples that are kept -----------------------------------------------------------------------


def test_kept_samples_belong_to_their_steps():
    model = tiny_dit()
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        with session.trace() as recorder:
            with pytest.raises(RuntimeError, match="expected a step that has been run"):
                recorder.keep(torch.zeros(2, 1, 4, 4))
            assert not recorder.started

            def keep(step, x):
                if step in (2, 5):
                    recorder.keep(torch.full((2, 1, 4, 4), step / 10))

            sample(model, STEPS, labels=(1, 2), each_step=keep)
            with pytest.raises(ValueError, match=r"expected \(B, C, H, W\).*got \(4, 4\)"):
                recorder.keep(torch.zeros(4, 4))
        first = recorder.trace
        with session.trace() as recorder:  # another run forgets what was kept of the last
            sample(model, STEPS, each_step=keep, predict=separate_guidance)
            sample(model, STEPS)
            recorder.keep(torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1))
    assert {step: kept.ravel()[0] for step, kept in first.samples.items()} == {1: 51, 4: 128}
    assert first.samples[1].shape == (2, 1, 4, 4)
    assert recorder.trace.samples.keys() == {STEPS - 1}
    assert recorder.trace.samples[STEPS - 1].ravel().tolist() == [0, 255]


def test_samples_of_a_step_are_kept_while_its_second_model_runs():
    tiny = PIPELINES["wan22"]
    pipe = tiny()
    config = toca.ToCaConfig(interval=3, selector="random")

    def keep(pipe, step, t, kwargs):
        recorder.keep(torch.full((1, 1, 2, 2), step / 255))
        return {}

    with toca.enabled(pipe, config) as session, session.trace() as recorder:
        tiny.call(pipe, STEPS, callback_on_step_end=keep)
    kept = {step: int(one.ravel()[0]) for step, one in recorder.trace.samples.items()}
    assert kept == {step: step for step in range(STEPS)}


# --- achieved and ideal --------------------------------------------------------------------------


def test_speed_ups_of_known_times():
    trace, _ = traced(tiny_dit())
    own = dataclasses.replace(trace, seconds=np.array([4.0, 1, 1, 2, 1, 1, 2, 1]))
    assert own.full_step_seconds == 2.0  # median of steps 0, 3 and 6
    assert own.speedup == pytest.approx(2 * 8 / 13)
    assert own.step_speedups.tolist() == [0.5, 2, 2, 1, 2, 2, 1, 2]
    measured = dataclasses.replace(own, untouched_seconds=np.array([9.0] + [3.0] * 7))
    assert measured.full_step_seconds == 3.0
    assert measured.speedup == pytest.approx(30 / 13)
    full, cached = trace.full_flops[0], trace.flops[1]
    assert trace.flops[0] == full > cached
    assert trace.ideal_step_speedups[:2].tolist() == [1.0, full / cached]
    with pytest.raises(ValueError, match=r"seconds: expected the shape \(8,\), got \(3,\)"):
        dataclasses.replace(trace, seconds=np.ones(3))


# --- the file ------------------------------------------------------------------------------------


def complete(trace: Trace) -> Trace:
    images = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    return dataclasses.replace(
        trace,
        untouched_seconds=np.linspace(1, 2, trace.num_steps),
        captions=("a <b>", "zwei Häuser"),
        result=images,
        untouched=images / 2,
        samples={2: (255 * images).astype(np.uint8)},
        versions={"torch": "2"},
    )


def test_a_saved_trace_reads_back_equal(tmp_path):
    trace, _ = traced(tiny_dit())
    for number, one in enumerate((trace, complete(trace), of_pipeline("wan22")[0])):
        path = tmp_path / f"{number}.npz"
        one.save(path)
        assert_equal(Trace.load(path), one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npz", "1.npz", "2.npz"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    trace, _ = traced(tiny_dit())
    path = tmp_path / "run.npz"
    trace.save(path)
    before = path.read_bytes()

    def broken(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", broken)
    with pytest.raises(OSError, match="no space"):
        trace.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run.npz"
    complete(traced(tiny_dit())[0]).save(path)
    return path


def rewritten(path, **changes):
    """The file with other arrays; None leaves one out."""
    with np.load(path) as arrays:
        held = dict(arrays)
    held |= {name.replace("__", "/"): value for name, value in changes.items()}
    np.savez(path, **{name: value for name, value in held.items() if value is not None})


def header(path, **changes):
    with np.load(path) as arrays:
        said = json.loads(bytes(arrays["header"]))
    return np.frombuffer(json.dumps(said | changes).encode(), np.uint8)


def assert_refused(path, match=None):
    with pytest.raises(ValueError, match=match) as caught:
        Trace.load(path)
    assert str(caught.value).startswith(f"{path}: expected a trace that Trace.save wrote")


def test_files_that_are_no_traces_are_refused(saved, tmp_path):
    whole = saved.read_bytes()
    for length in (0, 1, 10, 300, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        assert_refused(saved)
    saved.write_text("something else")
    assert_refused(saved)
    with zipfile.ZipFile(saved, "w") as archive:
        archive.writestr("notes.txt", "a zip of another kind")
    assert_refused(saved)
    np.savez(saved, a=np.ones(3))
    assert_refused(saved, "header")
    np.savez(saved, header=np.array([{}], dtype=object))
    assert_refused(saved)
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "none.npz")


def test_damaged_bytes_are_refused_or_change_nothing(saved):
    """Every part of the file is under a checksum, or is not read."""
    whole, trace = saved.read_bytes(), Trace.load(saved)
    refused = 0
    for at in np.random.default_rng(0).integers(len(whole), size=150):
        broken = bytearray(whole)
        broken[at] ^= 0x55
        saved.write_bytes(broken)
        try:
            read = Trace.load(saved)
        except (ValueError, OSError):
            refused += 1
        else:
            assert_equal(read, trace)
    assert refused > 100


def test_contents_that_contradict_each_other_are_refused(saved):
    whole = saved.read_bytes()
    known = np.load(saved)
    for changes, match in [
        ({"seconds": np.ones(3)}, r"seconds: expected the shape \(8,\), got \(3,\)"),
        ({"seconds": None}, "seconds"),
        ({"0__k__mlp": known["0/k/mlp"][:-1]}, r"k of mlp: expected the shape \(8, 3\)"),
        ({"0__full__attn": known["0/full/attn"][:, 1:]}, "full of attn"),
        ({"0__flops": known["0/flops"][None]}, "flops"),
        ({"header": np.frombuffer(b"{", np.uint8)}, "JSONDecodeError"),
        ({"header": header(saved, format=2)}, "format: expected 1, got 2"),
        ({"header": header(saved, parts=[])}, "parts: expected at least one"),
        ({"header": header(saved, config={"interval": 0})}, "interval"),
        ({"header": header(saved, samples=[3])}, "samples/3"),
    ]:
        saved.write_bytes(whole)
        rewritten(saved, **changes)
        assert_refused(saved, match)
    saved.write_bytes(whole)
    rewritten(saved, **{"0__selections__mlp": known["0/selections/mlp"][:40]})
    assert_refused(saved)
