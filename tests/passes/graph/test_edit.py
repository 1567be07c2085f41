"""New nodes at an insertion point: traced and copied, or calls of a submodule."""

from __future__ import annotations

from textwrap import dedent

import pytest
import torch
from rewriter.passes.graph.edit import call
from rewriter.passes.graph.edit import emit
from rewriter.passes.graph.edit import inherited
from rewriter.passes.pipeline import graph_text
from torch import Tensor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter.errors import PolicyError


def traced() -> tuple[GraphModule, Node, Node]:
    """`x + y` over `[2, 3]`: the graph, its sum and its output."""
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(torch.zeros(2, 3)) for _ in range(2)]
        module = make_fx(lambda x, y: x + y, pre_dispatch=True)(*inputs)
    *_, total, output = module.graph.nodes
    return module, total, output


def finished(module: GraphModule, output: Node, *results: Node) -> GraphModule:
    output.args = (results,)
    module.graph.lint()
    module.recompile()
    return module


def text(module: GraphModule) -> str:
    return "\n" + graph_text(module.graph) + "\n"


def both_ways(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    unused = x.exp()
    del unused
    return x * 2, (y - x).sum(-1)


def test_emit() -> None:
    """What the function traces to, without what is dead, where the graph is written to."""
    module, total, output = traced()
    first = next(iter(module.graph.nodes))
    with module.graph.inserting_before(output):
        doubled, sums = emit(module.graph, both_ways, [first, total])
    finished(module, output, doubled, sums)
    assert text(module) == dedent("""
        input x_1:   # float32 [2, 3]
        input y_1:   # float32 [2, 3]
        add = aten.add.Tensor(x_1, y_1)  # float32 [2, 3]
        mul = aten.mul.Tensor(x_1, 2)  # float32 [2, 3]
        sub = aten.sub.Tensor(add, x_1)  # float32 [2, 3]
        sum_1 = aten.sum.dim_IntList(sub, [-1])  # float32 [2]
        output ((mul, sum_1),)
    """)
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    actual = module(x, y)
    for ours, theirs in zip(actual, both_ways(x, x + y), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_emit_in_the_middle_of_a_graph() -> None:
    module, total, output = traced()
    x = next(iter(module.graph.nodes))
    with module.graph.inserting_before(total):
        (negated,) = emit(module.graph, lambda x: (-x,), [x])
    total.args = (negated, total.args[1])
    finished(module, output, total)
    assert [node.name for node in module.graph.nodes] == ["x_1", "y_1", "neg", "add", "output"]
    assert torch.equal(module(torch.ones(2, 3), torch.zeros(2, 3))[0], -torch.ones(2, 3))


def test_emit_may_return_what_it_is_given() -> None:
    module, total, output = traced()
    with module.graph.inserting_before(output):
        assert emit(module.graph, lambda x: (x, x), [total]) == (total, total)


def test_emit_twice_gives_nodes_of_their_own() -> None:
    module, total, output = traced()
    with module.graph.inserting_before(output):
        (one,), (two,) = (emit(module.graph, lambda x: (x.exp(),), [total]) for _ in range(2))
    assert one is not two and one.name != two.name


def test_emit_makes_fake_values_of_the_graph_s_own_mode() -> None:
    module, total, output = traced()
    with module.graph.inserting_before(output):
        (row,) = emit(module.graph, lambda x: (torch.arange(x.size(1)),), [total])
    value = row.meta["val"]
    assert value.shape == (3,) and value.dtype == torch.int64
    assert value.fake_mode is total.meta["val"].fake_mode


def test_emit_marks_its_nodes_and_no_others() -> None:
    module, total, output = traced()
    with module.graph.inserting_before(output):
        emit(module.graph, both_ways, [total, total], meta={"recompute": 3})
    marked = {node.name for node in module.graph.nodes if node.meta.get("recompute") == 3}
    assert marked == {"mul", "sub", "sum_1"}


def test_emit_of_a_tensor_from_python_values_is_an_error() -> None:
    """A constant of the traced function would be an attribute that the graph's module has not."""
    module, total, output = traced()
    before = text(module)
    with module.graph.inserting_before(output), pytest.raises(PolicyError, match="makes a tensor from Python values"):
        emit(module.graph, lambda x: (x + torch.tensor([1.0, 2.0, 3.0]),), [total])
    assert text(module) == before


class _Halves(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x if bias is None else x + bias
        return x[:, : self.width], x[:, self.width :]


class Total(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1)


def test_call() -> None:
    """A submodule for each call, named after its class and counted; None is an argument left out."""
    module, total, output = traced()
    x = next(iter(module.graph.nodes))
    with module.graph.inserting_before(output):
        left, right = call(module.graph, _Halves(1), [total, None], 2)
        (again, _) = call(module.graph, _Halves(2), [total, x], 2)
        (row,) = call(module.graph, Total(), [right])
    finished(module, output, left, again, row)
    assert text(module) == dedent("""
        input x_1:   # float32 [2, 3]
        input y_1:   # float32 [2, 3]
        add = aten.add.Tensor(x_1, y_1)  # float32 [2, 3]
        halves_0 = halves_0(add, None)
        getitem = getitem(halves_0, 0)
        getitem_1 = getitem(halves_0, 1)
        halves_1 = halves_1(add, x_1)
        getitem_2 = getitem(halves_1, 0)
        getitem_3 = getitem(halves_1, 1)
        total_0 = total_0(getitem_1)
        output ((getitem, getitem_2, total_0),)
    """)
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    left, again, row = module(x, y)
    assert torch.equal(left, (x + y)[:, :1]) and torch.equal(row, (x + y)[:, 1:].sum(-1))
    assert torch.equal(again, (x + y + x)[:, :2])


def test_call_leaves_names_that_are_taken() -> None:
    module, total, output = traced()
    module.total_0 = Total()
    with module.graph.inserting_before(output):
        (node,) = call(module.graph, Total(), [total], meta={"stack_trace": "here"})
    assert node.target == "total_1" and node.meta["stack_trace"] == "here"
    finished(module, output, node)
    assert module(torch.ones(2, 3), torch.ones(2, 3))[0].tolist() == [6.0, 6.0]


def test_what_a_replacement_takes_over() -> None:
    _, total, _ = traced()
    total.meta = {"val": total.meta["val"], "stack_trace": "File", "recompute": 1, "tensor_meta": ()}
    assert inherited(total) == {"stack_trace": "File", "recompute": 1}
