"""Decode: one or a few query rows against a cache of slots, split over the keys and merged exactly.

A cache holds little but live keys, so there is no schedule: each program reads some slots in order, masked by their live
ranges, and leaves a partial output and its log-sum-exp; a second kernel weighs them. Keys are read once for all query heads
of their group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rewriter.kernels.gpu.forward import attend
from rewriter.kernels.gpu.kernel_inputs import KernelInputs
from rewriter.kernels.gpu.kernel_inputs import row_strides
from rewriter.kernels.gpu.kernel_inputs import shared_strides
from rewriter.kernels.gpu.launch import UNSPECIALIZED
from rewriter.kernels.gpu.launch import launch
from rewriter.kernels.gpu.launch import processors
from rewriter.kernels.gpu.tiles import LOG2E
from rewriter.kernels.gpu.tiles import in_fp32
from rewriter.kernels.gpu.tiles import packed_rows
from torch import Tensor

SPLIT = 512
"""Keys of a program at most: its partial output is then 3 % of what it reads, and a cache of 32k keys fills a GPU."""

SMALLEST_SPLIT = 64
"""Keys of a program at least, or one block; its partial output is then a quarter of what it reads."""

MAX_QUERIES = 16
"""Up to this many query rows; for more, a schedule pays."""


def decode(arguments: KernelInputs) -> tuple[Tensor, Tensor]:
    """As `forward`, for few query rows; `arguments.row_order` is None."""
    a = arguments
    config = a.config("decode")
    tile_rows, tile_heads, chunks = a.tile_shape(config.block_m)
    num_tiles = -(-a.num_queries // tile_rows)
    split = split_keys(a, num_tiles * chunks, config.block_n)
    num_splits = -(-a.num_keys // split)
    output = a.empty_output()
    lse = torch.empty(a.query.shape[:3], dtype=torch.float32, device=a.query.device)
    rows = (*a.query.shape[:3], num_splits)
    partial_output = lse.new_empty(*rows, a.value_dim)
    partial_lse = lse.new_empty(rows)
    constants = a.constants(config)
    launch(_decode, (num_splits * num_tiles * chunks, a.num_kv_heads, a.num_batch))(
        a.query,
        a.key,
        a.value,
        partial_output,
        partial_lse,
        *a.logit_tensors(),
        a.start,
        a.end,
        a.query_index,
        *row_strides(a.query, a.key, a.value),
        *a.logit_strides(),
        *shared_strides(a.start, 2),
        *shared_strides(a.end, 2),
        *shared_strides(a.query_index, 1),
        a.num_queries,
        a.num_keys,
        num_splits,
        num_tiles,
        a.group,
        tile_rows,
        tile_heads,
        a.head_dim,
        a.value_dim,
        a.scale,
        a.softcap,
        SPLIT=split,
        **constants,
    )
    launch(_merge, (a.num_queries, a.query.size(1), a.num_batch))(
        partial_output,
        partial_lse,
        a.query if a.sinks is None else a.sinks,
        output,
        lse,
        *row_strides(output),
        num_splits,
        a.value_dim,
        HAS_SINKS=a.sinks is not None,
        BLOCK_SPLITS=16,
        BLOCK_DV=constants["BLOCK_DV"],
        num_warps=4,
    )
    return output, lse


def split_keys(arguments: KernelInputs, programs: int, block: int) -> int:
    """Keys of a program: half of `SPLIT`, and so on, until there are two programs for each processor of the GPU.

    A power of two, so that there are few variants to compile. Where sizes are symbols it is `SPLIT`, which then depends on none.

    Args:
        programs: of a split, batch row and KV head.
        block: keys of a block.
    """
    a, split = arguments, SPLIT
    sizes = (a.num_keys, a.num_batch, a.num_kv_heads, programs)
    if all(isinstance(size, int) for size in sizes):
        of_split = a.num_batch * a.num_kv_heads * programs
        wanted = 2 * processors(a.query.device)
        while split > max(block, SMALLEST_SPLIT) and -(-a.num_keys // split) * of_split < wanted:
            split //= 2
    return split


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _decode(
    query_ptr,
    key_ptr,
    value_ptr,
    partial_output_ptr,
    partial_lse_ptr,
    bias_ptr,
    slopes_ptr,
    key_index_ptr,
    start_ptr,
    end_ptr,
    query_index_ptr,
    stride_query_b,
    stride_query_h,
    stride_query,
    stride_key_b,
    stride_key_h,
    stride_key,
    stride_value_b,
    stride_value_h,
    stride_value,
    stride_bias_b,
    stride_bias_h,
    stride_key_index_b,
    stride_start_b,
    stride_start_h,
    stride_end_b,
    stride_end_h,
    stride_query_index_b,
    num_queries,
    num_keys,
    num_splits,
    num_tiles,
    group,
    tile_rows,
    tile_heads,
    head_dim,
    value_dim,
    scale,
    softcap,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale, softcap = in_fp32(scale), in_fp32(softcap)
    i_split = tl.program_id(0) % num_splits
    i_tile = tl.program_id(0) // num_splits % num_tiles
    i_chunk = tl.program_id(0) // num_splits // num_tiles
    i_kv_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    o_rows, o_heads, m_rows = packed_rows(i_tile, i_chunk, tile_rows, tile_heads, group, num_queries, BLOCK_M)
    b_query_index = tl.load(query_index_ptr + i_batch * stride_query_index_b + o_rows, mask=m_rows, other=0)
    o_heads = i_kv_head * group + o_heads
    o_dims = tl.arange(0, BLOCK_D)
    p_query = query_ptr + i_batch * stride_query_b + o_heads * stride_query_h + o_rows.to(tl.int64) * stride_query
    m_query = m_rows[:, None] & (o_dims < head_dim)[None, :]
    b_query = tl.load(p_query[:, None] + o_dims[None, :], mask=m_query, other=0.0)  # [BM, D]
    b_slopes = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        b_slopes = tl.load(slopes_ptr + o_heads, mask=m_rows, other=0.0).to(tl.float32)
    key_ptr += i_batch * stride_key_b + i_kv_head * stride_key_h
    value_ptr += i_batch * stride_value_b + i_kv_head * stride_value_h
    bias_ptr += i_batch * stride_bias_b + i_kv_head * stride_bias_h
    key_index_ptr += i_batch * stride_key_index_b
    start_ptr += i_batch * stride_start_b + i_kv_head * stride_start_h
    end_ptr += i_batch * stride_end_b + i_kv_head * stride_end_h
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    split_end = tl.minimum(i_split * SPLIT + SPLIT, num_keys)
    for first in range(i_split * SPLIT, split_end, BLOCK_N):
        o_keys = first + tl.arange(0, BLOCK_N)
        b_acc, b_max, b_sum = attend(
            b_query, b_acc, b_max, b_sum, o_keys, o_keys < split_end, key_ptr, value_ptr, bias_ptr, key_index_ptr,
            start_ptr, end_ptr, b_slopes, b_query_index, stride_key, stride_value, head_dim, value_dim, scale, softcap,
            True, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
        )  # fmt: skip
    b_output = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    o_dims = tl.arange(0, BLOCK_DV)
    p_partial = ((i_batch * tl.num_programs(1) * group + o_heads) * num_queries + o_rows) * num_splits + i_split
    p_output = partial_output_ptr + p_partial[:, None] * value_dim + o_dims[None, :]
    tl.store(p_output, b_output, mask=m_rows[:, None] & (o_dims < value_dim)[None, :])
    tl.store(partial_lse_ptr + p_partial, b_max + tl.log2(b_sum), mask=m_rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _merge(
    partial_output_ptr,
    partial_lse_ptr,
    sinks_ptr,
    output_ptr,
    lse_ptr,
    stride_output_b,
    stride_output_h,
    stride_output,
    num_splits,
    value_dim,
    HAS_SINKS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program merges the parts of one row, in the order of the keys."""
    i_query = tl.program_id(0)
    i_head = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    p_row = (i_batch * tl.num_programs(1) + i_head) * tl.num_programs(0) + i_query
    o_dims = tl.arange(0, BLOCK_DV)
    m_dims = o_dims < value_dim
    b_acc = tl.zeros([BLOCK_DV], tl.float32)
    row_max = -float("inf")
    row_sum = 0.0
    if HAS_SINKS:
        row_max = tl.load(sinks_ptr + i_head).to(tl.float32) * LOG2E
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    for first in range(0, num_splits, BLOCK_SPLITS):
        o_splits = first + tl.arange(0, BLOCK_SPLITS)
        m_splits = o_splits < num_splits
        b_lse = tl.load(partial_lse_ptr + p_row * num_splits + o_splits, mask=m_splits, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(b_lse, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(b_lse - shift)
        decay = tl.exp2(row_max - shift)
        p_output = partial_output_ptr + (p_row * num_splits + o_splits)[:, None] * value_dim + o_dims[None, :]
        b_output = tl.load(p_output, mask=m_splits[:, None] & m_dims[None, :], other=0.0)
        b_acc = b_acc * decay + tl.sum(weights[:, None] * b_output, 0)
        row_sum = row_sum * decay + tl.sum(weights, 0)
        row_max = new_max
    b_acc = b_acc / tl.where(row_sum == 0.0, 1.0, row_sum)
    p_output = output_ptr + i_batch * stride_output_b + i_head * stride_output_h + i_query.to(tl.int64) * stride_output
    tl.store(p_output + o_dims, b_acc.to(output_ptr.dtype.element_ty), mask=m_dims)
    tl.store(lse_ptr + p_row, (row_max + tl.log2(row_sum)) / LOG2E)
