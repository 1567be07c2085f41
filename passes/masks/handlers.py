"""One handler for each ATen operator that masks are made of: views, comparisons, logic, arithmetic, `arange`, `where`, ...

A handler gets the interpreter and a node, and returns the expression of the node's element, or None where the node is data."""

from __future__ import annotations

import math
import operator
from typing import Any

import sympy
import torch
from rewriter.passes.graph.nodes import arguments
from rewriter.passes.graph.nodes import is_bool
from rewriter.passes.graph.nodes import rank
from rewriter.passes.graph.nodes import shape
from rewriter.passes.masks.expression import TRUE
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import Precision
from rewriter.passes.masks.expression import apply
from rewriter.passes.masks.expression import broadcast
from rewriter.passes.masks.expression import is_not_negative
from rewriter.passes.masks.expression import linear_difference
from rewriter.passes.masks.expression import negate
from rewriter.passes.masks.expression import reads_index
from rewriter.passes.masks.expression import substitute
from rewriter.passes.masks.expression import with_exact_indices
from rewriter.passes.masks.interpret import HANDLERS
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.interpret import handles
from torch.fx import Node

aten = torch.ops.aten


@handles(aten.sym_size.int, operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg)
def _symbolic_integer(_: IndexFunctions, node: Node) -> Expression | None:
    return None  # the node's own value is a SymInt or a number, and has been read from its metadata


@handles(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(functions: IndexFunctions, node: Node) -> Expression | None:
    start = functions.scalar(node.args[0]) if len(node.args) > 1 else ZERO
    step = functions.scalar(node.args[2]) if len(node.args) > 2 else Const(1)
    if start is None or step is None or node.meta["val"].is_floating_point():
        return None
    if any(isinstance(part, Const) and isinstance(part.value, float) for part in (start, step)):
        return None  # a fraction is cut to an integer
    return apply("add", apply("mul", Axis(0), step), start)


@handles(
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
    value = functions.scalar(node.args[position])
    if isinstance(value, Const) and is_bool(node):
        return Const(bool(value.value))
    if isinstance(value, Const) and isinstance(value.value, float) and not node.meta["val"].is_floating_point():
        return None  # a fraction is cut to an integer
    if is_bool(node) or _may_wrap(node, value):
        return None
    return value


@handles(
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


@handles(
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
    if narrow and (reads_index(element) or not node.meta["val"].is_floating_point()):
        return None  # it may not fit
    return cast(element, node)


def cast(element: Expression, node: Node) -> Expression:
    """Rounded to the type of a node, where that is a floating-point one."""
    dtype = node.meta["val"].dtype
    return apply("cast", element, Precision(dtype)) if dtype.is_floating_point else element


_NARROW = (torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16)


def _is_narrow_integer(node: Node) -> bool:
    """Whether sums and products of a node's type wrap where indices need not."""
    return node.meta["val"].dtype in (torch.uint8, torch.int8, torch.int16)


def _may_wrap(node: Node, value: Expression | None) -> bool:
    """Whether a number need not fit the node's type."""
    if not _is_narrow_integer(node) or value is None:
        return False
    limits = torch.iinfo(node.meta["val"].dtype)
    return not isinstance(value, Const) or not limits.min <= value.value <= limits.max


@handles(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(functions: IndexFunctions, node: Node) -> Expression:
    source = node.args[0]
    assert isinstance(source, Node)
    return broadcast(functions.element(source), shape(source), rank(node))


@handles(aten.unsqueeze.default)
def _unsqueeze(functions: IndexFunctions, node: Node) -> Expression:
    source, dim = node.args
    assert isinstance(source, Node) and isinstance(dim, int)
    dim = dim % rank(node)
    return substitute(functions.element(source), {d: Axis(d + (d >= dim)) for d in range(rank(source))})


@handles(
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


@handles(aten.transpose.int, aten.permute.default, aten.t.default)
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


@handles(aten.slice.Tensor)
def _slice(functions: IndexFunctions, node: Node) -> Expression | None:
    source, dim, start, _, step = arguments(node, 5)
    dim = (dim or 0) % rank(source)
    offset = functions.scalar(start or 0)
    if offset is None or step not in (None, 1):
        return None
    if isinstance(offset, Const) and offset.value < 0:
        size = shape(source)[dim]
        if not isinstance(size, int):
            return None
        offset = Const(max(offset.value + size, 0))
    return substitute(functions.element(source), {dim: apply("add", Axis(dim), offset)})


@handles(aten.pad.default, aten.constant_pad_nd.default)
def _pad(functions: IndexFunctions, node: Node) -> Expression | None:
    """Elements before the first one of a dimension, or fewer of them on either side."""
    given = arguments(node, 4)
    source, sizes = given[:2]
    mode, value = given[2:] if node.target is aten.pad.default else ("constant", given[2])
    if (
        mode not in (None, "constant")
        or any(type(size) is not int for size in sizes)
        or any(n > 0 for n in sizes[1::2])
    ):
        return None
    axes, inside = {}, []
    for n, before in enumerate(sizes[::2]):
        dim = rank(node) - 1 - n
        axes[dim] = apply("add", Axis(dim), Const(-before))
        if before > 0:
            inside.append(apply("le", ZERO, axes[dim]))
    element = substitute(functions.element(source), axes)
    is_inside: Expression = TRUE
    for condition in inside:
        is_inside = apply("and", is_inside, condition)
    return _choice(node, is_inside, element, Const(bool(value) if is_bool(node) else value or 0))


@handles(aten.select.int)
def _select(functions: IndexFunctions, node: Node) -> Expression | None:
    source, dim, index = node.args
    assert isinstance(source, Node) and isinstance(dim, int)
    dim = dim % rank(source)
    position = functions.scalar(index)
    if position is None or (isinstance(position, Const) and position.value < 0):
        return None
    axes: dict[int, Expression] = {d: Axis(d - (d > dim)) for d in range(rank(source))}
    return substitute(functions.element(source), {**axes, dim: position})


@handles(aten.index.Tensor)
def _index(functions: IndexFunctions, node: Node) -> Expression | None:
    """Advanced indexing with one integer tensor per dimension."""
    source, indices = node.args
    assert isinstance(source, Node) and isinstance(indices, (list, tuple))
    if len(indices) != rank(source) or any(not isinstance(i, Node) or is_bool(i) for i in indices):
        return None
    positions = [functions.operand(i, node) for i in indices]
    if functions.is_opened(source) and not all(p is not None and is_not_negative(p) for p in positions):
        return None  # a negative position counts from the end
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
    "maximum": "max",
    "minimum": "min",
}


def _binary(functions: IndexFunctions, node: Node) -> Expression | None:
    name = node.target._opname  # type: ignore[union-attr]
    left, right = (functions.operand(a, node) for a in node.args[:2])
    if left is None or right is None:
        return None
    logical = [is_bool(a) or isinstance(a, bool) for a in node.args[:2]]
    if name in ("add", "mul", "sub", "rsub") and not all(logical):
        left, right = (apply("number", x) if b else x for x, b in zip((left, right), logical, strict=True))
    if not is_bool(node) and _is_narrow_integer(node):
        return None  # it may wrap
    left, right = (with_exact_indices(x) if is_bool(node) else cast(x, node) for x in (left, right))
    alpha: Any = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
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
    if operation in ("max", "min") and all(logical):
        operation = "or" if operation == "max" else "and"
    if operation in ("and", "or") and not all(logical):
        return None
    if operation in ("add", "mul") and all(logical):
        operation = "or" if operation == "add" else "and"
    return apply(operation, left, right)


for _name in (*_BINARY, "sub", "rsub", "gt", "ge", "ne"):
    _packet = getattr(aten, _name)
    HANDLERS.update({getattr(_packet, o): _binary for o in ("Tensor", "Scalar", "default") if hasattr(_packet, o)})


@handles(
    aten.logical_xor.default,
    aten.bitwise_xor.Tensor,
    aten.bitwise_xor.Scalar,
    aten.__xor__.Tensor,
    aten.__xor__.Scalar,
)
def _xor(functions: IndexFunctions, node: Node) -> Expression | None:
    left, right = (functions.operand(a, node) for a in node.args[:2])
    if left is None or right is None or not all(is_bool(a) or isinstance(a, bool) for a in node.args[:2]):
        return None
    return apply("or", apply("and", left, negate(right)), apply("and", negate(left), right))


@handles(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div(functions: IndexFunctions, node: Node) -> Expression | None:
    if node.kwargs.get("rounding_mode") != "floor":
        return None
    left, right = (functions.operand(a, node) for a in node.args[:2])
    return None if left is None or right is None else apply("floordiv", left, right)


@handles(aten.logical_not.default, aten.bitwise_not.default)
def _not(functions: IndexFunctions, node: Node) -> Expression | None:
    operand = functions.operand(node.args[0], node)
    return negate(operand) if operand is not None and is_bool(node.args[0]) else None


@handles(aten.neg.default)
def _neg(functions: IndexFunctions, node: Node) -> Expression | None:
    if _is_narrow_integer(node):
        return None
    operand = functions.operand(node.args[0], node)
    return None if operand is None else apply("mul", operand, Const(-1))


@handles(aten.abs.default)
def _abs(functions: IndexFunctions, node: Node) -> Expression | None:
    if _is_narrow_integer(node):
        return None
    operand = functions.operand(node.args[0], node)
    return None if operand is None else apply("abs", operand)


@handles(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(functions: IndexFunctions, node: Node) -> Expression | None:
    condition, left, right = (functions.operand(a, node) for a in node.args)
    if condition is None or left is None or right is None:
        return None
    return _choice(node, condition, left, right)


def _choice(node: Node, condition: Expression, left: Expression, right: Expression) -> Expression:
    """The left one where the condition holds, as a value of the node's type."""
    if is_bool(node):
        return apply("or", apply("and", condition, left), apply("and", negate(condition), right))
    return cast(apply("where", condition, left, right), node)


@handles(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(functions: IndexFunctions, node: Node) -> Expression | None:
    source, mask, value = (functions.operand(a, node) for a in node.args)
    if source is None or mask is None or value is None:
        return None
    if is_bool(node):
        filled = Const(bool(value.value)) if isinstance(value, Const) else value
        return apply("or", apply("and", mask, filled), apply("and", negate(mask), source))
    return apply("where", mask, value, source)


@handles(aten.log.default)
def _log(functions: IndexFunctions, node: Node) -> Expression | None:
    """Of 0 and 1."""
    element = functions.operand(node.args[0], node)
    if isinstance(element, Apply) and element.name == "cast":
        element = element.args[0]
    if not isinstance(element, Apply) or element.name != "number":
        return None
    return apply("where", element.args[0], Const(0.0), Const(-math.inf))


@handles(aten.cat.default)
def _cat(functions: IndexFunctions, node: Node) -> Expression | None:
    """Parts of which all but the last one have sizes that are numbers."""
    parts, dim = arguments(node, 2)
    dim = (dim or 0) % rank(node)
    if any(type(shape(part)[dim]) is not int for part in parts[:-1]):
        return None
    begins = [sum(shape(part)[dim] for part in parts[:number]) for number in range(len(parts))]
    moved = [apply("add", Axis(dim), Const(-begin)) for begin in begins]
    elements = [substitute(functions.element(part), {dim: place}) for part, place in zip(parts, moved, strict=True)]
    result = elements[-1]
    for begin, element in reversed(list(zip(begins[1:], elements, strict=False))):
        is_before = apply("lt", Axis(dim), Const(begin))
        result = _choice(node, is_before, element, result)
    return result


@handles(aten.tril.default, aten.triu.default)
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


@handles(aten.diff.default)
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
    step = linear_difference(element, before)
    at_border = linear_difference(substitute(element, {last: ZERO}), first)
    return step if step is not None and step == at_border else None
