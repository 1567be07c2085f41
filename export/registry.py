"""The targets of an export: a new one is a file in `targets/` and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rewriter.export.artifact import ExportReport
from rewriter.export.targets import aot
from rewriter.export.targets import onnx
from rewriter.export.targets import onnx_runtimes
from rewriter.export.targets import tensorrt
from rewriter.export.targets import tensorrt_runner
from rewriter.export.targets.written import Written


@dataclass(frozen=True)
class Target:
    """Attributes:
    open_calls: `open_calls(path, report)` gives an artifact's entry points, by name, as functions of tensors; with `runtime`,
        where a target leaves a choice.
    write: `write(optimized, kwargs, path, **options)` makes the artifact; None where another target writes it.
    cannot_run: why this machine runs no such artifact; "" where it does.
    runtimes: those that it can be opened in, where there is a choice; the first when none is asked for.
    """

    open_calls: Callable[..., dict[str, Callable[..., Any]]]
    write: Callable[..., Written] | None = None
    cannot_run: Callable[[ExportReport], str] = lambda report: ""
    runtimes: tuple[str, ...] = ()


TARGETS = {
    "aot_inductor": Target(aot.open_calls, aot.write),
    "onnx": Target(onnx_runtimes.open_calls, onnx.write, runtimes=tuple(onnx_runtimes.RUNTIMES)),
    # What TensorRT's parser takes is an ONNX file; the engine that it makes is an artifact beside it.
    "tensorrt": Target(onnx_runtimes.open_calls, tensorrt.write, runtimes=tuple(onnx_runtimes.RUNTIMES)),
    tensorrt.ENGINE: Target(tensorrt_runner.open_calls, cannot_run=tensorrt_runner.cannot_run),
}
"""By the name that a report carries."""
