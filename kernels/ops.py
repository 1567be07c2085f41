"""The operators as users and graphs call them: checks, `torch.library` registration, autograd.

`rewriter::live_range_attention` is one opaque node in a compiled graph. The public function of the same name takes
`LiveRanges`; graphs call the operator with its two vectors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from rewriter.kernels import cpu
from rewriter.kernels.live_ranges import LiveRanges
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256


class AttentionInputError(ValueError):
    """An input of live-range attention has the wrong shape, dtype or device."""


def live_range_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    live: LiveRanges,
    *,
    key_index: Tensor | None = None,
    query_index: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which query i sees key j exactly when `live.start[j] <= i < live.end[j]`.

        logit[i, j] = softcap(scale * q_i . k_j) + bias[j] - alibi_slope * |i - index_j|

    Differentiable in query, key, value, bias and sinks, and in the log-sum-exp. Grouped heads are not repeated.
    Accumulates in fp32. A row that sees no key returns 0, its log-sum-exp is -inf (the sink's logit where there are
    sinks), and its gradients are 0. Bitwise equal from run to run.

    Args:
        query: `[B, Hq, Q, D]`, fp16, bf16, fp32 or fp64.
        key: `[B, Hkv, K, D]`; Hq is a multiple of Hkv.
        value: `[B, Hkv, K, Dv]`.
        live: ranges with K keys.
        key_index: int32 or int64 `[K]` or `[B, K]`, the indices of the keys, for ALiBi; 0 .. K - 1 when left out.
            The ranges are per key column already.
        query_index: int32 or int64 `[Q]` or `[B, Q]`, the indices of the query rows that the ranges speak of;
            row r has index r + K - Q when left out (bottom-right alignment).
        bias: `[B|1, Hkv|1, K]`, added to the logits after scale and softcap.
        scale: factor of the products; `1 / sqrt(D)` when left out.
        softcap: `softcap * tanh(logit / softcap)`, positive.
        sinks: `[Hq]`, logits that join the denominator only (arXiv 2309.17453, section 3.3).
        alibi_slopes: `[Hq]` (arXiv 2108.12409, equation 3); a constant, no gradient.
        return_lse: also return the log-sum-exp.

    Returns:
        `[B, Hq, Q, Dv]` in the query's dtype; with `return_lse` also `[B, Hq, Q]` in fp32 (fp64 for fp64).

    Raises:
        AttentionInputError: an input has the wrong shape, dtype or device; the message says which and what is expected.
    """
    if not isinstance(live, LiveRanges):
        raise AttentionInputError(
            f"live must be LiveRanges, got {type(live).__name__}; build it with a constructor such as LiveRanges.causal(K)"
        )
    if softcap is not None and not softcap > 0:
        raise AttentionInputError(f"softcap must be positive, got {softcap}; leave it out for none")
    output, lse = torch.ops.rewriter.live_range_attention(
        query,
        key,
        value,
        live.start,
        live.end,
        query_index,
        key_index,
        bias,
        sinks,
        alibi_slopes,
        scale,
        softcap,
    )
    return (output, lse) if return_lse else output


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> None:
    """Raises `AttentionInputError`; runs on real and on fake tensors, and never reads values."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise AttentionInputError(f"{name} must be [B, H, S, D], got shape {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise AttentionInputError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise AttentionInputError(f"query is {query.dtype} and {name} {tensor.dtype}; cast them to one dtype")
    (num_batch, num_heads, num_queries, head_dim) = query.shape
    (_, num_kv_heads, num_keys, _) = key.shape
    if key.size(3) != head_dim:
        raise AttentionInputError(f"query has head_dim {head_dim} and key {key.size(3)}; they must be equal")
    if not 1 <= head_dim <= MAX_HEAD_DIM or not 1 <= value.size(3) <= MAX_HEAD_DIM:
        raise AttentionInputError(f"head dims must be 1 to {MAX_HEAD_DIM}, got {head_dim} (value: {value.size(3)})")
    if key.size(0) != num_batch or value.size(0) != num_batch:
        raise AttentionInputError(f"batch sizes differ: query {num_batch}, key {key.size(0)}, value {value.size(0)}")
    if num_kv_heads != value.size(1) or num_keys != value.size(2):
        raise AttentionInputError(
            f"key {list(key.shape)} and value {list(value.shape)} must agree in KV heads and number of keys"
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise AttentionInputError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    for name, tensor in (("start", start), ("end", end)):
        if tensor.dtype != torch.int32:
            raise AttentionInputError(f"{name} must be int32, got {tensor.dtype}; convert with .to(torch.int32)")
        if tensor.dim() != 3 or tensor.size(2) != num_keys:
            raise AttentionInputError(
                f"{name} must be [B|1, Hkv|1, K] with K = {num_keys} keys, got {list(tensor.shape)}"
            )
        _check_broadcast(name, tensor, (num_batch, num_kv_heads))
    for name, index, size in (("query_index", query_index, num_queries), ("key_index", key_index, num_keys)):
        if index is None:
            continue
        if index.dtype not in (torch.int32, torch.int64) or index.dim() not in (1, 2) or index.size(-1) != size:
            raise AttentionInputError(
                f"{name} must be int32 or int64 [{size}] or [B, {size}], got {index.dtype} {list(index.shape)}"
            )
        if index.dim() == 2 and index.size(0) not in (1, num_batch):
            raise AttentionInputError(f"{name} has {index.size(0)} rows, expected {num_batch} or 1")
    if bias is not None:
        if bias.dim() != 3 or bias.size(2) != num_keys or not bias.is_floating_point():
            raise AttentionInputError(
                f"bias must be a float tensor [B|1, Hkv|1, {num_keys}], got {bias.dtype} {list(bias.shape)}"
            )
        _check_broadcast("bias", bias, (num_batch, num_kv_heads))
    for name, vector in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if vector is not None and (vector.dim() != 1 or vector.size(0) != num_heads):
            raise AttentionInputError(f"{name} must be [{num_heads}] (one per query head), got {list(vector.shape)}")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise AttentionInputError("alibi_slopes must not require a gradient; detach them")
    for other in (key, value, start, end, query_index, key_index, bias, sinks, alibi_slopes):
        if other is not None and other.device != query.device:
            raise AttentionInputError(
                f"query is on {query.device}, another input on {other.device}; move them together"
            )


def _check_broadcast(name: str, tensor: Tensor, expected: tuple[int, int]) -> None:
    for dim, what in ((0, "batch rows"), (1, "KV heads")):
        if tensor.size(dim) != 1 and tensor.size(dim) != expected[dim]:
            raise AttentionInputError(f"{name} has {tensor.size(dim)} {what}, expected {expected[dim]} or 1")


def _logits(
    query: Tensor,
    key: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> cpu.Logits:
    num_queries, num_keys = query.size(2), key.size(2)
    if query_index is None:
        query_index = torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32)
    if key_index is None:
        key_index = torch.arange(num_keys, dtype=torch.int32)
    return cpu.Logits(
        query_index=query_index.to(torch.int32).reshape(-1, num_queries),
        key_index=key_index.to(torch.int32).reshape(-1, num_keys),
        bias=bias,
        alibi_slopes=alibi_slopes,
        scale=1 / math.sqrt(query.size(3)) if scale is None else scale,
        softcap=softcap or 0.0,
    )


@torch.library.custom_op("rewriter::live_range_attention", mutates_args=(), device_types="cpu")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, start, end, query_index, key_index, bias, sinks, alibi_slopes)
    logits = _logits(query, key, query_index, key_index, bias, alibi_slopes, scale, softcap)
    return cpu.forward(query, key, value, start, end, sinks, logits)


@_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, start, end, query_index, key_index, bias, sinks, alibi_slopes)
    num_batch, num_heads, num_queries, _ = query.shape
    output = query.new_empty(num_batch, num_queries, num_heads, value.size(3)).transpose(1, 2)
    return output, query.new_empty(num_batch, num_heads, num_queries, dtype=cpu.compute_dtype(query))


@torch.library.custom_op("rewriter::live_range_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = _logits(query, key, query_index, key_index, bias, alibi_slopes, scale, softcap)
    grads = cpu.backward(grad_output, grad_lse, query, key, value, output, lse, start, end, sinks, logits)
    # An operator cannot return None: an absent gradient is an empty tensor.
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


@_attention_backward.register_fake
def _(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        query.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (query, key, value, bias, sinks)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, start, end, query_index, key_index, bias, sinks, alibi_slopes, output, lse = ctx.saved_tensors
    grad_query, grad_key, grad_value, grad_bias, grad_sinks = torch.ops.rewriter.live_range_attention_backward(
        grad_output,
        grad_lse,
        query,
        key,
        value,
        output,
        lse,
        start,
        end,
        query_index,
        key_index,
        bias,
        sinks,
        alibi_slopes,
        ctx.scale,
        ctx.softcap,
    )
    return (
        grad_query,
        grad_key,
        grad_value,
        None,
        None,
        None,
        None,
        None if bias is None else grad_bias,
        None if sinks is None else grad_sinks,
        None,
        None,
        None,
    )


_attention.register_autograd(_backward, setup_context=_setup_context)
