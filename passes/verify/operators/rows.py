"""Along a row: differences, sums, and places in sorted rows, as functions with facts about them."""

from __future__ import annotations

from typing import Any

import torch
import z3
from rewriter.passes.verify.reading import Indices
from rewriter.passes.verify.reading import Reading
from rewriter.passes.verify.reading import Term
from rewriter.passes.verify.reading import Unread
from rewriter.passes.verify.reading import arguments_of
from rewriter.passes.verify.reading import as_number
from rewriter.passes.verify.reading import converted
from rewriter.passes.verify.reading import dimension_of
from rewriter.passes.verify.reading import is_bool_sum
from rewriter.passes.verify.reading import is_one
from rewriter.passes.verify.reading import reads
from rewriter.passes.verify.reading import sizes_of
from torch.fx import Node

aten = torch.ops.aten


@reads(aten.diff.default)
def _diff(reading: Reading, node: Any, indices: Indices) -> Term:
    given = arguments_of(node)
    source, prepend = given["self"], given["prepend"]
    dim = dimension_of(node, given["dim"])
    if given["n"] != 1 or given["append"] is not None:
        raise Unread("differences of another order")

    def at(shift: int) -> Any:
        places = [*indices]
        places[dim] = indices[dim] + shift
        if prepend is None:
            return reading.element(source, places)
        before = reading.size(sizes_of(prepend)[dim])
        first, rest = [*places], [*places]
        rest[dim] = places[dim] - before
        return z3.If(places[dim] < before, reading.element(prepend, first), reading.element(source, rest))

    return converted(reading, as_number(at(1)) - as_number(at(0)), node)


@reads(aten.cumsum.default)
def _cumsum(reading: Reading, node: Any, indices: Indices) -> Term:
    """A function with the facts of a sum at the places where it is read: of truth values, it rises between two places by at
    least what stands at the second one, and at most as many as there are between. Of a constant, it is that many times it."""
    source: Any = node.args[0]
    dim = dimension_of(node, node.args[1])
    value = node.meta["val"]
    if value.is_floating_point():
        raise Unread("a sum of fractions")
    element = as_number(reading.element(source, indices))
    if z3.is_int_value(element):
        return element * (indices[dim] + 1)
    total: Any = reading.unknown(node, indices)
    positions = _positions_of_runs(source)
    counts = is_bool_sum(node)
    if counts and indices[dim].get_id() in reading.steps:
        before: Any = reading.unknown(node, (*indices[:dim], indices[dim] - 1))
        reading.facts.append(
            z3.Implies(indices[dim] >= 0, total == z3.If(indices[dim] > 0, before, z3.IntVal(0)) + element)
        )
    if counts:
        reading.facts.append(z3.Implies(indices[dim] >= 0, z3.And(total >= element, total <= indices[dim] + 1)))
    for other, earlier in reading.remember(node, indices, total):
        if not all(a.eq(b) for d, (a, b) in enumerate(zip(other, indices, strict=True)) if d != dim):
            continue
        mine = (indices[dim], total, element)
        its = (other[dim], earlier, as_number(reading.element(source, other)))
        for (p, before, _), (q, after, counted) in ((its, mine), (mine, its)):
            if counts:
                rises = z3.And(after - before >= counted, after - before <= q - p)
                reading.facts.append(z3.Implies(z3.And(p >= 0, p < q), rises))
        reading.facts.append(z3.Implies(other[dim] == indices[dim], earlier == total))
        if positions is not None:
            # By induction over the places between: where the number of breaks stays, each position is one more than the last.
            same = z3.And(total == earlier, indices[dim] >= 0, other[dim] >= 0)
            step = reading.element(positions, indices) - reading.element(positions, other)
            reading.facts.append(z3.Implies(same, step == indices[dim] - other[dim]))
    return total


def _positions_of_runs(source: Node) -> Node | None:
    """Of `diff(positions) != 1` the positions, of which there are as many."""
    if source.target is not aten.ne.Scalar or source.args[1] != 1:
        return None
    difference: Any = source.args[0]
    if not isinstance(difference, Node) or difference.target is not aten.diff.default:
        return None
    given = arguments_of(difference)
    one_before = given["prepend"] is not None and is_one(sizes_of(given["prepend"])[-1])
    last = dimension_of(difference, given["dim"]) == len(sizes_of(difference)) - 1
    return given["self"] if given["n"] == 1 and given["append"] is None and one_before and last else None


@reads(aten.searchsorted.Tensor)
def _searchsorted(reading: Reading, node: Any, indices: Indices) -> Term:
    """The place of a value in a row that never falls, which is asked of sums of truth values only."""
    given = arguments_of(node)
    row, values = given["sorted_sequence"], given["self"]
    right = given["right"] or given["side"] == "right"
    if len(sizes_of(row)) != len(sizes_of(values)) or given["sorter"] is not None or not _never_falls(reading, row):
        raise Unread("a row that may not be sorted")
    result: Any = reading.unknown(node, indices)
    size = reading.size(sizes_of(row)[-1])
    value = reading.element(values, indices)
    reading.facts.append(z3.And(result >= 0, result <= size))
    for place in (*reading.places, indices[-1]):
        there: Any = reading.element(row, (*indices[:-1], place))
        is_before = there <= value if right else there < value
        reading.facts.append(z3.Implies(z3.And(place >= 0, place < size), (place < result) == is_before))
    # The value at the result is no longer before, and the one before it is.
    reading.steps.add(result.get_id())
    at: Any = reading.element(row, (*indices[:-1], result))
    last: Any = reading.element(row, (*indices[:-1], result - 1))
    reading.facts.append(z3.Implies(result < size, at > value if right else at >= value))
    reading.facts.append(z3.Implies(result > 0, last <= value if right else last < value))
    return result


def _never_falls(reading: Reading, node: Node) -> bool:
    """Views and copies of the sum of truth values along the last dimension."""
    node = reading.first(node)
    while node.target in (aten.view.default, aten.reshape.default, aten.contiguous.default, aten.clone.default):
        before = reading.first(node.args[0])
        if str(sizes_of(before)[-1]) != str(sizes_of(node)[-1]):
            return False
        node = before
    return is_bool_sum(node)
