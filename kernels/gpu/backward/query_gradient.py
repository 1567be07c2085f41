"""The query's gradient: one program per tile of query rows, over the keys that the forward visits."""

from __future__ import annotations

import triton
import triton.language as tl
from rewriter.kernels.gpu.launch import UNSPECIALIZED
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


@triton.jit
def _add_query_gradient(
    b_query,
    b_grad,
    b_acc,
    b_lse,
    b_delta,
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
    """Adds what one block of keys contributes to the query's gradient, without the scale. `[BM, D]`."""
    b_key = load_rows(key_ptr, o_keys, m_keys, tl.arange(0, BLOCK_D), stride_key, head_dim, MASKED, EVEN)  # [BN, D]
    products = dot(b_query, tl.trans(b_key), PRECISION)  # [BM, BN]
    b_bias = b_lse
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + o_keys, mask=m_keys, other=0.0).to(tl.float32)[None, :]
    b_key_index = o_keys[None, :]
    if HAS_ALIBI:
        b_key_index = tl.load(key_index_ptr + o_keys, mask=m_keys, other=0)[None, :]
    logits, b_tanh = base2_logits(
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
    weights = tl.exp2(logits - b_lse[:, None])
    if MASKED:
        b_start = tl.load(start_ptr + o_keys, mask=m_keys, other=0)
        b_end = tl.load(end_ptr + o_keys, mask=m_keys, other=0)
        # A key that is none begins and ends at 0.
        m_visible = visible(b_query_index[:, None], b_start[None, :], b_end[None, :])
        weights = tl.where(m_visible, weights, 0.0)
    b_value = load_rows(value_ptr, o_keys, m_keys, tl.arange(0, BLOCK_DV), stride_value, value_dim, MASKED, EVEN)
    grad_weights = dot(b_grad, tl.trans(b_value), PRECISION)  # [BM, BN]
    grad_logits = weights * (grad_weights - b_delta[:, None])
    if HAS_SOFTCAP:
        grad_logits *= 1 - b_tanh * b_tanh
    return add_dot(b_acc, grad_logits.to(b_key.dtype), b_key, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_gradient(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    grad_ptr,
    lse_ptr,
    grad_lse_ptr,
    delta_ptr,
    packed_lse_ptr,
    packed_delta_ptr,
    packed_index_ptr,
    grad_query_ptr,
    bias_ptr,
    slopes_ptr,
    key_index_ptr,
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
    stride_grad_b,
    stride_grad_h,
    stride_grad,
    stride_grad_query_b,
    stride_grad_query_h,
    stride_grad_query,
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
    o_rows = o_rows.to(tl.int64)
    o_dims = tl.arange(0, BLOCK_D)
    o_value_dims = tl.arange(0, BLOCK_DV)
    m_query = m_rows[:, None] & (o_dims < head_dim)[None, :]
    m_value = m_rows[:, None] & (o_value_dims < value_dim)[None, :]
    p_query = query_ptr + i_batch * stride_query_b + o_heads * stride_query_h + o_rows * stride_query
    b_query = tl.load(p_query[:, None] + o_dims[None, :], mask=m_query, other=0.0)  # [BM, D]
    p_grad = grad_ptr + i_batch * stride_grad_b + o_heads * stride_grad_h + o_rows * stride_grad
    b_grad = tl.load(p_grad[:, None] + o_value_dims[None, :], mask=m_value, other=0.0)  # [BM, DV]
    p_output = output_ptr + i_batch * stride_output_b + o_heads * stride_output_h + o_rows * stride_output
    b_output = tl.load(p_output[:, None] + o_value_dims[None, :], mask=m_value, other=0.0)
    p_lse = (i_batch * tl.num_programs(1) * group + o_heads) * num_queries + o_rows
    b_lse = tl.load(lse_ptr + p_lse, mask=m_rows, other=float("inf"))
    # exp2(logit - inf) = 0: a row without keys, or a row that is none, has no weights.
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
    b_delta = tl.sum(b_output.to(tl.float32) * b_grad.to(tl.float32), 1)
    b_delta -= tl.load(grad_lse_ptr + p_lse, mask=m_rows, other=0.0)
    # The gradient of a log-sum-exp of -inf may be anything, NaN too; nothing depends on it.
    b_delta = tl.where(b_lse == float("inf"), 0.0, b_delta)
    tl.store(delta_ptr + p_lse, b_delta, mask=m_rows)
    p_packed = (i_batch * tl.num_programs(1) + i_kv_head) * tl.num_programs(0) + i_chunk * num_tiles + i_tile
    p_packed = p_packed * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(packed_lse_ptr + p_packed, b_lse)
    tl.store(packed_delta_ptr + p_packed, b_delta)
    tl.store(packed_index_ptr + p_packed, b_query_index)
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

    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Without matrix units a thread would keep whole rows of its operands in registers through the loops.
    IS_FP32: tl.constexpr = PRECISION == "ieee"
    o_block = tl.arange(0, BLOCK_N)
    for first in tl.range(full_begin, full_end, BLOCK_N, disable_licm=IS_FP32):
        o_keys = first + o_block
        b_acc = _add_query_gradient(
            b_query, b_grad, b_acc, b_lse, b_delta, o_keys, o_keys < num_keys, key_ptr, value_ptr, bias_ptr,
            key_index_ptr, start_ptr, end_ptr, b_slopes, b_query_index, stride_key, stride_value, head_dim, value_dim,
            scale, softcap, False, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
        )  # fmt: skip
    for first in tl.range(list_begin, masked_begin, BLOCK_N, num_stages=LIST_STAGES, disable_licm=IS_FP32):
        o_keys = tl.load(list_keys_ptr + first + o_block)
        b_acc = _add_query_gradient(
            b_query, b_grad, b_acc, b_lse, b_delta, o_keys, o_keys < num_keys, key_ptr, value_ptr, bias_ptr,
            key_index_ptr, start_ptr, end_ptr, b_slopes, b_query_index, stride_key, stride_value, head_dim, value_dim,
            scale, softcap, False, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
        )  # fmt: skip
    for i in tl.range(
        masked_blocks(run_begin, full_begin, full_end, run_end, masked_begin, list_end, BLOCK_N), disable_licm=IS_FP32
    ):
        o_keys, m_keys = masked_block(
            i, run_begin, full_begin, full_end, run_end, masked_begin, list_end, list_keys_ptr, BLOCK_N
        )
        b_acc = _add_query_gradient(
            b_query, b_grad, b_acc, b_lse, b_delta, o_keys, m_keys, key_ptr, value_ptr, bias_ptr,
            key_index_ptr, start_ptr, end_ptr, b_slopes, b_query_index, stride_key, stride_value, head_dim, value_dim,
            scale, softcap, True, HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
        )  # fmt: skip
    p_grad_query = grad_query_ptr + i_batch * stride_grad_query_b + o_heads * stride_grad_query_h
    p_grad_query += o_rows * stride_grad_query
    tl.store(p_grad_query[:, None] + o_dims[None, :], (b_acc * scale).to(grad_query_ptr.dtype.element_ty), mask=m_query)
