"""Packed documents: ids that never fall along a row, and positions that begin anew in each document."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from rewriter.passes.graph.nodes import arguments
from rewriter.passes.graph.nodes import is_bool
from rewriter.passes.graph.nodes import rank
from rewriter.passes.masks.evaluate import evaluates
from rewriter.passes.masks.expression import FALSE
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import apply
from rewriter.passes.masks.expression import axes_of
from rewriter.passes.masks.expression import substitute
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.interpret import data
from rewriter.passes.masks.interpret import handles
from rewriter.passes.masks.intervals import HEAD
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import ROW
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.masks.intervals import Unproven
from torch import Tensor
from torch.fx import Node

if TYPE_CHECKING:
    from rewriter.passes.masks.prove import Analysis

aten = torch.ops.aten


@handles(aten.cumsum.default)
def _cumsum(functions: IndexFunctions, node: Node) -> Expression | None:
    """Data that never falls along its dimension, where it sums truth values; 0 where there is nothing to sum."""
    source = node.args[0]
    assert isinstance(source, Node)
    if functions.element(source) in (FALSE, ZERO):
        return ZERO
    return data(functions.representative(node))


def is_non_decreasing(node: Node) -> bool:
    """Whether an integer tensor is non-decreasing along its last dimension, by construction."""
    source, dim = arguments(node, 2)
    return node.target is aten.cumsum.default and is_bool(source) and dim % rank(node) == rank(node) - 1


def run_positions(node: Node) -> Node | None:
    """For document ids `cumsum(diff(positions) != 1)`: the positions, which count up by 1 within a document."""
    try:
        unequal = node.args[0]
        difference = unequal.args[0]  # type: ignore[union-attr]
        source = difference.args[0]  # type: ignore[union-attr]
        matches = (
            node.target is aten.cumsum.default
            and unequal.target is aten.ne.Scalar  # type: ignore[union-attr]
            and unequal.args[1] == 1  # type: ignore[union-attr]
            and difference.target is aten.diff.default  # type: ignore[union-attr]
            and len(difference.args) >= 3  # type: ignore[union-attr]
        )
    except (AttributeError, IndexError):
        return None
    return source if matches and isinstance(source, Node) else None


def prove(analysis: Analysis, predicate: Expression, positions: list[Expression]) -> Interval | None:
    """`ids[b, i] == ids[b, j]`: a key is seen in its own document, if ids never fall along a row."""
    if not isinstance(predicate, Apply) or predicate.name != "eq" or {ROW, HEAD} & axes_of(predicate) != {ROW}:
        return None
    left, right = sides(predicate, positions)
    if not isinstance(left, Element) or KEY in axes_of(left) or substitute(left, {ROW: Axis(KEY)}) != right:
        return None
    indices = left.indices
    others = {axis for index in indices[:-1] for axis in axes_of(index)}
    if not is_non_decreasing(left.node) or indices[-1] != Axis(ROW) or ROW in others:
        raise Unproven(f"document ids are not known to be non-decreasing{analysis.origin(left)}")
    start, after = (Apply(f"document_{side}", (right,)) for side in ("start", "end"))
    analysis.early.add(start)
    return Interval(start, after, segment=after, traits=("documents",), document=start)


def document_positions(analysis: Analysis, predicate: Expression) -> Expression | None:
    """For `ids[b, i] == ids[b, j]` with ids made from positions: the positions' element, over axes 0 and 1."""
    if isinstance(predicate, Apply) and predicate.name == "eq" and isinstance(ids := predicate.args[0], Element):
        source = run_positions(ids.node)
        if source is not None and predicate.args[1] == substitute(ids, {ROW: Axis(KEY), KEY: Axis(ROW)}):
            return analysis.functions.element(source)
    return None


def sides(equality: Apply, positions: list[Expression]) -> tuple[Expression, Expression]:
    """The sides of an equality, that of the query first; positions within documents count as the indices do."""
    left, right = (within_documents(argument, positions) for argument in equality.args)
    return (left, right) if ROW in axes_of(left) else (right, left)


def within_documents(expression: Expression, positions: list[Expression]) -> Expression:
    """`position(i) // c` as `(i + position(j) - j) // c`: within a document, positions count as the indices do."""
    if not isinstance(expression, Apply) or expression.name != "floordiv":
        return expression
    for position in positions:
        row, key = (substitute(position, {1: Axis(axis)}) for axis in (ROW, KEY))
        if expression.args[0] == row:
            shift = apply("add", key, apply("mul", Axis(KEY), Const(-1)))
            return Apply("floordiv", (apply("add", Axis(ROW), shift), expression.args[1]))
    return expression


@evaluates("document_start", "document_end")
def _bound(expression: Apply, value: Callable[[Expression], Tensor], grid: Mapping[int, Tensor]) -> Tensor:
    """`[B, 1, K]`: where the run of a key's document begins or ends. Document ids are `[..., K]`, non-decreasing."""
    del grid
    document = expression.args[0]
    assert isinstance(document, Element)
    ids = value(Element(document.node, ()))
    ids = ids.reshape(-1, ids.size(-1)).contiguous()
    return torch.searchsorted(ids, ids, right=expression.name == "document_end")[:, None, :]
