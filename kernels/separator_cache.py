"""Live ranges of a cache that is compacted when it is full, and whose keys are numbered by their place in it.

A cache of initial keys, separators and a local window keeps what has left the window until it holds `capacity` keys, and
then drops it at once (SepLLM, arXiv 2412.12094, section 4). When that happens depends on the token ids alone: the time of
each compaction follows from the one before, and jumps of 1, 2, 4, ... compactions give all of them in log steps.

Between two compactions, an epoch, the place of a key does not change. Where positions are places, a key whose place
changes is another key for the queries of the next epoch: its live range is split, as a compiler splits that of a
variable which moves to another register.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rewriter.kernels.dispatch import register
from rewriter.kernels.dispatch import runs_triton
from rewriter.kernels.live_ranges import FOREVER
from rewriter.kernels.live_ranges import plus_window
from torch import Tensor

MAX_TRACED_KEYS = 2**20
"""A graph that is traced for any length serves calls of at most so many tokens."""


@dataclass(frozen=True)
class CacheSizes:
    """The four blocks of the cache.

    Attributes:
        initial: first keys of each row, which are never dropped.
        separators: of the separators that have left the window, the newest so many stay.
        window: newest keys that a compaction keeps, the last query's own included.
        capacity: keys at which the cache is compacted, after the query that has seen one more; None to drop each key as soon
            as the other numbers allow it.
    """

    initial: int
    separators: int
    window: int
    capacity: int | None

    @property
    def shortest_epoch(self) -> int:
        """The least number of queries between two compactions."""
        assert self.capacity is not None
        return self.capacity + 1 - self.initial - self.separators - self.window


def separator_cache_ends(
    index: Tensor, is_separator: Tensor, origin: Tensor, due: Tensor, now: Tensor, num_new: int, sizes: CacheSizes
) -> tuple[Tensor, Tensor | None]:
    """The first query that no longer sees each key, and the times of the compactions.

    With j* the s-th separator after j (j itself for an ordinary key), of those that do not count as initial keys:
    end(j) = j* + window without a capacity, else 1 + the first compaction at or after j* + window.

    Args:
        index: int32 `[B, 1, L]`, ascending: the keys that live, then `num_new` new ones. Negative in an empty slot.
        is_separator: bool `[B, 1, L]`; false in an empty slot and for padding.
        origin: int32 `[B, 1, 1]`, the index of each row's first token; or `[B, 1, L]`, that of each key's own document where
            documents are packed in rows: then all keys are new, and the cache of each document begins empty.
        due: int32 `[B, 1, 1]`, the next compaction, at `now` or later; negative before the row's first token.
        now: int32 `[1]`, index of the first new key.

    Returns:
        end: int32 `[B, 1, L]`, `FOREVER` where later keys decide.
        times: int32 `[B, 1, E]`, ascending: the compactions from `due` on, the last at `now + num_new` or later, after
            which that one is repeated; None without a capacity.
    """
    end, times = torch.ops.rewriter.separator_cache_ends(
        index, is_separator, origin, due, now, num_new, sizes.initial, sizes.separators, sizes.window, sizes.capacity
    )
    return end, None if sizes.capacity is None else times


def _ends(
    index: Tensor,
    is_separator: Tensor,
    origin: Tensor,
    due: Tensor,
    now: Tensor,
    num_new: int,
    initial: int,
    separators: int,
    window: int,
    capacity: int | None,
) -> tuple[Tensor, Tensor]:
    if not runs_triton(index):
        return torch.ops.rewriter.separator_cache_ends_cpu(
            index, is_separator, origin, due, now, num_new, initial, separators, window, capacity
        )
    return compute_ends(index, is_separator, origin, due, now, num_new, initial, separators, window, capacity)


def compute_ends(
    index: Tensor,
    is_separator: Tensor,
    origin: Tensor,
    due: Tensor,
    now: Tensor,
    num_new: int,
    initial: int,
    separators: int,
    window: int,
    capacity: int | None,
) -> tuple[Tensor, Tensor]:
    sizes = CacheSizes(initial, separators, window, capacity)
    length = index.size(-1)
    counts = is_separator & (index >= origin + sizes.initial)
    rank = counts.to(torch.int32).cumsum(dim=-1, dtype=torch.int32)  # of each separator, from 1 on
    # The index of the r-th separator, for every r; FOREVER where there is none yet.
    by_rank = index.new_full((*index.shape[:2], length + 1), FOREVER)
    by_rank = by_rank.scatter(-1, torch.where(counts, rank - 1, length).long(), torch.where(counts, index, FOREVER))
    ahead = rank - 1 + min(sizes.separators, MAX_TRACED_KEYS)
    after = by_rank.gather(-1, torch.where(counts & (ahead < length), ahead, length).long())
    after = torch.where(ahead < length, after, FOREVER)
    last = torch.where(counts, after, index)
    leaves = torch.where(last == FOREVER, FOREVER, plus_window(last, sizes.window))
    is_initial = (index >= origin) & (index < origin + sizes.initial)
    if sizes.capacity is None:
        return torch.where(is_initial, FOREVER, leaves), torch.empty_like(due.expand(index.size(0), 1, 1)[..., :0])
    times = _compaction_times(index, rank, origin, due, now, num_new, sizes)
    at = torch.searchsorted(times, leaves)
    known = at < times.size(-1)
    dropped = times.gather(-1, at.clamp(max=times.size(-1) - 1)) + 1
    return torch.where(is_initial | ~known | (leaves == FOREVER), FOREVER, dropped), times


def _ends_fake(
    index: Tensor,
    is_separator: Tensor,
    origin: Tensor,
    due: Tensor,
    now: Tensor,
    num_new: int,
    initial: int,
    separators: int,
    window: int,
    capacity: int | None,
) -> tuple[Tensor, Tensor]:
    shortest = CacheSizes(initial, separators, window, capacity).shortest_epoch if capacity is not None else 1
    times = (num_new if origin.size(-1) > 1 else num_new // shortest) + 2 if capacity is not None else 0
    return torch.empty_like(index), index.new_empty(index.size(0), 1, times)


def _compaction_times(
    index: Tensor, rank: Tensor, origin: Tensor, due: Tensor, now: Tensor, num_new: int, sizes: CacheSizes
) -> Tensor:
    """t_{m+1} = t_m + (capacity + 1 - initial - window - k_m), k_m the separators kept at t_m."""
    assert sizes.capacity is not None
    stop = now + num_new
    query = now + torch.arange(num_new, dtype=torch.int32, device=index.device)
    # Separators that have left the window of each query, as far as the cache still holds them.
    left = torch.searchsorted(index, (query - sizes.window).expand(*index.shape[:2], -1).contiguous(), right=True)
    before = torch.nn.functional.pad(rank, (1, 0))
    passed = before.gather(-1, left)
    free = sizes.capacity + 1 - sizes.initial - sizes.window
    packed = origin.size(-1) > 1
    if packed:  # those of the query's own document
        passed = (passed - before.gather(-1, origin.clamp(0, num_new).long())).clamp(min=0)
    jump = query + (free - passed.clamp(max=sizes.separators))
    if packed:
        # At a document's first query nothing is old enough to be dropped: a compaction there does no harm, and the next is when
        # the cache of this document is full for the first time.
        begins = origin == query
        jump = torch.where(begins, query + sizes.capacity, jump)
        later = torch.where(begins, query, FOREVER)[..., 1:].flip(-1).cummin(dim=-1).values.flip(-1)
        jump = torch.minimum(jump, torch.nn.functional.pad(later, (0, 1), value=FOREVER)).to(torch.int32)
        first = origin[..., :1]
    else:
        # A row whose first token is among the new ones is compacted for the first time when it has `capacity` keys.
        first = torch.where(due < 0, origin + sizes.capacity, due)
    most = num_new if packed else num_new // sizes.shortest_epoch
    number = torch.arange(most + 2, dtype=torch.int32, device=index.device)
    times = first.expand(*first.shape[:2], number.size(0))

    def jumped(time: Tensor) -> Tensor:
        inside = time < stop
        return torch.where(inside, jump.gather(-1, torch.where(inside, time - now, 0).long()), time)

    for bit in range(_num_bits(num_new)):
        times = torch.where((number >> bit) & 1 == 1, jumped(times), times)
        jump = jumped(jump)
    return times.contiguous()


def _num_bits(num_new: int) -> int:
    """Bits of the number of a compaction. While a graph is traced for any length: enough for `MAX_TRACED_KEYS` tokens."""
    if num_new == 1:
        return 2
    if isinstance(num_new, int) and not torch.compiler.is_compiling():
        return (num_new + 1).bit_length()
    torch._check(num_new <= MAX_TRACED_KEYS)
    return MAX_TRACED_KEYS.bit_length()


@dataclass(frozen=True)
class SplitRanges:
    """Keys by epoch: one entry for each epoch that a key lives in. N entries, some of them empty.

    Attributes:
        source: int64 `[B, N]`, which key an entry is, a place in the list that was split.
        position: int64 `[B, N]`, its place among the keys of its epoch.
        start, end: int32 `[B, 1, N]`, the queries that see it; an empty entry's end is 0.
        query_position: int64 `[B, num_new]`, the places of the new keys when they come.
    """

    source: Tensor
    position: Tensor
    start: Tensor
    end: Tensor
    query_position: Tensor


def split_by_epoch(
    index: Tensor, end: Tensor, times: Tensor, now: Tensor, num_new: int, most_carried: int
) -> SplitRanges:
    """Splits live ranges at the compactions.

    Args:
        index: int32 `[B, L]`, ascending: the keys that live at `now`, then `num_new` new ones; negative in an empty slot.
        end: int32 `[B, L]`; at most `index`, or `now`, where a key is never seen from now on.
        times: int32 `[B, E]`, from `separator_cache_ends`.
        most_carried: no compaction keeps more keys than this.
    """
    parts = torch.ops.rewriter.split_by_epoch(index, end, times, now, num_new, most_carried)
    return SplitRanges(*parts)


def _split(
    index: Tensor, end: Tensor, times: Tensor, now: Tensor, num_new: int, most_carried: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not runs_triton(index):
        return torch.ops.rewriter.split_by_epoch_cpu(index, end, times, now, num_new, most_carried)
    return compute_split(index, end, times, now, num_new, most_carried)


def compute_split(
    index: Tensor, end: Tensor, times: Tensor, now: Tensor, num_new: int, most_carried: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_keys = index.size(1)
    stop = now + num_new
    first_query = torch.maximum(index, now)
    seen = end > first_query
    first = torch.searchsorted(times, first_query)
    last = torch.searchsorted(times, torch.minimum(end, stop) - 1)
    epochs = torch.where(seen, last - first + 1, 0)
    upto = epochs.cumsum(dim=1)
    number = torch.arange(num_keys + times.size(1) * most_carried, device=index.device).expand(index.size(0), -1)
    source = torch.searchsorted(upto, number.contiguous(), right=True).clamp(max=num_keys - 1)
    used = number < upto[:, -1:]
    epoch = (first - upto + epochs).gather(1, source) + number
    # In the order of (epoch, key), the place within an epoch is a difference of two numbers.
    order = torch.where(used, epoch, times.size(1) + 1).argsort(dim=1, stable=True)
    source, epoch, used = (t.gather(1, order) for t in (source, epoch, used))
    position = number - torch.searchsorted(torch.where(used, epoch, times.size(1) + 1), epoch.contiguous())
    position = torch.where(used, position, 0)
    bounds = torch.nn.functional.pad(times, (1, 0), value=-1)
    begins, ends = (bounds.gather(1, (epoch + i).clamp(0, times.size(1))) + 1 for i in (0, 1))
    own_start, own_end = (t.gather(1, source) for t in (index, end))
    start = torch.maximum(own_start, begins)
    end = torch.where(used, torch.minimum(own_end, ends), 0)
    # A new key's own query comes at the first of its entries.
    born = used & (epoch == first.gather(1, source)) & (source >= num_keys - num_new)
    target = torch.where(born, source - (num_keys - num_new), num_new)
    query_position = position.new_zeros(index.size(0), num_new + 1).scatter(1, target, position)[:, :-1].contiguous()
    return source, position, start[:, None].to(torch.int32), end[:, None].to(torch.int32), query_position


def _split_fake(
    index: Tensor, end: Tensor, times: Tensor, now: Tensor, num_new: int, most_carried: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_batch, num_entries = index.size(0), index.size(1) + times.size(1) * most_carried
    place = index.new_empty(num_batch, num_entries, dtype=torch.int64)
    bound = index.new_empty(num_batch, 1, num_entries)
    own = index.new_empty(num_batch, num_new, dtype=torch.int64)
    return place, torch.empty_like(place), bound, torch.empty_like(bound), own


for _name, _function, _inner, _fake in (
    ("separator_cache_ends", _ends, compute_ends, _ends_fake),
    ("split_by_epoch", _split, compute_split, _split_fake),
):
    register(f"rewriter::{_name}", _function).register_fake(_fake)
    # One opaque operator on the CPU: a compiler would unroll the jumps into C++.
    torch.library.custom_op(f"rewriter::{_name}_cpu", _inner, mutates_args=()).register_fake(_fake)
