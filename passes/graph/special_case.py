"""Special cases: whether a graph for given sizes is what another graph, for any sizes, is when it is called with them.

torch traces a size of one as a number, because broadcasting and `squeeze` treat it unlike others. So one row after several rows
is a graph of its own, which in most models computes the same: only then can the code of the other graph serve it, too.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from rewriter.passes.graph.regions import frozen
from torch import Tensor
from torch.fx import Graph
from torch.fx import Node

_aten = torch.ops.aten
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class SpecialCase:
    """What makes the general graph the special one.

    Attributes:
        sizes: of each symbol of the general graph that is a size of an input, the special graph's size: a number or a symbol.
        inputs: of each input of the general graph, what to call it with: the place of a tensor among the special graph's
            inputs; or such a place and a dimension, whose size it is.
    """

    sizes: dict[sympy.Symbol, sympy.Expr]
    inputs: tuple[int | tuple[int, int], ...]

    def arguments(self, given: Sequence[Any]) -> list[Any]:
        """Those of the general graph, from those of the special one."""
        return [given[i] if isinstance(i, int) else given[i[0]].shape[i[1]] for i in self.inputs]


def as_special_case(special: Graph, general: Graph) -> SpecialCase | None:
    """How calls of a graph become calls of another one; None where they do not, or it cannot be said, or no symbol is a number.

    Both are read node by node, with the sizes of the special graph in the place of the other one's: they must return the same
    operators of the same values, all of the same type, sizes and strides.
    """
    found = _inputs(special, general)
    if found is None or not any(size.is_number for size in found.sizes.values()):
        return None
    values = _Values()
    of_special = _Reading({}, values).result(special)
    of_general = _Reading(found.sizes, values).result(general)
    return found if of_special is not None and of_special == of_general else None


def can_be_compared(graph: Graph) -> bool:
    """Whether a graph holds nothing but operators that their names and arguments tell, and of which its result is made: no number
    that is read from a tensor, which would stand by its name, and nothing that is only asserted."""
    given = symbols_of([_value(node) for node in _placeholders(graph)])
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if symbols_of(_value(node)) - given or (not node.users and node.is_impure()):
            return False
    return _Reading({}, _Values()).result(graph) is not None


def symbols_of(value: Any) -> set[sympy.Symbol]:
    """Those in the sizes and strides of a tensor, in a size, or in any of several values."""
    if isinstance(value, (tuple, list)):
        return set().union(*map(symbols_of, value))
    numbers = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
    return set().union(*(n.node.expr.free_symbols for n in numbers if isinstance(n, _SIZES)))


def _inputs(special: Graph, general: Graph) -> SpecialCase | None:
    """How the inputs go together, by their order."""
    tensors = [(place, n) for place, n in enumerate(_placeholders(special)) if isinstance(_value(n), Tensor)]
    others = [n for n in _placeholders(general) if isinstance(_value(n), Tensor)]
    if len(tensors) != len(others):
        return None
    sizes: dict[sympy.Symbol, sympy.Expr] = {}
    found: dict[sympy.Symbol, tuple[int, int]] = {}
    for (place, node), other in zip(tensors, others, strict=True):
        shape, of_other = _value(node).shape, _value(other).shape
        if len(shape) != len(of_other):
            return None
        for dimension, (size, symbol) in enumerate(zip(shape, map(_expression, of_other), strict=True)):
            if isinstance(symbol, sympy.Symbol):
                sizes.setdefault(symbol, _expression(size))
                found.setdefault(symbol, (place, dimension))
    places = iter(tensors)
    inputs: list[int | tuple[int, int]] = []
    for value in map(_value, _placeholders(general)):
        if isinstance(value, Tensor):
            inputs.append(next(places)[0])
        elif isinstance(value, torch.SymInt) and _expression(value) in found:
            inputs.append(found[_expression(value)])
        else:
            return None
    return SpecialCase(sizes, tuple(inputs))


@dataclass(frozen=True)
class _Number:
    """Stands for a value among the arguments of an operator."""

    number: int


class _Values:
    """Values by number: what is computed in the same way has the same one.

    Attributes:
        zeros: numbers of indices that are certainly 0, of sizes of one.
    """

    def __init__(self) -> None:
        self._known: dict[Any, _Number] = {}
        self.zeros: set[_Number] = set()

    def number(self, description: Any) -> _Number:
        return self._known.setdefault(description, _Number(len(self._known)))


class _Reading:
    """One graph's values.

    Sizes are none of them: they stand, as text, where they are used.

    Args:
        sizes: to be read in the place of symbols.
    """

    def __init__(self, sizes: dict[sympy.Symbol, sympy.Expr], values: _Values) -> None:
        self._sizes, self._values = sizes, values
        self._of_nodes: dict[Node, _Number] = {}

    def result(self, graph: Graph) -> _Number | None:
        """What the graph returns; None where it holds something that its name and arguments do not tell."""
        inputs = [node for node in _placeholders(graph) if not isinstance(_value(node), _SIZES)]
        for place, node in enumerate(inputs):
            self._of_nodes[node] = self._values.number(("input", place, self._kind(_value(node))))
        for node in graph.nodes:
            if node.op == "output":
                return self._number(node.op, (node.args, {}), None)
            if node.op == "placeholder" or (node.op == "call_function" and isinstance(_value(node), _SIZES)):
                continue
            if node.op != "call_function" or not _is_known_by_name(node.target):
                return None
            if self._returns_what_it_is_given(node):
                self._of_nodes[node] = self._of_nodes[node.args[0]]
            else:
                args = self._without_zeros(node) if node.target is _aten.index.Tensor else node.args
                self._of_nodes[node] = self._number(node.target, (args, node.kwargs), _value(node))
                if self._is_zero(node):
                    self._values.zeros.add(self._of_nodes[node])
        return None

    def _number(self, target: Any, arguments: Any, value: Any) -> _Number:
        of_node: Any = lambda n: self._of_nodes[n] if n in self._of_nodes else self._size(n)  # noqa: E731
        arguments = torch.fx.map_arg(arguments, of_node)
        return self._values.number((target, frozen(arguments, self._size), self._kind(value)))

    def _size(self, node: Node) -> int | str:
        text = self._text(_value(node))
        return int(text) if text.isdecimal() else text

    def _text(self, value: Any) -> str:
        return str(_expression(value).xreplace(self._sizes))

    def _kind(self, value: Any) -> Any:
        """What is known of a value: type, sizes and strides, and device."""
        if isinstance(value, Tensor):
            numbers = (*value.shape, *value.stride(), value.storage_offset())
            kind = (type(value).__name__, value.dtype, value.device, value.requires_grad, value.dim())
            return (*kind, *map(self._text, numbers))
        if isinstance(value, (tuple, list)):
            return tuple(map(self._kind, value))
        return self._text(value) if isinstance(value, _SIZES) else repr(value)

    def _returns_what_it_is_given(self, node: Node) -> bool:
        """A slice of a whole dimension, and the like: the same tensor, of the same sizes and strides."""
        if node.target not in (_aten.slice.Tensor, _aten.expand.default, _aten.alias.default, _aten.view.default):
            return False
        (given,) = (n for n in node.all_input_nodes if isinstance(_value(n), Tensor))
        return bool(self._kind(_value(node)) == self._kind(_value(given)))

    def _is_zero(self, node: Node) -> bool:
        given: Any = node.args[0] if node.args else None
        if node.target is _aten.arange.default:
            return bool((self._size(given) if isinstance(given, Node) else given) == 1)
        keeps_values = node.target in (_aten.unsqueeze.default, _aten.atleast_1d.default)
        return keeps_values and self._of_nodes[given] in self._values.zeros

    def _without_zeros(self, node: Node) -> Any:
        """Arguments of an index whose places are 0 in dimensions of size one, as a graph for these sizes has them: of what is
        selected there."""
        tensor: Any = node.args[0]
        places: Any = node.args[1]
        if None in places:
            return node.args
        number, value, rest = self._of_nodes[tensor], _value(tensor), list(places)
        for dimension in reversed(range(len(rest))):
            if self._of_nodes[rest[dimension]] in self._values.zeros:
                value = value.select(dimension, 0)
                number = self._number(_aten.select.int, ((number, dimension, 0), {}), value)
                del rest[dimension]
        return (number, type(places)(rest))


def _is_known_by_name(target: Any) -> bool:
    """Others may hold graphs or values of their own, write to what they are given, or draw random numbers."""
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _placeholders(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _expression(value: Any) -> sympy.Expr:
    return value.node.expr if isinstance(value, _SIZES) else sympy.sympify(value)
