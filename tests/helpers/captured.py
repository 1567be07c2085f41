"""What a model is captured as, with and without copies of layers that are alike, written so that two graphs can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from rewriter.passes.graph import capture as capturing
from rewriter.passes.graph.repeated_calls import RepeatedCalls
from torch import Tensor
from torch import nn
from torch.fx import GraphModule
from torch.fx import Node


class Traced(RepeatedCalls):
    """Counts what is traced; copies nothing where told so."""

    def __init__(self, counts: Counter[str], *, copies: bool = True) -> None:
        super().__init__()
        self.counts, self.copies = counts, copies

    def __call__(self, node: Node, args: Any, kwargs: Any, trace: Callable[[], Any]) -> Any:
        def counted() -> Any:
            self.counts[str(node.target)] += 1
            return trace()

        return super().__call__(node, args, kwargs, counted) if self.copies else counted()


def captured(model: nn.Module, monkeypatch: pytest.MonkeyPatch, copies: bool, *inputs: Any, **named: Any) -> Any:
    """The graph, and how many calls of each function were traced."""
    graphs: list[GraphModule] = []
    counts: Counter[str] = Counter()

    def backend(graph: GraphModule, examples: list[Any]) -> Any:
        graphs.append(capturing.capture(graph, examples).module)
        return graph.forward

    monkeypatch.setattr(capturing, "RepeatedCalls", lambda: Traced(counts, copies=copies))
    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=True, fullgraph=True)(*inputs, **named)
    (graph,) = graphs
    graph.graph.eliminate_dead_code()
    return graph, counts


def described(graph: GraphModule) -> list[Any]:
    """All of the nodes that matters; a size is its expression, whichever node computes it."""
    places: dict[Node, int] = {}

    def is_size(node: Node) -> bool:
        return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool))

    def argument(node: Node) -> Any:
        return str(node.meta["val"].node.expr) if is_size(node) else f"%{places[node]}"

    def like(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return str(value)
        return str([*value.shape, *value.stride(), value.storage_offset(), value.dtype, value.requires_grad])

    rows = []
    for node in graph.graph.nodes:
        if is_size(node) and node.op != "placeholder":
            continue
        given = torch.fx.map_arg((node.args, dict(node.kwargs)), argument)
        places[node] = len(places)
        where = [
            str(list(node.meta.get("nn_module_stack", {}).values())),
            node.meta.get("stack_trace"),
            sorted(node.meta),
        ]
        values = pytree.tree_map(like, pytree.tree_leaves(node.meta.get("val")))
        rows.append((node.op, str(node.target), str(given), values, *where, node.meta.get("recompute")))
    return rows
