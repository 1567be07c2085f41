"""Lower to slots: each planned site reads and writes a cache of fixed size. One graph for prefill, one for decoding.

    key `[B, Hkv, C, D]`, value `[B, Hkv, C, Dv]`, index and end int32 `[B, H, C]`: C slots, H the KV heads or 1

The keys of a site live in slots; a slot is free when its key's range has ended, and then takes another key, as a register
does. Sites with the same ranges share one table of them. Several new keys attend over the slots and themselves, and
those that live on are moved to the slots; one new key takes a free slot in place, and attends over the slots alone.
State is the graph's last inputs, changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import sympy
import torch
from rewriter.passes.attention.normalize import commit
from rewriter.passes.graph.copy import GraphCopy
from rewriter.passes.graph.copy import NotCacheable
from rewriter.passes.graph.edit import call
from rewriter.passes.graph.edit import inherited
from rewriter.passes.graph.inputs import source_of
from rewriter.passes.graph.nodes import shape
from rewriter.passes.lower.cache_layout import FREE
from rewriter.passes.lower.cache_layout import CacheLayout
from rewriter.passes.lower.cache_layout import SiteLayout
from rewriter.passes.lower.cache_layout import StateTensor
from rewriter.passes.lower.cache_layout import TableLayout
from rewriter.passes.lower.cache_positions import apply_rotation
from rewriter.passes.lower.eviction import Extend
from rewriter.passes.lower.eviction import StoreDecode
from rewriter.passes.lower.eviction import StorePrefill
from rewriter.passes.lower.operator import Attend
from rewriter.passes.lower.operator import call_schedule
from rewriter.passes.lower.operator import emit_bounds
from rewriter.passes.lower.plan import PlannedSite
from rewriter.passes.masks.expression import ZERO
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import Size
from rewriter.passes.masks.expression import axes_of
from rewriter.passes.masks.expression import elements_of
from rewriter.passes.masks.expression import linear_terms
from rewriter.passes.masks.intervals import HEAD
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.masks.intervals import flatten
from rewriter.passes.policy import NO_TOKEN
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class CachedGraphs:
    """A model that runs new tokens only.

    Attributes:
        prefill: for two and more new tokens in each row.
        decode: for one.
        layout: the cache that both change.
        most_tokens: so many new tokens at once are what the graphs are for; None for any number.
        own: graphs that the policy asked for besides (`Policy.own_graphs`), by name.
    """

    prefill: GraphModule
    decode: GraphModule
    layout: CacheLayout
    most_tokens: int | None
    own: Mapping[str, GraphModule]


@dataclass(frozen=True)
class CachedLowering:
    """What a policy's own graphs are made from.

    Attributes:
        module: the graph, which stays as it is.
        planned, proofs: its sites, all of them proven.
        layout: the cache.
    """

    module: GraphModule
    planned: list[PlannedSite]
    proofs: list[MaskProof]
    layout: CacheLayout


def lower_cached(module: GraphModule, planned: list[PlannedSite]) -> CachedGraphs:
    """Two copies of a graph, lowered to slots; the graph itself stays.

    Raises:
        NotCacheable: with the reason, and the site.
    """
    proofs = []
    for plan in planned:
        where = f"site {plan.layer} ({plan.site.module_path or '-'})"
        if plan.reason is not None or plan.proof is None:
            raise NotCacheable(f"{where} is refused: {plan.reason}")
        try:
            _check(plan, plan.proof)
        except NotCacheable as reason:
            raise NotCacheable(f"{where}: {reason}") from None
        proofs.append(plan.proof)
    for plan in planned:
        commit(plan.site)
    most_tokens = _most_tokens(module, planned)
    layout = _layout(planned, proofs)
    lowered = CachedLowering(module, planned, proofs, layout)
    prefill, decode = (SlotLowering(lowered, decode=decode).run() for decode in (False, True))
    own = planned[0].policy.own_graphs(lowered)
    return CachedGraphs(prefill, decode, layout, most_tokens, own)


def _most_tokens(module: GraphModule, planned: list[PlannedSite]) -> int | None:
    """The most tokens that a call may have, the rows of the shortest table that the model slices; None for no limit.

    Raises:
        NotCacheable: the graph was traced for some numbers of tokens only, as a model that branches on it is.
    """
    tables = {
        int(size)
        for node in module.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta["val"], Tensor)
        for size in shape(node)
        if isinstance(size, int)
    }
    limits = []
    output = next(iter(reversed(module.graph.nodes)))
    if len(output.args[0]) != 1:
        raise NotCacheable("the model changes itself in its forward (frequencies that depend on the length, say)")
    for plan in planned[:1]:
        size = shape(plan.site.query)[-2]  # type: ignore[arg-type]
        if not isinstance(size, torch.SymInt):
            raise NotCacheable(f"the model fixes the number of tokens to {size}")
        tokens = size.node.expr
        for guard in size.node.shape_env.guards:
            if guard.expr.free_symbols != tokens.free_symbols:
                continue
            relation = isinstance(guard.expr, (sympy.Le, sympy.Ne)) and guard.expr.lhs == tokens
            if relation and guard.expr.rhs in tables:
                limits.append(int(guard.expr.rhs) - isinstance(guard.expr, sympy.Ne))
            elif not all(guard.expr.subs(tokens, number) for number in (2, 3, 7, 64, 5000, 2**20 - 3)):
                raise NotCacheable(f"the model does different things for different numbers of tokens ({guard.expr})")
    return min(limits, default=None)


def _check(plan: PlannedSite, proof: MaskProof) -> None:
    site, interval = plan.site, proof.interval
    assert site.query is not None and site.key is not None
    if proof.given:
        raise NotCacheable(f"a call gives its mask ({proof.name}) for pairs of query and key")
    if proof.others:
        raise NotCacheable(f"under its mask ({proof.name}) a key comes back")
    if len(shape(site.key)) != 4:
        raise NotCacheable("heads are folded into the batch")
    if str(shape(site.query)[2]) != str(shape(site.key)[2]):
        raise NotCacheable("it is cross-attention")
    starts = flatten("max", interval.start)
    if not interval.causal or Axis(KEY) not in starts or any(not _begins_early(s) for s in starts):
        raise NotCacheable(f"a key must be seen from its own query on, and its mask is: {proof.name}")
    for expression in (interval.start, interval.end, interval.segment, proof.bias):
        for part in _parts(expression):
            if isinstance(part, Size):
                raise NotCacheable(f"its mask ({proof.name}) depends on the length of the call")
            if isinstance(part, Apply) and part.name in ("document_start", "document_end"):
                raise NotCacheable("packed documents do not go on")
            if isinstance(part, Apply) and part.name == "running_topk_end":
                raise NotCacheable("the model's own top-k has no recurrent form here")
            if isinstance(part, Element) and _is_state(part.node) and any(axes_of(i) & {KEY} for i in part.indices):
                raise NotCacheable(f"its mask reads {source_of(part.node).name or part.node.name} at the key's index")
            if isinstance(part, Element) and any(axes_of(i) & {KEY} and i != Axis(KEY) for i in part.indices):
                raise NotCacheable(f"its mask ({proof.name}) reads data at another place than the key's own")
            if isinstance(part, Apply) and part.name in ("run_start", "run_end"):
                raise NotCacheable(f"its mask ({proof.name}) looks at the tokens around a key")
            if isinstance(part, Element) and part.node.target is aten.cumsum.default:
                raise NotCacheable(f"its mask ({proof.name}) adds up earlier tokens")
            if (
                isinstance(part, Element)
                and not any(axes_of(i) & {KEY} for i in part.indices)
                and not _is_state(part.node)
            ):
                raise NotCacheable(
                    f"its mask ({proof.name}) depends on the whole row, of which later tokens are a part"
                )


def _begins_early(start: Expression) -> bool:
    """Whether a start is at most the key's own index: the index itself, 0, or the begin of its chunk."""
    if start in (Axis(KEY), ZERO):
        return True
    return isinstance(start, Apply) and start.name == "mul" and isinstance(start.args[1], Const) and (
        start.args[0] == Apply("floordiv", (Axis(KEY), start.args[1]))
    )  # fmt: skip


def _is_state(node: Node) -> bool:
    """Whether a node is a parameter or buffer of the model, and not an argument of the call."""
    return source_of(node).kind not in ("", "argument")


def _parts(expression: Expression | None) -> list[Expression]:
    if isinstance(expression, Apply):
        return [expression, *(p for a in expression.args for p in _parts(a))]
    return [] if expression is None else [expression, *elements_of(expression)]


def _window(interval: Interval) -> int | None:
    """Queries that see a key, where the end of the model's own range is its index and a constant."""
    windows = []
    for end in flatten("min", interval.end):
        terms = dict(linear_terms(end) or {})
        if terms.pop(Axis(KEY), 0) == 1 and set(terms) <= {Const(1)}:
            windows.append(terms.get(Const(1), 0))
    return min(windows) if windows and min(windows) > 0 else None


def _is_per_head(policy: Any, interval: Interval) -> bool:
    """Whether each head of each site has ranges of its own; under a window the kept keys' positions decide, which differ."""
    return bool(policy.reads_site or (policy.positions_repeat and interval.sliding))


def _differs_by_head(bias: Expression | None) -> bool:
    """Whether each head has a bias of its own per key, as ALiBi is."""
    return bias is not None and HEAD in axes_of(bias)


def _layout(planned: list[PlannedSite], proofs: list[MaskProof]) -> CacheLayout:
    tables: dict[Any, list[int]] = {}
    for number, (plan, proof) in enumerate(zip(planned, proofs, strict=True)):
        own = number if _is_per_head(plan.policy, proof.interval) else None
        heads = plan.num_slot_heads if own is not None or _differs_by_head(proof.bias) else 1
        tables.setdefault((proof.interval, proof.bias, plan.policy, own, heads), []).append(number)
    table_of = {number: t for t, sites in enumerate(tables.values()) for number in sites}
    sites = []
    for number, plan in enumerate(planned):
        key, value = (t.meta["val"] for t in (plan.site.key, plan.site.value))  # type: ignore[union-attr]
        heads = plan.num_slot_heads
        store = (
            StateTensor("key", ("B", heads, "C", int(key.size(3))), key.dtype, 0),
            StateTensor("value", ("B", heads, "C", int(value.size(3))), value.dtype, 0),
        )
        sites.append(SiteLayout(plan.layer, table_of[number], store))
    layouts = []
    for (interval, bias, policy, _, heads), members in tables.items():
        each_key = ("B", heads, "C")
        state = [
            StateTensor("length", (1,), torch.int32, 0),
            StateTensor("forgotten", (1,), torch.int32, 0),
            StateTensor("lost", (1,), torch.int32, 0),
            StateTensor("origin", ("B", 1, 1), torch.int32, NO_TOKEN),
            StateTensor("index", each_key, torch.int32, FREE),
            StateTensor("end", each_key, torch.int32, 0),
        ]
        if policy.ranks_hidden_keys and interval.sliding:
            state.append(StateTensor("limit", each_key, torch.int32, 0))
        if bias is not None or policy.has_bias:
            state.append(StateTensor("bias", each_key, torch.float32, 0))
        if policy.positions == "cache":
            state.append(StateTensor("position", each_key, torch.int64, 0))
        state.extend(StateTensor(f"slot.{n}", each_key, dtype, 0) for n, dtype in policy.slot_fields.items())
        state.extend(StateTensor(f"row.{n}", ("B", 1, 1), dtype, -1) for n, dtype in policy.row_fields.items())
        layouts.append(TableLayout(policy, _window(interval), tuple(members), tuple(state)))
    return CacheLayout(tuple(layouts), tuple(sites))


@dataclass
class Table:
    """The nodes of one table in one graph: its state, what its sites share, after `Policy.extend`, and the schedules of sites of
    the same dtypes and sizes."""

    state: dict[str, Node]
    shared: dict[str, Node] = field(default_factory=dict)
    schedules: dict[Any, tuple[Node, ...]] = field(default_factory=dict)


class SlotLowering(GraphCopy):
    """One of the graphs, in the making.

    A policy's own graph derives from it: `fields` are the policy's `slot_fields` that its sites need, and `attend` puts the
    operator in a site's place.
    """

    fields: tuple[str, ...] = ()

    def __init__(self, lowered: CachedLowering, *, decode: bool) -> None:
        super().__init__(lowered.module)
        self.planned, self.proofs, self.layout, self.decode = lowered.planned, lowered.proofs, lowered.layout, decode
        self.angles: dict[Any, tuple[Node, ...]] = {}

    def run(self) -> GraphModule:
        tables = [Table(self._placeholders(f"table{t}", table.state)) for t, table in enumerate(self.layout.tables)]
        sites = [self._placeholders(f"site{s}", site.state) for s, site in enumerate(self.layout.sites)]
        for number, (plan, proof) in enumerate(zip(self.planned, self.proofs, strict=True)):
            table = self.layout.sites[number].table
            node = self.copies[plan.site.node]
            with self.graph.inserting_before(node):
                if not tables[table].shared:
                    self._extend(tables[table], self.layout.tables[table], plan, proof)
                result = self._replace(tables[table], plan, sites[number])
            node.replace_all_uses_with(result)
            self.copies[plan.site.node] = result  # which may be the query, key or value of a later site
        self.check_numbering(self.planned[0].site.query)  # type: ignore[arg-type]
        return self.finish()

    def _placeholders(self, prefix: str, state: tuple[StateTensor, ...]) -> dict[str, Node]:
        return {s.name: self.placeholder(f"{prefix}_{s.name}") for s in state}

    def _extend(self, table: Table, layout: TableLayout, plan: PlannedSite, proof: MaskProof) -> None:
        """The table's part: which keys live how long, and what becomes of them."""
        site = plan.site
        query, key, value = (self.copies[n] for n in (site.query, site.key, site.value))  # type: ignore[index]
        length = table.state["length"]
        with site.node.meta["val"].fake_mode:
            length.meta["val"] = torch.zeros(1, dtype=torch.int32, device=site.node.meta["val"].device)
        bounds = emit_bounds(self.graph, proof, key, self.copies, length)
        inputs = {"query": query, "key": key, "value": value}
        inputs.update(zip(("start", "limit", "segment", "index", "bias"), bounds, strict=False))
        if plan.input_ids is not None:
            inputs["input_ids"] = self.copies[plan.input_ids]
        inputs.update({f"parameter.{name}": self.copies[node] for name, node in plan.parameters.items()})
        module = Extend(layout, self.decode, tuple(inputs), tuple(table.state), self.fields)
        nodes = call(self.graph, module, [*inputs.values(), *table.state.values()], len(module.shared))
        table.shared = dict(zip(module.shared, nodes, strict=True))

    def _replace(self, table: Table, plan: PlannedSite, store: Mapping[str, Node]) -> Node:
        """A site's part: its keys to their slots, and its queries over them."""
        shared = table.shared
        tensors = [plan.site.query, plan.site.key, plan.site.value]
        if plan.rotations is not None:
            tensors[:2] = [r.content for r in plan.rotations]
        query, key, value = (self.copies[n] for n in tensors)  # type: ignore[index]
        if plan.rotations is not None:
            query, key = (r.by_head(self.graph, n) for r, n in zip(plan.rotations, (query, key), strict=True))
        copies = plan.num_slot_heads // plan.num_kv_heads
        if copies > 1:
            key, value = (
                self.graph.call_function(aten.repeat_interleave.self_int, (t, copies, 1)) for t in (key, value)
            )
        where = [shared[name] for name in (("slot", "seen") if self.decode else ("chosen", "source")) if name in shared]
        module = StoreDecode() if self.decode else StorePrefill()
        keys, values = call(self.graph, module, [key, value, store["key"], store["value"], *where], 2)
        if plan.rotations is not None:
            for_query, for_key = plan.rotations
            query = apply_rotation(self.graph, for_query, query, shared["own_place"], self.angles, self.copies)
            keys = apply_rotation(self.graph, for_key, keys, shared["place"], self.angles, self.copies)
        return self.attend(table, plan, query, keys, values)

    def attend(self, table: Table, plan: PlannedSite, query: Node, keys: Node, values: Node) -> Node:
        """The operator, at the insertion point: the queries of a site over the keys of its slots and the new ones."""
        ranges = [table.shared.get(name) for name in ("start", "end", "query_index", "bias")]
        sinks = None if plan.site.sinks is None else self.copies[plan.site.sinks]
        schedule: tuple[Node, ...] = ()
        if not self.decode:
            given = [query, keys, values, *ranges[:3]]
            schedule = call_schedule(self.graph, plan.site, given, table.schedules, plan.num_slot_heads)
        inputs = [query, keys, values, *ranges, sinks, *schedule]
        return call(self.graph, Attend(plan.site), inputs, meta=inherited(plan.site.node))[0]
