"""Attention that is not understood is found, too, and refused with its reason: a policy would be ignored there without a word."""

from __future__ import annotations

from typing import Any

import torch
from rewriter.passes.attention.views import PASSIVE
from rewriter.passes.attention.views import PRODUCTS
from rewriter.passes.attention.views import SCORE_OPERATORS
from rewriter.passes.attention.views import VIEWS
from rewriter.passes.attention.views import factors
from rewriter.passes.attention.views import same_sizes
from rewriter.passes.graph.inputs import source_of
from rewriter.passes.graph.nodes import rank
from torch.fx import GraphModule
from torch.fx import Node

aten = torch.ops.aten


FUSED = (aten._native_multi_head_attention.default, aten._transformer_encoder_layer_fwd.default)


def has_softmax(module: GraphModule, body: Any) -> bool:
    """Whether a forward of an `autograd.Function`, a submodule at the node `body`, has what attention has."""
    inner = module.get_submodule(str(body.target))
    names = (
        str(getattr(n.target, "__name__", n.target))
        for m in inner.modules()
        if isinstance(m, GraphModule)
        for n in m.graph.nodes
    )
    return any("softmax" in name or "scaled_dot_product" in name for name in names)


MAKES_WEIGHTS = {aten.exp.default, aten.exp2.default, aten.sigmoid.default}
"""What makes weights of logits where no softmax does: half of a softmax, or another kind of attention."""


def unsupported_operator(node: Node) -> Node | None:
    """The operator because of which a product of activations is not seen to make weights: it keeps the logits' last two sizes.

    The node itself, where it is no softmax and the product is above it.
    """
    stack: list[tuple[Any, Node | None]] = [(node.args[0], node if node.target in MAKES_WEIGHTS else None)]
    seen = set()
    while stack:
        top, strange = stack.pop()
        if not isinstance(top, Node) or top in seen or top.op != "call_function":
            continue
        seen.add(top)
        if top.target in PRODUCTS and strange is not None and not any(map(_is_weight, factors(top))):
            return strange
        if top.target not in SCORE_OPERATORS:
            value = top.meta.get("val")
            if not isinstance(value, torch.Tensor) or value.dim() < 3 or not same_sizes(top, node, slice(-2, None)):
                continue
            strange = strange or top
        stack.extend((source, strange) for source in top.all_input_nodes)
    return None


def _is_weight(factor: Node) -> bool:
    """Whether a factor has no rows of its own, or is a parameter, as the weights of a mixture or a block-diagonal layer are."""
    few = rank(factor) < 3
    while factor.target in PASSIVE | VIEWS | {aten.expand.default} and isinstance(factor.args[0], Node):
        factor = factor.args[0]
    return few or factor.op == "get_attr" or source_of(factor).kind in ("parameter", "buffer")
