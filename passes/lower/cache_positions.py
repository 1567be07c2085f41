"""Cache-relative positions: a key's position is its place among the keys of the cache, and changes when that is compacted.

Between two compactions, an epoch, it stays. A key is copied once for each epoch that it lives in: its live range is split at
each compaction, and each copy is rotated for the position that it has there (`rewriter.kernels.compaction`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rewriter.kernels import LiveRanges
from rewriter.kernels.separator_cache import SplitRanges
from rewriter.kernels.separator_cache import split_by_epoch
from rewriter.passes.graph.edit import call
from rewriter.passes.graph.edit import inherited
from rewriter.passes.lower.operator import Attend
from rewriter.passes.lower.operator import call_schedule
from rewriter.passes.lower.operator import emit_bounds
from rewriter.passes.lower.plan import PlannedSite
from rewriter.passes.lower.rotations import Rotation
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.policy import Extended
from rewriter.passes.policy import SiteTensors
from rewriter.passes.policy import Slots
from torch import Tensor
from torch import nn
from torch.fx import Graph
from torch.fx import Node


def attend_cache_relative(
    plan: PlannedSite, proof: MaskProof, query: Node, key: Node, value: Node, shared: dict[Any, tuple[Node, ...]]
) -> Node:
    """A site with cache-relative positions: one copy of each key for each epoch that it lives in."""
    graph = plan.site.node.graph
    assert plan.rotations is not None
    for_query, for_key = plan.rotations
    sharing = ("by place", proof.interval, plan.policy)
    if sharing not in shared:
        ranges = emit_bounds(graph, proof, key, {})
        ids = [] if plan.input_ids is None else [plan.input_ids]
        shared[sharing] = call(graph, _CacheRelative(plan.policy), [query, key, value, *ranges, *ids], 6)
    source, place, start, end, own_place, index = shared[sharing]
    query_content, key_content = (r.by_head(graph, r.content) for r in plan.rotations)
    keys, values = call(graph, _Gathered(), [key_content, value, source], 2)
    query = apply_rotation(graph, for_query, query_content, own_place, shared, {})
    keys = apply_rotation(graph, for_key, keys, place, shared, {})
    schedule = call_schedule(graph, plan.site, [query, keys, values, start, end, index], shared, sharing)
    inputs = [query, keys, values, start, end, index, None, plan.site.sinks, *schedule]
    return call(graph, Attend(plan.site), inputs, meta=inherited(plan.site.node))[0]


class _CacheRelative(nn.Module):
    """The live ranges of a whole text by epoch, and the places of its keys and queries."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor,
        end: Tensor,
        segment: Tensor,
        index: Tensor,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        live = LiveRanges(start, end)
        origin = SiteTensors.first_token(live, index)
        site = SiteTensors(live, segment, index, origin, input_ids, query, key, value)
        none = torch.empty(key.size(0), 1, 0, dtype=torch.int32, device=key.device)
        rows = {name: torch.full_like(origin, -1, dtype=d) for name, d in self.policy.row_fields.items()}
        slots = Slots(none, none, {name: none.to(d) for name, d in self.policy.slot_fields.items()}, rows)
        extended = self.policy.extend(slots, site)
        own = index[0, 0]
        split = split_by_epoch_positions(
            self.policy, index, torch.minimum(extended.end, end), extended, own[:1], key.size(2)
        )
        return split.source, split.position, split.start, split.end, split.query_position, own


class _Gathered(nn.Module):
    """Keys and values, one for each epoch that they live in."""

    def forward(self, key: Tensor, value: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        return gather_keys(key, source), gather_keys(value, source)


def gather_keys(tensor: Tensor, source: Tensor) -> Tensor:
    """`[B, H, L, D]` at the places `[B|1, N]`."""
    index = source[:, None, :, None].expand(tensor.size(0), tensor.size(1), -1, tensor.size(3))
    return tensor.gather(2, index)


def split_by_epoch_positions(
    policy: Any, index: Tensor, end: Tensor, extended: Extended, now: Tensor, num_new: int
) -> SplitRanges:
    """The live ranges of keys whose positions are places, by epoch.

    Args:
        index, end: int32 `[B|1, 1, L]`, oldest first.
        now: int32 `[1]`.
    """
    assert extended.times is not None
    num_batch = max(end.size(0), extended.times.size(0), index.size(0))
    index, end, times = (t[:, 0].expand(num_batch, -1).contiguous() for t in (index, end, extended.times))
    return split_by_epoch(index, end, times, now, num_new, policy.most_carried)


def apply_rotation(
    graph: Graph,
    rotation: Rotation,
    content: Node,
    places: Node,
    shared: dict[Any, tuple[Node, ...]],
    copies: Mapping[Node, Node],
) -> Node:
    """A content rotated for its positions; the angles are computed once for all sites that have the same."""
    sharing = ("angles", rotation.angle_nodes, rotation.angles, places)
    if sharing not in shared:
        shared[sharing] = rotation.copy_angles(graph, places, copies)
    return rotation.copy(graph, content, shared[sharing], copies)
