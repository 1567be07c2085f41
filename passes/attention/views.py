"""Operators through which logits, weights and heads are followed."""

from __future__ import annotations

import operator

import torch
from rewriter.passes.attention.site import Draft
from rewriter.passes.graph.nodes import arguments
from rewriter.passes.graph.nodes import rank
from rewriter.passes.graph.nodes import shape
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten


CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default}


PASSIVE = CASTS | {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
}


PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}


SCORE_OPERATORS = PASSIVE | {
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.tanh.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.view.default,
    aten.reshape.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.permute.default,
    aten.cat.default,
}


def factors(product: Node) -> list[Node]:
    if product.target is aten.einsum.default:
        return list(product.args[1])  # type: ignore[arg-type]
    return list(product.args[-2:])  # type: ignore[arg-type]


def number_of(argument: object) -> float | None:
    """A Python number, or a 0-dim tensor made from one."""
    if isinstance(argument, (int, float)):
        return float(argument)
    if isinstance(argument, Node) and rank(argument) == 0:
        if argument.target in (aten.full.default, aten.scalar_tensor.default):
            value = argument.args[1 if argument.target is aten.full.default else 0]
            return float(value) if isinstance(value, (int, float)) else None
        if argument.target in PASSIVE or argument.target in (aten.lift_fresh_copy.default, aten.detach.default):
            return number_of(argument.args[0])
        if argument.target in (aten.sqrt.default, aten.rsqrt.default):
            inner = number_of(argument.args[0])
            return None if inner is None else inner**0.5 if argument.target is aten.sqrt.default else inner**-0.5
        if argument.op == "get_attr":
            value = operator.attrgetter(str(argument.target))(argument.graph.owning_module)
            return float(value) if isinstance(value, torch.Tensor) else None
    return None


def skip_casts(node: Node) -> Node:
    while node.target in PASSIVE:
        node = node.args[0]  # type: ignore[assignment]
    return node


def splits_heads(node: Node) -> bool:
    """A view of `[B * H, M, N]` as `[B, H, M, N]`."""
    return _is_view_of_heads(node, 3, 4)


def joins_heads(node: Node) -> bool:
    """A view of `[B, H, M, N]` as `[B * H, M, N]`."""
    return _is_view_of_heads(node, 4, 3)


def _is_view_of_heads(node: Node, before: int, after: int) -> bool:
    source = node.args[0] if node.target in VIEWS else None
    if not isinstance(source, Node) or (rank(source), rank(node)) != (before, after):
        return False
    if node.target in (aten.unflatten.int, aten.flatten.using_ints) and arguments(node, 2)[1] not in (0, -before):
        return False
    return same_sizes(source, node, slice(-2, None))


def same_sizes(one: Node, other: Node, dims: slice) -> bool:
    sizes, others = shape(one)[dims], shape(other)[dims]
    return len(sizes) == len(others) and all(statically_known_true(a == b) for a, b in zip(sizes, others, strict=True))


VIEWS = {
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}


def fold_repeated_heads(site: Draft, node: Node) -> Node:
    """`[B, Hkv, S, D]` behind a `repeat_kv`, what is between them on the site's path; the node itself where there is none."""
    found = _behind_repeated_heads(node)
    while node is not found:
        site.path.append(node)
        node = node.all_input_nodes[0]
    return found


def _behind_repeated_heads(node: Node) -> Node:
    source = node
    while source.target in (aten.contiguous.default, aten.clone.default):
        source = source.args[0]  # type: ignore[assignment]
    if rank(source) != 4:
        return node
    if source.target is aten.repeat_interleave.self_int:
        dim = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim")
        return source.args[0] if dim in (1, -3) else node  # type: ignore[return-value]
    if source.target in VIEWS:
        expanded = source.args[0]
        while isinstance(expanded, Node) and expanded.target in (aten.clone.default, aten.contiguous.default):
            expanded = expanded.args[0]
        if isinstance(expanded, Node) and expanded.target is aten.expand.default and rank(expanded) == 5:
            single = expanded.args[0]
            if isinstance(single, Node) and single.target is aten.unsqueeze.default and single.args[1] in (2, -3):
                original = single.args[0]
                assert isinstance(original, Node)
                heads = shape(original)[1] * shape(expanded)[2]
                if heads == shape(source)[1] and str(shape(original)[2:]) == str(shape(source)[2:]):
                    return original
    return node
