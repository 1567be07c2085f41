"""Causal, and within a chunk both ways: `j <= i or i // c == j // c`, as chunks of an image or a frame among text are seen.

Key j of the chunk [a, a + c) is seen from a on by its chunk, and from j on by all later rows: from a on, for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.forms import chunks
from rewriter.passes.masks.intervals import NEVER_ENDS
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.masks.intervals import flatten

if TYPE_CHECKING:
    from rewriter.passes.masks.prove import Analysis


def prove(analysis: Analysis, predicate: Expression, positions: list[Expression]) -> Interval | None:
    if not isinstance(predicate, Apply) or predicate.name != "or" or len(parts := flatten("or", predicate)) != 2:
        return None
    for chunk, other in (parts, parts[::-1]):
        if not isinstance(chunk, Apply) or not isinstance(other, Apply):
            return None
        if chunk.name != "eq" or other.name not in ("lt", "le"):
            continue
        own = chunks.prove(analysis, chunk, positions)
        if own is None or own.start not in analysis.early:
            continue
        rest = analysis.comparison(other, positions)
        # Both ranges must meet: a chunk ends behind its key, and the other one begins there at the latest.
        if rest.causal and not rest.sliding and rest.end == NEVER_ENDS:
            return Interval(own.start, NEVER_ENDS, traits=("causal", *own.traits))
    return None
