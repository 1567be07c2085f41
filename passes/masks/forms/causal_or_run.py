"""Causal, and within a run of neighbours both ways: as the tokens of an image, or a frame, among text are seen.

    j <= i  or  i // c == j // c            a chunk
    j <= i  or  ids[i] == ids[j]            a document
    j <= i  or  i, j in one marked run      an image among text (`marked_runs`)

Key j of the run [a, b) is seen from a on by its run. Where its own row sees it the other way, too, as in a causal mask or a
causal window, the two ranges meet there, and their union is one range: from the first of their starts to the last of their ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewriter.passes.masks.expression import TRUE
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import apply
from rewriter.passes.masks.expression import linear_difference
from rewriter.passes.masks.forms import chunks
from rewriter.passes.masks.forms import documents
from rewriter.passes.masks.forms import marked_runs
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import NEVER_ENDS
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.masks.intervals import Unproven
from rewriter.passes.masks.intervals import flatten

if TYPE_CHECKING:
    from rewriter.passes.masks.prove import Analysis


def prove(analysis: Analysis, predicate: Expression, positions: list[Expression]) -> Interval | None:
    if not isinstance(predicate, Apply) or predicate.name != "or" or len(parts := flatten("or", predicate)) != 2:
        return None
    for part, other in (parts, parts[::-1]):
        if (run := _run(analysis, part, positions)) is None:
            continue
        in_run, own = run
        try:
            rest = analysis.conjunction([other])
        except Unproven:
            return None
        if not _sees_its_own_key(rest):
            continue
        start = apply("where", in_run, own.start, rest.start)
        end = rest.end
        if end != NEVER_ENDS:
            end = apply("where", in_run, Apply("max", (own.end, rest.end)), rest.end)
        return Interval(start, end, sliding=rest.sliding, traits=(*rest.traits, *own.traits))
    return None


def _run(analysis: Analysis, part: Expression, positions: list[Expression]) -> tuple[Expression, Interval] | None:
    """(which keys are of a run, the rows of a key's run), where a part is that a query is of its key's run."""
    marked = marked_runs.run_of(analysis, part)
    if marked is not None:
        return marked
    if not isinstance(part, Apply) or part.name != "eq":
        return None
    try:
        own = chunks.prove(analysis, part, positions) or documents.prove(analysis, part, positions)
    except Unproven:
        return None
    return (TRUE, own) if own is not None and own.start in analysis.early else None


def _sees_its_own_key(interval: Interval) -> bool:
    """Whether a range begins at its key's own row and holds it. A run begins there at the latest, so that the first start is
    the run's."""
    if interval.start != Axis(KEY):
        return False
    if interval.end == NEVER_ENDS:
        return True
    rest = linear_difference(interval.end, Axis(KEY))
    return isinstance(rest, Const) and rest.value > 0
