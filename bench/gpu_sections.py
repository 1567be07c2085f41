"""What `gpu_session.py` measures: each section is a list of rows, each row a call that returns figures.

All inputs are one row of 32 query and 8 KV heads of 128 in bf16, a Llama's, unless a row says otherwise. The masks are a
dynamic mask that keeps 1,024 keys (random scores, with its bias), the separator mask of real text (window 256, 3 first
keys) and a sliding window of 256.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attention import separators_of_real_text
from gpu_machine import KernelTimes
from gpu_machine import Machine
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import key_scores
from rewriter.kernels import live_range_attention
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.arguments import AttentionArguments
from rewriter.kernels.gpu.decode import MAX_QUERIES
from rewriter.kernels.gpu.kernel_inputs import KernelInputs
from rewriter.kernels.gpu.schedule import BACKWARD_CAPACITY
from rewriter.kernels.gpu.schedule import FORWARD_CAPACITY
from rewriter.kernels.gpu.schedule import build
from torch import Tensor

from rewriter.testing import Case
from rewriter.testing import assert_equivalent
from rewriter.testing.cases import ADVERSARIAL_RANGES
from rewriter.testing.cases import RANGE_KINDS

Figures = dict[str, Any]
"""What a row measured; times in milliseconds, rates in TFLOP/s or TB/s, memory in MiB."""

MASKS = ("dynamic", "separator", "window")
WINDOW, INITIAL = 256, 3


@dataclass(frozen=True)
class Sizes:
    """Of a session, or of its rehearsal."""

    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    keep: int = 1024
    lengths: tuple[int, ...] = (32768, 16384, 4096, 131072)
    """In the order in which they are measured: the one that the targets speak of first."""
    matmul: int = 8192
    copied: int = 2**31
    masks: tuple[str, ...] = MASKS
    decode_rows: tuple[int, ...] = (1, 32)


TINY = Sizes(
    query_heads=2,
    kv_heads=1,
    head_dim=16,
    keep=8,
    lengths=(18,),
    matmul=64,
    copied=2**16,
    masks=("dynamic",),
    decode_rows=(2,),
)


@dataclass(frozen=True)
class Row:
    """One line of the results: its name within the section, and what measures it."""

    name: str
    measure: Callable[[], Figures]


@dataclass(frozen=True)
class Inputs:
    """An attention's tensors and its mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    live: LiveRanges
    bias: Tensor | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.query, self.key, self.value)

    @property
    def pairs(self) -> int:
        """Visible (query row, key) pairs of all query heads."""
        rows = self.live.shape[0] * self.live.shape[1]
        return self.live.live_pairs() * self.query.size(1) // rows

    def attend(self) -> Tensor:
        output = live_range_attention(self.query, self.key, self.value, self.live, bias=self.bias)
        assert isinstance(output, Tensor)
        return output

    def attend_as_a_layer(self) -> Callable[[], Tensor]:
        """A call as a model's layers make it: the schedule is there already."""
        sizes = (self.query.size(2), self.query.size(1) // self.key.size(1), self.query.size(3))
        ranges = (self.live.start, self.live.end)
        schedule = torch.ops.rewriter.schedule(*ranges, None, *sizes, self.query.element_size(), True)
        arguments = (*self.leaves, *ranges, None, None, self.bias, None, None, None, None, schedule)
        return lambda: torch.ops.rewriter.live_range_attention(*arguments)[0]

    def gradients(self, call: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), self.leaves, self.grad)


def make_inputs(machine: Machine, sizes: Sizes, mask: str, length: int) -> Inputs:
    torch.manual_seed(0)
    query, key, value, grad = (
        torch.randn(1, heads, length, sizes.head_dim, dtype=torch.bfloat16, device=machine.device)
        for heads in (sizes.query_heads, sizes.kv_heads, sizes.kv_heads, sizes.query_heads)
    )
    live, bias = make_ranges(machine, sizes, mask, length)
    return Inputs(*(t.requires_grad_() for t in (query, key, value)), grad, live(), bias)  # type: ignore[arg-type]


def make_ranges(
    machine: Machine, sizes: Sizes, mask: str, length: int
) -> tuple[Callable[[], LiveRanges], Tensor | None]:
    """What computes a mask's ranges, and its bias."""
    if mask == "dynamic":
        generator = torch.Generator().manual_seed(1)
        score = torch.randn(1, sizes.kv_heads, length, generator=generator).to(machine.device)
        return lambda: running_topk_ranges(score, sizes.keep), score
    if mask == "separator":
        is_separator = separators_of_real_text(length).to(machine.device)
        return lambda: LiveRanges.separators(is_separator, window=WINDOW, initial=INITIAL), None
    return lambda: LiveRanges.sliding_window(length, WINDOW, device=torch.device(machine.device)), None


def tflops(pairs: int, head_dim: int, milliseconds: float, products: int = 2) -> float:
    """Of visible pairs: two products forward, five backward."""
    return 2 * products * head_dim * pairs / milliseconds / 1e9


# machine ---------------------------------------------------------------------------------------------------------------


def machine_rows(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """The ceilings, and the dense causal kernels that everything is compared with."""
    yield Row("matrix product", lambda: matmul(machine, sizes))
    yield Row("copy", lambda: copy(machine, sizes))
    for length in sizes.lengths:
        for variant in ("default", "flash", "cudnn") if length == sizes.lengths[0] else ("default",):
            yield Row(f"causal sdpa {variant} {length}", partial(causal_sdpa, machine, sizes, variant, length))


def matmul(machine: Machine, sizes: Sizes) -> Figures:
    a, b = (torch.randn(sizes.matmul, sizes.matmul, dtype=torch.bfloat16, device=machine.device) for _ in range(2))
    return {"tflops": 2 * sizes.matmul**3 / machine.graph_ms(lambda: a @ b) / 1e9}


def copy(machine: Machine, sizes: Sizes) -> Figures:
    """Bytes read and bytes written."""
    a = torch.empty(sizes.copied, dtype=torch.uint8, device=machine.device)
    b = torch.empty_like(a)
    return {"tb_per_s": 2 * a.numel() / machine.graph_ms(lambda: b.copy_(a)) / 1e9}


def causal_sdpa(machine: Machine, sizes: Sizes, variant: str, length: int) -> Figures:
    inputs = make_inputs(machine, sizes, "window", length)

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*inputs.leaves, is_causal=True, enable_gqa=True)

    with machine.sdpa(variant):
        with torch.no_grad():
            forward = machine.kernels(attend)
        output = attend()
        backward = machine.kernels(
            lambda: torch.autograd.grad(output, inputs.leaves, inputs.grad, retain_graph=True), repeats=3
        )
    pairs = sizes.query_heads * length * (length + 1) // 2
    return {
        "forward_ms": forward.total_ms,
        "backward_ms": backward.total_ms,
        "forward_tflops": tflops(pairs, sizes.head_dim, max(forward.total_ms, 1e-9)),
        "backward_tflops": tflops(pairs, sizes.head_dim, max(backward.total_ms, 1e-9), 5),
        "kernels": [*forward.longest[:1], *backward.longest[:1]],
    }


# correct ---------------------------------------------------------------------------------------------------------------


def classes_of_cases() -> list[Case]:
    """One case for each kind of call that Triton compiles anew: dtypes, entries of the launch table, options."""
    base = Case(kv_heads=2, group=2)
    entries = [
        replace(base, dtype=dtype, head_dim=dim, value_dim=dim, bias="head" if dtype != "float16" else None)
        for dtype in ("bfloat16", "float16", "float32")
        for dim in (64, 128, 256)
    ]
    options = {"sinks": True, "alibi": True, "softcap": 20.0, "query_index": "row", "key_index": "row"}
    return [
        *entries,
        replace(base, dtype="bfloat16", head_dim=128, value_dim=128, strided=True),
        replace(base, dtype="float16", head_dim=64, value_dim=64, bias="all", **options),
        replace(base, dtype="float32", head_dim=40, value_dim=24, bias="row", **options),
        replace(base, dtype="bfloat16", head_dim=96, value_dim=128, group=1, kv_heads=3, batch=2),
        replace(base, dtype="bfloat16", head_dim=128, value_dim=128, group=130, kv_heads=1),
    ]


def cases_of_class(kind: Case, rehearsed: bool) -> list[Case]:
    """Fifteen: every family of ranges at the borders of tiles, adversarial ranges, several tiles, a few query rows."""
    if rehearsed:
        return [replace(kind, head_dim=16, value_dim=16, group=min(kind.group, 2), keys=20, queries=19, ranges="topk")]
    borders = (63, 64, 65, 127, 128, 129, 191, 192, 255, 257)
    cases = [
        replace(kind, seed=i, keys=size, queries=max(size - i % 3, 1), ranges=ranges)
        for i, (size, ranges) in enumerate(zip(borders, RANGE_KINDS, strict=True))
    ]
    adversarial = ADVERSARIAL_RANGES["ends at tile borders"]
    cases.append(replace(kind, keys=len(adversarial), queries=len(adversarial) + 20, ranges=adversarial))
    many = 300 if kind.group > 4 else 700
    cases += [replace(kind, seed=20, keys=many, queries=many, ranges=ranges) for ranges in ("topk", "separators")]
    return cases + [replace(kind, seed=30, keys=333, queries=q, ranges="scattered") for q in (1, MAX_QUERIES)]


def correct_rows(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """Values and gradients against the dense form in fp64, by the rule of the property suite."""
    for kind in classes_of_cases()[:: 12 if machine.rehearsed else 1]:
        name = f"{kind.dtype} {kind.head_dim}/{kind.value_dim} group {kind.group}"
        yield Row(f"{name}{' with options' if kind.alibi else ''}", partial(check_class, machine, kind))
    yield Row("key scores", lambda: check_key_scores(machine))
    yield Row("bitwise equal runs", lambda: check_repeats(machine, sizes))


def check_class(machine: Machine, kind: Case) -> Figures:
    cases = cases_of_class(kind, machine.rehearsed)
    for case in cases:
        assert_equivalent(live_range_attention, case, device=machine.device)
    return {"cases": len(cases)}


def check_key_scores(machine: Machine) -> Figures:
    """Columns of the weights of the dense form, within the rounding of bf16 operands."""
    from rewriter.kernels import reference

    length = 24 if machine.rehearsed else 500
    case = Case(
        dtype="bfloat16", kv_heads=2, group=2, queries=length, keys=length, head_dim=64, value_dim=64, ranges="window"
    )
    tensors, live = case.tensors(), case.live()
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    _, lse = reference.live_range_attention(query, key, value, live, return_lse=True)
    exact = reference.key_scores(query, key, lse, live)
    here = machine.device
    moved = LiveRanges(live.start.to(here), live.end.to(here))
    actual = key_scores(query.to(here, torch.bfloat16), key.to(here, torch.bfloat16), lse.to(here).float(), moved)
    error = float((actual.cpu() - exact).norm() / exact.norm())
    assert error < 1e-4, (
        f"key scores are off by {error:.1e} of their norm; operands are exact in bf16, so 1e-5 is expected"
    )
    return {"cases": 1, "relative_error": error}


def check_repeats(machine: Machine, sizes: Sizes) -> Figures:
    inputs = make_inputs(machine, sizes, "dynamic", min(sizes.lengths[0], 8192))
    first, second = ([inputs.attend(), *inputs.gradients(inputs.attend)] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b), "two runs on the same inputs differ"
        assert bool(a.isfinite().all()), "a result is not finite"
    return {"cases": 1}


# attention -------------------------------------------------------------------------------------------------------------


def attention_rows(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """Kernels alone, the whole operator in eager mode and in a CUDA graph, ranges, schedules, decoding."""
    for length in sizes.lengths:
        for mask in sizes.masks:
            yield Row(f"{mask} {length}", partial(attention, machine, sizes, mask, length))
    for batch in sizes.decode_rows:
        yield Row(f"decode {batch} rows", partial(decode, machine, sizes, batch))


def attention(machine: Machine, sizes: Sizes, mask: str, length: int) -> Figures:
    inputs = make_inputs(machine, sizes, mask, length)
    compute_ranges, _ = make_ranges(machine, sizes, mask, length)
    with torch.no_grad():
        forward = machine.kernels(inputs.attend)
        eager_forward = machine.wall(inputs.attend)
        graph_forward = machine.graph_ms(inputs.attend)
    output = inputs.attend()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs.leaves, inputs.grad, retain_graph=True)

    backward = machine.kernels(gradients, repeats=3)
    eager_backward = machine.wall(gradients)
    # A backward runs on the stream of its forward: in a graph both are captured.
    graph_both = machine.graph_ms(lambda: inputs.gradients(inputs.attend))
    as_a_layer = inputs.attend_as_a_layer()
    with torch.no_grad():
        layer_forward, layer_eager = machine.graph_ms(as_a_layer), machine.wall(as_a_layer)
    layer_both = machine.graph_ms(lambda: inputs.gradients(as_a_layer))
    ranges = machine.kernels(compute_ranges)
    pairs = inputs.pairs
    attention_kernels = ("_forward", "_query_gradient", "_list_gradients", "_key_gradients", "_decode", "_merge")

    def of_attention(times: KernelTimes) -> float:
        return sum(ms for name, ms in times.own.items() if name in attention_kernels)

    return {
        "ideal": sizes.query_heads * length * (length + 1) / 2 / pairs,
        "forward_kernel_ms": of_attention(forward),
        "backward_kernels_ms": of_attention(backward),
        "forward_tflops": tflops(pairs, sizes.head_dim, of_attention(forward)),
        "backward_tflops": tflops(pairs, sizes.head_dim, of_attention(backward), 5),
        "kernels": {**forward.own, **backward.own},
        "forward_schedule_ms": forward.total_ms - of_attention(forward),
        "backward_schedule_ms": backward.total_ms - of_attention(backward),
        "forward_launches": forward.other_launches,
        "backward_launches": backward.other_launches,
        "eager_forward": eager_forward,
        "eager_backward": eager_backward,
        "graph_forward_ms": graph_forward,
        "graph_backward_ms": graph_both - graph_forward,
        "layer_graph_forward_ms": layer_forward,
        "layer_graph_backward_ms": layer_both - layer_forward,
        "layer_eager_forward": layer_eager,
        "ranges_ms": ranges.total_ms,
        "ranges_launches": ranges.other_launches,
        "schedules": schedules(machine, inputs),
        "peak_mib": machine.peak_mib(lambda: inputs.gradients(inputs.attend)),
    }


def schedules(machine: Machine, inputs: Inputs) -> Figures:
    """Both schedules by themselves, with what the CPU needs to launch them."""
    arguments = KernelInputs.make(AttentionArguments(*inputs.leaves, inputs.live.start, inputs.live.end), sort=True)
    figures = {}
    for name, kernel, capacity in (
        ("forward", "forward", FORWARD_CAPACITY),
        ("backward", "backward_query", BACKWARD_CAPACITY),
    ):
        config = arguments.config(kernel)
        tile_rows = arguments.tile_shape(config.block_m)[0]
        call = partial(
            build, arguments.start, arguments.end, arguments.query_index, tile_rows, config.block_n, capacity
        )
        figures[name] = {**machine.wall(call), "graph_ms": machine.graph_ms(call)}
    return figures


def decode(machine: Machine, sizes: Sizes, batch: int) -> Figures:
    """One query row a sequence, against caches of the kept keys; bandwidth of keys and values alone."""
    query, key, value = (
        torch.randn(batch, heads, length, sizes.head_dim, dtype=torch.bfloat16, device=machine.device)
        for heads, length in ((sizes.query_heads, 1), (sizes.kv_heads, sizes.keep), (sizes.kv_heads, sizes.keep))
    )
    start = torch.full((1, 1, sizes.keep), -1, dtype=torch.int32, device=machine.device)
    live = LiveRanges(start, torch.full_like(start, FOREVER))
    with torch.no_grad():
        ms = machine.graph_ms(lambda: live_range_attention(query, key, value, live))
        eager = machine.wall(lambda: live_range_attention(query, key, value, live))
    return {"ms": ms, "tb_per_s": 2 * key.numel() * key.element_size() / ms / 1e9, "eager": eager}


# compiled --------------------------------------------------------------------------------------------------------------


def compiled_rows(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """The whole operator as Inductor compiles it, as it is in an optimized model."""
    for mask in sizes.masks:
        yield Row(f"{mask} {sizes.lengths[0]}", partial(compiled, machine, sizes, mask, sizes.lengths[0]))


def compiled(machine: Machine, sizes: Sizes, mask: str, length: int) -> Figures:
    inputs = make_inputs(machine, sizes, mask, length)

    def attend(query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, bias: Tensor | None) -> Tensor:
        output = live_range_attention(query, key, value, LiveRanges(start, end), bias=bias)
        assert isinstance(output, Tensor)
        return output

    function = machine.compile(attend)

    def call() -> Tensor:
        return function(*inputs.leaves, inputs.live.start, inputs.live.end, inputs.bias)

    check_equal(call(), inputs.attend())
    with torch.no_grad():
        forward, graph_forward = machine.wall(call), machine.graph_ms(call)
        times = machine.kernels(call)
    both = machine.wall(lambda: inputs.gradients(call))
    graph_both = machine.graph_ms(lambda: inputs.gradients(call))
    return {
        "forward": forward,
        "graph_forward_ms": graph_forward,
        "graph_backward_ms": graph_both - graph_forward,
        "forward_and_backward": both,
        "forward_launches": times.other_launches,
    }


def check_equal(actual: Tensor, expected: Tensor) -> None:
    """Two results in bf16, of which each was rounded once."""
    actual, expected = actual.detach().float(), expected.detach().float()
    error = float((actual - expected).norm() / expected.norm())
    assert error < 1e-2, f"the results differ by {error:.1e} of their norm"


# peers -----------------------------------------------------------------------------------------------------------------


def peers_rows(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """FlexAttention and flash-sparse-attn with the same masks."""
    length = sizes.lengths[min(1, len(sizes.lengths) - 1)]
    for mask in sizes.masks:
        yield Row(f"flex {mask} {length}", partial(against, machine, sizes, mask, length, flex))
    yield Row(f"flash-sparse-attn window {length}", partial(against, machine, sizes, "window", length, flash_sparse))
    yield Row(f"dense mask dynamic {length}", partial(against, machine, sizes, "dynamic", length, dense_mask))


def against(
    machine: Machine, sizes: Sizes, mask: str, length: int, peer: Callable[..., Callable[[], Tensor]]
) -> Figures:
    inputs = replace(make_inputs(machine, sizes, mask, length), bias=None)
    call = peer(machine, inputs)
    with torch.no_grad():
        check_equal(call(), inputs.attend())
        figures: Figures = {"forward_ms": machine.graph_ms(call)}
    try:
        output = call()
        backward = machine.kernels(
            lambda: torch.autograd.grad(output, inputs.leaves, inputs.grad, retain_graph=True), repeats=3
        )
        figures["backward_ms"] = backward.total_ms
    except (NotImplementedError, RuntimeError) as error:
        figures["no_backward"] = f"{type(error).__name__}: {str(error)[:200]}"
    return figures


def flex(machine: Machine, inputs: Inputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention

    start, end = (t.expand(inputs.live.shape)[0].contiguous() for t in (inputs.live.start, inputs.live.end))
    group = inputs.query.size(1) // start.size(0)
    heads, length = (None if start.size(0) == 1 else inputs.query.size(1)), inputs.query.size(2)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row = h * 0 if heads is None else h // group
        return (start[row, j] <= i) & (i < end[row, j])

    block_mask = create_block_mask(visible, None, heads, length, length, device=machine.device)
    function = machine.compile(flex_attention)
    # On a CPU it takes no tensor that requires a gradient.
    leaves = [t.detach() if machine.rehearsed else t for t in inputs.leaves]
    return lambda: function(*leaves, block_mask=block_mask, enable_gqa=True)


def flash_sparse(machine: Machine, inputs: Inputs) -> Callable[[], Tensor]:
    if machine.rehearsed:
        return dense_mask(machine, inputs)
    from flash_sparse_attn import flash_dense_attn_func

    window = torch.tensor([[0, WINDOW - 1, 0, 0]] * inputs.key.size(1), dtype=torch.int32, device=machine.device)
    return lambda: flash_dense_attn_func(
        *(t.transpose(1, 2) for t in inputs.leaves), is_causal=True, window_sizes=window
    ).transpose(1, 2)


def dense_mask(machine: Machine, inputs: Inputs) -> Callable[[], Tensor]:
    index = torch.arange(inputs.query.size(2), dtype=torch.int32, device=machine.device)
    visible = inputs.live.visible(index)
    if visible.size(1) > 1:
        visible = visible.repeat_interleave(inputs.query.size(1) // visible.size(1), dim=1)
    return lambda: torch.nn.functional.scaled_dot_product_attention(*inputs.leaves, attn_mask=visible, enable_gqa=True)


# tuning ----------------------------------------------------------------------------------------------------------------


def tune_rows(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """The fastest entries of the launch table; the table stays as it is, the row has what to put there."""
    import tune

    for bits, head_dim in ((16, 128), (16, 64))[: 1 if machine.rehearsed else None]:
        yield Row(f"{bits} bits, heads of {head_dim}", partial(tune.figures, machine, bits, head_dim))


# counters --------------------------------------------------------------------------------------------------------------

COUNTERS = (
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",
    "lts__t_sectors_op_read.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio",
)


def counters_rows(machine: Machine, sizes: Sizes) -> Iterator[Row]:
    """Nsight Compute on one launch of the forward and of the keys' gradients: matrix units, L2, issue, stalls."""
    for kernel in ("_forward", "_query_gradient", "_list_gradients")[: 1 if machine.rehearsed else None]:
        yield Row(kernel, partial(counters, machine, sizes, kernel))


def counters(machine: Machine, sizes: Sizes, kernel: str) -> Figures:
    command = [sys.executable, "-P", str(Path(__file__).with_name("gpu_session.py")), "--once"]
    if machine.rehearsed:
        command.append("--rehearse")
    else:
        ncu = ["ncu", "--clock-control", "none", "-k", kernel, "-c", "1", "--csv", "--metrics", ",".join(COUNTERS)]
        command = ncu + command
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stderr[-300:]}"
    if machine.rehearsed:
        return {"launched": done.stdout.strip()}
    return read_counters(done.stdout)


def read_counters(text: str) -> Figures:
    """The metrics and their values in the CSV that `ncu --csv` prints among other lines."""
    import csv

    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    assert rows, f"ncu printed no table: {text[-300:]}"
    return {row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}" for row in rows}


def run_once(machine: Machine, sizes: Sizes) -> None:
    """One forward and backward, for a profiler around this process."""
    inputs = make_inputs(machine, sizes, "dynamic", sizes.lengths[0])
    inputs.gradients(inputs.attend)
    machine.synchronize()


def cached_cases() -> list[Case]:
    """What `gpu_cache.py` compiles beforehand: the calls of the sections "correct", "attention" and "models"."""
    measured = Case(dtype="bfloat16", kv_heads=8, group=4, head_dim=128, value_dim=128, queries=64, keys=64)
    tiny = Case(dtype="float32", kv_heads=2, group=2, head_dim=8, value_dim=8, strided=True)
    return [
        *(replace(kind, keys=129, queries=129) for kind in classes_of_cases()),
        measured,
        replace(measured, bias="head"),
        tiny,
        replace(tiny, bias="head"),
        replace(tiny, kv_heads=4, group=1),
        replace(measured, head_dim=64, value_dim=64),
        replace(measured, head_dim=64, value_dim=64, bias="head"),
    ]
