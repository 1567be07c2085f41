"""FX passes: find the attention of a traced model, prove its masks, and replace it by live-range attention."""

from __future__ import annotations

from rewriter.passes.apply_policy import Policy
from rewriter.passes.apply_policy import PolicyError
from rewriter.passes.apply_policy import SiteTensors
from rewriter.passes.pipeline import Rewritten
from rewriter.passes.pipeline import rewrite

__all__ = ["Policy", "PolicyError", "Rewritten", "SiteTensors", "rewrite"]
