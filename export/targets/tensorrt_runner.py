"""Running an engine: TensorRT's runtime, over tensors of PyTorch on an NVIDIA GPU.

An engine runs with the package and version that built it, on GPUs of the compute capabilities that it was built for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rewriter.export.artifact import ExportReport
from rewriter.export.targets.tensorrt_engine import logger_of
from torch import Tensor

from rewriter.errors import ArtifactError


def cannot_run(report: ExportReport) -> str:
    """Why this machine does not run the engines; "" where it does."""
    if not torch.cuda.is_available():
        return "engines run on NVIDIA GPUs, and there is none here"
    own = ".".join(map(str, torch.cuda.get_device_capability()))
    known = _engine(report)["capabilities"]
    if own not in known:
        return f"the engine was built for compute capability {', '.join(known)}, and this GPU has {own}"
    package, version = _engine(report)["builder"].split()
    try:
        installed = importlib.import_module(package).__version__
    except ImportError:
        return f"{package} {version}, which built the engine, is not installed"
    return "" if installed == version else f"{package} {version} built the engine, and {installed} is installed"


def open_calls(path: Path, report: ExportReport) -> dict[str, Callable[..., Any]]:
    """The entry points of an artifact, ready to be called.

    Raises:
        ArtifactError: this machine cannot run it, with why and what to do; or TensorRT cannot load it, with what it said.
    """
    why = cannot_run(report)
    if why:
        raise ArtifactError(f"{path} cannot be loaded: {why}. Load it where that holds, or export the model here")
    trt = importlib.import_module(_engine(report)["builder"].split()[0])
    device = torch.device("cuda", torch.cuda.current_device())
    return {name: load_engine(trt, report.file_of(path, name), report, name, device) for name in report.entry_points}


def load_engine(trt: Any, file: Path, report: ExportReport, entry_point: str, device: torch.device) -> EngineCall:
    """One engine.

    Args:
        trt: the package that built it.

    Raises:
        ArtifactError: TensorRT cannot load it, or its inputs and outputs are not those that the report has.
    """
    said: list[str] = []
    logger = logger_of(trt, said)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(file.read_bytes())
    context = None if engine is None else engine.create_execution_context()
    if context is None:
        raise ArtifactError(f"TensorRT does not load {file}: {'; '.join(said) or 'it does not say why'}")
    names = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
    outputs = report.entry_points[entry_point]["outputs"]
    known = {*(i.name for i in report.inputs(entry_point)), *outputs}
    if not names <= known or not names.issuperset(outputs):
        raise ArtifactError(
            f"{file} has the tensors {', '.join(sorted(names))}, and its report {', '.join(sorted(known))}"
        )
    return EngineCall((runtime, logger), engine, context, report, entry_point, device)


class EngineCall:
    """An engine as a function of tensors on its device; its results are new tensors."""

    def __init__(
        self, kept: Any, engine: Any, context: Any, report: ExportReport, entry_point: str, device: torch.device
    ) -> None:
        """
        Args:
            kept: what must live as long as the engine.
        """
        self.kept, self.engine, self.context, self.device = kept, engine, context, device
        self.names = [i.name for i in report.inputs(entry_point)]
        outputs = report.entry_points[entry_point]["outputs"]
        self.outputs = [(name, _DTYPES[engine.get_tensor_dtype(name).name]) for name in outputs]
        self.known = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        for name, tensor in zip(self.names, tensors, strict=True):
            if name not in self.known:  # the model does not read it
                continue
            if tensor.device.type != self.device.type:
                raise ArtifactError(f"{name} is on {tensor.device}, and the engine runs on {self.device}")
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise ArtifactError(f"the engine takes no {name} of {list(tensor.shape)}")
            self.context.set_tensor_address(name, tensor.data_ptr())
        results = []
        for name, dtype in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            results.append(torch.empty(shape, dtype=dtype, device=self.device))
            self.context.set_tensor_address(name, results[-1].data_ptr())
        if not self.context.execute_async_v3(_stream(self.device)):
            raise ArtifactError("TensorRT could not start the engine; see what it printed")
        return results


_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "BOOL": torch.bool,
}
"""torch's names of TensorRT's types."""


def _stream(device: torch.device) -> int:
    """The handle of the stream that PyTorch's kernels are on."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _engine(report: ExportReport) -> dict[str, Any]:
    """What is the same for all engines of an artifact."""
    return next(iter(report.engines.values()))
