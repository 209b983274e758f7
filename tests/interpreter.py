"""The triton backend on the CPU: a worker process in which Triton interprets its kernels.

Triton decides when it is imported whether kernels are compiled or interpreted.  The tests of one
pytest run need both, so calls of the ops go to a process of their own, started on first use; their
tensors go there and back by pickle, which keeps strides, and what a call wrote is copied back.

Triton 3.6 to 3.9 hold bfloat16 as integers in the interpreter: a product multiplies bit patterns,
and a cast cuts digits off where a GPU rounds to nearest.  The worker mends both.
"""

import atexit
import dataclasses
import functools
import importlib.util
import io
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: pip install 'toca_kernels[triton]'",
)


class Worker:
    def __init__(self) -> None:
        environment = os.environ | {
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        atexit.register(self.process.kill)

    def call(self, op: str, *arguments: Any, **named: Any) -> Any:
        """toca_kernels.<op>(..., backend="triton"); raises what it raises."""
        self.process.stdin.write(dumps((op, arguments, named)))
        self.process.stdin.flush()
        error, result, after = pickle.load(self.process.stdout)
        if error is not None:
            raise error
        for before, written in zip(tensors(arguments), tensors(after), strict=True):
            if not is_broadcast(before):
                before.copy_(written)
        return result


class _Pickler(pickle.Pickler):
    """torch 2.13 cannot pickle float8: such a tensor goes as the bytes that it is."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == torch.float8_e4m3fn:
            return Tensor.view, (value.view(torch.uint8), value.dtype)
        return NotImplemented


def dumps(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream).dump(value)
    return stream.getvalue()


@functools.cache
def worker() -> Worker:
    return Worker()


def call(op: str, *arguments: Any, **named: Any) -> Any:
    return worker().call(op, *arguments, **named)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dataclasses (a QuantizedCache)."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = list(vars(value).values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def is_broadcast(tensor: Tensor) -> bool:
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


# --- in the worker -------------------------------------------------------------------------------


def check_assertions() -> None:
    """Evaluate device_assert, and so the compiler's own checks for overflow of integers."""
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, debug=True)


def mend_bfloat16() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def rounded(handle: TensorHandle) -> TensorHandle:
        values = torch.from_numpy(np.ascontiguousarray(handle.data)).bfloat16()
        return TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)

    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return create_dot(self, widened(a), widened(b), *rest)

    def cast(self: Any, source: TensorHandle, dtype: Any) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return rounded(source)
        return cast_impl(self, source, dtype)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast


def serve() -> None:
    import toca_kernels as toca
    from toca_kernels import triton

    assert triton.INTERPRETED
    check_assertions()
    mend_bfloat16()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not end up among the answers
    while True:
        try:
            op, arguments, named = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        error, result = None, None
        try:
            result = getattr(toca.ops, op)(*arguments, **named, backend="triton")
        except Exception as raised:
            error = raised
        try:
            answer = dumps((error, result, arguments))
        except Exception:
            answer = dumps((RuntimeError(repr(error)), None, arguments))
        answers.write(answer)
        answers.flush()


if __name__ == "__main__":
    serve()
