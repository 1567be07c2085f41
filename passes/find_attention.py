"""Find attention: every softmax of a product of activations, and every `scaled_dot_product_attention`.

Anchored at the softmax and walked outwards through casts, masks, softcap and scale up to the product of query and
key, and through casts and inactive dropout down to the product with the value; never by a template of a whole trace.
Views between `[B, H, Q, K]` and `[B * H, Q, K]` on the way move to the factors; `repeat_kv` is folded into grouped
heads. A site that is found but cannot be used is refused with its reason.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import Any

import torch
from rewriter.passes.index_functions import arguments
from rewriter.passes.index_functions import rank
from rewriter.passes.index_functions import shape
from torch.fx import GraphModule
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskTerm:
    """One mask of a site.

    Attributes:
        kind: "keep" (bool, true where visible), "drop" (bool, true where hidden) or "add" (added to the logits).
        node: the mask, broadcastable to `[B, Hq, Q, K]`.
        fill: what hidden logits are set to, of a "keep" or "drop"; -inf for all that nothing can be lower than.
    """

    kind: str
    node: Node
    fill: float = -math.inf


@dataclass
class AttentionSite:
    """One attention of a graph.

    Attributes:
        node: the attention's output; `[B, Hq, Q, Dv]`, or `[N, Q, Dv]` for inputs of rank 3.
        form: "sdpa" or "eager"; other forms are refused.
        query, key, value: `[B, Hq, Q, D]`, `[B, Hkv, K, D]`, `[B, Hkv, K, Dv]` (or rank 3), heads not repeated.
        scale: factor of the products; None for `1 / sqrt(D)`.
        softcap: None for none.
        sinks: `[Hq]`, a logit per query head that joins the denominator only; None for none.
        masks: all of them apply.
        is_causal: also causal, top-left aligned.
        path: the nodes between the product of query and key and the output.
        reason: why the site is refused; None while it is not.
    """

    node: Node
    form: str
    query: Node | None = None
    key: Node | None = None
    value: Node | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Node | None = None
    masks: list[MaskTerm] = field(default_factory=list)
    is_causal: bool = False
    path: list[Node] = field(default_factory=list)
    reason: str | None = None

    @property
    def module_path(self) -> str:
        """Qualified name of the innermost module that made the site."""
        stack = list(self.node.meta.get("nn_module_stack", {}).values())
        if not stack:
            return ""
        path = stack[-1][0]
        for prefix in ("L['self'].", "L['model'].", "L['self']", "L['model']", "model."):
            if path.startswith(prefix):
                path = path[len(prefix) :]
                break
        return path.replace("_modules['", "").replace("']", "")


class Refused(Exception):
    """Why something that looks like attention is not replaced."""


_FUSED = (aten._native_multi_head_attention.default, aten._transformer_encoder_layer_fwd.default)


def find_attention(module: GraphModule, modified: frozenset[Node] = frozenset()) -> list[AttentionSite]:
    """All sites, in the order of the graph; the refused ones carry their reason.

    Args:
        modified: nodes that an in-place operation changes, from `canonicalize`.
    """
    sites = []
    for node in list(module.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            sites.append(_checked(_match_sdpa, AttentionSite(node, "sdpa")))
        elif node.target in (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default):
            if _product_above(node) is not None:
                sites.append(_checked(_match_eager, AttentionSite(node, "eager")))
            elif (strange := _strange_operator_above(node)) is not None:
                reason = f"{strange.target} between the product and the softmax is not understood"
                sites.append(AttentionSite(node, "eager", reason=reason))
        elif node.target in _WEIGHTS and _strange_operator_above(node) is not None:
            reason = f"its weights are made of the logits by {node.target}, expected a softmax"
            sites.append(AttentionSite(node, "eager", reason=reason))
        elif node.target in _FUSED:
            reason = (
                "torch's fused inference operator hides its query and key; "
                "call torch.backends.mha.set_fastpath_enabled(False)"
            )
            sites.append(AttentionSite(node, "fused", reason=reason))
        elif isinstance(node.target, torch._ops.OpOverload) and re.search("attention|attn", node.target.name()):
            reason = f"{node.target} is a kernel that hides its logits; call scaled_dot_product_attention"
            sites.append(AttentionSite(node, "kernel", reason=reason))
        elif node.target is torch.ops.higher_order.autograd_function_apply and _has_softmax(module, node.args[0]):
            reason = (
                "it is inside an autograd.Function, whose backward is the model's own; call it under torch.no_grad()"
            )
            sites.append(AttentionSite(node, "autograd.Function", reason=reason))
    for site in sites:
        changed = [node for node in (site.query, site.key, site.value, *site.path) if node in modified]
        if changed and site.reason is None:
            site.reason = f"{changed[0].name} is modified in place, through a view or where others see it"
    return sites


def _has_softmax(module: GraphModule, body: Any) -> bool:
    """Whether a forward of an `autograd.Function`, a submodule at the node `body`, has what attention has."""
    inner = module.get_submodule(str(body.target))
    names = (
        str(getattr(n.target, "__name__", n.target))
        for m in inner.modules()
        if isinstance(m, GraphModule)
        for n in m.graph.nodes
    )
    return any("softmax" in name or "scaled_dot_product" in name for name in names)


def _checked(match: Callable[[AttentionSite], None], site: AttentionSite) -> AttentionSite:
    try:
        match(site)
        _check_shapes(site)
    except Refused as refusal:
        site.reason = str(refusal)
    return site


def _match_sdpa(site: AttentionSite) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    arguments = {**dict(zip(names, site.node.args, strict=False)), **site.node.kwargs}
    site.query = arguments["query"]  # type: ignore[assignment]
    site.key = _fold_repeated_heads(site, arguments["key"])  # type: ignore[arg-type]
    site.value = _fold_repeated_heads(site, arguments["value"])  # type: ignore[arg-type]
    site.scale = arguments.get("scale")  # type: ignore[assignment]
    site.is_causal = bool(arguments.get("is_causal", False))
    if arguments.get("dropout_p", 0.0) != 0.0:
        raise Refused(f"dropout {arguments['dropout_p']} is active; call .eval() or set the attention dropout to 0")
    mask = arguments.get("attn_mask")
    if isinstance(mask, Node):
        site.masks = [MaskTerm("keep" if mask.meta["val"].dtype == torch.bool else "add", mask)]


_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default}
_PASSIVE = _CASTS | {
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
}
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
_SCORE_OPERATORS = _PASSIVE | {
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


def _product_above(node: Node) -> Node | None:
    """The product of two activations that a softmax's argument is made from, through elementwise operators."""
    stack, seen = [node.args[0]], set()
    while stack:
        top = stack.pop()
        if not isinstance(top, Node) or top in seen:
            continue
        seen.add(top)
        if top.target in _PRODUCTS:
            if all(rank(operand) >= 3 for operand in _factors(top)):
                return top
        elif top.target in _SCORE_OPERATORS:
            stack.extend(top.all_input_nodes)
    return None


_WEIGHTS = {aten.exp.default, aten.exp2.default, aten.sigmoid.default}
"""What makes weights of logits where no softmax does: half of a softmax, or another kind of attention."""


def _strange_operator_above(node: Node) -> Node | None:
    """The operator because of which a product of activations is not seen to make weights: it keeps the logits' last two sizes.

    The node itself, where it is no softmax and the product is above it.
    """
    stack: list[tuple[Any, Node | None]] = [(node.args[0], node if node.target in _WEIGHTS else None)]
    seen = set()
    while stack:
        top, strange = stack.pop()
        if not isinstance(top, Node) or top in seen or top.op != "call_function":
            continue
        seen.add(top)
        if top.target in _PRODUCTS and strange is not None and not any(map(_is_weight, _factors(top))):
            return strange
        if top.target not in _SCORE_OPERATORS:
            value = top.meta.get("val")
            if not isinstance(value, torch.Tensor) or value.dim() < 3 or not _same_sizes(top, node, slice(-2, None)):
                continue
            strange = strange or top
        stack.extend((source, strange) for source in top.all_input_nodes)
    return None


def _is_weight(factor: Node) -> bool:
    """Whether a factor has no rows of its own, or is a parameter, as the weights of a mixture or a block-diagonal layer are."""
    few = rank(factor) < 3
    while factor.target in _PASSIVE | _VIEWS | {aten.expand.default} and isinstance(factor.args[0], Node):
        factor = factor.args[0]
    return few or factor.op == "get_attr" or factor.meta.get("kind") in ("parameter", "buffer")


def _factors(product: Node) -> list[Node]:
    if product.target is aten.einsum.default:
        return list(product.args[1])  # type: ignore[arg-type]
    return list(product.args[-2:])  # type: ignore[arg-type]


def _match_eager(site: AttentionSite) -> None:
    softmax = site.node
    dim = softmax.args[1]
    if dim not in (-1, rank(softmax) - 1):
        raise Refused(f"softmax over dimension {dim}, expected the last")
    product = _product_above(softmax)
    assert product is not None
    site.scale = 1.0
    views = _walk_up(site, softmax.args[0], product)  # type: ignore[arg-type]
    views += _walk_down(site, softmax)
    site.path.extend(_factors(product))
    site.query, site.key = _oriented_factors(product)
    if views:
        _see_heads(site, views)
    assert site.key is not None and site.value is not None
    site.key = _fold_repeated_heads(site, site.key)
    site.value = _fold_repeated_heads(site, site.value)


def _walk_up(site: AttentionSite, node: Node, product: Node) -> list[Node]:
    """From the softmax to the product: masks first, then a softcap, then scales; returns the views between ranks 3 and 4."""
    scaled = False
    views = []
    site.path.append(product)
    while node is not product:
        site.path.append(node)
        target = node.target
        if _splits_heads(node) or _joins_heads(node):
            views.append(node)
            node = node.args[0]  # type: ignore[assignment]
            continue
        if target in _PASSIVE:
            node = node.args[0]  # type: ignore[assignment]
            continue
        if target in _VIEWS:
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
            factor = _number(other)
            if factor is None or (not on_left and "div" in str(target)):
                raise Refused("the logits are scaled by a tensor, which is not a number")
            inner = _skip_casts(scores)
            if inner.target is aten.tanh.default and "mul" in str(target):
                if scaled or site.softcap is not None:
                    raise Refused("a softcap is followed by another scale")
                site.softcap = factor
                node = inner.args[0]  # type: ignore[assignment]
                divided, cap, _ = _split_scores(node, product) if node is not product else (node, None, True)
                divisor = _number(cap)
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


def _split_sinks(site: AttentionSite, node: Node, product: Node) -> tuple[Node, Node]:
    """(the scores, sinks `[Hq]`) of scores with one more column, the same for all rows of a head."""
    parts, dim = node.args[0], (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))
    assert isinstance(parts, (list, tuple))
    if len(parts) != 2 or dim not in (-1, rank(node) - 1) or not _leads_to(parts[0], product):  # type: ignore[arg-type]
        raise Refused("other tensors are joined to the logits")
    scores, column = parts
    assert isinstance(scores, Node) and isinstance(column, Node)
    site.path.append(column)
    single = column
    while single.target in _PASSIVE or single.target is aten.expand.default:
        single = single.args[0]  # type: ignore[assignment]
        site.path.append(single)
    heads = shape(scores)[1] if rank(scores) == 4 else None
    if [*shape(single)] != [1, heads, 1, 1] or shape(column)[-1] != 1:
        raise Refused("a column is joined to the logits that is not one number for each head")
    with node.graph.inserting_before(node):
        sinks = node.graph.call_function(aten.reshape.default, (single, [-1]))
    sinks.meta["val"] = single.meta["val"].reshape([-1])
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
        if top not in seen and top.target in _SCORE_OPERATORS:
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
        with node.graph.inserting_before(node):
            negative = node.graph.call_function(aten.neg.default, (other,))
        negative.meta["val"] = -other.meta["val"]
        return MaskTerm("add", negative)
    if "masked_fill" in str(node.target):
        mask, fill = other
        kind = "drop"
    else:  # where(condition, scores, fill) or where(condition, fill, scores)
        mask, fill = other
        kind = "keep" if node.args[1] is not fill else "drop"
    value = _number(fill)
    if value is None or not (value <= -1e4):
        raise Refused(f"hidden logits are set to {value}, expected -inf or a value of at most -1e4")
    lowest = torch.finfo(node.meta["val"].dtype).min
    return MaskTerm(kind, mask, -math.inf if value <= lowest else value)


def _scaled_term(term: MaskTerm, node: Node, scale: float | None) -> MaskTerm:
    """`(scores + bias) * scale`: the bias as it comes to the softmax."""
    with node.graph.inserting_before(node):
        scaled = node.graph.call_function(aten.mul.Tensor, (term.node, scale))
    scaled.meta["val"] = term.node.meta["val"] * scale
    return MaskTerm(term.kind, scaled)


def _number(argument: object) -> float | None:
    """A Python number, or a 0-dim tensor made from one."""
    if isinstance(argument, (int, float)):
        return float(argument)
    if isinstance(argument, Node) and rank(argument) == 0:
        if argument.target in (aten.full.default, aten.scalar_tensor.default):
            value = argument.args[1 if argument.target is aten.full.default else 0]
            return float(value) if isinstance(value, (int, float)) else None
        if argument.target in _PASSIVE or argument.target in (aten.lift_fresh_copy.default, aten.detach.default):
            return _number(argument.args[0])
        if argument.target in (aten.sqrt.default, aten.rsqrt.default):
            inner = _number(argument.args[0])
            return None if inner is None else inner**0.5 if argument.target is aten.sqrt.default else inner**-0.5
        if argument.op == "get_attr":
            value = operator.attrgetter(str(argument.target))(argument.graph.owning_module)
            return float(value) if isinstance(value, torch.Tensor) else None
    return None


def _skip_casts(node: Node) -> Node:
    while node.target in _PASSIVE:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _walk_down(site: AttentionSite, node: Node) -> list[Node]:
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
        elif _splits_heads(user) or _joins_heads(user):
            views.append(user)
            node = user
        elif user.target in _PASSIVE:
            node = user
        elif user.target in (aten.dropout.default, aten.native_dropout.default):
            raise Refused(f"dropout {user.args[1]} is active; call .eval() or set the attention dropout to 0")
        elif user.target in _PRODUCTS and user.target is not aten.baddbmm.default:
            site.path.extend(_factors(user))
            weights, value = _oriented_product_with_value(user, node)
            if weights is not node:
                raise Refused("the attention weights are the right factor of a product")
            site.node, site.value = user, value
            return views
        else:
            raise Refused(f"the attention weights go to {user.target}, expected a product with the value")


def _splits_heads(node: Node) -> bool:
    """A view of `[B * H, M, N]` as `[B, H, M, N]`."""
    return _is_view_of_heads(node, 3, 4)


def _joins_heads(node: Node) -> bool:
    """A view of `[B, H, M, N]` as `[B * H, M, N]`."""
    return _is_view_of_heads(node, 4, 3)


def _is_view_of_heads(node: Node, before: int, after: int) -> bool:
    source = node.args[0] if node.target in _VIEWS else None
    if not isinstance(source, Node) or (rank(source), rank(node)) != (before, after):
        return False
    if node.target in (aten.unflatten.int, aten.flatten.using_ints) and arguments(node, 2)[1] not in (0, -before):
        return False
    return _same_sizes(source, node, slice(-2, None))


def _same_sizes(one: Node, other: Node, dims: slice) -> bool:
    sizes, others = shape(one)[dims], shape(other)[dims]
    return len(sizes) == len(others) and all(statically_known_true(a == b) for a, b in zip(sizes, others, strict=True))


def _see_heads(site: AttentionSite, views: list[Node]) -> None:
    """Query, key, value, masks and result of a site whose scores are split into batch and heads on the way: as `[B, H, ...]`."""
    view = next((node for node in views if _splits_heads(node)), None)
    if view is None:
        raise Refused("the logits are split into batch and heads by no view of their own")
    sizes: Any = view.args[2] if view.target is aten.unflatten.int else view.args[1]
    sizes, (batch, heads) = list(sizes[:2]), shape(view)[:2]
    flat = shape(view.args[0])[0]  # type: ignore[arg-type]
    for node in views:
        seen: Any = node if _splits_heads(node) else node.args[0]
        if not _same_sizes(seen, view, slice(2)):
            raise Refused("the logits are split into batch and heads in two ways")
    graph = site.node.graph

    def split(node: Node) -> Node:
        if rank(node) != 3:
            return node
        if str(shape(node)[0]) != str(flat):
            raise Refused(f"{node.name} is repeated for all rows of the batch, or for all heads")
        if _joins_heads(node) and _same_sizes(node.args[0], view, slice(2)):  # type: ignore[arg-type]
            site.path.append(node)
            return node.args[0]  # type: ignore[return-value]
        part = graph.call_function(aten.unflatten.int, (node, 0, sizes))
        part.meta["val"] = node.meta["val"].unflatten(0, (batch, heads))
        return part

    assert site.query is not None and site.key is not None and site.value is not None
    with graph.inserting_before(site.node):
        site.query, site.key, site.value = split(site.query), split(site.key), split(site.value)
        for place, term in enumerate(site.masks):
            if rank(term.node) == 3 and str(shape(term.node)[0]) not in ("1", str(heads)):  # those broadcast alike
                site.masks[place] = replace(term, node=split(term.node))
    if rank(site.node) == 3:
        product = site.node
        site.path.append(product)
        with graph.inserting_after(product):
            site.node = split(product)
        site.node.meta.update({name: value for name, value in product.meta.items() if name != "val"})
        with graph.inserting_after(site.node):
            joined = graph.call_function(aten.flatten.using_ints, (site.node, 0, 1))
        joined.meta["val"] = site.node.meta["val"].flatten(0, 1)
        product.replace_all_uses_with(joined, delete_user_cb=lambda user: user is not site.node)


def _oriented_factors(product: Node) -> tuple[Node, Node]:
    """Query and key `[..., S, D]` of the logits' product; views are inserted where the graph has none."""
    graph = product.graph
    if product.target is aten.einsum.default:
        return _einsum_factors(product, transpose_right=True)
    query, transposed = _factors(product)
    last = {rank(transposed) - 2, rank(transposed) - 1}
    dims: Any = transposed.args[1:]
    if transposed.target is aten.transpose.int and {d % rank(transposed) for d in dims} == last:
        return query, transposed.args[0]  # type: ignore[return-value]
    with graph.inserting_after(transposed):
        key = graph.call_function(aten.transpose.int, (transposed, -2, -1))
    key.meta["val"] = transposed.meta["val"].transpose(-2, -1)
    return query, key


def _oriented_product_with_value(product: Node, weights: Node) -> tuple[Node, Node]:
    if product.target is not aten.einsum.default:
        left, right = _factors(product)
        return left, right
    left, right = _factors(product)
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
    factors = []
    for node, letters, wanted in zip(_factors(product), (left, right), targets, strict=True):
        order = [letters.index(c) for c in wanted]
        with product.graph.inserting_before(product):
            view = product.graph.call_function(aten.permute.default, (node, order))
        view.meta["val"] = node.meta["val"].permute(order)
        factors.append(view)
    return factors[0], factors[1]


_VIEWS = {
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}


def _fold_repeated_heads(site: AttentionSite, node: Node) -> Node:
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
    if source.target in _VIEWS:
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


def _check_shapes(site: AttentionSite) -> None:
    assert site.query is not None and site.key is not None and site.value is not None
    query, key, value = (shape(n) for n in (site.query, site.key, site.value))
    if len(query) not in (3, 4) or len(key) != len(query) or len(value) != len(query):
        raise Refused(f"query has {len(query)} dimensions, expected [B, H, S, D] or [N, S, D]")
    if len(query) == 4:
        if str(key[1]) != str(value[1]):
            # One of the two was repeated in a way that is not recognised.
            raise Refused(f"key has {key[1]} heads and value {value[1]}")
        if str(query[1]) != str(key[1]):
            if not (isinstance(query[1], int) and isinstance(key[1], int)):
                raise Refused("query and key have different numbers of heads, which are not static")
            if query[1] % key[1]:
                raise Refused(f"{query[1]} query heads are not a multiple of {key[1]} KV heads")
    if not str(query[0]) == str(key[0]) == str(value[0]):
        raise Refused(f"query, key and value have {query[0]}, {key[0]} and {value[0]} rows of a batch")
    result, expected = shape(site.node), (*query[:-1], value[-1])
    if [str(size) for size in result] != [str(size) for size in expected]:
        raise Refused(f"the result is {list(result)}, expected {list(expected)}: a mask repeats the logits")
    for name, size in (("query", query[-1]), ("value", value[-1])):
        if isinstance(size, int) and size > 256:
            raise Refused(f"{name} has head_dim {size}, expected at most 256")
