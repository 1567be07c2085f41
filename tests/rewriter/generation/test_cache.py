"""The cache as a register file, driven at random against a dense oracle; and what it does when it is asked wrongly."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import initialize
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule
from torch import Tensor

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.errors import CacheError

ROWS, LONGEST = 3, 40
SEPARATORS = tuple(range(3, 20))
POLICIES = {
    "exact": Exact(),
    "window": SlidingWindow(5, sinks=1),
    "separators": SeparatorMask(SEPARATORS, initial=2, window=4),
    "newest separators": SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2),
    "four blocks": SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2, capacity=9),
    "places": SeparatorMask(SEPARATORS, initial=1, window=3, max_separators=2, capacity=9, positions="cache"),
    "dynamic mask": DynamicMask(5),
    "dynamic mask, two local": DynamicMask(4, local=2),
}


@functools.cache
def optimized(name: str) -> rewriter.OptimizedModel:
    """One model for each policy: captured once, and run at random lengths."""
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    fast = rewriter.optimize(LlamaForCausalLM(config).eval(), POLICIES[name], backend="eager", strict=True)
    for parameters in fast.policy_parameters.values():
        torch.nn.init.uniform_(parameters["A"], -1, 1)
    return fast


class Machine(RuleBasedStateMachine):
    """Prefill, decode, chunks, reordered rows, crop and reset; what is in dead slots is poisoned all the time."""

    name = ""

    @initialize(seed=st.integers(0, 2**31))
    def begin(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.fast = optimized(self.name)
        self.cache = self.fast.new_cache(LONGEST)
        self.forget()

    def forget(self) -> None:
        self.ids = torch.zeros(ROWS, 0, dtype=torch.long)
        self.mask = torch.zeros(ROWS, 0, dtype=torch.long)

    @property
    def length(self) -> int:
        return self.ids.size(1)

    def full(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if self.name != "places" else {}
        return self.fast(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits

    @torch.no_grad()
    def take(self, count: int, padding: list[int]) -> None:
        """New tokens, the first of them padding where the row has held nothing else."""
        count = min(count, LONGEST - self.length)
        if not count:
            return
        # Tokens that the row has not held yet: equal scores would tie, and rounding decide.
        fresh = [torch.randperm(64, generator=self.random) for _ in range(ROWS)]
        ids = torch.stack([f[~torch.isin(f, held)][:count] for f, held in zip(fresh, self.ids, strict=True)])
        mask = torch.ones(ROWS, count, dtype=torch.long)
        for row in range(ROWS):
            if not self.mask[row].any():
                mask[row, : padding[row]] = 0
        self.ids, self.mask = torch.cat((self.ids, ids), dim=1), torch.cat((self.mask, mask), dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -count:]
        actual = self.fast(
            input_ids=ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache
        ).logits
        # One token alone is another graph of the plain forward; two are never too few.
        padded = max(0, 2 - self.length)
        whole = torch.nn.functional.pad(self.ids, (padded, 0)), torch.nn.functional.pad(self.mask, (padded, 0))
        expected = self.full(*whole)[:, -count:]
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=2e-4, atol=2e-4)
        self.poison()

    def poison(self) -> None:
        """What is in a slot whose key is dead must not be read: NaN reaches every logit."""
        for layout, store in zip(self.cache.layout.sites, self.cache.stores, strict=True):
            dead = self.cache.tables[layout.table]["end"] <= self.cache.length
            for tensor in store.values():
                tensor.masked_fill_(dead[..., None], math.nan)

    @rule(count=st.integers(1, 12), padding=st.lists(st.integers(0, 4), min_size=ROWS, max_size=ROWS))
    def several(self, count: int, padding: list[int]) -> None:
        self.take(count, padding)

    @rule()
    def one(self) -> None:
        self.take(1, [0] * ROWS)

    @precondition(lambda self: self.length)
    @rule(rows=st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
    def reorder(self, rows: list[int]) -> None:
        self.cache.reorder_cache(torch.tensor(rows))
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    @precondition(lambda self: self.length)
    @rule(count=st.integers(1, 6))
    def crop(self, count: int) -> None:
        count = min(count, self.length)
        before = [t.clone() for t in self.cache.state()]
        try:
            self.cache.crop(-count)
        except CacheError:
            assert self.name != "exact", "nothing is forgotten"
            now = self.cache.state()
            assert all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(now, before, strict=True))
            return
        self.ids, self.mask = self.ids[:, :-count], self.mask[:, :-count]
        self.poison()

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.forget()

    @invariant()
    def slots_hold_no_more_than_the_pressure(self) -> None:
        if not hasattr(self, "cache") or not self.cache.tables:
            return
        assert self.cache.length == self.length
        for layout, table, capacity in zip(
            self.cache.layout.tables, self.cache.tables, self.cache.capacities, strict=True
        ):
            assert capacity <= layout.policy.pressure(LONGEST)
            assert table["end"].size(2) == capacity
            alive = table["end"] > self.length
            assert bool((table["index"] >= 0).logical_or(~alive).all())
            for row, head in torch.cartesian_prod(*(torch.arange(n) for n in alive.shape[:2])).tolist():
                held = table["index"][row, head][alive[row, head]].tolist()
                assert len(set(held)) == len(held), "no key twice"


@pytest.mark.parametrize("examples", [12, pytest.param(60, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", POLICIES)
def test_at_random_against_the_dense_oracle(name: str, examples: int) -> None:
    machine: Any = type("Case", (Machine,), {"name": name})
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=14))


@torch.no_grad()
def test_crop_takes_back_what_is_still_there() -> None:
    cache = optimized("exact").new_cache(20)
    ids = torch.randint(0, 64, (2, 9))
    optimized("exact")(input_ids=ids, past_key_values=cache)
    with pytest.raises(CacheError, match="as a negative number, got 4"):
        cache.crop(4)
    with pytest.raises(CacheError, match="cannot remove 10 tokens, the cache has 9"):
        cache.crop(-10)
    cache.crop(0)
    assert cache.length == 9
    window = optimized("window").new_cache()
    optimized("window")(input_ids=ids, past_key_values=window)
    with pytest.raises(CacheError, match="keys that 7 tokens would still see are forgotten"):
        window.crop(-2)
    window.crop(-9)
    assert window.length == 0 and not int(window.living_keys().sum())
    dynamic = optimized("dynamic mask").new_cache()
    optimized("dynamic mask")(input_ids=ids, past_key_values=dynamic)
    with pytest.raises(CacheError, match="keys make others leave, which cannot be taken back"):
        dynamic.crop(-1)
    assert dynamic.length == 9


@torch.no_grad()
def test_rows_can_be_chosen_and_repeated() -> None:
    fast = optimized("four blocks")
    ids = torch.randint(0, 64, (2, 14))
    cache = fast.new_cache()
    with pytest.raises(CacheError, match="the cache is empty; there are no rows yet"):
        cache.reorder_cache(torch.tensor([0, 1]))
    fast(input_ids=ids, past_key_values=cache)
    with pytest.raises(CacheError, match="rows must be integers from 0 to 1"):
        cache.reorder_cache(torch.tensor([0, 2]))
    with pytest.raises(CacheError, match="beam_idx has 3 rows, the cache 2"):
        cache.reorder_cache(torch.tensor([0, 1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 0]))
    assert cache.batch_size == 3
    new = torch.randint(0, 64, (3, 3))
    expected = fast(input_ids=torch.cat((ids[[1, 0, 0]], new), dim=1), use_cache=False).logits[:, -3:]
    actual = fast(input_ids=new, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_memory_is_the_slots_and_known_before() -> None:
    fast = optimized("four blocks")
    cache = fast.new_cache()
    assert cache.num_bytes == 0
    fast(input_ids=torch.randint(0, 64, (2, 30)), past_key_values=cache)
    keys_and_values = 2 * 2 * (2 * 2 * 10 * 8 * 4)  # layers, key and value; rows, heads, slots, head_dim, bytes
    assert keys_and_values < cache.num_bytes < 1.2 * keys_and_values
    assert repr(cache) == "LiveRangeCache(30 tokens, slots [10], 2 rows)"
    assert cache.get_max_length() == -1 and fast.new_cache(7).get_max_length() == -1
    assert optimized("exact").new_cache(7).get_max_length() == 7
