"""Gradients of the keys in the lists of segments: partial sums, one row for each segment and key."""

from __future__ import annotations

import triton
import triton.language as tl
from rewriter.kernels.gpu.backward.key_tiles import add_key_gradients
from rewriter.kernels.gpu.launch import UNSPECIALIZED
from rewriter.kernels.gpu.tiles import in_fp32
from rewriter.kernels.gpu.tiles import load_rows


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _list_gradients(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,
    packed_lse_ptr,
    packed_delta_ptr,
    packed_index_ptr,
    bias_ptr,
    slopes_ptr,
    key_index_ptr,
    start_ptr,
    end_ptr,
    order_ptr,
    run_begin_ptr,
    run_end_ptr,
    partial_key_ptr,
    partial_value_ptr,
    partial_bias_ptr,
    partial_begin_ptr,
    first_segment_ptr,
    segment_tiles_ptr,
    list_begin_ptr,
    list_full_ptr,
    list_keys_ptr,
    group_begin_ptr,
    first_tile_ptr,
    last_tile_ptr,
    stride_query_b,
    stride_query_h,
    stride_query,
    stride_key_b,
    stride_key_h,
    stride_key,
    stride_value_b,
    stride_value_h,
    stride_value,
    stride_grad_b,
    stride_grad_h,
    stride_grad,
    stride_bias_b,
    stride_bias_h,
    stride_key_index_b,
    range_stride_b,
    range_stride_h,
    stride_order_b,
    num_queries,
    num_keys,
    num_tiles,
    num_partial,
    num_chunks,
    group: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_heads: tl.constexpr,
    head_dim,
    value_dim,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    PARTS: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale, softcap = in_fp32(scale), in_fp32(softcap)
    i_group = tl.program_id(0)
    i_kv_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_row = i_batch * range_stride_b + i_kv_head * range_stride_h
    p_groups = group_begin_ptr + i_row * (MAX_SEGMENTS + 1)
    if i_group >= tl.load(p_groups + MAX_SEGMENTS):
        return
    # The last segment whose groups begin at or before this one; empty segments begin where the next does.
    b_group_begin = tl.load(p_groups + tl.arange(0, MAX_SEGMENTS))
    i_segment = tl.sum((b_group_begin <= i_group).to(tl.int32), 0) - 1
    p_list = i_row * (MAX_SEGMENTS + 1) + i_segment
    list_begin = tl.load(list_begin_ptr + p_list)
    list_size = tl.load(list_begin_ptr + p_list + 1) - list_begin
    place = (i_group - tl.load(p_groups + i_segment)) * BLOCK_N
    o_list = place + tl.arange(0, BLOCK_N)
    m_keys = o_list < list_size
    o_keys = tl.load(list_keys_ptr + i_row * num_partial + list_begin + o_list, mask=m_keys, other=0)
    start_ptr += i_row * num_keys
    end_ptr += i_row * num_keys
    key_ptr += i_batch * stride_key_b + i_kv_head * stride_key_h
    value_ptr += i_batch * stride_value_b + i_kv_head * stride_value_h
    query_ptr += i_batch * stride_query_b + i_kv_head * group * stride_query_h
    grad_ptr += i_batch * stride_grad_b + i_kv_head * group * stride_grad_h
    slopes_ptr += i_kv_head * group
    order_ptr += i_batch * stride_order_b
    o_packed = (i_batch * tl.num_programs(1) + i_kv_head) * num_chunks * num_tiles * PARTS * BLOCK_M
    packed_lse_ptr += o_packed
    packed_delta_ptr += o_packed
    packed_index_ptr += o_packed
    run_begin_ptr += i_row * num_tiles
    run_end_ptr += i_row * num_tiles
    o_dims = tl.arange(0, BLOCK_D)
    o_value_dims = tl.arange(0, BLOCK_DV)
    b_key = load_rows(key_ptr, o_keys, m_keys, o_dims, stride_key, head_dim, True, EVEN)
    b_value = load_rows(value_ptr, o_keys, m_keys, o_value_dims, stride_value, value_dim, True, EVEN)
    b_start = tl.load(start_ptr + o_keys, mask=m_keys, other=0)
    b_end = tl.load(end_ptr + o_keys, mask=m_keys, other=0)
    b_bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        p_bias = bias_ptr + i_batch * stride_bias_b + i_kv_head * stride_bias_h + o_keys
        b_bias = tl.load(p_bias, mask=m_keys, other=0.0).to(tl.float32)
    b_key_index = o_keys
    if HAS_ALIBI:
        b_key_index = tl.load(key_index_ptr + i_batch * stride_key_index_b + o_keys, mask=m_keys, other=0)
    segment_tiles = tl.load(segment_tiles_ptr + i_row)
    segment_begin = i_segment * segment_tiles
    segment_end = tl.minimum(segment_begin + segment_tiles, num_tiles)
    b_first_tile = tl.load(first_tile_ptr + i_row * num_keys + o_keys, mask=m_keys, other=2147483647)
    b_last_tile = tl.load(last_tile_ptr + i_row * num_keys + o_keys, mask=m_keys, other=0)
    first_tile = tl.maximum(segment_begin, tl.min(b_first_tile, 0))
    last_tile = tl.minimum(segment_end, tl.max(b_last_tile, 0))
    is_full = place + BLOCK_N <= tl.load(list_full_ptr + i_row * MAX_SEGMENTS + i_segment)
    full_end = tl.where(is_full, last_tile, first_tile)

    b_grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    b_grad_bias = tl.zeros([BLOCK_N], tl.float32)
    for i_chunk in range(num_chunks):
        for i_part in tl.range(first_tile * PARTS, full_end * PARTS, disable_licm=True):
            b_grad_key, b_grad_value, b_grad_bias = add_key_gradients(
                b_key, b_value, b_grad_key, b_grad_value, b_grad_bias, o_keys, m_keys, b_start, b_end, b_bias, b_key_index,
                i_part, i_chunk, query_ptr, grad_ptr, packed_lse_ptr, packed_delta_ptr, packed_index_ptr, slopes_ptr,
                order_ptr, run_begin_ptr, run_end_ptr, stride_query_h, stride_query, stride_grad_h, stride_grad,
                num_queries, num_tiles, group, tile_rows, tile_heads, head_dim, value_dim, scale, softcap, False, True,
                HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_ORDER, PARTS, BLOCK_M, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
            )  # fmt: skip
        for i_part in tl.range(full_end * PARTS, last_tile * PARTS, disable_licm=True):
            b_grad_key, b_grad_value, b_grad_bias = add_key_gradients(
                b_key, b_value, b_grad_key, b_grad_value, b_grad_bias, o_keys, m_keys, b_start, b_end, b_bias, b_key_index,
                i_part, i_chunk, query_ptr, grad_ptr, packed_lse_ptr, packed_delta_ptr, packed_index_ptr, slopes_ptr,
                order_ptr, run_begin_ptr, run_end_ptr, stride_query_h, stride_query, stride_grad_h, stride_grad,
                num_queries, num_tiles, group, tile_rows, tile_heads, head_dim, value_dim, scale, softcap, True, True,
                HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_ORDER, PARTS, BLOCK_M, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
            )  # fmt: skip
    # Loaded again: held through the loops, the keys would take registers from the sums.
    o_list = place + tl.arange(0, BLOCK_N)
    m_keys = o_list < list_size
    o_keys = tl.load(list_keys_ptr + i_row * num_partial + list_begin + o_list, mask=m_keys, other=0)
    partial_begin_ptr += i_row * num_keys
    first_segment_ptr += i_row * num_keys
    o_partial = tl.load(partial_begin_ptr + o_keys, mask=m_keys, other=0)
    o_partial += i_segment - tl.load(first_segment_ptr + o_keys, mask=m_keys, other=0)
    p_partial = (i_batch * tl.num_programs(1) + i_kv_head) * num_partial
    partial_key_ptr += p_partial * head_dim
    partial_value_ptr += p_partial * value_dim
    partial_bias_ptr += p_partial
    p_key = partial_key_ptr + o_partial[:, None] * head_dim + o_dims[None, :]
    tl.store(p_key, b_grad_key, mask=m_keys[:, None] & (o_dims < head_dim)[None, :])
    p_value = partial_value_ptr + o_partial[:, None] * value_dim + o_value_dims[None, :]
    tl.store(p_value, b_grad_value, mask=m_keys[:, None] & (o_value_dims < value_dim)[None, :])
    if HAS_BIAS:
        tl.store(partial_bias_ptr + o_partial, b_grad_bias, mask=m_keys)
