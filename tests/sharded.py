"""Models whose tokens several processes share, and what a run of them does.

`CASES` are run by every process of a group (sharded_worker.py), and by test_parallel.py in one
process, to compare with.  Ulysses runs on torch's own attention.  A ring
needs a kernel that returns the log-sum-exp, which diffusers has for GPUs only: `exact_attention`
stands in its place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import toca_kernels as toca
from models import diffusers
from pipelines import PIPELINES, TEXT
from published import noise, pack_text, positions_2d, randomize, stdit3
from published.stdit import unpatchify
from stdit3 import Attention

STEPS = 5  # full, 2 cached, full, cached: with an interval of 3
SAMPLES = 2
SIDE, PROMPT = 8, 16  # of the image models
WAN_GRID, WAN_TEXT = (3, 4, 4), 12
STDIT3_GRID = (3, 4, 4)


# --- what is sent --------------------------------------------------------------------------------


class Sent(TorchDispatchMode):
    """Bytes that this process hands to collectives, by their names, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        space, name = func.namespace, func._opname
        if space in ("c10d", "_c10d_functional") and "wait" not in name and "wrap" not in name:
            # Of a collective that fills outputs, the inputs come second.
            given = args[1] if space == "c10d" and name.startswith("allgather") else args[0]
            given = [given] if isinstance(given, Tensor) else given
            self.calls.append((name, sum(one.nbytes for one in given)))
        return func(*args, **(kwargs or {}))

    def take(self) -> list[tuple[str, int]]:
        calls, self.calls = self.calls, []
        return calls


# --- an attention for rings ----------------------------------------------------------------------


def exact_op(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
    """(B, S, H, D): the attention, and its log-sum-exp (B, S, H) if `return_lse`."""
    _, _, _, scale, _, return_lse = args
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    lse = logits.logsumexp(dim=-1, keepdim=True)
    out = ((logits - lse).exp() @ v).transpose(1, 2)
    return (out, lse[..., 0].transpose(1, 2)) if return_lse else out


def exact_attention() -> Callable[[], None]:
    """Puts it in the place of torch's own in diffusers' registry; returns what undoes this."""
    from diffusers.models import attention_dispatch as dispatch

    registry, native = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName.NATIVE
    own = registry._backends[native]

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        given = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if _parallel_config is None:
            return own(query, key, value, *given)
        return dispatch._templated_context_parallel_attention(
            query,
            key,
            value,
            *given,
            return_lse,
            forward_op=exact_op,
            backward_op=None,
            _parallel_config=_parallel_config,
        )

    registry._backends[native] = attention
    return lambda: registry._backends.update({native: own})


# --- models --------------------------------------------------------------------------------------


def tiny(name: str) -> nn.Module:
    of = PIPELINES[name]
    return randomize(getattr(diffusers(), of.model)(**of.settings))


def flux_step(model: nn.Module, x: Tensor, t: float) -> Tensor:
    N = x.shape[1]
    text = PROMPT - (N < SIDE * SIDE)  # uneven, too
    rows = torch.arange(N)
    return model(
        hidden_states=x,
        encoder_hidden_states=_text(text, 1),
        pooled_projections=_text(0, 2),
        timestep=torch.full((SAMPLES,), t),
        img_ids=torch.stack([rows * 0, rows // SIDE, rows % SIDE], dim=1).float(),
        txt_ids=torch.zeros(text, 3),
        guidance=torch.full((SAMPLES,), 3.5),
        return_dict=False,
    )[0]


def flux2_step(model: nn.Module, x: Tensor, t: float) -> Tensor:
    rows = torch.arange(x.shape[1])
    ids = torch.stack([rows * 0, rows // SIDE, rows % SIDE, rows * 0], dim=1)
    return model(
        hidden_states=x,
        encoder_hidden_states=_text(PROMPT, 1),
        timestep=torch.full((SAMPLES,), t),
        img_ids=ids.expand(SAMPLES, -1, -1),
        txt_ids=torch.zeros(SAMPLES, PROMPT, 4, dtype=torch.long),
        guidance=torch.full((SAMPLES,), 3.5),
        return_dict=False,
    )[0]


def qwen_step(model: nn.Module, x: Tensor, t: float) -> Tensor:
    lengths = torch.tensor([[PROMPT], [PROMPT - 5]])
    return model(
        hidden_states=x,
        encoder_hidden_states=_text(PROMPT, 1),
        encoder_hidden_states_mask=torch.arange(PROMPT) < lengths,
        timestep=torch.full((SAMPLES,), t / 1000),
        img_shapes=[[(1, SIDE, SIDE)]] * SAMPLES,
        return_dict=False,
    )[0]


def ltx_step(model: nn.Module, x: Tensor, t: float) -> Tensor:
    """Its cross-attention exchanges heads for tokens, too, in cached steps as in full ones."""
    return model(
        hidden_states=x,
        encoder_hidden_states=_text(PROMPT, 1),
        timestep=torch.full((SAMPLES, 1), t),
        encoder_attention_mask=None,  # diffusers expands one to all heads, of which few are here
        num_frames=1,
        height=SIDE,
        width=SIDE,
        return_dict=False,
    )[0]


def wan_step(model: nn.Module, x: Tensor, t: float) -> Tensor:
    """Guidance in two calls."""
    cond, uncond = (
        model(
            hidden_states=x,
            timestep=torch.full((SAMPLES,), t),
            encoder_hidden_states=_text(WAN_TEXT, seed),
            return_dict=False,
        )[0]
        for seed in (1, 2)
    )
    return uncond + 3 * (cond - uncond)


@functools.cache
def _text(length: int, seed: int) -> Tensor:
    """The same tensor in every step, as pipelines have it; of a pooled text if `length` is 0."""
    return noise(*((SAMPLES, length, TEXT) if length else (SAMPLES, TEXT)), seed=seed)


class SplitSpatialAttention(Attention):
    """Attention within frames whose tokens are split: heads are exchanged for tokens and back."""

    def forward(self, x: Tensor) -> Tensor:
        P = dist.get_world_size()
        qkv = self.qkv(x).unflatten(2, (3, P, self.num_heads // P, -1))
        # (BT, S here, 3, P, H / P, D) -> of all tokens, (3, BT, H / P, S, D)
        qkv = exchange(qkv.permute(3, 0, 1, 2, 4, 5)).permute(3, 1, 4, 0, 2, 5).flatten(3, 4)
        q, k, v = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]
        out = F.scaled_dot_product_attention(q, k, v)
        # (BT, H / P, S, D) -> (BT, S here, C)
        out = exchange(out.unflatten(2, (P, -1)).permute(2, 0, 1, 3, 4))
        return self.proj_drop(self.proj(out.permute(1, 3, 0, 2, 4).flatten(2)))


def exchange(parts: Tensor) -> Tensor:
    """(P, ...): what is for each process, against what each process has for this one."""
    parts = parts.contiguous()
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts)
    return out


class SplitSTDiT3(stdit3.STDiT3):
    """Open-Sora 1.2's layout: every frame's tokens are split among the processes."""

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor, fps: Tensor) -> Tensor:
        T, rows, cols = (n // p for n, p in zip(x.shape[2:], self.patch_size, strict=True))
        S, P = rows * cols, dist.get_world_size()
        t = self.t_embedder(timestep) + self.fps_embedder(fps.unsqueeze(1), len(x))
        t_mlp = self.t_block(t)
        y, y_lens = pack_text(self.y_embedder(y, self.training), mask)
        x = self.x_embedder(x).unflatten(1, (T, S)) + positions_2d(rows, cols, self.hidden_size)
        x = x.chunk(P, dim=2)[dist.get_rank()].flatten(1, 2)
        for pair in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            for block in pair:
                x = block(x, y, t_mlp, y_lens, None, None, T, S // P)
        parts = [torch.empty_like(x) for _ in range(P)]
        dist.all_gather(parts, x.contiguous())
        x = torch.cat([part.unflatten(1, (T, -1)) for part in parts], dim=2).flatten(1, 2)
        x = self.final_layer(x, t, None, None, T, S)
        return unpatchify(x, (T, rows, cols), self.patch_size).float()


def open_sora() -> nn.Module:
    model = stdit3.tiny()
    if dist.is_initialized():
        model.__class__ = SplitSTDiT3
        for block in model.spatial_blocks:
            block.attn.__class__ = SplitSpatialAttention
    return model


def open_sora_step(model: nn.Module, x: Tensor, t: float) -> Tensor:
    """Both guidance halves in one call."""
    null = model.y_embedder.y_embedding
    y = torch.cat([noise(SAMPLES, 1, *null.shape, seed=1), null.expand(SAMPLES, 1, -1, -1)])
    lengths = torch.arange(SAMPLES)[:, None] + len(null) // 2
    out = model(
        torch.cat([x, x]),
        torch.full((2 * SAMPLES,), t),
        y=y,
        mask=(torch.arange(len(null)) < lengths).long(),
        fps=torch.full((1,), 24.0),
    )
    cond, uncond = out[:, : x.shape[1]].chunk(2)
    return uncond + 3 * (cond - uncond)


def of_diffusers(name: str) -> Callable[[], nn.Module]:
    return functools.partial(tiny, name)


# What makes a model, what calls it, and the shape of a sample.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[int, ...]]] = {
    "flux": (of_diffusers("flux"), flux_step, (SIDE * SIDE, 16)),
    "uneven": (of_diffusers("flux"), flux_step, (SIDE * SIDE - 1, 16)),
    "flux2": (of_diffusers("flux2"), flux2_step, (SIDE * SIDE, 16)),
    "qwen": (of_diffusers("qwenimage"), qwen_step, (SIDE * SIDE, 16)),
    "ltx": (of_diffusers("ltx"), ltx_step, (SIDE * SIDE, 8)),
    "wan": (of_diffusers("wan"), wan_step, (16, WAN_GRID[0], 2 * WAN_GRID[1], 2 * WAN_GRID[2])),
    "stdit3": (open_sora, open_sora_step, (4, STDIT3_GRID[0], *(2 * n for n in STDIT3_GRID[1:]))),
}


# --- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run of a tiny model.

    Attributes:
        split: (ring degree, Ulysses degree); None for a model that splits by itself.
        settings: of its ToCaConfig.
        exact: whether attention is `exact_attention`.
        late: whether parallelism is enabled after ToCa.
        mask: the weights of its tokens.
        record: whether selections are recorded.
        taps: whether hooks on its MLPs keep cached steps from being composed of the ops.
    """

    model: str
    split: tuple[int, int] | None
    settings: dict[str, Any]
    exact: bool = False
    late: bool = False
    mask: Tensor | None = None
    record: bool = True
    taps: bool = False

    @property
    def size(self) -> int:
        return 2 if self.split is None else math.prod(self.split)


@dataclass
class Ran:
    """What a run did, as one process saw it."""

    latents: Tensor
    selections: dict[str, list[Tensor | None]]
    sent: list[list[tuple[str, int]]]
    k: list[dict[str, list[int]]]
    summary: Any
    put_back: bool


def parallelise(model: Any, case: Case, *, alone: bool = False) -> None:
    """As a user of diffusers does it."""
    if case.split is None or alone:
        return
    ring, ulysses = case.split
    degrees: dict[str, Any] = {"ring_degree": ring, "ulysses_degree": ulysses}
    if case.model == "uneven":
        degrees["ring_anything" if ring > 1 else "ulysses_anything"] = True
    config = diffusers().ContextParallelConfig(**degrees)
    with mock.patch("torch.accelerator.device_count", return_value=1):  # it wants one
        model.enable_parallelism(config=config)


def run(case: Case, *, alone: bool = False) -> Ran:
    make, step, shape = MODELS[case.model]
    undo = exact_attention() if case.exact and not alone else lambda: None
    model = make()
    if case.taps:
        for name, module in model.named_modules():
            if name.endswith((".ff", ".ffn", ".proj_mlp")):
                module.register_forward_hook(lambda *_: None)
    settings = toca.ToCaConfig(**case.settings)

    if not case.late:
        parallelise(model, case, alone=alone)
        before = _forwards(model)
    group = None if alone or case.split is not None else dist.group.WORLD
    session = toca.enable(model, settings, num_steps=STEPS, mask=case.mask, group=group)
    if case.late:
        parallelise(model, case, alone=alone)
    session.record_selections = case.record
    x = noise(SAMPLES, *shape, seed=0)
    sent = Sent()
    calls = []
    for number in range(STEPS):
        with torch.no_grad(), sent:
            x = x - 0.1 * step(model, x, 1000 * (1 - number / STEPS))
        calls.append(sent.take())
    names = [name for name in session._run.layers if not name.endswith("attn")]
    names += [name for name in session._run.layers if name.endswith("cross_attn")]
    selections = {name: session.selections_of(name) for name in names} if case.record else {}
    k = next(iter(session._run.branches.values())).done.k
    summary = session.summary()
    toca.disable(model)
    after = _forwards(model)
    ours = [
        one
        for one in after.values()
        if type(getattr(one, "__self__", one)).__module__[:4] == "toca"
    ]
    put_back = not ours and (case.late or after == before)
    with torch.no_grad():
        assert torch.isfinite(step(model, x, 500.0)).all()
    undo()
    return Ran(x, selections, calls, k, summary, put_back)


def _forwards(model: nn.Module) -> dict[str, Any]:
    """What stands in the place of the modules' forwards, hooks' own included."""
    found = {name: vars(m).get("forward") for name, m in model.named_modules()}
    for name, module in model.named_modules():
        if hasattr(module, "_diffusers_hook"):
            for hook in module._diffusers_hook.hooks.values():
                found[f"{name} {type(hook).__name__}"] = hook.fn_ref.forward
    return found


SPLITS = {"ulysses2": (1, 2), "ring2": (2, 1), "ulysses4": (1, 4), "ring4": (4, 1), "both4": (2, 2)}
SELECTING = {"interval": 3, "fresh_ratio": 0.3, "module_ratio": {"mlp": 1.0, "cross_attn": 0.8}}
# Some cached steps are above it, by the mean of all tokens; some processes' own tokens are not.
DRIFT = {"flux": 0.923, "wan": 0.672}


def cases() -> dict[str, Case]:
    """By MODEL-SPLIT-WHAT-QUOTA."""
    made: dict[str, Case] = {}

    def add(name: str, late: bool = False, mask: Tensor | None = None, **settings: Any) -> None:
        model, how, what, quota = name.split("-")
        split = None if how == "own2" else SPLITS[how]
        exact = how.startswith(("ring", "both")) or what == "exact"
        given = {**SELECTING, "quota": quota, **settings}
        made[name] = Case(model, split, given, exact, late, mask, taps=what.startswith("taps"))

    for how in SPLITS:
        for model in ("flux", "wan"):
            add(f"{model}-{how}-full-local", interval=1)
            add(f"{model}-{how}-attention-global")
    for name in ("flux-ulysses2", "wan-ring2", "wan-ulysses4", "flux-both4"):
        add(f"{name}-attention-local")
        add(f"{name}-norm-global", selector="norm")
    for model in ("flux2", "qwen", "ltx"):
        add(f"{model}-ulysses2-attention-global")
    for how in ("ulysses2", "ring2", "ulysses4", "ring4"):
        add(f"uneven-{how}-attention-global")
    add("uneven-ulysses2-norm-local", selector="norm")
    add("flux-ulysses2-exact-global")
    add("flux-ulysses2-similarity-global", selector="similarity")
    for kind in ({}, {"cache_dtype": "int8"}, {"forecast": 1}):
        add("".join(["flux-ulysses2-taps", *kind, "-global"]), **kind)
        add("".join(["flux-ulysses2-ops", *kind, "-global"]), **kind, selector="random")
    add("wan-ulysses4-taps-global", selector="entropy")
    add("wan-ulysses4-shared-global", selector="entropy", share_cfg_selection=True)
    for quota in ("local", "global"):
        add(f"flux-ulysses2-reuse-{quota}", fresh_ratio=0.0, forecast=1)  # as preset("forecast")
        add(f"flux-ulysses2-random-{quota}", selector="random")
        add(f"flux-ulysses2-drift-{quota}", residual_threshold=DRIFT["flux"])
        add(f"flux-ulysses2-late-{quota}", late=True)
        add(f"wan-ulysses4-late-{quota}", late=True)
        add(f"wan-ulysses4-drift-{quota}", residual_threshold=DRIFT["wan"])
        add(f"wan-ulysses4-entropy-{quota}", selector="entropy")
        add(f"wan-ulysses4-bonus-{quota}", grid=2, bonus=0.5)
        weights = noise(math.prod(WAN_GRID), seed=3)
        add(f"wan-ulysses4-mask-{quota}", mask=weights, selector="mask")
        add(f"stdit3-own2-entropy-{quota}", selector="entropy")
        add(f"stdit3-own2-random-{quota}", selector="random")
        bonus = {"grid": 2, "bonus": 0.5, "share_cfg_selection": True}
        add(f"stdit3-own2-bonus-{quota}", selector="entropy", **bonus)
    add("stdit3-own2-full-local", interval=1, selector="random")
    # Recording a selection sends it round: these are for counting what is sent.
    counted = ("flux-ulysses2-reuse", "flux-ulysses2-random", "flux-ulysses2-late")
    for name in (*counted, "wan-ulysses4-entropy", "stdit3-own2-random"):
        for quota in ("local", "global"):
            made[f"{name}-{quota}-sent"] = replace(made[f"{name}-{quota}"], record=False)
    return made


CASES = cases()
