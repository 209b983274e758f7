"""Caches in host memory: the same results, with copies that are made as late as they may."""

import functools
import gc
import importlib
import weakref

import pytest
import torch

import toca_kernels as toca
from models import sample, separate_guidance, timesteps, tiny_dit
from offloading import StandIn, offloaded
from pipelines import PIPELINES
from test_families import PUBLISHED, config
from toca_kernels.apps.measuring.watch import Watch
from toca_kernels.blocks.block import Block
from toca_kernels.copies import ALIGNMENT, CudaCopies, Lane, Slabs, slab_size

STEPS = 6
DIT_STEPS = 9  # 0, 3 and 6 are full
CONFIG = toca.ToCaConfig(interval=3, fresh_ratio=0.3)
CACHES = {
    "plain": {},
    "int8": {"cache_dtype": "int8"},
    "fp8": {"cache_dtype": "fp8"},
    "forecast 1": {"forecast": 1, "interval": 2},
    "forecast 2": {"forecast": 2, "interval": 2},
}


def both(thing, chosen, draw, **given):
    """What is drawn with caches at hand; checks that it is the same with caches on the host."""
    with toca.enabled(thing, chosen, **given) as session:
        at_hand = draw()
        summary = session.summary()
    copies = StandIn()
    with offloaded(thing, chosen, copies, **given) as session:
        apart = draw()
        also = session.summary()
    assert torch.equal(at_hand, apart)
    assert copies.asked[Lane.IN] > 0
    assert copies.made[Lane.OUT] > 0
    assert also.cache_bytes == summary.cache_bytes
    assert also.tokens_recomputed == summary.tokens_recomputed
    return at_hand, copies


@pytest.mark.parametrize("name", PIPELINES)
def test_stock_pipelines(name):
    tiny = PIPELINES[name]
    pipe = tiny()
    for settings in ("plain", "int8", "forecast 2"):
        interval = {"interval": 2} if name == "wan22" else {}  # two models share the steps
        chosen = config(name, **(CACHES[settings] | interval))
        both(pipe, chosen, lambda: tiny.call(pipe, STEPS))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_structures(name):
    module = importlib.import_module(f"published.{name.partition('_')[0]}")
    model = module.tiny(multi_scale=True) if name == "pixart_ms" else module.tiny()
    for settings in CACHES.values():
        chosen = CONFIG.replace(
            selector=PUBLISHED[name], module_ratio={"mlp": 1.0, "cross_attn": 0.5}
        )
        chosen = chosen.replace(**settings)
        both(model, chosen, lambda: module.sample(model, STEPS), num_steps=STEPS)


PARTIAL = {"self_attention": "partial", "module_ratio": {"attn": 0.5, "mlp": 1.0}}
SETTINGS = {
    "norm": {"selector": "norm"},
    "similarity": {"selector": "similarity"},
    "similarity, int8": {"selector": "similarity", "cache_dtype": "int8"},
    "similarity, forecast": {"selector": "similarity", "forecast": 1},
    "partial": PARTIAL,
    "partial, int8": {**PARTIAL, "cache_dtype": "int8"},
    "partial, forecast": {**PARTIAL, "forecast": 2},
    "partial, random": {**PARTIAL, "selector": "random"},
    "fused": {"full_steps": "fused"},
    "fused, forecast": {"full_steps": "fused", "forecast": 2, "interval": 2},
    "nothing fresh": {"fresh_ratio": 0.0},
    "every token": {"fresh_ratio": 1.0},
    "alternating": {"fresh_every": 2},
    "shared": {"share_cfg_selection": True},
    "layer 0 full": {"decide_per_block": True, "refresh_slope": 0.3, "count_from": "end"},
    "some layers": {"layers": (0, 2)},
    "attention only": {"modules": ("attn",), "fresh_ratio": 0.0},
    "MLP only": {"modules": ("mlp",)},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_of_dit(settings):
    model = tiny_dit()
    for predict in ({}, {"predict": separate_guidance}):
        draw = functools.partial(sample, model, DIT_STEPS, **predict)
        both(model, CONFIG.replace(**SETTINGS[settings]), draw, num_steps=DIT_STEPS)


def test_a_mask():
    model = tiny_dit()
    chosen = CONFIG.replace(selector="mask")
    draw = functools.partial(sample, model, DIT_STEPS)
    both(model, chosen, draw, num_steps=DIT_STEPS, mask=torch.rand(64))


@pytest.mark.parametrize("settings", ["plain", "forecast 2"])
def test_partial_attention_of_pixart(settings):
    module = importlib.import_module("published.pixart")
    model = module.tiny()
    chosen = CONFIG.replace(**(PARTIAL | CACHES[settings]), selector="entropy")
    both(model, chosen, lambda: module.sample(model, STEPS), num_steps=STEPS)


@pytest.mark.parametrize("forecast", [0, 1])
def test_steps_that_turn_out_full(forecast):
    """The first block decides, when the second one's caches are already on their way."""
    model = tiny_dit()
    kinds = set()
    for threshold in (0.02, 0.1, 0.3, 1.0):
        chosen = CONFIG.replace(residual_threshold=threshold, forecast=forecast)
        both(model, chosen, lambda: sample(model, DIT_STEPS), num_steps=DIT_STEPS)
        with toca.enabled(model, chosen, num_steps=DIT_STEPS) as session:
            sample(model, DIT_STEPS)
            kinds.add(session.summary().full_steps)
    assert len(kinds) > 1


def test_runs_of_other_sizes_by_turns():
    """Working buffers grow; what an earlier run has shown is made at once in a later one."""
    model = tiny_dit()

    def draw():
        sizes = ((16, 16), (24, 16), (16, 16), (8, 8), (24, 16))
        found = [sample(model, DIT_STEPS, size=size).flatten() for size in sizes]
        with torch.inference_mode():
            found.append(sample(model, DIT_STEPS).flatten())
        return torch.cat([*found, sample(model, DIT_STEPS).flatten()])

    both(model, CONFIG.replace(forecast=1), draw, num_steps=DIT_STEPS)


def test_inference_mode_by_turns():
    """What it makes cannot be written outside of it."""
    model = tiny_dit()
    calls = 0

    def predict(model, x, t, labels):
        nonlocal calls
        calls += 1
        with torch.inference_mode(calls % 5 > 1):
            return model(x, t, labels)[:, :4].clone()

    def draw():
        nonlocal calls
        calls = 0
        with torch.inference_mode():
            first = sample(model, DIT_STEPS, predict=predict)
        return first.clone()

    both(model, CONFIG, draw, num_steps=DIT_STEPS)


def test_guidance_branches_of_other_sizes():
    """One shows its outputs while the other's working buffers are in use."""
    model = tiny_dit()

    def predict(model, x, t, labels):
        first = model(x, t, labels)[:, :4]
        second = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, labels + 1]))
        return first + second[: len(x), :4]

    draw = functools.partial(sample, model, DIT_STEPS, predict=predict)
    both(model, CONFIG, draw, num_steps=DIT_STEPS)


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("settings", ["plain", "forecast 2"])
def test_interrupted_runs(settings):
    """A block raises, in the first step and later; what follows is as with caches at hand."""
    model = tiny_dit()
    calls = 0
    broken = 0

    def break_off(module, args):
        nonlocal calls
        calls += 1
        if calls == broken:
            raise Broken

    for block in model.blocks:
        block.mlp.register_forward_pre_hook(break_off)

    def draw():
        nonlocal calls, broken
        found = []
        for at in (2, 5, 8):
            calls, broken = 0, at
            with pytest.raises(Broken):
                sample(model, DIT_STEPS)
            broken = 0
            found.append(sample(model, DIT_STEPS))
        part = sample(model, 5, steps=timesteps(DIT_STEPS)[:5])
        return torch.stack([*found, part, sample(model, DIT_STEPS)])

    both(model, CONFIG.replace(**CACHES[settings]), draw, num_steps=DIT_STEPS)


@pytest.mark.parametrize("settings", ["plain", "forecast 1"])
def test_one_branch_is_interrupted_and_the_other_goes_on(settings):
    model = tiny_dit()
    calls = 0

    def break_off(module, args):
        nonlocal calls
        calls += 1
        if calls in (5, 26, 38):
            raise Broken

    handle = model.blocks[1].mlp.register_forward_pre_hook(break_off)

    def noise(x, t, labels):
        try:
            return model(x, t, labels)[:, :4]
        except Broken:
            return torch.zeros_like(x)

    def predict(model, x, t, labels):
        return noise(x, t, labels) + noise(x, t, labels + 1)

    def draw():
        nonlocal calls
        calls = 0
        return torch.stack([sample(model, DIT_STEPS, predict=predict) for _ in range(3)])

    both(model, CONFIG.replace(**CACHES[settings]), draw, num_steps=DIT_STEPS)
    assert calls > 38
    handle.remove()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("settings", ["plain", "forecast 1"])
def test_few_blocks(depth, settings):
    """What the step before has written is read from home again while it is hardly there."""
    model = tiny_dit(depth=depth)
    chosen = CONFIG.replace(**CACHES[settings])
    both(model, chosen, lambda: sample(model, DIT_STEPS), num_steps=DIT_STEPS)


def test_blocks_that_do_not_run_in_turn():
    """What was fetched for a block that is left out is not mistaken for another's."""
    tiny = PIPELINES["wan"]
    pipe = tiny()
    model = tiny.models(pipe)[0]
    order = list(model.blocks)
    step = 0

    def turn(module, args, kwargs):
        nonlocal step
        step += 1
        if step > 2:  # both branches have shown their outputs
            blocks = order[::-1] if step % 4 < 2 else order
            for number, block in enumerate(blocks):
                model.blocks[number] = block

    handle = model.register_forward_pre_hook(turn, with_kwargs=True)

    def draw():
        nonlocal step
        step = 0
        drawn = tiny.call(pipe, STEPS)
        for number, block in enumerate(order):
            model.blocks[number] = block
        return drawn

    both(pipe, config("wan", selector="random"), draw)
    handle.remove()


# --- the stand-in ----------------------------------------------------------------------------

WAITS = [
    ("computes", "copies"),
    (Lane.IN, "computes"),
    (Lane.IN, "copies"),
    (Lane.OUT, "computes"),
]


@pytest.mark.parametrize("wait", WAITS, ids=str)
def test_the_stand_in_notices_a_wait_that_is_missing(wait):
    model = tiny_dit()
    noticed = []
    chosen = CONFIG.replace(selector="similarity")
    with toca.enabled(model, chosen, num_steps=DIT_STEPS):
        want = sample(model, DIT_STEPS)
    with offloaded(model, chosen, StandIn(frozenset([wait])), num_steps=DIT_STEPS):
        try:
            assert torch.equal(sample(model, DIT_STEPS), want), "other numbers"
        except AssertionError as error:
            noticed.append(str(error))
    assert any(words in noticed[0] for words in ("copied", "other numbers"))


# --- what is copied when ---------------------------------------------------------------------


def test_the_next_blocks_caches_are_on_their_way_while_a_block_computes(monkeypatch):
    model = tiny_dit()
    copies = StandIn()
    asked = []
    own = Block.compose

    for kind in Block.__subclasses__():
        if "compose" in vars(kind):
            own = kind.compose

            def compose(self, state, args, kwargs, own=own):
                asked.append(dict(copies.asked))
                return own(self, state, args, kwargs)

            monkeypatch.setattr(kind, "compose", compose)
    before = []
    model.x_embedder.register_forward_hook(lambda *_: before.append(copies.asked[Lane.IN]))
    with offloaded(model, CONFIG, copies, num_steps=3):
        sample(model, 3)
    assert before == [0, 2, 8]  # the first block's are on their way before there is any
    # Six copies home of the full step; a cached step reads two modules of each block and writes
    # one.  Each block has its own and the next one's, and the last one all.
    first = {Lane.IN: 4, Lane.OUT: 6}, {Lane.IN: 6, Lane.OUT: 7}, {Lane.IN: 6, Lane.OUT: 8}
    second = [{Lane.IN: one[Lane.IN] + 6, Lane.OUT: one[Lane.OUT] + 3} for one in first]
    assert asked == [*first, *second]


def test_only_what_is_needed_is_copied():
    """Full steps of plain caches read nothing; modules that are only read do not go home."""
    model = tiny_dit()
    copies = StandIn()
    with offloaded(model, CONFIG.replace(fresh_ratio=0.0), copies, num_steps=4):
        sample(model, 4)
    assert copies.asked == {Lane.IN: 2 * 3 * 2, Lane.OUT: 2 * 3 * 2}


def alive(references):
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_the_device_holds_what_two_blocks_need():
    tiny = PIPELINES["flux"]  # blocks of two kinds
    pipe = tiny()
    copies, most = StandIn(), []

    def look(*_):
        found = [one() for one in copies.buffers]
        most.append(sum(one.nbytes() for one in found if one is not None))

    handles = [
        block.register_forward_hook(look)
        for model in tiny.models(pipe)
        for block in (*model.transformer_blocks, *model.single_transformer_blocks)
    ]
    with offloaded(pipe, config("flux"), copies) as session:
        tiny.call(pipe, STEPS)
        summary = session.summary()
        assert max(most) <= summary.working_bytes < summary.cache_bytes / 2
        assert summary.host_bytes >= summary.cache_bytes
        assert "pinned host memory" in str(summary)
        # Nothing will be read any more.
        assert alive(copies.buffers) == alive(copies.homes) == 0
        tiny.call(pipe, STEPS)
        assert alive(copies.buffers) == alive(copies.homes) == 0
    for handle in handles:
        handle.remove()


def test_everything_is_given_back_after_a_run_that_was_broken_off():
    model = tiny_dit()
    copies = StandIn()
    with offloaded(model, CONFIG, copies, num_steps=DIT_STEPS):
        sample(model, 5, steps=timesteps(DIT_STEPS)[:5])
        assert alive(copies.homes) > 0
    copies.last.clear()  # copies home that nobody waited for
    assert alive(copies.buffers) == alive(copies.homes) == 0


def test_a_session_goes_with_its_model():
    model = tiny_dit()
    with offloaded(model, CONFIG, num_steps=3) as session:
        sample(model, 3)
        gone = weakref.ref(session._run.loan)
        del session
    gc.collect()
    assert gone() is None


def test_cached_outputs_can_be_looked_at():
    """As `toca tune` does, after a step: they are at home."""
    model = tiny_dit()
    found = []
    with Watch(model, toca.enable(model, CONFIG, num_steps=4)).watching() as watch:
        sample(model, 4)
        found.append(watch.outputs)
    toca.disable(model)
    copies = StandIn()
    with offloaded(model, CONFIG, copies, num_steps=4) as session:
        watch = Watch(model, session)
        watch._synchronize = copies.finish
        with watch.watching():
            sample(model, 4)
            found.append(watch.outputs)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(one, found[1][at]) for at, one in found[0].items())


# --- settings --------------------------------------------------------------------------------


def test_a_model_on_a_cpu_has_its_caches_at_hand():
    model = tiny_dit()
    chosen = CONFIG.replace(cache_device="cpu")
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        want = sample(model, STEPS)
    with toca.enabled(model, chosen, num_steps=STEPS) as session:
        assert torch.equal(sample(model, STEPS), want)
        summary = session.summary()
        assert session._run.loan is None
    assert (summary.host_bytes, summary.working_bytes) == (0, 0)
    assert "host memory" not in str(summary)
    told = chosen.memory(model, batch=4, tokens=64)
    assert (told.host_bytes, told.total) == (0, CONFIG.memory(model, batch=4, tokens=64).total)


def test_no_graphs_of_steps_whose_caches_lie_elsewhere():
    with pytest.raises(ValueError, match="cuda_graph: expected False with cache_device='cpu'"):
        toca.enable(
            tiny_dit(), CONFIG.replace(cache_device="cpu"), num_steps=STEPS, cuda_graph=True
        )


def test_only_cuda_devices_copy():
    session = toca.enable(tiny_dit(), CONFIG.replace(cache_device="cpu"), num_steps=STEPS)
    with pytest.raises(ValueError, match="cache_device: expected None for a model on mps"):
        session._run._home_of_caches(torch.device("mps"))


# --- torch.compile ---------------------------------------------------------------------------


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_blocks():
    """Their graphs break where caches come and go."""
    model = tiny_dit()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    both(model, CONFIG, lambda: sample(model, STEPS), num_steps=STEPS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 4


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_whole_graph_is_refused_in_words():
    model = tiny_dit()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    refused = pytest.raises(torch._dynamo.exc.Unsupported, match="compile with fullgraph=False")
    with offloaded(model, CONFIG, num_steps=STEPS), refused:
        sample(model, STEPS)


# --- memory and streams ----------------------------------------------------------------------


def test_slabs_hold_tensors_side_by_side():
    made = []

    def pinned(nbytes):
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    slabs = Slabs(pinned)
    shapes = [((2, 37, 64), torch.float32), ((2, 37), torch.float32), ((2, 37, 64), torch.int8)]
    tensors = [slabs.empty(*one) for one in shapes * 7]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, tensor in enumerate(tensors):
        assert (tensor == number).all()
        assert tensor.is_contiguous()
        assert tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0
    assert [tuple(one.shape) for one in tensors] == [shape for shape, _ in shapes * 7]
    assert slabs.nbytes == sum(made)
    assert all(one & (one - 1) == 0 for one in made)


@pytest.mark.parametrize("nbytes", [1, 512, 513, 369 * 2**20, 2**30, 2**30 + 1, 5 * 2**27])
def test_slabs_waste_little(nbytes):
    slab = slab_size(nbytes)
    size = -(-nbytes // ALIGNMENT) * ALIGNMENT
    assert slab >= nbytes
    assert slab <= 16 * size
    assert slab // size * size >= 0.88 * slab


def test_cuda_streams_are_told_what_to_wait_for(monkeypatch):
    """The layer that no CPU can run, against streams that only listen."""
    told = []

    class Stream:
        def __init__(self, device=None):
            self.name = f"stream {len(told)}" if device is not None else "computes"
            told.append((self.name, "made"))

        def record_event(self):
            told.append((self.name, "records"))
            return f"event {len(told)}"

        def wait_event(self, event):
            told.append((self.name, "waits", event))

        def __enter__(self):
            told.append((self.name, "enters"))

        def __exit__(self, *_):
            told.append((self.name, "leaves"))

    for name in ("record_event", "wait_event"):
        assert hasattr(torch.cuda.Stream, name)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    copies = CudaCopies(torch.device("cuda", 0))
    computing = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    told.clear()
    source, into = torch.ones(3), torch.zeros(3)
    mark = copies.mark()
    after = copies.copy(Lane.IN, [(into, source)], [mark])
    copies.wait(after)
    assert told == [
        ("computes", "records"),
        ("stream 0", "waits", mark),
        ("stream 0", "enters"),
        ("stream 0", "leaves"),
        ("stream 0", "records"),
        ("computes", "waits", after),
    ]
    assert torch.equal(into, source)
