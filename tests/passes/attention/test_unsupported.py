"""Operators around a softmax: those with two names are one, and what is not understood is refused, not overlooked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch import nn

import rewriter

HEADS = 4
Weighted = Callable[[Tensor, Tensor, Tensor], Tensor]


class Beside(nn.Module):
    """An attention over logits and values `[B, H, S, S]` and `[B, H, S, 8]`, hidden where the mask is true, after a plain one."""

    def __init__(self, attend: Weighted) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        x = x + nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        hidden = torch.ones(x.size(2), x.size(2), dtype=torch.bool).triu(1)
        return x + self.attend(x @ x.transpose(-2, -1), x, hidden)


def exp_and_sum(logits: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    weights = torch.exp(logits.masked_fill(hidden, -torch.inf) - logits.amax(-1, keepdim=True))
    return weights @ value / weights.sum(-1, keepdim=True)


@torch.library.custom_op("rewriter_tests::attn", mutates_args=())
def kernel(logits: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value


kernel.register_fake(lambda logits, value, hidden: torch.empty_like(value))

SYNONYMS: dict[str, Weighted] = {
    "divide": lambda x, v, hidden: torch.divide(x, 3.0).masked_fill(hidden, -torch.inf).softmax(-1) @ v,
    "subtract": lambda x, v, hidden: torch.subtract(x, 1e9 * hidden).softmax(-1) @ v,
    "special": lambda x, v, hidden: torch.special.softmax(x.masked_fill(hidden, -torch.inf), -1) @ v,
    "linalg": lambda x, v, hidden: torch.linalg.matmul(x.masked_fill(hidden, -torch.inf).softmax(-1), v),
    "a tensor's fill": lambda x, v, hidden: torch.where(hidden, torch.tensor(-torch.inf), x).softmax(-1) @ v,
}
STRANGE: dict[str, tuple[Weighted, str]] = {
    "clamp": (lambda x, v, hidden: x.clamp(-3, 3).masked_fill(hidden, -torch.inf).softmax(-1) @ v, "clamp"),
    "lower bound": (lambda x, v, hidden: (x - 1e9 * hidden).maximum(torch.tensor(-1e5)).softmax(-1) @ v, "maximum"),
    "heads that talk": (lambda x, v, hidden: torch.einsum("bhqk,hg->bgqk", x, torch.eye(4)).softmax(-1) @ v, "einsum"),
    "convolution": (
        lambda x, v, hidden: nn.functional.conv2d(x, torch.eye(4)[..., None, None]).softmax(-1) @ v,
        "conv2d",
    ),
    "exp and sum": (exp_and_sum, "made of the logits by aten.exp"),
    "log softmax": (lambda x, v, hidden: x.log_softmax(-1).exp() @ v, "made of the logits by aten.exp"),
    "sigmoid": (
        lambda x, v, hidden: x.masked_fill(hidden, -torch.inf).sigmoid() @ v,
        "made of the logits by aten.sigmoid",
    ),
    "a kernel": (kernel, "rewriter_tests.attn.default is a kernel that hides its logits"),
}


@pytest.mark.parametrize("name", SYNONYMS)
def test_operators_with_two_names(name: str) -> None:
    model = Beside(SYNONYMS[name])
    fast = rewriter.optimize(model, backend="eager", strict=True)
    x = torch.randn(3, HEADS, 9, 8)
    torch.testing.assert_close(fast(x), model(x))
    assert [site.mask for site in fast.report.sites] == ["causal", "causal"]


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_not_understood_is_not_overlooked(name: str) -> None:
    """Beside an attention that is rewritten: else the policy would be ignored there without a word."""
    attend, reason = STRANGE[name]
    model = Beside(attend)
    fast = rewriter.optimize(model, backend="eager")
    x = torch.randn(3, HEADS, 9, 8)
    torch.testing.assert_close(fast(x), model(x))
    rewritten, refused = fast.report.sites
    assert rewritten.mask == "causal" and reason in refused.reason
    with pytest.raises(rewriter.RewriteError, match="1 of 2 attention sites are refused"):
        rewriter.optimize(model, backend="eager", strict=True)(x)


def test_parameters_for_each_head_are_no_keys() -> None:
    """The gates of RecurrentGemma: a sigmoid of a product with a block-diagonal weight."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(HEADS, 8, 8)), nn.Parameter(torch.randn(HEADS, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = x + nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
            rows = x.transpose(0, 1).flatten(1, 2)
            gate = torch.baddbmm(self.bias, rows, self.weight).sigmoid()
            return x * gate.unflatten(1, (x.size(0), -1)).transpose(0, 1)

    torch._dynamo.reset()
    model = Gated()
    fast = rewriter.optimize(model, backend="eager", strict=True)
    x = torch.randn(3, HEADS, 9, 8)
    torch.testing.assert_close(fast(x), model(x))
    assert [site.mask for site in fast.report.sites] == ["causal"]
