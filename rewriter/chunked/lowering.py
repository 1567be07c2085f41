"""The graphs of a chunked eviction (ParallelComp, arXiv 2502.14317): its first phase, and the query of its second.

In the first phase a row is a chunk of a long context, and after it the query. Each site returns, besides its output, its keys
and values and how much attention each key gets from the last rows of the query: what decides which keys stay. Nothing is kept
in the graph; which chunks and keys stay is decided by `rewriter.chunked.reading`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch import nn
from torch.fx import GraphModule
from torch.fx import Node

from rewriter.chunked.calibration import Abnormal
from rewriter.chunked.calibration import AttendCalibrated
from rewriter.chunked.calibration import Observe
from rewriter.passes.graph.copy import GraphCopy
from rewriter.passes.graph.copy import NotCacheable
from rewriter.passes.graph.edit import call
from rewriter.passes.graph.edit import inherited
from rewriter.passes.lower.operator import Attend
from rewriter.passes.lower.operator import emit_bounds
from rewriter.passes.lower.plan import PlannedSite
from rewriter.passes.lower.slots import CachedLowering
from rewriter.passes.lower.slots import SlotLowering
from rewriter.passes.lower.slots import Table

if TYPE_CHECKING:
    from rewriter.chunked.policy import ChunkedEviction

RESULTS = ("key", "value", "score", "hidden")
"""What a site returns after its output: `[B, Hkv, S, D]`, `[B, Hkv, S, Dv]`, fp32 `[B, H, S]`, bool `[B, H, S]`."""


def lower_phases(policy: ChunkedEviction, lowered: CachedLowering) -> dict[str, GraphModule]:
    """The graphs "chunk" and, where keys are calibrated by the query over all kept chunks, "query".

    Raises:
        NotCacheable: keys of several chunks have the same positions, and a mask would tell them apart.
    """
    for plan, proof in zip(lowered.planned, lowered.proofs, strict=True):
        where = f"site {plan.layer} ({plan.site.module_path or '-'})"
        window = lowered.layout.tables[lowered.layout.sites[plan.layer].table].window
        if proof.bias is not None or (proof.interval.sliding and window is None):
            raise NotCacheable(
                f"{where}: keys of several chunks have the same positions, which its mask ({proof.name}) cannot tell apart"
            )
        if policy.parity and proof.interval.sliding:
            raise NotCacheable(f"{where}: parity=True knows no {proof.name}")
    graphs = {"chunk": lower_chunks(policy, lowered)}
    if any(policy.calibrations(plan, "merged") for plan in lowered.planned):
        graphs["query"] = QueryLowering(policy, lowered).run()
    return graphs


class QueryLowering(SlotLowering):
    """The prefill of the second phase, in which the query's attention decides which keys are hidden."""

    fields = ("from_begin", "to_end")

    def __init__(self, policy: ChunkedEviction, lowered: CachedLowering) -> None:
        super().__init__(lowered, decode=False)
        self.policy = policy

    def attend(self, table: Table, plan: PlannedSite, query: Node, keys: Node, values: Node) -> Node:
        calibrations = self.policy.calibrations(plan, "merged")
        if not calibrations:
            return super().attend(table, plan, query, keys, values)
        attend = AttendCalibrated(plan.site, self.policy.group, self.policy.parity, calibrations)
        shared = [table.shared[name] for name in ("start", "end", "query_index", *self.fields, "chosen")]
        inputs = [query, keys, values, *shared, table.state["index"], table.state["end"]]
        return call(self.graph, attend, inputs, meta=inherited(plan.site.node))[0]


def lower_chunks(policy: ChunkedEviction, lowered: CachedLowering) -> GraphModule:
    """A copy of the graph for the first phase.

    Rows are padded on the left, so that the query is at the end of each. The inputs are those of the graph, but for symbolic
    sizes, and then `query_rows`, int64 `[m]`, the query's places in a row, and `hides`, bool `[1]`: whether calibrations hide
    anything here. The results are those of the graph, and then the
    `RESULTS` of each site.
    """
    planned, proofs = lowered.planned, lowered.proofs
    copy = GraphCopy(lowered.module)
    graph = copy.graph
    query_rows, hides = copy.placeholder("query_rows"), copy.placeholder("hides")
    results = []
    shared = {}
    for plan, proof in zip(planned, proofs, strict=True):
        site = plan.site
        node = copy.copies[site.node]
        query, key, value = (copy.copies[n] for n in (site.query, site.key, site.value))  # type: ignore[index]
        with graph.inserting_before(node):
            sharing = (proof.interval, proof.bias)
            if sharing not in shared:
                shared[sharing] = emit_bounds(graph, proof, key, copy.copies)
            start, end, _, index, *bias = shared[sharing]
            attend = _AttendToChunk(plan, policy)
            inputs = [query, key, value, start, end, index, query_rows, hides, *bias]
            output, *others = call(graph, attend, inputs, 1 + len(RESULTS), inherited(site.node))
        node.replace_all_uses_with(output)
        copy.copies[site.node] = output  # which may be the query, key or value of a later site
        results += others
    end_of_graph = next(iter(reversed(graph.nodes)))
    end_of_graph.args = ((*end_of_graph.args[0], *results),)
    copy.check_numbering(planned[0].site.query)  # type: ignore[arg-type]
    return copy.finish()


class _AttendToChunk(nn.Module):
    def __init__(self, plan: PlannedSite, policy: ChunkedEviction) -> None:
        super().__init__()
        calibrations = policy.calibrations(plan, "local")
        self.attend = Attend(plan.site)
        self.observe = Observe(self.attend, policy.group, policy.observe)
        self.abnormal = Abnormal(self.attend, policy.group, calibrations, policy.parity) if calibrations else None
        self.at_once = any(c.apply for c in calibrations)
        self.copies = plan.num_slot_heads // plan.num_kv_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor,
        end: Tensor,
        index: Tensor,
        query_rows: Tensor,
        hides: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        output, lse = self.attend.with_lse(query, key, value, start, end, None, bias)
        own, num_query = index[0, 0], query_rows.size(0)
        of_query = query[:, :, -num_query:], key, lse[:, :, -num_query:], start, end, own[-num_query:], bias
        score = self.observe(*of_query)
        hidden = torch.zeros_like(score, dtype=torch.bool)
        if self.abnormal is not None:
            # Padding stands before the context.
            origin = torch.where(end > start, index, index.size(2)).amin(dim=2, keepdim=True)
            context = (index >= origin) & (index < index.size(2) - num_query)
            from_begin = torch.where(context, index - origin, -1)
            later, at_once = self.abnormal(from_begin, index.size(2) - num_query - 1 - index, *of_query)
            later, at_once = later & hides, at_once & hides
            hidden = later.expand(hidden.shape)
            if self.at_once:
                keys = [t.repeat_interleave(self.copies, 1) if self.copies > 1 else t for t in (key, value)]
                output = self.attend(query, *keys, start, end.masked_fill(at_once, 0), None, bias)
        return output, key, value, score, hidden
