"""Lower: each planned site becomes one `rewriter::live_range_attention`, and dead mask construction is removed.

Small functions are traced to pre-dispatch ATen and their nodes copied into the graph. Live ranges are computed once
and shared by all sites that have the same mask and policy.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import torch
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.passes.analyse_masks import MaskProof
from rewriter.passes.analyse_masks import bias_tensor
from rewriter.passes.analyse_masks import key_bounds
from rewriter.passes.analyse_masks import key_grid
from rewriter.passes.apply_policy import PlannedSite
from rewriter.passes.apply_policy import PolicyError
from rewriter.passes.apply_policy import SiteTensors
from rewriter.passes.index_functions import Apply
from rewriter.passes.index_functions import Element
from rewriter.passes.index_functions import Expression
from rewriter.passes.index_functions import Size
from rewriter.passes.index_functions import shape
from torch import Tensor
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten


def lower(module: GraphModule, planned: list[PlannedSite]) -> int:
    """Replaces the sites that have a proof and no reason against them, in place; returns how many."""
    shared: dict[Any, tuple[Node, ...]] = {}
    replaced = 0
    for plan in planned:
        if plan.site.reason is None and plan.proof is not None:
            _replace(plan, plan.proof, shared)
            replaced += 1
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return replaced


def _replace(plan: PlannedSite, proof: MaskProof, shared: dict[Any, tuple[Node, ...]]) -> None:
    site = plan.site
    assert site.query is not None and site.key is not None and site.value is not None
    graph = site.node.graph
    with graph.inserting_before(site.node):
        tensors = (site.query, site.key, site.value)
        if len(site.query.meta["val"].shape) == 3:
            tensors = tuple(_emit(graph, lambda x: (x.unsqueeze(1),), [t])[0] for t in tensors)  # type: ignore[assignment]
        query, key, value = tensors
        sizes = (str(query.meta["val"].shape), str(key.meta["val"].shape))
        own = (tensors, *plan.parameters.values()) if plan.policy.reads_site else None
        sharing = (proof.interval, proof.bias, plan.policy, sizes, own)
        if sharing not in shared:
            shared[sharing] = _emit_ranges(graph, plan, proof, query, key, value)
        ranges = shared[sharing]
        needs_copy = any(user.target is aten.view.default for user in site.node.users)
        flat = len(site.query.meta["val"].shape) == 3

        dtype = site.node.meta["val"].dtype

        def attend(
            query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, *bias: Tensor
        ) -> tuple[Tensor]:
            # Autocast, or a model that upcasts, leaves different dtypes: computed in the widest, returned as the original.
            widest = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
            query, key, value = query.to(widest), key.to(widest), value.to(widest)
            output, _ = torch.ops.rewriter.live_range_attention(
                query,
                key,
                value,
                start,
                end,
                None,
                None,
                bias[0] if bias else None,
                None,
                None,
                site.scale,
                site.softcap,
            )
            output = (output.squeeze(1) if flat else output).to(dtype)
            # A view of the result asks for the layout that the original product had.
            return (output.contiguous() if needs_copy else output,)

        (result,) = _emit(graph, attend, [query, key, value, *ranges], _inherited(site.node))
    site.node.replace_all_uses_with(result)


def _emit_ranges(
    graph: Graph, plan: PlannedSite, proof: MaskProof, query: Node, key: Node, value: Node
) -> tuple[Node, ...]:
    """Start and end in index space, and the key bias where there is one."""
    interval = proof.interval
    if plan.policy.adds_parameters and not plan.parameters:
        raise PolicyError(
            f"{plan.policy} has no parameters for site {plan.layer} ({plan.site.module_path or '-'}): it was not there, or was "
            "refused, when they were made; give optimize example_inputs that run the model as it will be used"
        )
    square = str(shape(query)[2]) == str(shape(key)[2])
    expressions = (interval.start, interval.end, interval.segment, proof.bias)
    data = list(dict.fromkeys(n for e in expressions for n in _data_nodes(e)))
    ids = [] if plan.input_ids is None else [plan.input_ids]

    def ranges(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        given = iter(rest)
        env = dict(zip(data, given, strict=False))
        input_ids = next(given) if ids else None
        parameters = dict(zip(plan.parameters, given, strict=True))
        num_keys = key.size(2)
        grid = key_grid(key.size(0), key.size(1), num_keys, key.device)
        start, end, segment = (key_bounds(e, env, grid) for e in expressions[:3])
        live = LiveRanges(start, end)
        extra = plan.policy.live_ranges(SiteTensors(live, segment, input_ids, query, key, value, parameters))
        bias = None if proof.bias is None else bias_tensor(proof.bias, env, grid)
        if isinstance(extra, tuple):
            extra, own_bias = extra
            bias = own_bias if bias is None else bias + own_bias
        if extra is not None:
            live = live & extra
        start, end = live.start, live.end
        if not square:
            # The operator aligns rows to the bottom right: row r of the mask has index r + K - Q.
            offset = num_keys - query.size(2)
            start, end = start + offset, torch.where(end == FOREVER, FOREVER, end + offset)
        return (start, end) if bias is None else (start, end, bias)

    return _emit(graph, ranges, [query, key, value, *data, *ids, *plan.parameters.values()])


def _data_nodes(expression: Expression | None) -> list[Node]:
    if isinstance(expression, Size):
        return [expression.node]
    if isinstance(expression, Element):
        return [expression.node, *(n for i in expression.indices for n in _data_nodes(i))]
    if isinstance(expression, Apply):
        return [n for a in expression.args for n in _data_nodes(a)]
    return []


def _inherited(node: Node) -> dict[str, Any]:
    """What the nodes that replace a node take over: where it came from, and whether a backward recomputes it."""
    names = ("nn_module_stack", "stack_trace", "recompute", "ac_graph_id")
    return {name: node.meta[name] for name in names if name in node.meta}


def _emit(
    graph: Graph, function: Callable[..., tuple[Tensor, ...]], inputs: list[Node], meta: Mapping[str, Any] | None = None
) -> tuple[Node, ...]:
    """Traces `function` on the inputs' fake values and copies its nodes, with this metadata, to the insertion point."""
    fakes = [node.meta["val"] for node in inputs]
    fake_mode = next(fake.fake_mode for fake in fakes if isinstance(fake, Tensor))  # type: ignore[attr-defined]
    with fake_mode:
        traced = make_fx(function, pre_dispatch=True)(*fakes)
    traced.graph.eliminate_dead_code()
    if any(node.op == "get_attr" for node in traced.graph.nodes):
        raise PolicyError(
            "the policy's live_ranges makes a tensor from Python values, which a compiled graph cannot hold; "
            "compare with the numbers themselves, or use torch.full and torch.arange"
        )
    copies: dict[Node, Node] = {}
    sources = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(sources)
        elif node.op == "output":
            return tuple(copies[n] for n in node.args[0])
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].meta.update(meta or {})
    raise AssertionError("a traced graph ends with its output")
