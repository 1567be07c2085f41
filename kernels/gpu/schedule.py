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

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from rewriter.kernels.gpu.launch import UNSPECIALIZED
from rewriter.kernels.gpu.launch import launch
from torch import Tensor

MAX_SEGMENTS = 64

FORWARD_CAPACITY = 8
"""Room for indices is cheap: 32 bytes per key and KV head."""

BACKWARD_CAPACITY = 2
"""Each entry of a backward list has a row of partial gradients, of a key's size in fp32."""


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


def build(start: Tensor, end: Tensor, query_index: Tensor, tile_rows: int, block: int, capacity: int) -> Schedule:
    """The schedule of live ranges.

    Args:
        start, end: int32 `[B|1, Hkv|1, K]`, K at least 1.
        query_index: int32 `[B|1, Q]`, ascending along each row, Q at least 1.
        tile_rows: query rows of a tile.
        block: keys of a block of the attention kernel.
        capacity: entries of a row's lists, in multiples of K.
    """
    num_keys, num_queries = start.size(2), query_index.size(1)
    num_tiles = -(-num_queries // tile_rows)
    rows = (max(start.size(0), end.size(0), query_index.size(0)), max(start.size(1), end.size(1)))
    start, end = (t.expand(*rows, num_keys).contiguous() for t in (start, end))
    query_index = query_index[:, None, :].expand(*rows, num_queries).contiguous()
    device = start.device
    tile = torch.arange(num_tiles, device=device, dtype=torch.int32)
    key = torch.arange(num_keys, device=device, dtype=torch.int32).expand_as(start)
    low = query_index[:, :, ::tile_rows].contiguous()
    high = query_index[:, :, ((tile + 1) * tile_rows).clamp(max=num_queries) - 1].contiguous()

    # Tiles in which each key is alive. A key that never lives is dead from the first tile on.
    never = end <= start
    sorted_values, wanted = torch.stack((high, low, low, high)), torch.stack((start, start, end, end))
    first_tile, first_full_tile, dead_from, partly_dead_from = _ranks(sorted_values, wanted).unbind()
    dead_from, partly_dead_from = torch.where(never, 0, dead_from), torch.where(never, 0, partly_dead_from)
    last_tile = dead_from

    # The run ends where a key has not started yet and begins after the last key that is dead: both ascend with the tile.
    run_end = _first_unborn(first_tile, key, num_tiles)
    enters_run = _ranks_of_places(run_end, num_keys)
    run_begin = _last_killed(torch.maximum(dead_from, enters_run), key, num_tiles)
    full_end = _first_unborn(first_full_tile, key, num_tiles)
    full_begin = _last_killed(torch.maximum(partly_dead_from, enters_run), key, num_tiles)
    borders = torch.stack((run_begin, full_end, full_begin))
    leaves_run, full_first, full_last = _ranks_of_places(borders, num_keys).unbind()

    # Runs are used or not by chunks, the shortest segments that there can be. A mask without holes has runs of at least a
    # tile's rows; shorter ones are what scattered keys leave at the diagonal, not worth their partly filled blocks.
    chunk = -(-num_tiles // MAX_SEGMENTS)
    border = (torch.arange(MAX_SEGMENTS + 1, device=device) * chunk).clamp(max=num_tiles)
    length = torch.nn.functional.pad((run_end - run_begin).cumsum(dim=2), (1, 0))[:, :, border].diff(dim=2)
    used = (length > 0) & (2 * length >= tile_rows * border.diff())
    used = used[:, :, tile // chunk]
    whole_blocks = (full_end - full_begin).clamp(min=0) // block * block
    full_begin = torch.where(used, torch.where(whole_blocks > 0, full_begin, run_end), 0)
    run_begin, run_end = torch.where(used, run_begin, 0), torch.where(used, run_end, 0)
    full_end = torch.where(used, full_begin + whole_blocks, 0)
    used_before = torch.nn.functional.pad(used.cumsum(dim=2, dtype=torch.int32), (1, 0))
    run_first = _next(used, tile).gather(2, enters_run.long()).to(torch.int32)
    run_last = _previous_end(used, tile).gather(2, leaves_run.long()).to(torch.int32)

    # Tiles outside the runs in which a key is alive; the smallest interval that holds them.
    next_unused, unused_end = _next(~used, tile), _previous_end(~used, tile)
    alive = first_tile < last_tile
    outside_begin = torch.where(
        first_tile < enters_run,
        first_tile,
        torch.minimum(next_unused.gather(2, first_tile.long()), torch.maximum(leaves_run, first_tile)),
    )
    outside_end = torch.where(
        last_tile > leaves_run,
        last_tile,
        torch.maximum(
            unused_end.gather(2, last_tile.long()),
            torch.where(first_tile < enters_run, torch.minimum(last_tile, enters_run), 0),
        ),
    )
    listed = alive & (outside_begin < outside_end)

    # The shortest segments whose lists fit; one segment for all tiles always does.
    segment_tiles = torch.zeros(rows, dtype=torch.int32, device=device)
    for doubling in reversed(range(MAX_SEGMENTS.bit_length())):
        tiles_of_segment = chunk << doubling
        entries = (outside_end - 1) // tiles_of_segment - outside_begin // tiles_of_segment + 1
        fits = torch.where(listed, entries, 0).sum(dim=2) <= capacity * num_keys
        segment_tiles = torch.where(fits, tiles_of_segment, segment_tiles)
    first_segment = torch.where(listed, outside_begin // segment_tiles[:, :, None], 0)
    last_segment = torch.where(listed, (outside_end - 1) // segment_tiles[:, :, None] + 1, 0)
    change = torch.zeros(*rows, MAX_SEGMENTS + 1, dtype=torch.int32, device=device)
    change = change.scatter_add(2, first_segment.long(), listed.to(torch.int32))
    change = change.scatter_add(2, last_segment.long(), -listed.to(torch.int32))
    counts = change.cumsum(dim=2, dtype=torch.int32)[:, :, :MAX_SEGMENTS]
    list_begin = torch.nn.functional.pad(counts.cumsum(dim=2, dtype=torch.int32), (1, 0)).contiguous()

    list_full = torch.zeros(*rows, MAX_SEGMENTS, dtype=torch.int32, device=device)
    list_keys = torch.empty(*rows, capacity * num_keys, dtype=torch.int32, device=device)
    schedule = Schedule(
        start,
        end,
        query_index,
        tile_rows,
        run_begin.contiguous(),
        full_begin.contiguous(),
        full_end.contiguous(),
        run_end.contiguous(),
        segment_tiles,
        list_begin,
        list_full,
        list_keys,
        first_segment.to(torch.int32).contiguous(),
        last_segment.to(torch.int32).contiguous(),
        first_tile,
        last_tile,
        run_first,
        run_last,
        full_first,
        full_last,
        used_before.contiguous(),
    )
    launch(_fill_lists, (rows[0] * rows[1], MAX_SEGMENTS))(
        start,
        end,
        low,
        high,
        schedule.run_begin,
        schedule.run_end,
        schedule.used_before,
        schedule.first_segment,
        schedule.last_segment,
        segment_tiles,
        list_begin,
        list_full,
        list_keys,
        num_keys,
        num_tiles,
        capacity * num_keys,
        BLOCK=1024,
        MAX_SEGMENTS=MAX_SEGMENTS,
        num_warps=4,
    )
    return schedule


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


def _ranks(sorted_values: Tensor, wanted: Tensor) -> Tensor:
    """`[..., K]`: how many of the values `[..., T]`, which ascend along the last dimension, are less than each wanted one."""
    ranks = torch.empty_like(wanted)
    _launch_ranks(sorted_values, wanted, ranks, places=False)
    return ranks


def _ranks_of_places(sorted_values: Tensor, num_places: int) -> Tensor:
    """`[..., num_places]`: how many of the values `[..., T]` are at most 0, 1, ..."""
    ranks = sorted_values.new_empty(*sorted_values.shape[:-1], num_places)
    _launch_ranks(sorted_values, sorted_values, ranks, places=True)
    return ranks


def _launch_ranks(sorted_values: Tensor, wanted: Tensor, ranks: Tensor, *, places: bool) -> None:
    num_places, block = ranks.size(-1), 1024
    launch(_count_below, (ranks.numel() // num_places, -(-num_places // block)))(
        sorted_values.contiguous(),
        wanted,
        ranks,
        sorted_values.size(-1),
        num_places,
        PLACES=places,
        BLOCK=block,
        num_warps=4,
    )


def _first_unborn(tile: Tensor, key: Tensor, num_tiles: int) -> Tensor:
    """For each tile, the first key that starts only in a later one; the number of keys where none does. `[Rb, Rh, tiles]`."""
    unborn = torch.full((*key.shape[:2], num_tiles + 1), key.size(2), dtype=torch.int32, device=key.device)
    unborn = unborn.scatter_reduce(2, tile.long(), key, "amin")
    return unborn[:, :, 1:].flip(2).cummin(dim=2).values.flip(2)


def _last_killed(tile: Tensor, key: Tensor, num_tiles: int) -> Tensor:
    """For each tile, one more than the last key that ends the run from `tile` on. `[Rb, Rh, tiles]`."""
    killed = torch.zeros(*key.shape[:2], num_tiles + 1, dtype=torch.int32, device=key.device)
    killed = killed.scatter_reduce(2, tile.long(), key + 1, "amax")
    return killed[:, :, :num_tiles].cummax(dim=2).values


def _next(flag: Tensor, tile: Tensor) -> Tensor:
    """The first tile at or after each of `0 .. tiles` that has the flag; the number of tiles where none has."""
    position = torch.nn.functional.pad(torch.where(flag, tile, flag.size(2)), (0, 1), value=flag.size(2))
    return position.flip(2).cummin(dim=2).values.flip(2).to(torch.int32)


def _previous_end(flag: Tensor, tile: Tensor) -> Tensor:
    """One more than the last tile before each of `0 .. tiles` that has the flag; 0 where none has."""
    return torch.nn.functional.pad(torch.where(flag, tile + 1, 0).cummax(dim=2).values, (1, 0)).to(torch.int32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _count_below(sorted_ptr, wanted_ptr, ranks_ptr, num_sorted, num_places, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    """By bisection, as `torch.searchsorted`, which Inductor (torch 2.11) turns into code that does not compile here."""
    i_row = tl.program_id(0).to(tl.int64)
    o_places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_places = o_places < num_places
    b_wanted = o_places
    if not PLACES:
        b_wanted = tl.load(wanted_ptr + i_row * num_places + o_places, mask=m_places, other=0)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + tl.cast(num_sorted, tl.int32)
    candidates = tl.cast(num_sorted, tl.int32) + 1
    while candidates > 1:
        middle = (low + high) // 2
        m_open = m_places & (low < high)
        b_value = tl.load(sorted_ptr + i_row * num_sorted + middle, mask=m_open, other=0)
        m_above = (b_value <= b_wanted) if PLACES else (b_value < b_wanted)
        low = tl.where(m_open & m_above, middle + 1, low)
        high = tl.where(m_open & ~m_above, middle, high)
        candidates = (candidates + 1) // 2
    tl.store(ranks_ptr + i_row * num_places + o_places, low, mask=m_places)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _fill_lists(
    start_ptr,
    end_ptr,
    low_ptr,
    high_ptr,
    run_begin_ptr,
    run_end_ptr,
    used_before_ptr,
    first_segment_ptr,
    last_segment_ptr,
    segment_tiles_ptr,
    list_begin_ptr,
    list_full_ptr,
    list_keys_ptr,
    num_keys,
    num_tiles,
    list_size,
    BLOCK: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """One program writes the list of one segment: keys for all rows from the front, keys that need a mask from the back."""
    i_segment = tl.program_id(1)
    i_row = tl.program_id(0).to(tl.int64)
    segment_tiles = tl.load(segment_tiles_ptr + i_row)
    begin = tl.load(list_begin_ptr + i_row * (MAX_SEGMENTS + 1) + i_segment)
    stop = tl.load(list_begin_ptr + i_row * (MAX_SEGMENTS + 1) + i_segment + 1)
    if begin == stop:
        return
    first_tile = i_segment * segment_tiles
    last_tile = tl.minimum(first_tile + segment_tiles, num_tiles) - 1
    p_tile = i_row * num_tiles
    low = tl.load(low_ptr + p_tile + first_tile)
    high = tl.load(high_ptr + p_tile + last_tile)
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
    tl.store(list_full_ptr + i_row * MAX_SEGMENTS + i_segment, front - begin)
