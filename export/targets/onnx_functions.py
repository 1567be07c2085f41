"""The operators as ONNX functions of standard operators, in the domain `rewriter`.

Both go over tiles of rows in a `Loop`, so that memory grows with the length and not with its square; time does.

onnxscript reads the decorated functions as ONNX, not as Python: names are tensors, `op.` are ONNX's operators.
"""
# mypy: ignore-errors

from onnx import helper
from onnxscript import graph
from onnxscript import script
from onnxscript import values
from onnxscript.onnx_opset import opset23 as op
from onnxscript.onnx_types import BOOL
from onnxscript.onnx_types import FLOAT
from onnxscript.onnx_types import INT32
from onnxscript.onnx_types import INT64

DOMAIN = values.Opset("rewriter", 1)
TILE = 128
"""Rows that are computed at once."""

# A `Loop` and not a `Scan`, which TensorRT's parser does not take.
TRUE = helper.make_tensor("true", 9, [], [True])
ZERO = helper.make_tensor("zero", 6, [], [0])


@script(DOMAIN, default_opset=op)
def LiveRangeAttention(query, key, value, start, end, index, bias, scale: float, softcap: float) -> tuple[FLOAT, FLOAT]:
    """`rewriter.kernels.live_range_attention`: (output, log-sum-exp); a row that sees no key returns 0.

    Args: query `[B, Hq, Q, D]`, key and value `[B, Hkv, K, D]`, start and end int32 `[B|1, Hkv|1, K]`, index int32 `[Q]`,
    bias fp32 `[B|1, Hkv|1, K]`; softcap 0 for none.
    """
    k32 = op.Transpose(op.Cast(key, to=1), perm=[0, 1, 3, 2])
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
    none = op.Constant(value_ints=[0])
    tile = op.Constant(value_ints=[TILE])
    factor = op.Constant(value_float=scale)
    cap = op.Constant(value_float=softcap)
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_float=1.0)
    lowest = op.Constant(value_float=-3.0e38)
    some_cap = op.Where(op.Greater(cap, zero), cap, one)
    # Whole tiles of rows, tiles first: [n, B, Hkv, group, tile, D]. What is added is cut off again.
    more = op.Mod(op.Sub(tile, op.Mod(rows, tile)), tile)
    padded = op.Pad(op.Cast(query, to=1), op.Concat(none, more, axis=0), zero, op.Constant(value_ints=[2]))
    by_tile = op.Reshape(padded, op.Concat(batch, kv_heads, group, rest, tile, head_dim, axis=0))
    q_tiles = op.Transpose(by_tile, perm=[3, 0, 1, 2, 4, 5])
    i_padded = op.Pad(index, op.Concat(none, more, axis=0), op.Constant(value=ZERO))
    i_tiles = op.Reshape(i_padded, op.Concat(rest, tile, axis=0))
    added_bias = op.Unsqueeze(bias, op.Constant(value_ints=[2, 3]))
    begins = op.Unsqueeze(start, op.Constant(value_ints=[2, 3]))
    ends = op.Unsqueeze(end, op.Constant(value_ints=[2, 3]))
    last = op.Constant(value_ints=[4])
    flat_shape = op.Concat(batch, kv_heads, rest, keys, axis=0)
    tile_shape = op.Concat(batch, kv_heads, group, tile, keys, axis=0)
    q_shape = op.Concat(batch, kv_heads, rest, head_dim, axis=0)
    out_shape = op.Concat(batch, kv_heads, group, tile, value_dim, axis=0)

    @graph()
    def attend(number: INT64, going: BOOL):
        q = op.Gather(q_tiles, number, axis=0)
        i = op.Gather(i_tiles, number, axis=0)
        products = op.MatMul(op.Reshape(q, q_shape), k32)
        plain = op.Mul(products, factor)
        capped = op.Where(op.Greater(cap, zero), op.Mul(some_cap, op.Tanh(op.Div(plain, some_cap))), plain)
        logits = op.Add(op.Reshape(capped, tile_shape), added_bias)
        row = op.Unsqueeze(i, op.Constant(value_ints=[0, 1, 2, 4]))
        visible = op.And(op.LessOrEqual(begins, row), op.Less(row, ends))
        masked = op.Where(visible, logits, lowest)
        highest = op.ReduceMax(masked, last, keepdims=1)
        weights = op.Where(visible, op.Exp(op.Sub(masked, highest)), zero)
        total = op.ReduceSum(weights, last, keepdims=1)
        normal = op.Div(weights, op.Where(op.Greater(total, zero), total, one))
        own = op.Reshape(op.MatMul(op.Reshape(normal, flat_shape), v32), out_shape)
        own_lse = op.Squeeze(op.Add(op.Log(total), highest), last)
        return op.Identity(going), own, own_lse

    count = op.Squeeze(op.Shape(i_tiles, start=0, end=1), none)
    outputs, lses = op.Loop(count, op.Constant(value=TRUE), body=attend)
    whole = op.Reshape(op.Transpose(outputs, perm=[1, 2, 3, 0, 4, 5]), op.Concat(batch, heads, rest, value_dim, axis=0))
    output = op.Slice(whole, none, rows, op.Constant(value_ints=[2]))
    whole_lse = op.Reshape(op.Transpose(lses, perm=[1, 2, 3, 0, 4]), op.Concat(batch, heads, rest, axis=0))
    lse = op.Slice(whole_lse, none, rows, op.Constant(value_ints=[2]))
    return op.CastLike(output, query), lse


@script(DOMAIN, default_opset=op)
def RunningTopKEnd(score, segment, keep: int) -> INT32:
    """`rewriter.kernels.running_topk_ranges`: int32 `[B, H, K]`, the first query whose prefix holds `keep` better keys.

    Args: score fp32 `[B, H, K]`, segment int32 `[B|1, H|1, K]`. Of equals the older is better; NaN is the worst.
    """
    lowest = op.Constant(value_float=-3.4e38)
    rank = op.Where(op.IsNaN(score), lowest, op.Clip(score, lowest, op.Constant(value_float=3.4e38)))
    batch = op.Shape(score, start=0, end=1)
    heads = op.Shape(score, start=1, end=2)
    keys = op.Shape(score, start=2, end=3)
    none = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    tile = op.Constant(value_ints=[TILE])
    last = op.Constant(value_ints=[3])
    numbers = op.Range(op.Constant(value_int=0), op.Squeeze(keys, none), op.Constant(value_int=1))
    # Whole tiles of keys, tiles first: [n, B, H, tile]. What is added is cut off again.
    more = op.Concat(none, op.Mod(op.Sub(tile, op.Mod(keys, tile)), tile), axis=0)
    axis = op.Constant(value_ints=[2])
    padded = op.Pad(rank, more, lowest, axis)
    ranks = op.Transpose(op.Reshape(padded, op.Concat(batch, heads, rest, tile, axis=0)), perm=[2, 0, 1, 3])
    # One segment for all keys may be given as one number.
    shared = op.Concat(op.Shape(segment, start=0, end=2), keys, axis=0)
    padded_segment = op.Pad(op.Expand(segment, shared), more, op.Constant(value=ZERO), axis)
    by_tile = op.Concat(op.Shape(segment, start=0, end=2), rest, tile, axis=0)
    segments = op.Transpose(op.Reshape(padded_segment, by_tile), perm=[2, 0, 1, 3])
    padded_numbers = op.Pad(numbers, more, op.Constant(value_int=0))
    tile_numbers = op.Reshape(padded_numbers, op.Concat(rest, tile, axis=0))
    other = op.Unsqueeze(rank, axis)
    other_segment = op.Unsqueeze(segment, axis)
    other_number = op.Unsqueeze(numbers, none)
    limit = op.Constant(value_int=keep)

    @graph()
    def count(number: INT64, going: BOOL):
        # [B, H, j, k]: key k is better than key j of this tile.
        mine = op.Unsqueeze(op.Gather(ranks, number, axis=0), last)
        my_segment = op.Unsqueeze(op.Gather(segments, number, axis=0), last)
        my_number = op.Unsqueeze(op.Gather(tile_numbers, number, axis=0), op.Constant(value_ints=[1]))
        older = op.Less(other_number, my_number)
        same = op.Equal(my_segment, other_segment)
        by_score = op.Or(op.Greater(other, mine), op.And(op.Equal(other, mine), older))
        better = op.Or(op.Greater(other_segment, my_segment), op.And(same, by_score))
        counts = op.CumSum(op.Cast(better, to=7), op.Constant(value_int=3))
        alive = op.Cast(op.Less(counts, limit), to=7)
        return op.Identity(going), op.ReduceSum(alive, last, keepdims=0)

    tiles = op.Squeeze(op.Shape(tile_numbers, start=0, end=1), none)
    by_tiles = op.Loop(tiles, op.Constant(value=TRUE), body=count)
    whole = op.Reshape(op.Transpose(by_tiles, perm=[1, 2, 0, 3]), op.Concat(batch, heads, rest, axis=0))
    dies = op.Slice(whole, none, keys, axis)
    never = op.Equal(dies, op.Squeeze(keys, none))
    forever = op.Constant(value_int=2147483647)
    return op.Cast(op.Where(never, forever, op.Max(dies, numbers)), to=6)


FUNCTIONS = (LiveRangeAttention, RunningTopKEnd)
