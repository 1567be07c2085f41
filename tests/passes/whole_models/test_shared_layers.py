"""Layers of whole models that are alike become calls of one subgraph, whatever the policy; results stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rewriter.passes.graph.regions import share_layers
from rewritten import calls
from rewritten import rewritten
from torch import nn

from rewriter import Exact
from rewriter import Policy
from rewriter import SeparatorMask
from rewriter import SlidingWindow


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


def test_random_layers_are_left_as_they_are(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt2", "sdpa", layers=5).train()  # with dropout behind its attention
    for block in model.transformer.h:
        block.attn.config.attn_pdrop = block.attn.attn_dropout.p = 0.0
    module, _ = rewritten(model, Exact(), monkeypatch)
    assert share_layers(module) == 0
