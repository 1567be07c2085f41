"""Runs of marked tokens, as the patches of each image in a text are: numbered by where a mark follows on none.

    begins = marked & ~marked_before
    ids    = where(marked, cumsum(begins) - 1, -1)
    same   = (ids[i] == ids[j]) & (ids[i] >= 0)

Between two marked tokens of one number no run begins, so that all between them are marked: a key of a run is seen by its run. Its
borders are where the count of unmarked tokens changes.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from rewriter.passes.graph.nodes import arguments
from rewriter.passes.graph.nodes import rank
from rewriter.passes.masks.evaluate import evaluates
from rewriter.passes.masks.evaluate import vector
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import apply
from rewriter.passes.masks.expression import axes_of
from rewriter.passes.masks.expression import linear_terms
from rewriter.passes.masks.expression import negate
from rewriter.passes.masks.expression import substitute
from rewriter.passes.masks.intervals import HEAD
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import ROW
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.masks.intervals import flatten
from torch import Tensor

if TYPE_CHECKING:
    from rewriter.passes.masks.prove import Analysis

aten = torch.ops.aten


def prove(analysis: Analysis, predicate: Expression, positions: list[Expression]) -> Interval | None:
    """`ids[i] == ids[j] and ids[i] >= 0`, by itself."""
    del positions
    run = run_of(analysis, predicate)
    if run is None:
        return None
    marked, own = run
    start, end = (apply("where", marked, bound, ZERO) for bound in (own.start, own.end))
    return Interval(start, end, sliding=True, segment=end, traits=own.traits)


def together(analysis: Analysis, parts: list[Expression]) -> list[Expression]:
    """The parts of a conjunction, with those as one part that say together that a query is of its key's run."""
    for equal in parts:
        if isinstance(equal, Apply) and equal.name == "eq":
            counted = [part for part in parts if part in [apply("le", ZERO, side) for side in equal.args]]
            both = Apply("and", (equal, *counted[:1]))
            if counted and run_of(analysis, both) is not None:
                return [both, *(part for part in parts if part not in (equal, *counted))]
    return parts


def run_of(analysis: Analysis, predicate: Expression) -> tuple[Expression, Interval] | None:
    """(whether a key is marked, the rows of its run), where a predicate is that a query is of its key's run."""
    if not isinstance(predicate, Apply) or predicate.name != "and":
        return None
    parts = flatten("and", predicate)
    equal = [part for part in parts if isinstance(part, Apply) and part.name == "eq"]
    if len(equal) != 1 or HEAD in axes_of(predicate):
        return None
    left, right = equal[0].args if ROW in axes_of(equal[0].args[0]) else equal[0].args[::-1]
    if KEY in axes_of(left) or substitute(left, {ROW: Axis(KEY)}) != right:
        return None
    rest = [part for part in parts if part is not equal[0]]
    if not rest or any(part not in (apply("le", ZERO, left), apply("le", ZERO, right)) for part in rest):
        return None
    marked = _marked(analysis, right)
    if marked is None:
        return None
    start, end = (Apply(f"run_{side}", (marked,)) for side in ("start", "end"))
    return marked, Interval(start, end, traits=("runs of marked tokens",))


def _marked(analysis: Analysis, ids: Expression) -> Expression | None:
    """Of numbers of runs, at a key, whether it is marked."""
    if not isinstance(ids, Apply) or ids.name != "where":
        return None
    marked, number, none = ids.args
    terms = dict(linear_terms(number) or {})
    shift = terms.pop(Const(1), 0)
    if len(terms) != 1 or not isinstance(none, Const) or none.value >= 0 or shift < -1:
        return None
    ((count, factor),) = terms.items()
    if factor != 1 or not isinstance(count, Element) or count.node.target is not aten.cumsum.default:
        return None
    source, dim = arguments(count.node, 2)
    last = rank(count.node) - 1
    if dim % rank(count.node) != last or count.indices[-1] != Axis(KEY):
        return None
    # What is summed, at the place of the number.
    begins = substitute(analysis.functions.element(source), dict(enumerate(count.indices)))
    if isinstance(begins, Apply) and begins.name == "number":
        (begins,) = begins.args
    before = substitute(marked, {KEY: apply("add", Axis(KEY), Const(-1))})
    has_one = apply("le", ZERO, apply("add", Axis(KEY), Const(-1)))
    is_first = negate(apply("and", has_one, before))
    return marked if begins in (apply("and", marked, is_first), apply("and", is_first, marked)) else None


@evaluates("run_start", "run_end")
def _bound(expression: Apply, value: Callable[[Expression], Tensor], grid: Mapping[int, Tensor]) -> Tensor:
    """`[B|1, Hkv|1, K]`: where the run of a marked key begins or ends; the unmarked keys before it are counted."""
    unmarked = (~vector(value(expression.args[0]), grid)).cumsum(-1)
    counts = unmarked.reshape(-1, unmarked.size(-1)).contiguous()
    if expression.name == "run_end":
        return torch.searchsorted(counts, counts, right=True).view(unmarked.shape)
    # The last unmarked key before the run is the first one with its count.
    return torch.searchsorted(counts, counts).view(unmarked.shape) + (unmarked > 0)
