"""AOTInductor: an optimized model as one package of compiled code, for Python and C++ without this package.

On a CPU the operators are lowered to plain ATen first (`rewriter.kernels.portable`); on a GPU the package holds the Triton
kernels. A model that goes on from a cache has two entry points, `prefill` and `decode`, which change the cache's tensors in
place; each holds the weights.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import torch
from rewriter.export.artifact import FORMAT
from rewriter.export.artifact import ExportReport
from rewriter.export.entry_points import EntryPoint
from rewriter.export.entry_points import cache_bound
from rewriter.export.entry_points import entry_points
from rewriter.export.targets.written import Written
from rewriter.kernels.portable import PORTABLE
from rewriter.kernels.portable import replace_operators

from rewriter.errors import ArtifactError

if TYPE_CHECKING:
    from rewriter.optimized_model import OptimizedModel


def write(
    optimized: OptimizedModel, kwargs: Mapping[str, Any], path: Path, *, max_length: int | None, cache: bool
) -> Written:
    """Compiles the entry points of a model to a package; see `rewriter.export.aot_inductor`."""
    points, decoder, why = entry_points(optimized, kwargs, max_length, cache)
    device = points[0].examples[0].device
    kernels: dict[str, int] = {}
    functions: dict[str, int] = {}
    if device.type == "cpu":
        points = [_portable(point, functions) for point in points]
    else:
        for point in points:
            for node in point.program.graph.nodes:
                if str(node.target).startswith("rewriter."):
                    kernels[str(node.target)] = kernels.get(str(node.target), 0) + 1
    bound = cache_bound(points, decoder)
    _compile(points, path, None if decoder is None else decoder.vocabulary, bound)
    return Written(points, decoder, why, bound, kernels=kernels, functions=functions)


def open_calls(path: Path, report: ExportReport) -> dict[str, Callable[..., Any]]:
    """The entry points of a package, ready to be called.

    Raises:
        ArtifactError: it is of another machine or version, or cannot be loaded.
    """
    report.check_machine(path)
    from torch._inductor.package.package import load_package

    try:
        return {name: load_package(str(path), name) for name in report.entry_points}
    except Exception as error:  # whatever torch's loader raises
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error


def _portable(point: EntryPoint, functions: dict[str, int]) -> EntryPoint:
    module: Any = point.program.module()
    for name, count in replace_operators(module, PORTABLE).items():
        functions[name] = functions.get(name, 0) + count
    return point.retraced(module)


def _compile(points: Sequence[EntryPoint], path: Path, vocabulary: int | None, bound: int | None) -> None:
    from torch._inductor.package.package import package_aoti

    files: dict[str, Any] = {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        for point in points:
            options = {"aot_inductor.package": True, "aot_inductor.metadata": _metadata(point, vocabulary, bound)}
            module: Any = point.program.module(check_guards=False)
            files[point.name] = torch._inductor.aot_compile(module, point.examples, options=options)
    # Whole or not at all.
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
        whole = Path(folder) / "whole.pt2"
        package_aoti(str(whole), files)
        whole.replace(path)


def _metadata(point: EntryPoint, vocabulary: int | None, bound: int | None) -> dict[str, str]:
    """What a runner without a JSON reader needs to know: of each input a line `name dtype fill dims`, and the ranges."""
    lines = [
        f"{i.name} {i.dtype} {'-' if i.fill is None else int(i.fill)} {','.join(map(str, i.dims))}"
        for i in point.inputs
    ]
    ranges = [f"{name} {low} {high}" for name, (low, high) in point.ranges.items()]
    return {
        "rewriter_format": str(FORMAT),
        "rewriter_torch": torch.__version__.partition("+")[0],
        "rewriter_inputs": "\n".join(lines),
        "rewriter_ranges": "\n".join(ranges),
        "rewriter_vocabulary": str(vocabulary),
        "rewriter_max_length": "-" if bound is None else str(bound),
    }
