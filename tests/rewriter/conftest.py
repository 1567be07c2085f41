"""The law that the tests of this folder share: a rewritten model is the model under the policy's dense mask."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch import nn

from rewriter.testing import assert_within_budget


def batch(batch_size: int, length: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and a padding mask whose rows are padded differently."""
    ids = torch.randint(0, 64, (batch_size, length))
    mask = torch.ones(batch_size, length, dtype=torch.long)
    for row in range(batch_size):
        cut = row * length // (2 * batch_size)
        if cut:
            mask[row, :cut] = 0 if left else mask[row, :cut]
            mask[row, length - cut :] = mask[row, length - cut :] if left else 0
    return ids, mask


def call(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    inner = getattr(model, "model", model)
    keywords = {"use_cache": False} if hasattr(getattr(inner, "config", None), "use_cache") else {}
    if type(inner).__name__.startswith("Bert"):
        keywords = {}
    output = model(input_ids=ids, attention_mask=mask, **keywords)
    return output if isinstance(output, Tensor) else output.logits


def output_and_gradients(run: Callable[[], Tensor], model: nn.Module, weight: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = run()
    real = weight.abs().sum(-1) > 0
    (logits[real] * weight[real].to(logits.dtype)).sum().backward()
    return {
        "logits": logits[real].detach(),
        **{name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
    }


class Comparison:
    """Rewritten against dense in fp32, both against dense in fp64, pooled over batches and layers.

    Rows of padding are left out. A gradient that is zero but for rounding (a key's bias cancels in the softmax) is
    allowed one unit of the largest gradient.

    Args:
        magnitudes: after a backward of the fp64 form, for parameters whose gradient is a sum of terms that cancel: the sum
            of the terms' absolute values.
    """

    def __init__(
        self,
        model: nn.Module,
        optimized: nn.Module,
        dense: Callable[..., Tensor],
        magnitudes: Callable[[], dict[str, Tensor]] = dict,
    ) -> None:
        self.model, self.optimized, self.dense, self.magnitudes = model, optimized, dense, magnitudes
        self.precise = copy.deepcopy(model).double()
        self.results: dict[str, list[tuple[Tensor, ...]]] = {}

    def add(self, ids: Tensor, mask: Tensor) -> None:
        weight = torch.randn(*mask.shape, 64) * mask[..., None]
        actual = output_and_gradients(lambda: call(self.optimized, ids, mask), self.model, weight)
        plain = output_and_gradients(lambda: self.dense(self.model, ids, mask), self.model, weight)
        with softmax_in_full_precision():
            exact = output_and_gradients(lambda: self.dense(self.precise, ids, mask), self.precise, weight.double())
        magnitudes = self.magnitudes()
        for name in exact:
            magnitude = magnitudes.get(name, torch.zeros_like(exact[name]))
            parts = tuple(t.flatten() for t in (actual[name], plain[name], exact[name], magnitude))
            self.results.setdefault(re.sub(r"\d+", "*", name), []).append(parts)

    def check(self) -> None:
        pooled = {name: [torch.cat(part) for part in zip(*parts, strict=True)] for name, parts in self.results.items()}
        largest = max(exact.norm() for _, _, exact, _ in pooled.values())
        for name, (actual, plain, exact, magnitude) in pooled.items():
            cancels = exact.norm() < 1e-6 * largest
            assert_within_budget(actual, plain, exact, name, magnitude=largest if cancels else magnitude)


@contextmanager
def softmax_in_full_precision() -> Iterator[None]:
    """transformers' eager attention casts its logits to fp32, a fp64 model's too, where finfo.min becomes -inf."""
    original = nn.functional.softmax
    nn.functional.softmax = lambda x, dim, dtype=None: original(x, dim=dim)
    try:
        yield
    finally:
        nn.functional.softmax = original


@pytest.fixture
def law() -> SimpleNamespace:
    return SimpleNamespace(
        batch=batch, call=call, Comparison=Comparison, softmax_in_full_precision=softmax_in_full_precision
    )
