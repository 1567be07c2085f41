"""Attention over live ranges: the operators, their dense references, and the ranges themselves."""

from __future__ import annotations

from rewriter.kernels import reference
from rewriter.kernels.live_ranges import FOREVER
from rewriter.kernels.live_ranges import LiveRanges
from rewriter.kernels.ops import key_scores
from rewriter.kernels.ops import live_range_attention
from rewriter.kernels.topk import running_topk_ranges

from rewriter.errors import AttentionInputError

__all__ = [
    "FOREVER",
    "AttentionInputError",
    "LiveRanges",
    "key_scores",
    "live_range_attention",
    "reference",
    "running_topk_ranges",
]
