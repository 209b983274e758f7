"""Quantised linears: each way works as the same model does without a cache, or is refused in words.

What is quantised is a module of another class (torch's dynamic quantisation, quanto, bitsandbytes,
GGUF), or an nn.Linear whose weight is a tensor subclass (torchao).  `Sealed` stands in for such a
weight where torchao is not installed: it lets itself be multiplied by, whole, and nothing else.
Libraries that are missing skip their cases.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

import toca_kernels as toca
from models import sample, tiny_dit
from pipelines import PIPELINES
from toca_kernels.blocks.linear import plain

pytestmark = pytest.mark.filterwarnings("ignore")  # of the quantising libraries
STEPS = 6
OWN = ("own dit", "own pixart", "own stdit3", "own flux")
NAMES = ("dit", "pixart_alpha", "flux", "flux2", "sd3", "wan")
ONE_BRANCH = ("dit", "pixart_alpha", "flux", "sd3")  # one call of the model in a step
ONLY_MLPS = (
    "dit",
    "sd3",
    "own dit",
)  # whose linears have no taps: they may be replaced at any time
PACKED = ("dit", "pixart_alpha", "flux", "sd3", "wan", *OWN[:2])
CROSS = ("pixart_alpha", "wan")
MLPS = ("ff", "ff_context", "ffn", "proj_mlp")


# --- ways to quantise ----------------------------------------------------------------------------


class Sealed(Tensor):
    """An 8-bit weight, a tensor to nn.Linear only: no memory of its own, no slices, no products."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Sealed:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight: Tensor) -> Sealed:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __repr__(self) -> str:
        return f"Sealed({tuple(self.shape)})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = [*args, None][:3]
            return F.linear(x, weight.values.to(x.dtype) * weight.scale, bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:  # nn.Parameter
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{func} of a quantised weight")


def linears(model: nn.Module, block: int = 16) -> dict[str, nn.Linear]:
    """Of the transformer's blocks, those whose rows can be cut into blocks of this size."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and "block" in name and module.in_features % block == 0
    }


def weights_replaced(model: nn.Module) -> None:
    for module in linears(model).values():
        module.weight = nn.Parameter(Sealed.of(module.weight.detach()), requires_grad=False)


def dequantised(model: nn.Module) -> None:
    """Plain weights of what those of `weights_replaced` stand for."""
    for module in linears(model).values():
        sealed = Sealed.of(module.weight)
        module.weight.data = sealed.values * sealed.scale


def dynamically(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """torch's own: the activations of a call share one scale."""

    def quantise(model: nn.Module) -> None:
        torch.ao.quantization.quantize_dynamic(
            model, set(linears(model)), dtype=dtype, inplace=True
        )

    return quantise


def with_torchao(config: str) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        chosen = linears(model)
        ao.quantize_(model, getattr(ao, config)(), filter_fn=lambda module, name: name in chosen)

    return quantise


def with_quanto(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    quanto.quantize(model, weights=quanto.qint8, include=list(linears(model)))
    quanto.freeze(model)


def with_bitsandbytes(kind: str, block: int, **settings: Any) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        library = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is not installed")

        def make(linear: nn.Linear) -> nn.Module:
            new = getattr(library, kind)(
                linear.in_features, linear.out_features, linear.bias is not None, **settings
            )
            new.load_state_dict(linear.state_dict())
            return new.to("cpu")

        replace(model, block, make)

    return quantise


def with_gguf(model: nn.Module) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    kinds = pytest.importorskip("diffusers.quantizers.gguf.utils")
    q8 = gguf.GGMLQuantizationType.Q8_0

    def make(linear: nn.Linear) -> nn.Module:
        dtype = linear.weight.dtype
        new = kinds.GGUFLinear(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype
        )
        stored = torch.from_numpy(gguf.quantize(linear.weight.detach().float().numpy(), q8))
        new.weight, new.bias = kinds.GGUFParameter(stored, quant_type=q8), linear.bias
        return new

    replace(model, 32, make)


def replace(model: nn.Module, block: int, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, linear in linears(model, block).items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, make(linear).eval().requires_grad_(False))


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "stand-in": weights_replaced,
    "torch-int8": dynamically(torch.qint8),
    "torch-float16": dynamically(torch.float16),
    "torchao-int8": with_torchao("Int8WeightOnlyConfig"),
    "torchao-int8-dynamic": with_torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-float8": with_torchao("Float8WeightOnlyConfig"),
    "quanto-int8": with_quanto,
    "bitsandbytes-int8": with_bitsandbytes("Linear8bitLt", 16, has_fp16_weights=False),
    "bitsandbytes-nf4": with_bitsandbytes("LinearNF4", 64),
    "gguf-q8": with_gguf,
}
IN_PLACE = [way for way in WAYS if way.startswith(("stand-in", "torchao"))]  # the modules stay
# Where activations are rounded to few bits, a difference in their last one may become a whole step.
COARSE = {
    "torch-int8": 2e-3,
    "torchao-int8-dynamic": 1e-2,
    "bitsandbytes-int8": 1e-2,
    "bitsandbytes-nf4": 1e-2,
}
SOME = ("stand-in", "torch-int8", "torchao-int8")


# --- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A model, or a pipeline around one, and how to run it."""

    thing: Any
    models: list[nn.Module]
    call: Callable[..., Tensor]
    entropy: bool
    blocks: list[nn.Module]
    given: dict[str, Any]

    def quantise(self, way: str) -> None:
        for model in self.models:
            WAYS[way](model)

    @property
    def every(self) -> dict[str, float]:
        """The ratios of modules that recompute every token at fresh_ratio=1."""
        return {"mlp": 1.0} | ({"cross_attn": 1.0} if self.entropy else {})

    def enabled(self, **settings: Any) -> Any:
        # torch's dynamic quantisation would round all steps of a modulation table by one scale.
        chosen: dict[str, Any] = {"interval": 3, "fresh_ratio": 0.3, "tabulate_modulation": False}
        chosen["selector"] = "entropy" if self.entropy else "attention"
        chosen["module_ratio"] = {"mlp": 1.0} | ({"cross_attn": 0.5} if self.entropy else {})
        return toca.enabled(self.thing, toca.ToCaConfig(**(chosen | settings)), **self.given)


def made(name: str) -> Tiny:
    kind, _, own = name.partition(" ")
    if own:
        module = importlib.import_module(f"published.{own}") if own != "dit" else None
        model = module.tiny() if module else tiny_dit()
        call = functools.partial(module.sample if module else sample, model, STEPS)
        return Tiny(model, [model], call, own in ("pixart", "stdit3"), [], {"num_steps": STEPS})
    tiny = PIPELINES[kind]
    pipe = tiny()
    call = functools.partial(tiny.call, pipe, STEPS)
    return Tiny(pipe, tiny.models(pipe), call, kind in CROSS, tiny.blocks_of(pipe), {})


@functools.cache
def summary_of_plain(name: str) -> Any:
    tiny = made(name)
    with tiny.enabled() as session:
        tiny.call()
        return session.summary()


def close(have: Tensor, want: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((have - want).norm() <= tolerance * want.norm())


def cases(names: Sequence[str]) -> Any:
    """Every way with the first three, some ways with the others."""
    chosen = [(n, way) for n in names for way in WAYS if n in NAMES[:3] or way in SOME]
    return pytest.mark.parametrize(("name", "way"), chosen, ids=[" ".join(one) for one in chosen])


every_way = pytest.mark.parametrize("way", WAYS)


# --- before and after enabling -------------------------------------------------------------------


def check_before(name: str, way: str) -> None:
    tiny = made(name)
    plain = tiny.call()
    tiny.quantise(way)
    expected = tiny.call()
    assert not torch.equal(expected, plain)
    with tiny.enabled(interval=1) as session:
        assert torch.equal(tiny.call(), expected)
        assert session.summary().full_steps == STEPS
    with tiny.enabled() as session:
        cached = tiny.call()
        assert torch.equal(tiny.call(), cached)
        summary = session.summary()
    assert torch.isfinite(cached).all()
    assert not close(cached, expected, 1e-3)
    assert torch.equal(tiny.call(), expected)
    assert summary.packed_bytes == 0  # a copy of weights that are not there
    want = summary_of_plain(name)
    assert (summary.flops_full, summary.flops_done) == (want.flops_full, want.flops_done)


@cases(NAMES)
def test_quantised_before(name: str, way: str) -> None:
    """Full steps bit for bit; FLOPs are the model's, however many bytes a weight has."""
    check_before(name, way)


@cases(OWN)
def test_own_code_quantised_before(name: str, way: str) -> None:
    check_before(name, way)


def check_after(name: str, way: str) -> None:
    """The next run is that of a model which was quantised before; or it is refused in words."""
    tiny = made(name)
    tiny.quantise(way)
    with tiny.enabled():
        expected = tiny.call()
    tiny = made(name)
    with tiny.enabled() as session:
        tiny.call()
        packed = session.summary().packed_bytes
        assert packed > 0 or name not in PACKED
        tiny.quantise(way)
        if way not in IN_PLACE and name not in ONLY_MLPS:
            with pytest.raises(RuntimeError, match="disable the model and enable it again"):
                tiny.call()
            return
        assert torch.equal(tiny.call(), expected)
        assert session.summary().packed_bytes == 0


@cases(NAMES)
def test_quantised_after(name: str, way: str) -> None:
    check_after(name, way)


@cases(OWN)
def test_own_code_quantised_after(name: str, way: str) -> None:
    check_after(name, way)


@pytest.mark.parametrize("prepack", [True, False])
def test_weights_quantised_in_the_middle_of_a_run(prepack: bool) -> None:
    """They are called from then on; the next run is that of a model quantised before."""

    def after_first(tiny: Tiny, change: Callable[[], None]) -> Tensor:
        def callback(pipe, step, timestep, kwargs):
            if step == 0:
                change()
            return {}

        return tiny.call(callback_on_step_end=callback)

    tiny = made("flux")
    with tiny.enabled(prepack=False):
        expected = after_first(tiny, functools.partial(dequantised, tiny.models[0]))
    tiny = made("flux")
    with tiny.enabled(prepack=prepack):
        assert close(after_first(tiny, functools.partial(tiny.quantise, "stand-in")), expected)
        following = tiny.call()
    tiny = made("flux")
    tiny.quantise("stand-in")
    with tiny.enabled():
        assert torch.equal(tiny.call(), following)


# --- what a cached step computes -----------------------------------------------------------------


@contextlib.contextmanager
def attention_reused(tiny: Tiny) -> Iterator[None]:
    """Hooks that hand out, in two steps of three, what an attention returned in the first."""
    calls = [-1]

    def count(module, args):
        calls[0] += 1

    def reuse() -> Callable[..., Any]:
        kept = []

        def hook(module, args, out):
            if calls[0] % 3 == 0:
                kept[:] = [out]
            return kept[0]

        return hook

    (model,) = tiny.models
    found = (getattr(block, n, None) for block in tiny.blocks for n in ("attn", "attn1"))
    handles = [one.register_forward_hook(reuse()) for one in found if one is not None]
    handles.append(model.register_forward_pre_hook(count))
    yield
    for handle in handles:
        handle.remove()


@cases(ONE_BRANCH)
def test_every_token_recomputed_is_only_the_attention_reused(name: str, way: str) -> None:
    tiny = made(name)
    tiny.quantise(way)
    untouched = tiny.call()
    with attention_reused(tiny):
        expected = tiny.call()
    tolerance = COARSE.get(way, 1e-4)
    assert not close(expected, untouched, 3 * tolerance)
    with tiny.enabled(fresh_ratio=1.0, module_ratio=tiny.every):
        assert close(tiny.call(), expected, tolerance)


@contextlib.contextmanager
def rows_of(firsts: list[nn.Module]) -> Iterator[list[int]]:
    """Rows that these modules are called with."""
    rows = [0]
    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(module) for module in firsts}:

            def forward(self, x, *args, _own=kind.forward, **kwargs):
                if any(self is module for module in firsts):
                    rows[0] += x.shape[:-1].numel()
                return _own(self, x, *args, **kwargs)

            patch.setattr(kind, "forward", forward)
        yield rows


@cases([name for name in NAMES if name != "flux2"])
def test_selected_rows_go_through_the_quantised_modules(name: str, way: str) -> None:
    """(The single block of FLUX.2 has its MLP in a linear with other things.)"""
    tiny = made(name)
    tiny.quantise(way)
    mlps = [getattr(block, n, None) for block in tiny.blocks for n in MLPS]
    firsts = [mlp.net[0].proj if hasattr(mlp, "net") else mlp for mlp in mlps if mlp is not None]
    with rows_of(firsts) as rows, tiny.enabled() as session:
        tiny.call()
        summary = session.summary()
    assert rows[0] == summary.tokens_recomputed < summary.tokens_total


@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_cached_steps_are_those_of_the_weights_that_are_meant(name: str) -> None:
    """A linear of the dequantised weights may be read, sliced and packed; this one only called."""
    quantised, plain = made(name), made(name)
    quantised.quantise("stand-in")
    dequantised(plain.models[0])
    with quantised.enabled(), plain.enabled():
        assert close(quantised.call(), plain.call())


@pytest.mark.parametrize(
    "settings", [{"full_steps": "fused"}, {"self_attention": "partial"}], ids=str
)
@every_way
def test_fused_steps_and_partial_attention(settings: dict[str, Any], way: str) -> None:
    tiny = made("dit")
    tiny.quantise(way)
    expected = tiny.call()
    tolerance = COARSE.get(way, 1e-4)
    ratio = {"attn": 1.0, "mlp": 1.0} if "self_attention" in settings else tiny.every
    with tiny.enabled(fresh_ratio=1.0, module_ratio=ratio, **settings) as session:
        cached = tiny.call()
        assert session.summary().cached_steps == 4
    if "attn" in ratio:  # then nothing is reused
        assert close(cached, expected, tolerance)
    with tiny.enabled(interval=1, **settings):
        assert close(tiny.call(), expected, tolerance)


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith("torch-")])
@pytest.mark.parametrize("name", ["dit", "pixart_alpha", "flux"])
def test_quantised_in_bfloat16(name: str, way: str) -> None:
    """(torch's own dynamic quantisation knows float32 only.)"""
    tiny = made(name)
    tiny.thing.to(torch.bfloat16)
    prompt = {
        key: value.bfloat16() if isinstance(value, Tensor) and "mask" not in key else value
        for key, value in PIPELINES[name].prompt().items()
    }
    call = functools.partial(tiny.call, **prompt)
    tiny.quantise(way)
    expected = call()
    with tiny.enabled(interval=1):
        assert torch.equal(call(), expected)
    with attention_reused(tiny):
        reused = call()
    with tiny.enabled(fresh_ratio=1.0, module_ratio=tiny.every):
        assert close(call().float(), reused.float(), 0.02)
    with tiny.enabled() as session:
        cached = call()
        assert torch.equal(call(), cached)
        assert session.summary().nan_scores == 0
    assert torch.equal(call(), expected)


def test_the_stand_in_is_only_called() -> None:
    linear = nn.Linear(4, 3)
    x, bias = torch.randn(2, 4), linear.bias
    assert plain(linear)
    dense = linear(x)
    linear.weight = nn.Parameter(Sealed.of(linear.weight.detach()), requires_grad=False)
    assert type(linear.weight) is Sealed
    assert close(linear(x), dense, 0.02)
    assert not plain(linear)
    for reading in (
        lambda: linear.weight[1:],
        lambda: linear.weight.t(),
        lambda: linear.weight.view(torch.uint8),
        lambda: x @ linear.weight,
        lambda: torch.addmm(bias, x, linear.weight),
    ):
        with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
            reading()
