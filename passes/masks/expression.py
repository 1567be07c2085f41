"""The algebra of index expressions: what an element of a tensor is, as a function of its indices.

Expressions are values: frozen, compared by what they are. `apply` builds them with constants folded and the laws of 0, 1,
true and false applied; `substitute` puts expressions in the place of axes; `linear_terms` reads one as a sum of terms with
integer factors.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node


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
    """`name` is one of: add mul floordiv abs max min lt le eq and or not where number cast quotient remainder join; `Interval`
    has more.

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
    "max": max,
    "min": min,
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
        case "add", (Apply("add", (x, Const(a))), Const(b)) if type(a) is int and type(b) is int:
            return apply("add", x, Const(a + b))
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
        case "or", (Apply("and", (x, y)), Apply("and", (Apply("not", (z,)), w))) if x == z and y == w:
            return y
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


_OF_NUMBERS = ("add", "mul", "abs", "where", "cast", "max", "min")


def floating_type(expression: Expression) -> torch.dtype | None:
    """The floating-point type of the values; None where they are integers, truth values or constants."""
    if isinstance(expression, Element):
        dtype = expression.node.meta["val"].dtype
        return dtype if dtype.is_floating_point else None
    if not isinstance(expression, Apply) or expression.name not in _OF_NUMBERS:
        return None
    if expression.name == "cast":
        return expression.args[1].dtype  # type: ignore[attr-defined]
    types = [t for a in expression.args[expression.name == "where" :] if (t := floating_type(a)) is not None]
    return functools.reduce(torch.promote_types, types) if types else None


def with_exact_indices(expression: Expression) -> Expression:
    """The same number, its indices not cast to fp32 or fp64, which hold them: comparisons are proven for integers."""
    if not isinstance(expression, Apply):
        return expression
    if expression.name == "cast" and reads_index(expression) and _is_integer(expression.args[0]):
        return expression.args[0]
    return apply(expression.name, *(with_exact_indices(a) for a in expression.args))


def broadcast(element: Expression, sizes: tuple[Any, ...], out_rank: int) -> Expression:
    """Right-aligned: dimension d of the operand is dimension `d + out_rank - rank` of the result."""
    shift = out_rank - len(sizes)
    return substitute(
        element, {d: ZERO if type(size) is int and size == 1 else Axis(d + shift) for d, size in enumerate(sizes)}
    )


def reads_index(expression: Expression) -> bool:
    """Whether an index is part of a value, and not only of where a value is read."""
    if isinstance(expression, Apply):
        return any(reads_index(argument) for argument in expression.args)
    return isinstance(expression, (Axis, Size))


def linear_difference(left: Expression, right: Expression) -> Expression | None:
    """`left - right` where it is a constant."""
    terms = difference_terms(left, right)
    if terms is None:
        return None
    return Const(terms.pop(Const(1), 0)) if not terms.keys() - {Const(1)} else None


def difference_terms(left: Expression, right: Expression) -> dict[Expression, int] | None:
    """`left - right` as `linear_terms` has it, without terms of factor 0; None where one of them is no such sum."""
    terms: dict[Expression, int] = {}
    for expression, sign in ((left, 1), (right, -1)):
        part = linear_terms(expression)
        if part is None:
            return None
        for term, factor in part.items():
            terms[term] = terms.get(term, 0) + sign * factor
    return {term: factor for term, factor in terms.items() if factor}


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


LONGEST = 2**22
"""Integers are taken to be what they are, and not to wrap, for indices and data up to this: texts of four million tokens."""


def may_wrap(expression: Expression, dtype: torch.dtype) -> bool:
    """Whether an integer's value need not fit a type, in which it would begin anew."""
    limits = torch.iinfo(dtype)
    low, high = _value_range(expression)
    return low < limits.min or high > limits.max


def _value_range(expression: Expression) -> tuple[int, int]:
    """The least and the largest value of an integer expression, of indices below `LONGEST` and data up to it."""
    if isinstance(expression, Const):
        # Infinities and fractions are no integers, and asked of nothing.
        value = int(expression.value) if math.isfinite(expression.value) else 0
        return value, value
    if isinstance(expression, (Axis, Size)):
        return 0, LONGEST
    if not isinstance(expression, Apply):
        return -LONGEST, LONGEST
    ranges = [_value_range(a) for a in expression.args[expression.name == "where" :] if not isinstance(a, Precision)]
    match expression.name, ranges:
        case "add", [(a, b), (c, d)]:
            return a + c, b + d
        case "mul", [(a, b), (c, d)]:
            products = (a * c, a * d, b * c, b * d)
            return min(products), max(products)
        case "join", [(a, b), (c, d), (_, n)]:
            return a + c, b * max(n, 1) + d
        case (("where" | "max" | "min"), _):
            return min(low for low, _ in ranges), max(high for _, high in ranges)
        case "abs", [(a, b)]:
            return 0, max(abs(a), abs(b))
        case (("floordiv" | "quotient" | "remainder"), [(a, b), (c, d)]):
            most = max(abs(a), abs(b), abs(c), abs(d)) if expression.name == "remainder" else max(abs(a), abs(b))
            return -most, most
        case "cast", [own]:
            return own
        case (("number" | "lt" | "le" | "eq" | "and" | "or" | "not"), _):
            return 0, 1
    return -LONGEST, LONGEST


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


def is_not_negative(expression: Expression) -> bool:
    """Whether an integer is known to be at least 0; data is not."""
    if isinstance(expression, Const):
        return expression.value >= 0
    if isinstance(expression, Apply) and expression.name in ("abs", "number", "lt", "le", "eq", "and", "or", "not"):
        return True
    if isinstance(expression, Apply) and expression.name == "where":
        return all(map(is_not_negative, expression.args[1:]))
    if isinstance(expression, Apply) and expression.name in ("add", "mul", "floordiv", "quotient", "remainder", "join"):
        return all(map(is_not_negative, expression.args))
    return isinstance(expression, (Axis, Size))


def is_masking(value: float) -> bool:
    """Whether an additive value hides a key: exp of it is 0 in fp32, whatever the logit."""
    return (math.isinf(value) and value < 0) or value <= -1e4


LARGEST = 2**30
"""Constant offsets are cut to this: no row is that far, and sums stay in int32. A clamp in the graph would do the same,
but Inductor (torch 2.13) folds `maximum(arange(n).clamp(-m, m), arange(n)).clamp(max=m)`, m = 2**31 - 1, to m."""


def sum_of(terms: Mapping[Expression, int]) -> Expression:
    """What `linear_terms` takes apart; constant offsets are cut to `LARGEST`."""
    total: Expression = ZERO
    for term, factor in terms.items():
        if term == Const(1):
            factor = max(-LARGEST, min(LARGEST, factor))
        total = apply("add", total, apply("mul", term, Const(factor)))
    return total
