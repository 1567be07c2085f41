"""Gradients of key, value and bias: partial sums of the lists, and what the keys get in their runs."""

from __future__ import annotations

import triton
import triton.language as tl
from rewriter.kernels.gpu.backward.key_tiles import add_key_gradients
from rewriter.kernels.gpu.launch import UNSPECIALIZED
from rewriter.kernels.gpu.tiles import in_fp32
from rewriter.kernels.gpu.tiles import load_rows


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_gradients(
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
    last_segment_ptr,
    run_first_ptr,
    run_last_ptr,
    used_before_ptr,
    full_first_ptr,
    full_last_ptr,
    grad_key_ptr,
    grad_value_ptr,
    grad_bias_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale, softcap = in_fp32(scale), in_fp32(softcap)
    i_block = tl.program_id(0)
    i_kv_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    i_row = i_batch * range_stride_b + i_kv_head * range_stride_h
    o_keys = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_keys = o_keys < num_keys
    start_ptr += i_row * num_keys
    end_ptr += i_row * num_keys
    partial_begin_ptr += i_row * num_keys
    first_segment_ptr += i_row * num_keys
    last_segment_ptr += i_row * num_keys
    run_first_ptr += i_row * num_keys
    run_last_ptr += i_row * num_keys
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
    m_key = m_keys[:, None] & (o_dims < head_dim)[None, :]
    m_value = m_keys[:, None] & (o_value_dims < value_dim)[None, :]

    # The scale is applied at the end: partial sums are without it too.
    b_grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    b_grad_bias = tl.zeros([BLOCK_N], tl.float32)
    b_partial = tl.load(partial_begin_ptr + o_keys, mask=m_keys, other=0)
    b_count = tl.load(last_segment_ptr + o_keys, mask=m_keys, other=0)
    b_count -= tl.load(first_segment_ptr + o_keys, mask=m_keys, other=0)
    p_partial = (i_batch * tl.num_programs(1) + i_kv_head) * num_partial
    partial_key_ptr += p_partial * head_dim
    partial_value_ptr += p_partial * value_dim
    partial_bias_ptr += p_partial
    for i in range(tl.max(b_count, 0)):
        m_partial = i < b_count
        o_partial = b_partial + i
        p_key = partial_key_ptr + o_partial[:, None] * head_dim + o_dims[None, :]
        b_grad_key += tl.load(p_key, mask=m_partial[:, None] & m_key, other=0.0)
        p_value = partial_value_ptr + o_partial[:, None] * value_dim + o_value_dims[None, :]
        b_grad_value += tl.load(p_value, mask=m_partial[:, None] & m_value, other=0.0)
        if HAS_BIAS:
            b_grad_bias += tl.load(partial_bias_ptr + o_partial, mask=m_partial, other=0.0)

    b_run_first = tl.load(run_first_ptr + o_keys, mask=m_keys, other=2147483647)
    b_run_last = tl.load(run_last_ptr + o_keys, mask=m_keys, other=0)
    first_tile = tl.min(b_run_first, 0)
    last_tile = tl.maximum(tl.max(b_run_last, 0), first_tile)
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
    # Tiles whose rows all see all keys of the block: from where the last key is seen, to where the first one is not.
    last_key = tl.minimum(i_block * BLOCK_N + BLOCK_N, num_keys) - 1
    full_first = tl.maximum(tl.load(full_first_ptr + i_row * num_keys + last_key), first_tile)
    full_last = tl.minimum(tl.load(full_last_ptr + i_row * num_keys + i_block * BLOCK_N), last_tile)
    full_last = tl.maximum(full_last, full_first)
    p_used = used_before_ptr + i_row * (num_tiles + 1)
    if full_last > last_tile or tl.load(p_used + full_last) - tl.load(p_used + full_first) < full_last - full_first:
        full_first = first_tile
        full_last = first_tile
    for i_chunk in range(num_chunks):
        for i_part in tl.range(full_first * PARTS, full_last * PARTS, disable_licm=True):
            b_grad_key, b_grad_value, b_grad_bias = add_key_gradients(
                b_key, b_value, b_grad_key, b_grad_value, b_grad_bias, o_keys, m_keys, b_start, b_end, b_bias, b_key_index,
                i_part, i_chunk, query_ptr, grad_ptr, packed_lse_ptr, packed_delta_ptr, packed_index_ptr, slopes_ptr,
                order_ptr, run_begin_ptr, run_end_ptr, stride_query_h, stride_query, stride_grad_h, stride_grad,
                num_queries, num_tiles, group, tile_rows, tile_heads, head_dim, value_dim, scale, softcap, False, False,
                HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_ORDER, PARTS, BLOCK_M, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
            )  # fmt: skip
        before = (full_first - first_tile) * PARTS
        for i in tl.range(before + (last_tile - full_last) * PARTS, disable_licm=True):
            i_part = tl.where(i < before, first_tile * PARTS + i, full_last * PARTS + i - before)
            b_grad_key, b_grad_value, b_grad_bias = add_key_gradients(
                b_key, b_value, b_grad_key, b_grad_value, b_grad_bias, o_keys, m_keys, b_start, b_end, b_bias, b_key_index,
                i_part, i_chunk, query_ptr, grad_ptr, packed_lse_ptr, packed_delta_ptr, packed_index_ptr, slopes_ptr,
                order_ptr, run_begin_ptr, run_end_ptr, stride_query_h, stride_query, stride_grad_h, stride_grad,
                num_queries, num_tiles, group, tile_rows, tile_heads, head_dim, value_dim, scale, softcap, True, False,
                HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_ORDER, PARTS, BLOCK_M, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
            )  # fmt: skip
    o_outputs = (i_batch * tl.num_programs(1) + i_kv_head) * num_keys + o_keys
    b_grad_key = (b_grad_key * scale).to(grad_key_ptr.dtype.element_ty)
    tl.store(grad_key_ptr + o_outputs[:, None] * head_dim + o_dims[None, :], b_grad_key, mask=m_key)
    b_grad_value = b_grad_value.to(grad_value_ptr.dtype.element_ty)
    tl.store(grad_value_ptr + o_outputs[:, None] * value_dim + o_value_dims[None, :], b_grad_value, mask=m_value)
    if HAS_BIAS:
        tl.store(grad_bias_ptr + o_outputs, b_grad_bias, mask=m_keys)
