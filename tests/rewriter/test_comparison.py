"""One model under several policies, in one table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from everyday_models import llama
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import rewriter
from rewriter import DynamicMask
from rewriter import Exact
from rewriter import PerLayer
from rewriter import SeparatorMask
from rewriter import SlidingWindow
from rewriter.cli import app
from rewriter.comparison import compare
from rewriter.comparison.budget import at_budget
from rewriter.comparison.recall import NAMES
from rewriter.comparison.recall import questions
from rewriter.demo.models import MODELS
from rewriter.demo.models import load_bundled
from rewriter.errors import PolicyError
from rewriter.errors import RewriteError
from rewriter.policies.ranges import policy_ranges

CHUNKED = rewriter.ChunkedEviction(8)
TEXT = " ".join(f"The {n}th sentence says that {n * n} is a square." for n in range(400))


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    model, tokenizer = load_bundled()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model, tokenizer


class Knows(nn.Module):
    """Knows what comes next, and takes no note of policies."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = nn.Parameter(torch.eye(vocabulary))

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        logits = self.vocabulary[input_ids.roll(-1, dims=1)]
        return type("Output", (), {"logits": logits})()


@given(
    st.sampled_from(
        [SlidingWindow(1, sinks=4), SlidingWindow(9), SeparatorMask([1, 2], initial=2), SeparatorMask([3], window=1)]
    ),
    st.floats(0.3, 1),
    st.integers(20, 90),
)
def test_a_budget_is_used_and_not_exceeded(policy: rewriter.Policy, share: float, length: int) -> None:
    ids = torch.randint(0, 12, (1, length), generator=torch.Generator().manual_seed(length))
    causal = length * (length + 1) / 2
    smallest = dataclasses.replace(policy, window=1)  # type: ignore[call-arg]
    if policy_ranges(smallest, ids).live_pairs() > share * causal:
        with pytest.raises(PolicyError, match="cannot keep so little"):
            at_budget(policy, share, ids)
        return
    found: Any = at_budget(policy, share, ids)
    assert type(found) is type(policy)
    assert policy_ranges(found, ids).live_pairs() <= share * causal
    if found.window < length:
        assert policy_ranges(dataclasses.replace(found, window=found.window + 1), ids).live_pairs() > share * causal


def test_budgets_of_other_policies() -> None:
    ids = torch.arange(100)[None]
    window, best = at_budget(SlidingWindow(1), 0.5, ids), at_budget(DynamicMask(1, local=10), 0.5, ids)
    assert isinstance(window, SlidingWindow) and isinstance(best, DynamicMask)
    assert best.keep + best.local == window.window
    assert at_budget(Exact(), 0.1, ids) == Exact()
    mixed = at_budget(PerLayer({0: Exact(), "default": SlidingWindow(1)}), 0.5, ids)
    assert mixed == PerLayer({0: Exact(), "default": window})


@pytest.mark.parametrize(
    ("policy", "share", "message"),
    [
        (SlidingWindow(1), 0, "a budget must be more than 0 and at most 1, got 0"),
        (SlidingWindow(1), 1.5, "at most 1, got 1.5"),
        (
            SlidingWindow(1, sinks=50),
            0.1,
            r"cannot keep so little as 10.0% of the pairs of this text: with window=1 it keeps 7",
        ),
        (CHUNKED, 0.5, "no window and no keep that a budget could set"),
    ],
)
def test_a_budget_that_cannot_be_kept(policy: rewriter.Policy, share: float, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        at_budget(policy, share, torch.arange(100)[None])


def test_questions_lie_where_they_should(bundled: tuple[Any, Any]) -> None:
    _, tokenizer = bundled
    asked = questions(tokenizer, TEXT, 400, 6)
    depths = []
    for number, question in enumerate(asked):
        assert question.input_ids.size(1) <= 400
        text = tokenizer.decode(question.input_ids[0])
        answer = tokenizer.decode(question.input_ids[0, -question.answer_length :]).strip()
        assert answer.isdigit() and len(answer) == 6 and text.count(answer) == 2
        assert sum(f"number of {name} is" in text for name in NAMES) == (1, 4)[number % 2]
        depths.append(text.index(answer) / len(text))
    assert depths == sorted(depths) and depths[0] < 0.2 and depths[-1] > 0.7
    knows = Knows(len(tokenizer))
    assert all(q.is_answered(knows(q.input_ids).logits) for q in asked)
    assert not any(q.is_answered(torch.randn(1, q.input_ids.size(1), len(tokenizer))) for q in asked)


def test_a_comparison(bundled: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = bundled
    steps: list[tuple[str, int, int]] = []
    found = compare(
        model,
        tokenizer,
        [Exact(), SlidingWindow(1, sinks=2), SeparatorMask.from_tokenizer(tokenizer), DynamicMask(1, local=4)],
        TEXT,
        length=600,
        budgets=(0.5, 0.25),
        num_questions=2,
        backend="eager",
        on_step=lambda *step: steps.append(step),
    )
    assert [(r.policy.split("(")[0], r.budget) for r in found.results] == [
        ("original", None),
        ("Exact", None),
        ("SlidingWindow", 0.5),
        ("SlidingWindow", 0.25),
        ("SeparatorMask", 0.5),
        ("SeparatorMask", 0.25),
        ("DynamicMask", 0.5),
        ("DynamicMask", 0.25),
    ]
    assert (found.length, found.rows, found.borders, found.questions) == (600, 2, (512, 600), 2)
    original, exact, *others = found.results
    assert exact.bits == pytest.approx(original.bits, rel=1e-5) and exact.pairs == original.pairs == 1
    assert exact.recall == original.recall and exact.cache_bytes is not None
    assert original.cache_bytes == 2 * 2 * 600 * model.config.num_key_value_heads * model.config.head_dim * 4
    # By hand: the mean of the losses of both rows.
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False).input_ids)
    front = [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
    own = 600 - len(front)
    rows = [torch.tensor([[*front, *ids[n * own : (n + 1) * own].tolist()]]) for n in range(2)]
    with torch.no_grad():
        losses = [model(input_ids=row, labels=row).loss.item() / 0.6931472 for row in rows]
    assert original.bits == pytest.approx(sum(losses) / 2, rel=1e-5)
    for result in others:
        assert result.budget is not None and result.budget - 0.03 < result.pairs <= result.budget
        assert result.bits != original.bits and len(result.bits_by_position) == 2 and result.seconds > 0
    window = others[0].cache_bytes
    assert window is not None and window < 0.6 * original.cache_bytes
    assert steps == [(step, n, 9) for n, (step, _, _) in enumerate(steps)] and steps[-1] == ("", 9, 9)
    assert len(found.notes) >= 2 and all("untrained" in note or "recall" in note for note in found.notes)
    found.to_json(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["results"][2]["bits"] == others[0].bits
    found.to_html(tmp_path / "found.html")
    page = (tmp_path / "found.html").read_text()
    assert all(f"<code>{result.policy}</code>" in page for result in found.results)
    assert f"{2 ** others[0].bits_by_position[1]:.2f}" in page


def test_what_cannot_be_compared_is_an_error(bundled: tuple[Any, Any]) -> None:
    model, tokenizer = bundled
    with pytest.raises(PolicyError, match="its contexts are read in chunks"):
        compare(model, tokenizer, [CHUNKED], TEXT)
    with pytest.raises(PolicyError, match=r"policies must be policies such as .*, got 256"):
        compare(model, tokenizer, [256], TEXT)  # type: ignore[list-item]
    with pytest.raises(RewriteError, match="the text has 1 tokens; give a longer one"):
        compare(model, tokenizer, [Exact()], "a")
    with pytest.raises(RewriteError, match="rows at least 1, got 2048 and 0"):
        compare(model, tokenizer, [Exact()], TEXT, rows=0)


def test_a_model_that_cannot_go_on_has_no_cache(bundled: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokenizer = bundled
    model = llama(vocab_size=len(tokenizer)).eval()
    original = model.forward

    def forward(input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return original(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", forward)
    found = compare(model, tokenizer, [SlidingWindow(30)], TEXT, length=100, num_questions=0, backend="eager")
    assert found.results[1].cache_bytes is None and "takes no" in found.results[1].notes[0]
    assert found.results[1].recall is None


def test_a_model_that_learns_is_compared_as_one_that_does_not(bundled: tuple[Any, Any]) -> None:
    _, tokenizer = bundled
    model = llama(vocab_size=len(tokenizer), attention_dropout=0.5).train()
    model.lm_head.eval()
    found = compare(model, tokenizer, [Exact()], TEXT, length=60, rows=1, num_questions=0, backend="eager")
    assert found.results[1].bits == pytest.approx(found.original.bits, rel=1e-5)
    assert model.training and model.model.layers[0].training and not model.lm_head.training


class TestCommand:
    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["compare", *arguments], env={"COLUMNS": "200"})

    def test_one_table(self, bundled: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(MODELS, "bundled", lambda: bundled)
        (tmp_path / "text.txt").write_text(TEXT)
        text, page, data = (str(tmp_path / name) for name in ("text.txt", "page.html", "data.json"))
        sizes = ("--length", "300", "--rows", "1", "--questions", "1")
        done = self.run(
            "bundled", "--text", text, "--budget", "0.5", *sizes, "--html", page, "--json", data, "--policy",
            '{"policy": "SlidingWindow", "sinks": 3}',
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        results = json.loads(Path(data).read_text())["results"]
        assert [r["policy"] for r in results] == ["original", "SlidingWindow(window=85, sinks=3)"]
        assert "SlidingWindow(window=85, sinks=3)" in done.output and "perplexity" in Path(page).read_text()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("nowhere", "--text", "TEXT", "--budget", "0.5"), "nowhere has no config.json"),
            (("bundled", "--text", "missing.txt", "--budget", "0.5"), "there is no such file"),
            (("bundled", "--text", "TEXT"), "give --policy with its size, or --budget"),
            (("bundled", "--text", "TEXT", "--budget", "2"), "a budget must be more than 0 and at most 1, got 2"),
            (("bundled", "--text", "TEXT", "--policy", "SlidingWindow"), "a policy must be JSON"),
            (("bundled", "--text", "TEXT", "--policy", '{"policy": "SlidingWindow"}'), "window"),
        ],
    )
    def test_bad_input_is_named(self, arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text(TEXT)
        done = self.run(*(str(tmp_path / "text.txt") if a == "TEXT" else a for a in arguments))
        assert done.exit_code == 2
        assert message in " ".join(done.output.replace("│", " ").split())
