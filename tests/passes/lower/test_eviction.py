"""Tables of slots against a plain model of them, lists of keys with their ends: who lives, where, and what is lost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from rewriter.kernels import FOREVER
from rewriter.passes.lower.cache_layout import FREE
from rewriter.passes.lower.cache_layout import StateTensor
from rewriter.passes.lower.cache_layout import TableLayout
from rewriter.passes.lower.eviction import Extend
from rewriter.passes.lower.eviction import StoreDecode
from rewriter.passes.lower.eviction import StorePrefill
from rewriter.passes.policy import NO_TOKEN
from torch import Tensor

from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.policies.ranges import policy_ranges

BATCH, HEADS = 2, 2


def layout_of(policy: Any, *, heads: int = HEADS, bias: bool = False, limit: bool = False) -> TableLayout:
    each_key = ("B", heads, "C")
    state = [
        StateTensor("length", (1,), torch.int32, 0),
        StateTensor("forgotten", (1,), torch.int32, 0),
        StateTensor("lost", (1,), torch.int32, 0),
        StateTensor("origin", ("B", 1, 1), torch.int32, NO_TOKEN),
        StateTensor("index", each_key, torch.int32, FREE),
        StateTensor("end", each_key, torch.int32, 0),
        *([StateTensor("limit", each_key, torch.int32, 0)] if limit else []),
        *([StateTensor("bias", each_key, torch.float32, 0)] if bias else []),
        *([StateTensor("position", each_key, torch.int64, 0)] if policy.positions == "cache" else []),
        *(StateTensor(f"slot.{name}", each_key, dtype, 0) for name, dtype in policy.slot_fields.items()),
        *(StateTensor(f"row.{name}", ("B", 1, 1), dtype, -1) for name, dtype in policy.row_fields.items()),
    ]
    return TableLayout(policy, None, (0,), tuple(state))


class Cache:
    """A table and the keys and values of one site. What a key or value holds is its index in the text, and half of it."""

    def __init__(self, layout: TableLayout, capacity: int) -> None:
        self.layout, self.capacity = layout, capacity
        self.table = {s.name: s.make(BATCH, capacity, "cpu") for s in layout.state}
        self.keys, self.values = (torch.full((BATCH, HEADS, capacity, 1), -7.0) for _ in range(2))

    @property
    def length(self) -> int:
        return int(self.table["length"])

    def extend(self, ends: Tensor, ids: Tensor | None = None) -> list[list[list[list[int]]]]:
        """Takes new keys with the model's own ends int32 `[B, H|1, n]`; of each row, head and query the keys it sees."""
        num_new, decode = ends.size(2), ends.size(2) == 1
        index = self.length + torch.arange(num_new, dtype=torch.int32)[None, None]
        key = index[..., None].expand(BATCH, HEADS, -1, 1).float()
        value = key / 2
        given = {"query": key, "key": key, "value": value, "start": index.expand(ends.shape), "limit": ends}
        given |= {"segment": torch.ones_like(ends), "index": index}
        if "bias" in self.table:
            given["bias"] = index * 0.25
        if ids is not None:
            given["input_ids"] = ids
        module = Extend(self.layout, decode, tuple(given), tuple(self.table))
        shared = dict(zip(module.shared, module(*given.values(), *self.table.values()), strict=True))
        if decode:
            keys, values = StoreDecode()(key, value, self.keys, self.values, shared["slot"], shared["seen"])
        else:
            source = [shared["source"]] if "source" in shared else []
            keys, values = StorePrefill()(key, value, self.keys, self.values, shared["chosen"], *source)
        assert shared["query_index"].tolist() == index[0, 0].tolist()
        start, end = (shared[n].expand(BATCH, HEADS, keys.size(2)) for n in ("start", "end"))
        shown = (start[..., None] <= index[0, 0]) & (index[0, 0] < end[..., None])
        return [
            [
                [self._seen(shared, keys, values, (b, h), shown[b, h, :, row], row) for row in range(num_new)]
                for h in range(HEADS)
            ]
            for b in range(BATCH)
        ]

    def _seen(
        self, shared: dict[str, Tensor], keys: Tensor, values: Tensor, at: tuple[int, int], shown: Tensor, row: int
    ) -> list[int]:
        """The keys that a query sees; beside them stand their values, biases and places."""
        chosen = keys[at][shown, 0]
        assert torch.equal(values[at][shown, 0], chosen / 2)
        if "bias" in shared:
            bias = shared["bias"].expand(*keys.shape[:2], -1)[at]
            assert torch.equal(bias[shown], chosen * 0.25)
        if "place" in shared:
            place = shared["place"][at[0]][shown]
            order = place.argsort()
            assert place[order].tolist() == list(range(len(order))), "places are counted without a gap"
            assert torch.equal(chosen[order], chosen.sort().values), "in the order of the text"
            assert int(shared["own_place"][at[0]][row]) == len(order) - 1
        return sorted(map(int, chosen.tolist()))

    def alive(self) -> list[list[dict[int, int]]]:
        """Of each row and head the living keys and their ends; in the slots are their own keys and values."""
        index, end = (self.table[n].expand(BATCH, HEADS, -1) for n in ("index", "end"))
        living = end > self.length
        assert torch.equal(self.keys[living][:, 0], index[living].float())
        assert torch.equal(self.values[living][:, 0], index[living] / 2)
        return [
            [
                {int(index[b, h, slot]): int(end[b, h, slot]) for slot in living[b, h].nonzero().flatten()}
                for h in range(HEADS)
            ]
            for b in range(BATCH)
        ]


@dataclass
class Model:
    """The slots of one row and head, as a list of (key, end)."""

    capacity: int
    slots: list[tuple[int, int] | None] = field(default_factory=list)
    length: int = 0
    lost: bool = False
    forgotten: int = 0

    def __post_init__(self) -> None:
        self.slots = [None] * self.capacity

    def decode(self, end: int) -> None:
        """One key takes the first free slot; where there is none it is lost that something lived in the first."""
        now, self.lost = self.length, False
        free = [i for i, slot in enumerate(self.slots) if slot is None or slot[1] <= now]
        self.forgotten = max([self.forgotten, *(s[1] for i in free if (s := self.slots[i]) is not None)])
        if end > now:
            self.lost = not free
            self.slots[free[0] if free else 0] = (now, end)
        self.length += 1

    def prefill(self, ends: list[int]) -> None:
        """Those that outlive the call move to the first slots."""
        keys = [slot for slot in self.slots if slot is not None]
        keys += list(enumerate(ends, self.length))
        self.length += len(ends)
        staying = [key for key in keys if key[1] > self.length]
        self.forgotten = max([self.forgotten, *(end for _, end in keys if end <= self.length)])
        self.lost = len(staying) > self.capacity
        kept: list[tuple[int, int] | None] = [*staying[: self.capacity]]
        self.slots = kept + [None] * (self.capacity - len(kept))

    def alive(self) -> dict[int, int]:
        return dict(slot for slot in self.slots if slot is not None and slot[1] > self.length)


def random_ends(seed: int, length: int, longest: int = 5) -> Tensor:
    """int32 `[B, H, length]`: lives of up to so many queries, some of none, some for ever."""
    random = torch.Generator().manual_seed(seed)
    life = torch.randint(0, longest + 1, (BATCH, HEADS, length), generator=random)
    forever = torch.rand(life.shape, generator=random) < 0.1
    return torch.where(forever, FOREVER, torch.arange(length) + life).to(torch.int32)


CALLS = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@settings(max_examples=40)
@given(calls=CALLS, seed=st.integers(0, 2**31), capacity=st.integers(1, 12))
def test_slots_are_those_of_the_model(calls: list[int], seed: int, capacity: int) -> None:
    """Slot by slot, whether there are enough of them or not."""
    cache = Cache(layout_of(Exact()), capacity)
    models = [[Model(capacity) for _ in range(HEADS)] for _ in range(BATCH)]
    ends = random_ends(seed, sum(calls))
    lost = 0
    for count in calls:
        new = ends[:, :, cache.length : cache.length + count]
        for b, h in ((b, h) for b in range(BATCH) for h in range(HEADS)):
            model, own = models[b][h], new[b, h].tolist()
            if count == 1:
                model.decode(own[0])
            else:
                model.prefill(own)
        cache.extend(new)
        flat = [model for row in models for model in row]
        lost += any(model.lost for model in flat)
        assert int(cache.table["lost"]) == lost
        assert int(cache.table["forgotten"]) == max(model.forgotten for model in flat)
        assert cache.length == flat[0].length
        expected = torch.tensor([[[s or (FREE, 0) for s in model.slots] for model in row] for row in models])
        assert torch.equal(cache.table["index"], expected[..., 0].int())
        assert torch.equal(cache.table["end"], expected[..., 1].int())
        assert cache.alive() == [[model.alive() for model in row] for row in models]


def most_alive(ends: Tensor) -> int:
    """The most keys of a row and head that live at one query, or between two."""
    length = ends.size(2)
    return max(int(((torch.arange(length) <= q) & (ends > q)).sum(-1).max()) for q in range(length))


@settings(max_examples=30)
@given(calls=CALLS, seed=st.integers(0, 2**31))
def test_each_query_sees_the_living_keys(calls: list[int], seed: int) -> None:
    """As many slots as keys that ever live at once are enough."""
    ends = random_ends(seed, sum(calls))
    cache = Cache(layout_of(Exact(), bias=True), max(1, most_alive(ends)))
    for count in calls:
        first = cache.length
        seen = cache.extend(ends[:, :, first : first + count])
        for b, h, q in ((b, h, q) for b in range(BATCH) for h in range(HEADS) for q in range(count)):
            assert seen[b][h][q] == [j for j in range(first + q + 1) if ends[b, h, j] > first + q]
    assert int(cache.table["lost"]) == 0


@settings(max_examples=30)
@given(calls=CALLS, seed=st.integers(0, 2**31))
def test_one_call_is_as_many_steps(calls: list[int], seed: int) -> None:
    ends = random_ends(seed, sum(calls) + 1)
    whole, steps, pieces = (Cache(layout_of(Exact()), ends.size(2)) for _ in range(3))
    whole.extend(ends)
    for place in range(ends.size(2)):
        steps.extend(ends[:, :, place : place + 1])
    for count in (*calls, 1):
        pieces.extend(ends[:, :, pieces.length : pieces.length + count])
    for other in (steps, pieces):
        assert other.alive() == whole.alive()
        assert torch.equal(other.table["origin"], whole.table["origin"])
    after = torch.full((BATCH, HEADS, 2), FOREVER, dtype=torch.int32)
    assert whole.extend(after) == steps.extend(after) == pieces.extend(after)


def test_a_full_table_says_that_a_key_is_lost() -> None:
    forever = torch.full((BATCH, HEADS, 5), FOREVER, dtype=torch.int32)
    cache = Cache(layout_of(Exact()), 2)
    cache.extend(forever[:, :, :2])
    assert int(cache.table["lost"]) == 0
    cache.extend(forever[:, :, :1])
    assert int(cache.table["lost"]) == 1
    cache.extend(forever)
    assert int(cache.table["lost"]) == 2, "counted by calls"


def test_one_row_is_enough_to_lose_a_key() -> None:
    ends = torch.zeros(BATCH, HEADS, 3, dtype=torch.int32)
    ends[1, 0] = FOREVER
    cache = Cache(layout_of(Exact()), 2)
    cache.extend(ends)
    assert int(cache.table["lost"]) == 1
    assert cache.alive() == [[{}, {}], [{0: FOREVER, 1: FOREVER}, {}]]


def test_a_key_that_nobody_sees_takes_no_slot() -> None:
    cache = Cache(layout_of(Exact()), 1)
    cache.extend(torch.full((BATCH, HEADS, 1), FOREVER, dtype=torch.int32))
    cache.extend(torch.zeros(BATCH, HEADS, 1, dtype=torch.int32))
    assert int(cache.table["lost"]) == 0
    assert cache.alive() == [[{0: FOREVER}] * HEADS] * BATCH


def test_forgotten_is_the_last_end_of_those_that_left() -> None:
    """A key that has ended is not forgotten while it is in its slot."""
    ends = torch.tensor([2, 9, 3, 9, 9, 9], dtype=torch.int32).expand(BATCH, HEADS, 6)
    cache = Cache(layout_of(Exact()), 6)
    forgotten = []
    for place in range(6):
        cache.extend(ends[:, :, place : place + 1])
        forgotten.append(int(cache.table["forgotten"]))
    assert forgotten == [0, 0, 2, 3, 3, 3]
    assert cache.table["index"][0, 0].tolist() == [3, 1, 4, 5, FREE, FREE]


def test_origin_is_the_first_token_of_a_row() -> None:
    """Padding has ends of 0; a row of nothing else has no origin yet."""
    cache = Cache(layout_of(Exact()), 8)
    ends = torch.full((BATCH, 1, 4), FOREVER, dtype=torch.int32)
    ends[0, 0, :3] = ends[1] = 0
    cache.extend(ends)
    assert cache.table["origin"].flatten().tolist() == [3, NO_TOKEN]
    cache.extend(torch.full((BATCH, 1, 1), FOREVER, dtype=torch.int32))
    assert cache.table["origin"].flatten().tolist() == [3, 4]


POLICIES: dict[str, Any] = {
    "window": SlidingWindow(3),
    "window and sinks": SlidingWindow(2, sinks=2),
    "separators": SeparatorMask((0,), initial=1, window=3),
    "few separators": SeparatorMask((0,), initial=1, window=2, max_separators=2),
    "a cache that is compacted": SeparatorMask((0,), initial=1, window=2, max_separators=2, capacity=7),
    "places in the cache": SeparatorMask((0,), initial=1, window=2, max_separators=2, capacity=6, positions="cache"),
}


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=15)
@given(calls=CALLS, seed=st.integers(0, 2**31))
def test_a_policy_in_calls_is_the_policy_of_the_whole_text(name: str, calls: list[int], seed: int) -> None:
    policy = POLICIES[name]
    length = sum(calls)
    ids = torch.randint(0, 3, (BATCH, length), generator=torch.Generator().manual_seed(seed))
    visible = policy_ranges(policy, ids).visible(torch.arange(length)).expand(BATCH, 1, -1, -1)
    cache = Cache(layout_of(policy, heads=1), policy.pressure(length))
    for count in calls:
        first = cache.length
        ends = torch.full((BATCH, 1, count), FOREVER, dtype=torch.int32)
        seen = cache.extend(ends, ids[:, first : first + count])
        for b, h, q in ((b, h, q) for b in range(BATCH) for h in range(HEADS) for q in range(count)):
            assert seen[b][h][q] == visible[b, 0, first + q].nonzero().flatten().tolist()
    assert int(cache.table["lost"]) == 0


@settings(max_examples=15)
@given(calls=CALLS, seed=st.integers(0, 2**31))
def test_a_key_that_the_model_hides_is_ranked_all_the_same(calls: list[int], seed: int) -> None:
    """Under a window of the model's own; the slot keeps the window's end beside the policy's."""
    policy, length = POLICIES["few separators"], sum(calls)
    ids = torch.randint(0, 2, (BATCH, length), generator=torch.Generator().manual_seed(seed))
    visible = policy_ranges(policy, ids).visible(torch.arange(length)).expand(BATCH, 1, -1, -1)
    cache = Cache(layout_of(policy, heads=1, limit=True), policy.pressure(length))
    window = 4
    for count in calls:
        first = cache.length
        ends = (first + window + torch.arange(count, dtype=torch.int32)).expand(BATCH, 1, -1)
        seen = cache.extend(ends, ids[:, first : first + count])
        for b, h, q in ((b, h, q) for b in range(BATCH) for h in range(HEADS) for q in range(count)):
            shown = visible[b, 0, first + q].nonzero().flatten().tolist()
            assert seen[b][h][q] == [j for j in shown if first + q - j < window]


def test_a_store_changes_in_place_and_keeps_its_dtype() -> None:
    keys, values = (torch.zeros(1, 1, 3, 2, dtype=torch.float16) for _ in range(2))
    new = torch.ones(1, 1, 1, 2)
    slot, seen = torch.tensor([[[1]]]), torch.tensor([[[True]]])
    stored = StoreDecode()(new, new * 2, keys, values, slot, seen)
    assert stored[0] is keys and stored[1] is values
    assert keys[0, 0, :, 0].tolist() == [0, 1, 0] and values[0, 0, :, 0].tolist() == [0, 2, 0]
    StoreDecode()(new * 9, new * 9, keys, values, slot, ~seen)
    assert keys[0, 0, :, 0].tolist() == [0, 1, 0], "a key that nobody sees is not written"


def test_a_prefill_reads_the_slots_before_it_fills_them() -> None:
    keys, values = (torch.arange(3.0).view(1, 1, 3, 1) + add for add in (10, 20))
    new = torch.tensor([1.0, 2.0]).view(1, 1, 2, 1)
    chosen = torch.tensor([[[4, 0, 0]]])
    everything, _ = StorePrefill()(new, new, keys, values, chosen)
    assert everything.flatten().tolist() == [10, 11, 12, 1, 2]
    assert keys.flatten().tolist() == [2, 10, 10] and values.flatten().tolist() == [2, 20, 20]
    source = torch.tensor([[4, 4, 0]])
    gathered, _ = StorePrefill()(new, new, keys, values, chosen, source)
    assert gathered.flatten().tolist() == [2, 2, 2]


def test_slots_that_are_never_too_few() -> None:
    """The policy's bound, or a window of the model's own where that is less and hides keys for good."""
    layout = layout_of(SlidingWindow(8, sinks=2))
    assert layout.capacity(100) == 10 and layout.capacity(5) == 5
    assert dataclasses.replace(layout, window=4).capacity(100) == 4
    ranked = layout_of(POLICIES["few separators"])
    assert ranked.capacity(100) == 5 and dataclasses.replace(ranked, window=3).capacity(100) == 5
    assert layout.num_heads == HEADS


def test_state_tensors_are_made_of_their_layout() -> None:
    made = StateTensor("index", ("B", 3, "C"), torch.int32, FREE).make(2, 5, "cpu")
    assert made.shape == (2, 3, 5) and made.dtype == torch.int32 and bool((made == FREE).all())
