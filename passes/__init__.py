"""FX passes: find the attention of a traced model, prove its masks, and replace it by live-range attention."""

from __future__ import annotations

from rewriter.passes.apply_policy import Extended
from rewriter.passes.apply_policy import Policy
from rewriter.passes.apply_policy import PolicyError
from rewriter.passes.apply_policy import SiteTensors
from rewriter.passes.apply_policy import Slots
from rewriter.passes.cache_layout import CacheLayout
from rewriter.passes.capture import CaptureError
from rewriter.passes.lower_cached import CachedGraphs
from rewriter.passes.lower_cached import NotCacheable
from rewriter.passes.pipeline import Rewritten
from rewriter.passes.pipeline import rewrite
from rewriter.passes.predict import Prediction
from rewriter.passes.predict import Row

__all__ = [
    "CacheLayout",
    "CachedGraphs",
    "CaptureError",
    "Extended",
    "NotCacheable",
    "Policy",
    "PolicyError",
    "Prediction",
    "Rewritten",
    "Row",
    "SiteTensors",
    "Slots",
    "rewrite",
]
