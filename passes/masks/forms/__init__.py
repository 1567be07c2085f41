"""Forms of masks that need more than the algebra: one file each.

A form is a function `prove(analysis, predicate, positions)` that returns the interval of a predicate, None where the predicate
is something else, and raises `Unproven` where it is of this form and not one interval. It may register handlers for operators
(`interpret.handles`) and values for names of its own (`evaluate.evaluates`). A new form is a file here and an entry below.
"""

from __future__ import annotations

from rewriter.passes.masks.forms import causal_or_run
from rewriter.passes.masks.forms import chunks
from rewriter.passes.masks.forms import constant_buffer
from rewriter.passes.masks.forms import documents
from rewriter.passes.masks.forms import marked_runs
from rewriter.passes.masks.forms import running_topk

FORMS = (
    running_topk.prove,
    constant_buffer.prove,
    causal_or_run.prove,
    marked_runs.prove,
    documents.prove,
    chunks.prove,
)
"""In the order in which they are asked."""
