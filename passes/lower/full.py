"""Lower: each planned site becomes one `rewriter::live_range_attention`, or torch's own attention where its plan says so, and
dead mask construction is removed.

Small functions are traced to pre-dispatch ATen and their nodes copied into the graph. Live ranges are computed once
and shared by all sites that have the same mask and policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels.dense import dense_mask
from rewriter.passes.attention.normalize import commit
from rewriter.passes.attention.site import AttentionSite
from rewriter.passes.graph.edit import emit
from rewriter.passes.graph.edit import inherited
from rewriter.passes.graph.nodes import shape
from rewriter.passes.lower.cache_positions import attend_cache_relative
from rewriter.passes.lower.kernel import Kernel
from rewriter.passes.lower.operator import Attend
from rewriter.passes.lower.operator import AttendDense
from rewriter.passes.lower.operator import AttendUnderMask
from rewriter.passes.lower.operator import Schedule
from rewriter.passes.lower.operator import by_range
from rewriter.passes.lower.operator import emit_bounds
from rewriter.passes.lower.operator import emit_document_start
from rewriter.passes.lower.plan import PlannedSite
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.policy import SiteTensors
from torch import Tensor
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx import Node

from rewriter.errors import PolicyError
from rewriter.errors import RewriteError

aten = torch.ops.aten


def lower(module: GraphModule, planned: list[PlannedSite]) -> int:
    """Replaces the sites that have a proof and no reason against them, in place; returns how many.

    Raises:
        RewriteError: one would still be computed as it was.
    """
    shared: dict[Any, tuple[Node, ...]] = {}
    replaced: dict[Node, Node] = {}
    for plan in planned:
        if plan.reason is None and plan.proof is not None:
            commit(plan.site)
            replaced[plan.site.node] = _replace(plan, plan.proof, shared, replaced)
    module.graph.eliminate_dead_code()
    left = [node for node in module.graph.nodes if node in replaced]
    if left:  # it would be computed without the policy
        raise RewriteError(f"{left[0].name} was replaced and is still used; please report this, with the model")
    module.graph.lint()
    module.recompile()
    return len(replaced)


def _replace(
    plan: PlannedSite, proof: MaskProof, shared: dict[Any, tuple[Node, ...]], replaced: dict[Node, Node]
) -> Node:
    """What stands for a site now.

    Args:
        shared: ranges and masks that several sites have in common.
        replaced: what stands for each site before; this one's query, key or value may be such a site.
    """
    site = plan.site
    assert site.query is not None and site.key is not None and site.value is not None
    graph = site.node.graph
    with graph.inserting_before(site.node):
        tensors = tuple(replaced.get(node, node) for node in (site.query, site.key, site.value))
        if len(site.query.meta["val"].shape) == 3:
            tensors = tuple(emit(graph, lambda x: (x.unsqueeze(1),), [t])[0] for t in tensors)
        query, key, value = tensors
        if plan.kernel in (Kernel.CAUSAL, Kernel.FULL):
            dense = AttendDense(site, plan.kernel is Kernel.CAUSAL)
            (result,) = emit(graph, lambda *inputs: (dense(*inputs),), [query, key, value], inherited(site.node))
        elif plan.kernel is Kernel.GIVEN:
            result = _under_given_mask(plan, query, key, value, shared)
        elif proof.others:
            result = _over_several_ranges(plan, proof, query, key, value, shared)
        elif plan.rotations is not None:
            result = attend_cache_relative(plan, proof, query, key, value, shared)
        else:
            sizes = (str(query.meta["val"].shape), str(key.meta["val"].shape))
            own = (tensors, *plan.parameters.values()) if plan.policy.reads_site else None
            sharing = (proof.interval, proof.bias, plan.policy, sizes, own, plan.kernel)
            if sharing not in shared:
                ranges = _emit_ranges(graph, plan, proof, query, key, value)
                is_masked = plan.kernel is Kernel.MASKED
                shared[sharing] = _emit_mask(graph, query, key, ranges) if is_masked else ranges
            given, rest = shared[sharing], [] if site.sinks is None else [site.sinks]
            if plan.kernel is not Kernel.MASKED and Schedule.is_used(query):
                per_site = (*sharing, value.meta["val"].size(3), *(t.meta["val"].dtype for t in tensors))
                if per_site not in shared:
                    shared[per_site] = emit(graph, Schedule(indexed=False), [query, key, value, *given[:2]])
                rest += shared[per_site]
            attend = _masked(site) if plan.kernel is Kernel.MASKED else _over_live_ranges(site, len(given) == 3)
            (result,) = emit(graph, attend, [query, key, value, *given, *rest], inherited(site.node))
    site.node.replace_all_uses_with(result)
    return result


def _over_live_ranges(site: AttentionSite, has_bias: bool) -> Callable[..., tuple[Tensor]]:
    """Takes query, key, value, start, end, the bias where there is one, the sinks where the site has them, and the schedule where
    one is shared."""

    def attend(query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, *rest: Tensor) -> tuple[Tensor]:
        given = iter(rest)
        bias = next(given) if has_bias else None
        sinks = next(given) if site.sinks is not None else None
        return (Attend(site)(query, key, value, start, end, None, bias, sinks, *given),)

    return attend


def _masked(site: AttentionSite) -> Callable[..., tuple[Tensor]]:
    """Takes query, key, value, the mask, and the rows that see a key."""
    return lambda *inputs: (AttendDense(site)(*inputs),)


def _over_several_ranges(
    plan: PlannedSite, proof: MaskProof, query: Node, key: Node, value: Node, shared: dict[Any, tuple[Node, ...]]
) -> Node:
    """A site whose keys have several ranges: each key and value once for each of them, as keys of their own."""
    site = plan.site
    graph, count = site.node.graph, len(proof.intervals)
    sizes = (str(query.meta["val"].shape), str(key.meta["val"].shape))
    sharing = ("several", proof.intervals, proof.bias, sizes)
    if sharing not in shared:
        bounds = [emit_bounds(graph, one, key, {}) for one in by_range(proof)]
        starts, ends = [b[0] for b in bounds], [b[1] for b in bounds]

        def joined(query: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
            row = torch.arange(query.size(2), dtype=torch.int32, device=query.device)
            parts = [found[:count], found[count : 2 * count]]
            if len(found) > 2 * count:
                parts.append(found[-1:] * count)
            return (row, *(torch.cat(torch.broadcast_tensors(*part), dim=2) for part in parts))

        shared[sharing] = emit(graph, joined, [query, *starts, *ends, *bounds[0][4:]])
    has_bias = proof.bias is not None

    def attend(
        query: Tensor, key: Tensor, value: Tensor, row: Tensor, start: Tensor, end: Tensor, *rest: Tensor
    ) -> Any:
        given = iter(rest)
        bias = next(given) if has_bias else None
        keys, values = (torch.cat([t] * count, dim=2) for t in (key, value))
        return (Attend(site)(query, keys, values, start, end, row, bias, next(given, None)),)

    rest = [] if site.sinks is None else [site.sinks]
    (result,) = emit(graph, attend, [query, key, value, *shared[sharing], *rest], inherited(site.node))
    return result


def _under_given_mask(
    plan: PlannedSite, query: Node, key: Node, value: Node, shared: dict[Any, tuple[Node, ...]]
) -> Node:
    """A site whose mask a call gives: the mask as the model has it, and its ranges, once for all sites that have the same."""
    site = plan.site
    graph, terms = site.node.graph, list(site.masks)
    sizes = (str(shape(query)[2]), str(shape(key)[2]), query.meta["val"].dtype)
    sharing = ("given", site.is_causal, site.masks, *sizes)
    is_added = any(term.kind == "add" for term in terms)

    def found(query: Tensor, key: Tensor, *masks: Tensor) -> tuple[Tensor, ...]:
        # Inductor's code for bool tensors of this size takes longer than the look: a mask goes on as it is where it can.
        sizes = (query.size(2), key.size(2))
        visible = added = None
        if site.is_causal:
            visible = torch.ones(1, 1, *sizes, dtype=torch.bool, device=key.device).tril()
        for term, mask in zip(terms, masks, strict=True):
            mask = mask[(None,) * (4 - mask.dim())]
            if term.kind == "add":
                added = mask if added is None else added + mask
            else:
                shows = mask if term.kind == "keep" else ~mask
                visible = shows if visible is None else visible & shows
        own = None if added is None else added.detach()
        if visible is not None and own is not None:
            visible, own = torch.broadcast_tensors(visible, own)
        visible, own = (None if t is None else t.expand(*t.shape[:2], *sizes) for t in (visible, own))
        ranges = torch.ops.rewriter.mask_ranges(visible, own, query.dtype)
        return ranges if added is None else (*ranges, added)

    if sharing not in shared:
        shared[sharing] = emit(graph, found, [query, key, *(term.node for term in terms)])
    attend = AttendUnderMask(site, is_added)
    rest = [] if site.sinks is None else [site.sinks]
    inputs = [query, key, value, *shared[sharing], *rest]
    (result,) = emit(graph, lambda *given: (attend(*given),), inputs, inherited(site.node))
    return result


def _emit_mask(graph: Graph, query: Node, key: Node, ranges: tuple[Node, ...]) -> tuple[Node, ...]:
    """The mask of live ranges, and the rows that see a key."""

    def mask(query: Tensor, key: Tensor, start: Tensor, end: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        group = query.size(1) // key.size(1)
        return dense_mask(start, end, query.size(2), group, bias[0] if bias else None, query.dtype)

    return emit(graph, mask, [query, key, *ranges])


def _emit_ranges(
    graph: Graph, plan: PlannedSite, proof: MaskProof, query: Node, key: Node, value: Node
) -> tuple[Node, ...]:
    """Start and end in index space, and the key bias where there is one."""
    if plan.policy.adds_parameters and not plan.parameters:
        raise PolicyError(
            f"{plan.policy} has no parameters for site {plan.layer} ({plan.site.module_path or '-'}): it was not there, or was "
            "refused, when they were made; give optimize example_inputs that run the model as it will be used"
        )
    square = str(shape(query)[2]) == str(shape(key)[2])
    bounds = emit_bounds(graph, proof, key, {})
    biases = bounds[4:]
    documents = emit_document_start(graph, proof, key)
    ids = [] if plan.input_ids is None else [plan.input_ids]

    def ranges(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        given = iter(rest)
        start, end, segment, index = (next(given) for _ in range(4))
        bias = next(given) if biases else None
        document = next(given) if documents else None
        input_ids = next(given) if ids else None
        parameters = dict(zip(plan.parameters, given, strict=True))
        live = LiveRanges(start, end)
        origin = SiteTensors.first_token(live, index)
        if document is not None:
            origin = torch.maximum(origin, document)
        site = SiteTensors(live, segment, index, origin, input_ids, query, key, value, parameters)
        extra = plan.policy.live_ranges(site)
        if isinstance(extra, tuple):
            extra, own_bias = extra
            bias = own_bias if bias is None else bias + own_bias
        if extra is not None:
            live = live & extra
        start, end = live.start, live.end
        if not square:
            # The operator aligns rows to the bottom right: row r of the mask has index r + K - Q.
            offset = key.size(2) - query.size(2)
            start, end = start + offset, torch.where(end == FOREVER, FOREVER, end + offset)
        return (start, end) if bias is None else (start, end, bias)

    return emit(graph, ranges, [query, key, value, *bounds, *documents, *ids, *plan.parameters.values()])
