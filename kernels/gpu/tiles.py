"""What the attention kernels share: rows packed into tiles, gathered rows of keys, logits.

A tile has `BLOCK_M` rows: query rows times the query heads of a group, so that a key that is loaded once serves them all.
Row m is query row `m // heads` of the tile and head `m % heads`. Functions on logits take their operands with a dimension
of size 1, so that tiles of either orientation (rows by keys, keys by rows) use them.
"""

import triton
import triton.language as tl
from rewriter.kernels.dispatch import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def in_fp32(number):
    """A float argument, which Triton passes as fp32 and Inductor as fp64, in which nothing here may be computed."""
    return tl.cast(number, tl.float32)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`a @ b` in fp32. Triton's interpreter (3.9) multiplies the bits of bf16 operands; their values are exact in fp32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_dot(acc, a, b, PRECISION: tl.constexpr):
    """`acc + a @ b`; see `dot`."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def packed_rows(i_tile, i_chunk, tile_rows, tile_heads, group, num_queries, BLOCK_M: tl.constexpr):
    """Query row and head of each row of a tile, and whether there is one. int32 `[BLOCK_M]` each.

    A group of more than `BLOCK_M` heads takes several chunks of `tile_heads` heads.
    """
    o_packed = tl.arange(0, BLOCK_M)
    o_rows = i_tile * tile_rows + o_packed // tile_heads
    o_heads = i_chunk * tile_heads + o_packed % tile_heads
    m_rows = (o_packed < tile_rows * tile_heads) & (o_rows < num_queries) & (o_heads < group)
    return o_rows, o_heads, m_rows


@triton.jit
def load_rows(pointer, o_rows, m_rows, o_dims, stride, num_dims, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """Rows `o_rows` of a matrix whose rows are `stride` apart. `[rows, dims]`; 0 beyond `num_dims` and where not `m_rows`."""
    p_rows = pointer + o_rows.to(tl.int64)[:, None] * stride + o_dims[None, :]
    if MASKED:
        if EVEN:
            return tl.load(p_rows, mask=m_rows[:, None], other=0.0)
        return tl.load(p_rows, mask=m_rows[:, None] & (o_dims < num_dims)[None, :], other=0.0)
    if EVEN:
        return tl.load(p_rows)
    return tl.load(p_rows, mask=(o_dims < num_dims)[None, :], other=0.0)


@triton.jit
def masked_blocks(run_begin, full_begin, full_end, run_end, masked_begin, list_end, BLOCK_N: tl.constexpr):
    """How many blocks of a tile need a mask: both borders of its run, and the end of its segment's list."""
    run_blocks = tl.cdiv(full_begin - run_begin, BLOCK_N) + tl.cdiv(run_end - full_end, BLOCK_N)
    return run_blocks + tl.cdiv(list_end - masked_begin, BLOCK_N)


@triton.jit
def masked_block(
    i, run_begin, full_begin, full_end, run_end, masked_begin, list_end, list_keys_ptr, BLOCK_N: tl.constexpr
):
    """Keys of the i-th block that needs a mask, and which of them are the block's. A listed key of the run is the run's."""
    o_block = tl.arange(0, BLOCK_N)
    left = tl.cdiv(full_begin - run_begin, BLOCK_N)
    in_run = left + tl.cdiv(run_end - full_end, BLOCK_N)
    o_run = tl.where(i < left, run_begin + i * BLOCK_N, full_end + (i - left) * BLOCK_N) + o_block
    o_list = masked_begin + (i - in_run) * BLOCK_N + o_block
    m_list = o_list < tl.where(i < in_run, masked_begin - in_run * BLOCK_N, list_end)
    o_listed = tl.load(list_keys_ptr + o_list, mask=m_list, other=0)
    m_list &= (o_listed < run_begin) | (o_listed >= run_end)
    m_run = o_run < tl.where(i < in_run, tl.where(i < left, full_begin, run_end), run_begin)
    return tl.where(i < in_run, o_run, o_listed), m_run | m_list


@triton.jit
def visible(b_query_index, b_start, b_end):
    """Whether `start <= index < end`, by one comparison an element: of `index - start` with the range's length, unsigned.

    Where the index is before the start, the difference wraps round to more than any length: `end - index` is below `2 ** 32`.
    """
    b_length = tl.where(b_end > b_start, b_end - b_start, 0)
    return (b_query_index - b_start).to(tl.uint32, bitcast=True) < b_length.to(tl.uint32, bitcast=True)


@triton.jit
def tanh(x):
    """From the exponential, and near 0, where its difference with 1 cancels, from the Taylor series."""
    magnitude = tl.abs(x)
    decay = tl.exp2(magnitude * (-2 * LOG2E))
    square = x * x
    series = 62 / 2835 - square * (1382 / 155925)
    series = -17 / 315 + square * series
    series = 2 / 15 + square * series
    series = 1 + square * (-1 / 3 + square * series)
    large = (1 - decay) / (1 + decay)
    return tl.where(magnitude < 0.3, x * series, tl.where(x < 0, -large, large))


@triton.jit
def base2_logits(
    products,
    b_query_index,
    b_key_index,
    b_slopes,
    b_bias,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Logits times log2(e), without the mask; and the tanh of the softcap, for its gradient (else `products`)."""
    if HAS_SOFTCAP:
        b_tanh = tanh(products * (scale / softcap))
        logits = b_tanh * (softcap * LOG2E)
    else:
        b_tanh = products
        logits = products * (scale * LOG2E)
    if HAS_BIAS:
        logits += b_bias * LOG2E
    if HAS_ALIBI:
        logits -= b_slopes * LOG2E * tl.abs(b_query_index - b_key_index).to(tl.float32)
    return logits, b_tanh
