"""The algebra of index expressions, without a graph: what `apply` folds, and what takes expressions apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from rewriter.passes.masks.evaluate import materialize
from rewriter.passes.masks.expression import FALSE
from rewriter.passes.masks.expression import LARGEST
from rewriter.passes.masks.expression import TRUE
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import Precision
from rewriter.passes.masks.expression import Size
from rewriter.passes.masks.expression import apply
from rewriter.passes.masks.expression import axes_of
from rewriter.passes.masks.expression import broadcast
from rewriter.passes.masks.expression import constants_of
from rewriter.passes.masks.expression import elements_of
from rewriter.passes.masks.expression import floating_type
from rewriter.passes.masks.expression import is_masking
from rewriter.passes.masks.expression import linear_difference
from rewriter.passes.masks.expression import linear_terms
from rewriter.passes.masks.expression import negate
from rewriter.passes.masks.expression import reads_index
from rewriter.passes.masks.expression import reads_size
from rewriter.passes.masks.expression import substitute
from rewriter.passes.masks.expression import sum_of
from rewriter.passes.masks.expression import with_exact_indices
from torch.fx import Graph
from torch.fx import Node

I, J = Axis(0), Axis(1)  # noqa: E741
LESS = Apply("lt", (I, J))
FP16, BF16, FP32, FP64 = (Precision(t) for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64))


def tensor_node(dtype: torch.dtype) -> Node:
    node = Graph().placeholder("data")
    node.meta["val"] = torch.empty(4, 4, dtype=dtype)
    return node


IDS = Element(tensor_node(torch.int64), (I, J))
HALF = Element(tensor_node(torch.float16), (I, J))
SINGLE = Element(tensor_node(torch.float32), (J, I))
SIZE = Size("s0", tensor_node(torch.int64))

LAWS: list[tuple[str, tuple[Expression, ...], Expression]] = [
    ("add", (I, ZERO), I),
    ("add", (ZERO, IDS), IDS),
    ("mul", (I, Const(1)), I),
    ("mul", (Const(1), I), I),
    ("mul", (I, ZERO), ZERO),
    ("mul", (ZERO, IDS), ZERO),
    ("and", (LESS, TRUE), LESS),
    ("and", (TRUE, LESS), LESS),
    ("and", (LESS, FALSE), FALSE),
    ("and", (FALSE, LESS), FALSE),
    ("or", (LESS, FALSE), LESS),
    ("or", (FALSE, LESS), LESS),
    ("or", (LESS, TRUE), TRUE),
    ("or", (TRUE, LESS), TRUE),
    ("not", (TRUE,), FALSE),
    ("not", (FALSE,), TRUE),
    ("not", (Apply("not", (LESS,)),), LESS),
    ("where", (TRUE, I, J), I),
    ("where", (FALSE, I, J), J),
    ("where", (LESS, I, I), I),
    ("quotient", (Apply("join", (I, J, Const(3))), Const(3)), I),
    ("remainder", (Apply("join", (I, J, Const(3))), Const(3)), J),
    ("eq", (I, I), TRUE),
    ("cast", (Const(-1e9), BF16), Const(-1e9)),
    ("cast", (Apply("number", (LESS,)), FP16), Apply("number", (LESS,))),
    ("cast", (HALF, FP16), HALF),
    (
        "cast",
        (Apply("where", (LESS, HALF, Const(0.0))), FP32),
        Apply("where", (LESS, Apply("cast", (HALF, FP32)), Const(0.0))),
    ),
]


@pytest.mark.parametrize(("name", "args", "expected"), LAWS, ids=lambda x: x if isinstance(x, str) else "")
def test_laws(name: str, args: tuple[Expression, ...], expected: Expression) -> None:
    assert apply(name, *args) == expected


FOLDS: list[tuple[str, tuple[Any, ...], Any]] = [
    ("add", (3, 4), 7),
    ("mul", (3, -4), -12),
    ("floordiv", (-7, 2), -4),
    ("abs", (-3,), 3),
    ("lt", (1, 2), True),
    ("le", (2, 2), True),
    ("eq", (1, 2), False),
    ("number", (True,), 1),
    ("number", (False,), 0),
    ("add", (-math.inf, 1.0), -math.inf),
]


@pytest.mark.parametrize(("name", "args", "expected"), FOLDS)
def test_constants_are_folded(name: str, args: tuple[Any, ...], expected: Any) -> None:
    result = apply(name, *map(Const, args))
    assert isinstance(result, Const) and result.value == expected and type(result.value) is type(expected)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("quotient", (Apply("join", (I, J, Const(3))), Const(4))),
        ("remainder", (Apply("join", (I, J, Const(3))), Const(4))),
        ("eq", (IDS, IDS)),
        ("eq", (I, J)),
        ("where", (LESS, I, J)),
        ("cast", (HALF, FP32)),
        ("cast", (I, FP32)),
        ("floordiv", (I, Const(1))),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_no_law_covers_stays(name: str, args: tuple[Expression, ...]) -> None:
    """Data may be NaN, which is not equal to itself; a rounding is kept; so are indices merged by another length."""
    assert apply(name, *args) == Apply(name, args)


def test_negate_twice_is_nothing() -> None:
    assert negate(LESS) == Apply("not", (LESS,))
    assert negate(negate(LESS)) == LESS
    assert negate(TRUE) == FALSE


def test_substitute_puts_in_and_folds_again() -> None:
    sum_ = Apply("add", (I, Apply("mul", (J, Const(2)))))
    assert substitute(sum_, {0: Const(3), 1: Const(4)}) == Const(11)
    assert substitute(sum_, {1: ZERO}) == I
    assert substitute(LESS, {0: J, 1: I}) == Apply("lt", (J, I)), "all at once"
    assert substitute(sum_, {}) == sum_
    assert substitute(SIZE, {0: ZERO}) == SIZE


def test_substitute_reaches_nested_indices() -> None:
    nested = Element(IDS.node, (I, Element(IDS.node, (J, I))))
    expected = Element(IDS.node, (Const(5), Element(IDS.node, (J, Const(5)))))
    assert substitute(nested, {0: Const(5)}) == expected


def test_axes_and_elements_are_found_at_any_depth() -> None:
    nested = Element(IDS.node, (Axis(3), Element(HALF.node, (Axis(2), ZERO))))
    expression = Apply("where", (Apply("lt", (I, SIZE)), nested, SINGLE))
    assert axes_of(expression) == {0, 1, 2, 3}
    assert axes_of(Const(1)) == axes_of(SIZE) == frozenset()
    assert elements_of(expression) == [nested, nested.indices[1], SINGLE]
    assert elements_of(LESS) == []


def test_integers_written_in_an_expression() -> None:
    expression = Apply("add", (Apply("mul", (I, Const(7))), Apply("where", (TRUE, Const(2.5), Const(-3)))))
    assert constants_of(expression) == [7, -3]
    assert constants_of(Element(IDS.node, (Const(4), I))) == []


def test_where_data_is_read_does_not_count_as_reading() -> None:
    at_the_end = Element(IDS.node, (SIZE, I))
    assert not reads_size(at_the_end) and not reads_index(at_the_end)
    assert reads_size(Apply("lt", (I, SIZE))) and not reads_size(LESS)
    assert reads_index(Apply("add", (at_the_end, I))) and reads_index(SIZE) and not reads_index(Const(1))


def test_sizes_are_equal_by_their_text() -> None:
    other = Size("s0", tensor_node(torch.int64))
    assert other == SIZE and hash(other) == hash(SIZE) and Size("s1", SIZE.node) != SIZE


def test_linear_terms_of_a_sum() -> None:
    """3 * (i + 2) - j + ids[i, j] + i"""
    expression = Apply("mul", (Const(3), Apply("add", (I, Const(2)))))
    for term in (Apply("mul", (J, Const(-1))), IDS, I):
        expression = Apply("add", (expression, term))
    assert linear_terms(expression) == {I: 4, Const(1): 6, J: -1, IDS: 1}


@pytest.mark.parametrize(
    "expression",
    [
        Const(2.5),
        HALF,
        Apply("mul", (I, J)),
        Apply("mul", (Const(0.5), I)),
        Apply("add", (I, Const(0.5))),
        Apply("add", (I, SINGLE)),
        Apply("cast", (I, FP32)),
        Apply("where", (LESS, I, HALF)),
        Apply("mul", (Const(2), Apply("mul", (I, J)))),
    ],
)
def test_what_is_not_linear_in_integers_has_no_terms(expression: Expression) -> None:
    assert linear_terms(expression) is None


def test_other_integers_are_terms_themselves() -> None:
    for expression in (Apply("floordiv", (I, Const(4))), Apply("where", (LESS, I, J)), Apply("number", (LESS,)), SIZE):
        assert linear_terms(expression) == {expression: 1}


def test_linear_difference() -> None:
    ahead = Apply("add", (I, Const(5)))
    assert linear_difference(ahead, I) == Const(5)
    assert linear_difference(I, I) == ZERO
    assert linear_difference(ahead, J) is None
    assert linear_difference(Const(0.5), I) is None


def test_sum_of_puts_together_what_linear_terms_takes_apart() -> None:
    terms: dict[Expression, int] = {I: 4, Const(1): -6, J: -1, IDS: 1, SIZE: 2}
    assert linear_terms(sum_of(terms)) == terms
    assert sum_of({}) == ZERO
    assert sum_of({I: 1}) == I
    assert sum_of({I: 0, J: 1}) == J


@pytest.mark.parametrize(
    ("offset", "cut"),
    [(2**40, LARGEST), (-(2**40), -LARGEST), (LARGEST, LARGEST), (LARGEST + 1, LARGEST), (LARGEST - 1, LARGEST - 1)],
)
def test_sum_of_cuts_constant_offsets(offset: int, cut: int) -> None:
    assert linear_terms(sum_of({I: 1, Const(1): offset})) == {I: 1, Const(1): cut}


def test_sum_of_does_not_cut_factors() -> None:
    assert linear_terms(sum_of({I: 2**40})) == {I: 2**40}


def test_floating_type_is_that_of_what_is_computed() -> None:
    assert floating_type(HALF) == torch.float16
    assert floating_type(Apply("add", (HALF, SINGLE))) == torch.float32
    assert floating_type(Apply("mul", (HALF, Const(2.0)))) == torch.float16, "a number leaves the type as it is"
    assert floating_type(Apply("add", (HALF, Element(tensor_node(torch.bfloat16), (I, J))))) == torch.float32
    assert floating_type(Apply("where", (Apply("lt", (SINGLE, Const(0.0))), HALF, ZERO))) == torch.float16
    assert floating_type(Apply("cast", (IDS, BF16))) == torch.bfloat16
    for expression in (I, IDS, Const(0.5), SIZE, LESS, Apply("lt", (HALF, SINGLE)), Apply("add", (I, IDS))):
        assert floating_type(expression) is None


def test_exact_indices_lose_their_casts_and_data_do_not() -> None:
    assert with_exact_indices(Apply("le", (Apply("cast", (J, FP32)), Apply("cast", (I, FP64))))) == Apply("le", (J, I))
    assert with_exact_indices(Apply("cast", (IDS, FP32))) == Apply("cast", (IDS, FP32))
    mixed = Apply("cast", (Apply("add", (I, HALF)), FP32))
    assert with_exact_indices(mixed) == mixed


def test_broadcast_is_right_aligned() -> None:
    assert broadcast(Element(IDS.node, (I, J)), (4, 4), 4) == Element(IDS.node, (Axis(2), Axis(3)))
    assert broadcast(Element(IDS.node, (I, J)), (1, 4), 3) == Element(IDS.node, (ZERO, Axis(2)))
    assert broadcast(LESS, (4, 4), 2) == LESS


def test_what_hides_a_key() -> None:
    assert all(map(is_masking, (-math.inf, -1e4, torch.finfo(torch.float16).min)))
    assert not any(map(is_masking, (0.0, -9999.0, math.inf, 1e9)))


SIDES = (3, 4)
GRID = {0: torch.arange(SIDES[0])[:, None], 1: torch.arange(SIDES[1])[None, :]}


@st.composite
def numbers(draw: st.DrawFn, depth: int = 3) -> Expression:
    """An integer; of two bare constants no sums or products, which `apply` folds."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.one_of(st.integers(-5, 5).map(Const), st.sampled_from((I, J))))
    inner, length = numbers(depth - 1), st.integers(1, 4).map(Const)
    name = draw(
        st.sampled_from(("add", "mul", "floordiv", "abs", "number", "where", "quotient", "remainder", "of a join"))
    )
    if name in ("add", "mul"):
        left, right = draw(inner), draw(inner)
        return Apply(name, (left, J if isinstance(left, Const) and isinstance(right, Const) else right))
    if name == "floordiv":
        return Apply(name, (draw(inner), Const(draw(st.sampled_from((-3, -1, 1, 2, 5))))))
    if name == "abs":
        return Apply(name, (draw(inner),))
    if name == "number":
        return Apply(name, (draw(truths(depth - 1)),))
    if name == "where":
        return Apply(name, (draw(truths(depth - 1)), draw(inner), draw(inner)))
    merged = draw(inner)
    if name == "of a join":  # join(x, y, n), in which 0 <= y < n
        n, name = draw(length), draw(st.sampled_from(("quotient", "remainder")))
        merged = Apply("join", (merged, Apply("remainder", (draw(inner), n)), n))
    return Apply(name, (merged, draw(length)))


@st.composite
def truths(draw: st.DrawFn, depth: int = 3) -> Expression:
    if depth == 0:
        return Const(draw(st.booleans()))
    name = draw(st.sampled_from(("lt", "le", "eq", "and", "or", "not", "where", "const")))
    if name == "const":
        return Const(draw(st.booleans()))
    inner = numbers(depth - 1) if name in ("lt", "le", "eq") else truths(depth - 1)
    return Apply(name, tuple(draw(inner) for _ in range({"not": 1, "where": 3}.get(name, 2))))


def rebuilt(expression: Expression) -> Expression:
    """The same by `apply`."""
    return substitute(expression, {})


def reference(expression: Expression, index: tuple[int, ...]) -> Any:
    """The value at one place of the grid, in Python."""
    if isinstance(expression, Const):
        return expression.value
    if isinstance(expression, Axis):
        return index[expression.dim]
    assert isinstance(expression, Apply)
    args = [reference(a, index) for a in expression.args]
    return {
        "add": lambda x, y: x + y,
        "mul": lambda x, y: x * y,
        "floordiv": lambda x, y: x // y,
        "quotient": lambda x, y: x // y,
        "remainder": lambda x, y: x % y,
        "join": lambda x, y, n: x * n + y,
        "abs": abs,
        "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y,
        "eq": lambda x, y: x == y,
        "and": lambda x, y: x and y,
        "or": lambda x, y: x or y,
        "not": lambda x: not x,
        "number": int,
        "where": lambda condition, x, y: x if condition else y,
    }[expression.name](*args)


@settings(max_examples=80)
@given(st.one_of(numbers(), truths()))
def test_apply_keeps_values(raw: Expression) -> None:
    built = rebuilt(raw)
    expected = torch.tensor([[reference(raw, (i, j)) for j in range(SIDES[1])] for i in range(SIDES[0])])
    for expression in (raw, built):
        actual = materialize(expression, {}, GRID).expand(SIDES)
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    assert rebuilt(built) == built, "nothing is left to fold"


@settings(max_examples=40)
@given(numbers())
def test_linear_terms_keep_values(expression: Expression) -> None:
    terms = linear_terms(expression)
    if terms is not None:
        assert torch.equal(
            materialize(sum_of(terms), {}, GRID).expand(SIDES), materialize(expression, {}, GRID).expand(SIDES)
        )


@settings(max_examples=40)
@given(st.one_of(numbers(), truths()), st.integers(-3, 3), st.integers(0, 2))
def test_substitute_is_evaluation_elsewhere(expression: Expression, at_i: int, at_j: int) -> None:
    assert reference(substitute(expression, {0: Const(at_i), 1: Const(at_j)}), ()) == reference(
        expression, (at_i, at_j)
    )
