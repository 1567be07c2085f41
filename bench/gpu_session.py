"""All that needs a GPU, most valuable first, for a session whose minutes are counted.

    bench/on_gpu.sh [--budget SECONDS] [--only SECTION,...]     on a GPU
    bench/on_gpu.sh --rehearse                                  anywhere: each section at tiny sizes, in the interpreter

Each section runs in a process of its own with a limit of its own. Each row is written to `results/gpu-<card>.json` as soon
as it is measured, with commit, card, and the versions of torch and Triton; one that fails leaves its error there, and the
next one runs. A row that exists for this commit and card is not measured again, so a second call goes on where the first
stopped. A row whose process hung or crashed is found in the file as "did not end".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated
from typing import Any

import gpu_cache
import gpu_models
import gpu_sections
import models_cuda
import torch
import triton
import typer
from gpu_machine import Machine
from gpu_sections import TINY
from gpu_sections import Row
from gpu_sections import Sizes
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
LOST = 75
"""Exit status of a section whose process can run nothing more on the GPU, after an illegal address, say."""


@dataclass(frozen=True)
class Section:
    """Attributes:
    name: as `--only` takes it.
    question: what it answers.
    predicted: seconds that it should take on an H100 where kernels are found in the cache.
    limit: seconds after which it is ended.
    rows: what it measures.
    asked: whether it runs only where `--only` names it.
    """

    name: str
    question: str
    predicted: int
    limit: int
    rows: Callable[[Machine, Sizes], Iterator[Row]]
    asked: bool = False


SECTIONS = [
    Section("machine", "how fast are products, copies and dense attention?", 35, 80, gpu_sections.machine_rows),
    Section("correct", "are values and gradients right?", 90, 150, gpu_sections.correct_rows),
    Section("attention", "how fast are kernels, operators, schedules?", 75, 150, gpu_sections.attention_rows),
    Section("compiled", "how fast is the operator in compiled code?", 60, 120, gpu_sections.compiled_rows),
    Section("peers", "how fast are FlexAttention and flash-sparse-attn?", 70, 120, gpu_sections.peers_rows),
    Section("models", "do models and a package give what they should?", 130, 200, gpu_models.rows),
    Section("whole", "how fast is a whole model, and what memory does it take?", 110, 180, models_cuda.whole_rows),
    Section("tune", "which launch parameters are fastest?", 80, 300, gpu_sections.tune_rows),
    Section("llama", "and of a billion, and of eight?", 600, 600, models_cuda.llama_rows, asked=True),
    Section("counters", "what do the hardware's counters say?", 60, 120, gpu_sections.counters_rows, asked=True),
]


class Results:
    """The rows of one card's file, read anew before each change: sections are processes of their own."""

    def __init__(self, path: Path, machine: Machine) -> None:
        self.path = path
        self.identity = {
            "commit": gpu_cache.commit(),
            "card": machine.card,
            "torch": torch.__version__,
            "triton": triton.__version__,
        }

    def read(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def own(self) -> list[dict[str, Any]]:
        """The rows of this commit and card."""
        same = ("commit", "card")
        return [row for row in self.read() if all(row[name] == self.identity[name] for name in same)]

    def write(self, section: str, name: str, **values: Any) -> None:
        """Puts a row in the place of one of the same name, commit and card."""
        row = {"section": section, "row": name, **self.identity, **values}
        key = ("section", "row", "commit", "card")
        rows = [r for r in self.read() if any(r[k] != row[k] for k in key)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        lines = ",\n".join(json.dumps(r) for r in [*rows, row])
        new.write_text(f'{{"rows": [\n{lines}\n]}}\n')
        new.replace(self.path)

    def is_done(self, section: str, name: str, attempt: str) -> bool:
        """Whether a row was measured, or was tried by this call."""
        return any(
            row["section"] == section and row["row"] == name and ("figures" in row or row.get("attempt") == attempt)
            for row in self.own()
        )


def main(
    budget: Annotated[int, typer.Option(help="Seconds for all sections together.")] = 570,
    only: Annotated[str | None, typer.Option(help="Sections, separated by commas.", show_default=False)] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Tiny sizes, in Triton's interpreter.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    once: Annotated[bool, typer.Option("--once", hidden=True)] = False,
) -> None:
    machine, sizes = Machine(rehearse), TINY if rehearse else Sizes()
    if not rehearse and not torch.cuda.is_available():
        raise SystemExit("bench/on_gpu.sh needs a GPU; torch sees none here. --rehearse runs anywhere")
    if once:
        gpu_sections.run_once(machine, sizes)
        print("_forward and its gradients ran")
        return
    known = {s.name: s for s in SECTIONS}
    asked = only.split(",") if only else [s.name for s in SECTIONS if not s.asked or rehearse]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise SystemExit(f"--only names {', '.join(unknown)}; there are {', '.join(known)}")
    card = machine.card.lower().replace("nvidia", "").strip().replace(" ", "-")
    results = Results(out / f"gpu-{card}.json", machine)
    begin, attempt = time.time(), str(time.time())
    seconds = {}
    for one in (known[name] for name in asked):
        started = time.time()
        while run_section(one, machine, sizes, results, begin + budget, attempt):
            pass
        seconds[one.name] = time.time() - started
    summary(results, [known[name] for name in asked], seconds)


def run_section(
    section: Section, machine: Machine, sizes: Sizes, results: Results, deadline: float, attempt: str
) -> bool:
    """Runs a section in a process of its own; whether it has to go on in another, because a row broke the process."""
    left = deadline - time.time()
    if left < 10:
        print(f"{section.name}: no time left", flush=True)
        return False
    # A process that has used a GPU cannot be forked; a rehearsal has none, and need not import torch nine times.
    context = get_context("fork" if machine.rehearsed else "spawn")
    process = context.Process(target=run_rows, args=(section.name, machine, sizes, results, attempt))
    process.start()
    process.join(min(section.limit, left))
    ended = process.exitcode is not None
    if not ended:
        print(f"{section.name}: ended at its limit", flush=True)
        # With all that it has started.
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return ended and (process.exitcode == LOST or process.exitcode < 0)


def run_rows(name: str, machine: Machine, sizes: Sizes, results: Results, attempt: str) -> None:
    """Measures the rows of a section that are not there yet; all that a section's process does."""
    os.setsid()
    section = next(section for section in SECTIONS if section.name == name)
    gpu_cache.use_key_of(gpu_cache.FOLDER)
    counts = gpu_cache.count_compilations()
    for row in section.rows(machine, sizes):
        if results.is_done(section.name, row.name, attempt):
            continue
        results.write(section.name, row.name, error="did not end: hung, crashed, or out of time", attempt=attempt)
        begin = time.time()
        try:
            outcome: dict[str, Any] = {"figures": rounded(row.measure())}
        except Exception as error:  # any error is a result of the row
            outcome = {"error": f"{type(error).__name__}: {error}"[:1500], "attempt": attempt}
        compiled = {name: round(count, 1) for name, count in counts.items()}
        counts.clear()
        took = round(time.time() - begin, 2)
        results.write(section.name, row.name, **outcome, seconds=took, **({"compiled": compiled} if compiled else {}))
        print(f"{section.name} | {row.name} | {took} s | {str(outcome)[:300]}", flush=True)
        try:
            machine.synchronize()
        except RuntimeError:
            sys.stdout.flush()
            os._exit(LOST)


def rounded(value: Any) -> Any:
    """Four significant digits, at any depth."""
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def summary(results: Results, sections: list[Section], seconds: dict[str, float]) -> None:
    """Printed last and short."""
    console = Console(width=160)
    rows = results.own()
    table = Table(title=f"{results.identity}", title_justify="left")
    for name in ("section", "rows", "failed", "seconds", "predicted", "kernels compiled, found"):
        table.add_column(name, justify="left" if name == "section" else "right")
    for section in sections:
        mine = [row for row in rows if row["section"] == section.name]
        counts = [row.get("compiled", {}) for row in mine]
        table.add_row(
            section.name,
            str(len(mine)),
            str(sum("error" in row for row in mine)),
            f"{seconds.get(section.name, 0):.0f}",
            str(section.predicted),
            f"{sum(c.get('misses', 0) for c in counts):.0f}, {sum(c.get('hits', 0) for c in counts):.0f}",
        )
    console.print(table)
    figures = {(row["section"], row["row"]): row["figures"] for row in rows if "figures" in row}
    table = Table(title="milliseconds, and times the causal dense kernel", title_justify="left")
    for name in ("mask", "forward kernel", "backward kernels", "eager", "eager backward", "TFLOP/s", "launches"):
        table.add_column(name, justify="left" if name == "mask" else "right")
    for (section_name, row_name), f in figures.items():
        if section_name != "attention" or "forward_kernel_ms" not in f:
            continue
        dense = figures.get(("machine", f"causal sdpa default {row_name.split()[-1]}"), {})

        def against(ms: float, which: str, dense: dict[str, Any] = dense) -> str:
            return f"{ms:.3f} ({dense[which] / ms:.1f}x)" if dense and ms else f"{ms:.3f}"

        table.add_row(
            row_name,
            against(f["forward_kernel_ms"], "forward_ms"),
            against(f["backward_kernels_ms"], "backward_ms"),
            against(f["eager_forward"]["wall_ms"], "forward_ms"),
            against(f["eager_backward"]["wall_ms"], "backward_ms"),
            f"{f['forward_tflops']:.0f}, {f['backward_tflops']:.0f}",
            f"{f['forward_launches']}, {f['backward_launches']}",
        )
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['section']} | {row['row']}: {row['error'][:150]}", markup=False)
    console.print(f"written: {results.path}", markup=False)


if __name__ == "__main__":
    typer.run(main)
