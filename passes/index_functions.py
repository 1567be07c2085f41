"""Abstract interpretation of a mask's subgraph: what a tensor's element is, as a function of its indices.

`IndexFunctions.element(node)` is an expression over `Axis(0) .. Axis(rank - 1)`. Views, comparisons, logic, arithmetic,
`arange`, `tril`, `where`, ... are opened; any other node is data: `Element(node, indices)`, whose values are not known.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class Expression:
    """An element of a tensor, as a function of its indices."""


@dataclass(frozen=True)
class Const(Expression):
    value: bool | int | float


@dataclass(frozen=True)
class Precision(Expression):
    """What a number is rounded to."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Size(Expression):
    """A symbolic integer; two of them are equal when their symbols' expressions are."""

    text: str
    node: Node

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@dataclass(frozen=True)
class Axis(Expression):
    """The index along one dimension."""

    dim: int


@dataclass(frozen=True)
class Element(Expression):
    """An element of a tensor whose values are data."""

    node: Node
    indices: tuple[Expression, ...]


@dataclass(frozen=True)
class Apply(Expression):
    """`name` is one of: add mul floordiv abs lt le eq and or not where number cast quotient remainder join; `Interval` has more.

    `cast(x, precision)` rounds to a floating-point type: a bias is computed as the model computes it, in its precision.
    `join(i, j, n)` is `i * n + j` with `0 <= j < n`: an index along a dimension that two were merged into;
    `quotient(m, n)` and `remainder(m, n)` take it apart.
    """

    name: str
    args: tuple[Expression, ...]


TRUE, FALSE, ZERO = Const(True), Const(False), Const(0)


def substitute(expression: Expression, axes: dict[int, Expression]) -> Expression:
    """Replaces axes; those not named stay."""
    if isinstance(expression, Axis):
        return axes.get(expression.dim, expression)
    if isinstance(expression, Element):
        return Element(expression.node, tuple(substitute(i, axes) for i in expression.indices))
    if isinstance(expression, Apply):
        return apply(expression.name, *(substitute(a, axes) for a in expression.args))
    return expression


def axes_of(expression: Expression) -> frozenset[int]:
    if isinstance(expression, Axis):
        return frozenset((expression.dim,))
    parts: tuple[Expression, ...] = ()
    if isinstance(expression, Element):
        parts = expression.indices
    elif isinstance(expression, Apply):
        parts = expression.args
    return frozenset().union(*(axes_of(part) for part in parts))


def elements_of(expression: Expression) -> list[Element]:
    """All data elements, nested ones included, in order."""
    if isinstance(expression, Element):
        return [expression, *(e for i in expression.indices for e in elements_of(i))]
    if isinstance(expression, Apply):
        return [e for a in expression.args for e in elements_of(a)]
    return []


def constants_of(expression: Expression) -> list[int]:
    if isinstance(expression, Const):
        return [expression.value] if type(expression.value) is int else []
    if isinstance(expression, Apply):
        return [c for a in expression.args for c in constants_of(a)]
    return []


def reads_size(expression: Expression) -> bool:
    """Whether a value depends on a symbolic size, but for where data is read."""
    if isinstance(expression, Apply):
        return any(reads_size(a) for a in expression.args)
    return isinstance(expression, Size)


def negate(expression: Expression) -> Expression:
    return apply("not", expression)


_FOLD: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "abs": abs,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    "number": lambda x: x * 1,
}


def apply(name: str, *args: Expression) -> Expression:
    """`Apply` with constants folded and the laws of 0, 1, true and false applied."""
    if name in _FOLD and all(isinstance(a, Const) for a in args):
        return Const(_FOLD[name](*(a.value for a in args)))  # type: ignore[attr-defined]
    match name, args:
        case ("add", (x, Const(0))) | ("add", (Const(0), x)) | ("mul", (x, Const(1))) | ("mul", (Const(1), x)):
            return x
        case "mul", ((_, Const(0)) | (Const(0), _)):
            return ZERO
        case ("and", (x, Const(True))) | ("and", (Const(True), x)):
            return x
        case "and", ((_, Const(False)) | (Const(False), _)):
            return FALSE
        case ("or", (x, Const(False))) | ("or", (Const(False), x)):
            return x
        case "or", ((_, Const(True)) | (Const(True), _)):
            return TRUE
        case "not", (Const(value),):
            return Const(not value)
        case "not", (Apply("not", (x,)),):
            return x
        case "where", (Const(True), x, _):
            return x
        case "where", (Const(False), _, x):
            return x
        case "where", (_, x, y) if x == y:
            return x
        case "quotient", (Apply("join", (x, _, n)), m) if n == m:
            return x
        case "remainder", (Apply("join", (_, x, n)), m) if n == m:
            return x
        case "eq", (x, y) if x == y and not elements_of(x):
            return TRUE
        case "cast", (x, _) if _is_made_of_constants(x):
            return x
        case "cast", (Apply("where", (condition, x, y)), precision):
            return apply("where", condition, apply("cast", x, precision), apply("cast", y, precision))
        case "cast", (x, Precision(dtype)) if floating_type(x) == dtype:
            return x
    return Apply(name, args)


def _is_made_of_constants(expression: Expression) -> bool:
    """Whether a number is one of a few that are written in the program, such as 0 and a masking value."""
    if isinstance(expression, Apply) and expression.name in ("where", "add", "mul"):
        return all(_is_made_of_constants(a) for a in expression.args[expression.name == "where" :])
    return isinstance(expression, Const) or (isinstance(expression, Apply) and expression.name == "number")


def floating_type(expression: Expression) -> torch.dtype | None:
    """The floating-point type of the values; None where they are integers, truth values or constants."""
    if isinstance(expression, Element):
        dtype = expression.node.meta["val"].dtype
        return dtype if dtype.is_floating_point else None
    if not isinstance(expression, Apply) or expression.name not in ("add", "mul", "abs", "where", "cast"):
        return None
    if expression.name == "cast":
        return expression.args[1].dtype  # type: ignore[attr-defined]
    types = [t for a in expression.args[expression.name == "where" :] if (t := floating_type(a)) is not None]
    return functools.reduce(torch.promote_types, types) if types else None


def with_exact_indices(expression: Expression) -> Expression:
    """The same number, its indices not cast to fp32 or fp64, which hold them: comparisons are proven for integers."""
    if not isinstance(expression, Apply):
        return expression
    if expression.name == "cast" and _reads_index(expression) and _is_integer(expression.args[0]):
        return expression.args[0]
    return apply(expression.name, *(with_exact_indices(a) for a in expression.args))


class IndexFunctions:
    """Memoised evaluation of nodes to expressions.

    Args:
        modified: nodes that an in-place operation changes; they are data, whatever built them.
    """

    def __init__(self, modified: frozenset[Node] = frozenset()) -> None:
        self.modified = modified
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
            if result is not None:
                return result
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


def data(node: Node) -> Expression:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return Element(node, ())
    # A dimension of size 1 has one index, whatever it is broadcast to.
    return Element(node, tuple(ZERO if size == 1 else Axis(d) for d, size in enumerate(shape(node))))


def broadcast(element: Expression, sizes: tuple[Any, ...], out_rank: int) -> Expression:
    """Right-aligned: dimension d of the operand is dimension `d + out_rank - rank` of the result."""
    shift = out_rank - len(sizes)
    return substitute(
        element, {d: ZERO if type(size) is int and size == 1 else Axis(d + shift) for d, size in enumerate(sizes)}
    )


def shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def arguments(node: Node, count: int) -> list[Any]:
    """The first `count` positional arguments, None for those left out."""
    given: list[Any] = list(node.args[:count])
    return given + [None] * (count - len(given))


def rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _size(value: torch.SymInt, node: Node) -> Expression:
    expression = value.node.expr
    return Const(int(expression)) if expression.is_number else Size(str(expression), node)


def is_bool(node: object) -> bool:
    return isinstance(node, Node) and isinstance(v := node.meta.get("val"), torch.Tensor) and v.dtype == torch.bool


Handler = Callable[[IndexFunctions, Node], "Expression | None"]
HANDLERS: dict[Any, Handler] = {}


def _handles(*targets: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, handler))
        return handler

    return register


@_handles(aten.sym_size.int, operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg)
def _symbolic_integer(_: IndexFunctions, node: Node) -> Expression | None:
    return None  # the node's own value is a SymInt or a number, and has been read from its metadata


@_handles(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(functions: IndexFunctions, node: Node) -> Expression | None:
    start = functions.scalar(node.args[0]) if len(node.args) > 1 else ZERO
    step = functions.scalar(node.args[2]) if len(node.args) > 2 else Const(1)
    if start is None or step is None or node.meta["val"].is_floating_point():
        return None
    return apply("add", apply("mul", Axis(0), step), start)


@_handles(
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
    aten.scalar_tensor.default,
    aten.lift_fresh_copy.default,
)
def _full(functions: IndexFunctions, node: Node) -> Expression | None:
    position = 0 if node.target is aten.scalar_tensor.default else 2 if node.target is aten.new_full.default else 1
    if len(node.args) <= position:
        return None
    return functions.scalar(node.args[position])


@_handles(
    aten.ones.default,
    aten.ones_like.default,
    aten.new_ones.default,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
)
def _filled(_: IndexFunctions, node: Node) -> Expression:
    one = "ones" in node.target.__name__  # type: ignore[union-attr]
    return Const(one) if is_bool(node) else Const(int(one))


@_handles(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
def _same(functions: IndexFunctions, node: Node) -> Expression | None:
    source = node.args[0]
    assert isinstance(source, Node)
    element = functions.element(source)
    if is_bool(source) and not is_bool(node):
        return apply("number", element)
    if is_bool(node) and not is_bool(source):
        return negate(apply("eq", with_exact_indices(element), ZERO))
    if source.meta["val"].is_floating_point() and not node.meta["val"].is_floating_point():
        return None
    narrow = node.meta["val"].dtype in _NARROW
    if narrow and (_reads_index(element) or not node.meta["val"].is_floating_point()):
        return None  # it may not fit
    return cast(element, node)


def cast(element: Expression, node: Node) -> Expression:
    """Rounded to the type of a node, where that is a floating-point one."""
    dtype = node.meta["val"].dtype
    return apply("cast", element, Precision(dtype)) if dtype.is_floating_point else element


_NARROW = (torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16)


def _reads_index(expression: Expression) -> bool:
    """Whether an index is part of a value, and not only of where a value is read."""
    if isinstance(expression, Apply):
        return any(_reads_index(argument) for argument in expression.args)
    return isinstance(expression, (Axis, Size))


@_handles(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(functions: IndexFunctions, node: Node) -> Expression:
    source = node.args[0]
    assert isinstance(source, Node)
    return broadcast(functions.element(source), shape(source), rank(node))


@_handles(aten.unsqueeze.default)
def _unsqueeze(functions: IndexFunctions, node: Node) -> Expression:
    source, dim = node.args
    assert isinstance(source, Node) and isinstance(dim, int)
    dim = dim % rank(node)
    return substitute(functions.element(source), {d: Axis(d + (d >= dim)) for d in range(rank(source))})


@_handles(
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def _reshape(functions: IndexFunctions, node: Node) -> Expression | None:
    """Dimensions of size 1 come and go; two neighbours may be merged into one, or one be split in two."""
    source = node.args[0]
    assert isinstance(source, Node)
    inside = [(d, _symbolic(size)) for d, size in enumerate(shape(source)) if size != 1]
    outside = [(d, _symbolic(size)) for d, size in enumerate(shape(node)) if size != 1]
    axes: dict[int, Expression] = dict.fromkeys(range(rank(source)), ZERO)
    while inside and outside:
        (d, size), (out, out_size) = inside.pop(0), outside.pop(0)
        if size == out_size:
            axes[d] = Axis(out)
        elif inside and size * inside[0][1] == out_size and inside[0][1].is_number:
            second, length = inside.pop(0)
            axes[d] = apply("quotient", Axis(out), Const(int(length)))
            axes[second] = apply("remainder", Axis(out), Const(int(length)))
        elif outside and out_size * outside[0][1] == size and outside[0][1].is_number:
            second, length = outside.pop(0)
            axes[d] = apply("join", Axis(out), Axis(second), Const(int(length)))
        else:
            return None
    return None if inside or outside else substitute(functions.element(source), axes)


def _symbolic(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


@_handles(aten.transpose.int, aten.permute.default, aten.t.default)
def _permute(functions: IndexFunctions, node: Node) -> Expression:
    source = node.args[0]
    assert isinstance(source, Node)
    order = list(range(rank(source)))
    given: Any = node.args[1:] if len(node.args) > 1 else (0, -1)
    if node.target is aten.permute.default:
        order = [d % rank(source) for d in given[0]]
    else:
        first, second = (d % rank(source) for d in given)
        order[first], order[second] = order[second], order[first]
    return substitute(functions.element(source), {inner: Axis(outer) for outer, inner in enumerate(order)})


@_handles(aten.slice.Tensor)
def _slice(functions: IndexFunctions, node: Node) -> Expression | None:
    source, dim, start, _, step = arguments(node, 5)
    dim = (dim or 0) % rank(source)
    offset = functions.scalar(start or 0)
    if offset is None or step not in (None, 1):
        return None
    if isinstance(offset, Const) and offset.value < 0:
        size = functions.scalar(shape(source)[dim]) if isinstance(shape(source)[dim], int) else None
        if size is None:
            return None
        offset = apply("add", offset, size)
    return substitute(functions.element(source), {dim: apply("add", Axis(dim), offset)})


@_handles(aten.select.int)
def _select(functions: IndexFunctions, node: Node) -> Expression | None:
    source, dim, index = node.args
    assert isinstance(source, Node) and isinstance(dim, int)
    dim = dim % rank(source)
    position = functions.scalar(index)
    if position is None or (isinstance(position, Const) and position.value < 0):
        return None
    axes: dict[int, Expression] = {d: Axis(d - (d > dim)) for d in range(rank(source))}
    return substitute(functions.element(source), {**axes, dim: position})


@_handles(aten.index.Tensor)
def _index(functions: IndexFunctions, node: Node) -> Expression | None:
    """Advanced indexing with one integer tensor per dimension."""
    source, indices = node.args
    assert isinstance(source, Node) and isinstance(indices, (list, tuple))
    if len(indices) != rank(source) or any(not isinstance(i, Node) or is_bool(i) for i in indices):
        return None
    positions = [functions.operand(i, node) for i in indices]
    return substitute(functions.element(source), dict(enumerate(positions)))  # type: ignore[arg-type]


_BINARY = {
    "add": "add",
    "mul": "mul",
    "lt": "lt",
    "le": "le",
    "eq": "eq",
    "logical_and": "and",
    "logical_or": "or",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "__and__": "and",
    "__or__": "or",
    "floor_divide": "floordiv",
}


def _binary(functions: IndexFunctions, node: Node) -> Expression | None:
    name = node.target._opname  # type: ignore[union-attr]
    left, right = (functions.operand(a, node) for a in node.args[:2])
    if left is None or right is None:
        return None
    logical = [is_bool(a) or isinstance(a, bool) for a in node.args[:2]]
    if name in ("add", "mul", "sub", "rsub") and not all(logical):
        left, right = (apply("number", x) if b else x for x, b in zip((left, right), logical, strict=True))
    left, right = (with_exact_indices(x) if is_bool(node) else cast(x, node) for x in (left, right))
    alpha: Any = node.kwargs.get("alpha", 1)
    if alpha not in (1, -1) and node.meta["val"].is_floating_point():
        return None  # the product is not rounded
    if name == "rsub":
        left, right = right, left
    if name in ("sub", "rsub"):
        return apply("add", left, apply("mul", right, Const(-alpha)))
    if name == "add" and alpha != 1:
        right = apply("mul", right, Const(alpha))
    if name in ("gt", "ge"):
        return apply("lt" if name == "gt" else "le", right, left)
    if name == "ne":
        return negate(apply("eq", left, right))
    operation = _BINARY[name]
    if operation in ("and", "or") and not all(logical):
        return None
    if operation in ("add", "mul") and all(logical):
        operation = "or" if operation == "add" else "and"
    return apply(operation, left, right)


for _name in (*_BINARY, "sub", "rsub", "gt", "ge", "ne"):
    _packet = getattr(aten, _name)
    HANDLERS.update({getattr(_packet, o): _binary for o in ("Tensor", "Scalar", "default") if hasattr(_packet, o)})


@_handles(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div(functions: IndexFunctions, node: Node) -> Expression | None:
    if node.kwargs.get("rounding_mode") != "floor":
        return None
    left, right = (functions.operand(a, node) for a in node.args[:2])
    return None if left is None or right is None else apply("floordiv", left, right)


@_handles(aten.logical_not.default, aten.bitwise_not.default)
def _not(functions: IndexFunctions, node: Node) -> Expression | None:
    operand = functions.operand(node.args[0], node)
    return negate(operand) if operand is not None and is_bool(node.args[0]) else None


@_handles(aten.neg.default)
def _neg(functions: IndexFunctions, node: Node) -> Expression | None:
    operand = functions.operand(node.args[0], node)
    return None if operand is None else apply("mul", operand, Const(-1))


@_handles(aten.abs.default)
def _abs(functions: IndexFunctions, node: Node) -> Expression | None:
    operand = functions.operand(node.args[0], node)
    return None if operand is None else apply("abs", operand)


@_handles(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(functions: IndexFunctions, node: Node) -> Expression | None:
    condition, left, right = (functions.operand(a, node) for a in node.args)
    if condition is None or left is None or right is None:
        return None
    if is_bool(node):
        return apply("or", apply("and", condition, left), apply("and", negate(condition), right))
    return cast(apply("where", condition, left, right), node)


@_handles(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(functions: IndexFunctions, node: Node) -> Expression | None:
    source, mask, value = (functions.operand(a, node) for a in node.args)
    if source is None or mask is None or value is None:
        return None
    if is_bool(node):
        filled = Const(bool(value.value)) if isinstance(value, Const) else value
        return apply("or", apply("and", mask, filled), apply("and", negate(mask), source))
    return apply("where", mask, value, source)


@_handles(aten.tril.default, aten.triu.default)
def _triangle(functions: IndexFunctions, node: Node) -> Expression | None:
    source = node.args[0]
    assert isinstance(source, Node)
    diagonal = functions.scalar(node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0))
    if diagonal is None:
        return None
    row, column = Axis(rank(node) - 2), Axis(rank(node) - 1)
    limit = apply("add", row, diagonal)
    kept = apply("le", column, limit) if node.target is aten.tril.default else apply("le", limit, column)
    element = functions.element(source)
    return apply("and", kept, element) if is_bool(node) else apply("where", kept, element, ZERO)


@_handles(aten.diff.default)
def _diff(functions: IndexFunctions, node: Node) -> Expression | None:
    """Differences of neighbours along the last dimension with one value before the first: constant for a ramp."""
    source, order, dim, prepend, append = arguments(node, 5)
    last = rank(source) - 1
    if order not in (None, 1) or (dim if dim is not None else -1) not in (-1, last) or append is not None:
        return None
    if not isinstance(prepend, Node) or shape(prepend)[last] != 1:
        return None
    element = functions.element(source)
    before = substitute(element, {last: apply("add", Axis(last), Const(-1))})
    first = substitute(functions.element(prepend), {last: ZERO})
    step = _linear_difference(element, before)
    at_border = _linear_difference(substitute(element, {last: ZERO}), first)
    return step if step is not None and step == at_border else None


def _linear_difference(left: Expression, right: Expression) -> Expression | None:
    """`left - right` where it is a constant."""
    terms: dict[Expression, int] = {}
    for expression, sign in ((left, 1), (right, -1)):
        part = linear_terms(expression)
        if part is None:
            return None
        for term, factor in part.items():
            terms[term] = terms.get(term, 0) + sign * factor
    rest = {term: factor for term, factor in terms.items() if factor}
    return Const(rest.pop(Const(1), 0)) if not rest.keys() - {Const(1)} else None


def linear_terms(expression: Expression) -> dict[Expression, int] | None:
    """An integer expression as a sum of terms times integer factors; `Const(1)` carries the constant."""
    if isinstance(expression, Const):
        return {Const(1): expression.value} if isinstance(expression.value, int) else None
    if isinstance(expression, Apply) and expression.name == "add":
        total: dict[Expression, int] = {}
        for argument in expression.args:
            part = linear_terms(argument)
            if part is None:
                return None
            for term, factor in part.items():
                total[term] = total.get(term, 0) + factor
        return total
    if isinstance(expression, Apply) and expression.name == "mul":
        for constant, other in (expression.args, expression.args[::-1]):
            if isinstance(constant, Const) and isinstance(constant.value, int):
                part = linear_terms(other)
                return None if part is None else {t: f * constant.value for t, f in part.items()}
        return None
    return {expression: 1} if _is_integer(expression) else None


def _is_integer(expression: Expression) -> bool:
    """Whether the values are integers (or truth values), and not floating-point numbers."""
    if isinstance(expression, Const):
        return isinstance(expression.value, int)
    if isinstance(expression, Element):
        return not expression.node.meta["val"].dtype.is_floating_point
    if isinstance(expression, Apply) and expression.name == "cast":
        return False
    if isinstance(expression, Apply) and expression.name not in ("lt", "le", "eq", "and", "or", "not", "number"):
        return all(_is_integer(a) for a in (expression.args[1:] if expression.name == "where" else expression.args))
    return True


@_handles(aten.cumsum.default)
def _cumsum(functions: IndexFunctions, node: Node) -> Expression | None:
    """Data that never falls along its dimension, where it sums truth values; 0 where there is nothing to sum."""
    source = node.args[0]
    assert isinstance(source, Node)
    if functions.element(source) in (FALSE, ZERO):
        return ZERO
    return data(functions.representative(node))


def never_falls(node: Node) -> bool:
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


@_handles(aten.topk.default, aten.scatter.value, operator.getitem)
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


def is_masking(value: float) -> bool:
    """Whether an additive value hides a key: exp of it is 0 in fp32, whatever the logit."""
    return (math.isinf(value) and value < 0) or value <= -1e4
