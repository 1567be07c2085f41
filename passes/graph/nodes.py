"""Reading nodes: shapes, ranks and arguments from a node's metadata."""

from __future__ import annotations

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
