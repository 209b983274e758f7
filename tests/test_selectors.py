"""The selectors: the registry, and each one's scores against its formula."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from toca_kernels import config
from toca_kernels.selectors import SELECTORS, AttentionCall

B, H, N, D, L = 2, 3, 7, 8, 5


def test_a_config_knows_them_all():
    assert tuple(SELECTORS) == get_args(config.Selector)
    assert all(name == one.name for name, one in SELECTORS.items())


def call(mask=None, *, keys=N, batch=B, gqa=False):
    torch.manual_seed(0)
    heads = 1 if gqa else H
    q = torch.randn(B, H, N, D)
    k, v = torch.randn(2, batch, heads, keys, D)
    return AttentionCall(q, k, v, mask, 0.0, D**-0.5, gqa)


def masks():
    grown = torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(1)) > 0.3
    grown[..., 0] = True
    return {
        "none": None,
        "bool": grown,
        "float": torch.zeros(B, 1, N, N).masked_fill(~grown, -torch.inf),
        "heads": grown.repeat(1, H, 1, 1) | torch.eye(N, dtype=torch.bool),
    }


def weights(given):
    """(B, H, N, keys) in float64."""
    k = given.k.expand(B, -1, -1, -1).double()
    k = k.repeat_interleave(H // k.shape[1], dim=1)
    logits = given.q.double() @ k.mT * given.scale
    if given.mask is not None:
        mask = given.mask
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    return logits.softmax(dim=-1)


@pytest.mark.parametrize("mask", list(masks()))
@pytest.mark.parametrize("options", [{}, {"gqa": True}, {"batch": 1}])
def test_attention_is_what_a_key_receives(mask, options):
    given = call(masks()[mask], **options)
    out, score = SELECTORS["attention"].attend(given)
    assert torch.allclose(score.double(), weights(given).mean(dim=1).sum(dim=1), atol=1e-5)
    assert torch.allclose(out, given.out(), atol=1e-6)


def test_attention_of_an_explicit_map():
    p = weights(call())
    expected = p.mean(dim=1).sum(dim=1)
    assert torch.allclose(SELECTORS["attention"].of_map(p).double(), expected, atol=1e-6)
    of_heads = SELECTORS["attention"].of_map(p.flatten(0, 1))
    assert torch.allclose(of_heads.view(B, H, N).double().mean(dim=1), expected, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"batch": 1}, {"gqa": True}])
def test_entropy_of_each_query(options):
    given = call(keys=L, **options)
    _, score = SELECTORS["entropy"].attend(given)
    p = weights(given).mean(dim=1)
    assert torch.allclose(score.double(), -(p * (p + 1e-7).log()).sum(dim=-1), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"batch": 1}])
def test_norm_ranks_small_values_high(options):
    given = call(**options)
    _, score = SELECTORS["norm"].attend(given)
    length = given.v.expand(B, -1, -1, -1).double().norm(dim=-1).sum(dim=1)
    assert torch.allclose(score.double(), length.max(dim=1, keepdim=True).values - length)


def test_similarity_of_what_a_module_returned():
    old, new = torch.randn(2, B, N, D, generator=torch.Generator().manual_seed(0))
    new[:, 0] = 2 * old[:, 0]
    score = SELECTORS["similarity"].changed(new, old)
    assert torch.allclose(score, 1 - F.cosine_similarity(new, old, dim=2))
    assert torch.allclose(score[:, 0], torch.zeros(B), atol=1e-6)


def test_random_is_drawn_from_its_generator():
    first, again = torch.empty(2, 2, 3, 100)
    for score in (first, again):
        SELECTORS["random"].draw(score, torch.Generator().manual_seed(7))
    assert torch.equal(first, again)
    assert 0 <= first.min() < 0.1 < 0.9 < first.max() < 1


def test_what_a_selector_does_not_offer():
    mask = SELECTORS["mask"]
    assert SELECTORS["norm"].of_map(torch.rand(B, H, N, N)) is None
    for wrong in (
        lambda: mask.attend(call()),
        lambda: mask.changed(torch.rand(1, 2, 3), torch.rand(1, 2, 3)),
        lambda: mask.draw(torch.rand(3), torch.Generator()),
    ):
        with pytest.raises(NotImplementedError):
            wrong()
    assert [name for name, one in SELECTORS.items() if one.left_by_full_steps] == [
        "attention",
        "entropy",
        "norm",
        "similarity",
    ]
