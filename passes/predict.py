"""Predict: what each planned site would compute and keep, for a row of a chosen length.

Nothing is run: a site's own ranges are evaluated from its proof, for one row, one document without padding, and the policy's
from the call's own tokens, repeated to the length. Scores that depend on query, key or value are random, which changes which
keys are kept and not how many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import sympy
import torch
from rewriter.kernels import LiveRanges
from rewriter.kernels.costs import Cost
from rewriter.kernels.costs import Work
from rewriter.kernels.costs import costs
from rewriter.kernels.costs import fused_work
from rewriter.kernels.costs import live_range_work
from rewriter.passes.graph.inputs import GraphInput
from rewriter.passes.graph.inputs import source_of
from rewriter.passes.graph.nodes import shape
from rewriter.passes.lower.kernel import Kernel
from rewriter.passes.lower.kernel import plain_kernel
from rewriter.passes.lower.plan import PlannedSite
from rewriter.passes.masks.check import Sizes
from rewriter.passes.masks.check import Trial
from rewriter.passes.masks.evaluate import key_bounds
from rewriter.passes.masks.evaluate import key_grid
from rewriter.passes.masks.interpret import IndexFunctions
from rewriter.passes.masks.intervals import MaskProof
from rewriter.passes.policy import SiteTensors
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True)
class ExampleSequence:
    """What is predicted for.

    Attributes:
        length: tokens; those of the call when left out. A model that fixes its sizes keeps them.
        values: of the call's arguments, by name, where the call itself was given none (a meta device).
    """

    length: int | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)


PICTURE_KEYS = 96
"""Most keys of a picture; of a longer row as many are chosen, evenly."""


@dataclass(frozen=True)
class Prediction:
    """What one site would do with one row. Pairs and FLOPs are those of all its query heads.

    Attributes:
        num_queries, num_keys: of the row.
        dense_pairs: (query, key) pairs of attention without any mask.
        own_pairs: those that the model's own mask shows.
        live_pairs: those that are left under the policy.
        computed_pairs: those that the site's kernel computes; of live ranges, the CPU's.
        flops: of the two products, for `computed_pairs`: `2 (D + Dv)` each.
        own_pressure, pressure: the most keys alive at one query of a head, by the model's own mask, and under the policy.
        kv_bytes: of the keys and values alive at once, all KV heads.
        dense_kv_bytes: of all keys and values.
        own_bars, bars: first and last query (exclusive) of evenly chosen keys of the first head, without and with the policy;
            a picture of the mask.
        note: what was assumed, or why there is no policy in it.
        speed: of this attention's forward, relative to torch's fused kernel under the model's own mask, by `kernels.costs`; None
            where nothing was measured on the device, or for logits with more in them than a scale.
    """

    num_queries: int
    num_keys: int
    dense_pairs: int
    own_pairs: int
    live_pairs: int
    computed_pairs: int
    flops: int
    own_pressure: int
    pressure: int
    kv_bytes: int
    dense_kv_bytes: int
    own_bars: tuple[tuple[int, int, int], ...]
    bars: tuple[tuple[int, int, int], ...]
    note: str
    speed: float | None = None


def predict(
    planned: list[PlannedSite],
    functions: IndexFunctions,
    constants: Mapping[Node, Tensor],
    inputs: tuple[GraphInput, ...],
    row: ExampleSequence,
) -> dict[int, Prediction]:
    """Predictions by site number; a refused site has none, nor one whose mask a call gives or whose keys come back.

    Args:
        constants: buffers among the graph's inputs, with their values.
        inputs: what the call was given, for its token ids.
    """
    values = {**{i.name: i.value for i in inputs}, **row.values}
    result: dict[int, Prediction] = {}
    known: dict[Any, Prediction] = {}
    for plan in planned:
        if plan.reason is not None or plan.proof is None or plan.proof.given or plan.proof.others:
            continue
        sizes = tuple(str(shape(n)) for n in (plan.site.query, plan.site.key, plan.site.value))  # type: ignore[arg-type]
        same = (plan.proof.interval, plan.policy, sizes)
        if same not in known:
            known[same] = _predict(plan, plan.proof, functions, constants, values, row.length)
        result[plan.layer] = known[same]
    return result


LONGEST = 16384
"""Tokens up to which is looked for the length from which on a policy pays."""


@dataclass(frozen=True)
class WillNotPay:
    """A policy under which attention is predicted to be no faster than without it.

    Attributes:
        tokens: of the row that this is predicted for.
        speed: of attention, of all sites that the policy drops keys of, relative to the model's own.
        live: part of the pairs that the model's own masks show which is left.
        pays_from: a length from which on it is faster, a power of two; None where there is none up to `LONGEST`.
    """

    tokens: int
    speed: float
    live: float
    pays_from: int | None


def will_not_pay(
    planned: list[PlannedSite],
    functions: IndexFunctions,
    constants: Mapping[Node, Tensor],
    inputs: tuple[GraphInput, ...],
) -> WillNotPay | None:
    """What is lost in time by the policy, at the lengths of the call; None where it gains, drops nothing, or is not known.

    Nor is it asked of texts that are longer than `LONGEST`, which would take long.
    """
    sites = [plan for plan in planned if plan.reason is None and not plan.policy.is_lossless]

    def at(length: int | None) -> tuple[int, float, float] | None:
        found = predict(sites, functions, constants, inputs, ExampleSequence(length)).values()
        speeds = [p.speed for p in found if p.speed is not None]
        if not speeds or len(speeds) < len(found):
            return None
        live = sum(p.live_pairs for p in found) / max(1, sum(p.own_pairs for p in found))
        return max(p.num_keys for p in found), len(speeds) / sum(1 / speed for speed in speeds), live

    if any(not _has_speed(plan) or _traced_keys(plan) > LONGEST for plan in sites):
        return None
    now = at(None)
    if now is None or now[1] >= 1:
        return None
    longer = [2**n for n in range(5, LONGEST.bit_length()) if 2**n > now[0]]
    pays_from = next((length for length in longer if (then := at(length)) is not None and then[1] >= 1), None)
    return WillNotPay(*now, pays_from)


class _OneSequence(Trial):
    """Data of one row without padding: masks are ones, positions count from 0, so that there is one document."""

    def _value(self, node: Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, Tensor) and "position" in source_of(node).name:
            sizes = self.sizes(node)
            return torch.arange(sizes[-1]).expand(sizes)
        return super()._value(node)


def _predict(
    plan: PlannedSite,
    proof: MaskProof,
    functions: IndexFunctions,
    constants: Mapping[Node, Tensor],
    values: Mapping[str, Any],
    length: int | None,
) -> Prediction:
    site = plan.site
    assert site.query is not None and site.key is not None and site.value is not None
    trial = _OneSequence(functions, constants, Sizes(chosen_sizes(plan, length)), "ones", [])
    query, key, value = (trial.sizes(node) for node in (site.query, site.key, site.value))
    query_heads, heads = (query[1], key[1]) if len(query) == 4 else (1, 1)
    grid = key_grid(1, heads, key[-2], torch.device("cpu"))
    own = LiveRanges(*(key_bounds(e, trial, grid)[:1] for e in (proof.interval.start, proof.interval.end)))
    live, note = _under_policy(plan, proof, trial, own, grid, values, (query, key, value))
    rows = torch.arange(query[-2], dtype=torch.int32)

    def per_head(pairs: int, ranges: LiveRanges) -> int:
        return pairs * query_heads // ranges.shape[1]

    width = key[-1] + value[-1]
    kernel, work = _work(plan.kernel, live, query, key, width)
    slot = heads * width * site.key.meta["val"].element_size()
    pressure = live.pressure(rows)
    return Prediction(
        num_queries=query[-2],
        num_keys=key[-2],
        dense_pairs=query[-2] * key[-2] * query_heads,
        own_pairs=per_head(own.live_pairs(rows), own),
        live_pairs=per_head(live.live_pairs(rows), live),
        computed_pairs=work.pairs,
        flops=2 * width * work.pairs,
        own_pressure=own.pressure(rows),
        pressure=pressure,
        kv_bytes=pressure * slot,
        dense_kv_bytes=key[-2] * slot,
        own_bars=_bars(own, query[-2]),
        bars=_bars(live, query[-2]),
        note=note,
        speed=_speed(plan, proof, own, kernel, work, query, key) if _is_plain(plan) else None,
    )


def _work(kernel: Kernel, live: LiveRanges, query: list[int], key: list[int], width: int) -> tuple[str, Work]:
    """What computes these ranges, by its name among the costs, and its work; of live ranges as the CPU's kernel does it."""
    query_heads, kv_heads = (query[1], key[1]) if len(query) == 4 else (1, 1)
    num_queries, num_keys = query[-2], key[-2]
    if kernel is Kernel.LIVE_RANGE:
        return "live_range", live_range_work(live, num_queries, query_heads, kv_heads, width)
    name = "masked" if kernel is Kernel.MASKED else "causal"
    return name, fused_work(num_queries, num_keys, query_heads, width, is_causal=kernel is Kernel.CAUSAL)


def _speed(
    plan: PlannedSite, proof: MaskProof, own: LiveRanges, kernel: str, work: Work, query: list[int], key: list[int]
) -> float | None:
    """Relative to torch's kernel under the model's own mask: causal or full where that is all of it, else with a mask."""
    known = _costs_of(plan)
    if known is None:
        return None
    its_kernel = plain_kernel(plan.site, proof) or Kernel.MASKED
    name, its_work = _work(its_kernel, own, query, key, work.width)
    threads = torch.get_num_threads()
    its, ours = known[name].seconds(its_work, threads), known[kernel].seconds(work, threads)
    return its / ours if its and ours else None  # neither of them sees anything


def _costs_of(plan: PlannedSite) -> dict[str, Cost] | None:
    """What the kernels of a site's device take; on no device, a CPU's."""
    device = plan.site.node.meta["val"].device.type
    return costs("cpu" if device == "meta" else device)


def _is_plain(plan: PlannedSite) -> bool:
    """Whether a site's logits are a product with a scale, and a mask."""
    return plan.site.softcap is None and (plan.proof is None or plan.proof.bias is None) and not plan.policy.has_bias


def _has_speed(plan: PlannedSite) -> bool:
    return _is_plain(plan) and _costs_of(plan) is not None


def chosen_sizes(plan: PlannedSite, length: int | None) -> dict[sympy.Symbol, int]:
    """Values of the symbols in a site's sizes: one row; the length for those of its queries and keys."""
    assert plan.site.query is not None and plan.site.key is not None
    symbols: dict[sympy.Symbol, int] = {}
    for node in plan.site.node.graph.nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt):
                symbols.update(_traced(size))
    if length is None:
        return symbols
    rows, keys = (_symbols_of(node) for node in (plan.site.query, plan.site.key))
    traced = _traced_keys(plan)
    # A padding mask's length is a symbol of its own; it was the keys' when traced. Keys of a cache are left out.
    new = rows or keys
    chosen = {s: length if s in new or value == traced else value for s, value in symbols.items()}
    return {s: 0 if s in keys - new else value for s, value in chosen.items()}


def sizes_of_row(plan: PlannedSite, length: int) -> dict[sympy.Symbol, int]:
    """Values of the symbols of a graph's sizes for one row of a length."""
    assert plan.site.query is not None
    rows = plan.site.query.meta["val"].shape[0]
    alone = rows.node.expr.free_symbols if isinstance(rows, torch.SymInt) else set()
    return {symbol: 1 if symbol in alone else size for symbol, size in chosen_sizes(plan, length).items()}


def _traced_keys(plan: PlannedSite) -> int:
    """Keys of a site in the call that was traced."""
    assert plan.site.key is not None
    size = shape(plan.site.key)[-2]
    return int(size.node.expr.subs(_traced(size))) if isinstance(size, torch.SymInt) else int(size)


def _traced(size: torch.SymInt) -> dict[sympy.Symbol, int]:
    """What the symbols of a size were in the call that was traced; 1 where that is decided by data."""
    known = size.node.shape_env.backed_var_to_val
    return {symbol: int(known.get(symbol, 1)) for symbol in size.node.expr.free_symbols}


def _symbols_of(node: Node) -> set[sympy.Symbol]:
    """Of a site's tensor: those of its length."""
    size = shape(node)[-2]
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _under_policy(
    plan: PlannedSite,
    proof: MaskProof,
    trial: Trial,
    own: LiveRanges,
    grid: Mapping[int, Tensor],
    values: Mapping[str, Any],
    sizes: tuple[list[int], ...],
) -> tuple[LiveRanges, str]:
    """The ranges under the site's policy, and what was assumed for them."""
    policy, notes = plan.policy, []
    if policy.is_program:
        return own, f"{type(policy).__name__} is a program of two phases; this is the model's own mask"
    index = torch.arange(own.num_keys, dtype=torch.int32)[None, None, :]
    ids = None
    if policy.needs_input_ids:
        ids = _sequence_of_ids(plan, values, own.num_keys)
        if ids is None:
            return own, "the token ids have no values (a meta device): this is the model's own mask"
        notes.append("the tokens of the call's last row, repeated")
    tensors = []
    random = torch.Generator().manual_seed(0)
    for size in sizes:
        whole = [1, *size[-3:]] if len(size) == 4 else [1, 1, *size[-2:]]
        tensors.append(torch.randn(whole, generator=random) if policy.reads_site else torch.zeros(1).expand(whole))
    if policy.reads_site:
        notes.append("random scores")
    parameters = {}
    if policy.adds_parameters:
        parameters = policy.initial_parameters(plan.layer, plan.num_kv_heads, plan.value_dim)
    segment = key_bounds(proof.interval.segment, trial, grid)[:1]
    origin = SiteTensors.first_token(own, index)
    query, key, value = tensors
    extra = policy.live_ranges(SiteTensors(own, segment, index, origin, ids, query, key, value, parameters))
    extra = extra[0] if isinstance(extra, tuple) else extra
    return own if extra is None else own & extra, "; ".join(notes)


def _sequence_of_ids(plan: PlannedSite, values: Mapping[str, Any], length: int) -> Tensor | None:
    """int64 `[1, length]`: the last row of the call's token ids, again and again; None where they have no values."""
    assert plan.input_ids is not None
    given = values.get(source_of(plan.input_ids).name)
    if not isinstance(given, Tensor) or given.is_meta or isinstance(given, torch._subclasses.FakeTensor):
        return None
    row = given[-1].detach().cpu()
    return row.repeat(-(-length // len(row)))[None, :length]


def _bars(live: LiveRanges, num_queries: int) -> tuple[tuple[int, int, int], ...]:
    """`(key, first query, query after the last)` of up to `PICTURE_KEYS` keys of the first head; keys never seen left out."""
    chosen = torch.linspace(0, live.num_keys - 1, min(live.num_keys, PICTURE_KEYS)).round().long()
    start, end = (t.expand(live.shape)[0, 0, chosen].clamp(0, num_queries) for t in (live.start, live.end))
    rows = zip(chosen.tolist(), start.tolist(), end.tolist(), strict=True)
    return tuple((key, begin, after) for key, begin, after in rows if after > begin)
