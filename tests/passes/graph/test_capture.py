"""A captured graph is what tracing every call would give, though a layer like an earlier one is copied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captured import captured
from captured import described
from torch import Tensor
from torch import nn


class Layers(nn.Module):
    def __init__(self, number: int, layer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.number, self.layer = number, layer

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.number):
            x = self.layer(x)
        return x


def test_what_is_traced_does_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(x: Tensor) -> Tensor:
        return x + torch.softmax(x @ x.mT, -1)[:, 1:] @ x + x.flip(-1).chunk(2, -1)[0].repeat(1, 1, 2).sin()

    x = torch.randn(3, 2, 8)
    few, many = (captured(Layers(number, layer), monkeypatch, True, x)[1] for number in (3, 30))
    assert few == many and few.total() > 0


def written(x: Tensor) -> Tensor:
    y = x * 2
    y[..., 0] = 1.0
    return y.add_(x)


def constant(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, 2.0]).sum()


def other_numbers(x: Tensor) -> Tensor:
    """The same functions; other constants, types of constants, and arguments that are one tensor or two."""
    y = x * 1.0
    return (
        torch.add(x * 1, x, alpha=2)
        + torch.add(y, x, alpha=3)
        + torch.dot(x[0, 0], x[0, 0])
        + torch.dot(x[0, 0], y[0, 1])
    )


def checkpointed(x: Tensor) -> Tensor:
    y: Tensor = torch.utils.checkpoint.checkpoint(lambda x: (x.sin() * 2).cos(), x, use_reentrant=False)
    return (y.sin() * 2).cos()


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.sin() * 2
    return y + x.sin() * 2


def in_bf16(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.mT
    return x + (y.float() @ x) + (x @ x.mT) @ x


def joined(x: Tensor) -> Tensor:
    """As DeepSeek-V3 joins its keys: written through views of what is new."""
    y = x.new_empty(*x.shape[:-1], 16)
    y[..., :8].copy_(x.sin())
    y[..., 8:].copy_(x.cos())
    return y[..., 4:12] * 2


def signed_zeros(x: Tensor) -> Tensor:
    return torch.copysign(x, torch.tensor(0.0)) + 2 * torch.copysign(x, 0.0) + 3 * torch.copysign(x, -0.0)


@pytest.mark.parametrize(
    "layer",
    [written, joined, constant, other_numbers, signed_zeros, checkpointed, without_gradients, in_bf16],
    ids=lambda f: f.__name__,
)
def test_what_else_a_trace_depends_on(layer: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers(3, layer)
    x = torch.randn(3, 6, 8, requires_grad=True)
    traced, copied = (captured(model, monkeypatch, copies, x)[0] for copies in (False, True))
    assert described(copied) == described(traced)
    inputs = [n.meta["val"] for n in copied.graph.nodes if n.op == "placeholder"]
    sizes = iter(x.shape)
    given = [next(sizes) if isinstance(value, torch.SymInt) else x for value in inputs]
    torch.testing.assert_close(copied(*given)[0], model(x))
