"""The value of an index expression, as tensors: in a graph that is traced, or for a check."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from collections.abc import Mapping

import torch
from rewriter.kernels import FOREVER
from rewriter.kernels import running_topk_ranges
from rewriter.passes.masks.expression import Apply
from rewriter.passes.masks.expression import Axis
from rewriter.passes.masks.expression import Const
from rewriter.passes.masks.expression import Element
from rewriter.passes.masks.expression import Expression
from rewriter.passes.masks.expression import Size
from rewriter.passes.masks.expression import substitute
from rewriter.passes.masks.intervals import BATCH
from rewriter.passes.masks.intervals import HEAD
from rewriter.passes.masks.intervals import KEY
from rewriter.passes.masks.intervals import LARGEST
from rewriter.passes.masks.intervals import PLACE
from torch import Tensor
from torch.fx import Node


def materialize(expression: Expression, env: Mapping[Node, object], axes: Mapping[int, Tensor]) -> Tensor:
    """The expression's value over a grid.

    Args:
        env: values of the data nodes and symbolic sizes.
        axes: index tensors that broadcast to the grid, the key's along the last dimension; 0 for axes left out.
    """

    def value(e: Expression) -> Tensor:
        if isinstance(e, Const):
            fits = not isinstance(e.value, float) or not abs(e.value) < math.inf or abs(e.value) <= _LARGEST_FP32
            return torch.full((), e.value, dtype=_DTYPES[type(e.value)] if fits else torch.float64)
        if isinstance(e, Size):
            return torch.full((), env[e.node], dtype=torch.int64)  # type: ignore[call-overload]
        if isinstance(e, Axis):
            return axes[e.dim] if e.dim in axes else torch.full((), 0, dtype=torch.int64)
        if isinstance(e, Element):
            tensor = env[e.node]
            assert isinstance(tensor, Tensor)
            # Constant indices select, from the last dimension on: a traced index of no dimensions would be read as a number.
            places = [substitute(i, {KEY: Axis(PLACE)}) if PLACE in axes else i for i in e.indices]
            for dim in reversed(range(len(places))):
                if isinstance(place := places[dim], Const):
                    tensor = tensor.select(dim, int(place.value))
                    del places[dim]
            return tensor[tuple(torch.atleast_1d(value(place)) for place in places)] if places else tensor
        assert isinstance(e, Apply)
        if e.name == "cast":
            return value(e.args[0]).to(e.args[1].dtype)  # type: ignore[attr-defined]
        if e.name in ("add", "mul"):  # a number among the operands keeps its precision, and leaves them their type
            return _OPERATIONS[e.name](*(a.value if isinstance(a, Const) else value(a) for a in e.args))
        if e.name in ("document_start", "document_end"):
            return _document_bound(e.args[0], env, right=e.name == "document_end")
        if e.name == "running_topk_end":
            score, keep, segment = e.args
            assert isinstance(keep, Const)
            scores, segments = (_vector(value(part), axes) for part in (score, segment))
            return running_topk_ranges(scores, int(keep.value), segment=segments.to(torch.int32)).end
        return _OPERATIONS[e.name](*(value(a) for a in e.args))

    return value(expression)


def _document_bound(document: Expression, env: Mapping[Node, object], *, right: bool) -> Tensor:
    """`[B, 1, K]`: where the run of a key's document begins or ends. Document ids are `[..., K]`, non-decreasing."""
    assert isinstance(document, Element)
    ids = env[document.node]
    assert isinstance(ids, Tensor)
    ids = ids.reshape(-1, ids.size(-1)).contiguous()
    return torch.searchsorted(ids, ids, right=right)[:, None, :]


_LARGEST_FP32 = torch.finfo(torch.float32).max


_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float32}


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": operator.add,
    "mul": operator.mul,
    "floordiv": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "quotient": lambda m, n: torch.div(m, n, rounding_mode="floor"),
    "remainder": torch.remainder,
    "join": lambda i, j, n: i * n + j,
    "abs": torch.abs,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "where": torch.where,
    "number": lambda x: x.to(torch.int64),
    "max": torch.maximum,
    "min": torch.minimum,
}


def key_grid(
    num_batch: int, num_heads: int, num_keys: int, device: torch.device, first: Tensor | None = None
) -> dict[int, Tensor]:
    """The indices of all keys, for `key_bounds` and `bias_tensor`.

    Args:
        first: integer `[1]`, the index of the first key where a call continues a text; what a call is given has its own
            places, from 0 on.
    """
    place = torch.arange(num_keys, device=device)[None, None, :]
    grid = {
        BATCH: torch.arange(num_batch, device=device)[:, None, None],
        HEAD: torch.arange(num_heads, device=device)[None, :, None],
        KEY: place if first is None else place + first,
    }
    return grid if first is None else {**grid, PLACE: place}


def key_bounds(expression: Expression, env: Mapping[Node, object], grid: Mapping[int, Tensor]) -> Tensor:
    """A start, end or segment of an `Interval`: int32 `[B|1, Hkv|1, K]`, in row space."""
    value = _vector(materialize(expression, env, grid), grid)
    if _is_data(expression):
        value = torch.where(value > LARGEST, FOREVER, torch.where(value < -LARGEST, -LARGEST, value))
    return value.to(torch.int32)


def _is_data(expression: Expression) -> bool:
    """Whether an integer's value, and not only the choice between values, is data."""
    if isinstance(expression, Apply):
        values = expression.args[1:] if expression.name == "where" else expression.args
        return expression.name not in _BOUNDED and any(_is_data(a) for a in values)
    return isinstance(expression, Element)


_BOUNDED = ("document_start", "document_end", "running_topk_end")


def bias_tensor(bias: Expression, env: Mapping[Node, object], grid: Mapping[int, Tensor]) -> Tensor:
    """The key bias `[B|1, Hkv|1, K]`; fp32 where it is made from integers."""
    value = _vector(materialize(bias, env, grid), grid)
    return value if value.is_floating_point() else value.float()


def _vector(value: Tensor, grid: Mapping[int, Tensor]) -> Tensor:
    """`[B|1, Hkv|1, K]` of what was computed over a key grid."""
    value = value.to(grid[KEY].device)
    value = value[(None,) * (3 - value.dim())]
    return value.expand(*value.shape[:2], grid[KEY].size(-1))
