"""What of a mask may change from call to call: buffers, parameters, tensors written to in place."""

from __future__ import annotations

import pytest
import torch
from masked import INF
from masked import Attention
from masked import batches
from masked import row_and_key
from torch import Tensor
from torch import nn

import rewriter


def test_a_tensor_changed_in_place_through_a_view_is_data() -> None:
    def mask(scores: Tensor, ids: Tensor) -> Tensor:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        hidden[2:, 0] = True  # key 0 is hidden from the third query on
        return scores.masked_fill(hidden, -INF)

    model = Attention(mask)
    optimized = rewriter.optimize(model, backend="eager")
    (ids, _) = batches()
    assert torch.equal(optimized(ids), model(ids))
    assert not optimized.report.sites[0].rewritten


@pytest.mark.parametrize("changed", ["scores", "weights"])
def test_scores_and_weights_changed_through_a_view_are_refused(changed: str) -> None:
    class Changing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores = x @ x.transpose(1, 2)
            if changed == "scores":
                scores[:, 1:, 0] = -INF
            weights = scores.softmax(-1)
            if changed == "weights":
                weights[:, :, 0] = 0.0
            return weights @ x

    model = Changing()
    optimized = rewriter.optimize(model, backend="eager")
    x = torch.randn(3, 9, 4)
    torch.testing.assert_close(optimized(x), model(x))
    assert not optimized.report.sites[0].rewritten


def test_a_buffer_whose_values_change_is_proven_anew(nano: type[nn.Module]) -> None:
    model = nano()
    optimized = rewriter.optimize(model, backend="eager", strict=True)
    ids = torch.randint(0, 64, (2, 10))
    torch.testing.assert_close(optimized(ids), model(ids))
    assert {site.mask for site in optimized.report} == {"causal"}
    model.bias.mul_(torch.ones(64, 64).triu(-2))  # now also a window of 3
    torch.testing.assert_close(optimized(ids), model(ids))
    assert {site.mask for site in optimized.report} == {"causal + window 3"}


def test_a_buffer_beside_a_size_is_refused() -> None:
    """The last key is visible to all: at each length another one."""

    class Last(Attention):
        def __init__(self) -> None:
            super().__init__(self.masked)
            self.register_buffer("triangle", torch.ones(64, 64).tril())

        def masked(self, scores: Tensor, ids: Tensor) -> Tensor:
            length = scores.size(-1)
            visible = self.triangle[:length, :length] + (row_and_key(length)[1] >= length - 1) > 0
            return scores.masked_fill(~visible, -INF)

    model = Last()
    optimized = rewriter.optimize(model, backend="eager")
    for ids in batches():
        torch.testing.assert_close(optimized(ids), model(ids))
    assert "a constant mask is another one at another length" in str(optimized.report.sites[0].reason)


def test_a_parameter_is_data_since_training_changes_it() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Parameter(torch.tril(torch.ones(32, 32)), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            length = x.size(1)
            scores = x @ x.transpose(1, 2)
            return scores.masked_fill(self.mask[:length, :length] == 0, -INF).softmax(-1) @ x

    model = Learned()
    optimized = rewriter.optimize(model, backend="eager")
    x = torch.randn(3, 9, 4)
    torch.testing.assert_close(optimized(x), model(x))
    assert "input mask" in optimized.report.sites[0].reason
