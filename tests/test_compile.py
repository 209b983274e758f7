"""Every op under torch.library.opcheck and in a full graph of torch.compile, mutation included."""

import pytest
import torch

import toca_kernels as toca
from dit import random_dit
from models import sample, tiny_transformer
from toca_kernels.native import PackedLinear, packing_unavailable
from tolerance import assert_same_bits

B, N, C, k = 2, 9, 8, 3


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def selected():
    return toca.select_tokens(
        torch.rand(B, N), torch.zeros(B, N, dtype=torch.int32), k, backend="reference"
    ).rows(0, B)


def random(*shape):
    return torch.randn(*shape)


def update_lists():
    """gates, caches, fresh, inverse: one cached module, one that is refreshed."""
    _, inverse = selected()
    return (
        [random(B, C), None],
        [random(B, N, C), random(B, N, C)],
        [None, random(B, k, C)],
        [None, inverse],
    )


# The arguments of an op as it is registered, without the backend.
REGISTERED = {
    "attention_scores": lambda: (*random(2, B, 2, N, C), random(B, 2, N), 0.3),
    "select_tokens": lambda: (
        random(B, N),
        torch.zeros(B, N, dtype=torch.int32),
        [3, 4],
        0.1,
        (1, 3, 3),
        2,
        0.5,
    ),
    "gather_modulate": lambda: (
        random(B, N, C),
        selected()[0],
        *random(3, B, C),
        random(B, N, C),
        random(C),
        random(C),
        "layer",
        1e-6,
    ),
    "mlp_rows": lambda: (random(B, k, C), random(16, C), random(16), random(C, 16), None, "silu"),
    "scatter_residual": lambda: (random(B, N, C), *update_lists()),
    "scatter_residual_": lambda: (random(B, N, C), *update_lists()),
}


@pytest.mark.parametrize("op", REGISTERED)
def test_opcheck(op, backend):
    """Schema (what is mutated), autograd registration, fake tensors, AOT dispatch."""
    torch.library.opcheck(getattr(torch.ops.toca, op).default, (*REGISTERED[op](), backend))


def attention(q, key, lse):
    return toca.attention_scores(q, key, lse, scale=0.3)


def select(score, age):
    chosen = toca.select_tokens(score, age, k, age_weight=0.1, grid=(3, 3), cell=2, bonus=0.5)
    return chosen.index, chosen.inverse, chosen.nan


def select_ragged(score, age):
    chosen = toca.select_tokens(score, age, (2, 4))
    return *chosen.rows(0, 1), *chosen.rows(1, 2)


def gather(x, index, shift, scale, gate, cache):
    return toca.gather_modulate(x, index, shift, scale, residual=(gate, cache))


def mlp(rows, weight1, bias1, weight2):
    return toca.mlp_rows(rows, (weight1, bias1), (weight2, None))


def scatter(x, gate, attn, cache, fresh, inverse):
    return toca.scatter_residual(x, [(gate, attn), (None, cache, fresh, inverse)])


def scatter_inplace(x, gate, attn, cache, fresh, inverse):
    return toca.scatter_residual(x, [(gate, attn), (None, cache, fresh, inverse)], inplace=True)


def step(score, age, x, modulation, attn, cache, weight1, bias1, weight2):
    """A cached step of a block; its ages, its cache and x change inside the graph."""
    selection = toca.select_tokens(score, age, k, age_weight=0.1).rows(0, B)
    *modulation, gate = modulation.chunk(4, dim=1)
    return toca.partial_mlp(
        x,
        selection,
        modulation,
        cache,
        (weight1, bias1),
        (weight2, None),
        residual=(gate, attn),
        inplace=True,
    )


def scatter_tensors():
    return (*random(1, B, N, C), random(B, C), *random(2, B, N, C), random(B, k, C), selected()[1])


def score_and_age():
    return random(B, N), torch.zeros(B, N, dtype=torch.int32)


WEIGHTS = ((16, C), (16,), (C, 16))

CALLS = {
    "attention_scores": (attention, lambda: (*random(2, B, 2, N, C), random(B, 2, N))),
    "select_tokens": (select, score_and_age),
    "select_tokens-ragged": (select_ragged, score_and_age),
    "gather_modulate": (
        gather,
        lambda: (
            random(B, N, C),
            selected()[0],
            *random(3, B, C),
            random(B, N, C),
        ),
    ),
    "mlp_rows": (mlp, lambda: (random(B, k, C), *(random(*shape) for shape in WEIGHTS))),
    "scatter_residual": (scatter, scatter_tensors),
    "scatter_residual-inplace": (scatter_inplace, scatter_tensors),
    "partial_mlp": (
        step,
        lambda: (
            *score_and_age(),
            random(B, N, C),
            random(B, 4 * C),
            *random(2, B, N, C),
            *(random(*shape) for shape in WEIGHTS),
        ),
    ),
}


def check_compiled(call, make, **options):
    """The same results, and the same tensors afterwards, as without the compiler."""
    given = make()
    copies = [tensor.clone() for tensor in given]
    want, have = call(*given), torch.compile(call, fullgraph=True, **options)(*copies)
    if isinstance(want, torch.Tensor):
        want, have = (want,), (have,)
    for compiled, eager in zip((*have, *copies), (*want, *given), strict=True):
        assert_same_bits(compiled, eager)


@pytest.mark.parametrize("name", CALLS)
def test_full_graph(name, backend, monkeypatch, request):
    if backend == "reference":
        request.getfixturevalue("without_native")
    check_compiled(*CALLS[name], backend="aot_eager")


@pytest.fixture
def without_native(monkeypatch):
    """What `backend=None` then chooses is the reference."""
    monkeypatch.setitem(toca._backends._DEVICES, "native", ())


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_full_graph_by_inductor(inference):
    with inference():
        check_compiled(*CALLS["partial_mlp"], backend="inductor")


def test_dynamic_sizes_need_one_graph():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(gather, fullgraph=True, dynamic=True, backend=backend)
    for samples, tokens, rows in ((2, 9, 3), (3, 17, 5), (4, 12, 6)):
        index = torch.randint(0, tokens, (samples, rows))
        x, cache = random(samples, tokens, C), random(samples, tokens, C)
        given = (x, index, *(random(samples, C) for _ in range(3)), cache)
        assert_same_bits(compiled(*given), gather(*given))
    assert len(graphs) == 1


def packed_mlp():
    reason = packing_unavailable(torch.float32, torch.device("cpu"))
    if reason:
        pytest.skip(f"no prepacked linear: {reason}")
    fc1, fc2 = PackedLinear(random(16, C), random(16)), PackedLinear(random(C, 16), None)
    return lambda rows: toca.mlp_rows(rows, fc1, fc2)


def test_full_graph_of_packed_linears():
    check_compiled(packed_mlp(), lambda: (random(B, k, C),), backend="aot_eager")


@pytest.mark.xfail(
    strict=False,
    reason="Inductor lowers mkldnn._linear_pointwise for weights that it packed itself only",
    raises=torch._inductor.exc.InductorError,
)
def test_inductor_graph_of_packed_linears():
    check_compiled(packed_mlp(), lambda: (random(B, k, C),), backend="inductor")


def test_a_refusal_comes_through_the_compiler():
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="age: expected dtype int32, got float32"):
        compiled(random(B, N), random(B, N))


# --- an enabled model ----------------------------------------------------------------------------

TIMESTEPS = [float(t) for t in torch.linspace(990, 0, 9).long()]
CONFIG = toca.ToCaConfig(interval=3, fresh_ratio=0.4, layer_slope=0.3, step_slope=0.2)


def tiny(contiguous=False):
    torch.manual_seed(0)
    model = random_dit("S", channels=64, num_heads=4, depth=3, input_size=8)
    if contiguous:  # the layout of the first block's input, which DiT's embedder transposes
        model.x_embedder.register_forward_hook(lambda module, args, out: out.contiguous())
    return model


def denoise(model, seed=0):
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = torch.tensor([1, 2, 1000, 1000])
    for t in TIMESTEPS:
        x = x - 0.1 * model(x, torch.full((4,), int(t)), y)[:, :4]
    return x


def blocks_then_enable(model, **options):
    for block in model.blocks:
        block.compile(fullgraph=True, **options)
    toca.enable(model, CONFIG, timesteps=TIMESTEPS)
    return model


def enable_then_blocks(model, **options):
    toca.enable(model, CONFIG, timesteps=TIMESTEPS)
    for block in model.blocks:
        block.compile(fullgraph=True, **options)
    return model


def wrapped_blocks_then_enable(model, **options):
    for layer, block in enumerate(model.blocks):
        model.blocks[layer] = torch.compile(block, fullgraph=True, **options)
    toca.enable(model, CONFIG, timesteps=TIMESTEPS)
    return model


def enable_the_compiled_model(model, **options):
    compiled = torch.compile(model, **options)
    toca.enable(compiled, CONFIG, timesteps=TIMESTEPS)
    return compiled


def compile_the_enabled_model(model, **options):
    """Right, if not faster: a compiler does not look into an enabled model's forward."""
    toca.enable(model, CONFIG, timesteps=TIMESTEPS)
    return torch.compile(model, **options)


def compile_in_place(model, **options):
    model.compile(**options)
    toca.enable(model, CONFIG, timesteps=TIMESTEPS)
    return model


WAYS = [
    blocks_then_enable,
    enable_then_blocks,
    wrapped_blocks_then_enable,
    enable_the_compiled_model,
    compile_the_enabled_model,
    compile_in_place,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_samples_as_an_eager_one(way):
    model = tiny()
    with toca.enabled(model, CONFIG, timesteps=TIMESTEPS) as session:
        expected = denoise(model)
    counted = session.summary()
    compiled = way(model, backend="aot_eager")
    for _ in range(2):  # the first run makes the buffers, the second finds them
        assert torch.allclose(denoise(compiled), expected, atol=1e-5)
    target = compiled if way is enable_the_compiled_model else model
    summary = vars(target)["_toca_session"].summary()
    assert summary.tokens_recomputed == counted.tokens_recomputed
    assert summary.cached_steps == counted.cached_steps > 0
    toca.disable(target)


def test_two_graphs_serve_all_blocks():
    """One for full steps and one for cached ones, whatever the layer and the k."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    model = enable_then_blocks(tiny(contiguous=True), backend=backend)
    denoise(model)
    denoise(model, seed=1)
    assert len(graphs) == 2
    calls = [[str(node.target) for node in graph.graph.nodes] for graph in graphs]
    assert sum("toca.attention_scores.default" in targets for targets in calls) == 1
    assert sum("toca.gather_modulate.default" in targets for targets in calls) == 1


def test_blocks_compiled_by_inductor():
    model = tiny()
    with toca.enabled(model, CONFIG, timesteps=TIMESTEPS):
        expected = denoise(model)
    enable_then_blocks(model)
    assert torch.allclose(denoise(model), expected, atol=1e-4)


def test_diffusers_blocks_compile():
    model = tiny_transformer()
    config = toca.ToCaConfig(interval=2, fresh_ratio=0.3)
    with toca.enabled(model, config, num_steps=4):
        expected = sample(model, 4)
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        assert torch.allclose(sample(model, 4), expected, atol=1e-5)


@pytest.mark.parametrize("settings", [{"forecast": 2}, {"selector": "similarity"}])
def test_blocks_compile_under_other_policies(settings):
    config = CONFIG.replace(interval=2, **settings)
    model = tiny()
    with toca.enabled(model, config, timesteps=TIMESTEPS):
        expected = denoise(model)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert torch.allclose(denoise(model), expected, atol=1e-5)


def test_a_gate_is_decided_outside_of_graphs():
    """It reads a number in the middle of a step, so the first block's graph breaks there."""
    config = CONFIG.replace(interval=9, residual_threshold=0.5)
    model = tiny()
    with toca.enabled(model, config, timesteps=TIMESTEPS) as session:
        expected = denoise(model)
        full = session.summary().full_steps
        model.blocks[0].compile(backend="aot_eager")
        for block in model.blocks[1:]:
            block.compile(fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert torch.allclose(denoise(model), expected, atol=1e-5)
        assert session.summary().full_steps == full
