"""The schedule of the Triton kernels: every visible pair once, in room that does not depend on the ranges."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from rewriter.kernels import LiveRanges
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.dispatch import INTERPRETED
from rewriter.kernels.gpu import schedule
from rewriter.kernels.gpu.schedule import MAX_SEGMENTS
from rewriter.kernels.gpu.schedule import Schedule
from rewriter.kernels.gpu.schedule import backward_pairs
from rewriter.kernels.gpu.schedule import build
from rewriter.kernels.gpu.schedule import forward_keys
from schedule_in_torch import schedule_in_torch

from rewriter.testing import Case
from rewriter.testing import live_ranges

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="lists are filled by a Triton kernel: set TRITON_INTERPRET=1"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def keys_of_tile(s: Schedule, tile: int) -> tuple[set[int], set[int], set[int]]:
    """The run, the keys of the run that need no mask, and the list without the run."""
    at = (0, 0)
    run = set(range(int(s.run_begin[at][tile]), int(s.run_end[at][tile])))
    full = set(range(int(s.full_begin[at][tile]), int(s.full_end[at][tile])))
    segment = tile // int(s.segment_tiles[at])
    begin, end = s.list_begin[at][segment : segment + 2].tolist()
    listed = s.list_keys[at][begin:end].tolist()
    assert len(set(listed)) == len(listed)
    in_full_part = set(listed[: int(s.list_full[at][segment])])
    assert not in_full_part & run
    return run, full | in_full_part, set(listed) - run


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), live_ranges(n))),
    st.integers(0, 2**16),
    st.integers(1, 300),
    st.sampled_from([1, 3, 8, 40]),
    st.sampled_from([2, 16]),
    st.sampled_from([1, 2, 8]),
)
def test_each_visible_key_is_in_the_run_or_in_the_list(
    keys_and_ranges: tuple[int, object],
    seed: int,
    queries: int,
    tile_rows: int,
    block: int,
    capacity: int,
) -> None:
    num_keys, ranges = keys_and_ranges
    live = Case(seed=seed, keys=num_keys, ranges=ranges).live()  # type: ignore[arg-type]
    index = torch.randint(-2, num_keys + 2, (1, queries), generator=torch.Generator().manual_seed(seed)).int()
    index = index.sort(dim=1).values
    s = build(live.start.to(DEVICE), live.end.to(DEVICE), index.to(DEVICE), tile_rows, block, capacity)
    visible = live.visible(index)[0, 0]
    assert int(s.list_begin[0, 0, -1]) <= capacity * num_keys
    for tile in range(s.num_tiles):
        rows = visible[tile * tile_rows : (tile + 1) * tile_rows]
        run, unmasked, listed = keys_of_tile(s, tile)
        assert set(rows.any(0).nonzero().flatten().tolist()) <= run | listed
        assert rows[:, sorted(unmasked)].all()
        assert int(s.full_end[0, 0, tile] - s.full_begin[0, 0, tile]) % block == 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 120).flatmap(lambda n: st.tuples(st.just(n), live_ranges(n))),
    st.integers(0, 2**16),
    st.integers(1, 300),
    st.sampled_from([1, 3, 8, 40]),
    st.sampled_from([2, 16]),
    st.sampled_from([1, 2, 8]),
)
def test_the_kernels_make_what_its_definition_says(
    keys_and_ranges: tuple[int, object], seed: int, queries: int, tile_rows: int, block: int, capacity: int
) -> None:
    num_keys, ranges = keys_and_ranges
    live = Case(seed=seed, keys=num_keys, ranges=ranges, kv_heads=2).live()  # type: ignore[arg-type]
    index = torch.randint(-2, num_keys + 2, (2, queries), generator=torch.Generator().manual_seed(seed)).int()
    index = index.sort(dim=1).values
    wanted = schedule_in_torch(live.start, live.end, index, tile_rows, block, capacity)
    made = build(live.start.to(DEVICE), live.end.to(DEVICE), index.to(DEVICE), tile_rows, block, capacity)
    for field in fields(Schedule):
        if field.name not in ("tile_rows", "list_keys", "list_full"):
            own, expected = getattr(made, field.name).cpu(), getattr(wanted, field.name)
            assert own.dtype == torch.int32 and torch.equal(own, expected.int()), field.name


def test_a_causal_mask_has_no_lists() -> None:
    live = LiveRanges.causal(2048, device=DEVICE)
    s = build(live.start, live.end, torch.arange(2048, device=DEVICE)[None].int(), 32, 64, 2)
    assert int(s.list_begin[0, 0, -1]) == 0
    assert (s.full_end - s.full_begin)[0, 0].tolist() == [(32 * t + 1) // 64 * 64 for t in range(64)]
    assert s.run_begin[0, 0].tolist() == [0] * 64
    assert s.run_end[0, 0].tolist() == [32 * t + 32 for t in range(64)]


def test_a_sliding_window_lists_its_sinks_only() -> None:
    live = LiveRanges.sliding_window(4096, 512, sinks=4, device=DEVICE)
    s = build(live.start, live.end, torch.arange(4096, device=DEVICE)[None].int(), 32, 64, 2)
    assert set(s.list_keys[0, 0, : int(s.list_begin[0, 0, -1])].tolist()) == {0, 1, 2, 3}
    assert int((s.run_end - s.run_begin)[0, 0, 20:].max()) == 512 + 31


@pytest.mark.parametrize("keep", [512, 1024])
def test_a_dynamic_mask_computes_little_more_than_is_visible(keep: int) -> None:
    """Forward at most 1.2, backward at most 1.5, from eight times the keys kept on."""
    length = 8 * keep
    live = running_topk_ranges(torch.randn(1, 1, length, generator=torch.Generator().manual_seed(0)), keep)
    index = torch.arange(length, dtype=torch.int32)[None]
    pairs = live.live_pairs()
    start, end, index = (t.to(DEVICE) for t in (live.start, live.end, index))
    forward = build(start, end, index, 32, 64, schedule.FORWARD_CAPACITY)
    assert int(forward_keys(forward, 64).sum()) * 32 / pairs <= 1.2
    backward = build(start, end, index, 16, 64, schedule.BACKWARD_CAPACITY)
    assert backward_pairs(backward, 64) / pairs <= 1.5


def test_lists_that_would_not_fit_take_longer_segments() -> None:
    length = 512
    live = running_topk_ranges(torch.rand(1, 1, length), 128)
    index = torch.arange(length, dtype=torch.int32)[None]
    tiles = []
    for capacity in (1, 2, 8):
        s = build(live.start.to(DEVICE), live.end.to(DEVICE), index.to(DEVICE), 4, 16, capacity)
        assert s.list_keys.size(2) == capacity * length
        tiles.append(int(s.segment_tiles[0, 0]))
    assert tiles[0] > tiles[1] > tiles[2] >= -(-s.num_tiles // MAX_SEGMENTS)
