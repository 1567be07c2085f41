"""The targets of an export: a new one is a file in `targets/` and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.export.artifact import ExportReport
from rewriter.export.targets import aot
from rewriter.export.targets import onnx
from rewriter.export.targets import tensorrt
from rewriter.export.targets.written import Written


@dataclass(frozen=True)
class Target:
    """Attributes:
    write: `write(optimized, kwargs, path, **options)` makes the artifact.
    open_calls: `open_calls(path, report)` gives its entry points, by name, as functions of tensors.
    """

    write: Callable[..., Written]
    open_calls: Callable[[Path, ExportReport], dict[str, Callable[..., Any]]]


TARGETS = {
    "aot_inductor": Target(aot.write, aot.open_calls),
    "onnx": Target(onnx.write, onnx.open_calls),
    # What TensorRT's parser takes is an ONNX file.
    "tensorrt": Target(tensorrt.write, onnx.open_calls),
}
"""By the name that a report carries."""
