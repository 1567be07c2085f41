"""Chunked eviction equals a dense forward over everything at once, with masks that are written out from the definition.

The oracle packs all chunks, each with its copy of the query, then the query again and the answer, into one row of the original
model, and hides from each row what it must not see: per layer and head, as attention weights of earlier passes decide.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from crossed import crossed
from rewriter.kernels import LiveRanges
from rewriter.kernels import live_range_attention
from torch import Tensor
from torch import nn

import rewriter
from rewriter import MIXED_CALIBRATION
from rewriter import Calibrate
from rewriter import ChunkedEviction
from rewriter import PolicyError
from rewriter.errors import CacheError

BOS = 1


def sharp(model: nn.Module) -> Any:
    """Weights large enough that every key matters."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    model.config.bos_token_id = BOS  # type: ignore[union-attr]
    return model.eval()


def optimized(model: nn.Module, policy: ChunkedEviction) -> rewriter.OptimizedModel:
    return rewriter.optimize(model, policy, backend="eager", strict=True)


def tokens(*sizes: int, bos: bool = True) -> list[Tensor]:
    """Random rows; the first begins with a BOS."""
    rows = [torch.randint(3, 64, (size,)) for size in sizes]
    if bos:
        rows[0][0] = BOS
    return rows


@dataclass
class Oracle:
    """The original model over one packed row; `masks` bool `[H, S, S]` of each layer."""

    model: Any
    policy: ChunkedEviction
    chunks: list[Tensor]
    query: Tensor
    answer: Tensor

    def __post_init__(self) -> None:
        config = self.model.config
        self.attentions = [m for n, m in self.model.named_modules() if n.rsplit(".", 1)[-1] in ("self_attn", "attn")]
        self.heads = config.num_attention_heads
        self.group = self.heads // getattr(config, "num_key_value_heads", self.heads)
        if self.policy.group == "per_query_head":
            self.group = 1
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(self.attentions)
        window = getattr(config, "sliding_window", None)
        self.windows = [window if window and kind == "sliding_attention" else None for kind in kinds]
        longest = max(c.numel() for c in self.chunks)
        m = self.query.numel()
        ids, positions, self.contexts, self.copies = [], [], [], []
        for chunk in self.chunks:
            begin = sum(t.numel() for t in ids)
            self.contexts.append(slice(begin, begin + chunk.numel()))
            self.copies.append(slice(begin + chunk.numel(), begin + chunk.numel() + m))
            ids.append(torch.cat((chunk, self.query)))
            shift = longest - chunk.numel() if self.policy.align == "right" else 0
            positions.append(torch.arange(ids[-1].numel()) + shift)
        self.begin = sum(t.numel() for t in ids)
        self.ids = torch.cat((*ids, self.query, self.answer))
        self.before = torch.cat(positions)
        size = self.ids.numel()
        block = torch.zeros(size, size, dtype=torch.bool)
        for context, own in zip(self.contexts, self.copies, strict=True):
            block[context.start : own.stop, context.start : own.stop] = True
        block[self.begin :, self.begin :] = True
        self.masks = [(block.tril()).expand(self.heads, -1, -1).clone() for _ in self.attentions]

    def run(self, begin_position: int) -> tuple[Tensor, list[Tensor]]:
        """(logits `[S, V]`, attention weights `[H, S, S]` of each layer)."""
        after = begin_position + torch.arange(self.ids.numel() - self.begin)
        self.positions = torch.cat((self.before, after))
        distance = self.positions[:, None] - self.positions[None]
        weights: list[Tensor] = []
        with self._hooked(distance, weights):
            logits = self.model(input_ids=self.ids[None], position_ids=self.positions[None], use_cache=False).logits[0]
        return logits, weights

    @contextmanager
    def _hooked(self, distance: Tensor, weights: list[Tensor]) -> Iterator[None]:
        def given(mask: Tensor) -> Callable[..., Any]:
            additive = torch.where(mask, 0.0, -1e30).double()[None]
            return lambda _, args, kwargs: (args, {**kwargs, "attention_mask": additive})

        handles = []
        for layer, (module, window) in enumerate(zip(self.attentions, self.windows, strict=True)):
            mask = self.masks[layer] if window is None else self.masks[layer] & (distance < window)
            handles.append(module.register_forward_pre_hook(given(mask), with_kwargs=True))
            handles.append(module.register_forward_hook(lambda _, __, output: weights.append(output[1][0])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def grouped(self, weight: Tensor) -> Tensor:
        """`[H, ...]` -> the query heads of a KV head together, for each of them."""
        together = weight.unflatten(0, (-1, self.group))
        one = together.amax(1) if self.policy.group == "max" else together.mean(1)
        return one.repeat_interleave(self.group, 0)

    def calibrations(self, phase: str, layer: int) -> list[Calibrate]:
        own = [c for c in self.policy.calibration if layer in c.layer_range(len(self.attentions))]
        return [c for c in own if c.phase == phase] if len(self.chunks) > 1 or self.policy.parity else []

    def read(self) -> tuple[Tensor, list[float], list[int]]:
        """(logits of query and answer `[m + u, V]`, scores, kept chunks)."""
        policy, m = self.policy, self.query.numel()
        layers = range(len(self.attentions))
        hidden = [[torch.zeros(self.heads, c.numel(), dtype=torch.bool) for c in self.chunks] for _ in layers]
        worth: list[list[Tensor]] = []
        for layer in layers:
            weights = self.run(0)[1][layer]
            worth.append([])
            for c, (context, own) in enumerate(zip(self.contexts, self.copies, strict=True)):
                seen = weights[:, own, context]
                worth[-1].append(self.grouped(seen[:, -policy.observe :].sum(1)))
                for calibration in self.calibrations("local", layer):
                    mean = self.grouped(seen[:, -calibration.observe :].mean(1))
                    abnormal = (mean > calibration.threshold) & region(calibration, self.chunks[c].numel())
                    hidden[layer][c] |= abnormal
                    if calibration.apply:
                        self.masks[layer][:, context.start : own.stop, context] &= ~abnormal[:, None]
        logits = self.run(0)[0]
        scores = [self.likelihood(logits[own.start - 1 : own.stop - 1]) for own in self.copies]
        ranked = sorted(range(len(scores)), key=lambda c: (scores[c], -c))
        kept = sorted(ranked[: policy.keep_chunks])
        begin = max(self.chunks[c].numel() for c in (kept if policy.align == "left" else range(len(self.chunks))))
        rows = slice(self.begin, None)
        for layer in layers:
            for order, c in enumerate(kept):
                stays = self.stays(worth[layer][c], c, order) & ~hidden[layer][c]
                self.masks[layer][:, rows, self.contexts[c]] = stays[:, None]
        for layer in layers:
            for calibration in self.calibrations("merged", layer):
                weights = self.run(begin)[1][layer]
                last = weights[:, self.begin + m - calibration.observe : self.begin + m]
                hide = self.abnormal(calibration, last.mean(1), layer, kept)
                first = self.begin if calibration.apply else self.begin + m
                self.masks[layer][:, first:, :] &= ~hide[:, None]
        return self.run(begin)[0][self.begin :], scores, kept

    def likelihood(self, logits: Tensor) -> float:
        each = -logits.log_softmax(-1).gather(1, self.query[:, None])[:, 0]
        if self.policy.parity:
            return float(each.sum() / (len(each) - 1))
        return float(each[self.query != BOS].mean())

    def stays(self, worth: Tensor, c: int, order: int) -> Tensor:
        """bool `[H, L]`: the keys of the kept chunk number `order` that live on."""
        policy, length = self.policy, worth.size(1)
        bos = int(self.chunks[c][0]) == BOS
        stays = torch.ones(self.heads, length, dtype=torch.bool)
        capacity = policy.capacity
        competes_from = int(c > 0) if policy.parity else int(bos)
        if policy.parity and capacity is not None:
            capacity = min(capacity, *(t.numel() - int(t[0] == BOS) for t in self.chunks))
        if capacity is not None and (policy.parity or len(self.chunks) > 1):
            for head in range(self.heads):
                half, candidates = policy.smoothing // 2, range(competes_from, length)
                smooth = {j: max(float(worth[head, k]) for k in candidates if abs(k - j) <= half) for j in candidates}
                best = sorted(candidates, key=lambda j: (-smooth[j], j))[:capacity]
                stays[head] = torch.tensor(
                    [j in best or (j < competes_from and not policy.parity) for j in range(length)]
                )
        if policy.parity and order:
            for head in range(self.heads):
                stays[head, int(stays[head].nonzero()[0])] = False
        elif order and bos and policy.bos == "first":
            stays[:, 0] = False
        return stays

    def abnormal(self, calibration: Calibrate, mean: Tensor, layer: int, kept: list[int]) -> Tensor:
        """bool `[H, S]`."""
        result = torch.zeros(self.heads, self.ids.numel(), dtype=torch.bool)
        if not self.policy.parity:
            mean = self.grouped(mean)
            for c in kept:
                own = self.contexts[c]
                result[:, own] = (mean[:, own] > calibration.threshold) & region(calibration, self.chunks[c].numel())
            return result
        every = []
        for head in range(self.heads):
            seen = self.masks[layer][head, self.begin + self.query.numel() - 1]
            places = seen.nonzero()[:, 0].tolist()
            e, total = calibration.edge, len(places)
            inside = {
                "sink": range(e),
                "recent": range(total - e + 1, total),
                "middle": range(e + 1, total - e),
                "all": range(total),
            }[calibration.region]
            hide = [places[j] for j in inside if mean[head, places[j]] > calibration.threshold]
            every.append((head, places, hide))
        most = max(len(hide) for _, _, hide in every)
        for head, places, hide in every:
            others = sorted((p for p in places if p not in hide), key=lambda p: float(mean[head, p]))
            result[head, hide + others[: most - len(hide)]] = True
        return result


def region(calibration: Calibrate, length: int) -> Tensor:
    place = torch.arange(length)
    sink, recent = place < calibration.edge, place >= length - calibration.edge
    return {"sink": sink, "recent": recent, "middle": ~sink & ~recent, "all": sink | True}[calibration.region]


def answered(
    fast: rewriter.OptimizedModel, context: Any, query: Tensor, answer: Tensor, **options: Any
) -> tuple[Tensor, Any]:
    """(logits of query and answer `[m + u, V]`, what was read): the query at once, the answer a token at a time."""
    reading = fast.read(context, query, max_new_tokens=answer.numel(), **options)
    logits = []
    for ids in (query, *answer.split(1)):
        # An eager model in fp64 has rows of NaN where there is padding, and so cannot be seen to number tokens by place.
        places = reading.cache.length + torch.arange(ids.numel())
        logits.append(fast(input_ids=ids[None], position_ids=places[None], past_key_values=reading.cache).logits[0])
    return torch.cat(logits), reading


POLICIES = {
    "everything": ChunkedEviction(14, keep_chunks=4),
    "one chunk": ChunkedEviction(14, keep_chunks=1),
    "capacity": ChunkedEviction(14, keep_chunks=2, capacity=4),
    "right": ChunkedEviction(14, keep_chunks=2, capacity=4, align="right", bos="all", group="max", observe=3),
    "query heads": ChunkedEviction(14, keep_chunks=2, capacity=5, group="per_query_head", smoothing=1),
    "parity": ChunkedEviction(14, keep_chunks=2, capacity=6, parity=True),
    "calibrated": ChunkedEviction(14, keep_chunks=2, calibration=(Calibrate("0-100%", "all", threshold=0.15, edge=3),)),
    "calibrated twice": ChunkedEviction(
        14,
        keep_chunks=2,
        capacity=6,
        group="max",
        calibration=(
            Calibrate("0-50%", "middle", threshold=0.1, edge=3, observe=2, apply=False),
            Calibrate("50-100%", "sink", threshold=0.1, edge=5),
            Calibrate("0-100%", "recent", threshold=0.1, edge=5, phase="local"),
            Calibrate(0, "middle", threshold=0.1, edge=3, phase="local", apply=False),
        ),
    ),
    "calibrated parity": ChunkedEviction(
        14, keep_chunks=2, capacity=7, parity=True, calibration=(Calibrate("0-100%", "middle", threshold=0.1, edge=3),)
    ),
}
MODELS = [("llama", "eager"), ("qwen3", "sdpa"), ("mistral", "eager"), ("gemma2", "eager"), ("gpt2", "eager")]


@pytest.mark.parametrize(("name", "attention", "policy"), crossed(MODELS, POLICIES))
@torch.no_grad()
def test_reading_equals_one_dense_forward(
    name: str, attention: str, policy: ChunkedEviction, tiny_model: Callable[..., nn.Module], law: SimpleNamespace
) -> None:
    """Scores, kept chunks and logits, in fp64: for chunks of unequal length, some at a time."""
    original = sharp(tiny_model(name, "eager")).double()
    model = sharp(tiny_model(name, attention)).double()
    model.load_state_dict(original.state_dict())
    query, answer = tokens(9, 4, bos=False)
    chunks = [torch.cat((torch.tensor([BOS]), t)) for t in tokens(13, 9, 13, 11, bos=False)]
    fast = optimized(model, policy)
    if policy.parity and name in ("mistral", "gemma2"):
        with pytest.raises(CacheError, match="parity=True knows no"):
            fast.read([chunks], query, max_new_tokens=4)
        return
    with law.softmax_in_full_precision():
        expected, scores, kept = Oracle(original, policy, chunks, query, answer).read()
    for chunk_batch in (1, 3):
        logits, reading = answered(fast, [chunks], query, answer, chunk_batch=chunk_batch)
        assert reading.kept == [kept]
        torch.testing.assert_close(reading.scores, [scores], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def llama(tiny_model: Callable[..., nn.Module]) -> Any:
    torch._dynamo.reset()
    return sharp(tiny_model("llama", "sdpa")).double()


@torch.no_grad()
def dense(model: Any, *parts: Tensor) -> Tensor:
    """The original's logits for the last two parts, all parts in one text."""
    ids = torch.cat(parts)
    return model(input_ids=ids[None], use_cache=False).logits[0, -parts[-1].numel() - parts[-2].numel() :]


@pytest.mark.parametrize("phase", ["merged", "local"])
@pytest.mark.parametrize("align", ["left", "right"])
def test_a_context_of_one_chunk_is_read_as_a_whole(llama: Any, align: str, phase: str) -> None:
    """Nothing is forgotten, whatever the policy would do with several."""
    context, query, answer = tokens(20, 9, 5)
    calibration = (Calibrate("0-100%", "all", threshold=0.03, phase=phase),)
    policy = ChunkedEviction(20, capacity=3, align=align, calibration=calibration)
    logits, reading = answered(optimized(llama, policy), context, query, answer)
    torch.testing.assert_close(logits, dense(llama, context, query, answer), rtol=1e-9, atol=1e-9)
    assert reading.kept == [[0]]


@pytest.mark.parametrize(
    "change",
    [
        {"capacity": 14},
        {"capacity": 1000},
        {"keep_chunks": 10},
        {"calibration": (Calibrate("0-100%", "all", threshold=1.0),)},
    ],
    ids=str,
)
def test_what_evicts_nothing_changes_nothing(llama: Any, change: dict[str, Any]) -> None:
    context, query, answer = tokens(50, 9, 4)
    plain, one = answered(optimized(llama, ChunkedEviction(14, keep_chunks=4)), context, query, answer)
    other, two = answered(
        optimized(llama, ChunkedEviction(**{"chunk": 14, "keep_chunks": 4, **change})), context, query, answer
    )
    torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-9)
    assert one.kept == two.kept == [[0, 1, 2, 3]]


def test_the_order_of_chunks_does_not_matter(llama: Any) -> None:
    chunks = [torch.cat((torch.tensor([BOS]), t)) for t in tokens(11, 11, 11, bos=False)]
    query, answer = tokens(9, 4, bos=False)
    fast = optimized(llama, ChunkedEviction(14, capacity=5, bos="all"))
    first, _ = answered(fast, [chunks], query, answer)
    second, _ = answered(fast, [chunks[::-1]], query, answer)
    torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_chunks_are_scored_as_if_alone(llama: Any) -> None:
    context, query = tokens(61, 9)
    scores = [
        optimized(llama, ChunkedEviction(14)).read(context, query, chunk_batch=n, max_new_tokens=1).scores[0]
        for n in (1, 2, 5)
    ]
    chunks = optimized(llama, ChunkedEviction(14)).read(context, query, max_new_tokens=1).chunks[0]
    assert [c.numel() for c in chunks] == [13, 13, 13, 13, 13]  # 60 tokens in fives, a BOS before each
    assert torch.equal(torch.cat([c[1:] for c in chunks]), context[1:])
    alone = []
    for chunk in chunks:
        logits = llama(input_ids=torch.cat((chunk, query))[None], use_cache=False).logits[0]
        log_p = logits[-query.numel() - 1 : -1].log_softmax(-1)
        alone.append(-float(log_p.gather(1, query[:, None]).mean()))
    for own in scores:
        torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_batch", [1, 2, 5])
@pytest.mark.parametrize("parity", [False, True])
def test_of_equal_chunks_the_later_ones_are_kept(llama: Any, parity: bool, chunk_batch: int) -> None:
    chunk, query = tokens(10, 9)
    reading = optimized(llama, ChunkedEviction(14, parity=parity)).read(
        [[chunk] * 5], query, chunk_batch=chunk_batch, max_new_tokens=1
    )
    assert reading.kept == [[2, 3, 4]]


@pytest.mark.parametrize("chunk_batch", [1, 2, 4])
@torch.no_grad()
def test_nan_never_wins(llama: Any, chunk_batch: int) -> None:
    llama.model.embed_tokens.weight[63] = math.nan
    llama.lm_head.weight = nn.Parameter(llama.lm_head.weight.nan_to_num(0.0))
    query = torch.arange(3, 12)
    chunks = [torch.tensor([BOS, *row]) for row in ([5, 63, 7], [8, 9, 10], [63, 63, 63], [12, 13, 14])]
    fast = optimized(llama, ChunkedEviction(14, keep_chunks=2, capacity=2))
    reading = fast.read([chunks], query, chunk_batch=chunk_batch, max_new_tokens=1)
    assert reading.kept == [[1, 3]] and math.isnan(reading.scores[0][0])
    reading = optimized(llama, ChunkedEviction(14)).read([chunks], query, chunk_batch=chunk_batch, max_new_tokens=1)
    assert reading.kept == [[1, 3]], "not even where there is room"
    with pytest.raises(PolicyError, match="logits are NaN"):
        fast.read([chunks[::2]], query, max_new_tokens=1)


def test_concatenated_keys_equal_partial_results_merged_by_their_lse() -> None:
    query, key, value = (torch.randn(1, 2, n, 8).double() for n in (5, 12, 12))
    index = torch.arange(5, dtype=torch.int32)
    whole = live_range_attention(query, key, value, LiveRanges.bidirectional(12), query_index=index)
    parts = [
        live_range_attention(query, k, v, LiveRanges.bidirectional(4), query_index=index, return_lse=True)
        for k, v in zip(key.split(4, dim=2), value.split(4, dim=2), strict=True)
    ]
    lse = torch.stack([p[1] for p in parts]).double()
    weight = (lse - lse.logsumexp(0)).exp()[..., None]
    merged = (torch.stack([p[0] for p in parts]) * weight).sum(0)
    torch.testing.assert_close(merged, whole, rtol=1e-6, atol=1e-6)


def greedy(fast: rewriter.OptimizedModel, context: Any, query: Tensor, count: int) -> list[int]:
    reading = fast.read(context, query, max_new_tokens=count)
    ids, tokens = query[None], []
    for _ in range(count):
        ids = fast(input_ids=ids, past_key_values=reading.cache).logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(ids))
    return tokens


OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CALIBRATED = (Calibrate("0-100%", "all", threshold=0.05, edge=3, observe=6, apply=False),)


@pytest.mark.parametrize(
    ("name", "attention", "calibration"),
    crossed(
        [(name, "eager") for name in ("llama", "mistral", "gemma2", "gpt2")],
        {"plain": (), "calibrated": CALIBRATED},
        every=2,
    ),
)
@torch.no_grad()
def test_a_batch_of_contexts_is_as_one_after_the_other(
    name: str, attention: str, calibration: tuple[Calibrate, ...], tiny_model: Callable[..., nn.Module]
) -> None:
    """Contexts and queries of different lengths, some shorter than what calibration observes; greedy and with beams."""
    model = sharp(tiny_model(name, attention))
    contexts, queries = tokens(50, 13, 31), tokens(9, 4, 12, bos=False)
    fast = optimized(model, ChunkedEviction(14, keep_chunks=3, capacity=5, calibration=calibration))
    several = fast.generate(contexts, query_ids=queries, chunk_batch=2, **OPTIONS)
    assert several.shape == (3, 12 + 6)
    reading = fast.read(contexts, queries, max_new_tokens=6)
    inputs = {"input_ids": reading.query_ids, "attention_mask": reading.attention_mask}
    together = fast(**inputs, position_ids=reading.position_ids, past_key_values=reading.cache).logits
    for b, (context, query) in enumerate(zip(contexts, queries, strict=True)):
        one = fast.read(context, query, max_new_tokens=6)
        own = {"input_ids": query[None], "position_ids": one.position_ids}
        alone = fast(**own, past_key_values=one.cache).logits[0]
        torch.testing.assert_close(together[b, 12 - query.numel() :], alone, rtol=1e-3, atol=1e-3)
        assert (
            several[b, 12 - query.numel() :].tolist() == fast.generate(context, query_ids=query, **OPTIONS)[0].tolist()
        )
    beams = fast.generate(contexts, query_ids=queries, num_beams=3, **OPTIONS)
    alone = fast.generate(contexts[0], query_ids=queries[0], num_beams=3, **OPTIONS)
    assert beams[0, 12 - queries[0].numel() :].tolist() == alone[0].tolist()


@torch.no_grad()
def test_generate(llama: Any) -> None:
    """Greedy steps; contexts that are padded; ids of other dtypes; `max_length` counts from the query."""
    contexts, queries = tokens(50, 20, 31), tokens(9, 4, 12, bos=False)
    fast = optimized(llama, ChunkedEviction(14, keep_chunks=2, capacity=5))
    expected = greedy(fast, contexts[0], queries[0], 6)
    assert fast.generate(contexts[0], query_ids=queries[0], **OPTIONS)[0, 9:].tolist() == expected
    assert fast.generate(contexts[0].int(), query_ids=queries[0].int(), **OPTIONS)[0, 9:].tolist() == expected
    options = {**OPTIONS, "max_new_tokens": None}
    assert fast.generate(contexts[0], query_ids=queries[0], max_length=15, **options)[0, 9:].tolist() == expected
    padded = torch.stack([torch.cat((torch.zeros(11, dtype=torch.long), contexts[1])), contexts[2]])
    mask = torch.ones_like(padded)
    mask[0, :11] = 0
    again = fast.generate(padded, attention_mask=mask, query_ids=queries[0], **OPTIONS)
    assert again[0].tolist() == fast.generate(contexts[1], query_ids=queries[0], **OPTIONS)[0].tolist()


@torch.no_grad()
def test_the_query_calibrates_as_a_whole(llama: Any) -> None:
    context, query, answer = tokens(50, 9, 3)
    fast = optimized(llama, ChunkedEviction(14, calibration=CALIBRATED))
    expected, _ = answered(fast, context, query, answer)
    reading = fast.read(context, query, max_new_tokens=9)
    with pytest.raises(CacheError, match="9 tokens must come in one call, got 1"):
        fast(input_ids=query[None, :1], past_key_values=reading.cache)
    both = torch.cat((query, answer))
    logits = fast(input_ids=both[None], past_key_values=reading.cache).logits[0]
    torch.testing.assert_close(logits, expected[: both.numel()], rtol=1e-9, atol=1e-9)
    with pytest.raises(CacheError, match="can be cropped to"):
        reading.cache.crop(-answer.numel() - 1)
    reading.cache.crop(-answer.numel())
    again = fast(input_ids=answer[None], past_key_values=reading.cache).logits[0]
    torch.testing.assert_close(again, logits[query.numel() :], rtol=1e-9, atol=1e-9)
    whole = fast.generate(context, query_ids=query, **OPTIONS)
    assert whole.tolist() == fast.generate(context, query_ids=query, prefill_chunk=4, **OPTIONS).tolist()


@torch.no_grad()
def test_which_token_begins_a_text(llama: Any) -> None:
    """It may be known to the call alone."""
    context, query = tokens(50, 9)
    policy = ChunkedEviction(14, capacity=4)
    expected = optimized(llama, policy).generate(context, query_ids=query, **OPTIONS)
    llama.config.bos_token_id = llama.generation_config.bos_token_id = None
    fast = optimized(llama, policy)
    assert [c[0] == BOS for c in fast.read(context, query, max_new_tokens=1).chunks[0]] == [True, False, False, False]
    assert fast.generate(context, query_ids=query, bos_token_id=BOS, **OPTIONS).tolist() == expected.tolist()


class Untransformed(nn.Module):
    """A model that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.position, self.qkv = nn.Embedding(64, 16), nn.Linear(16, 48)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.position(position_ids)
        q, k, v = (t.unflatten(2, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        causal = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()
        mask = causal & attention_mask.bool()[:, None, None, :]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(x + y.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_a_model_that_no_library_knows() -> None:
    model = Untransformed().eval()
    context, query = tokens(12, 5, bos=False)
    fast = optimized(model, ChunkedEviction(14))
    reading = fast.read(context, query, max_new_tokens=3)
    given = {"input_ids": query[None], "position_ids": reading.position_ids}
    logits = fast(**given, past_key_values=reading.cache).logits[0]
    ids = torch.cat((context, query))[None]
    expected = model(ids, torch.ones_like(ids), torch.arange(17)[None])[0, 12:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_second_query_over_the_same_context(llama: Any) -> None:
    context, first, second = tokens(50, 9, 7)
    fast = optimized(llama, ChunkedEviction(14, keep_chunks=4))
    reading = fast.read(context, first, max_new_tokens=20)
    both = fast(input_ids=torch.cat((first, second))[None], past_key_values=reading.cache).logits[0, 9:]
    reading = fast.read(context, first, max_new_tokens=20)
    fast(input_ids=first[None], past_key_values=reading.cache)
    torch.testing.assert_close(fast(input_ids=second[None], past_key_values=reading.cache).logits[0], both)
    with pytest.raises(CacheError, match="can be cropped to"):
        reading.cache.crop(-(first.numel() + second.numel() + 1))
    reading.cache.crop(-second.numel())
    torch.testing.assert_close(fast(input_ids=second[None], past_key_values=reading.cache).logits[0], both)


CALIBRATED_ALL = ChunkedEviction(
    14, keep_chunks=2, capacity=5, calibration=(Calibrate("0-100%", "all", threshold=0.3, edge=3),)
)


@pytest.mark.soak
@torch.no_grad()
def test_compiled(llama: Any) -> None:
    context, query = tokens(50, 9)
    model = llama.float()
    eager, fast = optimized(model, CALIBRATED_ALL), rewriter.optimize(model, CALIBRATED_ALL, strict=True)
    expected = eager.read(context, query, max_new_tokens=4)
    reading = fast.read(context, query, max_new_tokens=4)
    assert reading.kept == expected.kept
    torch.testing.assert_close(reading.scores, expected.scores, rtol=1e-4, atol=1e-4)
    logits = fast(input_ids=query[None], past_key_values=reading.cache).logits
    plain = eager(input_ids=query[None], past_key_values=expected.cache).logits
    torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_in_bf16(llama: Any) -> None:
    context, query = tokens(50, 9)
    expected = optimized(llama.float(), CALIBRATED_ALL).read(context, query, max_new_tokens=4)
    half = optimized(copy.deepcopy(llama).bfloat16(), CALIBRATED_ALL)
    reading = half.read(context, query, max_new_tokens=4)
    assert reading.cache.stores[0]["key"].dtype == torch.bfloat16
    assert bool(half(input_ids=query[None], past_key_values=reading.cache).logits.isfinite().all())
    torch.testing.assert_close(reading.scores, expected.scores, rtol=0.1, atol=0.1)


def test_answer_takes_text() -> None:
    from rewriter.demo.models import load_bundled

    torch._dynamo.reset()
    model, tokenizer = load_bundled()
    context = "import os\nimport sys\n\n\ndef first(path):\n    return os.path.join(path, 'first')\n" * 6
    fast = optimized(model, ChunkedEviction(64, keep_chunks=2, capacity=40))
    text = fast.answer(
        context, "\n\ndef second(path):\n    return os.", tokenizer=tokenizer, max_new_tokens=4, do_sample=False
    )
    assert text.startswith("path")
    with pytest.raises(PolicyError, match="must be text, got int"):
        fast.answer(3, "why", tokenizer=tokenizer)  # type: ignore[arg-type]


@torch.no_grad()
def test_bad_input(llama: Any) -> None:
    context, query = tokens(50, 9)
    fast = optimized(llama, ChunkedEviction(14))
    nothing = query[:0]
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("the query is empty", lambda: fast.read(context, nothing, max_new_tokens=1)),
        ("context 0 is empty", lambda: fast.read(nothing, query, max_new_tokens=1)),
        ("token ids \\[N\\], or a list", lambda: fast.read(context.float(), query, max_new_tokens=1)),
        ("context 1 has no chunks", lambda: fast.read([context, []], query, max_new_tokens=1)),
        ("context_ids is empty", lambda: fast.read([], query, max_new_tokens=1)),
        ("2 queries for 1 contexts", lambda: fast.read(context, [query, query], max_new_tokens=1)),
        ("a chunk has 15 tokens", lambda: fast.read([[context[:15]]], query, max_new_tokens=1)),
        ("positions end at 64", lambda: fast.read(context, query, max_new_tokens=50)),
        ("positions end at 64", lambda: fast.read(context, query.repeat(7), max_new_tokens=1)),
        ("chunk_batch must be", lambda: fast.read(context, query, chunk_batch=0, max_new_tokens=1)),
        (
            "must have the shape of",
            lambda: fast.read([context], query, attention_mask=torch.ones(1, 50), max_new_tokens=1),
        ),
        ("from 0 to 63, got 64", lambda: fast.read(context, query.clamp(max=5) + 59, max_new_tokens=1)),
        (
            "must be token ids \\[N\\] or \\[B, N\\], or a list of contexts, got NoneType",
            lambda: fast.read(None, query),
        ),
        ("query_ids must be token ids .* got int", lambda: fast.read(context, 3)),  # type: ignore[arg-type]
        (
            "does not have",
            lambda: optimized(llama, ChunkedEviction(14, calibration=(Calibrate(7, "all"),))).read(context, query),
        ),
        ("chooses chunks by the query", lambda: fast.generate(context)),
        ("program of two phases", lambda: fast(input_ids=context[None])),
        ("the policy is Exact", lambda: optimized(llama, rewriter.Exact()).read(context, query)),  # type: ignore[arg-type]
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 1}, "chunk must be an integer of at least 2"),
        ({"keep_chunks": 0}, "keep_chunks must be"),
        ({"capacity": 0}, "capacity must be"),
        ({"smoothing": 4}, "smoothing must be odd"),
        ({"group": "sum"}, "group must be one of"),
        ({"align": "middle"}, "align must be one of"),
        ({"bos": "none"}, "bos must be one of"),
        ({"calibration": Calibrate(0, "sink")}, "must be a list of Calibrate"),
        ({"parity": True, "align": "right"}, "parity=True is for"),
    ],
    ids=str,
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        ChunkedEviction(**{"chunk": 16, **fields})


def test_calibrations_name_layers() -> None:
    assert [list(c.layer_range(8)) for c in MIXED_CALIBRATION] == [[0, 1], [2, 3], [6, 7]]
    assert list(Calibrate("2-3", "all").layer_range(8)) == [2, 3] and list(Calibrate(5, "all").layer_range(8)) == [5]
    for layers in ("50-25%", "0-101%", "first", -1):
        with pytest.raises(PolicyError, match=r"layers must rise|is not a layer"):
            Calibrate(layers, "all")
    with pytest.raises(PolicyError, match="threshold must be a positive number"):
        Calibrate(0, "all", threshold=0)
    policy = ChunkedEviction(16, capacity=3, calibration=MIXED_CALIBRATION)
    assert rewriter.Policy.from_dict(policy.to_dict()) == policy
    with pytest.raises(PolicyError, match="program for the whole model"):
        rewriter.PerLayer({0: policy})


def test_what_positions_cannot_be_reused_in_is_refused() -> None:
    import transformers

    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    fast = rewriter.optimize(transformers.BloomForCausalLM(config).eval(), ChunkedEviction(16), backend="eager")
    with pytest.raises(CacheError, match="takes no position_ids"):
        fast.read(torch.arange(3, 40), torch.arange(3, 9), max_new_tokens=1)
