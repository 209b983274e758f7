"""Fixtures of the op tests: seeds, poisoned memory, backends, instruction sets, threads."""

import importlib.util
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
        help="comma-separated backends that must be available here",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run without a backend that was promised: a broken build cannot pass as skipped.

    With pytest -n, its processes share the cores instead of waiting for each other's threads.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    status = toca.backends()
    for name in filter(None, config.getoption("--require-backends").split(",")):
        if name not in status:
            raise pytest.UsageError(
                f"--require-backends: expected some of {', '.join(status)}, got {name}"
            )
        # Triton's tests bring their own interpreter, so they need no GPU.
        interpreted = name == "triton" and importlib.util.find_spec("triton")
        if not (status[name].available or interpreted):
            raise pytest.UsageError(
                f"--require-backends: {name} is not available: {status[name].reason}"
            )


def need_backend(name: str) -> str:
    status = toca.backends()[name]
    if not status.available:
        pytest.skip(f"backend {name!r} is not available: {status.reason}")
    return name


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on the CPU."""
    return need_backend(request.param)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native backend at every instruction set that is compiled in and that this CPU has."""
    need_backend("native")
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
