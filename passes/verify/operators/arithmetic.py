"""Arithmetic, comparisons, logic and choices: element by element."""

from __future__ import annotations

import operator
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import torch
import z3
from rewriter.passes.verify.reading import INFINITE
from rewriter.passes.verify.reading import READERS
from rewriter.passes.verify.reading import Indices
from rewriter.passes.verify.reading import Reading
from rewriter.passes.verify.reading import Term
from rewriter.passes.verify.reading import Unread
from rewriter.passes.verify.reading import arguments_of
from rewriter.passes.verify.reading import as_bool
from rewriter.passes.verify.reading import as_number
from rewriter.passes.verify.reading import as_real
from rewriter.passes.verify.reading import converted
from rewriter.passes.verify.reading import floor_division
from rewriter.passes.verify.reading import is_bool
from rewriter.passes.verify.reading import maximum
from rewriter.passes.verify.reading import minimum
from rewriter.passes.verify.reading import reads
from rewriter.passes.verify.reading import remainder
from rewriter.passes.verify.reading import rounded
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten


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
    "maximum": maximum,
    "minimum": minimum,
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
        if not name.startswith("logical") and not (is_bool(arguments[0]) and is_bool(arguments[1])):
            raise Unread("bits of integers")
        return _LOGIC[name](as_bool(x), as_bool(y))
    if all(map(is_bool, arguments)) and name in ("add", "mul", "maximum", "minimum"):
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
    READERS.update(dict.fromkeys(_overloads, _binary))


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
    if node.target is aten.bitwise_not.default and not is_bool(node.args[0]):
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
    given = arguments_of(node)
    x: Any = reading.element(given["self"], indices)
    for name, bound in (("min", maximum), ("max", minimum)):
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
    given = arguments_of(node)
    row, column = indices[-2:]
    diagonal: Any = reading.number(given["diagonal"])
    kept = column - row <= diagonal if node.target is aten.tril.default else column - row >= diagonal
    return _choice(reading, node, kept, reading.element(given["self"], indices), z3.IntVal(0))
