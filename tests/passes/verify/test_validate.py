"""Each claim is put to a solver: true ones are verified for all sizes, wrong ones refuted with an example that is one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masked import INF
from masked import Attention
from masked import row_and_key
from rewriter.passes import pipeline
from rewriter.passes.lower import operator
from rewriter.passes.masks import evaluate as emitted
from rewriter.passes.masks import expression
from rewriter.passes.masks import handlers
from rewriter.passes.masks import prove
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.forms import chunks
from rewriter.passes.masks.intervals import BATCH
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import NEVER_ENDS
from rewriter.passes.masks.intervals import Interval
from rewriter.passes.verify import validate
from torch import Tensor
from torch import nn

import rewriter

pytest.importorskip("z3")

IDS = torch.randint(1, 16, (2, 12), generator=torch.Generator().manual_seed(0))


def index(scores: Tensor) -> tuple[Tensor, Tensor]:
    return row_and_key(scores.size(-1))


def shown(visible: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Masked scores of `visible(i, j, ids)`."""
    return lambda s, ids: s.masked_fill(~visible(*index(s), ids), -INF)


def images(ids: Tensor) -> Tensor:
    """Numbers of runs of tokens below 6, as transformers numbers images; -1 for text."""
    marked = ids < 6
    begins = marked & ~nn.functional.pad(marked, (1, 0), value=0)[:, :-1]
    return torch.where(marked, torch.cumsum(begins.int(), dim=1) - 1, -1)


def same_image(ids: Tensor) -> Tensor:
    query, key = images(ids)[:, None, :, None], images(ids)[:, None, None, :]
    return (query == key) & (query >= 0)


def packed(ids: Tensor) -> Tensor:
    return (ids == 7).cumsum(-1)


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": shown(lambda i, j, ids: j <= i),
    "window": shown(lambda i, j, ids: (j <= i) & (i - j < 5)),
    "sinks and window": shown(lambda i, j, ids: (j <= i) & ((i - j < 5) | (j < 3))),
    "symmetric window": shown(lambda i, j, ids: (i - j).abs() <= 3),
    "chunks": shown(lambda i, j, ids: (j <= i) & (i // 4 == j // 4)),
    "blocks": shown(lambda i, j, ids: j // 4 <= i // 4),
    "causal or the same chunk": shown(lambda i, j, ids: (j <= i) | (i // 4 == j // 4)),
    "near and far": shown(lambda i, j, ids: (i - j < 2) | (i - j > 6)),
    "a window or a chunk ahead": shown(lambda i, j, ids: ((i - j).abs() <= 3) | (i // 8 == j // 8 + 1)),
    "all but one": shown(lambda i, j, ids: (i != j) & (ids != 0)[:, None, None, :]),
    "padding": shown(lambda i, j, ids: (j <= i) & (ids != 0)[:, None, None, :]),
    "separators": shown(lambda i, j, ids: (j <= i) & ((i - j < 4) | (ids == 3)[:, None, None, :])),
    "documents": shown(lambda i, j, ids: (j <= i) & (packed(ids)[:, None, :, None] == packed(ids)[:, None, None, :])),
    "a prefix by row": shown(lambda i, j, ids: (j <= i) | (j < (ids[:, :1] % 5)[:, :, None, None])),
    "half of the row": shown(lambda i, j, ids: (j <= i) & (j >= ids.size(1) // 2)),
    "not hidden": shown(lambda i, j, ids: ~((j > i) | (i - j >= 6))),
    "added": lambda s, ids: s + torch.where(index(s)[0] >= index(s)[1], 0.0, -1e9),
    "added twice, and a bias": lambda s, ids: (
        s
        + torch.full(s.shape[-2:], -INF).triu(1)
        + torch.where(ids == 0, -INF, 0.0)[:, None, None, :]
        + ids[:, None, None, :] * 0.1
    ),
    "a lifetime of its own": shown(lambda i, j, ids: (j <= i) & (i - j < ids[:, None, None, :])),
    "chunks from a place of the row": shown(
        lambda i, j, ids: (i - (ids[:, :1] % 5)[:, :, None, None]) // 4 == (j - (ids[:, :1] % 5)[:, :, None, None]) // 4
    ),
    "images among text": shown(lambda i, j, ids: (j <= i) | same_image(ids)),
    "images among text, in a window": shown(lambda i, j, ids: (i - j < 4) & ((j <= i) | same_image(ids))),
    "images beside a causal window": shown(lambda i, j, ids: ((j <= i) & (i - j < 4)) | same_image(ids)),
    "images alone": shown(lambda i, j, ids: same_image(ids)),
    "documents both ways, and causal": shown(
        lambda i, j, ids: (j <= i) | (packed(ids)[:, None, :, None] == packed(ids)[:, None, None, :])
    ),
    "a chunk beside a causal window": shown(lambda i, j, ids: ((j <= i) & (i - j < 4)) | (i // 6 == j // 6)),
    "from one of two rows on": shown(lambda i, j, ids: (j <= i) | (j + 3 <= 2 * i)),
    "up to one of two rows": shown(lambda i, j, ids: (i - j < 2) | (i < 2 * j + 1)),
    "two keys a row": shown(lambda i, j, ids: (2 * i >= j) & (3 * i - j <= 9)),
    "two keys a row, strictly": shown(lambda i, j, ids: (2 * i > j) & (3 * i - j < 9)),
    "rows put together": shown(lambda i, j, ids: torch.cat(((j <= i)[:1], (j <= i)[1:]))),
    "the smaller of two": lambda s, ids: (
        s + torch.minimum(torch.full(s.shape[-2:], -INF).triu(1), torch.where(ids == 0, -1e9, 0.0)[:, None, None, :])
    ),
    "the larger of two": lambda s, ids: (
        s + torch.maximum(torch.full(s.shape[-2:], -INF).triu(1), torch.full(s.shape[-2:], -1e9).triu(3))
    ),
    "a logarithm": lambda s, ids: s + (index(s)[1] <= index(s)[0]).to(s.dtype).log(),
    "positions in 32 bits": shown(lambda i, j, ids: j.int() <= i.int()),
}


def explained(name: str) -> Any:
    torch._dynamo.reset()
    return rewriter.explain(Attention(MASKS[name]), input_ids=IDS).sites[0]


@pytest.mark.parametrize("name", MASKS)
def test_a_true_claim_is_verified_for_all_sizes(name: str) -> None:
    site = explained(name)
    assert (site.proof, site.reason) == ("verified", ""), site.proof_detail
    assert re.fullmatch(r"at all sizes up to [\d,]+, for all data", site.proof_detail)
    torch._dynamo.reset()
    model = Attention(MASKS[name])
    fast = rewriter.optimize(model, backend="eager", strict="verified")
    for rows, length in ((2, 12), (3, 21), (2, 5)):
        ids = torch.randint(0, 16, (rows, length), generator=torch.Generator().manual_seed(length))
        actual, expected = fast(ids), model(ids)
        seen = ~expected.isnan()  # the model's rows that see no key
        assert bool(seen.any())
        torch.testing.assert_close(actual[seen], expected[seen], rtol=1e-5, atol=1e-6)


def later(expression_: Any, by: int) -> Any:
    return expression_ if expression_ in (NEVER_ENDS, Const(0)) else expression.apply("add", expression_, Const(by))


def interval_changed(change: Callable[[Interval], Interval]) -> Callable[[Any], Any]:
    def faulty(original: Any) -> Any:
        def ranges(self: Any, predicates: Any) -> list[Interval]:
            return [change(interval) for interval in original(self, predicates)]

        return ranges

    return faulty


def with_ends(start: int = 0, end: int = 0) -> Callable[[Any], Any]:
    def change(interval: Interval) -> Interval:
        return Interval(later(interval.start, start), later(interval.end, end), traits=interval.traits)

    return interval_changed(change)


def swapped_branches(original: Any) -> Any:
    def where(functions: Any, node: Any) -> Any:
        result = original(functions, node)
        if isinstance(result, Apply) and result.name == "where":
            condition, left, right = result.args
            return Apply("where", (condition, right, left))
        return result

    return where


def renamed(names: dict[str, str]) -> Callable[[Any], Any]:
    """Expressions are built with one name in the place of another."""
    return lambda original: lambda name, *args: original(names.get(name, name), *args)


def always(value: Any) -> Callable[[Any], Any]:
    return lambda original: lambda *args, **kwargs: value


def without_data(original: Any) -> Any:
    def ranges(self: Any, predicates: Any) -> list[Interval]:
        return [Interval(Axis(KEY), NEVER_ENDS, traits=i.traits) for i in original(self, predicates)]

    return ranges


# name -> (where, attribute, what stands in its place, the mask whose claim is wrong then)
FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any], str]] = {
    "an end one query late": (prove.Analysis, "ranges", with_ends(end=1), "window"),
    "an end one query early": (prove.Analysis, "ranges", with_ends(end=-1), "window"),
    "a start one query late": (prove.Analysis, "ranges", with_ends(start=1), "causal"),
    "a start one query early": (prove.Analysis, "ranges", with_ends(start=-1), "causal"),
    "an end of blocks that is late": (prove.Analysis, "ranges", with_ends(end=1), "chunks"),
    "a document's end that is late": (prove.Analysis, "ranges", with_ends(end=1), "documents"),
    "data is forgotten": (prove.Analysis, "ranges", without_data, "padding"),
    "a prefix is forgotten": (prove.Analysis, "ranges", without_data, "a prefix by row"),
    "a window is forgotten": (prove.Analysis, "ranges", without_data, "symmetric window"),
    "a length is forgotten": (prove.Analysis, "ranges", without_data, "half of the row"),
    "separators are forgotten": (prove.Analysis, "ranges", with_ends(end=3), "separators"),
    "the smaller of two starts": (prove, "_maximum", lambda original: prove._minimum, "half of the row"),
    "the later of two ends": (prove, "_minimum", lambda original: prove._maximum, "chunks"),
    "branches in the wrong order": (handlers, "_where", swapped_branches, "added"),
    "less for less or equal": (handlers, "apply", renamed({"le": "lt"}), "causal"),
    "less or equal for less": (handlers, "apply", renamed({"lt": "le"}), "window"),
    "or for and": (handlers, "apply", renamed({"and": "or"}), "padding"),
    "a negation is lost": (handlers, "negate", lambda original: lambda e: e, "causal"),
    "a chunk's number without its size": (
        chunks,
        "chunk_of",
        lambda original: lambda e: None if original(e) is None else (original(e)[0] + 1, original(e)[1]),
        "chunks",
    ),
    "division that truncates": (
        emitted,
        "_OPERATIONS",
        lambda original: {**original, "floordiv": lambda x, y: torch.div(x, y, rounding_mode="trunc")},
        "chunks from a place of the row",
    ),
    "an end in int32 that wraps": (
        operator,
        "key_bounds",
        lambda original: lambda e, env, grid: emitted.vector(emitted.materialize(e, env, grid), grid).to(torch.int32),
        "a lifetime of its own",
    ),
    "a key's own row in place of the first one's": (
        operator,
        "key_grid",
        lambda original: lambda *args: {**original(*args), BATCH: original(*args)[BATCH] * 0},
        "padding",
    ),
    "a range of several is lost": (
        prove.Analysis,
        "ranges",
        lambda original: lambda self, predicates: original(self, predicates)[:1],
        "near and far",
    ),
    "a range comes twice": (
        prove.Analysis,
        "ranges",
        lambda original: lambda self, predicates: 2 * original(self, predicates)[:1],
        "causal",
    ),
    "what two ranges share is in both": (
        prove,
        "_without",
        lambda original: lambda interval, other: [interval],
        "a window or a chunk ahead",
    ),
    "a bias that is lost": (
        prove,
        "MaskProof",
        lambda original: lambda interval, bias, *rest: original(interval, None, *rest),
        "added twice, and a bias",
    ),
    "a bias that is doubled": (
        prove,
        "MaskProof",
        lambda original: (
            lambda interval, bias, *rest: original(
                interval, None if bias is None else Apply("add", (bias, bias)), *rest
            )
        ),
        "added twice, and a bias",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_analysis_is_found_without_running_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check by evaluation is off; the site is refused, and the reason holds an example."""
    owner, attribute, wrap, mask = FAULTS[name]
    monkeypatch.setattr(validate, "_known", {})
    monkeypatch.setattr(pipeline, "check_mask", lambda *_: None)
    faulty = wrap(getattr(owner, attribute))
    if owner is handlers and attribute.startswith("_"):
        of = [target for target, handler in handlers.HANDLERS.items() if handler is getattr(handlers, attribute)]
        for target in of:
            monkeypatch.setitem(handlers.HANDLERS, target, faulty)
    else:
        monkeypatch.setattr(owner, attribute, faulty)
    site = explained(mask)
    assert not site.rewritten
    faults = ("batch row", "the key bias", "two ranges of a key", "an additive mask takes a value that is neither 0")
    what = f"disagrees with the model's: ({'|'.join(faults)})"
    assert re.search(what, site.reason), (site.reason, site.proof_detail)
    assert "queries and" in site.reason
    if "bias" not in name:
        sizes = [int(n) for n in re.findall(r"of (\d+) queries and (\d+) keys", site.reason)[0]]
        assert max(sizes) <= max(validate.SMALL)


def test_a_counterexample_names_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "_known", {})
    monkeypatch.setattr(pipeline, "check_mask", lambda *_: None)
    monkeypatch.setattr(prove.Analysis, "ranges", without_data(prove.Analysis.ranges))
    reason = explained("padding").reason
    row, values = (
        re.search(r"batch row (\d+), query \d+, key (\d+) is hidden in the model", reason).groups(),
        re.search(  # type: ignore[union-attr]
            r"input_ids = (\[\[.*?\]\])", reason
        ),
    )
    assert values is not None
    ids = torch.tensor(eval(values[1]))
    assert ids[int(row[0]), int(row[1])] == 0, "the key that is hidden is padding"


def test_an_example_that_is_none_refutes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver's reading is the one that is wrong: the check by evaluation decides, and the report says so."""
    from rewriter.passes.verify.operators import arithmetic

    monkeypatch.setattr(validate, "_known", {})
    monkeypatch.setitem(arithmetic._ARITHMETIC, "le", lambda x, y: x < y)
    site = explained("causal")
    assert site.rewritten and site.proof == "evaluated"
    assert "not understood" in site.proof_detail


def test_facts_that_contradict_each_other_verify_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import z3

    monkeypatch.setattr(validate, "_known", {})
    monkeypatch.setattr(validate, "_what_sizes_are", lambda *_: [z3.BoolVal(False)])
    site = explained("causal")
    assert site.proof == "evaluated" and "contradicts itself" in site.proof_detail


def test_a_reading_that_fails_costs_a_proof_and_not_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("a fault of our own")

    monkeypatch.setattr(validate, "_known", {})
    monkeypatch.setattr(validate, "_question", fails)
    site = explained("causal")
    assert site.rewritten and site.proof_detail == "the solver's reading failed: ZeroDivisionError: a fault of our own"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_many_layers_are_one_question(
    attention: str, tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a graph, and at the next capture of the same model."""
    asked: list[int] = []
    inner = validate._asked

    def counted(*args: Any) -> Any:
        asked.append(1)
        return inner(*args)

    monkeypatch.setattr(validate, "_known", {})
    monkeypatch.setattr(validate, "_asked", counted)
    for _ in range(2):
        torch._dynamo.reset()
        model = tiny_model("llama", attention, layers=5)
        report = rewriter.explain(model, input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
        assert [site.proof for site in report.sites] == ["verified"] * 5
    assert len(asked) == 1


def test_strict_may_ask_for_the_solvers_word(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = rewriter.optimize(Attention(MASKS["window"]), backend="eager", strict="verified")
    assert fast(IDS).shape == (2, 2, 12, 6)
    monkeypatch.setattr(validate, "_known", {})
    monkeypatch.setattr(validate, "TIMEOUT", 0)
    monkeypatch.setattr(validate, "HAS_SOLVER", False)
    unsure = rewriter.optimize(Attention(MASKS["window"]), backend="eager", strict="verified")
    torch._dynamo.reset()
    with pytest.raises(rewriter.RewriteError, match=r"1 of 1 masks are not verified for all sizes.*causal \+ window 5"):
        unsure(IDS)
    torch._dynamo.reset()
    assert rewriter.optimize(Attention(MASKS["window"]), backend="eager", strict=True)(IDS).shape == (2, 2, 12, 6)


def test_without_a_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "HAS_SOLVER", False)
    site = explained("causal")
    assert site.rewritten and site.proof == "evaluated" and "pip install 'rewriter[proof]'" in site.proof_detail
    monkeypatch.setattr("rewriter.api.HAS_SOLVER", False)
    with pytest.raises(rewriter.RewriteError, match="z3 is not installed"):
        rewriter.optimize(Attention(MASKS["causal"]), strict="verified")
    with pytest.raises(rewriter.RewriteError, match="strict must be True, False or 'verified', got 'yes'"):
        rewriter.optimize(Attention(MASKS["causal"]), strict="yes")
