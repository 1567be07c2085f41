"""Writes the launch table: block sizes, warps and stages for each architecture, kernel, element size and head dim.

    python bench/tune.py                  on a GPU: the fastest candidates on its architecture, measured
    python bench/tune.py --compile-only   anywhere: for all architectures, the first candidates that fit

Candidates are tried from the largest tile on. One that spills registers or takes too much shared memory is out. Without a
GPU the first that is left is taken: a starting point, not a measurement. The other architectures' entries stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

import torch
import triton
import typer
from rewriter.kernels import key_scores
from rewriter.kernels import live_range_attention
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.gpu.compiled import SHARED_MEMORY
from rewriter.kernels.gpu.compiled import compile_launch
from rewriter.kernels.gpu.compiled import launches
from rewriter.kernels.gpu.launch import HEAD_DIMS
from rewriter.kernels.gpu.launch import TABLE
from rewriter.kernels.gpu.launch import Table
from rewriter.kernels.gpu.launch import architecture
from rewriter.kernels.gpu.launch import use_table

# block_m, block_n, num_warps, num_stages
CANDIDATES = {
    16: {
        "forward": [
            *[[128, 64, 8, 3], [128, 64, 8, 2], [128, 64, 4, 3], [128, 64, 4, 2], [128, 32, 8, 2], [64, 64, 4, 3]],
            *[
                [64, 64, 4, 2],
                [64, 64, 8, 2],
                [64, 32, 4, 2],
                [64, 32, 8, 2],
                [64, 16, 8, 2],
                [32, 32, 4, 2],
                [16, 16, 4, 1],
            ],
        ],
        "backward_query": [
            *[[64, 64, 4, 2], [64, 64, 8, 2], [64, 32, 4, 2], [64, 32, 8, 2], [64, 16, 8, 1]],
            *[[32, 64, 4, 2], [32, 64, 8, 2], [32, 32, 4, 2], [32, 32, 8, 2], [32, 16, 4, 1], [16, 16, 4, 1]],
        ],
        "backward_key": [
            *[[64, 128, 8, 2], [64, 64, 8, 2], [64, 64, 4, 2], [64, 64, 4, 1], [64, 32, 4, 2], [64, 32, 8, 1]],
            *[[32, 128, 8, 2], [32, 64, 8, 2], [32, 64, 4, 2], [32, 32, 4, 2], [32, 32, 8, 1], [32, 16, 8, 1]],
            *[[16, 64, 8, 2], [16, 32, 4, 2], [16, 32, 8, 2], [16, 16, 4, 1]],
        ],
        "decode": [[16, 64, 4, 3], [16, 64, 4, 2], [16, 32, 4, 2], [16, 16, 4, 1]],
        "key_scores": [[64, 64, 4, 2], [32, 64, 4, 2], [32, 64, 8, 2], [16, 32, 4, 2], [16, 16, 4, 1]],
    },
    # Products of fp32 are not rounded to tf32: they run on the scalar units, and their operands take registers.
    32: {
        "forward": [[32, 32, 4, 2], [16, 32, 4, 2], [16, 32, 8, 2], [16, 16, 8, 1]],
        "backward_query": [[16, 32, 4, 2], [16, 32, 4, 1], [16, 16, 4, 1], [16, 16, 8, 2], [16, 16, 8, 1]],
        "backward_key": [[16, 64, 8, 2], [16, 32, 8, 1], [16, 32, 4, 1], [16, 16, 8, 1], [16, 16, 4, 1]],
        "decode": [[16, 64, 4, 2], [16, 32, 4, 2], [16, 16, 4, 1], [16, 16, 8, 1]],
        "key_scores": [[32, 64, 8, 2], [16, 32, 4, 1], [16, 16, 4, 1], [16, 16, 8, 1]],
    },
}

DTYPES = {16: torch.bfloat16, 32: torch.float32}


def main(
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Choose by compiling alone, for all GPUs.")
    ] = False,
    element_bits: Annotated[str, typer.Option("--bits", help="Sizes of elements.")] = "16,32",
    architectures: Annotated[str, typer.Option(help="With --compile-only: which ones.")] = ",".join(SHARED_MEMORY),
) -> None:
    table: Table = json.loads(TABLE.read_text())
    names = architectures.split(",") if compile_only else [architecture(torch.device("cuda"))]
    for name in names:
        for bits in (int(part) for part in element_bits.split(",")):
            for head_dim in HEAD_DIMS:
                for kernel, entry in best(name, bits, head_dim, timed=not compile_only):
                    table.setdefault(name, {}).setdefault(kernel, {}).setdefault(str(bits), {})[str(head_dim)] = entry
                    typer.echo(f"{name} {kernel} {bits} {head_dim}: {entry}")
                TABLE.write_text(readable(table))


def best(name: str, bits: int, head_dim: int, *, timed: bool) -> Iterator[tuple[str, list[int]]]:
    candidates = CANDIDATES[bits]
    for kernel in ("forward", "decode", "key_scores"):
        fitting = ({kernel: entry} for entry in candidates[kernel])
        yield kernel, choose(name, bits, head_dim, fitting, timed)[kernel]
    # A tile of rows of the query's kernel is a whole number of those of the keys' kernels. Many keys to a block are worth
    # more than many rows: keys are the rows of these kernels' matrix products.
    pairs = [
        {"backward_query": query, "backward_key": key}
        for query in candidates["backward_query"]
        for key in candidates["backward_key"]
        if query[0] % key[0] == 0
    ]
    pairs.sort(key=lambda pair: rank(**pair))
    yield from choose(name, bits, head_dim, iter(pairs), timed).items()


def rank(backward_query: list[int], backward_key: list[int]) -> tuple[int, ...]:
    """The keys' kernels first: the larger tile, then more keys, then the query's larger tile."""
    rows, keys, *_ = backward_key
    return -rows * keys, -keys, -backward_query[0] * backward_query[1]


def choose(
    name: str, bits: int, head_dim: int, candidates: Iterator[dict[str, list[int]]], timed: bool
) -> dict[str, list[int]]:
    """The fastest of the candidates that fit, or the first one when they are not timed."""
    fastest, shortest = None, float("inf")
    spilling: set[tuple[str, tuple[int, ...]]] = set()
    for entries in candidates:
        known = {(kernel, tuple(entry)) for kernel, entry in entries.items()}
        if known & spilling:
            continue
        table: Table = json.loads(TABLE.read_text())
        for kernel, entry in entries.items():
            table.setdefault(name, {}).setdefault(kernel, {}).setdefault(str(bits), {})[str(head_dim)] = entry
        with use_table(table):
            bad = misfits(name, bits, head_dim, entries)
            spilling |= {(kernel, tuple(entries[kernel])) for kernel in bad}
            if bad:
                continue
            if not timed:
                return entries
            seconds = measure(bits, head_dim, entries)
        if seconds < shortest:
            fastest, shortest = entries, seconds
    if fastest is None:
        raise SystemExit(f"{name}, {bits} bits, head_dim {head_dim}: no candidate fits; add a smaller one")
    return fastest


def misfits(name: str, bits: int, head_dim: int, entries: dict[str, list[int]]) -> list[str]:
    """The entries whose kernels spill registers, take too much shared memory, or do not compile."""
    bad = []
    for launch in launches(name, list(entries), DTYPES[bits], head_dim):
        kernel = "backward_key" if launch.kernel.__name__ in ("_list_gradients", "_key_gradients") else None
        kernel = kernel or ("backward_query" if "backward_query" in entries else next(iter(entries)))
        if kernel in bad:
            continue
        try:
            compiled = compile_launch(launch, name)
        except Exception as error:
            typer.echo(f"  {launch.kernel.__name__} {entries[kernel]}: {type(error).__name__}")
            bad.append(kernel)
            continue
        if compiled.spilled or compiled.shared > SHARED_MEMORY[name]:
            bad.append(kernel)
    return bad


def measure(bits: int, head_dim: int, entries: dict[str, list[int]]) -> float:
    """Milliseconds of the kernels of some entries on a dynamic mask of 16,384 keys, 32/8 heads."""
    length, keep = 16384, 1024
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, h, length, head_dim, dtype=DTYPES[bits], device="cuda", requires_grad=True) for h in (32, 8, 8)
    )
    live = running_topk_ranges(torch.randn(1, 8, length, device="cuda"), keep)
    if "key_scores" in entries:
        lse = torch.zeros(1, 32, 64, device="cuda")
        return triton.testing.do_bench(lambda: key_scores(query[:, :, -64:], key, lse, live), return_mode="median")
    if "decode" in entries:
        last = query[:, :, -1:]
        return triton.testing.do_bench(lambda: live_range_attention(last, key, value, live), return_mode="median")
    if "forward" in entries:
        with torch.no_grad():
            return triton.testing.do_bench(lambda: live_range_attention(query, key, value, live), return_mode="median")
    with torch.no_grad():
        output, lse = torch.ops.rewriter.live_range_attention(query, key, value, live.start, live.end, *[None] * 7)
    grad, grad_lse = torch.randn_like(output), torch.zeros_like(lse)
    return triton.testing.do_bench(
        lambda: torch.ops.rewriter.live_range_attention_backward(
            grad, grad_lse, query, key, value, output, lse, live.start, live.end, *[None] * 7
        ),
        return_mode="median",
    )


def readable(table: Table) -> str:
    """One line for each architecture, kernel and element size."""
    lines = []
    for name, kernels in table.items():
        rows = [
            f'  "{kernel}": {{\n'
            + ",\n".join(f'   "{bits}": {json.dumps(entry)}' for bits, entry in entries.items())
            + "\n  }"
            for kernel, entries in kernels.items()
        ]
        lines.append(f' "{name}": {{\n' + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    typer.run(main)
