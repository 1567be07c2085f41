"""Which kernels run: Triton's on a GPU, and in its interpreter on the CPU; torch's elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether this process runs kernels in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""

MAX_TRITON_KEYS = 2**22
"""So that a place among the partial gradients, `BACKWARD_CAPACITY * keys * head_dim`, is an int32: an int64 for each row of a
tile would spill registers."""


def register(name: str, function: Callable[..., Any], schema: str | None = None) -> Any:
    """Registers an operator whose implementation launches Triton kernels, into which compilers see: a `triton_op`. In the
    interpreter there is nothing to see; there it is an opaque operator.

    Args:
        schema: by torch's rules, arguments and results; that of the function's signature when left out.
    """
    if INTERPRETED:
        return torch.library.custom_op(name, function, mutates_args=(), schema=schema)
    if schema is None:
        return torch.library.triton_op(name, function, mutates_args=())
    # In torch 2.13 a triton_op takes a schema and does not pass it on.
    with patch("torch._library.triton.infer_schema", lambda *_, **__: schema):
        return torch.library.triton_op(name, function, mutates_args=(), schema=schema)


_recording = False


@contextmanager
def recording() -> Iterator[None]:
    """Inside, tensors without data (device "meta") stand for a GPU's: what would be launched is recorded."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels are the ones for this tensor."""
    kind = tensor.device.type
    return kind == "cuda" or (INTERPRETED and kind == "cpu") or (_recording and kind == "meta")
