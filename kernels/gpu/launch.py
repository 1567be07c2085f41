"""Launching a kernel, and its launch parameters: a table by architecture, kernel, element size and head dim.

`launch_table.json` is written by `bench/tune.py` on a GPU and read here. Sizes that can change at run time never choose an
entry and are never compile-time constants.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rewriter.kernels import dispatch
from rewriter.kernels.dispatch import INTERPRETED
from rewriter.kernels.gpu.targets import TARGETS
from rewriter.kernels.gpu.targets import of_capability

TABLE = Path(__file__).with_name("launch_table.json")
HEAD_DIMS = (64, 128, 256)
"""Head dims of the table; others take the next larger one's entry."""

UNSPECIALIZED = (
    *("num_queries", "num_keys", "num_tiles", "num_splits", "num_partial", "list_size"),
    *("num_blocks", "num_spans", "span"),
    *("range_stride_b", "range_stride_h", "stride_order_b", "stride_bias_b", "stride_bias_h", "stride_key_index_b"),
    *("stride_start_b", "stride_start_h", "stride_end_b", "stride_end_h", "stride_query_index_b"),
)
"""Lengths, and strides that follow from them. Kernels take them with `do_not_specialize`: Triton would compile a kernel anew
for each combination of those that are 1 or a multiple of 16. The strides of rows, whose alignment makes loads wide, stay. A name
counts in every kernel."""


@dataclass(frozen=True)
class LaunchConfig:
    """Rows of a query tile, keys of a block, warps of a program, stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


Table = dict[str, dict[str, dict[str, dict[str, list[int]]]]]
"""Architecture, kernel, bits of an element, head dim: block_m, block_n, num_warps, num_stages."""


@functools.cache
def table() -> Table:
    return json.loads(TABLE.read_text())


_override: Table | None = None


@contextmanager
def use_table(entries: Table) -> Iterator[None]:
    """Inside, launches take their parameters from `entries` instead of the file: for tuning and for tests."""
    global _override
    _override = entries
    try:
        yield
    finally:
        _override = None


def launch_config(architecture: str, kernel: str, element_size: int, head_dim: int) -> LaunchConfig:
    """The table's entry for a head dim (the larger of key's and value's) and an element size in bytes."""
    if architecture == "interpreter":
        return LaunchConfig(32 if kernel == "backward_query" else 16, 16, 1, 1)
    entries = table() if _override is None else _override
    size = next(size for size in HEAD_DIMS if head_dim <= size)
    return LaunchConfig(*entries[architecture][kernel][str(8 * element_size)][str(size)])


def architecture(device: torch.device) -> str:
    """The part of the table for a device."""
    if _recording is not None:
        return _recording.architecture
    return "interpreter" if INTERPRETED else _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    return "gfx942" if torch.version.hip else of_capability(torch.cuda.get_device_capability(device))


def processors(device: torch.device) -> int:
    """Of a device, or of the one that launches are recorded for: so many programs run at once, or a few times as many."""
    if _recording is not None:
        return TARGETS[_recording.architecture].processors
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of done: kernel, positional arguments, compile-time constants and parameters."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@dataclass
class _Recording:
    architecture: str
    launches: list[Launch]


_recording: _Recording | None = None


@contextmanager
def record_launches(architecture: str) -> Iterator[list[Launch]]:
    """Inside, nothing is launched: the launches that an architecture would see are listed. Tensors can be on any device."""
    global _recording
    _recording = _Recording(architecture, [])
    try:
        with dispatch.recording():
            yield _recording.launches
    finally:
        _recording = None


def launch(kernel: Any, grid: tuple[Any, ...]) -> Callable[..., None]:
    """`launch(kernel, grid)(*arguments, **constants)`; becomes a node of the graph while one is traced."""
    if _recording is not None:
        launches = _recording.launches
        return lambda *arguments, **constants: launches.append(Launch(kernel, arguments, constants))
    if INTERPRETED:
        return kernel[grid]

    def start(*arguments: Any, **constants: Any) -> None:
        # Triton launches on the current device, which need not be the tensors'; a compiler sees to that itself.
        elsewhere = arguments[0].is_cuda and not torch.compiler.is_compiling()
        with torch.cuda.device(arguments[0].device) if elsewhere else nullcontext():
            torch.library.wrap_triton(kernel)[grid](*arguments, **constants)

    return start
