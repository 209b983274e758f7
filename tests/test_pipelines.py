"""The tiny models: offline, quick, repeatable, and such that no block of them is idle."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines import FROM_IMAGE, PIPELINES, TinyPipeline
from published import flux, noise, pixart, stdit, stdit3

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' own
STEPS = 4
STRENGTH = torch.tensor([[0.0, 0.6, 1.0], [1.0, 1.0, 0.0]])  # of the frames of two videos
MLPS = ("ff", "ffn", "img_mlp", "feed_forward", "proj_mlp")
STOCK = PIPELINES | {f"{name}_from_image": tiny for name, tiny in FROM_IMAGE.items()}


@pytest.fixture(params=STOCK)
def stock(request) -> TinyPipeline:
    return STOCK[request.param]


@pytest.fixture
def pipe(stock) -> Any:
    return stock()


def test_runs_and_repeats(stock, pipe):
    latents = stock.call(pipe, STEPS)
    assert latents.isfinite().all()
    assert latents.std() > 0.01
    assert torch.equal(stock.call(pipe, STEPS), latents)
    assert torch.equal(stock.call(stock(), STEPS), latents)
    assert not torch.equal(stock.call(pipe, STEPS, seed=1), latents)


def test_depends_on_the_mlp_of_every_block(stock, pipe):
    latents = stock.call(pipe, STEPS)
    for block in stock.blocks_of(pipe):
        kept = {name: value.clone() for name, value in block.state_dict().items()}
        silence(block)
        change = (stock.call(pipe, STEPS) - latents).norm() / latents.norm()
        assert change > 1e-3, f"{type(block).__name__}: {change:.2g}"
        block.load_state_dict(kept)
    assert torch.equal(stock.call(pipe, STEPS), latents)


def silence(block: nn.Module) -> None:
    """Zeroes the image's MLP."""
    found = [child for name, child in block.named_children() if name in MLPS]
    if not found:
        found = [block.attn.to_out]  # FLUX.2's single stream: the MLP and the attention share it
    for module in found:
        for parameter in module.parameters():
            parameter.zero_()


def test_blocks_are_as_described(stock, pipe):
    kinds = [type(block).__name__ for block in stock.blocks_of(pipe)]
    assert all(kinds.count(kind) >= 2 * len(stock.transformers) for kind in stock.blocks)
    assert {*kinds} == {*stock.blocks}


def test_tokens_are_as_described(stock, pipe):
    """Every block sees the image's tokens, alone, beside the text's or joined with them."""
    seen: list[int] = []

    def record(block: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden.shape[0] * hidden.shape[1])

    for block in stock.blocks_of(pipe):
        block.register_forward_pre_hook(record, with_kwargs=True)
    stock.call(pipe, 2, **({"class_labels": [3]} if "class_labels" in stock.prompt() else {}))
    batch = len(stock.calls[0])
    assert {*seen} <= {batch * stock.tokens, batch * (stock.tokens + stock.text)}


def test_guidance_calls_are_as_described(stock, pipe):
    calls: list[tuple[int, tuple[str, ...]]] = []
    for index, model in enumerate(stock.models(pipe)):
        model.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: calls.append(
                (index, branches(stock.prompt(), [*args, *kwargs.values()]))
            ),
            with_kwargs=True,
        )
    stock.call(pipe, STEPS, **({"class_labels": [3]} if "class_labels" in stock.prompt() else {}))
    assert [branch for _, branch in calls] == [*stock.calls] * STEPS
    assert {index for index, _ in calls} == {*range(len(stock.transformers))}


def branches(prompt: dict[str, Any], arguments: list[Any]) -> tuple[str, ...]:
    """Which prompt each row of a call's text is."""
    if "class_labels" in prompt:
        texts = {"cond": torch.tensor(3), "uncond": torch.tensor(1000)}
    else:
        texts = {"cond": prompt["prompt_embeds"][0]}
        if "negative_prompt_embeds" in prompt:
            texts["uncond"] = prompt["negative_prompt_embeds"][0]
    for argument in arguments:
        if isinstance(argument, Tensor | list):
            rows = [*argument] if isinstance(argument, list) or argument.ndim else []
            names = [
                name
                for row in rows
                for name, text in texts.items()
                if torch.equal(row.reshape(-1), text.reshape(-1))
            ]
            if names and len(names) == len(rows):
                return (*names,)
    raise AssertionError("the text is in none of the arguments")


# --- models of the structure of published repositories -------------------------------------------

PUBLISHED = {
    "pixart": (pixart.tiny, pixart.sample),
    "pixart_multi_scale": (functools.partial(pixart.tiny, multi_scale=True), pixart.sample),
    "stdit": (stdit.tiny, stdit.sample),
    "stdit3": (stdit3.tiny, stdit3.sample),
    "stdit3_given_frames": (stdit3.tiny, functools.partial(stdit3.sample, strength=STRENGTH)),
    "flux": (flux.tiny, flux.sample),
}


@pytest.fixture(params=PUBLISHED)
def published(request):
    make, sample = PUBLISHED[request.param]
    return make(), sample


def test_published_runs_and_repeats(published):
    model, sample = published
    latents = sample(model, STEPS)
    assert latents.isfinite().all()
    assert latents.std() > 0.01
    assert torch.equal(sample(copy.deepcopy(model), STEPS), latents)
    assert not torch.equal(sample(model, STEPS, seed=1), latents)


def test_published_depends_on_every_module_of_every_block(published):
    """Also on what the image's tokens take from the text; not on what the last text MLP makes."""
    model, sample = published
    latents = sample(model, STEPS)
    for name, module in model.named_modules():
        if name.endswith((".proj", ".mlp.fc2", "_mlp.2", ".linear2", ".kv_linear", ".attn_temp")):
            kept = {key: value.clone() for key, value in module.state_dict().items()}
            for parameter in module.parameters():
                parameter.zero_()
            change = (sample(model, STEPS) - latents).norm() / latents.norm()
            assert change > 1e-3, f"{name}: {change:.2g}"
            module.load_state_dict(kept)


@pytest.mark.parametrize("module", [pixart, stdit, stdit3])
def test_text_of_one_sample_is_not_seen_by_another(module):
    """Packed text: y_lens says whose a token is."""
    model = module.tiny()
    block = next(child for child in model.children() if isinstance(child, nn.ModuleList))[0]
    x, y = noise(2, 48, 48, seed=1), noise(1, 9, 48, seed=2)
    changed = y.clone()
    changed[:, 3:] = 0
    before, after = (block.cross_attn(x, text, [3, 6]) for text in (y, changed))
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_frames_that_are_all_made_need_no_mask():
    model = stdit3.tiny()
    made = stdit3.sample(model, STEPS, strength=torch.ones(2, 3))
    assert torch.allclose(made, stdit3.sample(model, STEPS), atol=1e-5)


def test_given_frames_stay_as_they_are():
    latents = stdit3.sample(stdit3.tiny(), STEPS, strength=STRENGTH)
    given = noise(*latents.shape, seed=0)
    same = (latents == given).flatten(3).all(dim=3).all(dim=1)
    assert torch.equal(same, STRENGTH == 0)
