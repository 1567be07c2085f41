"""Pipeline stages: a rewritten graph is cut between layers, into graphs that run on devices one after the other.

Masks are proven on the whole graph before it is cut. What a stage needs of ids, positions and masks, live ranges among it, it
computes itself, of the same call that all stages are given; so from stage to stage only what weights were needed for is sent,
which is the hidden states.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from rewriter.passes.graph.inputs import GraphInput
from rewriter.passes.graph.inputs import is_size
from rewriter.passes.graph.nodes import layer_path
from rewriter.passes.graph.nodes import writes
from rewriter.passes.lower.plan import PlannedSite
from torch import Tensor
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx import Node

from rewriter.errors import RewriteError

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """What one layer takes for one row, its forward alone. What stands before the first belongs to that one, and what stands
    after the last to the last.

    Attributes:
        path: of its module, qualified.
        matmul_flops: of its products with weights.
        attention_flops: of its attentions, for the pairs of query and key that are computed.
        parameter_bytes: of its parameters.
        activation_bytes: of what its operators return, views left out: about what is kept for its backward.
        output_bytes: of what later layers need of it, or of those before it.
    """

    path: str
    matmul_flops: int
    attention_flops: int
    parameter_bytes: int
    activation_bytes: int
    output_bytes: int


def layers_of_graph(
    module: GraphModule,
    planned: Sequence[PlannedSite],
    attention_flops: Mapping[int, int],
    inputs: Sequence[GraphInput],
    sizes: Mapping[sympy.Symbol, int],
) -> list[Layer]:
    """The layers between which a graph can be cut, and their costs.

    Args:
        module: lowered.
        planned: its sites; layers are the modules of a list that hold them.
        attention_flops: of the sites, by number, for one row.
        inputs: of the graph, without sizes.
        sizes: values of the graph's symbols, for one row.

    Raises:
        RewriteError: there are no two layers, or a cost cannot be predicted.
    """
    paths = _paths(planned)
    cutter = _Cutter(module, inputs, paths)
    found = []
    for place, path in enumerate(paths):
        own = [node for node in cutter.nodes if cutter.place[node] == place]
        sites = [plan for plan in planned if _layer_of_site(plan) == path]
        missing = [plan.layer for plan in sites if plan.layer not in attention_flops]
        if missing:
            raise RewriteError(f"what site {missing[0]} computes cannot be predicted, so that stages cannot be planned")
        parameters = {n: None for node in own for n in node.all_input_nodes if cutter.is_parameter(n)}
        found.append(
            Layer(
                path,
                matmul_flops=sum(_matmul_flops(node, sizes) for node in own),
                attention_flops=sum(attention_flops[plan.layer] for plan in sites),
                parameter_bytes=sum(_bytes(node, sizes) for node in parameters),
                activation_bytes=sum(_bytes(n, sizes) for n in own if n in cutter.learned and _has_memory(n)),
                output_bytes=sum(_bytes(node, sizes) for node in cutter.sent_after(place)),
            )
        )
    return found


def cut(
    module: GraphModule, inputs: Sequence[GraphInput], planned: Sequence[PlannedSite], firsts: Sequence[int]
) -> list[GraphModule]:
    """The graphs of stages. Each takes what the one before returns, a tensor or several, and the call's arguments, by name.

    Args:
        module: lowered, with one output.
        inputs: of the graph, without sizes.
        firsts: of each stage its first layer, ascending from 0.

    Raises:
        RewriteError: two stages need one parameter.
    """
    cutter = _Cutter(module, inputs, _paths(planned))
    return [
        cutter.stage(first, last, place == 0, place == len(firsts) - 1)
        for place, (first, last) in enumerate(zip(firsts, [*firsts[1:], cutter.num_layers], strict=True))
    ]


def _layer_of_site(plan: PlannedSite) -> str:
    return layer_path(plan.site.node)


def _paths(planned: Sequence[PlannedSite]) -> list[str]:
    paths = list(dict.fromkeys(map(_layer_of_site, planned)))
    if len(paths) < 2 or not all(path.rpartition(".")[2].isdigit() for path in paths):
        raise RewriteError(
            "a model is cut between layers, modules of a list that hold its attentions, and there are no two of them here"
        )
    return paths


class _Cutter:
    """A graph, and the layer that each of its nodes belongs to: nodes stand in the order of the layers.

    Attributes:
        place: of each node the number of its layer.
        learned: nodes that weights, or random numbers, were needed for; others a stage computes itself.
    """

    def __init__(self, module: GraphModule, inputs: Sequence[GraphInput], paths: Sequence[str]) -> None:
        self.module, self.num_layers = module, len(paths)
        self.nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.inputs = dict(zip((n for n in placeholders if not is_size(n.meta["val"])), inputs, strict=True))
        (self.output,) = (n for n in module.graph.nodes if n.op == "output")
        numbers = {path: number for number, path in enumerate(paths)}
        self.place: dict[Node, int] = {}
        present = 0
        for node in self.nodes:
            present = max(present, numbers.get(layer_path(node), 0))
            self.place[node] = present
        self.learned: set[Node] = set()
        for node in module.graph.nodes:
            is_random = isinstance(node.target, torch._ops.OpOverload) and (
                torch.Tag.nondeterministic_seeded in node.target.tags
            )
            if (
                is_random
                or self.is_parameter(node)
                or (_is_tensor(node) and self.learned.intersection(node.all_input_nodes))
            ):
                self.learned.add(node)

    def is_parameter(self, node: Node) -> bool:
        return node in self.inputs and self.inputs[node].kind == "parameter"

    def sent_after(self, place: int) -> list[Node]:
        """What layers up to this one have computed, and later ones need."""
        return [
            node
            for node in self.nodes
            if node in self.learned
            and self.place[node] <= place
            and isinstance(node.meta.get("val"), Tensor)
            and any(self.place[user] > place for user in node.users if user is not self.output)
        ]

    def stage(self, first: int, last: int, is_first: bool, is_last: bool) -> GraphModule:
        """Layers `first` to `last - 1`."""
        made = _Stage(self)
        received = [] if is_first else self.sent_after(first - 1)
        made.receive(received)
        made.give_arguments()
        results = pytree.tree_leaves(self.output.args) if is_last else self.sent_after(last - 1)
        needed = self._needed(range(first, last), results, set(received))
        for node in self.nodes:
            if node in needed:
                made.copied(node)
        values = tuple(map(made.copied, results))
        made.graph.output(values[0] if len(values) == 1 else values)
        made.graph.eliminate_dead_code()
        return made.finished()

    def _needed(self, own: range, results: Sequence[Any], received: set[Node]) -> set[Node]:
        """What a stage computes: its layers, what it returns, and what these need. What switches gradients or autocast on and off
        is part of each stage, as is what only checks something or writes."""
        rest = [node for node in results if isinstance(node, Node)]
        for node in self.nodes:
            is_own = self.place[node] in own
            acts = node.is_impure() or writes(node)
            if is_own if node in self.learned else acts:
                rest.append(node)
        needed: set[Node] = set()
        while rest:
            node = rest.pop()
            if node not in needed and node not in received:
                needed.add(node)
                rest.extend(() if _is_size_of_tensor(node) else node.all_input_nodes)
        return needed


class _Stage:
    """A stage's graph, while it is made."""

    def __init__(self, whole: _Cutter) -> None:
        self.whole = whole
        self.graph = Graph()
        self.tensors: dict[str, Any] = {}
        self.known: dict[Node, Any] = {}
        self.placeholders: list[Node] = []

    def receive(self, nodes: Sequence[Node]) -> None:
        for place, node in enumerate(nodes):
            self._placeholder(node, f"received_{place}")

    def give_arguments(self) -> None:
        for node, source in self.whole.inputs.items():
            if source.kind == "argument":
                self._placeholder(node, source.name)

    def _placeholder(self, node: Node, name: str) -> None:
        made = self.graph.create_node("placeholder", name, name=name)
        made.meta = dict(node.meta)
        self.known[node] = made
        self.placeholders.append(made)

    def copied(self, node: Any) -> Any:
        """A node of the whole graph in this one, with what it is computed of."""
        if not isinstance(node, Node):
            return node
        if node not in self.known:
            if node.op == "placeholder":
                self.known[node] = self._input(node)
            elif _is_size_of_tensor(node):
                self.known[node] = self._size(node)
            else:
                self.known[node] = self.graph.node_copy(node, self.copied)
                if node.op == "get_attr":
                    self.tensors[str(node.target)] = operator.attrgetter(str(node.target))(self.whole.module)
        return self.known[node]

    def _input(self, node: Node) -> Node:
        if is_size(node.meta["val"]):
            return self._size(node)
        source = self.whole.inputs[node]
        name = source.name if source.kind in ("parameter", "buffer") else node.name
        self.tensors[name] = source.value
        made = self.graph.get_attr(name)
        made.meta = dict(node.meta)
        return made

    def _size(self, node: Node) -> Node:
        """A size that the whole graph was given, or asks a tensor for, of the tensors that the stage has."""
        wanted = node.meta["val"]
        for given in self.placeholders:
            for dim, size in enumerate(given.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == wanted.node.expr:
                    made = self.graph.call_function(aten.sym_size.int, (given, dim))
                    made.meta["val"] = wanted
                    return made
        raise RewriteError(f"no argument of the call has the size {wanted}, which a stage needs")

    def finished(self) -> GraphModule:
        return GraphModule(self.tensors, self.graph)


def _is_size_of_tensor(node: Node) -> bool:
    return is_size(node.meta.get("val")) and any(map(_is_tensor, node.all_input_nodes))


def _is_tensor(node: Node) -> bool:
    """Whether a node holds tensors, or several values, of which some may be."""
    return not is_size(node.meta.get("val"))


def _has_memory(node: Node) -> bool:
    """Whether a node's result is one tensor with memory of its own."""
    is_view = isinstance(node.target, torch._ops.OpOverload) and any(r.alias_info for r in node.target._schema.returns)
    return isinstance(node.meta.get("val"), Tensor) and node.target is not operator.getitem and not is_view


def _value(size: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    return int(size.node.expr.subs(sizes)) if isinstance(size, torch.SymInt) else int(size)


def _numbers(node: Node, sizes: Mapping[sympy.Symbol, int]) -> int:
    result = 1
    for size in node.meta["val"].shape:
        result *= _value(size, sizes)
    return result


def _bytes(node: Node, sizes: Mapping[sympy.Symbol, int]) -> int:
    return _numbers(node, sizes) * int(node.meta["val"].element_size())


_PRODUCTS = {
    aten.linear.default: 0,
    aten.matmul.default: 0,
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
}
"""Matrix products, and which argument is the left one."""


def _matmul_flops(node: Node, sizes: Mapping[sympy.Symbol, int]) -> int:
    if node.target not in _PRODUCTS:
        return 0
    left = node.args[_PRODUCTS[node.target]]
    return 2 * _numbers(node, sizes) * _value(left.meta["val"].shape[-1], sizes)  # type: ignore[union-attr]
