"""The CPU's operators in C++ (`live_range_attention.cpp`): compiled by Inductor's toolchain at first use, and kept in its cache.

The source registers itself for CPU tensors with PyTorch's dispatcher, so that a call of an operator does not pass through Python.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("live_range_attention.cpp")
_FLAGS = ("-ftree-loop-vectorize",)  # which Inductor's own code is compiled without


@functools.cache
def load() -> bool:
    """Compiles and registers the operators; False, after a warning, where they cannot be compiled."""
    from torch._inductor.codecache import CppCodeCache  # slow to import

    try:
        # The source uses functions of this library, which Python has loaded for itself alone.
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
        CppCodeCache.load(SOURCE.read_text(encoding="utf-8"), extra_flags=_FLAGS, needs_vec_isa=True)
    except Exception as error:
        warnings.warn(
            f"the CPU kernel cannot be compiled ({type(error).__name__}: {str(error)[:300]}): attention runs in PyTorch's "
            "operators, several times slower; it needs a C++ compiler that torch.compile can use, such as g++",
            stacklevel=2,
        )
        return False
    return True
