"""Models that look like attention and are not quite: each is refused, or gives what it gave. All were wrong once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.testing._internal.two_tensor import TwoTensor

import rewriter
from rewriter.errors import CacheError

INF = float("inf")


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor], sinks: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.sinks = None if sinks is None else nn.Parameter(sinks)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        return self.function(self, q, k, v, real)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def masked(scores: Tensor) -> Tensor:
    return scores.masked_fill(~causal(scores.size(-1)), -INF)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def maximum_before_sinks(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    s = masked(q @ k.mT)
    s = s - s.max(-1, keepdim=True).values
    column = m.sinks.reshape(1, -1, 1, 1).expand(q.size(0), -1, q.size(2), 1)
    return torch.cat([s, column], -1).softmax(-1)[..., :-1] @ v


def maximum_before_softcap(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    s = q @ k.mT
    s = s - s.amax(-1, keepdim=True)
    return masked(5.0 * torch.tanh(s / 5.0)).softmax(-1) @ v


def maximum_of_everything(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    s = q @ k.mT
    return masked(s - s.amax()).softmax(-1) @ v


def sinks_changed_later(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    column = m.sinks.reshape(1, -1, 1, 1) * 1
    s = torch.cat([masked(q @ k.mT), column.expand(q.size(0), -1, q.size(2), 1)], -1)
    column.fill_(9.0)
    return s.softmax(-1)[..., :-1] @ v


def pieces_written(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    x = q * 1
    a, b = x.chunk(2, -1)
    a[..., :2] = 3.0 * v[..., :2]
    return sdpa(q, k, v)[..., :4] + b + x[..., :4]


def unbound_written(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    x = torch.stack([q, k])
    a, b = x.unbind(0)
    a.mul_(3.0)
    return sdpa(q, k, v) + x[0] + b


def inactive_dropout_written(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    x = q * 1
    y = nn.functional.dropout(x, 0.1, False)
    y[..., :2] = v[..., :2]
    return sdpa(q, k, v) + x


def repeated_keys_written(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    k = k[:, :2].repeat_interleave(2, dim=1)
    k[:, :, 0].fill_(0.5)
    return masked(q @ k.mT).softmax(-1) @ v


def transposed_keys_written(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    turned = k.transpose(-1, -2).contiguous() * 1
    s = q @ turned
    turned[..., 0].fill_(3.0)
    return masked(s).softmax(-1) @ v + turned.mT


def padding_written_later(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    real = real * 1
    keep = (real != 0)[:, None, None, :] & causal(q.size(2))
    real[:, 1] = 0
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep) + real[:, None, :, None]


def fill_below_a_bias(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    bias = 2e5 * torch.arange(q.size(2), dtype=q.dtype) / q.size(2) * real
    s = (q @ k.mT).masked_fill(~causal(q.size(2)), -1e5)
    return (s + bias[:, None, None, :]).softmax(-1) @ v


def positions_in_bf16(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    place = torch.arange(q.size(2)).to(torch.bfloat16)
    keep = place[None] <= place[:, None]
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def positions_in_uint8(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    place = torch.arange(q.size(2)).to(torch.uint8)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=place[None] <= place[:, None])


def integer_bias(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return masked(q @ k.mT + torch.arange(q.size(2))).softmax(-1) @ v


def bias_times_three(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    """Of 16 bits, added with a factor: the product is not rounded."""
    slopes = 2.0 ** -torch.arange(1, 5, dtype=torch.bfloat16)
    bias = torch.add(slopes[:, None, None], torch.arange(q.size(2)), alpha=3)
    return masked(q @ k.mT + bias.float()).softmax(-1) @ v


def keys_of_another_batch(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    return masked(q[:1] @ k.mT).softmax(-1) @ v


def heads_made_by_a_mask(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    bias = torch.arange(4.0)[:, None, None] * torch.arange(q.size(2))
    return (masked(q[:, :1] @ k[:, :1].mT) + bias).softmax(-1) @ v[:, :1]


def views_of_factors(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
    """The query is split into heads, the scores are not; the bias has as many heads as the query has rows."""
    q, v = (x.reshape(-1, 1, *x.shape[2:]) for x in (q, v))
    bias = (torch.arange(q.size(0)) % 3)[:, None, None] * torch.arange(q.size(2)) * 0.1
    return (masked(q @ q.mT) + bias).softmax(-1) @ v


FUNCTIONS = [
    maximum_before_sinks, maximum_before_softcap, maximum_of_everything, sinks_changed_later, pieces_written, unbound_written,
    inactive_dropout_written, repeated_keys_written, transposed_keys_written, padding_written_later, fill_below_a_bias,
    positions_in_bf16, positions_in_uint8, integer_bias, bias_times_three,
    keys_of_another_batch, heads_made_by_a_mask, views_of_factors,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_it_gives_what_it_gave(function: Callable[..., Tensor]) -> None:
    model = Function(function, torch.tensor([0.5, -1.0, 2.0, 0.0]) if "sinks" in function.__name__ else None)
    fast = rewriter.optimize(model, backend="eager")
    for rows, length in ((3, 9), (2, 300)):
        inputs = [torch.randn(rows, 4, length, 8) for _ in range(3)]
        real = torch.ones(rows, length, dtype=torch.int64)
        torch.testing.assert_close(
            fast(*(t.clone() for t in inputs), real.clone()), model(*inputs, real), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("visible", "value"),
    [
        (lambda m: m.half().bool(), 1e-10),
        (lambda m: m.bfloat16() > 0.5, 0.501),
        (lambda m: m.to(torch.uint8) > 0, 256),
        (lambda m: (1.0 - m.to(torch.float32)) < 1, 2.0**-30),
    ],
)
def test_a_mask_is_compared_as_it_was_rounded(visible: Callable[[Tensor], Tensor], value: float) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=visible(mask)[:, None, None, :])

    torch._dynamo.reset()
    x, mask = torch.randn(2, 4, 5, 8), torch.tensor([[1, 1, value, 1, 1]] * 2)
    fast = rewriter.optimize(Model(), backend="eager", strict=True)
    torch.testing.assert_close(fast(x, mask), Model()(x, mask))


def test_sinks_are_understood() -> None:
    """A column of one number per head, with the maximum taken away after it, gradients and all."""

    def function(m: Function, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        s = torch.cat([masked(q @ k.mT), m.sinks.expand(q.size(0), -1, q.size(2), 1)], -1)
        return (s - s.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v

    torch._dynamo.reset()
    model = Function(function, torch.tensor([0.5, -1.0, 2.0, 0.0])[None, :, None, None]).double()
    fast = rewriter.optimize(model, backend="eager", strict=True)
    results = []
    inputs = [torch.randn(3, 4, 11, 8, dtype=torch.float64) for _ in range(3)]
    for run in (fast, model):
        model.zero_grad()
        output = run(*inputs, torch.ones(3, 11))
        output.square().sum().backward()
        results.append((output.detach(), model.sinks.grad.clone()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("write", ["slice", "whole"])
def test_a_write_without_gradients_cuts_them(write: str) -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = x * 2
            with torch.no_grad():
                if write == "slice":
                    x[..., :2] = y[..., :2]
                else:
                    x.clamp_(-1, 1)
            return sdpa(x, x, x)

    torch._dynamo.reset()
    model = Cut()
    gradients = []
    start = torch.randn(3, 2, 9, 8)
    for run in (model, rewriter.optimize(model, backend="eager")):
        x = start.clone().requires_grad_()
        run(x, torch.ones_like(x)).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_a_write_keeps_its_dtype() -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return (x * 1).add_(y), sdpa(x, x, x)

    torch._dynamo.reset()
    x, y = torch.randn(3, 2, 9, 8, dtype=torch.bfloat16), torch.randn(3, 2, 9, 8)
    added, _ = rewriter.optimize(Narrow(), backend="eager", strict=True)(x, y)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added, Narrow()(x, y)[0])


def test_slices_written_one_after_the_other_are_one_tensor() -> None:
    class Joined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            key = x.new_empty(*x.shape[:-1], 8)
            key[..., :5].copy_(x[..., 3:])
            key[..., 5:].copy_(x[..., :3] * 2)
            return sdpa(x, key, x)

    torch._dynamo.reset()
    x = torch.randn(3, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    fast = rewriter.optimize(Joined(), backend="eager", strict=True)
    torch.testing.assert_close(fast(x), Joined()(x))
    torch.testing.assert_close(*(torch.autograd.grad(run(x).square().sum(), x)[0] for run in (fast, Joined())))


class Doubled(torch.autograd.Function):
    """A backward that is not the derivative of its forward."""

    @staticmethod
    def forward(ctx, x, times):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x * times, x.sum(-1)

    @staticmethod
    def backward(ctx, gradient, of_sum):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return gradient * 7 * x + of_sum[..., None], None


class OwnBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x, total = Doubled.apply(x.sin(), x.size(2))
        y = sdpa(x, x, x) * total[..., None]
        return torch.utils.checkpoint.checkpoint(lambda y: Doubled.apply(y, 3)[0], y, use_reentrant=False)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_backward_of_the_models_own_stays(backend: str) -> None:
    """BLOOM has one. A traced graph would have the derivative of its forward, or none."""
    fast = rewriter.optimize(OwnBackward(), backend=backend, strict=True)
    for length in (9, 14):
        x = (torch.randn(3, 2, length, 8, dtype=torch.float64) * 0.1).requires_grad_()
        torch.testing.assert_close(fast(x), OwnBackward()(x))
        ours, theirs = (torch.autograd.grad(run(x).square().sum(), x)[0] for run in (fast, OwnBackward()))
        torch.testing.assert_close(ours, theirs)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), OwnBackward()(x))


def test_attention_inside_an_autograd_function_is_refused() -> None:
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            return masked(x @ x.mT).softmax(-1) @ x

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient * ctx.saved_tensors[0]

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Attention.apply(x)

    torch._dynamo.reset()
    fast = rewriter.optimize(Model(), backend="eager")
    x = torch.randn(3, 2, 9, 8, requires_grad=True)
    torch.testing.assert_close(*(torch.autograd.grad(run(x).sum(), x)[0] for run in (fast, Model())))
    (site,) = fast.report.sites
    assert not site.rewritten and "inside an autograd.Function" in site.reason
    with torch.no_grad():
        torch.testing.assert_close(fast(x), Model()(x))
    assert fast.report.sites[-1].rewritten


@pytest.mark.parametrize("marked", [False, True])
def test_an_autograd_function_that_writes_to_its_input_is_an_error(marked: bool) -> None:
    class Zeroed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            x.zero_()
            if not marked:
                return x * 3
            ctx.mark_dirty(x)
            return x

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient * 7

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return sdpa(x, x, x) + Zeroed.apply(y) + y

    torch._dynamo.reset()
    with pytest.raises(rewriter.RewriteError, match=r"an autograd\.Function of the model's changes a tensor in place"):
        rewriter.optimize(Model(), backend="eager")(torch.randn(3, 2, 9, 8, requires_grad=True))


@pytest.mark.parametrize(
    "transform",
    [torch.func.grad(lambda a: a.sin().sum()), lambda a: flex_attention(a, a, a)],
    ids=["grad", "flex_attention"],
)
def test_what_leaves_no_trace_is_an_error(transform: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return sdpa(x, x, x), transform(x)

    torch._dynamo.reset()
    with pytest.raises(rewriter.RewriteError, match="leaves no trace"):
        rewriter.optimize(Model(), backend="eager")(torch.randn(3, 2, 9, 8))


def test_attention_where_no_pass_looks_is_an_error() -> None:
    class InVmap(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return sdpa(x, x, x), torch.vmap(lambda row: sdpa(row[None], row[None], row[None])[0])(x)

    class OverPairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys = nn.Parameter(TwoTensor(torch.randn(1, 2, 9, 32), torch.randn(1, 2, 9, 32)))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return sdpa(x, x, x), sdpa(self.keys, self.keys, self.keys)

    over = r"attends over tensors of class TwoTensor"
    for model, message in ((InVmap(), r"attends inside torch\.vmap"), (OverPairs(), over)):
        with pytest.raises(rewriter.RewriteError, match=message):
            rewriter.optimize(model, backend="eager")(torch.randn(3, 2, 9, 32))


@pytest.mark.parametrize("grad", [False, True])
def test_vmap_in_vmap_is_what_it_is_without_capture(grad: bool) -> None:
    weights = torch.randn(5, 8)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            inner = torch.vmap(lambda row, weight: (row * weight).cumsum(0) + row.size(0), in_dims=(None, 0))
            return sdpa(x, x, x), torch.vmap(inner, in_dims=(1, None))(x[0, 0], weights[:, : x.size(2)])

    model = Model()
    fast = rewriter.optimize(model, backend="eager")
    for length in (4, 7):
        x = torch.randn(3, 2, length, 8, requires_grad=grad)
        own, expected = fast(x), model(x)
        torch.testing.assert_close(own, expected)
        if grad:
            gradients = [torch.autograd.grad(sum(t.square().sum() for t in result), x)[0] for result in (own, expected)]
            torch.testing.assert_close(*gradients)
    assert fast.report.refused == []


def test_a_mask_that_adds_up_earlier_tokens_does_not_go_on() -> None:
    class Leading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.place = nn.Embedding(64, 16), nn.Embedding(64, 16)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
            x = (self.embedding(input_ids) + self.place(position_ids)).unflatten(-1, (2, 8)).transpose(1, 2)
            keep = causal(x.size(2)) & (attention_mask.cumsum(-1) > 0)[:, None, None, :]
            y = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=keep)
            return y.transpose(1, 2).flatten(2) @ self.embedding.weight.T

    torch._dynamo.reset()
    with pytest.raises(CacheError, match="adds up earlier tokens"):
        rewriter.optimize(Leading(), backend="eager").new_cache(32)


def test_a_buffer_on_the_meta_device_has_no_values(nano: type[nn.Module]) -> None:
    with torch.device("meta"):
        model = nano()
    report = rewriter.explain(model, torch.zeros(2, 9, dtype=torch.int64))
    assert all("on the meta device has no values" in site.reason for site in report.sites)


def test_a_buffer_of_a_module_with_a_getattr_of_its_own_is_read_and_read_again() -> None:
    """Dynamo names what belongs to such a module by its `__dict__`, and takes its sizes for unknown."""

    class Masked(nn.Module):
        def __init__(self, whole: bool = False) -> None:
            super().__init__()
            self.whole = whole
            self.register_buffer("keep", torch.ones(9, 9, dtype=torch.bool).tril())

        def __getattr__(self, name: str) -> Tensor | nn.Module:
            return super().__getattr__(name)

        def forward(self, x: Tensor) -> Tensor:
            keep = self.keep if self.whole else self.keep[: x.size(2), : x.size(2)]
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=keep)

    torch._dynamo.reset()
    model = Masked()
    fast = rewriter.optimize(model, backend="eager", strict=True)
    x = torch.randn(3, 2, 7, 8)
    for mask in ("causal", "causal + window 3"):
        torch.testing.assert_close(fast(x), model(x))
        assert [site.mask for site in fast.report.sites] == [mask]
        model.keep.triu_(-2)
    x = torch.randn(3, 2, 9, 8)
    whole = rewriter.optimize(Masked(whole=True), backend="eager")
    torch.testing.assert_close(whole(x), whole.model(x))
    assert "could not be evaluated at sizes" in whole.report.sites[0].reason
