"""Whether one graph, for given sizes, is what another one is for any: found where it is so, and never where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from rewriter.passes.graph.special_case import as_special_case
from rewriter.passes.graph.special_case import can_be_compared
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def traced(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """As Dynamo would: sizes from two on are symbols and inputs of the graph, sizes of one are numbers."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(x, static_shapes=False) for x in inputs]
    sizes = {s.node.expr: s for x in fakes for s in x.shape if isinstance(s, torch.SymInt)}
    with mode:
        return make_fx(lambda _, *xs: function(*xs), tracing_mode="real")(list(sizes.values()), *fakes)


def rows(function: Callable[..., Any], *shape: int) -> tuple[GraphModule, GraphModule]:
    """The graphs of one row and of three, each of this shape."""
    return traced(function, torch.randn(1, *shape)), traced(function, torch.randn(3, *shape))


def by_numbers(x: Tensor) -> Tensor:
    batch, length, width = x.shape
    return (x.view(batch, length, 2, width // 2).transpose(1, 2) / length).reshape(batch, -1)


def by_indices(x: Tensor) -> Tensor:
    batch = torch.arange(x.size(0))[:, None]
    return x[batch, torch.arange(x.size(1))[None]] * 2


COMPUTES_THE_SAME = {
    "sizes as numbers": by_numbers,
    "indices of rows": by_indices,
    "whole slices": lambda x: x[:, :] + torch.ones(x.size(1), 1),
    "several results": lambda x: torch.cat(x.split([1, x.size(-1) - 1], dim=-1)[::-1], dim=-1),
}


@pytest.mark.parametrize("function", COMPUTES_THE_SAME.values(), ids=COMPUTES_THE_SAME)
def test_one_row_is_a_case_of_several(function: Callable[[Tensor], Tensor]) -> None:
    special, general = rows(function, 5, 4)
    case = as_special_case(special.graph, general.graph)
    assert case is not None and 1 in case.sizes.values()
    x = torch.randn(1, 7, 4)
    given_inputs = [7, 4, x]  # the sizes of the special graph's inputs, as it was traced, and what it is called with
    torch.testing.assert_close(general(case.arguments(given_inputs)[:-1], x), function(x))
    assert as_special_case(general.graph, general.graph) is None  # of no special size
    assert as_special_case(general.graph, special.graph) is None


COMPUTES_SOMETHING_ELSE = {
    "squeeze": lambda x: x.squeeze(0),
    "a branch": lambda x: x * 2 if x.size(0) == 1 else x * 3,
    "a shape": lambda x: x.mean(0) if x.size(0) > 1 else x[0],
    "another order": lambda x: x.exp().sin() if x.size(0) > 1 else x.sin().exp(),
    "another number": lambda x: x + (1 if x.size(0) > 1 else 1.5),
    "a type": lambda x: x + (1 if x.size(0) > 1 else 1.0),
}


@pytest.mark.parametrize("function", COMPUTES_SOMETHING_ELSE.values(), ids=COMPUTES_SOMETHING_ELSE)
def test_what_treats_one_row_unlike_others_is_no_case(function: Callable[[Tensor], Tensor]) -> None:
    special, general = rows(function, 5, 4)
    assert as_special_case(special.graph, general.graph) is None


CANNOT_BE_SAID = {
    "random": lambda x: x + torch.rand_like(x),
    "writes": lambda x: x.clone().add_(1),
    "a constant": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
}


@pytest.mark.parametrize("function", CANNOT_BE_SAID.values(), ids=CANNOT_BE_SAID)
def test_what_its_name_and_arguments_do_not_tell_is_no_case(function: Callable[[Tensor], Tensor]) -> None:
    special, general = rows(function, 5, 4)
    assert as_special_case(special.graph, general.graph) is None


PLAIN: list[Callable[[Tensor], Tensor]] = [
    torch.sin,
    lambda x: x + 1,
    lambda x: x * x.size(1),
    lambda x: x[torch.arange(x.size(0))],
    lambda x: x.flatten(0, 1).unflatten(0, x.shape[:2]),
]
OTHERS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.sum(0, keepdim=True) + x,
    lambda x: x - x.squeeze(),
    lambda x: x.expand(3, *x.shape[1:]) if x.size(0) == 1 else x,
]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(PLAIN + OTHERS), min_size=1, max_size=5))
def test_a_case_gives_what_the_function_gives(steps: list[Callable[[Tensor], Tensor]]) -> None:
    def function(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    special, general = rows(function, 4, 2)
    case = as_special_case(special.graph, general.graph)
    x = torch.randn(1, 7, 2)
    assert case is not None or any(step in OTHERS for step in steps)
    if case is not None:
        torch.testing.assert_close(general(case.arguments([7, 2, x])[:-1], x), function(x))


def test_what_is_only_asserted_or_read_from_a_tensor_is_not_compared() -> None:
    def asserts(x: Tensor) -> Tensor:
        torch.ops.aten._assert_async.msg((x > 0).all(), "padding")
        return x * 2

    mode = FakeTensorMode(shape_env=ShapeEnv())
    mode.allow_scalar_outputs = True
    for function, expected in ((lambda x: x * 2, True), (asserts, False), (lambda x: x * x.sum().item(), False)):
        x = mode.from_tensor(torch.randn(3, 5), static_shapes=False)
        with mode:
            assert can_be_compared(make_fx(function)(x).graph) == expected
