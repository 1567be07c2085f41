"""Chunks of rows: `i // c`, counted from the first row or from an offset that is data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import apply
from rewriter.passes.masks.expression import axes_of
from rewriter.passes.masks.expression import difference_terms
from rewriter.passes.masks.expression import linear_terms
from rewriter.passes.masks.expression import substitute
from rewriter.passes.masks.expression import sum_of
from rewriter.passes.masks.forms.documents import sides
from rewriter.passes.masks.intervals import HEAD
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import ROW
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.masks.intervals import Unproven

if TYPE_CHECKING:
    from rewriter.passes.masks.prove import Analysis


def prove(analysis: Analysis, predicate: Expression, positions: list[Expression]) -> Interval | None:
    """`i // c == j // c`, and comparisons of `i // c`: blocks of rows."""
    if not isinstance(predicate, Apply) or HEAD in axes_of(predicate):
        return None
    if predicate.name == "eq":
        return _equality(analysis, predicate, positions)
    return _comparison(analysis, predicate, positions) if predicate.name in ("lt", "le") else None


def _equality(analysis: Analysis, predicate: Apply, positions: list[Expression]) -> Interval | None:
    left, right = sides(predicate, positions)
    chunk = chunk_of(left)
    if chunk is None or ROW in axes_of(right):
        return None
    if linear_terms(right) is None:  # ends of ranges are integers
        raise Unproven(f"a mask compares a chunk's number with a number that is not an integer{analysis.origin(right)}")
    size, shift = chunk
    start = apply("add", apply("mul", right, Const(size)), apply("mul", shift, Const(-1)))
    end = apply("add", start, Const(size))
    same = substitute(left, {ROW: Axis(KEY)}) == right
    if same:
        analysis.early.add(start)
    trait = f"chunks of {size}" + (" from an offset" if axes_of(shift) else "")
    return Interval(start, end, sliding=not same, segment=end, traits=(trait,))


def _comparison(analysis: Analysis, predicate: Apply, positions: list[Expression]) -> Interval | None:
    terms = difference_terms(*predicate.args)
    of_row = [term for term in terms or () if ROW in axes_of(term)]
    chunk = chunk_of(of_row[0]) if len(of_row) == 1 else None
    if terms is None or chunk is None or abs(terms[of_row[0]]) != 1:
        return None
    size, shift = chunk
    is_left = terms.pop(of_row[0]) == 1
    other = sum_of({term: -factor if is_left else factor for term, factor in terms.items()})
    # x // c <= y  is  x < (y + 1) c;  y <= x // c  is  y c <= x
    more = (predicate.name == "le") == is_left
    bound = apply("mul", apply("add", other, Const(1)) if more else other, Const(size))
    row = apply("add", Axis(ROW), shift)
    whole = Apply("lt", (row, bound)) if is_left else Apply("le", (bound, row))
    interval = analysis.comparison(whole, positions)
    return replace(interval, causal=False, traits=(f"blocks of {size}",))


def chunk_of(expression: Expression) -> tuple[int, Expression] | None:
    """`(c, x)` of `(i + x) // c`, where x does not depend on i."""
    if not isinstance(expression, Apply) or expression.name != "floordiv":
        return None
    dividend, size = expression.args
    terms = linear_terms(dividend)
    if terms is None or terms.pop(Axis(ROW), 0) != 1 or not isinstance(size, Const) or not isinstance(size.value, int):
        return None
    shift = sum_of(terms)
    return (size.value, shift) if size.value > 0 and ROW not in axes_of(shift) else None
