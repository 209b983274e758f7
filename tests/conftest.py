"""Fixtures of the op tests: seeds, poisoned memory, backends, instruction sets, threads."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch

import toca_kernels as toca
from toca_kernels import native

BACKENDS = ("reference", "native")
ISAS = native._C.isas() if native._C is not None else ["not built"]

T = TypeVar("T")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backends",
        default="",
        metavar="NAMES",
        help="comma-separated backends that must be available here: their tests fail, not skip",
    )


def required_backends(config: pytest.Config) -> list[str]:
    return [name for name in config.getoption("--require-backends").split(",") if name]


def pytest_configure(config: pytest.Config) -> None:
    unknown = set(required_backends(config)) - set(toca.backends())
    if unknown:
        raise pytest.UsageError(
            f"--require-backends: expected some of {', '.join(toca.backends())}, "
            f"got {', '.join(sorted(unknown))}"
        )


def need_backend(request: pytest.FixtureRequest, name: str) -> str:
    """Skip the test where a backend is not available; fail it where that was promised."""
    status = toca.backends()[name]
    if not status.available:
        reason = f"backend {name!r} is not available: {status.reason}"
        if name in required_backends(request.config):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    return name


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on the CPU."""
    return need_backend(request, request.param)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native backend at every instruction set that is compiled in and that this CPU has."""
    need_backend(request, "native")
    before = native._C.isa()
    native._C.choose_isa(request.param)
    yield request.param
    native._C.choose_isa(before)


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    """The same random numbers in every test; torch.empty is NaN, so an unwritten result fails.

    (Integers are filled with their maximum, which is no index.)
    """
    torch.manual_seed(0)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.fixture
def with_threads() -> Iterator[Callable[[int, Callable[[], T]], T]]:
    """Calls a function with that many threads."""
    before = torch.get_num_threads()

    def call(threads: int, function: Callable[[], T]) -> T:
        torch.set_num_threads(threads)
        return function()

    yield call
    torch.set_num_threads(before)
