"""New nodes at a graph's insertion point.

A small function is traced to pre-dispatch ATen and its nodes are copied (`emit`), or a submodule is called (`call`), which a
compiler reads when it compiles."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.fx import Graph
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter.errors import PolicyError

aten = torch.ops.aten


def call(
    graph: Graph,
    module: nn.Module,
    inputs: Sequence[Node | None],
    results: int = 1,
    meta: Mapping[str, Any] | None = None,
) -> tuple[Node, ...]:
    """A submodule of the graph's module, called at the insertion point.

    Args:
        results: 1 for a tensor, else the length of the tuple that the module returns.
    """
    owner = graph.owning_module
    assert owner is not None
    kind = type(module).__name__.lstrip("_").lower()
    name = next(n for i in itertools.count() if not hasattr(owner, n := f"{kind}_{i}"))
    owner.add_module(name, module)
    node = graph.call_module(name, tuple(inputs))
    node.meta.update(meta or {})
    if results == 1:
        return (node,)
    return tuple(graph.call_function(operator.getitem, (node, i)) for i in range(results))


def inherited(node: Node) -> dict[str, Any]:
    """What the nodes that replace a node take over: where it came from, and whether a backward recomputes it."""
    names = ("nn_module_stack", "stack_trace", "recompute", "ac_graph_id")
    return {name: node.meta[name] for name in names if name in node.meta}


def emit(
    graph: Graph, function: Callable[..., tuple[Tensor, ...]], inputs: list[Node], meta: Mapping[str, Any] | None = None
) -> tuple[Node, ...]:
    """Traces `function` on the inputs' fake values and copies its nodes, with this metadata, to the insertion point."""
    fakes = [node.meta["val"] for node in inputs]
    fake_mode = next(fake.fake_mode for fake in fakes if isinstance(fake, Tensor))  # type: ignore[attr-defined]
    with fake_mode:
        traced = make_fx(function, pre_dispatch=True)(*fakes)
    traced.graph.eliminate_dead_code()
    if any(node.op == "get_attr" for node in traced.graph.nodes):
        raise PolicyError(
            "the policy's live_ranges makes a tensor from Python values, which a compiled graph cannot hold; "
            "compare with the numbers themselves, or use torch.full and torch.arange"
        )
    copies: dict[Node, Node] = {}
    sources = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(sources)
        elif node.op == "output":
            return tuple(copies[n] for n in node.args[0])
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].meta.update(meta or {})
    raise AssertionError("a traced graph ends with its output")
