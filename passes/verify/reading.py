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

_READERS: dict[Any, Reader] = {}


def reads(*targets: Any) -> Callable[[Reader], Reader]:
    def register(reader: Reader) -> Reader:
        _READERS.update(dict.fromkeys(targets, reader))
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
        sizes = _sizes(node)
        place = tuple(z3.IntVal(0) if _is_one(s) else z3.simplify(i) for s, i in zip(sizes, indices, strict=True))
        key = (node, tuple(i.get_id() for i in place))
        if key not in self._known:
            self._keep.extend(place)
            self._known[key] = self._read(node, place)
        return self._known[key]

    def first(self, node: Any) -> Node:
        """The first node that was seen to compute the same: a sum that is written twice is one sum."""
        node = self.same.get(node, node)
        if node.op != "call_function" or node in self.modified or node in self.constants:
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
        reader = _READERS.get(node.target) if node.op == "call_function" and node not in self.modified else None
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
            function = z3.Function(f"{node.name}", *[z3.IntSort()] * len(indices), sort)
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
        sizes, result = _sizes(argument), _sizes(out)
        shift = len(result) - len(sizes)
        for own, other in zip(sizes, result[shift:], strict=True):
            if not _is_one(own) and _text(own) != _text(other) and not _is_one(other):
                self.facts.append(self.size(own) == self.size(other))  # else the operator raises
        return self.element(argument, indices[shift:])

    def complete(self) -> list[z3.BoolRef]:
        """All facts, with those about two sums of which one counts where runs begin, and the other what is between runs.

        At a place in a run at least one has begun. Of two places in runs, the counts of begins are equal exactly where those of
        gaps are: by induction, since without a begin between them each place up to the second one follows on one in a run, and
        without a gap none begins.
        """
        sums = [node for node in self._read_at if _is_bool_sum(node)]
        for begins, gaps in itertools.permutations(sums, 2):
            if not self._count_runs(begins, gaps):
                continue
            places = [_without_ones(n, place) for n in (begins, gaps) for place, _ in self._read_at[n]]
            read = {tuple(i.get_id() for i in place): place for place in places}
            length = self.size(_sizes(gaps)[-1])

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
        return self.element(node, [z3.IntVal(0) if _is_one(size) else next(indices) for size in _sizes(like)])

    def _count_runs(self, begins: Node, gaps: Node) -> bool:
        """Whether one sum counts where there is no gap and was one before, or no place before."""
        rank = len(_without_ones(begins, _sizes(begins)))
        if rank != len(_without_ones(gaps, _sizes(gaps))) or not rank:
            return False
        row, place = [z3.FreshInt("row") for _ in range(rank - 1)], z3.FreshInt("place")
        begin, gap, before = (
            as_bool(self._at(node, node.args[0], (*row, at)))
            for node, at in ((begins, place), (gaps, place), (gaps, place - 1))
        )
        solver = z3.Solver()
        solver.set("timeout", 100)
        solver.add(
            *(index >= 0 for index in (*row, place)), *(place < self.size(_sizes(node)[-1]) for node in (begins, gaps))
        )
        solver.add(begin != z3.And(z3.Not(gap), z3.Or(place == 0, before)))
        return bool(solver.check() == z3.unsat)

    def remember(self, node: Node, indices: Indices, term: Term) -> list[tuple[Indices, Term]]:
        """Where else a node was read before; this place is added."""
        earlier = list(self._read_at.setdefault(node, []))
        self._read_at[node].append((indices, term))
        return earlier


def _kinds(node: Node) -> tuple[bool, ...]:
    """Which of a node's arguments are nodes, as a number is no node's identity."""
    return tuple(isinstance(argument, Node) for argument in (*node.args, *node.kwargs.values()))


def _sizes(node: Any) -> tuple[int | torch.SymInt, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _is_bool_sum(node: Node) -> bool:
    """Whether a node counts truth values along the last dimension; they may be numbers, 0 and 1."""
    if node.target is not aten.cumsum.default:
        return False
    source: Any = node.args[0]
    while source.target in (aten.to.dtype, aten._to_copy.default) and not _is_bool(source):
        source = source.args[0]
    return _is_bool(source) and _dimension(node, node.args[1]) == len(_sizes(node)) - 1


def _without_ones(node: Node, place: Sequence[Any]) -> list[Any]:
    """Of something for each dimension, those whose size is not 1."""
    return [one for one, size in zip(place, _sizes(node), strict=True) if not _is_one(size)]


def _text(size: int | torch.SymInt) -> str:
    return str(size)


def _is_one(size: int | torch.SymInt) -> bool:
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
    "Max": lambda *a: functools.reduce(_maximum, a),
    "Min": lambda *a: functools.reduce(_minimum, a),
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


def _maximum(x: Any, y: Any) -> Any:
    return z3.If(x >= y, x, y)


def _minimum(x: Any, y: Any) -> Any:
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


def _arguments(node: Node) -> dict[str, Any]:
    """All arguments of an operator by the names of its schema, defaults filled in."""
    target: Any = node.target
    schema = target._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given.update(zip((a.name for a in schema), node.args, strict=False))
    given.update(node.kwargs)
    return given


def _dimension(node: Any, dim: Any) -> int:
    return dim % max(len(_sizes(node)), 1)


# Readers take nodes as `Any`: what an argument of an operator is, its schema says.

# What is made of numbers.


@reads(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(reading: Reading, node: Any, indices: Indices) -> Term:
    given = _arguments(node)
    start, step = (reading.number(given.get(name, default)) for name, default in (("start", 0), ("step", 1)))
    if z3.is_real(start) or z3.is_real(step):
        raise Unread("fractions")
    return converted(reading, start + indices[0] * step, node)


@reads(
    aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default, aten.fill.Scalar
)  # fmt: skip
def _full(reading: Reading, node: Any, indices: Indices) -> Term:
    given = _arguments(node)
    name = next(n for n in ("fill_value", "s", "value") if n in given)
    return converted(reading, reading.number(given[name]), node)


@reads(
    aten.ones.default,
    aten.ones_like.default,
    aten.new_ones.default,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
)
def _filled(reading: Reading, node: Any, indices: Indices) -> Term:
    return converted(reading, z3.IntVal(int("ones" in node.target.__name__)), node)


# Views.


@reads(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
def _same(reading: Reading, node: Any, indices: Indices) -> Term:
    return converted(reading, reading.element(node.args[0], indices), node)


@reads(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(reading: Reading, node: Any, indices: Indices) -> Term:
    return reading.operand(node.args[0], node, indices)


@reads(aten.atleast_1d.default)
def _atleast_1d(reading: Reading, node: Any, indices: Indices) -> Term:
    source: Any = node.args[0]
    return reading.element(source, indices[len(indices) - len(_sizes(source)) :])


@reads(aten.unsqueeze.default)
def _unsqueeze(reading: Reading, node: Any, indices: Indices) -> Term:
    source, dim = node.args
    dim = _dimension(node, dim)
    return reading.element(source, (*indices[:dim], *indices[dim + 1 :]))


@reads(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def _reshape(reading: Reading, node: Any, indices: Indices) -> Term:
    """In row-major order both shapes count the same elements; dimensions whose products agree are taken together."""
    source: Any = node.args[0]
    inside = [(d, s) for d, s in enumerate(_sizes(source)) if not _is_one(s)]
    outside = [(d, s) for d, s in enumerate(_sizes(node)) if not _is_one(s)]
    places: list[Term] = [z3.IntVal(0)] * len(_sizes(source))
    while inside and outside:
        of_source, of_result = [inside.pop(0)], [outside.pop(0)]
        while (left := _product(of_source)) != (right := _product(of_result)):
            # The side that is the smaller one takes its next dimension; of symbols, the one of which the other is a multiple.
            if (inside and (right / left).is_number and right / left > 1) or (inside and not outside):
                of_source.append(inside.pop(0))
            elif outside and (((left / right).is_number and left / right > 1) or not inside):
                of_result.append(outside.pop(0))
            elif inside and not (right / left).as_numer_denom()[1].free_symbols:
                of_source.append(inside.pop(0))
            elif outside and not (left / right).as_numer_denom()[1].free_symbols:
                of_result.append(outside.pop(0))
            else:
                raise Unread("shapes that do not divide each other")
        flat: Any = z3.IntVal(0)
        for d, size in of_result:
            flat = flat * reading.size(size) + indices[d]
        if len(of_source) == 1:
            places[of_source[0][0]] = flat
            continue
        for place, (d, size) in reversed(list(enumerate(of_source))):
            places[d] = remainder(flat, reading.size(size)) if place else flat
            flat = floor_division(flat, reading.size(size))
    return reading.element(source, places)


def _product(dimensions: list[tuple[int, Any]]) -> sympy.Expr:
    sizes = (s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s) for _, s in dimensions)
    return functools.reduce(operator.mul, sizes, sympy.Integer(1))


@reads(aten.transpose.int, aten.permute.default, aten.t.default)
def _permute(reading: Reading, node: Any, indices: Indices) -> Term:
    source: Any = node.args[0]
    order = list(range(len(indices)))
    if node.target is aten.permute.default:
        order = [_dimension(node, d) for d in node.args[1]]
    elif len(order) > 1:
        first, second = (0, 1) if node.target is aten.t.default else (_dimension(node, d) for d in node.args[1:3])
        order[first], order[second] = order[second], order[first]
    places = dict(zip(order, indices, strict=True))  # dimension `order[d]` of the source is d
    return reading.element(source, [places[d] for d in range(len(order))])


@reads(aten.slice.Tensor)
def _slice(reading: Reading, node: Any, indices: Indices) -> Term:
    given = _arguments(node)
    dim = _dimension(node, given["dim"])
    size = reading.size(_sizes(given["self"])[dim])
    start = given["start"] or 0
    begin: Any = reading.number(start)
    if isinstance(start, int):
        begin = begin if start >= 0 else _maximum(begin + size, z3.IntVal(0))
    else:  # an element of the slice is within the tensor, so that a start beyond its end needs no care
        begin = z3.If(begin < 0, _maximum(begin + size, z3.IntVal(0)), begin)
    places = [*indices]
    places[dim] = begin + indices[dim] * reading.number(given["step"])
    return reading.element(given["self"], places)


@reads(aten.select.int)
def _select(reading: Reading, node: Any, indices: Indices) -> Term:
    source, dim, index = node.args
    dim = dim % len(_sizes(source))
    place: Any = reading.number(index)
    if not isinstance(index, int) or index < 0:
        place = z3.If(place < 0, place + reading.size(_sizes(source)[dim]), place)
    return reading.element(source, (*indices[:dim], place, *indices[dim:]))


@reads(aten.flip.default)
def _flip(reading: Reading, node: Any, indices: Indices) -> Term:
    source, dims = node.args
    turned = {_dimension(node, d) for d in dims}
    sizes = _sizes(source)
    return reading.element(
        source, [reading.size(sizes[d]) - 1 - i if d in turned else i for d, i in enumerate(indices)]
    )


@reads(aten.roll.default)
def _roll(reading: Reading, node: Any, indices: Indices) -> Term:
    given = _arguments(node)
    source, places = given["self"], [*indices]
    if not given["dims"]:
        raise Unread("a roll over all elements")
    for shift, dim in zip(given["shifts"], given["dims"], strict=True):
        d = _dimension(node, dim)
        places[d] = remainder(places[d] - reading.number(shift), reading.size(_sizes(source)[d]))
    return reading.element(source, places)


@reads(aten.index.Tensor)
def _index(reading: Reading, node: Any, indices: Indices) -> Term:
    """Integer tensors, next to each other, in the places of dimensions."""
    source, given = node.args
    sizes = _sizes(source)
    named = [d for d, g in enumerate(given) if g is not None]
    tensors = [given[d] for d in named]
    if not named or named != list(range(named[0], named[-1] + 1)) or any(_is_bool(t) for t in tensors):
        raise Unread("indexing by truth values, or by tensors apart from each other")
    common = len(indices) - (len(sizes) - len(named))
    own = indices[named[0] : named[0] + common]
    places: list[Term] = [*indices[: named[0]]]
    for d, tensor in zip(named, tensors, strict=True):
        at: Any = reading.element(tensor, own[common - len(_sizes(tensor)) :])
        places.append(z3.If(at < 0, at + reading.size(sizes[d]), at))
    return reading.element(source, [*places, *indices[named[0] + common :]])


@reads(aten.gather.default)
def _gather(reading: Reading, node: Any, indices: Indices) -> Term:
    source, dim, index = node.args[:3]
    places = [*indices]
    places[_dimension(node, dim)] = reading.element(index, indices)
    return reading.element(source, places)


@reads(aten.cat.default)
def _cat(reading: Reading, node: Any, indices: Indices) -> Term:
    given = _arguments(node)
    dim, parts = _dimension(node, given["dim"]), list(given["tensors"])
    begins: list[Any] = [z3.IntVal(0)]
    for part in parts:
        begins.append(begins[-1] + reading.size(_sizes(part)[dim]))
    result: Any = None
    for begin, end, part in reversed(list(zip(begins, begins[1:], parts, strict=False))):
        places = [*indices]
        places[dim] = indices[dim] - begin
        own = converted(reading, reading.element(part, places), node)
        result = own if result is None else z3.If(indices[dim] < end, own, result)
    return result


@reads(aten.constant_pad_nd.default, aten.pad.default)
def _pad(reading: Reading, node: Any, indices: Indices) -> Term:
    given = _arguments(node)
    if given.get("mode", "constant") != "constant":
        raise Unread("padding that is not constant")
    source = given["self"]
    inside, places = [], [*indices]
    for n, before in enumerate(given["pad"][::2]):
        dim = len(indices) - 1 - n
        places[dim] = indices[dim] - reading.number(before)
        inside += [places[dim] >= 0, places[dim] < reading.size(_sizes(source)[dim])]
    fill = converted(reading, reading.number(given["value"] or 0), node)
    return z3.If(z3.And(*inside), reading.element(source, places), fill)


# Arithmetic, comparisons, logic.


def _is_bool(argument: Any) -> bool:
    if isinstance(argument, Node) and isinstance(argument.meta.get("val"), Tensor):
        return argument.meta["val"].dtype == torch.bool
    return isinstance(argument, bool)


def _pair(x: Any, y: Any) -> tuple[Any, Any]:
    """Both as numbers of one kind."""
    x, y = as_number(x), as_number(y)
    return (as_real(x), as_real(y)) if z3.is_real(x) or z3.is_real(y) else (x, y)


def _common_type(arguments: Sequence[Any]) -> torch.dtype:
    """What two operands are promoted to before they are added or compared."""
    values = [a.meta["val"] if isinstance(a, Node) else a for a in arguments]
    plain = [0 if isinstance(v, torch.SymInt) else v for v in values]
    if not any(isinstance(v, Tensor) for v in plain):
        return torch.float32 if any(isinstance(v, float) for v in plain) else torch.int64
    return torch.result_type(*plain)


def _times(x: Any, y: Any) -> Any:
    for a, b in ((x, y), (y, x)):
        if z3.is_rational_value(a) and abs(a.as_fraction()) >= INFINITE and not z3.is_rational_value(b):
            raise Unread("a product with infinity")
    return x * y


_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "rsub": lambda x, y: y - x,
    "mul": _times,
    "floor_divide": floor_division,
    "remainder": remainder,
    "maximum": _maximum,
    "minimum": _minimum,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}

_LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "logical_and": z3.And,
    "logical_or": z3.Or,
    "logical_xor": z3.Xor,
    "bitwise_and": z3.And,
    "bitwise_or": z3.Or,
    "bitwise_xor": z3.Xor,
    "__and__": z3.And,
    "__or__": z3.Or,
    "__xor__": z3.Xor,
}


def _binary(reading: Reading, node: Any, indices: Indices) -> Term:
    name = node.target._opname
    arguments = node.args[:2]
    x, y = (reading.operand(a, node, indices) for a in arguments)
    if name in _LOGIC:
        if not name.startswith("logical") and not (_is_bool(arguments[0]) and _is_bool(arguments[1])):
            raise Unread("bits of integers")
        return _LOGIC[name](as_bool(x), as_bool(y))
    if all(map(_is_bool, arguments)) and name in ("add", "mul", "maximum", "minimum"):
        return (z3.Or if name in ("add", "maximum") else z3.And)(as_bool(x), as_bool(y))
    alpha = node.kwargs.get("alpha", 1)
    common = _common_type(arguments)
    if common.is_floating_point:
        x, y = (rounded(reading, z, common) for z in (x, y))
    x, y = _pair(x, y)
    if name in ("add", "sub", "rsub") and alpha != 1:
        scaled = _times(*_pair(x if name == "rsub" else y, reading.number(alpha)))
        x, y = _pair(*((scaled, y) if name == "rsub" else (x, scaled)))
    if name in ("floor_divide", "remainder") and z3.is_real(x):
        raise Unread("division of fractions")
    return converted(reading, _ARITHMETIC[name](x, y), node)


for _name in (*_ARITHMETIC, *_LOGIC):
    _packet = getattr(aten, _name)
    _overloads = (getattr(_packet, o) for o in ("Tensor", "Scalar", "default", "Scalar_Tensor") if hasattr(_packet, o))
    _READERS.update(dict.fromkeys(_overloads, _binary))


@reads(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _division(reading: Reading, node: Any, indices: Indices) -> Term:
    x, y = _pair(*(reading.operand(a, node, indices) for a in node.args[:2]))
    if z3.is_real(x):
        raise Unread("division of fractions")
    if node.kwargs.get("rounding_mode") == "floor":
        return converted(reading, floor_division(x, y), node)
    if node.kwargs.get("rounding_mode") == "trunc":
        exact = floor_division(x, y)
        return converted(reading, z3.If(z3.And(exact < 0, exact * y != x), exact + 1, exact), node)
    raise Unread("division that is not rounded")


@reads(aten.logical_not.default, aten.bitwise_not.default)
def _not(reading: Reading, node: Any, indices: Indices) -> Term:
    if node.target is aten.bitwise_not.default and not _is_bool(node.args[0]):
        return converted(reading, -reading.element(node.args[0], indices) - 1, node)
    return z3.Not(as_bool(reading.element(node.args[0], indices)))


@reads(aten.neg.default)
def _neg(reading: Reading, node: Any, indices: Indices) -> Term:
    return converted(reading, -as_number(reading.element(node.args[0], indices)), node)


@reads(aten.log.default)
def _log(reading: Reading, node: Any, indices: Indices) -> Term:
    """Of 0 and 1; of other numbers any value."""
    x: Any = as_real(reading.element(node.args[0], indices))
    return z3.If(x == 1, z3.RealVal(0), z3.If(x == 0, z3.RealVal(-INFINITE), reading.unknown(node, indices)))


@reads(aten.abs.default)
def _abs(reading: Reading, node: Any, indices: Indices) -> Term:
    x: Any = reading.element(node.args[0], indices)
    return converted(reading, z3.If(x >= 0, x, -x), node)


@reads(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(reading: Reading, node: Any, indices: Indices) -> Term:
    given = _arguments(node)
    x: Any = reading.element(given["self"], indices)
    for name, bound in (("min", _maximum), ("max", _minimum)):
        if given.get(name) is not None:
            x = bound(*_pair(x, reading.number(given[name])))
    return converted(reading, x, node)


def _choice(reading: Reading, node: Any, condition: Any, x: Any, y: Any) -> Term:
    return z3.If(as_bool(condition), converted(reading, x, node), converted(reading, y, node))


@reads(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(reading: Reading, node: Any, indices: Indices) -> Term:
    return _choice(reading, node, *(reading.operand(a, node, indices) for a in node.args))


@reads(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(reading: Reading, node: Any, indices: Indices) -> Term:
    source, mask, value = (reading.operand(a, node, indices) for a in node.args)
    return _choice(reading, node, mask, value, source)


@reads(aten.tril.default, aten.triu.default)
def _triangle(reading: Reading, node: Any, indices: Indices) -> Term:
    given = _arguments(node)
    row, column = indices[-2:]
    diagonal: Any = reading.number(given["diagonal"])
    kept = column - row <= diagonal if node.target is aten.tril.default else column - row >= diagonal
    return _choice(reading, node, kept, reading.element(given["self"], indices), z3.IntVal(0))


# Along a row.


@reads(aten.diff.default)
def _diff(reading: Reading, node: Any, indices: Indices) -> Term:
    given = _arguments(node)
    source, prepend = given["self"], given["prepend"]
    dim = _dimension(node, given["dim"])
    if given["n"] != 1 or given["append"] is not None:
        raise Unread("differences of another order")

    def at(shift: int) -> Any:
        places = [*indices]
        places[dim] = indices[dim] + shift
        if prepend is None:
            return reading.element(source, places)
        before = reading.size(_sizes(prepend)[dim])
        first, rest = [*places], [*places]
        rest[dim] = places[dim] - before
        return z3.If(places[dim] < before, reading.element(prepend, first), reading.element(source, rest))

    return converted(reading, as_number(at(1)) - as_number(at(0)), node)


@reads(aten.cumsum.default)
def _cumsum(reading: Reading, node: Any, indices: Indices) -> Term:
    """A function with the facts of a sum at the places where it is read: of truth values, it rises between two places by at
    least what stands at the second one, and at most as many as there are between. Of a constant, it is that many times it."""
    source: Any = node.args[0]
    dim = _dimension(node, node.args[1])
    value = node.meta["val"]
    if value.is_floating_point():
        raise Unread("a sum of fractions")
    element = as_number(reading.element(source, indices))
    if z3.is_int_value(element):
        return element * (indices[dim] + 1)
    total: Any = reading.unknown(node, indices)
    positions = _positions_of_runs(source)
    counts = _is_bool_sum(node)
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
    given = _arguments(difference)
    one_before = given["prepend"] is not None and _is_one(_sizes(given["prepend"])[-1])
    last = _dimension(difference, given["dim"]) == len(_sizes(difference)) - 1
    return given["self"] if given["n"] == 1 and given["append"] is None and one_before and last else None


@reads(aten.searchsorted.Tensor)
def _searchsorted(reading: Reading, node: Any, indices: Indices) -> Term:
    """The place of a value in a row that never falls, which is asked of sums of truth values only."""
    given = _arguments(node)
    row, values = given["sorted_sequence"], given["self"]
    right = given["right"] or given["side"] == "right"
    if len(_sizes(row)) != len(_sizes(values)) or given["sorter"] is not None or not _never_falls(reading, row):
        raise Unread("a row that may not be sorted")
    result: Any = reading.unknown(node, indices)
    size = reading.size(_sizes(row)[-1])
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
        if _text(_sizes(before)[-1]) != _text(_sizes(node)[-1]):
            return False
        node = before
    return _is_bool_sum(node)
