"""Abstract interpretation of a mask's subgraph: what a tensor's element is, as a function of its indices.

`IndexFunctions.element(node)` is an expression over `Axis(0) .. Axis(rank - 1)`. An operator is opened by the handler that is
registered for it (`handles`; handlers stand in `handlers.py` and in `forms/`). Any other node is data, `Element(node, indices)`,
whose values are not known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rewriter.passes.graph.nodes import rank
from rewriter.passes.graph.nodes import shape
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import Size
from rewriter.passes.masks.expression import broadcast
from rewriter.passes.masks.expression import may_wrap
from torch.fx import Node


class IndexFunctions:
    """Memoised evaluation of nodes to expressions.

    Args:
        modified: nodes that an in-place operation changes; they are data, whatever built them.
    """

    def __init__(self, modified: frozenset[Node] = frozenset()) -> None:
        self.modified = modified
        self.wrapping: set[Node] = set()  # integers that may wrap, which are data of any size
        self._known: dict[Node, Expression] = {}
        self._numbered: dict[Any, Node] = {}

    def element(self, node: Node) -> Expression:
        """The element of `node` at `(Axis(0), Axis(1), ...)`."""
        if node not in self._known:
            # Depth first without recursion: masks of deep models are long chains.
            stack = [node]
            while stack:
                top = stack[-1]
                waiting = [n for n in top.all_input_nodes if n not in self._known] if self.is_opened(top) else []
                if waiting:
                    stack.extend(waiting)
                    continue
                self._known[stack.pop()] = self._evaluate(top)
        return self._known[node]

    def is_opened(self, node: Node) -> bool:
        """Whether the node is interpreted, and not data."""
        return node.op == "call_function" and node.target in HANDLERS and node not in self.modified

    def _evaluate(self, node: Node) -> Expression:
        value = node.meta.get("val")
        if isinstance(value, (int, float, bool)):
            return Const(value)
        if isinstance(value, torch.SymInt):
            return _size(value, node)
        if self.is_opened(node):
            result = HANDLERS[node.target](self, node)
            if result is not None and not _wraps(result, value):
                return result
            if result is not None:
                self.wrapping.add(node)
        return data(node)

    def representative(self, node: Node) -> Node:
        """The first node seen that computes the same: a mask written twice is one mask.

        Only for values that are compared here; the graph keeps both nodes, which may differ in their gradients.
        """
        if not self.is_opened(node):
            return node
        args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), self.representative)
        return self._numbered.setdefault((node.target, repr(args), repr(kwargs)), node)

    def scalar(self, argument: object) -> Expression | None:
        """A Python number, a symbolic size, or a 0-dim tensor of an operator's argument list."""
        if isinstance(argument, (bool, int, float)):
            return Const(argument)
        if isinstance(argument, Node):
            return self.element(argument) if rank(argument) == 0 else None
        return None

    def operand(self, argument: object, out: Node) -> Expression | None:
        """An argument of an elementwise operator, broadcast to the rank of its result."""
        if not isinstance(argument, Node) or not isinstance(argument.meta.get("val"), torch.Tensor):
            return self.scalar(argument)
        return broadcast(self.element(argument), shape(argument), rank(out))


def _wraps(result: Expression, value: Any) -> bool:
    """Whether an integer tensor's element need not fit its type."""
    is_integer = isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool
    return is_integer and may_wrap(result, value.dtype)


def data(node: Node) -> Expression:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return Element(node, ())
    # A dimension of size 1 has one index, whatever it is broadcast to.
    return Element(node, tuple(ZERO if size == 1 else Axis(d) for d, size in enumerate(shape(node))))


def _size(value: torch.SymInt, node: Node) -> Expression:
    expression = value.node.expr
    return Const(int(expression)) if expression.is_number else Size(str(expression), node)


Handler = Callable[[IndexFunctions, Node], "Expression | None"]


HANDLERS: dict[Any, Handler] = {}


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return register
