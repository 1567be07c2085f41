"""Attention as people write it whose scores change their shape on the way; each is found, and rewritten or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch import nn

import rewriter

HEADS = 4
Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Query, key and value `[B * H, S, 8]`, and an additive mask `[B, 1, S, S]`."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product, self.qkv = product, nn.Linear(32, 96)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.unflatten(2, (HEADS, 8)).transpose(1, 2).flatten(0, 1) for t in self.qkv(x).chunk(3, -1))
        keep = torch.ones(length, length, dtype=torch.bool).tril() & attention_mask[:, None, None].bool()
        mask = torch.zeros(keep.shape, dtype=x.dtype).masked_fill(~keep, torch.finfo(x.dtype).min)
        y = self.product(q / 8**0.5, k, v, mask)
        return y.reshape(batch, HEADS, length, 8).transpose(1, 2).flatten(2)


def split(x: Tensor) -> Tensor:
    return x.view(-1, HEADS, *x.shape[1:])


def there_and_back(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As OPT and BART once were: the mask over `[B, H, S, S]`, the softmax over `[B * H, S, S]`."""
    scores = split(torch.bmm(q, k.mT)) + mask
    return torch.bmm(scores.view(q.size(0), *mask.shape[2:]).softmax(-1), v)


def flat_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    flat = mask.expand(-1, HEADS, -1, -1).reshape(q.size(0), *mask.shape[2:])
    weights = (torch.bmm(q, k.mT) + flat).unflatten(0, (mask.size(0), HEADS)).softmax(-1)
    return torch.bmm(weights.flatten(0, 1), v)


def bias_and_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As BLOOM is: ALiBi `[B * H, 1, S]` in the product, the mask after the view."""
    slopes = 2.0 ** -torch.arange(1, HEADS + 1, dtype=torch.float32)
    bias = slopes[:, None, None] * torch.arange(q.size(1))
    bias = bias.expand(mask.size(0), -1, -1, -1).reshape(q.size(0), 1, -1).to(q.dtype)
    scores = split(bias.baddbmm(q, k.mT)) + mask
    return torch.bmm(scores.softmax(-1).view(q.size(0), *mask.shape[2:]), v)


def value_of_rank_4(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (split(torch.bmm(q, k.mT)) + mask).softmax(-1) @ split(v)


def heads_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Looks like batch and heads, and mixes the two."""
    scores = split(torch.bmm(q, k.mT)).transpose(0, 1).reshape(q.size(0), *mask.shape[2:])
    return torch.bmm(scores.softmax(-1), v)


def split_in_two_ways(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = split(torch.bmm(q, k.mT)) + mask
    scores = scores.flatten(0, 1).unflatten(0, (HEADS, -1)) + mask[:1, 0]
    return torch.bmm(scores.softmax(-1).view(q.size(0), *mask.shape[2:]), v)


def rows_split(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Half of a query's keys each: two softmaxes for one row."""
    weights = torch.bmm(q, k.mT).view(q.size(0), q.size(1) * 2, -1).softmax(-1)
    return torch.bmm(weights.view(q.size(0), q.size(1), -1), v)


def unflattened_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`[N, S, S]` as `[N, 1, S, S]`: a split of the rows, which are of one head."""
    scores = torch.bmm(q, k.mT).unflatten(1, (1, -1))
    return scores.softmax(-1).flatten(1, 2) @ v


def value_of_all_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((split(torch.bmm(q, k.mT)) + mask).softmax(-1) @ v[:1]).flatten(0, 1)


def one_head_by_unsqueeze(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (torch.bmm(q, k.mT).unsqueeze(1) + mask[:1]).softmax(-1).squeeze(1) @ v


FOUND: dict[Product, str] = {
    there_and_back: "causal + padding",
    flat_mask: "causal + padding",
    bias_and_mask: "causal + padding + key bias",
    value_of_rank_4: "causal + padding",
}
REFUSED: dict[Product, str] = {
    heads_first: "transpose.int between the product and the softmax",
    split_in_two_ways: "split into batch and heads in two ways",
    rows_split: "changes more than batch and heads",
    unflattened_rows: "changes more than batch and heads",
    value_of_all_rows: "is repeated for all rows",
    one_head_by_unsqueeze: "unsqueeze.default between the product and the softmax",
}


def calls() -> list[tuple[Tensor, Tensor]]:
    """Rows of even length, padded at either end."""
    inputs = []
    for batch, length in ((3, 10), (2, 18), (5, 6)):
        real = torch.ones(batch, length, dtype=torch.int64)
        real[0, -3:] = 0
        inputs.append((torch.randn(batch, length, 32, dtype=torch.float64), real))
    return inputs


@pytest.mark.parametrize("product", FOUND, ids=lambda f: f.__name__)
def test_views_of_batch_and_heads_on_the_way(product: Product) -> None:
    model = Attention(product).double()
    fast = rewriter.optimize(model, backend="eager", strict=True)
    for x, real in calls():
        ours, theirs = fast(x, real), model(x, real)
        torch.testing.assert_close(ours, theirs)
        of_ours, of_theirs = (torch.autograd.grad(y.square().sum(), model.qkv.weight)[0] for y in (ours, theirs))
        torch.testing.assert_close(of_ours, of_theirs)
    (site,) = fast.report.sites
    assert site.mask == FOUND[product]


@pytest.mark.parametrize("product", REFUSED, ids=lambda f: f.__name__)
def test_other_views_are_refused(product: Product) -> None:
    model = Attention(product).double()
    fast = rewriter.optimize(model, backend="eager")
    for x, real in calls():
        torch.testing.assert_close(fast(x, real), model(x, real))
    assert {REFUSED[product] in site.reason for site in fast.report.sites} == {True}


def test_one_row_of_a_batch_keeps_its_layout() -> None:
    """What views the flat result needs it contiguous, as the product made it; several rows are copied anyway."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows, length, _ = x.shape
            q = x.view(rows, length, HEADS, 8).transpose(1, 2).reshape(-1, length, 8)
            weights = (q @ q.mT).view(rows, HEADS, length, length).softmax(-1).view(rows * HEADS, length, length)
            return (weights @ q).view(rows * HEADS, length * 8)

    torch._dynamo.reset()
    fast = rewriter.optimize(Model(), backend="eager", strict=True)
    for rows in (3, 1, 2):
        x = torch.randn(rows, 5, 32)
        torch.testing.assert_close(fast(x), Model()(x))


@pytest.mark.parametrize("rounded", ["bias", "slopes"])
def test_a_bias_keeps_its_precision(rounded: str) -> None:
    """ALiBi of a 16-bit model is rounded where the model rounds it: at key 500 by up to 1, which changes the weights."""

    class Biased(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            slopes = 2.0 ** -torch.arange(1, HEADS + 1, dtype=torch.float32) * 1.7
            place = (attention_mask.cumsum(-1) - 1)[:, None, None, :]
            bias = (slopes.to(x.dtype) if rounded == "slopes" else slopes)[:, None, None] * place
            keep = torch.ones(x.size(2), x.size(2), dtype=torch.bool).tril()
            mask = torch.where(keep, bias.to(x.dtype), torch.finfo(x.dtype).min)
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    torch._dynamo.reset()
    fast = rewriter.optimize(Biased(), backend="eager", strict=True)
    x, real = torch.randn(2, HEADS, 600, 8, dtype=torch.bfloat16), torch.ones(2, 600, dtype=torch.int64)
    torch.testing.assert_close(fast(x, real), Biased()(x, real), rtol=2**-7, atol=2**-7)
