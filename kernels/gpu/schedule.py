"""The schedule on the device: for each tile of query rows, the keys that are alive in it.

A tile sees two kinds of keys, and each visible pair belongs to exactly one of them:

- the *run*, one stretch of neighbouring keys that ends where the tile's keys end (a window, a causal prefix, a
  document). Its keys are loaded without indices, and its middle needs no mask.
- the *list* of the other keys, gathered by index. Tiles share lists: time is cut into at most `MAX_SEGMENTS` segments of
  equally many tiles, and a segment's list holds first the keys that all of its rows see, then those that need a mask.

Shapes depend on sizes alone, so nothing waits for the device: all lists of a row together have room for `capacity` times
its keys, and a row whose lists would not fit takes longer segments. Time and memory are O(K + Q) for a fixed capacity,
where a list for each tile would take O(Q / T * live keys). Segments cost little because few keys are born or die in one:
on random scores the pairs computed are 1.06 to 1.2 times those visible (`bench/work_ratio.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import fields
from typing import Any

import torch
import triton
import triton.language as tl
from rewriter.kernels.dispatch import INTERPRETED
from rewriter.kernels.gpu.launch import UNSPECIALIZED
from rewriter.kernels.gpu.launch import launch
from torch import Tensor

MAX_SEGMENTS = 64
"""Segments of a row at most."""

FORWARD_CAPACITY = 8
"""Room for indices is cheap: 32 bytes per key and KV head."""

BACKWARD_CAPACITY = 2
"""Each entry of a backward list has a row of partial gradients, of a key's size in fp32."""

DOUBLINGS = MAX_SEGMENTS.bit_length()
"""Lengths of a segment that are tried: the shortest, and twice the one before until all tiles are one."""

BLOCK = 128 if INTERPRETED else 1024
"""Keys of a program that makes the schedule. Triton's interpreter scans them one by one."""

CHUNKS, TILE_BLOCK = (MAX_SEGMENTS, 8) if INTERPRETED else (1, 64)
"""Chunks of a program that looks for the runs' borders, and of each so many tiles at once. The interpreter runs the programs one
after the other."""

NEVER = tl.constexpr(2**31 - 1)

SCHEDULE_KERNELS = (
    "_births_and_deaths",
    "_scan_births",
    "_scan_deaths",
    "_borders_of_runs",
    "_outside_of_runs",
    "_segments",
    "_fill_lists",
)
"""Launched by `build`, in this order."""


@dataclass(frozen=True)
class Schedule:
    """All tensors int32. R rows of live ranges: batch rows (1 where shared) times KV heads (1 where shared).

    Attributes:
        start, end: `[Rb, Rh, K]`, the live ranges.
        query_index: `[Rb, Rh, Q]`, ascending.
        tile_rows: query rows of a tile.
        run_begin, full_begin, full_end, run_end: `[Rb, Rh, tiles]`; the keys of the run, and those of them that all rows
            of the tile see, a whole number of blocks.
        segment_tiles: `[Rb, Rh]`, tiles of a segment.
        list_begin: `[Rb, Rh, MAX_SEGMENTS + 1]`, where in `list_keys` the list of each segment begins.
        list_full: `[Rb, Rh, MAX_SEGMENTS]`, how many keys of a list need no mask.
        list_keys: `[Rb, Rh, capacity * K]`.
        first_segment, last_segment: `[Rb, Rh, K]`; a key is in the lists of segments `first <= s < last`.
        first_tile, last_tile: `[Rb, Rh, K]`; a key is alive in tiles `first <= t < last`.
        run_first, run_last: `[Rb, Rh, K]`; a key can be in a run in tiles `first <= t < last` only.
        full_first, full_last: `[Rb, Rh, K]`; all rows of the tiles `first <= t < last` see the key, if those have runs.
        used_before: `[Rb, Rh, tiles + 1]`, how many earlier tiles have a run.
    """

    start: Tensor
    end: Tensor
    query_index: Tensor
    tile_rows: int
    run_begin: Tensor
    full_begin: Tensor
    full_end: Tensor
    run_end: Tensor
    segment_tiles: Tensor
    list_begin: Tensor
    list_full: Tensor
    list_keys: Tensor
    first_segment: Tensor
    last_segment: Tensor
    first_tile: Tensor
    last_tile: Tensor
    run_first: Tensor
    run_last: Tensor
    full_first: Tensor
    full_last: Tensor
    used_before: Tensor

    @property
    def num_tiles(self) -> int:
        return self.run_begin.size(2)

    def made(self) -> list[Tensor]:
        """The tensors that `build` fills, in the order of `restored`; the ranges and indices are as they were given."""
        return [getattr(self, name) for name in MADE]

    @classmethod
    def restored(
        cls, start: Tensor, end: Tensor, query_index: Tensor, tile_rows: int, made: Sequence[Tensor]
    ) -> Schedule:
        """The schedule that `build` made of these arguments, from its tensors."""
        start, end, query_index = _by_rows(start, end, query_index)
        return cls(start, end, query_index, tile_rows, **dict(zip(MADE, made, strict=True)))


MADE = tuple(f.name for f in fields(Schedule) if f.name not in ("start", "end", "query_index", "tile_rows"))
"""The fields that `build` fills."""


def made_sizes(num_queries: int, num_keys: int, tile_rows: int, capacity: int) -> dict[str, tuple[int, ...]]:
    """The sizes of these fields, behind `[Rb, Rh]`."""
    num_tiles = -(-num_queries // tile_rows)
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(MADE, (num_keys,))
    sizes.update(dict.fromkeys(("run_begin", "full_begin", "full_end", "run_end"), (num_tiles,)))
    sizes.update(segment_tiles=(), list_begin=(MAX_SEGMENTS + 1,), list_full=(MAX_SEGMENTS,))
    sizes.update(list_keys=(capacity * num_keys,), used_before=(num_tiles + 1,))
    return sizes


def num_rows(start: Tensor, end: Tensor, query_index: Tensor) -> tuple[int, int]:
    """Batch rows and KV heads of a schedule: 1 where all share one."""
    return max(start.size(0), end.size(0), query_index.size(0)), max(start.size(1), end.size(1))


def _by_rows(start: Tensor, end: Tensor, query_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = num_rows(start, end, query_index)
    start, end = (t.expand(*rows, t.size(2)).contiguous() for t in (start, end))
    return start, end, query_index[:, None, :].expand(*rows, query_index.size(1)).contiguous()


def build(start: Tensor, end: Tensor, query_index: Tensor, tile_rows: int, block: int, capacity: int) -> Schedule:
    """The schedule of live ranges, by seven launches, the host waiting for none.

    Everything about a run is a scan over keys: the run of tile t ends at the first key that is not born by then, so that key k
    enters runs at the latest birth among the keys up to it; it begins after the last key that is dead, so that key k leaves
    runs at the earliest death among the keys from it on. The borders of the runs are then found in these scans by bisection.

    Args:
        start, end: int32 `[B|1, Hkv|1, K]`, K at least 1.
        query_index: int32 `[B|1, Q]`, ascending along each row, Q at least 1.
        tile_rows: query rows of a tile.
        block: keys of a block of the attention kernel.
        capacity: entries of a row's lists, in multiples of K.
    """
    num_keys, num_queries = start.size(2), query_index.size(1)
    num_tiles = -(-num_queries // tile_rows)
    start, end, query_index = _by_rows(start, end, query_index)
    rows, num_blocks = start.shape[:2], -(-num_keys // BLOCK)

    def empty(*sizes: int) -> Tensor:
        return torch.empty(*rows, *sizes, dtype=torch.int32, device=start.device)

    made = {name: empty(*s) for name, s in made_sizes(num_queries, num_keys, tile_rows, capacity).items()}
    of_tiles = [made[name] for name in ("run_begin", "full_begin", "full_end", "run_end")]
    used, enters_run, leaves_run = empty(MAX_SEGMENTS), empty(num_keys), empty(num_keys)
    births, deaths, entries, counts = (empty(num_blocks, n) for n in (2, 2, DOUBLINGS, MAX_SEGMENTS))
    all_rows = rows[0] * rows[1]
    by_keys = (all_rows, num_blocks)
    sizes = (num_queries, num_keys, num_tiles)
    options: dict[str, Any] = {"num_warps": 4}
    launch(_births_and_deaths, by_keys)(
        start,
        end,
        query_index,
        *(made[name] for name in ("first_tile", "full_first", "last_tile", "full_last")),
        births,
        *sizes,
        tile_rows,
        BLOCK=BLOCK,
        **options,
    )
    launch(_scan_births, by_keys)(
        *(made[name] for name in ("first_tile", "full_first", "last_tile", "full_last")),
        enters_run,
        leaves_run,
        births,
        deaths,
        num_keys,
        BLOCK=BLOCK,
        **options,
    )
    launch(_scan_deaths, by_keys)(leaves_run, made["full_last"], deaths, num_keys, num_tiles, BLOCK=BLOCK, **options)
    launch(_borders_of_runs, (all_rows, MAX_SEGMENTS // CHUNKS))(
        enters_run,
        leaves_run,
        made["full_first"],
        made["full_last"],
        *of_tiles,
        used,
        num_keys,
        num_tiles,
        tile_rows,
        block,
        BLOCK=TILE_BLOCK,
        CHUNKS=CHUNKS,
        MAX_SEGMENTS=MAX_SEGMENTS,
        **options,
    )
    # Behind the programs for keys, those that count runs.
    launch(_outside_of_runs, (all_rows, num_blocks + num_tiles // BLOCK + 1))(
        made["first_tile"],
        made["last_tile"],
        enters_run,
        leaves_run,
        *(made[name] for name in ("run_first", "run_last", "first_segment", "last_segment")),
        used,
        made["used_before"],
        entries,
        num_keys,
        num_tiles,
        num_blocks,
        BLOCK=BLOCK,
        CHUNKS=CHUNKS,
        MAX_SEGMENTS=MAX_SEGMENTS,
        DOUBLINGS=DOUBLINGS,
        **options,
    )
    launch(_segments, by_keys)(
        *(made[name] for name in ("first_segment", "last_segment")),
        entries,
        counts,
        made["segment_tiles"],
        num_keys,
        num_tiles,
        capacity * num_keys,
        BLOCK=BLOCK,
        MAX_SEGMENTS=MAX_SEGMENTS,
        DOUBLINGS=DOUBLINGS,
        GROUP=MAX_SEGMENTS if INTERPRETED else 4,
        **options,
    )
    launch(_fill_lists, (all_rows, MAX_SEGMENTS))(
        start,
        end,
        query_index,
        *(made[name] for name in ("run_begin", "run_end", "used_before", "first_segment", "last_segment")),
        made["segment_tiles"],
        counts,
        *(made[name] for name in ("list_begin", "list_full", "list_keys")),
        *sizes,
        capacity * num_keys,
        num_blocks,
        tile_rows,
        BLOCK=BLOCK,
        MAX_SEGMENTS=MAX_SEGMENTS,
        **options,
    )
    return Schedule(start, end, query_index, tile_rows, **made)


def forward_keys(schedule: Schedule, block: int) -> Tensor:
    """Keys that the forward, or the query's gradient, computes for each row of each tile. int64 `[Rb, Rh, tiles]`.

    Times the rows of the tiles, over the live pairs, this is the work ratio.
    """
    s = schedule
    run_blocks = (s.full_end - s.full_begin) // block
    run_blocks = run_blocks + _blocks(s.full_begin - s.run_begin, block) + _blocks(s.run_end - s.full_end, block)
    list_blocks = _blocks(s.list_begin.diff(dim=2), block)
    segment = torch.arange(s.num_tiles, device=s.start.device) // s.segment_tiles[:, :, None]
    return (run_blocks + list_blocks.gather(2, segment)).long() * block


def backward_pairs(schedule: Schedule, block: int) -> int:
    """(query row, key) pairs that the gradients of key and value compute, over all rows of live ranges."""
    s = schedule
    tiles = 0
    for row in range(s.start.size(0)):
        for head in range(s.start.size(1)):
            at = (row, head)
            begin, segment_tiles = s.list_begin[at].tolist(), int(s.segment_tiles[at])
            for segment in range(MAX_SEGMENTS):
                keys = s.list_keys[at][begin[segment] : begin[segment + 1]].long()
                for group in keys.split(block) if keys.numel() else ():
                    first = max(segment * segment_tiles, int(s.first_tile[at][group].min()))
                    last = min((segment + 1) * segment_tiles, int(s.last_tile[at][group].max()))
                    tiles += max(0, last - first)
            for first, last in zip(s.run_first[at].split(block), s.run_last[at].split(block), strict=True):
                tiles += max(0, int(last.max()) - int(first.min()))
    return tiles * block * s.tile_rows


def _blocks(keys: Tensor, block: int) -> Tensor:
    return (keys + (block - 1)) // block


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _min(a, b):
    return tl.minimum(a, b)


@triton.jit
def _tiles_before(query_index_ptr, b_wanted, m_wanted, num_queries, num_tiles, tile_rows, LAST: tl.constexpr):
    """How many tiles have a first index, or a last one, below each wanted one. By bisection: the indices ascend."""
    low = tl.zeros_like(b_wanted)
    high = low + tl.cast(num_tiles, tl.int32)
    candidates = tl.cast(num_tiles, tl.int32) + 1
    while candidates > 1:
        middle = (low + high) // 2
        m_open = m_wanted & (low < high)
        o_row = middle * tile_rows
        if LAST:
            o_row = tl.minimum(o_row + tile_rows, tl.cast(num_queries, tl.int32)) - 1
        b_index = tl.load(query_index_ptr + o_row, mask=m_open, other=0)
        m_below = b_index < b_wanted
        low = tl.where(m_open & m_below, middle + 1, low)
        high = tl.where(m_open & ~m_below, middle, high)
        candidates = (candidates + 1) // 2
    return low


@triton.jit
def _keys_until(scan_ptr, b_tile, m_tile, num_keys):
    """How many of a scan's ascending values over keys are at most each tile."""
    low = tl.zeros_like(b_tile)
    high = low + tl.cast(num_keys, tl.int32)
    candidates = tl.cast(num_keys, tl.int32) + 1
    while candidates > 1:
        middle = (low + high) // 2
        m_open = m_tile & (low < high)
        b_value = tl.load(scan_ptr + middle, mask=m_open, other=0)
        m_until = b_value <= b_tile
        low = tl.where(m_open & m_until, middle + 1, low)
        high = tl.where(m_open & ~m_until, middle, high)
        candidates = (candidates + 1) // 2
    return low


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _births_and_deaths(
    start_ptr,
    end_ptr,
    query_index_ptr,
    first_tile_ptr,
    first_full_ptr,
    dead_from_ptr,
    partly_dead_from_ptr,
    births_ptr,
    num_queries,
    num_keys,
    num_tiles,
    tile_rows,
    BLOCK: tl.constexpr,
):
    """The tiles in which each key is born, seen by all rows, dead to some row, and dead; the latest births of each block.

    A key that never lives is dead from the first tile on.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o_keys = i_block * BLOCK + tl.arange(0, BLOCK)
    m_keys = o_keys < num_keys
    p_keys = i_row * num_keys + o_keys
    query_index_ptr += i_row * num_queries
    b_start = tl.load(start_ptr + p_keys, mask=m_keys, other=0)
    b_end = tl.load(end_ptr + p_keys, mask=m_keys, other=0)
    b_first_tile = _tiles_before(query_index_ptr, b_start, m_keys, num_queries, num_tiles, tile_rows, True)
    b_first_full = _tiles_before(query_index_ptr, b_start, m_keys, num_queries, num_tiles, tile_rows, False)
    b_dead_from = _tiles_before(query_index_ptr, b_end, m_keys, num_queries, num_tiles, tile_rows, False)
    b_partly = _tiles_before(query_index_ptr, b_end, m_keys, num_queries, num_tiles, tile_rows, True)
    m_lives = b_end > b_start
    tl.store(first_tile_ptr + p_keys, b_first_tile, mask=m_keys)
    tl.store(first_full_ptr + p_keys, b_first_full, mask=m_keys)
    tl.store(dead_from_ptr + p_keys, tl.where(m_lives, b_dead_from, 0), mask=m_keys)
    tl.store(partly_dead_from_ptr + p_keys, tl.where(m_lives, b_partly, 0), mask=m_keys)
    p_births = births_ptr + (i_row * tl.num_programs(1) + i_block) * 2
    tl.store(p_births, tl.max(tl.where(m_keys, b_first_tile, 0), 0))
    tl.store(p_births + 1, tl.max(tl.where(m_keys, b_first_full, 0), 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _scan_births(
    first_tile_ptr,
    full_first_ptr,
    dead_from_ptr,
    full_last_ptr,
    enters_run_ptr,
    leaves_run_ptr,
    births_ptr,
    deaths_ptr,
    num_keys,
    BLOCK: tl.constexpr,
):
    """The latest births among the keys up to each one. What ends a run is dead, once the run has come to it.

    `full_first` is scanned in place; `full_last` and `leaves_run` get what `_scan_deaths` scans.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o_keys = i_block * BLOCK + tl.arange(0, BLOCK)
    m_keys = o_keys < num_keys
    p_keys = i_row * num_keys + o_keys
    born = tl.zeros([], tl.int32)
    full = tl.zeros([], tl.int32)
    for first in range(0, i_block, BLOCK):
        o_before = first + tl.arange(0, BLOCK)
        p_before = births_ptr + (i_row * tl.num_programs(1) + o_before) * 2
        born = tl.maximum(born, tl.max(tl.load(p_before, mask=o_before < i_block, other=0), 0))
        full = tl.maximum(full, tl.max(tl.load(p_before + 1, mask=o_before < i_block, other=0), 0))
    b_first_tile = tl.load(first_tile_ptr + p_keys, mask=m_keys, other=0)
    b_first_full = tl.load(full_first_ptr + p_keys, mask=m_keys, other=0)
    b_enters = tl.maximum(tl.associative_scan(b_first_tile, 0, _max), born)
    b_full_first = tl.maximum(tl.associative_scan(b_first_full, 0, _max), full)
    b_dead = tl.maximum(tl.load(dead_from_ptr + p_keys, mask=m_keys, other=0), b_enters)
    b_partly = tl.maximum(tl.load(full_last_ptr + p_keys, mask=m_keys, other=0), b_enters)
    tl.store(enters_run_ptr + p_keys, b_enters, mask=m_keys)
    tl.store(full_first_ptr + p_keys, b_full_first, mask=m_keys)
    tl.store(leaves_run_ptr + p_keys, b_dead, mask=m_keys)
    tl.store(full_last_ptr + p_keys, b_partly, mask=m_keys)
    p_deaths = deaths_ptr + (i_row * tl.num_programs(1) + i_block) * 2
    tl.store(p_deaths, tl.min(tl.where(m_keys, b_dead, NEVER), 0))
    tl.store(p_deaths + 1, tl.min(tl.where(m_keys, b_partly, NEVER), 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _scan_deaths(leaves_run_ptr, full_last_ptr, deaths_ptr, num_keys, num_tiles, BLOCK: tl.constexpr):
    """The earliest deaths among the keys from each one on, in place."""
    i_row = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    num_blocks = tl.num_programs(1)
    o_keys = i_block * BLOCK + tl.arange(0, BLOCK)
    m_keys = o_keys < num_keys
    p_keys = i_row * num_keys + o_keys
    dead = tl.zeros([], tl.int32) + tl.cast(num_tiles, tl.int32)
    partly = dead
    for first in range(i_block + 1, num_blocks, BLOCK):
        o_after = first + tl.arange(0, BLOCK)
        p_after = deaths_ptr + (i_row * num_blocks + o_after) * 2
        dead = tl.minimum(dead, tl.min(tl.load(p_after, mask=o_after < num_blocks, other=NEVER), 0))
        partly = tl.minimum(partly, tl.min(tl.load(p_after + 1, mask=o_after < num_blocks, other=NEVER), 0))
    b_dead = tl.load(leaves_run_ptr + p_keys, mask=m_keys, other=NEVER)
    b_partly = tl.load(full_last_ptr + p_keys, mask=m_keys, other=NEVER)
    b_leaves = tl.minimum(tl.associative_scan(b_dead, 0, _min, reverse=True), dead)
    b_full_last = tl.minimum(tl.associative_scan(b_partly, 0, _min, reverse=True), partly)
    tl.store(leaves_run_ptr + p_keys, b_leaves, mask=m_keys)
    tl.store(full_last_ptr + p_keys, b_full_last, mask=m_keys)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _borders_of_runs(
    enters_run_ptr,
    leaves_run_ptr,
    full_first_ptr,
    full_last_ptr,
    run_begin_ptr,
    full_begin_ptr,
    full_end_ptr,
    run_end_ptr,
    used_ptr,
    num_keys,
    num_tiles,
    tile_rows,
    block,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """The run of each tile of some chunks, the shortest segments that there can be, and whether a chunk's runs are used.

    A mask without holes has runs of at least a tile's rows; shorter ones are what scattered keys leave at the diagonal, not worth
    their partly filled blocks.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_chunks = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    chunk = (tl.cast(num_tiles, tl.int32) + MAX_SEGMENTS - 1) // MAX_SEGMENTS
    b_first = o_chunks * chunk
    b_last = tl.minimum(b_first + chunk, num_tiles)
    enters_run_ptr += i_row * num_keys
    leaves_run_ptr += i_row * num_keys
    full_first_ptr += i_row * num_keys
    full_last_ptr += i_row * num_keys
    b_length = tl.zeros([CHUNKS], tl.int64)
    for first in range(0, chunk, BLOCK):
        o_tiles = b_first[:, None] + first + tl.arange(0, BLOCK)[None, :]
        m_tiles = o_tiles < b_last[:, None]
        b_run_end = _keys_until(enters_run_ptr, o_tiles, m_tiles, num_keys)
        b_run_begin = _keys_until(leaves_run_ptr, o_tiles, m_tiles, num_keys)
        b_length += tl.sum(tl.where(m_tiles, b_run_end - b_run_begin, 0).to(tl.int64), 1)
    b_rows = tl.maximum(b_last - b_first, 0).to(tl.int64) * tile_rows
    m_used = (b_length > 0) & (2 * b_length >= b_rows)
    tl.store(used_ptr + i_row * MAX_SEGMENTS + o_chunks, m_used.to(tl.int32))
    for first in range(0, chunk, BLOCK):
        o_tiles = b_first[:, None] + first + tl.arange(0, BLOCK)[None, :]
        m_tiles = o_tiles < b_last[:, None]
        b_run_end = _keys_until(enters_run_ptr, o_tiles, m_tiles, num_keys)
        b_run_begin = _keys_until(leaves_run_ptr, o_tiles, m_tiles, num_keys)
        b_full_end = _keys_until(full_first_ptr, o_tiles, m_tiles, num_keys)
        b_full_begin = _keys_until(full_last_ptr, o_tiles, m_tiles, num_keys)
        b_whole = tl.maximum(b_full_end - b_full_begin, 0) // block * block
        b_full_begin = tl.where(b_whole > 0, b_full_begin, b_run_end)
        p_tiles = i_row * num_tiles + o_tiles
        tl.store(run_begin_ptr + p_tiles, tl.where(m_used[:, None], b_run_begin, 0), mask=m_tiles)
        tl.store(run_end_ptr + p_tiles, tl.where(m_used[:, None], b_run_end, 0), mask=m_tiles)
        tl.store(full_begin_ptr + p_tiles, tl.where(m_used[:, None], b_full_begin, 0), mask=m_tiles)
        tl.store(full_end_ptr + p_tiles, tl.where(m_used[:, None], b_full_begin + b_whole, 0), mask=m_tiles)


@triton.jit
def _next(b_tile, b_known, m_flag, b_begin, b_end):
    """The first tile at or after each one that lies in a chunk with the flag, if that is before the one known."""
    m_chunk = m_flag[None, :] & (b_end[None, :] > b_tile[:, None])
    b_next = tl.where(m_chunk, tl.maximum(b_tile[:, None], b_begin[None, :]), b_known[:, None])
    return tl.minimum(b_known, tl.min(b_next, 1))


@triton.jit
def _previous_end(b_tile, b_known, m_flag, b_begin, b_end):
    """One more than the last tile before each one that lies in a chunk with the flag, if that is after the one known."""
    m_chunk = m_flag[None, :] & (b_begin[None, :] < b_tile[:, None])
    b_previous = tl.where(m_chunk, tl.minimum(b_tile[:, None], b_end[None, :]), b_known[:, None])
    return tl.maximum(b_known, tl.max(b_previous, 1))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _outside_of_runs(
    first_tile_ptr,
    last_tile_ptr,
    enters_run_ptr,
    leaves_run_ptr,
    run_first_ptr,
    run_last_ptr,
    outside_begin_ptr,
    outside_end_ptr,
    used_ptr,
    used_before_ptr,
    entries_ptr,
    num_keys,
    num_tiles,
    num_blocks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
):
    """Tiles outside the runs in which each key is alive, the smallest interval that holds them (empty: 0, 0); and how many
    entries of lists it would take with segments of each length."""
    i_row = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    tiles = tl.cast(num_tiles, tl.int32)
    chunk = (tiles + MAX_SEGMENTS - 1) // MAX_SEGMENTS
    num_chunks = (tiles + chunk - 1) // chunk
    used_ptr += i_row * MAX_SEGMENTS
    if i_block >= num_blocks:
        o_tiles = tl.cast(i_block - num_blocks, tl.int32) * BLOCK + tl.arange(0, BLOCK)
        b_used_before = tl.zeros([BLOCK], tl.int32)
        for i_chunk in range(num_chunks):
            begin = tl.cast(i_chunk * chunk, tl.int32)
            b_within = tl.minimum(tl.minimum(o_tiles, tiles), begin + chunk) - begin
            b_used_before += tl.maximum(b_within, 0) * tl.load(used_ptr + i_chunk)
        tl.store(used_before_ptr + i_row * (num_tiles + 1) + o_tiles, b_used_before, mask=o_tiles <= num_tiles)
        return

    o_keys = i_block * BLOCK + tl.arange(0, BLOCK)
    m_keys = o_keys < num_keys
    p_keys = i_row * num_keys + o_keys
    b_first = tl.load(first_tile_ptr + p_keys, mask=m_keys, other=0)
    b_last = tl.load(last_tile_ptr + p_keys, mask=m_keys, other=0)
    b_enters = tl.load(enters_run_ptr + p_keys, mask=m_keys, other=0)
    b_leaves = tl.load(leaves_run_ptr + p_keys, mask=m_keys, other=0)
    b_run_first = tl.zeros([BLOCK], tl.int32) + tiles
    b_next_unused = b_run_first
    b_run_last = tl.zeros([BLOCK], tl.int32)
    b_unused_end = b_run_last
    for first in range(0, num_chunks, CHUNKS):
        o_chunks = tl.cast(first, tl.int32) + tl.arange(0, CHUNKS)
        b_chunk_begin = tl.minimum(o_chunks * chunk, tiles)
        b_chunk_end = tl.minimum(b_chunk_begin + chunk, tiles)
        m_used = tl.load(used_ptr + o_chunks) != 0
        b_run_first = _next(b_enters, b_run_first, m_used, b_chunk_begin, b_chunk_end)
        b_run_last = _previous_end(b_leaves, b_run_last, m_used, b_chunk_begin, b_chunk_end)
        b_next_unused = _next(b_first, b_next_unused, ~m_used, b_chunk_begin, b_chunk_end)
        b_unused_end = _previous_end(b_last, b_unused_end, ~m_used, b_chunk_begin, b_chunk_end)
    tl.store(run_first_ptr + p_keys, b_run_first, mask=m_keys)
    tl.store(run_last_ptr + p_keys, b_run_last, mask=m_keys)
    b_begin = tl.where(b_first < b_enters, b_first, tl.minimum(b_next_unused, tl.maximum(b_leaves, b_first)))
    b_before_run = tl.where(b_first < b_enters, tl.minimum(b_last, b_enters), 0)
    b_end = tl.where(b_last > b_leaves, b_last, tl.maximum(b_unused_end, b_before_run))
    m_listed = m_keys & (b_first < b_last) & (b_begin < b_end)
    b_begin = tl.where(m_listed, b_begin, 0)
    b_end = tl.where(m_listed, b_end, 0)
    tl.store(outside_begin_ptr + p_keys, b_begin, mask=m_keys)
    tl.store(outside_end_ptr + p_keys, b_end, mask=m_keys)
    p_entries = entries_ptr + (i_row * num_blocks + i_block) * DOUBLINGS
    for doubling in tl.static_range(DOUBLINGS):
        length = chunk << doubling
        b_entries = tl.where(m_listed, (b_end - 1) // length - b_begin // length + 1, 0)
        tl.store(p_entries + doubling, tl.sum(b_entries, 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _segments(
    first_segment_ptr,
    last_segment_ptr,
    entries_ptr,
    counts_ptr,
    segment_tiles_ptr,
    num_keys,
    num_tiles,
    list_size,
    BLOCK: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The shortest segments whose lists fit (one segment for all tiles always does); each key's, in place of its tiles; and how
    many keys of a block are in each segment's list."""
    i_row = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    num_blocks = tl.num_programs(1)
    tiles = (tl.cast(num_tiles, tl.int32) + MAX_SEGMENTS - 1) // MAX_SEGMENTS
    segment_tiles = tiles << (DOUBLINGS - 1)
    for step in tl.static_range(DOUBLINGS):
        doubling = DOUBLINGS - 1 - step
        total = tl.zeros([], tl.int64)
        for first in range(0, num_blocks, BLOCK):
            o_blocks = first + tl.arange(0, BLOCK)
            p_entries = entries_ptr + (i_row * num_blocks + o_blocks) * DOUBLINGS + doubling
            total += tl.sum(tl.load(p_entries, mask=o_blocks < num_blocks, other=0).to(tl.int64), 0)
        segment_tiles = tl.where(total <= list_size, tiles << doubling, segment_tiles)
    if i_block == 0:
        tl.store(segment_tiles_ptr + i_row, segment_tiles)
    o_keys = i_block * BLOCK + tl.arange(0, BLOCK)
    m_keys = o_keys < num_keys
    p_keys = i_row * num_keys + o_keys
    b_begin = tl.load(first_segment_ptr + p_keys, mask=m_keys, other=0)
    b_end = tl.load(last_segment_ptr + p_keys, mask=m_keys, other=0)
    b_first = b_begin // segment_tiles
    b_last = tl.where(b_end > 0, (b_end - 1) // segment_tiles + 1, 0)
    tl.store(first_segment_ptr + p_keys, b_first, mask=m_keys)
    tl.store(last_segment_ptr + p_keys, b_last, mask=m_keys)
    p_counts = counts_ptr + (i_row * num_blocks + i_block) * MAX_SEGMENTS
    for first in range(0, MAX_SEGMENTS, GROUP):
        o_segments = first + tl.arange(0, GROUP)
        m_in = (b_first[:, None] <= o_segments[None, :]) & (o_segments[None, :] < b_last[:, None])
        tl.store(p_counts + o_segments, tl.sum(m_in.to(tl.int32), 0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _fill_lists(
    start_ptr,
    end_ptr,
    query_index_ptr,
    run_begin_ptr,
    run_end_ptr,
    used_before_ptr,
    first_segment_ptr,
    last_segment_ptr,
    segment_tiles_ptr,
    counts_ptr,
    list_begin_ptr,
    list_full_ptr,
    list_keys_ptr,
    num_queries,
    num_keys,
    num_tiles,
    list_size,
    num_blocks,
    tile_rows,
    BLOCK: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """One program writes the list of one segment: keys for all rows from the front, keys that need a mask from the back."""
    i_segment = tl.program_id(1)
    i_row = tl.program_id(0).to(tl.int64)
    segment_tiles = tl.load(segment_tiles_ptr + i_row)
    if (i_segment > 0) & (i_segment * segment_tiles >= num_tiles):
        return
    o_segments = tl.arange(0, MAX_SEGMENTS)
    b_counts = tl.zeros([MAX_SEGMENTS], tl.int32)
    for i_block in range(num_blocks):
        b_counts += tl.load(counts_ptr + (i_row * num_blocks + i_block) * MAX_SEGMENTS + o_segments)
    begin = tl.sum(tl.where(o_segments < i_segment, b_counts, 0), 0)
    stop = begin + tl.sum(tl.where(o_segments == i_segment, b_counts, 0), 0)
    p_begin = list_begin_ptr + i_row * (MAX_SEGMENTS + 1)
    p_full = list_full_ptr + i_row * MAX_SEGMENTS
    if i_segment == 0:
        tl.store(p_begin, 0)
        tl.store(p_begin + 1 + o_segments, tl.cumsum(b_counts, 0))
        tl.store(p_full + o_segments, 0, mask=b_counts == 0)
    if begin == stop:
        return
    first_tile = i_segment * segment_tiles
    last_tile = tl.minimum(first_tile + segment_tiles, num_tiles) - 1
    p_tile = i_row * num_tiles
    p_rows = query_index_ptr + i_row * num_queries
    low = tl.load(p_rows + first_tile * tile_rows)
    high = tl.load(p_rows + tl.minimum((last_tile + 1) * tile_rows, tl.cast(num_queries, tl.int32)) - 1)
    # The runs of a segment lie between the first one's begin and the last one's end; where one is unused these are 0.
    p_used = used_before_ptr + i_row * (num_tiles + 1)
    has_run = tl.load(p_used + last_tile + 1) > tl.load(p_used + first_tile)
    run_low = tl.load(run_begin_ptr + p_tile + first_tile)
    run_high = tl.where(has_run, tl.cast(num_keys, tl.int32), 0)
    if tl.load(p_used + last_tile + 1) - tl.load(p_used + first_tile) == last_tile + 1 - first_tile:
        run_high = tl.load(run_end_ptr + p_tile + last_tile)
    front = begin
    back = stop
    p_keys = list_keys_ptr + i_row * list_size
    for o_first in range(0, num_keys, BLOCK):
        o_keys = o_first + tl.arange(0, BLOCK)
        m_keys = o_keys < num_keys
        p_key = i_row * num_keys + o_keys
        first = tl.load(first_segment_ptr + p_key, mask=m_keys, other=0)
        last = tl.load(last_segment_ptr + p_key, mask=m_keys, other=0)
        m_listed = (first <= i_segment) & (i_segment < last)
        b_start = tl.load(start_ptr + p_key, mask=m_listed, other=0)
        b_end = tl.load(end_ptr + p_key, mask=m_listed, other=0)
        m_full = m_listed & (b_start <= low) & (b_end > high) & ((o_keys < run_low) | (o_keys >= run_high))
        m_masked = m_listed & ~m_full
        full_before = tl.cumsum(m_full.to(tl.int32), 0)
        masked_before = tl.cumsum(m_masked.to(tl.int32), 0)
        tl.store(p_keys + front + full_before - 1, o_keys, mask=m_full)
        tl.store(p_keys + back - masked_before, o_keys, mask=m_masked)
        front += tl.sum(m_full.to(tl.int32), 0)
        back -= tl.sum(m_masked.to(tl.int32), 0)
    tl.store(p_full + i_segment, front - begin)
