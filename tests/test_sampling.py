"""Samples by number: noise of each one's own, digits, and pipelines."""

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models
import toca_kernels as toca
from pipelines import PIPELINES, TEXT, tiny_decoder
from published import noise as fixed_noise
from toca_kernels.apps.sampling import LatentSampler, Request, Sampler, noise
from toca_kernels.apps.sampling.generators import generators, seed_of
from toca_kernels.apps.sampling.loading import load
from toca_kernels.apps.sampling.own_noise import OuterCall, OwnNoise
from toca_kernels.apps.sampling.pipeline_sampler import PipelineSampler
from toca_kernels.apps.sampling.weights import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own
DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "sampler.py"
STEPS = 4
ROUNDING = {"atol": 2e-5, "rtol": 0}  # of matrices of another shape, after a run


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def requests(*indices: int, classes: int = 10) -> list[Request]:
    return [Request(index, index % classes) for index in indices]


def check_alone(sampler: Sampler, wanted: list[Request], draw: str = "sample") -> Tensor:
    """Each sample depends on its own request only: not on the batch, nor on its place in it."""
    call = getattr(sampler, draw)
    together = call(wanted, seed=3, steps=STEPS)
    assert len(together) == len(wanted)
    backwards = call(wanted[::-1], seed=3, steps=STEPS)
    torch.testing.assert_close(backwards.flip(0), together, **ROUNDING)
    for row, request in zip(together, wanted, strict=True):
        alone = call([request], seed=3, steps=STEPS)
        torch.testing.assert_close(alone[0], row, **ROUNDING)
    assert torch.equal(call(wanted, seed=3, steps=STEPS), together)
    assert not torch.allclose(call(wanted, seed=4, steps=STEPS), together, atol=1e-2)
    return together


# --- noise ---------------------------------------------------------------------------------------


def test_noise_comes_from_seed_and_index_alone():
    drawn = noise(7, [5, 0, 9], (4, 8))
    assert drawn.shape == (3, 4, 8)
    assert torch.equal(noise(7, [9], (4, 8))[0], drawn[2])
    assert not torch.equal(noise(8, [9], (4, 8))[0], drawn[2])
    assert torch.equal(drawn[1], torch.randn(4, 8, generator=generators(7, [0])[0]))
    torch.manual_seed(1)
    assert torch.equal(noise(7, [5, 0, 9], (4, 8)), drawn)
    assert noise(7, [], (4, 8)).shape == (0, 4, 8)
    assert noise(7, [0], (4,), dtype=torch.bfloat16).dtype == torch.bfloat16
    many = noise(0, range(1000), (64,))
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02
    assert abs((many[1:] * many[:-1]).mean()) < 0.02  # neighbours have nothing in common


def test_no_two_samples_of_a_seed_share_their_noise():
    """torch reads 32 bits of a seed; 200,000 hashes would repeat in them."""
    low, high = (torch.Generator().manual_seed(one) for one in (5, 5 + 2**32))
    assert torch.equal(torch.randn(9, generator=low), torch.randn(9, generator=high))
    for seed in (0, 1, 2**40):
        assert len({seed_of(seed, index) % 2**32 for index in range(200_000)}) == 200_000
    assert seed_of(0, 1) != seed_of(1, 0)


@pytest.mark.parametrize(("name", "arguments"), [("seed", (-1, 0)), ("index", (0, -1))])
def test_numbers_below_zero_are_refused(name, arguments):
    with pytest.raises(ValueError, match=f"{name}: expected a number >= 0"):
        seed_of(*arguments)


def test_draws_without_a_generator_are_each_samples_own():
    want = noise(0, [3, 8], (2, 5))
    for draw in (
        lambda: torch.randn(2, 2, 5),
        lambda: torch.randn((2, 2, 5)),
        lambda: torch.randn(size=(2, 2, 5)),
        lambda: torch.randn_like(torch.empty(2, 2, 5)),
    ):
        with OwnNoise(generators(0, [3, 8])):
            assert torch.equal(draw(), want)
    with OwnNoise(generators(0, [3, 8])):
        assert torch.randn(2, 3, dtype=torch.float64).dtype == torch.float64
        assert torch.randn_like(torch.empty(2, 3), dtype=torch.bfloat16).dtype == torch.bfloat16
        given = torch.Generator().manual_seed(1)
        assert torch.randn(3, generator=given).shape == (3,)  # another's
        with pytest.raises(ValueError, match="expected a multiple of 2 rows"):
            torch.randn(3, 5)


def test_the_halves_of_guidance_do_not_depend_on_the_batch():
    with OwnNoise(generators(0, [3, 8])):
        together = [torch.randn(4, 5) for _ in range(3)]
    with OwnNoise(generators(0, [8])):
        alone = [torch.randn(2, 5) for _ in range(3)]
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[[1, 3]], one)


def test_a_model_is_called_outside_of_the_mode():
    mode = OwnNoise(generators(0, [0, 1]))
    with mode:
        assert OuterCall(mode, lambda: torch.randn(3, 5))().shape == (3, 5)
        with pytest.raises(ZeroDivisionError):
            OuterCall(mode, lambda: 1 / 0)()
        with pytest.raises(ValueError, match="expected a multiple of 2 rows"):
            torch.randn(3, 5)


def test_fingerprints_tell_weights_apart():
    one, other = torch.nn.Linear(300, 40), torch.nn.Linear(300, 40)
    other.load_state_dict(one.state_dict())
    mark = fingerprint(one)
    assert fingerprint(other) == mark
    with torch.no_grad():
        other.weight.mul_(1.001)
    assert fingerprint(other) != mark
    assert fingerprint(one.double()) != mark
    pipe = PIPELINES["dit"]()
    mark = fingerprint(pipe)
    assert fingerprint(PIPELINES["dit"]()) == mark
    next(pipe.vae.parameters()).add_(1)
    assert fingerprint(pipe) != mark


# --- digits --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Sampler:
    for name in ("diffusers", "sklearn", "tqdm", "safetensors"):
        pytest.importorskip(name, reason="the digits example needs it")
    return load(str(DIGITS), device="cpu", dtype=torch.float32, arguments={})


def test_digits(digits):
    drawn = check_alone(digits, requests(4, 12))
    assert isinstance(digits, LatentSampler)
    assert digits.num_steps == 50
    assert drawn.shape == (2, 1, 32, 32)
    assert drawn.dtype == torch.float32
    assert drawn.min() == 0
    assert 0.9 < drawn.max() <= 1
    latents = digits.latents(requests(4, 12), seed=3, steps=STEPS)
    assert torch.equal((latents / 2 + 0.5).clamp(0, 1), drawn)


def test_digits_with_toca(digits):
    plain = digits.sample(requests(4, 12), seed=3, steps=STEPS)
    settings = {"num_steps": STEPS, "timesteps": digits.timesteps(STEPS)}
    with toca.enabled(digits.target, toca.ToCaConfig(), **settings) as session:
        cached = check_alone(digits, requests(4, 12))
        assert session.summary().cached_steps > 0
        assert session.summary().modulation_bytes > 0  # the timesteps are those of the loop
    assert 0 < (cached - plain).abs().mean() < 0.1


def test_digits_options(digits):
    other = load(str(DIGITS), device="cpu", dtype=torch.bfloat16, arguments={"guidance": 1.0})
    assert next(other.target.parameters()).dtype == torch.bfloat16
    images = [one.sample(requests(5), seed=0, steps=STEPS) for one in (digits, other)]
    assert (images[0] - images[1]).abs().max() > 0.05
    for wrong in (10, -1, "five"):
        with pytest.raises(ValueError, match="expected classes from 0 to 9"):
            digits.sample([Request(0, wrong)], seed=0, steps=STEPS)


# --- files in Python -----------------------------------------------------------------------------

OWN = """
    from dataclasses import dataclass
    import torch
    from beside_it import SIZE

    @dataclass
    class Own:
        target: object = None
        num_steps: int = 2
        def timesteps(self, steps):
            return None
        def sample(self, requests, *, seed, steps):
            return torch.full((len(requests), *SIZE), self.value)

    def sampler(*, device, dtype, value=0.5):
        made = Own(torch.nn.Linear(1, 1))
        made.value = value
        return made
"""


def write(path: Path, text: str) -> str:
    path.write_text(textwrap.dedent(text))
    return str(path)


def loaded(target: str, **arguments):
    return load(target, device="cpu", dtype=torch.float32, arguments=arguments)


def test_a_file_of_ones_own(tmp_path):
    write(tmp_path / "beside_it.py", "SIZE = (3, 4, 4)")
    path = write(tmp_path / "own.py", OWN)
    assert loaded(path, value=0.25).sample(requests(0, 1), seed=0, steps=1).eq(0.25).all()
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'size'; its sampler takes"):
        loaded(path, size=3)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (None, OSError, "no such file"),
        ("x = 1", ValueError, "expected a function sampler"),
        ("def sampler(*, device, dtype): return 3", ValueError, "got int"),
        ("import nothing_of_this_name", ValueError, "nothing_of_this_name"),
    ],
)
def test_a_file_that_makes_no_sampler_is_refused(text, error, words, tmp_path):
    path = tmp_path / "own.py"
    if text is not None:
        write(path, text)
    with pytest.raises(error, match=words):
        loaded(str(path))


# --- pipelines -----------------------------------------------------------------------------------

BETAS = {"beta_start": 1e-4, "beta_end": 2e-3}


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_a_pipeline_for_classes(scheduler):
    """Those that draw noise in every step do so for each sample; DiTPipeline gives no generator."""
    pipe = PIPELINES["dit"]()
    pipe.scheduler = getattr(models.diffusers(), scheduler)(**BETAS)
    sampler = PipelineSampler(pipe, {"guidance_scale": 4.0})
    assert sampler.num_steps == 50
    assert sampler.timesteps(STEPS) is None
    before = torch.get_rng_state()
    drawn = check_alone(sampler, requests(1, 4, 12))
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.shape == (3, 3, 16, 16)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    with toca.enabled(pipe, toca.ToCaConfig()) as session:
        cached = check_alone(sampler, requests(1, 4, 12))
        assert session.summary().cached_steps > 0
    assert not torch.equal(cached, drawn)
    assert torch.equal(sampler.sample(requests(1, 4, 12), seed=3, steps=STEPS), drawn)


class TextEncoder(torch.nn.Module):
    """What a pipeline asks of one whose `encode_prompt` is another's."""

    device, dtype = torch.device("cpu"), torch.float32


def prompted(name: str = "pixart_alpha"):
    """A pipeline with a stand-in for its text encoder: the embedding is the prompt's, by hash."""
    pipe = PIPELINES[name]()
    pipe.register_modules(text_encoder=TextEncoder())

    def encode(prompt, *args, **kwargs):
        rows = [fixed_noise(12, TEXT, seed=sum(map(ord, one))) for one in prompt]
        text, mask = torch.stack(rows), torch.ones(len(rows), 12)
        return text, mask, torch.zeros_like(text), mask

    pipe.encode_prompt = encode
    return pipe


def test_a_pipeline_for_prompts():
    arguments = {"height": 128, "width": 128, "use_resolution_binning": False}
    sampler = PipelineSampler(prompted(), arguments)
    wanted = [Request(2, "a ship"), Request(7, "two cats"), Request(8, "a ship")]
    latents = check_alone(sampler, wanted, draw="latents")
    assert latents.shape == (3, 4, 16, 16)
    assert not torch.allclose(latents[0], latents[2], atol=0.1)  # the same prompt, other noise
    with pytest.raises(ValueError, match="expected a decoder"):
        sampler.sample(wanted, seed=0, steps=STEPS)
    with pytest.raises(ValueError, match="expected prompts, got the class 3"):
        sampler.latents([Request(0, 3)], seed=0, steps=STEPS)


def test_pictures_of_a_pipeline_for_prompts():
    pipe = prompted()
    pipe.register_modules(**tiny_decoder())
    pipe.vae_scale_factor = 8
    arguments = {"height": 128, "width": 128, "use_resolution_binning": False}
    sampler = PipelineSampler(pipe, arguments)
    drawn = check_alone(sampler, [Request(2, "a ship"), Request(7, "two cats")])
    assert drawn.shape[:2] == (2, 3)
    assert drawn.dtype == torch.float32


def test_noise_that_is_nobodys_is_refused_for_a_batch():
    """What a scheduler draws from torch's own generator would depend on the other samples."""
    pipe = PIPELINES["dit"]()
    own = type(pipe.scheduler).step

    class Noisy(type(pipe.scheduler)):
        def step(self, output, t, sample, **kwargs):
            return own(self, output + 0.1 * torch.rand(output.shape), t, sample, **kwargs)

    pipe.scheduler = Noisy.from_config(pipe.scheduler.config)
    sampler = PipelineSampler(pipe, {})
    with pytest.raises(ValueError, match=r"draws from torch's own.* use a batch size of 1"):
        sampler.sample(requests(0, 1), seed=0, steps=STEPS)
    alone = [sampler.sample(requests(index), seed=0, steps=STEPS) for index in (0, 1, 0)]
    assert torch.equal(alone[0], alone[2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"generator": 1}, "generator: expected to be left out: every sample has its own"),
        ({"output_type": "pil"}, "output_type: expected to be left out"),
        ({"colour": 1}, "colour: DiTPipeline does not take it"),
    ],
)
def test_arguments_that_are_not_the_callers_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        PipelineSampler(PIPELINES["dit"](), arguments)


def test_conditions_that_do_not_fit_a_pipeline_are_refused():
    sampler = PipelineSampler(PIPELINES["dit"](), {})
    for wrong in (1000, "ship"):
        with pytest.raises(ValueError, match="expected classes from 0 to 999"):
            sampler.sample([Request(0, wrong)], seed=0, steps=STEPS)
    with pytest.raises(ValueError, match="expected one that returns latents"):
        sampler.latents(requests(0), seed=0, steps=STEPS)
    with pytest.raises(ValueError, match="expected a text encoder"):
        PipelineSampler(PIPELINES["pixart_alpha"](), {})


def test_a_saved_pipeline_is_loaded(tmp_path):
    PIPELINES["dit"]().save_pretrained(tmp_path)
    sampler = loaded(str(tmp_path), guidance_scale=1.0)
    assert sampler.sample(requests(3), seed=0, steps=2).shape == (1, 3, 16, 16)
