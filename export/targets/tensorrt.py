"""TensorRT: an ONNX file of standard operators, the engine that TensorRT makes of it, and the command that does the same.

The operators of this package are dissolved into standard ones, which compute all pairs in tiles of rows. With
torch-tensorrt they stay calls of this package's Triton kernels, in PyTorch, between engines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import torch
from rewriter.export.entry_points import entry_points
from rewriter.export.targets.onnx import OPSET
from rewriter.export.targets.onnx import as_standard_operators
from rewriter.export.targets.onnx import check_policy
from rewriter.export.targets.onnx import model_of
from rewriter.export.targets.onnx import need_packages
from rewriter.export.targets.onnx import package_versions
from rewriter.export.targets.onnx import save
from rewriter.export.targets.tensorrt_engine import Bounds
from rewriter.export.targets.tensorrt_engine import build
from rewriter.export.targets.tensorrt_engine import installed
from rewriter.export.targets.tensorrt_engine import profile_of
from rewriter.export.targets.written import Written
from torch import Tensor

from rewriter.errors import ExportError

if TYPE_CHECKING:
    from rewriter.optimized_model import OptimizedModel


def write(
    optimized: OptimizedModel,
    kwargs: Mapping[str, Any],
    path: Path,
    *,
    capabilities: Sequence[str] | None,
    profile: Mapping[str, Bounds] | None,
) -> Written:
    """Writes what TensorRT's parser takes, and the engine where TensorRT is installed; see `rewriter.export.tensorrt`."""
    need_packages()
    check_policy(optimized)
    points, _, _ = entry_points(optimized, kwargs, None, cached=False)
    shapes = profile_of(points[0], profile)
    model = model_of(points[0], OPSET, {torch.ops.aten.scaled_dot_product_attention.default: _in_products})
    save(as_standard_operators(model), path)
    script = path.with_name(path.name + ".sh")
    script.write_text("#!/bin/sh\n" + command(path, shapes) + "\n")
    trt = installed()
    notes, engine, versions = [command(path, shapes)], None, package_versions()
    if trt is None:
        notes.append("TensorRT is not installed, so no parser has seen the file: pip install 'rewriter[tensorrt]'")
    else:
        try:
            engine = build(trt, path, path.with_suffix(".engine"), shapes, capabilities)
        except BaseException:
            path.unlink()
            script.unlink()
            raise
        versions[trt.__name__] = trt.__version__
        notes.append("the engine was built, and not run: that needs a GPU. The comparison ran the file in ONNX Runtime")
    why = "an engine is the model's own call"
    return Written(
        points, no_decode=why, versions=versions, notes=notes, engine=None if engine is None else asdict(engine)
    )


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


def _in_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's attention as products and a softmax: TensorRT-RTX parses ONNX's `Attention`, and builds it for few shapes."""
    if enable_gqa:
        group = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(group, dim=-3), value.repeat_interleave(group, dim=-3)
    logits = (query @ key.transpose(-1, -2)).float() * (query.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        rows, keys = (torch.arange(t.size(-2), device=query.device) for t in (query, key))
        attn_mask = keys <= rows[:, None]
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(dim=-1).to(value.dtype) @ value


def command(path: Path, profile: Mapping[str, Sequence[Sequence[int]]]) -> str:
    """How to build the engine by hand. Its types are those of the file."""

    def shapes(place: int) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, sizes[place]))}" for name, sizes in profile.items())

    flags = [f"--{name}Shapes={shapes(place)}" for place, name in enumerate(("min", "opt", "max"))]
    files = [f"--onnx={path.name}", f"--saveEngine={path.with_suffix('.engine').name}"]
    return " ".join(["trtexec", *files, *flags, "--stronglyTyped"])
