"""torch's own fused attention, `scaled_dot_product_attention`, with live ranges as a mask: nothing is skipped.

What each dead key costs is what a mask costs; what it takes from the GPU or CPU is one well-kept kernel, and no schedule. Plain
torch operators, which every compiler and exporter knows.
"""

from __future__ import annotations

import torch
from rewriter.kernels.reference import per_query_head
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def dense_mask(
    start: Tensor, end: Tensor, num_queries: int, group: int, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The mask of live ranges, for all heads of a group, and the rows that see a key.

    Args:
        start, end: int32 `[B|1, Hkv|1, K]`; row r has index `r + K - Q`.
        group: query heads of a KV head.
        bias: `[B|1, Hkv|1, K]`, added to the logits; None for none.
        dtype: of the query.

    Returns:
        `[B|1, Hq|1, Q, K]`, bool, true where visible, or with a bias of `dtype`, -inf where not; and bool `[B|1, Hq|1, Q, 1]`. A
        row that sees no key has all of them in the mask: its softmax, and its gradients, would be NaN.
    """
    num_keys = start.size(2)
    row = torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32, device=start.device)[:, None]
    visible = (start[:, :, None] <= row) & (row < end[:, :, None])
    sees = visible.any(dim=-1, keepdim=True)
    visible, sees = (per_query_head(t, group) for t in (visible | ~sees, sees))
    if bias is None:
        return visible, sees
    added = per_query_head(bias, group)[:, :, None].to(dtype)
    return torch.where(visible, added, float("-inf")), sees


def _is_grouped(query: Tensor, key: Tensor) -> bool:
    """Whether query heads share KV heads; numbers of heads may be symbols, of which nothing is to be assumed."""
    return str(query.size(1)) != str(key.size(1))


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sees: Tensor | None, scale: float | None
) -> Tensor:
    """`[B, Hq, Q, D]` under a `dense_mask`; grouped heads are not repeated, a row that sees no key is 0. All see one where `sees`
    is None."""
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=_is_grouped(query, key)
    )
    return output if sees is None else output.masked_fill(~sees, 0)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """`[B, Hq, Q, D]` without a mask, or causal, of as many queries as keys."""
    return scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=_is_grouped(query, key)
    )
