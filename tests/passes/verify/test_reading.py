"""The second reading of a graph: at numbers, a formula's value is what PyTorch computes, for each operator that it knows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriter.passes.verify.reading import INFINITE
from rewriter.passes.verify.reading import LARGEST_DATA
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

z3 = pytest.importorskip("z3")

from rewriter.passes.verify.operators import Reading  # noqa: E402

INTEGERS = torch.tensor([[3, -1, 4, 1], [-5, 9, 2, -6], [0, 7, -2, 3]])
TRUTHS = torch.tensor([[True, False, True, True], [False, False, True, False], [True, True, False, True]])
FLOATS = INTEGERS * 0.5

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": lambda x: torch.arange(2, 9, 3) + x[0, 0],
    "arange of floats": lambda x: torch.arange(4, dtype=torch.float32) + x,
    "full": lambda x: torch.full((2, 3), 7) + x[0, 1],
    "ones and zeros": lambda x: torch.ones_like(x) - torch.zeros(3, 4) + x,
    "infinity": lambda x: torch.where(x > 0, 0.0, float("-inf")),
    "expand": lambda x: x[:, None, :1].expand(3, 2, 4),
    "view that merges": lambda x: x.reshape(12),
    "view that splits": lambda x: x.view(3, 2, 2),
    "view that merges and splits": lambda x: x.reshape(2, 6),
    "flatten": lambda x: x[None].flatten(1),
    "squeeze": lambda x: x[:, None, :].squeeze(1),
    "transpose": lambda x: x.transpose(0, 1) + x[:, :3].t().sum() * 0,
    "permute": lambda x: x.view(3, 2, 2).permute(2, 0, 1),
    "t": lambda x: x.t(),
    "slice": lambda x: x[1:, ::2],
    "slice from the end": lambda x: x[:, -3:],
    "slice from before the beginning": lambda x: x[:, -9:2],
    "select": lambda x: x[1],
    "select from the end": lambda x: x[:, -2],
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, -1),
    "index": lambda x: x[torch.tensor([2, -1, 0]), torch.tensor([1, 1, -4])],
    "index of one dimension": lambda x: x[:, torch.tensor([[3, 0], [1, -1]])],
    "gather": lambda x: x.gather(1, x.abs() % 4),
    "cat": lambda x: torch.cat((x, x[:1] * 2, x + 1)),
    "pad": lambda x: torch.nn.functional.pad(x, (1, 2, 0, 1), value=9),
    "add with alpha": lambda x: torch.add(x, x.flip(0), alpha=3),
    "rsub": lambda x: 5 - x,
    "sub with alpha": lambda x: torch.sub(x, 2, alpha=-2),
    "mul": lambda x: x * x.flip(1),
    "floor division": lambda x: x // 3,
    "floor division by a negative number": lambda x: x // -3,
    "floor division by data": lambda x: 7 // torch.where(x == 0, 2, x),
    "division with floor": lambda x: torch.div(x, -4, rounding_mode="floor"),
    "division with truncation": lambda x: torch.div(x, 4, rounding_mode="trunc"),
    "remainder": lambda x: x % 3,
    "remainder by a negative number": lambda x: x % -3,
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "minimum": lambda x: torch.minimum(x, torch.tensor(2)),
    "clamp": lambda x: x.clamp(-2, 3),
    "logarithm of 0 and 1": lambda x: (x > 0).double().log(),
    "neg and abs": lambda x: -x.abs(),
    "comparisons": lambda x: (x < 2) | (x >= 4) & (x != 9) | (x == -5) | (x.flip(1) <= x) | (x > 8),
    "comparisons of truth values": lambda x: (x > 0) == (x.flip(1) > 0),
    "not": lambda x: ~(x > 1),
    "not of integers": lambda x: ~x,
    "logical operators of integers": lambda x: torch.logical_xor(x, x.flip(1)) | torch.logical_not(x),
    "xor": lambda x: (x > 0) ^ (x > 2),
    "sum of truth values": lambda x: (x > 0) + (x < -4),
    "product of truth values": lambda x: (x > 0) * (x < 4),
    "truth values as numbers": lambda x: (x > 0) * 5 + (x > 1).float() - 1,
    "where": lambda x: torch.where(x > 0, x, -1),
    "masked fill": lambda x: x.masked_fill(x > 2, -7),
    "tril": lambda x: x.tril(1),
    "triu": lambda x: (x > -9).triu(),
    "diff": lambda x: x.diff(dim=1),
    "diff with one before": lambda x: x.diff(dim=1, prepend=x[:, :1] * 0 - 1),
    "cumsum of ones": lambda x: torch.ones_like(x).cumsum(1) + x,
    "to bool": lambda x: x.bool(),
    "to float and back": lambda x: (x.float() * 0.5).long(),
    "int8 that wraps": lambda x: (x * 50).to(torch.int8) * 3,
    "int16 that wraps": lambda x: (x * 9000).to(torch.int16) - 1,
    "uint8 that wraps": lambda x: x.to(torch.uint8) + 250,
    "atleast_1d": lambda x: torch.atleast_1d(x),
    "contiguous": lambda x: x.t().contiguous().clone(),
}


def formulas(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[list[Any], Tensor, Reading]:
    """What the reading says of each element, and PyTorch's value."""
    graph = make_fx(function, tracing_mode="fake", pre_dispatch=True)(x)
    constants = {n: getattr(graph, n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    for node in constants:
        node.meta["val"] = constants[node]
    node = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    reading = Reading({}, constants)
    expected = function(x)
    places = itertools.product(*map(range, expected.shape))
    read = [reading.element(node, [z3.IntVal(i) for i in place]) for place in places]
    for data, at in reading.data.items():
        if data.op == "placeholder":
            for place in itertools.product(*map(range, x.shape)):
                reading.facts.append(at(*map(z3.IntVal, place)) == as_term(x[place].item()))
    return read, expected, reading


def as_term(value: Any) -> Any:
    if isinstance(value, float) and abs(value) == float("inf"):
        return z3.RealVal(INFINITE if value > 0 else -INFINITE)
    return (
        z3.BoolVal(value)
        if isinstance(value, bool)
        else z3.IntVal(value)
        if isinstance(value, int)
        else z3.Q(*value.as_integer_ratio())
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_what_it_is_in_torch(name: str) -> None:
    read, expected, reading = formulas(OPERATORS[name], INTEGERS)
    assert not [text for text in reading.opaque if "sum.default" not in text]
    solver = z3.Solver()
    solver.add(*reading.facts)
    assert solver.check() == z3.sat, "the facts contradict each other"
    solver.add(z3.Or(*(r != as_term(e) for r, e in zip(read, expected.flatten().tolist(), strict=True))))
    assert solver.check() == z3.unsat, solver.model()


@pytest.mark.parametrize("shift", [0, 1])
def test_sums_of_truth_values_never_fall(shift: int) -> None:
    """What is known of a sum at two places: it follows from the sum, and something does not."""
    read, _, reading = formulas(lambda x: (x > 0).cumsum(1), INTEGERS)
    solver = z3.Solver()
    solver.add(*reading.facts)
    first, second = read[0], read[2]
    solver.add(z3.Or(second < first, second - first > 2 - shift))
    assert solver.check() == (z3.sat if shift else z3.unsat)


def test_the_facts_of_a_sorted_row_hold_in_torch() -> None:
    row = TRUTHS.cumsum(1)
    read, expected, reading = formulas(
        lambda x: torch.searchsorted((x > 0).cumsum(1), (x > 0).cumsum(1)), torch.where(TRUTHS, 1, 0)
    )
    solver = z3.Solver()
    solver.add(*reading.facts)
    solver.add(*(r == e for r, e in zip(read, torch.searchsorted(row, row).flatten().tolist(), strict=True)))
    assert torch.equal(expected, torch.searchsorted(row, row)) and solver.check() == z3.sat


def test_positions_of_a_document_count_up() -> None:
    """Where no break is counted between two places, their positions differ as the places do."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    read, _, reading = formulas(lambda p: (p.diff(dim=-1, prepend=p[:, :1] - 1) != 1).cumsum(-1), positions)
    solver = z3.Solver()
    solver.add(*reading.facts)
    assert solver.check() == z3.sat
    solver.add(read[3] == read[5])  # places 3 and 5 are of two documents
    assert solver.check() == z3.unsat


def test_what_is_not_known_is_said() -> None:
    read, _, reading = formulas(lambda x: x.sin(), FLOATS)
    assert list(reading.opaque) == ["aten.sin.default"]
    solver = z3.Solver()
    solver.add(*reading.facts, read[0] == LARGEST_DATA - 1)
    assert solver.check() == z3.sat  # any value at all


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x[x > 0], "truth values"),
        (lambda x: (x * 0.5) // 2, "fractions"),
        (lambda x: (x > 0).float() * float("-inf"), "a product with infinity"),
        (lambda x: x & 3, "bits of integers"),
    ],
)
def test_a_use_that_is_not_known_is_said(function: Callable[[Tensor], Tensor], reason: str) -> None:
    graph = make_fx(function, tracing_mode="real", pre_dispatch=True)(INTEGERS)
    node = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    reading = Reading({}, {})
    reading.element(node, [z3.IntVal(0)] * node.meta["val"].dim())
    assert reason in " ".join(reading.opaque)


@pytest.mark.parametrize(
    ("matrix", "known"),
    [
        (torch.ones(5, 5, dtype=torch.bool).tril(), True),
        (torch.ones(5, 5).triu(-2).tril(1), True),
        (torch.full((4, 4), float("-inf")).triu(1), True),
        (torch.tensor([[True, False, False], [True, True, False], [False, True, True]]).repeat(9, 3), False),
    ],
)
def test_a_buffer_is_a_band_or_unknown(matrix: Tensor, known: bool) -> None:
    """All of its elements are looked at; what a band is beyond the matrix follows from its borders."""
    graph = make_fx(lambda x: x * 1, tracing_mode="real")(matrix)
    source = next(n for n in graph.graph.nodes if n.op == "placeholder")
    reading = Reading({}, {source: matrix})
    differ = [
        z3.simplify(reading.element(source, (z3.IntVal(i), z3.IntVal(j))) != as_term(matrix[i, j].item()))
        for i, j in itertools.product(*map(range, matrix.shape))
    ]
    assert all(z3.is_false(d) for d in differ) is known
    assert bool(reading.opaque) is not known


def test_nodes_of_one_name_in_two_graphs_are_two_functions() -> None:
    """z3 takes functions of one name for one: what is not known of the one must not be what is not known of the other."""
    nodes = []
    for function in (lambda x: x.sin(), lambda x: x.cos()):
        graph = make_fx(function, tracing_mode="real")(FLOATS)
        node = next(n for n in graph.graph.nodes if n.op == "output").args[0]
        node.name = "same"
        nodes.append(node)
    reading = Reading({}, {})
    one, other = (reading.element(node, (z3.IntVal(0), z3.IntVal(1))) for node in nodes)
    solver = z3.Solver()
    solver.add(*reading.facts, one != other)
    assert solver.check() == z3.sat


def test_what_is_computed_twice_is_one_and_what_is_drawn_twice_is_not() -> None:
    graph = make_fx(lambda x: (x.sin(), x.sin(), torch.rand(3), torch.rand(3)), tracing_mode="real")(FLOATS)
    nodes = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    reading = Reading({}, {})
    assert [reading.first(node) for node in nodes] == [nodes[0], nodes[0], nodes[2], nodes[3]]
