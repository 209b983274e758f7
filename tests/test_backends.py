"""Which backend a call gets, what is said where there is none, and what these tests notice."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import toca_kernels as toca
from toca_kernels import _backends, native

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")

# One call of every op, on tensors of a device.
CALLS = {
    "attention_scores": lambda device, **options: toca.attention_scores(
        *torch.ones(2, 1, 1, 3, 4, device=device),
        torch.ones(1, 1, 3, device=device),
        scale=1.0,
        **options,
    ),
    "select_tokens": lambda device, **options: toca.select_tokens(
        torch.ones(1, 3, device=device),
        torch.ones(1, 3, dtype=torch.int32, device=device),
        2,
        **options,
    ),
    "gather_modulate": lambda device, **options: toca.gather_modulate(
        torch.ones(1, 3, 4, device=device), None, *torch.ones(2, 1, 4, device=device), **options
    ),
    "mlp_rows": lambda device, **options: toca.mlp_rows(
        torch.ones(1, 3, 4, device=device),
        (torch.ones(4, 4, device=device), None),
        (torch.ones(4, 4, device=device), None),
        **options,
    ),
    "scatter_residual": lambda device, **options: toca.scatter_residual(
        torch.ones(1, 3, 4, device=device),
        [(None, torch.ones(1, 3, 4, device=device))],
        **options,
    ),
    "read_rows": lambda device, **options: toca.read_rows(
        torch.ones(1, 3, 4, device=device), **options
    ),
}
every_op = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def test_status_says_what_is_usable_and_why():
    for name, status in toca.backends().items():
        assert name in _backends.NAMES
        assert status.reason
        assert bool(status.devices) == status.available
    assert toca.backends()["reference"].available


def test_status_names_the_instruction_set_in_use(isa):
    assert f"{isa} chosen" in toca.backends()["native"].reason


def test_an_unknown_instruction_set_is_refused(isa):
    with pytest.raises(ValueError, match=re.escape("isa: expected one of isas(), got mmx")):
        native._C.choose_isa("mmx")
    assert native._C.isa() == isa


def test_none_is_the_fastest_body_for_the_device(isa):
    assert _backends.resolve(None, CPU) == "native"
    assert _backends.resolve(None, META) == "reference"


@every_op
@pytest.mark.parametrize("name", ["numpy", "", 3, ["native"]])
def test_an_unknown_name_is_refused(call, name):
    message = rf"backend: expected one of reference, native, .*got {re.escape(repr(name))}"
    with pytest.raises(ValueError, match=message):
        call(CPU, backend=name)


@every_op
def test_a_named_backend_is_not_replaced_on_another_device(call, isa):
    message = "backend 'native' runs on cpu(, cuda)?, the tensors are on meta"
    with pytest.raises(RuntimeError, match=message):
        call(META, backend="native")


@pytest.fixture
def on_cuda(monkeypatch):
    """As where all bodies for CUDA can run; nothing is launched."""
    monkeypatch.setattr(_backends, "_CUDA_MISSING", "")
    monkeypatch.setitem(_backends._DEVICES, "native", ("cpu", "cuda"))
    monkeypatch.setitem(_backends._DEVICES, "triton", ("cuda",))


def test_the_choice_on_cuda_goes_by_the_op(on_cuda, monkeypatch):
    for op in (None, "attention_scores", *_backends._ON_CUDA):
        order = _backends._ON_CUDA.get(op, ("triton",))
        assert _backends.resolve(None, CUDA, op=op) == order[0]
    monkeypatch.setitem(_backends._ON_CUDA, "select_tokens", ("native", "triton"))
    assert _backends.resolve(None, CUDA, op="select_tokens") == "native"
    assert _backends.resolve(None, CPU, op="select_tokens") == "native"


def test_without_triton_cuda_gets_the_native_bodies_that_there_are(on_cuda, monkeypatch):
    monkeypatch.setitem(_backends._DEVICES, "triton", ())
    assert _backends.resolve(None, CUDA, op="gather_modulate") == "native"
    assert _backends.resolve(None, CUDA, op="attention_scores") == "reference"
    assert _backends.resolve(None, CUDA) == "reference"


def test_an_op_without_a_native_body_on_cuda_is_refused_by_name(on_cuda):
    assert _backends.resolve("native", CUDA, op="gather_modulate") == "native"
    with pytest.raises(RuntimeError, match="'native' has no body of attention_scores on cuda"):
        _backends.resolve("native", CUDA, op="attention_scores")


def test_a_refusal_says_why_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(_backends, "_CUDA_MISSING", "there is no CUDA driver")
    monkeypatch.setitem(_backends._DEVICES, "native", ("cpu",))
    message = "runs on cpu, the tensors are on cuda:0; CUDA bodies: there is no CUDA driver"
    with pytest.raises(RuntimeError, match=message):
        _backends.resolve("native", CUDA)
    assert "CUDA bodies: there is no CUDA driver" in toca.backends()["native"].reason


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ((1, ""), "CUDA bodies: compiled in with CUDA 12.8"),
        ((0, ""), "compiled in with CUDA 12.8, but no device can be used: there is none"),
        ((-1, "out of memory"), "but no device can be used: out of memory"),
    ],
)
def test_status_says_what_cuda_says(devices, reason, on_cuda, monkeypatch):
    class Extension:
        cuda_toolkit = staticmethod(lambda: 12080)
        cuda_devices = staticmethod(lambda: devices)
        isa = staticmethod(lambda: "avx2")
        isas = staticmethod(lambda: ["avx2"])

    monkeypatch.setattr(_backends, "_C", Extension, raising=False)
    status = toca.backends()["native"]
    assert status.reason.endswith(reason)
    assert ("cuda" in status.devices) == (devices[0] > 0)
    assert status.available


@every_op
def test_shapes_without_values(call):
    """On the meta device an op says the shape and dtype of its result and computes nothing."""
    shapes = [
        [
            (value.shape, value.dtype)
            for value in (
                [out] if isinstance(out, torch.Tensor) else [out.index, out.inverse, out.nan]
            )
        ]
        for out in (call(CPU), call(META))
    ]
    assert shapes[0] == shapes[1]


@pytest.fixture
def without_native(monkeypatch):
    reason = "the extension is not built (no compiler)"
    monkeypatch.setattr(_backends, "_NATIVE_MISSING", reason)
    monkeypatch.setattr(_backends, "_CUDA_MISSING", reason)
    monkeypatch.setitem(_backends._DEVICES, "native", ())


@every_op
def test_a_missing_backend_is_refused_by_name_only(call, without_native):
    message = "backend 'native' is not available: the extension is not built (no compiler)"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call(CPU, backend="native")
    call(CPU)
    assert _backends.resolve(None, CPU) == "reference"
    assert toca.backends()["native"] == toca.BackendStatus(
        False, (), "the extension is not built (no compiler)"
    )


def test_packed_weights_need_the_native_backend(without_native):
    linear = native.PackedLinear(torch.ones(4, 4), None)
    with pytest.raises(RuntimeError, match="backend 'native' is not available"):
        toca.mlp_rows(torch.ones(1, 3, 4), linear, linear)


def test_calls_from_several_python_threads(isa):
    """The GIL is released in the extension, and its scratch memory belongs to a call."""
    calls = [CALLS["attention_scores"], CALLS["gather_modulate"], CALLS["scatter_residual"]] * 20
    want = [call(CPU, backend="native") for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for have, expected in zip(pool.map(lambda call: call(CPU), calls), want, strict=True):
            assert torch.equal(have, expected)


# --- the tests' own fixtures ---


@pytest.mark.parametrize(
    ("dtype", "poison"),
    [
        (torch.float32, torch.nan),
        (torch.bfloat16, torch.nan),
        (torch.float16, torch.nan),
        (torch.int32, 2**31 - 1),
        (torch.int64, 2**63 - 1),
    ],
    ids=str,
)
def test_new_memory_is_poisoned(dtype, poison):
    given = torch.zeros(3, dtype=dtype)
    poisoned = torch.full((3,), poison, dtype=dtype)
    for fresh in (
        torch.empty(3, dtype=dtype),
        torch.empty_like(given),
        given.new_empty(3),
        torch.empty_strided((3,), (1,), dtype=dtype),
    ):
        torch.testing.assert_close(fresh, poisoned, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["attention_scores", "gather_modulate", "scatter_residual"])
def test_a_kernel_that_writes_nothing_returns_nan(op, isa, monkeypatch):
    monkeypatch.setattr(native, "_C", type("Idle", (), {op: staticmethod(lambda *_: None)}))
    assert CALLS[op](CPU, backend="native").isnan().all()


def test_a_broken_build_cannot_pass_as_skipped():
    """Run a test of the native backend, three times, where the extension cannot be imported."""
    script = """
import sys, pytest
sys.modules["toca_kernels._C"] = None
test = "tests/test_backends.py::test_status_names_the_instruction_set_in_use"
for options in ([], ["--require-backends=reference,native"], ["--require-backends=numpy"]):
    print(int(pytest.main(["-q", "-p", "no:cacheprovider", test, *options])), flush=True)
    print("---")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    skipped, missing, unknown = (run.split() for run in done.stdout.split("---")[:3])
    assert ("skipped" in skipped, skipped[-1]) == (True, "0")
    assert missing[-1] == unknown[-1] == str(int(pytest.ExitCode.USAGE_ERROR))
    assert "--require-backends: native is not available: the extension" in done.stderr
    assert "--require-backends: expected some of reference, native" in done.stderr
