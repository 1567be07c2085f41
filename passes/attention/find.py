"""Find attention: every softmax of a product of activations, and every `scaled_dot_product_attention`.

A site that is found but cannot be used is refused with its reason, and the graph stays as it was there."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from rewriter.passes.attention.match_sdpa import match_sdpa
from rewriter.passes.attention.match_softmax import match_softmax
from rewriter.passes.attention.match_softmax import product_above
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.attention.site import Draft
from rewriter.passes.attention.site import Refused
from rewriter.passes.attention.unsupported import FUSED
from rewriter.passes.attention.unsupported import MAKES_WEIGHTS
from rewriter.passes.attention.unsupported import has_softmax
from rewriter.passes.attention.unsupported import unsupported_operator
from rewriter.passes.graph.nodes import shape
from torch.fx import GraphModule
from torch.fx import Node

aten = torch.ops.aten


def find_attention(module: GraphModule, modified: frozenset[Node] = frozenset()) -> list[AttentionSite]:
    """All sites, in the order of the graph; the refused ones carry their reason.

    Args:
        modified: nodes that an in-place operation changes, from `canonicalize`.
    """
    sites = []
    for node in list(module.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            sites.append(_matched(match_sdpa, node, "sdpa", modified))
        elif node.target in (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default):
            if product_above(node) is not None:
                sites.append(_matched(match_softmax, node, "eager", modified))
            elif (strange := unsupported_operator(node)) is not None:
                reason = f"{strange.target} between the product and the softmax is not understood"
                sites.append(AttentionSite(node, "eager", reason=reason))
        elif node.target in MAKES_WEIGHTS and unsupported_operator(node) is not None:
            reason = f"its weights are made of the logits by {node.target}, expected a softmax"
            sites.append(AttentionSite(node, "eager", reason=reason))
        elif node.target in FUSED:
            reason = (
                "torch's fused inference operator hides its query and key; "
                "call torch.backends.mha.set_fastpath_enabled(False)"
            )
            sites.append(AttentionSite(node, "fused", reason=reason))
        elif isinstance(node.target, torch._ops.OpOverload) and re.search("attention|attn", node.target.name()):
            reason = f"{node.target} is a kernel that hides its logits; call scaled_dot_product_attention"
            sites.append(AttentionSite(node, "kernel", reason=reason))
        elif node.target is torch.ops.higher_order.autograd_function_apply and has_softmax(module, node.args[0]):
            reason = (
                "it is inside an autograd.Function, whose backward is the model's own; call it under torch.no_grad()"
            )
            sites.append(AttentionSite(node, "autograd.Function", reason=reason))
    return sites


def _matched(match: Callable[[Draft], None], node: Node, form: str, modified: frozenset[Node]) -> AttentionSite:
    draft = Draft(node, form)
    try:
        match(draft)
        _check_shapes(draft)
    except Refused as refusal:
        return AttentionSite(node, form, reason=str(refusal))
    changed = [n for n in (draft.query, draft.key, draft.value, *draft.path) if n in modified]
    if changed:
        reason = f"{changed[0].name} is modified in place, through a view or where others see it"
        return AttentionSite(node, form, reason=reason)
    return draft.finished()


def _check_shapes(site: Draft) -> None:
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
