"""torch.vmap in a Dynamo graph: what lies between its begin and its end becomes one call, and is traced to plain operators.

Tracing before dispatch sees what enters a vmap and what leaves it, and nothing of what is between. Traced after dispatch, the
part is the batched operators themselves. transformers builds its masks so where a model adds a condition of its own, as
those of images are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rewriter.passes.graph.nodes import may_attend
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx import Interpreter
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter.errors import CaptureError


class VmapRegion:
    """A part of a graph with all levels of a vmap, to be called with what it reads.

    Args:
        module: the part as a graph of its own; its placeholders are what it reads, its output a tuple.
    """

    __name__ = "vmap_region"

    def __init__(self, module: GraphModule) -> None:
        self.module = module

    def __call__(self, *inputs: Any) -> Any:
        with disable_proxy_modes_tracing():
            batched = make_fx(lambda *values: Interpreter(self.module).run(*values))(*inputs)
        for node in batched.graph.nodes:
            if may_attend(node.target):
                raise CaptureError(
                    "a part of the model attends inside torch.vmap, where no pass sees it; give the attention a batch dimension "
                    "in place of the vmap"
                )
        return Interpreter(batched).run(*inputs)


def gather_vmap(dynamo_graph: GraphModule) -> GraphModule:
    """The same graph with each vmap as one call of a `VmapRegion`; itself where it has none."""
    regions = _regions(list(dynamo_graph.graph.nodes))
    if not regions:
        return dynamo_graph
    of_region = {node: number for number, region in enumerate(regions) for node in region}
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in dynamo_graph.graph.nodes:
        number = of_region.get(node)
        if number is None:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif node is regions[number][-1]:
            _call(dynamo_graph, graph, regions[number], copies)
    return GraphModule(dynamo_graph, graph)


def _regions(nodes: Sequence[Node]) -> list[list[Node]]:
    """The runs of nodes from the begin of an outermost vmap to its end."""
    regions: list[list[Node]] = []
    depth = 0
    for node in nodes:
        begins = node.target is _VMAP_BEGINS
        if begins and depth == 0:
            regions.append([])
        if begins or depth:
            regions[-1].append(node)
        depth += begins - (node.target is _VMAP_ENDS)
    return regions


def _call(module: GraphModule, graph: Graph, region: list[Node], copies: dict[Node, Node]) -> None:
    """Puts a region into a graph as one call, and its results into `copies`."""
    inside = set(region)
    reads = list(dict.fromkeys(i for node in region for i in node.all_input_nodes if i not in inside))
    results = [node for node in region if any(user not in inside for user in node.users)]
    own = Graph()
    mine: dict[Node, Node] = {node: own.placeholder(node.name) for node in reads}
    for node in region:
        mine[node] = own.node_copy(node, mine.__getitem__)
    own.output(tuple(mine[node] for node in results))
    call = graph.call_function(VmapRegion(GraphModule(module, own)), tuple(copies[node] for node in reads))
    for place, node in enumerate(results):
        copies[node] = graph.call_function(_item, (call, place))
        copies[node].meta.update(node.meta)


def _item(results: Sequence[Any], place: int) -> Any:
    return results[place]


_VMAP_BEGINS = torch._functorch.predispatch._vmap_increment_nesting
_VMAP_ENDS = torch._functorch.predispatch._vmap_decrement_nesting
