"""The closed form of the four-block cache against the cache itself, and live ranges split at its compactions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rewriter.kernels.live_ranges import FOREVER
from rewriter.kernels.separator_cache import CacheSizes
from rewriter.kernels.separator_cache import separator_cache_ends
from rewriter.kernels.separator_cache import split_by_epoch
from torch import Tensor


def at_once_while_it_can(is_separator: list[bool], sizes: CacheSizes) -> list[list[int]]:
    """What each query sees without a capacity."""
    visible = []
    for query in range(len(is_separator)):
        seen = [j for j in range(query + 1) if j < sizes.initial or query - j < sizes.window]
        past = [j for j in range(sizes.initial, query + 1 - sizes.window) if is_separator[j]]
        visible.append(sorted({*seen, *past[max(0, len(past) - sizes.separators) :]}))
    return visible


SETTINGS = {
    "seed": st.integers(0, 2**31),
    "initial": st.integers(0, 4),
    "separators": st.integers(0, 5),
    "window": st.integers(1, 8),
    "room": st.integers(0, 9),
    "length": st.integers(1, 90),
    "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
}


def ends(separator: Tensor, sizes: CacheSizes) -> tuple[Tensor, Tensor | None, Tensor]:
    length = separator.size(-1)
    index = torch.arange(length, dtype=torch.int32)[None, None]
    origin = torch.zeros(1, 1, 1, dtype=torch.int32)
    now = torch.zeros(1, dtype=torch.int32)
    return (*separator_cache_ends(index, separator[None, None], origin, origin - 1, now, length, sizes), index)


@given(**{**SETTINGS, "lengths": st.lists(st.integers(1, 30), min_size=1, max_size=6), "length": st.just(0)})
def test_packed_documents_are_what_they_are_alone(
    seed: int, initial: int, separators: int, window: int, room: int, lengths: list[int], length: int, density: float
) -> None:
    separator = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) < density
    origin = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)]).to(torch.int32)[None, None]
    index = torch.arange(sum(lengths), dtype=torch.int32)[None, None]
    due, now = torch.full((1, 1, 1), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for capacity in (None, initial + separators + window + room):
        sizes = CacheSizes(initial, separators, window, capacity)
        packed, _ = separator_cache_ends(index, separator[None, None], origin, due, now, sum(lengths), sizes)
        begin = length
        for number in lengths:
            part = slice(begin, begin + number)
            alone, _, _ = ends(separator[part], sizes)
            cut = [end.clamp(max=begin + number) for end in (packed[0, 0, part], alone[0, 0].long() + begin)]
            torch.testing.assert_close(*cut, check_dtype=False)
            begin += number


@given(**SETTINGS)
def test_visible_keys_and_compactions_equal_the_cache(
    cache_itself: Callable[..., Any],
    seed: int,
    initial: int,
    separators: int,
    window: int,
    room: int,
    length: int,
    density: float,
) -> None:
    separator = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < density
    sizes = CacheSizes(initial, separators, window, initial + separators + window + room)
    end, times, index = ends(separator, sizes)
    assert times is not None
    visible, compactions = cache_itself(separator.tolist(), sizes)
    assert [[j for j in range(i + 1) if end[0, 0, j] > i] for i in range(length)] == visible
    assert [t for t in dict.fromkeys(times[0, 0].tolist()) if t < length] == compactions
    now = torch.zeros(1, dtype=torch.int32)
    split = split_by_epoch(index[:, 0], end[:, 0], times[:, 0], now, length, initial + separators + window)
    for query in range(length):
        seen = (split.start[0, 0] <= query) & (query < split.end[0, 0])
        by_place = sorted(zip(split.position[0, seen].tolist(), split.source[0, seen].tolist(), strict=True))
        assert by_place == list(enumerate(visible[query])), "each key once, at its place in the cache"
        assert split.query_position[0, query] == len(visible[query]) - 1


@given(**SETTINGS)
def test_without_a_capacity_a_key_leaves_as_soon_as_it_may(
    seed: int, initial: int, separators: int, window: int, room: int, length: int, density: float
) -> None:
    del room
    separator = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < density
    sizes = CacheSizes(initial, separators, window, None)
    end, times, _ = ends(separator, sizes)
    assert times is None
    visible = [[j for j in range(i + 1) if end[0, 0, j] > i] for i in range(length)]
    assert visible == at_once_while_it_can(separator.tolist(), sizes)


@given(seed=st.integers(0, 2**31), cut=st.integers(1, 39), room=st.integers(0, 6))
def test_going_on_from_the_living_keys_gives_the_same(seed: int, cut: int, room: int) -> None:
    """The rest of a text from the keys that are alive, in slots of which some are empty, and the next compaction."""
    length, sizes = 40, CacheSizes(1, 2, 3, 6 + room)
    separator = torch.rand(length, generator=torch.Generator().manual_seed(seed)) < 0.4
    whole, _, index = ends(separator, sizes)
    before, times, _ = ends(separator[:cut], sizes)
    assert times is not None
    alive = [j for j in range(cut) if before[0, 0, j] > cut]
    empty = 9 - len(alive) if len(alive) < 9 else 0
    slots = torch.tensor([-1] * empty + alive, dtype=torch.int32)
    kept = torch.where(slots < 0, False, separator[slots.clamp(min=0)])
    rest, _ = separator_cache_ends(
        torch.cat((slots, index[0, 0, cut:]))[None, None],
        torch.cat((kept, separator[cut:]))[None, None],
        torch.zeros(1, 1, 1, dtype=torch.int32),
        times[:, :, -1:],
        torch.tensor([cut], dtype=torch.int32),
        length - cut,
        sizes,
    )
    known = torch.cat((before[0, 0, alive], torch.full((length - cut,), FOREVER, dtype=torch.int32)))
    assert torch.equal(torch.minimum(known, rest[0, 0, empty:]), whole[0, 0, [*alive, *range(cut, length)]])


@pytest.mark.parametrize("capacity", [7, None])
def test_operators_pass_opcheck(capacity: int | None) -> None:
    index = torch.arange(12, dtype=torch.int32).repeat(2, 1, 1)
    row = torch.zeros(2, 1, 1, dtype=torch.int32)
    now = torch.zeros(1, dtype=torch.int32)
    arguments = (index, index % 3 == 0, row, row - 1, now, 12, 1, 2, 3, capacity)
    torch.library.opcheck(torch.ops.rewriter.separator_cache_ends_cpu, arguments)
    if capacity is not None:
        end, times = torch.ops.rewriter.separator_cache_ends(*arguments)
        torch.library.opcheck(torch.ops.rewriter.split_by_epoch_cpu, (index[:, 0], end[:, 0], times[:, 0], now, 12, 6))
