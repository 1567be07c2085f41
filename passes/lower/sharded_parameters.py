"""Parameters that are in pieces on several processes: one all-gather for each layer, at its first use, and again in the backward.

A model in which each parameter is gathered where it is read (`rewriter.distributed.sharded_parameters`) has a node of
`rewriter::all_gather_parameters` for each. `gather_by_layer` joins those of a layer, and marks them to be computed again in the
backward: a compiler keeps the pieces until then, and not whole parameters. `overlap` is for the compiler's graphs: it lets
parameters travel while the layer before is computed, and gradients while the next ones are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any
from typing import cast

import torch
import torch.utils._pytree as pytree
from rewriter.kernels import context_parallel
from rewriter.kernels.sharded_parameters import ALL_GATHER
from rewriter.kernels.sharded_parameters import REDUCE_SCATTER
from rewriter.passes.graph.inputs import source_of
from rewriter.passes.graph.nodes import layer_path
from rewriter.passes.graph.nodes import owner
from rewriter.passes.graph.nodes import writes
from torch import Tensor
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from rewriter.errors import RewriteError

aten = torch.ops.aten


def gathers_parameters(graph: Graph) -> bool:
    return any(node.target is ALL_GATHER for node in graph.nodes)


def parameter_of(node: Node) -> Node:
    """The input whose pieces a node brings together; the node itself where it does not."""
    gathered = node.args[0] if node.target is operator.getitem else None
    if not isinstance(gathered, Node) or gathered.target is not ALL_GATHER:
        return node
    piece = _arguments(gathered)[0][cast(int, node.args[1])]
    while piece.op != "placeholder":
        (piece,) = piece.all_input_nodes
    return piece


def _arguments(gather: Node) -> tuple[list[Node], list[int], int, str]:
    """Pieces, rows, processes and group of an all-gather."""
    return cast(Any, gather.args)


def gather_by_layer(module: GraphModule) -> None:
    """Rewrites a graph in place; its values stay the same.

    Raises:
        RewriteError: the model changes a parameter while it runs, which would be lost with the whole parameter.
    """
    graph = module.graph
    groups: dict[Any, list[Node]] = {}
    exchanges = 0  # in context parallelism code ends there, and what it would take along would be kept for the backward
    for node in graph.nodes:
        exchanges += node.target in context_parallel.OPERATORS
        changed = owner(node.all_input_nodes[0]) if writes(node) and node.all_input_nodes else None
        if changed is not None and parameter_of(changed) is not changed:
            raise RewriteError(
                f"{source_of(parameter_of(changed)).name} is changed in the model's forward ({node.target}), which is lost where "
                "processes hold pieces of it; change it between calls, or keep it in a buffer"
            )
        if node.target is ALL_GATHER:
            pieces, _, processes, group = _arguments(node)
            piece = pieces[0].meta["val"]
            kind = (piece.requires_grad, piece.dtype, piece.device, processes, group)
            groups.setdefault((layer_path(node), exchanges, kind), []).append(node)
    if not groups:
        return
    _to_the_front(graph, (_arguments(node)[0][0] for nodes in groups.values() for node in nodes))
    for nodes in groups.values():
        _joined(graph, nodes)
    _recompute(graph)
    graph.eliminate_dead_code()
    module.recompile()


def _to_the_front(graph: Graph, pieces: Iterable[Node]) -> None:
    """Moves what makes pieces of inputs behind the inputs: it is of DTensors, and cuts a compiler's graph where it stands."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    seen = set()
    for piece in pieces:
        chain = []
        while piece.op != "placeholder" and piece not in seen:
            chain.append(piece)
            (piece,) = piece.all_input_nodes
        for node in reversed(chain):
            node.meta.pop("recompute", None)
            last.append(node)
            last = node
            seen.add(node)


def _joined(graph: Graph, nodes: list[Node]) -> None:
    """One all-gather in the place of several of one piece each."""
    pieces: dict[Node, int] = {}  # with their rows; a parameter that is read twice is gathered once
    first: dict[Node, Node] = {}
    for node in nodes:
        (piece,), (rows,), *_ = _arguments(node)
        pieces.setdefault(piece, rows)
        first.setdefault(piece, node)
    with graph.inserting_before(nodes[0]):
        gathered = graph.call_function(ALL_GATHER, (list(pieces), list(pieces.values()), *nodes[0].args[2:]))
        gathered.meta = {**nodes[0].meta, "val": [first[piece].meta["val"][0] for piece in pieces]}
        whole = {}
        for place, piece in enumerate(pieces):
            whole[piece] = graph.call_function(operator.getitem, (gathered, place))
            whole[piece].meta = {**first[piece].meta, "val": first[piece].meta["val"][0]}
    for node in nodes:
        for item in list(node.users):
            item.replace_all_uses_with(whole[_arguments(node)[0][0]])
            graph.erase_node(item)
        graph.erase_node(node)


_ALSO = {
    *(aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default),
    *(
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.slice.Tensor,
        aten.to.dtype,
        aten._to_copy.default,
    ),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, operator.getitem),
}
"""Views and casts: what they make of a whole parameter is as large, and as cheap."""


def _recompute(graph: Graph) -> None:
    made: set[Node] = set()
    for node in graph.nodes:
        if node.target is ALL_GATHER or (node.target in _ALSO and node.all_input_nodes[0] in made):
            made.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def overlap(graph: Graph) -> None:
    """Begins to gather a layer's parameters before those of the layer before are waited for, and waits for gradients one layer
    later than they are sent. For a graph of a compiler, before it generates code."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    gathers = [node for node in graph.nodes if node.target is ALL_GATHER]
    waits: list[Node] = []
    for place, node in enumerate(gathers):
        pieces, rows, processes, group = _arguments(node)
        is_known = place > 0 and all(order[piece] < order[gathers[place - 1]] for piece in pieces)
        with graph.inserting_before(waits[-1] if is_known else node):
            start = _call(graph, "all_gather_start", pieces, rows, processes, group)
        with graph.inserting_before(node):
            waits.append(_call(graph, "all_gather_wait", start, pieces, rows, processes))
        node.replace_all_uses_with(waits[-1])
    scatters = [node for node in graph.nodes if node.target is REDUCE_SCATTER]
    starts = []
    for node in scatters:
        with graph.inserting_before(node):
            starts.append(_call(graph, "reduce_scatter_start", *node.args))
    output = next(iter(reversed(graph.nodes)))
    for node, start, later in zip(scatters, starts, [*scatters, output][1:], strict=True):
        items = list(node.users)
        before = min([later, *(user for item in items for user in item.users)], key=order.__getitem__)
        with graph.inserting_before(before):
            wait = _call(graph, "reduce_scatter_wait", start, *node.args)
        for item in items:
            before.prepend(item)
        node.replace_all_uses_with(wait)
    for node in (*gathers, *scatters):
        graph.erase_node(node)


def _call(graph: Graph, name: str, *args: Any) -> Node:
    node = graph.call_function(getattr(torch.ops.rewriter, name).default, args)
    given = pytree.tree_map_only(Node, lambda n: n.meta["val"], args)
    fake = next(value for value in pytree.tree_leaves(given) if isinstance(value, Tensor))
    with fake.fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = node.target(*given)  # type: ignore[operator]
    return node
