"""rewriter: attention keys have live ranges.

A model in, the same model with its attention proven, rewritten and run over the keys that are alive.
"""

from __future__ import annotations

import importlib as _importlib
from pathlib import Path as _Path
from typing import Any as _Any

if not (_Path(__file__).parent / "kernels").is_dir():
    # In a checkout the package's other folders, kernels, passes and export, stand beside this one.
    __path__.append(str(_Path(__file__).resolve().parents[1]))

from rewriter.chunked.calibrate import MIXED_CALIBRATION
from rewriter.chunked.calibrate import Calibrate
from rewriter.chunked.policy import ChunkedEviction
from rewriter.errors import ArtifactError
from rewriter.errors import AttentionInputError
from rewriter.errors import CacheError
from rewriter.errors import CaptureError
from rewriter.errors import Error
from rewriter.errors import ExportError
from rewriter.errors import PolicyError
from rewriter.errors import PolicyWarning
from rewriter.errors import RewriteError
from rewriter.errors import VerifyError
from rewriter.optimize import explain
from rewriter.optimize import from_pretrained
from rewriter.optimize import optimize
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

__version__ = "0.1.0"

__all__ = [
    "MIXED_CALIBRATION",
    "ArtifactError",
    "AttentionInputError",
    "CacheError",
    "Calibrate",
    "CaptureError",
    "ChunkedEviction",
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
    "VerifyError",
    "explain",
    "from_pretrained",
    "optimize",
    "stream",
]


def __getattr__(name: str) -> _Any:
    """`rewriter.export` and `rewriter.testing` without an import of their own; they are loaded when they are asked for."""
    if name in ("export", "testing"):
        return _importlib.import_module(f"rewriter.{name}")
    raise AttributeError(f"module 'rewriter' has no attribute {name!r}")
