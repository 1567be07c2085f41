"""TensorRT: an engine where torch-tensorrt is installed, else an ONNX file that TensorRT's parser takes, and how to build it.

TensorRT's libraries are not on the package index, and need an NVIDIA GPU. With torch-tensorrt the operators that it does not
know stay calls of this package's Triton kernels, in PyTorch, between the engines. Without it, the functions of the ONNX file
are dissolved into standard operators, all of which must be on the parser's list, and a `trtexec` command is written that
builds the engine for the sizes of the export.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from rewriter.export.entry_points import EntryPoint
from rewriter.export.entry_points import entry_points
from rewriter.export.targets.onnx import OPSET
from rewriter.export.targets.onnx import check_policy
from rewriter.export.targets.onnx import need_packages
from rewriter.export.targets.onnx import package_versions
from rewriter.export.targets.onnx import write_file
from rewriter.export.targets.written import Written

from rewriter.errors import ExportError

if TYPE_CHECKING:
    from rewriter.optimized_model import OptimizedModel

PARSED = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "Cast",
        "CastLike",
        "Ceil",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Cos",
        "CumSum",
        "Div",
        "Einsum",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "IsInf",
        "IsNaN",
        "LayerNormalization",
        "Less",
        "LessOrEqual",
        "Log",
        "MatMul",
        "Max",
        "Mean",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pad",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "Relu",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Shape",
        "Sigmoid",
        "Sign",
        "Sin",
        "Size",
        "Slice",
        "Softmax",
        "Softplus",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Tanh",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)
"""Standard operators that the parser of TensorRT 10 takes (onnx-tensorrt, docs/operators.md), as far as our files use any."""


def write(optimized: OptimizedModel, kwargs: Mapping[str, Any], path: Path, *, precision: str) -> Written:
    """Writes what TensorRT's parser takes, and the command that builds an engine; see `rewriter.export.tensorrt`."""
    if precision not in ("fp32", "fp16", "bf16"):
        raise ExportError(f"precision must be fp32, fp16 or bf16, got {precision!r}")
    need_packages()
    check_policy(optimized)
    points, _, _ = entry_points(optimized, kwargs, None, cached=False)
    write_file(points[0], path, OPSET)
    _dissolve_functions(path)
    unknown = sorted(set(operators(path)) - PARSED)
    if unknown:
        path.unlink()
        raise ExportError(f"TensorRT's parser does not take {', '.join(unknown)}; nothing was written")
    command = trtexec(points[0], path, precision)
    path.with_name(path.name + ".sh").write_text("#!/bin/sh\n" + command + "\n")
    notes = [
        command,
        f"precision {precision}; not built here: TensorRT needs an NVIDIA GPU. The comparison ran this file in ONNX Runtime",
    ]
    why = "an engine is the model's own call"
    return Written(points, no_decode=why, versions=package_versions(), notes=notes)


def compile_engine(optimized: OptimizedModel, kwargs: Mapping[str, Any]) -> Any:
    """The model's own call through torch-tensorrt, in this process: engines, and between them our kernels in PyTorch.

    Written against torch-tensorrt 2.13's published sources; needs an NVIDIA GPU, and has not been run.

    Raises:
        ExportError: torch-tensorrt is not installed.
    """
    try:
        import torch_tensorrt
    except ImportError:
        raise ExportError(
            "torch-tensorrt is not installed, and is not on the package index: see https://pytorch.org/TensorRT for "
            "pip install torch-tensorrt --extra-index-url ..., or build the ONNX file of tensorrt() with trtexec"
        ) from None
    point = entry_points(optimized, kwargs, None, cached=False)[0][0]
    return torch_tensorrt.dynamo.compile(
        point.program,
        arg_inputs=list(point.examples),
        # A mask that is given is all there is: no causality beside it.
        attn_bias_is_causal=False,
        torch_executed_ops={
            "torch.ops.rewriter.live_range_attention.default",
            "torch.ops.rewriter.running_topk_end.default",
        },
    )


def trtexec(point: EntryPoint, path: Path, precision: str) -> str:
    """The command that builds an engine, with a profile from the smallest to the largest sizes of the export."""

    def shapes(pick: str) -> str:
        parts = []
        for given in point.inputs:
            sizes = []
            for dim in given.dims:
                if isinstance(dim, int):
                    sizes.append(dim)
                    continue
                low, high = point.ranges[dim]
                batch = dim.startswith("batch")
                best = min(8 if batch else 512, high)
                sizes.append({"min": low, "opt": best, "max": min(high, 64) if batch else high}[pick])
            parts.append(f"{given.name}:{'x'.join(map(str, sizes))}")
        return ",".join(parts)

    flags = [f"--{pick}Shapes={shapes(pick)}" for pick in ("min", "opt", "max")]
    kind = [] if precision == "fp32" else [f"--{precision}"]
    return " ".join(
        ["trtexec", f"--onnx={path.name}", f"--saveEngine={path.with_suffix('.engine').name}", *flags, *kind]
    )


def operators(path: Path) -> dict[str, int]:
    """The operators of a file, with their number."""
    import onnx

    counts: dict[str, int] = {}
    for node in onnx.load(str(path)).graph.node:
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _dissolve_functions(path: Path) -> None:
    import onnx
    from onnx import checker
    from onnx import inliner

    model = inliner.inline_local_functions(onnx.load(str(path)))
    onnx.save_model(model, str(path))
    checker.check_model(str(path), full_check=True)
