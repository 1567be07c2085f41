"""ONNX: an optimized model as a file that any runtime runs.

The operators are model-local functions of standard operators in the domain `rewriter`: a runtime that has kernels for
`rewriter::LiveRangeAttention` may replace them, any other runs the bodies, which go over tiles of rows and all keys. Masks are
explicit, because `is_causal` means different things to different runtimes. The Triton kernels do not travel in such a file.
For a runtime that takes no functions, the bodies stand in the place of the calls.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import numpy as np
import torch
from rewriter.export.artifact import part_path
from rewriter.export.entry_points import EntryPoint
from rewriter.export.entry_points import cache_bound
from rewriter.export.entry_points import entry_points
from rewriter.export.entry_points import functional
from rewriter.export.targets.written import Written
from rewriter.kernels.live_ranges import FOREVER
from rewriter.kernels.portable import MAX_KEYS
from rewriter.kernels.portable import UNDER_A_MASK
from rewriter.kernels.portable import replace_operators
from rewriter.kernels.portable import with_sinks
from rewriter.kernels.separator_cache import compute_ends
from torch import Tensor

from rewriter.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto

    from rewriter.optimized_model import OptimizedModel

OPSET = 23
"""The least: newer attention operators and types begin here."""


def write(
    optimized: OptimizedModel,
    kwargs: Mapping[str, Any],
    path: Path,
    *,
    opset: int,
    functions: bool,
    cache: bool,
    max_length: int | None,
) -> Written:
    """Writes the entry points of a model as ONNX files; see `rewriter.export.onnx`."""
    if opset < OPSET:
        raise ExportError(f"opset must be at least {OPSET}, got {opset}")
    need_packages()
    points, written = points_of(optimized, kwargs, cache, max_length)
    models = {part_path(path, point.name): model_of(point, opset) for point in points}
    files = save(models, functions=functions)
    notes = [
        f"opset {opset}; attention computes all pairs, in tiles of rows: time grows with the square of the length, "
        "memory does not"
    ]
    counts: dict[str, int] = {}
    for model in models.values() if functions else ():
        for name, count in local_functions(model).items():
            counts[name] = counts.get(name, 0) + count
    return replace(written, versions=package_versions(), functions=counts, notes=notes, beside=files[1:])


def points_of(
    optimized: OptimizedModel, kwargs: Mapping[str, Any], cache: bool, max_length: int | None
) -> tuple[list[EntryPoint], Written]:
    """The entry points as programs that change nothing, and what a report says of them.

    Args:
        cache: `prefill` and `decode`, in the place of the model's own call.
        max_length: tokens of a row over the cache.

    Raises:
        ExportError: the policy has no form in standard operators, or a cache is asked for and the model has none.
    """
    check_policy(optimized)
    points, decoder, why = entry_points(optimized, kwargs, max_length, cache)
    if not cache:
        why = "it is the model's own call alone; export with cache=True for prefill and decode"
    elif decoder is None:
        raise ExportError(
            f"cache=True asks for prefill and decode, and there is no decode step: {why or 'the call has no input_ids'}"
        )
    else:
        points = [functional(point) for point in points]
    # Wherever the model is, what computes such a file here is a CPU.
    return points, Written(points, decoder, why, cache_bound(points, decoder), device="cpu")


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

    own = point
    for words in ({**SYMBOLIC, **(others or {})}, SEARCHES):  # what an operator of ours is written in may search
        module: Any = own.program.module()
        if replace_operators(module, words):
            own = own.retraced(module)
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


LARGEST_FILE = 2**30
"""Bytes of weights that stand in a file itself; one of more than 2**31 can be neither written nor read."""

ALIGNMENT = 4096
"""Of weights in a file of their own, so that a runtime may map them into memory; smaller ones stay, as constants are computed."""


def save(models: dict[Path, ModelProto], *, functions: bool) -> list[Path]:
    """Writes models; the files are checked by ONNX's own checker.

    Where there are several, or the weights are large, these stand in a file of their own, beside the first, each once.

    Args:
        functions: leave the functions; False puts their bodies in the place of the calls.

    Returns:
        All files that were written, the models first.
    """
    from onnx import checker
    from onnx import save_model

    files = list(models)
    if len(models) > 1 or sum(len(tensor.raw_data) for tensor in models[files[0]].graph.initializer) > LARGEST_FILE:
        weights = files[0].with_name(files[0].name + ".data")
        _move_weights(models.values(), weights)  # before anything else: no tool takes a model that is larger
        files.append(weights)
    for path, model in models.items():
        save_model(model if functions else as_standard_operators(model), str(path))
        checker.check_model(str(path), full_check=True)
    return files


def _move_weights(models: Iterable[ModelProto], file: Path) -> None:
    """Puts the weights of models into a file: what several have is there once."""
    from onnx.external_data_helper import set_external_data

    places: dict[bytes, int] = {}
    with file.open("wb") as out:
        for tensor in (t for model in models for t in model.graph.initializer):
            content = tensor.raw_data
            if len(content) < ALIGNMENT:
                continue
            key = hashlib.sha256(content).digest()
            if key not in places:
                out.write(bytes(-out.tell() % ALIGNMENT))
                places[key] = out.tell()
                out.write(content)
            set_external_data(tensor, file.name, places[key], len(content))
            tensor.ClearField("raw_data")


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


def local_functions(model: ModelProto) -> dict[str, int]:
    """The functions of our domain in a model, with the number of their calls."""
    counts: dict[str, int] = {}
    for node in model.graph.node:
        if node.domain == "rewriter":
            counts[f"rewriter::{node.op_type}"] = counts.get(f"rewriter::{node.op_type}", 0) + 1
    return counts


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


def _amax(values: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    return torch.amax(values, tuple(dim) or tuple(range(values.dim())), keepdim)


def _argsort(values: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    """ONNX's TopK is stable: of equal values it takes the lower index first."""
    return values.topk(values.size(dim), dim, largest=descending).indices


def _searchsorted(
    ordered: Tensor,
    values: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """By bisection, in as many steps as the longest row needs, as ONNX has no operator for it; nothing of all pairs is made."""
    assert sorter is None, "no pass emits one"
    size, right = ordered.size(-1), right or side == "right"
    low = torch.zeros_like(values, dtype=torch.int64)
    high = low + size
    for _ in range(MAX_KEYS.bit_length()):
        middle = (low + high) // 2
        place = middle.clamp(max=size - 1)
        found = ordered[place] if ordered.dim() == 1 else ordered.gather(-1, place)
        is_later = (low < high) & ((found <= values) if right else (found < values))
        low, high = torch.where(is_later, middle + 1, low), torch.where(is_later, high, middle)
    return low.to(torch.int32) if out_int32 else low


SEARCHES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.argsort.stable: _argsort,
    torch.ops.aten.searchsorted.Tensor: _searchsorted,
}
"""Operators of torch's that its ONNX exporter has no form for."""

SYMBOLIC: dict[Any, Callable[..., Any]] = {
    **UNDER_A_MASK,
    **SEARCHES,
    torch.ops.aten.amax.default: _amax,
    torch.ops.rewriter.live_range_attention.default: _live_range_attention,
    torch.ops.rewriter.running_topk_end.default: _running_topk_end,
    torch.ops.rewriter.separator_cache_ends.default: compute_ends,
}
"""The operators as calls of functions of the file, and torch's own in words that its exporter knows."""
