"""Which process has which tokens of a text, and which keys it needs of the others."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from rewriter.kernels import LiveRanges
from rewriter.kernels.context_parallel import needed_keys
from rewriter.kernels.context_parallel import share_tokens

CPU = torch.device("cpu")


def random_ranges(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(-3, num_tokens + 3, (2, 3, num_tokens), generator=generator, dtype=torch.int32)
    length = torch.randint(-2, num_tokens, start.shape, generator=generator, dtype=torch.int32)
    return start, start + length


def live_pairs(start: torch.Tensor, end: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """bool `[B, H, rows, keys]`."""
    row = torch.arange(num_tokens)[:, None]
    return (start[:, :, None] <= row) & (row < end[:, :, None])


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 4), chunk=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_tokens_are_shared_as_well_as_two_chunks_for_each_process_allow(size: int, chunk: int, seed: int) -> None:
    num_tokens = 2 * size * chunk
    start, end = random_ranges(num_tokens, seed)
    tokens = share_tokens([start], [end], num_tokens, size, CPU)
    assert tokens.shape == (size, num_tokens // size)
    assert torch.equal(tokens.flatten().sort().values, torch.arange(num_tokens))
    assert all(torch.equal(own, own.sort().values) for own in tokens)
    rows = live_pairs(start, end, num_tokens).sum(dim=(0, 1, 3)).double()
    cost = max(float(rows[own].sum()) for own in tokens)
    chunks = rows.view(2 * size, chunk).sum(dim=1).tolist()
    pairings = itertools.permutations(range(2 * size)) if size <= 3 else [()]
    best = min((max(chunks[p[2 * n]] + chunks[p[2 * n + 1]] for n in range(size)) for p in pairings if p), default=cost)
    assert cost <= 1.02 * best + 1e-9


def test_a_causal_text_is_shared_from_both_ends_and_a_window_in_one_piece() -> None:
    causal = LiveRanges.causal(16)
    ends = share_tokens([causal.start], [causal.end], 16, 2, CPU)
    assert ends.tolist() == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert share_tokens([], [], 16, 2, CPU).tolist() == ends.tolist()
    long = LiveRanges.sliding_window(4096, 3)
    assert share_tokens([long.start], [long.end], 4096, 2, CPU)[0].equal(torch.arange(2048))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 4), chunk=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_a_key_is_needed_where_a_row_sees_it(size: int, chunk: int, seed: int) -> None:
    num_tokens = 2 * size * chunk
    start, end = random_ranges(num_tokens, seed)
    tokens = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed)).view(size, -1).sort(dim=1).values
    sees = live_pairs(start, end, num_tokens)
    expected = torch.stack([sees[:, :, own].any(dim=2) for own in tokens])
    assert torch.equal(needed_keys(start, end, tokens), expected)


def test_ranges_of_all_rows_and_heads_stay_one() -> None:
    live = LiveRanges.causal(8)
    tokens = torch.arange(8).view(2, 4)
    needed = needed_keys(live.start, live.end, tokens)
    assert needed.shape == (2, 1, 1, 8)
    assert needed[:, 0, 0].int().sum(dim=1).tolist() == [4, 8]
    with pytest.raises(RuntimeError):
        needed_keys(live.start, live.end[..., :3], tokens)
