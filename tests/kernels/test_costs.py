"""What a kernel is said to compute: counted from the ranges, without running it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels import running_topk_ranges
from rewriter.kernels.costs import FEW_ROWS
from rewriter.kernels.costs import costs
from rewriter.kernels.costs import fused_work
from rewriter.kernels.costs import live_range_work
from rewriter.kernels.cpu import native


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(1, 60),
    st.integers(0, 30),
    st.sampled_from([(1, 1), (2, 1), (6, 2), (40, 1)]),
    st.booleans(),
    st.sampled_from(["AVX512", "AVX2", "DEFAULT"]),
)
def test_pairs_are_those_of_the_panels(
    seed: int, queries: int, more: int, heads: tuple[int, int], shared: bool, vectors: str
) -> None:
    """Panels one by one, their keys one by one, against the closed form."""
    random = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    shape = (2, 1 if shared else kv_heads, queries + more)
    start = torch.randint(-3, queries + more, shape, generator=random).int()
    length = torch.randint(-1, queries + more, shape, generator=random)
    end = torch.where(torch.rand(shape, generator=random) < 0.3, FOREVER, start + length).int()
    rows = queries * (query_heads // kv_heads)
    lanes = {"AVX512": 32, "AVX2": 16, "DEFAULT": 8}[vectors]
    height = rows if rows <= FEW_ROWS else lanes
    panels, pairs = 0, 0
    for own_start, own_end in zip(start.flatten(0, 1), end.flatten(0, 1), strict=True):
        for first in range(0, rows, height):
            index = more + torch.arange(first, min(first + height, rows)) // (query_heads // kv_heads)
            seen = ((own_start <= index[:, None]) & (index[:, None] < own_end)).any(dim=0)
            pairs += int(seen.sum()) * height * (kv_heads if shared else 1)
            panels += kv_heads if shared else 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
        work = live_range_work(LiveRanges(start, end), queries, 2 * query_heads, 2 * kv_heads, 16)
    assert (work.blocks, work.pairs, work.width) == (panels, pairs, 16)


def test_few_rows_are_as_many_as_the_kernel_says() -> None:
    assert f"kMost = {FEW_ROWS};" in native.SOURCE.read_text(encoding="utf-8")


def test_little_more_is_computed_than_is_visible() -> None:
    length = 4096
    for live in (LiveRanges.sliding_window(length, 256), running_topk_ranges(torch.rand(1, 1, length), 128)):
        assert 1 <= live_range_work(live, length, 8, 2, 1).pairs / (8 * live.live_pairs()) < 1.3


def test_torchs_kernel_skips_no_block_of_keys_in_short_texts() -> None:
    assert fused_work(512, 512, 1, 1, is_causal=True).pairs == fused_work(512, 512, 1, 1).pairs == 512 * 512
    assert fused_work(2048, 2048, 1, 1, is_causal=True).pairs < 0.8 * fused_work(2048, 2048, 1, 1).pairs


def test_what_was_measured_says_that_skipping_pays() -> None:
    known = costs("cpu")
    assert known is not None and costs("tpu") is None
    window = live_range_work(LiveRanges.sliding_window(4096, 256), 4096, 8, 2, 128)
    causal = fused_work(4096, 4096, 8, 128, is_causal=True)
    assert known["live_range"].seconds(window, 1) < known["causal"].seconds(causal, 1)
    assert known["live_range"].seconds(window, 2) < known["live_range"].seconds(window, 1)
