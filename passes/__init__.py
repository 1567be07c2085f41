"""FX passes: find the attention of a traced model, prove its masks, and replace it by live-range attention."""

from __future__ import annotations

from rewriter.passes.lower.cache_layout import CacheLayout
from rewriter.passes.lower.sharded_parameters import gathers_parameters
from rewriter.passes.lower.slots import CachedGraphs
from rewriter.passes.lower.slots import NotCacheable
from rewriter.passes.lower.stages import Layer
from rewriter.passes.lower.stages import cut
from rewriter.passes.lower.stages import layers_of_graph
from rewriter.passes.masks.words import in_words
from rewriter.passes.pipeline import Analysed
from rewriter.passes.pipeline import CachedRewritten
from rewriter.passes.pipeline import Explained
from rewriter.passes.pipeline import Rewritten
from rewriter.passes.pipeline import analyse
from rewriter.passes.pipeline import explain
from rewriter.passes.pipeline import rewrite
from rewriter.passes.pipeline import rewrite_for_cache
from rewriter.passes.policy import Extended
from rewriter.passes.policy import Policy
from rewriter.passes.policy import SiteTensors
from rewriter.passes.policy import Slots
from rewriter.passes.predict import ExampleSequence
from rewriter.passes.predict import Prediction
from rewriter.passes.predict import WillNotPay
from rewriter.passes.predict import sizes_of_row
from rewriter.passes.verify.validate import HAS_SOLVER
from rewriter.passes.verify.validate import Answer
from rewriter.passes.verify.validate import Validation

from rewriter.errors import CaptureError
from rewriter.errors import PolicyError

__all__ = [
    "HAS_SOLVER",
    "Analysed",
    "Answer",
    "CacheLayout",
    "CachedGraphs",
    "CachedRewritten",
    "CaptureError",
    "ExampleSequence",
    "Explained",
    "Extended",
    "Layer",
    "NotCacheable",
    "Policy",
    "PolicyError",
    "Prediction",
    "Rewritten",
    "SiteTensors",
    "Slots",
    "Validation",
    "WillNotPay",
    "analyse",
    "cut",
    "explain",
    "gathers_parameters",
    "in_words",
    "layers_of_graph",
    "rewrite",
    "rewrite_for_cache",
    "sizes_of_row",
]
