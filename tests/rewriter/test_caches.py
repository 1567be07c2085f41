"""The proof by execution: decoding from slots that forget equals the masked full forward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import reference
from torch import Tensor
from torch import nn

import rewriter
from rewriter import DynamicMask
from rewriter.caches import CacheError
from rewriter.caches import KeySlots
from rewriter.caches import dynamic_mask_slots
from rewriter.caches import push_dynamic_mask
from rewriter.testing import assert_within_budget


def full_ranges(policy: DynamicMask, rank: Tensor, padding: int) -> LiveRanges:
    """Ranges of a full forward in which the first `padding` keys of the first row are none."""
    causal = LiveRanges.causal(rank.size(2))
    end = causal.end.repeat(rank.size(0), 1, 1)
    end[0, :, :padding] = 0
    return LiveRanges(causal.start, end) & policy.ranked_ranges(rank, end)


@given(
    seed=st.integers(0, 2**31),
    keep=st.integers(1, 9),
    local=st.sampled_from([0, 0, 1, 4]),
    prompt=st.integers(0, 14),
    steps=st.integers(1, 12),
    kind=st.sampled_from(["distinct", "tied", "nan"]),
    padding=st.integers(0, 3),
)
def test_step_by_step_equals_the_masked_full_forward(
    seed: int, keep: int, local: int, prompt: int, steps: int, kind: str, padding: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    policy = DynamicMask(keep, local=local)
    length, padding = prompt + steps, min(padding, prompt)
    query = torch.randn(2, 4, length, 5, generator=random)
    key = torch.randn(2, 2, length, 5, generator=random)
    value = torch.randn(2, 2, length, 3, generator=random)
    rank, bias = torch.randn(2, 2, 2, length, generator=random)
    rank = rank if kind == "distinct" else rank.round()
    if kind == "nan":
        rank[rank == 1] = math.nan
        rank[rank == -2] = -math.inf
    live = full_ranges(policy, rank, padding)
    before = (t[:, :, :prompt] for t in (key, value))
    slots = dynamic_mask_slots(
        policy, *before, full_ranges(policy, rank[:, :, :prompt], padding), rank[:, :, :prompt], bias[:, :, :prompt]
    )
    visible = live.visible(torch.arange(length)).expand(2, 2, -1, -1)
    storage = slots.key.data_ptr()
    outputs = []
    for step in range(prompt, length):
        push_dynamic_mask(slots, policy, *(t[:, :, step : step + 1] for t in (key, value, rank, bias)))
        for b in range(2):
            for h in range(2):
                alive = slots.index[b, h][slots.end[b, h] > step].tolist()
                assert sorted(alive) == visible[b, h, step].nonzero().flatten().tolist()
        outputs.append(slots.attend(query[:, :, step : step + 1]))
    rows = torch.arange(prompt, length, dtype=torch.int32)
    dense, exact = (
        reference.live_range_attention(
            *(t.to(dtype) for t in (query[:, :, prompt:], key, value)), live, query_index=rows, bias=bias.to(dtype)
        )
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_budget(torch.cat(outputs, dim=2), dense, exact, "output")
    assert slots.capacity == keep + local and slots.key.data_ptr() == storage, "nothing grows, nothing moves"


def test_a_dead_slot_is_not_read() -> None:
    """What is in a slot whose key is dead cannot reach the output: not even NaN."""
    policy = DynamicMask(3)
    key, value = torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4)
    rank, bias = torch.randn(1, 2, 10), torch.randn(1, 2, 10)
    slots = dynamic_mask_slots(policy, key, value, full_ranges(policy, rank, 0), rank, bias)
    slots.end[0, 0, 1] = 0
    query = torch.randn(1, 4, 1, 4)
    slots.length += 1
    expected = slots.attend(query)
    slots.value[0, 0, 1] = math.nan
    slots.key[0, 0, 1] = math.nan
    assert torch.equal(slots.attend(query), expected)


class Block(nn.Module):
    """A two-layer model whose attention can be told to decode from slots."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.head = nn.Linear(32, 64)

    def heads(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv[layer](x).chunk(3, dim=-1))
        return q, k, v

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in range(2):
            q, k, v = self.heads(layer, x)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x)

    def step(self, token: Tensor, slots: list[KeySlots], fast: rewriter.OptimizedModel) -> Tensor:
        x = self.embedding(token)
        assert isinstance(fast.policy, DynamicMask)
        for layer in range(2):
            q, k, v = self.heads(layer, x)
            scored = fast.policy.score_keys(v, fast.policy_parameters[str(layer)])
            push_dynamic_mask(slots[layer], fast.policy, k, v, *scored)
            x = x + slots[layer].attend(q).transpose(1, 2).flatten(2)
        return self.head(x)


@torch.no_grad()
def test_greedy_generation_equals_the_full_forward() -> None:
    """From the first token on, with 6 of up to 60 keys: the same logits as a full forward over all tokens so far."""
    torch.manual_seed(3)
    torch._dynamo.reset()
    model = Block().eval()
    policy = DynamicMask(5, local=1)
    tokens = torch.randint(0, 64, (3, 1))
    fast = rewriter.optimize(model, policy, backend="eager", example_inputs={"input_ids": torch.zeros(2, 9).long()})
    for parameters in fast.policy_parameters.values():
        nn.init.uniform_(parameters["A"], -1, 1)
    slots = [KeySlots(3, 4, 6, 8, 8) for _ in range(2)]
    for step in range(60):
        logits = model.step(tokens[:, -1:], slots, fast)[:, -1]
        if step in (1, 5, 6, 30, 59):
            torch.testing.assert_close(logits, fast(tokens)[:, -1], rtol=1e-4, atol=1e-5)
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    assert tokens.unique().numel() > 3


def test_bad_input_leaves_the_slots_as_they_were() -> None:
    policy = DynamicMask(3)
    key, value = torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4)
    rank, bias = torch.randn(1, 2, 10), torch.zeros(1, 2, 10)
    few = KeySlots(1, 2, 2, 4, 4)
    with pytest.raises(CacheError, match="3 of the prompt's keys live on, and there are 2 slots"):
        few.fill(key, value, full_ranges(policy, rank, 0), rank, bias)
    assert few.length == 0 and bool((few.index == -1).all())
    slots = dynamic_mask_slots(policy, key, value, full_ranges(policy, rank, 0), rank, bias)
    index, held = slots.index.clone(), slots.key.clone()
    with pytest.raises(CacheError, match="the slots have taken 10 keys already"):
        slots.fill(key, value, LiveRanges.causal(10), rank, bias)
    with pytest.raises(CacheError, match=r"key is \[1, 2, 2, 4\], expected \[1, 2, 1, 4\] \(one key at a time\)"):
        slots.push(key[:, :, :2], value[:, :, :2], torch.full((1, 2, 2), FOREVER), rank[:, :, :2], bias[:, :, :2])
    two = KeySlots(2, 2, 3, 4, 4)
    with pytest.raises(CacheError, match=r"key is \[1, 2, 1, 4\], expected \[2, 2, 1, 4\]"):
        push_dynamic_mask(two, policy, key[:, :, :1], value[:, :, :1], rank[:, :, :1], bias[:, :, :1])
    best = torch.full_like(rank[:, :, :2], 1e9)
    with pytest.raises(CacheError, match="one key at a time"):
        push_dynamic_mask(slots, policy, key[:, :, :2], value[:, :, :2], best, bias[:, :, :2])
    assert bool((slots.end == FOREVER).all()), "the key that would have left is still there"
    with pytest.raises(CacheError, match="slots know no window"):
        dynamic_mask_slots(DynamicMask(3, on_window="intersect"), key, value, LiveRanges.causal(10), rank, bias)
    new = (key[:, :, :1], value[:, :, :1])
    forever = torch.full((1, 2, 1), FOREVER, dtype=torch.int32)
    with pytest.raises(CacheError, match="all 3 slots hold living keys at index 10"):
        slots.push(*new, forever, rank[:, :, :1], bias[:, :, :1])
    assert torch.equal(slots.index, index) and torch.equal(slots.key, held) and slots.length == 10
