"""Policies: which keys live how long. One file each; the base of all is `rewriter.passes.policy.Policy`."""

from __future__ import annotations

from rewriter.passes.policy import Policy
from rewriter.policies.dynamic_mask import DynamicMask
from rewriter.policies.exact import Exact
from rewriter.policies.per_layer import PerLayer
from rewriter.policies.ranges import policy_ranges
from rewriter.policies.separator_mask import SeparatorMask
from rewriter.policies.sliding_window import SlidingWindow

__all__ = ["DynamicMask", "Exact", "PerLayer", "Policy", "SeparatorMask", "SlidingWindow", "policy_ranges"]
