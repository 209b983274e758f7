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


@pytest.mark.parametrize("name", ["flux", "pixart_alpha", "wan"])
def test_pipelines_without_a_config(name):
    tiny = PIPELINES[name]
    pipe = tiny()
    untouched = tiny.call(pipe, STEPS)
    with toca.enabled(pipe) as session:
        out = tiny.call(pipe, STEPS)
        assert torch.equal(tiny.call(pipe, STEPS), out)
        summary = session.summary()
    assert (summary.full_steps, summary.cached_steps) == (2, 4)
    assert 1e-6 < (out - untouched).norm() / untouched.norm() < 0.5
    assert torch.equal(tiny.call(pipe, STEPS), untouched)


def test_a_copied_scheduler_is_its_own():
    pipe = PIPELINES["pixart_alpha"]()
    with toca.enabled(pipe, config()) as session:
        pipe.scheduler.set_timesteps(6)
        other = copy.deepcopy(pipe.scheduler)
        other.set_timesteps(3)
        assert len(pipe.scheduler.timesteps) == 6
        assert len(other.timesteps) == 3
        assert session._run.num_steps == 6


def selections(session):
    return [branch.done.selections for branch in session._run.branches.values()]


def modules(step):
    """The image's: a text may have another length in each branch."""
    return [name for name in step if not name.startswith(("txt_", "single_"))]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", ["wan", "flux_true_cfg", "qwenimage"])
def test_a_selection_is_shared_between_calls(name, images):
    tiny = PIPELINES[name]
    pipe = tiny()
    prompts = {
        key: value.repeat(images, *[1] * (value.ndim - 1)) for key, value in tiny.prompt().items()
    }
    recomputed = []
    for share in (True, False):
        given = config(
            share_cfg_selection=share, selector="entropy" if name == "wan" else "attention"
        )
        with toca.enabled(pipe, given) as session:
            session.record_selections = True
            tiny.call(pipe, STEPS, **prompts)
            cond, uncond = selections(session)
        same = [
            torch.equal(one[module], other[module])
            for one, other in zip(cond, uncond, strict=True)
            if one is not None
            for module in modules(one)
        ]
        recomputed.append(sum(int(m.sum()) for step in uncond if step for m in step.values()))
        assert all(same) == share
    assert recomputed[0] == recomputed[1]


def pixart_run(model, config, calls, steps=6):
    """(prediction of either half at the last step, selections of each call's branch)."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 16, 16, generator=noise)
    text = torch.randn(2, 12, model.config.caption_channels, generator=noise)
    mask = torch.ones(2, 12)
    mask[1, 7:] = 0

    def predict(halves, t):
        rows = slice(halves[0], halves[-1] + 1)
        return model(
            x.repeat(len(halves), 1, 1, 1),
            encoder_hidden_states=text[rows],
            encoder_attention_mask=mask[rows],
            timestep=torch.full((len(halves),), t),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0][:, :4]

    with toca.enabled(model, config, num_steps=steps) as session:
        session.record_selections = True
        for step in range(steps):
            t = 999 - 150 * step
            out = torch.cat([predict(halves, t) for halves in calls])
            x = x - 0.1 * (out[1:] + 2 * (out[:1] - out[1:]))
        return out, selections(session)


def test_calls_of_their_own_share_what_a_batch_shares():
    """Entropies of both calls rank the tokens, as those of both halves do."""
    model = PIPELINES["pixart_alpha"]().transformer
    given = config(
        selector="entropy", share_cfg_selection=True, module_ratio={"mlp": 1.0}, age_weight=0.05
    )
    batched, [together] = pixart_run(model, given, [(0, 1)])
    apart, [first, second] = pixart_run(model, given, [(0,), (1,)])
    assert (apart - batched).norm() <= 1e-5 * batched.norm()
    steps = [step for step, done in enumerate(together) if done is not None]
    assert steps
    for step in steps:
        for module, tokens in together[step].items():
            assert torch.equal(first[step][module], tokens[:, :1]), (step, module)
            assert torch.equal(second[step][module], tokens[:, :1]), (step, module)
    _, [mine] = pixart_run(model, given.replace(share_cfg_selection=False), [(0, 1)])
    assert not torch.equal(mine[1]["mlp"][:, 0], mine[1]["mlp"][:, 1])


def test_refreshed_entropies_are_shared_between_calls():
    model = PIPELINES["pixart_alpha"]().transformer
    given = config(selector="entropy", share_cfg_selection=True)
    _, [first, second] = pixart_run(model, given, [(0,), (1,)])
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        assert one is None or all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("forecast", [0, 2])
def test_a_guidance_branch_that_comes_and_goes_shares(forecast):
    """Guidance over a part of the run: the second call is there in steps 2 to 4 only."""
    tiny = PIPELINES["wan"]
    pipe = tiny()
    given = config(selector="random", share_cfg_selection=True, forecast=forecast)
    model = pipe.transformer
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, model.config.in_channels, 3, 8, 8, generator=noise)
    texts = torch.randn(2, 12, model.config.text_dim, generator=noise)
    conditional, unconditional = texts[:1].clone(), texts[1:].clone()
    for _ in range(2):
        with toca.enabled(model, given, num_steps=STEPS) as session:
            session.record_selections = True
            for step in range(STEPS):
                t = torch.tensor([900 - 100 * step])
                for text in (conditional, unconditional)[: 1 + (2 <= step < 5)]:
                    model(x, t, text)
            assert session.summary().cached_steps > 0


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
    assert all(branch.call is None for branch in session._run.branches.values())
