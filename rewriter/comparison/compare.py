"""`compare`: perplexity, recall, keys, time and memory of a model under several policies, on a text of the user's own."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch import nn

from rewriter.api import explain
from rewriter.api import optimize
from rewriter.comparison.budget import at_budget
from rewriter.comparison.recall import Question
from rewriter.comparison.recall import questions
from rewriter.comparison.texts import rows_of
from rewriter.errors import CacheError
from rewriter.errors import PolicyError
from rewriter.errors import RewriteError
from rewriter.optimized_model import OptimizedModel
from rewriter.passes.policy import Policy
from rewriter.report.data import readable_bytes

ORIGINAL = "original"
ROUNDS = 3
"""Times that each contestant reads a row, in turns; the shortest counts."""

FIRST_BORDER = 512
"""The first position, after 0, that bits are averaged to; see `borders`."""

LOSSES = 1024
"""Positions whose losses are computed at once: logits of a large vocabulary are made fp32 for it."""


@dataclass(frozen=True)
class Result:
    """One contestant.

    Attributes:
        policy: as text; "original" for the model itself.
        budget: share of the causal pairs that its size was set for, or None.
        pairs: (query, key) pairs that it sees in a row, as a share of those that the model's own masks show, by
            `rewriter.explain`.
        bits: per token, over all rows.
        bits_by_position: between `Comparison.borders`.
        recall: share of the questions that are answered right; None where none was asked.
        seconds: of reading one row, logits of all its tokens.
        cache_bytes: of the keys and values that it keeps of one row, for going on; None where it cannot.
        notes: what else to know.
    """

    policy: str
    budget: float | None
    pairs: float
    bits: float
    bits_by_position: tuple[float, ...]
    recall: float | None
    seconds: float
    cache_bytes: int | None
    notes: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        return float(2**self.bits)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; prints as a table.

    Attributes:
        model: its class.
        length, rows: tokens of a row, and how many were read.
        borders: positions between which bits are averaged, the length last.
        questions: how many were asked.
        threads: of torch, on a CPU.
        results: the original first.
    """

    model: str
    length: int
    rows: int
    borders: tuple[int, ...]
    questions: int
    threads: int
    results: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def to_html(self, path: str | Path) -> None:
        """Writes the table as a page without external resources."""
        from rewriter.report.html import template

        page = template("page.html.j2", Path(__file__).parent).render(found=self)
        Path(path).write_text(page, encoding="utf-8")

    @property
    def original(self) -> Result:
        return self.results[0]

    def worse(self, result: Result) -> float:
        """By how much a perplexity is higher than the original's."""
        return result.perplexity / self.original.perplexity - 1

    def cells(self, result: Result) -> list[str]:
        """A result as the table shows it."""
        return [
            result.policy,
            "-" if result.budget is None else f"{result.budget:g}",
            f"{result.pairs:.1%}",
            f"{result.perplexity:.2f}",
            f"{self.worse(result):+.1%}",
            "-" if result.recall is None else f"{result.recall:.0%}",
            f"{self.original.seconds / result.seconds:.2f}x",
            "-" if result.cache_bytes is None else readable_bytes(result.cache_bytes),
        ]

    COLUMNS = ("policy", "budget", "pairs seen", "perplexity", "worse by", "recall", "speed", "cache of a row")

    @property
    def caption(self) -> str:
        recall = f", and {self.questions} questions about a note in one" if self.questions else ""
        return (
            f"{self.model} reads {self.rows} row{'s' * (self.rows > 1)} of {self.length:,} tokens{recall}; {self.threads} "
            "threads. Pairs are of those that the model's own masks show, speeds of the original's, in turns."
        )

    @property
    def notes(self) -> list[str]:
        notes = [f"{result.policy}: {note}" for result in self.results for note in result.notes]
        if self.original.recall == 0:
            notes.append("the model itself answers none of the questions, so recall says nothing here")
        return notes

    def __rich__(self) -> Table:
        table = Table(title=self.caption, title_justify="left", caption="\n".join(self.notes), caption_justify="left")
        for name in self.COLUMNS:
            table.add_column(name, justify="left" if name == "policy" else "right")
        for result in self.results:
            table.add_row(*self.cells(result))
        return table


def compare(
    model: nn.Module,
    tokenizer: Any,
    policies: Iterable[Policy],
    text: str,
    *,
    length: int = 2048,
    rows: int = 2,
    budgets: Sequence[float] = (),
    num_questions: int = 8,
    backend: str = "inductor",
    on_step: Callable[[str, int, int], None] = lambda step, done, of: None,
) -> Comparison:
    """Reads a text with a model under each policy, and says what each of them costs and saves.

    Args:
        model: of transformers, that predicts the next token. It is not changed.
        tokenizer: the model's.
        policies: contestants beside the original.
        text: what is read; questions are about notes among its sentences.
        length: tokens of a row. A text that is shorter is one row.
        rows: most rows that are read.
        budgets: shares of the causal pairs: each policy with a size is taken once for each of them, its `window` or `keep` set
            for it. Without any, policies are as they are given.
        num_questions: notes that are asked for; 0 asks nothing.
        backend: as for `rewriter.optimize`.
        on_step: called with what is done next, how many steps are done, and how many there are.

    Raises:
        PolicyError: a policy cannot be applied to one call, or cannot keep so little as a budget.
        RewriteError: the text is too short, or as `rewriter.optimize` with `strict`: no attention is left out.
    """
    ids = rows_of(tokenizer, text, length, rows)
    given = list(policies)
    for policy in given:
        if not isinstance(policy, Policy):
            raise PolicyError(f"policies must be policies such as SlidingWindow(256), got {policy!r}")
        if policy.is_program:
            raise PolicyError(f"{policy} is no mask of one call; its contexts are read in chunks, see fast.read")
    contestants: list[tuple[Policy, float | None]] = [
        (policy if budget is None else at_budget(policy, budget, ids[0]), None if policy.is_lossless else budget)
        for policy, budget in itertools.product(given, budgets or (None,))
    ]
    contestants = list(dict.fromkeys(contestants))
    asked = questions(tokenizer, text, ids[0].size(1), num_questions)
    steps = _Steps(on_step, 2 + len(contestants))
    with torch.no_grad(), _evaluating(model):
        steps.begin(ORIGINAL)
        calls: list[Any] = [model]
        found = [_read(model, ids, asked)]
        for policy, _ in contestants:
            steps.begin(str(policy))
            fast = optimize(model, policy, backend=backend, strict=True, progress=False)
            calls.append(fast)
            found.append(_read(fast, ids, asked))
        steps.begin("times, in turns")
        seconds = _times(calls, ids[0])
        pairs = [1.0, *(_share_of_pairs(model, policy, ids[0]) for policy, _ in contestants)]
        caches = [_own_cache_bytes(model, ids[0]), *(_cache_bytes(fast, ids[0].size(1)) for fast in calls[1:])]
    steps.end()
    named: list[tuple[Policy | None, float | None]] = [(None, None), *contestants]
    results = [
        Result(
            policy=ORIGINAL if policy is None else str(policy),
            budget=budget,
            pairs=pairs[n],
            bits=found[n].bits,
            bits_by_position=found[n].by_position,
            recall=found[n].recall,
            seconds=seconds[n],
            cache_bytes=caches[n][0],
            notes=tuple(note for note in (_untrained(policy), caches[n][1]) if note),
        )
        for n, (policy, budget) in enumerate(named)
    ]
    return Comparison(
        model=type(model).__name__,
        length=ids[0].size(1),
        rows=len(ids),
        borders=tuple(borders(ids[0].size(1))[1:]),
        questions=len(asked),
        threads=torch.get_num_threads(),
        results=tuple(results),
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is one that does not learn; its modules are as they were after."""
    learning = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in learning:
            module.training = True


class _Steps:
    def __init__(self, on_step: Callable[[str, int, int], None], count: int) -> None:
        self.on_step, self.count, self.done = on_step, count, -1

    def begin(self, step: str) -> None:
        self.done += 1
        self.on_step(step, self.done, self.count)

    def end(self) -> None:
        self.on_step("", self.count, self.count)


def borders(length: int) -> list[int]:
    """Positions between which bits are averaged: 0, `FIRST_BORDER`, twice that, ... and the length."""
    powers = [FIRST_BORDER * 2**n for n in range(length.bit_length()) if FIRST_BORDER * 2**n < length]
    return [0, *powers, length]


@dataclass(frozen=True)
class _Reading:
    bits: float
    by_position: tuple[float, ...]
    recall: float | None


def _read(call: Any, rows: Sequence[Tensor], asked: Sequence[Question]) -> _Reading:
    device = next(call.parameters()).device
    losses = torch.stack([bits_of_tokens(_logits(call, ids.to(device)), ids.to(device)) for ids in rows]).mean(dim=0)
    edges = borders(rows[0].size(1))
    right = [q.is_answered(_logits(call, q.input_ids.to(device)).cpu()) for q in asked]
    return _Reading(
        bits=float(losses.mean()),
        by_position=tuple(float(losses[a:b].mean()) for a, b in itertools.pairwise(edges)),
        recall=sum(right) / len(right) if right else None,
    )


def _logits(call: Any, ids: Tensor) -> Tensor:
    logits: Tensor = call(input_ids=ids, use_cache=False).logits
    return logits


def bits_of_tokens(logits: Tensor, ids: Tensor) -> Tensor:
    """Bits of each token but the first, `[K - 1]`."""
    parts = zip(logits[0, :-1].split(LOSSES), ids[0, 1:].split(LOSSES), strict=True)
    return torch.cat([nn.functional.cross_entropy(p.float(), t, reduction="none") for p, t in parts]) / math.log(2)


def _times(calls: Sequence[Any], ids: Tensor) -> list[float]:
    best = [math.inf] * len(calls)
    ids = ids.to(next(calls[0].parameters()).device)
    for _ in range(ROUNDS):
        for n, call in enumerate(calls):
            begin = time.perf_counter()
            _logits(call, ids)[0, -1, 0].item()  # on a GPU, waits for it
            best[n] = min(best[n], time.perf_counter() - begin)
    return best


def _share_of_pairs(model: nn.Module, policy: Policy, ids: Tensor) -> float:
    ids = ids.to(next(model.parameters()).device)
    report = explain(model, policy=policy, length=ids.size(1), input_ids=ids, use_cache=False)
    predictions = [site.prediction for site in report.sites if site.prediction is not None]
    if len(predictions) < len(report.sites):
        raise RewriteError(
            f"{type(model).__name__}: pairs are predicted for {len(predictions)} of {len(report.sites)} attentions"
        )
    return sum(p.live_pairs for p in predictions) / sum(p.own_pairs for p in predictions)


def _own_cache_bytes(model: Any, ids: Tensor) -> tuple[int | None, str]:
    """Of the cache that the model itself returns."""
    cache = getattr(model(input_ids=ids.to(next(model.parameters()).device), use_cache=True), "past_key_values", None)
    if cache is None:
        return None, "the model keeps no cache"
    tensors = list(_tensors_of(cache))
    return sum(t.numel() * t.element_size() for t in tensors), ""


def _tensors_of(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (t for t in (layer.keys, layer.values) if t is not None)


def _cache_bytes(fast: OptimizedModel, length: int) -> tuple[int | None, str]:
    try:
        cache = fast.new_cache(length)
        cache.make_room(length)
        cache.allocate(1)
    except CacheError as error:
        return None, str(error)
    return cache.num_bytes, ""


def _untrained(policy: Policy | None) -> str:
    return "its parameters are as they begin, untrained" if policy is not None and policy.adds_parameters else ""
