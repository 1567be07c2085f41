"""A second reading of a graph: the element of a tensor at symbolic indices, as a formula of z3's.

`Reading.element(node, indices)` follows the graph from a node to its inputs, each operator by its definition in PyTorch. It
shares nothing with the analysis that it is to check (`passes.masks`) but the graph itself. Sizes are integers that may be any,
data are functions of their indices that may be any, and what an operator makes is known of it alone, as facts about the places
that are read.

An operator that is not known here, and what a fact would need that is not known, is a function of its indices that may be any,
too; `opaque` lists these: a counterexample that needs one need not be one.

Integers wrap where their type's do; those of 64 bits are mathematical ones. Floating-point numbers are real ones: infinity is
`INFINITE`, integers are exact up to what the type holds and any number beyond that.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TypeAlias

import sympy
import torch
import z3
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten

Term: TypeAlias = Any
"""`z3.ExprRef`, a formula or a number; z3 has no types of Python's."""

Indices = tuple[Term, ...]
Reader = Callable[["Reading", Node, Indices], Term]

INFINITE = 10**60
"""Stands for infinity; a sum of several masking values is far from it."""

LARGEST_DATA = 1000
"""What is added to logits by data, a bias say, is smaller: it hides no key."""

MOST_LISTED = 64
"""Elements of a buffer that are written into a formula one by one."""

READERS: dict[Any, Reader] = {}


def reads(*targets: Any) -> Callable[[Reader], Reader]:
    def register(reader: Reader) -> Reader:
        READERS.update(dict.fromkeys(targets, reader))
        return reader

    return register


class Unread(Exception):
    """An operator, or a use of one, that is not known here."""


class Reading:
    """Formulas of one graph.

    Args:
        same: nodes that stand for nodes of another graph, as the inputs of emitted ranges do.
        constants: buffers of the model, with their present values.
        modified: nodes that an in-place operation changes: data, whatever built them.

    Attributes:
        facts: what holds of sizes and data.
        symbols: of sizes.
        data: functions of the graph's own inputs, by node.
        opaque: what was not understood.
        places: indices that facts about whole rows are instantiated at.
        steps: indices, by z3's number of the term, at which a sum is to be told from the one before.
    """

    def __init__(
        self,
        same: Mapping[Node, Node],
        constants: Mapping[Node, Tensor],
        modified: frozenset[Node] = frozenset(),
    ) -> None:
        self.same, self.constants, self.modified = same, constants, modified
        self.facts: list[z3.BoolRef] = []
        self.symbols: dict[sympy.Symbol, z3.ArithRef] = {}
        self.data: dict[Node, z3.FuncDeclRef] = {}
        self.opaque: dict[str, None] = {}
        self.places: list[Term] = []
        self.steps: set[int] = set()
        self._known: dict[tuple[Node, tuple[int, ...]], Term] = {}
        self._keep: list[Term] = []  # z3 numbers terms by identity while they live
        self._functions: dict[Any, z3.FuncDeclRef] = {}
        self._first: dict[Node, Node] = {}
        self._made: dict[Any, Node] = {}
        self._read_at: dict[Node, list[tuple[Indices, Term]]] = {}

    def element(self, node: Any, indices: Sequence[Term]) -> Term:
        """The element of a node at these indices, one for each of its dimensions; a dimension of size 1 is read at 0."""
        node = self.first(node)
        sizes = sizes_of(node)
        place = tuple(z3.IntVal(0) if is_one(s) else z3.simplify(i) for s, i in zip(sizes, indices, strict=True))
        key = (node, tuple(i.get_id() for i in place))
        if key not in self._known:
            self._keep.extend(place)
            self._known[key] = self._read(node, place)
        return self._known[key]

    def first(self, node: Any) -> Node:
        """The first node that was seen to compute the same: a sum that is written twice is one sum."""
        node = self.same.get(node, node)
        if node.op != "call_function" or node in self.modified or node in self.constants or _is_random(node):
            return node
        if node not in self._first:
            # By identity: nodes of the two graphs may have the same name.
            given = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda n: id(self.first(n)))
            self._first[node] = self._made.setdefault((node.target, repr(given), _kinds(node)), node)
        return self._first[node]

    def _read(self, node: Node, indices: Indices) -> Term:
        value = node.meta.get("val")
        if isinstance(value, (bool, int, float, torch.SymInt)):
            return self.number(value)
        if node in self.constants:
            return self._constant(node, indices)
        reader = READERS.get(node.target) if node.op == "call_function" and node not in self.modified else None
        if reader is None:
            if node.op != "placeholder":
                self.opaque[str(node.target)] = None
            return self.unknown(node, indices)
        try:
            return reader(self, node, indices)
        except Unread as reason:
            self.opaque[f"{node.target}: {reason}"] = None
            return self.unknown(node, indices)

    def number(self, value: Any) -> Term:
        if isinstance(value, Node):
            return self.element(value, ())
        if isinstance(value, bool):
            return z3.BoolVal(value)
        if isinstance(value, int):
            return z3.IntVal(value)
        if isinstance(value, float):
            if math.isnan(value):
                raise Unread("not a number")
            infinite = INFINITE if value > 0 else -INFINITE
            ratio = (infinite, 1) if math.isinf(value) else value.as_integer_ratio()
            return z3.simplify(z3.Q(*ratio))
        if isinstance(value, torch.SymInt):
            return self.size(value)
        raise Unread(f"a {type(value).__name__}")

    def size(self, size: int | torch.SymInt) -> z3.ArithRef:
        return z3.IntVal(size) if isinstance(size, int) else self.expression(size.node.expr)

    def expression(self, expression: Any) -> Any:
        """A size's expression, or a relation of such."""
        if isinstance(expression, sympy.Symbol):
            if expression not in self.symbols:
                self.symbols[expression] = z3.Int(str(expression))
            return self.symbols[expression]
        if expression.is_Integer:
            return z3.IntVal(int(expression))
        if expression in (sympy.true, sympy.false):
            return z3.BoolVal(bool(expression))
        name, arguments = type(expression).__name__, [self.expression(a) for a in expression.args]
        if name == "Pow" and expression.args[1].is_Integer and 0 < int(expression.args[1]) < 5:
            return functools.reduce(operator.mul, [arguments[0]] * int(expression.args[1]))
        if name not in _OF_SIZES:
            raise Unread(f"the size {expression}")
        return _OF_SIZES[name](*arguments)

    def unknown(self, node: Node, indices: Indices) -> Term:
        """Data: a function of its indices, with what its type says of it."""
        dtype = node.meta["val"].dtype if isinstance(node.meta.get("val"), Tensor) else torch.int64
        function = self.data.get(node)
        if function is None:
            sort = z3.BoolSort() if dtype == torch.bool else z3.RealSort() if dtype.is_floating_point else z3.IntSort()
            # Numbered: nodes of the two graphs may have the same name, and z3 takes what has one name for one function.
            function = z3.Function(f"{node.name}#{len(self.data)}", *[z3.IntSort()] * len(indices), sort)
            self.data[node] = function
        term = function(*indices)
        if dtype.is_floating_point:
            self.facts.append(z3.And(term > -LARGEST_DATA, term < LARGEST_DATA))
        elif dtype not in (torch.bool, torch.int64):
            limits = torch.iinfo(dtype)
            self.facts.append(z3.And(term >= limits.min, term <= limits.max))
        return term

    def _constant(self, node: Node, indices: Indices) -> Term:
        """A buffer: by what its rows and columns are, where that is one of the forms below, checked in each of its elements."""
        value = self.constants[node]
        if value.is_meta or not value.numel():
            raise Unread("a buffer without values")
        if value.numel() == 1:
            return self.number(value.detach().cpu().reshape(()).item())
        if value.dim() >= 2 and all(s == 1 for s in value.shape[:-2]):
            formula = _formula_of_matrix(value.detach().cpu().reshape(value.shape[-2:]))
            if formula is not None:
                return formula(self, indices[-2], indices[-1])
        if value.dim() == 1 and not value.is_floating_point() and value.dtype != torch.bool:
            first = int(value[0])
            if torch.equal(value.detach().cpu(), torch.arange(first, first + value.numel(), dtype=value.dtype)):
                return indices[0] + first
        if value.numel() <= MOST_LISTED:
            result: Any = self.unknown(node, indices)
            for place in itertools.product(*map(range, value.shape)):
                here = z3.And(*(index == n for index, n in zip(indices, place, strict=True)))
                result = z3.If(here, self.number(value[place].item()), result)
            return result
        self.opaque[f"the buffer {node.name}"] = None
        return self.unknown(node, indices)

    def operand(self, argument: Any, out: Node, indices: Indices) -> Term:
        """An argument of an elementwise operator, broadcast: at the indices of the result."""
        if not isinstance(argument, Node) or not isinstance(argument.meta.get("val"), Tensor):
            return self.number(argument)
        sizes, result = sizes_of(argument), sizes_of(out)
        shift = len(result) - len(sizes)
        for own, other in zip(sizes, result[shift:], strict=True):
            if not is_one(own) and str(own) != str(other) and not is_one(other):
                self.facts.append(self.size(own) == self.size(other))  # else the operator raises
        return self.element(argument, indices[shift:])

    def complete(self) -> list[z3.BoolRef]:
        """All facts, with those about two sums of which one counts where runs begin, and the other what is between runs.

        At a place in a run at least one has begun. Of two places in runs, the counts of begins are equal exactly where those of
        gaps are: by induction, since without a begin between them each place up to the second one follows on one in a run, and
        without a gap none begins.
        """
        sums = [node for node in self._read_at if is_bool_sum(node)]
        for begins, gaps in itertools.permutations(sums, 2):
            if not self._count_runs(begins, gaps):
                continue
            places = [_without_ones(n, place) for n in (begins, gaps) for place, _ in self._read_at[n]]
            read = {tuple(i.get_id() for i in place): place for place in places}
            length = self.size(sizes_of(gaps)[-1])

            def in_run(place: Sequence[Any], gaps: Node = gaps, length: Any = length) -> Any:
                gap = as_bool(self._at(gaps, gaps.args[0], place))
                return z3.And(z3.Not(gap), place[-1] >= 0, place[-1] < length)

            for place in read.values():
                self.facts.append(z3.Implies(in_run(place), self._at(begins, begins, place) > 0))
            for first, second in itertools.combinations(read.values(), 2):
                begun, between = (self._at(n, n, first) == self._at(n, n, second) for n in (begins, gaps))
                one_row = [a == b for a, b in zip(first[:-1], second[:-1], strict=True)]
                known = z3.And(*one_row, in_run(first), in_run(second))
                self.facts.append(z3.Implies(known, begun == between))
        return self.facts

    def _at(self, like: Node, node: Any, place: Sequence[Any]) -> Any:
        """The element of a node at the indices of those dimensions of `like` that are not of size 1."""
        indices = iter(place)
        return self.element(node, [z3.IntVal(0) if is_one(size) else next(indices) for size in sizes_of(like)])

    def _count_runs(self, begins: Node, gaps: Node) -> bool:
        """Whether one sum counts where there is no gap and was one before, or no place before."""
        rank = len(_without_ones(begins, sizes_of(begins)))
        if rank != len(_without_ones(gaps, sizes_of(gaps))) or not rank:
            return False
        row, place = [z3.FreshInt("row") for _ in range(rank - 1)], z3.FreshInt("place")
        begin, gap, before = (
            as_bool(self._at(node, node.args[0], (*row, at)))
            for node, at in ((begins, place), (gaps, place), (gaps, place - 1))
        )
        solver = z3.Solver()
        solver.set("timeout", 100)
        solver.add(
            *(index >= 0 for index in (*row, place)),
            *(place < self.size(sizes_of(node)[-1]) for node in (begins, gaps)),
        )
        solver.add(begin != z3.And(z3.Not(gap), z3.Or(place == 0, before)))
        return bool(solver.check() == z3.unsat)

    def remember(self, node: Node, indices: Indices, term: Term) -> list[tuple[Indices, Term]]:
        """Where else a node was read before; this place is added."""
        earlier = list(self._read_at.setdefault(node, []))
        self._read_at[node].append((indices, term))
        return earlier


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _kinds(node: Node) -> tuple[bool, ...]:
    """Which of a node's arguments are nodes, as a number is no node's identity."""
    return tuple(isinstance(argument, Node) for argument in (*node.args, *node.kwargs.values()))


def sizes_of(node: Any) -> tuple[int | torch.SymInt, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def is_bool_sum(node: Node) -> bool:
    """Whether a node counts truth values along the last dimension; they may be numbers, 0 and 1."""
    if node.target is not aten.cumsum.default:
        return False
    source: Any = node.args[0]
    while source.target in (aten.to.dtype, aten._to_copy.default) and not is_bool(source):
        source = source.args[0]
    return is_bool(source) and dimension_of(node, node.args[1]) == len(sizes_of(node)) - 1


def _without_ones(node: Node, place: Sequence[Any]) -> list[Any]:
    """Of something for each dimension, those whose size is not 1."""
    return [one for one, size in zip(place, sizes_of(node), strict=True) if not is_one(size)]


def is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def floor_division(x: Any, y: Any) -> Any:
    """z3's own division rounds so that the remainder is not negative."""
    return z3.If(y > 0, x / y, -x / -y)


def remainder(x: Any, y: Any) -> Any:
    return x - y * floor_division(x, y)


_OF_SIZES: dict[str, Callable[..., Any]] = {
    "Add": lambda *a: z3.Sum(*a),
    "Mul": lambda *a: z3.Product(*a),
    "FloorDiv": floor_division,
    "PythonMod": remainder,
    "Mod": remainder,
    "Max": lambda *a: functools.reduce(maximum, a),
    "Min": lambda *a: functools.reduce(minimum, a),
    "Equality": operator.eq,
    "Unequality": operator.ne,
    "LessThan": operator.le,
    "GreaterThan": operator.ge,
    "StrictLessThan": operator.lt,
    "StrictGreaterThan": operator.gt,
    "And": z3.And,
    "Or": z3.Or,
    "Not": z3.Not,
}


def maximum(x: Any, y: Any) -> Any:
    return z3.If(x >= y, x, y)


def minimum(x: Any, y: Any) -> Any:
    return z3.If(x <= y, x, y)


def _formula_of_matrix(value: Tensor) -> Callable[[Reading, Term, Term], Term] | None:
    """A band of a matrix, `low <= column - row <= high`, where one value is inside and another one outside."""
    rows, columns = value.shape
    inside = value[0, 0]
    distance = torch.arange(columns)[None, :] - torch.arange(rows)[:, None]
    equal = value == inside
    if bool(equal.all()):
        return lambda reading, i, j: reading.number(inside.item())
    low, high = int(distance[equal].min()), int(distance[equal].max())
    band = (distance >= low) & (distance <= high)
    outside = value[~band]
    if not torch.equal(equal, band) or not bool((outside == outside[0]).all()):
        return None
    # At the matrix' own corners a band has no border.
    lowest, highest = low if low > 1 - rows else None, high if high < columns - 1 else None

    def formula(reading: Reading, i: Any, j: Any) -> Term:
        bounds = [] if lowest is None else [j - i >= lowest]
        bounds += [] if highest is None else [j - i <= highest]
        return z3.If(z3.And(*bounds), reading.number(inside.item()), reading.number(outside[0].item()))

    return formula


def as_bool(term: Any) -> Any:
    return term if z3.is_bool(term) else term != 0


def as_number(term: Any) -> Any:
    return z3.If(term, z3.IntVal(1), z3.IntVal(0)) if z3.is_bool(term) else term


def as_real(term: Any) -> Any:
    number = as_number(term)
    return z3.ToReal(number) if z3.is_int(number) else number


_EXACT = {torch.float16: 2**11, torch.bfloat16: 2**8, torch.float32: 2**24, torch.float64: 2**53}
"""Integers up to this are exact in the type."""


def converted(reading: Reading, term: Any, node: Node) -> Any:
    """A term in the type of a node."""
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        return as_bool(term)
    if not dtype.is_floating_point:
        number = as_number(term)
        if z3.is_real(number):
            number = z3.If(number >= 0, z3.ToInt(number), -z3.ToInt(-number))
        return wrapped(number, dtype)
    return rounded(reading, term, dtype)


def rounded(reading: Reading, term: Any, dtype: torch.dtype) -> Any:
    """A number in a floating-point type, which holds integers exactly up to some size, and is any number beyond it."""
    if z3.is_real(term):
        return term
    number = as_number(term)
    if z3.is_bool(term) or z3.is_int_value(number):
        return z3.ToReal(number)
    limit = _EXACT.get(dtype)
    if limit is None:
        raise Unread(f"{dtype}")
    function = reading._functions.setdefault(dtype, z3.Function(f"round_{dtype}", z3.IntSort(), z3.RealSort()))
    return z3.If(z3.And(number >= -limit, number <= limit), z3.ToReal(number), function(number))


def wrapped(number: Any, dtype: torch.dtype) -> Any:
    """An integer in its type, which begins anew where it does not fit; one of 64 bits is taken as it is."""
    if dtype == torch.int64:
        return number
    limits = torch.iinfo(dtype)
    fits = z3.And(number >= limits.min, number <= limits.max)
    return z3.If(fits, number, (number - limits.min) % (limits.max - limits.min + 1) + limits.min)


def arguments_of(node: Node) -> dict[str, Any]:
    """All arguments of an operator by the names of its schema, defaults filled in."""
    target: Any = node.target
    schema = target._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given.update(zip((a.name for a in schema), node.args, strict=False))
    given.update(node.kwargs)
    return given


def dimension_of(node: Any, dim: Any) -> int:
    return dim % max(len(sizes_of(node)), 1)


def is_bool(argument: Any) -> bool:
    if isinstance(argument, Node) and isinstance(argument.meta.get("val"), Tensor):
        return argument.meta["val"].dtype == torch.bool
    return isinstance(argument, bool)
