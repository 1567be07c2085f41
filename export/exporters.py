"""`aot_inductor`, `onnx` and `tensorrt`: write an artifact, reload it in a fresh process, and compare it with the model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from rewriter.export.artifact import ExportReport
from rewriter.export.entry_points import bind
from rewriter.export.registry import TARGETS
from rewriter.export.targets.onnx import OPSET
from rewriter.export.verify import finish
from rewriter.export.verify import new_report

if TYPE_CHECKING:
    from rewriter.optimized_model import OptimizedModel


def aot_inductor(
    optimized: OptimizedModel,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | Path = "model.pt2",
    *,
    max_length: int | None = None,
    cache: bool = True,
) -> ExportReport:
    """Compiles an optimized model to a package, and compares what it wrote with the model.

    Args:
        args, kwargs: of one call of the model, with at least two rows of two tokens; batch and length may then be others.
        path: file to write, `.pt2`; a report and the compared cases are written beside it.
        max_length: tokens of a row over the cache, where the policy bounds nothing; the model's positions when left out.
        cache: False for the model's own call alone, without a decode step.

    Returns:
        The report.

    Raises:
        ExportError: the model cannot be exported so, or the package gives other results than the model.
        RewriteError, PolicyError, CacheError: as `optimize`.
    """
    return _export("aot_inductor", optimized, args, kwargs, path, max_length=max_length, cache=cache)


def onnx(
    optimized: OptimizedModel,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | Path = "model.onnx",
    *,
    opset: int = OPSET,
    functions: bool = True,
    cache: bool = False,
    max_length: int | None = None,
) -> ExportReport:
    """Writes an optimized model as an ONNX file, and compares what it wrote with the model.

    It is the model's own call; with `cache` there are two files, `prefill` in `path` and `decode` in `<name>.decode.onnx`, whose
    weights stand once in `<path>.data`. They take the cache's tensors, of fixed sizes, and return the new ones behind the logits.

    Args:
        args, kwargs: of one call of the model, with at least two rows of two tokens; batch and length may then be others.
        path: file to write, `.onnx`; a report and the compared cases are written beside it.
        opset: 23 or later.
        functions: the operators are functions of the file, which a runtime may have kernels for; False writes standard
            operators alone, for a runtime that takes no functions, such as OpenVINO.
        cache: write `prefill` and `decode`, for generation, in the place of the model's own call.
        max_length: tokens of a row over the cache, where the policy bounds nothing; the model's positions when left out.

    Raises:
        ExportError: the policy has no form in standard operators, a package is missing, the model cannot be exported so or has
            no decode step, or the file gives other results than the model.
        RewriteError, PolicyError, CacheError: as `optimize`.
    """
    return _export(
        "onnx", optimized, args, kwargs, path, opset=opset, functions=functions, cache=cache, max_length=max_length
    )


def tensorrt(
    optimized: OptimizedModel,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | Path = "model.trt.onnx",
    *,
    capabilities: Sequence[str] | None = None,
    profile: Mapping[str, tuple[int, int, int]] | None = None,
    cache: bool = False,
    max_length: int | None = None,
) -> ExportReport:
    """Writes an ONNX file of standard operators, builds TensorRT's engine of it, and compares the file with the model.

    The engine is built where TensorRT-RTX (`pip install 'rewriter[tensorrt]'`, no GPU needed) or TensorRT is installed; it
    computes in the types of the model, so load the model in fp16 or bf16 for such an engine. The comparison runs the file in ONNX
    Runtime, which has no bf16 kernels: there it is the parser alone that has seen it. The engine is an artifact of its own,
    `load("model.trt.engine")`, which runs where there is a GPU that it was built for; there it is compared, too.

    Args:
        args, kwargs: of one call of the model, with at least two rows of two tokens; batch and length may then be others.
        path: file to write; beside it a report, the compared cases, the engine (`.engine`) and the command that builds it
            (`<path>.sh`).
        capabilities: compute capabilities that the engine is for, such as `("8.6", "12.0")`; this machine's GPU when left out,
            and without one those of 8.0, 8.6, 9.0 and 10.0 that the installed TensorRT compiles for.
        profile: the least, best and most sizes that the engine takes, such as `{"batch": (1, 1, 8), "tokens": (2, 512, 4096)}`;
            up to 8 rows of any length when left out. Its activation memory is that of the most.
        cache, max_length: as for `onnx`; there are two engines then.

    Raises:
        ExportError: a package is missing, the policy has no form in standard operators, the parser refuses an operator, no engine
            can be built (nothing is left written then), or the file gives other results than the model.
        RewriteError, PolicyError: as `optimize`.
    """
    return _export(
        "tensorrt",
        optimized,
        args,
        kwargs,
        path,
        capabilities=capabilities,
        profile=profile,
        cache=cache,
        max_length=max_length,
    )


def _export(
    target: str,
    optimized: OptimizedModel,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    path: str | Path,
    **options: Any,
) -> ExportReport:
    path = Path(path)
    named = bind(optimized.model, args, kwargs)
    write = TARGETS[target].write
    assert write is not None
    # All files or none: what was there before stays where an export fails.
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
        written = write(optimized, named, Path(folder) / path.name, **options).moved_to(path.parent)
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    report = new_report(optimized, target, path, written)
    finish(report, optimized, named, path, written)
    if written.also is not None:
        also, file, parts = written.also
        second = new_report(optimized, also, file, parts)
        finish(second, optimized, named, file, parts, TARGETS[also].cannot_run(second))
    return report
