"""Apply a policy: for each proven site, the live ranges that replace its mask.

A policy says from a site's tensors which keys live how long; the model's own ranges, recovered from its mask, are
intersected with the policy's. The pass decides and refuses; `lower` and `lower_cached` emit.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol

import torch
from rewriter.kernels import LiveRanges
from rewriter.passes.analyse_masks import MaskProof
from rewriter.passes.find_attention import AttentionSite
from rewriter.passes.index_functions import rank
from rewriter.passes.index_functions import shape
from rewriter.passes.rotations import Rotation
from rewriter.passes.rotations import Unrotatable
from rewriter.passes.rotations import find_rotation
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node


@dataclass(frozen=True)
class SiteTensors:
    """What a policy may look at, in plain torch operations; everything here is traced into the graph.

    Attributes:
        live: the model's own live ranges, from its proven mask.
        segment: int32 `[B|1, 1, K]`, the same for all keys of a document (of the row, where there are none) and rising
            from document to document; 0 for keys of padding.
        index: int32 `[1, 1, K]`, each key's place in its row, which is also its query's index; 0 .. K - 1 where no earlier
            keys are in a cache.
        origin: int32 `[B|1, 1, 1]`, the index of each row's first token that is not padding.
        input_ids: `[B, K]`, or None where the policy does not ask for them.
        query: `[B, Hq, Q, D]`.
        key: `[B, Hkv, K, D]`.
        value: `[B, Hkv, K, Dv]`.
        parameters: the policy's own trainable parameters at this site, by name.
    """

    live: LiveRanges
    segment: Tensor
    index: Tensor
    origin: Tensor
    input_ids: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    parameters: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def is_token(self) -> Tensor:
        """bool `[B|1, 1, K]`: the key is ever seen; false for padding."""
        return self.live.end > self.live.start

    @staticmethod
    def first_token(live: LiveRanges, index: Tensor) -> Tensor:
        """int32 `[B|1, 1, 1]`: the index of the first key that is ever seen, `NO_TOKEN` where there is none."""
        return torch.where(live.end > live.start, index, NO_TOKEN).amin(dim=(1, 2), keepdim=True)


NO_TOKEN = 2**30
"""The `origin` of a row that has held nothing but padding so far."""


@dataclass(frozen=True)
class Slots:
    """The keys of a cache when new ones come, as a policy sees them.

    Attributes:
        index: int32 `[B, H, C]`, H the KV heads or 1; negative in a slot without a living key.
        end: int32 `[B, H, C]`, the policy's end as far as it was known; `FOREVER` while it is not.
        fields: what the policy keeps of each key, by the names of its `slot_fields`, `[B, H, C]` each.
        rows: what it keeps of each row, by the names of its `row_fields`, `[B, 1, 1]` each.
    """

    index: Tensor
    end: Tensor
    fields: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]

    @property
    def alive(self) -> Tensor:
        return self.index >= 0


@dataclass(frozen=True)
class Extended:
    """What a policy makes of new keys that join those of a cache.

    Attributes:
        slot_end: int32 `[B|1, H|1, C]`, the ends of the keys in the slots; only earlier ones count.
        end: int32 `[B|1, H|1, K]`, the new keys' ends, `FOREVER` while not known.
        fields, rows: as in `Slots`, of the new keys, and after them.
        bias: `[B|1, H|1, K]` of the new keys, added to their logits; None for none.
        times: int32 `[B, 1, E]`, the queries after which keys are dropped; only where positions are places.
    """

    slot_end: Tensor
    end: Tensor
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    bias: Tensor | None = None
    times: Tensor | None = None


class Policy(Protocol):
    """What the passes ask of a policy."""

    @property
    def needs_causal(self) -> bool:
        """Whether the policy is defined for causal attention only."""

    @property
    def needs_input_ids(self) -> bool:
        """Whether `SiteTensors.input_ids` must be there."""

    @property
    def needs_whole_segments(self) -> bool:
        """Whether each query must see all earlier keys of its document: no window of the model's."""

    @property
    def adds_parameters(self) -> bool:
        """Whether the policy has trainable parameters at each site, `SiteTensors.parameters`."""

    @property
    def reads_site(self) -> bool:
        """Whether the ranges depend on query, key or value, and so cannot be shared by several sites."""

    @property
    def positions(self) -> str:
        """ "text": a token's position is its place in the text; "cache": its place among the keys that live; "chunk": positions
        begin anew in each chunk, so that several keys have the same."""

    @property
    def most_carried(self) -> int:
        """The most keys that are alive after a compaction; asked for where positions are places."""

    @property
    def competes(self) -> bool:
        """Whether a key that the model's own mask hides still counts among the policy's keys."""

    @property
    def slot_fields(self) -> Mapping[str, torch.dtype]:
        """What a cache keeps of each key for the policy."""

    @property
    def row_fields(self) -> Mapping[str, torch.dtype]:
        """What a cache keeps of each row for the policy; -1 at first."""

    @property
    def has_bias(self) -> bool:
        """Whether the policy adds a bias per key."""

    @property
    def is_chunked(self) -> bool:
        """Whether it is a program of two phases, not a mask: `lower_chunks` makes the graph of the first."""

    @property
    def group(self) -> str:
        """How the query heads of a KV head score its keys together: "mean", "max", or "per_query_head", where each has keys of
        its own."""

    def needs_order(self, one: bool) -> bool:
        """Whether `extend` wants the slots oldest first, when one new key comes, or several."""

    def live_ranges(self, site: SiteTensors) -> LiveRanges | tuple[LiveRanges, Tensor] | None:
        """The policy's own ranges, and with a bias per key if it has one; None to keep the model's ranges."""

    def extend(self, slots: Slots, site: SiteTensors) -> Extended:
        """The same for new keys that join those of a cache."""

    def for_layer(self, layer: int) -> Policy:
        """The policy of one attention site, counted from 0 in the order of the graph."""


class Calibration(Protocol):
    """Which keys with abnormally much attention are hidden; see `rewriter.Calibrate`."""

    region: str
    threshold: float
    observe: int
    edge: int
    phase: str
    apply: bool

    def layer_range(self, num_layers: int) -> range:
        """The attention sites that it is for."""


class PolicyError(ValueError):
    """A policy cannot be applied to this model or these inputs; the message says what to do."""


@dataclass
class PlannedSite:
    """A site with all that lowering needs, or with its reason for refusal."""

    site: AttentionSite
    layer: int
    policy: Any
    num_layers: int
    proof: MaskProof | None = None
    input_ids: Node | None = None
    parameters: dict[str, Node] = field(default_factory=dict)
    rotations: tuple[Rotation, Rotation] | None = None

    @property
    def num_kv_heads(self) -> int:
        assert self.site.key is not None
        return int(shape(self.site.key)[1])

    @property
    def num_slot_heads(self) -> int:
        """Heads of the keys in a cache: the KV heads, or the query heads where each keeps its own."""
        assert self.site.query is not None
        return int(shape(self.site.query)[1]) if self.policy.group == "per_query_head" else self.num_kv_heads

    def calibrations(self, phase: str) -> tuple[Calibration, ...]:
        """The policy's calibrations of this site, in one of the two phases of a chunked eviction."""
        own: Sequence[Calibration] = self.policy.calibration if self.policy.is_chunked else ()
        return tuple(c for c in own if c.phase == phase and self.layer in c.layer_range(self.num_layers))

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
            weights = sorted(n.meta["source"] for n in level if n.meta.get("kind") == "parameter")
            if weights:
                return f"{self.site.module_path or '-'} with {', '.join(weights)}"
            level = list(dict.fromkeys(i for n in level for i in n.all_input_nodes if i not in seen))
            seen.update(level)
        return self.site.module_path or "-"


def apply_policy(
    module: GraphModule, sites: list[AttentionSite], proofs: dict[int, MaskProof], policy: Policy
) -> list[PlannedSite]:
    """Pairs each site with its policy; sites that a policy is not defined for are refused, with the reason.

    Args:
        proofs: by position in `sites`.

    Raises:
        PolicyError: the policy needs token ids and the graph has none.
    """
    planned = []
    parameters = _policy_parameters(module)
    for layer, site in enumerate(sites):
        own = policy.for_layer(layer)
        plan = PlannedSite(site, layer, own, len(sites), proofs.get(layer))
        planned.append(plan)
        if site.reason is not None or plan.proof is None:
            continue
        if own.needs_causal and _rows_and_keys_differ(site):
            site.reason = (
                f"{type(own).__name__} is defined for causal self-attention with one query per key; "
                "this is cross-attention or reads a cache of earlier keys"
            )
        elif own.needs_causal and not plan.proof.interval.causal and not _is_single(site):
            site.reason = f"{type(own).__name__} is defined for causal attention, the mask is: {plan.proof.name}"
        elif own.needs_whole_segments and plan.proof.interval.sliding:
            site.reason = (
                f"{type(own).__name__} ranks all earlier keys, and the model's mask hides some of them "
                f"({plan.proof.name}): a key could leave and come back, which is not one live range"
            )
        elif own.adds_parameters and len(shape(site.key)) != 4:  # type: ignore[arg-type]
            site.reason = (
                f"{type(own).__name__} has parameters for each KV head, and here heads are folded into the batch"
            )
        elif own.is_chunked and site.sinks is not None:
            site.reason = f"{type(own).__name__} scores keys by their weights, of which the model's sinks take a part"
        elif own.positions == "cache" and (plan.proof.interval.sliding or plan.proof.bias is not None):
            site.reason = (
                f"{type(own).__name__} numbers keys by their place in the cache, and the distances of the model's own mask "
                f"({plan.proof.name}) are in the text"
            )
        else:
            plan.parameters = parameters.get(layer, {})
            if own.needs_input_ids:
                plan.input_ids = _input_ids(module, site, type(own).__name__)
            if own.positions == "cache":
                try:
                    plan.rotations = _rotations(module, site, {s.node for s in sites})
                except Unrotatable as reason:
                    site.reason = f"{type(own).__name__} numbers keys by their place in the cache, and {reason}"
    return planned


def _rotations(module: GraphModule, site: AttentionSite, attentions: set[Node]) -> tuple[Rotation, Rotation]:
    """How query and key come from what does not depend on positions."""
    assert site.query is not None and site.key is not None and site.value is not None
    inputs = {node.meta.get("source"): node for node in module.graph.nodes if node.op == "placeholder"}
    positions = next((n for s, n in inputs.items() if s == "position_ids" and isinstance(n.meta["val"], Tensor)), None)
    if positions is None:
        raise Unrotatable("the model does not read position_ids")
    query, key = (find_rotation(node, positions, site.value, attentions) for node in (site.query, site.key))
    return query, key


@torch.library.custom_op("rewriter::policy_parameters", mutates_args=())
def policy_parameters(parameters: Sequence[Tensor], names: str) -> None:
    """Marks the policies' parameters among a graph's inputs; erased when they are found.

    Args:
        names: of each, the number of its site and what the policy calls it, in one string: `0.W 0.A 1.W 1.A`.
    """


@policy_parameters.register_fake
def _(parameters: Sequence[Tensor], names: str) -> None:
    pass


torch.fx.node.has_side_effect(torch.ops.rewriter.policy_parameters.default)  # it has no result, and is not dead


def _policy_parameters(module: GraphModule) -> dict[int, dict[str, Node]]:
    """The parameters by site and name; their markers are erased."""
    found: dict[int, dict[str, Node]] = {}
    for node in list(module.graph.nodes):
        if node.target is torch.ops.rewriter.policy_parameters.default:
            nodes, names = node.args
            for parameter, name in zip(nodes, names.split(), strict=True):
                layer, _, own = name.partition(".")
                found.setdefault(int(layer), {})[own] = parameter
            module.graph.erase_node(node)
    return found


def _rows_and_keys_differ(site: AttentionSite) -> bool:
    assert site.query is not None and site.key is not None
    return str(shape(site.query)[-2]) != str(shape(site.key)[-2])


def _is_single(site: AttentionSite) -> bool:
    """One query and one key: causal, whatever mask is left of it."""
    assert site.query is not None and site.key is not None
    return (shape(site.query)[-2], shape(site.key)[-2]) == (1, 1)


def _input_ids(module: GraphModule, site: AttentionSite, policy: str) -> Node:
    """The graph input with the token ids: the integers that an embedding looks up."""
    found: dict[Node, None] = {}
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            source = node.args[1]
            while isinstance(source, Node) and source.op == "call_function" and source.args:
                source = source.args[0]  # views and casts
            if isinstance(source, Node) and source.op == "placeholder" and rank(source) == 2:
                found[source] = None
    named = [node for node in found if "input_ids" in node.meta.get("source", "")]
    candidates = named or list(found)
    if len(candidates) != 1:
        seen = ", ".join(node.meta.get("source", node.name) for node in candidates) or "none"
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
