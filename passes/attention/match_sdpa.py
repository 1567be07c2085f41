"""`scaled_dot_product_attention`, whose arguments say all."""

from __future__ import annotations

import torch
from rewriter.passes.attention.site import Draft
from rewriter.passes.attention.site import MaskTerm
from rewriter.passes.attention.site import Refused
from rewriter.passes.attention.views import fold_repeated_heads
from torch.fx import Node


def match_sdpa(site: Draft) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    arguments = {**dict(zip(names, site.node.args, strict=False)), **site.node.kwargs}
    site.query = arguments["query"]  # type: ignore[assignment]
    site.key = fold_repeated_heads(site, arguments["key"])  # type: ignore[arg-type]
    site.value = fold_repeated_heads(site, arguments["value"])  # type: ignore[arg-type]
    site.scale = arguments.get("scale")  # type: ignore[assignment]
    site.is_causal = bool(arguments.get("is_causal", False))
    if arguments.get("dropout_p", 0.0) != 0.0:
        raise Refused(f"dropout {arguments['dropout_p']} is active; call .eval() or set the attention dropout to 0")
    mask = arguments.get("attn_mask")
    if isinstance(mask, Node):
        site.masks = [MaskTerm("keep" if mask.meta["val"].dtype == torch.bool else "add", mask)]
