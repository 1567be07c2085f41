"""When each key leaves a running top-w, in three launches: the w-th oldest of the better keys, by counting.

Keys stand in the order from the best to the worst; the key at place r dies at the w-th oldest of the r keys before it. Time is
cut into at most `MAX_SPANS` spans and the order into blocks. How many keys of the first spans stand before a block is counted
once, in a table; a key finds its span in the table by bisection, what its own block adds counted on the way, and then its place
in the span.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rewriter.kernels.dispatch import INTERPRETED
from rewriter.kernels.gpu.launch import UNSPECIALIZED
from rewriter.kernels.gpu.launch import launch
from rewriter.kernels.live_ranges import FOREVER
from torch import Tensor

BLOCK = 256 if INTERPRETED else 64
"""Places of a block; a span's keys are looked at so many at once. Triton's interpreter runs the programs one after the other."""

MIN_SPAN = 256
"""Keys of a span at least. A shorter one makes a larger table, a longer one more comparisons for each key."""

MAX_SPANS = 512
"""The table has a number for each span and block: 4 MiB a row of 131,072 keys."""

STEPS = MAX_SPANS.bit_length() - 1
"""Of the bisection among spans."""


def ends(order: Tensor, keep: int) -> Tensor:
    """The first index at which `keep` better keys exist, or the key's own; without one `FOREVER`.

    O(K^2 / 64) comparisons and K^2 / 4,096 numbers of scratch memory up to 131,072 keys, then O(K) numbers.

    Args:
        order: int64 `[R, K]`, the keys of each row from the best to the worst: a permutation of 0 .. K - 1.

    Returns:
        int32 `[R, K]`, by key.
    """
    num_rows, num_keys = order.shape
    span = BLOCK * torch.sym_max(MIN_SPAN // BLOCK, -(-num_keys // (MAX_SPANS * BLOCK)))
    num_spans, num_blocks = -(-num_keys // span), -(-num_keys // BLOCK)
    place, end = (torch.empty_like(order, dtype=torch.int32) for _ in range(2))
    counts = torch.empty(num_rows, num_spans, num_blocks, dtype=torch.int32, device=order.device)
    sizes = (num_keys, num_blocks, num_spans, span)
    grid = (num_rows, num_blocks)
    launch(_count_older, grid)(order, place, counts, *sizes, BLOCK=BLOCK, num_warps=4)
    until = counts.cumsum(dim=2, dtype=torch.int32)
    launch(_ends, grid)(order, place, until, end, *sizes, keep, BLOCK=BLOCK, STEPS=STEPS, FOREVER=FOREVER, num_warps=8)
    return end


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _count_older(order_ptr, place_ptr, counts_ptr, num_keys, num_blocks, num_spans, span, BLOCK: tl.constexpr):
    """Each key's place in the order; and how many keys of a block are in each span or older."""
    i_row = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o_places = i_block * BLOCK + tl.arange(0, BLOCK)
    m_places = o_places < num_keys
    b_keys = tl.load(order_ptr + i_row * num_keys + o_places, mask=m_places, other=2**31 - 1)
    tl.store(place_ptr + i_row * num_keys + b_keys, o_places, mask=m_places)
    for first in range(0, num_spans, BLOCK):
        o_spans = first + tl.arange(0, BLOCK)
        m_older = b_keys[None, :] < ((o_spans + 1) * span)[:, None]
        p_counts = counts_ptr + (i_row * num_spans + o_spans) * num_blocks + i_block
        tl.store(p_counts, tl.sum((m_older & m_places[None, :]).to(tl.int32), 1), mask=o_spans < num_spans)


@triton.jit
def _better_until(until_ptr, b_span, b_keys, o_places, m_dies, num_blocks, span, BLOCK: tl.constexpr):
    """How many keys before each place are in a span or older: of the blocks before, and of the place's own."""
    m_before = m_dies & (b_span >= 0) & (o_places >= BLOCK)
    p_until = until_ptr + b_span.to(tl.int64) * num_blocks + (o_places // BLOCK - 1)
    b_count = tl.load(p_until, mask=m_before, other=0)
    m_older = b_keys[None, :] < ((b_span + 1) * span)[:, None]
    return b_count + tl.sum((m_older & (o_places[None, :] < o_places[:, None])).to(tl.int32), 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _ends(
    order_ptr,
    place_ptr,
    until_ptr,
    end_ptr,
    num_keys,
    num_blocks,
    num_spans,
    span,
    keep,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    FOREVER: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    o_places = i_block * BLOCK + tl.arange(0, BLOCK)
    m_places = o_places < num_keys
    m_dies = m_places & (o_places >= keep)
    b_keys = tl.load(order_ptr + i_row * num_keys + o_places, mask=m_places, other=2**31 - 1).to(tl.int32)
    place_ptr += i_row * num_keys
    until_ptr += i_row * num_spans * num_blocks
    # The first span until which there are enough better keys.
    low = tl.zeros([BLOCK], tl.int32)
    high = low + (num_spans - 1)
    for _ in range(STEPS):
        middle = (low + high) // 2
        b_better = _better_until(until_ptr, middle, b_keys, o_places, m_dies, num_blocks, span, BLOCK)
        m_open = low < high
        high = tl.where(m_open & (b_better >= keep), middle, high)
        low = tl.where(m_open & (b_better < keep), middle + 1, low)
    b_wanted = keep - _better_until(until_ptr, low - 1, b_keys, o_places, m_dies, num_blocks, span, BLOCK)
    b_end = low * span
    for first in range(0, span, BLOCK):
        o_keys = (low * span)[:, None] + first + tl.arange(0, BLOCK)[None, :]
        m_keys = m_dies[:, None] & (o_keys < num_keys)
        b_place = tl.load(place_ptr + o_keys, mask=m_keys, other=2**31 - 1)
        b_is_better = (b_place < o_places[:, None]).to(tl.int32)
        b_end += tl.sum((tl.cumsum(b_is_better, 1) < b_wanted[:, None]).to(tl.int32), 1)
        b_wanted -= tl.sum(b_is_better, 1)
    b_end = tl.where(m_dies, tl.maximum(b_end, b_keys), FOREVER)
    tl.store(end_ptr + i_row * num_keys + b_keys, b_end, mask=m_places)
