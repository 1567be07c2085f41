"""From which length on does skipping dead keys pay? And what does attention take, by a model of four numbers?

Attention alone, fp32, on the CPU: torch's fused kernel, causal and under a mask, and live-range attention, for windows of
several sizes and for separators, at several lengths and numbers of heads, in rounds in which they take turns.
`kernels/costs.json` gets the numbers of the model `rewriter.kernels.costs` (least squares of the relative errors), and the table
printed, and `bench/results/crossover-cpu.json`, show the measured and the predicted speed of each, relative to the causal kernel,
and the length from which on it is ahead.

    python bench/crossover.py --out kernels/costs.json
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from typing import Any

import torch
import typer
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from rewriter.kernels.costs import TABLE
from rewriter.kernels.costs import Cost
from rewriter.kernels.costs import Work
from rewriter.kernels.costs import fused_work
from rewriter.kernels.costs import live_range_work
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
HEADS = ((8, 2, 64), (4, 4, 32))
"""Query heads, KV heads, and the numbers of each."""
MODES = ("forward", "training")
CAUSAL, MASKED = "causal", "masked"
POINTS = Path(__file__).parent / "results" / "crossover-cpu.json"


def ranges(length: int) -> dict[str, LiveRanges]:
    """What live-range attention is measured on."""
    separators = torch.rand(length, generator=torch.Generator().manual_seed(0)) < 0.1
    windows = {f"window {w}": LiveRanges.sliding_window(length, w, sinks=4) for w in (64, 256, 1024) if w < length}
    near = LiveRanges.sliding_window(length, min(256, length - 1), sinks=4)
    index = torch.arange(length, dtype=torch.int32)
    kept = LiveRanges(index[None, None], torch.where(separators, 2**30, near.end[0, 0]).int()[None, None])
    return {CAUSAL: LiveRanges.causal(length), **windows, "separators, window 256": kept}


@dataclass(frozen=True)
class Measured:
    """One kernel at one size: seconds of the fastest round, and its work."""

    kernel: str
    mask: str
    length: int
    heads: tuple[int, int, int]
    seconds: float
    work: Work


def kernels(length: int, heads: tuple[int, int, int]) -> dict[tuple[str, str], tuple[Callable[..., Tensor], Work]]:
    """What is measured, by kernel and mask, and the work of each."""
    num_heads, num_kv_heads, width = heads
    hidden = torch.ones(length, length, dtype=torch.bool).tril()
    found: dict[tuple[str, str], tuple[Callable[..., Tensor], Work]] = {
        (CAUSAL, CAUSAL): (
            lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            fused_work(length, length, num_heads, 2 * width, is_causal=True),
        ),
        (MASKED, CAUSAL): (
            lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=hidden, enable_gqa=True),
            fused_work(length, length, num_heads, 2 * width),
        ),
    }
    for mask, live in ranges(length).items():
        work = live_range_work(live, length, num_heads, num_kv_heads, 2 * width)
        found["live_range", mask] = (lambda q, k, v, live=live: live_range_attention(q, k, v, live), work)
    return found


def measure(mode: str, rounds: int) -> list[Measured]:
    results = []
    for heads in HEADS:
        num_heads, num_kv_heads, width = heads
        for length in LENGTHS:
            sizes = [(1, n, length, width) for n in (num_heads, num_kv_heads, num_kv_heads)]
            inputs = [torch.randn(size, requires_grad=mode == "training") for size in sizes]
            wanted = torch.randn(sizes[0])
            everything = kernels(length, heads)
            best = dict.fromkeys(everything, math.inf)
            for number in range(rounds + 1):  # the first is not counted
                for key, (call, _) in everything.items():
                    begin = time.perf_counter()
                    output = call(*inputs)
                    if mode == "training":
                        output.backward(wanted)
                    best[key] = min(best[key], time.perf_counter() - begin) if number else math.inf
            results += [Measured(*key, length, heads, best[key], work) for key, (_, work) in everything.items()]
    return results


def fit(measured: list[Measured], threads: int) -> Cost:
    """Least squares of the relative errors, over numbers that are not negative."""
    rows = torch.tensor(
        [[1.0, *(n / threads for n in (m.work.blocks, m.work.pairs, m.work.pairs * m.work.width))] for m in measured],
        dtype=torch.float64,
    )
    seconds = torch.tensor([m.seconds * 1e9 for m in measured], dtype=torch.float64)
    used = [0, 1, 2, 3]
    while True:
        found = torch.linalg.lstsq(rows[:, used] / seconds[:, None], torch.ones(len(measured), 1, dtype=torch.float64))
        numbers = dict(zip(used, found.solution[:, 0].tolist(), strict=True))
        negative = [place for place, number in numbers.items() if number < 0]
        if not negative:
            return Cost(*(round(numbers.get(place, 0.0), 7) for place in range(4)))
        used = [place for place in used if place not in negative]


def table(mode: str, measured: list[Measured], found: dict[str, Cost], threads: int) -> Table:
    """Speed relative to the causal kernel, measured and predicted."""
    shown = Table(title=f"{mode}: speed relative to torch's causal kernel, measured (predicted)", title_justify="left")
    for column in ("query heads, KV heads, width", "mask", *(f"{n:,}" for n in LENGTHS), "ahead from"):
        shown.add_column(column, justify="left" if column[0] in "qm" else "right")
    by_place = {(m.kernel, m.mask, m.heads, m.length): m for m in measured}
    for heads in HEADS:
        for kernel, mask in dict.fromkeys((m.kernel, m.mask) for m in measured if m.kernel != CAUSAL):
            cells, ahead = [], "-"
            for length in LENGTHS:
                m, base = by_place.get((kernel, mask, heads, length)), by_place[CAUSAL, CAUSAL, heads, length]
                if m is None:
                    cells.append("")
                    continue
                predicted = found[CAUSAL].seconds(base.work, threads) / found[kernel].seconds(m.work, threads)
                cells.append(f"{base.seconds / m.seconds:.2f}x ({predicted:.2f}x)")
                ahead = f"{length:,}" if base.seconds >= m.seconds and ahead == "-" else ahead
            shown.add_row(", ".join(map(str, heads)), f"{kernel}, {mask}", *cells, ahead)
    return shown


def main(
    out: Annotated[Path, typer.Option(help="JSON to write: the numbers of the model.")] = TABLE,
    points: Annotated[Path, typer.Option(help="JSON to write: what was measured, and is predicted.")] = POINTS,
    rounds: Annotated[int, typer.Option(help="Rounds of the timings.")] = 7,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    known: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    console, own = Console(width=170), {}
    rows: dict[str, Any] = {"torch": torch.__version__, "threads": threads}
    for mode in MODES:
        measured = measure(mode, rounds)
        names = dict.fromkeys(m.kernel for m in measured)
        found = {name: fit([m for m in measured if m.kernel == name], threads) for name in names}
        own[mode] = {name: asdict(cost) for name, cost in found.items()}
        console.print(table(mode, measured, found, threads))
        rows[mode] = [{**asdict(m), "predicted": found[m.kernel].seconds(m.work, threads)} for m in measured]
    points.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    own["measured"] = {"torch": torch.__version__, "threads": threads}
    out.write_text(json.dumps({**known, "cpu": own}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
