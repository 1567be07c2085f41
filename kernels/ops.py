"""The operators as users and graphs call them: checks, `torch.library` registration, autograd.

`rewriter::live_range_attention` is one node in a captured graph. On a GPU it is a `torch.library.triton_op`: Inductor and
AOTInductor see through it to the schedule and the Triton kernels. On a CPU it becomes one opaque operator. The public
function of the same name takes `LiveRanges`; graphs call the operator with its two vectors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from rewriter.kernels.cpu import attention as cpu
from rewriter.kernels.cpu import decode as cpu_decode
from rewriter.kernels.cpu import key_scores as cpu_key_scores
from rewriter.kernels.gpu import backward as gpu_backward
from rewriter.kernels.gpu import decode as gpu_decode
from rewriter.kernels.gpu import forward as gpu_forward
from rewriter.kernels.gpu import key_scores as gpu_key_scores
from rewriter.kernels.gpu.arguments import Arguments
from rewriter.kernels.gpu.arguments import as_int32
from rewriter.kernels.gpu.launch import register
from rewriter.kernels.gpu.launch import runs_triton
from rewriter.kernels.gpu.schedule import MAX_KEYS
from rewriter.kernels.live_ranges import LiveRanges
from torch import Tensor

from rewriter.errors import AttentionInputError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256
GROUPS = ("mean", "max", "per_query_head")


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
    output, lse = torch.ops.rewriter.live_range_attention(
        query,
        key,
        value,
        live.start,
        live.end,
        query_index,
        key_index,
        bias,
        sinks,
        alibi_slopes,
        scale,
        softcap,
    )
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


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> None:
    """Raises `AttentionInputError`; runs on real and on fake tensors, and never reads values."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise AttentionInputError(f"{name} must be [B, H, S, D], got shape {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise AttentionInputError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
        if tensor.dtype == torch.float64 and runs_triton(tensor):
            raise AttentionInputError(
                f"{name} is fp64, which the Triton kernels do not take; use fp32, or move it to the CPU"
            )
        if tensor.dtype != query.dtype:
            raise AttentionInputError(f"query is {query.dtype} and {name} {tensor.dtype}; cast them to one dtype")
    (num_batch, num_heads, num_queries, head_dim) = query.shape
    (_, num_kv_heads, num_keys, _) = key.shape
    if key.size(3) != head_dim:
        raise AttentionInputError(f"query has head_dim {head_dim} and key {key.size(3)}; they must be equal")
    if not 1 <= head_dim <= MAX_HEAD_DIM or not 1 <= value.size(3) <= MAX_HEAD_DIM:
        raise AttentionInputError(f"head dims must be 1 to {MAX_HEAD_DIM}, got {head_dim} (value: {value.size(3)})")
    if key.size(0) != num_batch or value.size(0) != num_batch:
        raise AttentionInputError(f"batch sizes differ: query {num_batch}, key {key.size(0)}, value {value.size(0)}")
    if num_kv_heads != value.size(1) or num_keys != value.size(2):
        raise AttentionInputError(
            f"key {list(key.shape)} and value {list(value.shape)} must agree in KV heads and number of keys"
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise AttentionInputError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    for name, tensor in (("start", start), ("end", end)):
        if tensor.dtype != torch.int32:
            raise AttentionInputError(f"{name} must be int32, got {tensor.dtype}; convert with .to(torch.int32)")
        if tensor.dim() != 3 or tensor.size(2) != num_keys:
            raise AttentionInputError(
                f"{name} must be [B|1, Hkv|1, K] with K = {num_keys} keys, got {list(tensor.shape)}"
            )
        _check_broadcast(name, tensor, (num_batch, num_kv_heads))
    for name, index, size in (("query_index", query_index, num_queries), ("key_index", key_index, num_keys)):
        if index is None:
            continue
        if index.dtype not in (torch.int32, torch.int64) or index.dim() not in (1, 2) or index.size(-1) != size:
            raise AttentionInputError(
                f"{name} must be int32 or int64 [{size}] or [B, {size}], got {index.dtype} {list(index.shape)}"
            )
        if index.dim() == 2 and index.size(0) not in (1, num_batch):
            raise AttentionInputError(f"{name} has {index.size(0)} rows, expected {num_batch} or 1")
    if bias is not None:
        if bias.dim() != 3 or bias.size(2) != num_keys or not bias.is_floating_point():
            raise AttentionInputError(
                f"bias must be a float tensor [B|1, Hkv|1, {num_keys}], got {bias.dtype} {list(bias.shape)}"
            )
        _check_broadcast("bias", bias, (num_batch, num_kv_heads))
    limit = MAX_KEYS if runs_triton(query) else 2**31
    if isinstance(num_keys, int) and num_keys >= limit:
        raise AttentionInputError(f"{num_keys} keys are too many for int32 indices; give fewer than {limit}")
    if runs_triton(query) and isinstance(num_batch, int) and num_batch >= 2**16:
        raise AttentionInputError(f"a grid of a GPU has at most 65,535 batch rows, got {num_batch}; split the batch")
    for name, vector in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if vector is not None and (vector.dim() != 1 or vector.size(0) != num_heads):
            raise AttentionInputError(f"{name} must be [{num_heads}] (one per query head), got {list(vector.shape)}")
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise AttentionInputError("alibi_slopes must not require a gradient; detach them")
    for other in (key, value, start, end, query_index, key_index, bias, sinks, alibi_slopes):
        if other is not None and other.device != query.device:
            raise AttentionInputError(
                f"query is on {query.device}, another input on {other.device}; move them together"
            )

    if query.device.type not in ("cpu", "cuda", "meta"):
        raise AttentionInputError(f"there is no kernel for device {query.device}; move the inputs to the CPU or a GPU")


def _check_broadcast(name: str, tensor: Tensor, expected: tuple[int, int]) -> None:
    for dim, what in ((0, "batch rows"), (1, "KV heads")):
        if tensor.size(dim) != 1 and tensor.size(dim) != expected[dim]:
            raise AttentionInputError(f"{name} has {tensor.size(dim)} {what}, expected {expected[dim]} or 1")


def _logits(
    query: Tensor,
    key: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> cpu.Logits:
    num_queries, num_keys = query.size(2), key.size(2)
    if query_index is None:
        query_index = torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32)
    if key_index is None:
        key_index = torch.arange(num_keys, dtype=torch.int32)
    return cpu.Logits(
        query_index=_rows(query_index),
        key_index=_rows(key_index),
        bias=bias,
        alibi_slopes=alibi_slopes,
        scale=1 / math.sqrt(query.size(3)) if scale is None else scale,
        softcap=softcap or 0.0,
    )


def _in_its_own_precision(query: Tensor) -> torch.autocast:
    """The CPU's kernels are made of torch's operators, which the caller's autocast would run in 16 bits."""
    return torch.autocast(query.device.type, enabled=False)


def _rows(index: Tensor) -> Tensor:
    """int32 `[B|1, size]`."""
    return as_int32(index)[None] if index.dim() == 1 else as_int32(index)


def _is_empty(query: Tensor, key: Tensor) -> bool:
    return 0 in (*query.shape[:3], key.size(2))


def _empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    num_batch, num_heads, num_queries, _ = query.shape
    output = query.new_empty(num_batch, num_queries, num_heads, value.size(3)).transpose(1, 2)
    return output, query.new_empty(num_batch, num_heads, num_queries, dtype=cpu.compute_dtype(query))


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, start, end, query_index, key_index, bias, sinks, alibi_slopes)
    if _is_empty(query, key):
        # No row sees a key: only the sinks are left of the denominator.
        output, lse = _empty_outputs(query, value)
        return output.zero_(), lse.fill_(-math.inf) if sinks is None else lse.copy_(sinks[:, None].expand_as(lse))
    if not runs_triton(query):
        return torch.ops.rewriter.live_range_attention_cpu(
            query, key, value, start, end, query_index, key_index, bias, sinks, alibi_slopes, scale, softcap
        )
    few = query.size(2) <= gpu_decode.MAX_QUERIES
    arguments = Arguments.make(
        query, key, value, start, end, query_index, key_index, bias, sinks, alibi_slopes, scale, softcap, sort=not few
    )
    return gpu_decode.decode(arguments) if few else gpu_forward.forward(arguments)


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    _check(query, key, value, start, end, query_index, key_index, bias, sinks, alibi_slopes)
    return _empty_outputs(query, value)


def _forward_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    logits = _logits(query, key, query_index, key_index, bias, alibi_slopes, scale, softcap)
    with _in_its_own_precision(query):
        if query.size(2) <= cpu_decode.MAX_QUERIES:
            decoded = cpu_decode.decode(query, key, value, start, end, sinks, logits)
            if decoded is not None:
                return decoded
        return cpu.forward(query, key, value, start, end, sinks, logits)


def _backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _is_empty(query, key):
        inputs = (query, key, value, bias)
        grads = [None if t is None else torch.zeros_like(t, memory_format=torch.contiguous_format) for t in inputs]
        return _present(query, (*grads, None if sinks is None else grad_lse.sum(dim=(0, 2)).to(sinks.dtype)))
    if not runs_triton(query):
        return torch.ops.rewriter.live_range_attention_backward_cpu(
            grad_output, grad_lse, query, key, value, output, lse, start, end, query_index, key_index, bias, sinks,
            alibi_slopes, scale, softcap,
        )  # fmt: skip
    arguments = Arguments.make(
        query, key, value, start, end, query_index, key_index, bias, sinks, alibi_slopes, scale, softcap, sort=True
    )
    return _present(query, gpu_backward.backward(arguments, output, lse, grad_output, grad_lse))


def _backward_fake(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (query, key, value, bias, sinks)
    grads = tuple(None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs)
    return _present(query, grads)


def _backward_cpu(
    grad_output: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = _logits(query, key, query_index, key_index, bias, alibi_slopes, scale, softcap)
    with _in_its_own_precision(query):
        grads = cpu.backward(grad_output, grad_lse, query, key, value, output, lse, start, end, sinks, logits)
    return _present(query, grads)


def _present(query: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An operator cannot return None: an absent gradient is an empty tensor."""
    return tuple(query.new_empty(0) if grad is None else grad for grad in grads)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx: Any, grad_output: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, start, end, query_index, key_index, bias, sinks, alibi_slopes, output, lse = ctx.saved_tensors
    grad_query, grad_key, grad_value, grad_bias, grad_sinks = torch.ops.rewriter.live_range_attention_backward(
        grad_output, grad_lse, query, key, value, output, lse, start, end, query_index, key_index, bias, sinks,
        alibi_slopes, ctx.scale, ctx.softcap,
    )  # fmt: skip
    no_grad = (None, None, None, None)
    bias_and_sinks = (None if bias is None else grad_bias, None if sinks is None else grad_sinks)
    return grad_query, grad_key, grad_value, *no_grad, *bias_and_sinks, None, None, None


def _scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
    group: str,
) -> Tensor:
    _check(query, key, key, start, end, query_index, key_index, bias, None, alibi_slopes)
    if lse.shape != query.shape[:3]:
        raise AttentionInputError(f"lse must be {list(query.shape[:3])}, one per query row, got {list(lse.shape)}")
    if lse.device != query.device:
        raise AttentionInputError(f"query is on {query.device}, lse on {lse.device}; move them together")
    if _is_empty(query, key):
        return _scores_fake(query, key, lse, start, end, None, None, None, None, None, None, group).zero_()
    if not runs_triton(query):
        return torch.ops.rewriter.key_scores_cpu(
            query, key, lse, start, end, query_index, key_index, bias, alibi_slopes, scale, softcap, group
        )
    arguments = Arguments.make(
        query, key, key, start, end, query_index, key_index, bias, None, alibi_slopes, scale, softcap, sort=False
    )
    return gpu_key_scores.key_scores(arguments, lse, group)


def _scores_fake(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
    group: str,
) -> Tensor:
    heads = query.size(1) if group == "per_query_head" else key.size(1)
    return query.new_empty(query.size(0), heads, key.size(2), dtype=torch.float32)


def _scores_cpu(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    start: Tensor,
    end: Tensor,
    query_index: Tensor | None,
    key_index: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
    group: str,
) -> Tensor:
    logits = _logits(query, key, query_index, key_index, bias, alibi_slopes, scale, softcap)
    with _in_its_own_precision(query):
        return cpu_key_scores.key_scores(query, key, lse, start, end, logits, group)


for _name, _function, _fake in (
    ("live_range_attention_cpu", _forward_cpu, _forward_fake),
    ("live_range_attention_backward_cpu", _backward_cpu, _backward_fake),
    ("key_scores_cpu", _scores_cpu, _scores_fake),
):
    torch.library.custom_op(
        f"rewriter::{_name}", _function, mutates_args=(), device_types=("cpu", "cuda")
    ).register_fake(_fake)

_attention = register("rewriter::live_range_attention", _forward)
_attention.register_fake(_forward_fake)
_attention.register_autograd(_autograd, setup_context=_setup_context)
register("rewriter::live_range_attention_backward", _backward).register_fake(_backward_fake)
register("rewriter::key_scores", _scores).register_fake(_scores_fake)
