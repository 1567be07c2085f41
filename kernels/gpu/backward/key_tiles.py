"""What both kernels for the gradients of keys do with one tile of query rows."""

from __future__ import annotations

import triton
import triton.language as tl
from rewriter.kernels.gpu.tiles import add_dot
from rewriter.kernels.gpu.tiles import base2_logits
from rewriter.kernels.gpu.tiles import dot
from rewriter.kernels.gpu.tiles import visible


@triton.jit
def add_key_gradients(
    b_key,
    b_value,
    b_grad_key,
    b_grad_value,
    b_grad_bias,
    o_keys,
    m_keys,
    b_start,
    b_end,
    b_bias,
    b_key_index,
    i_part,
    i_chunk,
    query_ptr,
    grad_ptr,
    packed_lse_ptr,
    packed_delta_ptr,
    packed_index_ptr,
    slopes_ptr,
    order_ptr,
    run_begin_ptr,
    run_end_ptr,
    stride_query_h,
    stride_query,
    stride_grad_h,
    stride_grad,
    num_queries,
    num_tiles,
    group: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_heads: tl.constexpr,
    head_dim,
    value_dim,
    scale,
    softcap,
    MASKED: tl.constexpr,
    LISTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what one part of a tile of query rows contributes to a group's gradients, the key's without the scale.

    Logits are keys by rows here, so that the weights enter the products from registers. The loops around it go without
    code motion, which would keep addresses in registers that the sums need (208 bytes spilled on sm_90, without it none).
    """
    i_tile = i_part // PARTS
    # A row of the tile that is none repeats another; its log-sum-exp of inf makes all its weights 0.
    o_packed = i_part % PARTS * BLOCK_M + tl.arange(0, BLOCK_M)
    o_tile_rows = tl.where(o_packed < tile_rows * tile_heads, o_packed // tile_heads, 0)
    o_tile_heads = tl.minimum(i_chunk * tile_heads + o_packed % tile_heads, group - 1)
    o_rows = tl.minimum(i_tile * tile_rows + o_tile_rows, num_queries - 1)
    if HAS_ORDER:
        o_rows = tl.load(order_ptr + o_rows)
    o_rows = o_rows.to(tl.int64)
    o_dims = tl.arange(0, BLOCK_D)
    o_value_dims = tl.arange(0, BLOCK_DV)
    # A head's stride may take more than 31 bits once multiplied by a head of a large group.
    o_tile_heads = o_tile_heads.to(tl.int64)
    p_query = query_ptr + o_tile_heads * stride_query_h + o_rows * stride_query
    p_query = p_query[:, None] + o_dims[None, :]
    p_grad = grad_ptr + o_tile_heads * stride_grad_h + o_rows * stride_grad
    p_grad = p_grad[:, None] + o_value_dims[None, :]
    if EVEN:
        b_query = tl.load(p_query)  # [BM, D]
        b_grad = tl.load(p_grad)  # [BM, DV]
    else:
        b_query = tl.load(p_query, mask=(o_dims < head_dim)[None, :], other=0.0)
        b_grad = tl.load(p_grad, mask=(o_value_dims < value_dim)[None, :], other=0.0)
    o_packed = (i_chunk * num_tiles * PARTS + i_part) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_query_index = tl.load(packed_index_ptr + o_packed)
    b_lse = tl.load(packed_lse_ptr + o_packed)
    b_delta = tl.load(packed_delta_ptr + o_packed)
    b_slopes = b_delta
    if HAS_ALIBI:
        b_slopes = tl.load(slopes_ptr + o_tile_heads).to(tl.float32)
    products = dot(b_key, tl.trans(b_query), PRECISION)  # [BN, BM]
    logits, b_tanh = base2_logits(
        products,
        b_query_index[None, :],
        b_key_index[:, None],
        b_slopes[None, :],
        b_bias[:, None],
        scale,
        softcap,
        HAS_BIAS,
        HAS_ALIBI,
        HAS_SOFTCAP,
    )
    weights = tl.exp2(logits - b_lse[None, :])
    if MASKED:
        run_begin = tl.load(run_begin_ptr + i_tile)
        run_end = tl.load(run_end_ptr + i_tile)
        m_in_run = (o_keys >= run_begin) & (o_keys < run_end)
        m_own = m_keys & (~m_in_run if LISTED else m_in_run)
        b_own_end = tl.where(m_own, b_end, b_start)  # what is another's ends where it begins
        m_visible = visible(b_query_index[None, :], b_start[:, None], b_own_end[:, None])
        weights = tl.where(m_visible, weights, 0.0)
    b_grad_value = add_dot(b_grad_value, weights.to(b_grad.dtype), b_grad, PRECISION)  # [BN, DV]
    grad_weights = dot(b_value, tl.trans(b_grad), PRECISION)  # [BN, BM]
    grad_logits = weights * (grad_weights - b_delta[None, :])
    if HAS_BIAS:
        b_grad_bias += tl.sum(grad_logits, 1)
    if HAS_SOFTCAP:
        grad_logits *= 1 - b_tanh * b_tanh
    b_grad_key = add_dot(b_grad_key, grad_logits.to(b_query.dtype), b_query, PRECISION)  # [BN, D]
    return b_grad_key, b_grad_value, b_grad_bias
