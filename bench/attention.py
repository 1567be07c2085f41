"""How fast is live-range attention? Dense SDPA, FlexAttention and this kernel on the same inputs in one run.

    python bench/attention.py

8 query and 2 KV heads of 64, batch 1, random queries, keys and values, fp32 or (`--dtype bfloat16`) bf16. Masks: a
dynamic mask (`DynamicMask(512)` with random parameters, its bias and the gradients of its parameters included), the
separator mask of real text (window 256, 3 first keys), a sliding window of 256. The ideal speed-up is the number of
causal pairs over the number of visible ones; the work ratio is pairs computed over pairs visible. Ranges are all that
comes before the attention: scores and their gradients, and ranges. An S x S mask is the one that the original dynamic
mask makes, fp32, for all query heads. Times are the shortest of a few rounds in which the contestants take turns.
Peak memory is that of a process of its own, above what it held with the inputs and the gradient of the output in
place.
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
from typing import Annotated
from typing import Any

import torch
import typer
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from rewriter.kernels.costs import live_range_work
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rewriter import DynamicMask
from rewriter import SiteTensors

QUERY_HEADS, KV_HEADS, HEAD_DIM, KEEP, WINDOW = 8, 2, 64, 512, 256
GROUP = QUERY_HEADS // KV_HEADS
MASKS = ("dynamic", "separator", "window")
OUT = Path(__file__).parent / "results" / "attention-cpu.json"


@dataclass
class Measured:
    """One mask at one length; times in seconds, memory in MiB, None where not measured."""

    mask: str
    length: int
    ideal: float
    work_ratio: float
    forward: float
    backward: float
    ranges: float
    peak_memory: float
    dense_forward: float | None = None
    dense_backward: float | None = None
    against_flex: float | None = None


def run(
    console: Console,
    out: Path,
    lengths: list[int],
    dense_up_to: int,
    flex_up_to: int,
    rounds: int,
    threads: int,
    dtype: torch.dtype,
) -> None:
    torch.set_num_threads(threads)
    results: list[Measured] = []
    for length in lengths:
        few = max(1, rounds * 16384 // length)
        results.extend(measure(length, length <= dense_up_to, length <= flex_up_to, few, threads, dtype))
        console.print(f"{length:,} done")
    console.print(table(results))
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "matmul_gflops": matmul_rate() / 1e9,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "results": [asdict(r) for r in results]}, indent=1) + "\n")
    console.print(f"written: {out}", markup=False)


def inputs(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    heads = (QUERY_HEADS, KV_HEADS, KV_HEADS)
    query, key, value = (torch.randn(1, h, length, HEAD_DIM, dtype=dtype, requires_grad=True) for h in heads)
    return query, key, value


@dataclass(frozen=True)
class Visible:
    """A mask as the attention is given it.

    Attributes:
        live: its ranges.
        bias: `[1, Hkv, S]`, with a gradient to the policy's parameters and the values; None for none.
        parameters: the policy's own.
    """

    live: LiveRanges
    bias: Tensor | None = None
    parameters: tuple[Tensor, ...] = ()


def mask_builder(mask: str, value: Tensor) -> Callable[[], Visible]:
    """What builds a mask from what a model would have: values, token ids, or nothing."""
    length = value.size(2)
    if mask == "dynamic":
        policy = DynamicMask(KEEP)
        named = policy.initial_parameters(0, KV_HEADS, HEAD_DIM)
        own = {name: parameter.requires_grad_() for name, parameter in named.items()}
        causal = LiveRanges.causal(length)
        site = SiteTensors(
            causal, torch.ones_like(causal.start), causal.start, causal.start[..., :1], None, value, value, value, own
        )

        def build() -> Visible:
            ranges, bias = policy.live_ranges(site)
            return Visible(causal & ranges, bias, tuple(own.values()))

        return build
    if mask == "separator":
        is_separator = separators_of_real_text(length)
        return lambda: Visible(LiveRanges.separators(is_separator, window=WINDOW, initial=3))
    return lambda: Visible(LiveRanges.sliding_window(length, WINDOW))


def separators_of_real_text(length: int) -> Tensor:
    """bool `[1, length]`: separators among the tokens of the standard library's source files."""
    from transformers import AutoTokenizer

    from rewriter import SeparatorMask
    from rewriter.demo.corpus import held_out_files
    from rewriter.demo.corpus import training_files
    from rewriter.demo.models import MODEL

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    policy = SeparatorMask.from_tokenizer(tokenizer)
    ids: list[int] = []
    for path in (*held_out_files(), *training_files()):
        ids.extend(tokenizer.backend_tokenizer.encode(path.read_text(encoding="utf-8", errors="ignore")).ids)
        if len(ids) >= length:
            break
    return torch.isin(torch.tensor([ids[:length]]), torch.tensor(policy.separators))


def measure(
    length: int, with_dense: bool, with_flex: bool, rounds: int, threads: int, dtype: torch.dtype
) -> list[Measured]:
    query, key, value = inputs(length, dtype)
    grad = torch.randn(1, QUERY_HEADS, length, HEAD_DIM, dtype=dtype)
    masks = MASKS if with_dense else tuple(mask for mask in MASKS if mask != "separator")
    builders = {mask: mask_builder(mask, value) for mask in masks}
    visible = {mask: build() for mask, build in builders.items()}
    # The attention's own part: its bias is an input, and what comes before it is timed apart.
    biases = {m: v.bias.detach().requires_grad_() for m, v in visible.items() if v.bias is not None}

    def dense() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def ours(mask: str) -> Callable[[], Tensor]:
        return lambda: live_range_attention(query, key, value, visible[mask].live, bias=biases.get(mask))

    calls: dict[str, Callable[[], Any]] = {mask: ours(mask) for mask in masks}
    if with_dense:
        calls["dense"] = dense
    with torch.no_grad():
        forward_times = take_turns(calls, rounds)
        against_flex = {}
        if with_flex:
            # A contest of its own: the threads of its generated code go on spinning and slow down whoever comes next.
            for mask in masks:
                contest = {"flex": flex(query, key, value, visible[mask].live, biases.get(mask)), "ours": ours(mask)}
                times = take_turns(contest, rounds)
                against_flex[mask] = times["flex"] / times["ours"]
    outputs = {name: call() for name, call in calls.items()}
    backward_times = take_turns(
        {
            name: lambda output=output, own=own: torch.autograd.grad(output, own, grad, retain_graph=True)
            for name, output in outputs.items()
            for own in [(query, key, value, *([biases[name]] if name in biases else []))]
        },
        max(1, rounds // 2),
    )
    results = []
    for mask in masks:
        live = visible[mask].live
        pairs = live.live_pairs()
        rows = live.shape[0] * live.shape[1]
        results.append(
            Measured(
                mask=mask,
                length=length,
                ideal=rows * length * (length + 1) / 2 / pairs,
                work_ratio=live_range_work(live, length, GROUP * rows, rows, 1).pairs / (GROUP * pairs),
                forward=forward_times[mask],
                backward=backward_times[mask],
                ranges=take_turns({mask: lambda m=mask: before_attention(builders[m], value)}, rounds)[mask],
                peak_memory=peak_memory(mask, length, threads, dtype),
                dense_forward=forward_times.get("dense"),
                dense_backward=backward_times.get("dense"),
                against_flex=against_flex.get(mask),
            )
        )
    return results


def before_attention(build: Callable[[], Visible], value: Tensor) -> None:
    """Scores, ranges, and the gradients of the scores."""
    visible = build()
    if visible.bias is not None:
        torch.autograd.grad(visible.bias, (value, *visible.parameters), torch.ones_like(visible.bias))


def flex(query: Tensor, key: Tensor, value: Tensor, live: LiveRanges, bias: Tensor | None) -> Callable[[], Tensor]:
    """FlexAttention with the same mask and bias, the block mask built before. Forward only: it has no backward on CPU."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention

    start, end = (t.expand(live.shape)[0] for t in (live.start, live.end))
    shared = start.size(0) == 1

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = 0 if shared else h // GROUP
        return (start[row, j] <= i) & (i < end[row, j])

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if bias is None else score + bias.detach()[0, h // GROUP, j]

    block_mask = create_block_mask(
        visible, None, None if shared else QUERY_HEADS, query.size(2), key.size(2), device="cpu"
    )
    torch._dynamo.reset()  # a second length would compile with a dynamic one, which its CPU code generator cannot (2.13)
    compiled = torch.compile(flex_attention, dynamic=False)
    detached = [t.detach() for t in (query, key, value)]
    return lambda: compiled(
        *detached, score_mod=None if bias is None else biased, block_mask=block_mask, enable_gqa=True
    )


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


def peak_memory(mask: str, length: int, threads: int, dtype: torch.dtype) -> float:
    """MiB that forward and backward need at their peak, in a process of their own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (mask, length, threads, dtype))


def _peak_memory(mask: str, length: int, threads: int, dtype: torch.dtype) -> float:
    torch.set_num_threads(threads)
    query, key, value = inputs(length, dtype)
    build = mask_builder(mask, value)
    small = LiveRanges.sliding_window(256, 16)  # starts thread pools and matrix libraries
    live_range_attention(*(t[:, :, :256] for t in (query, key, value)), small).sum().backward()
    query.grad = key.grad = value.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here (Linux)
    before = resident_peak()
    visible = build()
    live_range_attention(query, key, value, visible.live, bias=visible.bias).sum().backward()
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
        "ranges",
        "peak MiB",
        "S x S mask MiB",
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
            f"{r.ranges / (r.forward + r.backward):.1%}",
            f"{r.peak_memory:.0f}",
            f"{4 * QUERY_HEADS * r.length**2 / 2**20:,.0f}" if r.mask == "dynamic" else "-",
        )
    return output


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = OUT,
    lengths: Annotated[str, typer.Option(help="Lengths, separated by commas.")] = "4096,8192,16384,32768,65536,131072",
    dense_up_to: Annotated[int, typer.Option(help="Longest length for what is quadratic.")] = 32768,
    flex_up_to: Annotated[int, typer.Option(help="Longest length for FlexAttention's block masks.")] = 16384,
    rounds: Annotated[int, typer.Option(help="Rounds of timing.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    dtype: Annotated[str, typer.Option(help="Of query, key and value: float32 or bfloat16.")] = "float32",
) -> None:
    sizes = [int(part) for part in lengths.split(",")]
    run(Console(width=190), out, sizes, dense_up_to, flex_up_to, rounds, threads, getattr(torch, dtype))


if __name__ == "__main__":
    typer.run(main)
