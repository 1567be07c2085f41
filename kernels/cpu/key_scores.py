"""Key scores on the CPU: how much attention each key gets from some query rows, given their log-sum-exp."""

from __future__ import annotations

import torch
from rewriter.kernels.cpu.attention import BLOCK
from rewriter.kernels.cpu.attention import Logits
from rewriter.kernels.cpu.attention import compute_dtype
from torch import Tensor


def key_scores(
    query: Tensor, key: Tensor, lse: Tensor, start: Tensor, end: Tensor, logits: Logits, group: str
) -> Tensor:
    """fp32 `[B, Hkv, K]`, or `[B, Hq, K]` for `group="per_query_head"`; `BLOCK` keys at a time."""
    dtype = compute_dtype(query)
    num_batch, num_heads, num_queries, _ = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    shape = (num_batch, num_kv_heads, num_heads // num_kv_heads)
    grouped = query.to(dtype).view(*shape, num_queries, query.size(3))
    # exp(logit - inf) = 0: a row without keys has no weights.
    row_lse = lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf).view(*shape, num_queries, 1)
    query_index = logits.query_index[:, None, :, None]
    heads = num_heads if group == "per_query_head" else num_kv_heads
    scores = torch.zeros(num_batch, heads, num_keys)
    for first in range(0, num_keys, BLOCK):
        block = slice(first, min(first + BLOCK, num_keys))
        products = grouped @ key[:, :, None, block].to(dtype).transpose(3, 4) * logits.scale  # [B, Hkv, G, w, N]
        if logits.softcap:
            products = logits.softcap * torch.tanh(products / logits.softcap)
        if logits.bias is not None:
            products = products + logits.bias[:, :, None, None, block].to(dtype)
        if logits.alibi_slopes is not None:
            distance = (query_index - logits.key_index[:, None, None, block]).abs()
            slopes = logits.alibi_slopes.to(dtype).view(num_kv_heads, -1, 1, 1)
            products = products - slopes * distance[:, :, None]
        visible = (start[:, :, None, block] <= query_index) & (query_index < end[:, :, None, block])
        weights = torch.exp(products - row_lse).masked_fill(~visible[:, :, None], 0)
        mass = weights.sum(dim=3)  # [B, Hkv, G, N]
        if group == "mean":
            mass = mass.mean(dim=2)
        elif group == "max":
            mass = mass.amax(dim=2)
        else:
            mass = mass.flatten(1, 2)
        scores[:, :, block] = mass.float()
    return scores
