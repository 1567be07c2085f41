"""Export: an optimized model as an artifact that runs without this package, and verifies itself.

`aot_inductor` compiles a package for Python and C++ (`runner/`), `onnx` writes a file for any runtime, `tensorrt` what TensorRT
builds an engine from. Each reloads what it wrote in a fresh process and compares it with the model.
"""

from __future__ import annotations

from rewriter.export.artifact import ExportReport
from rewriter.export.exporters import aot_inductor
from rewriter.export.exporters import onnx
from rewriter.export.exporters import tensorrt
from rewriter.export.loading import Artifact
from rewriter.export.loading import load
from rewriter.export.verify import compare

from rewriter.errors import ArtifactError
from rewriter.errors import ExportError

__all__ = [
    "Artifact",
    "ArtifactError",
    "ExportError",
    "ExportReport",
    "aot_inductor",
    "compare",
    "load",
    "onnx",
    "tensorrt",
]
