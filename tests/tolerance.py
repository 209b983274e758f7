"""How far a result may be from the exact one: derived from the arithmetic, never chosen.

u is the unit roundoff of float32 (2**-24), ulp the spacing of the output's dtype at the value.

The reference against the oracle.  n float32 roundings of terms that add up to a magnitude m err by
at most n u m (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and the result
is rounded once:

    |reference - exact| <= n u m + 1 ulp

A backend against the reference.  Another order of the same sum may be unluckier, but not by far:

    |result - exact| <= 2 r m + 1 ulp,     r = max(u, the largest |reference - exact| / m)

r is the reference's own error in that dtype, taken over the whole tensor, relative to what an error
is relative to; at least one rounding, for a reference that is exact by luck.

NaN and infinity must be where the exact result has them.  Moved data and indices are equal.
"""

import numpy as np
import torch
from torch import Tensor

from oracle import Exact

UNIT = 2.0**-24


def exact_values(tensor: Tensor | None) -> np.ndarray | None:
    """The tensor's values as the oracles take them: float64, indices as they are."""
    if tensor is None:
        return None
    return (tensor.detach().double() if tensor.is_floating_point() else tensor).numpy()


def ulp(value: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Spacing of dtype at the magnitude of value."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(value)
    spacing = np.ldexp(info.eps, exponent - 1)
    return np.where(np.isfinite(value), np.maximum(spacing, info.tiny * info.eps), 0.0)


def assert_reference_within_bound(
    reference: Tensor, exact: Exact, *, roundings_in_dtype: int = 0
) -> None:
    """`roundings_in_dtype`: intermediate results that are stored in the tensors' dtype."""
    unit = exact.roundings * UNIT + roundings_in_dtype * torch.finfo(reference.dtype).eps / 2
    assert_error_within(reference, exact, unit)


def assert_backend_within_budget(result: Tensor, reference: Tensor, exact: Exact) -> None:
    assert_error_within(result, exact, 2 * max(UNIT, relative_error(reference, exact)))


def relative_error(reference: Tensor, exact: Exact) -> float:
    """The largest error of a reference, relative to the magnitude of what was added up."""
    usable = np.isfinite(exact.value) & np.isfinite(reference.double().numpy())
    usable &= exact.magnitude > 0
    error = abs(reference.double().numpy()[usable] - exact.value[usable]) / exact.magnitude[usable]
    return float(error.max(initial=0.0))


def assert_error_within(result: Tensor, exact: Exact, relative: float) -> None:
    assert result.shape == exact.value.shape, f"shape {tuple(result.shape)}, {exact.value.shape}"
    have = result.detach().double().numpy()
    with np.errstate(invalid="ignore"):
        error = abs(have - exact.value)
        budget = relative * exact.magnitude + ulp(exact.value, result.dtype)
    # Where the exact value overflows the dtype, infinity of its sign is the right answer.
    rounded = torch.from_numpy(exact.value).to(result.dtype).double().numpy()
    special = ~np.isfinite(rounded)
    wrong = np.where(special, ~same(have, rounded), ~(error <= budget))
    if not wrong.any():
        return
    with np.errstate(invalid="ignore", divide="ignore"):
        badness = np.where(wrong, np.nan_to_num(error / budget, nan=np.inf, posinf=np.inf), -1.0)
    worst = np.unravel_index(badness.argmax(), badness.shape)
    at = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{int(wrong.sum())} of {wrong.size} elements are out of budget ({result.dtype}); "
        f"the worst is {at}: got {have[worst]!r}, exact {exact.value[worst]!r}, "
        f"error {error[worst]:.3g}, budget {budget[worst]:.3g}"
    )


def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    """Equal to the bit, except that one NaN is as good as another."""
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    if not result.is_floating_point():
        assert torch.equal(result, expected)
        return
    bits = {2: torch.int16, 4: torch.int32}[result.element_size()]
    differs = result.contiguous().view(bits) != expected.contiguous().view(bits)
    differs &= ~(result.isnan() & expected.isnan())
    if differs.any():
        at = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differs.sum())} of {differs.numel()} elements differ, the first at {at}: "
            f"got {result[at].item()!r}, expected {expected[at].item()!r}"
        )
