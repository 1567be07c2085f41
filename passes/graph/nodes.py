"""Reading nodes: shapes, ranks and arguments from a node's metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node


def shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def arguments(node: Node, count: int) -> list[Any]:
    """The first `count` positional arguments, None for those left out."""
    given: list[Any] = list(node.args[:count])
    return given + [None] * (count - len(given))


def rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def layer_path(node: Node) -> str:
    """Qualified name of the layer that a node is of: its module, up to the first number in the name, or all of it."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0].removeprefix("L['model']").removeprefix("L['self']").removeprefix(".") if stack else ""
    found = re.match(r".*?\.\d+(?=\.|$)", path)
    return found[0] if found else path


def writes(node: Node) -> bool:
    """Whether an operator changes one of its inputs in place."""
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def owner(node: Node) -> Node:
    """Of a view, whose memory it is."""
    while isinstance(node.target, torch._ops.OpOverload):
        results = node.target._schema.returns
        if not results or results[0].alias_info is None or not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    return node


def above(nodes: Iterable[Node]) -> list[Node]:
    """The nodes and all that they are computed from."""
    seen: dict[Node, None] = {}
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen[node] = None
            stack.extend(node.all_input_nodes)
    return list(seen)


def is_bool(node: object) -> bool:
    return isinstance(node, Node) and isinstance(v := node.meta.get("val"), torch.Tensor) and v.dtype == torch.bool


def may_attend(target: Any) -> bool:
    """Whether a call makes weights, or is a whole attention, by its name: where no pass looks, neither may stand."""
    name = str(getattr(target, "__name__", target))
    return "softmax" in name or "attention" in name or "multi_head" in name
