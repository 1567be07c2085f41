"""The operators as ONNX functions of standard operators, in the domain `rewriter`.

onnxscript reads the decorated functions as ONNX, not as Python: names are tensors, `op.` are ONNX's operators.
"""
# mypy: ignore-errors

from onnxscript import script
from onnxscript import values
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import FLOAT
from onnxscript.onnx_types import INT32

DOMAIN = values.Opset("rewriter", 1)


@script(DOMAIN, default_opset=op)
def LiveRangeAttention(query, key, value, start, end, index, bias, scale: float, softcap: float) -> tuple[FLOAT, FLOAT]:
    """`rewriter.kernels.live_range_attention`: (output, log-sum-exp); a row that sees no key returns 0.

    Args: query `[B, Hq, Q, D]`, key and value `[B, Hkv, K, D]`, start and end int32 `[B|1, Hkv|1, K]`, index int32 `[Q]`,
    bias fp32 `[B|1, Hkv|1, K]`; softcap 0 for none.
    """
    q32 = op.Cast(query, to=1)
    k32 = op.Cast(key, to=1)
    v32 = op.Cast(value, to=1)
    batch = op.Shape(query, start=0, end=1)
    heads = op.Shape(query, start=1, end=2)
    rows = op.Shape(query, start=2, end=3)
    head_dim = op.Shape(query, start=3, end=4)
    kv_heads = op.Shape(key, start=1, end=2)
    keys = op.Shape(key, start=2, end=3)
    value_dim = op.Shape(value, start=3, end=4)
    group = op.Div(heads, kv_heads)
    rest = op.Constant(value_ints=[-1])
    # The query heads of a KV head, one after the other: keys are not repeated.
    grouped = op.Reshape(q32, op.Concat(batch, kv_heads, rest, head_dim, axis=0))
    products = op.MatMul(grouped, op.Transpose(k32, perm=[0, 1, 3, 2]))
    factor = op.Constant(value_float=scale)
    cap = op.Constant(value_float=softcap)
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    plain = op.Mul(products, factor)
    some_cap = op.Where(op.Greater(cap, zero), cap, one)
    capped = op.Where(op.Greater(cap, zero), op.Mul(some_cap, op.Tanh(op.Div(plain, some_cap))), plain)
    logits = op.Reshape(capped, op.Concat(batch, kv_heads, group, rows, keys, axis=0))
    added = op.Add(logits, op.Unsqueeze(bias, op.Constant(value_ints=[2, 3])))
    row = op.Unsqueeze(index, op.Constant(value_ints=[0, 1, 2, 4]))
    begins = op.Unsqueeze(start, op.Constant(value_ints=[2, 3]))
    ends = op.Unsqueeze(end, op.Constant(value_ints=[2, 3]))
    visible = op.And(op.LessOrEqual(begins, row), op.Less(row, ends))
    lowest = op.Constant(value_float=-3.0e38)
    masked = op.Where(visible, added, lowest)
    highest = op.ReduceMax(masked, op.Constant(value_ints=[4]), keepdims=1)
    weights = op.Where(visible, op.Exp(op.Sub(masked, highest)), zero)
    total = op.ReduceSum(weights, op.Constant(value_ints=[4]), keepdims=1)
    divisor = op.Where(op.Greater(total, zero), total, one)
    normal = op.Div(weights, divisor)
    flat = op.Reshape(normal, op.Concat(batch, kv_heads, rest, keys, axis=0))
    output = op.Reshape(op.MatMul(flat, v32), op.Concat(batch, heads, rows, value_dim, axis=0))
    lse = op.Reshape(op.Add(op.Log(total), highest), op.Concat(batch, heads, rows, axis=0))
    return op.CastLike(output, query), lse


@script(DOMAIN, default_opset=op)
def RunningTopKEnd(score, segment, keep: int) -> INT32:
    """`rewriter.kernels.running_topk_ranges`: int32 `[B, H, K]`, the first query whose prefix holds `keep` better keys.

    Args: score fp32 `[B, H, K]`, segment int32 `[B|1, H|1, K]`. Of equals the older is better; NaN is the worst.
    """
    lowest = op.Constant(value_float=-3.4e38)
    rank = op.Where(op.IsNaN(score), lowest, op.Clip(score, lowest, op.Constant(value_float=3.4e38)))
    keys = op.Shape(score, start=2, end=3)
    number = op.Range(op.Constant(value_int=0), op.Squeeze(keys, op.Constant(value_ints=[0])), op.Constant(value_int=1))
    last = op.Constant(value_ints=[3])
    before = op.Constant(value_ints=[2])
    # [B, H, j, k]: key k is better than key j.
    mine = op.Unsqueeze(rank, last)
    other = op.Unsqueeze(rank, before)
    my_segment = op.Unsqueeze(segment, last)
    other_segment = op.Unsqueeze(segment, before)
    older = op.Less(
        op.Unsqueeze(number, op.Constant(value_ints=[0])), op.Unsqueeze(number, op.Constant(value_ints=[1]))
    )
    same = op.Equal(my_segment, other_segment)
    by_score = op.Or(op.Greater(other, mine), op.And(op.Equal(other, mine), older))
    better = op.Or(op.Greater(other_segment, my_segment), op.And(same, by_score))
    count = op.CumSum(op.Cast(better, to=7), op.Constant(value_int=3))
    limit = op.Constant(value_int=keep)
    alive = op.Cast(op.Less(count, limit), to=7)
    dies = op.ReduceSum(alive, last, keepdims=0)
    never = op.Equal(dies, op.Squeeze(keys, op.Constant(value_ints=[0])))
    forever = op.Constant(value_int=2147483647)
    return op.Cast(op.Where(never, forever, op.Max(dies, number)), to=6)


FUNCTIONS = (LiveRangeAttention, RunningTopKEnd)
