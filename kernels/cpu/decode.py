"""Attention of a few query rows on the CPU: decoding from the slots of a cache.

A tile of the schedule is built for many rows; for a few, finding the live keys of each head costs more than the products.
Here all rows and heads are one batched product over the slots in use.
"""

from __future__ import annotations

import math

import torch
from rewriter.kernels.cpu.attention import Logits
from rewriter.kernels.cpu.attention import compute_dtype
from torch import Tensor

MAX_QUERIES = 4
"""More rows than this go through the schedule."""


def decode(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, sinks: Tensor | None, logits: Logits
) -> tuple[Tensor, Tensor] | None:
    """As `rewriter.kernels.cpu.attention.forward`; None where most keys are dead, which a schedule skips and this does not.

    Args:
        query: `[B, Hq, Q, D]` with at most `MAX_QUERIES` rows.
    """
    rows = logits.query_index[:, None, :, None]
    visible = (start[:, :, None, :] <= rows) & (rows < end[:, :, None, :])  # [B|1, Hkv|1, Q, K]
    alive = visible.any(dim=2)
    used = alive.flatten(0, 1).any(dim=0).nonzero()
    if not used.numel():
        return None
    first, last = int(used[0]), int(used[-1]) + 1
    alive = alive[:, :, first:last]
    num_alive = int(alive.sum())
    if 2 * num_alive < alive.numel():
        return None
    dtype = compute_dtype(query)
    num_batch, num_heads, num_queries, _ = query.shape
    num_kv_heads = key.size(1)
    group = num_heads // num_kv_heads
    keys, values = (t[:, :, first:last].to(dtype) for t in (key, value))
    if num_alive < alive.numel():
        # What a dead slot holds must not reach the product, not even times 0: it may be NaN.
        values = values.masked_fill(~alive[..., None], 0)
    # [B, Hkv, G * Q, ...]
    scores = (query.to(dtype) * logits.scale).reshape(num_batch, num_kv_heads, -1, query.size(3)) @ keys.transpose(2, 3)
    scores = scores.view(num_batch, num_kv_heads, group, num_queries, -1)
    if logits.softcap:
        scores = logits.softcap * torch.tanh(scores / logits.softcap)
    if logits.bias is not None:
        scores = scores + logits.bias[:, :, None, None, first:last].to(dtype)
    if logits.alibi_slopes is not None:
        distance = (logits.query_index[:, :, None] - logits.key_index[:, None, first:last]).abs().to(dtype)
        scores = scores - logits.alibi_slopes.to(dtype).view(num_kv_heads, group, 1, 1) * distance[:, None, None]
    scores = scores.masked_fill(~visible[:, :, None, :, first:last], -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(dtype).view(num_kv_heads, group, 1))
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0)[..., None])
    output = weights.view(num_batch, num_kv_heads, group * num_queries, -1) @ values
    # Heads innermost, as the schedule's kernel has it.
    result = query.new_empty(num_batch, num_queries, num_heads, value.size(3)).transpose(1, 2)
    result.copy_(output.view(num_batch, num_heads, num_queries, -1))
    return result, lse.view(num_batch, num_heads, num_queries)
