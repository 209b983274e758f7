"""The extension, as native.py calls it; csrc/toca.h says what the numbers mean."""

from collections.abc import Sequence

# (first slope, second or 0, distance, how many slopes, how often all tokens have been computed)
_Forecast = tuple[int, int, int, int, int] | None

def attention_scores(
    ptr: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    scale: float,
    dtype: int,
    threads: int,
) -> None: ...
def attention_entropy(
    ptr: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    scale: float,
    dtype: int,
    threads: int,
) -> None: ...
def select_tokens(
    ptr: Sequence[int],
    size: Sequence[int],
    age_weight: float,
    bonus: float,
    threads: int,
    where: tuple[int, int] | None,
) -> None: ...
def select_tokens_scratch(R: int, N: int) -> int: ...
def gather_modulate(
    ptr: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    eps: float,
    rms: bool,
    dtype: int,
    cache_dtype: int,
    threads: int,
    where: tuple[int, int] | None,
    forecast: _Forecast,
) -> None: ...
def scatter_residual(
    x: int,
    out: int,
    size: Sequence[int],
    updates: Sequence[tuple[int, int, int, int, int, int, int, int, int, _Forecast]],
    dtype: int,
    threads: int,
    where: tuple[int, int] | None,
) -> None: ...
def store_rows(
    ptr: Sequence[int],
    size: Sequence[int],
    dtype: int,
    cache_dtype: int,
    threads: int,
    where: tuple[int, int] | None,
    forecast: _Forecast,
) -> None: ...
def read_rows(
    ptr: Sequence[int],
    size: Sequence[int],
    dtype: int,
    cache_dtype: int,
    threads: int,
    where: tuple[int, int] | None,
    forecast: _Forecast,
) -> None: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def choose_isa(name: str) -> None: ...
def cuda_toolkit() -> int: ...
def cuda_driver() -> int: ...
def cuda_devices() -> tuple[int, str]: ...
