"""Live ranges of a running top-w: causal selection of the w best keys of every prefix, as one interval per key.

A key's score does not depend on the query, so a key that has left the top w never returns: w better keys exist, in
every longer prefix too. Key j dies at the first query whose prefix holds w keys that beat it. The w-th best score of
each prefix, `tau`, is non-decreasing, so that query is found by binary search once `tau` is known for all prefixes.
`tau` is an order statistic of every prefix: a wavelet matrix answers all prefixes at once, one stable partition and
one cumulative sum per bit of the rank.
"""

from __future__ import annotations

import math

import torch
from rewriter.kernels.live_ranges import FOREVER
from rewriter.kernels.live_ranges import LiveRanges
from torch import Tensor


def running_topk_ranges(score: Tensor, keep: int) -> LiveRanges:
    """Ranges under which each query sees the `keep` best keys of its prefix, its own included in the contest.

    O(K log K) time, O(K) memory, no gradient (the selection is constant; arXiv 2508.02124, section 3).

    Args:
        score: `[B, H, K]`, any float dtype, ranked in fp32. Of equal scores the older key wins; NaN never wins.
        keep: number of keys that a query sees.

    Raises:
        ValueError: `score` is not rank 3, or `keep` is below 1.
    """
    if score.dim() != 3 or not score.is_floating_point():
        raise ValueError(f"score must be a float tensor [B, H, K], got {score.dtype} {list(score.shape)}")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    with torch.no_grad():
        num_keys = score.size(2)
        index = torch.arange(num_keys, device=score.device)
        flat = torch.nan_to_num(score.detach().float(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        # Rank 0 is the best key. A stable descending sort puts the older of equals first.
        order = flat.flatten(0, 1).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, index.expand_as(order))
        end = torch.full_like(rank, FOREVER)
        if num_keys > keep:
            # worst_kept[i] is the rank of the keep-th best key among 0..i; it falls, so its negation is sorted.
            worst_kept = _prefix_order_statistic(rank, keep - 1)
            dies = torch.searchsorted(-worst_kept, -rank, right=True) + (keep - 1)
            end = torch.where(dies < num_keys, torch.maximum(dies, index), FOREVER)
        start = index.to(torch.int32)[None, None, :]
        return LiveRanges(start, end.to(torch.int32).view(score.shape))


def _prefix_order_statistic(rank: Tensor, position: int) -> Tensor:
    """The `position`-th smallest of `rank[:, : i + 1]` for every `i >= position`. `[R, K]` -> `[R, K - position]`."""
    num_keys = rank.size(1)
    prefix = torch.arange(position + 1, num_keys + 1, device=rank.device).expand(rank.size(0), -1)
    wanted = torch.full_like(prefix, position)
    answer = torch.zeros_like(wanted)
    # The first and the last place of each prefix in this level's order, side by side.
    bounds = torch.stack((torch.zeros_like(prefix), prefix), dim=1)
    values = rank
    place = torch.arange(num_keys, device=rank.device)
    for bit in reversed(range(max(1, (num_keys - 1).bit_length()))):
        ones = (values >> bit) & 1
        ones_before = torch.nn.functional.pad(ones.cumsum(dim=1), (1, 0))
        num_zeros = num_keys - ones_before[:, -1:]
        ones_at = ones_before[:, None, :].expand(-1, 2, -1).gather(2, bounds)
        zeros_at = bounds - ones_at
        zeros = zeros_at[:, 1] - zeros_at[:, 0]
        # Sums of products with 0 and 1: for int64 they take a third of the time of torch.where.
        go_right = (wanted >= zeros).long()
        answer += go_right << bit
        wanted = wanted - zeros * go_right
        bounds = zeros_at + (num_zeros[:, None] + ones_at - zeros_at) * go_right[:, None]
        zeros_before = place - ones_before[:, :-1]
        moved = zeros_before + (num_zeros + ones_before[:, :-1] - zeros_before) * ones
        values = torch.empty_like(values).scatter_(1, moved, values)
    return answer
