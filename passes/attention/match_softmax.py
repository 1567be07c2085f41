"""Attention written as operators: anchored at the softmax and walked outwards.

Up through casts, masks, softcap and scale to the product of query and key, and down through casts and inactive dropout to the
product with the value; never by a template of a whole trace. Views between `[B, H, Q, K]` and `[B * H, Q, K]` on the way move to
the factors; `repeat_kv` is folded into grouped heads."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from rewriter.passes.attention.normalize import derived
from rewriter.passes.attention.normalize import oriented_factors
from rewriter.passes.attention.normalize import oriented_product_with_value
from rewriter.passes.attention.normalize import split_batch_and_heads
from rewriter.passes.attention.site import Draft
from rewriter.passes.attention.site import MaskTerm
from rewriter.passes.attention.site import Refused
from rewriter.passes.attention.views import PASSIVE
from rewriter.passes.attention.views import PRODUCTS
from rewriter.passes.attention.views import SCORE_OPERATORS
from rewriter.passes.attention.views import VIEWS
from rewriter.passes.attention.views import factors
from rewriter.passes.attention.views import fold_repeated_heads
from rewriter.passes.attention.views import joins_heads
from rewriter.passes.attention.views import number_of
from rewriter.passes.attention.views import skip_casts
from rewriter.passes.attention.views import splits_heads
from rewriter.passes.graph.nodes import arguments
from rewriter.passes.graph.nodes import rank
from rewriter.passes.graph.nodes import shape
from torch.fx import Node

aten = torch.ops.aten


def product_above(node: Node) -> Node | None:
    """The product of two activations that a softmax's argument is made from, through elementwise operators."""
    stack, seen = [node.args[0]], set()
    while stack:
        top = stack.pop()
        if not isinstance(top, Node) or top in seen:
            continue
        seen.add(top)
        if top.target in PRODUCTS:
            if all(rank(operand) >= 3 for operand in factors(top)):
                return top
        elif top.target in SCORE_OPERATORS:
            stack.extend(top.all_input_nodes)
    return None


def match_softmax(site: Draft) -> None:
    softmax = site.node
    dim = softmax.args[1]
    if dim not in (-1, rank(softmax) - 1):
        raise Refused(f"softmax over dimension {dim}, expected the last")
    product = product_above(softmax)
    assert product is not None
    site.scale = 1.0
    views = _walk_up(site, softmax.args[0], product)  # type: ignore[arg-type]
    views += _walk_down(site, softmax)
    site.path.extend(factors(product))
    site.query, site.key = oriented_factors(product)
    if views:
        split_batch_and_heads(site, views)
    assert site.key is not None and site.value is not None
    site.key = fold_repeated_heads(site, site.key)
    site.value = fold_repeated_heads(site, site.value)


def _walk_up(site: Draft, node: Node, product: Node) -> list[Node]:
    """From the softmax to the product: masks first, then a softcap, then scales; returns the views between ranks 3 and 4."""
    scaled = False
    views = []
    site.path.append(product)
    while node is not product:
        site.path.append(node)
        target = node.target
        if splits_heads(node) or joins_heads(node):
            views.append(node)
            node = node.args[0]  # type: ignore[assignment]
            continue
        if target in PASSIVE:
            node = node.args[0]  # type: ignore[assignment]
            continue
        if target in VIEWS:
            raise Refused("a view between the product and the softmax changes more than batch and heads")
        if (shifted := _without_maximum(node)) is not None:
            if site.sinks is not None or site.softcap is not None:
                raise Refused("the logits' maximum is taken away before a softcap or sinks, which see that")
            node = shifted
            continue
        if target is aten.cat.default:
            if scaled or site.masks or site.sinks is not None:
                raise Refused("logits are joined to the scores before a mask, scale or softcap")
            node, site.sinks = _split_sinks(site, node, product)
            continue
        scores, other, on_left = _split_scores(node, product)
        if target in (
            aten.add.Tensor,
            aten.sub.Tensor,
            aten.masked_fill.Scalar,
            aten.masked_fill.Tensor,
        ) or "where" in str(target):
            term = _mask_term(node, other, on_left)
            if scaled:
                if term.kind != "add" or site.softcap is not None:
                    raise Refused("a mask is applied before the scale or softcap")
                term = _scaled_term(term, node, site.scale)
            site.masks.append(term)
        elif target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            factor = number_of(other)
            if factor is None or (not on_left and "div" in str(target)):
                raise Refused("the logits are scaled by a tensor, which is not a number")
            inner = skip_casts(scores)
            if inner.target is aten.tanh.default and "mul" in str(target):
                if scaled or site.softcap is not None:
                    raise Refused("a softcap is followed by another scale")
                site.softcap = factor
                node = inner.args[0]  # type: ignore[assignment]
                divided, cap, _ = _split_scores(node, product) if node is not product else (node, None, True)
                divisor = number_of(cap)
                if divisor is None or "div" not in str(node.target) or not math.isclose(divisor, factor):
                    raise Refused("tanh of the logits is not of the form softcap * tanh(logits / softcap)")
                scores = divided
            else:
                assert site.scale is not None
                site.scale *= 1 / factor if "div" in str(target) else factor
            scaled = True
        else:
            raise Refused(f"{target} between the product and the softmax is not understood")
        node = scores
    if product.target is aten.baddbmm.default:
        if product.kwargs.get("beta", 1) != 1 or scaled:
            raise Refused("baddbmm with a factor")
        alpha: Any = product.kwargs.get("alpha", 1)
        site.scale = (site.scale or 1.0) * alpha
        site.masks.append(MaskTerm("add", product.args[0]))  # type: ignore[arg-type]
    return views


def _without_maximum(node: Node) -> Node | None:
    """x of `x - x.max(-1)`, which the softmax does not see."""
    if node.target is not aten.sub.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    scores, maximum = node.args[:2]
    if not isinstance(scores, Node) or not isinstance(maximum, Node):
        return None
    last = rank(scores) - 1
    reduced: Any = maximum.args[0] if maximum.target is operator.getitem and maximum.args[1] == 0 else maximum
    if (
        reduced.target not in (aten.max.dim, aten.amax.default)
        or len(reduced.args) < 3
        or reduced.args[0] is not scores
    ):
        return None
    dims = reduced.args[1] if reduced.target is aten.amax.default else [reduced.args[1]]
    return scores if reduced.args[2] and list(dims) in ([-1], [last]) else None


def _split_sinks(site: Draft, node: Node, product: Node) -> tuple[Node, Node]:
    """(the scores, sinks `[Hq]`) of scores with one more column, the same for all rows of a head."""
    parts, dim = node.args[0], (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))
    assert isinstance(parts, (list, tuple))
    if len(parts) != 2 or dim not in (-1, rank(node) - 1) or not _leads_to(parts[0], product):  # type: ignore[arg-type]
        raise Refused("other tensors are joined to the logits")
    scores, column = parts
    assert isinstance(scores, Node) and isinstance(column, Node)
    site.path.append(column)
    single = column
    while single.target in PASSIVE or single.target is aten.expand.default:
        single = single.args[0]  # type: ignore[assignment]
        site.path.append(single)
    heads = shape(scores)[1] if rank(scores) == 4 else None
    if [*shape(single)] != [1, heads, 1, 1] or shape(column)[-1] != 1:
        raise Refused("a column is joined to the logits that is not one number for each head")
    sinks = derived(single, aten.reshape.default, [-1], before=node)
    return scores, sinks


def _drops_sinks(node: Node) -> bool:
    """`weights[..., :-1]`"""
    if node.target is not aten.slice.Tensor:
        return False
    _, dim, start, end, step = arguments(node, 5)
    return dim in (-1, rank(node) - 1) and start in (None, 0) and end == -1 and step in (None, 1)


def _split_scores(node: Node, product: Node) -> tuple[Node, object, bool]:
    """(the argument that leads to the product, the other one, whether the first is on the left)."""
    operands = [a for a in node.args if isinstance(a, (Node, int, float))]
    leading = [a for a in operands if isinstance(a, Node) and _leads_to(a, product)]
    if len(leading) != 1:
        raise Refused(f"{node.name} uses the logits more than once")
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and node.kwargs.get("alpha", 1) != 1:
        raise Refused("a mask is added with a factor")
    others = [a for a in operands if a is not leading[0]]
    return leading[0], (others if len(others) != 1 else others[0]), operands[0] is leading[0]


def _leads_to(node: Node, product: Node) -> bool:
    stack, seen = [node], set()
    while stack:
        top = stack.pop()
        if top is product:
            return True
        if top not in seen and top.target in SCORE_OPERATORS:
            seen.add(top)
            stack.extend(top.all_input_nodes)
    return False


def _mask_term(node: Node, other: Any, on_left: bool) -> MaskTerm:
    if node.target is aten.add.Tensor:
        if not isinstance(other, Node):
            raise Refused("a number is added to the logits")
        return MaskTerm("add", other)
    if node.target is aten.sub.Tensor:
        if not isinstance(other, Node) or not on_left:
            raise Refused("the logits are taken from something, or a number from them")
        return MaskTerm("add", derived(other, aten.neg.default, before=node))
    if "masked_fill" in str(node.target):
        mask, fill = other
        kind = "drop"
    else:  # where(condition, scores, fill) or where(condition, fill, scores)
        mask, fill = other
        kind = "keep" if node.args[1] is not fill else "drop"
    value = number_of(fill)
    if value is None or not (value <= -1e4):
        raise Refused(f"hidden logits are set to {value}, expected -inf or a value of at most -1e4")
    lowest = torch.finfo(node.meta["val"].dtype).min
    return MaskTerm(kind, mask, -math.inf if value <= lowest else value)


def _scaled_term(term: MaskTerm, node: Node, scale: float | None) -> MaskTerm:
    """`(scores + bias) * scale`: the bias as it comes to the softmax."""
    return MaskTerm(term.kind, derived(term.node, aten.mul.Tensor, scale, before=node))


def _walk_down(site: Draft, node: Node) -> list[Node]:
    """From the softmax to the product with the value, the weights may be used for nothing else; returns the views, as above."""
    dropped = False
    views = []
    while True:
        site.path.append(node)
        users = list(node.users)
        if len(users) != 1:
            raise Refused("the attention weights are returned or used elsewhere")
        user = users[0]
        if site.sinks is not None and not dropped:
            if not _drops_sinks(user):
                raise Refused("the weights of the joined column are used")
            node, dropped = user, True
        elif splits_heads(user) or joins_heads(user):
            views.append(user)
            node = user
        elif user.target in PASSIVE:
            node = user
        elif user.target in (aten.dropout.default, aten.native_dropout.default):
            raise Refused(f"dropout {user.args[1]} is active; call .eval() or set the attention dropout to 0")
        elif user.target in PRODUCTS and user.target is not aten.baddbmm.default:
            site.path.extend(factors(user))
            weights, value = oriented_product_with_value(user, node)
            if weights is not node:
                raise Refused("the attention weights are the right factor of a product")
            site.node, site.value = user, value
            return views
        else:
            raise Refused(f"the attention weights go to {user.target}, expected a product with the value")
