"""Native bodies: allocate the result, pass pointers and sizes to the extension, return.

The extension knows nothing of torch.  Everything it is handed was checked in ops.py; what only
the data can tell (an index out of range) its CPU bodies check themselves, before they write.  Its
CUDA bodies follow no such index, and cannot say so: that would be a wait.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate

import torch  # before _C: both then share the OpenMP runtime, and so the threads, of torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .features import ForecastCache

try:
    from . import _C
except ImportError:
    _C = None  # type: ignore[assignment]  # _backends says so; no op resolves to this module then

_DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
}


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row_strides(tensor: Tensor | None) -> tuple[int, int]:
    """(per sample, per token) strides in elements; 0 per token where one row serves a sample."""
    if tensor is None:
        return 0, 0
    return tensor.stride(0), (tensor.stride(1) if tensor.ndim == 3 else 0)


def _where(tensor: Tensor) -> tuple[int, int] | None:
    """The device and torch's current stream on it; None: the CPU bodies run."""
    if tensor.device.type != "cuda":
        return None
    device = tensor.get_device()
    return device, torch.cuda.current_stream(device).cuda_stream


def _forecast(
    slopes: Sequence[Tensor], distance: Tensor | None, computed: int
) -> tuple[int, int, int, int, int] | None:
    """What the extension is told of a cache that is extrapolated."""
    if distance is None:
        return None
    first, *rest = map(_pointer, slopes)
    return first, rest[0] if rest else 0, distance.data_ptr(), len(slopes), computed


def attention_scores(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    if _where(q) is not None:
        raise RuntimeError("backend 'native' has no body of attention_scores on cuda")
    B, H, Nq, D = q.shape
    N = k.shape[2]
    out = torch.empty((B, N), dtype=torch.float32)
    partial = torch.empty((B, H, N), dtype=torch.float32)
    _C.attention_scores(
        (q.data_ptr(), k.data_ptr(), lse.data_ptr(), partial.data_ptr(), out.data_ptr()),
        (B, H, Nq, N, D),
        (*q.stride()[:3], *k.stride()[:3]),
        scale,
        _DTYPES[q.dtype],
        torch.get_num_threads(),
    )
    return out


def attention_entropy(
    q: Tensor, k: Tensor, lse: Tensor | None, scale: float, mask: Tensor | None
) -> Tensor:
    if _where(q) is not None:
        raise RuntimeError("backend 'native' has no body of attention_entropy on cuda")
    B, H, N, D = q.shape
    L = k.shape[2]
    out = torch.empty((B, N), dtype=torch.float32)
    packed = torch.empty((B, H, D, -(-L // 64) * 64), dtype=torch.int32)
    _C.attention_entropy(
        (
            q.data_ptr(),
            k.data_ptr(),
            _pointer(lse),
            _pointer(mask),
            packed.data_ptr(),
            out.data_ptr(),
        ),
        (B, H, N, L, D),
        (*q.stride()[:3], *k.stride()[:3]),
        scale,
        _DTYPES[q.dtype],
        torch.get_num_threads(),
    )
    return out


def select_tokens(
    score: Tensor,
    age: Tensor,
    k: Sequence[int],
    age_weight: float,
    grid: Sequence[int],
    cell: int,
    bonus: float,
) -> tuple[Tensor, Tensor, Tensor]:
    R, N = score.shape
    device, where = score.device, _where(score)
    offsets = _offsets(tuple(k), device) if len(set(k)) > 1 else None
    index = torch.empty((sum(k),), dtype=torch.int64, device=device)
    inverse = torch.empty((R, N), dtype=torch.int32, device=device)
    nan = torch.empty((R,), dtype=torch.int32, device=device)
    words = 0 if where is None else _C.select_tokens_scratch(R, N)
    scratch = torch.empty((words,), dtype=torch.int32, device=device) if words else None
    _C.select_tokens(
        (
            score.data_ptr(),
            age.data_ptr(),
            _pointer(offsets),
            index.data_ptr(),
            inverse.data_ptr(),
            nan.data_ptr(),
            _pointer(scratch),
        ),
        (R, N, k[0] if k else 0, *grid, cell),
        age_weight,
        bonus,
        torch.get_num_threads(),
        where,
    )
    return index, inverse, nan


@functools.lru_cache(maxsize=256)  # on a GPU a copy, which a graph could not hold
def _offsets(k: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(k)], dtype=torch.int64, device=device)


def gather_modulate(
    x: Tensor,
    index: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    cache: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    cache_scale: Tensor | None = None,
    slopes: Sequence[Tensor] = (),
    distance: Tensor | None = None,
) -> Tensor:
    B, N, C = x.shape
    k = N if index is None else index.shape[1]
    out = torch.empty((B, k, C), dtype=x.dtype, device=x.device)
    _C.gather_modulate(
        (
            x.data_ptr(),
            _pointer(index),
            shift.data_ptr(),
            scale.data_ptr(),
            _pointer(gate),
            _pointer(cache),
            _pointer(cache_scale),
            _pointer(weight),
            _pointer(bias),
            out.data_ptr(),
        ),
        (B, N, k, C),
        (*_row_strides(shift), *_row_strides(scale), *_row_strides(gate)),
        eps,
        norm == "rms",
        _DTYPES[x.dtype],
        _DTYPES[x.dtype if cache is None else cache.dtype],
        torch.get_num_threads(),
        _where(x),
        _forecast(slopes, distance, len(slopes) + 1),  # so often computed that all are read
    )
    return out


# The GEMMs are the library's in every backend; only a packed weight makes a difference.
mlp_rows = reference.mlp_rows


def scatter_residual(
    x: Tensor,
    gates: Sequence[Tensor | None],
    caches: Sequence[Tensor],
    fresh: Sequence[Tensor | None],
    inverse: Sequence[Tensor | None],
    out: Tensor,
    scales: Sequence[Tensor | None] | None = None,
    forecasts: Sequence[ForecastCache | None] | None = None,
) -> None:
    B, N, C = x.shape
    nothing = [None] * len(caches)
    _C.scatter_residual(
        x.data_ptr(),
        out.data_ptr(),
        (B, N, C),
        [
            (
                _pointer(gate),
                *_row_strides(gate),
                cache.data_ptr(),
                _pointer(scale),
                _DTYPES[cache.dtype],
                _pointer(rows),
                _pointer(slot),
                0 if rows is None else rows.shape[1],
                None if forecast is None else _forecast(*forecast[1:]),
            )
            for gate, cache, scale, forecast, rows, slot in zip(
                gates, caches, scales or nothing, forecasts or nothing, fresh, inverse, strict=True
            )
        ],
        _DTYPES[x.dtype],
        torch.get_num_threads(),
        _where(x),
    )


def store_rows(
    values: Tensor, scale: Tensor | None, rows: Tensor, forecast: ForecastCache | None = None
) -> None:
    B, N, C = rows.shape
    _C.store_rows(
        (rows.data_ptr(), values.data_ptr(), _pointer(scale)),
        (B * N, C),
        _DTYPES[rows.dtype],
        _DTYPES[values.dtype],
        torch.get_num_threads(),
        _where(rows),
        None if forecast is None else _forecast(*forecast[1:]),
    )


def read_rows(
    values: Tensor,
    index: Tensor | None,
    scale: Tensor | None,
    slopes: Sequence[Tensor],
    distance: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    B, N, C = values.shape
    k = N if index is None else index.shape[1]
    out = torch.empty((B, k, C), dtype=dtype, device=values.device)
    _C.read_rows(
        (values.data_ptr(), _pointer(scale), _pointer(index), out.data_ptr()),
        (B, N, k, C),
        _DTYPES[dtype],
        _DTYPES[values.dtype],
        torch.get_num_threads(),
        _where(values),
        _forecast(slopes, distance, len(slopes) + 1),
    )
    return out


# --- prepacked linears ---------------------------------------------------------------------------

_POST_OPS = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}
_PACK_ROWS = 64  # oneDNN's layout is the same for 16 to 2048 rows; it wants a number


class PackedLinear:
    """A linear's weight in the order in which oneDNN reads it, and its bias.

    torch hands oneDNN a plain weight, which it reorders in every call; at the few rows of a cached
    step that costs as much as the product.  The price is a second copy of the weight (`nbytes`).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        reason = packing_unavailable(weight.dtype, weight.device)
        if reason:
            raise RuntimeError(f"prepacked linear: not available: {reason}")
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.nbytes = weight.numel() * weight.element_size()
        self.bias = bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(
            weight.detach().contiguous(), _PACK_ROWS
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> PackedLinear:
        return cls(linear.weight, None if linear.bias is None else linear.bias.detach())

    def __call__(self, rows: Tensor, activation: str | None = None) -> Tensor:
        post, algorithm = _POST_OPS[activation] if activation else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, post, [], algorithm)


@functools.cache
def packing_unavailable(dtype: torch.dtype, device: torch.device) -> str:
    """Why a weight of this dtype cannot be prepacked here; empty if it can.

    The oneDNN ops behind it are private to torch: a small product is compared with F.linear once.
    """
    if device.type != "cpu":
        return f"oneDNN packs for the CPU, the weight is on {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN has no fast {dtype} linear here"
    rows = torch.linspace(-1, 1, 3 * 32).view(3, 32).to(dtype)
    weight = torch.linspace(-1, 1, 16 * 32).view(16, 32).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        have = torch.ops.mkldnn._linear_pointwise(rows, packed, None, "gelu", [], "tanh")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch's oneDNN linear failed: {error!r}"
    want = F.gelu(F.linear(rows, weight), approximate="tanh")
    if not torch.allclose(have.float(), want.float(), rtol=2e-2, atol=2e-2):
        return "torch's oneDNN linear gave a wrong product"
    return ""


def packed_mlp_rows(rows: Tensor, fc1: PackedLinear, fc2: PackedLinear, activation: str) -> Tensor:
    return fc2(fc1(rows, activation))
