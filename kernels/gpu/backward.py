"""Backward: the query's gradient by tiles of query rows, then those of key, value and bias by groups of keys.

    d logit = p * (dp - delta),   p = exp(logit - lse),   dp = dO V^T,   delta = rowsum(dO * O) - dlse

1. `_query_gradient` visits keys as the forward does; it also writes delta.
2. `_list_gradients` holds `BLOCK_N` keys of a segment's list in registers and goes over the tiles of the segment in which
   they are alive. Its sums are partial: one row for each (segment, key), stored by key.
3. `_key_gradients` holds `BLOCK_N` neighbouring keys, starts from the sum of their partial rows, in the order of the
   segments, goes over the tiles that have them in their run, and writes the gradients.

Nothing is added to an output by two programs, so results are bitwise equal from run to run. Grouping the keys of a segment
computes 1.06 to 1.19 times the visible pairs of a dynamic mask; neighbours or keys of like lifetimes over the whole length
compute 1.4 to 4.8 times, and slots assigned by linear scan 1.00 to 1.04 times, but a group of 64 slots changes occupants
every few tiles and each change costs a reload of its keys (`bench/work_ratio.py`).
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
from rewriter.kernels.gpu.schedule import BACKWARD_CAPACITY
from rewriter.kernels.gpu.schedule import MAX_SEGMENTS
from rewriter.kernels.gpu.schedule import build
from rewriter.kernels.gpu.tiles import LOG2E
from rewriter.kernels.gpu.tiles import add_dot
from rewriter.kernels.gpu.tiles import base2_logits
from rewriter.kernels.gpu.tiles import dot
from rewriter.kernels.gpu.tiles import in_fp32
from rewriter.kernels.gpu.tiles import load_rows
from rewriter.kernels.gpu.tiles import masked_block
from rewriter.kernels.gpu.tiles import masked_blocks
from rewriter.kernels.gpu.tiles import packed_rows
from torch import Tensor


def backward(
    arguments: KernelInputs, output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, bias and sinks (None where there is none), in the dtypes of the inputs."""
    a = arguments
    query_config, key_config = a.config("backward_query"), a.config("backward_key")
    tile_rows, tile_heads, chunks = a.tile_shape(query_config.block_m)
    schedule = build(a.start, a.end, a.query_index, tile_rows, query_config.block_n, BACKWARD_CAPACITY)
    order, order_stride = a.order()
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    lse, grad_lse = lse.contiguous(), grad_lse.float().contiguous()
    delta = torch.empty_like(lse)
    grad_query = torch.empty_like(a.query, memory_format=torch.contiguous_format)
    packed_lse = lse.new_empty(a.num_batch, a.num_kv_heads, chunks * schedule.num_tiles, query_config.block_m)
    packed_delta = torch.empty_like(packed_lse)
    packed_index = torch.empty_like(packed_lse, dtype=torch.int32)
    sizes = (a.num_queries, a.num_keys, schedule.num_tiles)
    shape = (a.group, tile_rows, tile_heads, a.head_dim, a.value_dim, a.scale, a.softcap)
    launch(_query_gradient, (schedule.num_tiles * chunks, a.num_kv_heads, a.num_batch))(
        a.query,
        a.key,
        a.value,
        output,
        grad_output,
        lse,
        grad_lse,
        delta,
        packed_lse,
        packed_delta,
        packed_index,
        grad_query,
        *a.logit_tensors(),
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
        *row_strides(a.query, a.key, a.value, output, grad_output, grad_query),
        *a.logit_strides(),
        *range_strides(schedule),
        order_stride,
        *sizes,
        schedule.list_keys.size(2),
        *shape,
        HAS_ORDER=a.row_order is not None,
        MAX_SEGMENTS=MAX_SEGMENTS,
        **a.constants(query_config),
    )

    # Where the partial sums of each key begin, and the groups of each segment's list.
    block = key_config.block_n
    rows_of_key = schedule.last_segment - schedule.first_segment
    partial_begin = (rows_of_key.cumsum(dim=2, dtype=torch.int32) - rows_of_key).contiguous()
    groups = (schedule.list_begin.diff(dim=2) + (block - 1)) // block
    group_begin = torch.nn.functional.pad(groups.cumsum(dim=2, dtype=torch.int32), (1, 0)).contiguous()
    num_partial = BACKWARD_CAPACITY * a.num_keys
    partial_shape = (a.num_batch, a.num_kv_heads, num_partial)
    partial_key = lse.new_empty(*partial_shape, a.head_dim)
    partial_value = lse.new_empty(*partial_shape, a.value_dim)
    partial_bias = lse.new_empty(partial_shape if a.bias is not None else (1,))
    grad_key = torch.empty_like(a.key, memory_format=torch.contiguous_format)
    grad_value = torch.empty_like(a.value, memory_format=torch.contiguous_format)
    grad_bias = lse.new_empty(a.key.shape[:3] if a.bias is not None else (1,))
    inputs = (
        a.query,
        a.key,
        a.value,
        grad_output,
        packed_lse,
        packed_delta,
        packed_index,
        *a.logit_tensors(),
        schedule.start,
        schedule.end,
        order,
        schedule.run_begin,
        schedule.run_end,
        partial_key,
        partial_value,
        partial_bias,
        partial_begin,
        schedule.first_segment,
    )
    strides = (
        *row_strides(a.query, a.key, a.value, grad_output),
        *a.logit_strides(),
        *range_strides(schedule),
        order_stride,
    )
    # A tile of the query's kernel is a whole number of tiles of these.
    parts = query_config.block_m // key_config.block_m
    constants = {"HAS_ORDER": a.row_order is not None, "PARTS": parts, **a.constants(key_config)}
    # A list of n keys has fewer than n / block + 1 groups.
    max_groups = -(-num_partial // block) + MAX_SEGMENTS
    launch(_list_gradients, (max_groups, a.num_kv_heads, a.num_batch))(
        *inputs,
        schedule.segment_tiles,
        schedule.list_begin,
        schedule.list_full,
        schedule.list_keys,
        group_begin,
        schedule.first_tile,
        schedule.last_tile,
        *strides,
        *sizes,
        num_partial,
        chunks,
        *shape,
        MAX_SEGMENTS=MAX_SEGMENTS,
        **constants,
    )
    launch(_key_gradients, (-(-a.num_keys // block), a.num_kv_heads, a.num_batch))(
        *inputs,
        schedule.last_segment,
        schedule.run_first,
        schedule.run_last,
        schedule.used_before,
        schedule.full_first,
        schedule.full_last,
        grad_key,
        grad_value,
        grad_bias,
        *strides,
        *sizes,
        num_partial,
        chunks,
        *shape,
        **constants,
    )
    bias_gradient = sinks_gradient = None
    if a.bias is not None:
        bias_gradient = grad_bias.sum_to_size(a.bias.shape).to(a.bias.dtype)
    if a.sinks is not None:
        weights = torch.exp(a.sinks.float()[:, None] - lse)
        sinks_gradient = -(weights * delta).sum(dim=(0, 2)).to(a.sinks.dtype)
    return grad_query, grad_key, grad_value, bias_gradient, sinks_gradient


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
        m_visible = (b_start[None, :] <= b_query_index[:, None]) & (b_query_index[:, None] < b_end[None, :])
        m_visible &= m_keys[None, :]
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
    for first in tl.range(list_begin, masked_begin, BLOCK_N, disable_licm=IS_FP32):
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


@triton.jit
def _add_key_gradients(
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
    group,
    tile_rows,
    tile_heads,
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
        m_visible = (b_start[:, None] <= b_query_index[None, :]) & (b_query_index[None, :] < b_end[:, None])
        weights = tl.where(m_visible & m_own[:, None], weights, 0.0)
    b_grad_value = add_dot(b_grad_value, weights.to(b_grad.dtype), b_grad, PRECISION)  # [BN, DV]
    grad_weights = dot(b_value, tl.trans(b_grad), PRECISION)  # [BN, BM]
    grad_logits = weights * (grad_weights - b_delta[None, :])
    if HAS_BIAS:
        b_grad_bias += tl.sum(grad_logits, 1)
    if HAS_SOFTCAP:
        grad_logits *= 1 - b_tanh * b_tanh
    b_grad_key = add_dot(b_grad_key, grad_logits.to(b_query.dtype), b_query, PRECISION)  # [BN, D]
    return b_grad_key, b_grad_value, b_grad_bias


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
            b_grad_key, b_grad_value, b_grad_bias = _add_key_gradients(
                b_key, b_value, b_grad_key, b_grad_value, b_grad_bias, o_keys, m_keys, b_start, b_end, b_bias, b_key_index,
                i_part, i_chunk, query_ptr, grad_ptr, packed_lse_ptr, packed_delta_ptr, packed_index_ptr, slopes_ptr,
                order_ptr, run_begin_ptr, run_end_ptr, stride_query_h, stride_query, stride_grad_h, stride_grad,
                num_queries, num_tiles, group, tile_rows, tile_heads, head_dim, value_dim, scale, softcap, False, True,
                HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_ORDER, PARTS, BLOCK_M, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
            )  # fmt: skip
        for i_part in tl.range(full_end * PARTS, last_tile * PARTS, disable_licm=True):
            b_grad_key, b_grad_value, b_grad_bias = _add_key_gradients(
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
            b_grad_key, b_grad_value, b_grad_bias = _add_key_gradients(
                b_key, b_value, b_grad_key, b_grad_value, b_grad_bias, o_keys, m_keys, b_start, b_end, b_bias, b_key_index,
                i_part, i_chunk, query_ptr, grad_ptr, packed_lse_ptr, packed_delta_ptr, packed_index_ptr, slopes_ptr,
                order_ptr, run_begin_ptr, run_end_ptr, stride_query_h, stride_query, stride_grad_h, stride_grad,
                num_queries, num_tiles, group, tile_rows, tile_heads, head_dim, value_dim, scale, softcap, False, False,
                HAS_BIAS, HAS_ALIBI, HAS_SOFTCAP, HAS_ORDER, PARTS, BLOCK_M, BLOCK_D, BLOCK_DV, EVEN, PRECISION,
            )  # fmt: skip
        before = (full_first - first_tile) * PARTS
        for i in tl.range(before + (last_tile - full_last) * PARTS, disable_licm=True):
            i_part = tl.where(i < before, first_tile * PARTS + i, full_last * PARTS + i - before)
            b_grad_key, b_grad_value, b_grad_bias = _add_key_gradients(
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
