"""What each operator is, by its definition in PyTorch, at symbolic indices: a reader for each, registered by `reading.reads`.

Readers take nodes as `Any`: what an argument of an operator is, its schema says.
"""

from __future__ import annotations

from rewriter.passes.verify.operators import arithmetic
from rewriter.passes.verify.operators import rows
from rewriter.passes.verify.operators import views
from rewriter.passes.verify.reading import Reading

__all__ = ["Reading", "arithmetic", "rows", "views"]  # importing these registers their readers
