"""A row's top-k of a score that depends on the key alone, among the keys of a causal prefix: a running top-k."""

from __future__ import annotations

import operator
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rewriter.kernels import running_topk_ranges
from rewriter.passes.graph.nodes import arguments
from rewriter.passes.graph.nodes import rank
from rewriter.passes.graph.nodes import shape
from rewriter.passes.masks.evaluate import evaluates
from rewriter.passes.masks.evaluate import vector
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.interpret import handles
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.masks.intervals import Unproven
from torch import Tensor
from torch.fx import Node

if TYPE_CHECKING:
    from rewriter.passes.masks.prove import Analysis

aten = torch.ops.aten


@handles(aten.topk.default, aten.scatter.value, operator.getitem)
def _membership(_: IndexFunctions, node: Node) -> Expression | None:
    return None  # data here; `topk_membership` knows what it is, and a check by evaluation computes it


@dataclass(frozen=True)
class Topk:
    """`scatter(zeros, -1, topk(source, keep).indices, 1)`: 1 where an element is among the largest of its row."""

    source: Node
    keep: int


def topk_membership(node: Node) -> Topk | None:
    """What a node marks, if it marks the largest elements of each row of a tensor."""
    if node.target is not aten.scatter.value:
        return None
    zeros, dim, indices, one = node.args
    if not isinstance(zeros, Node) or not isinstance(indices, Node) or one in (0, False):
        return None
    if indices.target is not operator.getitem or indices.args[1] != 1:
        return None
    topk = indices.args[0]
    assert isinstance(topk, Node)
    if topk.target is not aten.topk.default or zeros.target not in (aten.zeros_like.default, aten.zeros.default):
        return None
    source, keep, topk_dim, largest, _ = arguments(topk, 5)
    last = rank(node) - 1
    if {dim, -1 if topk_dim is None else topk_dim} - {-1, last} or largest is False or type(keep) is not int:
        return None
    same = [str(s) for s in shape(source)] == [str(s) for s in shape(node)]
    return Topk(source, keep) if same else None


def prove(analysis: Analysis, predicate: Expression, positions: list[Expression]) -> Interval | None:
    """`is among the keep largest of its row`, as an interval; None where the predicate is something else."""
    del positions
    if not isinstance(predicate, Apply) or predicate.name != "not":
        return None
    equal = predicate.args[0]
    if not isinstance(equal, Apply) or equal.name != "eq" or not isinstance(member := equal.args[0], Element):
        return None
    topk = topk_membership(member.node)
    if topk is None or equal.args[1] != ZERO:
        return None
    # Every index must be the row's or key's own: a shifted or permuted membership is another one.
    sizes = shape(member.node)
    own = [ZERO if type(size) is int and size == 1 else Axis(d) for d, size in enumerate(sizes)]
    if len(sizes) != 4 or list(member.indices) != own:
        raise Unproven(f"a top-k is not read at its own row and key{analysis.origin(predicate)}")
    lowest = torch.finfo(topk.source.meta["val"].dtype).min
    visible, scores = analysis.additive(analysis.functions.element(topk.source), lowest)
    among = analysis.conjunction([visible])
    if not among.causal or among.sliding:
        raise Unproven(f"a top-k is not over the keys of a causal prefix ({', '.join(among.traits) or 'no mask'})")
    if len(scores) != 1:
        raise Unproven(f"a top-k of {len(scores)} added scores is not understood")
    end = Apply("running_topk_end", (scores[0], Const(topk.keep), among.segment))
    return Interval(ZERO, end, sliding=True, traits=(f"dynamic mask {topk.keep}",))


@evaluates("running_topk_end")
def _end(expression: Apply, value: Callable[[Expression], Tensor], grid: Mapping[int, Tensor]) -> Tensor:
    score, keep, segment = expression.args
    assert isinstance(keep, Const)
    scores, segments = (vector(value(part), grid) for part in (score, segment))
    return running_topk_ranges(scores, int(keep.value), segment=segments.to(torch.int32)).end
