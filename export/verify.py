"""Verification: what an artifact gives in a fresh process against what the optimized model gave when it was exported.

Two cases at sizes that the model was not traced at: three rows, padded differently, and one row. Over a cache, a prompt is
followed by single tokens, and all of it is compared with the model's forward over the whole text.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import torch
from rewriter.export.artifact import ExportReport
from rewriter.export.artifact import cases_path
from rewriter.export.artifact import checksum
from rewriter.export.artifact import describe
from rewriter.export.artifact import report_path
from rewriter.export.artifact import versions
from rewriter.export.entry_points import EntryPoint
from rewriter.export.entry_points import first_tensor
from rewriter.export.loading import load
from rewriter.export.targets.written import Written
from torch import Tensor

from rewriter.chunked.reading import run_chunks
from rewriter.errors import ArtifactError
from rewriter.errors import ExportError

if TYPE_CHECKING:
    from rewriter.generation.decoder import Decoder
    from rewriter.optimized_model import OptimizedModel

SIZES = ((3, 37), (1, 150))
"""(rows, tokens) of the cases."""

STEPS = 4
"""Single tokens after a prompt."""

ROWS = 8
"""Logits of so many last tokens are compared."""


def new_report(optimized: OptimizedModel, target: str, path: Path, written: Written) -> ExportReport:
    """The report of an artifact that was just written, before it is compared."""
    fallbacks = list(dict.fromkeys(f"{s.module}: {s.reason}" for s in optimized.report.sites if not s.rewritten))
    report = ExportReport(
        target=target,
        policy=optimized.policy.to_dict(),
        dtype=str(next(optimized.model.parameters()).dtype).removeprefix("torch."),
        versions={**versions(), **written.versions},
        machine=(platform.machine(), written.device or written.points[0].examples[0].device.type),
        sha256=checksum(path),
        num_bytes=path.stat().st_size,
        max_length=written.bound,
        entry_points=describe(written.points),
        fallbacks=fallbacks,
        no_decode=written.no_decode,
    )
    report.kernels, report.functions = written.kernels, written.functions
    report.notes += written.notes
    report.engines = written.engines
    report.beside = {file.name: checksum(file) for file in written.beside}
    return report


@torch.no_grad()
def write_cases(
    optimized: OptimizedModel,
    kwargs: Mapping[str, Any],
    path: Path,
    points: Sequence[EntryPoint],
    decoder: Decoder | None,
    bound: int | None,
) -> None:
    """Inputs of the two sizes, and the optimized model's results for them."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    names = {p.name: p for p in points}
    for number, (rows, tokens) in enumerate(_sizes(points, bound)):
        if "forward" in names:
            point = names["forward"]
            inputs = _forward_case(point, kwargs, rows, tokens)
            others = {n: v for n, v in kwargs.items() if not isinstance(v, Tensor)}
            given = {n: t for n, t in inputs.items() if not (n == "position_ids" and n not in kwargs)}
            expected = first_tensor(optimized(**given, **others))
        else:
            assert decoder is not None
            inputs = _text_case(decoder.vocabulary, rows, tokens, decoder.device)
            if "chunk" in names:
                inputs["num_query"] = torch.tensor(min(16, tokens // 2))
                logits, results = run_chunks(
                    decoder,
                    inputs["input_ids"],
                    inputs["attention_mask"],
                    inputs["position_ids"],
                    int(inputs["num_query"]),
                )
                real = inputs["attention_mask"].bool()
                expected = torch.cat((logits.flatten(), *(_real(r, real).flatten() for r in results)))
            else:
                own = {
                    k: v for k, v in inputs.items() if k in kwargs or k != "position_ids" or _takes_positions(optimized)
                }
                expected = first_tensor(optimized(**own, use_cache=False))[:, -ROWS:]
        tensors.update({f"{number}.{name}": t.contiguous() for name, t in inputs.items()})
        tensors[f"{number}.expected"] = expected.contiguous().clone()
    save_file({name: t.cpu() for name, t in tensors.items()}, cases_path(path))


def _takes_positions(optimized: OptimizedModel) -> bool:
    return not any(p.positions == "cache" for p in optimized.policy.parts())


def _sizes(points: Sequence[EntryPoint], bound: int | None) -> list[tuple[int, int]]:
    """The cases' sizes, as far as the ranges allow them: over a cache of a prompt, and the single tokens after it.

    Args:
        bound: tokens of a row over the cache; None for any number.
    """

    def within(name: str, size: int) -> int:
        bounds = [p.ranges[name] for p in points if name in p.ranges]
        low, high = (max(low for low, _ in bounds), min(high for _, high in bounds)) if bounds else (size, size)
        return min(max(size, low), high)

    steps = STEPS if any(p.name == "decode" for p in points) else 0
    sizes = [(within("batch", rows), within("tokens", tokens - steps) + steps) for rows, tokens in SIZES]
    return [(rows, tokens if bound is None else min(tokens, bound)) for rows, tokens in sizes]


def _text_case(vocabulary: int, rows: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(rows)
    # Neighbours differ: equal tokens tie in a ranking, and rounding would decide.
    ids = torch.stack(
        [torch.randperm(max(vocabulary, tokens), generator=random)[:tokens] % vocabulary for _ in range(rows)]
    )
    mask = (torch.arange(tokens) >= 3 * torch.arange(rows)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "position_ids": positions.to(device)}


def _forward_case(point: EntryPoint, kwargs: Mapping[str, Any], rows: int, tokens: int) -> dict[str, Tensor]:
    """Arguments like the example's, of other sizes: masks padded on the left, ids and features drawn anew."""
    random = torch.Generator().manual_seed(rows)
    case = {}
    for given, example in zip(point.inputs, point.examples, strict=True):
        sizes = [rows if d == "batch" else tokens if isinstance(d, str) else d for d in given.dims]
        if given.name == "position_ids":
            case[given.name] = torch.arange(tokens).expand(rows, -1)
        elif "mask" in given.name and len(sizes) == 2:
            case[given.name] = (torch.arange(sizes[1]) >= 3 * torch.arange(rows)[:, None]).to(example.dtype)
        elif example.is_floating_point():
            case[given.name] = torch.randn(sizes, generator=random).to(example.dtype)
        else:
            top = int(example.amax()) + 1
            case[given.name] = torch.randint(0, max(top, 2), sizes, generator=random).to(example.dtype)
        case[given.name] = case[given.name].to(example.device)
    return case


def _real(result: Tensor, real: Tensor) -> Tensor:
    """A site's result `[B, H, S, ...]` without what belongs to padding."""
    keep = real[:, None, :, None] if result.dim() == 4 else real[:, None, :]
    return torch.where(keep, result, 0).float()


def finish(
    report: ExportReport,
    optimized: OptimizedModel,
    kwargs: Mapping[str, Any],
    path: Path,
    written: Written,
    cannot_run: str = "",
) -> ExportReport:
    """Compares an artifact that was just written with the model, and writes the report.

    Args:
        cannot_run: why it cannot be compared on this machine; "" where it can. `rewriter verify` compares it elsewhere.

    Raises:
        ExportError: they do not agree; the report says by how much.
    """
    write_cases(optimized, kwargs, path, written.points, written.decoder, written.bound)
    if cannot_run:
        report.notes.append(f"not compared with the model: {cannot_run}; `rewriter verify {path.name}` does it")
    report.write(path)  # which loading reads
    if cannot_run:
        return report
    report.compared = compare_in_a_fresh_process(path)
    report.write(path)
    if not report.agrees:
        largest = max(c["relative"] for c in report.compared)
        raise ExportError(
            f"{path} was written, and gives other results than the model: they differ by {largest:.1e} of their size, "
            f"{report.tolerance:g} is allowed; see {report_path(path)}"
        )
    return report


def compare_in_a_fresh_process(path: Path) -> list[dict[str, Any]]:
    """Runs the artifact's cases in another process; see `compare`.

    Raises:
        ExportError: the process failed; with what it said.
    """
    path = path.absolute()
    command = [sys.executable, "-m", "rewriter.export.verify", str(path)]
    # Python looks for modules in the working directory first, where a folder may have this package's name.
    done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent)
    if done.returncode:
        raise ExportError(
            f"the artifact {path} was written, and does not run in a fresh process:\n{done.stderr[-4000:]}"
        )
    result: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


@torch.no_grad()
def compare(path: Path, runtime: str | None = None) -> list[dict[str, Any]]:
    """The artifact's cases, run: sizes, largest difference, and the norm of the difference over that of the result.

    Args:
        runtime: as for `load`.

    Raises:
        ArtifactError: the artifact is damaged, or its cases are; or it does not open in that runtime.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    artifact = load(path, runtime)
    try:
        tensors = load_file(cases_path(path))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{cases_path(path)} cannot be read ({error}); it belongs to the artifact") from None
    results = []
    for number in range(len(SIZES)):
        case = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{number}.")}
        expected = case.pop("expected")
        device = artifact.device
        case = {name: t.to(device) for name, t in case.items()}
        mask = case.get("attention_mask")
        if "forward" in artifact.entry_points:
            actual = artifact(**case)
        elif "chunk" in artifact.entry_points:
            assert mask is not None
            logits, *others = artifact.chunk(
                case["input_ids"], case["attention_mask"], case["position_ids"], int(case["num_query"])
            )
            actual = torch.cat((logits.flatten(), *(_real(t, mask.bool()).flatten() for t in others)))
        else:
            actual = _with_cache(artifact, case)
            expected = expected[:, -actual.size(1) :]
        actual = actual.cpu()
        if mask is not None and expected.dim() == 3 and mask.dim() == 2 and expected.size(1) <= mask.size(1):
            real = mask.cpu()[:, -expected.size(1) :].bool()
            actual, expected = actual[real], expected[real]
        difference = (actual.double() - expected.double()).abs()
        results.append(
            {
                "sizes": list((case.get("input_ids", next(iter(case.values())))).shape),
                "largest": float(difference.max()),
                "relative": float(difference.norm() / expected.double().norm().clamp(min=1e-30)),
            }
        )
    return results


def _with_cache(artifact: Any, case: Mapping[str, Tensor]) -> Tensor:
    """The last logits of a text: all but `STEPS` tokens at once, as far as the prompt's size allows, the others one by one."""
    ids, mask, positions = (case[name] for name in ("input_ids", "attention_mask", "position_ids"))
    cache = artifact.new_cache(ids.size(0))
    ranges = artifact.report.entry_points["prefill"]["ranges"]
    prompt = min(max(ids.size(1) - STEPS, ranges["tokens"][0]), ids.size(1))
    rows = max(min(ROWS - STEPS, prompt, ranges["kept"][1]), ranges["kept"][0])
    kept = torch.arange(prompt - rows, prompt, device=ids.device)
    logits = [artifact.run(cache, ids[:, :prompt], mask[:, :prompt], positions[:, :prompt], kept)]
    for place in range(prompt, ids.size(1)):
        one = slice(place, place + 1)
        logits.append(artifact.run(cache, ids[:, one], mask[:, one], positions[:, one]))
    return torch.cat(logits, dim=1)


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]))))
