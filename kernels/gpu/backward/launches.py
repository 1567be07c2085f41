"""The launches of the backward, in order."""

from __future__ import annotations

import torch
from rewriter.kernels.gpu.backward.key_gradients import _key_gradients
from rewriter.kernels.gpu.backward.list_gradients import _list_gradients
from rewriter.kernels.gpu.backward.query_gradient import _query_gradient
from rewriter.kernels.gpu.kernel_inputs import KernelInputs
from rewriter.kernels.gpu.kernel_inputs import range_strides
from rewriter.kernels.gpu.kernel_inputs import row_strides
from rewriter.kernels.gpu.launch import launch
from rewriter.kernels.gpu.schedule import BACKWARD_CAPACITY
from rewriter.kernels.gpu.schedule import MAX_SEGMENTS
from torch import Tensor


def backward(
    arguments: KernelInputs, output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, bias and sinks (None where there is none), in the dtypes of the inputs."""
    a = arguments
    query_config, key_config = a.config("backward_query"), a.config("backward_key")
    tile_rows, tile_heads, chunks = a.tile_shape(query_config.block_m)
    schedule = a.schedule("backward_query")
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
        LIST_STAGES=a.list_stages(query_config),
        **a.constants(query_config),
    )

    block = key_config.block_n
    partial_begin, group_begin = a.places(schedule)
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
