"""Lower to chunks: the graph of the first phase of a chunked eviction (ParallelComp, arXiv 2502.14317).

A row is a chunk of a long context, and after it the query. Each site returns, besides its output, its keys and values and
how much attention each key gets from the last rows of the query: what decides which keys stay. Nothing is kept here; which
chunks and keys do is decided outside the graph (`rewriter.reading`).
"""

from __future__ import annotations

import torch
from rewriter.passes.analyse_masks import MaskProof
from rewriter.passes.apply_policy import PlannedSite
from rewriter.passes.calibration import Abnormal
from rewriter.passes.calibration import Observe
from rewriter.passes.emit import Attend
from rewriter.passes.emit import call
from rewriter.passes.emit import emit_bounds
from rewriter.passes.emit import inherited
from rewriter.passes.graph_copy import GraphCopy
from torch import Tensor
from torch import nn
from torch.fx import GraphModule

RESULTS = ("key", "value", "score", "hidden")
"""What a site returns after its output: `[B, Hkv, S, D]`, `[B, Hkv, S, Dv]`, fp32 `[B, H, S]`, bool `[B, H, S]`."""


def lower_chunks(module: GraphModule, planned: list[PlannedSite], proofs: list[MaskProof]) -> GraphModule:
    """A copy of the graph, lowered.

    Rows are padded on the left, so that the query is at the end of each. The inputs are those of the graph, but for symbolic
    sizes, and then `query_rows`, int64 `[m]`, the query's places in a row, and `hides`, bool `[1]`: whether calibrations hide
    anything here. The results are those of the graph, and then the
    `RESULTS` of each site.
    """
    copy = GraphCopy(module, planned)
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
            attend = _AttendToChunk(plan)
            inputs = [query, key, value, start, end, index, query_rows, hides, *bias]
            output, *others = call(graph, attend, inputs, 1 + len(RESULTS), inherited(site.node))
        node.replace_all_uses_with(output)
        results += others
    end_of_graph = next(iter(reversed(graph.nodes)))
    end_of_graph.args = ((*end_of_graph.args[0], *results),)
    copy.check_numbering()
    return copy.finish()


class _AttendToChunk(nn.Module):
    def __init__(self, plan: PlannedSite) -> None:
        super().__init__()
        policy, calibrations = plan.policy, plan.calibrations("local")
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
