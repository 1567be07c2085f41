"""Which kernels run: Triton's on a GPU, and in its interpreter on the CPU; torch's elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether this process runs kernels in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1`)."""

MAX_TRITON_KEYS = 2**22
"""So that a place among the partial gradients, `BACKWARD_CAPACITY * keys * head_dim`, is an int32: an int64 for each row of a
tile would spill registers."""


def register(name: str, function: Callable[..., Any]) -> Any:
    """Registers an operator whose implementation launches Triton kernels, into which compilers see: a `triton_op`. In the
    interpreter there is nothing to see; there it is an opaque operator."""
    if INTERPRETED:
        return torch.library.custom_op(name, function, mutates_args=())
    return torch.library.triton_op(name, function, mutates_args=())


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels are the ones for this tensor."""
    return tensor.device.type == "cuda" or (INTERPRETED and tensor.device.type == "cpu")
