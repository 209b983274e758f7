"""TokenCache: what a run keeps, for which tokens, and what it hands out."""

import pytest
import torch

from toca_kernels.cache import TokenCache

L, B, N, C = 4, 2, 12, 5
SETTINGS = {"age_weight": 0.1, "grid": (3, 4), "cell": 1, "bonus": 0.0}


def made(**kwargs):
    return TokenCache(L, (B, N, C), torch.float32, torch.device("cpu"), **kwargs)


def filled(**kwargs):
    """A cache that a full step has gone through, with scores."""
    cache = made(**kwargs)
    for layer in range(L):
        cache.record_score(layer, torch.rand(B, N))
        cache.refreshed(layer)
    return cache


def best(score, k):
    """(rows, k) best tokens, ascending."""
    return score.argsort(dim=-1, descending=True)[..., :k].sort().values


def test_it_is_preallocated_for_one_kind_of_tokens():
    cache = made()
    assert cache.attn.shape == cache.mlp.shape == (L, B, N, C)
    assert cache.nbytes == 2 * L * B * N * C * 4
    x = torch.zeros(B, N, C)
    assert cache.fits(x)
    assert not cache.fits(x[:1])
    assert not cache.fits(x[:, :5])
    assert not cache.fits(x.bfloat16())
    assert not cache.fits(x.to("meta"))


def test_nothing_is_valid_before_it_is_written_or_after_it_is_forgotten():
    cache = made()
    assert cache.valid == [False] * L
    cache.refreshed(2)
    assert cache.valid == [False, False, True, False]
    cache.refreshed(0)
    cache.select([True] * L, [3] * L, **SETTINGS)
    cache.invalidate()
    assert cache.valid == [False] * L
    with pytest.raises(KeyError):
        cache.selection(0)


def test_scores_are_normalised_over_the_tokens():
    cache = made()
    score = torch.rand(B, N) * 100
    cache.record_score(1, score)
    assert torch.allclose(cache.score[1], score / score.norm(dim=1, keepdim=True))
    assert (cache.score[[0, 2, 3]] == 0).all()
    cache.record_score(2, torch.zeros(B, N))  # no division by zero
    assert (cache.score[2] == 0).all()


def test_halves_that_share_have_the_mean_score():
    cache = filled(share_halves=True)
    score = torch.rand(B, N)
    cache.record_score(0, score)
    mean = score.mean(dim=0)
    assert cache.score.shape == (L, 1, N)
    assert torch.allclose(cache.score[0, 0], mean / mean.norm())
    cache.select([True] * L, [4] * L, **SETTINGS)
    index, inverse = cache.selection(0)
    assert (index.shape, inverse.shape) == ((B, 4), (B, N))
    assert torch.equal(index[0], index[1])
    assert torch.equal(index[0], best(mean, 4))
    assert cache.recomputed().shape == (L, B, N)


def test_halves_of_an_odd_batch_are_refused():
    with pytest.raises(ValueError, match=r"share_cfg_selection: .* got 3 samples"):
        TokenCache(L, (3, N, C), torch.float32, torch.device("cpu"), share_halves=True)


@pytest.mark.parametrize(
    "cached",
    [
        [True, True, True, True],
        [False, True, True, True],  # the published code's layer 0
        [True, False, True, False],
        [False, False, False, True],
        [False, False, False, False],
    ],
)
def test_layers_that_are_cached_get_their_own_k_and_the_others_none(cached):
    cache = filled()
    k = [0, 3, 5, N]
    cache.select(cached, k, **SETTINGS)
    assert cache.nan == 0
    fresh = cache.recomputed()
    for layer in range(L):
        if not cached[layer]:
            assert fresh[layer].all()
            with pytest.raises(KeyError):
                cache.selection(layer)
            continue
        index, inverse = cache.selection(layer)
        assert torch.equal(index, best(cache.score[layer], k[layer]))
        rows = torch.arange(k[layer], dtype=torch.int32).expand(B, -1)
        assert torch.equal(inverse.gather(1, index), rows)
        assert ((inverse >= 0) == fresh[layer]).all()
        assert (fresh[layer].sum(dim=1) == k[layer]).all()


def test_a_selection_is_of_the_step_at_hand_only():
    cache = filled()
    cache.select([True] * L, [3] * L, **SETTINGS)
    cache.select([False, True, True, True], [N, 2, 2, 2], **SETTINGS)
    with pytest.raises(KeyError):
        cache.selection(0)
    assert cache.selection(1)[0].shape == (B, 2)
    assert cache.recomputed()[0].all()


def test_ages_grow_where_nothing_is_recomputed_and_a_full_layer_is_young():
    cache = filled()
    cache.select([True] * L, [0] * L, **SETTINGS)
    cache.select([True] * L, [2] * L, **SETTINGS)
    ages = torch.where(cache.recomputed(), 0, 2)
    assert torch.equal(cache.age, ages.int())
    cache.refreshed(1)
    cache.select([True, False, True, True], [0] * L, **SETTINGS)
    assert (cache.age[1] == 0).all()
    assert torch.equal(cache.age[0], ages[0] + 1)


def test_age_outweighs_the_score_in_the_end():
    """Each of the N tokens has its turn: least recently recomputed first."""
    cache = filled()
    seen = torch.zeros(L, B, N, dtype=torch.bool)
    for _ in range(3):
        cache.select([True] * L, [4] * L, **(SETTINGS | {"age_weight": 10.0}))
        seen |= cache.recomputed()
    assert seen.all()


def test_nan_scores_are_counted_where_they_are_read():
    cache = filled()
    broken = torch.rand(B, N)
    broken[1, 3] = torch.nan  # the norm over the tokens is NaN, and so is the whole row
    cache.record_score(2, broken)
    cache.select([True, True, False, True], [3] * L, **SETTINGS)
    assert cache.nan == 0
    cache.select([True] * L, [3] * L, **SETTINGS)
    assert cache.nan == N
    index, _ = cache.selection(2)
    assert 0 <= index.min() <= index.max() < N
    cache.invalidate()
    assert cache.nan == 0


def test_cells_larger_than_the_image():
    cache = TokenCache(1, (1, 1, C), torch.float32, torch.device("cpu"))
    cache.record_score(0, torch.ones(1, 1))
    cache.select([True], [1], age_weight=0.1, grid=(1, 1), cell=2, bonus=0.6)
    assert cache.recomputed().all()


def test_the_rest_is_small():
    """Scores, ages and selections beside the features; what a run holds is in test_memory.py."""
    cache = TokenCache(8, (2, 256, 256), torch.bfloat16, torch.device("cpu"))
    assert 0 < cache.other_nbytes < 0.05 * cache.nbytes
    before = cache.other_nbytes
    cache.select([True] * 8, [64] * 8, **(SETTINGS | {"grid": (16, 16)}))
    # int64 index and int32 inverse
    assert cache.other_nbytes == before + 8 * 2 * (64 * 8 + 256 * 4)
    assert cache.other_nbytes < 0.05 * cache.nbytes
