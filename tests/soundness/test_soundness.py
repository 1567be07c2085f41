"""Whatever is claimed of a mask is true: random mask-building programs, at sizes that nothing has seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from random_masks import Masks
from random_masks import Tally
from random_masks import examine
from random_masks import inputs
from random_masks import soak
from rewriter.passes import pipeline
from rewriter.passes.verify import validate

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "soundness.json"


def test_no_claim_is_wrong() -> None:
    """Other programs than those of `make soak`."""
    tally = soak(100, seed=2**20)
    assert tally.wrong == []
    assert tally.caught == []
    assert tally.proven > 27, "programs that are all refused show nothing"
    assert tally.verified > 0.9 * tally.proven
    assert tally.one_interval_proven > 0.6 * tally.one_interval


def test_the_last_soak_found_nothing_wrong() -> None:
    last = json.loads(RESULTS.read_text())
    assert last["count"] >= 20_000 and last["verified"] > 0.99 * last["proven"]
    assert last["one_interval_proven"] > 0.6 * last["one_interval"]
    assert last["wrong"] == last["caught"] == []


def test_a_wrong_claim_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An analysis that takes `<=` for `<`, and no check by evaluation behind it."""
    from rewriter.passes.masks import expression
    from rewriter.passes.masks import intervals
    from rewriter.passes.masks import prove

    program = "(i - j < 5) & (i >= j)"
    original = prove.Analysis.comparison

    def faulty(self, predicate, positions):  # type: ignore[no-untyped-def]
        interval = original(self, predicate, positions)
        later = expression.apply("add", interval.end, expression.Const(1))
        return interval if interval.end == intervals.NEVER_ENDS else intervals.Interval(interval.start, later)

    monkeypatch.setattr(prove.Analysis, "comparison", faulty)
    caught = Tally()
    examine([program], caught)
    assert len(caught.caught) == 1 and not caught.wrong
    monkeypatch.setattr(pipeline, "check_mask", lambda *args: None)
    refuted = Tally()
    examine([program], refuted)
    assert len(refuted.caught) == 1 and not refuted.wrong, "the solver finds it, too"
    monkeypatch.setattr(validate, "HAS_SOLVER", False)
    wrong = Tally()
    examine([program], wrong)
    assert len(wrong.wrong) == 2  # at both sizes


def test_programs_are_what_they_say() -> None:
    model = Masks(["i >= j", "torch.where(i >= j, 0.0, -INF).double()"])
    given = inputs(3, 9, seed=0)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    outputs = model(**given)
    expected = torch.nn.functional.scaled_dot_product_attention(given["q"], given["k"], given["v"], attn_mask=causal)
    assert all(torch.allclose(output, expected) for output in outputs)
