"""FX passes: find the attention of a traced model, prove its masks, and replace it by live-range attention."""

from __future__ import annotations

from rewriter.passes.lower.cache_layout import CacheLayout
from rewriter.passes.lower.slots import CachedGraphs
from rewriter.passes.lower.slots import NotCacheable
from rewriter.passes.pipeline import Rewritten
from rewriter.passes.pipeline import rewrite
from rewriter.passes.policy import Extended
from rewriter.passes.policy import Policy
from rewriter.passes.policy import SiteTensors
from rewriter.passes.policy import Slots
from rewriter.passes.predict import ExampleSequence
from rewriter.passes.predict import Prediction

from rewriter.errors import CaptureError
from rewriter.errors import PolicyError

__all__ = [
    "CacheLayout",
    "CachedGraphs",
    "CaptureError",
    "ExampleSequence",
    "Extended",
    "NotCacheable",
    "Policy",
    "PolicyError",
    "Prediction",
    "Rewritten",
    "SiteTensors",
    "Slots",
    "rewrite",
]
