"""The counting behind a running top-w, where time is cut into more keys a chunk, and more blocks, than short rows have."""

from __future__ import annotations

import pytest
import torch
from rewriter.kernels.dispatch import INTERPRETED
from rewriter.kernels.gpu import running_topk
from rewriter.kernels.topk import best_first
from rewriter.kernels.topk import end_by_partition

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="keys are counted by a Triton kernel: set TRITON_INTERPRET=1"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("keys", "spans"), [(1000, 512), (1500, 4), (1500, 2), (3000, 4)])
@pytest.mark.parametrize("keep", [1, 100, 1499])
@pytest.mark.parametrize("order", ["random", "rising", "falling", "tied"])
def test_equals_the_partition(keys: int, spans: int, keep: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_topk, "MAX_SPANS", spans)
    monkeypatch.setattr(running_topk, "STEPS", spans.bit_length() - 1)
    score = torch.randn(1, 2, keys, generator=torch.Generator().manual_seed(keys + keep))
    if order in ("rising", "falling"):
        score = score.sort(dim=2, descending=order == "falling").values
    if order == "tied":
        score = score.round()
    ends = running_topk.ends(best_first(score.to(DEVICE), None), keep).view(score.shape)
    assert torch.equal(ends.cpu(), end_by_partition(score, keep, None))
