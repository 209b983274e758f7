"""The Triton backend as a whole: when it is imported, where it runs, what it never reads."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interpreter
import toca_kernels as toca
from interpreter import needs_triton

PACKAGE = Path(toca.__file__).parent / "triton"


def test_is_imported_on_first_use_only():
    code = """
import sys, torch, toca_kernels as toca
toca.gather_modulate(torch.ones(1, 2, 3), None, *torch.ones(2, 1, 3))
assert not {"triton", "toca_kernels.triton"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@needs_triton
def test_refuses_the_cpu_and_says_what_to_do():
    x = torch.ones(1, 2, 3)
    message = "backend 'triton' runs on cuda, the tensors are on cpu; set TRITON_INTERPRET=1"
    with pytest.raises(RuntimeError, match=message):
        toca.gather_modulate(x, None, x[:, 0], x[:, 0], backend="triton")


@needs_triton
def test_kernels_refuse_the_cpu_themselves():
    from toca_kernels import triton

    x = torch.ones(1, 2, 3)
    with pytest.raises(RuntimeError, match="the tensors are on cpu"):
        triton.scatter_residual(x, [None], [x.clone()], [None], [None], x)


@needs_triton
def test_a_device_without_kernels_is_refused():
    x = torch.ones(1, 2, 3, device="meta")
    with pytest.raises(RuntimeError, match="runs on cuda, the tensors are on meta"):
        toca.gather_modulate(x, None, x[:, 0], x[:, 0], backend="triton")


def test_status_without_triton(monkeypatch):
    reason = "Triton is not installed: pip install 'toca_kernels[triton]'"
    monkeypatch.setattr(toca._backends, "_TRITON_MISSING", reason)
    monkeypatch.setitem(toca._backends._DEVICES, "triton", ())
    assert toca.backends()["triton"] == toca.BackendStatus(False, (), reason)
    x = torch.ones(1, 2, 3)
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        toca.gather_modulate(x, None, x[:, 0], x[:, 0], backend="triton")


def test_default_on_cuda(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setitem(toca._backends._DEVICES, "triton", ("cuda",))
    assert toca._backends.resolve(None, cuda) == "triton"
    monkeypatch.setitem(toca._backends._DEVICES, "triton", ())
    assert toca._backends.resolve(None, cuda) == "reference"


@needs_triton
def test_index_out_of_range_is_caught_in_debug_mode():
    """TRITON_DEBUG=1: Triton then compiles device_assert; the interpreter here evaluates it."""
    x = torch.ones(1, 4, 8)
    for index in (-1, 4):
        with pytest.raises(Exception, match=r"index: expected values in \[0, N\)"):
            interpreter.call("gather_modulate", x, torch.tensor([[index]]), x[:, 0], x[:, 0])


@needs_triton
def test_slot_out_of_range_is_caught_in_debug_mode():
    x, fresh = torch.ones(1, 4, 8), torch.ones(1, 2, 8)
    for slot in (-2, 2):
        inverse = torch.full((1, 4), slot, dtype=torch.int32)
        with pytest.raises(Exception, match=r"inverse: expected values in \[-1, k\)"):
            interpreter.call("scatter_residual", x, [(None, x.clone(), fresh, inverse)])


def test_package_reads_no_environment_variable():
    for path in PACKAGE.glob("*.py"):
        assert "environ" not in path.read_text()
