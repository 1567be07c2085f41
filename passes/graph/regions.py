"""Regions: layers that are alike become calls of one subgraph, so that a compiler makes code for one of them.

A compiler's time is that of its graph, and a model of thirty layers holds one layer thirty times. Here the nodes of each layer
of a list (`model.layers.0`, `model.layers.1`, ...) are cut out of the graph; those that are the same, but for the tensors that
go in, become one subgraph, called with `torch.ops.higher_order.invoke_subgraph` (what `torch.compiler.nested_compile_region`
makes), which Inductor compiles once.

What writes, such as a cache, stays where it is, and so does what reads it: a layer is cut there, and what lies between one
layer's cut and the next one's is the subgraph.

For graphs without gradients only. With them, what a subgraph keeps for its backward may be what it was given, and Inductor (of
torch 2.13) does not know: it writes other values into that memory, and gradients are wrong. The same care is taken here of
outputs: none may be, or become when nothing is left of an operation that does nothing, what went in.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FEWEST = 4
"""Layers that must be alike: for fewer, the calls cost more than they spare."""


@dataclass(frozen=True)
class Region:
    """The nodes of one layer, in order.

    Attributes:
        nodes: of the layer.
        inputs: nodes before it that it uses, in the order of their first use.
        outputs: nodes of the layer that are used after it.
        signature: equal for layers that are the same but for their inputs.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    signature: Any


def share_layers(module: GraphModule, example_inputs: Sequence[Any] = (), *, fewest: int = FEWEST) -> int:
    """Makes subgraphs of layers that are alike, in place; the graph computes what it did.

    Args:
        example_inputs: of the graph, fake perhaps; where they are given, it is for inputs of their sizes only, but for sizes that
            are symbols.
        fewest: layers, or parts of layers where they are cut, that must be alike.

    Returns:
        How many layers are calls of a subgraph now; 0 where the graph was left as it was.
    """
    graph = module.graph
    stays = _what_stays(graph)
    if stays is None:
        return 0
    _take_sizes_from_inputs(graph)
    _write_sizes(graph, example_inputs)
    shared, replaced = 0, dict[Node, Node]()
    done: set[str] = set()
    # Found anew after each: the layers of one list may lie within those of another.
    while (
        found := next(((name, spans) for name, spans in _lists_of_layers(graph, fewest) if name not in done), None)
    ) is not None:
        name, spans = found
        done.add(name)
        _move_what_layers_share(graph, spans, stays)
        regions = [_region(part) for part in _cut(spans, stays)]
        alike: dict[Any, list[Region]] = {}
        for region in regions:
            if region is not None:
                alike.setdefault(region.signature, []).append(region)
        groups = [same for same in alike.values() if len(same) >= fewest]
        subgraphs = [_subgraph(same[0]) for same in groups]  # before any of them is changed
        for subgraph, same in zip(subgraphs, groups, strict=True):
            _call_one_subgraph(module, subgraph, same, replaced)
            shared += len(same)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return shared


def _what_stays(graph: Graph) -> set[Node] | None:
    """The submodules that a lowering has put in, which may write to inputs of the graph, and what reads memory that they may
    have written to: their place among each other is not to change.

    Returns:
        None where there is something that a subgraph would change the meaning of, or cannot take.
    """
    if any(_cannot_be_shared(node) for node in graph.nodes):
        return None
    submodules = [node for node in graph.nodes if node.op == "call_module"]
    may_be_written = {n for node in submodules for n in node.all_input_nodes if n.op == "placeholder"}
    may_be_written.update(submodules)  # which may return what they have written to
    stays = set(submodules)
    for node in graph.nodes:
        if any(n in may_be_written for n in node.all_input_nodes):
            stays.add(node)
            if not _makes_new_memory(node):
                may_be_written.add(node)
    return stays


def _cannot_be_shared(node: Node) -> bool:
    """Writes and random numbers in the graph itself, subgraphs, weights that are more than one tensor."""
    if node.op == "placeholder":
        return is_traceable_wrapper_subclass(node.meta.get("val"))
    if not isinstance(node.target, torch._ops.OpOverload):
        return isinstance(node.target, torch._ops.HigherOrderOperator)
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:  # whose tag is for its dropout
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0))
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def _expression(node: Node) -> Any:
    value = node.meta.get("val")
    return value.node.expr if isinstance(value, torch.SymInt) else None


def _take_sizes_from_inputs(graph: Graph) -> None:
    """A size that is asked of a layer's tensor is taken from where it is first known: it does not depend on the layer then."""
    known: dict[Any, Node] = {}
    for node in graph.nodes:
        expression = _expression(node)
        if expression is None:
            continue
        first = known.setdefault(expression, node)
        if first is not node and node.op == "call_function":
            node.replace_all_uses_with(first)
    graph.eliminate_dead_code()


def _write_sizes(graph: Graph, example_inputs: Sequence[Any]) -> None:
    """Sizes of the inputs that are numbers, and what is computed of them: a subgraph takes no numbers."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    values: dict[Node, Any] = dict(zip(inputs, example_inputs, strict=False))
    numbers: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(
            node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)
        ):
            continue
        if node.target is torch.ops.aten.sym_size.int and node.args[0] in values:
            value = values[node.args[0]].shape[node.args[1]]
        elif node.all_input_nodes and all(n in numbers for n in node.all_input_nodes):
            value = node.target(*torch.fx.map_arg(node.args, numbers.__getitem__), **node.kwargs)
        else:
            continue
        if isinstance(value, (int, float, bool)):
            numbers[node] = value
    for node in graph.nodes:
        node.args, node.kwargs = (torch.fx.map_arg(a, lambda n: numbers.get(n, n)) for a in (node.args, node.kwargs))
    graph.eliminate_dead_code()


_LAYER = re.compile(r"^(.*?)\.(\d+)(?:\.|$)")


def _layer_of(node: Node) -> tuple[str, int] | None:
    """The outermost list of modules that a node belongs to, and its place there."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0].replace("_modules['", "").replace("']", "") if stack else ""
    found = _LAYER.match(path)
    return (found[1], int(found[2])) if found else None


def _lists_of_layers(graph: Graph, fewest: int) -> list[tuple[str, list[list[Node]]]]:
    """Each list of modules that run one after the other: its name, and the nodes from each module's first to the next one's."""
    places: dict[str, dict[int, list[int]]] = {}
    nodes = list(graph.nodes)
    for place, node in enumerate(nodes):
        layer = _layer_of(node)
        if layer is not None and node.op == "call_function":
            places.setdefault(layer[0], {}).setdefault(layer[1], []).append(place)
    found = []
    for name, of_layer in places.items():
        in_order = [of_layer[number] for number in sorted(of_layer)]
        one_after_the_other = all(a[-1] < b[0] for a, b in itertools.pairwise(in_order))
        if len(in_order) < fewest or not one_after_the_other:
            continue
        ends = [own[0] for own in in_order[1:]] + [in_order[-1][-1] + 1]
        found.append((name, [nodes[own[0] : end] for own, end in zip(in_order, ends, strict=True)]))
    return found


def _move_what_layers_share(graph: Graph, spans: list[list[Node]], stays: set[Node]) -> None:
    """Nodes that depend on no layer and are used by several go before the first one: ranges, or angles of a rotation."""
    owner = {node: number for number, span in enumerate(spans) for node in span}
    free: set[Node] = set()  # depends on nothing in the layers, but for what is free itself
    for node in owner:
        if node not in stays and all(n not in owner or n in free for n in node.all_input_nodes):
            free.add(node)
    # What a layer hands on to the next one is free in the first layer, and is used by one other.
    wanted = [node for node in free if len({owner.get(user) for user in node.users} - {owner[node], None}) > 1]
    moved: set[Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in moved:
            moved.add(node)
            wanted += [n for n in node.all_input_nodes if n in owner]
    first = next((node for node in owner if node not in moved), None)
    if first is None:
        return
    for node in owner:
        if node in moved:
            first.prepend(node)
    for span in spans:
        span[:] = [node for node in span if node not in moved]


def _cut(spans: list[list[Node]], stays: set[Node]) -> list[list[Node]]:
    """The layers without what stays; its place is between what it needs and what needs it, and cuts a layer in two.

    The second part of a layer and the first one of the next are one. Nodes are moved so that each part is together.
    """
    parts: list[list[Node]] = []
    begun: list[Node] = []
    for span in spans:
        needs: set[Node] = set()  # something that stays, or is such a one
        for node in span:
            if node in stays or any(n in needs for n in node.all_input_nodes):
                needs.add(node)
        is_needed: set[Node] = set()  # by something that stays
        for node in reversed(span):
            if node in stays or any(user in is_needed for user in node.users):
                is_needed.add(node)
        first = [node for node in span if node not in needs]
        between = [node for node in span if node in needs & is_needed]
        last = [node for node in span if node in needs - is_needed]
        for node, following in itertools.pairwise((*first, *between, *last)):
            node.append(following)
        if between:
            parts.append(begun + first)
            begun = last
        else:
            parts += [begun, first]
            begun = []
    return [*parts, begun]


def _region(nodes: list[Node]) -> Region | None:
    """A layer with its signature; None where it cannot be a subgraph."""
    nodes = _without_aliases(nodes)
    if not nodes:
        return None
    own = {node: place for place, node in enumerate(nodes)}
    inputs: dict[Node, int] = {}
    described: list[Any] = []

    def numbered(node: Node) -> Any:
        if node in own:
            return ("own", own[node])
        return ("input", inputs.setdefault(node, len(inputs)))

    for node in nodes:
        if node.op != "call_function":
            return None
        described.append((node.target, frozen((node.args, node.kwargs), numbered), _value(node)))
    outputs = tuple(node for node in nodes if any(user not in own for user in node.users))
    if not all(isinstance(node.meta.get("val"), Tensor) for node in outputs):
        return None
    if not outputs:
        return None
    signature = (tuple(described), tuple(_value(n) for n in inputs), tuple(own[n] for n in outputs))
    return Region(tuple(nodes), tuple(inputs), outputs, signature)


def _without_aliases(nodes: list[Node]) -> list[Node]:
    """A part without the nodes at its end that may return what they are given: they are moved after it. Empty where that cannot
    be, or nothing is left."""
    kept = list(nodes)
    while True:
        own = set(kept)
        outputs = [node for node in kept if any(user not in own for user in node.users)]
        aliases = {node for node in outputs if not _makes_new_memory(node)}
        if not aliases:
            break
        if any(user in own - aliases for node in aliases for user in node.users):
            return []
        kept = [node for node in kept if node not in aliases]
    if kept:
        for node in reversed([node for node in nodes if node not in own]):
            kept[-1].append(node)
    return kept


def frozen(value: Any, numbered: Callable[[Node], Any]) -> Any:
    """Arguments as something to be compared, with their types: 1, 1.0 and True are not alike."""
    if isinstance(value, Node):
        return numbered(value)
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(frozen(v, numbered) for v in value))
    if isinstance(value, Mapping):
        return ("mapping", *((k, frozen(v, numbered)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", *(frozen(v, numbered) for v in (value.start, value.stop, value.step)))
    return (type(value).__name__, repr(value))


def _value(node: Node) -> Any:
    """What is known of a node's value: type, sizes and strides, and device."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return (
            *(str(x) for x in (value.dtype, tuple(value.shape), value.stride(), value.storage_offset(), value.device)),
            type(value).__name__,
        )
    if isinstance(value, (tuple, list)):
        return tuple(_value_of_part(part) for part in value)
    return str(value)


def _value_of_part(value: Any) -> Any:
    return (str(value.dtype), str(tuple(value.shape))) if isinstance(value, Tensor) else str(value)


_aten = torch.ops.aten

_MAKE_NEW_MEMORY = (
    _aten.linear.default,
    _aten.matmul.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.layer_norm.default,
)


def _makes_new_memory(node: Node) -> bool:
    """Whether a value is certainly computed: a product, a norm, or the sum or product of two tensors."""
    if node.target in (_aten.add.Tensor, _aten.mul.Tensor):
        given = [argument for argument in node.args[:2] if isinstance(argument, Node)]
        return len(given) == 2 and all(isinstance(n.meta.get("val"), Tensor) and n.op != "get_attr" for n in given)
    return node.target in _MAKE_NEW_MEMORY


def _call_one_subgraph(
    module: GraphModule, subgraph: GraphModule, regions: Sequence[Region], replaced: dict[Node, Node]
) -> None:
    """All regions become calls of the subgraph.

    Args:
        replaced: of each output of an earlier region, what stands for it now; this adds those of these regions.
    """
    number = sum(name.startswith("shared_layer_") for name, _ in module.named_children())
    name = f"shared_layer_{number}"
    module.add_submodule(name, subgraph)
    for region in regions:
        last, graph, own = region.nodes[-1], module.graph, set(region.nodes)
        with graph.inserting_after(last):
            body = graph.get_attr(name)
        with graph.inserting_after(body):
            called = graph.call_function(invoke_subgraph, (body, name, *(replaced.get(n, n) for n in region.inputs)))
        called.meta["val"] = tuple(node.meta["val"] for node in region.outputs)
        after = called
        for place, output in enumerate(region.outputs):
            with graph.inserting_after(after):
                after = graph.call_function(operator.getitem, (called, place))
            after.meta.update(output.meta)
            for user in list(output.users):
                if user not in own:
                    user.replace_input_with(output, after)
            replaced[output] = after
        for node in reversed(region.nodes):
            graph.erase_node(node)


def _subgraph(region: Region) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for place, node in enumerate(region.inputs):
        copies[node] = graph.placeholder(f"input_{place}")
    for node in region.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in region.outputs))
    return GraphModule(torch.nn.Module(), graph)
