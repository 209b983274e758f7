"""partial_mlp: gather, MLP and scatter as the one step that a block takes."""

import re

import pytest
import torch
from torch import nn

from toca_kernels import gather_modulate, mlp_rows, partial_mlp, scatter_residual, select_tokens
from toca_kernels.native import PackedLinear, packing_unavailable
from tolerance import assert_same_bits

B, N, C, F = 2, 13, 16, 24


class Block:
    """The tensors of a cached step."""

    def __init__(self, k, dtype=torch.float32):
        def random(*shape):
            return torch.randn(*shape).to(dtype)

        self.x, self.cache = random(B, N, C), random(B, N, C)
        self.shift, self.scale, self.gate, gate_a = random(B, 4 * C).chunk(4, dim=1)
        self.residual = (gate_a, random(B, N, C))
        self.fc1 = random(F, C) / C**0.5, random(F)
        self.fc2 = random(C, F) / F**0.5, random(C)
        age = torch.zeros(B, N, dtype=torch.int32)
        self.selection = select_tokens(torch.rand(B, N), age, k).rows(0, B)

    def step(self, **options):
        """(result, the MLP's cache afterwards) on copies of x and of the cache."""
        given = {
            "x": self.x.clone(),
            "selection": self.selection,
            "modulation": (self.shift, self.scale, self.gate),
            "cache": self.cache.clone(),
            "fc1": self.fc1,
            "fc2": self.fc2,
            "residual": self.residual,
        } | options
        return partial_mlp(**given), given["cache"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_tokens_equal_the_dense_block(dtype, backend):
    """k = N is the block without a cache: attention's residual, then the MLP's, over all tokens."""
    block = Block(N, dtype)
    gate_a, attn = block.residual
    rows = gather_modulate(
        block.x, None, block.shift, block.scale, residual=block.residual, backend=backend
    )
    mlp = mlp_rows(rows, block.fc1, block.fc2, backend=backend)
    dense = scatter_residual(block.x, [(gate_a, attn), (block.gate, mlp)], backend=backend)
    result, cache = block.step(backend=backend)
    assert_same_bits(cache, mlp)
    assert_same_bits(result, dense)


def test_matches_plain_torch(backend):
    block = Block(5)
    (index, _), (gate_a, attn) = block.selection, block.residual
    hidden = block.x + gate_a[:, None] * attn
    normal = nn.functional.layer_norm(hidden, (C,), eps=1e-6)
    rows = normal * (1 + block.scale[:, None]) + block.shift[:, None]
    mlp = nn.functional.linear(
        nn.functional.gelu(nn.functional.linear(rows, *block.fc1), approximate="tanh"), *block.fc2
    )
    place = index[:, :, None].expand(-1, -1, C)
    want_cache = block.cache.scatter(1, place, mlp.gather(1, place))
    result, cache = block.step(backend=backend)
    torch.testing.assert_close(cache, want_cache)
    torch.testing.assert_close(result, hidden + block.gate[:, None] * want_cache)


def test_no_token_reuses_the_cache_whole(backend):
    block = Block(0)
    result, cache = block.step(backend=backend)
    assert_same_bits(cache, block.cache)
    want = scatter_residual(block.x, [block.residual, (block.gate, block.cache)], backend=backend)
    assert_same_bits(result, want)


@pytest.mark.parametrize("k", [0, 5, N])
def test_inplace_writes_the_same_into_x(k, backend):
    block = Block(k)
    want, want_cache = block.step(backend=backend)
    x = block.x.clone()
    result, cache = block.step(x=x, inplace=True, backend=backend)
    assert result is x
    assert_same_bits(x, want)
    assert_same_bits(cache, want_cache)


def test_options_reach_the_norm_and_the_mlp(backend):
    block = Block(5)
    norm = {"norm": "rms", "weight": torch.randn(C), "bias": torch.randn(C), "eps": 0.1}
    index, inverse = block.selection
    rows = gather_modulate(block.x, index, block.shift, block.scale, **norm, backend=backend)
    fresh = mlp_rows(rows, block.fc1, block.fc2, activation="silu", backend=backend)
    want_cache = block.cache.clone()
    want = scatter_residual(block.x, [(block.gate, want_cache, fresh, inverse)], backend=backend)
    result, cache = block.step(**norm, activation="silu", residual=None, backend=backend)
    assert_same_bits(result, want)
    assert_same_bits(cache, want_cache)


def test_packed_linears():
    reason = packing_unavailable(torch.float32, torch.device("cpu"))
    if reason:
        pytest.skip(f"no prepacked linear: {reason}")
    block = Block(5)
    packed = PackedLinear(*block.fc1), PackedLinear(*block.fc2)
    index, inverse = block.selection
    rows = gather_modulate(block.x, index, block.shift, block.scale, residual=block.residual)
    want_cache = block.cache.clone()
    update = (block.gate, want_cache, mlp_rows(rows, *packed), inverse)
    want = scatter_residual(block.x, [block.residual, update])
    result, cache = block.step(fc1=packed[0], fc2=packed[1])
    assert_same_bits(result, want)
    assert_same_bits(cache, want_cache)


def test_tokens_that_were_not_selected_keep_their_cache(isa):
    block = Block(5, torch.bfloat16)
    _, cache = block.step(backend="native")
    kept = block.selection[1] < 0
    assert_same_bits(cache[kept], block.cache[kept])


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        pytest.param(
            "selection",
            lambda block: (block.selection[0][0], block.selection[1]),
            "index: expected shape (B, k), got (5)",
            id="rank-of-index",
        ),
        pytest.param(
            "selection",
            lambda block: (block.selection[0] + N, block.selection[1]),
            "index: expected values in [0, 13), got",
            id="index-out-of-range",
        ),
        pytest.param(
            "selection",
            lambda block: (block.selection[0], block.selection[1] + 5),
            "inverse: expected values in [-1, 5), got",
            id="slot-out-of-range",
        ),
        pytest.param(
            "modulation",
            lambda block: (block.shift, block.scale, block.gate[:, 1:]),
            "gate: expected shape (2, 16), got (2, 15)",
            id="shape-of-gate",
        ),
        pytest.param(
            "residual", lambda _: (None, None), "expected a tensor, got NoneType", id="no-residual"
        ),
        pytest.param(
            "fc2",
            lambda block: (block.fc2[0], block.fc1[1]),
            "fc2 bias: expected shape (16), got (24)",
            id="shape-of-bias",
        ),
        pytest.param(
            "cache",
            lambda block: block.cache[:, :-1],
            "cache: expected shape (2, 13, 16), got (2, 12, 16)",
            id="shape-of-cache",
        ),
        pytest.param(
            "activation", lambda _: "relu", "activation: expected one of", id="unknown-activation"
        ),
        pytest.param("norm", lambda _: "batch", "norm: expected one of", id="unknown-norm"),
    ],
)
def test_refuses_and_changes_nothing(name, wrong, message, backend):
    block = Block(5)
    kept = [tensor.clone() for tensor in (block.x, block.cache, block.residual[1])]
    given = {"x": block.x, "cache": block.cache, name: wrong(block)}
    with pytest.raises(ValueError, match=re.escape(message)):
        block.step(**given, inplace=True, backend=backend)
    for tensor, before in zip((block.x, block.cache, block.residual[1]), kept, strict=True):
        assert_same_bits(tensor, before)
