"""Lower to slots: each planned site reads and writes a cache of fixed size. One graph for several new tokens, one for one.

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

import torch
from rewriter.kernels import LiveRanges
from rewriter.passes.analyse_masks import KEY
from rewriter.passes.analyse_masks import Interval
from rewriter.passes.analyse_masks import MaskProof
from rewriter.passes.apply_policy import NO_TOKEN
from rewriter.passes.apply_policy import Extended
from rewriter.passes.apply_policy import PlannedSite
from rewriter.passes.apply_policy import SiteTensors
from rewriter.passes.apply_policy import Slots
from rewriter.passes.index_functions import ZERO
from rewriter.passes.index_functions import Apply
from rewriter.passes.index_functions import Axis
from rewriter.passes.index_functions import Const
from rewriter.passes.index_functions import Element
from rewriter.passes.index_functions import Expression
from rewriter.passes.index_functions import Size
from rewriter.passes.index_functions import axes_of
from rewriter.passes.index_functions import elements_of
from rewriter.passes.index_functions import linear_terms
from rewriter.passes.index_functions import shape
from rewriter.passes.lower import Attend
from rewriter.passes.lower import call
from rewriter.passes.lower import emit_bounds
from rewriter.passes.lower import gather_keys
from rewriter.passes.lower import inherited
from rewriter.passes.lower import split_by_place
from rewriter.passes.lower import turned
from torch import Tensor
from torch import nn
from torch.fx import Graph
from torch.fx import GraphModule
from torch.fx import Node

aten = torch.ops.aten

FREE = -1
"""The `index` of a slot without a key."""


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a cache.

    Attributes:
        name: what it is called within its table or site.
        shape: sizes; "B" for the rows of the batch, "C" for the slots.
        fill: its value in an empty cache.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    fill: int | float | bool

    def make(self, batch_size: int, capacity: int, device: torch.device | str | None) -> Tensor:
        sizes = [{"B": batch_size, "C": capacity}.get(s, s) if isinstance(s, str) else s for s in self.shape]
        return torch.full(sizes, self.fill, dtype=self.dtype, device=device)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TableLayout:
    """The slots' ranges, shared by the sites that have the same.

    Attributes:
        policy: whose ranges they are.
        window: queries that see a key under the model's own mask, where that is a constant.
        sites: positions in `CacheLayout.sites`.
        state: in the order of the graphs' inputs.
    """

    policy: Any
    window: int | None
    sites: tuple[int, ...]
    state: tuple[StateTensor, ...]

    def capacity(self, max_length: int) -> int:
        """Slots that are never too few for a text of so many tokens."""
        pressure = min(max_length, self.policy.pressure(max_length))
        return pressure if self.window is None or self.policy.competes else min(pressure, self.window)


@dataclass(frozen=True)
class SiteLayout:
    """The keys and values of one attention."""

    layer: int
    table: int
    state: tuple[StateTensor, ...]


@dataclass(frozen=True)
class CacheLayout:
    """What a cache holds; its tensors are the last inputs of the graphs: those of the tables, then those of the sites."""

    tables: tuple[TableLayout, ...]
    sites: tuple[SiteLayout, ...]


@dataclass(frozen=True)
class CachedGraphs:
    """A model that runs new tokens only.

    Attributes:
        several: for two and more new tokens in each row.
        one: for one.
        layout: the cache that both change.
    """

    several: GraphModule
    one: GraphModule
    layout: CacheLayout


class NotCacheable(Exception):
    """Why a site cannot go on from a cache."""


def lower_cached(module: GraphModule, planned: list[PlannedSite]) -> CachedGraphs:
    """Two copies of a graph, lowered to slots; the graph itself stays.

    Raises:
        NotCacheable: with the reason, and the site.
    """
    proofs = []
    for plan in planned:
        where = f"site {plan.layer} ({plan.site.module_path or '-'})"
        if plan.site.reason is not None or plan.proof is None:
            raise NotCacheable(f"{where} is refused: {plan.site.reason}")
        try:
            _check(plan, plan.proof)
        except NotCacheable as reason:
            raise NotCacheable(f"{where}: {reason}") from None
        proofs.append(plan.proof)
    layout = _layout(planned, proofs)
    several, one = (_Lowering(module, planned, proofs, layout, one=one).run() for one in (False, True))
    return CachedGraphs(several, one, layout)


def _check(plan: PlannedSite, proof: MaskProof) -> None:
    site, interval = plan.site, proof.interval
    assert site.query is not None and site.key is not None
    if len(shape(site.key)) != 4:
        raise NotCacheable("heads are folded into the batch")
    if str(shape(site.query)[2]) != str(shape(site.key)[2]):
        raise NotCacheable("it is cross-attention")
    starts = _flattened("max", interval.start)
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
                raise NotCacheable(f"its mask reads {part.node.meta.get('source', part.node.name)} at the key's index")


def _begins_early(start: Expression) -> bool:
    """Whether a start is at most the key's own index: the index itself, 0, or the begin of its chunk."""
    if start in (Axis(KEY), ZERO):
        return True
    return isinstance(start, Apply) and start.name == "mul" and isinstance(start.args[1], Const) and (
        start.args[0] == Apply("floordiv", (Axis(KEY), start.args[1]))
    )  # fmt: skip


def _is_state(node: Node) -> bool:
    """Whether a node is a parameter or buffer of the model, and not an argument of the call."""
    return node.op == "placeholder" and "." in node.meta.get("source", "")


def _flattened(name: str, expression: Expression) -> list[Expression]:
    if isinstance(expression, Apply) and expression.name == name:
        return [part for argument in expression.args for part in _flattened(name, argument)]
    return [expression]


def _parts(expression: Expression | None) -> list[Expression]:
    if isinstance(expression, Apply):
        return [expression, *(p for a in expression.args for p in _parts(a))]
    return [] if expression is None else [expression, *elements_of(expression)]


def _window(interval: Interval) -> int | None:
    """Queries that see a key, where the end of the model's own range is its index and a constant."""
    windows = []
    for end in _flattened("min", interval.end):
        terms = dict(linear_terms(end) or {})
        if terms.pop(Axis(KEY), 0) == 1 and set(terms) <= {Const(1)}:
            windows.append(terms.get(Const(1), 0))
    return min(windows) if windows and min(windows) > 0 else None


def _layout(planned: list[PlannedSite], proofs: list[MaskProof]) -> CacheLayout:
    tables: dict[Any, list[int]] = {}
    for number, (plan, proof) in enumerate(zip(planned, proofs, strict=True)):
        own = number if plan.policy.reads_site else None
        tables.setdefault((proof.interval, proof.bias, plan.policy, own), []).append(number)
    table_of = {number: t for t, sites in enumerate(tables.values()) for number in sites}
    sites = []
    for number, plan in enumerate(planned):
        key, value = (t.meta["val"] for t in (plan.site.key, plan.site.value))  # type: ignore[union-attr]
        heads = plan.num_kv_heads
        store = (
            StateTensor("key", ("B", heads, "C", int(key.size(3))), key.dtype, 0),
            StateTensor("value", ("B", heads, "C", int(value.size(3))), value.dtype, 0),
        )
        sites.append(SiteLayout(plan.layer, table_of[number], store))
    layouts = []
    for (interval, bias, policy, _), members in tables.items():
        heads = planned[members[0]].num_kv_heads if policy.reads_site else 1
        each_key = ("B", heads, "C")
        state = [
            StateTensor("length", (1,), torch.int32, 0),
            StateTensor("forgotten", (1,), torch.int32, 0),
            StateTensor("lost", (1,), torch.int32, 0),
            StateTensor("origin", ("B", 1, 1), torch.int32, NO_TOKEN),
            StateTensor("index", each_key, torch.int32, FREE),
            StateTensor("end", each_key, torch.int32, 0),
        ]
        if policy.competes and interval.sliding:
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
class _Table:
    """The nodes of one table in one graph: its state, and what its sites share once the policy has spoken."""

    state: dict[str, Node]
    shared: dict[str, Node] = field(default_factory=dict)


class _Lowering:
    """One of the two graphs, in the making."""

    def __init__(
        self,
        module: GraphModule,
        planned: list[PlannedSite],
        proofs: list[MaskProof],
        layout: CacheLayout,
        *,
        one: bool,
    ) -> None:
        self.planned, self.proofs, self.layout, self.one = planned, proofs, layout, one
        self.copies: dict[Node, Node] = {}
        graph = Graph()
        graph.output(graph.graph_copy(module.graph, self.copies))
        self.module = GraphModule(module, graph)
        self.graph = self.module.graph
        # GraphModule copies the graph that it is given.
        own = {old.name: new for old, new in zip(graph.nodes, self.graph.nodes, strict=True)}
        self.copies = {node: own[copy.name] for node, copy in self.copies.items()}
        self.angles: dict[Any, tuple[Node, ...]] = {}
        self.body = next(node for node in self.graph.nodes if node.op != "placeholder")

    def run(self) -> GraphModule:
        self._read_sizes_from_tensors()
        tables = [_Table(self._placeholders(f"table{t}", table.state)) for t, table in enumerate(self.layout.tables)]
        sites = [self._placeholders(f"site{s}", site.state) for s, site in enumerate(self.layout.sites)]
        for number, (plan, proof) in enumerate(zip(self.planned, self.proofs, strict=True)):
            table = self.layout.sites[number].table
            node = self.copies[plan.site.node]
            with self.graph.inserting_before(node):
                if not tables[table].shared:
                    self._extend(tables[table], self.layout.tables[table], plan, proof)
                result = self._attend(tables[table].shared, plan, sites[number])
            node.replace_all_uses_with(result)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.module.recompile()
        return self.module

    def _read_sizes_from_tensors(self) -> None:
        """Symbolic sizes among the inputs become the sizes of tensors."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        tensors = [node for node in inputs if isinstance(node.meta["val"], Tensor)]
        for node in inputs:
            value = node.meta["val"]
            if not isinstance(value, torch.SymInt):
                continue
            source = next(
                (t, d)
                for t in tensors
                for d, size in enumerate(t.meta["val"].shape)
                if isinstance(size, torch.SymInt) and size.node.expr == value.node.expr
            )
            with self.graph.inserting_before(self.body):
                size = self.graph.call_function(aten.sym_size.int, source)
            size.meta = dict(node.meta)
            node.replace_all_uses_with(size)
            self.copies = {k: size if v is node else v for k, v in self.copies.items()}
            self.graph.erase_node(node)

    def _placeholders(self, prefix: str, state: tuple[StateTensor, ...]) -> dict[str, Node]:
        with self.graph.inserting_before(self.body):
            return {s.name: self.graph.placeholder(f"{prefix}_{s.name}".replace(".", "_")) for s in state}

    def _extend(self, table: _Table, layout: TableLayout, plan: PlannedSite, proof: MaskProof) -> None:
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
        module = _Extend(layout, self.one, tuple(inputs), tuple(table.state))
        nodes = call(self.graph, module, [*inputs.values(), *table.state.values()], len(module.shared))
        table.shared = dict(zip(module.shared, nodes, strict=True))

    def _attend(self, shared: Mapping[str, Node], plan: PlannedSite, store: Mapping[str, Node]) -> Node:
        """A site's part: its keys to their slots, and its queries over them."""
        tensors = [plan.site.query, plan.site.key, plan.site.value]
        if plan.rotations is not None:
            tensors[:2] = [r.content for r in plan.rotations]
        query, key, value = (self.copies[n] for n in tensors)  # type: ignore[index]
        if plan.rotations is not None:
            query, key = (r.by_head(self.graph, n) for r, n in zip(plan.rotations, (query, key), strict=True))
        where = [shared[name] for name in (("slot", "seen") if self.one else ("chosen", "source")) if name in shared]
        module = _StoreOne() if self.one else _StoreSeveral()
        keys, values = call(self.graph, module, [key, value, store["key"], store["value"], *where], 2)
        if plan.rotations is not None:
            for_query, for_key = plan.rotations
            query = turned(self.graph, for_query, query, shared["own_place"], self.angles, self.copies)
            keys = turned(self.graph, for_key, keys, shared["place"], self.angles, self.copies)
        ranges = [shared[name] for name in ("start", "end", "query_index", "bias") if name in shared]
        return call(self.graph, Attend(plan.site), [query, keys, values, *ranges], meta=inherited(plan.site.node))[0]


class _Extend(nn.Module):
    """New keys join a table: its state changes in place, and its sites get what they need, as a tuple.

    Args:
        inputs, state: names of the arguments, in order.
    """

    def __init__(self, layout: TableLayout, one: bool, inputs: tuple[str, ...], state: tuple[str, ...]) -> None:
        super().__init__()
        self.layout, self.one, self.inputs, self.state = layout, one, inputs, state
        shared = ["slot", "seen"] if one else ["chosen"]
        shared += ["start", "end", "query_index"]
        if "bias" in state:
            shared.append("bias")
        if layout.policy.positions == "cache":
            shared += ["place", "own_place"] if one else ["source", "place", "own_place"]
        self.shared = tuple(shared)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, tensors, strict=False))
        state = dict(zip(self.state, tensors[len(self.inputs) :], strict=True))
        live, index = LiveRanges(given["start"], given["limit"]), given["index"]
        site = SiteTensors(
            live,
            given["segment"],
            index,
            torch.minimum(state["origin"], SiteTensors.first_token(live, index)),
            given.get("input_ids"),
            given["query"],
            given["key"],
            given["value"],
            {name.removeprefix("parameter."): t for name, t in given.items() if name.startswith("parameter.")},
        )
        function = _one_key if self.one else _several_keys
        table, shared = function(self.layout, state, site, given.get("bias"))
        result = tuple(shared[name] for name in self.shared)
        for name, new in table.items():
            state[name].copy_(new)
        return result


class _StoreSeveral(nn.Module):
    """Keys and values to attend over, those in the slots and new ones; the survivors take the slots.

    Returns:
        `[B, Hkv, C + n, D]`, or `[B, Hkv, N, D]` where `source` says which.
    """

    def forward(
        self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, source: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        result = []
        for store, new in ((keys, key), (values, value)):
            everything = torch.cat((store, new.to(store.dtype)), dim=2)
            store.copy_(everything.gather(2, chosen[..., None].expand(*store.shape[:2], -1, store.size(3))))
            result.append(everything if source is None else gather_keys(everything, source))
        return tuple(result)


class _StoreOne(nn.Module):
    """The new key and value to their slot, in place; returns the slots."""

    def forward(
        self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slot: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        num_batch, num_heads = keys.shape[:2]
        row = torch.arange(num_batch, device=keys.device)[:, None]
        head = torch.arange(num_heads, device=keys.device)[None, :]
        place = slot[..., 0].expand(num_batch, num_heads)
        for store, new in ((keys, key), (values, value)):
            written = torch.where(seen, new[:, :, 0].to(store.dtype), store[row, head, place])
            store.index_put_((row, head, place), written)
        return keys, values


def _policy_slots(state: Mapping[str, Tensor], now: Tensor, order: Tensor | None) -> Slots:
    """What the policy sees of the slots, oldest first where it asks for an order."""
    index = torch.where(state["end"] > now, state["index"], FREE)
    fields = {n.removeprefix("slot."): t for n, t in state.items() if n.startswith("slot.")}
    rows = {n.removeprefix("row."): t for n, t in state.items() if n.startswith("row.")}
    end = state["end"]
    if order is not None:
        index, end = index.gather(2, order), end.gather(2, order)
        fields = {n: t.gather(2, order) for n, t in fields.items()}
    return Slots(index, end, fields, rows)


@dataclass(frozen=True)
class _Joined:
    """The slots and the new keys, each with its fields by name, when the policy has spoken.

    Attributes:
        old: `[B, H, C]` each, in the order of the slots.
        new: `[B, H, n]` each.
        rows: what is kept of each row.
        order: int64 `[B, H, C]`, the slots from the oldest to the newest, empty ones first; None where nobody asked.
        extended: the policy's own answer, in that order.
    """

    old: dict[str, Tensor]
    new: dict[str, Tensor]
    rows: dict[str, Tensor]
    order: Tensor | None
    extended: Extended


def _join(
    layout: TableLayout, state: Mapping[str, Tensor], site: SiteTensors, bias: Tensor | None, *, one: bool
) -> _Joined:
    policy, now = layout.policy, state["length"]
    heads, num_new = state["index"].shape[:2], site.key.size(2)
    order = None
    if policy.needs_order(one):
        order = torch.where(state["end"] > now, state["index"], FREE).argsort(dim=2, stable=True)
    extended = policy.extend(_policy_slots(state, now, order), site)
    slot_end = extended.slot_end.expand(state["end"].shape).to(torch.int32)
    if order is not None:
        slot_end = torch.empty_like(state["end"]).scatter(2, order, slot_end)
    old = {n: t for n, t in state.items() if n in ("index", "limit", "bias") or n.startswith("slot.")}
    old["end"] = torch.minimum(state["end"], slot_end)
    limit = site.live.end
    new = {"index": site.index}
    new["end"] = torch.where(site.is_token, extended.end, 0) if policy.competes else torch.minimum(extended.end, limit)
    if "limit" in state:
        new["limit"] = limit
    if "bias" in state:
        biases = [b for b in (bias, extended.bias) if b is not None]
        new["bias"] = biases[0] if len(biases) == 1 else biases[0] + biases[1]
    new.update({f"slot.{n}": t for n, t in extended.fields.items()})
    new = {n: t.to(state[n].dtype).expand(*heads, num_new) for n, t in new.items()}
    rows = {f"row.{n}": t.to(state[f"row.{n}"].dtype) for n, t in extended.rows.items()}
    return _Joined(old, new, rows, order, extended)


def _visible_end(fields: Mapping[str, Tensor]) -> Tensor:
    return torch.minimum(fields["end"], fields["limit"]) if "limit" in fields else fields["end"]


def _several_keys(
    layout: TableLayout, state: Mapping[str, Tensor], site: SiteTensors, bias: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the table after the new keys, what its sites need): those that live on move to the first slots, in their order."""
    now, num_new, capacity = state["length"], site.key.size(2), state["index"].size(2)
    joined = _join(layout, state, site, bias, one=False)
    keys = {name: torch.cat((joined.old[name], new), dim=2) for name, new in joined.new.items()}
    stop = now + num_new
    lives_on = keys["end"] > stop
    place = lives_on.to(torch.int32).cumsum(dim=2, dtype=torch.int32)
    count = place[:, :, -1:]
    target = torch.where(lives_on & (place <= capacity), place - 1, capacity).long()
    number = torch.arange(keys["end"].size(2), device=now.device).expand_as(target)
    chosen = target.new_zeros(*target.shape[:2], capacity + 1).scatter(2, target, number)[:, :, :capacity]
    taken = torch.arange(capacity, device=now.device) < count
    table = {name: torch.where(taken, t.gather(2, chosen), 0) for name, t in keys.items()}
    table["index"] = torch.where(taken, table["index"], FREE)
    table.update(joined.rows)
    ended = torch.where(lives_on, 0, keys["end"]).amax().view(1)
    table["forgotten"] = torch.maximum(state["forgotten"], ended)
    table["lost"] = state["lost"] + (count > capacity).to(torch.int32).amax().view(1)
    table["origin"], table["length"] = site.origin, stop
    shared = {"chosen": chosen, "query_index": site.index[0, 0]}
    if layout.policy.positions == "cache":
        table["position"], split = _several_places(layout, keys, joined, chosen, now, num_new)
        return table, {**shared, **split}
    start = site.live.start.expand(*keys["end"].shape[:2], num_new)
    shared.update(start=torch.cat((joined.old["index"], start), dim=2), end=_visible_end(keys))
    return table, {**shared, "bias": keys["bias"]} if "bias" in keys else shared


def _several_places(
    layout: TableLayout, keys: Mapping[str, Tensor], joined: _Joined, chosen: Tensor, now: Tensor, num_new: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the places of the survivors, the keys of each epoch as `_attend_several` wants them)."""
    assert joined.order is not None
    capacity = joined.order.size(2)
    new = capacity + torch.arange(num_new, device=now.device)
    order = torch.cat((joined.order, new.expand(*joined.order.shape[:2], num_new)), dim=2)
    end = keys["end"].gather(2, order)
    index = torch.where(end > now, keys["index"].gather(2, order), FREE)
    split = split_by_place(layout.policy, index, end, joined.extended, now, num_new)
    rank = ((end > now + num_new).to(torch.int64).cumsum(dim=2) - 1).clamp(min=0)
    position = torch.zeros_like(rank).scatter(2, order, rank).gather(2, chosen)
    return position, {
        "source": order[:, 0].gather(1, split.source),
        "place": split.position,
        "start": split.start,
        "end": split.end,
        "own_place": split.query_position,
    }


def _one_key(
    layout: TableLayout, state: Mapping[str, Tensor], site: SiteTensors, bias: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the table after the new key, what its sites need): it takes the first free slot, if anyone will see it."""
    now, capacity = state["length"], state["index"].size(2)
    joined = _join(layout, state, site, bias, one=True)
    free = joined.old["end"] <= now
    slot = free.to(torch.int32).argmax(dim=2, keepdim=True)
    seen = joined.new["end"] > now
    taken = seen & (torch.arange(capacity, device=now.device) == slot)
    table = {name: torch.where(taken, joined.new[name], old) for name, old in joined.old.items()}
    table.update(joined.rows)
    ended = torch.where(free, joined.old["end"], 0).amax().view(1)
    table["forgotten"] = torch.maximum(state["forgotten"], ended)
    table["lost"] = state["lost"] + (seen & ~free.gather(2, slot)).to(torch.int32).amax().view(1)
    table["origin"], table["length"] = site.origin, now + 1
    shared = {
        "slot": slot,
        "seen": seen,
        "start": table["index"],
        "end": _visible_end(table),
        "query_index": now.clone(),
    }
    if "bias" in table:
        shared["bias"] = table["bias"]
    if layout.policy.positions == "cache":
        # Of the keys that live; the new one comes last.
        own = (~free).sum(dim=2, keepdim=True)
        place = torch.where(taken, own, state["position"])
        shared.update(place=torch.where(table["end"] > now, place, 0)[:, 0], own_place=own[:, 0])
        stays = table["end"] > now + 1
        by_place = place.new_zeros(*place.shape[:2], capacity + 1)
        by_place = by_place.scatter(2, torch.where(stays, place, capacity), stays.to(torch.int64))
        table["position"] = (by_place.cumsum(dim=2).gather(2, place) - 1).clamp(min=0)
    return table, shared
