"""Canonicalize: one name for each operator, erase what does nothing, and make in-place operations visible.

Full slices, casts to the same dtype, expands and views to the same shape and inactive dropout are erased. An in-place operation
on a fresh tensor, or on a slice of one, becomes its functional form, where nothing else can see the difference; the
tensors that the remaining ones change are reported, and mask analysis takes them for data.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rewriter.passes.graph.nodes import arguments
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class Canonicalized:
    """What the pass did.

    Attributes:
        erased: number of nodes that did nothing.
        functionalized: number of in-place operations that became functional.
        modified: tensors that in-place operations still change, and the views of them.
    """

    erased: int
    functionalized: int
    modified: frozenset[Node]


def canonicalize(module: GraphModule) -> Canonicalized:
    """Rewrites the graph in place; its values stay the same."""
    for node in module.graph.nodes:
        node.target = _SYNONYMS.get(node.target, node.target)
    functionalized = 0
    modes = _grad_modes(module)
    for node in list(module.graph.nodes):
        # A write where gradients are off cuts the gradient of what is written to; its functional form would not.
        if not _written(node) or not isinstance(node.args[0], Node):
            continue
        root = _root(node.args[0])
        if root not in modes or modes[node] == modes[root]:  # what is new here was made in the mode of its own root
            functionalized += _functionalize(node) or _scatter(node)
    modified: set[Node] = set()
    for node in module.graph.nodes:
        for written in _written(node):
            modified |= _aliases(written)
    erased = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node not in modified and _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            erased += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return Canonicalized(erased, functionalized, frozenset(n for n in modified if n.graph is module.graph))


def _synonyms() -> dict[Any, Any]:
    usual = {
        "absolute": "abs", "clip": "clamp", "concat": "cat", "divide": "div", "greater": "gt", "greater_equal": "ge",
        "less": "lt", "less_equal": "le", "multiply": "mul", "negative": "neg", "not_equal": "ne", "subtract": "sub",
        "true_divide": "div",
    }  # fmt: skip
    usual |= {f"{name}_": f"{other}_" for name, other in usual.items() if hasattr(aten, f"{name}_")}
    found = {
        aten.special_softmax.default: aten.softmax.int,
        aten.swapaxes.default: aten.transpose.int,
        aten.linalg_matmul.default: aten.matmul.default,
    }
    for name, other in usual.items():
        packet, usual_packet = getattr(aten, name), getattr(aten, other)
        for overload in set(packet.overloads()) & set(usual_packet.overloads()):
            found[getattr(packet, overload)] = getattr(usual_packet, overload)
    return found


_SYNONYMS = _synonyms()
"""Operators that torch has under two names, and the name that the other passes know."""


def _grad_modes(module: GraphModule) -> dict[Node, bool | None]:
    """Whether gradients are on at each node, None where the graph does not say."""
    modes: dict[Node, bool | None] = {}
    mode = None
    for node in module.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            mode = node.args[0]
        modes[node] = mode
    return modes


def _root(node: Node) -> Node:
    """What a view is a view of."""
    while _is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _does_nothing(node: Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if node.target is aten.slice.Tensor:
        _, _, start, end, step = arguments(node, 5)
        return start in (None, 0) and end in (None, 2**63 - 1) and step in (None, 1)
    if node.target in (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default):
        return bool(before.dtype == after.dtype and before.device == after.device)
    if node.target in (aten.expand.default, aten.view.default, aten.reshape.default):
        return [str(s) for s in before.shape] == [str(s) for s in after.shape]
    if node.target is aten.alias.default:
        return True
    if node.target is aten.dropout.default:
        probability, training = node.args[1:3]
        return bool(probability == 0.0 or not training)
    return False


def _written(node: Node) -> list[Node]:
    """The arguments that an operation writes to, by its schema."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    schema = node.target._schema
    if not schema.is_mutable:
        return []
    values = [*node.args, *(node.kwargs.get(argument.name) for argument in schema.arguments[len(node.args) :])]
    written = [v for a, v in zip(schema.arguments, values, strict=False) if a.alias_info and a.alias_info.is_write]
    return [value for value in written if isinstance(value, Node)]


_MAY_RETURN_THEIR_INPUT = {
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "broadcast_tensors",
    "meshgrid",
    "sum_to_size",
    "einsum",
}
"""Operators that return their input, or a view of it, and whose schema does not say so."""


def _is_view(node: Node) -> bool:
    """Whether a node's result may share memory with its first argument."""
    target = node.target
    if node.op != "call_function":
        return False
    if target is operator.getitem:  # a piece of what chunk or split returns
        return isinstance(node.args[0], Node) and _is_view(node.args[0])
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target._schema.name.split("::")[1] in _MAY_RETURN_THEIR_INPUT:
        return True
    return any(a.alias_info is not None for a in target._schema.returns) or target in (
        aten.reshape.default,
        aten.contiguous.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.type_as.default,
        aten.flatten.using_ints,
    )


def _aliases(node: Node) -> set[Node]:
    """All nodes that may share memory with a node."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top in seen:
            continue
        seen.add(top)
        if _is_view(top):
            stack.extend(a for a in top.all_input_nodes[:1])
        stack.extend(user for user in top.users if _is_view(user) and user.all_input_nodes[0] is top)
    return seen


def _functionalize(node: Node) -> bool:
    """`x.op_(...)` -> `y = x.op(...)`, later uses of x become y; only where x had no other name before."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name = target._schema.name.split("::")[1]
    changed = node.args[0]
    if not name.endswith("_") or name.endswith("__") or not isinstance(changed, Node) or changed.op != "call_function":
        return False
    packet = getattr(aten, name[:-1], None)
    earlier = set(_until(node))
    if (
        packet is None
        or target._overloadname not in packet.overloads()
        or _is_view(changed)
        or any(_is_view(user) and user in earlier and user is not node for user in changed.users)
    ):
        return False
    functional = getattr(packet, target._overloadname)
    before, after = changed.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    graph = node.graph
    with graph.inserting_before(node):
        result = graph.call_function(functional, node.args, node.kwargs)
        result.meta = dict(node.meta)
        new = {result}
        given: Any = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        with before.fake_mode if isinstance(before, FakeTensor) else nullcontext():
            promoted = functional(*given[0], **given[1])
        if promoted.dtype != before.dtype:
            result.meta["val"] = promoted
            new.add(cast := graph.call_function(aten.to.dtype, (result, before.dtype)))
            result, cast.meta = cast, dict(node.meta)
    changed.replace_all_uses_with(result, delete_user_cb=lambda user: user not in earlier and user not in new)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return True


def _scatter(node: Node) -> bool:
    """`x[..., a:b].copy_(y)` -> `z = slice_scatter(x, y)`, later uses of x become z; only where x has no other view by then."""
    if node.target is not aten.copy_.default or node.users:
        return False
    part, source = node.args[:2]
    if not isinstance(part, Node) or not isinstance(source, Node) or part.target is not aten.slice.Tensor:
        return False
    whole = part.args[0]
    assert isinstance(whole, Node)
    earlier = set(_until(node))
    others = [user for user in whole.users if _is_view(user) and user in earlier and user is not part]
    if _is_view(whole) or whole.op != "call_function" or others or list(part.users) != [node]:
        return False
    _, dim, start, end, step = arguments(part, 5)
    before, after = whole.meta.get("val"), source.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if [str(size) for size in part.meta["val"].shape] != [str(size) for size in after.shape]:
        return False  # copy_ broadcasts
    graph = node.graph
    with graph.inserting_before(node):
        if after.dtype != before.dtype:
            source = graph.call_function(aten.to.dtype, (source, before.dtype))
            source.meta["val"] = after.to(before.dtype)
        result = graph.call_function(aten.slice_scatter.default, (whole, source, dim or 0, start, end, step or 1))
    result.meta = {**node.meta, "val": before}
    whole.replace_all_uses_with(
        result, delete_user_cb=lambda user: user not in earlier and user is not result and user is not source
    )
    graph.erase_node(node)
    graph.erase_node(part)
    return True


def _until(node: Node) -> list[Node]:
    """The nodes before `node`, and itself."""
    nodes = []
    for other in node.graph.nodes:
        nodes.append(other)
        if other is node:
            break
    return nodes
