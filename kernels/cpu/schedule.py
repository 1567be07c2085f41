"""The schedule: for each tile of query rows, the keys that are alive in it.

A tile visits a dense run `[run_begin, run_end)` of neighbouring keys that every row of the tile sees, and a gathered
list of the others: first those that every row sees, then those that need a mask. The work of a tile is its rows times
its live keys, whatever their scatter; nothing of size Q x K exists. Tiles are built a segment at a time, so memory
stays proportional to the live keys of one segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SEGMENT = 16
"""Tiles built at once: fewer cost more calls, more cost more candidates per tile (w=256: 8, 16, 32 within 20 %)."""

MIN_RUN = 1024
"""Shorter runs are gathered with the rest: one product over 1,000 gathered keys beats two without a copy."""


@dataclass(frozen=True)
class Tile:
    """The keys that the query rows `[row_begin, row_end)` visit.

    Attributes:
        run_begin, run_end: keys visited without an index; all rows of the tile see all of them.
        keys: int64 `[N]`, the other live keys, ascending within the two parts.
        num_full: the first `num_full` of `keys` are seen by all rows; the rest are masked row by row.
    """

    row_begin: int
    row_end: int
    run_begin: int
    run_end: int
    keys: Tensor
    num_full: int

    @property
    def num_keys(self) -> int:
        return self.run_end - self.run_begin + self.keys.numel()


def tile_rows(group_size: int, num_queries: int, *, shared: bool) -> int:
    """Query rows of a tile: a matrix product then has about 512 rows, or 384 for each head where heads share a tile.

    Fewer rows visit fewer keys that only some of them see; more rows make better products and fewer calls. Of 96, 112,
    128 and 144 rows for four heads in a group, 128 and 144 are best for one head at a time, 96 where two share.

    Args:
        group_size: query heads of a KV head.
        shared: whether all KV heads have the same live ranges.
    """
    rows = max(16, min(192, (384 if shared else 512) // group_size))
    return max(1, min(rows, num_queries))


def tiles(start: Tensor, end: Tensor, query_index: Tensor, rows: int) -> Iterator[Tile]:
    """The tiles of one row of live ranges, in order.

    Args:
        start, end: int32 `[K]`.
        query_index: int32 `[Q]`, in any order.
        rows: query rows of a tile.
    """
    num_queries = query_index.numel()
    if num_queries == 0:
        return
    num_tiles = -(-num_queries // rows)
    padded = query_index[torch.arange(num_tiles * rows).clamp(max=num_queries - 1)]
    low, high = padded.view(num_tiles, rows).aminmax(dim=1)
    alive = end > start
    for first in range(0, num_tiles, SEGMENT):
        low_part, high_part = low[first : first + SEGMENT, None], high[first : first + SEGMENT, None]
        candidates = ((start <= high_part.max()) & (end > low_part.min()) & alive).nonzero().squeeze(1)
        key_start, key_end = start[candidates], end[candidates]
        live = (key_start <= high_part) & (key_end > low_part)
        full = (key_start <= low_part) & (key_end > high_part)
        # [tiles, 2, candidates] so that one nonzero lists, tile by tile, the full keys and then the masked ones.
        kinds = torch.stack((full, live & ~full), dim=1)
        tile, kind, position = kinds.nonzero().unbind(1)
        keys = candidates[position]
        counts = kinds.sum(dim=2).tolist()
        runs = (
            _longest_runs(keys, tile * 2 + kind, len(counts))
            if max(num_full for num_full, _ in counts) >= MIN_RUN
            else [(0, 0)] * len(counts)
        )
        offset = 0
        for i, ((num_full, num_masked), (run_offset, run_length)) in enumerate(zip(counts, runs, strict=True)):
            own = keys[offset : offset + num_full + num_masked]
            run_begin = run_end = 0
            if run_length >= MIN_RUN:
                before = run_offset - offset
                run_begin = int(own[before])
                run_end = run_begin + run_length
                own = torch.cat((own[:before], own[before + run_length :]))
                num_full -= run_length
            offset += own.numel() + run_end - run_begin
            row = (first + i) * rows
            yield Tile(row, min(row + rows, num_queries), run_begin, run_end, own, num_full)


def _longest_runs(keys: Tensor, group: Tensor, num_tiles: int) -> list[tuple[int, int]]:
    """(offset in `keys`, length) of the longest run of neighbouring fully visible keys, for each tile."""
    total = keys.numel()
    border = torch.ones(total, dtype=torch.bool)
    border[1:] = (keys[1:] != keys[:-1] + 1) | (group[1:] != group[:-1])
    begin = border.nonzero().squeeze(1)
    length = torch.diff(begin, append=torch.tensor([total]))
    run_group = group[begin]
    is_full = run_group % 2 == 0
    # One integer orders by length and carries the offset, so that a maximum per tile finds both.
    code = torch.where(is_full, length * (total + 1) + (total - begin), 0)
    best = torch.zeros(num_tiles, dtype=torch.int64).scatter_reduce_(0, run_group // 2, code, "amax")
    return [(total - value % (total + 1), value // (total + 1)) if value else (0, 0) for value in best.tolist()]
