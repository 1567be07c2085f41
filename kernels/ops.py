"""The operators as users and graphs call them: `torch.library` registration and autograd.

`rewriter::live_range_attention` is one node in a captured graph. On a GPU it is a `torch.library.triton_op`: Inductor and
AOTInductor see through it to the schedule and the Triton kernels. On a CPU it becomes one opaque operator. The public
function of the same name takes `LiveRanges`; graphs call the operator with its two vectors. All take the fields of
`AttentionArguments`, in its order.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import torch
from rewriter.kernels.arguments import AttentionArguments
from rewriter.kernels.cpu import attention as cpu
from rewriter.kernels.cpu import key_scores as cpu_key_scores
from rewriter.kernels.cpu import native
from rewriter.kernels.dispatch import register
from rewriter.kernels.dispatch import runs_triton
from rewriter.kernels.gpu import decode as gpu_decode
from rewriter.kernels.gpu import forward as gpu_forward
from rewriter.kernels.gpu import key_scores as gpu_key_scores
from rewriter.kernels.gpu import shared_schedule
from rewriter.kernels.gpu.backward import launches as gpu_backward
from rewriter.kernels.gpu.kernel_inputs import KernelInputs
from rewriter.kernels.live_ranges import LiveRanges
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils._pytree import tree_unflatten

from rewriter.errors import AttentionInputError

GROUPS = ("mean", "max", "per_query_head")
ON_GPU_ALONE = ("schedule",)
"""Fields that the operators of the CPU do not have."""


def live_range_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    live: LiveRanges,
    *,
    key_index: Tensor | None = None,
    query_index: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which query i sees key j exactly when `live.start[j] <= i < live.end[j]`.

        logit[i, j] = softcap(scale * q_i . k_j) + bias[j] - alibi_slope * |i - index_j|

    Differentiable in query, key, value, bias and sinks, and in the log-sum-exp. Grouped heads are not repeated.
    Accumulates in fp32. A row that sees no key returns 0, its log-sum-exp is -inf (the sink's logit where there are
    sinks), and its gradients are 0. Bitwise equal from run to run.

    Args:
        query: `[B, Hq, Q, D]`, fp16, bf16, fp32 or fp64.
        key: `[B, Hkv, K, D]`; Hq is a multiple of Hkv.
        value: `[B, Hkv, K, Dv]`.
        live: ranges with K keys.
        key_index: int32 or int64 `[K]` or `[B, K]`, the indices of the keys, for ALiBi; 0 .. K - 1 when left out.
            The ranges are per key column already.
        query_index: int32 or int64 `[Q]` or `[B, Q]`, the indices of the query rows that the ranges speak of;
            row r has index r + K - Q when left out (bottom-right alignment).
        bias: `[B|1, Hkv|1, K]`, added to the logits after scale and softcap.
        scale: factor of the products; `1 / sqrt(D)` when left out.
        softcap: `softcap * tanh(logit / softcap)`, positive.
        sinks: `[Hq]`, logits that join the denominator only (arXiv 2309.17453, section 3.3).
        alibi_slopes: `[Hq]` (arXiv 2108.12409, equation 3); a constant, no gradient.
        return_lse: also return the log-sum-exp.

    Returns:
        `[B, Hq, Q, Dv]` in the query's dtype; with `return_lse` also `[B, Hq, Q]` in fp32 (fp64 for fp64).

    Raises:
        AttentionInputError: an input has the wrong shape, dtype or device; the message says which and what is expected.
    """
    _check_live_and_softcap(live, softcap)
    arguments = AttentionArguments(
        query, key, value, live.start, live.end, query_index, key_index, bias, sinks, alibi_slopes, scale, softcap
    )
    output, lse = torch.ops.rewriter.live_range_attention(*arguments.astuple())
    return (output, lse) if return_lse else output


def key_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    live: LiveRanges,
    *,
    key_index: Tensor | None = None,
    query_index: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    group: str = "mean",
) -> Tensor:
    """The attention mass of each key: its weights summed over some query rows, usually the last ones of a prompt.

        score[j] = sum over rows i of exp(logit[i, j] - lse[i]),   0 where i does not see j

    No array of the size rows x keys is made, and there is no gradient.

    Args:
        query: `[B, Hq, w, D]`, the rows that count.
        key: `[B, Hkv, K, D]`.
        lse: `[B, Hq, w]`, the log-sum-exp of these rows, as `live_range_attention` returns it.
        live, key_index, query_index, bias, scale, softcap, alibi_slopes: as given to `live_range_attention`.
        group: what becomes of the query heads of a KV head: their `"mean"`, their `"max"`, or `"per_query_head"`, each
            its own score.

    Returns:
        fp32 `[B, Hkv, K]`; `[B, Hq, K]` for `"per_query_head"`.

    Raises:
        AttentionInputError: an input has the wrong shape, dtype or device, or `group` is not one of the three.
    """
    _check_live_and_softcap(live, softcap)
    if group not in GROUPS:
        raise AttentionInputError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
    return torch.ops.rewriter.key_scores(
        query, key, lse, live.start, live.end, query_index, key_index, bias, alibi_slopes, scale, softcap, group
    )


def _check_live_and_softcap(live: LiveRanges, softcap: float | None) -> None:
    if not isinstance(live, LiveRanges):
        raise AttentionInputError(
            f"live must be LiveRanges, got {type(live).__name__}; build it with a constructor such as LiveRanges.causal(K)"
        )
    if softcap is not None and not softcap > 0:
        raise AttentionInputError(f"softcap must be positive, got {softcap}; leave it out for none")


def _in_its_own_precision(query: Tensor) -> torch.autocast:
    """The CPU's kernels are made of torch's operators, which the caller's autocast would run in 16 bits."""
    return torch.autocast(query.device.type, enabled=False)


def empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """An output and log-sum-exp without values, laid out as the operator's."""
    num_batch, num_heads, num_queries, _ = query.shape
    output = query.new_empty(num_batch, num_queries, num_heads, value.size(3)).transpose(1, 2)
    return output, query.new_empty(num_batch, num_heads, num_queries, dtype=cpu.compute_dtype(query))


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    a = AttentionArguments(*inputs)
    a.check()
    if a.is_empty:
        # No row sees a key: only the sinks are left of the denominator.
        output, lse = empty_outputs(a.query, a.value)
        return output.zero_(), lse.fill_(-math.inf) if a.sinks is None else lse.copy_(a.sinks[:, None].expand_as(lse))
    if not runs_triton(a.query):
        return torch.ops.rewriter.live_range_attention_cpu(*a.astuple(without=ON_GPU_ALONE))
    if a.query.size(2) <= gpu_decode.MAX_QUERIES:
        return gpu_decode.decode(KernelInputs.make(a, sort=False))
    return gpu_forward.forward(KernelInputs.make(a, sort=True))


def _forward_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    a = AttentionArguments(*inputs)
    a.check()
    return empty_outputs(a.query, a.value)


def _forward_cpu(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The first call loads the operator in C++, which takes its place; this goes on where it cannot be compiled."""
    if native.load():
        return torch.ops.rewriter.live_range_attention_cpu(*inputs)
    return forward_in_torch(*inputs)


def forward_in_torch(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by PyTorch's operators alone, on the CPU."""
    a = AttentionArguments(*inputs)
    with _in_its_own_precision(a.query):
        return cpu.forward(a.query, a.key, a.value, a.start, a.end, a.sinks, cpu.Logits.of(a))


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of query, key, value, bias and sinks."""


def _backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *rest: Any,
) -> Gradients:
    a = AttentionArguments(query, key, value, *rest)
    if a.is_empty:
        inputs = (query, key, value, a.bias)
        grads = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in inputs]
        return _present(query, (*grads, None if a.sinks is None else grad_lse.sum(dim=(0, 2)).to(a.sinks.dtype)))
    if not runs_triton(query):
        given = (grad_output, grad_lse, query, key, value, output, lse)
        own = a.astuple(without=("query", "key", "value", *ON_GPU_ALONE))
        return torch.ops.rewriter.live_range_attention_backward_cpu(*given, *own)
    return _present(query, gpu_backward.backward(KernelInputs.make(a, sort=True), output, lse, grad_output, grad_lse))


def _backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    *rest: Any,
) -> Gradients:
    a = AttentionArguments(query, key, value, *rest)
    inputs = (query, key, value, a.bias, a.sinks)
    grads = tuple(None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)
    return _present(query, grads)


def _backward_cpu(*inputs: Any) -> Gradients:
    """As `_forward_cpu`."""
    if native.load():
        return torch.ops.rewriter.live_range_attention_backward_cpu(*inputs)
    return backward_in_torch(*inputs)


def backward_in_torch(*inputs: Any) -> Gradients:
    """The gradients, as `forward_in_torch`."""
    grad_output, grad_lse, query, key, value, output, lse, *rest = inputs
    a = AttentionArguments(query, key, value, *rest)
    given = (grad_output, grad_lse, query, key, value, output, lse, a.start, a.end, a.sinks)
    with _in_its_own_precision(query):
        return _present(query, cpu.backward(*given, cpu.Logits.of(a)))


def _present(query: Tensor, grads: tuple[Tensor | None, ...]) -> Gradients:
    """An operator cannot return None: an absent gradient is an empty tensor."""
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    leaves, ctx.structure = tree_flatten(inputs)
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    ctx.others = [None if isinstance(x, Tensor) else (x,) for x in leaves]  # None in the place of a tensor
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    *tensors, output, lse = ctx.saved_tensors
    saved = iter(tensors)
    leaves = [next(saved) if other is None else other[0] for other in ctx.others]
    a = AttentionArguments(*tree_unflatten(leaves, ctx.structure))
    query, key, value, *rest = a.astuple()
    names = ("query", "key", "value", "bias", "sinks")
    grads = torch.ops.rewriter.live_range_attention_backward(
        grad_output, grad_lse, query, key, value, output, lse, *rest
    )
    by_name: dict[str, Any] = {name: g for name, g in zip(names, grads, strict=True) if getattr(a, name) is not None}
    if a.schedule is not None:
        by_name["schedule"] = [None] * len(a.schedule)
    given = len(ctx.needs_input_grad)  # torch leaves out the last arguments that have their defaults
    return tuple(by_name.get(name) for name in list(AttentionArguments.parameters())[:given])


_OF_SCORES = AttentionArguments.parameters(without=("query", "key", "value", "sinks", "schedule"))
"""Of the record, what `rewriter::key_scores` takes after query, key and log-sum-exp."""


def _of_scores(query: Tensor, key: Tensor, rest: tuple[Any, ...]) -> AttentionArguments:
    return AttentionArguments(query, key, key, **dict(zip(_OF_SCORES, rest, strict=True)))


def _scores(query: Tensor, key: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    *own, group = rest
    a = _of_scores(query, key, tuple(own))
    a.check()
    if lse.shape != query.shape[:3]:
        raise AttentionInputError(f"lse must be {list(query.shape[:3])}, one per query row, got {list(lse.shape)}")
    if lse.device != query.device:
        raise AttentionInputError(f"query is on {query.device}, lse on {lse.device}; move them together")
    if a.is_empty:
        return _scores_fake(query, key, lse, *rest).zero_()
    if not runs_triton(query):
        return torch.ops.rewriter.key_scores_cpu(query, key, lse, *rest)
    return gpu_key_scores.key_scores(KernelInputs.make(a, sort=False), lse, group)


def _scores_fake(query: Tensor, key: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    heads = query.size(1) if rest[-1] == "per_query_head" else key.size(1)
    return query.new_empty(query.size(0), heads, key.size(2), dtype=torch.float32)


def _scores_cpu(query: Tensor, key: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    *own, group = rest
    a = _of_scores(query, key, tuple(own))
    with _in_its_own_precision(query):
        return cpu_key_scores.key_scores(query, key, lse, a.start, a.end, cpu.Logits.of(a), group)


def _schema(function: Callable[..., Any], parameters: Mapping[str, Any], result: Any) -> str:
    """The operator's schema. torch infers none for a list that may be left out, `schedule`, which is the last one."""
    plain = {name: type_ for name, type_ in parameters.items() if name != "schedule"}
    schema = torch.library.infer_schema(_signed(function, plain, result), mutates_args=())
    return schema if len(plain) == len(parameters) else schema.replace(") ->", ", Tensor[]? schedule=None) ->")


def _signed(function: Callable[..., Any], parameters: Mapping[str, Any], result: Any) -> Callable[..., Any]:
    """The function with the signature that torch reads an operator's schema from; what may be left out is None."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    optional = AttentionArguments.optional() if list(parameters)[-1] in AttentionArguments.optional() else ()
    named = [
        inspect.Parameter(name, kind, annotation=type_, default=None if name in optional else inspect.Parameter.empty)
        for name, type_ in parameters.items()
    ]
    function.__signature__ = inspect.Signature(named, return_annotation=result)  # type: ignore[attr-defined]
    return function


def _signatures(fields: dict[str, Any]) -> dict[str, tuple[dict[str, Any], Any]]:
    tensors = {name: fields[name] for name in ("query", "key", "value")}
    of_gradients = {"grad_output": Tensor, "grad_lse": Tensor, **tensors, "output": Tensor, "lse": Tensor, **fields}
    return {
        "live_range_attention": (fields, tuple[Tensor, Tensor]),
        "live_range_attention_backward": (of_gradients, Gradients),
        "key_scores": ({"query": Tensor, "key": Tensor, "lse": Tensor, **_OF_SCORES, "group": str}, Tensor),
    }


_SIGNATURES = _signatures(AttentionArguments.parameters())
_CPU_SIGNATURES = _signatures(AttentionArguments.parameters(without=ON_GPU_ALONE))

for _name, _function, _fake in (
    ("live_range_attention", _forward_cpu, _forward_fake),
    ("live_range_attention_backward", _backward_cpu, _backward_fake),
    ("key_scores", _scores_cpu, _scores_fake),
):
    _definition = _schema(_function, *_CPU_SIGNATURES[_name])
    torch.library.define(f"rewriter::{_name}_cpu", _definition, tags=torch.Tag.pt2_compliant_tag)
    # Of lower precedence than what the operators in C++ register for CPU tensors.
    torch.library.impl(f"rewriter::{_name}_cpu", "CompositeExplicitAutograd", _function)
    torch.library.register_fake(f"rewriter::{_name}_cpu", _fake)

_attention, _attention_backward, _key_scores = (
    register(f"rewriter::{name}", function, _schema(function, *_SIGNATURES[name]))
    for name, function in (
        ("live_range_attention", _forward),
        ("live_range_attention_backward", _backward),
        ("key_scores", _scores),
    )
)
_attention.register_fake(_forward_fake)
_attention.register_autograd(_autograd, setup_context=_setup_context)
_attention_backward.register_fake(_backward_fake)
_key_scores.register_fake(_scores_fake)
register("rewriter::schedule", shared_schedule.make).register_fake(shared_schedule.make_fake)
