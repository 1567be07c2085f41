"""An attention of a graph, and what its mask is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import field
from dataclasses import fields

from torch.fx import Node


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


@dataclass(frozen=True)
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
        joined: (product, view): where the model's own result has batch and heads in one dimension, that result and a view of
            `node` that takes its place when the site is lowered; None elsewhere.
        reason: why it cannot be used, whatever its mask; None if it can.
    """

    node: Node
    form: str
    query: Node | None = None
    key: Node | None = None
    value: Node | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Node | None = None
    masks: tuple[MaskTerm, ...] = ()
    is_causal: bool = False
    joined: tuple[Node, Node] | None = None
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


@dataclass
class Draft:
    """A site while it is matched: the fields of `AttentionSite`, and the path from the product of query and key to the output.

    New nodes that it names have no users: the graph stays as it was.
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
    joined: tuple[Node, Node] | None = None
    path: list[Node] = field(default_factory=list)

    def finished(self) -> AttentionSite:
        own = {f.name: getattr(self, f.name) for f in fields(AttentionSite) if f.name not in ("masks", "reason")}
        return AttentionSite(masks=tuple(self.masks), **own)


class Refused(Exception):
    """Why something that looks like attention is not replaced."""
