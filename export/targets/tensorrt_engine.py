"""Engines: what TensorRT's own parser and builder make of an ONNX file, which needs no GPU with TensorRT-RTX.

`tensorrt_rtx` (the extra `tensorrt`) or `tensorrt` is asked, whichever is installed. An engine is compiled for given compute
capabilities; it runs on GPUs of these only.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rewriter.export.entry_points import EntryPoint
from rewriter.passes.graph.origin import line_of

from rewriter.errors import ExportError

CAPABILITIES = ("8.0", "8.6", "9.0", "10.0")
"""What engines are made for where no GPU is there to ask, as far as the installed version knows them."""

Bounds = tuple[int, int, int]
"""Of a size: the least, the one to be fastest at, and the most."""


@dataclass(frozen=True)
class Engine:
    """What was built.

    Attributes:
        file: beside the ONNX file.
        builder: package and version.
        capabilities: compute capabilities that it runs on.
        layers: of the network that the parser made.
        num_bytes: of the engine.
        activation_bytes: memory that it needs besides weights, inputs and outputs, at the largest sizes of its profile.
        build_seconds: of parsing and building.
        profile: of each input, its least, best and most sizes.
    """

    file: str
    builder: str
    capabilities: tuple[str, ...]
    layers: int
    num_bytes: int
    activation_bytes: int
    build_seconds: float
    profile: dict[str, tuple[tuple[int, ...], ...]]


def installed() -> Any | None:
    """The TensorRT that is installed, the one for RTX first; None where there is none."""
    for name in ("tensorrt_rtx", "tensorrt"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def check_profile(points: Sequence[EntryPoint], wanted: Mapping[str, Bounds] | None) -> None:
    """Raises `ExportError` where a name is no size of the inputs, or bounds do not ascend within the export's."""
    ranges = {name: bounds for point in points for name, bounds in point.ranges.items()}
    for name, given in (wanted or {}).items():
        if name not in ranges:
            raise ExportError(f"profile names {name!r}, which no input has; its sizes are {', '.join(ranges)}")
        low, high = ranges[name]
        if len(given) != 3 or not low <= given[0] <= given[1] <= given[2] <= high:
            raise ExportError(
                f"profile of {name} must be three sizes that ascend, from {low} to {high}, got {tuple(given)}"
            )


def profile_of(point: EntryPoint, wanted: Mapping[str, Bounds] | None = None) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Of each input the least, best and most sizes.

    Args:
        wanted: by the name of a size (`batch`, `tokens`); when left out, up to 8 rows, best 1, of any length, best 512, and any
            number of tokens whose logits are kept (`kept`), best 1.
    """
    bounds: dict[str, Bounds] = {}
    for name, (low, high) in point.ranges.items():
        is_batch = name.startswith("batch")
        most = min(high, 8) if is_batch else high
        best = 1 if is_batch or name == "kept" else 512
        bounds[name] = (wanted or {}).get(name, (low, min(best, most), most))
    profile: dict[str, tuple[tuple[int, ...], ...]] = {}
    for own in point.inputs:
        sizes = [bounds[dim] if isinstance(dim, str) else (dim, dim, dim) for dim in own.dims]
        profile[own.name] = tuple(zip(*sizes, strict=True))
    return profile


def bounded_by(point: EntryPoint, profile: Mapping[str, Sequence[Sequence[int]]]) -> EntryPoint:
    """An entry point with the ranges of its engine's profile."""
    ranges = dict(point.ranges)
    for own in point.inputs:
        least, _, most = profile[own.name]
        for dim, low, high in zip(own.dims, least, most, strict=True):
            if isinstance(dim, str):
                ranges[dim] = (low, high)
    return replace(point, ranges=ranges)


def build(
    trt: Any,
    file: Path,
    engine: Path,
    profile: Mapping[str, Sequence[Sequence[int]]],
    capabilities: Sequence[str] | None,
) -> Engine:
    """Parses an ONNX file, and writes the engine.

    Args:
        trt: what `installed` returned.
        file: the ONNX file; what it reads besides lies beside it.
        engine: file to write.
        profile: of each input its least, best and most sizes.
        capabilities: such as "8.6"; those of the GPU of this machine when left out, else `CAPABILITIES`.

    Raises:
        ExportError: the parser refuses an operator, with where it stands in the model; a capability that this TensorRT does not
            compile for; or the builder makes no engine, with what it said.
    """
    began = time.perf_counter()
    said: list[str] = []
    logger = logger_of(trt, said)
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    chosen = _choose(trt, config, capabilities)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))  # types are the file's
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        raise ExportError(_refusal(parser, file))
    profiles = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        name = network.get_input(number).name
        profiles.set_shape(name, *profile[name])
    config.add_optimization_profile(profiles)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reasons = "; ".join(message for message in said if _ACTIVATIONS not in message)
        raise ExportError(f"TensorRT parses {file.name} and builds no engine of it: {reasons or 'it does not say why'}")
    engine.write_bytes(plan)
    return Engine(
        file=engine.name,
        builder=f"{trt.__name__} {trt.__version__}",
        capabilities=chosen,
        layers=network.num_layers,
        num_bytes=plan.nbytes,
        activation_bytes=_activation_bytes(said),
        build_seconds=time.perf_counter() - began,
        profile={name: tuple(tuple(sizes) for sizes in shapes) for name, shapes in profile.items()},
    )


def _choose(trt: Any, config: Any, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Sets the compute capabilities of a build; returns those that were taken."""
    if not hasattr(config, "set_compute_capability"):  # TensorRT itself builds on the GPU that it is for
        if wanted is not None:
            raise ExportError(f"{trt.__name__} builds for the GPU of this machine; leave capabilities out")
        return (_of_this_gpu(),)
    known = {
        _with_dot(name): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")
    }
    if wanted is None:
        own = _of_this_gpu() if torch.cuda.is_available() else ""
        wanted = (own,) if own in known else tuple(c for c in CAPABILITIES if c in known)
    unknown = [c for c in wanted if c not in known]
    if unknown or not wanted:
        raise ExportError(
            f"{trt.__name__} {trt.__version__} builds no engine for compute capability {', '.join(unknown) or '(none)'}; it "
            f"knows {', '.join(known)}"
        )
    config.num_compute_capabilities = len(wanted)
    for place, capability in enumerate(wanted):
        config.set_compute_capability(known[capability], place)
    return tuple(wanted)


def _with_dot(name: str) -> str:
    """`8.6` for `SM86`, `12.0` for `SM120`."""
    return f"{name[2:-1]}.{name[-1]}"


def _of_this_gpu() -> str:
    return ".".join(map(str, torch.cuda.get_device_capability()))


def _refusal(parser: Any, file: Path) -> str:
    """What the parser does not take, and where that stands in the model."""
    import onnx

    try:
        nodes: Sequence[Any] = onnx.load(str(file), load_external_data=False).graph.node
    except Exception:  # it is no ONNX file
        nodes = ()
    reasons = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        where = ""
        if 0 <= error.node() < len(nodes):
            node = nodes[error.node()]
            line = line_of({p.key: p.value for p in node.metadata_props}.get("pkg.torch.onnx.stack_trace", ""))
            where = f"{node.op_type} (node {node.name}{', ' + line if line else ''}): "
        reasons.append(where + error.desc())
    return f"TensorRT's parser does not take the model: {'; '.join(reasons) or 'it does not say why'}"


def logger_of(trt: Any, said: list[str]) -> Any:
    """Keeps what TensorRT says; nothing is printed."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR) or _ACTIVATIONS in message:
                said.append(message)

    return Logger()


_ACTIVATIONS = "Total Activation Memory: "


def _activation_bytes(said: Sequence[str]) -> int:
    """The most of what the builder says of its kernels; an engine tells it only where there is a GPU."""
    found = [message.split(_ACTIVATIONS)[1].split()[0] for message in said if _ACTIVATIONS in message]
    return max(map(int, found), default=0)
