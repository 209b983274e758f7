"""TokenCache: what a run keeps, for which tokens, and what it hands out."""

import pytest
import torch

from toca_kernels.cache import TokenCache
from toca_kernels.track import Layout, Track, rank, tensors

L, B, N, C = 4, 2, 12, 5
CPU = torch.device("cpu")
LAYOUT = Layout((B, N, C), torch.float32, CPU)
SETTINGS = {"age_weight": 0.1, "grid": (3, 4), "cell": 1, "bonus": 0.0}


def filled(**kwargs):
    """A track that a full step has gone through, with scores."""
    track = Track("mlp", L, **kwargs)
    for layer in range(L):
        track.hold(layer, LAYOUT)
        rank(track.score[layer], [torch.rand(B, N)], 0.0)
    track.young([True] * L)
    return track


def best(score, k):
    """(rows, k) best tokens, ascending."""
    return score.argsort(dim=-1, descending=True)[..., :k].sort().values


def test_buffers_are_made_once_for_one_kind_of_tokens():
    cache = TokenCache({"attn": L, "mlp": L}, CPU, selecting=["mlp"])
    assert cache.layout == {}
    assert cache.nbytes == 0
    cache.see({"attn": [LAYOUT] * L, "mlp": [LAYOUT] * L})
    cache.hold()
    assert cache.layout == {"attn": [LAYOUT] * L, "mlp": [LAYOUT] * L}
    assert cache.nbytes == 2 * L * B * N * C * 4
    first = cache.tracks["mlp"].features[0]
    assert cache.tracks["mlp"].hold(0, LAYOUT) is first
    assert cache.tracks["mlp"].score.shape == cache.tracks["mlp"].age.shape == (L, B, N)
    assert cache.tracks["attn"].age.numel() == 0  # nothing selects there


@pytest.mark.parametrize(("name", "dtype"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_eight_bits_and_a_scale_for_each_token(name, dtype):
    cache = TokenCache({"mlp": L}, CPU, cache_dtype=name)
    cache.see({"mlp": [LAYOUT] * L})
    cache.hold()
    values, scale = tensors(cache.tracks["mlp"].features[0])
    assert (values.dtype, values.shape) == (dtype, (B, N, C))
    assert (scale.dtype, scale.shape) == (torch.float32, (B, N))
    assert cache.nbytes == L * B * N * (C + 4)


def test_nothing_is_valid_before_it_is_written_or_after_it_is_forgotten():
    cache = TokenCache({"mlp": L}, CPU, selecting=["mlp"])
    cache.see({"mlp": [LAYOUT] * L})
    cache.hold()
    track = cache.tracks["mlp"]
    assert not cache.valid
    track.valid = [True] * L
    assert cache.valid
    track.select([True] * L, [3] * L, **SETTINGS)
    cache.invalidate()
    assert not cache.valid
    with pytest.raises(KeyError):
        track.selection(0)


def test_scores_are_normalised_over_the_tokens():
    into = torch.zeros(B, N)
    score = torch.rand(B, N) * 100
    rank(into, [score], 0.0)
    assert torch.allclose(into, score / score.norm(dim=1, keepdim=True))
    rank(into, [torch.zeros(B, N)], 0.0)  # no division by zero
    assert (into == 0).all()


def test_halves_that_share_have_the_mean_score():
    track = filled(shared=True)
    score = torch.rand(B, N)
    rank(track.score[0], [score], 0.0)
    mean = score.mean(dim=0)
    assert track.score.shape == (L, 1, N)
    assert torch.allclose(track.score[0, 0], mean / mean.norm())
    track.select([True] * L, [4] * L, **SETTINGS)
    index, inverse = track.selection(0)
    assert (index.shape, inverse.shape) == ((B, 4), (B, N))
    assert torch.equal(index[0], index[1])
    assert torch.equal(index[0], best(mean, 4))
    assert track.recomputed().shape == (L, B, N)


def test_an_odd_batch_has_no_halves():
    track = Track("mlp", L, shared=True)
    track.hold(0, Layout((3, N, C), torch.float32, CPU))
    assert (track.halves, track.rows) == (1, 3)


def test_branches_that_share_have_the_mean_score():
    track, other = filled(), torch.rand(L, B, N)
    rank(track.score, [track.scores, other], 0.5)
    mean = (track.scores + other) / 2 + 0.5
    assert torch.allclose(track.score, mean / mean.norm(dim=-1, keepdim=True))


def test_halves_that_part_go_on_with_the_age_of_both():
    track = filled(shared=True)
    track.select([True] * L, [4] * L, **SETTINGS)
    age = track.age.clone()
    track.part()
    assert (track.halves, track.rows) == (1, B)
    assert torch.equal(track.age, age.repeat(1, 2, 1))


@pytest.mark.parametrize("shared", [False, True])
def test_a_forecast_measures_from_where_tokens_were_computed(shared):
    track = filled(forecast=1, shared=shared)
    assert track.at(0).computed == 0
    track.ran([True] * L)
    assert track.at(0).computed == 2
    for steps in (1, 2):
        track.measure()
        assert (track.distance == steps).all()
        track.grow([False] * L)
    track.measure()
    track.select([True, True, True, False], [4] * L, **SETTINGS)
    assert (track.distance == 3).all()
    track.measure()
    fresh = track.selection(0)[1] >= 0
    assert torch.equal(track.distance[0], torch.where(fresh, 1.0, 4.0))
    track.invalidate()
    assert track.at(0).computed == 0


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
    nan = cache.select(cached, k, **SETTINGS)
    assert nan == 0
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
    cache.forget_selection()
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
    cache.young([False, True, False, False])
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
    track = filled()
    broken = torch.rand(B, N)
    broken[1, 3] = torch.nan  # the norm over the tokens is NaN, and so is the whole row
    rank(track.score[2], [broken], 0.0)
    assert track.select([True, True, False, True], [3] * L, **SETTINGS) == 0
    assert track.select([True] * L, [3] * L, **SETTINGS) == N
    index, _ = track.selection(2)
    assert 0 <= index.min() <= index.max() < N


def test_cells_larger_than_the_image():
    track = Track("mlp", 1)
    track.hold(0, Layout((1, 1, C), torch.float32, CPU))
    rank(track.score[0], [torch.ones(1, 1)], 0.0)
    track.select([True], [1], age_weight=0.1, grid=(1, 1), cell=2, bonus=0.6)
    assert track.recomputed().all()


def test_the_rest_is_small():
    """Scores, ages and selections beside the features; what a run holds is in test_memory.py."""
    cache = TokenCache({"attn": 8, "mlp": 8}, CPU, selecting=["mlp"])
    layout = Layout((2, 256, 256), torch.bfloat16, CPU)
    cache.see({"attn": [layout] * 8, "mlp": [layout] * 8})
    cache.hold()
    assert 0 < cache.other_nbytes < 0.05 * cache.nbytes
    before = cache.other_nbytes
    cache.tracks["mlp"].select([True] * 8, [64] * 8, **(SETTINGS | {"grid": (16, 16)}))
    # int64 index and int32 inverse
    assert cache.other_nbytes == before + 8 * 2 * (64 * 8 + 256 * 4)
    assert cache.other_nbytes < 0.05 * cache.nbytes


@pytest.mark.parametrize(("cache_dtype", "most"), [(None, 3.02), ("int8", 1.52)])
def test_caches_of_flux_at_1024(cache_dtype, most):
    """GiB of its 19 double and 38 single stream blocks, 4096 + 512 tokens, in bfloat16."""
    image, text = ((1, n, 3072) for n in (4096, 512))
    layout = {
        **{f"img_{m}": [Layout(image, torch.bfloat16, torch.device("meta"))] * 19 for m in KINDS},
        **{f"txt_{m}": [Layout(text, torch.bfloat16, torch.device("meta"))] * 19 for m in KINDS},
    }
    joint = Layout((1, 4608, 3072), torch.bfloat16, torch.device("meta"))
    layout |= {f"single_{m}": [joint] * 38 for m in KINDS}
    counts = {name: len(layers) for name, layers in layout.items()}
    cache = TokenCache(counts, torch.device("meta"), cache_dtype=cache_dtype)
    cache.see(layout)
    cache.hold()
    assert most - 0.05 < cache.nbytes / 2**30 < most


KINDS = ("attn", "mlp")
