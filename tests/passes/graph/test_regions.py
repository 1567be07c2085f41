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

from rewriter import Exact


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
