from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rewriter


def report_of(nano: Any) -> rewriter.Report:
    torch._dynamo.reset()

    class Two(nn.Module):
        """One attention that is rewritten and one that is refused."""

        def __init__(self) -> None:
            super().__init__()
            self.proven = nano(attention="sdpa")
            self.reader = nn.MultiheadAttention(64, 2, batch_first=True)

        def forward(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            x = self.proven(input_ids)
            return self.reader(x, x, x, attn_mask=hidden, need_weights=False)[0]

    optimized = rewriter.optimize(Two(), backend="eager")
    optimized(torch.randint(0, 64, (2, 10)), torch.rand(10, 10) < 0.1)
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
    assert "input argument 1" in third.reason
    assert report.summary() == "2 of 3 attention sites rewritten"

    printed = str(report)
    assert "refused: a mask depends on" in " ".join(printed.split())
    assert "conftest.py" in printed

    data = json.loads(json.dumps(report.to_dict()))
    assert [site["module"] for site in data["graphs"][0]["sites"]] == ["proven", "proven", "reader"]
    assert set(data["graphs"][0]["seconds"]) >= {"capture", "find-attention", "analyse-masks", "lower"}

    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<tr") == 4
    assert page.count('class="no"') == 1
    assert "refused: a mask depends on" in page


def test_an_empty_report_says_what_to_do() -> None:
    assert "call the model once" in rewriter.optimize(nn.Linear(2, 2)).report.summary()
