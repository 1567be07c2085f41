"""Artifacts: an exported model on disk, beside it a JSON file that says what it is, and what it was compared with.

    model.pt2                 the artifact: an AOTInductor package, an ONNX file, or an engine
    model.pt2.json            the `ExportReport`: policy, versions, signature, checksums, differences
    model.pt2.cases           inputs and the optimized model's results for them, safetensors

An ONNX file or an engine has one entry point. With a cache there are two files, `model.onnx` for `prefill` and
`model.decode.onnx`; ONNX files share their weights, in `model.onnx.data`.

Loading checks all that can be checked before anything of it runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from rewriter.export.entry_points import EntryPoint
from rewriter.export.entry_points import Input
from torch import Tensor

from rewriter.errors import ArtifactError

FORMAT = 2
"""Of artifacts; those of another one are refused."""


@dataclass
class ExportReport:
    """What was exported, and how it compares.

    Attributes:
        target: "aot_inductor", "onnx", "tensorrt", or "tensorrt_engine".
        policy: as `Policy.to_dict` has it.
        dtype: of the model's parameters.
        versions: of what it was made with.
        machine: processor architecture, and "cpu" or "cuda".
        sha256: of the artifact.
        num_bytes: of the artifact.
        beside: the artifact's further files, by name, with their checksums.
        max_length: tokens of a row over its cache; None for no bound.
        entry_points: name -> inputs (name, dtype, dims, fill), ranges of dims, outputs.
        kernels: operators that are kernels in the artifact, with their number.
        functions: operators that became functions of standard ones.
        fallbacks: attention sites that stayed as they were, and why.
        no_decode: why there is no decode step; "" where there is one.
        compared: of each comparison with the optimized model: sizes, largest difference, and relative difference.
        notes: what the target needs to be told.
        engines: what TensorRT made of each entry point, an `Engine` of `targets/tensorrt_engine.py`; empty where it did not.
    """

    target: str
    policy: dict[str, Any]
    dtype: str
    versions: dict[str, str]
    machine: tuple[str, str]
    sha256: str
    num_bytes: int
    max_length: int | None
    entry_points: dict[str, dict[str, Any]]
    kernels: dict[str, int] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    no_decode: str = ""
    compared: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def tolerance(self) -> float:
        """Of the relative difference."""
        return 0.05 if self.dtype in ("bfloat16", "float16") else 1e-3

    @property
    def agrees(self) -> bool:
        """Whether there were comparisons, and all were within the tolerance."""
        return bool(self.compared) and all(c["relative"] <= self.tolerance for c in self.compared)

    def inputs(self, entry_point: str) -> list[Input]:
        return [Input(**{**i, "dims": tuple(i["dims"])}) for i in self.entry_points[entry_point]["inputs"]]

    def output_dtypes(self, entry_point: str) -> list[torch.dtype]:
        """Of the results: those of the cache's tensors, and for what the model computes that of its parameters."""
        known = {f"new.{i.name}": i.dtype for i in self.inputs(entry_point)}
        return [getattr(torch, known.get(name, self.dtype)) for name in self.entry_points[entry_point]["outputs"]]

    def file_of(self, artifact: Path, entry_point: str) -> Path:
        """The file of an entry point, where each has its own.

        Raises:
            ArtifactError: it is not one of those that were checked, as the artifact has another name than it was written under.
        """
        file = part_path(artifact, entry_point)
        if file != artifact and file.name not in self.beside:
            raise ArtifactError(
                f"{artifact} was written under another name: its {entry_point} is one of {', '.join(self.beside)}; rename it back"
            )
        return file

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write(self, artifact: Path) -> None:
        report_path(artifact).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def read(cls, artifact: Path) -> ExportReport:
        """The report of an artifact, and the artifact's own integrity checked.

        Raises:
            ArtifactError: a file is missing or damaged, or the artifact is of another format, version or machine.
        """
        path = report_path(artifact)
        for needed in (artifact, path):
            if not needed.is_file():
                raise ArtifactError(
                    f"{needed} is not there; an artifact is {artifact.name} and {path.name}, side by side"
                )
        try:
            stored = dict(json.loads(path.read_text()))
            if "format" not in stored:
                raise ValueError("it has no format")
            if stored["format"] != FORMAT:
                raise ArtifactError(
                    f"{artifact} has format {stored['format']}, this version reads {FORMAT}; export the model again"
                )
            report = cls(**stored)
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path} is no report of an artifact ({error}); export the model again") from None
        if checksum(artifact) != report.sha256:
            raise ArtifactError(
                f"{artifact} is damaged or cut off: {artifact.stat().st_size:,} bytes with another checksum, expected "
                f"{report.num_bytes:,}; copy it again"
            )
        for name, expected in report.beside.items():
            file = artifact.with_name(name)
            if not file.is_file():
                raise ArtifactError(f"{file} is not there; it belongs to {artifact.name}: copy it, too")
            if checksum(file) != expected:
                raise ArtifactError(f"{file} is damaged or cut off, or of another export; copy it again")
        return report

    def check_machine(self, artifact: Path) -> None:
        """Raises `ArtifactError` where compiled code was made for another processor or another torch."""
        own = platform.machine()
        if self.machine[0] != own:
            raise ArtifactError(
                f"{artifact} was compiled for {self.machine[0]}, this machine is {own}; export the model here"
            )
        if self.machine[1] == "cuda" and not torch.cuda.is_available():
            raise ArtifactError(f"{artifact} was compiled for a GPU, and there is none here")
        if _release(self.versions["torch"]) != _release(torch.__version__):
            raise ArtifactError(
                f"{artifact} was compiled with torch {self.versions['torch']}, this is {torch.__version__}; use that version, or "
                "export the model again"
            )


def report_path(artifact: Path) -> Path:
    return artifact.with_name(artifact.name + ".json")


def cases_path(artifact: Path) -> Path:
    return artifact.with_name(artifact.name + ".cases")


def part_path(artifact: Path, entry_point: str) -> Path:
    """The file of an entry point, where each has its own: `model.decode.onnx` beside `model.onnx`."""
    return artifact.with_stem(artifact.stem + ".decode") if entry_point == "decode" else artifact


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else (
            hashlib.sha256(file.read()).hexdigest()
        )  # fmt: skip


def versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def _release(version: str) -> str:
    return version.partition("+")[0]


def describe(points: Sequence[EntryPoint]) -> dict[str, dict[str, Any]]:
    """The entry points as plain data."""
    return {
        p.name: {
            "inputs": [dataclasses.asdict(i) for i in p.inputs],
            "ranges": {name: list(bounds) for name, bounds in p.ranges.items()},
            "outputs": list(p.outputs),
        }
        for p in points
    }


def check_inputs(inputs: Sequence[Input], ranges: Mapping[str, Sequence[int]], tensors: Sequence[Tensor]) -> None:
    """Raises `ArtifactError` where tensors are not what an entry point takes."""
    if len(tensors) != len(inputs):
        raise ArtifactError(
            f"{len(tensors)} tensors are given, expected {len(inputs)}: {', '.join(i.name for i in inputs)}"
        )
    sizes: dict[str, int] = {}
    for given, tensor in zip(inputs, tensors, strict=True):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != given.dtype:
            raise ArtifactError(f"{given.name} must be {given.dtype}, got {dtype}")
        if tensor.dim() != len(given.dims):
            raise ArtifactError(f"{given.name} must have sizes {list(given.dims)}, got {list(tensor.shape)}")
        for size, dim in zip(tensor.shape, given.dims, strict=True):
            expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
            if size != expected:
                raise ArtifactError(
                    f"{given.name} must have sizes {list(given.dims)}, got {list(tensor.shape)}; {dim} is {expected}"
                )
            if isinstance(dim, str):
                low, high = ranges[dim]
                if not low <= size <= high:
                    raise ArtifactError(
                        f"{given.name} has {size} {dim}, and the artifact was exported for {low} to {high}"
                    )
