"""A policy at a budget: its window, or the keys that it keeps, set so that a share of the pairs is left."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right

import torch
from torch import Tensor

from rewriter.errors import PolicyError
from rewriter.kernels.live_ranges import LiveRanges
from rewriter.passes.policy import Policy
from rewriter.policies.per_layer import PerLayer
from rewriter.policies.ranges import policy_ranges


def at_budget(policy: Policy, share: float, input_ids: Tensor) -> Policy:
    """The policy with the largest size under which no more than a share of the causal pairs of a text is seen.

    The size is `window`, or else `keep`. A policy that loses nothing stays as it is, and so do such parts of a `PerLayer`, whose
    other parts are set one by one.

    Args:
        share: more than 0, at most 1; of the (query, key) pairs that a causal mask shows.
        input_ids: int64 `[1, K]`, the text; some policies read it.

    Raises:
        PolicyError: the share is out of its range, the policy has no size, or its smallest one shows more.
    """
    if not 0 < share <= 1:
        raise PolicyError(f"a budget must be more than 0 and at most 1, got {share:g}")
    if isinstance(policy, PerLayer):
        return PerLayer({layer: at_budget(part, share, input_ids) for layer, part in policy.layers.items()})
    if policy.is_lossless:
        return policy
    names = {field.name for field in dataclasses.fields(policy)} if dataclasses.is_dataclass(policy) else set()
    size = next((name for name in ("window", "keep") if name in names), None)
    if size is None or policy.is_program:
        raise PolicyError(f"{policy} has no window and no keep that a budget could set; compare it without one")
    length = input_ids.size(1)
    most = share * length * (length + 1) / 2
    least = _pairs(dataclasses.replace(policy, **{size: 1}), input_ids)
    if least > most:
        raise PolicyError(
            f"{policy} cannot keep so little as {share:.1%} of the pairs of this text: with {size}=1 it keeps "
            f"{least / (length * (length + 1) / 2):.1%}"
        )
    sizes = range(1, length + 1)
    found = bisect_right(sizes, most, key=lambda n: _pairs(dataclasses.replace(policy, **{size: n}), input_ids))
    return dataclasses.replace(policy, **{size: found})


def _pairs(policy: Policy, input_ids: Tensor) -> int:
    """Pairs that are seen at one attention of a text, for each of its heads."""
    length = input_ids.size(1)
    if not policy.reads_site:
        return policy_ranges(policy, input_ids).live_pairs()
    # The best keys and the last ones: no more than a window of so many.
    width = getattr(policy, "keep", 0) + getattr(policy, "local", 0)
    return LiveRanges.sliding_window(length, width, device=torch.device("cpu")).live_pairs()
