"""Apply a policy: for each proven site, the live ranges that replace its mask.

A policy says from a site's tensors which keys live how long; the model's own ranges, recovered from its mask, are
intersected with the policy's. The pass decides and refuses; `lower` and `lower_cached` emit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.graph.inputs import source_of
from rewriter.passes.graph.nodes import rank
from rewriter.passes.graph.nodes import shape
from rewriter.passes.lower.kernel import Kernel
from rewriter.passes.lower.kernel import choose_kernel
from rewriter.passes.lower.policy_parameters import take_policy_parameters
from rewriter.passes.lower.rotations import Rotation
from rewriter.passes.lower.rotations import Unrotatable
from rewriter.passes.lower.rotations import find_rotation
from rewriter.passes.lower.sharded_parameters import parameter_of
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.policy import Policy
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node

from rewriter.errors import PolicyError
from rewriter.errors import RewriteError

aten = torch.ops.aten


@dataclass(frozen=True)
class PlannedSite:
    """A site with all that lowering needs, or with the reason why it is refused.

    Attributes:
        site: what was found.
        layer: its number, from 0 in the order of the graph.
        policy: of this site.
        num_layers: sites of the graph.
        proof: what its mask is; None where that is not proven.
        reason: why it stays as it was; None where it is replaced.
        input_ids: the graph's input with the token ids, where the policy needs them.
        parameters: the policy's, by name.
        rotations: of query and key, where positions are cache-relative.
        kernel: what computes it when it is replaced.
    """

    site: AttentionSite
    layer: int
    policy: Policy
    num_layers: int
    proof: MaskProof | None = None
    reason: str | None = None
    input_ids: Node | None = None
    parameters: dict[str, Node] = field(default_factory=dict)
    rotations: tuple[Rotation, Rotation] | None = None
    kernel: Kernel = Kernel.LIVE_RANGE

    @property
    def num_kv_heads(self) -> int:
        assert self.site.key is not None
        return int(shape(self.site.key)[1])

    @property
    def num_slot_heads(self) -> int:
        """Heads of the keys in a cache: the KV heads, or the query heads where each keeps its own."""
        assert self.site.query is not None
        return int(shape(self.site.query)[1]) if self.policy.keys_per_query_head else self.num_kv_heads

    @property
    def value_dim(self) -> int:
        assert self.site.value is not None
        return int(shape(self.site.value)[-1])

    @property
    def identity(self) -> str:
        """What tells the site from others in another graph of the same model: its module and the weights nearest to its value."""
        assert self.site.value is not None
        level, seen = [self.site.value], {self.site.value}
        while level:
            weights = sorted(source_of(n).name for n in level if source_of(n).kind == "parameter")
            if weights:
                return f"{self.site.module_path or '-'} with {', '.join(weights)}"
            above = (parameter_of(i) for n in level for i in n.all_input_nodes)
            level = list(dict.fromkeys(i for i in above if i not in seen))
            seen.update(level)
        return self.site.module_path or "-"


def apply_policy(
    module: GraphModule,
    sites: list[AttentionSite],
    verdicts: Sequence[MaskProof | str],
    policy: Policy,
    kernel: str = "live_range",
) -> list[PlannedSite]:
    """Pairs each site with its policy; sites that a policy is not defined for are refused, with the reason.

    Args:
        verdicts: of each site its proof, or the reason why there is none.
        kernel: one of `CHOICES`.

    Raises:
        PolicyError: the policy needs token ids and the graph has none, or names sites that are not there.
        RewriteError: a site cannot be computed by the kernel that is asked for.
    """
    policy.check_sites(len(sites))
    parameters = take_policy_parameters(module)
    planned = []
    for layer, (site, verdict) in enumerate(zip(sites, verdicts, strict=True)):
        own = policy.for_layer(layer)
        if isinstance(verdict, str):
            planned.append(PlannedSite(site, layer, own, len(sites), reason=verdict))
            continue
        reason, rotations = _reason_against(own, site, verdict), None
        if reason is None and own.positions == "cache":
            try:
                rotations = _rotations(module, site, {s.node for s in sites})
            except Unrotatable as unrotatable:
                reason = f"{type(own).__name__} numbers keys by their place in the cache, and {unrotatable}"
        if reason is not None:
            planned.append(PlannedSite(site, layer, own, len(sites), verdict, reason))
            continue
        input_ids = _input_ids(module, site, type(own).__name__) if own.needs_input_ids else None
        own_parameters = parameters.get(layer, {})
        chosen = choose_kernel(kernel, own, site, verdict)
        if isinstance(chosen, str):
            raise RewriteError(
                f"kernel={kernel!r} cannot compute site {layer} ({site.module_path or '-'}): {chosen}; use kernel='auto'"
            )
        planned.append(
            PlannedSite(site, layer, own, len(sites), verdict, None, input_ids, own_parameters, rotations, chosen)
        )
    return planned


def _reason_against(policy: Policy, site: AttentionSite, proof: MaskProof) -> str | None:
    """Why a policy is not defined for a site; None if it is."""
    name = type(policy).__name__
    if proof.given and not policy.is_lossless:
        return f"{name} drops keys, and {proof.given}; use Exact()"
    if proof.others and not policy.is_lossless:
        return f"{name} drops keys, and under the model's mask ({proof.name}) a key comes back; use Exact()"
    if policy.needs_causal and _rows_and_keys_differ(site):
        return (
            f"{name} is defined for causal self-attention with one query per key; "
            "this is cross-attention or reads a cache of earlier keys"
        )
    if policy.needs_causal and not proof.interval.causal and not _is_single(site):
        return f"{name} is defined for causal attention, the mask is: {proof.name}"
    if policy.needs_whole_segments and proof.interval.sliding:
        return (
            f"{name} ranks all earlier keys, and the model's mask hides some of them "
            f"({proof.name}): a key could leave and come back, which is not one live range"
        )
    if policy.adds_parameters and len(shape(site.key)) != 4:  # type: ignore[arg-type]
        return f"{name} has parameters for each KV head, and here heads are folded into the batch"
    if (own := policy.reason_against(site, proof)) is not None:
        return own
    if policy.positions == "cache" and (proof.interval.sliding or proof.bias is not None):
        return (
            f"{name} numbers keys by their place in the cache, and the distances of the model's own mask "
            f"({proof.name}) are in the text"
        )
    return None


def _rotations(module: GraphModule, site: AttentionSite, attentions: set[Node]) -> tuple[Rotation, Rotation]:
    """How query and key come from what does not depend on positions."""
    assert site.query is not None and site.key is not None and site.value is not None
    inputs = {source_of(node).name: node for node in module.graph.nodes if node.op == "placeholder"}
    positions = next((n for s, n in inputs.items() if s == "position_ids" and isinstance(n.meta["val"], Tensor)), None)
    if positions is None:
        raise Unrotatable("the model does not read position_ids")
    query, key = (find_rotation(node, positions, site.value, attentions) for node in (site.query, site.key))
    return query, key


def _rows_and_keys_differ(site: AttentionSite) -> bool:
    assert site.query is not None and site.key is not None
    return str(shape(site.query)[-2]) != str(shape(site.key)[-2])


def _is_single(site: AttentionSite) -> bool:
    """One query and one key: causal, whatever mask is left of it."""
    assert site.query is not None and site.key is not None
    return (shape(site.query)[-2], shape(site.key)[-2]) == (1, 1)


_IDS_OF: dict[Any, int] = {torch.ops.aten.embedding.default: 1, torch.nn.functional.embedding: 0}
"""The argument of a lookup that holds ids. Where a vocabulary is spread over processes, the call stays as the model wrote it."""


def _input_ids(module: GraphModule, site: AttentionSite, policy: str) -> Node:
    """The graph input with the token ids: the integers that an embedding looks up."""
    found: dict[Node, None] = {}
    for node in module.graph.nodes:
        if node.target in _IDS_OF:
            source = node.args[_IDS_OF[node.target]]
            while isinstance(source, Node) and source.op in ("call_function", "call_method") and source.args:
                source = source.args[0]  # views and casts
            if isinstance(source, Node) and source.op == "placeholder" and rank(source) == 2:
                found[source] = None
    named = [node for node in found if "input_ids" in source_of(node).name]
    candidates = named or list(found)
    if len(candidates) != 1:
        seen = ", ".join(source_of(node).name or node.name for node in candidates) or "none"
        raise PolicyError(
            f"{policy} looks separators up in the token ids, but the model's call has {len(candidates)} inputs that are "
            f"token ids ({seen}); call the model with input_ids=..., not with inputs_embeds=..."
        )
    assert site.key is not None
    ids, keys = shape(candidates[0]), shape(site.key)
    if str(ids[0]) != str(keys[0]) or str(ids[1]) != str(keys[-2]):
        raise PolicyError(
            f"{policy} needs one token id for each key: input_ids is {list(ids)}, the attention has {keys[0]} rows of "
            f"{keys[-2]} keys; call the model with the whole sequence and without past_key_values"
        )
    return candidates[0]
