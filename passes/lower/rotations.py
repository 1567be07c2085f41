"""Rotations: the part of a graph by which a query or key depends on positions, found so that it can be run again.

A key that is numbered by its place in a cache changes its number while it lives, so it is stored as it was before it met its
position, and rotated when it is read. What lies between is a piece of the graph: all nodes that depend on `position_ids`
and lead to the key. It is not matched against a known form of rotary embedding (arXiv 2104.09864): whatever it is, it is
run again on other keys and positions.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph
from torch.fx import Node

aten = torch.ops.aten


class Unrotatable(Exception):
    """Why a query or key cannot be given other positions."""


@dataclass(frozen=True)
class Rotation:
    """`result = rotate(content, position_ids)`, a piece of a graph.

    Attributes:
        content: what the rotation is applied to, one row per token.
        token_dim: dimension of the tokens in `content`: 2 for `[B, H, S, D]`, 1 for `[B, S, H, D]`.
        positions: int64 `[B, S]`.
        result: the query or key of a site, `[B, H, S, D]`.
        angle_nodes: the nodes that depend on positions and not on the content, in order.
        angles: those of them that the content meets: sines and cosines, say.
        nodes: the other nodes up to the result, in order.
        others: what both read besides: frequencies, sizes of the batch.
    """

    content: Node
    token_dim: int
    positions: Node
    result: Node
    angle_nodes: tuple[Node, ...]
    angles: tuple[Node, ...]
    nodes: tuple[Node, ...]
    others: tuple[Node, ...]

    def copy_angles(self, graph: Graph, places: Node, copies: Mapping[Node, Node]) -> tuple[Node, ...]:
        """Nodes for the angles at other positions, at the graph's insertion point.

        Args:
            places: int64 `[B, N]`.
            copies: this graph's nodes in `graph`, where that is another one.
        """
        env = {**{n: copies.get(n, n) for n in self.others}, self.positions: places}
        self._copy(graph, self.angle_nodes, env, (places, 1))
        return tuple(env[node] for node in self.angles)

    def copy(self, graph: Graph, content: Node, angles: Sequence[Node], copies: Mapping[Node, Node]) -> Node:
        """A node for the rotated tensor `[B, H, N, D]`, at the graph's insertion point.

        Args:
            content: `[B, H, N, D]`, whatever the layout in this graph.
            angles: from `copy_angles`.
        """
        env = {n: copies.get(n, n) for n in self.others}
        env.update(zip(self.angles, angles, strict=True))
        env[self.content] = self.by_head(graph, content)
        self._copy(graph, self.nodes, env, (env[self.content], self.token_dim))
        return env[self.result]

    def by_head(self, graph: Graph, content: Node) -> Node:
        """`[B, H, S, D]` from the content's own layout, and back."""
        return content if self.token_dim == 2 else graph.call_function(aten.transpose.int, (content, 1, 2))

    def _copy(self, graph: Graph, nodes: Sequence[Node], env: dict[Node, Node], counted: tuple[Node, int]) -> None:
        tokens = _token_symbol(self.positions)
        for node in nodes:
            if _is(node.meta.get("val"), tokens):
                env[node] = graph.call_function(aten.sym_size.int, counted)
            else:
                env[node] = graph.node_copy(node, env.__getitem__)


def find_rotation(result: Node, positions: Node, value: Node, attentions: Collection[Node]) -> Rotation:
    """The rotation that makes a site's query or key.

    Args:
        value: the site's value, which must not depend on positions.
        attentions: the outputs of all sites; what depends on positions through them alone does not count.

    Raises:
        Unrotatable: with the reason.
    """
    placed = _reached_from(positions, attentions)
    if value in placed:
        raise Unrotatable(
            "positions are part of what attention reads (learned or added to the embeddings), not a rotation"
        )
    if result not in placed:
        raise Unrotatable("query and key do not depend on position_ids")
    tokens = _token_symbol(positions)
    inside: set[Node] = set()
    frontier: set[Node] = set()
    others: set[Node] = set()

    def enter(node: Node) -> None:
        stack = [node]
        while stack:
            top = stack.pop()
            if top in inside or top is positions:
                continue
            inside.add(top)
            for source in top.all_input_nodes:
                if source is positions or source in placed or _mentions(source, tokens):
                    stack.append(source)
                elif _is_several(source, tokens):
                    stack.append(source)  # pieces of one tensor: what they are pieces of
                elif _has_tokens(source, tokens):
                    frontier.add(source)
                else:
                    others.add(source)

    enter(result)
    order = {node: i for i, node in enumerate(result.graph.nodes)}
    while len(frontier) > 1:  # views of one tensor: what they are views of
        last = max(frontier, key=order.__getitem__)
        if last.op != "call_function":
            break
        frontier.remove(last)
        enter(last)
    if len(frontier) != 1:
        raise Unrotatable(f"they are made from {len(frontier)} tensors of the tokens, expected one")
    (content,) = frontier
    sizes = list(content.meta["val"].shape)
    token_dims = [d for d, size in enumerate(sizes) if _is(size, tokens)]
    if len(sizes) != 4 or token_dims not in ([1], [2]):
        raise Unrotatable(f"what is rotated has shape {sizes}, expected [B, H, S, D] or [B, S, H, D]")
    met = _reached_from(content, attentions)
    nodes = sorted(inside, key=order.__getitem__)
    for node in nodes:
        size = node.meta.get("val")
        if node.op == "placeholder" and not _is(size, tokens):
            raise Unrotatable(f"the rotation depends on {node.name}, a size that is not understood")
    # Sizes are needed on both sides.
    rotating = tuple(n for n in nodes if n in met or _mentions(n, tokens))
    turning = tuple(n for n in nodes if n not in met)
    read = {source for n in rotating for source in n.all_input_nodes}
    angles = tuple(n for n in (positions, *turning) if n in read and not _mentions(n, tokens))
    everything = tuple(sorted(others, key=order.__getitem__))
    return Rotation(content, token_dims[0], positions, result, turning, angles, rotating, everything)


def _reached_from(node: Node, attentions: Collection[Node]) -> set[Node]:
    seen: set[Node] = set()
    stack = [node]
    while stack:
        top = stack.pop()
        if top not in seen and top not in attentions:
            seen.add(top)
            stack.extend(top.users)
    return seen


def _token_symbol(positions: Node) -> sympy.Expr:
    size = positions.meta["val"].size(1)
    if not isinstance(size, torch.SymInt):
        raise Unrotatable("the number of tokens is fixed in this graph")
    return size.node.expr


def _is(size: Any, tokens: sympy.Expr) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr == tokens)


def _mentions(node: Node, tokens: sympy.Expr) -> bool:
    """Whether a node is an integer made from the number of tokens."""
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt) and tokens in value.node.expr.free_symbols


def _has_tokens(node: Node, tokens: sympy.Expr) -> bool:
    return _tensor_has_tokens(node.meta.get("val"), tokens)


def _is_several(node: Node, tokens: sympy.Expr) -> bool:
    """Whether a node gives several tensors of the tokens, as `chunk`, `split` and `unbind` do."""
    value = node.meta.get("val")
    return isinstance(value, (list, tuple)) and any(_tensor_has_tokens(part, tokens) for part in value)


def _tensor_has_tokens(value: Any, tokens: sympy.Expr) -> bool:
    return isinstance(value, Tensor) and any(
        isinstance(s, torch.SymInt) and tokens in s.node.expr.free_symbols for s in value.shape
    )
