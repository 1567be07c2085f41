"""Normal form: what a site needs as `[B, H, S, D]` and the graph has otherwise, as new nodes.

The only editor among the matchers. New nodes have no users, so that a site that is refused, by a matcher or later, leaves the
graph as it was; the one change of what others read, `commit`, is made when a site is lowered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.attention.site import Draft
from rewriter.passes.attention.site import Refused
from rewriter.passes.attention.views import factors
from rewriter.passes.attention.views import joins_heads
from rewriter.passes.attention.views import same_sizes
from rewriter.passes.attention.views import splits_heads
from rewriter.passes.graph.nodes import rank
from rewriter.passes.graph.nodes import shape
from torch.fx import Node

aten = torch.ops.aten


def derived(
    node: Node,
    function: Any,
    *arguments: Any,
    before: Node | None = None,
    after: Node | None = None,
    sizes: tuple[Any, ...] | None = None,
) -> Node:
    """A new node `function(node, *arguments)`, before or after another one.

    Args:
        sizes: the values of the last argument, where that is a list of nodes and numbers.
    """
    graph = node.graph
    place = graph.inserting_after(after) if after is not None else graph.inserting_before(before)
    with place:
        result = graph.call_function(function, (node, *arguments))
    known = arguments if sizes is None else (*arguments[:-1], sizes)
    result.meta["val"] = function(node.meta["val"], *known)
    return result


def commit(site: AttentionSite) -> None:
    """What reads the model's own result reads a view of the site's, which lowering replaces."""
    if site.joined is not None:
        product, view = site.joined
        product.replace_all_uses_with(view, delete_user_cb=lambda user: user is not site.node)


def split_batch_and_heads(site: Draft, views: list[Node]) -> None:
    """Query, key, value, masks and result of a site whose scores are split into batch and heads on the way: as `[B, H, ...]`."""
    view = next((node for node in views if splits_heads(node)), None)
    if view is None:
        raise Refused("the logits are split into batch and heads by no view of their own")
    sizes: Any = view.args[2] if view.target is aten.unflatten.int else view.args[1]
    sizes, (batch, heads) = list(sizes[:2]), shape(view)[:2]
    flat = shape(view.args[0])[0]  # type: ignore[arg-type]
    for node in views:
        seen: Any = node if splits_heads(node) else node.args[0]
        if not same_sizes(seen, view, slice(2)):
            raise Refused("the logits are split into batch and heads in two ways")

    def split(node: Node) -> Node:
        if rank(node) != 3:
            return node
        if str(shape(node)[0]) != str(flat):
            raise Refused(f"{node.name} is repeated for all rows of the batch, or for all heads")
        if joins_heads(node) and same_sizes(node.args[0], view, slice(2)):  # type: ignore[arg-type]
            site.path.append(node)
            return node.args[0]  # type: ignore[return-value]
        after = node if node is site.node else None
        return derived(node, aten.unflatten.int, 0, sizes, before=site.node, after=after, sizes=(batch, heads))

    assert site.query is not None and site.key is not None and site.value is not None
    site.query, site.key, site.value = split(site.query), split(site.key), split(site.value)
    for place, term in enumerate(site.masks):
        if rank(term.node) == 3 and str(shape(term.node)[0]) not in ("1", str(heads)):  # those broadcast alike
            site.masks[place] = replace(term, node=split(term.node))
    if rank(site.node) == 3:
        product = site.node
        site.path.append(product)
        site.node = split(product)
        site.node.meta.update({name: value for name, value in product.meta.items() if name != "val"})
        site.joined = product, derived(site.node, aten.flatten.using_ints, 0, 1, after=site.node)


def oriented_factors(product: Node) -> tuple[Node, Node]:
    """Query and key `[..., S, D]` of the logits' product; views are inserted where the graph has none."""
    if product.target is aten.einsum.default:
        return _einsum_factors(product, transpose_right=True)
    query, transposed = factors(product)
    last = {rank(transposed) - 2, rank(transposed) - 1}
    dims: Any = transposed.args[1:]
    if transposed.target is aten.transpose.int and {d % rank(transposed) for d in dims} == last:
        return query, transposed.args[0]  # type: ignore[return-value]
    return query, derived(transposed, aten.transpose.int, -2, -1, after=transposed)


def oriented_product_with_value(product: Node, weights: Node) -> tuple[Node, Node]:
    if product.target is not aten.einsum.default:
        left, right = factors(product)
        return left, right
    left, right = factors(product)
    if left is not weights:
        raise Refused("the attention weights are the right factor of an einsum")
    _, value = _einsum_factors(product, transpose_right=False)
    return left, value


def _einsum_factors(product: Node, *, transpose_right: bool) -> tuple[Node, Node]:
    """The factors of an einsum as `[batch..., M, C]` and `[batch..., N, C]` (or `[batch..., C, N]`).

    The result must be `[batch..., M, N]` as it stands, so that it can be replaced.
    """
    equation = str(product.args[0]).replace(" ", "")
    inputs, result = equation.split("->") if "->" in equation else (equation, "")
    left, right = inputs.split(",")
    contracted = set(left) & set(right) - set(result)
    batch = [c for c in result if c in left and c in right]
    rows, columns = ([c for c in result if c in own and c not in batch] for own in (left, right))
    simple = len(contracted) == len(rows) == len(columns) == 1 and "." not in equation
    if not simple or result != "".join([*batch, *rows, *columns]):
        raise Refused(f"einsum {equation!r} is not a batched matrix product with the result in order")
    inner = contracted.pop()
    targets = (
        [*batch, rows[0], inner],
        [*batch, columns[0], inner] if transpose_right else [*batch, inner, columns[0]],
    )
    oriented = []
    for node, letters, wanted in zip(factors(product), (left, right), targets, strict=True):
        order = [letters.index(c) for c in wanted]
        oriented.append(derived(node, aten.permute.default, order, before=product))
    return oriented[0], oriented[1]
