"""Live ranges of a running top-w: causal selection of the w best keys of every prefix, as one interval per key.

A key's score does not depend on the query, so a key that has left the top w never returns: w better keys exist, in
every longer prefix too. Key j dies at the first query whose prefix holds w keys that beat it. In the order from the best
key to the worst, the keys that beat the r-th are those before it, so that query is the w-th smallest of the first r
indices: an order statistic of every prefix of that order. On the CPU a wavelet matrix answers all prefixes at once, one
stable partition and one cumulative sum per bit of the index; on a GPU keys count (`kernels/gpu/running_topk.py`).
"""

from __future__ import annotations

import math

import torch
from rewriter.kernels.dispatch import register
from rewriter.kernels.dispatch import runs_triton
from rewriter.kernels.gpu import running_topk as gpu
from rewriter.kernels.live_ranges import FOREVER
from rewriter.kernels.live_ranges import LiveRanges
from torch import Tensor


def running_topk_ranges(score: Tensor, keep: int, *, segment: Tensor | None = None) -> LiveRanges:
    """Ranges under which each query sees the `keep` best keys of its prefix, its own included in the contest.

    O(K log K) time, O(K) memory, no gradient (the selection is constant; arXiv 2508.02124, section 3).

    Args:
        score: `[B, H, K]`, any float dtype, ranked in fp32. Of equal scores the older key wins; NaN never wins.
        keep: number of keys that a query sees.
        segment: int32 `[B|1, H|1, K]`, the ranking's restarts: a key of a larger number beats every key of a smaller
            one, whatever their scores. For packed documents give numbers that rise from document to document, and
            intersect the result with the documents' own ranges; keys of padding get the smallest number.

    Raises:
        ValueError: `score` is not rank 3, `keep` is below 1, or `segment` does not fit.
    """
    if score.dim() != 3 or not score.is_floating_point():
        raise ValueError(f"score must be a float tensor [B, H, K], got {score.dtype} {list(score.shape)}")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    if segment is not None and (segment.dtype != torch.int32 or segment.dim() != 3 or segment.size(2) != score.size(2)):
        raise ValueError(
            f"segment must be int32 [B|1, H|1, K] with K = {score.size(2)} keys, got {segment.dtype} {list(segment.shape)}"
        )
    with torch.no_grad():
        end = torch.ops.rewriter.running_topk_end(score.detach(), keep, segment)
        start = torch.arange(score.size(2), dtype=torch.int32, device=score.device)[None, None, :]
        return LiveRanges(start, end)


def _end(score: Tensor, keep: int, segment: Tensor | None) -> Tensor:
    if not runs_triton(score):
        return torch.ops.rewriter.running_topk_end_cpu(score, keep, segment)
    return gpu.ends(best_first(score, segment), keep).view(score.shape)


def best_first(score: Tensor, segment: Tensor | None) -> Tensor:
    """int64 `[B * H, K]`, the keys of each row from the best to the worst."""
    rank = torch.nan_to_num(score.float(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if segment is not None:
        rank = (segment.long() << 32) + ordered_bits(rank)
    # A stable descending sort puts the older of equals first.
    return rank.expand(score.shape).flatten(0, 1).contiguous().argsort(dim=1, descending=True, stable=True)


def end_by_partition(score: Tensor, keep: int, segment: Tensor | None) -> Tensor:
    num_keys = score.size(2)
    order = best_first(score, segment)
    end = torch.full_like(order, FOREVER)
    if num_keys > keep:
        # The r-th best key dies where the prefix holds `keep` of the r better ones: at the `keep`-th oldest of them.
        dies = torch.maximum(_prefix_order_statistic(order, keep), order[:, keep:])
        end[:, keep:] = dies
    return torch.empty_like(end).scatter_(1, order, end).to(torch.int32).view(score.shape)


def ordered_bits(score: Tensor) -> Tensor:
    """int64 in the range of int32, in the order of the fp32 scores; the two zeros are equal."""
    bits = torch.where(score == 0, 0.0, score).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def _end_fake(score: Tensor, keep: int, segment: Tensor | None) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.int32)


register("rewriter::running_topk_end", _end).register_fake(_end_fake)
# One opaque operator on the CPU: a compiler would unroll the partition into C++ for every attention.
torch.library.custom_op("rewriter::running_topk_end_cpu", end_by_partition, mutates_args=()).register_fake(_end_fake)


def _prefix_order_statistic(values: Tensor, count: int) -> Tensor:
    """The `count`-th smallest of the first p of `values`, for every p from `count` on but the last.

    Args:
        values: int64 `[R, K]`, each row a permutation of 0 .. K - 1.

    Returns:
        int64 `[R, K - count]`; column i is for the first `count + i` values.
    """
    num_rows, num_keys = values.shape
    prefix = torch.arange(count, num_keys, device=values.device, dtype=torch.int32).expand(num_rows, -1)
    # The first and the last place of each prefix in this level's order.
    bounds = torch.stack((torch.zeros_like(prefix), prefix))
    wanted = torch.full_like(prefix, count - 1)
    answer = torch.zeros_like(wanted)
    values = values.to(torch.int32)
    for bit in reversed(range(max(1, (num_keys - 1).bit_length()))):
        ones_before = torch.nn.functional.pad(((values >> bit) & 1).cumsum(dim=1, dtype=torch.int32), (1, 0))
        values = _descend(values, ones_before, bounds, wanted, answer, bit)
    return answer.long()


def _descend(values: Tensor, ones_before: Tensor, bounds: Tensor, wanted: Tensor, answer: Tensor, bit: int) -> Tensor:
    """Partitions `values` by a bit and moves every prefix's bounds into the part that holds its order statistic.

    Args:
        values: int32 `[R, K]`, this level's order.
        ones_before: int32 `[R, K + 1]`, how many of the values before each place have the bit.
        bounds: int32 `[2, R, P]`, the places where each prefix's values begin and end; changed in place.
        wanted: int32 `[R, P]`, which of these values is sought; changed in place.
        answer: int32 `[R, P]`, the bits found so far; changed in place.

    Returns:
        int32 `[R, K]`, the next level's order.
    """
    num_zeros = values.size(1) - ones_before[:, -1:]
    ones_at = torch.stack([ones_before.gather(1, bound.long()) for bound in bounds])
    zeros_at = bounds - ones_at
    zeros = zeros_at[1] - zeros_at[0]
    # Sums of products with 0 and 1 take a third of the time of torch.where.
    go_right = (wanted >= zeros).to(torch.int32)
    answer += go_right << bit
    wanted -= zeros * go_right
    bounds.copy_(zeros_at + (num_zeros + ones_at - zeros_at) * go_right)
    ones = (values >> bit) & 1
    zeros_before = torch.arange(values.size(1), device=values.device, dtype=torch.int32) - ones_before[:, :-1]
    moved = zeros_before + (num_zeros + ones_before[:, :-1] - zeros_before) * ones
    return torch.empty_like(values).scatter_(1, moved.long(), values)
