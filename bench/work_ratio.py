"""How much do the Triton kernels compute and move, for how much that is visible? Counted, not timed: needs no GPU.

    python bench/work_ratio.py

1. Ways to group the keys of a dynamic mask for the backward, by simulation: 64 neighbours; 64 keys of like lifetimes, then
   neighbours; 64 slots, assigned by linear scan, with the keys that enter within a tile in a block of their own; and the
   lists of segments, which the kernels use. Pairs computed over pairs visible, random scores, one head.
2. The kernels' own schedules, as built for bf16, 32/8 heads of 128, on an H100's or H200's table entries: work ratios,
   bytes of keys and values that the forward reads beside a dense causal flash kernel of the same tile, bytes of schedule
   per key and KV head, and whether that grows with the length.
"""

from __future__ import annotations

import heapq
import json
import os
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

os.environ["TRITON_INTERPRET"] = "1"  # the lists of a schedule are filled by a Triton kernel

import torch
import typer
from rewriter.kernels import LiveRanges
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.gpu.launch import launch_config
from rewriter.kernels.gpu.schedule import BACKWARD_CAPACITY
from rewriter.kernels.gpu.schedule import FORWARD_CAPACITY
from rewriter.kernels.gpu.schedule import Schedule
from rewriter.kernels.gpu.schedule import backward_pairs
from rewriter.kernels.gpu.schedule import build
from rewriter.kernels.gpu.schedule import forward_keys
from rich.console import Console
from rich.table import Table
from torch import Tensor

GROUP, HEAD_DIM, WINDOW = 4, 128, 256
BLOCK = 64


@dataclass
class Grouping:
    """Work ratios of the backward for key and value."""

    length: int
    keep: int
    neighbours: float
    like_lifetimes: float
    slots: float
    tiles_between_changes: float
    segments: float


@dataclass
class Counted:
    mask: str
    length: int
    ideal: float
    work_ratio_forward: float
    work_ratio_query_gradient: float
    work_ratio_key_gradients: float
    key_bytes_against_flash: float
    schedule_bytes_per_key: float


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path(__file__).parent
    / "results"
    / "work-ratio.json",
    lengths: Annotated[str, typer.Option(help="Lengths, separated by commas.")] = "4096,16384,32768,131072",
) -> None:
    torch.set_num_threads(1)
    console = Console(width=150)
    sizes = [int(part) for part in lengths.split(",")]
    groupings = [grouping(length, keep) for length in sizes for keep in (512, 1024, 2048) if length >= 8 * keep]
    console.print(table("grouping keys for the backward, simulated", groupings))
    counted = [count(mask, length) for mask in ("dynamic", "separator", "window", "causal") for length in sizes]
    console.print(table("the kernels' schedules, keep 1024, window 256", counted))
    out.parent.mkdir(parents=True, exist_ok=True)
    results = {"grouping": [asdict(g) for g in groupings], "schedules": [asdict(c) for c in counted]}
    out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"written: {out}", markup=False)


def grouping(length: int, keep: int, tile_rows: int = 16) -> Grouping:
    live = running_topk_ranges(torch.randn(1, 1, length, generator=torch.Generator().manual_seed(0)), keep)
    start, end = live.start[0, 0].long(), live.end[0, 0].long().clamp(max=length)
    lives = end > start
    start, end = start[lives], end[lives]
    pairs = int((end - start).sum())
    num_tiles = -(-length // tile_rows)
    first, last = start // tile_rows, (end - 1) // tile_rows + 1

    def ratio(order: Tensor) -> float:
        tiles = sum(int(tiles_touched(first[group], last[group], num_tiles)) for group in order.split(BLOCK))
        return tiles * tile_rows * BLOCK / pairs

    # Ranges within a factor of the square root of 2 count as alike; a stable sort keeps neighbours together in a class.
    classes = ((end - start).double().log2() * 2).floor()
    slots, tiles_between = slot_ratio(start, last, first, num_tiles, tile_rows)
    index = torch.arange(length, dtype=torch.int32)[None]
    schedule = build(live.start, live.end, index, tile_rows, BLOCK, BACKWARD_CAPACITY)
    return Grouping(
        length,
        keep,
        neighbours=ratio(torch.arange(start.numel())),
        like_lifetimes=ratio(classes.argsort(stable=True)),
        slots=slots / pairs,
        tiles_between_changes=tiles_between,
        segments=backward_pairs(schedule, BLOCK) / pairs,
    )


def tiles_touched(first: Tensor, last: Tensor, num_tiles: int) -> Tensor:
    """In how many tiles at least one of the keys is alive."""
    change = torch.zeros(num_tiles + 1, dtype=torch.long)
    change.index_add_(0, first, torch.ones_like(first)).index_add_(0, last, -torch.ones_like(last))
    return (change.cumsum(0)[:num_tiles] > 0).sum()


def slot_ratio(start: Tensor, last: Tensor, first: Tensor, num_tiles: int, tile_rows: int) -> tuple[float, float]:
    """Pairs that groups of 64 slots compute, and how many tiles a group goes between changes of its occupants.

    A key takes a slot from the first tile on whose rows all come after its start; in the tile in which it starts, it is in
    an extra block of 16 keys at a time.
    """
    from_tile = -(-start // tile_rows)
    takes = from_tile < last
    events = sorted(zip(from_tile[takes].tolist(), last[takes].tolist(), strict=True))
    free: list[int] = []
    in_use: list[tuple[int, int]] = []
    occupied: dict[int, list[tuple[int, int]]] = {}
    slots = 0
    for begin, stop in events:
        while in_use and in_use[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(in_use)[1])
        if free:
            slot = heapq.heappop(free)
        else:
            slot, slots = slots, slots + 1
        heapq.heappush(in_use, (stop, slot))
        occupied.setdefault(slot // BLOCK, []).append((begin, stop))
    tiles = changes = 0
    for intervals in occupied.values():
        begin, stop = torch.tensor(intervals).unbind(1)
        tiles += int(tiles_touched(begin, stop, num_tiles))
        changes += begin.unique().numel()
    entering = torch.bincount(first[from_tile > first], minlength=num_tiles)
    extra = int(((entering + 15) // 16 * 16).sum())
    return float((tiles * BLOCK + extra) * tile_rows), tiles / changes


def count(mask: str, length: int) -> Counted:
    live = ranges(mask, length)
    pairs = live.live_pairs()
    forward_config, query_config, key_config = (
        launch_config("sm90", name, 2, HEAD_DIM) for name in ("forward", "backward_query", "backward_key")
    )
    index = torch.arange(length, dtype=torch.int32)[None]
    forward = build(
        live.start, live.end, index, forward_config.block_m // GROUP, forward_config.block_n, FORWARD_CAPACITY
    )
    backward = build(
        live.start, live.end, index, query_config.block_m // GROUP, query_config.block_n, BACKWARD_CAPACITY
    )
    keys = int(forward_keys(forward, forward_config.block_n).sum())
    tiles = -(-length // forward.tile_rows)
    flash_keys = sum(min(length, (tile + 1) * forward.tile_rows) for tile in range(tiles))
    return Counted(
        mask,
        length,
        ideal=length * (length + 1) / 2 / pairs,
        work_ratio_forward=keys * forward.tile_rows / pairs,
        work_ratio_query_gradient=int(forward_keys(backward, query_config.block_n).sum()) * backward.tile_rows / pairs,
        work_ratio_key_gradients=backward_pairs(backward, key_config.block_n) / pairs,
        key_bytes_against_flash=keys / flash_keys,
        schedule_bytes_per_key=(nbytes(forward) + nbytes(backward)) / length,
    )


def nbytes(schedule: Schedule) -> int:
    return sum(value.nbytes for value in vars(schedule).values() if isinstance(value, Tensor))


def ranges(mask: str, length: int) -> LiveRanges:
    if mask == "dynamic":
        return running_topk_ranges(torch.randn(1, 1, length, generator=torch.Generator().manual_seed(0)), 1024)
    if mask == "separator":
        from attention import separators_of_real_text

        return LiveRanges.separators(separators_of_real_text(length), window=WINDOW, initial=3)
    return LiveRanges.sliding_window(length, WINDOW) if mask == "window" else LiveRanges.causal(length)


def table(title: str, results: list[Grouping] | list[Counted]) -> Table:
    output = Table(title=title, title_justify="left")
    for name in vars(results[0]):
        output.add_column(name.replace("_", " "), justify="left" if name == "mask" else "right")
    for result in results:
        output.add_row(
            *(
                f"{v:,}" if isinstance(v, int) else f"{v:.2f}" if isinstance(v, float) else v
                for v in vars(result).values()
            )
        )
    return output


if __name__ == "__main__":
    typer.run(main)
