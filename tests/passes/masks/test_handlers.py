"""Each handler by itself: what it says of an element, evaluated over all indices, is what the operator computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriter.passes.masks.evaluate import materialize
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import elements_of
from rewriter.passes.masks.interpret import IndexFunctions
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

Function = Callable[..., Tensor]


def inputs(rows: int = 3, columns: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Integers `[2, rows, columns]`, truth values `[2, 1, columns]` and numbers `[rows, columns]`."""
    random = torch.Generator().manual_seed(rows * columns)
    ids = torch.randint(-6, 7, (2, rows, columns), generator=random)
    keep = torch.rand(2, 1, columns, generator=random) < 0.5
    return ids, keep, torch.randn(rows, columns, generator=random)


def trace(function: Function, *tensors: Tensor, symbolic: bool = False) -> tuple[GraphModule, Node]:
    mode = "symbolic" if symbolic else "fake"
    module = make_fx(function, pre_dispatch=True, tracing_mode=mode)(*tensors)
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    return module, output.args[0]


def interpreted(function: Function, *tensors: Tensor, symbolic: bool = False) -> tuple[GraphModule, Node, Expression]:
    module, node = trace(function, *tensors, symbolic=symbolic)
    return module, node, IndexFunctions().element(node)


def evaluated(module: GraphModule, expression: Expression, tensors: tuple[Tensor, ...], sizes: torch.Size) -> Tensor:
    """The expression over all indices of a tensor of these sizes, at the graph's inputs."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    env: dict[Node, Any] = dict(zip(placeholders, tensors, strict=True))
    symbols = {
        traced.node.expr: size
        for node, tensor in zip(placeholders, tensors, strict=True)
        for traced, size in zip(node.meta["val"].shape, tensor.shape, strict=True)
        if isinstance(traced, torch.SymInt)
    }
    for node in module.graph.nodes:
        if isinstance(value := node.meta.get("val"), torch.SymInt):
            env[node] = int(value.node.expr.subs(symbols))
    axes = {d: torch.arange(size).view(size, *[1] * (len(sizes) - d - 1)) for d, size in enumerate(sizes)}
    return materialize(expression, env, axes).expand(sizes)


def assert_opened(function: Function, *tensors: Tensor) -> Expression:
    """No part of the expression is data but the inputs, and it has the function's values."""
    module, _, expression = interpreted(function, *tensors)
    assert all(element.node.op == "placeholder" for element in elements_of(expression)), expression
    expected = function(*tensors)
    actual = evaluated(module, expression, tensors, expected.shape)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, check_dtype=False)
    return expression


VIEWS: dict[str, Function] = {
    "alias": lambda ids, keep, x: torch.ops.aten.alias.default(ids),
    "clone": lambda ids, keep, x: ids.clone(),
    "contiguous": lambda ids, keep, x: ids.transpose(0, 2).contiguous(),
    "detach": lambda ids, keep, x: ids.detach(),
    "expand": lambda ids, keep, x: keep.expand(2, 3, 4),
    "expand to more dimensions": lambda ids, keep, x: x.expand(2, 5, 3, 4),
    "expand with a dimension kept": lambda ids, keep, x: keep.expand(-1, 3, -1),
    "expand as": lambda ids, keep, x: keep.expand_as(ids),
    "broadcast to": lambda ids, keep, x: torch.broadcast_to(x, (2, 3, 4)),
    "unsqueeze": lambda ids, keep, x: ids.unsqueeze(1),
    "unsqueeze at the end": lambda ids, keep, x: ids.unsqueeze(-1),
    "new axes": lambda ids, keep, x: ids[:, None, :, None],
    "squeeze": lambda ids, keep, x: keep.squeeze(),
    "squeeze one": lambda ids, keep, x: keep.squeeze(1),
    "squeeze nothing": lambda ids, keep, x: ids.squeeze(1),
    "view": lambda ids, keep, x: keep.view(2, 4),
    "reshape with ones": lambda ids, keep, x: ids.reshape(2, 1, 3, 4, 1),
    "merge": lambda ids, keep, x: ids.view(6, 4),
    "merge the last": lambda ids, keep, x: ids.flatten(1),
    "split": lambda ids, keep, x: ids.view(2, 3, 2, 2),
    "unflatten": lambda ids, keep, x: ids.unflatten(-1, (2, 2)),
    "merge and split": lambda ids, keep, x: ids.reshape(6, 2, 2),
    "split what was merged": lambda ids, keep, x: ids.reshape(6, 4).reshape(2, 3, 4),
    "transpose": lambda ids, keep, x: ids.transpose(-1, 1),
    "permute": lambda ids, keep, x: ids.permute(2, 0, -2),
    "t": lambda ids, keep, x: x.t(),
    "slice": lambda ids, keep, x: ids[:, 1:, :3],
    "slice of a sliced": lambda ids, keep, x: ids[..., 1:][..., 1:],
    "slice from the end": lambda ids, keep, x: ids[..., -2:],
    "slice to the end": lambda ids, keep, x: ids[..., :-1],
    "select": lambda ids, keep, x: ids[:, 2],
    "select the last dimension": lambda ids, keep, x: ids[..., 1],
    "select twice": lambda ids, keep, x: ids[1, :, 3],
    "index": lambda ids, keep, x: x[torch.arange(3)[:, None], torch.arange(3)[None, :]],
    "index by data": lambda ids, keep, x: x[ids.abs() // 4, (ids + 6) // 4],
    "index of an index": lambda ids, keep, x: torch.arange(30)[torch.arange(4) * 3 + 1],
}

ARITHMETIC: dict[str, Function] = {
    "add": lambda ids, keep, x: ids + ids[0],
    "add a number": lambda ids, keep, x: ids + 3,
    "add times a factor": lambda ids, keep, x: torch.add(ids, ids[0], alpha=-3),
    "add truth values": lambda ids, keep, x: keep + (x > 0),
    "add a truth value to a number": lambda ids, keep, x: x + keep,
    "sub": lambda ids, keep, x: ids - ids[0],
    "sub times a factor": lambda ids, keep, x: torch.sub(ids, ids[0], alpha=2),
    "sub of floats": lambda ids, keep, x: x - x[0],
    "number minus": lambda ids, keep, x: 1 - ids,
    "one minus a mask": lambda ids, keep, x: 1.0 - keep.float(),
    "rsub": lambda ids, keep, x: torch.rsub(ids, ids[0]),
    "mul": lambda ids, keep, x: ids * ids[0],
    "mul by a number": lambda ids, keep, x: ids * -2,
    "mul truth values": lambda ids, keep, x: keep * (x > 0),
    "mul a truth value with a number": lambda ids, keep, x: keep * x,
    "mul of floats and integers": lambda ids, keep, x: x * ids,
    "floor": lambda ids, keep, x: ids // 4,
    "floor of a negative divisor": lambda ids, keep, x: torch.floor_divide(ids, -4),
    "div with rounding": lambda ids, keep, x: torch.div(ids, 3, rounding_mode="floor"),
    "div of tensors with rounding": lambda ids, keep, x: torch.div(ids, ids[0].abs() + 1, rounding_mode="floor"),
    "neg": lambda ids, keep, x: -ids,
    "neg of floats": lambda ids, keep, x: -x,
    "abs": lambda ids, keep, x: (ids - 1).abs(),
    "diff of a ramp": lambda ids, keep, x: torch.diff(torch.arange(5), prepend=torch.arange(1) - 1),
    "diff of a steep ramp": lambda ids, keep, x: torch.diff(torch.arange(5) * 3 + 1, prepend=torch.arange(1) - 2),
}

COMPARISONS: dict[str, Function] = {
    "lt": lambda ids, keep, x: ids < ids[0],
    "le": lambda ids, keep, x: ids <= 2,
    "gt": lambda ids, keep, x: ids > ids[1],
    "ge": lambda ids, keep, x: x >= 0,
    "eq": lambda ids, keep, x: ids == ids[0],
    "ne": lambda ids, keep, x: ids != 2,
    "integer and float": lambda ids, keep, x: ids < x,
    "a number with a fraction": lambda ids, keep, x: ids < 1.5,
    "truth values": lambda ids, keep, x: keep == (x > 0),
    "truth values in order": lambda ids, keep, x: keep < (x > 0),
    "truth value and number": lambda ids, keep, x: keep == 0,
    "logical and": lambda ids, keep, x: torch.logical_and(keep, x > 0),
    "bitwise and": lambda ids, keep, x: keep & (x > 0),
    "logical or": lambda ids, keep, x: torch.logical_or(keep, x > 0),
    "bitwise or": lambda ids, keep, x: keep | (x > 0),
    "logical not": lambda ids, keep, x: torch.logical_not(keep),
    "bitwise not": lambda ids, keep, x: ~keep,
    "not of a comparison": lambda ids, keep, x: ~(ids < 0),
    "causal": lambda ids, keep, x: torch.arange(5)[None, :] <= torch.arange(5)[:, None],
}

CHOICES: dict[str, Function] = {
    "where": lambda ids, keep, x: torch.where(keep, x, -x),
    "where with a number": lambda ids, keep, x: torch.where(keep, x, -1e9),
    "where with a number first": lambda ids, keep, x: torch.where(keep, -1e9, x),
    "where of numbers": lambda ids, keep, x: torch.where(keep, 0.0, -torch.inf),
    "where of truth values": lambda ids, keep, x: torch.where(keep, ids[0] > 0, x > 0),
    "where promotes": lambda ids, keep, x: torch.where(keep, x, ids),
    "masked_fill": lambda ids, keep, x: x.masked_fill(ids > 0, -1e9),
    "masked_fill by a tensor": lambda ids, keep, x: x.masked_fill(ids > 0, torch.full((), -2.0)),
    "masked_fill of truth values": lambda ids, keep, x: (x > 0).masked_fill(ids > 0, True),
    "masked_fill of truth values by a number": lambda ids, keep, x: (x > 0).masked_fill(ids > 0, 0),
    "tril": lambda ids, keep, x: ids.tril(),
    "tril above": lambda ids, keep, x: ids.tril(1),
    "tril below": lambda ids, keep, x: torch.tril(x, diagonal=-1),
    "tril of truth values": lambda ids, keep, x: keep.expand(2, 3, 4).tril(),
    "triu": lambda ids, keep, x: ids.triu(),
    "triu above": lambda ids, keep, x: ids.triu(2),
    "triu of truth values": lambda ids, keep, x: torch.ones(4, 5, dtype=torch.bool).triu(1),
    "triu of -inf": lambda ids, keep, x: torch.full((4, 5), -torch.inf).triu(1),
}

MADE: dict[str, Function] = {
    "arange": lambda ids, keep, x: torch.arange(5),
    "arange from": lambda ids, keep, x: torch.arange(2, 6),
    "arange by": lambda ids, keep, x: torch.arange(1, 12, 3),
    "arange down": lambda ids, keep, x: torch.arange(4, -1, -1),
    "full": lambda ids, keep, x: torch.full((2, 3), -5),
    "full of a float": lambda ids, keep, x: torch.full((2, 3), 0.25),
    "full of a truth value": lambda ids, keep, x: torch.full((2, 3), True),
    "full of no dimensions": lambda ids, keep, x: torch.full((), 7),
    "full_like": lambda ids, keep, x: torch.full_like(ids, 3),
    "new_full": lambda ids, keep, x: x.new_full((2, 2), -torch.inf),
    "scalar_tensor": lambda ids, keep, x: torch.scalar_tensor(3.5),
    "ones": lambda ids, keep, x: torch.ones(2, 3),
    "ones of truth values": lambda ids, keep, x: torch.ones(2, 3, dtype=torch.bool),
    "ones_like": lambda ids, keep, x: torch.ones_like(keep),
    "new_ones": lambda ids, keep, x: ids.new_ones(3),
    "zeros": lambda ids, keep, x: torch.zeros(2, 3),
    "zeros of truth values": lambda ids, keep, x: torch.zeros(2, 3, dtype=torch.bool),
    "zeros_like": lambda ids, keep, x: torch.zeros_like(x),
    "new_zeros": lambda ids, keep, x: keep.new_zeros(4),
}

CASTS: dict[str, Function] = {
    "to float": lambda ids, keep, x: ids.float(),
    "to double": lambda ids, keep, x: x.double(),
    "to the same": lambda ids, keep, x: x.to(torch.float32),
    "to half": lambda ids, keep, x: x.half(),
    "to bfloat16": lambda ids, keep, x: x.to(torch.bfloat16),
    "through bfloat16": lambda ids, keep, x: x.bfloat16().float() + 1.0,
    "data to half": lambda ids, keep, x: ids.half(),
    "to int32": lambda ids, keep, x: ids.to(torch.int32),
    "truth to number": lambda ids, keep, x: keep.long(),
    "truth to float": lambda ids, keep, x: keep.to(x.dtype),
    "truth to a narrow number": lambda ids, keep, x: keep.to(torch.int8),
    "number to truth": lambda ids, keep, x: ids.bool(),
    "float to truth": lambda ids, keep, x: (x.tril() != 0).float().bool(),
    "type_as": lambda ids, keep, x: keep.type_as(x),
    "index to float": lambda ids, keep, x: torch.arange(5).float(),
    "index in half": lambda ids, keep, x: torch.arange(5).float() * x[0, 0].half(),
    "sum in half": lambda ids, keep, x: x.half() + x.bfloat16(),
}

OPENED = {
    f"{group}: {name}": function
    for group, members in {
        "views": VIEWS,
        "arithmetic": ARITHMETIC,
        "comparisons": COMPARISONS,
        "choices": CHOICES,
        "made": MADE,
        "casts": CASTS,
    }.items()
    for name, function in members.items()
}


@pytest.mark.parametrize("name", OPENED)
def test_an_element_is_what_the_operator_computes(name: str) -> None:
    assert_opened(OPENED[name], *inputs())


DATA: dict[str, Function] = {
    "arange of floats": lambda ids, keep, x: torch.arange(0.0, 5.0),
    "slice by two": lambda ids, keep, x: ids[..., ::2],
    "select from the end": lambda ids, keep, x: ids[:, -1],
    "reshape across": lambda ids, keep, x: ids.reshape(2, 4, 3),
    "three merged": lambda ids, keep, x: ids.flatten(),
    "float to integer": lambda ids, keep, x: x.long(),
    "index to int8": lambda ids, keep, x: torch.arange(5).to(torch.int8),
    "index to bfloat16": lambda ids, keep, x: torch.arange(5).to(torch.bfloat16),
    "data to uint8": lambda ids, keep, x: ids.to(torch.uint8),
    "bits": lambda ids, keep, x: ids & 3,
    "bits flipped": lambda ids, keep, x: ~ids,
    "logical and of numbers": lambda ids, keep, x: torch.logical_and(ids, keep),
    "logical not of numbers": lambda ids, keep, x: torch.logical_not(ids),
    "division": lambda ids, keep, x: ids / 2,
    "truncated division": lambda ids, keep, x: torch.div(ids, 2, rounding_mode="trunc"),
    "floats added times a factor": lambda ids, keep, x: torch.add(x, x, alpha=3),
    "index of one dimension of two": lambda ids, keep, x: x[torch.arange(2)],
    "diff of data": lambda ids, keep, x: torch.diff(ids, prepend=ids[..., :1]),
    "diff without a first": lambda ids, keep, x: torch.diff(torch.arange(5)),
    "diff of a ramp with a jump": lambda ids, keep, x: torch.diff(torch.arange(5), prepend=torch.arange(1) + 7),
    "diff of second order": lambda ids, keep, x: torch.diff(torch.arange(5), n=2, prepend=torch.arange(1)),
    "cumsum": lambda ids, keep, x: (ids == 3).cumsum(-1),
    "no handler": lambda ids, keep, x: x.sin(),
    "sum": lambda ids, keep, x: ids.sum(-1),
}


@pytest.mark.parametrize("name", DATA)
def test_the_rest_is_data(name: str) -> None:
    """An element of the operator's own result, of which nothing is claimed."""
    _, node, expression = interpreted(DATA[name], *inputs())
    assert expression == Element(node, tuple(Axis(d) for d in range(node.meta["val"].dim())))


def test_what_is_modified_is_data() -> None:
    _, node = trace(lambda ids: ids + 1, inputs()[0])
    assert isinstance(IndexFunctions().element(node), Apply)
    assert IndexFunctions(frozenset({node})).element(node) == Element(node, (Axis(0), Axis(1), Axis(2)))


def test_data_of_size_1_is_read_at_0() -> None:
    _, _, expression = interpreted(lambda ids, keep, x: keep & (x > 0), *inputs())
    (element,) = (e for e in elements_of(expression) if e.node.name.startswith("keep"))
    assert element.indices == (Axis(0), Const(0), Axis(2))


def test_cumsum_of_nothing_is_nothing() -> None:
    assert_opened(lambda ids, keep, x: torch.zeros(2, 4, dtype=torch.bool).cumsum(-1), *inputs())


def test_the_same_sum_written_twice_is_one() -> None:
    def twice(ids: Tensor) -> Tensor:
        return (ids == 3).cumsum(-1)[:, :, None] == (ids == 3).cumsum(-1)[:, None, :]

    _, _, expression = interpreted(twice, inputs()[0][0])
    assert len({element.node for element in elements_of(expression)}) == 1


def test_representative_tells_different_sums_apart() -> None:
    def different(ids: Tensor) -> Tensor:
        return (ids == 3).cumsum(-1)[:, :, None] == (ids == 4).cumsum(-1)[:, None, :]

    _, _, expression = interpreted(different, inputs()[0][0])
    assert len({element.node for element in elements_of(expression)}) == 2


SYMBOLIC: dict[str, Function] = {
    "causal": lambda ids, keep, x: torch.ones(x.shape, dtype=torch.bool).tril(x.size(1) - x.size(0)),
    "aligned at the end": lambda ids, keep, x: (
        torch.arange(x.size(1)) <= (torch.arange(x.size(0)) + x.size(1) - x.size(0))[:, None]
    ),
    "slice at a size": lambda ids, keep, x: torch.arange(2 * x.size(1))[x.size(0) :],
    "arange from a size": lambda ids, keep, x: torch.arange(x.size(0), x.size(0) + x.size(1)),
    "full of a size": lambda ids, keep, x: torch.full(x.shape, x.size(0)),
    "broadcast": lambda ids, keep, x: keep & (x > 0),
    "split": lambda ids, keep, x: torch.arange(2 * x.size(1)).view(x.size(1), 2),
    "expand": lambda ids, keep, x: keep[:, None].expand(-1, 1, x.size(0), -1),
    "select at a size": lambda ids, keep, x: ids.select(2, x.size(0)),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes_hold_for_other_sizes(name: str) -> None:
    module, _, expression = interpreted(SYMBOLIC[name], *inputs(5, 7), symbolic=True)
    for rows, columns in ((5, 7), (3, 4), (4, 10)):
        tensors = inputs(rows, columns)
        expected = SYMBOLIC[name](*tensors)
        actual = evaluated(module, expression, tensors, expected.shape)
        torch.testing.assert_close(actual, expected, check_dtype=False)


UNUSUAL: dict[str, Function] = {
    "slice from before the first": lambda ids, keep, x: torch.arange(5)[-8:],
    "index from the end": lambda ids, keep, x: torch.arange(5)[torch.arange(5) - 2],
    "rsub times a factor": lambda ids, keep, x: torch.rsub(ids, 2, alpha=3),
    "sub of a number times a factor": lambda ids, keep, x: torch.ops.aten.sub.Scalar(ids, 2, 3),
    "add of a number times a factor": lambda ids, keep, x: torch.ops.aten.add.Scalar(ids, 2, 3),
    "full of a fraction as an integer": lambda ids, keep, x: torch.full((3,), 2.75, dtype=torch.int64),
    "scalar_tensor of a fraction as an integer": lambda ids, keep, x: torch.scalar_tensor(2.75, dtype=torch.int64),
    "full_like of a fraction as an integer": lambda ids, keep, x: torch.full_like(ids, 2.75),
    "full of a number as a truth value": lambda ids, keep, x: torch.full((2, 1, 4), 5, dtype=torch.bool) == keep,
    "arange from a fraction": lambda ids, keep, x: torch.arange(0.5, 4, dtype=torch.int64),
    "one less than 0 in uint8": lambda ids, keep, x: keep.to(torch.uint8) - 1,
    "a product in int8": lambda ids, keep, x: keep.to(torch.int8) * 100 * 2,
    "neg of uint8": lambda ids, keep, x: -keep.to(torch.uint8),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_element_is_what_the_operator_computes_or_data(name: str) -> None:
    """Data is right, too, where an operator is used in an unusual way."""
    tensors = inputs()
    module, node, expression = interpreted(UNUSUAL[name], *tensors)
    if any(element.node is node for element in elements_of(expression)):
        return
    expected = UNUSUAL[name](*tensors)
    actual = evaluated(module, expression, tensors, expected.shape)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, check_dtype=False)
