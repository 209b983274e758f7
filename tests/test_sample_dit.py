"""Checkpoints of facebookresearch/DiT, in a stand-in for a clone of it: own code."""

import argparse
import sys

import pytest
import torch

import models
import toca_kernels as toca
from pipelines import tiny_decoder
from test_sampling import STEPS, check_alone, loaded, requests, write
from toca_kernels.apps.sampling import Request, noise
from toca_kernels.apps.sampling.loading import load

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


MODELS = """
    import torch
    from dit import DiT, TimestepEmbedder

    class Waves(TimestepEmbedder):  # float32 into the MLP, as published
        def forward(self, t):
            rate = torch.exp(-9.21 * torch.arange(self.frequencies // 2) / (self.frequencies // 2))
            angle = t[:, None].float() * rate
            return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))

    class Net(DiT):
        in_channels = 4

    def make(input_size, num_classes):
        net = Net(input_size, channels=32, num_heads=4, depth=3, num_classes=num_classes)
        net.t_embedder = Waves(32)
        return net

    DiT_models = {"DiT-T/2": make}
"""

# DDPM (Ho et al. 2020, equations 7 and 11; the larger variance, beta) and DDIM (Song et al. 2021,
# equation 12) over every 1000/steps-th timestep, with the names that sample_ddp.py calls.
DIFFUSION = """
    import torch as th

    class Spaced:
        def __init__(self, steps):
            self.kept = [t * (999 // (steps - 1)) for t in range(steps)]
            self.use_timesteps = set(self.kept)
            self.alphas = th.cumprod(1 - th.linspace(1e-4, 2e-2, 1000), 0)[self.kept].tolist()

        def _loop(self, step, model, shape, noise, clip_denoised, model_kwargs, progress, device):
            x = noise
            assert x.shape == shape and not clip_denoised
            for i in reversed(range(len(self.kept))):
                t = th.full((len(x),), self.kept[i], device=device)
                eps = model(x, t, **model_kwargs)[:, : x.shape[1]]
                a, before = self.alphas[i], self.alphas[i - 1] if i else 1.0
                clean = (x - (1 - a) ** 0.5 * eps) / a**0.5
                x = step(x, eps, clean, a, before, th.randn_like(x))
            return x

        def p_sample_loop(self, model, shape, noise=None, **options):
            def step(x, eps, clean, a, before, drawn):
                beta = 1 - a / before
                mean = before**0.5 * beta * clean + (a / before) ** 0.5 * (1 - before) * x
                return mean / (1 - a) + (beta**0.5 * drawn if before < 1 else 0)
            return self._loop(step, model, shape, noise, **options)

        def ddim_sample_loop(self, model, shape, noise=None, **options):
            def step(x, eps, clean, a, before, drawn):
                return before**0.5 * clean + (1 - before) ** 0.5 * eps
            return self._loop(step, model, shape, noise, **options)

    def create_diffusion(timestep_respacing):
        return Spaced(int(timestep_respacing))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> dict[str, str]:
    """A stand-in for a clone, weights as train.py saves them, and an autoencoder."""
    folder = tmp_path_factory.mktemp("DiT")
    (folder / "diffusion").mkdir()
    write(folder / "models.py", MODELS)
    write(folder / "diffusion" / "__init__.py", "from .spaced import create_diffusion")
    write(folder / "diffusion" / "spaced.py", DIFFUSION)
    net = models.tiny_dit(input_size=16)
    state = {"ema": net.state_dict(), "model": {}, "args": argparse.Namespace(epochs=1)}
    torch.save(state, folder / "weights.pt")
    models.diffusers()
    tiny_decoder()["vae"].save_pretrained(folder / "vae")
    return {
        "weights": str(folder / "weights.pt"),
        "checkout": str(folder),
        "model": "DiT-T/2",
        "vae": str(folder / "vae"),
        "image_size": 128,
    }


def checkpoint(given, dtype=torch.float32, **arguments):
    given = {**given, **arguments}
    return load(given.pop("weights"), device="cpu", dtype=dtype, arguments=given)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_checkpoint_of_dit(method, guidance, checkout):
    sampler = checkpoint(checkout, method=method, guidance=guidance)
    assert sampler.num_steps == {"ddim": 50, "ddpm": 250}[method]
    assert sampler.timesteps(STEPS) == [999, 666, 333, 0]
    before = torch.get_rng_state()
    drawn = check_alone(sampler, requests(1, 4, 12))
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.shape == (3, 3, 16, 16)
    assert 0 <= drawn.min() < drawn.max() <= 1
    settings = {"num_steps": STEPS, "timesteps": sampler.timesteps(STEPS)}
    with toca.enabled(sampler.target, toca.ToCaConfig(), **settings) as session:
        cached = check_alone(sampler, requests(1, 4, 12))
        assert session.summary().cached_steps > 0
        assert session.summary().modulation_bytes > 0
    assert not torch.equal(cached, drawn)


def test_a_checkpoint_is_sampled_as_its_own_loop_does(checkout):
    sampler = checkpoint(checkout, guidance=4.0)
    sys.path.insert(0, checkout["checkout"])
    from diffusion import create_diffusion  # of the stand-in

    for name in [name for name in sys.modules if name.split(".")[0] == "diffusion"]:
        del sys.modules[name]
    z = noise(3, [5], (4, 16, 16))
    y = torch.tensor([5, 1000])
    want = create_diffusion("4").ddim_sample_loop(
        sampler.target.forward_with_cfg,
        (2, 4, 16, 16),
        torch.cat([z, z]),
        clip_denoised=False,
        model_kwargs={"y": y, "cfg_scale": 4.0},
        progress=False,
        device="cpu",
    )
    assert torch.equal(sampler.latents([Request(5, 5)], seed=3, steps=4), want[:1])


def test_a_checkpoint_in_bfloat16(checkout):
    exact, coarse = (checkpoint(checkout, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert next(coarse.target.parameters()).dtype == torch.bfloat16
    have, want = (one.latents(requests(1, 4), seed=0, steps=STEPS) for one in (coarse, exact))
    assert have.dtype == torch.float32
    assert 1e-5 < (have - want).norm() / want.norm() < 0.05
    settings = {"num_steps": STEPS, "timesteps": coarse.timesteps(STEPS)}
    with toca.enabled(coarse.target, toca.ToCaConfig(), **settings) as session:
        cached = coarse.latents(requests(1, 4), seed=0, steps=STEPS)
        assert session.summary().modulation_bytes > 0
    assert 0 < (cached - have).norm() / have.norm() < 0.5


def test_modules_of_the_same_name_are_left_alone(checkout):
    """The checkout has a `models`, and so have these tests."""
    checkpoint(checkout)
    assert sys.modules["models"] is models
    assert "diffusion" not in sys.modules
    assert checkout["checkout"] not in sys.path


def test_checkpoints_that_do_not_fit_are_refused(checkout, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    (tmp_path / "models.py").touch()
    for change, error, words in (
        ({"checkout": str(tmp_path)}, ValueError, "expected a clone of facebookresearch/DiT"),
        ({"model": "DiT-XL/2"}, ValueError, "expected one of DiT-T/2"),
        ({"method": "euler"}, ValueError, "expected one of ddim, ddpm"),
        ({"weights": str(tmp_path / "other.pt")}, ValueError, "the weights of this model"),
        ({"weights": str(tmp_path / "nothing.pt")}, OSError, "no such file"),
        ({"size": 3}, ValueError, "unexpected keyword argument 'size'"),
    ):
        with pytest.raises(error, match=words):
            checkpoint(checkout, **change)
    with pytest.raises(ValueError, match="missing a required argument: 'checkout'"):
        loaded(checkout["weights"])
    sampler = checkpoint(checkout, vae=None)
    assert sampler.latents(requests(0), seed=0, steps=2).shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match="expected an autoencoder"):
        sampler.sample(requests(0), seed=0, steps=2)
    with pytest.raises(ValueError, match="expected classes from 0 to 999"):
        sampler.latents([Request(0, 1000)], seed=0, steps=2)
