"""The specification of every operator: dense, readable, differentiable by autograd, exact in fp64.

Same signatures and semantics as the operators; sizes are limited by the dense `[Q, K]` arrays.
"""

from __future__ import annotations

import math
from typing import Any

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
    operands: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dense form of `rewriter.kernels.live_range_attention`; see there for the arguments.

    fp16 and bf16 inputs are computed in fp32 and the output is cast back; fp64 stays fp64. With `operands`, what enters a
    matrix product is rounded to that dtype first, and the backward starts from the rounded output: the precision that
    tensor cores leave a kernel.
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
    products = q @ k.transpose(2, 3)
    if operands is not None:
        products = _RoundedGradient.apply(products, operands)
    logits = products * (1 / math.sqrt(query.size(3)) if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + per_query_head(bias.to(dtype), group)[:, :, None, :]
    if alibi_slopes is not None:
        distance = query_index.view(-1, 1, num_queries, 1) - key_index.view(-1, 1, 1, num_keys)
        logits = logits - alibi_slopes.to(dtype)[:, None, None] * distance.abs()
    visible = per_query_head(live.visible(query_index), group)
    logits = logits.masked_fill(~visible, -math.inf)
    if sinks is not None:
        # A sink is a key with a value of 0 that every row sees.
        logits = torch.cat((logits, sinks.to(dtype)[:, None, None].expand(*logits.shape[:3], 1)), dim=3)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    lse = torch.logsumexp(logits, dim=-1)
    if operands is not None:
        output = _RoundedAttention.apply(logits, v, operands)
        return (output.to(query.dtype), lse) if return_lse else output.to(query.dtype)
    # A row without keys has no maximum to subtract: its weights are 0, and so are its gradients.
    weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0)[..., None])
    output = (weights @ v).to(query.dtype)
    return (output, lse) if return_lse else output


def key_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    live: LiveRanges,
    *,
    key_index: Tensor | None = None,
    query_index: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    group: str = "mean",
) -> Tensor:
    """Dense form of `rewriter.kernels.key_scores`: the weights are attention's output for values that are unit vectors."""
    identity = torch.eye(key.size(2), dtype=query.dtype, device=query.device).expand(*key.shape[:3], -1)
    weights, own_lse = live_range_attention(
        query,
        key,
        identity,
        live,
        key_index=key_index,
        query_index=query_index,
        bias=bias,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=True,
    )
    # The given log-sum-exp may count more keys, or a sink.
    factor = torch.exp(own_lse - lse.to(own_lse.dtype)).masked_fill(own_lse == -math.inf, 0)
    mass = (weights.to(own_lse.dtype) * factor[..., None]).sum(dim=2)  # [B, Hq, K]
    if group == "per_query_head":
        return mass
    mass = mass.unflatten(1, (key.size(1), -1))
    return mass.mean(dim=2) if group == "mean" else mass.amax(dim=2)


def running_topk_ranges(score: Tensor, keep: int, *, segment: Tensor | None = None) -> LiveRanges:
    """`rewriter.kernels.running_topk_ranges` by its definition, O(K^2): count the better keys of every prefix."""
    num_keys = score.size(2)
    score = torch.nan_to_num(score.float(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    index = torch.arange(num_keys, device=score.device)
    segment = torch.zeros_like(score, dtype=torch.int32) if segment is None else segment.expand(score.shape)
    end = torch.full(score.shape, FOREVER, dtype=torch.int32, device=score.device)
    for j in range(num_keys):
        own, own_segment = score[:, :, j : j + 1], segment[:, :, j : j + 1]
        better = (score > own) | ((score == own) & (index < j))
        better = (segment > own_segment) | ((segment == own_segment) & better)
        out = (better.cumsum(dim=2) >= keep) & (index >= j)
        end[:, :, j] = torch.where(out.any(dim=2), out.int().argmax(dim=2), FOREVER)
    return LiveRanges(index[None, None, :].to(torch.int32), end)


class _RoundedAttention(torch.autograd.Function):
    """`softmax(logits) @ value` and its gradients, with products of rounded weights and delta from the rounded output."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, operands: torch.dtype) -> Tensor:
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        weights = torch.exp(logits - lse.masked_fill(lse == -math.inf, 0))
        output = (weights.to(operands).to(weights.dtype) @ value).to(operands).to(weights.dtype)
        ctx.save_for_backward(weights, value, output)
        ctx.operands = operands
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, value, output = ctx.saved_tensors
        delta = (grad * output).sum(dim=-1, keepdim=True)
        grad_logits = weights * (grad @ value.transpose(2, 3) - delta)
        return grad_logits, weights.to(ctx.operands).to(weights.dtype).transpose(2, 3) @ grad, None


class _RoundedGradient(torch.autograd.Function):
    """Passes its input on, and its gradient rounded."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, operands: torch.dtype) -> Tensor:
        ctx.operands = operands
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.operands).to(grad.dtype), None


def per_query_head(tensor: Tensor, group: int) -> Tensor:
    """`[B, Hkv, ...]` repeated to `[B, Hq, ...]`; what all heads share stays."""
    return tensor if tensor.size(1) == 1 else tensor.repeat_interleave(group, dim=1)
