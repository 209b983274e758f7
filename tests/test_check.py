"""`toca check`: the errors that it reports, and the command around them."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch

import toca_kernels as toca
from models import diffusers
from pipelines import PIPELINES
from published import flux, pixart, stdit3
from toca_kernels.apps.check import Report, check
from toca_kernels.cli import main

STEPS = 6
NAMES = ("flux", "pixart_alpha", "dit")
# A size that the pipelines would not choose by themselves.
SMALL = {name: {"height": 128, "width": 128} for name in ("flux", "pixart_alpha")}
SMALL["pixart_alpha"] |= {"use_resolution_binning": False}
SMALL["dit"] = {"class_labels": [3, 7]}


def config(**settings):
    given = {"interval": 3, "fresh_ratio": 0.3, "module_ratio": {"mlp": 1.0, "cross_attn": 0.5}}
    return toca.ToCaConfig(**{**given, "selector": "random", **settings})


@functools.cache
def report(name: str, **settings) -> Report:
    """`ratio` is that of every module that can have one."""
    if "ratio" in settings:
        ratio = settings.pop("ratio")
        settings |= {"fresh_ratio": ratio, "module_ratio": {"mlp": 1.0, "cross_attn": 1.0}}
    tiny = PIPELINES[name]
    pipe = tiny()
    return check(pipe, lambda: tiny.call(pipe, STEPS), config(**settings), STEPS)


def errors(found: Report) -> dict[str, float | None]:
    return {one.module: one.error for one in found.modules}


@pytest.mark.parametrize("name", NAMES)
def test_full_steps_have_no_error(name):
    found = report(name, interval=1)
    assert found.exact
    assert (found.steps, found.cached_steps) == (STEPS, 0)
    assert (found.error, found.psnr, found.cached_seconds) == (0, None, None)
    assert set(errors(found).values()) == {None}
    assert found.full_seconds > 0
    assert found.verdict.startswith("nothing was cached")


@pytest.mark.parametrize("name", NAMES)
def test_errors_grow_with_the_interval(name):
    few, many = (report(name, interval=interval) for interval in (2, 6))
    assert few.exact
    assert 0 < few.error < many.error
    assert few.psnr > many.psnr
    for module, error in errors(few).items():
        assert 0 < error < errors(many)[module]
    assert many.cached_steps == STEPS - 1
    assert many.cached_seconds > 0
    assert many.cache_bytes > 0


@pytest.mark.parametrize("name", NAMES)
def test_errors_fall_with_the_tokens_that_are_recomputed(name):
    none, some, every = (report(name, ratio=ratio) for ratio in (0.0, 0.5, 1.0))
    for one, two, three in zip(none.modules, some.modules, every.modules, strict=True):
        if one.module.endswith("attn") and "cross" not in one.module:
            assert (one.k_share, two.k_share, three.k_share) == (0, 0, 0)
            continue
        assert one.error > two.error > three.error > 0  # the attention before it is reused
        assert (one.k_share, three.k_share) == (0, 1)
        assert two.k_share == pytest.approx(0.5, abs=0.02)


def test_the_error_of_what_is_reused_is_measured_by_hooks():
    """In steps 1 and 2 of the untouched model, against its step 0."""
    tiny = PIPELINES["flux"]
    pipe = tiny()
    outputs: dict[int, list] = {0: [], 1: []}
    handles = [
        block.attn.register_forward_hook(lambda m, a, out, at=at: outputs[at].append(out[0]))
        for at, block in enumerate(pipe.transformer.transformer_blocks)
    ]
    tiny.call(pipe, 3)
    for handle in handles:
        handle.remove()
    found = check(pipe, lambda: tiny.call(pipe, 3), config(fresh_ratio=0.0), 3)
    off = [
        float((steps[0] - steps[now]).norm() / steps[now].norm())
        for steps in outputs.values()
        for now in (1, 2)
    ]
    measured = next(one for one in found.modules if one.module == "img_attn")
    assert measured.layers == 2
    assert measured.error == pytest.approx(sum(off) / 4)
    assert measured.worst_error == pytest.approx(max(sum(off[:2]), sum(off[2:])) / 2)
    assert measured.worst_layer == int(sum(off[2:]) > sum(off[:2]))


def test_the_same_input_in_every_step_leaves_no_error():
    """Every cached output is what it would be again, whether it is recomputed or not."""
    model = PIPELINES["flux"]().transformer
    x, text = torch.randn(1, 16, 16), torch.randn(1, 8, 32)
    ids = torch.zeros(16, 3), torch.zeros(8, 3)

    def call():
        for step in range(STEPS):
            out = model(
                hidden_states=x,
                encoder_hidden_states=text,
                pooled_projections=text[:, 0],
                timestep=torch.tensor([0.5 - 1e-9 * step], dtype=torch.float64),
                img_ids=ids[0],
                txt_ids=ids[1],
                guidance=torch.ones(1),
                return_dict=False,
            )
        return out[0]

    found = check(model, call, config(), STEPS)
    assert found.cached_steps == 4
    assert max(errors(found).values()) < 1e-4
    assert found.verdict.startswith("safe")


@pytest.mark.parametrize("name", ["flux", "dit"])
def test_eight_bit_caches_add_little(name):
    exact, coarse = (report(name, fresh_ratio=0.0, cache_dtype=one) for one in (None, "int8"))
    assert coarse.exact  # full steps do not read the cache
    assert coarse.cache_bytes < exact.cache_bytes
    for module, error in errors(coarse).items():
        assert error == pytest.approx(errors(exact)[module], rel=0.2)


@pytest.mark.parametrize("source", [flux, pixart, stdit3], ids=lambda one: one.__name__)
def test_published_models(source):
    """Their samplers call the model's forward, not the model."""
    model = source.tiny()
    chosen = config(interval=2, selector="attention" if source is flux else "entropy")
    found = check(model, lambda: source.sample(model, STEPS), chosen, STEPS)
    assert found.exact
    assert found.cached_steps == STEPS // 2
    assert found.cached_seconds > 0
    assert all(error > 0 for error in errors(found).values())


@pytest.mark.parametrize("name", ["wan22", "sd3"])
def test_other_pipelines(name):
    """Two transformers; an output that only some layers have."""
    found = report(name, interval=2)
    assert found.exact
    assert all(error > 0 for error in errors(found).values())
    assert ("transformer_2.mlp" in errors(found)) == (name == "wan22")


def test_the_model_is_left_as_it_was():
    tiny = PIPELINES["flux"]
    pipe = tiny()
    before = tiny.call(pipe, STEPS)
    attributes = [set(vars(module)) for module in pipe.transformer.modules()]
    check(pipe, lambda: tiny.call(pipe, STEPS), config(), STEPS)
    assert [set(vars(module)) for module in pipe.transformer.modules()] == attributes
    assert not any(module._forward_hooks for module in pipe.transformer.modules())
    assert torch.equal(tiny.call(pipe, STEPS), before)


def test_an_enabled_model_is_refused():
    pipe = PIPELINES["flux"]()
    with toca.enabled(pipe, config()), pytest.raises(ValueError, match="already is"):
        check(pipe, lambda: pytest.fail("was run"), config(), STEPS)


# --- verdicts ------------------------------------------------------------------------------------


def verdict(error, exact=True, nan=0, **modules):
    from toca_kernels.apps.check import ModuleReport

    found = [ModuleReport(name, 2, off, 1, off, k) for name, (off, k) in modules.items()]
    return Report(8, 5, exact, tuple(found), 1.0, 0.5, error, 30.0, 10, 1, nan).verdict


def test_verdicts():
    assert verdict(0.01, mlp=(0.9, 0.1)) == "safe: the result is off by 1.0%"
    assert verdict(math.nan).startswith("NOT SAFE: the run gave numbers that are not finite")
    assert verdict(0.01, nan=3).startswith("NOT SAFE: the run gave numbers that are not finite")
    assert verdict(0.0, exact=False).startswith("NOT SAFE: full steps do not repeat")
    text = verdict(0.1, attn=(0.2, 0), img_mlp=(0.5, 0.1), mlp=(0.7, 0.1))
    assert text.startswith("doubtful, look at the pictures: the result is off by 10.0%")
    assert "fine as it is: attn;" in text
    assert "module_ratio of mlp, img_mlp" in text
    text = verdict(0.5, attn=(0.6, 0.0))
    assert text.startswith("NOT SAFE")
    assert text.endswith("; lower the interval")


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NAMES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / request.param
    PIPELINES[request.param]().save_pretrained(folder)
    return request.param, folder


def run(folder, name, *argv, **arguments):
    call = json.dumps(SMALL.get(name, {}) | arguments)
    argv = ["check", str(folder), "--device", "cpu", "--steps", "6", "--call", call, *argv]
    return main(argv)


def test_the_command_prints_a_table_and_writes_json(saved, capsys, tmp_path):
    name, folder = saved
    preset = {"flux": "flux-50", "pixart_alpha": "pixart-dpm20", "dit": "dit-ddim50"}[name]
    path = tmp_path / "made" / "report.json"
    assert run(folder, name, "--preset", preset, "--json", str(path)) == 0
    text = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert "| module | layers | error | worst layer | its error | k / N |" in text
    assert found["verdict"] in text
    assert found["exact"]
    assert found["config"] == toca.ToCaConfig.preset(preset).to_dict()
    assert 0 < found["error"] < 1
    assert found["machine"]["torch"] == torch.__version__
    modules = [one["module"] for one in found["modules"]]
    for module in modules:
        assert f"| {module} |" in text
    assert {"flux": "single_mlp", "pixart_alpha": "cross_attn", "dit": "mlp"}[name] in modules


def test_settings_may_be_left_out_or_saved(saved, capsys, tmp_path):
    name, folder = saved
    assert run(folder, name) == 0
    assert "verdict" in capsys.readouterr().out
    path = tmp_path / "own.json"
    config(interval=1).save(path)
    assert run(folder, name, "--config", str(path)) == 0
    assert "nothing was cached" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["flux", "pixart_alpha", "wan", "sd3", "qwenimage", "ltx"])
def test_a_transformer_alone(name, capsys, tmp_path):
    """Its pipeline has no text encoder: the prompt is made up."""
    if name == "wan":
        pytest.importorskip("accelerate", reason="diffusers loads Wan with accelerate only")
    PIPELINES[name]().transformer.save_pretrained(tmp_path)
    size = {"height": 64, "width": 64}
    if name in ("wan", "ltx"):
        size["num_frames"] = 9
    if name == "pixart_alpha":
        size["use_resolution_binning"] = False
    assert run(tmp_path, name, **size) == 0
    assert "verdict" in capsys.readouterr().out


def refusal(capsys, *argv):
    try:
        status = main(["check", *argv])
    except SystemExit as error:
        status = error.code
    assert status == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


def test_refusals_are_in_words(capsys, tmp_path):
    flux = tmp_path / "flux"
    PIPELINES["flux"]().save_pretrained(flux)
    assert "expected at least 2" in refusal(capsys, str(flux), "--steps", "1")
    assert "expected a JSON object" in refusal(capsys, str(flux), "--call", "[1]")
    assert "expected a JSON object" in refusal(capsys, str(flux), "--call", "{")
    assert "not allowed with" in refusal(capsys, str(flux), "--preset", "x", "--config", "y")
    assert "preset: expected one of" in refusal(capsys, str(flux), "--preset", "nothing")
    message = refusal(capsys, str(flux), "--preset", "pixart-dpm20", "--device", "cpu")
    assert "selector: expected one of attention, norm, similarity, random, mask" in message
    assert "toca check: " in refusal(capsys, str(tmp_path / "nothing"), "--device", "cpu")


def test_what_is_not_supported_is_refused_with_what_is(capsys, tmp_path):
    library = diffusers()
    unet = library.UNet2DModel(
        sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    library.DDPMPipeline(unet, library.DDPMScheduler()).save_pretrained(tmp_path / "unet")
    message = refusal(capsys, str(tmp_path / "unet"), "--device", "cpu")
    assert "DDPMPipeline, which has none" in message
    assert "facebookresearch/DiT" in message
    unet.save_pretrained(tmp_path / "alone")
    message = refusal(capsys, str(tmp_path / "alone"), "--device", "cpu")
    assert "got UNet2DModel" in message
    assert "FluxTransformer2DModel" in message


def test_a_family_that_is_not_known_is_refused(capsys, tmp_path, monkeypatch):
    pipe = PIPELINES["flux"]()
    for block in pipe.transformer.transformer_blocks:
        del block.ff
    monkeypatch.setattr("toca_kernels.apps.sampling.pipelines.load", lambda *args: pipe)
    message = refusal(capsys, "any", "--device", "cpu")
    assert "expected one of the supported families, got FluxTransformer2DModel" in message
