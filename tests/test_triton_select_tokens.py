"""select_tokens in Triton's interpreter: equal to the reference, bit for bit."""

import sys

import pytest
import torch

import interpreter
from interpreter import needs_triton
from toca_kernels import select_tokens

pytestmark = needs_triton

NONE = {}
BONUS = {"cell": 2, "bonus": 0.6}

CASES = [
    pytest.param(4, 256, 18, {"grid": (16, 16), **BONUS, "age_weight": 0.0625}, id="dit-xl"),
    pytest.param(3, 256, [0, 256, 17], {"grid": (16, 16), **BONUS}, id="ragged"),
    pytest.param(2, 35, 7, {"grid": (5, 7), "cell": 3, "bonus": 0.4}, id="border-tiles-cut-short"),
    pytest.param(2, 60, 9, {"grid": (3, 4, 5), **BONUS}, id="frames"),
    pytest.param(2, 24, 5, {"grid": (4, 6), "cell": 24, "bonus": 1.0}, id="one-tile"),
    pytest.param(2, 20, 6, {"grid": (20, 1, 1), **BONUS}, id="a-tile-for-each-token"),
    pytest.param(2, 33, 1, NONE, id="best-only"),
    pytest.param(2, 33, 33, NONE, id="all"),
    pytest.param(2, 33, 0, NONE, id="none"),
    pytest.param(1, 1, 1, NONE, id="one-token"),
    pytest.param(0, 5, 2, NONE, id="no-row"),
    pytest.param(2, 0, 0, NONE, id="no-token"),
    pytest.param(1, 9001, 900, {"age_weight": 0.1}, id="three-chunks"),
    pytest.param(1, 131072, 13107, {"grid": (32, 64, 64), **BONUS}, id="video"),
    pytest.param(1, 9000, 900, {"grid": (90, 100), **BONUS}, id="tiles-across-chunks"),
]


def compare(score, age, k, **options):
    """The selection of both backends is the same, and so are the ages."""
    expected_age = age.clone()
    result = interpreter.call("select_tokens", score, age, k, **options)
    expected = select_tokens(score, expected_age, k, **options, backend="reference")
    assert torch.equal(result.index, expected.index)
    assert torch.equal(result.inverse, expected.inverse)
    assert torch.equal(result.nan, expected.nan)
    assert torch.equal(age, expected_age)
    assert result.k == expected.k
    return result


def ages(R, N):
    return torch.randint(0, 9, (R, N), dtype=torch.int32)


@pytest.mark.parametrize(("R", "N", "k", "options"), CASES)
def test_equals_reference(R, N, k, options):
    compare(torch.randn(R, N), ages(R, N), k, **options)


@pytest.mark.parametrize("k", [1, 5, 20, 39])
def test_ties_go_to_the_lower_index(k):
    compare(torch.randint(0, 3, (3, 40)).float(), ages(3, 40) % 2, k, age_weight=1.0)
    compare(torch.zeros(1, 40), ages(1, 40), k, grid=(5, 8), **BONUS)


def test_signed_zeros_are_equal():
    score = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    assert compare(score, torch.zeros(1, 5, dtype=torch.int32), 3).index.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("k", [0, 1, 3, 6])
def test_nan_ranks_with_minus_infinity_and_is_counted(k):
    nan, inf = torch.nan, torch.inf
    score = torch.tensor([[nan, 1.0, -inf, nan, inf, 0.0], [nan] * 6])
    compare(score, ages(2, 6), k, age_weight=0.5)
    compare(score, ages(2, 6), k, age_weight=0.5, grid=(2, 3), **BONUS)


def test_extremes():
    tiny, huge = 1e-45, 3.4028235e38
    score = torch.tensor([[tiny, -tiny, huge, -huge, 1.1754944e-38, 0.0, torch.inf, -torch.inf]])
    for k in range(9):
        compare(score, torch.zeros(1, 8, dtype=torch.int32), k)
        compare(score, torch.zeros(1, 8, dtype=torch.int32), k, grid=(2, 4), **BONUS)


def test_age_counts_as_in_the_reference():
    """Sums that a fused multiply-add would round to another float32."""
    score = torch.rand(4, 300) * 1e-3
    age = torch.randint(0, 1 << 30, (4, 300), dtype=torch.int32)
    compare(score, age, 30, age_weight=1e-9 / 3)


def test_ages_over_many_steps():
    age = torch.zeros(2, 50, dtype=torch.int32)
    for _ in range(6):
        compare(torch.randn(2, 50), age, 11, age_weight=0.3)


# --- where the rows of a ragged selection begin --------------------------------------------------


class Stream:
    """Of a pretended GPU: keeps what was asked of it."""

    def __init__(self, number):
        self.cuda_stream, self.asked = number, []

    def record_event(self):
        self.asked.append("record")
        return f"event of {self.cuda_stream}"

    def wait_event(self, event):
        self.asked.append(f"wait for {event}")


class PretendedGPU:
    """Offsets on the host and the streams of a GPU; `copies` says how each copy was made."""

    def __init__(self, monkeypatch):
        from toca_kernels.triton import select_tokens  # the launcher

        module = sys.modules[select_tokens.__module__]
        self.offsets, self.copies = module._offsets, []
        self.device = torch.device("cuda", 0)
        self.stream, self.capturing, self.pinned = Stream(1), False, False
        monkeypatch.setattr(module, "_kept", {})
        monkeypatch.setattr(module, "_host_offsets", lambda k: self)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)

    def pin_memory(self):
        self.pinned = True
        return self

    def to(self, device, non_blocking=False):
        self.copies.append(("pinned" if self.pinned else "pageable", non_blocking))
        self.pinned = False
        return object()

    def of(self, *k):
        return self.offsets(k, self.device)


@pytest.fixture
def gpu(monkeypatch):
    return PretendedGPU(monkeypatch)


def test_offsets_are_copied_once_and_nobody_waits(gpu):
    first = gpu.of(3, 1)
    assert gpu.of(3, 1) is first
    assert gpu.of(1, 3) is not first
    assert gpu.copies == [("pinned", True)] * 2
    assert gpu.stream.asked == ["record"] * 2


def test_another_stream_waits_for_the_copy(gpu):
    first, gpu.stream = gpu.of(3, 1), Stream(2)
    assert gpu.of(3, 1) is first
    assert gpu.stream.asked == ["wait for event of 1"]
    assert len(gpu.copies) == 1


def test_a_graph_reads_offsets_that_are_there(gpu):
    first = gpu.of(3, 1)
    gpu.capturing, gpu.stream = True, Stream(2)
    assert gpu.of(3, 1) is first
    assert gpu.stream.asked == [], "an event of before the capture cannot be waited for"


def test_a_graph_repeats_a_copy_of_new_offsets(gpu):
    gpu.capturing = True
    captured = gpu.of(3, 1)
    assert gpu.copies == [("pageable", True)]
    gpu.capturing = False
    assert gpu.of(3, 1) is not captured, "there before the first replay, so nobody else reads it"
    assert gpu.stream.asked == ["record"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("warm", [False, True])
def test_a_new_ragged_k_is_captured(warm):
    k = [5, 1, 7] if warm else [2, 9, 4]
    score, age = torch.randn(3, 100, device="cuda"), ages(3, 100).cuda()
    select_tokens(score, age.clone(), 3, backend="triton")  # compiled
    select_tokens(score, age.clone(), [1, 2, 3], backend="triton")
    if warm:
        torch.cuda.set_sync_debug_mode("error")
        try:
            select_tokens(score, age.clone(), k, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    before = age.clone()
    with torch.cuda.graph(graph):
        result = select_tokens(score, age, k, backend="triton")
    for _ in range(3):
        expected = select_tokens(score, before, k, backend="reference")
        graph.replay()
        assert torch.equal(result.index, expected.index)
        assert torch.equal(age, before)
