"""ONNX: an optimized model as a file that any runtime runs.

The operators are model-local functions of standard operators in the domain `rewriter`: a runtime that has kernels for
`rewriter::LiveRangeAttention` may replace them, any other runs the bodies, which go over tiles of rows and all keys. Masks are
explicit, because `is_causal` means different things to different runtimes. The Triton kernels do not travel in such a file.
For a runtime that takes no functions, the bodies stand in the place of the calls.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
import torch
from rewriter.export.artifact import ExportReport
from rewriter.export.entry_points import EntryPoint
from rewriter.export.entry_points import entry_points
from rewriter.export.targets.written import Written
from rewriter.kernels.live_ranges import FOREVER
from rewriter.kernels.portable import UNDER_A_MASK
from rewriter.kernels.portable import replace_operators
from rewriter.kernels.portable import with_sinks
from rewriter.kernels.separator_cache import compute_ends
from torch import Tensor

from rewriter.errors import ArtifactError
from rewriter.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto

    from rewriter.optimized_model import OptimizedModel

OPSET = 23
"""The least: newer attention operators and types begin here."""


def write(optimized: OptimizedModel, kwargs: Mapping[str, Any], path: Path, *, opset: int, functions: bool) -> Written:
    """Writes the model's own call as an ONNX file; see `rewriter.export.onnx`."""
    if opset < OPSET:
        raise ExportError(f"opset must be at least {OPSET}, got {opset}")
    need_packages()
    check_policy(optimized)
    points, _, _ = entry_points(optimized, kwargs, None, cached=False)
    model = model_of(points[0], opset)
    save(model if functions else as_standard_operators(model), path)
    notes = [
        f"opset {opset}; attention computes all pairs, in tiles of rows: time grows with the square of the length, "
        "memory does not"
    ]
    why = "an ONNX file is the model's own call"
    return Written(points, no_decode=why, versions=package_versions(), functions=local_functions(path), notes=notes)


def open_calls(path: Path, report: ExportReport) -> dict[str, Callable[..., Any]]:
    """The file's one entry point, in ONNX Runtime.

    Raises:
        ArtifactError: the runtime is missing, or cannot load it.
    """
    return {"forward": session(path, report)}


def check_policy(optimized: OptimizedModel) -> None:
    """Raises `ExportError` where a policy has no form in standard operators."""
    for policy in optimized.policy.parts():
        if policy.is_program or policy.positions == "cache" or getattr(policy, "capacity", None) is not None:
            raise ExportError(
                f"{policy} has no form in ONNX's standard operators: when it drops keys is found by a search over the tokens; "
                "export it with aot_inductor, or take SeparatorMask without a capacity"
            )


def need_packages() -> None:
    """Raises `ExportError` where one is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"{error}; ONNX export needs onnx, onnxscript and onnxruntime: pip install 'rewriter[export]'"
        ) from None


def package_versions() -> dict[str, str]:
    """Of what writes and runs such files."""
    import onnx
    import onnxruntime

    return {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


def model_of(point: EntryPoint, opset: int, others: Mapping[Any, Callable[..., Any]] | None = None) -> ModelProto:
    """A program as ONNX has it, with the operators as functions.

    Args:
        others: operators besides this package's that are written in other words.
    """
    from onnx import helper
    from rewriter.export.targets.onnx_functions import FUNCTIONS

    module: Any = point.program.module()
    replace_operators(module, {**SYMBOLIC, **(others or {})})
    own = point.retraced(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                own.program,
                point.examples,
                None,
                input_names=[i.name for i in point.inputs],
                output_names=list(point.outputs),
                opset_version=opset,
                dynamo=True,
                optimize=False,  # its fusion of rotations fails where a batch shares its positions
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise ExportError(
                f"torch cannot write this model as ONNX: {cause}. Nothing was written; a model that has the operator in other "
                "words (another expert implementation in its configuration, say) may do"
            ) from error
    assert program is not None
    model: ModelProto = program.model_proto
    # The bodies come last: torch's change of the opset would put them in the place of the calls.
    used = {node.op_type for node in model.graph.node if node.domain == "rewriter"}
    model.functions.extend(f.to_function_proto() for f in FUNCTIONS if f.name in used)
    if not any(entry.domain == "rewriter" for entry in model.opset_import):
        model.opset_import.extend([helper.make_opsetid("rewriter", 1)])
    return model


def save(model: ModelProto, path: Path) -> None:
    """Writes a model; the file is checked by ONNX's own checker."""
    from onnx import checker
    from onnx import save_model

    save_model(model, str(path))
    checker.check_model(str(path), full_check=True)


def as_standard_operators(model: ModelProto) -> ModelProto:
    """The bodies of functions in the place of their calls, and what is constant computed: axes, sizes, pieces of a split."""
    from onnx import inliner
    from onnxscript import optimizer

    model = inliner.inline_local_functions(model)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    _write_forever_as_fp32_holds_it(model)
    return model


NO_SIZE = 2**31 - 128
"""The largest int32 that fp32 holds, too."""


def _write_forever_as_fp32_holds_it(model: ModelProto) -> None:
    """Puts `NO_SIZE` in the place of `FOREVER`, the end of a key that lives for ever.

    OpenVINO (2026.4) computes with integers in fp32, where `FOREVER` is 2**31, and as int32 -2**31: no query would see the key.
    """
    import onnx
    from onnx import numpy_helper

    tensors = list(model.graph.initializer)
    for attribute in (a for node in model.graph.node if node.op_type == "Constant" for a in node.attribute):
        if attribute.HasField("t"):
            tensors.append(attribute.t)
        elif attribute.name == "value_int":
            attribute.i = NO_SIZE if attribute.i == FOREVER else attribute.i
        elif attribute.name == "value_ints":
            attribute.ints[:] = [NO_SIZE if number == FOREVER else number for number in attribute.ints]
    for tensor in tensors:
        if tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
            values = numpy_helper.to_array(tensor)
            if (values == FOREVER).any():
                held = np.where(values == FOREVER, np.array(NO_SIZE, values.dtype), values)
                tensor.CopyFrom(numpy_helper.from_array(held, tensor.name))


def local_functions(path: Path) -> dict[str, int]:
    """The functions of our domain in a file, with the number of their calls."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    counts: dict[str, int] = {}
    for node in model.graph.node:
        if node.domain == "rewriter":
            counts[f"rewriter::{node.op_type}"] = counts.get(f"rewriter::{node.op_type}", 0) + 1
    return counts


def session(path: Path, report: ExportReport) -> Callable[..., Sequence[Tensor]]:
    """A file in ONNX Runtime, on the CPU: tensors in, tensors out.

    Raises:
        ArtifactError: the runtime is missing, or cannot load it.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ArtifactError("ONNX Runtime is not installed: pip install 'rewriter[export]'") from None
    narrow = report.dtype in ("bfloat16", "float16")  # of which the runtime has few kernels for CPUs
    try:
        file = in_full_precision(path) if narrow else str(path)
        running = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever the runtime raises
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
    names = [i.name for i in report.inputs("forward")]
    known = {i.name for i in running.get_inputs()}

    def call(*tensors: Tensor) -> list[Tensor]:
        own = [t.float() if narrow and t.is_floating_point() else t for t in tensors]
        given = {n: t.detach().cpu().contiguous().numpy() for n, t in zip(names, own, strict=True) if n in known}
        results = [torch.from_numpy(array) for array in running.run(None, given)]
        dtype = getattr(torch, report.dtype)
        return [t.to(dtype) if narrow and t.is_floating_point() else t for t in results]

    return call


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
    whole: bytes = model.SerializeToString()
    return whole


def _live_range_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None = None,
    key_index: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Sequence[Tensor]:
    assert key_index is None and alibi_slopes is None, "no pass emits these"
    num_queries, num_keys = query.size(2), key.size(2)
    if query_index is None:
        query_index = torch.arange(num_queries, device=query.device) + (num_keys - num_queries)
    if bias is None:
        bias = torch.zeros(1, 1, num_keys, device=query.device)
    output, lse = torch.onnx.ops.symbolic_multi_out(
        "rewriter::LiveRangeAttention",
        (query, key, value, start, end, query_index.view(-1).to(torch.int32), bias.float()),
        {"scale": 1 / math.sqrt(query.size(3)) if scale is None else scale, "softcap": softcap or 0.0},
        dtypes=(query.dtype, torch.float32),
        shapes=((*query.shape[:3], value.size(3)), tuple(query.shape[:3])),
        version=1,
    )
    return (output, lse) if sinks is None else with_sinks(output, lse, sinks)


def _running_topk_end(score: Tensor, keep: int, segment: Tensor | None = None) -> Tensor:
    if segment is None:
        segment = torch.ones(1, 1, 1, dtype=torch.int32, device=score.device)
    return torch.onnx.ops.symbolic(
        "rewriter::RunningTopKEnd",
        (score.float(), segment),
        {"keep": keep},
        dtype=torch.int32,
        shape=tuple(score.shape),
        version=1,
    )


SYMBOLIC: dict[Any, Callable[..., Any]] = {
    **UNDER_A_MASK,
    torch.ops.rewriter.live_range_attention.default: _live_range_attention,
    torch.ops.rewriter.running_topk_end.default: _running_topk_end,
    torch.ops.rewriter.separator_cache_ends.default: compute_ends,
}
"""The operators as calls of functions of the file."""
