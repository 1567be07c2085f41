from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.cpu import schedule
from rewriter.kernels.cpu.schedule import tile_rows
from rewriter.kernels.cpu.schedule import tiles


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 80), st.integers(1, 90), st.integers(1, 40), st.integers(1, 8))
def test_each_tile_lists_each_live_key_once(seed: int, queries: int, keys: int, rows: int, shortest_run: int) -> None:
    random = torch.Generator().manual_seed(seed)
    start = torch.randint(-3, keys + 3, (keys,), generator=random).int()
    end = torch.where(
        torch.rand(keys, generator=random) < 0.3, FOREVER, start + torch.randint(0, keys, (keys,), generator=random)
    ).int()
    index = torch.randperm(queries + 7, generator=random)[:queries].int()
    before = schedule.MIN_RUN
    schedule.MIN_RUN = shortest_run
    try:
        seen = list(tiles(start, end, index, rows))
    finally:
        schedule.MIN_RUN = before
    assert [t.row_begin for t in seen] == list(range(0, queries, rows))
    assert seen[-1].row_end == queries
    for tile in seen:
        q = index[tile.row_begin : tile.row_end, None]
        visible = (start <= q) & (q < end)
        run = list(range(tile.run_begin, tile.run_end))
        listed = run + tile.keys.tolist()
        assert len(set(listed)) == len(listed)
        # The smallest and largest query of a tile stand for all: a key that lives only between two others may be listed.
        between = (start <= q.max()) & (end > q.min()) & (end > start)
        assert (
            set(listed) == set(between.nonzero().flatten().tolist()) >= set(visible.any(0).nonzero().flatten().tolist())
        )
        assert visible[:, run + tile.keys[: tile.num_full].tolist()].all()


def test_a_causal_mask_is_a_run_and_a_diagonal() -> None:
    live = LiveRanges.causal(8192)
    last = list(tiles(live.start[0, 0], live.end[0, 0], torch.arange(8192).int(), 128))[-1]
    assert (last.run_begin, last.run_end) == (0, 8192 - 127)
    assert last.num_full == 0
    assert last.keys.numel() == 127


def test_the_gathered_keys_of_a_dynamic_mask_are_few_more_than_it_keeps() -> None:
    keep, length = 128, 4096
    live = running_topk_ranges(torch.rand(1, 1, length), keep)
    rows = tile_rows(4, length, shared=True)
    counts = [t.num_keys for t in tiles(live.start[0, 0], live.end[0, 0], torch.arange(length).int(), rows)]
    assert max(counts) <= keep + rows - 1
