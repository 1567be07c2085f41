"""TensorRT: ONNX files of standard operators, the engines that TensorRT makes of them, and the commands that do the same.

The operators of this package are dissolved into standard ones, which compute all pairs in tiles of rows. With
torch-tensorrt they stay calls of this package's Triton kernels, in PyTorch, between engines.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import torch
from rewriter.export.artifact import part_path
from rewriter.export.entry_points import EntryPoint
from rewriter.export.entry_points import entry_points
from rewriter.export.targets.onnx import OPSET
from rewriter.export.targets.onnx import model_of
from rewriter.export.targets.onnx import need_packages
from rewriter.export.targets.onnx import package_versions
from rewriter.export.targets.onnx import points_of
from rewriter.export.targets.onnx import save
from rewriter.export.targets.tensorrt_engine import Bounds
from rewriter.export.targets.tensorrt_engine import bounded_by
from rewriter.export.targets.tensorrt_engine import build
from rewriter.export.targets.tensorrt_engine import check_profile
from rewriter.export.targets.tensorrt_engine import installed
from rewriter.export.targets.tensorrt_engine import profile_of
from rewriter.export.targets.written import Written
from torch import Tensor

from rewriter.errors import ExportError

if TYPE_CHECKING:
    from rewriter.optimized_model import OptimizedModel


ENGINE = "tensorrt_engine"
"""The target of the artifact beside the ONNX file, as its report has it."""


def write(
    optimized: OptimizedModel,
    kwargs: Mapping[str, Any],
    path: Path,
    *,
    capabilities: Sequence[str] | None,
    profile: Mapping[str, Bounds] | None,
    cache: bool,
    max_length: int | None,
) -> Written:
    """Writes what TensorRT's parser takes, and the engines where TensorRT is installed; see `rewriter.export.tensorrt`."""
    if path.suffix == ".engine":
        raise ExportError(f"{path.name} is the name of an engine; give that of the ONNX file, {path.stem}.onnx")
    need_packages()
    points, written = points_of(optimized, kwargs, cache, max_length)
    check_profile(points, profile)
    profiles = {point.name: profile_of(point, profile) for point in points}
    attention = {torch.ops.aten.scaled_dot_product_attention.default: _in_products}
    files = save({part_path(path, p.name): model_of(p, OPSET, attention) for p in points}, functions=False)
    commands = [command(part_path(path, p.name), p, profiles[p.name]) for p in points]
    script = path.with_name(path.name + ".sh")
    script.write_text("\n".join(["#!/bin/sh", *commands]) + "\n")
    trt = installed()
    versions = package_versions()
    if trt is None:
        notes = [*commands, "TensorRT is not installed, so no parser has seen it: pip install 'rewriter[tensorrt]'"]
        return replace(written, versions=versions, notes=notes, beside=files[1:])
    file = path.with_suffix(".engine")
    engines: dict[str, dict[str, Any]] = {}
    made = [part_path(file, point.name) for point in points]
    for point, own in zip(points, made, strict=True):
        built = build(trt, part_path(path, point.name), own, profiles[point.name], capabilities)
        engines[point.name] = asdict(built)
    versions[trt.__name__] = trt.__version__
    notes = [*commands, f"{file.name} is an artifact of its own; the comparison of this one ran in ONNX Runtime"]
    bounded = [bounded_by(point, profiles[point.name]) for point in points]
    engine = replace(written, points=bounded, versions=versions, engines=engines, beside=made[1:], device="cuda")
    return replace(
        written, versions=versions, notes=notes, engines=engines, beside=files[1:], also=(ENGINE, file, engine)
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
            "torch-tensorrt is not installed: pip install torch-tensorrt-rtx, or see https://pytorch.org/TensorRT for the one of "
            "TensorRT itself; tensorrt() builds engines without it"
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


def command(path: Path, point: EntryPoint, profile: Mapping[str, Sequence[Sequence[int]]]) -> str:
    """How to build an engine by hand. Its types are those of the file."""
    varying = [own.name for own in point.inputs if any(isinstance(dim, str) for dim in own.dims)]

    def shapes(place: int) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, profile[name][place]))}" for name in varying)

    flags = [f"--{name}Shapes={shapes(place)}" for place, name in enumerate(("min", "opt", "max"))]
    files = [f"--onnx={path.name}", f"--saveEngine={path.with_suffix('.engine').name}"]
    return shlex.join(["trtexec", *files, *flags, "--stronglyTyped"])
