"""How much memory does training take, and what stays after compiling? Against the original, as it is and compiled.

A Llama of 4 layers, one row, forward and backward. Each contestant is measured in a process of its own: what it holds after it
has compiled a call, and, for each length, the most that it holds during a training step, above what it held before the step.

    python bench/memory.py --out bench/results/memory.json
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from never_slower import COMPILED
from never_slower import ORIGINAL
from never_slower import POLICIES
from never_slower import batch
from never_slower import models
from rich.console import Console
from rich.table import Table

import rewriter

LENGTHS = (512, 1024, 2048, 4096, 8192)
CONTESTANTS = (ORIGINAL, COMPILED, *POLICIES)


def held(name: str) -> float:
    """MiB of memory of this process: "VmRSS" now, "VmHWM" at most since the peak was reset (Linux)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def settle() -> None:
    """Gives back what is not used any more."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(contestant: str, lengths: list[int]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = models()["llama"]().train()
    if contestant == COMPILED:
        call: Any = torch.compile(model, dynamic=True)
    else:
        call = model if contestant == ORIGINAL else rewriter.optimize(model, POLICIES[contestant], strict=True)

    def step(length: int) -> None:
        given = batch(1, length, model.config.vocab_size)
        call(**given, labels=given["input_ids"], use_cache=False).loss.backward()

    settle()
    before = held("VmRSS")
    for length in (192, 256):  # the second compiles with sizes that change, where the first took its own for granted
        step(length)
    settle()
    after = held("VmRSS")
    peaks = {}
    for length in lengths:
        settle()
        own = held("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        step(length)
        peaks[str(length)] = held("VmHWM") - own
    return {"compiled": after - before, "peaks": peaks}


def table(results: dict[str, Any]) -> Table:
    shown = Table(title="MiB: held after compiling, and at most in a training step", title_justify="left")
    lengths = list(next(iter(results.values()))["peaks"])
    for column in ("", "after compiling", *(f"{int(n):,} tokens" for n in lengths)):
        shown.add_column(column, justify="right" if column else "left")
    for name, own in results.items():
        base = results[ORIGINAL]["peaks"]
        cells = (f"{own['peaks'][n]:.0f} ({own['peaks'][n] / base[n]:.2f}x)" for n in lengths)
        shown.add_row(name, f"{own['compiled']:.0f}", *cells)
    return shown


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("memory.json"),
    lengths: Annotated[str, typer.Option(help="Tokens, separated by commas.")] = ",".join(map(str, LENGTHS)),
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    contestant: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    torch.set_num_threads(threads)
    if contestant:
        print(json.dumps(measure(contestant, [int(n) for n in lengths.split(",")])))
        return
    results = {}
    for name in CONTESTANTS:
        command = [sys.executable, __file__, "--contestant", name]
        done = subprocess.run(
            [*command, "--lengths", lengths, "--threads", str(threads)], check=True, capture_output=True, text=True
        )
        results[name] = json.loads(done.stdout.splitlines()[-1])
    Console(width=150).print(table(results))
    out.write_text(json.dumps({"torch": torch.__version__, "threads": threads, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
