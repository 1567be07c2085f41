"""Live-range attention by other kernels than the one that is registered: PyTorch's operators, and variants of the one in C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rewriter.kernels import LiveRanges
from rewriter.kernels.arguments import AttentionArguments
from rewriter.kernels.cpu import native
from rewriter.kernels.ops import backward_in_torch
from rewriter.kernels.ops import forward_in_torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.codecache import CppCodeCache

Attention = Callable[..., Any]

NAMES = ("live_range_attention_cpu", "live_range_attention_backward_cpu")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Attention, backward: Attention, *inputs: Any) -> tuple[Tensor, Tensor]:
        output, lse = forward(*inputs)
        ctx.run, ctx.inputs = backward, inputs
        ctx.save_for_backward(output, lse)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *rest = ctx.inputs
        grads = ctx.run(grad_output, grad_lse, query, key, value, *ctx.saved_tensors, *rest)
        names = ("query", "key", "value", "bias", "sinks")
        by_name = dict(zip(names, grads, strict=True))
        given = dict(zip(AttentionArguments.parameters(without=("schedule",)), ctx.inputs, strict=True))
        return (None, None, *(by_name.get(name) if t is not None else None for name, t in given.items()))


def attention_by(forward: Attention, backward: Attention) -> Attention:
    """A function like `rewriter.kernels.live_range_attention`."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, live: LiveRanges, *, return_lse: bool = False, **options: Any
    ) -> Any:
        arguments = AttentionArguments(query, key, value, live.start, live.end, **options)
        output, lse = _Attention.apply(forward, backward, *arguments.astuple(without=("schedule",)))
        return (output, lse) if return_lse else output

    return attention


def in_torch() -> Attention:
    return attention_by(forward_in_torch, backward_in_torch)


def native_variant(name: str, *changes: tuple[str, str], bits: int | None = None, optimized: bool = True) -> Attention:
    """The kernel in C++ with its text changed, or for narrower vectors.

    Args:
        name: of a namespace of its own for the operators.
        changes: what is replaced by what; each stands in the source once.
        bits: of a vector; the machine's widest when left out.
        optimized: whether the compiler takes its time.
    """
    source = native.SOURCE.read_text(encoding="utf-8")
    for old, new in (("STABLE_TORCH_LIBRARY_IMPL(rewriter,", f"STABLE_TORCH_LIBRARY_IMPL({name},"), *changes):
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {native.SOURCE.name}"
        source = source.replace(old, new)
    assert native.load()
    for operator in NAMES:
        schema = str(getattr(torch.ops.rewriter, operator).default._schema)
        torch.library.define(f"{name}::{operator}", schema[schema.index("(") :])
    with config.patch({"cpp.simdlen": bits}):
        CppCodeCache.load(source, extra_flags=native._FLAGS if optimized else ("-O0",), needs_vec_isa=True)
    operators = getattr(torch.ops, name)
    return attention_by(*(getattr(operators, operator) for operator in NAMES))
