"""The public names of `rewriter`, from where they are defined; `rewriter` takes them from here when one is first asked for."""

from __future__ import annotations

from rewriter.api import explain
from rewriter.api import from_pretrained
from rewriter.api import optimize
from rewriter.chunked.calibrate import MIXED_CALIBRATION
from rewriter.chunked.calibrate import Calibrate
from rewriter.chunked.policy import ChunkedEviction
from rewriter.comparison import Comparison
from rewriter.comparison import compare
from rewriter.distributed import distribute
from rewriter.distributed import for_checkpoint
from rewriter.distributed import plan_stages
from rewriter.distributed import stage
from rewriter.distributed import whole_parameters
from rewriter.errors import ArtifactError
from rewriter.errors import AttentionInputError
from rewriter.errors import CacheError
from rewriter.errors import CaptureError
from rewriter.errors import Error
from rewriter.errors import ExportError
from rewriter.errors import PolicyError
from rewriter.errors import PolicyWarning
from rewriter.errors import RewriteError
from rewriter.errors import SpeedWarning
from rewriter.errors import VerifyError
from rewriter.optimized_model import OptimizedModel
from rewriter.passes import SiteTensors
from rewriter.passes.policy import Policy
from rewriter.policies.dynamic_mask import DynamicMask
from rewriter.policies.exact import Exact
from rewriter.policies.per_layer import PerLayer
from rewriter.policies.separator_mask import SeparatorMask
from rewriter.policies.sliding_window import SlidingWindow
from rewriter.report.report import Report
from rewriter.streaming import stream

__all__ = [
    "MIXED_CALIBRATION",
    "ArtifactError",
    "AttentionInputError",
    "CacheError",
    "Calibrate",
    "CaptureError",
    "ChunkedEviction",
    "Comparison",
    "DynamicMask",
    "Error",
    "Exact",
    "ExportError",
    "OptimizedModel",
    "PerLayer",
    "Policy",
    "PolicyError",
    "PolicyWarning",
    "Report",
    "RewriteError",
    "SeparatorMask",
    "SiteTensors",
    "SlidingWindow",
    "SpeedWarning",
    "VerifyError",
    "compare",
    "distribute",
    "explain",
    "for_checkpoint",
    "from_pretrained",
    "optimize",
    "plan_stages",
    "stage",
    "stream",
    "whole_parameters",
]
