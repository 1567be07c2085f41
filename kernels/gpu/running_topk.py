"""One level of the wavelet matrix behind `running_topk_ranges`, for all prefixes at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rewriter.kernels.gpu.launch import UNSPECIALIZED
from rewriter.kernels.gpu.launch import launch
from torch import Tensor

BLOCK = 1024


def descend(values: Tensor, ones_before: Tensor, bounds: Tensor, wanted: Tensor, answer: Tensor, bit: int) -> Tensor:
    """Partitions `values` by a bit and moves every prefix's bounds into the part that holds its order statistic.

    Args:
        values: int32 `[R, K]`, this level's order.
        ones_before: int32 `[R, K + 1]`, how many of the values before each place have the bit.
        bounds: int32 `[2, R, P]`, the places where each prefix's values begin and end; changed in place.
        wanted: int32 `[R, P]`, which of these values is sought; changed in place.
        answer: int32 `[R, P]`, the bits found so far; changed in place.

    Returns:
        int32 `[R, K]`, the next level's order.
    """
    moved = torch.empty_like(values)
    num_rows, num_values = values.shape
    launch(_descend, (num_rows, -(-num_values // BLOCK)))(
        values, ones_before, bounds, wanted, answer, moved, num_values, wanted.size(1), bit, BLOCK=BLOCK, num_warps=4
    )
    return moved


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _descend(
    values_ptr,
    ones_before_ptr,
    bounds_ptr,
    wanted_ptr,
    answer_ptr,
    moved_ptr,
    num_values,
    num_prefixes,
    bit,
    BLOCK: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    o_places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_values = o_places < num_values
    p_ones = ones_before_ptr + i_row * (num_values + 1)
    num_zeros = num_values - tl.load(p_ones + num_values)
    b_values = tl.load(values_ptr + i_row * num_values + o_places, mask=m_values, other=0)
    b_ones = tl.load(p_ones + o_places, mask=m_values, other=0)
    o_moved = tl.where(((b_values >> bit) & 1) == 1, num_zeros + b_ones, o_places - b_ones)
    tl.store(moved_ptr + i_row * num_values + o_moved, b_values, mask=m_values)

    m_prefixes = o_places < num_prefixes
    p_prefixes = i_row * num_prefixes + o_places
    p_upper = bounds_ptr + tl.num_programs(0).to(tl.int64) * num_prefixes + p_prefixes
    lower = tl.load(bounds_ptr + p_prefixes, mask=m_prefixes, other=0)
    upper = tl.load(p_upper, mask=m_prefixes, other=0)
    wanted = tl.load(wanted_ptr + p_prefixes, mask=m_prefixes, other=0)
    ones_lower = tl.load(p_ones + lower, mask=m_prefixes, other=0)
    ones_upper = tl.load(p_ones + upper, mask=m_prefixes, other=0)
    zeros = (upper - ones_upper) - (lower - ones_lower)
    m_ones = wanted >= zeros
    tl.store(bounds_ptr + p_prefixes, tl.where(m_ones, num_zeros + ones_lower, lower - ones_lower), mask=m_prefixes)
    tl.store(p_upper, tl.where(m_ones, num_zeros + ones_upper, upper - ones_upper), mask=m_prefixes)
    tl.store(wanted_ptr + p_prefixes, tl.where(m_ones, wanted - zeros, wanted), mask=m_prefixes)
    answer = tl.load(answer_ptr + p_prefixes, mask=m_prefixes, other=0)
    tl.store(answer_ptr + p_prefixes, tl.where(m_ones, answer | (1 << bit), answer), mask=m_prefixes)
