"""Runtimes of ONNX files on CPUs: ONNX Runtime, and OpenVINO for files without functions.

Neither has many kernels of 16-bit types; models of these are computed in fp32, and their results rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rewriter.export.artifact import ExportReport
from torch import Tensor

from rewriter.errors import ArtifactError

LARGEST_IN_MEMORY = 2**31 - 2**24
"""Bytes of weights of a model that is handed over in memory, not as a file."""

Results = Mapping[str, np.ndarray]
"""Arrays by the names of a file's results."""

Session = tuple[set[str], Callable[[Mapping[str, np.ndarray]], Results]]
"""The inputs of an open file, and what computes its results."""


def open_calls(path: Path, report: ExportReport, runtime: str = "onnxruntime") -> dict[str, Callable[..., Any]]:
    """The entry points of an artifact.

    Args:
        runtime: one of `RUNTIMES`.

    Raises:
        ArtifactError: the runtime is missing, or cannot load a file.
    """
    return {name: _call(report.file_of(path, name), report, name, runtime) for name in report.entry_points}


def _call(path: Path, report: ExportReport, entry_point: str, runtime: str) -> Callable[..., Sequence[Tensor]]:
    narrow = report.dtype in ("bfloat16", "float16")
    try:
        known, run = RUNTIMES[runtime](in_full_precision(path) if narrow else str(path))
    except ArtifactError:
        raise
    except ImportError as error:
        raise ArtifactError(f"{error}: pip install {runtime}") from None
    except Exception as error:  # whatever the runtime raises
        raise ArtifactError(f"{path} cannot be loaded in {runtime}: {error}") from error
    names = [i.name for i in report.inputs(entry_point)]
    outputs = list(zip(report.entry_points[entry_point]["outputs"], report.output_dtypes(entry_point), strict=True))

    def call(*tensors: Tensor) -> list[Tensor]:
        own = [t.float() if narrow and t.is_floating_point() else t for t in tensors]
        given = {n: t.detach().cpu().contiguous().numpy() for n, t in zip(names, own, strict=True) if n in known}
        arrays = run(given)
        results = [(torch.from_numpy(np.array(arrays[name])), dtype) for name, dtype in outputs]
        return [t.to(dtype) if narrow and t.is_floating_point() else t for t, dtype in results]

    return call


def _in_onnxruntime(file: str | bytes) -> Session:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return {i.name for i in session.get_inputs()}, lambda given: dict(
        zip(names, session.run(names, dict(given)), strict=True)
    )


def _in_openvino(file: str | bytes) -> Session:
    import openvino

    core = openvino.Core()
    # Its own default rounds to bf16 where the processor has that.
    model = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(given: Mapping[str, np.ndarray]) -> Results:
        results = model(dict(given))
        return {name: results[output] for output in model.outputs for name in output.get_names()}

    return {name for own in model.inputs for name in own.get_names()}, run


RUNTIMES: dict[str, Callable[[str | bytes], Session]] = {"onnxruntime": _in_onnxruntime, "openvino": _in_openvino}
"""By the name of their package."""


def in_full_precision(path: Path) -> bytes:
    """A file's model with fp32 in the place of all 16-bit types."""
    import onnx
    from onnx import numpy_helper

    narrow, full = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16), onnx.TensorProto.FLOAT

    def widen(tensor: Any) -> None:
        if tensor.data_type in narrow:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))

    def widen_graph(nodes: Iterable[Any], graph: Any = None) -> None:
        if graph is not None:
            for tensor in graph.initializer:
                widen(tensor)
            for value in (*graph.input, *graph.output, *graph.value_info):
                if value.type.tensor_type.elem_type in narrow:
                    value.type.tensor_type.elem_type = full
        for node in nodes:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow:
                    attribute.i = full
                elif attribute.type == onnx.AttributeProto.TENSOR:
                    widen(attribute.t)
                elif attribute.type == onnx.AttributeProto.GRAPH:
                    widen_graph(attribute.g.node, attribute.g)

    model = onnx.load(str(path))
    widen_graph(model.graph.node, model.graph)
    for function in model.functions:
        widen_graph(function.node)
    num_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if num_bytes > LARGEST_IN_MEMORY:
        raise ArtifactError(
            f"{path} has weights of {num_bytes / 2**30:.1f} GiB in fp32, which the runtimes here compute in, and take "
            f"{LARGEST_IN_MEMORY / 2**30:.1f} GiB at most; run it in a runtime of 16-bit types"
        )
    whole: bytes = model.SerializeToString()
    return whole
