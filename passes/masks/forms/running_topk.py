"""A row's top-k of a score that depends on the key alone, among the keys of a causal prefix: a running top-k."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from rewriter.passes.graph.nodes import arguments
from rewriter.passes.graph.nodes import rank
from rewriter.passes.graph.nodes import shape
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.interpret import handles
from torch.fx import Node

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
