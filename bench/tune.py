"""Writes the launch table: block sizes, warps and stages for each architecture, kernel, element size and head dim.

    python bench/tune.py                  on a GPU: the fastest candidates on its architecture, measured
    python bench/tune.py --compile-only   anywhere: for all architectures, the first candidates that fit

A candidate that spills more than a few registers or takes too much shared memory is out. On a GPU all others are compiled,
on all cores at once, and the time of each kernel alone is measured. Without one, candidates are tried from the largest tile
on and the first that fits is taken: a starting point, not a measurement. The other architectures' entries stay.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import zip_longest
from multiprocessing import get_context
from typing import Annotated

import torch
import triton
import typer
from gpu_machine import Machine
from rewriter.kernels import key_scores
from rewriter.kernels import live_range_attention
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.gpu.compiled import MAX_SPILLED
from rewriter.kernels.gpu.compiled import compile_launch
from rewriter.kernels.gpu.compiled import launches
from rewriter.kernels.gpu.launch import HEAD_DIMS
from rewriter.kernels.gpu.launch import TABLE
from rewriter.kernels.gpu.launch import Table
from rewriter.kernels.gpu.launch import architecture
from rewriter.kernels.gpu.launch import table as launch_table
from rewriter.kernels.gpu.launch import use_table
from rewriter.kernels.gpu.targets import TARGETS

# block_m, block_n, num_warps, num_stages
CANDIDATES = {
    16: {
        "forward": [
            *[[128, 128, 8, 3], [128, 128, 8, 2], [128, 64, 8, 4], [128, 64, 8, 3], [128, 64, 8, 2], [128, 64, 4, 3]],
            *[[128, 64, 4, 2], [128, 32, 8, 4], [128, 32, 8, 2], [64, 128, 4, 3], [64, 128, 4, 2], [64, 64, 4, 4]],
            *[[64, 64, 4, 3], [64, 64, 4, 2], [64, 64, 8, 2], [64, 32, 4, 4], [64, 32, 4, 2], [64, 32, 8, 2]],
            *[[64, 16, 8, 2], [32, 32, 4, 2], [16, 16, 4, 1]],
        ],
        "backward_query": [
            *[[128, 64, 8, 3], [128, 64, 8, 2], [128, 64, 8, 1], [128, 32, 8, 3], [128, 32, 8, 2], [64, 64, 4, 3]],
            *[[64, 64, 4, 2], [64, 64, 4, 1], [64, 64, 8, 2], [64, 32, 4, 3], [64, 32, 4, 2], [64, 32, 8, 2]],
            *[[64, 16, 8, 2], [64, 16, 8, 1], [32, 64, 4, 2], [32, 64, 8, 2], [32, 32, 4, 2], [32, 32, 8, 2]],
            *[[32, 16, 4, 1], [16, 16, 4, 1]],
        ],
        "backward_key": [
            *[[64, 128, 8, 3], [64, 128, 8, 2], [64, 128, 8, 1], [64, 64, 8, 2], [64, 64, 4, 3], [64, 64, 4, 2]],
            *[[64, 64, 4, 1], [64, 32, 4, 2], [64, 32, 8, 1], [32, 128, 8, 3], [32, 128, 8, 2], [32, 64, 8, 2]],
            *[[32, 64, 4, 4], [32, 64, 4, 3], [32, 64, 4, 2], [32, 32, 4, 2], [32, 32, 8, 1], [32, 16, 8, 1]],
            *[[16, 128, 8, 3], [16, 64, 8, 2], [16, 64, 4, 4], [16, 32, 4, 2], [16, 32, 8, 2], [16, 16, 4, 1]],
        ],
        "decode": [[16, 64, 4, 3], [16, 64, 4, 2], [16, 32, 4, 3], [16, 32, 4, 2], [16, 16, 4, 1]],
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
GPU = Machine(rehearsed=False)


def main(
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Choose by compiling alone, for all GPUs.")
    ] = False,
    element_bits: Annotated[str, typer.Option("--bits", help="Sizes of elements.")] = "16,32",
    head_dims: Annotated[str, typer.Option(help="Head dims.")] = ",".join(map(str, HEAD_DIMS)),
    architectures: Annotated[str, typer.Option(help="With --compile-only: which ones.")] = ",".join(TARGETS),
) -> None:
    names = architectures.split(",") if compile_only else [architecture(torch.device("cuda"))]
    for name in names:
        for bits in (int(part) for part in element_bits.split(",")):
            for head_dim in (int(part) for part in head_dims.split(",")):
                chosen = dict((first_that_fit if compile_only else fastest)(name, bits, head_dim))
                for kernel, entry in chosen.items():
                    typer.echo(f"{name} {kernel} {bits} {head_dim}: {entry}")
                TABLE.write_text(readable(with_entries(name, bits, head_dim, chosen)))


def with_entries(name: str, bits: int, head_dim: int, entries: dict[str, list[int]]) -> Table:
    """The table in the file, with these entries in place of its own."""
    table: Table = json.loads(TABLE.read_text())
    for kernel, entry in entries.items():
        table.setdefault(name, {}).setdefault(kernel, {}).setdefault(str(bits), {})[str(head_dim)] = entry
    return table


def first_that_fit(name: str, bits: int, head_dim: int) -> Iterator[tuple[str, list[int]]]:
    candidates = CANDIDATES[bits]
    for kernel in ("forward", "decode", "key_scores"):
        yield from choose(name, bits, head_dim, ({kernel: entry} for entry in candidates[kernel])).items()
    # A tile of rows of the query's kernel is a whole number of those of the keys' kernels. Many keys to a block are worth
    # more than many rows: keys are the rows of these kernels' matrix products.
    pairs = [
        {"backward_query": query, "backward_key": key}
        for query in candidates["backward_query"]
        for key in candidates["backward_key"]
        if query[0] % key[0] == 0
    ]
    pairs.sort(key=lambda pair: rank(**pair))
    yield from choose(name, bits, head_dim, iter(pairs)).items()


def rank(backward_query: list[int], backward_key: list[int]) -> tuple[int, ...]:
    """The keys' kernels first: the larger tile, then more keys, then the query's larger tile."""
    rows, keys, *_ = backward_key
    return -rows * keys, -keys, -backward_query[0] * backward_query[1]


def choose(name: str, bits: int, head_dim: int, candidates: Iterator[dict[str, list[int]]]) -> dict[str, list[int]]:
    """The first of the candidates that fits."""
    spilling: set[tuple[str, tuple[int, ...]]] = set()
    for entries in candidates:
        if spilling & {(kernel, tuple(entry)) for kernel, entry in entries.items()}:
            continue
        bad = misfits((name, bits, head_dim, entries))
        if not bad:
            return entries
        spilling |= {(kernel, tuple(entries[kernel])) for kernel in bad}
    raise SystemExit(f"{name}, {bits} bits, head_dim {head_dim}: no candidate fits; add a smaller one")


def fastest(name: str, bits: int, head_dim: int) -> Iterator[tuple[str, list[int]]]:
    """The entries whose kernels took least time, each kernel by itself."""
    candidates = CANDIDATES[bits]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for kernel in ("forward", "decode", "key_scores"):
            found = timed(pool, name, bits, head_dim, [{kernel: entry} for entry in candidates[kernel]])
            if not found:
                raise SystemExit(f"{name}, {bits} bits, head_dim {head_dim}: no {kernel} fits; add a smaller one")
            yield kernel, found[kernel][1]
        # The keys' kernels depend on how many of their tiles make one of the query's: of each size of that, both are timed.
        pairs: list[dict[str, tuple[float, list[int]]]] = []
        for rows in sorted({query[0] for query in candidates["backward_query"]}, reverse=True):
            queries = [entry for entry in candidates["backward_query"] if entry[0] == rows]
            keys = [entry for entry in candidates["backward_key"] if rows % entry[0] == 0]
            both = zip_longest(queries, keys)
            entries = [{"backward_query": q or queries[0], "backward_key": k or keys[0]} for q, k in both]
            found = timed(pool, name, bits, head_dim, entries)
            pairs += [found] if len(found) == 2 else []
            if len(pairs) == 2:
                break
    if not pairs:
        raise SystemExit(f"{name}, {bits} bits, head_dim {head_dim}: no pair of the backward's fits; add a smaller one")
    best = min(pairs, key=lambda found: sum(milliseconds for milliseconds, _ in found.values()))
    yield from ((kernel, entry) for kernel, (_, entry) in best.items())


def timed(
    pool: ProcessPoolExecutor, name: str, bits: int, head_dim: int, candidates: list[dict[str, list[int]]]
) -> dict[str, tuple[float, list[int]]]:
    """Of each kernel the shortest time in milliseconds, and whose it was; compiled in a pool of processes first."""
    found: dict[str, tuple[float, list[int]]] = {}
    misfit = list(pool.map(misfits, [(name, bits, head_dim, entries) for entries in candidates]))
    for entries, bad in zip(candidates, misfit, strict=True):
        if len(bad) == len(entries):
            continue
        with use_table(with_entries(name, bits, head_dim, entries)):
            try:
                times = measure(bits, head_dim, entries)
            except triton.OutOfResources as error:  # of the one of a pair that does not fit
                typer.echo(f"  {entries}: {error}")
                continue
        for kernel, entry in entries.items():
            typer.echo(f"  {kernel} {entry}: {times[kernel]:.3f} ms{' does not fit' if kernel in bad else ''}")
            if kernel not in bad and times[kernel] < found.get(kernel, (float("inf"), []))[0]:
                found[kernel] = (times[kernel], entry)
    return found


def misfits(work: tuple[str, int, int, dict[str, list[int]]]) -> list[str]:
    """The entries whose kernels spill many registers, take too much shared memory, or do not compile.

    Args:
        work: architecture, bits of an element, head dim, entries; one argument, for a pool of processes.
    """
    name, bits, head_dim, entries = work
    bad = []
    with use_table(with_entries(name, bits, head_dim, entries)):
        recorded = launches(name, list(entries), DTYPES[bits], head_dim)
    for launch in recorded:
        kernel = entry_of(launch.kernel.__name__)
        if kernel in bad or kernel not in entries:
            continue
        try:
            compiled = compile_launch(launch, name)
        except Exception as error:
            typer.echo(f"  {launch.kernel.__name__} {entries[kernel]}: {type(error).__name__}")
            bad.append(kernel)
            continue
        if compiled.spilled > MAX_SPILLED or compiled.shared > TARGETS[name].shared_memory:
            bad.append(kernel)
    return bad


def entry_of(kernel_name: str) -> str:
    """The entry of the launch table that a kernel takes its sizes from."""
    names = {"_query_gradient": "backward_query", "_list_gradients": "backward_key", "_key_gradients": "backward_key"}
    return names.get(kernel_name, kernel_name.removeprefix("_").replace("merge", "decode"))


def measure(bits: int, head_dim: int, entries: dict[str, list[int]], machine: Machine = GPU) -> dict[str, float]:
    """Milliseconds of the kernels of some entries on a dynamic mask of 16,384 keys with its bias, 32/8 heads."""
    length, keep, heads, kv_heads = (48, 8, 2, 1) if machine.rehearsed else (16384, 1024, 32, 8)
    device = machine.device
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, h, length, head_dim, dtype=DTYPES[bits], device=device) for h in (heads, kv_heads, kv_heads)
    )
    score = torch.randn(1, kv_heads, length, device=device)
    live = running_topk_ranges(score, keep)
    if "key_scores" in entries:
        rows = min(64, length)
        lse = torch.zeros(1, heads, rows, device=device)
        times = machine.kernels(lambda: key_scores(query[:, :, -rows:], key, lse, live, bias=score)).own
    elif "decode" in entries:
        times = machine.kernels(lambda: live_range_attention(query[:, :, -1:], key, value, live, bias=score)).own
    else:
        forward = (query, key, value, live.start, live.end, None, None, score, None, None, None, None)
        if "forward" in entries:
            times = machine.kernels(lambda: torch.ops.rewriter.live_range_attention(*forward)).own
        else:
            output, lse = torch.ops.rewriter.live_range_attention(*forward)
            grads = (torch.randn_like(output), torch.zeros_like(lse), query, key, value, output, lse, *forward[3:])
            times = machine.kernels(lambda: torch.ops.rewriter.live_range_attention_backward(*grads)).own
    result = dict.fromkeys(entries, 0.0)
    for kernel_name, milliseconds in times.items():
        if entry_of(kernel_name) in result:
            result[entry_of(kernel_name)] += milliseconds
    return result


def figures(machine: Machine, bits: int, head_dim: int) -> dict[str, object]:
    """The fastest entry of each kernel beside the table's and the milliseconds of both, as `gpu_session.py` keeps them."""
    name = "sm90" if machine.rehearsed else architecture(torch.device("cuda"))
    if machine.rehearsed:
        chosen = {kernel: candidates[0] for kernel, candidates in CANDIDATES[bits].items()}
    else:
        chosen = dict(fastest(name, bits, head_dim))
    present = {k: entries[str(bits)][str(head_dim)] for k, entries in launch_table()[name].items()}
    kernels: tuple[tuple[str, ...], ...] = (
        ("forward",),
        ("decode",),
        ("key_scores",),
        ("backward_query", "backward_key"),
    )
    result: dict[str, object] = {}
    for group in kernels:
        for label, entries in (("table", present), ("fastest", chosen)):
            of_group = {kernel: entries[kernel] for kernel in group}
            with use_table(with_entries(name, bits, head_dim, of_group)):
                for kernel, milliseconds in measure(bits, head_dim, of_group, machine).items():
                    result[f"{kernel} {label}"] = {"entry": of_group[kernel], "ms": milliseconds}
    return result


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
