"""Tiny models, a sampling loop and a naive ToCa: what the tests of the runtime compare with.

Only settings and plans, plain numbers, come from the package.
"""

import copy
import functools
import os
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit import random_dit, randomize
from toca_kernels import ToCaConfig

NULL = 1000  # the label of guidance's unconditional half
SOURCES = ("facebook", "diffusers")


# --- models --------------------------------------------------------------------------------------


def tiny_dit(**shape: int) -> nn.Module:
    """A DiT of facebookresearch's structure: 3 blocks, 32 channels; 64 tokens of a 16 x 16 latent.

    One position embedding serves all tokens, so that an image may have any size.
    """
    defaults = {"channels": 32, "num_heads": 4, "depth": 3, "input_size": 2}
    return random_dit("S", **(defaults | shape))


def diffusers() -> Any:
    """The package, which tests can do without."""
    import pytest

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("diffusers", reason="diffusers is not installed")
    library.utils.logging.set_verbosity_error()
    return library


def tiny_transformer(**settings: Any) -> nn.Module:
    """diffusers' DiT, of the size of `tiny_dit`."""
    defaults = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 16,
        "patch_size": 2,
        "num_embeds_ada_norm": NULL,
        "norm_type": "ada_norm_zero",
    }
    return randomize(diffusers().DiTTransformer2DModel(**(defaults | settings))).eval()


def tiny_pipeline() -> Any:
    """DiTPipeline around `tiny_transformer`; it always decodes, so it has a tiny autoencoder."""
    library = diffusers()
    torch.manual_seed(0)
    vae = library.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, sample_size=16
    )
    pipe = library.DiTPipeline(
        transformer=tiny_transformer(),
        vae=vae.eval(),
        scheduler=library.DDIMScheduler(num_train_timesteps=1000, clip_sample=False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(pipe: Any, num_steps: int, labels: Sequence[int] = (3, 7)) -> Tensor:
    """The images, from the same noise in every call."""
    images = pipe(
        class_labels=list(labels),
        guidance_scale=4.0,
        num_inference_steps=num_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        return_dict=False,
    )[0]
    return torch.from_numpy(images)


class InDouble(nn.Module):
    """A transformer in float64 for a pipeline with latents in float32: exact inside a step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.dtype, self.device = torch.float32, torch.device("cpu")  # of the pipeline's latents

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(sample=self.model(x.double(), **kwargs).sample.float())


def tiny_model(source: str) -> nn.Module:
    return {"facebook": tiny_dit, "diffusers": tiny_transformer}[source]()


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.blocks if hasattr(model, "blocks") else model.transformer_blocks


def mlp_of(block: nn.Module) -> nn.Module:
    return block.mlp if hasattr(block, "mlp") else block.ff


def attention_of(block: nn.Module) -> nn.Module:
    return block.attn if hasattr(block, "attn") else block.attn1


# --- sampling ------------------------------------------------------------------------------------


def timesteps(num_steps: int) -> list[int]:
    return torch.linspace(999, 0, num_steps).round().long().tolist()


def call_model(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Predicted noise, unguided."""
    if hasattr(model, "forward_with_cfg"):
        return model(x, t, y)[:, :4]
    return model(x, timestep=t, class_labels=y).sample[:, :4]


def batched_guidance(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Both guidance halves in one call, as published loops do."""
    x, t = torch.cat([x, x]), torch.cat([t, t])
    y = torch.cat([labels, torch.full_like(labels, NULL)])
    if hasattr(model, "forward_with_cfg"):
        return model.forward_with_cfg(x, t, y, 4.0)[: len(labels), :4]
    return guided(*call_model(model, x, t, y).chunk(2))


def separate_guidance(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """One call for each guidance branch."""
    return guided(
        call_model(model, x, t, labels), call_model(model, x, t, torch.full_like(labels, NULL))
    )


def guided(cond: Tensor, uncond: Tensor) -> Tensor:
    """Three channels of four are guided, as in published loops."""
    out = cond.clone()
    out[:, :3] = uncond[:, :3] + 4.0 * (cond[:, :3] - uncond[:, :3])
    return out


def sample(
    model: nn.Module,
    num_steps: int,
    *,
    predict: Callable[..., Tensor] = batched_guidance,
    labels: Sequence[int] = (3, 7),
    size: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    steps: Sequence[float] | None = None,
    each_step: Callable[[int, Tensor], None] = lambda step, x: None,
) -> Tensor:
    """A user's own DDIM loop (eta = 0): the final latents.

    The noise schedule is milder than the published one, whose first step magnifies what a random
    model predicts a hundredfold.  `each_step` sees every step's latents before the model does.
    """
    signal = torch.cumprod(1 - torch.linspace(1e-4, 2e-3, 1001, dtype=torch.float64), 0).tolist()
    steps = timesteps(num_steps) if steps is None else steps
    noise = torch.randn(len(labels), 4, *size, generator=torch.Generator().manual_seed(1))
    x, y = noise.to(dtype), torch.tensor(labels)
    for step, t in enumerate(steps):
        each_step(step, x)
        noise = predict(model, x, torch.full((len(labels),), t), y).to(dtype)
        now = signal[int(t)]
        then = signal[int(steps[step + 1])] if step + 1 < len(steps) else 1.0
        clean = (x - (1 - now) ** 0.5 * noise) / now**0.5
        x = then**0.5 * clean + (1 - then) ** 0.5 * noise
    return x


# --- the naive ToCa ------------------------------------------------------------------------------


class Kept:
    """A module's outputs, and how they moved from one computation of a token to the next.

    Read at a later step as a Taylor expansion of `order` terms in the steps since.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.computed = 0  # times that all tokens were computed

    def write(self, value: Tensor, step: int) -> None:
        """All tokens."""
        if self.computed == 0:
            self.value, self.step = value, torch.full(value.shape[:2], step)
            self.slopes = [torch.zeros_like(value) for _ in range(2)]
        else:
            self.write_at(value, torch.ones(value.shape[:2], dtype=torch.bool), step)
        self.computed += 1

    def write_at(self, value: Tensor, fresh: Tensor, step: int) -> None:
        """Those tokens that are fresh."""
        passed = (step - self.step)[:, :, None]
        first = (value - self.value) / passed
        second = (first - self.slopes[0]) / passed if self.computed > 1 else torch.zeros_like(first)
        keep = ~fresh[:, :, None]
        self.slopes = [
            torch.where(keep, old, new)
            for old, new in zip(self.slopes, (first, second), strict=True)
        ]
        self.value = torch.where(keep, self.value, value)
        self.step = torch.where(fresh, step, self.step)

    def read(self, step: int) -> Tensor:
        passed = (step - self.step)[:, :, None]
        out = self.value
        known = self.order if self.computed > 1 else min(self.order, 2 - self.order)
        for power in range(1, known + 1):
            out = out + passed**power / power * self.slopes[power - 1]
        return out


class NaiveToCa:
    """ToCa (ICLR 2025) on a DiT, from its description: no kernel, no shortcut.

    The whole attention map of the last full step is kept, scores are computed from it anew in every
    cached step, tokens are sorted, gathered and scattered.  Which layers are full, and k, are the
    plan's.  `NaiveToCa.on(model, ...)` replaces the blocks of a copy of the model, for one run.

    Attributes:
        selections: for each step, None if full, else the (layers, B, N) tokens recomputed.
        margin: the smallest difference of two scores that decided anything.  Where it is far above
            the rounding of the scores, every right implementation selects the same tokens.
    """

    @classmethod
    def on(
        cls,
        model: nn.Module,
        config: ToCaConfig,
        num_steps: int,
        grid: tuple[int, int] = (8, 8),
        dtype: torch.dtype = torch.float32,
    ) -> tuple[nn.Module, "NaiveToCa"]:
        model = copy.deepcopy(model).to(dtype)
        return model, cls(model, config, num_steps, grid)

    def __init__(
        self, model: nn.Module, config: ToCaConfig, num_steps: int, grid: tuple[int, int]
    ) -> None:
        blocks = blocks_of(model)
        tokens = grid[0] * grid[1]
        plan = config.plan(num_steps=num_steps, num_layers=len(blocks), num_tokens=tokens)
        self.full, self.k = plan.full["mlp"], plan.k["mlp"]
        self.config, self.grid = config, grid
        self.step = -1
        self.attn = [Kept(config.forecast) for _ in blocks]
        self.map: dict[int, Tensor] = {}
        self.mlp = [Kept(config.forecast) for _ in blocks]
        self.age: dict[int, Tensor] = {}
        self.fresh: list[list[Tensor]] = []
        self.margin = float("inf")
        for layer, block in enumerate(blocks):
            block.forward = functools.partial(self.forward, layer, block)

    @property
    def selections(self) -> list[Tensor | None]:
        return [
            None if self.full[step].all() else torch.stack(layers)
            for step, layers in enumerate(self.fresh)
        ]

    def forward(
        self, layer: int, block: nn.Module, x: Tensor, *args: Tensor, **kwargs: Any
    ) -> Tensor:
        if layer == 0:
            self.step += 1
            self.fresh.append([])
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            chunk[:, None] for chunk in modulations(block, x, *args, **kwargs).chunk(6, dim=1)
        )
        eps_a, eps_m = epsilons(block)

        def norm(x: Tensor, eps: float) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], eps=eps)

        if self.full[self.step, layer]:
            attn, self.map[layer] = attention(block, norm(x, eps_a) * (1 + scale_a) + shift_a)
            self.attn[layer].write(attn, self.step)
            self.age[layer] = torch.zeros(x.shape[:2], dtype=x.dtype)
            x = x + gate_a * attn
            out = mlp(block, norm(x, eps_m) * (1 + scale_m) + shift_m)
            self.mlp[layer].write(out, self.step)
            self.fresh[-1].append(torch.ones(x.shape[:2], dtype=torch.bool))
            return x + gate_m * out

        x = x + gate_a * self.attn[layer].read(self.step)
        index = self.select(layer, int(self.k[self.step, layer]))
        self.fresh[-1].append(torch.zeros(x.shape[:2], dtype=torch.bool).scatter_(1, index, True))
        at = index[:, :, None].expand(-1, -1, x.shape[2])
        fresh = mlp(block, norm(x.gather(1, at), eps_m) * (1 + scale_m) + shift_m)
        rows = torch.zeros_like(x).scatter(1, at, fresh)
        self.mlp[layer].write_at(rows, self.fresh[-1][-1], self.step)
        return x + gate_m * self.mlp[layer].read(self.step)

    def select(self, layer: int, k: int) -> Tensor:
        """(B, k) tokens: s1 (attention received), s3 (age), s4 (the best of every cell)."""
        received = self.map[layer].sum(dim=1)
        score = received / received.norm(dim=1, keepdim=True).clamp(min=1e-12)
        score = score + self.config.age_weight * self.age[layer] / self.config.interval
        if self.config.grid > 1 and self.config.bonus:
            score = self.with_bonus(score)
        ranked, order = score.sort(dim=1, descending=True, stable=True)
        if 0 < k < score.shape[1]:
            self.decided_by(ranked[:, k - 1] - ranked[:, k])
        index = order[:, :k]
        self.age[layer] = (self.age[layer] + 1).scatter(1, index, 0.0)
        return index

    def with_bonus(self, score: Tensor) -> Tensor:
        (rows, cols), side = self.grid, self.config.grid
        out = score.clone()
        for sample in range(len(score)):
            for top in range(0, rows, side):
                for left in range(0, cols, side):
                    cell = [
                        row * cols + col
                        for row in range(top, min(top + side, rows))
                        for col in range(left, min(left + side, cols))
                    ]
                    values = score[sample, cell]
                    best = cell[int(values.argmax())]
                    out[sample, best] *= 1 + self.config.bonus
                    if len(cell) > 1:
                        first, second = values.sort(descending=True).values[:2]
                        self.decided_by(first - second)
        return out

    def decided_by(self, difference: Tensor) -> None:
        self.margin = min(self.margin, difference.min().item())


def reuse_attention(
    model: nn.Module, full: Collection[int], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A copy of the model whose attention returns, in steps that are not full, what it last did."""
    model = copy.deepcopy(model).to(dtype)
    step = -1

    def count(module: nn.Module, inputs: Any) -> None:
        nonlocal step
        step += 1

    blocks_of(model)[0].register_forward_pre_hook(count)
    for block in blocks_of(model):
        kept: dict[str, Tensor] = {}

        def hook(
            module: nn.Module, inputs: Any, out: Tensor, kept: dict[str, Tensor] = kept
        ) -> Tensor:
            if step in full:
                kept["out"] = out
            return kept["out"]

        attention_of(block).register_forward_hook(hook)
    return model


def modulations(block: nn.Module, x: Tensor, *args: Tensor, **kwargs: Any) -> Tensor:
    """(B, 6 C): shift, scale and gate of the attention, then of the MLP."""
    if hasattr(block, "adaLN_modulation"):
        return block.adaLN_modulation(*args)
    norm = block.norm1
    condition = norm.emb(kwargs["timestep"], kwargs["class_labels"], hidden_dtype=x.dtype)
    return norm.linear(F.silu(condition))


def epsilons(block: nn.Module) -> tuple[float, float]:
    if hasattr(block, "adaLN_modulation"):
        return block.norm1.eps, block.norm2.eps
    return block.norm1.norm.eps, block.norm3.eps


def attention(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(output, head-averaged map (B, N, N))."""
    B, N, C = x.shape
    if hasattr(block, "attn"):
        heads, out = block.attn.num_heads, block.attn.proj
        q, k, v = block.attn.qkv(x).chunk(3, dim=2)
    else:
        heads, out = block.attn1.heads, block.attn1.to_out[0]
        q, k, v = block.attn1.to_q(x), block.attn1.to_k(x), block.attn1.to_v(x)
    q, k, v = (t.view(B, N, heads, C // heads).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(2, 3) * (C // heads) ** -0.5).softmax(dim=3)
    return out((weights @ v).transpose(1, 2).reshape(B, N, C)), weights.mean(dim=1)


def mlp(block: nn.Module, x: Tensor) -> Tensor:
    if hasattr(block, "mlp"):
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    else:
        fc1, fc2 = block.ff.net[0].proj, block.ff.net[2]
    return fc2(F.gelu(fc1(x), approximate="tanh"))


# --- comparing -----------------------------------------------------------------------------------


def assert_close(have: Tensor, exact: Tensor, rounded: Tensor) -> None:
    """|have - exact| <= 4 x the error of `rounded`, plus an ulp of the largest value.

    `exact` is computed in float64, `rounded` is the same in the precision of `have`: how far
    rounding alone leads.  Other orders of the same sums may be unluckier, but not by far.
    """
    assert have.shape == exact.shape
    assert torch.isfinite(exact).all()
    error = (have.double() - exact).abs().max()
    ulp = torch.finfo(have.dtype).eps * exact.abs().max()
    budget = 4 * (rounded.double() - exact).abs().max() + ulp
    assert error <= budget, f"error {error:.3g}, budget {budget:.3g}"
