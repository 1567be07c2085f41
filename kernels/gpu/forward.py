"""Forward: one program per tile of query rows, KV head and batch row.

It visits the keys of its tile in three loops: the whole blocks of the run and the keys of the list that all rows of its
segment see, which need no mask, and then the borders of the run and the rest of the list, which do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rewriter.kernels.gpu.kernel_inputs import KernelInputs
from rewriter.kernels.gpu.kernel_inputs import range_strides
from rewriter.kernels.gpu.kernel_inputs import row_strides
from rewriter.kernels.gpu.launch import UNSPECIALIZED
from rewriter.kernels.gpu.launch import launch
from rewriter.kernels.gpu.schedule import MAX_SEGMENTS
from rewriter.kernels.gpu.tiles import LOG2E
from rewriter.kernels.gpu.tiles import add_dot
from rewriter.kernels.gpu.tiles import base2_logits
from rewriter.kernels.gpu.tiles import dot
from rewriter.kernels.gpu.tiles import in_fp32
from rewriter.kernels.gpu.tiles import load_rows
from rewriter.kernels.gpu.tiles import masked_block
from rewriter.kernels.gpu.tiles import masked_blocks
from rewriter.kernels.gpu.tiles import packed_rows
from rewriter.kernels.gpu.tiles import visible
from torch import Tensor


def forward(arguments: KernelInputs) -> tuple[Tensor, Tensor]:
    """Output `[B, Hq, Q, Dv]` in the query's dtype, heads innermost, and log-sum-exp `[B, Hq, Q]` in fp32."""
    a = arguments
    config = a.config("forward")
    tile_rows, tile_heads, chunks = a.tile_shape(config.block_m)
    schedule = a.schedule("forward")
    order, order_stride = a.order()
    output = a.empty_output()
    lse = torch.empty(a.query.shape[:3], dtype=torch.float32, device=a.query.device)
    launch(_forward, (schedule.num_tiles * chunks, a.num_kv_heads, a.num_batch))(
        a.query,
        a.key,
        a.value,
        output,
        lse,
        *a.logit_tensors(),
        a.query if a.sinks is None else a.sinks,
        schedule.start,
        schedule.end,
        schedule.query_index,
        order,
        schedule.run_begin,
        schedule.full_begin,
        schedule.full_end,
        schedule.run_end,
        schedule.segment_tiles,
        schedule.list_begin,
        schedule.list_full,
        schedule.list_keys,
        *row_strides(a.query, a.key, a.value, output),
        *a.logit_strides(),
        *range_strides(schedule),
        order_stride,
        a.num_queries,
        a.num_keys,
        schedule.num_tiles,
        schedule.list_keys.size(2),
        a.group,
        tile_rows,
        tile_heads,
        a.head_dim,
        a.value_dim,
        a.scale,
        a.softcap,
        HAS_ORDER=a.row_order is not None,
        HAS_SINKS=a.sinks is not None,
        MAX_SEGMENTS=MAX_SEGMENTS,
        LIST_STAGES=a.list_stages(config),
        **a.constants(config),
    )
    return output, lse


@triton.jit
def attend(
    b_query,
    b_acc,
    b_max,
    b_sum,
    o_keys,
    m_keys,
    key_ptr,
    value_ptr,
    bias_ptr,
    key_index_ptr,
    start_ptr,
    end_ptr,
    b_slopes,
    b_query_index,
    stride_key,
    stride_value,
    head_dim,
    value_dim,
    scale,
    softcap,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Folds one block of keys into the running maximum, sum and output."""
    b_key = load_rows(key_ptr, o_keys, m_keys, tl.arange(0, BLOCK_D), stride_key, head_dim, MASKED, EVEN)  # [BN, D]
    products = dot(b_query, tl.trans(b_key), PRECISION)  # [BM, BN]
    b_bias = b_sum
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + o_keys, mask=m_keys, other=0.0).to(tl.float32)[None, :]
    b_key_index = o_keys[None, :]
    if HAS_ALIBI:
        b_key_index = tl.load(key_index_ptr + o_keys, mask=m_keys, other=0)[None, :]
    logits, _ = base2_logits(
        products,
        b_query_index[:, None],
        b_key_index,
        b_slopes[:, None],
        b_bias,
        scale,
        softcap,
        HAS_BIAS,
        HAS_ALIBI,
        HAS_SOFTCAP,
    )
    if MASKED:
        b_start = tl.load(start_ptr + o_keys, mask=m_keys, other=0)
        b_end = tl.load(end_ptr + o_keys, mask=m_keys, other=0)
        # A key that is none begins and ends at 0.
        m_visible = visible(b_query_index[:, None], b_start[None, :], b_end[None, :])
        logits = tl.where(m_visible, logits, float("-inf"))
    new_max = tl.maximum(b_max, tl.max(logits, 1))
    # A row that has seen no key yet has a maximum of -inf, which must not be subtracted from -inf.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(logits - shift[:, None])
    decay = tl.exp2(b_max - shift)
    b_sum = b_sum * decay + tl.sum(weights, 1)
    b_value = load_rows(value_ptr, o_keys, m_keys, tl.arange(0, BLOCK_DV), stride_value, value_dim, MASKED, EVEN)
    b_acc = add_dot(b_acc * decay[:, None], weights.to(b_value.dtype), b_value, PRECISION)  # [BM, DV]
    return b_acc, new_max, b_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    lse_ptr,
    bias_ptr,
    slopes_ptr,
    key_index_ptr,
    sinks_ptr,
    start_ptr,
    end_ptr,
    query_index_ptr,
    order_ptr,
    run_begin_ptr,
    full_begin_ptr,
    full_end_ptr,
    run_end_ptr,
    segment_tiles_ptr,
    list_begin_ptr,
    list_full_ptr,
    list_keys_ptr,
    stride_query_b,
    stride_query_h,
    stride_query,
    stride_key_b,
    stride_key_h,
    stride_key,
    stride_value_b,
    stride_value_h,
    stride_value,
    stride_output_b,
    stride_output_h,
    stride_output,
    stride_bias_b,
    stride_bias_h,
    stride_key_index_b,
    range_stride_b,
    range_stride_h,
    stride_order_b,
    num_queries,
    num_keys,
    num_tiles,
    list_size,
    group,
    tile_rows,
    tile_heads,
    head_dim,
    value_dim,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
    LIST_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale, softcap = in_fp32(scale), in_fp32(softcap)
    # Late tiles of a causal mask have most keys: they go first.
    i_tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    i_chunk = tl.program_id(0) // num_tiles
    i_kv_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_row = i_batch * range_stride_b + i_kv_head * range_stride_h
    o_rows, o_heads, m_rows = packed_rows(i_tile, i_chunk, tile_rows, tile_heads, group, num_queries, BLOCK_M)
    b_query_index = tl.load(query_index_ptr + i_row * num_queries + o_rows, mask=m_rows, other=0)
    if HAS_ORDER:
        o_rows = tl.load(order_ptr + i_batch * stride_order_b + o_rows, mask=m_rows, other=0)
    o_heads = i_kv_head * group + o_heads
    o_dims = tl.arange(0, BLOCK_D)
    p_query = query_ptr + i_batch * stride_query_b + o_heads * stride_query_h + o_rows.to(tl.int64) * stride_query
    m_query = m_rows[:, None] if EVEN else m_rows[:, None] & (o_dims < head_dim)[None, :]
    b_query = tl.load(p_query[:, None] + o_dims[None, :], mask=m_query, other=0.0)  # [BM, D]
    b_slopes = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        b_slopes = tl.load(slopes_ptr + o_heads, mask=m_rows, other=0.0).to(tl.float32)
    key_ptr += i_batch * stride_key_b + i_kv_head * stride_key_h
    value_ptr += i_batch * stride_value_b + i_kv_head * stride_value_h
    bias_ptr += i_batch * stride_bias_b + i_kv_head * stride_bias_h
    key_index_ptr += i_batch * stride_key_index_b
    start_ptr += i_row * num_keys
    end_ptr += i_row * num_keys

    p_tile = i_row * num_tiles + i_tile
    run_begin = tl.load(run_begin_ptr + p_tile)
    full_begin = tl.load(full_begin_ptr + p_tile)
    full_end = tl.load(full_end_ptr + p_tile)
    run_end = tl.load(run_end_ptr + p_tile)
    i_segment = i_tile // tl.load(segment_tiles_ptr + i_row)
    p_list = i_row * (MAX_SEGMENTS + 1) + i_segment
    list_begin = tl.load(list_begin_ptr + p_list)
    list_end = tl.load(list_begin_ptr + p_list + 1)
    full_blocks = tl.load(list_full_ptr + i_row * MAX_SEGMENTS + i_segment) // BLOCK_N
    masked_begin = list_begin + full_blocks * BLOCK_N
    list_keys_ptr += i_row * list_size

    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    o_block = tl.arange(0, BLOCK_N)
    for first in range(full_begin, full_end, BLOCK_N):
        o_keys = first + o_block
        b_acc, b_max, b_sum = attend(
            b_query, b_acc, b_max, b_sum, o_keys, o_keys < num_keys, key_ptr, value_ptr, bias_ptr, key_index_ptr,
            start_ptr, end_ptr, b_slopes, b_query_index, stride_key, stride_value, head_dim, value_dim, scale, softcap,
            False, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
        )  # fmt: skip
    for first in tl.range(list_begin, masked_begin, BLOCK_N, num_stages=LIST_STAGES):
        o_keys = tl.load(list_keys_ptr + first + o_block)
        b_acc, b_max, b_sum = attend(
            b_query, b_acc, b_max, b_sum, o_keys, o_keys < num_keys, key_ptr, value_ptr, bias_ptr, key_index_ptr,
            start_ptr, end_ptr, b_slopes, b_query_index, stride_key, stride_value, head_dim, value_dim, scale, softcap,
            False, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
        )  # fmt: skip
    for i in range(masked_blocks(run_begin, full_begin, full_end, run_end, masked_begin, list_end, BLOCK_N)):
        o_keys, m_keys = masked_block(
            i, run_begin, full_begin, full_end, run_end, masked_begin, list_end, list_keys_ptr, BLOCK_N
        )
        b_acc, b_max, b_sum = attend(
            b_query, b_acc, b_max, b_sum, o_keys, m_keys, key_ptr, value_ptr, bias_ptr, key_index_ptr,
            start_ptr, end_ptr, b_slopes, b_query_index, stride_key, stride_value, head_dim, value_dim, scale, softcap,
            True, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
        )  # fmt: skip

    if HAS_SINKS:
        b_sink = tl.load(sinks_ptr + o_heads, mask=m_rows, other=0.0).to(tl.float32) * LOG2E
        new_max = tl.maximum(b_max, b_sink)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(b_max - shift)
        b_acc = b_acc * decay[:, None]
        b_sum = b_sum * decay + tl.exp2(b_sink - shift)
        b_max = new_max
    b_lse = b_max + tl.log2(b_sum)
    b_output = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    o_dims = tl.arange(0, BLOCK_DV)
    p_output = output_ptr + i_batch * stride_output_b + o_heads * stride_output_h + o_rows.to(tl.int64) * stride_output
    m_output = m_rows[:, None] if EVEN else m_rows[:, None] & (o_dims < value_dim)[None, :]
    tl.store(p_output[:, None] + o_dims[None, :], b_output.to(output_ptr.dtype.element_ty), mask=m_output)
    p_lse = lse_ptr + (i_batch * tl.num_programs(1) * group + o_heads) * num_queries + o_rows
    tl.store(p_lse, b_lse / LOG2E, mask=m_rows)
