"""Lower: each planned site becomes one `rewriter::live_range_attention`, and dead mask construction is removed.

Small functions are traced to pre-dispatch ATen and their nodes copied into the graph. Live ranges are computed once
and shared by all sites that have the same mask and policy.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import torch
from rewriter.kernels import FOREVER
from rewriter.kernels import LiveRanges
from rewriter.kernels.compaction import SplitRanges
from rewriter.kernels.compaction import split_by_epoch
from rewriter.passes.analyse_masks import KEY
from rewriter.passes.analyse_masks import MaskProof
from rewriter.passes.analyse_masks import bias_tensor
from rewriter.passes.analyse_masks import key_bounds
from rewriter.passes.analyse_masks import key_grid
from rewriter.passes.apply_policy import Extended
from rewriter.passes.apply_policy import PlannedSite
from rewriter.passes.apply_policy import PolicyError
from rewriter.passes.apply_policy import SiteTensors
from rewriter.passes.apply_policy import Slots
from rewriter.passes.find_attention import AttentionSite
from rewriter.passes.index_functions import Apply
from rewriter.passes.index_functions import Element
from rewriter.passes.index_functions import Expression
from rewriter.passes.index_functions import Size
from rewriter.passes.index_functions import shape
from rewriter.passes.rotations import Rotation
from torch import Tensor
from torch import nn
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
            tensors = tuple(emit(graph, lambda x: (x.unsqueeze(1),), [t])[0] for t in tensors)  # type: ignore[assignment]
        query, key, value = tensors
        if plan.rotations is not None:
            result = attend_by_place(plan, proof, query, key, value, shared)
        else:
            sizes = (str(query.meta["val"].shape), str(key.meta["val"].shape))
            own = (tensors, *plan.parameters.values()) if plan.policy.reads_site else None
            sharing = (proof.interval, proof.bias, plan.policy, sizes, own)
            if sharing not in shared:
                shared[sharing] = _emit_ranges(graph, plan, proof, query, key, value)

            def attend(query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, *bias: Tensor) -> Any:
                return (Attend(site)(query, key, value, start, end, None, *bias),)

            (result,) = emit(graph, attend, [query, key, value, *shared[sharing]], inherited(site.node))
    site.node.replace_all_uses_with(result)


class Attend(nn.Module):
    """The operator in a site's place: its scale and softcap, its dtype, its rank and, where it matters, its layout."""

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.scale, self.softcap = site.scale, site.softcap
        self.dtype = site.node.meta["val"].dtype
        self.flat = len(shape(site.query)) == 3  # type: ignore[arg-type]
        # A view of the result asks for the layout that the original product had.
        self.needs_copy = any(user.target is aten.view.default for user in site.node.users)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor,
        end: Tensor,
        query_index: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        # Autocast, or a model that upcasts, leaves different dtypes: computed in the widest, returned as the original.
        widest = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        query, key, value = query.to(widest), key.to(widest), value.to(widest)
        output, _ = torch.ops.rewriter.live_range_attention(
            query, key, value, start, end, query_index, None, bias, None, None, self.scale, self.softcap
        )
        output = (output.squeeze(1) if self.flat else output).to(self.dtype)
        return output.contiguous() if self.needs_copy else output


def attend_by_place(
    plan: PlannedSite, proof: MaskProof, query: Node, key: Node, value: Node, shared: dict[Any, tuple[Node, ...]]
) -> Node:
    """Attention whose positions are places in the cache: a key is one key for each epoch that it lives in."""
    graph = plan.site.node.graph
    assert plan.rotations is not None
    for_query, for_key = plan.rotations
    sharing = ("by place", proof.interval, plan.policy)
    if sharing not in shared:
        ranges = emit_bounds(graph, proof, key, {})
        ids = [] if plan.input_ids is None else [plan.input_ids]
        shared[sharing] = call(graph, _Places(plan.policy), [query, key, value, *ranges, *ids], 6)
    source, place, start, end, own_place, index = shared[sharing]
    query_content, key_content = (r.by_head(graph, r.content) for r in plan.rotations)
    keys, values = call(graph, _Gathered(), [key_content, value, source], 2)
    query = turned(graph, for_query, query_content, own_place, shared, {})
    keys = turned(graph, for_key, keys, place, shared, {})
    return call(graph, Attend(plan.site), [query, keys, values, start, end, index], meta=inherited(plan.site.node))[0]


class _Places(nn.Module):
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
        split = split_by_place(self.policy, index, torch.minimum(extended.end, end), extended, own[:1], key.size(2))
        return split.source, split.position, split.start, split.end, split.query_position, own


class _Gathered(nn.Module):
    """Keys and values, one for each epoch that they live in."""

    def forward(self, key: Tensor, value: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        return gather_keys(key, source), gather_keys(value, source)


def gather_keys(tensor: Tensor, source: Tensor) -> Tensor:
    """`[B, H, L, D]` at the places `[B|1, N]`."""
    index = source[:, None, :, None].expand(tensor.size(0), tensor.size(1), -1, tensor.size(3))
    return tensor.gather(2, index)


def split_by_place(
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


def turned(
    graph: Graph,
    rotation: Rotation,
    content: Node,
    places: Node,
    shared: dict[Any, tuple[Node, ...]],
    copies: Mapping[Node, Node],
) -> Node:
    """A content rotated for its places; the angles are computed once for all sites that have the same."""
    sharing = ("angles", rotation.angle_nodes, rotation.angles, places)
    if sharing not in shared:
        shared[sharing] = rotation.copy_angles(graph, places, copies)
    return rotation.copy(graph, content, shared[sharing], copies)


def call(
    graph: Graph, module: nn.Module, inputs: Sequence[Node], results: int = 1, meta: Mapping[str, Any] | None = None
) -> tuple[Node, ...]:
    """A submodule of the graph's module, called at the insertion point.

    Args:
        results: 1 for a tensor, else the length of the tuple that the module returns.
    """
    owner = graph.owning_module
    assert owner is not None
    kind = type(module).__name__.lstrip("_").lower()
    name = next(n for i in itertools.count() if not hasattr(owner, n := f"{kind}_{i}"))
    owner.add_module(name, module)
    node = graph.call_module(name, tuple(inputs))
    node.meta.update(meta or {})
    if results == 1:
        return (node,)
    return tuple(graph.call_function(operator.getitem, (node, i)) for i in range(results))


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
    data = _data_of(proof)
    ids = [] if plan.input_ids is None else [plan.input_ids]

    def ranges(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        given = iter(rest)
        env = dict(zip(data, given, strict=False))
        input_ids = next(given) if ids else None
        parameters = dict(zip(plan.parameters, given, strict=True))
        grid = key_grid(key.size(0), key.size(1), key.size(2), key.device)
        interval = proof.interval
        start, end, segment = (key_bounds(e, env, grid) for e in (interval.start, interval.end, interval.segment))
        live, index = LiveRanges(start, end), grid[KEY].to(torch.int32)
        origin = SiteTensors.first_token(live, index)
        site = SiteTensors(live, segment, index, origin, input_ids, query, key, value, parameters)
        extra = plan.policy.live_ranges(site)
        bias = None if proof.bias is None else bias_tensor(proof.bias, env, grid)
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

    return emit(graph, ranges, [query, key, value, *data, *ids, *plan.parameters.values()])


def emit_bounds(
    graph: Graph, proof: MaskProof, key: Node, copies: Mapping[Node, Node], length: Node | None = None
) -> tuple[Node, ...]:
    """The model's own start, end and segment, the keys' indices, and the bias of the model's own mask where it has one.

    Args:
        copies: the proof's nodes in `graph`, where that is another one.
        length: int32 `[1]`, tokens before the first key; none when left out.
    """
    data = _data_of(proof)
    before = [] if length is None else [length]

    def bounds(key: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        env = dict(zip(data, rest, strict=False))
        grid = key_grid(key.size(0), key.size(1), key.size(2), key.device, rest[-1] if before else None)
        interval = proof.interval
        ranges = [key_bounds(e, env, grid) for e in (interval.start, interval.end, interval.segment)]
        bias = [] if proof.bias is None else [bias_tensor(proof.bias, env, grid)]
        return (*ranges, grid[KEY].to(torch.int32), *bias)

    return emit(graph, bounds, [key, *(copies.get(n, n) for n in data), *before])


def _data_of(proof: MaskProof) -> list[Node]:
    """The data that a proof's ranges and bias read."""
    interval = proof.interval
    expressions = (interval.start, interval.end, interval.segment, proof.bias)
    return list(dict.fromkeys(n for e in expressions for n in _data_nodes(e)))


def _data_nodes(expression: Expression | None) -> list[Node]:
    if isinstance(expression, Size):
        return [expression.node]
    if isinstance(expression, Element):
        return [expression.node, *(n for i in expression.indices for n in _data_nodes(i))]
    if isinstance(expression, Apply):
        return [n for a in expression.args for n in _data_nodes(a)]
    return []


def inherited(node: Node) -> dict[str, Any]:
    """What the nodes that replace a node take over: where it came from, and whether a backward recomputes it."""
    names = ("nn_module_stack", "stack_trace", "recompute", "ac_graph_id")
    return {name: node.meta[name] for name in names if name in node.meta}


def emit(
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
