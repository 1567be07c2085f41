"""How fast is live-range attention? Dense SDPA, FlexAttention and this kernel on the same inputs in one run.

    python bench/attention.py

fp32, 8 query and 2 KV heads of 64, batch 1, random queries, keys and values. Masks: a dynamic mask (running top-512 of
random scores), the separator mask of real text (window 256, 3 first keys), a sliding window of 256. The ideal speed-up
is the number of causal pairs over the number of visible ones; the work ratio is pairs computed over pairs visible.
Times are the shortest of a few rounds in which the contestants take turns. Peak memory is that of a process of its own,
above what it held with the inputs and the gradient of the output in place.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.cpu.schedule import computed_pairs
from rewriter.kernels.cpu.schedule import tile_rows
from rewriter.kernels.cpu.schedule import tiles
from rich.console import Console
from rich.table import Table
from torch import Tensor

QUERY_HEADS, KV_HEADS, HEAD_DIM, KEEP, WINDOW = 8, 2, 64, 512, 256
GROUP = QUERY_HEADS // KV_HEADS
MASKS = ("dynamic", "separator", "window")


@dataclass
class Measured:
    """One mask at one length; times in seconds, memory in MiB, None where not measured."""

    mask: str
    length: int
    ideal: float
    work_ratio: float
    forward: float
    backward: float
    ranges_and_schedule: float
    peak_memory: float
    dense_forward: float | None = None
    dense_backward: float | None = None
    against_flex: float | None = None


def run(
    console: Console, out: Path, lengths: list[int], dense_up_to: int, flex_up_to: int, rounds: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    results: list[Measured] = []
    for length in lengths:
        few = max(1, rounds * 16384 // length)
        results.extend(measure(length, length <= dense_up_to, length <= flex_up_to, few, threads))
        console.print(f"{length:,} done")
    console.print(table(results))
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "torch": torch.__version__,
        "matmul_gflops": matmul_rate() / 1e9,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "results": [asdict(r) for r in results]}, indent=1) + "\n")
    console.print(f"written: {out}", markup=False)


def inputs(length: int, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    heads = (QUERY_HEADS, KV_HEADS, KV_HEADS)
    query, key, value = (torch.randn(1, h, length, HEAD_DIM, requires_grad=grad) for h in heads)
    return query, key, value


def ranges_builder(mask: str, length: int) -> Callable[[], LiveRanges]:
    """What builds the ranges from what a model would have: scores, token ids, or nothing."""
    if mask == "dynamic":
        score = torch.randn(1, KV_HEADS, length, generator=torch.Generator().manual_seed(1))
        return lambda: running_topk_ranges(score, KEEP)
    if mask == "separator":
        is_separator = separators_of_real_text(length)
        return lambda: LiveRanges.separators(is_separator, window=WINDOW, initial=3)
    return lambda: LiveRanges.sliding_window(length, WINDOW)


def separators_of_real_text(length: int) -> Tensor:
    """bool `[1, length]`: separators among the tokens of the standard library's source files."""
    from transformers import AutoTokenizer

    from rewriter import SeparatorMask
    from rewriter.demo.corpus import held_out_files
    from rewriter.demo.corpus import training_files
    from rewriter.demo.run import MODEL

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    policy = SeparatorMask.from_tokenizer(tokenizer)
    ids: list[int] = []
    for path in (*held_out_files(), *training_files()):
        ids.extend(tokenizer.backend_tokenizer.encode(path.read_text(encoding="utf-8", errors="ignore")).ids)
        if len(ids) >= length:
            break
    return torch.isin(torch.tensor([ids[:length]]), torch.tensor(policy.separators))


def measure(length: int, with_dense: bool, with_flex: bool, rounds: int, threads: int) -> list[Measured]:
    query, key, value = inputs(length, grad=True)
    grad = torch.randn(1, QUERY_HEADS, length, HEAD_DIM)
    masks = MASKS if with_dense else tuple(mask for mask in MASKS if mask != "separator")
    builders = {mask: ranges_builder(mask, length) for mask in masks}
    ranges = {mask: build() for mask, build in builders.items()}

    def dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def ours(live: LiveRanges) -> Callable[[], Tensor]:
        return lambda: live_range_attention(query, key, value, live)

    calls: dict[str, Callable[[], Any]] = {mask: ours(live) for mask, live in ranges.items()}
    if with_dense:
        calls["dense"] = dense
    with torch.no_grad():
        forward_times = take_turns(calls, rounds)
        against_flex = {}
        if with_flex:
            # A contest of its own: the threads of its generated code go on spinning and slow down whoever comes next.
            for mask, live in ranges.items():
                times = take_turns({"flex": flex(query, key, value, live), "ours": ours(live)}, rounds)
                against_flex[mask] = times["flex"] / times["ours"]
    outputs = {name: call() for name, call in calls.items()}
    backward_times = take_turns(
        {
            name: lambda output=output: torch.autograd.grad(output, (query, key, value), grad, retain_graph=True)
            for name, output in outputs.items()
        },
        max(1, rounds // 2),
    )
    results = []
    for mask, live in ranges.items():
        pairs = live.live_pairs()
        rows = live.shape[0] * live.shape[1]
        results.append(
            Measured(
                mask=mask,
                length=length,
                ideal=rows * length * (length + 1) / 2 / pairs,
                work_ratio=computed_pairs(live, length, GROUP) / pairs,
                forward=forward_times[mask],
                backward=backward_times[mask],
                ranges_and_schedule=take_turns({mask: lambda m=mask: schedule_all(builders[m]())}, rounds)[mask],
                peak_memory=peak_memory(mask, length, threads),
                dense_forward=forward_times.get("dense"),
                dense_backward=backward_times.get("dense"),
                against_flex=against_flex.get(mask),
            )
        )
    return results


def schedule_all(live: LiveRanges) -> None:
    index = torch.arange(live.num_keys, dtype=torch.int32)
    start, end = (t.expand(live.shape).flatten(0, 1) for t in (live.start, live.end))
    for row_start, row_end in zip(start, end, strict=True):
        for _ in tiles(row_start, row_end, index, tile_rows(GROUP, live.num_keys, shared=live.shape[1] == 1)):
            pass


def flex(query: Tensor, key: Tensor, value: Tensor, live: LiveRanges) -> Callable[[], Tensor]:
    """FlexAttention with the same mask; building its block mask is not timed. Forward only: it has no backward on CPU."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention

    start, end = (t.expand(live.shape)[0] for t in (live.start, live.end))
    shared = start.size(0) == 1

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = 0 if shared else h // GROUP
        return (start[row, j] <= i) & (i < end[row, j])

    block_mask = create_block_mask(
        visible, None, None if shared else QUERY_HEADS, query.size(2), key.size(2), device="cpu"
    )
    torch._dynamo.reset()  # a second length would compile with a dynamic one, which its CPU code generator cannot (2.13)
    compiled = torch.compile(flex_attention, dynamic=False)
    detached = [t.detach() for t in (query, key, value)]
    return lambda: compiled(*detached, block_mask=block_mask, enable_gqa=True)


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The shortest time of each, after one call that is not counted."""
    best = dict.fromkeys(calls, math.inf)
    for counted in [False] + [True] * rounds:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if counted:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def peak_memory(mask: str, length: int, threads: int) -> float:
    """MiB that forward and backward need at their peak, in a process of their own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (mask, length, threads))


def _peak_memory(mask: str, length: int, threads: int) -> float:
    torch.set_num_threads(threads)
    build = ranges_builder(mask, length)
    query, key, value = inputs(length, grad=True)
    small = LiveRanges.sliding_window(256, 16)  # starts thread pools and matrix libraries
    live_range_attention(*(t[:, :, :256] for t in (query, key, value)), small).sum().backward()
    query.grad = key.grad = value.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (Linux)
    before = resident_peak()
    live_range_attention(query, key, value, build()).sum().backward()
    return (resident_peak() - before) / 1024


def resident_peak() -> int:
    """KiB of memory that this process has held at most since its peak was reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def matmul_rate() -> float:
    """Floating-point operations per second of a fp32 product of 2048."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / take_turns({"product": lambda: a @ a}, 5)["product"]


def table(results: list[Measured]) -> Table:
    output = Table(title="live-range attention on the CPU, fp32, 8/2 heads of 64", title_justify="left")
    for name in (
        "mask",
        "S",
        "forward s",
        "against dense",
        "ideal",
        "of ideal",
        "against Flex",
        "backward s",
        "against dense",
        "work ratio",
        "ranges + schedule",
        "peak MiB",
    ):
        output.add_column(name, justify="left" if name == "mask" else "right")
    for r in results:
        speedup = None if r.dense_forward is None else r.dense_forward / r.forward
        output.add_row(
            r.mask,
            f"{r.length:,}",
            f"{r.forward:.3f}",
            "-" if speedup is None else f"{speedup:.1f}x",
            f"{r.ideal:.1f}x",
            "-" if speedup is None else f"{speedup / r.ideal:.0%}",
            "-" if r.against_flex is None else f"{r.against_flex:.1f}x",
            f"{r.backward:.3f}",
            "-" if r.dense_backward is None else f"{r.dense_backward / r.backward:.1f}x",
            f"{r.work_ratio:.2f}",
            f"{r.ranges_and_schedule / (r.forward + r.backward):.1%}",
            f"{r.peak_memory:.0f}",
        )
    return output
