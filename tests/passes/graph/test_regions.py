"""Layers that are alike become calls of one subgraph: which are, that nothing else changes, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriter.passes.graph.regions import share_layers
from rewritten import calls
from rewritten import rewritten
from torch import Tensor
from torch import nn
from torch.fx import GraphModule

from rewriter import Exact

aten = torch.ops.aten


def test_too_few_layers_are_left_as_they_are(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = rewritten(tiny_model("llama", "sdpa", layers=3), Exact(), monkeypatch)
    nodes = [node.name for node in module.graph.nodes if node.op == "call_function"]
    assert share_layers(module) == 0 and calls(module) == []
    assert {node.name for node in module.graph.nodes if node.op == "call_function"} <= set(nodes)


class Scaled(nn.Module):
    """A layer with an attention and a number of its own."""

    def __init__(self, number: Any) -> None:
        super().__init__()
        self.number, self.project = number, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x).unsqueeze(1)
        return x + self.number * nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True).squeeze(1)


class Deep(nn.Module):
    def __init__(self, numbers: list[Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled(number) for number in numbers)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = nn.functional.one_hot(input_ids % 8, 8).float()
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
def test_layers_with_other_numbers_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = rewritten(Deep([2, 2, 3, 2, 3, 2.0, 2, 3, 3]), Exact(), monkeypatch)
    (before,) = module(*inputs)
    assert share_layers(module) == 8  # four times 2, four times 3, and once 2.0
    torch.testing.assert_close(module(*inputs)[0], before, rtol=0, atol=0)


class Idle(nn.Module):
    """Layers that hand on what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Flatten(0, 0) for _ in range(5))
        self.attend = Scaled(1)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = nn.functional.one_hot(input_ids % 8, 8).float()
        for layer in self.layers:
            x = layer(x)
        return self.attend(x)


@torch.no_grad()
def test_layers_that_may_return_what_they_are_given_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = rewritten(Idle(), Exact(), monkeypatch)
    assert share_layers(module) == 0


class Interleaved(nn.Module):
    """Two lists of modules that run in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Scaled(1) for _ in range(6))
        self.feeds = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = nn.functional.one_hot(input_ids % 8, 8).float()
        for attention, feed in zip(self.attentions, self.feeds, strict=True):
            x = attention(x)
            x = x + feed(x)
        return x


@torch.no_grad()
def test_lists_that_run_in_turns_are_cut_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    module, inputs = rewritten(Interleaved(), Exact(), monkeypatch)
    (before,) = module(*inputs)
    shared = share_layers(module)
    assert shared == len(calls(module)) and 5 <= shared <= 6
    assert not [w for w in recwarn.list if "erase_node" in str(w.message)]
    torch.testing.assert_close(module(*inputs)[0], before, rtol=0, atol=0)


class Store(nn.Module):
    """Adds to a cache in place, and returns it."""

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        return cache.add_(x)


def writing_layers(count: int) -> GraphModule:
    """Layers with a cache in common, which each reads, writes to and reads again, with work before and after that."""
    graph = torch.fx.Graph()
    x, cache, *weights = (graph.placeholder(name) for name in ("x", "cache", *(f"weight_{n}" for n in range(count))))
    module = nn.Module()
    module.store = Store()
    for number, weight in enumerate(weights):
        y = graph.call_function(aten.linear.default, (x, weight))
        before = graph.call_function(aten.mul.Tensor, (cache, 2.0))  # reads what this layer's write will change
        after = graph.call_module("store", (y, cache))
        flipped = graph.call_function(aten.t.default, (after,))  # which a later write would change, too
        z = graph.call_function(aten.mul.Tensor, (flipped, before))
        z = graph.call_function(aten.tanh.default, (z,))
        x = graph.call_function(aten.add.Tensor, (z, x))
        for node in (y, before, after, flipped, z, z.args[0], x):
            node.meta["nn_module_stack"] = {"": (f"layers.{number}", nn.Module)}
    graph.output((x,))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(4, 4)
    return GraphModule(module, graph)


@torch.no_grad()
def test_layers_are_cut_where_they_write() -> None:
    """What reads the cache stays among the writes; what is between two layers' own is shared; results and cache are the same."""
    module, inputs = writing_layers(6), [torch.randn(4, 4) for _ in range(8)]
    given = [t.clone() for t in inputs]
    (expected,) = module(*given)
    assert share_layers(module) == 5  # after the first layer's write and before the second one's, and so on
    (actual,) = module(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(inputs[1], given[1], rtol=0, atol=0)
    names = [
        getattr(node.target, "__name__", node.target) for node in module.graph.nodes if node.op.startswith("call_")
    ]
    middle = names[names.index("store") + 1 :]
    between = middle[: middle.index("store")]
    assert [name for name in between if name != "getitem"] == [
        "t.default",
        "mul.Tensor",
        "invoke_subgraph",
        "mul.Tensor",
    ]
