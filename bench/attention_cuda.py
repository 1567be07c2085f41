"""The Triton kernels on a GPU: bf16, 32/8 heads of 128, dynamic mask, separator mask of real text, window.

Same run, same inputs, in this order: the machine's own ceilings (a large matrix product, a large copy); then for each mask
and length SDPA's flash kernel on the causal mask, SDPA with the dense mask, FlexAttention with the same mask,
flash-sparse-attn where it is installed and can express the mask (a window), and this. Every contestant's output is compared
with this kernel's before it is timed. The operator is compiled, as it is in an optimized model. Times are medians of
replays of a CUDA graph, which leave out what the CPU needs to launch kernels; "eager" is the operator called as it is, with
that. Peak memory is torch's, above what the inputs hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields
from pathlib import Path
from typing import Any

import attention_cpu
import torch
import triton
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.gpu.arguments import Arguments
from rewriter.kernels.gpu.schedule import BACKWARD_CAPACITY
from rewriter.kernels.gpu.schedule import FORWARD_CAPACITY
from rewriter.kernels.gpu.schedule import Schedule
from rewriter.kernels.gpu.schedule import backward_pairs
from rewriter.kernels.gpu.schedule import build
from rewriter.kernels.gpu.schedule import forward_keys
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile

QUERY_HEADS, KV_HEADS, HEAD_DIM, KEEP, WINDOW = 32, 8, 128, 1024, 256
GROUP = QUERY_HEADS // KV_HEADS
MASKS = ("dynamic", "separator", "window")
DEVICE = "cuda"


@dataclass
class Measured:
    """One mask at one length. Times in milliseconds, rates of arithmetic in TFLOP/s on visible pairs, memory in MiB.

    `tile_cost` is the time of the attention kernel alone for each pair that it computes, over that of the causal flash kernel
    for each pair that is visible to it.
    """

    mask: str
    length: int
    ideal: float
    work_ratio_forward: float
    work_ratio_backward: float
    ranges: float
    schedule: float
    forward: float
    backward: float
    forward_tflops: float
    backward_tflops: float
    kernels: dict[str, float]
    tile_cost: float
    eager_forward: float
    eager_backward: float
    decode: float
    decode_bandwidth: float
    peak_memory: float
    others: dict[str, float] = field(default_factory=dict)
    """Milliseconds of the others: "flash forward", "flash backward", "dense mask forward", "flex forward", ..."""


def run(console: Console, out: Path, lengths: list[int], dense_up_to: int, mask_up_to: int, flex_up_to: int) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("bench/attention.py --device cuda needs a GPU; torch sees none here")
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "matmul_tflops": matmul_rate() / 1e12,
        "copy_gb_per_s": copy_rate() / 1e9,
    }
    console.print(machine)
    torch._dynamo.config.recompile_limit = 64  # FlexAttention is compiled for each length and mask
    results: list[Measured] = []
    for length in lengths:
        for mask in MASKS:
            results.append(
                measure(
                    mask,
                    length,
                    length <= dense_up_to,
                    length <= mask_up_to,
                    length <= flex_up_to,
                    machine["copy_gb_per_s"] * 1e9,
                )
            )
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"machine": machine, "results": [asdict(r) for r in results]}, indent=1) + "\n")
        console.print(table(results[-len(MASKS) :]))
    console.print(table(results))
    console.print(f"written: {out}", markup=False)


def milliseconds(call: Callable[[], Any]) -> float:
    return triton.testing.do_bench_cudagraph(call, return_mode="median")


def milliseconds_with_launches(call: Callable[[], Any]) -> float:
    return triton.testing.do_bench(call, return_mode="median")


def kernel_milliseconds(call: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Milliseconds of each kernel that a call launches, by name."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return {event.key: event.device_time_total / repeats / 1e3 for event in profiled.key_averages()}


def matmul_rate() -> float:
    """Floating-point operations per second of a bf16 product of 8192."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * 8192**3 / (milliseconds(lambda: a @ b) / 1e3)


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    a = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() / (milliseconds(lambda: b.copy_(a)) / 1e3)


def ranges_builder(mask: str, length: int) -> Callable[[], LiveRanges]:
    if mask == "dynamic":
        score = torch.randn(1, KV_HEADS, length, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        return lambda: running_topk_ranges(score, KEEP)
    if mask == "separator":
        is_separator = attention_cpu.separators_of_real_text(length).to(DEVICE)
        return lambda: LiveRanges.separators(is_separator, window=WINDOW, initial=3)
    return lambda: LiveRanges.sliding_window(length, WINDOW, device=DEVICE)


def measure(mask: str, length: int, with_dense: bool, with_mask: bool, with_flex: bool, copy_rate: float) -> Measured:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS)
    )
    grad = torch.randn(1, QUERY_HEADS, length, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    build_ranges = ranges_builder(mask, length)
    live = build_ranges()
    rows = live.shape[0] * live.shape[1]
    pairs = live.live_pairs()
    pairs_of_all_heads = pairs * QUERY_HEADS // rows

    def eager() -> Tensor:
        return live_range_attention(query, key, value, live)

    compiled_attention = torch.compile(attention, dynamic=False)

    def ours() -> Tensor:
        return compiled_attention(query, key, value, live.start, live.end)

    forward = forward_time(ours)
    backward = backward_time(ours, (query, key, value), grad)
    with torch.no_grad():
        kernels = kernel_milliseconds(eager)
        eager_forward = milliseconds_with_launches(eager)
    output = eager()
    eager_backward = milliseconds_with_launches(
        lambda: torch.autograd.grad(output, (query, key, value), grad, retain_graph=True)
    )
    kernels |= kernel_milliseconds(lambda: torch.autograd.grad(output, (query, key, value), grad, retain_graph=True))
    kernels = {name: time for name, time in kernels.items() if name.startswith("_")}
    forward_ratio, backward_ratio, schedule = work_ratios(query, key, value, live, pairs)
    keep = min(length, int(live.live_counts()[..., -1].max()))
    decode = decode_time(query, keep)
    flops = 4 * HEAD_DIM * pairs_of_all_heads
    measured = Measured(
        mask=mask,
        length=length,
        ideal=rows * length * (length + 1) / 2 / pairs,
        work_ratio_forward=forward_ratio,
        work_ratio_backward=backward_ratio,
        ranges=milliseconds(build_ranges),
        schedule=schedule,
        forward=forward,
        backward=backward,
        forward_tflops=flops / forward / 1e9,
        backward_tflops=2.5 * flops / backward / 1e9,
        kernels=kernels,
        tile_cost=math.nan,
        eager_forward=eager_forward,
        eager_backward=eager_backward,
        decode=decode,
        decode_bandwidth=2 * 2 * KV_HEADS * keep * HEAD_DIM / (decode / 1e3) / copy_rate,
        peak_memory=peak_memory(ours, (query, key, value), grad),
    )
    for name, contestant in others(mask, live, query, key, value, with_dense, with_mask, with_flex).items():
        with torch.no_grad():
            if not name.startswith("flash causal"):
                torch.testing.assert_close(
                    contestant(), eager(), atol=2e-2, rtol=2e-2, msg=lambda m, n=name: f"{n}: {m}"
                )
        measured.others[f"{name} forward"] = forward_time(contestant)
        try:
            measured.others[f"{name} backward"] = backward_time(contestant, (query, key, value), grad)
        except NotImplementedError as error:
            print(f"{name} has no backward here: {error}")
    if "flash causal forward" in measured.others:
        computed = kernels["_forward"] / (forward_ratio * pairs_of_all_heads)
        visible = measured.others["flash causal forward"] / (QUERY_HEADS * length * (length + 1) / 2)
        measured.tile_cost = computed / visible
    return measured


def attention(query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return live_range_attention(query, key, value, LiveRanges(start, end))


def forward_time(call: Callable[[], Tensor]) -> float:
    with torch.no_grad():
        return milliseconds(call)


def backward_time(call: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> float:
    """Without the forward, which is captured too: a backward runs on the stream of its forward."""
    return milliseconds(lambda: torch.autograd.grad(call(), leaves, grad)) - milliseconds(call)


def work_ratios(query: Tensor, key: Tensor, value: Tensor, live: LiveRanges, pairs: int) -> tuple[float, float, float]:
    """Pairs computed over pairs visible, forward and backward; and the milliseconds of both schedules."""
    arguments = Arguments.make(
        query, key, value, live.start, live.end, None, None, None, None, None, None, None, sort=True
    )
    configs = [arguments.config(name) for name in ("forward", "backward_query", "backward_key")]

    def schedule(index: int, capacity: int) -> Any:
        tile_rows = arguments.tile_shape(configs[index].block_m)[0]
        return build(live.start, live.end, arguments.query_index, tile_rows, configs[index].block_n, capacity)

    forward, backward = schedule(0, FORWARD_CAPACITY), schedule(1, BACKWARD_CAPACITY)
    schedules = (forward, backward)
    forward, backward = (Schedule(**{f.name: to_cpu(getattr(s, f.name)) for f in fields(s)}) for s in schedules)
    forward_pairs = int(forward_keys(forward, configs[0].block_n).sum()) * forward.tile_rows
    query_pairs = int(forward_keys(backward, configs[1].block_n).sum()) * backward.tile_rows
    # The query's gradient takes three products, those of key and value four.
    both = (3 * query_pairs + 4 * backward_pairs(backward, configs[2].block_n)) / 7
    seconds = milliseconds(lambda: schedule(0, FORWARD_CAPACITY)) + milliseconds(lambda: schedule(1, BACKWARD_CAPACITY))
    return forward_pairs / pairs, both / pairs, seconds


def to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def decode_time(query: Tensor, keep: int) -> float:
    """One query row against a cache of the kept keys."""
    last = query[:, :, -1:].detach()
    key, value = (torch.randn(1, KV_HEADS, keep, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    start = torch.full((1, 1, keep), -1, dtype=torch.int32, device=DEVICE)
    live = LiveRanges(start, torch.full_like(start, FOREVER))
    return forward_time(lambda: live_range_attention(last, key, value, live))


def peak_memory(call: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> float:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(call(), leaves, grad)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def others(
    mask: str,
    live: LiveRanges,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    with_dense: bool,
    with_mask: bool,
    with_flex: bool,
) -> dict[str, Callable[[], Tensor]]:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    contestants: dict[str, Callable[[], Tensor]] = {}
    if with_dense:
        contestants["flash causal"] = lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True)
    if with_mask:
        index = torch.arange(query.size(2), device=DEVICE, dtype=torch.int32)
        visible = live.visible(index)
        visible = visible if visible.size(1) == 1 else visible.repeat_interleave(GROUP, dim=1)
        contestants["dense mask"] = lambda: sdpa(query, key, value, attn_mask=visible, enable_gqa=True)
    if with_flex:
        contestants["flex"] = flex(query, key, value, live)
    if mask == "window":
        try:
            from flash_sparse_attn import flash_dense_attn_func
        except ImportError:
            return contestants
        window = torch.tensor([[0, WINDOW - 1, 0, 0]] * KV_HEADS, dtype=torch.int32, device=DEVICE)
        contestants["flash-sparse-attn"] = lambda: flash_dense_attn_func(
            *(t.transpose(1, 2) for t in (query, key, value)), is_causal=True, window_sizes=window
        ).transpose(1, 2)
    return contestants


def flex(query: Tensor, key: Tensor, value: Tensor, live: LiveRanges) -> Callable[[], Tensor]:
    """FlexAttention with the same mask; building its block mask is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention

    start, end = (t.expand(live.shape)[0].contiguous() for t in (live.start, live.end))
    shared = start.size(0) == 1

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = 0 if shared else h // GROUP
        return (start[row, j] <= i) & (i < end[row, j])

    heads = None if shared else QUERY_HEADS
    block_mask = create_block_mask(visible, None, heads, query.size(2), key.size(2), device=DEVICE, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=block_mask, enable_gqa=True)


def table(results: list[Measured]) -> Table:
    output = Table(title="live-range attention on a GPU, bf16, 32/8 heads of 128", title_justify="left")
    names = ["mask", "S", "forward ms", "against flash", "ideal", "against Flex", "TFLOP/s", "tile cost", "work ratio"]
    names += ["backward ms", "against flash", "against Flex", "TFLOP/s", "work ratio"]
    names += ["eager: forward", "backward", "ranges + schedule", "decode ms", "of copy rate", "peak MiB"]
    for name in names:
        output.add_column(name, justify="left" if name == "mask" else "right")

    def against(r: Measured, what: str, own: float) -> str:
        return f"{r.others[what] / own:.1f}x" if what in r.others else "-"

    for r in results:
        share = (r.ranges + r.schedule) / (r.forward + r.backward)
        output.add_row(
            r.mask,
            f"{r.length:,}",
            f"{r.forward:.2f}",
            against(r, "flash causal forward", r.forward),
            f"{r.ideal:.1f}x",
            against(r, "flex forward", r.forward),
            f"{r.forward_tflops:.0f}",
            "-" if math.isnan(r.tile_cost) else f"{r.tile_cost:.2f}",
            f"{r.work_ratio_forward:.2f}",
            f"{r.backward:.2f}",
            against(r, "flash causal backward", r.backward),
            against(r, "flex backward", r.backward),
            f"{r.backward_tflops:.0f}",
            f"{r.work_ratio_backward:.2f}",
            f"{r.eager_forward:.2f}",
            f"{r.eager_backward:.2f}",
            "-" if math.isnan(share) else f"{share:.1%}",
            f"{r.decode:.3f}",
            f"{r.decode_bandwidth:.0%}",
            f"{r.peak_memory:.0f}",
        )
    return output
