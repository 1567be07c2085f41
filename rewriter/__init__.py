"""rewriter: attention keys have live ranges.

A model in, the same model with its attention proven, rewritten and run over the keys that are alive.
"""

from __future__ import annotations

from rewriter.chunked_eviction import MIXED_CALIBRATION
from rewriter.chunked_eviction import Calibrate
from rewriter.chunked_eviction import ChunkedEviction
from rewriter.optimize import OptimizedModel
from rewriter.optimize import explain
from rewriter.optimize import optimize
from rewriter.passes import PolicyError
from rewriter.passes import SiteTensors
from rewriter.policies import DynamicMask
from rewriter.policies import Exact
from rewriter.policies import PerLayer
from rewriter.policies import Policy
from rewriter.policies import SeparatorMask
from rewriter.policies import SlidingWindow
from rewriter.report import Report
from rewriter.streaming import stream
from rewriter.tracing import RewriteError

__all__ = [
    "MIXED_CALIBRATION",
    "Calibrate",
    "ChunkedEviction",
    "DynamicMask",
    "Exact",
    "OptimizedModel",
    "PerLayer",
    "Policy",
    "PolicyError",
    "Report",
    "RewriteError",
    "SeparatorMask",
    "SiteTensors",
    "SlidingWindow",
    "explain",
    "optimize",
    "stream",
]
