"""The CPU's operators in C++ (`live_range_attention.cpp`): compiled by Inductor's toolchain at first use, and kept in its cache.

The source registers itself for CPU tensors with PyTorch's dispatcher, so that a call of an operator does not pass through Python.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("live_range_attention.cpp")
_FLAGS = ("-ftree-loop-vectorize",)  # which Inductor's own code is compiled without


_lock = threading.Lock()
_in_background: list[threading.Thread] = []


def load() -> bool:
    """Compiles and registers the operators; False, after a warning, where they cannot be compiled."""
    with _lock:
        return _loaded()


def load_in_background() -> None:
    """Begins `load`, which is some 6 s of a C++ compiler's, beside what else is done before the first attention is computed."""
    if not _in_background:
        _in_background.append(threading.Thread(target=load, daemon=True))
        _in_background[0].start()


@functools.cache
def _loaded() -> bool:
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
