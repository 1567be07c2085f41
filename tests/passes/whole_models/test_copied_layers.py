"""Graphs of whole models with layers copied are those in which every call was traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captured import captured
from captured import described
from crossed import crossed
from torch import Tensor
from torch import nn


@pytest.mark.parametrize(
    ("name", "attention", "gradients"),
    crossed([("llama", "sdpa"), ("gemma2", "eager"), ("gpt2", "eager"), ("bert", "sdpa")], [False, True], every=2),
)
def test_copies_are_what_tracing_gives(
    name: str, attention: str, gradients: bool, tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(name, attention).eval()
    ids = torch.randint(0, 64, (3, 12))
    graphs = []
    with torch.set_grad_enabled(gradients):
        for copies in (False, True):
            graphs.append(captured(model, monkeypatch, copies, input_ids=ids, attention_mask=torch.ones_like(ids)))
    (traced, all_calls), (copied, calls) = graphs
    assert described(copied) == described(traced)
    assert calls.total() < 0.7 * all_calls.total(), "half of a model of two layers is like the other half"
    values = [id(n.meta["val"]) for n in copied.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert len(set(values)) == len(values), "a trace that is given two nodes' values must be able to tell them apart"
