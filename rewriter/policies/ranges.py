"""Ranges that several policies need, and those of a policy without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import PolicyError
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels.live_ranges import plus_window
from rewriter.passes import SiteTensors
from rewriter.passes.policy import Policy


def policy_ranges(policy: Policy, input_ids: Tensor) -> LiveRanges:
    """The ranges that a policy gives a plain causal site, for pictures, counts and references.

    Args:
        policy: one that does not look at query, key and value.
        input_ids: int64 `[B, K]`.
    """
    causal = LiveRanges.causal(input_ids.size(1), device=input_ids.device)
    if policy.reads_site:
        raise PolicyError(f"{type(policy).__name__} depends on a site's query, key and value; there is no site here")
    nothing = torch.empty(input_ids.size(0), 1, input_ids.size(1), 1, device=input_ids.device)
    origin = SiteTensors.first_token(causal, causal.start)
    site = SiteTensors(causal, torch.ones_like(causal.end), causal.start, origin, input_ids, nothing, nothing, nothing)
    extra = policy.live_ranges(site)
    if extra is None:
        return causal
    return causal & (extra[0] if isinstance(extra, tuple) else extra)


def _windowed(site: SiteTensors, window: int, first: int, forever: Tensor | None) -> LiveRanges:
    """Causal; a key lives for `window` queries, or for ever: the `first` keys of a row, and where `forever` says so.

    Args:
        forever: bool `[B, K]`.
    """
    kept = torch.zeros_like(site.index, dtype=torch.bool) if forever is None else forever[:, None, :]
    if first:
        # Rows are padded differently.
        kept = kept | ((site.index >= site.origin) & (site.index < site.origin + first))
    return LiveRanges(site.index, torch.where(kept, FOREVER, plus_window(site.index, window)))
