"""What went wrong once, or could: runs that differ, guidance in other forms, wrapped modules."""

import copy

import pytest
import torch

import toca_kernels as toca
from pipelines import PIPELINES
from published import noise, pixart

STEPS = 6
SOME = {"mlp": 1.0, "cross_attn": 0.5}


def config(**settings):
    given = {"interval": 3, "fresh_ratio": 0.3, "module_ratio": SOME}
    return toca.ToCaConfig(**(given | settings))


def prompted(model, lengths, *, steps=4, rows=2, separate=False):
    """PixArt's own code with prompts of these lengths."""
    length, channels = model.y_embedder.y_embedding.shape
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    text = noise(len(lengths), 1, length, channels, seed=1)
    x = noise(len(lengths), model.in_channels, 16, 16, seed=0)
    for t in range(900, 100, -800 // steps):
        times = torch.full((len(x),), float(t))
        out = model.forward_with_dpmsolver(x, times, text, mask=mask)
        if separate:
            out = out + model.forward_with_dpmsolver(x, times, text, mask=mask)
        x = x - 0.05 * out
    return x


def test_prompts_of_another_length_in_the_next_run():
    model = pixart.tiny()
    with toca.enabled(model, config(selector="entropy"), num_steps=4):
        first = prompted(model, [5, 6])
        second = prompted(model, [7, 3])
        assert torch.equal(prompted(model, [5, 6]), first)
    with toca.enabled(model, config(selector="entropy"), num_steps=4):
        assert torch.equal(prompted(model, [7, 3]), second)


def test_halves_of_a_batch_in_separate_calls_are_refused():
    model = pixart.tiny()
    with (
        toca.enabled(model, config(selector="entropy"), num_steps=4),
        pytest.raises(ValueError, match="guidance: expected both halves in one batch"),
    ):
        prompted(model, [5, 6], separate=True)


def test_another_scheduler_after_enabling_is_refused():
    tiny = PIPELINES["flux"]
    pipe = tiny()
    with toca.enabled(pipe, config()):
        tiny.call(pipe, STEPS)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match="scheduler: expected the one that announced"):
            tiny.call(pipe, STEPS)


def test_a_copied_scheduler_is_its_own():
    pipe = PIPELINES["pixart_alpha"]()
    with toca.enabled(pipe, config()) as session:
        pipe.scheduler.set_timesteps(6)
        other = copy.deepcopy(pipe.scheduler)
        other.set_timesteps(3)
        assert len(pipe.scheduler.timesteps) == 6
        assert len(other.timesteps) == 3
        assert session._run.num_steps == 6


@pytest.mark.parametrize("name", ["wan", "flux_true_cfg", "qwenimage"])
def test_a_selection_is_not_shared_between_calls(name):
    tiny = PIPELINES[name]
    pipe = tiny()
    prompts = {
        key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in tiny.prompt().items()
    }
    with (
        toca.enabled(pipe, config(share_cfg_selection=True)),
        pytest.raises(ValueError, match="share_cfg_selection: expected both guidance halves in"),
    ):
        tiny.call(pipe, STEPS, **prompts)


@pytest.mark.parametrize(
    ("name", "interval"),
    [("flux", {"single_attn": 6}), ("flux2", {"single_attn": 6}), ("dit", {"attn": 6})],
)
def test_intervals_that_a_family_cannot_honour_are_refused(name, interval):
    pipe = PIPELINES[name]()
    with pytest.raises(ValueError, match="module_interval: expected one interval for"):
        toca.enable(pipe, config(module_interval=interval))


@pytest.mark.parametrize("interval", [1, 2])
def test_new_scores_serve_the_step_that_took_them(interval):
    """Cross-attention in full where the MLP is cached: it ranks the tokens at once."""
    tiny = PIPELINES["pixart_alpha"]
    pipe = tiny()
    chosen = config(
        interval=STEPS,
        selector="entropy",
        module_interval={"cross_attn": interval},
        age_weight=0.0,
    )
    with toca.enabled(pipe, chosen) as session:
        session.record_selections = True
        run = session._run
        seen = []
        own = run._forward

        def forward(branch, *args):
            out = own(branch, *args)
            track = branch.cache.tracks["mlp"]
            seen.append([(track.score[0].clone(), track._selected.get(0))])
            return out

        run._forward = forward
        tiny.call(pipe, STEPS)
    for step, ((score, selected),) in enumerate(seen):
        if step % interval or selected is None:
            continue
        index, _ = selected
        best = score.argsort(dim=-1, descending=True, stable=True)[:, : index.shape[1]]
        assert torch.equal(index, best.sort(dim=-1).values)


def test_slices_of_heads_rank_like_all_of_them():
    from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

    tiny = PIPELINES["pixart_alpha"]
    recorded = []
    for processor in (AttnProcessor(), SlicedAttnProcessor(2)):
        pipe = tiny()
        for block in pipe.transformer.transformer_blocks:
            block.attn1.set_processor(processor)
        with toca.enabled(pipe, config(selector="attention")) as session:
            session.record_selections = True
            tiny.call(pipe, STEPS)
            recorded.append(session.selections_of("mlp"))
    for one, other in zip(*recorded, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_an_enabled_model_is_not_pickled(tmp_path):
    pipe = PIPELINES["flux"]()
    with (
        toca.enabled(pipe, config()),
        pytest.raises(ValueError, match="pickle: expected a model that is not enabled"),
    ):
        torch.save(pipe.transformer, tmp_path / "model.pt")
    torch.save(pipe.transformer.state_dict(), tmp_path / "model.pt")


def test_a_run_may_change_between_inference_mode_and_no_grad():
    tiny = PIPELINES["pixart_alpha"]
    pipe = tiny()
    with toca.enabled(pipe, config()):
        with torch.inference_mode():
            first = tiny.call(pipe, STEPS)
        with torch.no_grad():
            assert torch.equal(tiny.call(pipe, STEPS), first)


def test_a_disabled_session_holds_no_text():
    tiny = PIPELINES["flux"]
    pipe = tiny()
    with toca.enabled(pipe, config()) as session:
        tiny.call(pipe, STEPS)
    assert all(branch._call is None for branch in session._run.branches.values())
