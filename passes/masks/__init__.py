"""Proving what a mask is, for each key one interval of query rows."""

from __future__ import annotations

from rewriter.passes.masks import handlers
from rewriter.passes.masks.forms import FORMS

__all__ = ["FORMS", "handlers"]  # importing them registers their handlers
