"""A copy of a graph, to be lowered while the graph itself stays: symbolic sizes are read from tensors, inputs may be added."""

from __future__ import annotations

import torch
from rewriter.passes.graph.nodes import shape
from torch import Tensor
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx import Node

aten = torch.ops.aten

_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


class NotCacheable(Exception):
    """Why a site cannot go on from a cache."""


class GraphCopy:
    """A copy in the making.

    Attributes:
        module, graph: the copy.
        copies: the original's nodes in the copy.
    """

    def __init__(self, module: GraphModule) -> None:
        self.copies: dict[Node, Node] = {}
        graph = Graph()
        graph.output(graph.graph_copy(module.graph, self.copies))
        self.module = GraphModule(module, graph)
        self.graph = self.module.graph
        # GraphModule copies the graph that it is given.
        own = {old.name: new for old, new in zip(graph.nodes, self.graph.nodes, strict=True)}
        self.copies = {node: own[copy.name] for node, copy in self.copies.items()}
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        self.body = last.next
        self._read_sizes_from_tensors()

    def placeholder(self, name: str) -> Node:
        """A new last input."""
        with self.graph.inserting_before(self.body):
            return self.graph.placeholder(name.replace(".", "_"))

    def finish(self) -> GraphModule:
        """The copy, without what is dead."""
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.recompile()
        return self.module

    def check_numbering(self, query: Node) -> None:
        """Raises `NotCacheable` if, masks removed, the graph still derives positions from the length of the call.

        Args:
            query: of any site of the original, `[B, H, Q, D]`.
        """
        self.graph.eliminate_dead_code()
        alive = set(self.graph.nodes)
        tokens = shape(query)[-2].node.expr
        for node, copied in self.copies.items():
            if copied in alive and node.target in _ARANGES:
                sizes = [s.node.expr for s in shape(node) if isinstance(s, torch.SymInt)]
                if any(tokens in expr.free_symbols for expr in sizes):
                    raise NotCacheable("the model numbers the tokens of a call by itself, and not by position_ids")

    def _read_sizes_from_tensors(self) -> None:
        """Symbolic sizes among the inputs become the sizes of tensors."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        tensors = [node for node in inputs if isinstance(node.meta["val"], Tensor)]
        for node in inputs:
            value = node.meta["val"]
            if not isinstance(value, torch.SymInt):
                continue
            source = next(
                (t, d)
                for t in tensors
                for d, size in enumerate(t.meta["val"].shape)
                if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr
            )
            with self.graph.inserting_before(self.body):
                size = self.graph.call_function(aten.sym_size.int, source)
            size.meta = dict(node.meta)
            node.replace_all_uses_with(size)
            self.copies = {k: size if v is node else v for k, v in self.copies.items()}
            self.graph.erase_node(node)
