"""The specification of every operator: dense, readable, differentiable by autograd, exact in fp64.

Same signatures and semantics as the operators; sizes are limited by the dense `[Q, K]` arrays.
"""

from __future__ import annotations

import math

import torch
from rewriter.kernels.live_ranges import FOREVER
from rewriter.kernels.live_ranges import LiveRanges
from torch import Tensor


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
    """Dense form of `rewriter.kernels.live_range_attention`; see there for the arguments.

    fp16 and bf16 inputs are computed in fp32 and the output is cast back; fp64 stays fp64.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    num_queries, num_keys = query.size(2), key.size(2)
    group = query.size(1) // key.size(1)
    if query_index is None:
        query_index = torch.arange(num_keys - num_queries, num_keys, device=query.device)
    if key_index is None:
        key_index = torch.arange(num_keys, device=query.device)
    q, k, v = (t.to(dtype) for t in (query, key, value))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    logits = q @ k.transpose(2, 3) * (1 / math.sqrt(query.size(3)) if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + _per_query_head(bias.to(dtype), group)[:, :, None, :]
    if alibi_slopes is not None:
        distance = query_index.view(-1, 1, num_queries, 1) - key_index.view(-1, 1, 1, num_keys)
        logits = logits - alibi_slopes.to(dtype)[:, None, None] * distance.abs()
    visible = _per_query_head(live.visible(query_index), group)
    logits = logits.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(dtype)[:, None].expand_as(lse))
    # A row without keys has no maximum to subtract: its weights are 0, and so are its gradients.
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0)[..., None])
    output = (weights @ v).to(query.dtype)
    return (output, lse) if return_lse else output


def running_topk_ranges(score: Tensor, keep: int) -> LiveRanges:
    """`rewriter.kernels.running_topk_ranges` by its definition, O(K^2): count the better keys of every prefix."""
    num_keys = score.size(2)
    score = torch.nan_to_num(score.float(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    index = torch.arange(num_keys, device=score.device)
    end = torch.full(score.shape, FOREVER, dtype=torch.int32, device=score.device)
    for j in range(num_keys):
        own = score[:, :, j : j + 1]
        better = (score > own) | ((score == own) & (index < j))
        out = (better.cumsum(dim=2) >= keep) & (index >= j)
        end[:, :, j] = torch.where(out.any(dim=2), out.int().argmax(dim=2), FOREVER)
    return LiveRanges(index[None, None, :].to(torch.int32), end)


def _per_query_head(tensor: Tensor, group: int) -> Tensor:
    return tensor if tensor.size(1) == 1 else tensor.repeat_interleave(group, dim=1)
