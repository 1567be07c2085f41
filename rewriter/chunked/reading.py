"""Reading a long context in chunks: the program of `ChunkedEviction` (ParallelComp, arXiv 2502.14317).

Phase one runs the chunks of a context, each with the query behind it and some at a time, scores them, and keeps the best keys
of the best chunks: never the keys of more than `keep_chunks` chunks and those that run. Phase two is generation over a
`LiveRangeCache` that holds what was kept; the query is its prompt. Keys of several chunks have the same positions, so masks
are built from places in the cache, and positions only rotate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.chunked.lowering import RESULTS
from rewriter.chunked.policy import ChunkedEviction
from rewriter.errors import PolicyError
from rewriter.generation.cache import ExpectedCall
from rewriter.generation.cache import LiveRangeCache
from rewriter.generation.cache import rounded_up
from rewriter.generation.decoder import Decoder
from rewriter.generation.generate import longest_text
from rewriter.generation.generate import option
from rewriter.generation.model_facts import text_config
from rewriter.kernels import FOREVER
from rewriter.passes import Policy
from rewriter.passes.lower.cache_layout import FREE

Context = Tensor | Sequence[Tensor]
"""Token ids `[N]`, which are divided into chunks, or the chunks themselves."""


@dataclass(frozen=True)
class Reading:
    """What was kept of some contexts, and why.

    Attributes:
        cache: the keys that were kept; the query comes next.
        query_ids, attention_mask, position_ids: int64 `[B, m]`, `[B, cache.length + m]` and `[B, m]`, the prompt of phase two.
        chunks: of each context its chunks, int64 `[L]` each.
        scores: of each context the negative log-likelihood of its query under each chunk, nats per token: lower is better.
        kept: of each context the numbers of the chunks that were kept.
    """

    cache: LiveRangeCache
    query_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    chunks: list[list[Tensor]]
    scores: list[list[float]]
    kept: list[list[int]]


@dataclass
class _Chunk:
    """What is left of a chunk.

    Attributes:
        length: tokens, a BOS included.
        place: int64 `[sites, H, n]`, the places of its keys in the chunk, in order.
        hidden: bool `[sites, H, n]`, what calibration has taken away.
        keys, values: of each site `[H, n, D]`.
    """

    number: int
    score: float
    length: int
    place: Tensor
    hidden: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    def take(self, name: str, site: int) -> Tensor:
        """The keys or values of a site, which are no longer kept here."""
        tensors: list[Any] = getattr(self, name)
        tensor: Tensor = tensors[site]
        tensors[site] = None
        return tensor

    def drop_first(self) -> None:
        """Gives up the first key of each head."""
        self.place, self.hidden = self.place[..., 1:], self.hidden[..., 1:]
        self.keys, self.values = ([t[:, 1:] for t in tensors] for tensors in (self.keys, self.values))


def read(
    policy: Policy,
    make_decoder: Callable[[], Decoder],
    context_ids: Context | Sequence[Context],
    query_ids: Tensor | Sequence[Tensor],
    attention_mask: Tensor | None,
    chunk_batch: int,
    options: Mapping[str, Any],
) -> Reading:
    """Phase one; see `OptimizedModel.read`.

    Args:
        make_decoder: called when the rest is checked.
    """
    policy = chunked_policy(policy)
    if isinstance(chunk_batch, bool) or not isinstance(chunk_batch, int) or chunk_batch < 1:
        raise PolicyError(f"chunk_batch must be an integer of at least 1, got {chunk_batch!r}")
    contexts = _contexts(context_ids, attention_mask)
    queries = _queries(query_ids, len(contexts))
    if policy.parity and policy.calibration and len(contexts) > 1:
        raise PolicyError("with parity=True a calibration depends on the batch; read one context at a time")
    decoder = make_decoder()
    bos = _bos(decoder.model, options)
    chunks = [_divide(context, policy.chunk, bos) for context in contexts]
    for part in (*(c for context in chunks for c in context), *queries):
        decoder.check_ids(part)
    most = max(q.numel() for q in queries)
    new = longest_text(decoder.model, most, options) - most
    _check_room(decoder.model, chunks, queries, new)
    rows, scores = [], []
    for context, query in zip(chunks, queries, strict=True):
        kept, own_scores = _read_one(decoder, policy, context, query, bos, chunk_batch)
        rows.append(kept)
        scores.append(own_scores)
    numbers = [[chunk.number for chunk in row] for row in rows]
    cache = _merge(decoder, policy, rows, chunks, queries, bos, most + new)
    if "query" in decoder.own and any(len(context) > 1 or policy.parity for context in chunks):
        cache.expected_call = ExpectedCall("query", most)
    pad = option(decoder.model, options, "pad_token_id")
    ids, mask = _padded(queries, pad if isinstance(pad, int) and 0 <= pad < decoder.vocabulary else bos or 0)
    before = torch.ones(len(rows), cache.length, dtype=torch.int64)
    positions = cache.length + (mask.cumsum(1) - 1).clamp(min=0)
    device = cache.device
    return Reading(
        cache,
        ids.to(device),
        torch.cat((before, mask), dim=1).to(device),
        positions.to(device),
        chunks,
        scores,
        numbers,
    )


def chunked_policy(policy: Policy) -> ChunkedEviction:
    """The policy, if it is one under which contexts are read in chunks.

    Raises:
        PolicyError: it is another.
    """
    if not isinstance(policy, ChunkedEviction):
        raise PolicyError(
            f"contexts are read in chunks under ChunkedEviction, and the policy is {policy}; give input_ids"
        )
    return policy


@torch.no_grad()
def run_chunks(
    decoder: Decoder,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor,
    num_query: int,
    hides: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """The first phase of a chunked eviction: chunks of a context, each with the query behind it.

    Args:
        input_ids, attention_mask, position_ids: int64 `[c, S]`; rows are padded on the left.
        num_query: tokens of the query, the last of each row; there is at least one before them.
        hides: whether the policy's calibrations hide keys.

    Returns:
        The logits for the query's tokens, `[c, num_query, vocabulary]`, and of each site in turn what `RESULTS`
        names.
    """
    length = input_ids.size(1)
    rows = torch.arange(length - num_query, length, device=input_ids.device)
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "logits_to_keep": rows - 1,
    }
    logits, *results = decoder.own["chunk"](
        *(fetch(arguments) for fetch in decoder.fetch), rows, torch.tensor([hides], device=rows.device)
    )
    return logits if decoder.takes_rows else logits[:, rows - 1], results


def _bos(model: Any, options: Mapping[str, Any]) -> int | None:
    """The token that begins a text, if the model has one."""
    config = text_config(model)
    for bos in (options.get("bos_token_id"), getattr(config, "bos_token_id", None), option(model, {}, "bos_token_id")):
        if isinstance(bos, int):
            return bos
    return None


def _read_one(
    decoder: Decoder, policy: ChunkedEviction, chunks: list[Tensor], query: Tensor, bos: int | None, chunk_batch: int
) -> tuple[list[_Chunk], list[float]]:
    """The chunks of one context that are kept, in its order, and the scores of all."""
    longest = max(c.numel() for c in chunks)
    best: list[_Chunk] = []
    scores: list[float] = []
    for first in range(0, len(chunks), chunk_batch):
        group = chunks[first : first + chunk_batch]
        ids, mask = _padded([torch.cat((chunk, query)) for chunk in group], bos or 0)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if policy.align == "right":
            positions = positions + mask * torch.tensor([[longest - c.numel()] for c in group])
        device = decoder.device
        hides = len(chunks) > 1 or policy.parity
        logits, results = run_chunks(
            decoder, ids.to(device), mask.to(device), positions.to(device), query.numel(), hides
        )
        own = [_likelihood(policy, row, query.to(device), bos) for row in logits]
        scores += own
        of_site = {name: results[i :: len(RESULTS)] for i, name in enumerate(RESULTS)}
        numbered = [(score, first + i) for i, score in enumerate(own)]
        # Of equals the later ones stay.
        alive = [c for c in (*((b.score, b.number) for b in best), *numbered) if not math.isnan(c[0])]
        ranked = sorted(alive, key=lambda c: (c[0], -c[1]))
        stays = {number for _, number in ranked[: policy.keep_chunks]}
        best = [c for c in best if c.number in stays]
        for i, (score, number) in enumerate(numbered):
            if number in stays:
                part = slice(ids.size(1) - query.numel() - group[i].numel(), ids.size(1) - query.numel())
                own_results = {name: [t[i, :, part] for t in tensors] for name, tensors in of_site.items()}
                best.append(_keep(policy, number, score, chunks, bos, own_results))
        del logits, results, of_site
    if not best:
        raise PolicyError(
            f"the query has no likelihood under any of the {len(chunks)} chunks, the model's logits are NaN; is its dtype too "
            "narrow for it?"
        )
    return sorted(best, key=lambda c: c.number), scores


def _likelihood(policy: ChunkedEviction, logits: Tensor, query: Tensor, bos: int | None) -> float:
    """Mean negative log-likelihood of the query's tokens, a BOS left out, in fp32."""
    each = torch.nn.functional.cross_entropy(logits.float(), query, reduction="none")
    if policy.parity:
        return float(each.sum() / max(query.numel() - 1, 1))
    counts = torch.ones_like(query, dtype=torch.bool) if bos is None else query != bos
    return float(each[counts].mean() if bool(counts.any()) else each.mean())


def _keep(
    policy: ChunkedEviction,
    number: int,
    score: float,
    chunks: list[Tensor],
    bos: int | None,
    results: Mapping[str, list[Tensor]],
) -> _Chunk:
    """What stays of one chunk: of each head the keys with the highest scores.

    Args:
        results: of each site the `RESULTS` of this chunk's context, `[H, L, ...]`.
    """
    scores = torch.stack(results["score"])
    num_sites, heads, length = scores.shape
    has_bos = _begins_with_bos(chunks[number], bos)
    capacity = length
    whole = len(chunks) == 1 and not policy.parity
    if policy.capacity is not None and not whole:
        shortest = min(c.numel() - _begins_with_bos(c, bos) for c in chunks)
        capacity = min(policy.capacity, shortest) if policy.parity else policy.capacity
    first = number > 0 if policy.parity else has_bos
    if policy.parity and policy.capacity is None:
        first = False  # nothing competes
    if capacity >= length - first:
        place = torch.arange(length, device=scores.device).expand(num_sites, heads, -1)
        if policy.parity and first:
            place = place[..., 1:]
    else:
        smooth = scores[..., first:].nan_to_num(-math.inf, math.inf, -math.inf)
        smooth = torch.nn.functional.max_pool1d(smooth, policy.smoothing, 1, policy.smoothing // 2)
        # Of equals the older ones stay.
        chosen = smooth.argsort(dim=2, descending=True, stable=True)[..., :capacity].sort(dim=2).values + int(first)
        with_bos = first and not policy.parity
        place = torch.cat((torch.zeros_like(chosen[..., :1]), chosen), dim=2) if with_bos else chosen
    hidden = torch.stack(results["hidden"]).gather(2, place)
    keys, values = ([_gathered(t, p) for t, p in zip(results[n], place, strict=True)] for n in ("key", "value"))
    return _Chunk(number, score, length, place, hidden, keys, values)


def _gathered(tensor: Tensor, place: Tensor) -> Tensor:
    """`[H, n, D]` from `[Hkv, L, D]`, in memory of its own."""
    tensor = tensor.repeat_interleave(place.size(0) // tensor.size(0), 0)
    return tensor.gather(1, place[..., None].expand(-1, -1, tensor.size(2)))


def _merge(
    decoder: Decoder,
    policy: ChunkedEviction,
    rows: list[list[_Chunk]],
    chunks: list[list[Tensor]],
    queries: list[Tensor],
    bos: int | None,
    length: int,
) -> LiveRangeCache:
    """A cache with the keys of the kept chunks of each context, in the order of the text; shorter rows begin later.

    The chunks' own keys are given up site by site.

    Args:
        length: tokens that come after the context, at most.
    """
    for row, own in zip(rows, chunks, strict=True):
        _drop_begins(policy, row, own, bos)
    sizes = [sum(c.place.size(2) for c in row) for row in rows]
    most, num_batch, device = max(sizes), len(rows), decoder.device
    if not most:
        raise PolicyError(f"nothing of the context is left under {policy}; give a longer context")
    cache = decoder.new_cache(rounded_up(most + length))
    num_sites, heads, _ = rows[0][0].place.shape
    # Where the query begins: behind the longest chunk that was kept, or behind all.
    begins = [
        max(c.length for c in row) if policy.align == "left" else max(c.numel() for c in own)
        for row, own in zip(rows, chunks, strict=True)
    ]
    shape = num_sites, num_batch, heads, most
    alive = torch.zeros(shape, dtype=torch.bool, device=device)
    position, from_begin, to_end = (torch.full(shape, -1, dtype=torch.int32, device=device) for _ in range(3))
    for b, row in enumerate(rows):
        part = slice(most - sizes[b], most)
        alive[:, b, :, part] = ~torch.cat([c.hidden for c in row], dim=2)
        offsets = [begins[b] - c.length if policy.align == "right" else 0 for c in row]
        position[:, b, :, part] = torch.cat([c.place + o for c, o in zip(row, offsets, strict=True)], dim=2).int()
        if len(chunks[b]) > 1 or policy.parity:
            from_begin[:, b, :, part] = torch.cat([c.place for c in row], dim=2).int()
            to_end[:, b, :, part] = torch.cat([c.length - 1 - c.place for c in row], dim=2).int()
    shift = torch.tensor(begins, device=device)[:, None] - most
    # Shorter queries begin later, behind their padding.
    padding = torch.tensor([max(q.numel() for q in queries) - q.numel() for q in queries], device=device)
    tables: list[Mapping[str, Tensor]] = []
    for layout in decoder.layout.tables:
        site = layout.sites[0]
        end = torch.full_like(position[site], FOREVER)
        if layout.window is not None:  # in positions
            end = position[site] + layout.window - (shift[:, 0] - padding)[:, None, None].int()
        live = alive[site] & (end > most)
        place = torch.arange(most, dtype=torch.int32, device=device)
        table = {"index": torch.where(live, place, FREE), "end": torch.where(live, end, 0)}
        if policy.slot_fields:
            table.update({"slot.from_begin": from_begin[site], "slot.to_end": to_end[site]})
        tables.append({name: tensor[:, : layout.num_heads] for name, tensor in table.items()})

    def sites() -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        for site in range(num_sites):
            yield tuple(
                [torch.cat([c.take(name, site) for c in row], dim=1) for row in rows] for name in ("keys", "values")
            )  # type: ignore[misc]

    cache.fill(most, tables, sites(), shift)
    return cache


def _drop_begins(policy: ChunkedEviction, row: list[_Chunk], chunks: list[Tensor], bos: int | None) -> None:
    """Takes from the kept chunks of a context what only the first of them keeps: its BOS."""
    for chunk in row[1:]:
        if policy.parity or (policy.bos == "first" and _begins_with_bos(chunks[chunk.number], bos)):
            chunk.drop_first()


def _contexts(context_ids: Any, attention_mask: Tensor | None) -> list[Context]:
    """One entry for each context."""
    if attention_mask is not None and (
        not isinstance(context_ids, Tensor) or attention_mask.shape != context_ids.shape
    ):
        raise PolicyError("attention_mask must have the shape of context_ids [B, N]; lists of contexts need none")
    if isinstance(context_ids, Tensor) and context_ids.dim() in (1, 2):
        rows = context_ids[None] if context_ids.dim() == 1 else context_ids
        masks = [None] * len(rows) if attention_mask is None else attention_mask.view(rows.shape).bool()
        contexts: list[Context] = [row if mask is None else row[mask] for row, mask in zip(rows, masks, strict=True)]
    elif isinstance(context_ids, (list, tuple)):
        contexts = list(context_ids)
    else:
        raise PolicyError(
            f"context_ids must be token ids [N] or [B, N], or a list of contexts, got {_given(context_ids)}"
        )
    if not contexts:
        raise PolicyError("context_ids is empty; give token ids [N], or one such tensor for each context")
    for number, context in enumerate(contexts):
        parts = [context] if isinstance(context, Tensor) else context
        if not isinstance(parts, (list, tuple)) or not all(
            isinstance(part, Tensor) and part.dim() == 1 and not part.is_floating_point() for part in parts
        ):
            wrong = parts if not isinstance(parts, (list, tuple)) else next(p for p in parts if not _is_row(p))
            raise PolicyError(f"context {number} must be token ids [N], or a list of such chunks, got {_given(wrong)}")
        if not parts:
            raise PolicyError(f"context {number} has no chunks")
        if any(not part.numel() for part in parts):
            raise PolicyError(f"context {number} is empty, or one of its chunks is; give at least one token")
    return contexts


def _queries(query_ids: Any, num_contexts: int) -> list[Tensor]:
    """A query for each context, on the CPU."""
    one = isinstance(query_ids, Tensor) and query_ids.dim() == 1
    several = isinstance(query_ids, (list, tuple)) or (isinstance(query_ids, Tensor) and query_ids.dim() == 2)
    queries = [query_ids] if one else list(query_ids) if several else [query_ids]
    for query in queries:
        if not _is_row(query):
            raise PolicyError(f"query_ids must be token ids [m] or [B, m], or a list of such rows, got {_given(query)}")
        if not query.numel():
            raise PolicyError(
                "the query is empty; chunks are chosen by the likelihood of the query, so it needs a token"
            )
    if len(queries) == 1:
        queries = queries * num_contexts
    if len(queries) != num_contexts:
        raise PolicyError(
            f"there are {len(queries)} queries for {num_contexts} contexts; give one for each, or one for all"
        )
    return [query.long().cpu() for query in queries]


def _is_row(ids: Any) -> bool:
    return isinstance(ids, Tensor) and ids.dim() == 1 and not ids.is_floating_point()


def _given(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _begins_with_bos(chunk: Tensor, bos: int | None) -> bool:
    return bos is not None and int(chunk[0]) == bos


def _divide(context: Context, most: int, bos: int | None) -> list[Tensor]:
    """The chunks of a context, on the CPU: as few as fit, and their lengths differ by one at most."""
    if not isinstance(context, Tensor):
        too_long = [c.numel() for c in context if c.numel() > most]
        if too_long:
            raise PolicyError(f"a chunk has {too_long[0]} tokens, and the policy's chunk is {most}; divide it")
        return [c.long().cpu() for c in context]
    context = context.long().cpu()
    head = context[:1] if _begins_with_bos(context, bos) else context[:0]
    body = context[head.numel() :]
    count = max(1, -(-body.numel() // (most - head.numel())))
    borders = [i * body.numel() // count for i in range(count + 1)]
    return [torch.cat((head, body[a:b])) for a, b in itertools.pairwise(borders)]


def _check_room(model: Any, chunks: list[list[Tensor]], queries: list[Tensor], new: int) -> None:
    room = getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(room, int):
        return
    for context, query in zip(chunks, queries, strict=True):
        longest = max(c.numel() for c in context)
        if longest + query.numel() + new > room:
            raise PolicyError(
                f"the longest chunk has {longest} tokens, the query {query.numel()} and the answer up to {new}, and the model's "
                f"positions end at {room}; take a chunk of {max(room - query.numel() - new, 0)} tokens at most, a shorter "
                "query or a smaller max_new_tokens"
            )


def _padded(rows: list[Tensor], fill: int) -> tuple[Tensor, Tensor]:
    """(ids, mask): int64 `[B, longest]`, padded on the left."""
    longest = max(r.numel() for r in rows)
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - row.numel() :] = row
        mask[number, longest - row.numel() :] = 1
    return ids, mask


def answer(
    generate: Callable[..., Any], context: str, query: str, tokenizer: Any, chunk_batch: int, options: Mapping[str, Any]
) -> str:
    """Text in, text out; see `OptimizedModel.answer`."""
    if not isinstance(context, str) or not isinstance(query, str):
        given = context if not isinstance(context, str) else query
        raise PolicyError(f"context and query must be text, got {type(given).__name__}; generate takes token ids")
    begin = [t for t in tokenizer("").input_ids if t == tokenizer.bos_token_id][:1]
    if begin:
        options = {"bos_token_id": begin[0], **options}
    context_ids, query_ids = (
        torch.tensor(ids, dtype=torch.int64)
        for ids in (
            [*begin, *tokenizer(context, add_special_tokens=False).input_ids],
            tokenizer(query, add_special_tokens=False).input_ids,
        )
    )
    result = generate(context_ids, query_ids=query_ids, chunk_batch=chunk_batch, **options)
    sequences = result if isinstance(result, Tensor) else result.sequences
    text: str = tokenizer.decode(sequences[0, query_ids.numel() :], skip_special_tokens=True)
    return text
