"""The operator in a site's place, and the model's own ranges: what all lowering passes need."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from rewriter.kernels.dense import masked_attention
from rewriter.kernels.dense import plain_attention
from rewriter.kernels.dispatch import runs_triton
from rewriter.kernels.gpu.decode import MAX_QUERIES
from rewriter.kernels.gpu.shared_schedule import num_tensors
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.graph.edit import call
from rewriter.passes.graph.edit import emit
from rewriter.passes.graph.nodes import shape
from rewriter.passes.masks.evaluate import bias_tensor
from rewriter.passes.masks.evaluate import key_bounds
from rewriter.passes.masks.evaluate import key_grid
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import Size
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import MaskProof
from torch import Tensor
from torch import nn
from torch.fx import Graph
from torch.fx import Node

aten = torch.ops.aten


class _InPlaceOfSite(nn.Module):
    """What a site asks of what is put in its place: scale, softcap, dtype, rank and, where it matters, layout.

    Computed in the widest dtype of its inputs, returned in that of the original.
    """

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.scale, self.softcap = site.scale, site.softcap
        self.dtype = site.node.meta["val"].dtype
        self.flat = len(shape(site.query)) == 3  # type: ignore[arg-type]
        self.needs_copy = _is_viewed(site.node)

    def returned(self, output: Tensor) -> Tensor:
        output = (output.squeeze(1) if self.flat else output).to(self.dtype)
        return output.contiguous() if self.needs_copy else output


class Attend(_InPlaceOfSite):
    """The operator of live ranges in a site's place."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor,
        end: Tensor,
        query_index: Tensor | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
        *schedule: Tensor,
    ) -> Tensor:
        return self.with_lse(query, key, value, start, end, query_index, bias, sinks, *schedule)[0]

    def with_lse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor,
        end: Tensor,
        query_index: Tensor | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
        *schedule: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The output and the log-sum-exp of each row, fp32 `[B, Hq, Q]`."""
        query, key, value = widened(query, key, value)
        inputs = (query, key, value, start, end, query_index, None, bias, sinks, None, self.scale, self.softcap)
        output, lse = torch.ops.rewriter.live_range_attention(*inputs, list(schedule) or None)
        return self.returned(output), lse


class Schedule(nn.Module):
    """What the sites with the same ranges share besides them, where Triton's kernels run: `rewriter::schedule`.

    Attributes:
        results: so many tensors.
    """

    def __init__(self, *, indexed: bool) -> None:
        super().__init__()
        self.backward_too = torch.is_grad_enabled()
        self.results = num_tensors(indexed=indexed, backward=self.backward_too)

    @staticmethod
    def is_used(query: Node) -> bool:
        """Whether a kernel that has a schedule computes a site of this query: not for few rows, nor on a CPU."""
        num_queries = shape(query)[2]
        is_decoding = isinstance(num_queries, int) and num_queries <= MAX_QUERIES
        return runs_triton(query.meta["val"]) and not is_decoding

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, query_index: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        (query, key, value), group = widened(query, key, value), query.size(1) // key.size(1)
        sizes = (query.size(2), group, max(key.size(3), value.size(3)), query.element_size())
        return tuple(torch.ops.rewriter.schedule(start, end, query_index, *sizes, self.backward_too))


class AttendDense(_InPlaceOfSite):
    """torch's own kernel in a site's place: under a `dense_mask`, or causal, or without a mask."""

    def __init__(self, site: AttentionSite, is_causal: bool = False) -> None:
        super().__init__(site)
        self.is_causal = is_causal

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, sees: Tensor | None = None
    ) -> Tensor:
        query, key, value = widened(query, key, value)
        if mask is None or sees is None:
            return self.returned(plain_attention(query, key, value, self.is_causal, self.scale))
        if mask.is_floating_point():
            mask = mask.to(query.dtype)
        return self.returned(masked_attention(query, key, value, mask, sees, self.scale))


class AttendUnderMask(_InPlaceOfSite):
    """The operator for a mask that is data in a site's place; see `rewriter.kernels.given_mask`."""

    def __init__(self, site: AttentionSite, is_added: bool) -> None:
        super().__init__(site)
        self.is_added = is_added

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor,
        end: Tensor,
        form: Tensor,
        shown: Tensor,
        sees: Tensor,
        *rest: Tensor,
    ) -> Tensor:
        given = iter(rest)
        added = next(given) if self.is_added else None
        query, key, value = widened(query, key, value)
        found = (start, end, form, shown, sees, added)
        output, _ = torch.ops.rewriter.attention_under_mask(
            query, key, value, *found, None, next(given, None), self.scale, self.softcap
        )
        return self.returned(output)


def call_schedule(
    graph: Graph, site: AttentionSite, inputs: list[Node | None], shared: dict[Any, tuple[Node, ...]], sharing: Any
) -> tuple[Node, ...]:
    """The schedule that a site shares with those of the same sizes and dtypes, called where the first of them is; none on a CPU.

    Args:
        inputs: query, key, value, start, end and the indices of the query rows.
        shared: what sites share, by what they have in common.
        sharing: what this site has in common with others besides sizes and dtypes: its ranges.
    """
    assert site.query is not None and site.key is not None and site.value is not None
    if not Schedule.is_used(site.query):
        return ()
    values = [node.meta["val"] for node in (site.query, site.key, site.value)]
    key = ("schedule", sharing, *((value.dtype, value.shape[1], value.shape[-1]) for value in values))
    if key not in shared:
        module = Schedule(indexed=True)
        shared[key] = call(graph, module, inputs, module.results)
    return shared[key]


def _is_viewed(node: Node) -> bool:
    """Whether a view of a result asks for the layout that the original product had."""
    return any(
        user.target is aten.view.default or (user.target is aten.flatten.using_ints and _is_viewed(user))
        for user in node.users
    )


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in the widest of their dtypes: autocast, or a model that upcasts, leaves different ones."""
    widest = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(widest) for t in tensors)


def emit_bounds(
    graph: Graph, proof: MaskProof, key: Node, copies: Mapping[Node, Node], length: Node | None = None
) -> tuple[Node, ...]:
    """The model's own start, end and segment, the keys' indices, and the bias of the model's own mask where it has one.

    Args:
        copies: the proof's nodes in `graph`, where that is another one.
        length: int32 `[1]`, tokens before the first key; none when left out.
    """
    data = data_of(proof)
    before = [] if length is None else [length]

    def bounds(key: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        env = dict(zip(data, rest, strict=False))
        grid = key_grid(key.size(0), key.size(1), key.size(2), key.device, rest[-1] if before else None)
        interval = proof.interval
        ranges = [key_bounds(e, env, grid) for e in (interval.start, interval.end, interval.segment)]
        bias = [] if proof.bias is None else [bias_tensor(proof.bias, env, grid)]
        return (*ranges, grid[KEY].to(torch.int32), *bias)

    return emit(graph, bounds, [key, *(copies.get(n, n) for n in data), *before])


def emit_document_start(graph: Graph, proof: MaskProof, key: Node) -> tuple[Node, ...]:
    """The index of the first key of each key's document, int32 `[B|1, 1, K]`; nothing where a row is one document."""
    document = proof.interval.document
    if document is None:
        return ()
    data = list(dict.fromkeys(_data_nodes(document)))

    def starts(key: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        grid = key_grid(key.size(0), key.size(1), key.size(2), key.device)
        return (key_bounds(document, dict(zip(data, rest, strict=True)), grid),)

    return emit(graph, starts, [key, *data])


def by_range(proof: MaskProof) -> list[MaskProof]:
    """A proof for each range of the keys."""
    return [replace(proof, interval=interval, others=()) for interval in proof.intervals]


def data_of(proof: MaskProof) -> list[Node]:
    """The data that a proof's ranges and bias read."""
    bounds = [bound for i in proof.intervals for bound in (i.start, i.end, i.segment)]
    expressions = (*bounds, proof.bias)
    return list(dict.fromkeys(n for e in expressions for n in _data_nodes(e)))


def _data_nodes(expression: Expression | None) -> list[Node]:
    if isinstance(expression, Size):
        return [expression.node]
    if isinstance(expression, Element):
        return [expression.node, *(n for i in expression.indices for n in _data_nodes(i))]
    if isinstance(expression, Apply):
        return [n for a in expression.args for n in _data_nodes(a)]
    return []
