"""Attention of a few query rows on the CPU: decoding from the slots of a cache.

A tile of the schedule is built for many rows; for a few, finding the live keys of each head costs more than the products.
Here torch's own fused kernel runs over the slots in use, the query heads of a group as its rows: of 516 keys of 32, one
row takes a sixth of the time of the same in single operations, of which each is a few microseconds.
"""

from __future__ import annotations

import math

import torch
from rewriter.kernels.cpu.attention import Logits
from rewriter.kernels.cpu.attention import compute_dtype
from rewriter.kernels.cpu.attention import in_compute_dtype
from torch import Tensor

MAX_QUERIES = 4
"""More rows than this go through the schedule."""


def decode(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, sinks: Tensor | None, logits: Logits
) -> tuple[Tensor, Tensor] | None:
    """As `rewriter.kernels.cpu.attention.forward`; None where the schedule does better or must: most keys are dead, logits
    have a softcap, key and value differ in their head_dim.

    Args:
        query: `[B, Hq, Q, D]` with at most `MAX_QUERIES` rows.
    """
    if logits.softcap or key.size(3) != value.size(3):
        return None
    rows = logits.query_index[:, None, :, None]
    visible = (start[:, :, None, :] <= rows) & (rows < end[:, :, None, :])  # [B|1, Hkv|1, Q, K]
    everything = bool(visible.all())
    if not everything:
        alive = visible.any(dim=2)
        used = _used(alive)
        alive, visible, key, value = alive[:, :, used], visible[..., used], key[:, :, used], value[:, :, used]
        num_alive = int(alive.sum())
        if 2 * num_alive <= alive.numel():
            return None
        if num_alive < alive.numel():
            # What a dead slot holds must not reach the products, not even times 0: it may be NaN.
            key, value = (t.masked_fill(~alive[..., None], 0) for t in (key, value))
    num_batch, num_heads, num_queries, head_dim = query.shape
    num_kv_heads = key.size(1)
    group = num_heads // num_kv_heads
    stacked = query.reshape(num_batch, num_kv_heads, group * num_queries, head_dim)
    stacked, key, value = (in_compute_dtype(t) for t in (stacked, key, value))
    dtype = compute_dtype(query)
    mask: Tensor | None = None  # [B|1, Hkv|1, 1 or G, 1 or Q, K], added to the logits
    if logits.bias is not None:
        bias = logits.bias if everything else logits.bias[:, :, used]
        mask = bias[:, :, None, None].to(dtype)
    if logits.alibi_slopes is not None:
        key_index = logits.key_index if everything else logits.key_index[:, used]
        distance = (logits.query_index[:, :, None] - key_index[:, None]).abs().to(dtype)
        alibi = -logits.alibi_slopes.to(dtype).view(num_kv_heads, group, 1, 1) * distance[:, None, None]
        mask = alibi if mask is None else mask + alibi
    if not everything:
        # Last, as the bias of a dead slot may be NaN too.
        shown = torch.zeros((), dtype=dtype) if mask is None else mask
        mask = torch.where(visible[:, :, None], shown, -math.inf)
    if mask is not None:
        mask = mask.expand(num_batch, num_kv_heads, group, num_queries, -1).flatten(2, 3)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        stacked, key, value, 0.0, False, attn_mask=mask, scale=logits.scale
    )
    output = output.to(query.dtype).reshape(num_batch, num_heads, num_queries, -1)
    lse = lse.reshape(num_batch, num_heads, num_queries).contiguous()
    if not everything:
        empty = ~visible.any(dim=3)[:, :, None].expand(num_batch, num_kv_heads, group, num_queries)
        empty = empty.reshape(num_batch, num_heads, num_queries)
        output, lse = output.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -math.inf)
    if sinks is not None:
        with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        output, lse = (output * torch.exp(lse - with_sinks)[..., None]).to(query.dtype), with_sinks
    # Heads innermost, as the schedule's kernel has it.
    return output.transpose(1, 2).contiguous().transpose(1, 2), lse


def _used(alive: Tensor) -> slice:
    """From the first key that is alive in any row and head to the last."""
    places = alive.flatten(0, 1).any(dim=0).nonzero()
    return slice(int(places[0]), int(places[-1]) + 1) if places.numel() else slice(0, 0)
