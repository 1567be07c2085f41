"""Packed documents: ids that never fall along a row, and positions that begin anew in each document."""

from __future__ import annotations

import torch
from rewriter.passes.graph.nodes import arguments
from rewriter.passes.graph.nodes import is_bool
from rewriter.passes.graph.nodes import rank
from rewriter.passes.masks.expression import FALSE
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.interpret import data
from rewriter.passes.masks.interpret import handles
from torch.fx import Node

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
