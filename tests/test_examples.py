"""The scripts in examples/ for published repositories, on tiny models in place of a checkout."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import toca_kernels as toca
from published import flux, noise, pixart, stdit3

FOLDER = Path(__file__).parents[1] / "examples"


def script(name):
    """Under another name than the package that it imports."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Solver:
    """DPMS of PixArt-alpha, as far as the script uses it: the published loop."""

    def __init__(self, predict, *, condition, uncondition, cfg_scale, model_kwargs):
        self.model, self.cfg_scale = predict.__self__, cfg_scale

    def sample(self, z, steps=20):
        return pixart.sample(self.model, steps, samples=len(z), cfg_scale=self.cfg_scale)


class Flow:
    """Open-Sora's scheduler."""

    def __init__(self, steps):
        self.steps = steps

    def sample(self, model, text_encoder, z, prompts, device, additional_args=None):
        return stdit3.sample(model, self.steps, samples=len(prompts))


def flux_inputs(steps):
    ids = torch.zeros(8, 8, 3)
    ids[..., 1], ids[..., 2] = torch.arange(8)[:, None], torch.arange(8)
    return {
        "img": noise(1, 64, 16, seed=0),
        "img_ids": ids.view(1, -1, 3),
        "txt": noise(1, 8, 32, seed=1),
        "txt_ids": torch.zeros(1, 8, 3),
        "vec": noise(1, 32, seed=2),
        "timesteps": flux.get_schedule(steps, 64),
    }


def parts(name, steps):
    """What `load` would return."""
    if name == "flux":
        return {
            "model": flux.tiny(),
            "inputs": flux_inputs(steps),
            "denoise": flux.denoise,
        }
    if name == "pixart":
        texts = {"condition": None, "uncondition": None, "model_kwargs": {}}
        return {
            "model": pixart.tiny(),
            "inputs": texts,
            "noise": torch.zeros(1, 1),
            "solver": Solver,
        }
    return {
        "model": stdit3.tiny(),
        "inputs": {"text_encoder": None, "z": None, "prompts": ["waves"], "device": "cpu"},
        "scheduler": Flow(steps),
    }


def untouched(name, model, steps):
    if name == "flux":
        return flux.denoise(model, **flux_inputs(steps), guidance=3.5)
    if name == "pixart":
        return pixart.sample(model, steps, samples=1, cfg_scale=4.5)
    return stdit3.sample(model, steps, samples=1)


@pytest.mark.parametrize(("name", "steps"), [("flux", 12), ("pixart", 8), ("open_sora", 9)])
def test_a_script_samples_with_toca(name, steps, monkeypatch, capsys):
    module = script(name)
    found = SimpleNamespace(**parts(name, steps), saved=[])
    found.save = found.saved.append
    want = untouched(name, found.model, steps)
    monkeypatch.setattr(module, "load", lambda args: found)
    module.main(["--repo", "none", "--weights", "none", "--steps", str(steps)])
    (have,) = found.saved
    assert have.shape == want.shape
    assert torch.isfinite(have).all()
    assert 0 < (have - want).norm() < 0.3 * want.norm()
    summary = capsys.readouterr().out
    assert f"steps       {steps} (" in summary
    assert " 0 cached" not in summary
    toca.disable(found.model)
    assert torch.equal(untouched(name, found.model, steps), want)


@pytest.mark.parametrize("name", ["flux", "pixart", "open_sora"])
def test_a_script_says_what_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = script(name)
    argv = ["--repo", str(tmp_path), "--weights", str(tmp_path / "weights")]
    with pytest.raises(SystemExit, match="there is none"):
        module.main(argv)
    weights = tmp_path / "weights"
    for part in ("flux1-dev.safetensors", "ae.safetensors", "model.pth"):
        (weights / part).parent.mkdir(exist_ok=True)
        (weights / part).touch()
    for part in ("sd-vae-ft-ema", "t5_ckpts"):
        (weights / part).mkdir()
    config = tmp_path / "configs" / "opensora-v1-2" / "inference"
    config.mkdir(parents=True)
    (config / "sample.py").touch()
    if name == "pixart":
        argv[3] = str(weights / "model.pth")
    with pytest.raises(SystemExit, match="no working checkout"):
        module.main(argv)


def test_the_server_draws_what_lone_runs_draw(monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.syspath_prepend(FOLDER / "digits")
    serve = importlib.import_module("serve")
    model = serve.load_model()
    orders = [serve.Order(3, 6, seed=0), serve.Order(5, 4, seed=1, arrives=1)]
    orders += [serve.Order(7, 5, seed=2, arrives=2), serve.Order(1, 4, seed=3, arrives=9)]
    with toca.enabled(model, toca.ToCaConfig.preset("dit-ddim50")) as session:
        drawn = serve.serve(model, orders, capacity=2, session=session)
    untouched = serve.serve(model, orders, capacity=3)
    assert set(drawn) == set(untouched) == set(orders)
    for order in orders:
        given = {"num_steps": order.steps, "noise": order.noise(), "progress": False}
        label = torch.tensor([order.label])
        assert torch.allclose(untouched[order], serve.sample(model, label, **given), atol=1e-4)
        with toca.enabled(model, toca.ToCaConfig.preset("dit-ddim50"), num_steps=order.steps):
            alone = serve.sample(model, label, **given)
        assert torch.allclose(drawn[order], alone, atol=1e-4)
