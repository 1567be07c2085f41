"""Eviction: new keys join a table of live ranges and take the slots of keys whose ranges have ended.

Submodules of the graphs that `slots.py` makes, in plain torch. A table's module asks the policy which keys live how long
and says which slots they get; a site's module moves keys and values there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rewriter.kernels import LiveRanges
from rewriter.passes.lower.cache_layout import FREE
from rewriter.passes.lower.cache_layout import TableLayout
from rewriter.passes.lower.cache_positions import gather_keys
from rewriter.passes.lower.cache_positions import split_by_epoch_positions
from rewriter.passes.policy import Extended
from rewriter.passes.policy import SiteTensors
from rewriter.passes.policy import Slots
from torch import Tensor
from torch import nn


class Extend(nn.Module):
    """New keys join a table: its state changes in place, and its sites get what they need, as a tuple.

    Args:
        decode: for one new key; else for several.
        inputs, state: names of the arguments, in order.
        fields: of the policy's `slot_fields`, those that the sites need.
    """

    def __init__(
        self,
        layout: TableLayout,
        decode: bool,
        inputs: tuple[str, ...],
        state: tuple[str, ...],
        fields: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.layout, self.decode, self.inputs, self.state = layout, decode, inputs, state
        shared = ["slot", "seen"] if decode else ["chosen"]
        shared += ["start", "end", "query_index"]
        if "bias" in state:
            shared.append("bias")
        if layout.policy.positions == "cache":
            shared += ["place", "own_place"] if decode else ["source", "place", "own_place"]
        self.shared = (*shared, *fields)

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
        function = _decode_key if self.decode else _prefill_keys
        table, shared = function(self.layout, state, site, given.get("bias"))
        result = tuple(shared[name] for name in self.shared)
        for name, new in table.items():
            state[name].copy_(new)
        return result


class StorePrefill(nn.Module):
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


class StoreDecode(nn.Module):
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
    """The slots and the new keys, each with its fields by name, after `Policy.extend`.

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
    layout: TableLayout, state: Mapping[str, Tensor], site: SiteTensors, bias: Tensor | None, *, decode: bool
) -> _Joined:
    policy, now = layout.policy, state["length"]
    heads, num_new = state["index"].shape[:2], site.key.size(2)
    order = None
    if policy.needs_order(decode):
        order = torch.where(state["end"] > now, state["index"], FREE).argsort(dim=2, stable=True)
    extended = policy.extend(_policy_slots(state, now, order), site)
    slot_end = extended.slot_end.expand(state["end"].shape).to(torch.int32)
    if order is not None:
        slot_end = torch.empty_like(state["end"]).scatter(2, order, slot_end)
    old = {n: t for n, t in state.items() if n in ("index", "limit", "bias") or n.startswith("slot.")}
    old["end"] = torch.minimum(state["end"], slot_end)
    limit = site.live.end
    new = {"index": site.index}
    new["end"] = (
        torch.where(site.is_token, extended.end, 0) if policy.ranks_hidden_keys else torch.minimum(extended.end, limit)
    )
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


def _prefill_keys(
    layout: TableLayout, state: Mapping[str, Tensor], site: SiteTensors, bias: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the table after the new keys, what its sites need): those that live on move to the first slots, in their order."""
    now, num_new, capacity = state["length"], site.key.size(2), state["index"].size(2)
    joined = _join(layout, state, site, bias, decode=False)
    keys = {name: torch.cat((joined.old[name], new), dim=2) for name, new in joined.new.items()}
    stop = now + num_new
    lives_on = keys["end"] > stop
    place = lives_on.to(torch.int32).cumsum(dim=2, dtype=torch.int32)
    count = place[:, :, -1:]
    number = torch.arange(keys["end"].size(2), device=now.device).expand_as(place)
    # Those that go have places behind the slots, one each: runtimes differ in what they make of a place that is taken twice.
    target = torch.where(lives_on & (place <= capacity), place - 1, capacity + number)
    chosen = target.new_zeros(*target.shape[:2], capacity + number.size(2)).scatter(2, target, number)[:, :, :capacity]
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
        table["position"], split = _prefill_positions(layout, keys, joined, chosen, now, num_new)
        return table, {**shared, **split}
    shared.update({name: keys[f"slot.{name}"] for name in layout.policy.slot_fields})
    start = site.live.start.expand(*keys["end"].shape[:2], num_new)
    shared.update(start=torch.cat((joined.old["index"], start), dim=2), end=_visible_end(keys))
    return table, {**shared, "bias": keys["bias"]} if "bias" in keys else shared


def _prefill_positions(
    layout: TableLayout, keys: Mapping[str, Tensor], joined: _Joined, chosen: Tensor, now: Tensor, num_new: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the places of the survivors, the keys of each epoch as the sites of a prefill want them)."""
    assert joined.order is not None
    capacity = joined.order.size(2)
    new = capacity + torch.arange(num_new, device=now.device)
    order = torch.cat((joined.order, new.expand(*joined.order.shape[:2], num_new)), dim=2)
    end = keys["end"].gather(2, order)
    index = torch.where(end > now, keys["index"].gather(2, order), FREE)
    split = split_by_epoch_positions(layout.policy, index, end, joined.extended, now, num_new)
    rank = ((end > now + num_new).to(torch.int64).cumsum(dim=2) - 1).clamp(min=0)
    position = torch.zeros_like(rank).scatter(2, order, rank).gather(2, chosen)
    return position, {
        "source": order[:, 0].gather(1, split.source),
        "place": split.position,
        "start": split.start,
        "end": split.end,
        "own_place": split.query_position,
    }


def _decode_key(
    layout: TableLayout, state: Mapping[str, Tensor], site: SiteTensors, bias: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the table after the new key, what its sites need): it takes the first free slot, if anyone will see it."""
    now, capacity = state["length"], state["index"].size(2)
    joined = _join(layout, state, site, bias, decode=True)
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
