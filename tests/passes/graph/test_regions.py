"""Layers that are alike become calls of one subgraph: which are, that nothing else changes, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriter.passes.graph.regions import share_layers
from torch import Tensor
from torch import nn
from torch.fx import GraphModule

import rewriter
from rewriter import Exact
from rewriter import Policy
from rewriter import SeparatorMask
from rewriter import SlidingWindow

IDS = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def rewritten(
    model: nn.Module, policy: Policy, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[GraphModule, list[Any]]:
    """The graph of a call, as it goes to the compiler, and what it is called with."""
    taken: list[tuple[GraphModule, list[Any]]] = []

    def take(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        del inputs

        def run(*values: Any) -> Any:
            taken.append((module, list(values)))
            return module(*values)

        return run

    monkeypatch.setattr("rewriter.optimized_model.generate_code", take)
    rewriter.optimize(model, policy, strict=True)(input_ids=IDS, use_cache=False, **options)
    return taken[0]


def calls(module: GraphModule) -> list[str]:
    """Of each shared layer the subgraph that it calls, in order."""
    hop = torch.ops.higher_order.invoke_subgraph
    return [str(node.args[1]) for node in module.graph.nodes if node.target is hop]


@pytest.mark.parametrize("policy", [Exact(), SlidingWindow(4), SeparatorMask((3, 7))], ids=lambda p: type(p).__name__)
@torch.no_grad()
def test_layers_that_are_alike_are_one_subgraph(
    tiny_model: Callable[..., nn.Module], policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what they share, ranges and angles, is computed before them."""
    module, inputs = rewritten(tiny_model("llama", "sdpa", layers=5).eval(), policy, monkeypatch)
    before = [t.clone() for t in module(*inputs)]
    assert share_layers(module) == 5
    assert calls(module) == ["shared_layer_0"] * 5
    attention = ("scaled_dot_product", "live_range")
    assert not any(name in str(node.target) for node in module.graph.nodes for name in attention)
    assert len([n for n in module.shared_layer_0.graph.nodes if any(a in str(n.target) for a in attention)]) == 1
    for old, new in zip(before, module(*inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


@torch.no_grad()
def test_layers_with_other_masks_are_given_other_ranges(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and whole texts in turns: the layers differ in what goes in."""
    module, inputs = rewritten(tiny_model("gemma2", "eager", layers=8).eval(), Exact(), monkeypatch)
    before = [t.clone() for t in module(*inputs)]
    assert share_layers(module) == 8 and calls(module) == ["shared_layer_0"] * 8
    for old, new in zip(before, module(*inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


@torch.no_grad()
def test_hidden_states_come_out(tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", "sdpa", layers=5).eval()
    module, inputs = rewritten(model, Exact(), monkeypatch, output_hidden_states=True)
    before = [t.clone() for t in module(*inputs)]
    assert len(before) > 5 and share_layers(module) >= 4
    for old, new in zip(before, module(*inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_too_few_layers_are_left_as_they_are(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = rewritten(tiny_model("llama", "sdpa", layers=3), Exact(), monkeypatch)
    nodes = [node.name for node in module.graph.nodes if node.op == "call_function"]
    assert share_layers(module) == 0 and calls(module) == []
    assert {node.name for node in module.graph.nodes if node.op == "call_function"} <= set(nodes)


def test_random_layers_are_left_as_they_are(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2", "sdpa", layers=5).train()  # with dropout behind its attention
    for block in model.transformer.h:
        block.attn.config.attn_pdrop = block.attn.attn_dropout.p = 0.0
    module, _ = rewritten(model, Exact(), monkeypatch)
    assert share_layers(module) == 0


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
