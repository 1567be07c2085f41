"""The graph of a call after the passes, and which of its layers share a subgraph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import rewriter
from rewriter import Policy

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

    monkeypatch.setattr("rewriter.optimized_model.CodeOfGraphs", lambda: take)
    rewriter.optimize(model, policy, strict=True)(input_ids=IDS, use_cache=False, **options)
    return taken[0]


def calls(module: GraphModule) -> list[str]:
    """Of each shared layer the subgraph that it calls, in order."""
    hop = torch.ops.higher_order.invoke_subgraph
    return [str(node.args[1]) for node in module.graph.nodes if node.target is hop]
