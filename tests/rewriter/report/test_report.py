from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rewriter.kernels.costs import Cost
from torch import nn

import rewriter
from rewriter.report import html
from rewriter.report.data import GraphReport
from rewriter.report.data import SiteReport


def report_of(nano: Any) -> rewriter.Report:
    torch._dynamo.reset()

    class Two(nn.Module):
        """One attention that is rewritten and one that is refused."""

        def __init__(self) -> None:
            super().__init__()
            self.proven = nano(attention="sdpa")
            self.reader = nn.MultiheadAttention(64, 2, batch_first=True)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.proven(input_ids)
            hidden = torch.matmul(x[0], x[0].transpose(0, 1)) > 1e9  # by what the layers compute
            return self.reader(x, x, x, attn_mask=hidden, need_weights=False)[0]

    optimized = rewriter.optimize(Two(), backend="eager")
    optimized(torch.randint(0, 64, (2, 10)))
    return optimized.report


def test_sites_say_what_they_are(nano: Any, tmp_path: Path) -> None:
    report = report_of(nano)
    first, second, third = report.sites
    assert (first.module, first.form, first.mask, first.kernel) == (
        "proven",
        "sdpa",
        "causal",
        "live_range_attention (CPU)",
    )
    assert first.source.startswith("conftest.py:")
    assert second.layer == 1
    assert third.module == "reader"
    assert third.mask == third.kernel == "-"
    assert " at test_report.py:" in third.reason
    assert report.summary() == "2 of 3 attention sites rewritten"

    printed = str(report)
    assert "refused: a mask compares values" in " ".join(printed.split())
    assert "conftest.py" in printed

    data = json.loads(json.dumps(report.to_dict()))
    assert [site["module"] for site in data["graphs"][0]["sites"]] == ["proven", "proven", "reader"]
    assert set(data["graphs"][0]["seconds"]) >= {"capture", "find-attention", "analyse-masks", "lower"}

    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count('class="card ok"') == page.count('class="card refused"') == 1  # the two that are alike are one
    assert page.count('<tr class="no">') == 1 and page.count('<tr class="ok">') == 2
    assert "a mask compares values" in page and "<svg" not in page


def explained(model: nn.Module, **options: Any) -> rewriter.Report:
    torch._dynamo.reset()
    ids = torch.randint(3, 64, (2, 10))
    ids[:, ::5] = 2
    return rewriter.explain(
        model.eval(), input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options
    )


def test_predictions_are_those_of_the_masks(tiny_model: Any) -> None:
    """Pairs, pressure and bytes of a longer row, counted from the mask's definition."""
    policy = rewriter.SeparatorMask((2,), initial=1, window=4)
    report = explained(tiny_model("gemma2", "eager"), policy=policy, length=40)
    i, j = torch.arange(40)[:, None], torch.arange(40)[None, :]
    own = {"window 8 + causal + padding": (j <= i) & (i - j < 8), "causal + padding": j <= i}
    kept = (i - j < 4) | (j < 1) | (j % 5 == 0)
    for site in report.sites:
        p = site.prediction
        mask = own[site.mask]
        assert (p.num_queries, p.num_keys, p.dense_pairs) == (40, 40, 40 * 40 * 4)
        assert (p.own_pairs, p.live_pairs) == (4 * int(mask.sum()), 4 * int((mask & kept).sum()))
        assert (p.own_pressure, p.pressure) == (int(mask.sum(1).max()), int((mask & kept).sum(1).max()))
        assert p.kv_bytes == p.pressure * 2 * (8 + 8) * 4 and p.dense_kv_bytes == 40 * 2 * 16 * 4
        assert p.live_pairs <= p.computed_pairs and p.flops == 2 * 16 * p.computed_pairs
        drawn = torch.zeros(40, 40, dtype=torch.bool)
        for key, begin, end in p.bars:
            drawn[begin:end, key] = True
        assert torch.equal(drawn, mask & kept)
    printed = " ".join(str(report).split())
    assert "Predicted for one row" in printed and "40" in printed


def test_predictions_of_policies_that_rank(tiny_model: Any) -> None:
    report = explained(tiny_model("qwen3", "sdpa"), policy=rewriter.DynamicMask(6), length=30)
    pairs = sum(min(i + 1, 6) for i in range(30)) * 4
    assert {(s.prediction.live_pairs, s.prediction.pressure, s.prediction.note) for s in report.sites} == {
        (pairs, 6, "random scores")
    }
    chunked = explained(tiny_model("llama", "sdpa"), policy=rewriter.ChunkedEviction(8), length=30)
    assert "program of two phases" in chunked.sites[0].prediction.note
    with pytest.raises(rewriter.RewriteError, match="length must be at least 1"):
        rewriter.explain(nn.Linear(2, 2), torch.ones(1, 2), length=0)


def test_the_page_shows_modules_masks_costs_and_graphs(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("gemma2", "eager")
    report = explained(model, policy=rewriter.SlidingWindow(4), length=64)
    other = explained(model, policy=rewriter.SlidingWindow(16), length=64)
    report.to_html(tmp_path / "page.html", beside=[other])
    report.to_json(tmp_path / "page.json")
    page = (tmp_path / "page.html").read_text()
    assert (
        page.count("<svg") == 2 and page.count('<rect class="live"') == 2 * 64
    )  # a bar for each key; a window, and none
    assert "<title>key 5: queries 5 to 8, under the policy</title>" in page and ">63</text>" in page
    for text in ("Gemma2Attention", "self_attn", "after <b>capture</b>", "after <b>lower</b>", "FLOPs"):
        assert text in page, text
    for text in (
        "<b>Gemma2ForCausalLM</b>",
        "float32, on cpu",
        "under <code>SlidingWindow(window=4, sinks=0)</code>",
        "torch 2",
    ):
        assert text in page, text
    side_by_side = page[page.index("Policies side by side") : page.index("Attention sites</h2>")]
    for each in (report, other):
        live = sum(site.prediction.live_pairs for site in each.sites) / sum(
            site.prediction.dense_pairs for site in each.sites
        )
        assert str(each.subject.policy) in side_by_side and f">{live:.1%}<" in side_by_side
    flops = sum(site.prediction.own_pairs for site in report.sites) * 2 * 16
    assert f"instead of {html._readable(flops)} for all that its own masks show" in page
    assert "live_range_attention" in page and "http" not in page.replace("http://www.w3.org", "")
    parser = Checked()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    graph = json.loads((tmp_path / "page.json").read_text())["graphs"][-1]
    assert graph["modules"]["kind"] == "Gemma2ForCausalLM" and next(iter(graph["graphs"])) == "capture"
    assert graph["sites"][0]["prediction"]["num_keys"] == 64


class Checked(HTMLParser):
    """Every element that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "rect", "path", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag


def test_a_hundred_layers_are_a_few_rows() -> None:
    sites = [
        SiteReport(
            layer=i,
            module=f"model.layers.{i}.attention",
            form="sdpa",
            mask="window 8" if i % 6 else "causal",
            proof="verified",
            proof_detail="at all sizes up to 1,073,741,824, for all data",
            policy="Exact()",
            kernel="k",
            reason="",
            source="a:1",
        )
        for i in range(100)
    ]
    report = rewriter.Report([GraphReport(sites)])
    assert [g.numbers for g in report.groups] == ["0 .. 96 by 6", "1 .. 99, 83 of them"]
    assert report.groups[0].modules == "model.layers.{0 .. 96 by 6}.attention"
    assert len(str(report).splitlines()) < 20


def test_an_empty_report_says_what_to_do() -> None:
    assert "call the model once" in rewriter.optimize(nn.Linear(2, 2)).report.summary()


def test_a_refusal_is_not_hidden_by_a_later_graph(tiny_model: Callable[..., nn.Module]) -> None:
    fast = rewriter.optimize(tiny_model("llama", "eager").eval(), rewriter.SlidingWindow(4), backend="eager")
    ids = torch.randint(64, (1, 9))
    with pytest.warns(rewriter.PolicyWarning):
        fast(ids, output_attentions=True, use_cache=False)
    fast(ids, use_cache=False)
    fast(ids, use_cache=False, labels=ids)
    report = fast.report
    assert report.summary() == (
        "0 of 2 attention sites rewritten in graph 0; 2 of 2 attention sites rewritten in graph 1, 2"
    )
    assert len(report.refused) == 2 and all(site.rewritten for site in report.sites)
    text = str(report)
    assert "refused: the attention weights are" in text and "live_range_attention (CPU)" in text


def test_speeds_are_predicted_from_what_the_kernels_take(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With costs that make the arithmetic plain: a nanosecond for a pair's number, and a thousand for a panel."""
    plain = Cost(base=0, block=0, pair=0, number=1)
    table = {"causal": plain, "masked": plain, "live_range": Cost(base=0, block=1000, pair=0, number=1)}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")  # panels of 32 rows, 16 tokens
    monkeypatch.setattr("rewriter.passes.predict.costs", lambda device: table if device == "cpu" else None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    length = 1100

    def speeds(model: nn.Module, policy: rewriter.Policy, **options: Any) -> list[float | None]:
        return [s.prediction.speed for s in explained(model, policy=policy, length=length, **options).sites]

    llama = tiny_model("llama", "sdpa")
    assert speeds(llama, rewriter.Exact(), kernel="dense") == [1.0, 1.0]  # a padding mask: under a mask as before
    masked, numbers, panels = 4 * length * length, 16, 69  # the last of which has 12 tokens
    seen = {
        rewriter.Exact(): [16 * n for n in range(1, 69)] + [length],
        rewriter.SlidingWindow(5): [16, *[20] * 67, 16],
    }
    for policy, keys in seen.items():
        report = explained(llama, policy=policy, length=length)
        computed = 2 * 32 * sum(keys)
        assert [s.prediction.computed_pairs for s in report.sites] == [computed] * 2
        wanted = masked * numbers / (computed * numbers + 1000 * 2 * panels)
        assert [s.prediction.speed for s in report.sites] == [pytest.approx(wanted)] * 2
    assert speeds(tiny_model("gemma2", "eager"), rewriter.Exact()) == [None, None]  # softcaps: not measured
    assert "attention's speed" in " ".join(str(report).split())


class Losing:
    """Costs under which a call takes so long that nothing pays below some 1,000 tokens."""

    def __call__(self, device: str) -> dict[str, Cost]:
        return {
            "causal": Cost(0, 0, 0, 1),
            "masked": Cost(0, 0, 0, 1),
            "live_range": Cost(base=2e7, block=0, pair=0, number=1),
        }


def test_a_policy_that_will_not_pay_says_so_once_with_numbers(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.passes.predict.costs", Losing())
    model = tiny_model("llama", "sdpa").eval()
    fast = rewriter.optimize(model, rewriter.SlidingWindow(5), backend="eager")
    ids = torch.zeros(2, 32, dtype=torch.long)
    wanted = r"SlidingWindow\(window=5.* attention over 32 tokens is predicted to run at 0\.\d+x .* from about [\d,]+ tokens on"
    with pytest.warns(rewriter.SpeedWarning, match=wanted):
        fast(input_ids=ids, use_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", rewriter.SpeedWarning)
        with torch.no_grad():
            fast(input_ids=ids[:1], use_cache=False)  # another graph
        prepared = rewriter.optimize(model, rewriter.SlidingWindow(5), backend="eager")
        prepared.warmup({"input_ids": ids, "use_cache": False})
        rewriter.optimize(
            model, rewriter.SlidingWindow(5), backend="eager", example_inputs={"input_ids": ids, "use_cache": False}
        )
        rewriter.optimize(model, backend="eager")(input_ids=ids, use_cache=False)  # Exact drops nothing


def test_a_policy_that_pays_says_nothing(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    same = Cost(0, 0, 0, 1)
    table = {"causal": same, "masked": same, "live_range": same}
    monkeypatch.setattr("rewriter.passes.predict.costs", lambda device: table)
    fast = rewriter.optimize(tiny_model("llama", "sdpa").eval(), rewriter.SlidingWindow(5), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", rewriter.SpeedWarning)
        fast(input_ids=torch.zeros(2, 512, dtype=torch.long), use_cache=False)


class OddMask(nn.Module):
    """Causal attention with a mask that a prediction meets with data or lengths that the model never has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embedding = kind, nn.Embedding(64, 8)
        self.register_buffer("keep", torch.ones(100, dtype=torch.bool))

    def forward(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids).unsqueeze(1)
        length = input_ids.size(1)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask = mask & (self.keep[:length] if self.kind == "a buffer of some length" else ~hidden[:, None, None, :])
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("kind", ["a buffer of some length", "what is true is hidden"])
def test_a_prediction_never_fails_a_call(kind: str) -> None:
    ids = torch.randint(0, 64, (2, 24))
    model, hidden = OddMask(kind), torch.zeros(2, 24, dtype=torch.bool)
    i, j = torch.arange(24)[:, None], torch.arange(24)[None, :]
    x = model.embedding(ids).unsqueeze(1)
    expected = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=(j <= i) & (i - j < 4))
    fast = rewriter.optimize(model, rewriter.SlidingWindow(4), backend="eager", strict=True)
    torch.testing.assert_close(fast(ids, hidden), expected)


def test_a_call_of_no_rows_is_not_failed_either() -> None:
    fast = rewriter.optimize(OddMask("a buffer of some length"), rewriter.SeparatorMask((3,)), backend="eager")
    ids = torch.zeros(0, 24, dtype=torch.long)
    assert fast(ids, torch.zeros(0, 24, dtype=torch.bool)).shape == (0, 1, 24, 8)
