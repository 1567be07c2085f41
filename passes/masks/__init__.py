"""Proving what a mask is, for each key one interval of query rows."""

from __future__ import annotations

# Handlers are registered when their modules are imported.
from rewriter.passes.masks import handlers
from rewriter.passes.masks.forms import documents
from rewriter.passes.masks.forms import running_topk

__all__ = ["documents", "handlers", "running_topk"]
