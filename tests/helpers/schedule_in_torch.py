"""The schedule of the Triton kernels in PyTorch's operators, as plain as its definition: what the kernels' is compared with."""

from __future__ import annotations

import torch
from rewriter.kernels.gpu.schedule import MAX_SEGMENTS
from rewriter.kernels.gpu.schedule import Schedule
from torch import Tensor


def schedule_in_torch(
    start: Tensor, end: Tensor, query_index: Tensor, tile_rows: int, block: int, capacity: int
) -> Schedule:
    """All of a schedule but its lists' keys, in PyTorch's operators.

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
    return Schedule(
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


def _ranks(sorted_values: Tensor, wanted: Tensor) -> Tensor:
    """`[..., K]`: how many of the values `[..., T]`, which ascend along the last dimension, are less than each wanted one."""
    return torch.searchsorted(sorted_values.contiguous(), wanted.contiguous(), right=False).to(torch.int32)


def _ranks_of_places(sorted_values: Tensor, num_places: int) -> Tensor:
    """`[..., num_places]`: how many of the values `[..., T]` are at most 0, 1, ..."""
    places = torch.arange(num_places, dtype=torch.int32).expand(*sorted_values.shape[:-1], num_places)
    return torch.searchsorted(sorted_values.contiguous(), places.contiguous(), right=True).to(torch.int32)


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
