"""Key scores: how much attention each key gets from some query rows, given their log-sum-exp.

One program per block of keys goes over the rows: nothing of the size rows x keys exists. Logits are keys by rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from rewriter.kernels.gpu.kernel_inputs import KernelInputs
from rewriter.kernels.gpu.kernel_inputs import row_strides
from rewriter.kernels.gpu.kernel_inputs import shared_strides
from rewriter.kernels.gpu.launch import UNSPECIALIZED
from rewriter.kernels.gpu.launch import launch
from rewriter.kernels.gpu.tiles import LOG2E
from rewriter.kernels.gpu.tiles import base2_logits
from rewriter.kernels.gpu.tiles import dot
from rewriter.kernels.gpu.tiles import in_fp32
from rewriter.kernels.gpu.tiles import load_rows
from rewriter.kernels.gpu.tiles import packed_rows
from rewriter.kernels.gpu.tiles import visible
from torch import Tensor


def key_scores(arguments: KernelInputs, lse: Tensor, group: str) -> Tensor:
    """fp32 `[B, Hkv, K]`, or `[B, Hq, K]` for `group="per_query_head"`. `lse` is `[B, Hq, Q]`; the value is not read."""
    a = arguments
    config = a.config("key_scores")
    # The mean over a group needs one sum for all its heads, the others one for each.
    tile_rows, tile_heads, chunks = a.tile_shape(config.block_m) if group == "mean" else (config.block_m, 1, a.group)
    heads = a.query.size(1) if group == "per_query_head" else a.num_kv_heads
    scores = torch.empty((a.num_batch, heads, a.num_keys), dtype=torch.float32, device=a.query.device)
    launch(_key_scores, (-(-a.num_keys // config.block_n), a.num_kv_heads, a.num_batch))(
        a.query,
        a.key,
        lse.float().contiguous(),
        scores,
        *a.logit_tensors(),
        a.start,
        a.end,
        a.query_index,
        *row_strides(a.query, a.key),
        *a.logit_strides(),
        *shared_strides(a.start, 2),
        *shared_strides(a.end, 2),
        *shared_strides(a.query_index, 1),
        a.num_queries,
        a.num_keys,
        -(-a.num_queries // tile_rows),
        chunks,
        a.group,
        tile_rows,
        tile_heads,
        a.head_dim,
        a.scale,
        a.softcap,
        GROUP=group,
        **{k: v for k, v in a.constants(config).items() if k != "BLOCK_DV"},
    )
    return scores


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_scores(
    query_ptr,
    key_ptr,
    lse_ptr,
    scores_ptr,
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
    num_tiles,
    num_chunks,
    group,
    tile_rows,
    tile_heads,
    head_dim,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale, softcap = in_fp32(scale), in_fp32(softcap)
    i_kv_head = tl.program_id(1).to(tl.int64)
    i_batch = tl.program_id(2).to(tl.int64)
    o_keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_keys = o_keys < num_keys
    o_dims = tl.arange(0, BLOCK_D)
    p_key = key_ptr + i_batch * stride_key_b + i_kv_head * stride_key_h
    b_key = load_rows(p_key, o_keys, m_keys, o_dims, stride_key, head_dim, True, EVEN)  # [BN, D]
    p_start = start_ptr + i_batch * stride_start_b + i_kv_head * stride_start_h
    b_start = tl.load(p_start + o_keys, mask=m_keys, other=0)
    p_end = end_ptr + i_batch * stride_end_b + i_kv_head * stride_end_h
    b_end = tl.load(p_end + o_keys, mask=m_keys, other=0)
    b_bias = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        p_bias = bias_ptr + i_batch * stride_bias_b + i_kv_head * stride_bias_h + o_keys
        b_bias = tl.load(p_bias, mask=m_keys, other=0.0).to(tl.float32)
    b_key_index = o_keys
    if HAS_ALIBI:
        b_key_index = tl.load(key_index_ptr + i_batch * stride_key_index_b + o_keys, mask=m_keys, other=0)
    b_total = tl.zeros([BLOCK_N], tl.float32)
    for i_chunk in range(num_chunks):
        b_sum = tl.zeros([BLOCK_N], tl.float32)
        for i_tile in range(num_tiles):
            o_rows, o_heads, m_rows = packed_rows(i_tile, i_chunk, tile_rows, tile_heads, group, num_queries, BLOCK_M)
            b_query_index = tl.load(query_index_ptr + i_batch * stride_query_index_b + o_rows, mask=m_rows, other=0)
            o_heads = i_kv_head * group + o_heads
            p_query = query_ptr + i_batch * stride_query_b + o_heads * stride_query_h
            p_query += o_rows.to(tl.int64) * stride_query
            m_query = m_rows[:, None] & (o_dims < head_dim)[None, :]
            b_query = tl.load(p_query[:, None] + o_dims[None, :], mask=m_query, other=0.0)  # [BM, D]
            p_lse = lse_ptr + (i_batch * tl.num_programs(1) * group + o_heads) * num_queries + o_rows
            b_lse = tl.load(p_lse, mask=m_rows, other=float("inf"))
            b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
            b_slopes = b_lse
            if HAS_ALIBI:
                b_slopes = tl.load(slopes_ptr + o_heads, mask=m_rows, other=0.0).to(tl.float32)
            logits, _ = base2_logits(
                dot(b_key, tl.trans(b_query), PRECISION),  # [BN, BM]
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
            m_visible = visible(b_query_index[None, :], b_start[:, None], b_end[:, None])
            b_sum += tl.sum(tl.where(m_visible, tl.exp2(logits - b_lse[None, :]), 0.0), 1)
        if GROUP == "per_query_head":
            p_scores = scores_ptr + ((i_batch * tl.num_programs(1) + i_kv_head) * group + i_chunk) * num_keys
            tl.store(p_scores + o_keys, b_sum, mask=m_keys)
        elif GROUP == "max":
            b_total = tl.maximum(b_total, b_sum)
        else:
            b_total += b_sum
    if GROUP != "per_query_head":
        if GROUP == "mean":
            b_total /= group
        p_scores = scores_ptr + (i_batch * tl.num_programs(1) + i_kv_head) * num_keys
        tl.store(p_scores + o_keys, b_total, mask=m_keys)
